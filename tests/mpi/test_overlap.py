"""Sums that are begun during the last backward pass: the same numbers, begun early, in one order on all ranks."""

import pytest
import torch
from reference import GLOBAL_BATCH_SIZE, NUM_EXAMPLES, computed_once, make_problem, relative_difference
from torch import nn

import hpc_bnn.training.reducer
from hpc_bnn import (
    Categorical,
    DeepEnsemble,
    DeterministicNetwork,
    Grid,
    GridComm,
    LaplacePrior,
    LogPredictive,
    LowRankGaussian,
    MCDropout,
    MeanFieldGaussian,
    NegativeElbo,
    OverlappingOptimizer,
    StudentTPrior,
    VariationalStep,
)
from hpc_bnn.config import OptimizerConfig
from hpc_bnn.errors import ConfigError, NonFiniteError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.training.optim import JobOptimizer, build_optimizer

NUM_SAMPLES = 9


class Net(nn.Module):
    """Six tensors in whole lines of 16 numbers, one that is not, one that no forward uses."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 32), nn.Dropout(dropout), nn.Linear(32, 3)
        )
        self.unused = nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return self.layers(x)


FAMILIES = {
    "mean_field": MeanFieldGaussian,
    "laplace": lambda net: MeanFieldGaussian(net, prior=LaplacePrior(1.0), antithetic=True),
    "with_points": lambda net: MeanFieldGaussian(net, deterministic=["layers.2.*"]),
    "mc_dropout": MCDropout,
    "deterministic": DeterministicNetwork,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Each tensor is a block of its own."""
    monkeypatch.setattr(hpc_bnn.training.reducer, "OVERLAP_BYTES", 8)
    monkeypatch.setattr(hpc_bnn.training.reducer, "OVERLAP_BLOCKS", 10**6)


def make_step(comm, family="mean_field", overlap=True, **options):
    with Key(5, Stream.INIT).global_generator():
        net = Net(0.2 if family == "mc_dropout" else 0.0).double()
    posterior = FAMILIES[family](net)
    config = OptimizerConfig(learning_rate=0.02, schedule="constant")
    optimizer, _ = build_optimizer(config, posterior, comm, 1, 1, overlap)
    return VariationalStep(
        posterior, Categorical(3), optimizer, comm,
        num_samples=NUM_SAMPLES, num_train_examples=NUM_EXAMPLES, seed=5, **options,
    )  # fmt: skip


@computed_once
def alone(family="mean_field", chunk_size=1, objective=NegativeElbo):
    options = {"chunk_size": chunk_size, "objective": objective()}
    posterior = train(make_step(GridComm(Grid()), family, overlap=False, **options)).posterior
    return {name: parameter.detach() for name, parameter in posterior.named_parameters()}


def train(step, sizes=(GLOBAL_BATCH_SIZE, 5, 1)):
    """A step on each batch; of one example most ranks of the data axis have none."""
    x, y = make_problem(torch.float64)
    for size in sizes:
        mine = step.comm.grid.local_examples(size)
        step(x[mine.start : mine.stop], y[mine.start : mine.stop], size)
    return step


CASES = [
    *((family, 1, NegativeElbo) for family in FAMILIES),
    ("mean_field", 2, NegativeElbo),
    ("with_points", 100, NegativeElbo),
    ("mean_field", 1, LogPredictive),
    ("laplace", 100, LogPredictive),
]


@pytest.mark.parametrize(("family", "chunk_size", "objective"), CASES)
def test_overlap_changes_no_number(comm, family, chunk_size, objective):
    expected = alone(family, chunk_size, objective)
    step = train(make_step(comm, family, chunk_size=chunk_size, objective=objective()))
    for name, parameter in step.posterior.named_parameters():
        assert relative_difference(parameter, expected[name]) < 1e-12, name
    comm.check_replicas(list(step.posterior.parameters()), "parameters")


