"""Tables as text. Flags say how one is written; what they leave open is guessed from its first lines, and said."""

from __future__ import annotations

import argparse
import codecs
import csv
import io
import itertools
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np

from hpc_bnn.errors import DataError

logger = logging.getLogger(__name__)  # on the first rank alone

SEPARATORS = {"tab": "\t", "semicolon": ";", "comma": ",", "pipe": "|", "whitespace": r"\s+"}
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""First line that Excel reads."""
NO_TEXT = (b"PK", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"PAR1", b"\xd0\xcf\x11\xe0", b"\x89HDF")
"""How archives, spreadsheets and other binary files begin."""
NUM_BYTES, NUM_ROWS = 2**20, 1000
"""What a guess looks at."""
MISSING = {
    "",
    "?",
    "--",
    "#N/A",
    "#NA",
    "<NA>",
    "N/A",
    "NA",
    "NULL",
    "NaN",
    "None",
    "n/a",
    "nan",
    "null",
    "-nan",
    "-NaN",
}
"""Words that stand for a missing value: "?", "--" (which argparse does not take), and those of pandas."""

MINUS = "\u2212"
"""The minus of typesetters."""


def _number_with(decimal: str, thousands: str | None) -> re.Pattern[str]:
    """Return the pattern of a number in these signs; thousands are groups of three digits, or have no sign."""
    digits = r"\d+" if thousands is None else rf"(\d{{1,3}}({_sign(thousands)}\d{{3}})+|\d+)"
    point = re.escape(decimal)
    number = rf"({digits}({point}\d*)?|{point}\d+)(e[+\-{MINUS}]?\d+)?|inf(inity)?"
    return re.compile(rf"[+\-{MINUS}]?({number})", re.IGNORECASE)


def _sign(thousands: str) -> str:
    """Return the pattern of a sign between thousands: a blank is any blank, narrow and unbroken ones too."""
    return r"\s" if thousands.isspace() else re.escape(thousands)


NUMBER = _number_with(".", None)
DIGITS = re.compile(rf"[+\-{MINUS}]?[\d.,'\s]*\d[\d.,'\s]*([eEdD][+\-{MINUS}]?\d+)?%?")
NUMBER_IN_DISGUISE = re.compile(
    rf"\W*{DIGITS.pattern}(\W\D*|\s+[^\W\d].*|\s*°.*)?|\W*\d+[.,]\d+\D+|[A-Z]{{1,3}}(\$\s*|(?<=[A-Z]{{3}})\s+){DIGITS.pattern}"
)
"""Such as $1.00, EUR 1.00, 1.00D+01, 1 000, (1.00), 1.0-, 5 kg, 5 W/m2, 5°30' and 1.0kg; not A1, 12a, 18-25 or Zone 3."""
GROUPS = re.compile(rf"[+\-{MINUS}]?[1-9]\d{{0,2}}[.,]\d{{3}}")
"""A group of thousands, or a number with three decimals."""


@dataclass(frozen=True)
class Format:
    """How a table is written."""

    encoding: str
    separator: str
    """A word of `SEPARATORS`."""
    decimal: str
    thousands: str | None
    header: bool
    """Whether the first row holds the names of the columns."""
    width: int
    """Fields in a row."""
    num_seen: int
    """Rows that this was found from."""
    num_skipped: int
    """Lines above the table."""
    names: tuple[str, ...]
    """Of the columns; fewer than the fields where each row ends with a separator."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a table is written."""
    add = parser.add_argument
    add("--separator", choices=SEPARATORS, help="of the fields (default: the one that all lines have equally often)")
    add(
        "--header",
        action=argparse.BooleanOptionalAction,
        help="whether the first line holds the names of the columns (default: guessed where the lines below leave no doubt)",
    )
    add("--skip-lines", type=int, default=0, metavar="N", help="lines above the table (default: %(default)s)")
    add("--decimal", choices=[".", ","], help="sign of numbers (default: as the first lines have it)")
    add("--thousands", metavar="SIGN", help="between groups of digits, or none (default: as the first lines have it)")
    add("--encoding", metavar="NAME", help="of the text, such as cp1252 (default: by its mark, otherwise utf-8)")
    add(
        "--missing-words",
        nargs="+",
        default=[],
        metavar="WORD",
        help="fields that stand for a missing value, such as - n/e -9999, besides empty ones, ?, --, NA, NaN and the like",
    )


