#!/usr/bin/env python3
"""Write a CSV of series over time as HDF5 shards of windows for forecasting.

An example is a window of the rows in order: x [channels, window] holds the history of the targets, then of the
features, then of the calendar; y [targets, horizon] holds the targets of the rows that follow. The rows are cut into
train, validation and test by time; a window lies wholly inside one of them. Only the training split is strided. With
--changes y holds the targets less their newest value of the history, with --changes 24 less that of the same hour.

The rows have one time each, in order, at a constant step, or one of months, quarters or years. Times with an offset, or of
a --time-zone, become UTC; others are taken as they stand. Of an interval, "00:00 - 01:00", the beginning is taken. How the
table is written is guessed from its first lines, and said, where the flags leave it open and the lines leave no doubt.
Changes are taken before numbers are rounded to float32; they are float64 where float32 would round differences away. The calendar is sine and cosine of hour/24 (with minutes), of weekday/7 (Monday 0), and of day of the year
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
import functools
import logging
import re
from dataclasses import dataclass, replace

import common
import numpy as np
import tables

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
EPOCH = {"epoch-seconds": "s", "epoch-milliseconds": "ms", "epoch-microseconds": "us", "epoch-nanoseconds": "ns"}
INTERVAL = r"\s+-\s+"
QUARTER = r"^(\d{4})[- ]?[Qq]([1-4])$"
FORMATS = (
    "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%d.%m.%Y", "%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M:%S", "%d/%m/%Y", "%m/%d/%Y", "%m/%d/%Y %I:%M %p", "%d.%m.%y %H:%M", "%Y%m%d", "%Y%m%d%H", "%Y%m%d%H%M",
    "%Y/%m/%d %H:%M", "%Y/%m/%d", "%d-%b-%Y %H:%M", "%d-%b-%Y", "%b %Y", "%b-%y", "%m/%Y", "%m.%Y", "%Y.%m.%d %H:%M",
)  # fmt: skip
"""Usual ways to write times, for messages."""
MISSING = "Mend the file, or leave out the windows that touch it by --missing drop"


@dataclass(frozen=True)
class Series:
    """Series over time."""

    times: np.ndarray
    """Times [rows] datetime64."""
    values: np.ndarray
    """Values [rows, channels] float64, the targets first; not finite where one is missing."""
    names: list[str]
    """Names of the channels."""
    num_targets: int
    time: str
    """Name of the column of times."""


# --- the table -----------------------------------------------------------------------------------------


def read_series(options: argparse.Namespace) -> Series:
    """Return the targets, the features and the calendar of the source."""
    form = tables.find_format(options)
    time = form.names[0] if options.time is None else options.time
    table = tables.read_table(options, form, (time,))
    columns = list(table)
    asked = {"--time": [time], "--targets": options.targets, "--features": options.features}
    if options.features == ["all"]:
        del asked["--features"]
    for flag, names in asked.items():
        for name in names:
            common.check(flag, name, name in columns, "no such column", f"Choose of {', '.join(columns)}")
            fits = flag == "--time" or name != time
            common.check(flag, name, fits, "it is the time column", "--calendar makes inputs of it")
    times = parse_times(table[time], options)
    features, targets = options.features, list(dict.fromkeys(options.targets))
    if features == ["all"]:
        features = [name for name in table if name != time and holds_numbers(table[name])]
        words = [name for name in table if name not in (time, *targets, *features)]
        if words:
            logger.info("--features all leaves out the columns that are not numbers: %s", ", ".join(words))
    names = list(dict.fromkeys([*targets, *features]))
    values = [parse_numbers(table[name], times) for name in names]
    for kind in options.calendar:
        values += calendar(times, kind)
        names += [f"{kind}_sin", f"{kind}_cos"]
    return Series(times, np.column_stack(values), names, len(targets), time)


def parse_times(texts, options: argparse.Namespace) -> np.ndarray:
    """Return a column of times as datetime64 [rows], UTC where it is known, in order; of an interval its beginning."""
    import pandas

    texts, given = texts.astype(str).str.strip(), options.time_format
    flag = f"--time {texts.name}"
    parts = texts.str.split(INTERVAL, expand=True, regex=True)
    if parts.shape[1] == 2 and parts.notna().all(axis=None) and not fits_some(texts, given):
        logger.info("%s: '%s' and so on are intervals: their beginnings are taken", flag, texts.iloc[0])
        texts = parts[0]
        given = re.split(INTERVAL, given)[0]
    quarters = texts.str.extract(QUARTER)
    if quarters[[0, 1]].notna().all(axis=None) and given == "ISO8601":
        texts = quarters[0] + "-" + (quarters[1].astype(int) * 3 - 2).astype(str).str.zfill(2)
    try:
        if given in EPOCH:
            numbers = pandas.to_numeric(texts, errors="coerce")
            times = pandas.to_datetime(numbers, unit=EPOCH[given], utc=True, errors="coerce")
        else:
            is_utc = options.time_zone is None
            times = pandas.to_datetime(texts, utc=is_utc, errors="coerce", format=given)
    except (ValueError, re.error) as error:
        is_mixed = options.time_zone is not None and "Mixed timezones" in str(error)
        common.check("--time-zone", options.time_zone, not is_mixed, "the times have offsets", "Leave it out")
        rule = f"it is no format ({error})"
        raise ConfigError(Fault("--time-format", given, rule, "Try '%d.%m.%Y %H:%M'")) from error
    if times.isna().any():
        row = int(times.isna().argmax())
        raise DataError(
            f"{flag}: '{texts[row]}' in data row {row + 1} is no time of the format {given}. "
            f"Mend the row, or say how times are written by --time-format{suggest_formats(texts)}"
        )
    first, last = times.min(), times.max()
    if given in EPOCH and last.year > 2300:
        rule = f"'{texts.iloc[-1]}' in the last row is of the year {times.iloc[-1].year} by {given}"
        raise DataError(f"{flag}: {rule}. Give the unit of the numbers by --time-format{suggest_formats(texts)}")
    is_early = given in EPOCH and given != "epoch-seconds" and last.year == 1970
    if is_early or ("%y" in given and last > pandas.Timestamp.now(last.tz)):
        logger.warning(
            "%s: by %s the times are those from %s to %s. Are numbers in another unit, or years of two digits, which are "
            "those of 1969 to 2068, older?", flag, given, first, last,
        )  # fmt: skip
    if options.time_zone is not None:
        times = localise(flag, times, options.time_zone)
    times = times.dt.tz_localize(None).to_numpy("datetime64[us]")
    backwards = np.diff(times) < np.timedelta64(0)
    if backwards.any():
        row = int(backwards.argmax()) + 1
        raise DataError(
            f"{flag}: {iso(times[row])} comes after {iso(times[row - 1])}. Sort the rows by time; where the time is local, "
            "it goes back an hour in autumn: give --time-zone, such as Europe/Berlin"
        )
    return times


def fits_some(texts, form: str) -> bool:
    """Whether some whole texts are times of a format."""
    import pandas

    try:
        return bool(pandas.to_datetime(texts, errors="coerce", format=form, utc=True).notna().any())
    except (ValueError, re.error):  # no format, such as one of an interval: it has the hour twice
        return False


def localise(flag: str, times, zone: str):
    """Return local times of a zone with that zone; `DataError` where an hour is missing or twice in a wrong place."""
    common.check("--time-zone", zone, getattr(times.dt, "tz", None) is None, "the times have an offset", "Leave it out")
    try:
        return times.dt.tz_localize(zone, ambiguous="infer", nonexistent="raise").dt.tz_convert("UTC")
    except KeyError as error:
        raise ConfigError(
            Fault("--time-zone", zone, f"it is not known ({error})", "Try Europe/Berlin or UTC")
        ) from error
    except ValueError as error:
        raise DataError(
            f"{flag}: the times are not those of the clocks in {zone} ({error}). Where the hours of the file do not follow "
            "the change of summer time, leave out --time-zone, or give one without it, such as Etc/GMT-1"
        ) from error


def suggest_formats(texts) -> str:
    """Return the usual formats that all times of a column have, in words."""
    import pandas

    fitting = [
        form for form in FORMATS if pandas.to_datetime(texts, errors="coerce", format=form, utc=True).notna().all()
    ]
    numbers = pandas.to_numeric(texts, errors="coerce")
    if len(fitting) == 0 and numbers.gt(1e8).all():
        return f", such as {list(EPOCH)[min(int(np.log10(numbers.max()) - 8) // 3, 3)]}"
    return f", such as {' or '.join(map(repr, fitting))}, which fit all rows" if fitting else ""


def holds_numbers(column) -> bool:
    """Whether a column holds numbers, if only some: others among them are an error."""
    import pandas

    return bool(column.isna().all() or pandas.to_numeric(column, errors="coerce").notna().any())


def parse_numbers(column, times: np.ndarray) -> np.ndarray:
    """Return a column as numbers [rows], nan where it is empty."""
    import pandas

    if not pandas.api.types.is_numeric_dtype(column):
        tables.check_words(column, "")
        row = int(column.notna().argmax())
        raise DataError(
            f"--source: column '{column.name}' holds '{column[row]}' at {iso(times[row])}, which is no number. "
            "Choose columns of numbers"
        )
    tables.say_outliers(column)
    return column.to_numpy(np.float64)


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


@dataclass(frozen=True)
class Step:
    """The step of time that most rows have."""

    is_irregular: np.ndarray
    """Whether a row [rows] is not one step after the row before."""
    text: str
    months: int | None
    """Months of it, where the rows follow the calendar: months are 28 to 31 days."""
    seconds: float
    """Seconds of it; of months those of most."""


def find_step(times: np.ndarray) -> Step:
    """Return the step of rows at these times, in order; of months where it is four weeks or more."""
    steps, months = np.diff(times), times.astype("datetime64[M]")
    forward = steps[steps > np.timedelta64(0)]
    if len(forward) == 0:
        raise DataError(f"--source: {len(times)} rows have no two times. One row per time is needed")
    step = _most(forward)
    seconds = float(step / np.timedelta64(1, "s"))
    from_start, to_end = times - months, months + 1 - times  # of the month; the latter for its last days
    if step >= np.timedelta64(28, "D") and any((part == part[0]).all() for part in (from_start, to_end)):
        counts = np.diff(months.astype(int))
        usual = int(_most(counts[counts > 0]))
        return Step(
            np.diff(months.astype(int), prepend=months[0].astype(int) - usual) != usual,
            f"{usual} months",
            usual,
            seconds,
        )
    irregular = np.diff(times, prepend=times[0] - step) != step
    return Step(irregular, f"{seconds:g} s", None, seconds)


def _most(values: np.ndarray):
    values, counts = np.unique(values, return_counts=True)
    return values[counts.argmax()]


def check_complete(series: Series, step: Step) -> None:
    """Raise `DataError` that names column and time where a value is missing or a step of time is irregular."""
    missing = np.argwhere(~np.isfinite(series.values))
    if len(missing):
        row, channel = missing[0]
        raise DataError(
            f"--source: column '{series.names[channel]}' has no finite value at {iso(series.times[row])} "
            f"({len(missing)} values are missing in all). {MISSING}"
        )
    irregular = np.flatnonzero(step.is_irregular)
    if len(irregular):
        before, after = series.times[irregular[0] - 1 : irregular[0] + 1]
        local = "; of local time an hour is missing in spring, and twice there in autumn: give --time-zone"
        raise DataError(
            f"--time {series.time}: {iso(after)} comes after {iso(before)}, and the step is {step.text} "
            f"({len(irregular)} irregular steps in all). {MISSING}{local if step.seconds < 86400 else ''}"
        )


def find_windows(series: Series, step: Step, name: str, part: range, options: argparse.Namespace) -> np.ndarray:
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
        | any_flag(step.is_irregular, starts + 1, starts + window + horizon)
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


def cut_windows(
    series: Series, options: argparse.Namespace, starts: dict[str, np.ndarray]
) -> dict[str, common.Examples]:
    """Return the examples x [n, channels, window] and y [n, targets, horizon] of each split, cut when they are written."""
    window, horizon, num_targets, changes = options.window, options.horizon, series.num_targets, options.changes
    levels = series.values[:, :num_targets]
    x_type = common.float_type("x", series.values)
    y_type = common.float_type("y", levels[changes:] - levels[:-changes] if changes else levels)

    def read(starts: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rows = starts[start:stop, None] + np.arange(window + horizon)
        x = series.values[rows[:, :window]]
        y = series.values[rows[:, window:], :num_targets]
        if changes:
            known = window - changes + np.arange(horizon) % changes
            y = y - x[:, known, :num_targets]
        return x.swapaxes(1, 2).astype(x_type), y.swapaxes(1, 2).astype(y_type)

    return {name: common.Examples(len(first), functools.partial(read, first)) for name, first in starts.items()}


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
        step = find_step(series.times)
        if options.missing == "error":
            check_complete(series, step)
        starts = {name: find_windows(series, step, name, part, options) for name, part in parts.items()}
    common.write(
        comm,
        options,
        cut_windows(series, options, starts),
        key=sums,
        **facts,
        channels={"x": series.names, "y": series.names[: series.num_targets]},
        coordinates={name: {"time": series.times[first + options.window - 1]} for name, first in starts.items()},
        details={
            "window": options.window,
            "horizon": options.horizon,
            "changes": options.changes,
            "persistence": "zero" if options.changes else list(range(series.num_targets)),
            **({"step_seconds": step.seconds} if step.months is None else {"step_months": step.months}),
            "first_time": {name: iso(series.times[part[0]]) for name, part in parts.items()},
            "last_time": {name: iso(series.times[part[-1]]) for name, part in parts.items()},
        },
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the script's flags."""
    parser = common.make_parser(__doc__)
    common.add_source(parser, "table as text, with a column of times and columns of numbers", metavar="FILE")
    tables.add_flags(parser)
    add = parser.add_argument
    add("--time", metavar="COLUMN", help="column of times (default: the first)")
    add(
        "--time-format",
        default="ISO8601",
        metavar="F",
        help="as of strptime, such as '%%d.%%m.%%Y %%H:%%M', or epoch-seconds, epoch-milliseconds and the like "
        "(default: %(default)s; quarters as 2024-Q1)",
    )
    add(
        "--time-zone",
        metavar="NAME",
        help="of times without an offset, such as Europe/Berlin: they become UTC, over changes of summer time, too",
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
