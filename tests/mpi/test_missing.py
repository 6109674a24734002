"""Targets that are missing add nothing: loss, gradient and metrics are those of the present ones, on every grid."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1]))

from graphs import InterpretedGraph
from reference import Results as Run
from reference import assert_layout_law, by_one, computed_once

from hpc_bnn import (
    Bernoulli,
    Categorical,
    Crps,
    Energy,
    Gathered,
    Gaussian,
    GaussianPrior,
    Grid,
    GridComm,
    Implicit,
    LogPredictive,
    MeanFieldGaussian,
    MomentMatched,
    NegativeElbo,
    Poisson,
    ShardDataset,
    StudentT,
    TensorSource,
    VariationalStep,
    testing,
    write_shards,
)
from hpc_bnn.errors import DataError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.predictive.calibration import calibrate_dataset, conformal_rank
from hpc_bnn.predictive.evaluation import evaluate_dataset

# --- against definitions: of each present target by itself, so that no number stands for a missing one ----------------

DENSITIES = {
    "bernoulli": (Bernoulli(2, missing_targets=True), lambda f, t: D.Bernoulli(logits=f[:, t])),
    "poisson": (Poisson(2, missing_targets=True), lambda f, t: D.Poisson(f[:, t].exp())),
    "gaussian": (Gaussian(2, missing_targets=True), lambda f, t: D.Normal(f[:, t], f[:, 2 + t].exp())),
    "learned": (Gaussian(2, "learned", 0.8, missing_targets=True), lambda f, t: D.Normal(f[:, t], f[:, 2 + t].exp())),
    "student_t": (StudentT(2, df=3.5, missing_targets=True), lambda f, t: D.StudentT(3.5, f[:, t], f[:, 2 + t].exp())),
    "categorical": (Categorical(3, ignore_index=-1), lambda f, t: D.Categorical(logits=f)),
}


def present(y):
    """Yield (example, target) of all targets [B, T] or classes [B] that are not missing."""
    y = y[:, None] if y.ndim == 1 else y
    for b, row in enumerate(y.tolist()):
        yield from ((b, t) for t, value in enumerate(row) if value == value and value != -1)


def value_of(y, b, t):
    return y[b] if y.ndim == 1 else y[b, t].double()


def log_liks(density):
    """[K, B] of outputs [K, B, ...]."""

    def function(f, y):
        rows = [f.new_zeros(len(f)) for _ in y]
        for b, t in present(y):
            rows[b] = rows[b] + density(f[:, b], t).log_prob(value_of(y, b, t))
        return torch.stack(rows, 1)

    return function


def elbo(density):
    return lambda f, y: -log_liks(density)(f, y).mean()


def log_predictive(density):
    return lambda f, y: -(torch.logsumexp(log_liks(density)(f, y), 0) - math.log(len(f))).mean()


def moment_matched(density):
    def loss(f, y):
        total = f.new_zeros(())
        for b, t in present(y):
            of_sample = density(f[:, b], t)
            variance = of_sample.variance.mean() + of_sample.mean.var(correction=0)
            total = total - D.Normal(of_sample.mean.mean(), variance.sqrt()).log_prob(value_of(y, b, t))
        return total / len(y)

    return loss


def pair_factor(num_samples, fairness):
    return (1 - (1 - fairness) / num_samples) / (num_samples * (num_samples - 1)) if num_samples > 1 else 0.0


def crps(f, y):
    """Of each present target, over all T targets."""
    total = f.new_zeros(())
    for b, t in present(y):
        pairs = (f[:, None, b, t] - f[None, :, b, t]).abs().sum()
        score = (f[:, b, t] - y[b, t]).abs().mean() - 0.5 * pair_factor(len(f), 0.95) * pairs
        total = total + score * W[t] / W.mean()
    return total / y.numel()


def energy(f, y):
    """Of the present targets of an example jointly."""
    total = f.new_zeros(())
    for b, row in enumerate(y):
        keep = ~row.isnan()
        if keep.any():
            members, weights = f[:, b, keep], (W / W.mean())[keep]

            def norm(d, weights=weights):
                square = (d.square() * weights).sum(-1)
                return torch.where(square > 0, square, 1.0).sqrt() * (square > 0)

            pairs = norm(members[:, None] - members[None]).sum()
            total = total + norm(members - row[keep]).mean() - 0.5 * pair_factor(len(f), 0.95) * pairs
    return total / len(y)


def log_cosh(members, y):
    return torch.log(torch.cosh(members.mean(0) - y)).sum(-1) + 0.1 * members.var(0, correction=0).sum(-1)


def log_cosh_of_present(f, y):
    rows = [log_cosh(f[:, b : b + 1, t : t + 1], y[b : b + 1, t : t + 1]) for b, t in present(y)]
    return torch.cat(rows).sum() / len(y)


W = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
CASES = {f"elbo_{name}": (NegativeElbo(), of, elbo(density)) for name, (of, density) in DENSITIES.items()}
CASES |= {
    f"{objective.name}_{name}": (objective, DENSITIES[name][0], definition(DENSITIES[name][1]))
    for objective, definition, names in (
        (LogPredictive(), log_predictive, ("gaussian", "categorical")),
        (MomentMatched(), moment_matched, ("learned", "poisson", "bernoulli")),
    )
    for name in names
}
CASES["crps"] = (Crps(weights=W), Implicit(3, missing_targets=True), crps)
CASES["energy"] = (Energy(weights=W), Implicit(3, missing_targets=True), energy)
CASES["own_bernoulli"] = (
    Gathered(log_cosh),
    DENSITIES["bernoulli"][0],
    lambda f, y: log_cosh_of_present(f.sigmoid(), y),
)
CASES["own"] = (Gathered(log_cosh), Gaussian(2, scale=1.0, missing_targets=True), log_cosh_of_present)


QUICK = {
    "elbo_student_t",
    "elbo_categorical",
    "log_predictive_gaussian",
    "moment_matched_poisson",
    "crps",
    "energy",
    "own_bernoulli",
}


def slow_unless(quick, values):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("case", slow_unless(QUICK, CASES))
def test_loss_and_gradient_are_those_of_the_present_targets(comm, case):
    objective, likelihood, definition = CASES[case]
    y = testing.make_examples(likelihood, torch.float64)[1]
    assert 0 < len(list(present(y))) < y.numel() - 3
    testing.check_objective(comm, objective, definition, likelihood=likelihood, num_samples=(7,), chunk_sizes=(1, 7))


# --- training ------------------------------------------------------------------------------------------------------

NUM_EXAMPLES, GLOBAL_BATCH_SIZE = 31, 13


def make_numbers(kind):
    """Return inputs [31, 6], and targets [31, 3] or classes [31, 4] of which many are missing; in ``kind`` "whole" none is.

    Of the first batch all of the last data group of four, of the second batch all, and target 2 of all.
    """
    generator = Key(11, Stream.DATA_ORDER).generator()
    x = torch.randn(NUM_EXAMPLES, 6, generator=generator, dtype=torch.float64)
    lacks = torch.rand(NUM_EXAMPLES, 4, generator=generator, dtype=torch.float64) < 0.3
    lacks[10:26], lacks[:, 2] = True, True
    if kind == "classes":
        y = torch.randint(0, 3, (NUM_EXAMPLES, 4), generator=generator)
        return x, y.masked_fill(lacks, 255)
    y = torch.randn(NUM_EXAMPLES, 3, generator=generator, dtype=torch.float64)
    return x, y if kind == "whole" else y.masked_fill(lacks[:, :3], math.nan)


OBJECTIVES = {
    "elbo": (NegativeElbo, lambda **o: Gaussian(3, **o)),
    "log_predictive": (LogPredictive, lambda **o: Gaussian(3, "learned", **o)),
    "moment_matched": (MomentMatched, lambda **o: Gaussian(3, **o)),
    "crps": (Crps, lambda **o: Implicit(3, **o)),
    "energy": (Energy, lambda **o: Implicit(3, **o)),
    "classes": (NegativeElbo, lambda **o: Categorical(3, ignore_index=255)),
}


class Points(nn.Module):
    """Logits of four points, [B, 3, 4]."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 12)

    def forward(self, x):
        return self.linear(x).unflatten(1, (3, 4))


