"""Metrics of the job, not means of the ranks' metrics."""

import math

import numpy as np
import pytest
import torch
from reference import by_one, make_problem, make_step
from torch import nn

from hpc_bnn import (
    Bernoulli,
    Categorical,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    MeanFieldGaussian,
    Poisson,
    ShardDataset,
    StudentT,
    TensorSource,
    write_shards,
)
from hpc_bnn.errors import DataError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.predictive import find_groups
from hpc_bnn.predictive.evaluation import evaluate_dataset, out_of_distribution_metrics, uncertainties_of_dataset
from hpc_bnn.run.plotted_examples import shown_examples


@pytest.mark.parametrize("num_examples", [31, 2], ids=["uneven", "fewer_than_ranks"])
def test_metrics_equal_those_of_one_process(comm, tmp_path_factory, num_examples):
    directory = comm.broadcast_object(str(tmp_path_factory.mktemp("shards")) if comm.grid.rank == 0 else None)
    x, y = (t.numpy()[:num_examples] for t in make_problem(torch.float64))
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            facts = {"name": "toy", "source": "test", "licence": "none", "num_classes": 3}
            write_shards(directory, {"train": (x, np.asarray(y))}, **facts)
    dataset = ShardDataset(directory, "train", dtype=torch.float64)
    step = make_step(GridComm(Grid()))
    arguments = step.posterior, Categorical(3)
    expected = by_one(lambda: evaluate_dataset(*arguments, GridComm(Grid()), dataset, num_samples=6).metrics)
    seen = []
    got = evaluate_dataset(
        *arguments, comm, dataset, num_samples=6, see=lambda examples, *_: seen.extend(examples.tolist())
    ).metrics
    assert got["accuracy"] == expected["accuracy"]
    assert got == pytest.approx(expected, rel=1e-12) and {"nll", "brier", "ece", "classwise_ece", "aurc"} <= got.keys()
    assert seen == list(range(num_examples))[comm.grid.local_examples(num_examples)]


def test_a_class_that_is_none_is_found_by_all(comm):
    """The example is in the last block of the last data group; the others have finished theirs."""
    x, y = make_problem(torch.float64)
    y = torch.where(torch.arange(len(y)) == len(y) - 1, -100, y)
    arguments, source = (make_step(GridComm(Grid())).posterior, Categorical(3), comm), TensorSource(x, y, 3)
    with pytest.raises(DataError, match="a target is -100, and the likelihood Categorical"):
        evaluate_dataset(*arguments, source.on("cpu", x.dtype), num_samples=6)


LIKELIHOODS = {
    "gaussian": Gaussian(4),
    "student_t": StudentT(4, df=5.0),
    "poisson": Poisson(4),
    "bernoulli": Bernoulli(4),
    "implicit": Implicit(4),
    "categorical": Categorical(3),
    "field of classes": Categorical(3),
}


