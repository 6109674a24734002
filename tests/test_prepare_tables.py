"""data_prep/timeseries.py and data_prep/tabular.py."""

import argparse
import csv
import hashlib
import json
import logging
import math
from datetime import datetime, timedelta, timezone

import numpy as np
import preparation
import pytest
import tabular
import timeseries
from preparation import check_statistics, shared, start, stored
from sklearn.datasets import load_diabetes, load_iris, load_wine

from hpc_bnn.data import Manifest, ShardDataset, verify_shards
from hpc_bnn.errors import ConfigError, DataError


def prepare(script, source, output, *flags):
    """Run a script in this process on a source; return the manifest and x, y of each split."""
    return preparation.prepare(script, output, "--source", source, *flags)


def write_rows(path, header, rows, separator=","):
    lines = [separator.join(map(str, row)) for row in ([header] if header else []) + list(rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


# --- time series ---------------------------------------------------------------------------------------

HOURS = [datetime(2020, 2, 27, 22, 30) + timedelta(hours=hour) for hour in range(100)]
SMALL = ("--targets", "load", "--features", "wind", "--window", 6, "--horizon", 3)


def write_series(path, load=None, wind=None, times=HOURS, skip=()):
    """Write a CSV of 100 hours, whose load is the number of the row unless it is given."""
    load = range(100) if load is None else load
    wind = [math.sin(row) for row in range(100)] if wind is None else wind
    rows = [
        (f"{time:%Y-%m-%d %H:%M}", w, "calm", v) for row, (time, v, w) in enumerate(zip(times, load, wind))
        if row not in skip
    ]  # fmt: skip
    return write_rows(path, ["time", "wind", "sky", "load"], rows)


def test_ett_windows_are_those_of_the_file(tmp_path):
    source, output = shared("ett", "ETTh1.csv"), tmp_path / "ett"
    flags = [
        "--targets",
        "OT",
        "--features",
        "all",
        "--window",
        "96",
        "--horizon",
        "24",
        "--split-rows",
        "8640",
        "2880",
        "2880",
    ]  # as --help has it
    done = start("timeseries", "--source", source, "--output", output, *flags)
    assert done.returncode == 0, done.stderr
    assert "last 3020 of 17420 rows" in done.stderr and verify_shards(output) == []
    manifest, splits = stored(output)
    assert {split: len(y) for split, (_, y) in splits.items()} == {"train": 8521, "validation": 2761, "test": 2761}
    assert (manifest.name, manifest.licence) == ("ETTh1", "CC BY-ND 4.0") and "Informer" in manifest.source
    names = ("OT", "HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL")
    assert manifest.arrays["x"].channels == names and manifest.arrays["y"].channels == ("OT",)
    with open(source) as file:
        rows = list(csv.DictReader(file))
    raw = np.array([[float(row[name]) for name in names] for row in rows], dtype=np.float32)
    views = np.lib.stride_tricks.sliding_window_view(raw, 120, axis=0)  # [first row, channels, 120]
    for split, first, stop in (("train", 0, 8640), ("validation", 8640, 11520), ("test", 11520, 14400)):
        expected = views[first : stop - 119]
        np.testing.assert_array_equal(splits[split][0], expected[..., :96])
        np.testing.assert_array_equal(splits[split][1], expected[:, :1, 96:])
        times = [datetime.fromisoformat(rows[row]["date"]).isoformat() for row in (first, stop - 1)]
        assert [manifest.details[f"{end}_time"][split] for end in ("first", "last")] == times
    check_statistics(manifest, views[:8521, :, :96], views[:8521, :1, 96:])
    assert [manifest.details[k] for k in ("window", "horizon", "step_seconds")] == [96, 24, 3600]


def test_opsd_and_its_calendar(tmp_path):
    source = shared("electricity_load", "opsd_de_2019_60min.csv")
    load = "DE_load_actual_entsoe_transparency"
    flags = ("--targets", load, "--window", 504, "--horizon", 168, "--calendar", "hour", "weekday", "yearday")
    manifest, splits = prepare(timeseries, source, tmp_path / "opsd", *flags)
    assert [len(y) for _, y in splits.values()] == [4585, 1081, 1081]
    assert manifest.name == "opsd_de_2019_60min" and "ENTSO-E" in manifest.source
    with open(source) as file:
        rows = list(csv.DictReader(file))
    x, y = splits["test"]
    np.testing.assert_array_equal(y[-1, 0], np.array([float(row[load]) for row in rows[-168:]], np.float32))
    history = rows[-672:-168]
    np.testing.assert_array_equal(x[-1, 0], np.array([float(row[load]) for row in history], np.float32))
    times = [datetime.fromisoformat(row["utc_timestamp"].replace("Z", "+00:00")) for row in history]
    phases = {
        "hour": [time.hour / 24 for time in times],
        "weekday": [time.weekday() / 7 for time in times],
        "yearday": [(time.timetuple().tm_yday - 1) / 365 for time in times],
    }
    for channel, name in enumerate(manifest.arrays["x"].channels[1:], start=1):
        kind, wave = name.split("_")
        expected = [getattr(math, wave)(2 * math.pi * phase) for phase in phases[kind]]
        np.testing.assert_allclose(x[-1, channel], expected, atol=1e-6)
    assert channel == 6


def test_a_file_that_is_read_short_is_not_taken_for_the_published_one(tmp_path):
    source = shared("ett", "ETTh1.csv")
    options = argparse.Namespace(source=source, name=None, source_text=None, licence=None)
    digest = next(sha256 for sha256, known in timeseries.KNOWN.items() if known[0] == "ETTh1")
    with pytest.raises(DataError, match="17419 rows of ETTh1 were read, expected 17420"):
        timeseries.describe(options, digest, 17_419)
    (tmp_path / "changed.csv").write_bytes(source.read_bytes() + b"2018-06-26 20:00:00,1,1,1,1,1,1,1\n")
    flags = ("--targets", "OT", "--window", 24, "--horizon", 24, "--stride", 99, "--licence", "mine")
    manifest, _ = prepare(timeseries, tmp_path / "changed.csv", tmp_path / "out", *flags)
    assert (manifest.name, manifest.source, manifest.licence) == ("changed", "changed.csv", "mine")


def test_changes_are_since_the_newest_row_of_the_history(tmp_path):
    source = write_series(tmp_path / "s.csv")
    _, levels = prepare(timeseries, source, tmp_path / "levels", *SMALL)
    manifest, changes = prepare(timeseries, source, tmp_path / "changes", *SMALL, "--changes")
    for split, (x, y) in levels.items():
        np.testing.assert_array_equal(changes[split][0], x)
        np.testing.assert_array_equal(changes[split][1], y - x[:, : y.shape[1], -1:])
    assert manifest.details["changes"] == 1 and np.ptp(levels["train"][1]) > 2 * np.ptp(changes["train"][1])


def test_changes_of_a_season_are_since_the_same_phase(tmp_path):
    source = write_series(tmp_path / "s.csv")
    flags = (*SMALL, "--window", 6, "--horizon", 5, "--changes", 2)
    _, levels = prepare(timeseries, source, tmp_path / "levels", *flags[:-2])
    _, changes = prepare(timeseries, source, tmp_path / "changes", *flags)
    x, y = levels["train"]
    known = x[:, : y.shape[1]][..., [4, 5, 4, 5, 4]]
    np.testing.assert_array_equal(changes["train"][1], y - known)
    with pytest.raises(ConfigError, match="--changes 7: a season must lie within the history"):
        prepare(timeseries, source, tmp_path / "more", *flags[:-1], 7)


def test_windows_lie_inside_one_split_and_only_training_is_strided(tmp_path):
    source = write_series(tmp_path / "s.csv")
    flags = (*SMALL, "--stride", 4, "--validation-fraction", 0.1, "--test-fraction", 0.3)
    _, splits = prepare(timeseries, source, tmp_path / "out", *flags, "--examples-per-shard", 5)
    for split, first, stop, stride in (("train", 0, 60, 4), ("validation", 60, 70, 1), ("test", 70, 100, 1)):
        x, y = splits[split]
        starts = range(first, stop - 8, stride)
        assert [list(one) for one in x[:, 0]] == [list(range(a, a + 6)) for a in starts]
        assert [list(one) for one in y[:, 0]] == [list(range(a + 6, a + 9)) for a in starts]
    with open(tmp_path / "out" / "manifest.json") as file:
        assert str(tmp_path) not in file.read()


def test_no_value_outside_the_training_split_enters_its_statistics(tmp_path):
    quiet = prepare(timeseries, write_series(tmp_path / "a.csv"), tmp_path / "a", *SMALL)
    wild = [row if row < 60 else (-1e9) ** (row % 3) for row in range(100)]
    source = write_series(tmp_path / "b.csv", load=wild, wind=wild)
    loud = prepare(timeseries, source, tmp_path / "b", *SMALL, "--features", "wind")
    assert loud[0].statistics["y"] == quiet[0].statistics["y"]
    assert loud[0].statistics["x"].mean[0] == quiet[0].statistics["x"].mean[0]
    check_statistics(loud[0], *loud[1]["train"])
    assert abs(loud[1]["test"][1]).max() > 1e17


@pytest.mark.parametrize("stride", [1, 5])
def test_drop_leaves_out_the_windows_that_touch_what_is_missing(tmp_path, caplog, stride):
    load = ["" if row in (20, 77) else row for row in range(100)]
    wind = ["" if row in (35, 59) else row for row in range(100)]
    source = write_series(tmp_path / "s.csv", load, wind, skip=(45, 46))
    flags = (*SMALL, "--split-rows", 60, 20, 18, "--stride", stride)
    with pytest.raises(DataError, match=r"'load' has no finite value at 2020-02-28T18:30:00 \(4 values"):
        prepare(timeseries, source, tmp_path / "out", *flags)
    with caplog.at_level(logging.INFO):
        _, splits = prepare(timeseries, source, tmp_path / "out", *flags, "--missing", "drop")
    kept = [row for row in range(100) if row not in (45, 46)]  # the rows of the file
    for split, first, stop in (("train", 0, 60), ("validation", 60, 80), ("test", 80, 98)):
        expected, num_left_out = [], 0
        for a in range(first, stop - 8, stride if split == "train" else 1):
            rows = kept[a : a + 9]
            is_whole = rows[-1] - rows[0] == 8 and not {20, 77} & set(rows)
            if is_whole and not {35, 59} & set(rows[:6]):  # the horizon needs no wind
                expected.append(rows)
            else:
                num_left_out += 1
        x, y = splits[split]
        assert [[*a, *b] for a, b in zip(x[:, 0], y[:, 0])] == expected
        assert np.isfinite(x).all()
        assert (f"{split}: {num_left_out} of" in caplog.text) == (num_left_out > 0)


def test_irregular_and_repeated_times(tmp_path):
    source = write_series(tmp_path / "gap.csv", skip=(45, 46))
    message = r"--time time: 2020-02-29T21:30:00 comes after 2020-02-29T18:30:00, and the step is 3600 s \(1 irregular"
    with pytest.raises(DataError, match=message):
        prepare(timeseries, source, tmp_path / "out", *SMALL)
    repeated = [HOURS[row - (row == 11)] for row in range(100)]
    source = write_series(tmp_path / "twice.csv", times=repeated)
    with pytest.raises(DataError, match="2020-02-28T08:30:00 comes after 2020-02-28T08:30:00"):
        prepare(timeseries, source, tmp_path / "out", *SMALL)
    source = write_series(tmp_path / "gap_at_end.csv", skip=(95,))  # in rows that are left out
    prepare(timeseries, source, tmp_path / "out", *SMALL, "--split-rows", 60, 0, 30)
    assert list(Manifest.read(tmp_path / "out").splits) == ["train", "test"]


def test_times_are_read_as_they_are_written(tmp_path, caplog):
    zone = timezone(timedelta(hours=1))
    moments = [datetime(2020, 12, 30, 1, tzinfo=zone) + timedelta(minutes=15 * row) for row in range(400)]
    rows = [(row, f"{time:%d.%m.%Y %H:%M%z}", "x") for row, time in enumerate(moments)]
    source = write_rows(tmp_path / "s.csv", ["load", "when", "word"], rows)
    flags = ("--time", "when", "--targets", "load", "--window", 4, "--horizon", 1, "--features", "all")
    flags = (*flags, "--calendar", "yearday", "hour")
    with pytest.raises(DataError, match=r"'30.12.2020 01:00\+0100' in data row 1 is no time"):
        prepare(timeseries, source, tmp_path / "out", *flags)
    with caplog.at_level(logging.INFO):
        manifest, splits = prepare(timeseries, source, tmp_path / "out", *flags, "--time-format", "%d.%m.%Y %H:%M%z")
    assert "not numbers: word" in caplog.text and manifest.details["step_seconds"] == 900
    assert manifest.details["first_time"]["train"] == "2020-12-30T00:00:00"
    assert manifest.arrays["x"].channels == ("load", "yearday_sin", "yearday_cos", "hour_sin", "hour_cos")
    for window in splits["train"][0][[0, 100, -1]]:
        for row, yearday, hour in window[[0, 1, 3]].T:
            time = moments[int(row)].astimezone(timezone.utc)
            days = 366 if time.year == 2020 else 365
            phase = (time.timetuple().tm_yday - 1) / days
            assert yearday == pytest.approx(math.sin(2 * math.pi * phase), abs=1e-6)
            assert hour == pytest.approx(math.sin(2 * math.pi * (time.hour + time.minute / 60) / 24), abs=1e-6)


@pytest.mark.parametrize(
    "flags, kind, message",
    [
        (("--targets", "lod"), ConfigError, "--targets lod: no such column. Choose of time, wind, sky, load"),
        (("--features", "time"), ConfigError, "--features time: it is the time column"),
        (("--time", "clock"), ConfigError, "--time clock: no such column"),
        (("--features", "sky"), DataError, "column 'sky' holds 'calm' at 2020-02-27T22:30:00"),
        (("--window", 0), ConfigError, "--window 0: must be at least 1"),
        (("--horizon", -1), ConfigError, "--horizon -1: must be at least 1"),
        (("--stride", 0), ConfigError, "--stride 0: must be at least 1"),
        (("--window", 18), ConfigError, "'validation' has 20 rows, and a window with its horizon has 21"),
        (("--split-rows", 60, 30, 11), ConfigError, "--split-rows 60 30 11: the source has 100 rows"),
        (("--split-rows", 0, 50, 50), ConfigError, "a training split is needed"),
        (("--test-fraction", 1.5), ConfigError, "--test-fraction 1.5: must be at least 0"),
        (("--time-format", "%Q"), ConfigError, "--time-format %Q: it is no format"),
        (("--calendar", "moon"), ConfigError, "invalid choice: 'moon'"),
        (("--source", "nowhere.csv"), DataError, "nowhere.csv cannot be read"),
    ],
)
def test_what_is_wrong_with_a_series_is_said(tmp_path, flags, kind, message):
    source = write_series(tmp_path / "s.csv")
    with pytest.raises(kind) as caught:
        prepare(timeseries, source, tmp_path / "out", *SMALL, *flags)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("time,load\n2020-01-02,1\n2020-01-01,2\n2020-01-03,2\n", "comes after 2020-01-02T00:00:00. Sort the rows"),
        ("time,load\n2020-01-01,1\nlater,2\n2020-01-03,2\n", "--time time: 'later' in data row 2 is no time"),
        ("time,load\n2020-01-01,1\n2020-01-02,inf\n2020-01-03,2\n", "no finite value at 2020-01-02T00:00:00"),
        ("time,load\n2020-01-01,1\n2020-01-01,1\n2020-01-01,1\n", "no two times"),
        ("time,load\n2020-01-01,1,2\n2020-01-02,1,2\n", "most lines have 3 fields, and 'time load' has 2"),
        ("", "cannot be read as a table"),
    ],
)
def test_what_is_wrong_in_a_csv_is_said(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    flags = [
        "--targets",
        "load",
        "--window",
        "1",
        "--horizon",
        "1",
        "--validation-fraction",
        "0",
        "--test-fraction",
        "0",
    ]
    with pytest.raises(DataError, match=message):
        prepare(timeseries, tmp_path / "s.csv", tmp_path / "out", *flags)


def test_two_ranks_write_the_windows_that_one_writes(tmp_path, mpirun):
    source = write_series(tmp_path / "s.csv")
    flags = (*SMALL, "--examples-per-shard", 10)
    alone, _ = prepare(timeseries, source, tmp_path / "one", *flags)
    done = mpirun(2, "data_prep/timeseries.py", "--source", source, "--output", tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / "two") == alone and len(alone.splits["train"]) == 6


# --- tables --------------------------------------------------------------------------------------------


def write_iris(path, separator=","):
    """Write iris with the species as a word, and return the rows."""
    iris = load_iris()
    rows = [(*row, iris.target_names[c]) for row, c in zip(iris.data, iris.target)]
    return write_rows(path, ["sepal", "sepal_width", "petal", "petal_width", "species"], rows, separator)


def rows_of(x, table):
    """Return which row of a table [rows, columns] each example x [n, columns] is."""
    places = {row.tobytes(): number for number, row in enumerate(np.asarray(table, np.float32))}
    assert len(places) == len(table)
    return [places[row.tobytes()] for row in x]


def test_diabetes_is_dealt_to_splits_without_leakage(tmp_path):
    data = load_diabetes(scaled=False)
    rows = np.column_stack([data.data, data.target]).tolist()
    source, output = (write_rows(tmp_path / "diabetes.csv", [*data.feature_names, "progression"], rows), tmp_path / "a")
    done = start("tabular", "--source", source, "--target", "-1", "--output", output, "--licence", "public")
    assert done.returncode == 0, done.stderr
    assert verify_shards(output) == []
    manifest, splits = stored(output)
    assert {split: len(y) for split, (_, y) in splits.items()} == {"train": 309, "validation": 45, "test": 88}
    assert manifest.arrays["x"].channels == tuple(data.feature_names)
    assert manifest.arrays["y"].channels == ("progression",) and manifest.arrays["y"].shape == (1,)
    assert (manifest.name, manifest.source, manifest.licence) == ("diabetes", "diabetes.csv", "public")
    found = {split: rows_of(x, data.data) for split, (x, _) in splits.items()}
    assert sorted(row for part in found.values() for row in part) == list(range(442))
    for split, part in found.items():
        np.testing.assert_array_equal(splits[split][1][:, 0], data.target[part].astype(np.float32))
    check_statistics(manifest, *splits["train"])
    _, again = prepare(tabular, source, tmp_path / "b", "--target", "progression")
    _, other = prepare(tabular, source, tmp_path / "c", "--target", 10, "--seed", 1)
    np.testing.assert_array_equal(again["test"][0], splits["test"][0])
    assert sorted(rows_of(other["test"][0], data.data)) != sorted(found["test"])
    for row in found["test"] + found["validation"]:
        rows[row] = [1e9 * value for value in rows[row]]
    write_rows(source, [*data.feature_names, "progression"], rows)
    wild, _ = prepare(tabular, source, tmp_path / "d", "--target", "-1")
    assert wild.statistics == manifest.statistics
    done = start("tabular", "--source", source, "--target", "11", "--output", tmp_path / "e")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--target 11: no such column of 11. Choose of age, sex" in done.stderr


@pytest.mark.parametrize("separator, suffix", [(",", "csv"), (";", "txt"), ("\t", "tsv"), ("  ", "data")])
def test_wine_of_any_separator_without_header(tmp_path, separator, suffix):
    wine = load_wine()
    labels = [(30, 4, 100)[c] for c in wine.target]  # sorted as numbers: 4, 30, 100
    rows = [(label, *row) for label, row in zip(labels, wine.data)]
    source = write_rows(tmp_path / f"wine.{suffix}", None, rows, separator)
    flags = ("--target", 0, "--classes", "--validation-fraction", 0, "--features", -1, 3)
    manifest, splits = prepare(tabular, source, tmp_path / "out", *flags)
    assert manifest.num_classes == 3 and manifest.details["classes"] == {"4": 0, "30": 1, "100": 2}
    assert manifest.arrays["x"].channels == ("13", "3") and manifest.arrays["y"].dtype == "int64"
    assert sorted(splits) == ["test", "train"] and "y" not in manifest.statistics
    x, y = (np.concatenate([splits[split][k] for split in ("train", "test")]) for k in (0, 1))
    assert sorted(zip(x[:, 0], x[:, 1], y)) == sorted(
        (np.float32(row[13]), np.float32(row[3]), {4: 0, 30: 1, 100: 2}[row[0]]) for row in rows
    )
    assert y.shape == (178,)


def test_a_split_file_and_classes_that_are_words(tmp_path):
    source, iris = write_iris(tmp_path / "iris.csv"), load_iris()
    words = ["validation" if row % 5 == 0 else "test" if row % 7 == 0 else "train" for row in range(150)]
    split_file = tmp_path / "split.txt"
    split_file.write_text("\n".join(words))
    flags = ("--target", "species", "--classes", "--split-file", split_file)
    manifest, splits = prepare(tabular, source, tmp_path / "out", *flags)
    assert manifest.details["classes"] == {"setosa": 0, "versicolor": 1, "virginica": 2}
    for split, (x, y) in splits.items():
        rows = [row for row, word in enumerate(words) if word == split]
        np.testing.assert_array_equal(x, iris.data[rows].astype(np.float32))
        np.testing.assert_array_equal(y, iris.target[rows])
    assert manifest.statistics["x"].mean == pytest.approx(
        iris.data[[word == "train" for word in words]].mean(0), rel=1e-6
    )
    for text, message in (
        ("train\n" * 149, "it has 149 words, and the table 150 rows"),
        ("train\n" * 149 + "Test", "word 150 is 'Test'"),
        ("test\n" * 150, "no row is left to train on"),
    ):
        split_file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            prepare(tabular, source, tmp_path / "bad", *flags)
    split_file.unlink()
    with pytest.raises(DataError, match=r"split\.txt"):
        prepare(tabular, source, tmp_path / "bad", *flags)


@pytest.mark.filterwarnings("ignore:overflow")
def test_no_path_stands_in_the_notes_of_an_interrupted_preparation(tmp_path):
    source, split_file = write_iris(tmp_path / "iris.csv"), tmp_path / "split.txt"
    source.write_text(source.read_text().replace("7.9", "1e300"))  # its square is infinite: the writer stops
    split_file.write_text("train\n" * 150)
    flags = ("--target", "petal_width", "--split-file", split_file)
    with pytest.raises(DataError, match="x: its numbers are so large"):
        prepare(tabular, source, tmp_path / "out", *flags)
    notes = (tmp_path / "out" / ".preparation" / "plan.json").read_text()
    assert hashlib.sha256(split_file.read_bytes()).hexdigest() in notes and str(tmp_path) not in notes


def test_words_are_one_hot_with_the_categories_of_the_training_split(tmp_path, caplog):
    source, iris = write_iris(tmp_path / "iris.csv"), load_iris()
    split_file = tmp_path / "split.txt"
    words = ["train" if row % 2 else "test" for row in range(150)]
    split_file.write_text("\n".join(words))
    flags = ("--target", "petal_width", "sepal_width", "--split-file", split_file)
    with caplog.at_level(logging.INFO):
        manifest, splits = prepare(tabular, source, tmp_path / "out", *flags)
    assert "column 'species' is one-hot, 3 categories" in caplog.text
    names = ("sepal", "petal", "species=setosa", "species=versicolor", "species=virginica")
    assert manifest.arrays["x"].channels == names and manifest.arrays["x"].dtype == "float32"
    assert manifest.arrays["y"].channels == ("petal_width", "sepal_width")
    x, y = splits["test"]
    np.testing.assert_array_equal(x[:, 2:], np.eye(3)[iris.target[::2]])
    np.testing.assert_array_equal(x[:, :2], iris.data[::2, [0, 2]].astype(np.float32))
    np.testing.assert_array_equal(y, iris.data[::2, [3, 1]].astype(np.float32))
    split_file.write_text("\n".join("train" if row < 100 else "test" for row in range(150)))
    message = "'species' holds 'virginica' in data row 101, and no row of the training split does"
    with pytest.raises(DataError, match=message):
        prepare(tabular, source, tmp_path / "bad", *flags)


def test_rows_with_missing_values(tmp_path, caplog):
    lines = write_iris(tmp_path / "iris.csv").read_text().splitlines()
    for row, (old, new) in {3: ("1.5", "?"), 10: ("5.4", ""), 30: ("4.8", "-inf")}.items():
        assert old in lines[row + 1]
        lines[row + 1] = lines[row + 1].replace(old, new, 1)
    lines[151 - 1] = lines[151 - 1].replace("virginica", "")
    source = tmp_path / "holes.csv"
    source.write_text("\n".join(lines))
    split_file = tmp_path / "split.txt"
    split_file.write_text("\n".join("test" if row >= 140 or row in (2, 3) else "train" for row in range(150)))
    flags = ("--target", "species", "--classes", "--split-file", split_file)
    with pytest.raises(DataError, match=r"'petal' has no value in data row 4 \(4 values"):
        prepare(tabular, source, tmp_path / "out", *flags)
    with caplog.at_level(logging.INFO):
        manifest, splits = prepare(tabular, source, tmp_path / "out", *flags, "--missing", "drop")
    assert "4 of 150 rows have missing values" in caplog.text and manifest.num_classes == 3
    test = [2, *range(140, 149)]
    np.testing.assert_array_equal(splits["test"][0], load_iris().data[test].astype(np.float32))
    np.testing.assert_array_equal(splits["test"][1], load_iris().target[test])
    assert len(splits["train"][1]) == 150 - 12 - 2
    flags = ("--target", "petal_width", "--features", "sepal_width")  # complete columns
    _, splits = prepare(tabular, source, tmp_path / "whole", *flags)
    assert sum(len(y) for _, y in splits.values()) == 150


@pytest.mark.parametrize("footer", ["Source: the office", "Source: the office,,"])
def test_a_footer_that_is_left_out_makes_no_words_of_numbers(tmp_path, footer):
    source = tmp_path / "t.csv"
    source.write_text("\n".join(["a,b,y", *(f"{row}.5,{row},{row}" for row in range(60)), footer]))
    flags = ("--separator", "comma", "--header", "--target", "y", "--missing", "drop")
    manifest, splits = prepare(tabular, source, tmp_path / "out", *flags)
    assert manifest.arrays["x"].channels == ("a", "b")
    for x, y in splits.values():
        np.testing.assert_array_equal(x, y + np.array([0.5, 0]))


def test_names_that_begin_with_zeros_are_names_of_their_own(tmp_path):
    codes = ("00501", "501", "0", "7")
    source = write_rows(tmp_path / "t.csv", ["zip", "k"], [(codes[row % 4], codes[row % 2]) for row in range(60)])
    flags = ("--target", "k", "--classes", "--categories", "zip", "--test-fraction", 0, "--validation-fraction", 0)
    manifest, splits = prepare(tabular, source, tmp_path / "out", *flags)
    assert manifest.arrays["x"].channels == tuple(f"zip={code}" for code in sorted(codes))
    assert manifest.details["classes"] == {"00501": 0, "501": 1}
    np.testing.assert_array_equal(splits["train"][1], np.arange(60) % 2)


def test_true_and_false_beside_empty_fields_are_numbers(tmp_path):
    source = tmp_path / "t.csv"
    rows = [f"{row},{('TRUE', 'FALSE', '')[row % 3]},{('True', 'False')[row % 2]}" for row in range(60)]
    source.write_text("\n".join(["y,smoker,member", *rows]))
    flags = ("--target", "y", "--missing", "drop", "--seed", 0)
    _, splits = prepare(tabular, source, tmp_path / "out", *flags)
    x, y = (np.concatenate([split[number] for split in splits.values()]) for number in range(2))
    rows = np.round(y[:, 0]).astype(int)
    assert len(rows) == 40 and not (rows % 3 == 2).any()
    np.testing.assert_array_equal(x, np.stack([rows % 3 == 0, rows % 2 == 0], 1))


@pytest.mark.parametrize(
    "flags, kind, message",
    [
        (("--target", "colour"), ConfigError, "--target colour: no such column of 5"),
        (("--target", "-6"), ConfigError, "--target -6: no such column of 5"),
        (("--target", "species"), ConfigError, "--target species: it holds words such as 'setosa'"),
        (("--target", "petal", "sepal", "--classes"), ConfigError, "a class is one column"),
        (("--target", "petal", "--features", "petal"), ConfigError, "--features petal: it is a target"),
        (("--target", "0", "--separator", "tab"), DataError, "by tab each line is one field"),
        (("--target", "0", "--features", "0"), ConfigError, "it is a target"),
        (("--target", "0", "--no-header"), DataError, "column '0' holds numbers, and 'sepal' in data row 1"),
        (("--target", "species", "--no-header"), ConfigError, "no such column of 5"),
        (("--target", "0", "--source", "nowhere.csv"), DataError, "nowhere.csv cannot be read"),
        (("--target", "0", "--validation-fraction", "-1"), ConfigError, "--validation-fraction -1.0"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, flags, kind, message):
    source = write_iris(tmp_path / "iris.csv")
    with pytest.raises(kind) as caught:
        prepare(tabular, source, tmp_path / "out", *flags)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a,b\n", "no rows below the header"),
        (b"", "cannot be read as a table"),
        (b"a,b\n1,2\n1,2,3,4\n", "cannot be read as a table"),
        (b"a,b\n1,2,3\n4,5,6\n", "most lines have 3 fields, and 'a b' has 2"),
        (b"a,b\n\xff\xfe,1\n", "cannot be read as a table"),
        (b"a,b\n1,x\n2,x\n", "all rows have the same class x"),
    ],
)
def test_what_is_wrong_in_a_table_is_said(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    flags = ["--target", "-1", "--classes", "--validation-fraction", "0", "--test-fraction", "0"]
    with pytest.raises(DataError, match=message):
        prepare(tabular, tmp_path / "t.csv", tmp_path / "out", *flags)


def test_two_ranks_write_the_table_that_one_writes(tmp_path, mpirun):
    source = write_iris(tmp_path / "iris.csv", ";")
    split_file = tmp_path / "split.txt"
    split_file.write_text("\n".join("test" if row % 3 else "train" for row in range(150)))
    flags = ("--target", "species", "--classes", "--split-file", split_file, "--examples-per-shard", 20)
    alone, _ = prepare(tabular, source, tmp_path / "one", *flags)
    done = mpirun(2, "data_prep/tabular.py", "--source", source, "--output", tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    assert Manifest.read(tmp_path / "two") == alone and verify_shards(tmp_path / "two") == []
    assert str(tmp_path) not in json.dumps((tmp_path / "two" / "manifest.json").read_text())


def test_classes_are_classes_and_stand_in_the_training_split(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("a,b\n" + "\n".join(f"{i},{i / 7}" for i in range(1, 30)))
    with pytest.raises(DataError, match="no classes"):
        prepare(tabular, table, tmp_path / "out", "--target", "b", "--classes")
    table.write_text("a,b\n" + "\n".join(f"{i},{i % 2 + (i == 5)}" for i in range(10)))
    split = tmp_path / "split.txt"
    split.write_text("\n".join("test" if i == 5 else "train" for i in range(10)))
    with pytest.raises(DataError, match="no row of the training split has the class 2"):
        prepare(tabular, table, tmp_path / "out", "--target", "b", "--classes", "--split-file", split)


def test_decimal_commas_and_other_encodings(tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes("größe;y\n0,5;1,5\n2,5;-0,25\n1;2\n4;3\n".encode("latin-1"))
    with pytest.raises(DataError, match="--encoding"):
        prepare(tabular, table, tmp_path / "out", "--target", "y")
    flags = (
        "--target",
        "y",
        "--decimal",
        ",",
        "--encoding",
        "latin-1",
        "--test-fraction",
        0,
        "--validation-fraction",
        0,
    )
    manifest, splits = prepare(tabular, table, tmp_path / "out", *flags)
    assert splits["train"][0].tolist() == [[0.5], [2.5], [1.0], [4.0]]
    assert splits["train"][1].tolist() == [[1.5], [-0.25], [2.0], [3.0]]
    assert manifest.arrays["x"].channels == ("größe",)


# --- coordinates of a table ----------------------------------------------------------------------------


def coordinates_of(tmp_path, header, rows, *flags):
    """Write a table and prepare it; return the names of the channels, and the coordinates of the rows in order."""
    source = write_rows(tmp_path / "c.csv", header, rows)
    manifest, _ = prepare(tabular, source, tmp_path / "out", "--target", header[-1], *flags)
    parts = [ShardDataset(tmp_path / "out", split) for split in manifest.splits]
    found = [part.coordinates(range(len(part))) for part in parts]
    joined = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    order = np.argsort(joined["row"])
    return manifest.arrays["x"].channels, {name: values[order] for name, values in joined.items()}


@pytest.mark.parametrize("given", ["place", "0", "-3"])
def test_a_coordinate_is_no_feature_however_it_is_given(tmp_path, given):
    rows = [(row + 100, row % 7, row / 2) for row in range(40)]
    channels, found = coordinates_of(tmp_path, ["place", "a", "b"], rows, "--coordinates", given)
    assert channels == ("a",) and found["place"].tolist() == [row[0] for row in rows]


@pytest.mark.parametrize(
    "form",
    ["{}", "{:05d}", "A {}", "12345678901234560{:02d}", "99999999999999999999{}", "{}.5", "{}.50", "+{}", "-0", "1e{}"],
)
@pytest.mark.parametrize("is_feature", [False, True])
def test_coordinates_stand_as_in_the_file(tmp_path, form, is_feature):
    texts = [form.format(row % 29 + 1) for row in range(60)]
    rows = [(text, "" if row == 30 else row / 4, row % 5, row) for row, text in enumerate(texts)]
    features = ["a", "place"] if is_feature and len(form) < 7 and form != "A {}" else ["a"]
    flags = ("--coordinates", "place", "--missing", "drop", "--features", *features)
    _, found = coordinates_of(tmp_path, ["place", "a", "c", "b"], rows, *flags)
    assert found["place"].astype(str).tolist() == texts[:30] + texts[31:]
    assert found["row"].tolist() == [*range(1, 31), *range(32, 61)]
    assert found["place"].dtype.kind == {"{}": "i", "12345678901234560{:02d}": "i", "{}.5": "f"}.get(form, "U")


@pytest.mark.parametrize("missing", ["", "NA", "?"])
def test_a_missing_coordinate_is_no_place_of_its_own(tmp_path, missing):
    rows = [(missing if row == 3 else f"A{row}", row % 7, row) for row in range(40)]
    with pytest.raises(DataError, match=r"'place' has no value in data row 4 .* --missing drop"):
        coordinates_of(tmp_path, ["place", "a", "b"], rows, "--coordinates", "place")
    _, found = coordinates_of(tmp_path, ["place", "a", "b"], rows, "--coordinates", "place", "--missing", "drop")
    assert found["place"].tolist() == [f"A{row}" for row in range(40) if row != 3]


@pytest.mark.parametrize("names", [["row", "c"], ["a b", "a_b"], ["a-b", "a.b"], ["c", "row"]])
def test_coordinates_of_one_name_are_refused(tmp_path, names):
    with pytest.raises(ConfigError, match=r"--coordinates .*Rename the column"):
        coordinates_of(tmp_path, [*names, "x", "y"], [range(4)] * 40, "--coordinates", *names)


# --- large whole numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [2**53, 2**62, 2**63, 2**64, 10**25, -(2**62)])
@pytest.mark.parametrize("has_gap", [False, True])
def test_whole_numbers_that_float64_would_round_are_refused_or_kept(tmp_path, first, has_gap):
    names = [str(first + 1 + 2 * (row % 3)) for row in range(60)]
    ids = ["" if has_gap and row == 7 else name for row, name in enumerate(names)]
    source = write_rows(tmp_path / "t.csv", ["id", "a", "b"], [(name, row % 7, row) for row, name in enumerate(ids)])
    flags = ("--missing", "drop", "--force")
    for target, features in (("b", ("id", "a")), ("id", ("a", "b"))):
        with pytest.raises(DataError, match=r"'id' holds '-?\d+' in data row 1, .* above 2\*\*53.*--coordinates 'id'"):
            prepare(tabular, source, tmp_path / "out", "--target", target, "--features", *features, *flags)
    manifest, _ = prepare(tabular, source, tmp_path / "out", "--target", "b", "--categories", "id", *flags)
    assert manifest.arrays["x"].channels == (*(f"id={name}" for name in sorted(set(names))), "a")
    manifest, _ = prepare(tabular, source, tmp_path / "out", "--target", "id", "--classes", *flags)
    assert set(manifest.details["classes"]) == set(names)
    times = [(f"{time:%Y-%m-%d %H:%M}", name) for time, name in zip(HOURS, names)]
    source = write_rows(tmp_path / "s.csv", ["time", "id"], times)
    with pytest.raises(DataError, match=r"above 2\*\*53"):
        prepare(timeseries, source, tmp_path / "out", "--targets", "id", "--window", 2, "--horizon", 1)


@pytest.mark.parametrize("form", ["{}", "{}e20", "{}.5", "{}00000000000000000", "-{}e300"])
def test_other_large_numbers_are_numbers(tmp_path, form):
    texts = [form.format(row + 1) for row in range(30)]
    source = write_rows(tmp_path / "t.csv", ["a", "b"], [(text, row) for row, text in enumerate(texts)])
    options = tabular.make_parser().parse_args(["--source", str(source), "--output", "o", "--target", "b"])
    table = tabular.tables.read_table(options, tabular.tables.find_format(options))
    assert table["a"].tolist() == [float(text) for text in texts]


@pytest.mark.parametrize(
    "flag, field",
    [
        *((flag, field) for flag in ("--targets", "--features") for field in ("", "NA", "row")),
        ("--time", ""),
        ("--time", "?"),
    ],
)
def test_a_column_that_is_left_out_is_no_column_to_choose(tmp_path, flag, field):
    rows = [(f"{time:%Y-%m-%d %H:%M}", row, field.replace("row", str(row))) for row, time in enumerate(HOURS)]
    source = write_rows(tmp_path / "s.csv", ["time", "load", ""], rows)
    flags = ("--targets", "load", "--window", 2, "--horizon", 1, flag, "column 2")
    with pytest.raises(ConfigError, match=r"column 2: no such column. Choose of time, load$"):
        prepare(timeseries, source, tmp_path / "out", *flags)
