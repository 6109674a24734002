"""One step in one process, against a one-line reference."""

import math

import pytest
import torch
from stepping import noise_of
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from hpc_bnn import Categorical, GaussianPrior, Grid, GridComm, KlAnnealing, MeanFieldGaussian, VariationalStep
from hpc_bnn.errors import ConfigError, NonFiniteError
from hpc_bnn.noise import Key, Stream


def make_step(num_samples=3, dtype=torch.float64, **options):
    with Key(0, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    posterior = MeanFieldGaussian(net, prior=GaussianPrior(0.5), init_std=0.2)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    return VariationalStep(
        posterior,
        Categorical(3),
        optimizer,
        GridComm(Grid()),
        num_samples=num_samples,
        num_train_examples=50,
        seed=7,
        **options,
    )


def batch(dtype=torch.float64):
    generator = Key(0, Stream.DATA_ORDER).generator()
    return torch.randn(10, 4, generator=generator, dtype=dtype), torch.arange(10) % 3


def test_negative_elbo_and_its_gradient_equal_the_definition():
    step = make_step(kl_weight=0.3)
    x, y = batch()
    loc, log_scale = (p.detach().clone().requires_grad_() for p in step.posterior.parameters())
    data_term = 0
    for sample in range(3):
        eps = noise_of(step.posterior, Key(7, Stream.NOISE, sample=sample))
        weights = step.posterior.random.views(loc + log_scale.exp() * eps)
        data_term += F.cross_entropy(torch.func.functional_call(step.posterior.module, weights, (x,)), y) / 3
    kl = kl_divergence(Normal(loc, log_scale.exp()), Normal(0.0, 0.5)).sum()
    nelbo = data_term + 0.3 * kl / 50
    gradients = torch.autograd.grad(nelbo, [loc, log_scale])
    result = step(x, y, len(x))
    assert result.nelbo == pytest.approx(nelbo.item(), rel=1e-12)
    assert result.data_term == pytest.approx(data_term.item(), rel=1e-12)
    assert result.kl == pytest.approx(kl.item(), rel=1e-12)
    for after, before, gradient in zip(step.posterior.parameters(), (loc, log_scale), gradients):
        torch.testing.assert_close(after.detach(), (before - 0.1 * gradient).detach(), rtol=1e-12, atol=1e-14)


def test_steps_draw_different_noise():
    step = make_step()
    x, y = batch()
    first = step(x, y, len(x))
    weights = [p.detach().clone() for p in step.posterior.module.parameters()]
    assert step.num_steps == 1
    second = step(x, y, len(x))
    assert first.data_term != second.data_term
    assert not any(torch.equal(a, b) for a, b in zip(weights, step.posterior.module.parameters()))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_non_finite_input_stops_before_the_update(poison):
    step = make_step()
    x, y = batch()
    x[3, 1] = poison
    before = step.posterior.loc.detach().clone()
    with pytest.raises(NonFiniteError, match=r"step 0.*rank 0 on "):
        step(x, y, len(x))
    assert torch.equal(step.posterior.loc, before) and step.num_steps == 0


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("network", ["plain", "BatchNorm"])
def test_a_kl_that_is_not_finite_changes_nothing(capture, network):
    step = make_step(dtype=torch.float32, capture=capture)
    if network == "BatchNorm":
        net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        posterior = MeanFieldGaussian(net)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        options = {"num_samples": 3, "num_train_examples": 50, "capture": capture}
        step = VariationalStep(posterior, Categorical(3), optimizer, GridComm(Grid()), **options)
    x, y = batch(torch.float32)
    for _ in range(4):
        step(x, y, len(x))
    step.settle()
    *_, scales = (value for name, value in step.posterior.state_dict().items() if name.endswith("bias.log_scale"))
    with torch.no_grad():
        scales[0] = 50.0  # draws are finite, and their squares are not
    before = [step.posterior.buffer.flat.clone(), step.num_steps]
    buffers = [value.clone() for value in step.posterior.module.buffers()]
    with pytest.raises(NonFiniteError, match=r"step 4: the KL is inf.*not updated"):
        step(x, y, len(x))
        step.settle()
    assert torch.equal(step.posterior.buffer.flat, before[0]) and step.num_steps == before[1]
    if capture == "on":
        assert all(map(torch.equal, step.posterior.module.buffers(), buffers))
    with torch.no_grad():
        scales[0] = -3.0
    step(x, y, len(x))
    step.settle()


@pytest.mark.parametrize("number", [0, -5, math.nan, math.inf, None, "100"])
def test_numbers_of_training_examples_are_checked(number):
    step = make_step()
    with pytest.raises(ConfigError, match=r"num_train_examples .*must be at least 1"):
        VariationalStep(
            step.posterior, Categorical(3), torch.optim.SGD(step.posterior.parameters(), lr=0.1), GridComm(Grid()),
            num_samples=3, num_train_examples=number,
        )  # fmt: skip


@pytest.mark.parametrize("kl_weight", [math.nan, -1.0, None, "1"])
def test_what_a_schedule_of_the_kl_gives_is_checked(kl_weight):
    step = make_step(kl_weight=lambda num_steps: kl_weight if num_steps else 1.0)
    x, y = batch()
    step(x, y, len(x))
    before = step.posterior.loc.detach().clone()
    with pytest.raises(ConfigError, match=r"kl_weight .*0 or more"):
        step(x, y, len(x))
    assert torch.equal(step.posterior.loc, before)


def test_training_lowers_the_objective():
    step = make_step(num_samples=8)
    x, y = batch()
    y = (x[:, 0] > 0).long()  # can be learnt
    results = [step(x, y, len(x)).nelbo for _ in range(150)]
    assert sum(results[-10:]) / 10 < 0.7 * results[0]


def test_autocast_keeps_weights_and_gradients_in_float32():
    exact, rough = (make_step(dtype=torch.float32), make_step(dtype=torch.float32, autocast_dtype=torch.bfloat16))
    x, y = batch(torch.float32)
    a, b = exact(x, y, len(x)), rough(x, y, len(x))
    assert rough.posterior.loc.dtype == rough.posterior.buffer.reduced.dtype == torch.float32
    assert a.data_term != b.data_term
    assert a.data_term == pytest.approx(b.data_term, rel=2e-2)  # bfloat16 has 8 bits of mantissa


def test_too_few_samples_are_refused():
    with pytest.raises(ConfigError, match=r"^num_samples 0"):
        make_step(num_samples=0)


def test_noise_that_is_not_keyed_is_said(caplog):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(x * torch.rand_like(x))

    posterior = MeanFieldGaussian(Functional())
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    step = VariationalStep(posterior, Categorical(3), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=10)
    x, y = batch()
    step(x, y, len(x))
    step(x, y, len(x))
    assert caplog.text.count("torch's global generator") == 1


def test_kl_annealing_enters_the_step():
    step = make_step(kl_weight=KlAnnealing(0.8, "linear", 4))
    x, y = batch()
    results = [step(x, y, len(x)) for _ in range(6)]
    assert [r.kl_weight for r in results] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    for r in results:
        assert r.nelbo == pytest.approx(r.data_term + r.kl_weight * r.kl / 50, rel=1e-12)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [2, 2, 2, 2, 2, 2]),
        ("linear", [0, 0.5, 1, 1.5, 2, 2]),
        ("cosine", [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2, 2]),
        ("cyclical", [0, 1, 2, 2, 0, 1]),
    ],
)
def test_schedules_of_the_kl(schedule, expected):
    annealing = KlAnnealing(2.0, schedule, 4)
    assert [annealing(step) for step in range(6)] == pytest.approx(expected)


def test_the_kl_is_scaled_by_the_number_of_training_examples():
    x, y = batch()
    step = make_step()
    result = step(x, y, len(x))
    assert result.nelbo - result.data_term == pytest.approx(result.kl / 50, rel=1e-12)
