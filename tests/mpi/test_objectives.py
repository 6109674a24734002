"""The log predictive over all samples of the job: exact on every grid."""

import math

import pytest
import torch
from modules import NUM_CLASSES, make_examples, make_module
from reference import GLOBAL_BATCH_SIZE, make_problem, make_step, relative_difference

from hpc_bnn import Categorical, Grid, GridComm, MeanFieldGaussian, VariationalStep
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Stream, keyed_generator
from hpc_bnn.objectives import LogPredictive

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def by_definition(step, x, y):
    """-log mean_s p(y | x, w_s), its mean over the batch, and the gradient, by autograd in one process."""
    posterior = step.posterior
    leaves = [p.detach().clone().requires_grad_() for p in posterior.parameters()]
    log_probs = []
    for sample in range(step.num_samples):
        generator = keyed_generator(step.seed, Stream.NOISE, 0, sample)
        eps = torch.randn(posterior.num_weights, dtype=x.dtype, generator=generator)
        weights = posterior.random.views(leaves[0] + leaves[1].exp() * eps)
        outputs = torch.func.functional_call(posterior.module, weights, (x,))
        log_probs.append(step.likelihood.log_prob(outputs, y))
    loss = (math.log(step.num_samples) - torch.logsumexp(torch.stack(log_probs), 0)).mean()
    return loss, torch.cat(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("num_samples", [16, 5, "one per rank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_loss_and_gradient_equal_the_definition(comm, dtype, num_samples, chunk_size):
    num_samples = comm.grid.sample_size if num_samples == "one per rank" else num_samples
    step = make_step(comm, dtype, num_samples, objective="log_predictive", chunk_size=chunk_size)
    x, y = (t[:GLOBAL_BATCH_SIZE] for t in make_problem(dtype))
    loss, gradient = by_definition(step, x, y)
    part = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    step.accumulate_gradient_(x[part], y[part], GLOBAL_BATCH_SIZE)
    assert step.posterior.tally[0].item() == pytest.approx(loss.item(), rel=TOLERANCE[dtype])
    assert relative_difference(step.posterior.gradient, gradient) < TOLERANCE[dtype]


def test_it_is_not_the_negative_elbo(comm):
    x, y = (t[:GLOBAL_BATCH_SIZE] for t in make_problem(torch.float64))
    part = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    terms = [
        make_step(comm, objective=name)(x[part], y[part], GLOBAL_BATCH_SIZE).data_term
        for name in ("elbo", "log_predictive")
    ]
    assert terms[1] < terms[0]  # Jensen


def test_communication_is_two_floats_per_example(comm):
    x, y = (t[:GLOBAL_BATCH_SIZE] for t in make_problem(torch.float64))
    part = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    traffic = []
    for name in ("elbo", "log_predictive"):
        step = make_step(comm, objective=name)
        before = comm.traffic.num_collectives, comm.traffic.num_bytes
        step(x[part], y[part], GLOBAL_BATCH_SIZE)
        traffic.append((comm.traffic.num_collectives - before[0], comm.traffic.num_bytes - before[1]))
    has_group = comm.grid.sample_size > 1
    assert traffic[1][0] - traffic[0][0] == 2 * has_group
    assert traffic[1][1] - traffic[0][1] == 8 * 2 * (part.stop - part.start) * has_group


def test_more_data_groups_than_examples(comm):
    x, y = make_problem(torch.float64)
    alone, step = (make_step(c, objective="log_predictive") for c in (GridComm(Grid()), comm))
    part = comm.grid.local_examples(1)
    expected, got = alone(x[:1], y[:1], 1), step(x[:1][part], y[:1][part], 1)
    assert got.nelbo == pytest.approx(expected.nelbo, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_tiny_likelihoods_keep_their_digits(comm, dtype):
    """Log-likelihoods of -700 to -1000 nats: exp underflows, the shifted sum does not."""
    like = torch.zeros((), dtype=dtype)
    log_probs = (
        -700 - 300 * torch.rand(6, 4, generator=keyed_generator(0, Stream.NOISE), dtype=torch.float64)
    ).to(dtype)
    log_probs[0, 3] = log_probs[1, 3] + 1
    mine = comm.grid.local_samples(6)
    objective = LogPredictive(4, like)
    for sample in mine:
        objective.see(log_probs[sample : sample + 1])
    objective.combine(comm)
    expected = torch.logsumexp(log_probs.double(), 0)
    torch.testing.assert_close(
        objective.log_normaliser.double(), expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0
    )
    weights = objective.weights(log_probs[mine.start : mine.stop]).sum(0)
    comm.sum_(weights, "sample")
    torch.testing.assert_close(
        weights, torch.ones_like(weights), rtol=2e-4 if dtype == torch.float32 else 1e-12, atol=0
    )


def test_ensembles_refuse_a_coupled_objective(comm):
    step = make_step(comm)
    step.posterior.is_replicated = False
    with pytest.raises(ConfigError, match="members of an ensemble"):
        type(step)(
            step.posterior, step.likelihood, step.optimizer, comm,
            num_samples=16, num_train_examples=9, objective="log_predictive",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["lenet_batchnorm", "torch_transformer_dropout"])
def test_two_passes_see_the_same_masks_and_keep_one_set_of_statistics(comm, name):
    states = []
    x, y = make_examples(11)
    for grid_comm in (GridComm(Grid()), comm):
        posterior = MeanFieldGaussian(make_module(name), init_std=0.05)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.05)
        step = VariationalStep(
            posterior, Categorical(NUM_CLASSES), optimizer, grid_comm,
            num_samples=5, num_train_examples=100, objective="log_predictive",
        )  # fmt: skip
        part = grid_comm.grid.local_examples(11)
        for _ in range(2):
            step(x[part], y[part], 11)
        states.append({k: v.clone() for k, v in posterior.state_dict().items()})
    expected, got = states
    for key, value in got.items():
        if value.is_floating_point():
            assert torch.equal(value, expected[key]) or relative_difference(value, expected[key]) < 1e-12, key
        else:
            assert value == 2  # num_batches_tracked: one per step
