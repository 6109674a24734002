"""data_prep/tables.py: text as people have it is read right, or refused with the flag that says how it is written."""

import contextlib
import itertools
import logging
import re

import numpy as np
import pandas
import pytest
import tables
import tabular
import timeseries
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_bnn.errors import ConfigError, DataError, HpcBnnError

ROWS = 30
SIGNS = {"tab": "\t", "semicolon": ";", "comma": ",", "pipe": "|", "whitespace": "  "}


def read(path, *flags, script=tabular, required=("--target", "-1")):
    """Read a table by its flags, without writing shards."""
    words = ["--source", str(path), "--output", "none", *required, *map(str, flags)]
    options = script.make_parser().parse_args(words)
    return tables.read_table(options, tables.find_format(options))


def in_digits(value, decimal, thousands):
    """Return a number as text, in some signs."""
    text = f"{value:,.2f}" if thousands else f"{value:.2f}"
    return text.translate({ord(","): thousands or "", ord("."): decimal})


class Dialect:
    """A table of two columns of numbers and one of words, and how it is written."""

    def __init__(self, data):
        draw = data.draw
        self.separator = draw(st.sampled_from(list(SIGNS)))
        self.encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252", "latin-1", "utf-16-le"]))
        self.decimal = draw(st.sampled_from(".,"))
        others = [None, "." if self.decimal == "," else ","]
        self.thousands = draw(st.sampled_from(others))
        self.header = draw(st.booleans())
        self.skipped = draw(st.sampled_from([0, 0, 0, 2]))
        self.ends_with_separator = self.separator != "whitespace" and draw(st.booleans())
        self.quotes = draw(st.booleans())
        newline = draw(st.sampled_from(["\n", "\r\n"]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        size = draw(st.sampled_from([1.0, 100.0, 1e5]))
        self.numbers = np.round(rng.normal(size=(ROWS, 2)) * size, 2)
        word = draw(st.sampled_from(["{}", "{} mit Rest", "Größe {}", "{}, {}", "{}; {}", "tab\t{}"]))
        self.words = [word.format(*rng.choice(["rot", "grün", "blau"], 2)) for _ in range(ROWS)]
        sign = SIGNS[self.separator]
        cells = [
            [*(in_digits(v, self.decimal, self.thousands) for v in row), w] for row, w in zip(self.numbers, self.words)
        ]
        cells = ([["höhe", "tiefe", "farbe"]] if self.header else []) + cells
        lines = [
            sign.join(self.quoted(cell, sign) for cell in row) + sign.strip() * self.ends_with_separator
            for row in cells
        ]
        lines = ["Station: X", "exported by hand"][: self.skipped] + lines
        self.content = (newline.join(lines) + newline).encode(self.encoding)

    def quoted(self, cell, sign):
        needs = (
            self.quotes or sign.strip(" ") in cell or (self.separator == "whitespace" and " " in cell) or "\t" in cell
        )
        return f'"{cell}"' if needs else cell

    @property
    def flags(self):
        """The flags that say it."""
        flags = ["--separator", self.separator, "--decimal", self.decimal, "--thousands", self.thousands or "none"]
        flags += ["--encoding", self.encoding, "--header" if self.header else "--no-header"]
        return [*flags, "--skip-lines", str(self.skipped)]

    def is_right(self, table):
        """Whether a table is the one that was written."""
        names = ["höhe", "tiefe", "farbe"] if self.header else ["0", "1", "2"]
        words = [" ".join(word.split()) for word in self.words]
        found = [" ".join(str(word).split()) for word in table.iloc[:, 2]]
        return list(table) == names and np.array_equal(table.iloc[:, :2].to_numpy(), self.numbers) and found == words


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_table_is_read_right_or_the_flag_that_is_needed_is_named(data, tmp_path_factory):
    dialect = Dialect(data)
    path = tmp_path_factory.getbasetemp() / "dialect.txt"
    path.write_bytes(dialect.content)
    try:
        assert dialect.is_right(read(path))
    except HpcBnnError as error:
        assert "--" in str(error).partition(str(path))[2], error
    assert dialect.is_right(read(path, *dialect.flags))


NAMES = {
    "words": ["age", "size", "weight", "kind"],
    "years": ["country", "2001", "2002", "2003"],
    "numbers": ["0", "1", "2", "3"],
    "index": ["", "0", "1", "2"],
}
BODIES = {
    "numbers": lambda rng: [f"{v:.1f}" for v in rng.normal(size=4)],
    "whole numbers": lambda rng: list(map(str, rng.integers(0, 50, 4))),
    "numbers and words": lambda rng: [*(f"{v:.1f}" for v in rng.normal(size=3)), str(rng.choice(["x", "o"]))],
    "words": lambda rng: [str(rng.choice(list(kinds))) for kinds in ("xob", "xo", "bo", ("yes", "no"))],
    "a word first": lambda rng: [str(rng.choice(["DE", "FR"])), *(f"{v:.1f}" for v in rng.normal(size=3))],
    "all words differ": lambda rng: [f"w{v}" for v in rng.integers(0, 10**9, 4)],
    "missing values": lambda rng: [str(rng.choice(["?", "--", "1.5", "2.5"])) for _ in range(4)],
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("names", [None, *NAMES])
def test_a_header_is_told_from_data_or_asked_for(tmp_path, names, kind, seed):
    rng = np.random.default_rng(seed)
    rows = [BODIES[kind](rng) for _ in range(40)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(map(",".join, ([NAMES[names]] if names else []) + rows)))
    flag = "--header" if names else "--no-header"
    right = read(path, flag)
    assert len(right) == 40
    try:
        pandas.testing.assert_frame_equal(read(path), right)
    except DataError as error:
        assert "--header or --no-header" in str(error)


def test_usual_tables_need_no_flag(tmp_path):
    """Of the kinds above, those that every reader of tables takes."""
    rng = np.random.default_rng(0)
    for kind, names in [(k, n) for k in BODIES for n in (None, "words")]:
        if (kind, names) in [("all words differ", None), ("all words differ", "words"), ("missing values", None)]:
            continue
        rows = [BODIES[kind](rng) for _ in range(40)]
        path = tmp_path / "t.csv"
        path.write_text("\n".join(map(",".join, ([NAMES[names]] if names else []) + rows)))
        assert len(read(path)) == 40


def test_what_is_guessed_is_said(tmp_path, caplog):
    path = tmp_path / "t.csv"
    path.write_text("a;b\n0,5;1\n1,5;2\n", encoding="utf-8-sig")
    with caplog.at_level(logging.INFO):
        read(path)
    for word in (
        "semicolon",
        "','",
        "utf-8",
        "first line has the names",
        "--separator, --decimal, --encoding, --header",
    ):
        assert word in caplog.text
    caplog.clear()
    flags = ("--separator", "semicolon", "--decimal", ",", "--encoding", "utf-8", "--header")
    with caplog.at_level(logging.INFO):
        read(path, *flags)
    assert not caplog.text


@pytest.mark.parametrize("separator", ["tab", "semicolon", "comma"])
@pytest.mark.parametrize("line, skipped", [("sep={}", 0), ('"sep={}"', 0), ("SEP={}", 0), ("a note\nsep={}", 1)])
def test_the_first_line_may_say_the_separator(tmp_path, caplog, separator, line, skipped):
    sign = SIGNS[separator]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([line.format(sign), *(sign.join(row) for row in (["a b", '"c;,d"'], *[["1", "2"]] * 9))]))
    with caplog.at_level(logging.INFO):
        table = read(path, "--skip-lines", skipped, "--header")
    assert table.shape == (9, 2) and f"the separator {separator}, as its first line says" in caplog.text


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,a,b\n1,2,3\n", "two columns are named 'a'"),
        ("# by a tool\na,b\n1,2\n3,4\n", "--skip-lines"),
        ("# a,b\n1,2\n3,4\n", "looks like a comment"),
        ("a;b,c\nx;y,z\nq;w,e\n", "semicolon and comma divide each line evenly"),
        ("a b\nr1 1 2\nr2 3 4\n", "--separator"),
        ("a,b\n1,2\n3,4\nSource: the office\n", "'Source: the office' has 1"),
        ("PK\x03\x04sheet", "export it as CSV"),
        ("a;b\n1.234;2\n900;3\n2.345;3\n", "--thousands '.'"),
        ('a,b\n"1,234",2\n"5,432",3\n', "--thousands ','"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="cannot be read as a table") as caught:
        read(tmp_path / "t.csv")
    assert words in str(caught.value)


@pytest.mark.parametrize("separator", SIGNS)
@pytest.mark.parametrize("how", ["open", "doubled", "of lines"])
def test_a_quote_that_is_not_around_a_field_loses_no_rows(tmp_path, separator, how):
    word = {"open": '"w{}', "doubled": '"""w{}"', "of lines": '"w\n{}"'}[how]
    rows = [[str(row), word.format(row) if row in (10, 19) else "w", str(row % 7)] for row in range(ROWS)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(SIGNS[separator].join(row) for row in [["a", "n", "y"], *rows]))
    flags = ("--separator", separator, "--header")
    if how == "open":  # pandas takes nine rows for one word
        with pytest.raises(DataError, match=r"a quote opens in a line before line 21 .* Double each quote"):
            read(path, *flags)
    else:
        assert len(read(path, *flags)) == ROWS


MARKS = ["-", "n/e", ".", "*", "missing", "k.A.", "-9999"]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_missing_values_are_asked_for_or_said(tmp_path, mark, caplog):
    rows = [f"{mark if row % 7 == 3 else row / 4},{row % 5 / 2}" for row in range(40)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a,b", *rows]))
    words = (f"--missing-words={mark}",)
    for script, flags in (
        (tabular, ("--target", "b")),
        (timeseries, ("--targets", "a", "--window", "2", "--horizon", "1")),
    ):
        assert read(path, *words, script=script, required=flags)["a"].isna().sum() == 6
        column = read(path, script=script, required=flags)["a"]
        if mark == "-9999":
            tables.say_outliers(column)
            assert "--missing-words=-9999" in caplog.text
        else:
            with pytest.raises(DataError, match=r"holds numbers, and '.*data row 4.*--missing-words"):
                tables.check_words(column, "")


@pytest.mark.parametrize("blank", [" ", "  ", "\t", "\xa0"])
@pytest.mark.parametrize(
    "kind, mark", [(kind, m) for kind in ("numbers", "words") for m in ("NA", "?", "null", "n/e", "-9999")]
)
def test_a_blank_after_a_field_hides_no_missing_value(tmp_path, kind, mark, blank):
    fields = [str(row / 4) if kind == "numbers" else "uvw"[row % 3] for row in range(40)]
    fields[3] = fields[17] = mark
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join(
            ["a,c,b", *(f"{field}{blank},{mark if row == 5 else row}{blank},{row}" for row, field in enumerate(fields))]
        )
    )
    table = read(path, "--header", "--separator", "comma", f"--missing-words={mark}")
    for name, missing in {"a": [3, 17], "c": [5]}.items():
        assert np.flatnonzero(table[name].isna()).tolist() == missing
    whole = table["a"].dropna().tolist()
    assert whole == [type(whole[0])(field) for field in fields if field != mark]
    assert table["c"].dropna().tolist() == [row for row in range(40) if row != 5]


DISGUISES = [
    "{}%",
    "{},5",
    "1'{:03d}",
    "{0} {1}",
    "1\u202f{:03d}",
    "${}.00",
    "{}.0 €",
    "€ {}",
    "{}.0 kg",
    "{}.5kg",
    "{}.50D+01",
    "({}.00)",
    "{}.0-",
    "<{}.0",
    ">= {}",
    "~{}",
    "{} °C",
    "{}°",
    "-{} m/s",
    "1.{:03d}.000",
    "{} W/m2",
    "{}.5 m s-1",
    "{} ppm CO2",
    "{}° 30'",
    "EUR {}",
    "CHF {}.50",
    "US${}",
]


@pytest.mark.parametrize("form", DISGUISES)
def test_numbers_that_are_read_as_words_are_no_categories(form):
    column = pandas.Series([form.format(10 + row % 3, row) for row in range(20)], name="a")
    table, parts = column.to_frame(), {"train": np.arange(20)}
    with pytest.raises(
        DataError, match=f"'{re.escape(column[0])}' in .* looks like a number, or several.*--categories 'a'"
    ):
        tabular.encode_features(table, parts, lambda name: False)
    x, names = tabular.encode_features(table, parts, lambda name: True)  # the remedy
    assert names == [f"a={word}" for word in sorted(set(column))] and x.sum() == 20
    marked = column.where(np.arange(20) != 4, "n/e")
    with pytest.raises(DataError, match=r"looks like a number.*--missing-words='n/e'"):
        tables.check_words(marked, "")


@pytest.mark.parametrize(
    "words",
    [
        "A1 B2 12a x-1",
        "18-25 26-35 36-50",
        "<=50K >50K",
        "1st 2nd 3rd",
        "4x4 2WD",
        "Room+1 Room+2",
        "ABC1 ABC2",
        "Typ+1 Typ+2",
    ],
)
def test_words_with_digits_are_words(words):
    tables.check_words(pandas.Series([word.replace("+", " ") for word in words.split()] * 5, name="a"), "")


@pytest.mark.parametrize("zero", ["\u0660", "\uff10", "\u0966"], ids=["Arabic", "wide", "Devanagari"])
def test_digits_of_other_scripts_are_digits(tmp_path, zero):
    digits = str.maketrans("0123456789", "".join(chr(ord(zero) + digit) for digit in range(10)))
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a;b", *(f"-{row}.25;{row}".translate(digits) for row in range(40))]), encoding="utf-8")
    table = read(path)
    assert table["a"].tolist() == [-row - 0.25 if row else -0.25 for row in range(40)]
    assert table["b"].tolist() == list(range(40))


@pytest.mark.parametrize("form", ["{:.2e}", "{:.2E}", "{:.1f}", "{:.0f}.", "{:+.2e}"])
@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("minus", ["-", "\u2212"])
def test_exponents_and_the_minus_of_typesetters_are_those_of_numbers(tmp_path, form, decimal, minus):
    numbers = [form.format(v) for v in np.random.default_rng(0).normal(size=40) * 1e-3 + np.arange(-20, 20)]
    rows = [f"{text.replace('.', decimal).replace('-', minus)};{row}" for row, text in enumerate(numbers)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["a;b", *rows]), encoding="utf-8")
    flags = ("--decimal", decimal) if form == "{:.0f}." else ()  # 5, has no digits behind
    assert read(path, *flags)["a"].tolist() == list(map(float, numbers))


@pytest.mark.parametrize("mark", ["1{}234", "-1{}000", "900{}125"])
@pytest.mark.parametrize("separator, decimal, row", [("\t", ",", 3), (";", ",", 3), (";", ".", 3), (";", ".", 1500)])
def test_one_field_that_may_be_of_thousands_is_asked_for_wherever_it_stands(tmp_path, separator, decimal, row, mark):
    field, path = mark.format(decimal), tmp_path / "t.txt"
    rows = [f"{field if number == row else 100 + number % 800}{separator}{number % 7}" for number in range(1600)]
    path.write_text("\n".join([f"a{separator}b", *rows]))
    with pytest.raises(DataError, match=f"'{field}' may be a number with decimals, or of thousands.*--thousands none"):
        read(path)
    values = [read(path, "--thousands", sign)["a"][row] for sign in (decimal, "none")]
    assert values == [float(field.replace(decimal, sign)) for sign in ("", ".")]
    path.write_text("\n".join([f"a{separator}b", *rows, f"0{decimal}5{separator}1"]))  # all are decimals
    assert row == 3 or read(path)["a"][row] == values[1]


IN_GROUPS = ["{:,.2f}", "{:,.1f}", "{:,.0f}", "{:+,.2f}"]


@pytest.mark.parametrize("form", IN_GROUPS)
@pytest.mark.parametrize(
    "decimal, thousands", [(".", ","), (",", "."), (".", "'"), (",", " "), (",", "\xa0"), (",", "\u202f")]
)
def test_a_sign_of_thousands_stands_between_groups_of_three_digits_alone(tmp_path, decimal, thousands, form):
    numbers = np.round(np.random.default_rng(0).normal(size=40) * 1e5, 2)
    signs = str.maketrans(".,", decimal + thousands)
    rows = [form.format(v).translate(signs) for v in numbers]
    others = {  # what is no number in these signs
        "date": [f"0{row % 9 + 1}{thousands}02{thousands}2024" for row in range(40)],
        "code": [f"{row}{thousands}1" for row in range(40)],
        "address": [thousands.join(["192", "168", "1", str(row)]) for row in range(40)],
        "name": [f"a{thousands}123" for row in range(40)],
    }
    path = tmp_path / "t.csv"
    path.write_text(
        "\n".join([";".join(["a", *others, "b"]), *map(";".join, zip(rows, *others.values(), map(str, range(40))))])
    )
    given = " " if thousands.isspace() else thousands
    table = read(path, "--thousands", given, "--decimal", decimal, "--header")
    expected = [float(form.format(v).replace(",", "")) for v in numbers]
    assert table["a"].tolist() == expected and table["b"].tolist() == list(range(40))
    for name, texts in others.items():
        assert table[name].tolist() == texts
        if name != "name":
            with pytest.raises(DataError, match=f"'{name}' holds .* looks like a number"):
                tables.check_words(table[name], "")


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "bz2", "zip", "xz", "zst", "tar", "tar.gz"])
def test_text_is_text_whatever_its_file_is_called(tmp_path, suffix):
    path = tmp_path / f"t.csv.{suffix}"
    path.write_text("a,b\n1,2\n3,4\n")
    assert read(path).values.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("encoding", ["hex", "base64", "rot13", "zlib", "bz2", "uu", "quopri", "nothing", "undefined"])
