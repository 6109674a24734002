"""Targets that are missing: likelihoods, shards, and the command line. Grids: tests/mpi/test_missing.py."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray
from conftest import with_plots
from torch import nn

import hpc_bnn
from hpc_bnn import (
    Bernoulli,
    Categorical,
    Crps,
    Examples,
    Gaussian,
    Grid,
    GridComm,
    Poisson,
    ShardDataset,
    StudentT,
    TensorSource,
    write_shards,
)
from hpc_bnn.cli.commands import main
from hpc_bnn.config import AugmentationConfig, LikelihoodConfig
from hpc_bnn.data import Manifest, as_source
from hpc_bnn.data.augment import build_augmentation
from hpc_bnn.data.manifest import OF_DATA, OPTIONAL, sha256_of_json
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.likelihoods import build_likelihood
from hpc_bnn.predictive import ClassPredictive, find_groups
from hpc_bnn.predictive.evaluation import evaluate_dataset
from hpc_bnn.predictive.groups import Climatology
from hpc_bnn.run.plotted_examples import shown_examples

FACTS = {"name": "toy", "source": "made by the test", "licence": "none"}
LIKELIHOODS = [
    Bernoulli(2, missing_targets=True),
    Poisson(2, missing_targets=True),
    Gaussian(2, scale=0.5, missing_targets=True),
    Gaussian(2, min_scale=0.1, missing_targets=True),
    Gaussian(2, "learned", missing_targets=True),
    StudentT(2, df=3.5, missing_targets=True),
    Categorical(3, ignore_index=-1),
]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("wild", [-1e308, 1e308, math.inf])
def test_no_gradient_reaches_the_outputs_of_a_missing_target(likelihood, wild):
    """Where the density overflows, 0 times its derivative would be NaN."""
    of_classes = likelihood.num_classes is not None
    missing, width = (-1, 3) if of_classes else (math.nan, 4 if isinstance(getattr(likelihood, "scale", 0), str) else 2)
    if isinstance(likelihood, StudentT):
        width = 4
    y = torch.tensor([0, 1, missing]) if of_classes else torch.tensor([[0, 1], [1, missing], [missing, missing]])
    lacks = y == -1 if of_classes else y.isnan()
    lacks = lacks[:, None].expand(3, 3) if of_classes else lacks.repeat(1, width // 2)
    outputs = torch.where(lacks, wild, torch.zeros(3, width, dtype=torch.float64)).requires_grad_()
    found = likelihood.log_prob(outputs, y)
    found.sum().backward()
    assert found.isfinite().all() and found[2] == 0 and not outputs.grad[lacks].any()
    assert outputs.grad.isfinite().all() and outputs.grad.any()
    assert likelihood.fits(y).all()


def test_only_what_stands_for_a_missing_target_is_taken():
    with pytest.raises(DataError, match="a target is nan"):
        Gaussian().check_targets(torch.tensor([math.nan]))
    with pytest.raises(DataError, match="a target is inf"):
        Gaussian(missing_targets=True).check_targets(torch.tensor([math.nan, math.inf]))
    with pytest.raises(DataError, match="a target is -1"):
        Categorical(3, ignore_index=255).check_targets(torch.tensor([255, -1]))
    with pytest.raises(DataError, match="a target is nan"):
        Categorical(3, ignore_index=255).check_targets(torch.full((1, 3), math.nan))  # probabilities
    for index in (0, 2):
        with pytest.raises(ConfigError, match="must be a whole number that is no class"):
            Categorical(3, ignore_index=index)


class Plain(hpc_bnn.likelihoods.Likelihood):
    """Knows nothing of missing targets."""

    def __init__(self, num_targets):
        super().__init__(num_targets)


class Heavy(StudentT):
    """Inherits all."""


def test_a_likelihood_of_the_user_has_to_know_of_missing_targets():
    with pytest.raises(ConfigError, match="Give it missing_targets: true"):
        build_likelihood(LikelihoodConfig(f"{__name__}.Plain"), None, (2,), missing_targets=True)
    arguments = {"missing_targets": True}
    config = LikelihoodConfig(f"{__name__}.Heavy", arguments=arguments)
    assert build_likelihood(config, None, (2,), missing_targets=True).missing_targets
    for name in ("gaussian", "student_t", "poisson", "bernoulli", "implicit"):
        assert build_likelihood(LikelihoodConfig(name), None, (2,), missing_targets=True).missing_targets
    with pytest.raises(ConfigError, match="Use categorical"):
        build_likelihood(LikelihoodConfig("bernoulli"), 2, (), ignore_index=-1)


# --- shards --------------------------------------------------------------------------------------------------------


def numbers(count, seed):
    """Inputs [n, 4], and two targets: 0.3 of the first and all of some examples are missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    y = np.stack([x[:, 0], 1000 + 50 * x[:, 1]], 1) + 0.1 * rng.normal(size=(count, 2))
    y[rng.random(count) < 0.3, 0] = np.nan
    y[::7] = np.nan
    return x, y


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", ["numbers", "channels", "fields"])
@pytest.mark.parametrize("examples_per_shard", [1, 5, 100])
def test_statistics_are_those_of_the_present_targets(tmp_path, dtype, form, examples_per_shard):
    """Also of files in which a channel has none."""
    rng = np.random.default_rng(0)
    y = (100 + rng.normal(size=(40, 2, 3, 4))).astype(dtype)
    y[rng.random(y.shape) < 0.3] = np.nan
    y[5:15, 0] = np.nan
    y = {"numbers": y[:, 0, 0, 0], "channels": y[:, :, 0, 0], "fields": y}[form]
    splits = {"train": (rng.normal(size=(40, 2)), y)}
    options = {"examples_per_shard": examples_per_shard, "missing_targets": True}
    found = write_shards(tmp_path, splits, **options, **FACTS).statistics["y"]
    axes, y = (0, *range(2, y.ndim)), y.astype(np.float64)
    np.testing.assert_allclose(found.mean, np.atleast_1d(np.nanmean(y, axes)), rtol=1e-12)
    np.testing.assert_allclose(found.std, np.atleast_1d(np.nanstd(y, axes)), rtol=1e-9)


