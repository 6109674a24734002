"""Coordinates of examples, from the preparation to predictions and to metrics of groups and skill."""

import csv
import hashlib
import json
import math
import re
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scoringrules
import torch
import weather
from scipy import stats

from hpc_bnn import Gaussian, Grid, GridComm, MeanFieldGaussian, ShardDataset, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.data import verify_shards
from hpc_bnn.data.files import SplitFiles
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.predictive import evaluate_dataset, find_groups, parse_regions
from hpc_bnn.predictive.evaluation import _skill
from hpc_bnn.predictive.groups import Climatology

FACTS = {"name": "made", "source": "test", "licence": "none"}
NUM = {"train": 40, "test": 23}
TIMES = {s: np.datetime64("2019-11-30T22:00") + np.arange(n) * np.timedelta64(7, "h") for s, n in NUM.items()}
STATIONS = {split: np.array(["Öland", "Kiel", "Ystad"])[np.arange(n) % 3] for split, n in NUM.items()}
LATITUDES, LONGITUDES = [52.0, 51.0, 50.0], [358.0, 359.0, 0.0, 1.0]


def make_shards(directory, coordinates, examples_per_shard=9, **facts):
    """Write fields [2, 3, 4] of which the second channel is the newest input, and return the arrays by split."""
    rng, splits = np.random.default_rng(0), {}
    for split, number in NUM.items():
        x = rng.normal(3, 2, (number, 3, 3, 4)).astype("float32")
        y = np.stack([x[:, 2] + rng.normal(0, 1, (number, 3, 4)), rng.normal(5, 3, (number, 3, 4))], 1)
        splits[split] = x, y.astype("float32")
    details = {"latitudes": LATITUDES, "longitudes": LONGITUDES, "persistence": [2, None], "lead_seconds": 3600.0}
    facts = {"target_weights": [[0.5], [1.0], [1.5]], "channels": {"y": ["a", "b"]}, "details": details} | facts
    write_shards(directory, splits, coordinates=coordinates, examples_per_shard=examples_per_shard, **FACTS, **facts)
    return splits


@pytest.fixture
def shards(tmp_path):
    coordinates = {
        split: {"time": TIMES[split], "station": STATIONS[split].tolist(), "height": np.arange(float(n))}
        for split, n in NUM.items()
    }
    return tmp_path / "shards", make_shards(tmp_path / "shards", coordinates)


def evaluate(directory, **options):
    dataset = ShardDataset(directory, "test", dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 48), torch.nn.Unflatten(1, (4, 3, 4)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).view_as(parameter))
    posterior = MeanFieldGaussian(net.double(), init_std=0.1)
    comm = GridComm(Grid())
    groups = find_groups(comm, dataset, options.pop("by", ()), options.pop("regions", None))
    train_set = ShardDataset(directory, "train", dtype=torch.float64, scaling=dataset.manifest)
    options |= {"groups": groups, "train_set": train_set, "num_samples": 5}
    return evaluate_dataset(posterior, Gaussian(2), comm, dataset, **options)


# --- coordinates in files -----------------------------------------------------------------------------------


def test_coordinates_come_back_by_range_and_are_verified(shards):
    files = SplitFiles(shards[0], "test")
    for span in (range(23), range(7, 12), range(20, 23), range(9, 9)):
        found = files.coordinates(span)
        assert found["time"].dtype == "datetime64[us]" and list(found) == ["time", "station", "height"]
        np.testing.assert_array_equal(found["time"], TIMES["test"][span.start : span.stop])
        np.testing.assert_array_equal(found["station"], STATIONS["test"][span.start : span.stop])
        np.testing.assert_array_equal(found["height"], np.arange(23.0)[span.start : span.stop])
    assert verify_shards(shards[0]) == []


@pytest.mark.parametrize("name", ["time", "station", "height"])
def test_changed_coordinates_are_refused(shards, name):
    """By another value under the same size: HDF5's own checksum is written anew, that of the manifest is not."""
    path = shards[0] / "test-00001.h5"
    with h5py.File(path, "r+") as file:
        file[name][3] = file[name][4]
    with pytest.raises(DataError, match=r"test-00001\.h5: its coordinates were changed"):
        SplitFiles(shards[0], "test").coordinates(range(23))