def write_field_shards(directory, likelihood, num_examples=23, of_classes=False):
    """Write inputs [6] and targets [4, 2, 3] that suit a likelihood, with weights of their rows; a split is foreign, one has 2."""
    rng = np.random.default_rng(3)
    x, foreign = rng.normal(size=(num_examples, 6)), 5 + 5 * rng.normal(size=(9, 6))
    y = rng.normal(size=(num_examples, 4, 2, 3)) * np.array([1, 10, 100, 1000])[:, None, None]
    if isinstance(likelihood, Poisson):
        y = rng.poisson(3, y.shape).astype(float)
    if isinstance(likelihood, Bernoulli):
        y = (y > 0).astype(float)
    weights = [[0.5], [1.5]]
    facts = {"target_weights": weights}
    if likelihood.num_classes:
        y, facts = rng.integers(0, 3, (num_examples, *((2, 3) if of_classes else ()))), {"num_classes": 3}
    splits = {"train": (x, y), "foreign": (foreign, y[:9]), "few": (x[:2], y[:2])}
    kinds = {split: {"kind": np.arange(len(x)) % 3 // 2} for split, (x, _) in splits.items()}  # groups of uneven sizes
    write_shards(directory, splits, coordinates=kinds, name="toy", source="test", licence="none", **facts)


class ToField(nn.Module):
    """A linear network onto fields [outputs, 2, 3], or onto classes."""

    def __init__(self, likelihood, of_classes=False):
        super().__init__()
        is_field = of_classes or not likelihood.num_classes
        self.form = (likelihood.num_outputs, 2, 3) if is_field else (likelihood.num_outputs,)
        self.linear = nn.Linear(6, math.prod(self.form)).double()

    def forward(self, x):
        return self.linear(x).unflatten(1, self.form)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_all_metrics_curves_and_uncertainties_equal_those_of_one_process(comm, tmp_path_factory, name):
    likelihood, of_classes = LIKELIHOODS[name], name == "field of classes"
    directory = comm.broadcast_object(str(tmp_path_factory.mktemp("shards")) if comm.grid.rank == 0 else None)
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory, likelihood, of_classes=of_classes)
    with Key(0, Stream.INIT).global_generator():
        posterior = MeanFieldGaussian(ToField(likelihood, of_classes), init_std=0.3)
    regions = {} if likelihood.num_classes and not of_classes else {"part": np.eye(2, 3)}

    def evaluate(one):
        data = ShardDataset(directory, "train", dtype=torch.float64, normalises_targets=likelihood.is_equivariant)
        foreign = ShardDataset(directory, "foreign", dtype=torch.float64)
        options = {} if likelihood.num_classes else {"references": ["climatology"]}
        options |= {"groups": find_groups(one, data, ["kind"], regions), "num_samples": 5}
        evaluation = evaluate_dataset(posterior, likelihood, one, data, **options)
        outside = uncertainties_of_dataset(posterior, likelihood, one, foreign, num_samples=5)
        detected = out_of_distribution_metrics(evaluation.uncertainties, outside)
        return evaluation, outside, detected

    expected, expected_outside, expected_detected = by_one(lambda: evaluate(GridComm(Grid())))
    got, outside, detected = evaluate(comm)
    tolerance = 1e-8  # of quantiles, which are found by iteration; of what is a sum 1e-10
    for metric, value in expected.metrics.items():
        assert got.metrics[metric] == pytest.approx(value, rel=tolerance if "width" in metric else 1e-10), metric
    flat = [flatten([evaluation.curves, evaluation.groups]) for evaluation in (got, expected)]
    assert got.groups.keys() == {"kind", *(["region"] if regions else [])} and got.groups["kind"]["name"] == ["0", "1"]
    assert flat[0] == pytest.approx(flat[1], rel=tolerance, abs=1e-13)
    for a, b in ((got.uncertainties, expected.uncertainties), (outside, expected_outside)):
        assert a.keys() == b.keys()
        for key, value in b.items():
            torch.testing.assert_close(a[key], value, rtol=1e-10, atol=1e-12)
    assert detected == pytest.approx(expected_detected, rel=1e-10) and len(detected) == 6
    names = {"accuracy", "nll", "brier", "ece", "classwise_ece", "aurc", "mean_iou" if of_classes else "adaptive_ece"}
    if not likelihood.num_classes:
        names = {
            "rmse",
            "mae",
            "aurc",
            "crps",
            "fair_crps",
            "spread_skill",
            "calibration_error",
            "coverage_90",
            "width_90",
        }
        assert detected["ood_auroc/epistemic_std"] > 0.9  # linear networks disagree far from the data
        assert len(got.curves["channels"]["crps"]) == 4 and sum(got.curves["pit"]) == pytest.approx(1)
    assert names <= got.metrics.keys() and ("nll" in got.metrics) == likelihood.has_density


def flatten(tree):
    """Return the numbers of nested dicts and lists."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [number for part in tree for number in flatten(part)]
    return [tree] if isinstance(tree, (int, float)) else []


def test_the_examples_of_the_picture_are_chosen_before_they_travel(comm, monkeypatch):
    """Those of one process, on rank 0; and no inputs but theirs, however many data groups have candidates."""
    x, y = make_problem(torch.float64)
    posterior, source = make_step(GridComm(Grid())).posterior, TensorSource(x, y, 3).on("cpu", x.dtype)
    found, gathered, whole = [], [], comm.objects.gather

    def noted(value, *axis):
        gathered.append(whole(value, *axis))
        return gathered[-1]

    monkeypatch.setattr(comm.objects, "gather", noted)
    for one in (GridComm(Grid()), comm):
        shown = shown_examples(Categorical(3), one, source)
        evaluate_dataset(posterior, Categorical(3), one, source, num_samples=6, see=shown.add)
        found.append(shown.gather())
    expected, got = found
    inputs = [example["x"] for part in gathered[-1] for example in part.values()]
    assert len(inputs) == len({e["index"] for kind in expected.values() for e in kind}) <= 12
    if comm.grid.rank:
        assert got == {}
        return
    for kind, examples in expected.items():
        assert [e["index"] for e in got[kind]] == [e["index"] for e in examples]
        for one, other in zip(got[kind], examples):
            torch.testing.assert_close(one["x"], other["x"])
            assert one["y"] == other["y"] and one["entropy"] == pytest.approx(other["entropy"], rel=1e-9)
