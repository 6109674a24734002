#!/usr/bin/env python3
"""Write a CSV of series over time as HDF5 shards of windows for forecasting.

An example is a window of the rows in order: x [channels, window] holds the history of the targets, then of the
features, then of the calendar; y [targets, horizon] holds the targets of the rows that follow. The rows are cut into
train, validation and test by time; a window lies wholly inside one of them. Only the training split is strided. With
--changes y holds the targets less their newest value of the history, with --changes 24 less that of the same hour.

The rows have one time each, in order, at a constant step. Times with an offset become UTC; times without are taken as
they stand. The calendar is sine and cosine of hour/24 (with minutes), of weekday/7 (Monday 0), and of day of the year
over the days of that year.

Two published data sets are known by their SHA-256, and their numbers of rows are verified:

  ETTh1.csv, ETTh2.csv     17,420 rows; Zhou et al., Informer, AAAI 2021 (github.com/zhouhaoyi/ETDataset). CC BY-ND 4.0:
                           name the authors, do not publish altered copies
  opsd_de_2019_60min.csv   8,760 rows; Open Power System Data "Time series", from ENTSO-E Transparency and the German
                           TSOs (filtered in github.com/GIT4Holger/26S_EMSBat). MIT, nothing separate for the data

Four days of the transformer's seven series -> how its oil temperature changes within a day; 8,521 / 2,761 / 2,761
windows:

  python data_prep/timeseries.py --source ETTh1.csv --targets OT --features all --window 96 --horizon 24 \\
      --changes --split-rows 8640 2880 2880 --output data/ETTh1

21 days of Germany's load and of the calendar -> its load of the next 7 days, as changes since the week before; 4,585 /
1,081 / 1,081 windows:

  python data_prep/timeseries.py --source opsd_de_2019_60min.csv --targets DE_load_actual_entsoe_transparency \\
      --window 504 --horizon 168 --calendar hour weekday yearday --changes 168 --output data/opsd_de
"""

import argparse
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.errors import ConfigError, DataError, Fault

logger = logging.getLogger(__name__)  # on the first rank alone

ETT = "Zhou et al., Informer, AAAI 2021; github.com/zhouhaoyi/ETDataset, commit 1d16c8f, ETT-small/"
OPSD = "Open Power System Data, Time series, from ENTSO-E Transparency and the German TSOs"
KNOWN = {  # SHA-256: (name, source, licence, number of rows)
    "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066": (
        "ETTh1",
        f"{ETT}ETTh1.csv",
        "CC BY-ND 4.0",
        17_420,
    ),
    "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b": (
        "ETTh2",
        f"{ETT}ETTh2.csv",
        "CC BY-ND 4.0",
        17_420,
    ),
    "2264f7297db1a3953e22acda99c5adab074fc41023034d338432326b333e8e8e": (
        "opsd_de_2019_60min",
        f"{OPSD}; filtered in github.com/GIT4Holger/26S_EMSBat, commit 023d333",
        "MIT (of the repository; nothing separate is stated for the data)",
        8_760,
    ),
}
CALENDAR = ("hour", "weekday", "yearday")
MISSING = "Mend the file, or leave out the windows that touch it by --missing drop"


@dataclass(frozen=True)
class Series:
    """Series over time."""

    times: np.ndarray
    """Times [rows] datetime64."""
    values: np.ndarray
    """Values [rows, channels] float32, the targets first; not finite where one is missing."""
    names: list[str]
    """Names of the channels."""
    num_targets: int
    time: str
    """Name of the column of times."""


# --- the table -----------------------------------------------------------------------------------------


def read_csv(path: Path, **how: Any):
    """Return a CSV as a table of pandas."""
    try:
        import pandas
    except ImportError as error:
        raise DataError("data_prep/timeseries.py needs pandas: pip install 'hpc_bnn[data]'") from error
    too_long = pandas.errors.ParserWarning  # rows of more fields than the header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", too_long)
            return pandas.read_csv(path, index_col=False, low_memory=False, **how)
    except (OSError, ValueError, too_long) as error:
        raise DataError(f"--source {path}: it cannot be read as CSV ({error}). Look at its lines") from error


