"""``hpc-bnn predict`` and ``evaluate`` on runs that were trained here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_bnn import ShardDataset, write_shards
from hpc_bnn.cli.commands import main

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits_run(digits, tmp_path_factory):
    """A run of the digits, some epochs long."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train", "--config", str(REPOSITORY / "configs/digits.yaml"), "--data.shards", str(digits)]
    command += ["--num_epochs", "3", "--num_samples", "2", "--num_test_samples", "8", "--run_dir", str(run_dir)]
    assert main(command) == 0
    return run_dir


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Two shard directories of the same relation, the second with statistics of its own."""
    directory, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    for name, shift in (("here", 0.0), ("elsewhere", 3.0)):
        x = rng.normal(size=(200, 2)) + shift
        y = np.stack([10 * x[:, 0], 1000 + 50 * x[:, 1]], axis=1) + rng.normal(size=(200, 2))
        facts = {"name": name, "source": "test", "licence": "none", "channels": {"y": ["a", "b"]}}
        write_shards(directory / name, {"train": (x[:150], y[:150]), "test": (x[150:], y[150:])}, **facts)
    return directory


@pytest.fixture(scope="module")
def numbers_run(numbers):
    run_dir = numbers / "run"
    command = ["train", "--data.shards", str(numbers / "here"), "--run_dir", str(run_dir), "--num_epochs", "30"]
    command += ["--num_samples", "4", "--num_test_samples", "16", "--optimizer.learning_rate", "0.02"]
    assert main([*command, "--global_batch_size", "50", "--posterior.init_std", "0.02"]) == 0
    return run_dir


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


def test_a_full_disk_is_said_and_leaves_nothing(digits_run, tmp_path):
    """In a process of its own: HDF5 used to end it with a segmentation fault, at its exit."""
    command = f"ulimit -f 20; exec {sys.executable} -m hpc_bnn predict {digits_run} --output p.h5 --members true"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "p.h5 cannot be written" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_read_without_code(digits_run):
    path = max((digits_run / "checkpoints").glob("*.pt"))
    assert {"model", "optimizer", "place"} <= torch.load(path, weights_only=True).keys()