def test_shards_without_coordinates_are_as_before(tmp_path):
    """A former hpc_bnn reads them, and a former run knows them again by the digest of these fields."""
    make_shards(tmp_path / "none", None)
    make_shards(tmp_path / "some", {split: {"time": TIMES[split]} for split in NUM})
    without, with_them = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("none", "some"))
    assert "coordinates" not in without and "coordinates_sha256" not in without["splits"]["test"][0]
    assert with_them["coordinates"] == {"time": "datetime64[us]"}
    dataset = ShardDataset(tmp_path / "none", "test")
    of_data = {name: without[name] for name in ("arrays", "splits", "statistics", "num_classes", "target_weights")}
    assert dataset.manifest.digest == hashlib.sha256(json.dumps(of_data, sort_keys=True).encode()).hexdigest()[:16]
    assert dataset.coordinates(range(3)) == {}


@pytest.mark.parametrize(
    "coordinates, words",
    [
        ({"train": {"time": TIMES["train"]}}, "give all splits the same"),
        ({"elsewhere": {"time": TIMES["train"]}}, "give all splits the same"),
        ({s: {"time": TIMES[s][:-1]} for s in NUM}, r"train: the coordinate time is datetime64\[us\] \(39,\)"),
        ({s: {"time": TIMES[s].reshape(-1, 1)} for s in NUM}, r"train: the coordinate time is"),
        (
            {s: {"time": np.where(np.arange(NUM[s]) == 5, np.datetime64("NaT"), TIMES[s])} for s in NUM},
            "train, example 5: .* no time",
        ),
        ({s: {"y": TIMES[s]} for s in NUM}, "needs a name of its own"),
        ({s: {"mean": TIMES[s]} for s in NUM}, "needs a name of its own"),
        ({s: {"two words": TIMES[s]} for s in NUM}, "needs a name of its own"),
        ({s: {"z": np.arange(NUM[s]) * 1j} for s in NUM}, "needs a name of its own, and a time, number or text"),
        ({s: {"z": np.arange(NUM[s]) if s == "test" else STATIONS[s]} for s in NUM}, "the coordinate z is"),
    ],
)
def test_coordinates_of_another_form_are_refused(tmp_path, coordinates, words):
    with pytest.raises(DataError, match=words):
        make_shards(tmp_path / "s", coordinates)
    assert not (tmp_path / "s/manifest.json").exists()


# --- groups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["station", "season", "month", "hour"])
def test_a_group_has_the_metrics_of_its_examples_alone(tmp_path, shards, by):
    directory, splits = shards
    groups = evaluate(directory, by=[by])
    hours, months = (TIMES["test"].astype(f"datetime64[{u}]").astype(int) for u in "hM")
    label = {
        "station": STATIONS["test"],
        "hour": np.array([f"{h % 24:02d}" for h in hours]),
        "month": np.array([f"{m % 12 + 1:02d}" for m in months]),
        "season": np.array(["DJF" if m % 12 in (11, 0, 1) else "SON" for m in months]),
    }[by]
    table = groups.groups[by]
    assert sorted(table["name"]) == sorted(set(label.tolist())) and len(table["name"]) > 1
    for number, name in enumerate(table["name"]):
        rows = label == name
        alone = tmp_path / f"alone{number}"
        facts = {"details": {}, "target_weights": [[0.5], [1.0], [1.5]], "channels": {"y": ["a", "b"]}}
        write_shards(
            alone, {"train": splits["train"], "test": tuple(a[rows] for a in splits["test"])}, **FACTS, **facts
        )
        expected = evaluate(alone)
        got = {metric: values[number] for metric, values in table["metrics"].items()}
        # 1e-8: a quantile of a mixture is found to a tolerance, with those of its block
        assert got == pytest.approx(expected.metrics, rel=1e-8) and {"crps", "nll", "coverage_90"} <= got.keys()
        channels = {metric: values[number] for metric, values in table["channels"].items()}
        assert channels["crps"] == pytest.approx(expected.curves["channels"]["crps"], rel=1e-11)
        assert table["pit"][number] == pytest.approx(expected.curves["pit"], rel=1e-9)


