#!/usr/bin/env python3
"""Write a table, a row per example, as HDF5 shards for regression or classification.

x [features] holds columns of numbers as they are and columns of words one-hot, with the categories of the training
split (channels 'column=category'). y [targets] holds numbers, or, with --classes, y is the place of the target's value
among all its values, sorted; the map stands in the manifest's details. Empty fields, 'NA', 'NaN', '?' and what else pandas
takes for missing, --missing-words, and infinite numbers, are missing values.

A column is given by its name or its number: 0 is the first, -1 the last. How the table is written is guessed from its first
lines, and said, where the flags leave it open and the lines leave no doubt. Numbers are float32, or float64 where float32
would round their differences away.

A table of your own, its last column to predict, 10 % of the rows for validation and 20 % for test:

  python data_prep/tabular.py --source diabetes.csv --target -1 --output data/diabetes

A class, and a split of your own, a file with one of the words train, validation, test per row of the table:

  python data_prep/tabular.py --source iris.csv --target species --classes --split-file iris_split.txt --output data/iris
"""

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import tables

from hpc_bnn.comm import GridComm
from hpc_bnn.errors import DataError

logger = logging.getLogger(__name__)  # on the first rank alone

SPLITS = ("train", "validation", "test")


# --- the table -----------------------------------------------------------------------------------------