def test_what_is_no_encoding_of_text_is_said(tmp_path, encoding):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(DataError, match="Give its --encoding, such as cp1252"):
        read(tmp_path / "t.csv", "--encoding", encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "utf-16-le", "UTF-16LE", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes("\ufeffa,b\n1,2\n3,4\n".encode(encoding))
    assert list(read(tmp_path / "t.csv", "--encoding", encoding)) == ["a", "b"]
    assert list(read(tmp_path / "t.csv")) == ["a", "b"]


# --- times ---------------------------------------------------------------------------------------------

START = {
    "h": "2024-03-29",
    "D": "2023-12-30",
    "MS": "2020-01-01",
    "ME": "2020-01-31",
    "QS": "2019-01-01",
    "YS": "1980-01-01",
}
FORMATS = ["%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M", "%Y%m%d%H%M"]


def series(path, times, *flags):
    """Write times beside numbers; return the series that is read, and its step."""
    path.write_text("\n".join(["time,load", *(f"{time},{row / 3}" for row, time in enumerate(times))]))
    words = ["--source", str(path), "--output", "o", "--targets", "load", "--window", "2", "--horizon", "1", *flags]
    found = timeseries.read_series(timeseries.make_parser().parse_args(words))
    step = timeseries.find_step(found.times)
    timeseries.check_complete(found, step)
    return found, step


@pytest.mark.parametrize("frequency", START)
@pytest.mark.parametrize("form", FORMATS)
def test_times_of_any_format_and_step(tmp_path, form, frequency):
    truth = pandas.date_range(START[frequency], periods=100, freq=frequency)
    texts = truth.strftime(form)
    try:
        found, step = series(tmp_path / "s.csv", texts)
    except DataError as error:
        assert f"'{form}'" in str(error), error
        found, step = series(tmp_path / "s.csv", texts, "--time-format", form)
    np.testing.assert_array_equal(found.times, truth.to_numpy().astype(found.times.dtype))
    assert not step.is_irregular.any()
    assert step.months == {"MS": 1, "ME": 1, "QS": 3, "YS": 12}.get(frequency)
    with pytest.raises(DataError, match="irregular steps"):
        series(tmp_path / "gap.csv", np.delete(np.asarray(texts), 50), "--time-format", form)


@pytest.mark.parametrize("text", ["{0}-Q{1}", "{0}Q{1}", "{0} q{1}"])
def test_quarters(tmp_path, text):
    found, step = series(tmp_path / "s.csv", [text.format(1990 + k // 4, k % 4 + 1) for k in range(50)])
    assert step.months == 3 and str(found.times[1]).startswith("1990-04-01")


UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


@pytest.mark.parametrize("unit, scale", UNITS.items())
def test_seconds_since_1970(tmp_path, unit, scale):
    truth = pandas.date_range("2024-01-01", periods=50, freq="h")
    texts = [int(time.timestamp()) * scale for time in truth]
    with pytest.raises(DataError, match=f"--time-format, such as epoch-{unit}"):
        series(tmp_path / "s.csv", texts)
    found, _ = series(tmp_path / "s.csv", texts, "--time-format", f"epoch-{unit}")
    np.testing.assert_array_equal(found.times, truth.to_numpy().astype(found.times.dtype))


@pytest.mark.parametrize("given, held", list(itertools.permutations(UNITS, 2)))
def test_numbers_of_another_unit_are_no_times(tmp_path, given, held, caplog):
    texts = [(1_704_000_000 + 1_000_000 * k) * UNITS[held] for k in range(50)]
    is_late = UNITS[held] > UNITS[given]
    with pytest.raises(DataError, match="epoch") if is_late else contextlib.nullcontext():
        series(tmp_path / "s.csv", texts, "--time-format", f"epoch-{given}")
    assert is_late or "from 1970-01-" in caplog.text


@pytest.mark.parametrize("year", [1955, 1975, 2015])
def test_years_of_two_digits_that_become_the_future_are_said(tmp_path, year, caplog):
    days = pandas.date_range(f"{year}-01-01", periods=50, freq="D")
    series(tmp_path / "s.csv", days.strftime("%d.%m.%y").tolist(), "--time-format", "%d.%m.%y")
    assert ("from 2055-01-01" in caplog.text) == (year < 1969)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Sydney"])
@pytest.mark.parametrize("minutes", [15, 60])
def test_days_of_23_and_25_hours(tmp_path, zone, minutes):
    hours = pandas.date_range("2024-01-01", "2024-12-31", freq="h", tz=zone)
    changes = [hour for hour, after in itertools.pairwise(hours) if hour.utcoffset() != after.utcoffset()]
    assert len(changes) == 2
    for change in changes:
        begin, end = (pandas.Timestamp(change) + pandas.Timedelta(days=days) for days in (-2, 2))
        truth = pandas.date_range(begin, end, freq=f"{minutes}min")
        texts = truth.strftime("%Y-%m-%d %H:%M")
        with pytest.raises(DataError, match="--time-zone"):
            series(tmp_path / "s.csv", texts)
        found, _ = series(tmp_path / "s.csv", texts, "--time-zone", zone)
        utc = truth.tz_convert("UTC").tz_localize(None).to_numpy()
        np.testing.assert_array_equal(found.times, utc.astype(found.times.dtype))
        days = pandas.date_range(texts[0], texts[-1], freq=f"{minutes}min")  # each of 24 hours
        with pytest.raises(DataError, match="not those of the clocks"):
            series(tmp_path / "s.csv", days.strftime("%Y-%m-%d %H:%M"), "--time-zone", zone)


@pytest.mark.parametrize("form", FORMATS[:4])
def test_of_intervals_the_beginnings_are_taken(tmp_path, form, caplog):
    truth = pandas.date_range("2024-01-01", periods=50, freq="h")
    texts = [f"{a} - {b}" for a, b in zip(truth.strftime(form), (truth + pandas.Timedelta("1h")).strftime(form))]
    for flag in (form, f"{form} - {form}"):
        with caplog.at_level(logging.INFO):
            found, _ = series(tmp_path / "s.csv", texts, "--time-format", flag)
        assert "intervals: their beginnings are taken" in caplog.text
        np.testing.assert_array_equal(found.times, truth.to_numpy().astype(found.times.dtype))


@pytest.mark.parametrize("form", ["%d.%m.%Y - %H:%M", "%H:%M  -  %Y-%m-%d", "%Y - %j %H:%M"])
def test_a_format_that_holds_a_dash_is_no_interval(tmp_path, form, caplog):
    truth = pandas.date_range("2024-01-01", periods=50, freq="h")
    texts = list(truth.strftime(form))
    with caplog.at_level(logging.INFO):
        found, _ = series(tmp_path / "s.csv", texts, "--time-format", form)
    assert "intervals" not in caplog.text
    np.testing.assert_array_equal(found.times, truth.to_numpy().astype(found.times.dtype))
    texts[20] = texts[20][:-1] + "x"
    with pytest.raises(DataError, match=r"'.*x' in data row 21 is no time"):
        series(tmp_path / "s.csv", texts, "--time-format", form)


def test_offsets_and_zones_exclude_each_other(tmp_path):
    truth = pandas.date_range("2024-10-26", periods=72, freq="h", tz="Europe/Berlin")
    texts = [time.isoformat() for time in truth]
    found, _ = series(tmp_path / "s.csv", texts)
    assert found.times[0] == np.datetime64("2024-10-25T22:00")
    for rows in (texts, texts[:12]):  # two offsets, and one
        with pytest.raises(ConfigError, match="--time-zone Europe/Berlin"):
            series(tmp_path / "s.csv", rows, "--time-zone", "Europe/Berlin")
    with pytest.raises(ConfigError, match="--time-zone Mars/Base: it is not known"):
        series(tmp_path / "s.csv", [text[:16] for text in texts[:12]], "--time-zone", "Mars/Base")


def test_files_of_the_reports(tmp_path):
    """As people have sent them: a tab before a name among blanks, a semicolon in a header, months, and years before 1678."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mpg.data"
    path.write_text("\n".join(f'{10 + i:.1f}   8   {200 + i}.0      130.0      3504.\t"ford pinto"' for i in range(60)))
    table = read(path, required=("--target", "0"))
    assert table.shape == (60, 6) and table.iloc[:, 0].tolist() == [10.0 + i for i in range(60)]
    path.write_text("\n".join(['"x (m; local)",y', *(f"{a:.3f},{b:.3f}" for a, b in rng.normal(size=(40, 2)))]))
    assert list(read(path, required=("--target", "y")).columns) == ["x (m; local)", "y"]
    for texts, months in (([f"{1990 + k // 12}-{k % 12 + 1:02d}" for k in range(300)], 1), (range(1600, 2000), 12)):
        found, step = series(tmp_path / "series.csv", texts)
        assert (
            step.months == months and str(found.times[0]).startswith(f"{texts[0]}"[:4]) and not step.is_irregular.any()
        )
