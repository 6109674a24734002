"""``hpc-bnn predict`` and ``evaluate`` on runs that were trained here."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import stored
from torch import nn

import hpc_bnn
from hpc_bnn import ShardDataset, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.data import Manifest
from hpc_bnn.data.manifest import ArraySpec
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.run import export

REPOSITORY = Path(__file__).parent.parent


def test_the_manifest_of_another_run_is_refused(numbers, numbers_run, tmp_path, capsys):
    """Of the same shapes, with other statistics: predictions would be in other units."""
    shutil.copytree(numbers_run, tmp_path / "run")
    shutil.copy(numbers / "elsewhere/manifest.json", tmp_path / "run/manifest.json")
    with pytest.raises(DataError, match="is not that of the run"):
        hpc_bnn.load(tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "is not that of the run" in capsys.readouterr().err


def test_predictions_of_classes_are_those_of_the_evaluation(digits_run, digits, tmp_path, capsys):
    path = tmp_path / "predictions.h5"
    assert main(["predict", str(digits_run), "--output", str(path), "--members", "true"]) == 0
    assert str(path) in capsys.readouterr().out
    y = ShardDataset(digits, "test").fetch(slice(None))[1].numpy()
    with h5py.File(path) as file:
        p = file["probabilities"][()]
        nll = -np.log(np.take_along_axis(p, y[:, None].astype(int), 1)).mean()
        accuracy = (file["class"][()] == y).mean()
        assert file["members"].shape == (len(y), 8, 10) and file["quantiles"].shape == (len(y), 5, 10)
        np.testing.assert_allclose(file["members"][()].mean(1), p, atol=1e-6)
    summary = json.loads((digits_run / "summary.json").read_text())
    assert summary["test/nll"] == pytest.approx(nll, rel=1e-5)
    assert summary["test/accuracy"] == pytest.approx(accuracy, rel=1e-6) and accuracy > 0.7
    assert main(["predict", str(digits_run), "--output", str(path)]) == 2
    assert "it is there already" in capsys.readouterr().err


def test_predictions_are_data_with_names_and_truth(digits_run, numbers, numbers_run, digits, tmp_path):
    xarray = pytest.importorskip("xarray")
    for run_dir, shards in ((digits_run, digits), (numbers_run, numbers / "here")):
        path = tmp_path / f"{run_dir.name}.nc"
        command = ["predict", str(run_dir), "--output", str(path), "--members", "true"]
        assert main(command) == 0
        with h5py.File(
            shards / json.loads((shards / "manifest.json").read_text())["splits"]["test"][0]["file"]
        ) as file:
            truth = file["y"][()]
        with xarray.open_dataset(path, engine="netcdf4") as found:
            assert not any("phony" in name for name in found.sizes)
            np.testing.assert_allclose(found["y"], truth, rtol=1e-6)
            assert found["quantiles"].sel(quantile=0.25).shape == found["std"].shape
            assert found["members"].mean("member").shape == found["std"].shape and len(found.example) == len(truth)
            if run_dir is digits_run:
                assert found["probabilities"].sel(category=3).dims == ("example",)
                summary = json.loads((run_dir / "summary.json").read_text())
                assert float((found["class"] == found["y"]).mean()) == pytest.approx(summary["test/accuracy"], rel=1e-6)
            else:
                error = found["mean"].sel(channel="b") - found["y"].sel(channel="b")
                assert 0 < float((error**2).mean()) < 500  # its variance is 2,500
                frame = found[["mean", "std"]].to_dataframe()
                assert list(frame.index.names) == ["example", "channel"] and len(frame) == 2 * len(truth)
    without = tmp_path / "without.h5"
    assert main([*command[:3], str(without), "--truth", "false", "--quantiles", "[]"]) == 0
    with h5py.File(without) as file:
        assert set(file) == {"example", "channel", "mean", "std", "aleatoric_std", "epistemic_std"}


def test_a_table_has_the_numbers_of_the_file(digits_run, numbers_run, tmp_path, capsys):
    pandas = pytest.importorskip("pandas")
    for run_dir, label in ((digits_run, "3"), (numbers_run, "b")):
        paths = [tmp_path / f"{label}.{kind}" for kind in ("h5", "csv")]
        for path in paths:
            assert main(["predict", str(run_dir), "--output", str(path), "--members", "true"]) == 0
        table = pandas.read_csv(paths[1], index_col="example", dtype=str)
        num_columns = 0
        with h5py.File(paths[0]) as file:
            for name in set(file) - {"example", "category", "channel", "quantile", "member"}:
                stored, titles = file[name][()], [t for t in table if t.partition(" ")[0].partition("/")[0] == name]
                assert len(titles) == stored[0].size, name
                cells = table[titles].astype(stored.dtype).to_numpy()  # the digits of the dtype are all there
                np.testing.assert_array_equal(cells, stored.reshape(len(stored), -1))
                num_columns += len(titles)
            median = table[f"quantiles/0.5/{label}"].astype("float32")
            np.testing.assert_array_equal(median, file["quantiles"][:, 2, 3 if label == "3" else 1])
        assert num_columns == table.shape[1] and sorted(tmp_path.glob(".*")) == []
    assert main(["predict", str(digits_run), "--output", str(tmp_path / "3.csv")]) == 2
    assert "it is there already" in capsys.readouterr().err
    for name in ("3.parquet", "3.xlsx", "3.csv.gz", "3.TXT"):  # no HDF5 under the name of another format
        assert main(["predict", str(digits_run), "--output", str(tmp_path / name)]) == 2
        assert f"{name}: predictions are written as HDF5" in capsys.readouterr().err and not (tmp_path / name).exists()
    assert main(["predict", str(digits_run), "--output", str(tmp_path / "4.CSV"), "--members", "true"]) == 0
    assert (tmp_path / "4.CSV").read_text() == (tmp_path / "3.csv").read_text()
    assert "entropy [nats]" in (tmp_path / "3.csv").read_text().partition("\n")[0]


def test_a_table_has_coordinates_units_and_gaps(tmp_path):
    pandas = pytest.importorskip("pandas")
    rng, times = np.random.default_rng(0), np.datetime64("2020-01-01T06", "s") + np.arange(20) * np.timedelta64(90, "s")
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2))
    y[3, 1] = np.nan
    facts = {"name": "made", "source": "test", "licence": "none", "channels": {"y": ["t@850", "t, max"]}}
    facts |= {"details": {"units": {"t": "K", "t, max": "°C"}}, "missing_targets": True}
    beside = {split: {"time": times, "station": [f"s{n}" for n in range(20)]} for split in ("train", "test")}
    write_shards(tmp_path / "data", {"train": (x, y), "test": (x, y)}, coordinates=beside, **facts)
    words = ["--num_epochs", "1", "--num_samples", "1", "--num_test_samples", "2", "--global_batch_size", "10"]
    assert main(["train", "--data.shards", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run"), *words]) == 0
    assert main(["predict", str(tmp_path / "run"), "--output", str(tmp_path / "p.csv"), "--quantiles", "[0.1]"]) == 0
    table = pandas.read_csv(tmp_path / "p.csv", parse_dates=["time"])
    of_targets = ["y", "mean", "std", "aleatoric_std", "epistemic_std", "quantiles/0.1"]
    titles = [f"{name}/{channel}" for name in of_targets for channel in ("t@850 [K]", "t, max [°C]")]
    assert list(table) == ["example", "time", "station", *titles]
    assert np.array_equal(table["time"].to_numpy().astype("datetime64[s]"), times) and table["station"][7] == "s7"
    np.testing.assert_allclose(table["y/t, max [°C]"], y[:, 1], rtol=1e-6)
    assert table["y/t, max [°C]"].isna().sum() == 1


@pytest.mark.parametrize(
    ("shape", "details", "dims"),
    [
        ((2, 3, 4), {"latitudes": [50, 51, 52], "longitudes": [0, 1, 2, 3]}, ("channel", "latitude", "longitude")),
        ((2, 4), {"horizon": 4, "step_seconds": 3600.0}, ("channel", "horizon")),
        ((2, 3, 4), {}, ("channel", "dim_1", "dim_2")),
    ],
)
def test_fields_and_series_have_coordinates(shape, details, dims, tmp_path):
    xarray, rng = pytest.importorskip("xarray"), np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)).astype("float32"), rng.normal(size=(40, *shape)).astype("float32")
    facts = {"name": "made", "source": "test", "licence": "none", "channels": {"y": ["a", "b"]}, "details": details}
    write_shards(tmp_path / "data", {"train": (x[:30], y[:30]), "test": (x[30:], y[30:])}, **facts)
    command = [
        "train",
        "--data.shards",
        str(tmp_path / "data"),
        "--run_dir",
        str(tmp_path / "run"),
        "--num_epochs",
        "1",
    ]
    assert main([*command, "--num_samples", "1", "--num_test_samples", "2", "--global_batch_size", "10"]) == 0
    path = tmp_path / "predictions.h5"
    assert main(["predict", str(tmp_path / "run"), "--output", str(path)]) == 0
    with xarray.open_dataset(path, engine="netcdf4") as found:
        assert found["mean"].dims == found["y"].dims == ("example", *dims)
        np.testing.assert_allclose(found["y"], y[30:], rtol=1e-5, atol=1e-6)
        if "latitudes" in details:
            assert found["mean"].sel(latitude=51, channel="b").shape == (10, 4)
            assert found.latitude.units == "degrees_north"
        if "horizon" in details:
            assert found.horizon.values.tolist() == [3600, 7200, 10800, 14400]


def test_more_samples_than_in_training_and_another_split(digits_run, tmp_path):
    path = tmp_path / "train.h5"
    command = ["predict", str(digits_run), "--output", str(path), "--split", "train", "--num_test_samples", "3"]
    assert main([*command, "--quantiles", "[]"]) == 0
    with h5py.File(path) as file:
        assert len(file["class"]) == 1438 and "quantiles" not in file and file.attrs["num_samples"] == 3


def test_foreign_shards_are_normalised_as_the_training_data(numbers, numbers_run, tmp_path):
    """A network that has learnt y = a x + b keeps it for data of another mean."""
    path = tmp_path / "predictions.h5"
    command = ["predict", str(numbers_run), "--shards", str(numbers / "elsewhere"), "--output", str(path)]
    assert main(command) == 0
    y = ShardDataset(numbers / "elsewhere", "test", normalises_targets=False).fetch(slice(None))[1].numpy()
    with h5py.File(path) as file:
        mean, std = file["mean"][()], file["std"][()]
        assert list(file.attrs["channels"]) == ["a", "b"]
        # Extrapolated by 3 standard deviations; with the statistics of the foreign data it would be wrong by 30 and 150
        assert (np.abs(mean.mean(0) - y.mean(0)) < [15, 75]).all()
        assert (std > 0).all()
        assert (np.diff(file["quantiles"][()], axis=1) > 0).all()


def test_predictions_of_large_numbers_keep_their_differences(tmp_path):
    """Time stamps: in float32 they would be a multiple of 128 seconds."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1))
    y = 1.7e9 + 100 * x + rng.normal(size=(60, 1))
    write_shards(tmp_path / "s", {"train": (x, y), "test": (x, y)}, name="s", source="test", licence="none")
    words = ["--data.shards", tmp_path / "s", "--run_dir", tmp_path / "r", "--model.arguments", "{hidden: [16]}"]
    words += ["--num_samples", 2, "--num_test_samples", 4, "--num_epochs", 40, "--global_batch_size", 20]
    words += ["--optimizer.learning_rate", 0.03, "--posterior.init_std", 0.02, "--kl_weight", 0.1]
    assert main(["train", *map(str, words)]) == 0
    assert main(["predict", str(tmp_path / "r"), "--output", str(tmp_path / "p.h5")]) == 0
    with h5py.File(tmp_path / "p.h5") as file:
        mean = file["mean"][()]
    assert np.abs(mean - y).mean() < 40 and len(np.unique(mean)) == 60
    assert json.loads((tmp_path / "r/summary.json").read_text())["test/rmse"] == pytest.approx(
        np.sqrt(np.square(mean - y).mean()), rel=1e-3
    )