def test_regions_are_parts_of_the_field(shards):
    """A box over the meridian of 0 degrees, and a mask; their weighted sums add up to the whole."""
    mask = np.zeros((3, 4), bool)
    mask[0], mask[1:, 0] = True, True
    box = parse_regions(["east=49.5,51,-1,0"])["east"]
    found = evaluate(shards[0], regions={"box": box, "mask": mask, "rest": ~mask})
    table, weights = found.groups["region"], np.array([0.5, 1, 1.5])[:, None].repeat(4, 1)
    assert table["name"] == ["box", "mask", "rest"]
    squares = np.square(table["metrics"]["rmse"])
    parts = weights[mask].sum(), weights[~mask].sum()
    whole = (squares[1] * parts[0] + squares[2] * parts[1]) / sum(parts)
    assert whole == pytest.approx(found.metrics["rmse"] ** 2, rel=1e-12) and squares[1] != pytest.approx(squares[2])
    box_mask = np.zeros((3, 4), bool)
    box_mask[1:, 1:3] = True
    again = evaluate(shards[0], regions={"box": box_mask}).groups["region"]
    assert {name: values[0] for name, values in again["metrics"].items()} == {
        n: v[0] for n, v in table["metrics"].items()
    }


@pytest.mark.parametrize("step", [0.01, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("make", [np.float64, np.float32])
@pytest.mark.parametrize("first", [-180, 0])
def test_the_edges_of_a_box_belong_to_it(step, make, first):
    """Of grids that hold their decimals to rounding only, from either end and over the meridian; of one point, too."""
    longitudes = make(np.arange(round(360 / step)) * step + first).astype(float)
    latitudes = make(60 - np.arange(21) * step).astype(float)
    manifest = SimpleNamespace(places=(21, len(longitudes)), details={"latitudes": latitudes, "longitudes": longitudes})
    dataset = SimpleNamespace(manifest=manifest)

    def size(data, *box):
        return len(find_groups(GridComm(Grid()), data, regions={"box": box})[0].places)

    for n in range(-180, 180, 41):
        south, west = round(60 - (7 + n % 13) * step, 2), round(n * step, 2)
        box = south, round(south + 7 * step, 2), west, round(west + 12 * step, 2)
        assert size(dataset, *box) == 8 * 13, box
    assert size(dataset, -90, 90, -180, 180) == size(dataset, -90, 90, 0, 360) == 21 * len(longitudes)
    point = SimpleNamespace(places=(1, 1), details={"latitudes": make([60.1]), "longitudes": make([5.1])})
    assert size(SimpleNamespace(manifest=point), 60.1, 60.1, 5.1, 5.1) == 1


@pytest.mark.parametrize(
    "by, regions, words",
    [
        (["place"], {}, "--by place: the examples have time, station, height"),
        (["horizon"], {}, "--by horizon: the targets have no dim of steps to come"),
        ((), {"sea": np.zeros((3, 4))}, "--regions sea: it holds no point"),
        ((), {"sea": (10, 20, 0, 5)}, "--regions sea: it holds no point"),
        ((), {"sea": np.ones(4)}, r"--regions sea: its mask is \[4\]"),
        ((), {"sea": np.where(np.eye(3, 4), np.nan, 1)}, "--regions sea: its mask has places that are NaN"),
        (
            (),
            {"sea": np.ma.masked_array(np.ones((3, 4)), np.eye(3, 4))},
            "--regions sea: its mask has places that are NaN",
        ),
        (
            (),
            {"sea": np.full((3, 4), "no")},
            "--regions sea: its mask has places that are NaN, masked or words. Write 1",
        ),
    ],
)
def test_groups_that_are_none_are_named(shards, by, regions, words):
    with pytest.raises(ConfigError) as raised:
        find_groups(GridComm(Grid()), ShardDataset(shards[0], "test"), by, regions)
    assert re.search(words, raised.value.on_command_line())


@pytest.mark.parametrize("by", ["hour", "month", "season"])
@pytest.mark.parametrize("text", ["20240115", "15-01-2024", "24-01-15", "2024-13-01T00:00", "2024-01-15T24:00", "noon"])
def test_times_of_another_form_are_no_groups(tmp_path, text, by):
    """Characters at the same places would be."""
    texts = {split: ["2024-01-15T06:00:00"] * (number - 1) + [text] for split, number in NUM.items()}
    make_shards(tmp_path, {split: {"time": values} for split, values in texts.items()})
    data = ShardDataset(tmp_path, "test")
    if (text, by) in [("2024-13-01T00:00", "hour"), ("2024-01-15T24:00", "month"), ("2024-01-15T24:00", "season")]:
        find_groups(GridComm(Grid()), data, [by])  # it has that part
        return
    with pytest.raises(ConfigError, match=f"a time is '{text}', which has no {by}"):
        find_groups(GridComm(Grid()), data, [by])


@pytest.mark.parametrize(
    "text", ["alps", "alps=1,2,3", "alps=50,40,0,5", "alps=0,100,0,5", "=1,2,3,4", "alps=a,b,c,d", "a=nan,1,2,3"]
)
def test_regions_that_are_none_are_named(text):
    with pytest.raises(ConfigError, match="must be NAME=SOUTH,NORTH,WEST,EAST"):
        parse_regions([text])


def test_what_stands_twice_is_one_grouping_and_no_two_regions(shards):
    data, comm = ShardDataset(shards[0], "test"), GridComm(Grid())
    found = [
        [(group.grouping, group.label) for group in find_groups(comm, data, by)]
        for by in (["station", "hour"] * 2, "hour")
    ]
    assert len(found[0]) == len(set(found[0])) and found[1] == [name for name in found[0] if name[0] == "hour"]
    with pytest.raises(ConfigError, match=r"--regions a=0,1,0,1: a stands twice. Give each"):
        parse_regions(["a=1,2,3,4", "b=1,2,3,4", "a=0,1,0,1"])


@pytest.mark.parametrize("names", [["nothing"], "climatology", ["persistence", "Climatology"]])
def test_references_that_are_none_are_named(shards, names):
    """They would be left out in silence."""
    with pytest.raises(
        ConfigError, match=f"^references {names if isinstance(names, str) else names[-1]}: must be names among"
    ):
        evaluate_dataset(
            None, Gaussian(), GridComm(Grid()), ShardDataset(shards[0], "test"), references=names, num_samples=2
        )


def test_a_mask_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "m.npy").write_bytes(b"none")
    for name in ("m.npy", "absent.npy"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            parse_regions([f"land={tmp_path / name}"])


# --- skill --------------------------------------------------------------------------------------------------


def test_skill_against_persistence_and_climatology(shards):
    """Against NumPy and SciPy; the second channel is no input, so persistence knows nothing of it."""
    directory, splits = shards
    found = evaluate(directory, references=["persistence", "climatology"])
    (x, y), weights = (a.astype(float) for a in splits["test"]), np.array([0.5, 1, 1.5])[:, None]
    channels = found.curves["channels"]
    assert "rmse_skill/persistence" not in channels and "persistence/rmse" not in found.metrics  # NaN of a channel
    train = splits["train"][1].astype(float)
    mean, std = train.mean(0), train.std(0)
    error = mean - y

    def average(values):
        return (values * weights).mean((0, 2, 3)) / weights.mean()

    rmse = np.sqrt(average(np.square(error)))
    np.testing.assert_allclose(channels["climatology/rmse"], rmse, rtol=1e-10)
    z = (y - mean) / std
    crps = average(std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)))
    np.testing.assert_allclose(channels["climatology/crps"], crps, rtol=1e-6)
    np.testing.assert_allclose(channels["crps_skill/climatology"], 1 - np.array(channels["crps"]) / crps, rtol=1e-6)
    assert found.metrics["rmse_skill/climatology"] == pytest.approx(
        1 - found.metrics["rmse"] / found.metrics["climatology/rmse"]
    )

    of_a = directory.with_name("a")  # its first channel alone
    write_shards(
        of_a,
        {split: (x, y[:, :1]) for split, (x, y) in splits.items()},
        details={"persistence": [2]},
        target_weights=weights,
        **FACTS,
    )
    dataset = ShardDataset(of_a, "test", dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 24), torch.nn.Unflatten(1, (2, 3, 4))).double()
    options = {"num_samples": 3, "references": ["persistence"]}
    alone = evaluate_dataset(MeanFieldGaussian(net), Gaussian(1), GridComm(Grid()), dataset, **options).metrics
    error = x[:, [2]] - y[:, :1]
    assert alone["persistence/rmse"] == pytest.approx(
        np.sqrt((np.square(error) * weights).mean() / weights.mean()), rel=1e-6
    )
    assert alone["persistence/crps"] == pytest.approx((np.abs(error) * weights).mean() / weights.mean(), rel=1e-6)