def choose_columns(options: argparse.Namespace, columns: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the targets, of the features and of the coordinates."""
    beside = list(dict.fromkeys(tables.find_column("--coordinates", name, columns) for name in options.coordinates))
    targets = list(dict.fromkeys(tables.find_column("--target", name, columns) for name in options.target))
    if options.features is None:
        features = [name for name in columns if name not in targets and name not in beside]
    else:
        features = list(dict.fromkeys(tables.find_column("--features", name, columns) for name in options.features))
    for name in targets:
        common.check("--features", name, name not in features, "it is a target", "Leave it out")
    rule = f"of the columns {', '.join(columns)} none is left as a feature"
    common.check("--target", " ".join(options.target), len(features) > 0, rule, "Look at --separator")
    rule = "a class is one column"
    common.check("--target", " ".join(targets), len(targets) == 1 or not options.classes, rule, "Choose one")
    return targets, features, beside


def name_coordinates(columns: list[str]) -> list[str]:
    """Return the names under which coordinates are written; `ConfigError` where two are the same."""
    names = [re.sub(r"\W", "_", column) for column in columns]
    for number, (name, column) in enumerate(zip(names, columns)):
        rule = f"it is written as '{name}', which is the name of another coordinate or of the number of the row"
        is_new = name not in ["row", *names[:number]]
        common.check("--coordinates", column, is_new, rule, "Rename the column in the file, or leave it out")
    return names


def encode_coordinate(texts) -> np.ndarray:
    """Return texts [rows] as they stand, or as numbers where nothing of any text is lost by it."""
    for kind in (np.int64, np.float64):
        try:
            numbers = texts.to_numpy(object).astype(kind)
        except (ValueError, OverflowError):  # words, and whole numbers above 2**63
            continue
        if all(map(str.__eq__, map(str, numbers.tolist()), texts)):
            return numbers
    return texts.to_numpy(object)


def complete_rows(parts: list, missing: str) -> np.ndarray:
    """Return whether a row [rows] has all its values; `DataError` where one has not and ``missing`` is "error"."""
    import pandas

    table = pandas.concat(parts, axis=1)
    is_missing = table.isna().to_numpy()
    if missing == "error" and is_missing.any():
        row, column = np.argwhere(is_missing)[0]
        raise DataError(
            f"--source: column '{table.columns[column]}' has no value in data row {row + 1} ({is_missing.sum()} "
            "values are missing in all). Mend the file, or leave out such rows by --missing drop"
        )
    kept = ~is_missing.any(1)
    if not kept.all():
        logger.info("%d of %d rows have missing values: left out", np.sum(~kept), len(kept))
    return kept


def keep_zeros(options: argparse.Namespace, form: tables.Format, table, names: list[str]):
    """Return a table whose columns of ``names`` stand as in the file where a zero leads: 00501 is not 501."""
    from pandas.api.types import is_numeric_dtype

    numbers = [name for name in names if is_numeric_dtype(table[name])]
    texts = tables.read_table(options, form, numbers, numbers) if numbers else table[[]]
    return table.assign(**{n: texts[n] for n in numbers if texts[n].str.fullmatch(r"[+-]?0\d+", na=False).any()})


# --- splits --------------------------------------------------------------------------------------------


def read_words(path: Path, num_rows: int) -> np.ndarray:
    """Return the words [rows] of a split file."""
    try:
        words = np.array(path.read_text(encoding="utf-8").split(), dtype=str)
    except (OSError, ValueError) as error:
        raise DataError(f"--split-file {path}: it cannot be read ({error})") from error
    common.check(
        "--split-file",
        path,
        len(words) == num_rows,
        f"it has {len(words)} words, and the table {num_rows} rows",
        "Write one word per row of the table, none for its header",
    )
    is_split = np.isin(words, SPLITS)
    rule = f"word {is_split.argmin() + 1} is '{words[is_split.argmin()]}'"
    common.check("--split-file", path, is_split.all(), rule, f"Write {', '.join(SPLITS)}")
    return words


def choose_rows(options: argparse.Namespace, kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return the places of each split's examples among the rows that are kept [rows], sorted."""
    if options.split_file is None:
        return common.draw_split(int(kept.sum()), common.check_fractions(options), options.seed)
    words = read_words(options.split_file, len(kept))[kept]
    parts = {name: np.flatnonzero(words == name) for name in SPLITS if (words == name).any()}
    common.check("--split-file", options.split_file, "train" in parts, "no row is left to train on", "Write train")
    return parts


# --- inputs and targets --------------------------------------------------------------------------------


def encode_features(
    table, parts: dict[str, np.ndarray], is_category: Callable[[str], bool]
) -> tuple[np.ndarray, list[str]]:
    """Return inputs [rows, channels], words and what ``is_category`` one-hot, and the names of the channels."""
    from pandas.api.types import is_numeric_dtype

    arrays, names = [], []
    for feature, column in table.items():
        if is_numeric_dtype(column) and not is_category(feature):
            tables.say_outliers(column)
            arrays.append(column.to_numpy(np.float64)[:, None])
            names.append(feature)
            continue
        if not is_category(feature):
            tables.check_words(column, f", and if the numbers name categories, --categories '{feature}'")
        categories = sorted(column.iloc[parts["train"]].unique())
        unknown = column[~column.isin(categories)]
        if len(unknown):
            raise DataError(
                f"--source: column '{feature}' holds '{unknown.iloc[0]}' in data row {unknown.index[0] + 1}, and no "
                "row of the training split does. Put such a row into it by --split-file, or leave out the column by "
                "--features"
            )
        words = column.to_numpy(object)
        arrays.append((words[:, None] == np.array(categories, dtype=object)).astype(np.float64))
        names += [f"{feature}={category}" for category in categories]
        logger.info("column '%s' is one-hot, %d categories", feature, len(categories))
    x = np.concatenate(arrays, axis=1)
    return x.astype(common.float_type("x", x)), names


def encode_classes(column) -> tuple[np.ndarray, dict[str, int]]:
    """Return classes [rows] int64 and the class of each value, in sorted order."""
    import pandas

    y, values = pandas.factorize(column.convert_dtypes(), sort=True)
    if column.dtype.kind == "f" and (column % 1 != 0).any():
        raise DataError(
            f"--target {column.name}: it holds numbers such as {column[column % 1 != 0].iloc[0]}, no classes. "
            "Leave out --classes"
        )
    if len(values) < 2:
        raise DataError(f"--target {column.name}: all rows have the same class {values[0]}. Choose another")
    return y.astype(np.int64), {str(value): number for number, value in enumerate(values)}


def check_classes(target: str, y: np.ndarray, classes: dict[str, int], parts: dict[str, np.ndarray]) -> None:
    """Raise `DataError` where the training split lacks a class."""
    lacking = sorted(set(classes.values()) - set(y[parts["train"]]))
    if lacking:
        names = [name for name, number in classes.items() if number in lacking]
        raise DataError(
            f"--target {target}: no row of the training split has the class {names[0]} ({len(lacking)} classes are "
            "lacking there). Leave out such rows, or put one into it by --split-file"
        )


def encode_numbers(table) -> np.ndarray:
    """Return targets [rows, targets]."""
    from pandas.api.types import is_numeric_dtype

    for target, column in table.items():
        if is_numeric_dtype(column):
            tables.say_outliers(column)
        else:
            tables.check_words(column, "")
        rule = f"it holds words such as '{column.iloc[0]}'"
        common.check("--target", target, is_numeric_dtype(column), rule, "If it is a class, give --classes")
    y = table.to_numpy(np.float64)
    return y.astype(common.float_type("y", y))


# --- the script ----------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    with comm.agree(f"reading {options.source}"):
        sums = common.checksums(*(path for path in (options.source, options.split_file) if path is not None))
        form = tables.find_format(options)
        table = tables.read_table(options, form)
        targets, features, beside = choose_columns(options, list(table.columns))
        names = name_coordinates(beside)
        texts = tables.read_table(options, form, beside, beside)[beside] if beside else table[[]]
        categories = {tables.find_column("--categories", name, features) for name in options.categories}
        table = table[targets + features]
        kept = complete_rows([table, texts], options.missing)
        for name in table.select_dtypes(["object", "string"]) if not kept.all() else ():
            table[name] = tables.as_numbers(table[name].where(kept), form)  # the words were those of a footer
        table = keep_zeros(options, form, table, [*categories, *(targets if options.classes else [])])
        named = {name: encode_coordinate(texts[column][kept]) for name, column in zip(names, beside)}
        named["row"] = np.flatnonzero(kept) + 1
        parts, table = choose_rows(options, kept), table[kept]
        coordinates = {name: {n: values[part] for n, values in named.items()} for name, part in parts.items()}
        if options.classes:
            y, classes = encode_classes(table[targets[0]])
            check_classes(targets[0], y, classes, parts)
            facts = {"num_classes": len(classes), "details": {"classes": classes}}
        else:
            y, facts = encode_numbers(table[targets]), {}
        x, names = encode_features(table[features], parts, categories.__contains__)
    common.write(
        comm,
        options,
        {name: (x[part], y[part]) for name, part in parts.items()},
        key=sums,
        **common.state_facts(options, options.source.stem, options.source.name),
        channels={"x": names} if options.classes else {"x": names, "y": targets},
        coordinates=coordinates,
        **facts,
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = common.make_parser(__doc__)
    common.add_source(parser, "the table, as text", metavar="FILE")
    tables.add_flags(parser)
    add = parser.add_argument
    add("--target", nargs="+", required=True, metavar="COLUMN", help="to predict")
    add("--features", nargs="+", metavar="COLUMN", help="inputs (default: all other columns)")
    add(
        "--categories",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="inputs whose numbers are names: one-hot, as words are",
    )
    add(
        "--coordinates",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="what names or places a row, such as a station or a time: no inputs, they go into predictions (always there: row)",
    )
    add("--classes", action="store_true", help="the target is a class (default: targets are numbers)")
    add(
        "--missing",
        choices=["error", "drop"],
        default="error",
        help="where a value is missing: stop, or leave out the row (default: %(default)s)",
    )
    common.add_fractions(parser, validation=0.1, test=0.2)
    add(
        "--split-file",
        type=Path,
        metavar="FILE",
        help="text file with one word per row of the table: train, validation or test; in place of the fractions",
    )
    common.add_facts(parser)
    return parser


if __name__ == "__main__":
    common.run(make_parser(), prepare)