def test_evaluation_by_channel_and_of_foreign_data(numbers, numbers_run, capsys):
    assert main(["evaluate", str(numbers_run), "--ood_shards", str(numbers / "elsewhere")]) == 0
    assert "ood_auroc/epistemic_std" in capsys.readouterr().out
    content = json.loads((numbers_run / "evaluation.json").read_text())
    assert content["metrics"]["ood_auroc/epistemic_std"] > 0.9
    channels = content["curves"]["channels"]
    assert channels["name"] == ["a", "b"] and channels["rmse"][1] > 2 * channels["rmse"][0]
    assert sum(content["curves"]["pit"]) == pytest.approx(1)


def test_data_of_another_form_are_refused(digits_run, numbers, tmp_path, capsys):
    command = ["predict", str(digits_run), "--shards", str(numbers / "here"), "--output", str(tmp_path / "p.h5")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "x is [2]" in error and "[1, 8, 8]" in error
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "it holds no run" in capsys.readouterr().err


def test_classes_that_are_foreign_can_be_predicted_and_not_evaluated(digits_run, tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    facts = {"name": "foreign", "source": "test", "licence": "none", "num_classes": 3}
    channels = {}
    write_shards(tmp_path / "foreign", {"train": (x, np.arange(20) % 3)}, channels=channels, **facts)
    foreign = ["--split", "train", "--shards", str(tmp_path / "foreign"), "--output", str(tmp_path / "p.h5")]
    assert main(["predict", str(digits_run), *foreign]) == 0
    assert (
        main(["evaluate", str(digits_run), "--data.shards", str(tmp_path / "foreign"), "--data.test_split", "train"])
        == 1
    )
    assert "10 classes, and the data have 3" in capsys.readouterr().err
    ood = ["--ood_shards", str(tmp_path / "foreign"), "--ood_split", "train"]
    assert main(["evaluate", str(digits_run), *ood]) == 0
    metrics = json.loads((digits_run / "evaluation.json").read_text())["metrics"]
    assert metrics["ood_auroc/entropy"] > 0.8  # noise is not a digit


@pytest.mark.parametrize("name", ["classes", "changes", "lead", "lead_seconds", "step_seconds", "step_months"])
def test_targets_that_mean_something_else_are_not_evaluated(digits, digits_run, tmp_path, name, capsys, caplog):
    """The same shapes, such as of another lead time: an evaluation would be wrong, and a prediction comes without them."""
    shutil.copytree(digits_run, tmp_path / "run")
    data, run = Manifest.read(digits), Manifest.read(tmp_path / "run")
    ours, theirs = (3600.0, 7200.0) if name == "lead_seconds" else (["a", "b"], ["b", "a"])
    for manifest, value, directory in ((data, theirs, tmp_path / "other"), (run, ours, tmp_path / "run")):
        directory.mkdir(exist_ok=True)
        changed = replace(manifest, details=manifest.details | {name: value})
        (directory / "manifest.json").write_text(changed.to_json())
    for file in digits.glob("*.h5"):
        (tmp_path / "other" / file.name).symlink_to(file)
    words = [str(tmp_path / "run"), "--data.shards", str(tmp_path / "other")]
    for command in ("evaluate", "calibrate"):
        assert main([command, *words, *(["--split", "test", "--half", "true"] if command == "calibrate" else [])]) == 1
        assert f"trained with {name} {ours}, and the data have {theirs}" in capsys.readouterr().err
    words = [str(tmp_path / "run"), "--shards", str(tmp_path / "other"), "--output", str(tmp_path / "p.h5")]
    assert main(["predict", *words]) == 0 and "the truth of digits is left out" in caplog.text
    assert "y" not in h5py.File(tmp_path / "p.h5")


@pytest.mark.parametrize("change", ["units", "kind"])
def test_inputs_in_other_units_or_of_another_kind_are_refused(digits, digits_run, tmp_path, change, capsys):
    """The same shapes and channels: bytes and fractions of pixels, K and degC."""
    shutil.copytree(digits_run, tmp_path / "run")
    found = Manifest.read(digits)
    other = replace(found, details=found.details | {"units": {"t": "degC", "z": "m"}})
    if change == "kind":
        spec = found.arrays["x"]
        arrays = {**found.arrays, "x": ArraySpec(spec.shape, "float32", spec.channels)}
        other = replace(found, arrays=arrays)
    mine = replace(found, details=found.details | {"units": {"t": "K", "z": "m"}})
    for manifest, directory in ((other, tmp_path / "other"), (mine, tmp_path / "run")):
        directory.mkdir(exist_ok=True)
        (directory / "manifest.json").write_text(manifest.to_json())
    for file in digits.glob("*.h5"):
        (tmp_path / "other" / file.name).symlink_to(file)
    said = "t is in 'degC', and the network was trained on it in 'K'" if change == "units" else "x is float32, and the"
    for command in ("evaluate", "predict"):
        flag = "--data.shards" if command == "evaluate" else "--shards"
        words = [command, str(tmp_path / "run"), flag, str(tmp_path / "other")]
        assert main([*words, *(["--output", str(tmp_path / "p.h5")] if command == "predict" else [])]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_a_truth_of_another_kind_is_left_out(digits_run, tmp_path, shape, caplog):
    x = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    y, facts = np.zeros((20, *shape), np.float32), {"name": "foreign", "source": "test", "licence": "none"}
    write_shards(tmp_path / "foreign", {"train": (x, y)}, **facts)
    words = ["--split", "train", "--shards", str(tmp_path / "foreign"), "--output", str(tmp_path / "p.h5")]
    assert main(["predict", str(digits_run), *words]) == 0
    assert "for 10 classes, and the data have none: the truth of foreign is left out" in caplog.text
    with h5py.File(tmp_path / "p.h5") as file:
        assert "y" not in file and len(file["class"]) == 20


def test_a_full_disk_is_said_and_leaves_nothing(digits_run, tmp_path):
    """In a process of its own: HDF5 used to end it with a segmentation fault, at its exit."""
    command = f"ulimit -f 20; exec {sys.executable} -m hpc_bnn predict {digits_run} --output p.h5 --members true"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "p.h5 cannot be written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["activation: Tanh", "hidden: [16]"])
def test_a_config_of_another_network_is_refused(digits_run, tmp_path, capsys, change):
    """It would give other numbers without a word where the shapes fit."""
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["arguments"] |= yaml.safe_load(change)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for command in (["evaluate", str(run)], ["predict", str(run), "--output", str(tmp_path / "p.h5")]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "--model.arguments" in said and "the checkpoints in" in said and "Leave it at that" in said
    assert main(["evaluate", str(digits_run), "--model.arguments", f"{{{change}}}"]) == 2


def test_a_file_that_appears_while_it_is_predicted_is_not_replaced(digits_run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "p.h5"
    usual = export.publish

    def late(temporary, target, **options):
        path.write_text("mine")
        usual(temporary, target, **options)

    monkeypatch.setattr(export, "publish", late)
    assert main(["predict", str(digits_run), "--output", str(path)]) == 2
    assert "it is there already" in capsys.readouterr().err
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["p.h5"]


def test_verify_speaks_of_predictions(digits_run, tmp_path, capsys):
    path = tmp_path / "p.h5"
    assert main(["predict", str(digits_run), "--output", str(path)]) == 0
    assert main(["verify", str(path)]) == 0 and "predictions, complete" in capsys.readouterr().out
    with h5py.File(path) as file:
        place = file["std"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 9] ^= 1
    path.write_bytes(content)
    assert main(["verify", str(path)]) == 1 and str(path) in capsys.readouterr().err
    path.write_text("no predictions")
    assert main(["verify", str(path)]) == 1 and str(path) in capsys.readouterr().err


def test_a_checkpoint_is_read_without_code(digits_run):
    path = max((digits_run / "checkpoints").glob("*.pt"))
    assert {"model", "optimizer", "place"} <= torch.load(path, weights_only=True).keys()


# --- predictions for arrays in memory ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_loaded_run_predicts_what_the_command_writes(kind, digits, digits_run, numbers, numbers_run, tmp_path):
    """For inputs as they lie in the shards, as an array, a tensor, in another dtype, or a part of them."""
    run_dir, shards = (digits_run, digits) if kind == "classes" else (numbers_run, numbers / "here")
    path, x = tmp_path / "predictions.h5", stored(shards)
    assert main(["predict", str(run_dir), "--output", str(path), "--members", "true", "--which", "best"]) == 0
    predictor = hpc_bnn.load(run_dir)
    found = predictor.predict(x, quantiles=(0.05, 0.25, 0.5, 0.75, 0.95), members=True)
    with h5py.File(path) as file:
        assert found.keys() == {name for name in file if not file[name].is_scale} - {"y", "row"}
        for name, values in found.items():
            np.testing.assert_allclose(values, file[name][()], rtol=1e-6, atol=1e-6)
            assert values.shape == file[name].shape
    again = predictor.predict(torch.from_numpy(x).double(), batch_size=7, progress=True)
    one = predictor.predict(x[3:4], num_samples=3)
    for name, values in again.items():
        np.testing.assert_allclose(values, found[name], rtol=1e-5, atol=1e-6)
        assert one[name].shape == (1, *values.shape[1:])
    assert not np.allclose(one["std"], found["std"][3:4], rtol=1e-3)
    assert predictor.num_steps == json.loads((run_dir / "evaluation.json").read_text())["num_steps"]


def test_a_run_is_loaded_where_its_data_are_not(numbers_run, numbers, tmp_path):
    """In a process of its own, as a notebook; MPI and Horovod are not there, the run was moved."""
    shutil.copytree(numbers_run, tmp_path / "moved")
    np.save(tmp_path / "x.npy", stored(numbers / "here"))
    program = (
        "import sys; sys.modules['mpi4py'] = sys.modules['horovod'] = None\n"
        "import numpy as np, hpc_bnn\n"
        "print(hpc_bnn.load('moved').predict(np.load('x.npy'))['mean'].mean(0))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mean = hpc_bnn.load(numbers_run).predict(stored(numbers / "here"))["mean"].mean(0)
    np.testing.assert_allclose([float(n) for n in done.stdout.strip().strip("[]").split()], mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x[0], "an example of the training is"),
        (lambda x: x[..., :1], "an example of the training is"),
        (lambda x: x[:0], "one or more"),
        (lambda x: {"image": x}, "the network has the inputs x"),
        (lambda x: x + 0.25, "the training data are uint8"),
        (lambda x: x.astype(int) - 1, "the training data are uint8"),
        (lambda x: x.astype(np.uint16) + 256, "the training data are uint8"),
        (lambda x: np.where(x > 9, np.nan, x), "the training data are uint8"),
        (lambda x: x.astype(str), "the training data are uint8"),
    ],
)
def test_inputs_of_another_form_are_refused(digits_run, digits, change, named):
    with pytest.raises(ConfigError, match=named):
        hpc_bnn.load(digits_run).predict(change(stored(digits)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_samples": 2.5}, "num_samples"),
        ({"num_samples": "a"}, "num_samples"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"quantiles": [0.0]}, "quantiles"),
    ],
)
def test_arguments_of_a_prediction_are_checked(numbers_run, numbers, options, named):
    with pytest.raises(ConfigError, match=f"^{named} "):
        hpc_bnn.load(numbers_run).predict(stored(numbers / "here"), **options)
    with pytest.raises(ConfigError, match="which last: must be best or newest"):
        hpc_bnn.load(numbers_run, "last")


@pytest.mark.parametrize("levels", [np.array([0.1, 0.9]), torch.tensor([0.1, 0.9]), (0.1, 0.9), np.float64(0.1)])
def test_levels_come_as_numbers_of_any_kind(numbers_run, numbers, levels):
    predictor, x = hpc_bnn.load(numbers_run), stored(numbers / "here")[:5]
    found, expected = (predictor.predict(x, quantiles=q)["quantiles"] for q in (levels, np.ravel(levels).tolist()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_quantiles_that_a_likelihood_does_not_have_are_not_left_out_in_silence(numbers_run):
    predictor = hpc_bnn.load(numbers_run)
    predictor.likelihood = hpc_bnn.Likelihood()
    with pytest.raises(ConfigError, match=r"^quantiles .* Likelihood has no quantiles"):
        predictor.predict(np.zeros(1), quantiles=[0.5])


def train_an_epoch(directory, *more):
    """Train on DIRECTORY/shards into DIRECTORY/run."""
    words = ["train", "--data.shards", str(directory / "shards"), "--run_dir", str(directory / "run")]
    assert main([*words, "--num_epochs", "1", "--num_samples", "1", "--num_test_samples", "2", *more]) == 0


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path):
    """Where the training data have names; numbers of columns are none."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2)) * [1, 100]
    facts = {"name": "table", "source": "test", "licence": "none", "channels": {"x": ["u", "v"]}}
    write_shards(tmp_path / "shards", {"train": (x, x[:, :1]), "test": (x[:9], x[:9, :1])}, **facts)
    train_an_epoch(tmp_path)
    predictor = hpc_bnn.load(tmp_path / "run")
    expected = predictor.predict(x)["mean"]
    table = pandas.DataFrame(x, columns=["u", "v"])
    for found in (table, table[["v", "u"]], pandas.DataFrame(x)):
        np.testing.assert_array_equal(predictor.predict(found)["mean"], expected)
    for columns in (["u", "w"], ["v", "v"]):
        with pytest.raises(ConfigError, match="the network was trained on u, v"):
            predictor.predict(pandas.DataFrame(x, columns=columns))
    for nothing in ([[1.0, 2.0], [3.0]], torch.from_numpy(x).to_sparse()):
        with pytest.raises(ConfigError, match="no array"):
            predictor.predict(nothing)
    with pytest.raises(ConfigError, match="quantiles half: must be numbers"):
        predictor.predict(x, quantiles="half")


def test_an_array_with_coordinates_is_read_by_them(tmp_path):
    """Of channels by their names; points of a grid must be those of the training, in their order."""
    xarray = pytest.importorskip("xarray")
    x = np.random.default_rng(0).normal(size=(20, 2, 3, 3))
    degrees = {"latitudes": [50.0, 51.0, 52.0], "longitudes": [-1.0, 0.0, 1.0]}
    facts = {"name": "grid", "source": "test", "licence": "none", "channels": {"x": ["u", "v"]}, "details": degrees}
    write_shards(tmp_path / "shards", {"train": (x, x[:, :1]), "test": (x, x[:, :1])}, **facts)
    train_an_epoch(tmp_path, "--model.name", f"{__name__}.Points", "--model.arguments", "{}")
    predictor = hpc_bnn.load(tmp_path / "run")
    places = {"channel": ["u", "v"], "lat": np.float32([50, 51, 52]), "lon": [359.0, 360.0, 361.0]}
    field = xarray.DataArray(x, places, ("time", "channel", "lat", "lon"))
    expected = predictor.predict(x)["mean"]
    for found in (field, field[:, ::-1], field.drop_vars("channel"), field.assign_coords(channel=[1000.0, 850.0])):
        np.testing.assert_array_equal(predictor.predict(found)["mean"], expected)
    for found, what in (
        (field[:, :, ::-1], "latitudes"),
        (field.transpose("time", "channel", "lon", "lat"), "latitudes"),
    ):
        with pytest.raises(ConfigError, match=f"x of other {what}: its {what} are .* training 50 to 52"):
            predictor.predict(found)
    with pytest.raises(ConfigError, match="x of other longitudes"):
        predictor.predict(field.roll(lon=1, roll_coords=True))
    with pytest.raises(ConfigError, match="the network was trained on u, v"):
        predictor.predict(field.assign_coords(channel=["u", "w"]))


class Points(nn.Module):
    def __init__(self, in_shape, num_outputs):
        super().__init__()
        self.linear = nn.Linear(in_shape[0], num_outputs)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def test_a_class_that_is_missing_is_none_in_files(tmp_path):
    """Neither an empty cell nor what xarray masks is a class."""
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 2)), rng.integers(0, 3, 30).astype(np.uint8)
    y[:9:2] = 255
    facts = {"name": "toy", "source": "test", "licence": "none", "num_classes": 3, "ignore_index": 255}
    write_shards(tmp_path / "shards", {"train": (x, y), "test": (x[:9], y[:9])}, **facts)
    train_an_epoch(tmp_path)
    for name in ("p.h5", "p.csv"):
        assert main(["predict", str(tmp_path / "run"), "--output", str(tmp_path / name)]) == 0
    found = pandas.read_csv(tmp_path / "p.csv")["y"].to_numpy()
    expected = np.where(y[:9] == 255, np.nan, y[:9])
    np.testing.assert_array_equal(found, expected)
    with xarray.open_dataset(tmp_path / "p.h5") as file:
        np.testing.assert_array_equal(file["y"], expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_no_finite_numbers_of_the_training_are_refused(numbers_run, numbers, value):
    x = stored(numbers / "here").astype(np.float64)
    predictor, x[3, 1] = hpc_bnn.load(numbers_run), value
    with pytest.raises(ConfigError, match="without NaN and infinity"):
        predictor.predict(x)
    x[3, 1] = -9999
    for kind in (np.float64, np.int64):
        with pytest.raises(ConfigError, match="without NaN and infinity"):
            predictor.predict(np.ma.masked_equal(x.astype(kind), -9999))
    found = predictor.predict(torch.from_numpy(stored(numbers / "here")).bfloat16())["mean"]
    np.testing.assert_allclose(found, predictor.predict(stored(numbers / "here"))["mean"], rtol=0.05)


@pytest.mark.parametrize("content", [b"", b"- a", b"a: [", b"model: 3", b"checkpoint: [1]", b"run_dir: caf\xe9", b"3"])
def test_a_config_that_holds_no_fields_is_said(digits_run, tmp_path, content, capsys):
    """Whoever reads it: a run's own, and one that a flag names."""
    shutil.copytree(digits_run, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"holds no fields|no YAML in UTF-8|a group of fields"):
        hpc_bnn.load(tmp_path / "run")
    for words in (["evaluate", str(tmp_path / "run")], ["train", "--config", str(tmp_path / "run/config.yaml")]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert re.search("holds no fields|no YAML in UTF-8|a group of fields", said) and "Traceback" not in said


def test_what_is_no_run_or_no_checkpoint_is_said(digits_run, digits, tmp_path):
    with pytest.raises(ConfigError, match="it holds no run"):
        hpc_bnn.load(tmp_path)
    shutil.copytree(digits_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(DataError, match="no sound checkpoint"):
        hpc_bnn.load(tmp_path / "run")
    text = (digits_run / "config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(text + "from_the_future: 1\n")
    with pytest.raises(ConfigError, match="from_the_future"):
        hpc_bnn.load(tmp_path / "run")
    with pytest.raises(ConfigError, match="quantiles"):
        hpc_bnn.load(digits_run).predict(stored(digits), quantiles=[1.5])