def read_table(
    options: argparse.Namespace, form: Format, texts: Collection[str] = (), only: Collection[str] | None = None
):
    """Return the source, or ``only`` some columns, as a table of pandas; columns in ``texts`` stay as they stand."""
    try:
        import pandas
    except ImportError as error:
        raise DataError("tables are read by pandas: pip install 'hpc_bnn[data]'") from error
    path = options.source
    table = _read_csv(options, form, usecols=only, dtype=dict.fromkeys(texts, str))
    if len(table) == 0:
        raise DataError(f"--source {path}: it has no rows below the header. Give --no-header if it has none")
    large = [name for name in table if _is_large(table[name])]
    for name, column in _read_csv(options, form, usecols=large, dtype=str).items() if large else ():
        if table[name].dtype == object or any(map(_is_rounded, column.dropna())):
            table[name] = column
    for name in table.select_dtypes(["object", "string"]):
        if table[name].astype(str).str.contains(r"[\r\n]").any():
            _check_quotes(path, form)
        if pandas.api.types.infer_dtype(table[name], skipna=True) == "boolean":  # beside empty fields
            table[name] = table[name].astype(float)
            continue
        column = table[name].str.strip()
        column = column.mask(column.isin(MISSING.union(options.missing_words)))
        table[name] = column if name in texts else as_numbers(column, form)
    marks = pandas.to_numeric(pandas.Series(options.missing_words, dtype=object), errors="coerce").dropna()
    for name in table.select_dtypes("number") if len(marks) else ():
        table[name] = table[name].mask(table[name].isin(marks))  # pandas overlooks those before a blank
    if options.thousands is None and len(table) >= form.num_seen:
        # the rows that were seen told nothing of the sign
        whole = [n for n in table.select_dtypes("float") if (table[n].iloc[: form.num_seen].dropna() % 1 == 0).all()]
        for _, column in _read_csv(options, form, usecols=whole, dtype=str).items() if whole else ():
            _check_groups(path, column.dropna().str.strip(), form.decimal, form.separator)
    return _without_nameless(path, table, form).replace([np.inf, -np.inf], np.nan)