@pytest.mark.parametrize("std", [0.0, 1e-320, 1e-300, 1e-12, 1.0])
def test_climatology_of_a_target_that_is_nearly_constant(std):
    """A point forecast has its absolute error as CRPS."""
    y = torch.tensor([[3.0, -2e5, 1e30, 1.0]], dtype=torch.float64)
    climatology = Climatology(torch.ones(4, dtype=torch.float64), torch.full((4,), std, dtype=torch.float64))
    expected = (y - 1).abs() if std < 1 else torch.from_numpy(scoringrules.crps_normal(y.numpy(), 1.0, std))
    torch.testing.assert_close(climatology.crps(y), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("theirs", [math.inf, math.nan, 0.0])
def test_there_is_no_skill_against_what_is_no_score(theirs):
    assert math.isnan(_skill(0.3, theirs)) and _skill(0.3, 0.5) == pytest.approx(0.4)


@pytest.mark.parametrize(("window", "horizon"), [(6, 3), (3, 3), (2, 3)])
def test_persistence_of_a_series_is_its_newest_row(tmp_path, window, horizon):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(20, *shape)).astype(np.float32) for shape in ((2, window), (1, horizon)))
    details = {"window": window, "horizon": horizon, "persistence": [1]}
    write_shards(tmp_path, {"train": (x, y)}, details=details, **FACTS)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2 * horizon), torch.nn.Unflatten(1, (2, horizon)))
    net(torch.zeros(1, 2, window))
    dataset, options = ShardDataset(tmp_path, "train"), {"num_samples": 2, "references": ["persistence"]}
    found = evaluate_dataset(MeanFieldGaussian(net), Gaussian(1), GridComm(Grid()), dataset, **options).metrics
    assert found["persistence/rmse"] == pytest.approx(np.sqrt(np.square(x[:, 1:, -1:] - y).mean()), rel=1e-5)