def test_only_the_last_micro_batch_begins_sums(comm, monkeypatch):
    step, begun, start = make_step(comm, micro_batch_size=3), [], comm.start_sum_
    monkeypatch.setattr(comm, "start_sum_", lambda *args: begun.append(1) or start(*args))
    train(step)
    expected = alone()
    for name, parameter in step.posterior.named_parameters():
        assert relative_difference(parameter, expected[name]) < 1e-12, name
    assert len(begun) == 3 * (2 * (len(step.posterior.random) - 2) + 1)  # as many as for whole batches


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_sums_begin_while_the_last_backward_pass_runs(comm, chunk_size, monkeypatch):
    step = make_step(comm, chunk_size=chunk_size)
    begun, start = [], comm.start_sum_

    def spy(flat, axis="world"):
        begun.append((flat.storage_offset(), step.reducer._is_last))
        return start(flat, axis)

    monkeypatch.setattr(comm, "start_sum_", spy)
    step.comparison.make_replicas_equal_(step.posterior)  # once, not in each step
    before = comm.traffic.num_collectives, comm.traffic.num_bytes
    train(step, [GLOBAL_BATCH_SIZE])
    layout = step.posterior.random
    assert list(layout)[-1] == "layers.4.bias" and next(iter(layout)) == "unused"  # both of the rest
    # Means and scales of five weights, those of the last layer first; then the rest, once.
    *early, (_, is_rest_early) = begun
    assert len(early) == 2 * (len(layout) - 2) and all(is_early for _, is_early in early)
    assert not is_rest_early
    assert [place for place, _ in early[::2]] == sorted((place for place, _ in early[::2]), reverse=True)
    if comm.grid.world_size > 1:
        assert comm.traffic.num_collectives - before[0] == len(begun)
        assert comm.traffic.num_bytes - before[1] == 8 * len(step.posterior.buffer.reduced)


def test_a_divided_posterior_serves_a_plain_optimizer_as_well(comm):
    expected = alone()
    step = make_step(comm)
    plain = torch.optim.Adam(step.posterior.parameters(), lr=0.02)
    step.optimizer = JobOptimizer.of(plain, step.posterior, comm)
    train(step)
    for name, parameter in step.posterior.named_parameters():
        assert relative_difference(parameter, expected[name]) < 1e-12, name


def test_what_is_not_finite_stops_all_ranks_before_the_update(comm):
    step = make_step(comm)
    x, y = make_problem(torch.float64)
    broken = comm.grid.world_size - 1
    x = x.clone().fill_(float("nan")) if comm.grid.rank == broken else x
    before = [p.detach().clone() for p in step.posterior.parameters()]
    mine = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    with pytest.raises(NonFiniteError, match=f"not finite on rank {broken} on "):
        step(x[mine.start : mine.stop], y[mine.start : mine.stop], GLOBAL_BATCH_SIZE)
    assert all(map(torch.equal, before, step.posterior.parameters()))


class Twice(Net):
    """Its first backward pass starts another one inside, in which gradients come in several goes."""

    def forward(self, x):
        half = torch.utils.checkpoint.checkpoint(self.layers, x.requires_grad_(), use_reentrant=True)
        return half + torch.utils.checkpoint.checkpoint(self.layers, x, use_reentrant=True)


def test_gradients_that_come_in_several_goes_are_an_error(comm):
    posterior = MeanFieldGaussian(Twice().double())
    optimizer = OverlappingOptimizer(torch.optim.SGD(posterior.parameters(), lr=0.1), posterior, comm)
    step = VariationalStep(
        posterior, Categorical(3), optimizer, comm, num_samples=NUM_SAMPLES, num_train_examples=NUM_EXAMPLES
    )
    with pytest.raises(ConfigError, match=r"overlap True: .* several partial gradients"):
        train(step, [GLOBAL_BATCH_SIZE])
    comm.barrier()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (LowRankGaussian, "cannot be divided into blocks"),
        (lambda net: MeanFieldGaussian(net, prior=StudentTPrior(1.0)), "Monte Carlo KL"),
        (lambda net: MeanFieldGaussian(net, estimator="local"), "noise per example"),
        (lambda net: DeepEnsemble(Net, 2, range(2), seed=5), "cannot be divided into blocks"),
        (lambda net: DeterministicNetwork(nn.Sequential(net, nn.BatchNorm1d(3))), "BatchNorm"),
    ],
)
def test_posteriors_that_cannot_be_divided_are_refused(make, why):
    posterior = make(Net())
    with pytest.raises(ConfigError, match=f"(?m)^overlap True: .*{why}"):
        OverlappingOptimizer(torch.optim.SGD(posterior.parameters(), lr=0.1), posterior, GridComm(Grid()))
