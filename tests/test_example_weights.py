"""Weights of examples in shards, and from the command line. Steps and grids: tests/mpi/test_example_weights.py."""

import json

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import hpc_bnn
from hpc_bnn import (
    Categorical,
    Examples,
    Gaussian,
    Grid,
    GridComm,
    MeanFieldGaussian,
    ShardDataset,
    TensorSource,
    write_shards,
)
from hpc_bnn.cli.commands import main
from hpc_bnn.config import AugmentationConfig
from hpc_bnn.data.augment import build_augmentation
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.predictive.calibration import calibrate_dataset

ONE = GridComm(Grid())
FACTS = {"name": "toy", "source": "made by the test", "licence": "none"}


def examples(count, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    y = np.stack([x[:, 0], 1000 + 50 * x[:, 1]], 1) + 0.1 * rng.normal(size=(count, 2))
    return x, y, rng.random(count)


def test_weights_from_shards_to_metrics(tmp_path):
    """Trained, evaluated, predicted, loaded, planned; inputs by name may be called weights where no example has any."""
    splits = {"train": examples(140, 0), "test": examples(40, 1), "foreign": examples(20, 2)}
    write_shards(tmp_path / "shards", splits, **FACTS)
    run, words = tmp_path / "run", ["--data.shards", tmp_path / "shards", "--num_samples", 2, "--num_test_samples", 5]
    words += ["--num_epochs", 3, "--global_batch_size", 20, "--model.arguments", "{hidden: [8]}"]
    words = list(map(str, words))
    assert main(["train", *words, "--run_dir", str(run)]) == 0
    assert main(["predict", str(run), "--output", str(tmp_path / "p.h5")]) == 0
    assert main(["plan", *words, "--ranks", "2"]) == 0
    x, y, w = splits["test"]
    with h5py.File(tmp_path / "p.h5") as file:
        errors = np.square(file["mean"][()] - y).mean(1)
        np.testing.assert_allclose(hpc_bnn.load(run).predict(x)["mean"], file["mean"][()], rtol=1e-5, atol=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/rmse"] == pytest.approx(np.sqrt(np.average(errors, weights=w)), rel=1e-4)
    assert summary["test/rmse"] != pytest.approx(np.sqrt(errors.mean()), rel=1e-3)
    # Training knows them: with the weight 0 for all but the KL nothing is left
    nothing = {name: (x, y, np.where(name == "train", 0.0, 1.0) * w) for name, (x, y, w) in splits.items()}
    write_shards(tmp_path / "nothing", nothing, **FACTS)
    words[1] = str(tmp_path / "nothing")
    assert main(["train", *words, "--run_dir", str(tmp_path / "idle")]) == 0
    assert json.loads((tmp_path / "idle/summary.json").read_text())["train/data_term"] == 0.0
    # Others without weights can be predicted
    write_shards(tmp_path / "plain", {"train": splits["train"][:2], "test": splits["test"][:2]}, **FACTS)
    words = ["--data.shards", str(tmp_path / "plain"), "--output", str(tmp_path / "q.h5")]
    assert main(["predict", str(run), *words]) == 0


@pytest.mark.parametrize("likelihood", [Categorical(3), Gaussian(2, missing_targets=True)], ids=["classes", "numbers"])
def test_an_example_of_weight_0_is_none_of_those_of_a_calibration(likelihood):
    """All others count once, whatever their weights."""
    x, y, w = (torch.from_numpy(a) for a in examples(90, 0))
    y = (y / torch.tensor([1.0, 1000.0])) if likelihood.num_classes is None else (3 * w).long()
    if likelihood.num_classes is None:
        y[::5, 0] = torch.nan
    w[w < 0.4] = 0
    source = [TensorSource(x.double(), y, likelihood.num_classes, weights=w)]
    source += [TensorSource(x[w > 0].double(), y[w > 0], likelihood.num_classes)]
    posterior = MeanFieldGaussian(nn.Linear(4, likelihood.num_outputs).double(), init_std=0.3)
    options = {"level": 0.8, "num_samples": 4}
    pair = [calibrate_dataset(posterior, likelihood, ONE, s.on("cpu", torch.float64), **options) for s in source]
    assert pair[0].num_examples == pair[1].num_examples < 90 and pair[0].temperature == pair[1].temperature
    for name in ("thresholds", "noise_factors"):
        values = [getattr(found, name) for found in pair]
        assert values == [None, None] or torch.allclose(*values, rtol=1e-12)
    with pytest.raises(DataError, match="of the calibration, or these have the weight 0"):
        nothing = TensorSource(x.double(), y, likelihood.num_classes, weights=0 * w).on("cpu", torch.float64)
        calibrate_dataset(posterior, likelihood, ONE, nothing, **options)


def test_an_input_may_be_called_weights(tmp_path):
    x, y, w = examples(9, 0)
    named = {"a": x, "weights": x[:, :2]}
    manifest = write_shards(tmp_path / "named", {"train": (named, y)}, **FACTS)
    assert not manifest.has_weights and list(manifest.inputs) == ["a", "weights"] == list(manifest.in_shape)
    inputs, targets = ShardDataset(tmp_path / "named", "train").fetch(slice(None))
    assert list(inputs) == ["a", "weights"] and len(targets) == 9
    with pytest.raises(DataError, match="named a, weights"):
        write_shards(tmp_path / "both", {"train": (named, y, w)}, **FACTS)


def test_examples_read_one_by_one_bring_their_weights(tmp_path):
    x, y, w = examples(20, 0)
    whole = write_shards(tmp_path / "a", {"train": (x, y, w)}, examples_per_shard=6, **FACTS)
    read = Examples(20, lambda start, stop: (x[start:stop], y[start:stop], w[start:stop]))
    assert write_shards(tmp_path / "b", {"train": read}, examples_per_shard=6, **FACTS) == whole


@pytest.mark.parametrize("reading", ["rank", "node"])
def test_a_changed_weight_is_found(tmp_path, reading):
    manifest = write_shards(tmp_path, {"train": examples(20, 0)}, **FACTS)
    path = tmp_path / manifest.shards[0].file
    with h5py.File(path, "r+") as file:
        file["weights"][3] += 0.5
    with pytest.raises(DataError):
        ShardDataset(tmp_path, "train", reading=reading).fetch([3])


@pytest.mark.parametrize(
    "weights, words",
    [
        ([1.0, -0.5], "example 1: its weight is below 0"),
        ([np.nan, 1.0], "example 0: weights holds a value that is not finite"),
        ([1, 2], "one floating-point number for each"),
        ([[1.0], [2.0]], "one floating-point number for each"),
        ([1.0], "as many as examples are needed"),
    ],
)
def test_weights_that_cannot_be_are_refused(tmp_path, weights, words):
    with pytest.raises(DataError, match=words):
        write_shards(tmp_path, {"train": (np.ones((2, 1)), np.ones(2), np.array(weights))}, **FACTS)


def test_a_split_without_them_and_a_mixture_are_refused(tmp_path):
    x, y, w = examples(9, 0)
    with pytest.raises(DataError, match="test: the inputs are x, y, and x, y, weights are expected"):
        write_shards(tmp_path, {"train": (x, y, w), "test": (x, y)}, **FACTS)
    manifest = write_shards(tmp_path, {"train": (x, y, w)}, **FACTS)
    with pytest.raises(ConfigError, match="a mixture of two has none"):
        build_augmentation(AugmentationConfig([{"name": "mixup"}]), manifest, num_samples=2, seed=0)