# --- from files to predictions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weather_run(tmp_path_factory):
    """A run on fields of 3 lead times, of which every example's values are known from its time."""
    xarray, directory = pytest.importorskip("xarray"), tmp_path_factory.mktemp("weather")
    times = np.datetime64("2020-02-20T00", "ns") + np.arange(80) * np.timedelta64(6, "h")
    coordinates = {"time": times, "latitude": [52.0, 51.0, 50.0], "longitude": [0.0, 1.0, 2.0, 3.0]}
    values = np.arange(80.0)[:, None, None] + np.linspace(0, 0.5, 12).reshape(3, 4)
    units = {"units": "K"}
    xarray.Dataset({"t": (tuple(coordinates), values, units)}, coordinates).to_netcdf(directory / "t.nc")
    words = [
        "--source",
        str(directory / "t.nc"),
        "--history",
        "2",
        "--lead",
        "1",
        "4",
        "2",
        "--output",
        str(directory / "shards"),
    ]
    options = weather.make_parser().parse_args(words)
    weather.prepare(options, GridComm(Grid()))
    words = [
        "train",
        "--data.shards",
        str(directory / "shards"),
        "--run_dir",
        str(directory / "run"),
        "--num_epochs",
        "1",
    ]
    words += [
        "--num_samples",
        "1",
        "--num_test_samples",
        "2",
        "--global_batch_size",
        "16",
        "--model.arguments",
        "{hidden: [4]}",
    ]
    assert main(words) == 0
    return directory


def test_predictions_know_their_times_and_leads(weather_run, tmp_path):
    xarray = pytest.importorskip("xarray")
    assert main(["predict", str(weather_run / "run"), "--output", str(tmp_path / "p.h5")]) == 0
    with xarray.open_dataset(tmp_path / "p.h5", decode_timedelta=True) as found:
        assert found["mean"].coords.keys() >= {"time", "lead_time", "latitude", "longitude", "channel"}
        assert found.channel.values.tolist() == ["t t+1", "t t+4", "t t+2"]
        np.testing.assert_array_equal(found.lead_time / np.timedelta64(6, "h"), [1, 4, 2])
        assert found.attrs["channel_units"] == ["K"] * 3
        valid = found.time + found.lead_time  # [examples, channels]
        expected = (valid - np.datetime64("2020-02-20T00")) / np.timedelta64(6, "h")
        np.testing.assert_allclose(found.y.isel(latitude=0, longitude=0), expected, rtol=1e-6)
        assert found.sel(channel="t t+2", latitude=51).mean("longitude")["mean"].shape == (found.sizes["example"],)