def train(comm, case, *, kind="lacking", missing_targets=True, **options):
    objective, make = OBJECTIVES[case]
    likelihood = make(missing_targets=missing_targets)
    with Key(5, Stream.INIT).global_generator():
        net = (
            Points()
            if case == "classes"
            else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, likelihood.num_outputs))
        )
    posterior = MeanFieldGaussian(likelihood.wrap(net).double(), prior=GaussianPrior(0.7), init_std=0.1)
    step = VariationalStep(
        posterior, likelihood, torch.optim.Adam(posterior.parameters(), lr=1e-2), comm, objective=objective(),
        num_samples=7, num_train_examples=NUM_EXAMPLES, seed=5, **options,
    )  # fmt: skip
    if step.recorder is not None:
        step.recorder.new_graph = InterpretedGraph
    x, y = make_numbers("classes" if case == "classes" else kind)
    results = Run(comm)
    for start in (0, 13, 26, 0, 13):
        some = slice(start, min(start + GLOBAL_BATCH_SIZE, NUM_EXAMPLES))
        results.take(step, x[some], y[some], some.stop - some.start)
    step.settle()
    return step, results


@computed_once
def train_alone(case, **options):
    return train(GridComm(Grid()), case, **options)[1]


WAYS = {
    "walking": {},
    "chunks": {"chunk_size": 3},
    "micro-batches": {"micro_batch_size": 2},
    "captured": {"capture": "on"},
    "captured chunks": {"capture": "on", "chunk_size": 7},
}