def test_the_option_alone_changes_no_number(tmp_path):
    """And a manifest without it is that of before, to the byte."""
    x, y = numbers(50, 0)
    y[np.isnan(y)] = 0.5
    plain, other = (
        write_shards(
            tmp_path / name, {"train": (x, y)}, examples_per_shard=20, missing_targets=name == "other", **FACTS
        )
        for name in ("plain", "other")
    )
    assert plain.splits == other.splits and plain.statistics == other.statistics
    content = json.loads((tmp_path / "plain/manifest.json").read_text())
    assert not OPTIONAL.keys() & content.keys()
    former = {name: content[name] for name in OF_DATA if name not in OPTIONAL}
    assert plain.digest == sha256_of_json(former)[:16] != other.digest
    assert Manifest.read(tmp_path / "other").missing_targets and not Manifest.read(tmp_path / "plain").missing_targets


@pytest.mark.parametrize(
    "y, options, words",
    [
        ([1.0, math.nan], {}, "example 1: y holds a value that is not finite. missing_targets=True takes NaN"),
        ([1.0, math.inf], {"missing_targets": True}, "example 1: y holds a value that is not finite"),
        ([0, 1], {"missing_targets": True}, "targets are int64: give numbers, or ignore_index"),
        ([0, 1], {"missing_targets": True, "num_classes": 2}, "or ignore_index for classes"),
        ([0, -1], {"num_classes": 2}, "example 1: class -1 is not in 0..1"),
        ([0, -2], {"num_classes": 2, "ignore_index": -1}, "example 1: class -2 is not in 0..1"),
        ([0, 1], {"num_classes": 2, "ignore_index": 1}, "none of the classes"),
        ([0.0, 1.0], {"ignore_index": -1}, "none of the classes"),
        ([[math.nan, 1.0], [math.nan, 2.0]], {"missing_targets": True}, "y: channel 0 has no target in the training"),
    ],
)
def test_what_cannot_be_missing_is_refused(tmp_path, y, options, words):
    with pytest.raises(DataError, match=words):
        write_shards(tmp_path, {"train": (np.ones((2, 1)), np.array(y))}, **options, **FACTS)