def read_series(options: argparse.Namespace) -> Series:
    """Return the targets, the features and the calendar of the source."""
    columns = list(read_csv(options.source, nrows=0).columns)
    time = columns[0] if options.time is None else options.time
    asked = {"--time": [time], "--targets": options.targets, "--features": options.features}
    if options.features == ["all"]:
        del asked["--features"]
    for flag, names in asked.items():
        for name in names:
            common.check(flag, name, name in columns, "no such column", f"Choose of {', '.join(columns)}")
            fits = flag == "--time" or name != time
            common.check(flag, name, fits, "it is the time column", "--calendar makes inputs of it")
    table = read_csv(options.source, dtype={time: str})
    times = parse_times(table[time], options.time_format)
    features, targets = options.features, list(dict.fromkeys(options.targets))
    if features == ["all"]:
        features = list(table.select_dtypes("number"))
        words = [name for name in columns if name not in (time, *targets, *features)]
        if words:
            logger.info("--features all leaves out the columns that are not numbers: %s", ", ".join(words))
    names = list(dict.fromkeys([*targets, *features]))
    values = [parse_numbers(table[name], times) for name in names]
    for kind in options.calendar:
        values += calendar(times, kind)
        names += [f"{kind}_sin", f"{kind}_cos"]
    return Series(times, np.column_stack(values).astype(np.float32), names, len(targets), time)


def parse_times(texts, time_format: str) -> np.ndarray:
    """Return a column of times as datetime64 [rows] (UTC where they have an offset), in order."""
    import pandas

    try:
        times = pandas.to_datetime(texts, utc=True, errors="coerce", format=time_format)
    except ValueError as error:
        rule = f"it is no format ({error})"
        raise ConfigError(Fault("--time-format", time_format, rule, "Try '%d.%m.%Y %H:%M'")) from error
    if times.isna().any():
        row = int(times.isna().argmax())
        raise DataError(
            f"--time {texts.name}: '{texts[row]}' in data row {row + 1} is no time of the format {time_format}. "
            "Mend the row, or say how times are written by --time-format"
        )
    times = times.dt.tz_localize(None).to_numpy("datetime64[us]")
    backwards = np.diff(times) < np.timedelta64(0)
    if backwards.any():
        row = int(backwards.argmax()) + 1
        raise DataError(
            f"--time {texts.name}: {iso(times[row])} comes after {iso(times[row - 1])}. Sort the rows by time, "
            "and use a column in UTC (local time goes back an hour in autumn)"
        )
    return times


def parse_numbers(column, times: np.ndarray) -> np.ndarray:
    """Return a column as numbers [rows], nan where it is empty."""
    import pandas

    numbers = pandas.to_numeric(column, errors="coerce")
    words = numbers.isna() & column.notna()
    if words.any():
        row = int(words.argmax())
        raise DataError(
            f"--source: column '{column.name}' holds '{column[row]}' at {iso(times[row])}, which is no number. "
            "Write a number, or nothing where the value is missing"
        )
    return numbers.to_numpy(np.float64)