PAIRS = [f"{case}, {way}" for m, case in enumerate(OBJECTIVES) for n, way in enumerate(WAYS) if (m + n) % 4 == 0]
"""Each objective with a way or two, each way with two objectives or more: with the quick ones."""
QUICK_PAIRS = {"elbo, walking", "elbo, captured", "log_predictive, chunks", "moment_matched, captured chunks"}
QUICK_PAIRS |= {"crps, micro-batches", "energy, captured", "classes, micro-batches", "classes, captured chunks"}


@pytest.mark.parametrize("pair", slow_unless(QUICK_PAIRS, sorted({*PAIRS, *QUICK_PAIRS})))
def test_the_layout_law_holds_where_targets_are_missing(comm, pair):
    case, way = pair.split(", ")
    step, results = train(comm, case, **WAYS[way])
    expected = train_alone(case)
    assert_layout_law(results, expected)
    assert expected[1].data_term == expected[4].data_term == 0.0  # nothing is present; N stays, and with it the KL
    assert all(math.isfinite(result.nelbo) for result in results)
    if "captured" in way:
        assert step.recorder.num_captures >= 3 and not step.recorder.said


@pytest.mark.parametrize("case", slow_unless({"elbo", "moment_matched", "crps"}, list(OBJECTIVES)[:-1]))
def test_where_nothing_is_missing_every_bit_stays(comm, case):
    """And as many collectives, with as many bytes."""
    runs = []
    for missing_targets in (False, True):
        before = comm.traffic.num_collectives, comm.traffic.num_bytes
        step, results = train(comm, case, kind="whole", missing_targets=missing_targets)
        after = comm.traffic.num_collectives - before[0], comm.traffic.num_bytes - before[1]
        runs.append((step.posterior.buffer.flat.clone(), [r.nelbo for r in results], after))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]


