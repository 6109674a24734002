"""Modules of many kinds train under wrapping, in chunks, with the same result on every grid."""

import pytest
import torch
from modules import MODULES, NUM_CLASSES, make_examples, make_module
from reference import relative_difference

from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, posteriors

NUM_EXAMPLES, NUM_SAMPLES = 11, 5  # uneven on 2, 3 and 4 ranks
FAMILIES = {
    "mean_field": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05),
    "antithetic": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, antithetic=True),
    "low_rank": lambda net: posteriors.LowRankGaussian(net, init_std=0.05, rank=2),
    "student_t": lambda net: posteriors.MeanFieldGaussian(
        net, init_std=0.05, prior=posteriors.StudentTPrior()
    ),
    "mixture_low_rank": lambda net: posteriors.LowRankGaussian(
        net, init_std=0.05, rank=2, prior=posteriors.ScaleMixturePrior()
    ),
    "laplace": lambda net: posteriors.MeanFieldGaussian(
        net, init_std=0.05, prior=posteriors.LaplacePrior(0.5)
    ),
    "local": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, estimator="local"),
    "flipout": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, estimator="flipout"),
    "deterministic": posteriors.DeterministicNetwork,
}


def train(comm, name, family="mean_field", chunk_size=1, num_steps=3, num_samples=NUM_SAMPLES):
    posterior = FAMILIES[family](make_module(name)) if isinstance(family, str) else family(make_module(name))
    # Not Adam: it divides by |g|, and the biases of attention keys have no gradient but rounding.
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.05, momentum=0.9)
    step = VariationalStep(
        posterior, Categorical(NUM_CLASSES), optimizer, comm,
        num_samples=num_samples, num_train_examples=100, seed=3, chunk_size=chunk_size,
    )  # fmt: skip
    x, y = make_examples(NUM_EXAMPLES)
    part = comm.grid.local_examples(NUM_EXAMPLES)
    results = [step(x[part], y[part], NUM_EXAMPLES) for _ in range(num_steps)]
    return posterior, results


def assert_equal(posterior, reference, results, expected, tolerance=1e-12):
    state, other = posterior.state_dict(), reference.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        if value.is_floating_point():
            assert relative_difference(value, other[name]) < tolerance or torch.equal(value, other[name]), (
                name
            )
        else:
            assert torch.equal(value, other[name]), name
    for a, b in zip(results, expected):
        assert a.nelbo == pytest.approx(b.nelbo, rel=tolerance)
        assert a.kl == pytest.approx(b.kl, rel=tolerance)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("name", MODULES)
def test_module_trains_alike_on_every_grid(comm, name, chunk_size):
    reference, expected = train(GridComm(Grid()), name)
    posterior, results = train(comm, name, chunk_size=chunk_size)
    assert_equal(posterior, reference, results, expected)
    assert results[0].nelbo != results[-1].nelbo
    comm.check_replicas([v for v in posterior.state_dict().values()], name)


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_alike_on_every_grid(comm, family, chunk_size):
    reference, expected = train(GridComm(Grid()), "vit", family)
    posterior, results = train(comm, "vit", family, chunk_size)
    assert_equal(posterior, reference, results, expected)


@pytest.mark.parametrize("name, estimator", [("mlp", "local"), ("lenet_batchnorm", "flipout")])
def test_noise_per_example_does_not_depend_on_the_grid(comm, name, estimator, monkeypatch):
    monkeypatch.setattr(posteriors.estimators, "BLOCK", 4)  # several blocks in a batch of 11
    reference, expected = train(GridComm(Grid()), name, estimator)
    posterior, results = train(comm, name, estimator)
    assert_equal(posterior, reference, results, expected)
    assert len(posterior._noisy._layers) >= 2


def test_mc_dropout_trains_alike_on_every_grid(comm):
    reference, expected = train(GridComm(Grid()), "torch_transformer_dropout", posteriors.MCDropout)
    posterior, results = train(comm, "torch_transformer_dropout", posteriors.MCDropout)
    assert_equal(posterior, reference, results, expected)
    assert results[0].kl > 0


def test_a_rank_without_examples_takes_part_in_batch_norm(comm):
    """One example in the whole job: the ranks of the other data groups have none."""
    x, y = make_examples(1)
    results = []
    for grid_comm in (GridComm(Grid()), comm):
        posterior = FAMILIES["mean_field"](make_module("lenet_batchnorm"))
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(
            posterior, Categorical(NUM_CLASSES), optimizer, grid_comm, num_samples=4, num_train_examples=9
        )
        part = grid_comm.grid.local_examples(1)
        results.append((step(x[part], y[part], 1), posterior))
    (expected, reference), (got, posterior) = results
    assert got.nelbo == pytest.approx(expected.nelbo, rel=1e-12)
    assert relative_difference(posterior.loc, reference.loc) < 1e-12
