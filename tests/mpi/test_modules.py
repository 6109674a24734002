"""Modules of many kinds train under wrapping, in chunks, with the same result on every grid."""

import pytest
import torch
from modules import MODULES, NUM_CLASSES, make_examples, make_module
from reference import Results, assert_layout_law, by_one, computed_once, relative_difference

from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, posteriors, predict_classes
from hpc_bnn.noise import Key, Stream

NUM_EXAMPLES, NUM_SAMPLES = 11, 5  # uneven on 2, 3 and 4 ranks
FAMILIES = {
    "mean_field": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05),
    "antithetic": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, antithetic=True),
    "low_rank": lambda net: posteriors.LowRankGaussian(net, init_std=0.05, rank=2),
    "student_t": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, prior=posteriors.StudentTPrior()),
    "mixture_low_rank": lambda net: posteriors.LowRankGaussian(
        net, init_std=0.05, rank=2, prior=posteriors.ScaleMixturePrior()
    ),
    "laplace": lambda net: posteriors.MeanFieldGaussian(net, init_std=0.05, prior=posteriors.LaplacePrior(0.5)),
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
    results = Results(comm)
    for _ in range(num_steps):
        results.take(step, x, y, NUM_EXAMPLES)
    return posterior, results


@computed_once
def train_alone(name, family="mean_field"):
    return train(GridComm(Grid()), name, family)[1]


@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("name", MODULES)
def test_module_trains_alike_on_every_grid(comm, name, chunk_size):
    expected = train_alone(name)
    posterior, results = train(comm, name, chunk_size=chunk_size)
    assert_layout_law(results, expected)
    assert results[0].nelbo != results[-1].nelbo
    comm.check_replicas([v for v in posterior.state_dict().values()], name)


@pytest.mark.parametrize("chunk_size", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_alike_on_every_grid(comm, family, chunk_size):
    expected = train_alone("vit", family)
    _, results = train(comm, "vit", family, chunk_size)
    assert_layout_law(results, expected)


@pytest.mark.parametrize("name, estimator", [("mlp", "local"), ("lenet_batchnorm", "flipout")])
def test_noise_per_example_does_not_depend_on_the_grid(comm, name, estimator):
    expected = train_alone(name, estimator)
    posterior, results = train(comm, name, estimator)
    assert_layout_law(results, expected)
    assert len(posterior.sampler.noisy.layers) >= 2


def test_mc_dropout_trains_alike_on_every_grid(comm):
    expected = train_alone("torch_transformer_dropout", posteriors.MCDropout)
    _, results = train(comm, "torch_transformer_dropout", posteriors.MCDropout)
    assert_layout_law(results, expected)
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


def train_ensemble(comm, num_members=5):
    posterior = posteriors.DeepEnsemble(
        MODULES["mlp"], num_members, comm.grid.local_samples(num_members), seed=4, prior_std=0.5
    )
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    step = VariationalStep(
        posterior, Categorical(NUM_CLASSES), optimizer, comm, num_samples=num_members, num_train_examples=100
    )
    x, y = make_examples(NUM_EXAMPLES, torch.float32)
    part = comm.grid.local_examples(NUM_EXAMPLES)
    results = [step(x[part], y[part], NUM_EXAMPLES) for _ in range(3)]
    state = {k: v.clone() for s in comm.gather_objects(posterior.state_dict(), "sample") for k, v in s.items()}
    return posterior, state, results


def test_ensemble_members_train_alone_and_alike_on_every_grid(comm):
    """Float32, as its modules come: 1e-5 per step."""
    expected_state, expected = by_one(lambda: train_ensemble(GridComm(Grid()))[1:])
    posterior, state, results = train_ensemble(comm)
    assert state.keys() == expected_state.keys() and "members.4.1.weight" in state
    for name, value in state.items():
        assert relative_difference(value, expected_state[name]) < 3e-5, name
    for a, b in zip(results, expected):
        assert a.nelbo == pytest.approx(b.nelbo, rel=3e-5) and a.kl == pytest.approx(b.kl, rel=3e-5)
    assert not torch.equal(state["members.0.1.weight"], state["members.1.1.weight"])
    x, _ = make_examples(NUM_EXAMPLES, torch.float32)
    predictive = predict_classes(posterior, Categorical(NUM_CLASSES), comm, x, num_samples=5)
    members = []
    for member in range(5):
        net = MODULES["mlp"]()
        net.load_state_dict({k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"members.{member}.")})
        members.append(torch.softmax(net(x), -1))
    torch.testing.assert_close(predictive.probabilities.float(), torch.stack(members).mean(0).detach())


def test_an_ensemble_member_is_the_network_trained_without_the_others():
    state = by_one(lambda: train_ensemble(GridComm(Grid()))[1])
    with Key(4, Stream.INIT, sample=2).global_generator():
        net = MODULES["mlp"]()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x, y = make_examples(NUM_EXAMPLES, torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in net.parameters()) / (2 * 0.25)
        (torch.nn.functional.cross_entropy(net(x), y) + decay / 100).backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        assert relative_difference(state[f"members.2.{name}"], value) < 3e-5, name