def _read_csv(options: argparse.Namespace, form: Format, **how):
    """Return what pandas reads; ``how`` goes to it."""
    import pandas

    path = options.source
    names = [*form.names, *(f"\0{number}" for number in range(len(form.names), form.width))]
    too_long = pandas.errors.ParserWarning  # rows of more fields than the first
    exact = {} if int(pandas.__version__.partition(".")[0]) >= 3 else {"float_precision": "round_trip"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", too_long)
            return pandas.read_csv(
                path, sep=SEPARATORS[form.separator], encoding=form.encoding, decimal=form.decimal,
                skiprows=form.num_skipped, header=0 if form.header else None, names=names,
                index_col=False, skipinitialspace=True, na_values=["?", "--", *options.missing_words],
                compression=None, low_memory=False, **exact, **how,
            )  # fmt: skip
    except (OSError, ValueError, LookupError, too_long) as error:
        raise _unreadable(
            path, str(error), "Say how it is written by --separator, --encoding or --skip-lines"
        ) from error


def _check_quotes(path: Path, form: Format) -> None:
    """Raise `DataError` where a quote is not around a field: pandas takes all rows up to the next quote for one field."""
    sign = " " if form.separator == "whitespace" else SEPARATORS[form.separator]
    with open(path, encoding=form.encoding, newline="") as file:
        rows = csv.reader(
            itertools.islice(file, form.num_skipped, None), delimiter=sign, skipinitialspace=True, strict=True
        )
        try:
            for _ in rows:
                pass
        except csv.Error as error:
            rule = f"a quote opens in a line before line {form.num_skipped + rows.line_num} and ends inside of a field"
            raise _unreadable(path, rule, "Double each quote that is part of a text, or remove it") from error


def as_numbers(column, form: Format):
    """Return a column of texts as numbers where each field is one in the signs of the table, otherwise as it is."""
    import pandas

    if not all(map(_number_with(form.decimal, form.thousands).fullmatch, column.dropna())):
        return column
    sign = _sign(form.thousands or "\0")
    plain = column.map(
        lambda field: _in_ascii(re.sub(sign, "", field).replace(form.decimal, ".").replace(MINUS, "-")),
        na_action="ignore",
    )
    return column if any(map(_is_rounded, plain.dropna())) else pandas.to_numeric(plain)


def _in_ascii(number: str) -> str:
    """Return a number with the digits of ASCII: those of other scripts, and wide ones, are digits, too."""
    return number if number.isascii() else re.sub(r"\d", lambda digit: str(int(digit[0])), number)


def _is_large(column) -> bool:
    """Whether a column holds numbers that float64 may round."""
    import pandas

    is_object = column.dtype == object and pandas.api.types.infer_dtype(column, skipna=True) == "integer"
    return is_object or bool(column.dtype.kind in "iuf" and not column.dropna().between(-(2**53), 2**53).all())


def _is_rounded(text: str) -> bool:
    """Whether a text is a whole number that float64 would round."""
    return len(text) > 15 and re.fullmatch(r"\s*[+-]?\d+\s*", text) is not None and int(text) != float(text)


def _without_nameless(path: Path, table, form: Format):
    """Leave out columns without a name that hold nothing, or the numbers of the rows."""
    nameless = [name for name in table if name.startswith(("\0", "column "))]
    empty = [name for name in nameless if table[name].isna().all()]
    for name in nameless:
        if name.startswith("\0") and name not in empty:
            rule = f"rows have {form.width} fields, and the first one {len(form.names)}"
            raise _unreadable(path, rule, "Look at the --separator, and give each column a name")
    steps = {name: set(np.diff(table[name])) for name in nameless if table[name].dtype.kind == "i"}
    numbering = [name for name, step in steps.items() if step == {1}]
    for name in numbering:
        logger.warning("%s: %s has no name and counts the rows: left out", path, name)
    return table.drop(columns=empty + numbering)


def find_column(flag: str, given: str, columns: list[str]) -> str:
    """Return the name of a column that is given by name or number."""
    if given in columns:
        return given
    number = int(given) if given.removeprefix("-").isdecimal() else len(columns)
    rule, there = f"no such column of {len(columns)}", f"Choose of {', '.join(columns)}"
    common.check(flag, given, -len(columns) <= number < len(columns), rule, there)
    return columns[number]


def check_words(column, remedy: str) -> None:
    """Raise `DataError` where a column of words of pandas holds numbers as well, or numbers that were not read as such."""
    words = column.dropna()
    is_number = words.astype(str).map(lambda word: NUMBER.fullmatch(word) is not None)
    where = f"--source: column '{column.name}' holds"
    rounded = words[words.astype(str).map(_is_rounded)]
    if is_number.all() and len(rounded):
        raise DataError(
            f"{where} '{rounded.iloc[0]}' in data row {rounded.index[0] + 1}, a whole number above 2**53, which "
            f"float64 would round. Leave out the column; tabular.py keeps it by --coordinates '{column.name}'{remedy}"
        )
    if is_number.any() and not is_number.all():
        word = words[~is_number]
        raise DataError(
            f"{where} numbers, and '{word.iloc[0]}' in data row {word.index[0] + 1}, which is none ({len(word)} such "
            "values in all). If it is one, say how by --decimal and --thousands, or remove its signs; if it stands for "
            f"a missing value give --missing-words='{word.iloc[0]}', if it is the name of the column --header{remedy}"
        )
    looks_so = words.astype(str).map(lambda word: NUMBER_IN_DISGUISE.fullmatch(word) is not None)
    hidden, others = words[looks_so], words[~looks_so]
    if len(hidden) > len(words) / 2:
        other = next(iter(others), None)
        marks = "" if other is None else f"; if '{other}' stands for a missing value give --missing-words='{other}'"
        raise DataError(
            f"{where} '{hidden.iloc[0]}' in data row {hidden.index[0] + 1}, which looks like a number, or several, and "
            "was read as a word. Say how all numbers are written by --decimal and --thousands, and what divides the "
            "fields by --separator; remove signs such as % and units from the file, or leave out the column"
            f"{marks}{remedy}"
        )


def say_outliers(column) -> None:
    """Warn where the extreme value of a column of numbers lies far from all others, again and again."""
    values, counts = np.unique(column.dropna(), return_counts=True)
    if len(values) < 4:
        return
    for extreme, count, others in ((values[0], counts[0], values[1:]), (values[-1], counts[-1], values[:-1])):
        if count > 1 and np.abs(extreme - others).min() > 3 * np.ptp(others):
            logger.warning(
                "column '%s' is %g in %d rows, far from all other values: if that stands for a missing value, give "
                "--missing-words=%g", column.name, extreme, count, extreme,
            )  # fmt: skip


# --- how a table is written ----------------------------------------------------------------------------


def find_format(options: argparse.Namespace) -> Format:
    """Return how the source is written, as the flags say, or as its first lines tell."""
    path = options.source
    encoding, text, is_whole = _decode(path, options.encoding)
    lines = list(io.StringIO(text, newline=None))[options.skip_lines :]
    said = SEPARATOR_LINE.fullmatch(lines[0]) if lines else None
    stated = said and next((word for word, sign in SEPARATORS.items() if sign == said[1]), None)
    lines = lines[1:] if stated else lines
    num_skipped = options.skip_lines + bool(stated)
    if not "".join(lines).strip():
        raise _unreadable(path, "it is empty", "Look at --skip-lines")
    separator = (
        options.separator
        or stated
        or _guess_separator(path, {word: _rows_of(lines, word, is_whole) for word in SEPARATORS})
    )
    table = _rows_of(lines, separator, is_whole, strict=False)
    width = max(map(len, table))
    if width == 1:
        raise _unreadable(path, f"by {separator} each line is one field", "Give the --separator")
    if table[0][0].startswith("#") and options.header is None:
        rule = f"its first line, '{lines[0].strip()}', looks like a comment"
        raise _unreadable(path, rule, "Give --skip-lines, the number of such lines, or remove the #")
    decimal, thousands = _guess_signs(options, separator, table)
    number = _NumberIn(_number_with(decimal, thousands), {*MISSING, *options.missing_words})
    header = _guess_header(path, table, number) if options.header is None else options.header
    ends_empty = all(len(row) == width and not row[-1] for row in table)
    names = tuple(_names(path, table[0])) if header else tuple(map(str, range(len(table[0]) - ends_empty)))
    found = Format(encoding, separator, decimal, thousands, header, width, len(table), num_skipped, names)
    guesses = {
        "separator": f"the separator {separator}"
        + (f", as its first line says, '{said[0].strip()}'" if stated else ""),
        "decimal": f"numbers with '{decimal}'" + (f" and '{thousands}' between thousands" if thousands else ""),
        "encoding": encoding.removesuffix("-sig"),
        "header": f"the first line {'has the names of the columns' if header else 'is data'}",
    }
    open_ = {flag: what for flag, what in guesses.items() if getattr(options, flag) is None}
    if open_:
        flags = ", ".join(f"--{flag}" for flag in open_)
        logger.info("%s is read with these guesses: %s. The flags are %s", path, ", ".join(open_.values()), flags)
    return found


def _unreadable(path: Path, rule: str, remedy: str) -> DataError:
    return DataError(f"--source {path}: it cannot be read as a table ({rule}). {remedy}")


def _decode(path: Path, given: str | None) -> tuple[str, str, bool]:
    """Return the encoding of a file, its first characters, and whether they are all."""
    try:
        with open(path, "rb") as file:
            content, is_whole = file.read(NUM_BYTES), not file.read(1)
        if content.startswith(NO_TEXT):
            raise _unreadable(path, "it is an archive or a spreadsheet, no text", "Unpack it, or export it as CSV")
        mark = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
        encoding = given or mark
        "".encode(encoding)  # LookupError where it is no encoding of text, such as hex
        if mark != "utf-8" and codecs.lookup(encoding).name.startswith(mark.removesuffix("-sig")):
            encoding = mark  # utf-16-le keeps the mark in the first name
        text = codecs.getincrementaldecoder(encoding)().decode(content, final=is_whole)
    except OSError as error:
        raise _unreadable(path, str(error), "Name a file") from error
    except (UnicodeError, LookupError) as error:
        remedy = "Give its --encoding, such as cp1252, latin-1 or utf-16"
        raise _unreadable(path, str(error), remedy) from error
    if "\0" in text:
        raise _unreadable(path, f"it holds zeros as {encoding}", "Give its --encoding, such as utf-16-le")
    return encoding, text, is_whole


def _rows_of(lines: list[str], separator: str, is_whole: bool, *, strict: bool = True) -> list[list[str]]:
    """Return the fields of the first rows, without empty lines; none where quotes are not around fields."""
    sign = SEPARATORS[separator]
    if separator == "whitespace":
        sign, lines = " ", [f"{line.strip().expandtabs(1)}\n" for line in lines]
    reader = csv.reader(io.StringIO("".join(lines), newline=""), delimiter=sign, skipinitialspace=True, strict=strict)
    found: list[list[str]] = []
    try:
        for row in reader:
            found += [[field.strip() for field in row]] if any(row) else []
            if len(found) == NUM_ROWS:
                return found
    except csv.Error:
        return []
    return found if is_whole else found[:-1]


def _guess_separator(path: Path, rows: dict[str, list[list[str]]]) -> str:
    """Return the separator that divides each row into as many fields, two or more."""
    if path.suffix in (".tsv", ".tab"):
        return "tab"
    even = {}
    for word, table in rows.items():
        counts = {len(row) for row in table}
        if _ends_with_separator(table):
            counts = {len(table[0])}
        if len(counts) == 1 and max(counts) > 1:
            even[word] = counts.pop()
    remedy = "Give the --separator"
    signs = [word for word in even if word != "whitespace"]
    if len(signs) > 1:
        fields = [field for row in rows["semicolon"] for field in row] if set(signs) == {"semicolon", "comma"} else [""]
        if not all("," not in field or DIGITS.fullmatch(field) for field in fields) or fields == [""]:
            raise _unreadable(path, f"{' and '.join(signs)} divide each line evenly", remedy)
        return "semicolon"  # the commas are those of numbers
    if signs:
        word = signs[0]
        several = re.compile(rf"({NUMBER.pattern})(\s+({NUMBER.pattern}))+", re.IGNORECASE)
        if "whitespace" in even and any(several.fullmatch(field) for row in rows[word] for field in row):
            return "whitespace"  # such as a tab before the last field, and blanks elsewhere
        return word
    if even:
        return "whitespace"
    counts = {word: Counter(map(len, table)) for word, table in rows.items()}
    usual = {word: count.most_common(1)[0][0] for word, count in counts.items() if count}
    likely = [
        word for word in usual if usual[word] > 1 and (word != "whitespace" or max(usual.values()) == usual[word])
    ]
    if not likely:
        return "comma"  # one column
    word = likely[0]
    odd = next(row for row in rows[word] if len(row) != usual[word])
    rule = f"by {word} most lines have {usual[word]} fields, and '{' '.join(odd)[:60]}' has {len(odd)}"
    raise _unreadable(
        path, rule, f"{remedy}, or --skip-lines, the number of lines above the table; quote words that hold it"
    )


def _ends_with_separator(table: list[list[str]]) -> bool:
    """Whether all rows but the first end with a separator."""
    return len(table) > 1 and all(len(row) == len(table[0]) + 1 and not row[-1] for row in table[1:])


def _guess_signs(options: argparse.Namespace, separator: str, table: list[list[str]]) -> tuple[str, str | None]:
    """Return the signs of decimals and of thousands."""
    decimal, thousands = options.decimal, options.thousands
    given = None if thousands in (None, "none") else thousands
    if given is not None:
        common.check(
            "--thousands", given, len(given) == 1 and given != decimal, "one sign, not that of decimals", "Try ,"
        )
    if decimal is not None and thousands is not None:
        return decimal, given
    columns = list(zip(*(row for row in table[1:] if len(row) == len(table[0])))) or [()]
    fields = [re.sub(rf"e[+\-{MINUS}]?\d+$", "", field, flags=re.I) for column in columns for field in column]

    def some(pattern: str) -> str | None:
        return next((field for field in fields if re.fullmatch(pattern, field)), None)

    group = rf"[+\-{MINUS}]?\d{{1,3}}"
    for point, comma in ((".", ","), (",", ".")):
        if some(rf"{group}(\{comma}\d{{3}})+\{point}\d+|{group}(\{comma}\d{{3}}){{2,}}") and decimal in (None, point):
            return point, comma if thousands is None else given
    digits = rf"({group}(['\s]\d{{3}})+|[+\-{MINUS}]?\d*)"
    with_comma, with_point = some(rf"{digits},\d+"), some(rf"{digits}\.\d+")
    if decimal is None and with_comma and with_point:
        rule = f"it holds '{with_comma}' and '{with_point}'"
        raise _unreadable(options.source, rule, "Give the sign of --decimal, and that between --thousands or none")
    if decimal is None:
        decimal = "," if given == "." or (with_comma and given != ",") else "."
    for column in columns if thousands is None else ():
        _check_groups(options.source, column, decimal, separator)
    return decimal, given


def _check_groups(path: Path, column: Iterable[str], decimal: str, separator: str) -> None:
    """Raise `DataError` where the sign of decimals in a column may be that of thousands."""
    # 950, 1.234: thousands. Decimals would be 950.000, or not always three
    marked = {field for field in column if decimal in field}
    whole = any(re.fullmatch(r"[+-]?\d{1,3}", field) for field in column)
    is_grouped = len(marked) > 0 and all(map(GROUPS.fullmatch, marked))
    if is_grouped and (decimal == "," or separator == "semicolon" or (whole and len(marked) > 1)):
        rule = f"'{min(marked)}' may be a number with decimals, or of thousands"
        raise _unreadable(path, rule, f"Give --thousands '{decimal}', or --thousands none")


@dataclass(frozen=True)
class _NumberIn:
    """Tells numbers from words, as they are written in a table."""

    pattern: re.Pattern[str]
    missing: set[str]

    def __call__(self, field: str) -> bool:
        return self.pattern.fullmatch(field) is not None


def _guess_header(path: Path, table: list[list[str]], number: _NumberIn) -> bool:
    """Return whether the first row holds names; `DataError` where the rows below leave a doubt."""
    first, below = table[0], table[1:]
    if not below:
        return True
    columns = [[row[k] for row in below if k < len(row) and row[k] not in number.missing] for k in range(len(first))]
    pairs = [(field, column) for field, column in zip(first, columns) if field not in number.missing]
    numbers = [(field, column) for field, column in pairs if number(field)]
    words = [(field, column) for field, column in pairs if not number(field)]
    above_numbers = any(sum(map(number, column)) > len(column) / 2 for _, column in words)
    recurs = any(field in column for field, column in words)
    if above_numbers and not numbers:
        return True
    if not above_numbers and recurs:
        return False
    if not numbers:
        few = all(len(set(column)) <= len(column) / 2 for _, column in words)
        if few and len(below) > 5:
            return True
    elif not above_numbers and not _may_name(numbers, number, below):
        return False
    text = " ".join(first)
    rule = f"its first line, '{text[:60]}', may hold the names of the columns or be data"
    raise _unreadable(path, rule, "Give --header or --no-header")


def _may_name(numbers: list[tuple[str, list[str]]], number: _NumberIn, below: list[list[str]]) -> bool:
    """Whether numbers in the first row may be names, such as 0, 1, 2 or years."""

    def is_regular(fields: list[str]) -> bool:
        steps = {int(b) - int(a) for a, b in itertools.pairwise(fields)} if all(map(str.isdecimal, fields)) else {0}
        return min(steps, default=1) > 0 and (len(steps) == 1 or not fields[1:])

    names = [field for field, _ in numbers]
    has_fractions = any(
        number(field) and not field.lstrip("+-").isdecimal() for _, column in numbers for field in column
    )
    follows = [field for field in below[0] if number(field)]
    is_like_the_next = len(follows) == len(names) and is_regular(follows)
    return is_regular(names) and (has_fractions or len(names) > 2) and not is_like_the_next


def _names(path: Path, row: list[str]) -> list[str]:
    """Return names of columns; a number where there is none."""
    names = [name or f"column {number}" for number, name in enumerate(row)]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise _unreadable(
            path, f"two columns are named '{twice}'", "Rename one, or give --no-header and --skip-lines 1"
        )
    return names
