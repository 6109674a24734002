"""Weights of examples: each multiplies the data term of its example, on every grid; metrics are weighted means."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1]))

from graphs import InterpretedGraph
from reference import Results, assert_layout_law, by_one, computed_once, relative_difference

from hpc_bnn import (
    Categorical,
    Crps,
    Energy,
    Gathered,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    LogPredictive,
    MeanFieldGaussian,
    MomentMatched,
    NegativeElbo,
    ShardDataset,
    TensorSource,
    testing,
    write_shards,
)
from hpc_bnn.data import BatchLoader
from hpc_bnn.errors import ConfigError, DataError, RankError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.objectives import Coupling
from hpc_bnn.predictive.evaluation import evaluate_dataset
from hpc_bnn.testing import NUM_EXAMPLES

ONE = GridComm(Grid())
CASES = {
    "elbo": (NegativeElbo(), Categorical(3)),
    "log_predictive": (LogPredictive(), Gaussian(2)),
    "moment_matched": (MomentMatched(), Gaussian(2, missing_targets=True)),
    "crps": (Crps(), Implicit(3)),
    "energy": (Energy(), Implicit(3, missing_targets=True)),
    "own": (Gathered(lambda f, y: (f.mean(0) - y).cosh().log().sum(-1), of="mean"), Gaussian(2)),
}
WAYS = {
    "walking": {},
    "chunks": {"chunk_size": 3},
    "micro-batches": {"micro_batch_size": 2},
    "captured": {"capture": "on"},
    "captured chunks": {"capture": "on", "chunk_size": 7},
}


def make_weights(dtype=torch.float64):
    """Between 0 and 3; 0 for all of the last data group of four."""
    weights = 3 * torch.rand(NUM_EXAMPLES, generator=Key(2, Stream.NOISE).generator(), dtype=torch.float64)
    weights[10:] = 0
    return weights.to(dtype)


def make_step(comm, case, **options):
    objective, likelihood = CASES[case]
    step = testing.make_step(comm, objective, likelihood, torch.float64, num_samples=7, **options)
    if step.recorder is not None:
        step.recorder.new_graph = InterpretedGraph
    return step


@computed_once
def of_single_examples(case):
    """Data term and its gradient of each example, without weights."""
    losses, gradients = [], []
    for b in range(NUM_EXAMPLES):
        step = make_step(ONE, case)
        x, y = testing.make_examples(step.likelihood, torch.float64)
        step.accumulate_batch_(x[b : b + 1], y[b : b + 1], 1)
        step.reduce_()
        step.posterior.finish_(step.scalars)
        losses.append(step.posterior.buffer.tally[0].clone())
        gradients.append(step.posterior.buffer.gradient.clone())
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize(
    "case, way",
    [(c, ("walking", "chunks", "micro-batches")[(n + n // len(CASES)) % 3]) for n, c in enumerate([*CASES, *CASES])],
)
def test_loss_and_gradient_are_weighted_sums_of_those_of_the_examples(comm, case, way):
    losses, gradients = of_single_examples(case)
    step, weights, mine = make_step(comm, case, **WAYS[way]), make_weights(), comm.grid.local_examples(NUM_EXAMPLES)
    x, y = testing.make_examples(step.likelihood, torch.float64)
    step.accumulate_batch_(x[mine], y[mine], NUM_EXAMPLES, weights[mine])
    step.reduce_()
    step.posterior.finish_(step.scalars)
    tally, gradient = step.posterior.buffer.tally, step.posterior.buffer.gradient
    assert tally[0].item() == pytest.approx((weights @ losses / NUM_EXAMPLES).item(), rel=1e-12)
    assert relative_difference(gradient, weights @ gradients / NUM_EXAMPLES) < 1e-12


def train(comm, case, way):
    """Steps with weights, without, and with others."""
    step, results = make_step(comm, case, **WAYS[way]), Results(comm)
    x, y = testing.make_examples(step.likelihood, torch.float64)
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    for weights in (make_weights(), None, 1 + make_weights(), make_weights(), make_weights().flip(0), None):
        of_mine = None if weights is None else weights[mine]
        results.append(step(x[mine], y[mine], NUM_EXAMPLES, weights=of_mine))
        results.states.append({name: value.clone() for name, value in step.posterior.state_dict().items()})
    step.settle()
    return step, results


@computed_once
def train_alone(case):
    return train(ONE, case, "walking")[1]


PAIRS = {f"{case}, {way}" for m, case in enumerate(CASES) for n, way in enumerate(WAYS) if (m + n) % 4 == 0}
"""Each objective with a way or two, each way with two objectives or more: with the quick ones."""
QUICK = {"elbo, captured", "log_predictive, captured", "crps, captured chunks", "moment_matched, micro-batches"}


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in sorted(PAIRS | QUICK)]
)
def test_the_layout_law_holds_with_weights(comm, pair):
    case, way = pair.split(", ")
    step, results = train(comm, case, way)
    assert_layout_law(results, train_alone(case))
    if "captured" in way:
        assert step.recorder.num_captures >= 3 and not step.recorder.said


@pytest.mark.parametrize("case", CASES)
def test_weights_of_one_change_no_bit_and_no_collective(comm, case):
    runs, mine = [], comm.grid.local_examples(NUM_EXAMPLES)
    for weights in (None, torch.ones(NUM_EXAMPLES, dtype=torch.float64)[mine]):
        step = make_step(comm, case)
        x, y = testing.make_examples(step.likelihood, torch.float64)
        step(x[mine], y[mine], NUM_EXAMPLES)
        before = comm.traffic.num_collectives, comm.traffic.num_bytes, comm.traffic.num_object_collectives
        result = step(x[mine], y[mine], NUM_EXAMPLES, weights=weights)
        after = comm.traffic.num_collectives, comm.traffic.num_bytes, comm.traffic.num_object_collectives
        runs.append((step.posterior.buffer.flat.clone(), result.nelbo, [b - a for a, b in zip(before, after)]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("change", ["another", "none"])
def test_other_weights_in_a_sample_group_are_an_error_that_names_them(comm, change):
    step, weights = make_step(comm, "elbo"), 1 + make_weights()
    if comm.grid.sample_size == 1:
        pytest.skip("no sample group of several ranks")
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    x, y = (t[mine] for t in testing.make_examples(step.likelihood, torch.float64))
    before, given = step.posterior.buffer.flat.clone(), weights[mine].clone()
    if comm.grid.rank == comm.grid.world_size - 1:
        given = None if change == "none" else given + (torch.arange(len(given)) == 0)
    with pytest.raises(RankError, match=r"the digest of the weights is .* on rank"):
        step(x, y, NUM_EXAMPLES, weights=given)
    assert torch.equal(step.posterior.buffer.flat, before) and step.num_steps == 0
    step(x, y, NUM_EXAMPLES, weights=weights[mine])


class Unaware(NegativeElbo):
    """An objective of a user whose data term knows of no weights."""

    class Sum(Coupling):
        total = 0.0

        def gradient(self, samples, statistic):
            self.total = self.total - statistic.sum() / self.num_samples
            return torch.full_like(statistic, -1.0 / self.num_samples)

        def data_term(self):
            return torch.zeros(()) + self.total

    def begin(self, y, samples, num_samples):
        return self.Sum(y, samples, num_samples)


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_weight_that_cannot_be_stops_all_before_the_update(comm, wrong, capture):
    step, weights = make_step(comm, "elbo", capture=capture), make_weights()
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    x, y = (t[mine] for t in testing.make_examples(step.likelihood, torch.float64))
    step(x, y, NUM_EXAMPLES, weights=weights[mine])
    step.settle()
    before = step.posterior.buffer.flat.clone()
    weights[NUM_EXAMPLES - 1] = wrong
    with pytest.raises(DataError, match=rf"a weight is {wrong:g} on rank .* in step 1: weights of examples are finite"):
        step(x, y, NUM_EXAMPLES, weights=weights[mine])
        step.settle()
    assert torch.equal(step.posterior.buffer.flat, before) and step.num_steps == 1


def test_weights_of_another_form_and_objectives_without_them_are_refused(comm):
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    step, count = make_step(comm, "elbo"), mine.stop - mine.start
    x, y = (t[mine] for t in testing.make_examples(step.likelihood, torch.float64))
    for weights in (torch.ones(count, 1), torch.ones(count + 1), torch.ones(count, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="one floating-point number for each"):
            step(x, y, NUM_EXAMPLES, weights=weights)
    own = testing.make_step(comm, Unaware(), Categorical(3), torch.float64, num_samples=7)
    own(x, y, NUM_EXAMPLES)
    with pytest.raises(ConfigError, match="not defined for weights of examples"):
        own(x, y, NUM_EXAMPLES, weights=torch.ones(count))


# --- shards, metrics -----------------------------------------------------------------------------------------------

KINDS = {
    "gaussian": Gaussian(2),
    "lacking": Gaussian(2, missing_targets=True),
    "implicit": Implicit(2),
    "categorical": Categorical(3),
    "field": Categorical(3, ignore_index=-1),
}


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 12)

    def forward(self, x):
        return self.linear(x).unflatten(1, (3, 4))


def make_shards(directory, kind, comm=None):
    """Examples with weights 0, 1 and 2; and each of them as often as its weight says."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(29, 6)), rng.integers(0, 3, 29)
    if KINDS[kind].num_classes:
        y = rng.integers(0, 3, (29, 4) if kind == "field" else 29)
        facts = {"num_classes": 3} | ({"ignore_index": -1} if kind == "field" else {})
        y[rng.random(y.shape) < 0.2 * (kind == "field")] = -1
    else:
        y, facts = rng.normal(size=(29, 2)) * [1, 100], {"missing_targets": kind == "lacking"}
        y[rng.random(y.shape) < 0.2 * (kind == "lacking")] = np.nan
    facts |= {"name": "toy", "source": "test", "licence": "none", "normalise_targets": False, "comm": comm}
    weighted = write_shards(
        directory / "weighted", {"train": (x, y, w.astype(np.float32))}, examples_per_shard=7, **facts
    )
    rows = np.repeat(np.arange(29), w)
    write_shards(directory / "repeated", {"train": (x[rows], y[rows])}, **facts)
    assert weighted.has_weights and list(weighted.in_shape) == [6]
    return x, y, w


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_examples_that_come_as_often_as_their_weight(comm, directory, kind):
    """But for the calibration error over bins of equal count, whose bins hold other examples."""
    likelihood = KINDS[kind]
    make_shards(directory, kind, comm)
    with Key(0, Stream.INIT).global_generator():
        net = Field() if kind == "field" else nn.Linear(6, likelihood.num_outputs)
    posterior = MeanFieldGaussian(net.double(), init_std=0.3)

    def evaluate(one, name):
        scaling = ShardDataset(directory / "weighted", "train").manifest  # of the inputs
        data = ShardDataset(directory / name, "train", dtype=torch.float64, scaling=scaling)
        return evaluate_dataset(posterior, likelihood, one, data, num_samples=5)

    found = by_one(lambda: evaluate(ONE, "repeated")), evaluate(comm, "weighted")
    expected, got = (evaluation.metrics for evaluation in found)
    assert got.keys() == expected.keys() and len(got) >= 5
    adaptive = [metrics.pop("adaptive_ece", 0.0) for metrics in (expected, got)]
    assert got == pytest.approx(expected, rel=1e-9) and all(0 <= value <= 1 for value in adaptive)
    for curve in ("pit", "reliability", "overlap"):
        if curve in found[0].curves:
            flat = [np.hstack(list(c.values()) if isinstance(c, dict) else c) for c in (e.curves[curve] for e in found)]
            np.testing.assert_allclose(flat[1], flat[0], rtol=1e-9)