def test_a_target_that_is_missing_is_an_error_where_nobody_said_so(comm):
    for case, makes in (("elbo", False), ("crps", False)):
        with pytest.raises(DataError, match="a target is nan on rank"):
            train(comm, case, missing_targets=makes)
    step, (x, y) = train(comm, "classes")[0], make_numbers("classes")
    y[3, 1] = 254
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    with pytest.raises(DataError, match="a target is 254 on rank"):
        step(x[mine], y[mine], NUM_EXAMPLES)


# --- shards, metrics -----------------------------------------------------------------------------------------------


def lacking(shape, seed=4):
    """Which targets are missing: a fifth, all of some examples."""
    lacks = np.random.default_rng(seed).random(shape) < 0.2
    lacks[[2, 11, 20]] = True
    return lacks


def make_field(likelihood, num_examples=23):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(num_examples, 6))
    if likelihood.num_classes:
        y = rng.integers(0, 3, (num_examples, 2, 3))
        y[lacking(y.shape)] = 255
        return x, y.astype(np.uint8), {"num_classes": 3, "ignore_index": 255}
    y = rng.normal(size=(num_examples, 4, 2, 3)) * np.array([1, 10, 100, 1000])[:, None, None]
    y = rng.poisson(3, y.shape).astype(float) if isinstance(likelihood, Poisson) else y
    y = (y > 0).astype(float) if isinstance(likelihood, Bernoulli) else y
    y[lacking(y.shape)] = np.nan
    return x, y, {"missing_targets": True, "target_weights": [[0.5], [1.5]]}


class ToField(nn.Module):
    def __init__(self, likelihood):
        super().__init__()
        self.form = (likelihood.num_outputs, 2, 3)
        self.linear = nn.Linear(6, math.prod(self.form)).double()

    def forward(self, x):
        return self.linear(x).unflatten(1, self.form)


FIELDS = {
    "gaussian": Gaussian(4, missing_targets=True),
    "student_t": StudentT(4, df=5.0, missing_targets=True),
    "poisson": Poisson(4, missing_targets=True),
    "bernoulli": Bernoulli(4, missing_targets=True),
    "implicit": Implicit(4, missing_targets=True),
    "categorical": Categorical(3, ignore_index=255),
}


