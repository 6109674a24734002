"""Small problems whose result must not depend on the grid."""

import functools

import torch
from torch import nn

from hpc_bnn import (
    Categorical,
    GaussianPrior,
    Grid,
    GridComm,
    MeanFieldGaussian,
    VariationalStep,
    global_batches,
)
from hpc_bnn.noise import Stream, keyed_generator, keyed_global_generator

NUM_EXAMPLES = 31
GLOBAL_BATCH_SIZE = 13
"""13, 13 and 5 examples: uneven on 2, 3 and 4 ranks, and the last batch is partial."""


def computed_once(function):
    """For what one process computes: all grids are compared with the same. Nobody changes what it returns."""
    results = {}

    @functools.wraps(function)
    def remembered(*arguments, **options):
        key = repr((arguments, sorted(options.items())))
        assert " at 0x" not in key, "two objects can have the same address, one after the other"
        if key not in results:
            results[key] = function(*arguments, **options)
        return results[key]

    return remembered


def make_problem(dtype):
    """Return inputs [31, 6] and classes [31]."""
    generator = keyed_generator(11, Stream.DATA_ORDER)
    x = torch.randn(NUM_EXAMPLES, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (NUM_EXAMPLES,), generator=generator)


def make_step(comm, dtype=torch.float64, num_samples=16, **options):
    with keyed_global_generator(5, Stream.INIT):
        net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(dtype)
    posterior = MeanFieldGaussian(net, prior=GaussianPrior(0.7), init_std=0.1)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    return VariationalStep(
        posterior, Categorical(3), optimizer, comm,
        num_samples=num_samples, num_train_examples=NUM_EXAMPLES, seed=5, kl_weight=0.9, **options,
    )  # fmt: skip


def train(comm, dtype=torch.float64, num_samples=16, num_steps=5):
    """Make some steps and return the step object and the results."""
    step = make_step(comm, dtype, num_samples)
    x, y = make_problem(dtype)
    results = []
    for epoch in range(num_steps):
        for batch in global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 5, epoch):
            mine = batch[comm.grid.local_examples(len(batch))]
            results.append(step(x[mine], y[mine], len(batch)))
            if len(results) == num_steps:
                return step, results


def relative_difference(a, b):
    return ((a - b).norm() / b.norm()).item()


@computed_once
def train_alone(dtype=torch.float64, num_samples=16):
    return train(GridComm(Grid()), dtype, num_samples)