def calendar(times: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return sine and cosine [rows] of the hour of the day, the day of the week or the day of the year."""
    days, years = times.astype("datetime64[D]"), times.astype("datetime64[Y]")
    if kind == "hour":
        phase = (times - days) / np.timedelta64(1, "D")
    elif kind == "weekday":
        phase = (days.astype(int) + 3) % 7 / 7  # 1970-01-01 was a Thursday
    else:
        start, stop = (year.astype("datetime64[D]") for year in (years, years + 1))
        phase = (days - start) / (stop - start)
    return np.sin(2 * np.pi * phase), np.cos(2 * np.pi * phase)


def iso(time: np.datetime64) -> str:
    return str(np.datetime_as_string(time, unit="s"))


def describe(options: argparse.Namespace, sha256: str, num_rows: int) -> dict[str, str]:
    """Return name, source and licence: as the flags say, or of a known file, whose number of rows is verified."""
    path = options.source
    name, source, licence, expected = KNOWN.get(sha256, (path.stem, path.name, "not stated", num_rows))
    if num_rows != expected:
        raise DataError(f"--source {path}: {num_rows} rows of {name} were read, expected {expected}")
    return common.state_facts(options, name, source, licence)


# --- windows -------------------------------------------------------------------------------------------


def split_rows(options: argparse.Namespace, num_rows: int) -> dict[str, range]:
    """Return the rows of each split, in order."""
    if options.split_rows is None:
        return common.cut(num_rows, common.check_fractions(options))
    counts = options.split_rows
    text, total = " ".join(map(str, counts)), sum(counts)
    common.check("--split-rows", text, counts[0] > 0 <= min(counts), "a training split is needed", "Try 800 100 100")
    common.check("--split-rows", text, total <= num_rows, f"the source has {num_rows} rows", f"Not {total} in all")
    bounds = np.cumsum([0, *counts]).tolist()
    parts = {name: range(*pair) for name, *pair in zip(("train", "validation", "test"), bounds, bounds[1:])}
    return {name: part for name, part in parts.items() if part}


def common_step(times: np.ndarray) -> np.timedelta64:
    """Return the step of time that most rows have."""
    steps = np.diff(times)
    steps, counts = np.unique(steps[steps > np.timedelta64(0)], return_counts=True)
    if len(steps) == 0:
        raise DataError(f"--source: {len(times)} rows have no two times. One row per time is needed")
    return steps[counts.argmax()]


def is_irregular(times: np.ndarray, step: np.timedelta64) -> np.ndarray:
    """Return whether a row [rows] is not one step after the row before."""
    return np.diff(times, prepend=times[0] - step) != step


def check_complete(series: Series, step: np.timedelta64) -> None:
    """Raise `DataError` that names column and time where a value is missing or a step of time is irregular."""
    missing = np.argwhere(~np.isfinite(series.values))
    if len(missing):
        row, channel = missing[0]
        raise DataError(
            f"--source: column '{series.names[channel]}' has no finite value at {iso(series.times[row])} "
            f"({len(missing)} values are missing in all). {MISSING}"
        )
    irregular = np.flatnonzero(is_irregular(series.times, step))
    if len(irregular):
        before, after = series.times[irregular[0] - 1 : irregular[0] + 1]
        raise DataError(
            f"--time {series.time}: {iso(after)} comes after {iso(before)}, and the step is "
            f"{step / np.timedelta64(1, 's'):g} s "
            f"({len(irregular)} irregular steps in all). {MISSING}"
        )


def find_windows(
    series: Series, step: np.timedelta64, name: str, part: range, options: argparse.Namespace
) -> np.ndarray:
    """Return the first rows [n] of the windows of a split that touch nothing missing."""
    window, horizon = options.window, options.horizon
    rule = f"the split '{name}' has {len(part)} rows, and a window with its horizon has {window + horizon}"
    common.check("--window", window, len(part) >= window + horizon, rule, "Try less, or another split")
    stride = options.stride if name == "train" else 1
    starts = np.arange(part.start, part.stop - window - horizon + 1, stride)
    missing = ~np.isfinite(series.values)
    bad = (
        any_flag(missing.any(1), starts, starts + window)
        | any_flag(missing[:, : series.num_targets].any(1), starts + window, starts + window + horizon)
        | any_flag(is_irregular(series.times, step), starts + 1, starts + window + horizon)
    )
    if bad.all():
        raise DataError(f"--missing drop: no window of the split '{name}' is left. Mend the file")
    if bad.any():
        logger.info("%s: %d of %d windows touch missing values or irregular steps: left out", name, bad.sum(), len(bad))
    return starts[~bad]


def any_flag(flags: np.ndarray, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return whether any of flags [rows] is set in first[i] .. stop[i] - 1, for each i."""
    counts = np.concatenate([[0], np.cumsum(flags)])
    return counts[stop] > counts[first]


def cut_windows(series: Series, starts: np.ndarray, options: argparse.Namespace) -> common.Examples:
    """Return examples x [n, channels, window] and y [n, targets, horizon], cut when they are written."""
    window, horizon, num_targets = options.window, options.horizon, series.num_targets

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = starts[start:stop, None] + np.arange(window + horizon)
        x = series.values[rows[:, :window]]
        y = series.values[rows[:, window:], :num_targets]
        if options.changes:
            known = window - options.changes + np.arange(horizon) % options.changes
            y = y - x[:, known, :num_targets]
        return x.swapaxes(1, 2), y.swapaxes(1, 2)

    return common.Examples(len(starts), read)


# --- the script ----------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    for flag in ("window", "horizon", "stride"):
        value = getattr(options, flag)
        common.check(f"--{flag}", value, value >= 1, "must be at least 1", "Try 1")
    rule = f"a season must lie within the history, 0 to {options.window} rows"
    common.check(
        "--changes", options.changes, 0 <= options.changes <= options.window, rule, "Use less, or a longer --window"
    )
    with comm.agree(f"reading {options.source}"):
        sums = common.checksums(options.source)
        series = read_series(options)
        num_rows = len(series.times)
        facts = describe(options, sums[0], num_rows)
        parts = split_rows(options, num_rows)
        num_used = max(part.stop for part in parts.values())
        if num_used < num_rows:
            logger.info("the last %d of %d rows are in no split: left out", num_rows - num_used, num_rows)
            series = replace(series, times=series.times[:num_used], values=series.values[:num_used])
        step = common_step(series.times)
        if options.missing == "error":
            check_complete(series, step)
        starts = {name: find_windows(series, step, name, part, options) for name, part in parts.items()}
    common.write(
        comm,
        options,
        {name: cut_windows(series, first, options) for name, first in starts.items()},
        key=sums,
        **facts,
        channels={"x": series.names, "y": series.names[: series.num_targets]},
        details={
            "window": options.window,
            "horizon": options.horizon,
            "changes": options.changes,
            "step_seconds": float(step / np.timedelta64(1, "s")),
            "first_time": {name: iso(series.times[part[0]]) for name, part in parts.items()},
            "last_time": {name: iso(series.times[part[-1]]) for name, part in parts.items()},
        },
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = common.make_parser(__doc__)
    common.add_source(parser, "CSV with a header, a column of times and columns of numbers", metavar="FILE")
    add = parser.add_argument
    add("--time", metavar="COLUMN", help="column of times (default: the first)")
    add(
        "--time-format",
        default="ISO8601",
        metavar="F",
        help="as of strptime, such as '%%d.%%m.%%Y %%H:%%M' (default: %(default)s)",
    )
    add("--targets", nargs="+", required=True, metavar="COLUMN", help="to predict; also inputs")
    add(
        "--features",
        nargs="*",
        default=[],
        metavar="COLUMN",
        help="further inputs, or 'all' for every column of numbers (default: none)",
    )
    add("--calendar", nargs="*", default=[], choices=CALENDAR, help="further inputs (default: none)")
    add("--window", type=int, required=True, metavar="N", help="rows of history")
    add("--horizon", type=int, required=True, metavar="N", help="rows to predict")
    add(
        "--stride",
        type=int,
        default=1,
        metavar="N",
        help="rows between windows of the training split (default: %(default)s)",
    )
    add(
        "--changes",
        type=int,
        nargs="?",
        const=1,
        default=0,
        metavar="N",
        help="y as changes since the newest known row of the same phase of a season of N rows (without N 1: since the newest "
        "row); easier to learn where the level drifts or repeats",
    )
    common.add_fractions(parser, validation=0.2, test=0.2)
    add(
        "--split-rows",
        type=int,
        nargs=3,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="numbers of rows, in order, in place of the fractions; further rows are left out",
    )
    add(
        "--missing",
        choices=["error", "drop"],
        default="error",
        help="where a value is missing or a step of time irregular: stop, or leave out the windows that touch it "
        "(default: %(default)s)",
    )
    common.add_facts(parser)
    return parser


if __name__ == "__main__":
    common.run(make_parser(), prepare)