@pytest.mark.parametrize("name", slow_unless({"gaussian", "poisson", "categorical"}, FIELDS))
def test_metrics_count_the_present_targets_on_every_grid(comm, directory, name):
    """Written by all ranks; a data set of one rank that reads the present targets one by one knows the same."""
    likelihood = FIELDS[name]
    x, y, facts = make_field(likelihood)
    nothing = np.full_like(y, 255 if likelihood.num_classes else np.nan)
    splits = {"train": (x, y), "nothing": (x[:9], nothing[:9])}
    splits["some"] = (x[:9], y[:9].copy())
    splits["some"][1][:, 1] = 255 if likelihood.num_classes else np.nan
    manifest = write_shards(
        directory, splits, name="toy", source="test", licence="none", examples_per_shard=4, comm=comm, **facts
    )
    if likelihood.num_classes is None:
        np.testing.assert_allclose(manifest.statistics["y"].mean, np.nanmean(y, (0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(manifest.statistics["y"].std, np.nanstd(y, (0, 2, 3)), rtol=1e-12)
    assert manifest.digest == comm.broadcast_object(manifest.digest)
    with Key(0, Stream.INIT).global_generator():
        posterior = MeanFieldGaussian(ToField(likelihood), init_std=0.3)

    def evaluate(one):
        seen = []
        evaluations = [
            evaluate_dataset(
                posterior, likelihood, one, open_split(directory, split, likelihood), num_samples=5,
                see=lambda *block: seen.append(block),
            )
            for split in ("train", "some")
        ]  # fmt: skip
        with pytest.raises(DataError, match="all targets of this split of toy are missing"):
            evaluate_dataset(posterior, likelihood, one, open_split(directory, "nothing", likelihood), num_samples=5)
        return evaluations, seen

    def evaluate_alone():
        evaluations, seen = evaluate(GridComm(Grid()))
        _, predictive, targets = seen[0]
        compare = compare_classes if likelihood.num_classes else compare_numbers
        compare(evaluations, predictive, targets, y, has_cdf=name == "gaussian")
        if likelihood.has_density and not likelihood.num_classes:
            assert evaluations[0].metrics["nll"] == pytest.approx(
                nll_of_each(posterior, likelihood, directory), rel=1e-9
            )
        return evaluations

    for expected, got in zip(by_one(evaluate_alone), evaluate(comm)[0], strict=True):
        assert got.metrics == pytest.approx(expected.metrics, rel=1e-8)
        assert got.curves.keys() == expected.curves.keys()


def open_split(directory, split, likelihood):
    return ShardDataset(directory, split, dtype=torch.float64, normalises_targets=likelihood.is_equivariant)


def compare_classes(evaluations, predictive, targets, *_, **__):
    metrics, curves = evaluations[0].metrics, evaluations[0].curves
    p, truth = predictive.probabilities.movedim(1, -1)[targets != 255], targets[targets != 255].long()
    assert metrics["accuracy"] == pytest.approx((p.argmax(1) == truth).double().mean().item(), rel=1e-12)
    assert metrics["nll"] == pytest.approx(F.nll_loss(p.log(), truth).item(), rel=1e-12)
    squares = (p - F.one_hot(truth, 3)).square().sum(1).mean().item()
    assert metrics["brier"] == pytest.approx(squares, rel=1e-12)
    overlaps = [((p.argmax(1) == c) & (truth == c)).sum() / ((p.argmax(1) == c) | (truth == c)).sum() for c in range(3)]
    assert metrics["mean_iou"] == pytest.approx(float(torch.stack(overlaps).double().mean()), rel=1e-6)
    assert sum(curves["reliability"]["count"]) == len(truth)


def compare_numbers(evaluations, predictive, targets, y, has_cdf):
    metrics, curves = evaluations[0].metrics, evaluations[0].curves
    np.testing.assert_array_equal(np.isnan(targets.numpy()), np.isnan(y))
    weights = torch.tensor([[0.5], [1.5]]).expand(4, 2, 3).double()
    keep = ~targets.isnan()
    spans = weights.expand(targets.shape)[keep]
    error = (predictive.mean - targets)[keep].square()
    assert metrics["rmse"] == pytest.approx(((error * spans).sum() / spans.sum()).sqrt().item(), rel=1e-12)
    some = evaluations[1].curves["channels"]
    assert some["name"] == ["0", "2", "3"] and len(some["rmse"]) == len(curves["channels"]["rmse"]) - 1 == 3
    if has_cdf:
        cdf = predictive.share.mixture.cdf(targets.flatten()).view_as(targets)[keep]  # one process has all targets
        for level in (0.5, 0.9):
            inside = (cdf >= (1 - level) / 2) & (cdf < (1 + level) / 2)
            covered = (inside * spans).sum() / spans.sum()
            assert metrics[f"coverage_{100 * level:.0f}"] == pytest.approx(covered.item(), rel=1e-12)
    assert sum(curves["pit"]) == pytest.approx(1)


def nll_of_each(posterior, likelihood, directory):
    """By one target after another, as if all others were missing."""
    data = open_split(directory, "train", likelihood)
    inputs, stored = data.fetch(slice(None))
    plain = type(likelihood)(1, **({"df": 5.0} if isinstance(likelihood, StudentT) else {}))
    posterior.begin_()
    of_samples = []
    for sample in range(5):
        posterior.draw_(Key(0, Stream.PREDICTION, sample=sample))
        rows = []
        for b, row in enumerate(stored):
            f = posterior.network(inputs[b : b + 1]).detach()
            parts = f.unflatten(1, (-1, 4))  # [1, locations and scales, channels, ...]
            terms = [
                plain.log_prob(parts[:, :, c, i, j], row[c, i, j].view(1, 1)) - scale_of(data, c)
                for c, i, j in (~row.isnan()).nonzero().tolist()
            ]
            rows.append(torch.cat(terms).sum() if terms else torch.zeros((), dtype=torch.float64))
        of_samples.append(torch.stack(rows))
    total = torch.logsumexp(torch.stack(of_samples), 0) - math.log(5)
    has_one = ~stored.isnan().flatten(1).all(1)
    assert not has_one.all()
    return -total[has_one].mean().item()


def scale_of(data, channel):
    """Return the log of the standard deviation of a channel, 0 where targets are not normalised."""
    return math.log(data.target_scale[1].flatten()[channel]) if data.target_scale else 0.0


def test_calibration_is_that_of_the_present_targets(comm):
    """A threshold for each target from its own scores; classes without the ignored ones."""
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(60, 6))), torch.from_numpy(rng.normal(size=(60, 4)))
    y[torch.from_numpy(rng.random((60, 4)) < np.array([0.0, 0.1, 0.3, 0.5]))] = math.nan
    likelihood = Gaussian(4, missing_targets=True)
    with Key(0, Stream.INIT).global_generator():
        nets = nn.Linear(6, 8).double(), nn.Linear(6, 3).double()
    posterior = MeanFieldGaussian(nets[0], init_std=0.3)
    found = calibrate_dataset(
        posterior, likelihood, comm, TensorSource(x, y).on("cpu", torch.float64), level=0.8, num_samples=5
    )
    for t in range(4):
        keep = ~y[:, t].isnan()
        one = TensorSource(x[keep], torch.where(torch.arange(4) == t, y[keep, t : t + 1], 0.0))
        alone = calibrate_dataset(
            posterior, Gaussian(4), GridComm(Grid()), one.on("cpu", torch.float64), level=0.8, num_samples=5
        )
        assert alone.num_examples == keep.sum()
        assert found.thresholds[t].item() == pytest.approx(alone.thresholds[t].item(), rel=1e-12)
    assert found.num_examples == (~y.isnan()).sum(0).min()
    classes = torch.from_numpy(rng.integers(0, 3, 60))
    keep = torch.from_numpy(rng.random(60) < 0.7)
    posterior = MeanFieldGaussian(nets[1], init_std=0.3)
    pair = []
    for one, source, of in (
        (comm, TensorSource(x, classes.masked_fill(~keep, -1), 3), Categorical(3, ignore_index=-1)),
        (GridComm(Grid()), TensorSource(x[keep], classes[keep], 3), Categorical(3)),
    ):
        source = source.on("cpu", torch.float64)
        pair.append(calibrate_dataset(posterior, of, one, source, level=0.8, num_samples=5))
        evaluated = evaluate_dataset(posterior, of, one, source, num_samples=5)
        pair.append(evaluated.metrics)
    assert pair[0].num_examples == pair[2].num_examples == keep.sum()
    assert pair[0].thresholds.item() == pytest.approx(pair[2].thresholds.item(), rel=1e-12)
    assert pair[0].temperature == pytest.approx(pair[2].temperature, rel=1e-9)
    assert pair[1] == pytest.approx(pair[3], rel=1e-12) and "adaptive_ece" in pair[1]
    assert conformal_rank(int(keep.sum()), 0.8) <= keep.sum()
    y[:, 1], y[3:, 2] = math.nan, math.nan  # none, and too few: the others keep their thresholds
    options, posterior = {"level": 0.8, "num_samples": 5}, MeanFieldGaussian(nets[0], init_std=0.3)
    source = TensorSource(x, y).on("cpu", torch.float64)
    fewer = calibrate_dataset(posterior, likelihood, comm, source, **options)
    assert fewer.thresholds.isinf().tolist() == [False, True, True, False] and not fewer.holds_everything
    torch.testing.assert_close(fewer.thresholds[[0, 3]], found.thresholds[[0, 3]])
    with pytest.raises(DataError, match="all targets are missing in all examples"):
        source = TensorSource(x, y * math.nan).on("cpu", torch.float64)
        calibrate_dataset(posterior, likelihood, comm, source, **options)