def test_inputs_are_never_missing(tmp_path):
    x, y = numbers(8, 0)
    x[3, 1] = np.nan
    with pytest.raises(DataError, match=r"example 3: x holds a value that is not finite$"):
        write_shards(tmp_path, {"train": (x, y)}, missing_targets=True, **FACTS)


@pytest.mark.parametrize("streamed", [False, True])
def test_what_a_numpy_array_masks_is_missing(tmp_path, streamed):
    """What lies beneath a mask is no number: NaN where there is one, else an error."""

    def splits(x, y):
        return {"train": Examples(8, lambda start, stop: (x[start:stop], y[start:stop])) if streamed else (x, y)}

    x, y = numbers(8, 0)
    expected = write_shards(tmp_path / "nan", splits(x, y), missing_targets=True, **FACTS)
    masked = np.ma.masked_equal(np.nan_to_num(y, nan=-9999), -9999)
    found = write_shards(tmp_path / "masked", splits(x, masked), missing_targets=True, **FACTS)
    assert found.statistics == expected.statistics and found.digest == expected.digest
    with pytest.raises(DataError, match="example 0: x holds a value that is not finite"):
        write_shards(tmp_path / "x", splits(np.ma.masked_greater(x, -99), y), missing_targets=True, **FACTS)
    classes = np.ma.masked_equal([7, 0, 1, 7, 0, 1, 0, 1], 7)
    with pytest.raises(
        DataError, match=r"y is masked in \d places, and int64 has no NaN. Fill it, such as with y.filled"
    ):
        write_shards(tmp_path / "y", splits(x, classes), num_classes=2, ignore_index=-1, **FACTS)
    stations = {"train": {"station": classes}}
    with pytest.raises(DataError, match="station is masked in 2 places"):
        write_shards(tmp_path / "station", splits(x, y), missing_targets=True, coordinates=stations, **FACTS)
    weights = np.ma.masked_less(np.arange(1.0, 1 + y.shape[1]), 1.5)
    with pytest.raises(DataError, match="target_weights must be finite"):
        write_shards(tmp_path / "w", splits(x, y), missing_targets=True, target_weights=weights, **FACTS)
    for given in (weights, "cos", [[1.0], [1.0, 2.0]]):
        with pytest.raises(ConfigError, match=r"^weights .*: must be finite"):
            Crps(weights=given)


@pytest.mark.parametrize("ids", [True, "tokens", ["tokens"]], ids=str)
def test_ids_are_names_of_inputs(tmp_path, ids):
    x, y = numbers(8, 0)
    with pytest.raises(DataError, match=r"ids are (True|tokens), and the inputs x: name some of them"):
        write_shards(tmp_path, {"train": (x, y)}, missing_targets=True, ids=ids, **FACTS)


def test_missing_classes_are_not_mixed(tmp_path):
    y = np.array([0, 1, 255], np.uint8)
    manifest = write_shards(tmp_path, {"train": (np.ones((3, 1)), y)}, num_classes=2, ignore_index=255, **FACTS)
    with pytest.raises(ConfigError, match="no probabilities to mix"):
        build_augmentation(AugmentationConfig([{"name": "mixup"}]), manifest, num_samples=2, seed=0)


class Lacking(torch.utils.data.TensorDataset):
    """A Dataset of the user that says what is missing."""

    missing_targets = True


def make_dataset(split):
    x, y = (torch.from_numpy(a).float() for a in numbers(60 if split == "train" else 20, 1))
    return Lacking(x, y / torch.tensor([1.0, 1000.0]))


def test_a_dataset_says_what_is_missing():
    x, y = torch.ones(4, 2), torch.tensor([0, 1, -1, 0])
    assert as_source(make_dataset("test")).manifest.missing_targets
    assert as_source(torch.utils.data.TensorDataset(x, y), num_classes=2).manifest.ignore_index is None
    dataset = torch.utils.data.TensorDataset(x, y)
    dataset.ignore_index = -1
    assert as_source(dataset, num_classes=2).manifest.ignore_index == -1