def test_the_command_writes_groups_and_the_report_shows_them(weather_run, tmp_path, capsys):
    run_dir, output = str(weather_run / "run"), weather_run / "run/evaluation.json"
    words = [
        "--by",
        "hour,season",
        "--regions",
        "all=-90,90,-180,180; north=52,52,0,3",
        "--references",
        "persistence,climatology",
    ]
    assert main(["evaluate", run_dir, *words]) == 0
    assert "crps_skill/persistence" in capsys.readouterr().out
    content = json.loads(output.read_text())
    assert content["groups"].keys() == {"hour", "season", "region"}
    assert content["groups"]["hour"]["name"] == ["06", "12", "18"]
    whole = {name: values[0] for name, values in content["groups"]["region"]["metrics"].items()}
    assert whole == pytest.approx({name: content["metrics"][name] for name in whole}, rel=1e-9)
    # The fields rise by 1 in each step: the error of persistence is the lead
    assert content["curves"]["channels"]["persistence/rmse"] == pytest.approx([1, 4, 2], rel=1e-4)
    assert main(["report", run_dir, "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert (
        all(f"<h2>By {title}</h2>" in page for title in ("channel", "hour", "region")) and "By season" not in page
    )  # one season
    assert (
        main(["evaluate", run_dir, "--by", "station"]) == 2
        and "--by station: the examples have time" in capsys.readouterr().err
    )
    assert main(["evaluate", run_dir, "--references", "guess"]) == 2 and "--references guess" in capsys.readouterr().err


def test_series_have_times_horizons_and_skill(tmp_path, capsys):
    """Of a line, whose persistence is wrong by the steps to come; of changes, by the season."""
    import timeseries

    with open(tmp_path / "line.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["time", "v"])
        rows.writerows([f"2021-01-{1 + n // 24:02d}T{n % 24:02d}:00:00Z", n] for n in range(240))
    for name, flags in {"plain": [], "changes": ["--changes"]}.items():
        words = [
            "--source",
            tmp_path / "line.csv",
            "--targets",
            "v",
            "--window",
            6,
            "--horizon",
            3,
            "--output",
            tmp_path / name,
            *flags,
        ]
        timeseries.prepare(timeseries.make_parser().parse_args(list(map(str, words))), GridComm(Grid()))
        run_dir = str(tmp_path / f"run {name}")
        words = [
            "train",
            "--data.shards",
            str(tmp_path / name),
            "--run_dir",
            run_dir,
            "--num_epochs",
            "1",
            "--num_samples",
            "1",
        ]
        assert main([*words, "--num_test_samples", "2", "--global_batch_size", "16"]) == 0
        assert main(["evaluate", run_dir, "--by", "horizon", "--references", "persistence"]) == 0
        content = json.loads((tmp_path / f"run {name}/evaluation.json").read_text())["groups"]["horizon"]
        assert content["name"] == ["1 h", "2 h", "3 h"]
        assert content["metrics"]["persistence/rmse"] == pytest.approx([1, 2, 3], rel=1e-4)
    found, y = (
        SplitFiles(tmp_path / "plain", "test"),
        ShardDataset(tmp_path / "plain", "test", normalises_targets=False),
    )
    newest = (found.coordinates(range(5))["time"] - np.datetime64("2021-01-01")) / np.timedelta64(1, "h")
    np.testing.assert_allclose(y.fetch(slice(0, 5))[1][:, 0, 0], newest + 1)


def test_rows_and_columns_of_a_table_are_kept(tmp_path, capsys):
    import tabular

    with open(tmp_path / "t.csv", "w") as file:
        rows = csv.writer(file)
        rows.writerow(["Station name", "a", "y"])
        rows.writerows([f"S{n % 3}", n, 2 * n] for n in range(60))
    words = [
        "--source",
        tmp_path / "t.csv",
        "--target",
        "y",
        "--coordinates",
        "Station name",
        "--output",
        tmp_path / "s",
    ]
    tabular.prepare(tabular.make_parser().parse_args(list(map(str, words))), GridComm(Grid()))
    dataset = ShardDataset(tmp_path / "s", "test", normalises_targets=False)
    found = dataset.coordinates(range(len(dataset)))
    assert dataset.in_shape == (1,)
    np.testing.assert_allclose(dataset.fetch(slice(None))[1][:, 0], 2 * (found["row"] - 1))
    np.testing.assert_array_equal(found["Station_name"], [f"S{(row - 1) % 3}" for row in found["row"]])