@pytest.mark.parametrize("reading", ["rank", "group", "node"])
def test_weights_come_with_the_batch(comm, directory, reading):
    _, y, w = make_shards(directory, "gaussian", comm)
    data = ShardDataset(directory / "weighted", "train", dtype=torch.float64, comm=comm, reading=reading)
    seen = {}
    for batch in BatchLoader(data, comm.grid, 8, seed=3).epoch(0):
        assert batch.weights.dtype == torch.float64 and batch.weights.shape == batch.examples.shape
        np.testing.assert_allclose(batch.y, y[batch.examples.numpy()])
        seen |= dict(zip(batch.examples.tolist(), batch.weights.tolist()))
    everyones = {b: weight for part in comm.gather_objects(seen) for b, weight in part.items()}
    assert everyones == dict(enumerate(w.astype(float)))
    plain = BatchLoader(ShardDataset(directory / "repeated", "train", comm=comm), comm.grid, 8, seed=3)
    assert next(plain.epoch(0)).weights is None


def test_tensors_have_weights_too(comm):
    x, y = testing.make_examples(Categorical(3), torch.float64)
    source = TensorSource(x, y, 3, weights=make_weights())
    batch = next(BatchLoader(source.on("cpu", torch.float64), comm.grid, NUM_EXAMPLES, seed=0).epoch(0))
    assert torch.equal(batch.weights, make_weights()[batch.examples])