# --- the command line ----------------------------------------------------------------------------------------------


def words_of(run_dir, *more):
    words = ["--run_dir", run_dir, "--num_samples", 2, "--num_test_samples", 5, "--num_epochs", 4]
    words += ["--global_batch_size", 20, "--optimizer.learning_rate", 0.02, "--model.arguments", "{hidden: [8]}", *more]
    return list(map(str, words))


@pytest.mark.parametrize("flags", [(), ("--objective.name", "crps"), ("--likelihood.name", "student_t")], ids=str)
def test_numbers_from_shards_to_predictions(tmp_path, flags):
    """Trained, evaluated, calibrated, predicted, loaded: the same numbers as from the present targets alone."""
    splits = {"train": numbers(140, 0), "calibration": numbers(60, 1), "test": numbers(40, 2)}
    write_shards(tmp_path / "shards", splits, missing_targets=True, channels={"y": ["a", "b"]}, **FACTS)
    run = tmp_path / "run"
    with with_plots():
        assert main(["train", "--data.shards", str(tmp_path / "shards"), *words_of(run, *flags)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert all(math.isfinite(v) for name, v in summary.items() if name.startswith(("train/", "test/")))
    assert main(["evaluate", str(run)]) == 0
    assert main(["calibrate", str(run), "--split", "calibration", "--level", "0.8"]) == 0
    assert main(["predict", str(run), "--output", str(tmp_path / "p.h5"), "--calibration", "true"]) == 0
    x, y = splits["test"]
    with xarray.open_dataset(tmp_path / "p.h5") as found:
        np.testing.assert_allclose(found.y, y, rtol=1e-6)  # NaN where they are missing
        error = (found["mean"].values - y)[~np.isnan(y)]
        assert np.isfinite(found["mean"]).all() and np.isfinite(found.lower).all()
    assert summary["test/rmse"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-4)
    np.testing.assert_allclose(hpc_bnn.load(run).predict(x)["mean"], found["mean"], rtol=1e-5, atol=1e-5)
    channels = json.loads((run / "evaluation.json").read_text())["curves"]["channels"]
    assert channels["name"] == ["a", "b"] and main(["report", str(run)]) == 0


class Segments(nn.Sequential):
    """Gives each point of an image a class."""

    def __init__(self, in_shape, num_outputs):
        super().__init__(nn.Conv2d(in_shape[0], 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, num_outputs, 3, padding=1))


def squares(count, seed):
    rng = np.random.default_rng(seed)
    x, y = 0.3 * rng.normal(size=(count, 1, 8, 8)), np.zeros((count, 8, 8), np.uint8)
    for image, classes in zip(x, y):
        row, column = rng.integers(0, 5, 2)
        image[0, row : row + 4, column : column + 4] += 2
        classes[row : row + 4, column : column + 4] = 1
    y[rng.random(y.shape) < 0.3] = 255
    y[::9] = 255
    return x.astype(np.float32), y


def test_fields_of_classes_from_shards_to_predictions(tmp_path):
    splits = {"train": squares(120, 0), "test": squares(30, 1), "nothing": squares(9, 2)}
    splits["nothing"][1][:] = 255
    write_shards(tmp_path / "shards", splits, num_classes=2, ignore_index=255, **FACTS)
    run = tmp_path / "run"
    words = [*words_of(run), "--data.shards", str(tmp_path / "shards"), "--model.name", f"{__name__}.Segments"]
    words[words.index("{hidden: [8]}")] = "{}"
    words += ["--posterior.init_std", "0.01", "--kl_weight", "0.1"]
    with with_plots():
        assert main(["train", *words]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert main(["predict", str(run), "--output", str(tmp_path / "p.h5")]) == 0
    with xarray.open_dataset(tmp_path / "p.h5") as found:
        y, said, p = found.y.values, found["class"].values, found.probabilities.values
    truth = splits["test"][1]
    np.testing.assert_array_equal(y, np.where(truth == 255, np.nan, truth))  # xarray masks what is missing
    keep = ~np.isnan(y)
    assert (
        summary["test/accuracy"] == pytest.approx((said == y)[keep].mean(), rel=1e-6) and summary["test/accuracy"] > 0.8
    )
    of_truth = np.take_along_axis(p, np.where(keep, y, 0)[:, None].astype(int), 1)[:, 0]
    assert summary["test/nll"] == pytest.approx(-np.log(of_truth[keep]).mean(), rel=1e-4)


def test_a_split_with_nothing_present_is_an_error_that_says_so(tmp_path, capsys):
    x, y = numbers(60, 0)
    splits = {"train": (x, y), "test": (x[:9], np.full((9, 2), np.nan))}
    write_shards(tmp_path / "shards", splits, missing_targets=True, **FACTS)
    assert main(["train", "--data.shards", str(tmp_path / "shards"), *words_of(tmp_path / "run")]) != 0
    assert (
        "all targets of this split of toy are missing or have the weight 0: there is nothing to evaluate"
        in capsys.readouterr().err
    )


def test_a_dataset_of_the_user_from_the_command_line(tmp_path):
    words = words_of(tmp_path / "run", "--data.dataset", f"{__name__}.make_dataset")
    assert main(["train", *words]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert math.isfinite(summary["test/rmse"]) and math.isfinite(summary["train/nelbo"])


def test_missing_classes_are_blank_in_the_picture():
    y = torch.tensor([[[0, 255, 1]] * 2] * 3)
    dataset = TensorSource(torch.ones(3, 1), y, 2)
    dataset.manifest = replace(dataset.manifest, ignore_index=255)
    shown = shown_examples(Categorical(2, ignore_index=255), GridComm(Grid()), dataset)
    of_points = torch.full((3, 2, 2, 3), 0.5)
    shown.add(torch.arange(3), ClassPredictive(of_points, of_points, of_points[:, 0]), y)
    found = shown.gather()["y"]
    assert found.isnan().equal(y == 255) and found.nan_to_num(255).equal(y.double())


def test_missing_targets_do_not_count_where_the_variance_is_infinite():
    """With two degrees of freedom all examples are as uncertain: what the network accepts is all of them, or none."""
    x, y = (torch.from_numpy(a).double() for a in numbers(60, 0))
    likelihood = StudentT(2, df=2.0, missing_targets=True)
    source = TensorSource(x, y / torch.tensor([1.0, 1000.0])).on("cpu", torch.float64)
    posterior = hpc_bnn.MeanFieldGaussian(nn.Linear(4, 4).double(), init_std=0.3)
    metrics = evaluate_dataset(posterior, likelihood, GridComm(Grid()), source, num_samples=3).metrics
    assert metrics["aurc"] == pytest.approx(metrics["mae"], rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_groups_and_climatology_know_the_present_targets_alone(tmp_path, weighted):
    """The metrics of a group are those of a data set of its examples; one group has no target."""
    x, y = numbers(60, 0)
    station = np.arange(60) % 3
    y[station == 2] = np.nan
    rows, facts = station == 0, {"missing_targets": True, "normalise_targets": False, **FACTS}
    of_examples = (np.arange(60) % 4 / 2.0,) if weighted else ()
    coordinates = {"train": {"station": station}}
    write_shards(tmp_path / "all", {"train": (x, y, *of_examples)}, coordinates=coordinates, **facts)
    write_shards(tmp_path / "one", {"train": (x[rows], y[rows], *(w[rows] for w in of_examples))}, **facts)
    comm, likelihood = GridComm(Grid()), Gaussian(2, missing_targets=True)
    posterior = hpc_bnn.MeanFieldGaussian(nn.Linear(4, 4).double(), init_std=0.3)
    data = ShardDataset(tmp_path / "all", "train", dtype=torch.float64)
    one = ShardDataset(tmp_path / "one", "train", dtype=torch.float64, scaling=data.manifest)
    groups = find_groups(comm, data, ["station"])
    arguments = {"num_samples": 4, "references": ["climatology"], "train_set": data}
    found = evaluate_dataset(posterior, likelihood, comm, data, groups=groups, **arguments).groups["station"]
    alone = evaluate_dataset(posterior, likelihood, comm, one, **arguments).metrics
    of_group = {name: found["metrics"][name][0] for name in alone}
    assert alone == pytest.approx(of_group, rel=1e-8)  # quantiles are found by iteration
    assert found["metrics"]["rmse"][2] is None and found["pit"][2] is None
    climatology = Climatology.of(comm, data)
    count = ~np.isnan(y) * (of_examples[0] if weighted else np.ones(60))[:, None]
    mean = np.nansum(count * y, 0) / count.sum(0)
    np.testing.assert_allclose(climatology.mean, mean, rtol=1e-7)  # weights are float32
    np.testing.assert_allclose(
        climatology.std, np.sqrt(np.nansum(count * (y - mean) ** 2, 0) / count.sum(0)), rtol=1e-6
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_uncertainty_of_selective_prediction_is_that_of_the_present_targets(tmp_path, weighted):
    """As its loss is; against a sum over examples, whose rows have one, the other or both targets."""
    x, y = numbers(60, 0)
    y[:, 1] /= 100  # the other would outweigh it
    facts = {"missing_targets": True, "normalise_targets": False, "target_weights": [1.0, 3.0], **FACTS}
    of_examples = (np.arange(60) % 4 / 2.0,) if weighted else ()
    write_shards(tmp_path, {"train": (x, y, *of_examples)}, **facts)
    data, likelihood = ShardDataset(tmp_path, "train", dtype=torch.float64), Gaussian(2, missing_targets=True)
    posterior = hpc_bnn.MeanFieldGaussian(nn.Linear(4, 4).double(), init_std=0.3)
    blocks = []
    found = evaluate_dataset(
        posterior, likelihood, GridComm(Grid()), data, num_samples=4, see=lambda *block: blocks.append(block)
    )
    (_, predictive, _), there = blocks[0], ~np.isnan(y)
    w = there * np.array([1.0, 3.0])
    keep = w.any(1) & ((of_examples[0] if weighted else np.ones(60)) > 0)
    w, of = w[keep], (of_examples[0] if weighted else np.ones(60))[keep]
    std, loss = predictive.variance.sqrt().numpy()[keep], np.abs(predictive.mean.numpy() - np.nan_to_num(y))[keep]
    std, loss, of = (std * w).sum(1) / w.sum(1), (loss * w).sum(1) / w.sum(1), of * w.sum(1)
    risks = [np.average(loss[std <= limit], weights=of[std <= limit]) for limit in std]
    assert found.metrics["aurc"] == pytest.approx(np.average(risks, weights=of), rel=1e-6)


@pytest.mark.parametrize("of_classes", [False, True])
def test_a_group_lacks_only_what_is_missing_in_it(tmp_path, of_classes):
    """One group has all, one lacks a channel, one has nothing: what is not known is null in JSON."""
    x, station = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    y, facts = x[:, :2].astype(np.float64), {"missing_targets": True}
    y[station == 1, 1] = y[station == 2] = np.nan
    likelihood = Gaussian(2, missing_targets=True)
    if of_classes:
        y, facts = np.where(station == 2, -1, np.arange(30) % 2), {"num_classes": 2, "ignore_index": -1}
        likelihood = Categorical(2, ignore_index=-1)
    write_shards(tmp_path, {"train": (x, y)}, coordinates={"train": {"station": station}}, **facts, **FACTS)
    data, comm = ShardDataset(tmp_path, "train", normalises_targets=False), GridComm(Grid())
    posterior = hpc_bnn.MeanFieldGaussian(nn.Linear(4, 2 if of_classes else 4), init_std=0.3)
    arguments = {"num_samples": 3, "groups": find_groups(comm, data, ["station"])}
    found = evaluate_dataset(posterior, likelihood, comm, data, **arguments)
    table = json.loads(json.dumps(found.groups, allow_nan=False))["station"]
    assert all(values[2] is None and values[0] is not None for values in table["metrics"].values())
    assert of_classes or {"rmse", "crps", "spread_skill"} <= table["channels"].keys()
    for full, part, nothing in table["channels"].values():
        assert None not in full and part[0] is not None and part[1] is None and nothing is None
    assert of_classes or found.curves["channels"]["rmse"][1] > 0
