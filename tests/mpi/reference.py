"""Small problems whose result must not depend on the grid."""

import functools
import math
import time

import pytest
import torch
from torch import nn

from hpc_bnn import Categorical, GaussianPrior, Grid, GridComm, MeanFieldGaussian, VariationalStep, global_batches
from hpc_bnn.comm.mpi import running_mpi
from hpc_bnn.noise import Key, Stream

NUM_EXAMPLES = 31
GLOBAL_BATCH_SIZE = 13
"""13, 13 and 5 examples: uneven on 2, 3 and 4 ranks, and the last batch is partial."""


def by_one(compute):
    """Return what one rank computes for all, or raise what it raises: on few cores each of them would take it from the others.

    Without MPI each rank computes.
    """
    mpi = running_mpi()
    if mpi is None:
        return compute()
    world, result, error = mpi.COMM_WORLD, None, None
    if world.rank == 0:
        try:
            result = compute()
        except Exception as caught:
            error = caught
    ready = world.Ibarrier()
    while not ready.Test():
        time.sleep(0.002)
    result, error = world.bcast((result, error))
    if error is not None:
        raise error
    return result


def computed_once(function):
    """For what one process computes: all grids are compared with the same. Nobody changes what it returns."""
    results = {}

    @functools.wraps(function)
    def remembered(*arguments, **options):
        key = repr((arguments, sorted(options.items())))
        assert " at 0x" not in key, "two objects can have the same address, one after the other"
        if key not in results:
            results[key] = by_one(lambda: function(*arguments, **options))
        return results[key]

    return remembered


def make_problem(dtype):
    """Return inputs [31, 6] and classes [31]."""
    generator = Key(11, Stream.DATA_ORDER).generator()
    x = torch.randn(NUM_EXAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (NUM_EXAMPLES,), generator=generator)


def make_step(comm, dtype=torch.float64, num_samples=16, **options):
    with Key(5, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    posterior = MeanFieldGaussian(net, prior=GaussianPrior(0.7), init_std=0.1)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    return VariationalStep(
        posterior, Categorical(3), optimizer, comm,
        num_samples=num_samples, num_train_examples=NUM_EXAMPLES, seed=5, kl_weight=0.9, **options,
    )  # fmt: skip


class Results(list):
    """The results of the steps of a run, with its grid and its parameters after each step."""

    def __init__(self, comm):
        super().__init__()
        self.grid = f"{comm.grid.sample_size} x {comm.grid.data_size}"
        self.states = []

    def take(self, step, x, y, global_batch_size):
        """Make a step on this rank's examples of a batch."""
        mine = step.comm.grid.local_examples(global_batch_size)
        self.append(step(x[mine], y[mine], global_batch_size))
        self.states.append({name: value.clone() for name, value in step.posterior.state_dict().items()})


def assert_layout_law(results, expected, tolerance=1e-12):
    """Name what differs after the first step in which anything does, and the grids."""
    for number, (state, other) in enumerate(zip(results.states, expected.states, strict=True), 1):
        assert state.keys() == other.keys()
        differences = {name: relative_difference(value, other[name]) for name, value in state.items()}
        different = [f"{name} by {size:.1e}" for name, size in differences.items() if not size < tolerance]
        assert not different, (
            f"grid {results.grid} and grid {expected.grid} differ first after step {number}, "
            f"by more than {tolerance}: {', '.join(different)}"
        )
    for result, other in zip(results, expected, strict=True):
        for name in ("nelbo", "kl", "data_term"):
            assert getattr(result, name) == pytest.approx(getattr(other, name), rel=tolerance), name


def train(comm, dtype=torch.float64, num_samples=16, num_steps=5):
    """Make some steps and return the step object and the results."""
    step = make_step(comm, dtype, num_samples)
    x, y = make_problem(dtype)
    results = Results(comm)
    for epoch in range(num_steps):
        for batch in global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 5, epoch):
            results.take(step, x[batch], y[batch], len(batch))
            if len(results) == num_steps:
                return step, results


def relative_difference(a, b):
    """Return the norm of a difference by that of the second; 0 of two that are equal, infinity of numbers that are not finite."""
    if torch.equal(a, b):
        return 0.0
    size = ((a - b).double().norm() / b.double().norm()).item()
    return math.inf if math.isnan(size) else size


@computed_once
def train_alone(dtype=torch.float64, num_samples=16):
    return train(GridComm(Grid()), dtype, num_samples)[1]
