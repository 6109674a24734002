"""Mean-field posterior: gradients and KL against references, in float64."""

import pytest
import torch
from stepping import complete, keyed, noise_of
from torch import nn
from torch.distributions import Normal, kl_divergence

from hpc_bnn import Gaussian, Grid, GridComm, VariationalStep
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import FlatLayout, GaussianPrior, LowRankGaussian, MeanFieldGaussian


def make_net(dtype=torch.float64):
    with Key(0, Stream.INIT).global_generator():
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def make_posterior(**options):
    posterior = MeanFieldGaussian(make_net(), init_std=0.3, **options)
    with torch.no_grad():  # scales that differ
        noise = torch.randn(posterior.num_weights, generator=Key(9, Stream.INIT).generator(), dtype=torch.float64)
        posterior.log_scale += 0.5 * noise
    return posterior


def reference_loss(posterior, eps, x):
    """The same loss by autograd through functional_call: w = loc + exp(log_scale) * eps."""
    net = make_net()
    loc, log_scale = (p.detach().clone().requires_grad_() for p in posterior.parameters())
    weights = posterior.random.views(loc + log_scale.exp() * eps)
    return torch.func.functional_call(net, weights, (x,)).square().sum(), loc, log_scale


def test_gradient_of_samples_equals_autograd_through_the_sampling():
    posterior = make_posterior()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    posterior.begin_()
    expected = [torch.zeros_like(p) for p in posterior.parameters()]
    for sample in range(3):
        posterior.draw_(keyed(sample))
        posterior.network(x).square().sum().backward()
        posterior.fold_()
        eps = noise_of(posterior, keyed(sample))
        loss, *leaves = reference_loss(posterior, eps, x)
        for total, gradient in zip(expected, torch.autograd.grad(loss, leaves)):
            total += gradient
    complete(posterior)
    for parameter, gradient in zip(posterior.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-13)


def test_gradient_against_finite_differences():
    posterior = make_posterior()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)

    def loss():
        posterior.begin_()
        posterior.draw_(keyed(0))
        return posterior.network(x).square().sum()

    loss().backward()
    posterior.fold_()
    complete(posterior)
    gradients = [parameter.grad.clone() for parameter in posterior.parameters()]
    for parameter, gradient in zip(posterior.parameters(), gradients):
        for i in (0, 7, posterior.num_weights - 1):
            with torch.no_grad():
                value = parameter[i].item()
                parameter[i] = value + 1e-6
                up = loss().item()
                parameter[i] = value - 1e-6
                down = loss().item()
                parameter[i] = value
            assert gradient[i].item() == pytest.approx((up - down) / 2e-6, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("prior", [GaussianPrior(), GaussianPrior(0.1), GaussianPrior(2.0, mean=-0.7)])
def test_kl_and_its_gradient_equal_torch_distributions(prior):
    posterior = make_posterior(prior=prior)
    loc, log_scale = (p.detach().clone().requires_grad_() for p in posterior.parameters())
    mean = torch.tensor(prior.mean, dtype=torch.float64)
    reference = kl_divergence(Normal(loc, log_scale.exp()), Normal(mean, prior.std)).sum()
    torch.testing.assert_close(posterior.kl(), reference.detach(), rtol=1e-12, atol=0)
    posterior.begin_()
    torch.testing.assert_close(complete(posterior, 0.25), reference.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(posterior.parameters(), torch.autograd.grad(0.25 * reference, [loc, log_scale])):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-13)


def test_kl_is_zero_where_the_posterior_is_the_prior():
    posterior = MeanFieldGaussian(make_net(), prior=GaussianPrior(0.5), init_std=0.5)
    with torch.no_grad():
        posterior.loc.zero_()
    assert abs(posterior.kl().item()) < 1e-12


def test_samples_have_the_moments_of_the_posterior():
    posterior = make_posterior()
    n = 4000
    draws = []
    posterior.begin_()
    for sample in range(n):
        posterior.draw_(keyed(sample))
        draws.append(torch.cat([p.detach().reshape(-1) for p in posterior.module.parameters()]))
    draws = torch.stack(draws)
    views = posterior.random.views
    names = [name for name, _ in posterior.module.named_parameters()]
    loc = torch.cat([views(posterior.loc.detach())[n].reshape(-1) for n in names])
    scale = torch.cat([views(posterior.log_scale.detach().exp())[n].reshape(-1) for n in names])
    assert ((draws.mean(0) - loc) / (scale * n**-0.5)).abs().max() < 5  # standard errors
    assert ((draws.std(0) / scale - 1) * (2 * n) ** 0.5).abs().max() < 5


def test_module_keeps_its_parameter_objects_and_tied_weights_stay_tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    before = dict(net.named_parameters(remove_duplicate=False))
    posterior = MeanFieldGaussian(net)
    assert all(after is before[name] for name, after in net.named_parameters(remove_duplicate=False))
    posterior.begin_()
    posterior.draw_(keyed(0))
    assert net[1].weight.data_ptr() == net[0].weight.data_ptr()
    assert posterior.num_weights == 16 + 4 + 4


def test_unused_and_frozen_weights():
    net = make_net()
    net.spare = nn.Linear(2, 2, dtype=torch.float64)
    net[0].bias.requires_grad_(False)
    forward = net.__class__.forward
    net.forward = lambda x: forward(nn.Sequential(net[0], net[1], net[2]), x)
    posterior = MeanFieldGaussian(net)
    frozen = net[0].bias.clone()
    posterior.begin_()
    posterior.draw_(keyed(0))
    net.forward(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    posterior.fold_()
    complete(posterior)
    gradients = posterior.random.views(posterior.loc.grad)
    assert "0.bias" not in gradients and torch.equal(net[0].bias, frozen)
    assert gradients["spare.weight"].abs().max() == 0 and gradients["0.weight"].abs().max() > 0


@pytest.mark.parametrize("rule", ["norm", "0.*", nn.LayerNorm])
@pytest.mark.parametrize("kind", [MeanFieldGaussian, LowRankGaussian])
def test_a_lone_rule_is_one_rule(kind, rule):
    net = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    assert list(kind(net, deterministic=rule).random) == ["1.weight", "1.bias"]


@pytest.mark.parametrize("kind", [MeanFieldGaussian, LowRankGaussian])
def test_a_weight_without_dims_is_batched(kind):
    """A gate or a temperature: in a batch of samples it is [c]."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.layer = nn.Parameter(torch.tensor(0.5)), nn.Linear(3, 2)

        def forward(self, x):
            return self.gate * self.layer(x)

    gradients = []
    for chunk_size in (1, 2):
        torch.manual_seed(0)
        posterior = kind(Gated().double())
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(
            posterior, Gaussian(2, 1.0), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=4,
            chunk_size=chunk_size,
        )  # fmt: skip
        step(torch.ones(4, 3).double(), torch.ones(4, 2).double(), 4)
        gradients.append(posterior.buffer.gradient.clone())
        assert step.loop.why_not is None
    assert torch.allclose(*gradients, rtol=1e-12)


def test_state_goes_round_and_misfits_are_named():
    source, target = make_posterior(), MeanFieldGaussian(make_net())
    target.load_state_dict({name: value.clone() for name, value in source.state_dict().items()})
    assert torch.equal(source.loc, target.loc) and torch.equal(source.log_scale, target.log_scale)
    assert {"0.weight.loc", "0.weight.log_scale", "2.bias.loc"} <= set(source.state_dict())
    state = source.state_dict()
    state["0.weight.loc"] = torch.zeros(1, 3)
    state["other"] = state.pop("2.bias.loc")
    with pytest.raises(ConfigError) as caught:
        target.load_state_dict(state)
    assert all(name in str(caught.value) for name in ("0.weight.loc", "2.bias.loc", "other"))


def test_buffers_that_are_not_persistent_are_no_part_of_the_state():
    def make(length):
        net = make_net()
        net.register_buffer("kept", torch.ones(2))
        if length:
            net[0].register_buffer("table", torch.full((length,), float(length)), persistent=False)
        return MeanFieldGaussian(net)

    state = make(3).state_dict()
    assert "kept" in state and "0.table" not in state
    for length in (0, 3, 5):
        make(length).load_state_dict(state)
    older = state | {"0.table": torch.zeros(3)}
    (target := make(5)).load_state_dict(older)
    assert target.module[0].table.tolist() == [5.0] * 5


def test_layout_starts_on_vector_boundaries():
    layout = FlatLayout({"bias": torch.Size([3]), "weight": torch.Size([4, 8]), "more": torch.Size([16])})
    assert list(layout) == ["weight", "more", "bias"]
    views = layout.views(torch.arange(51))
    assert views["bias"].tolist() == [48, 49, 50] and views["weight"].shape == (4, 8)


def test_mean_weights():
    posterior = make_posterior()
    posterior.begin_()
    posterior.draw_(keyed(0))
    net = posterior.use_mean_()
    assert torch.equal(net[0].weight, posterior.random.views(posterior.loc.detach())["0.weight"])


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_scales_are_refused(std):
    with pytest.raises(ConfigError, match=f"^std {std}: must be positive"):
        GaussianPrior(std)
    with pytest.raises(ConfigError, match=f"^init_std {std}: must be positive"):
        MeanFieldGaussian(make_net(), init_std=std)


def test_module_without_trainable_weights_is_refused():
    with pytest.raises(ConfigError, match="no trainable weight"):
        MeanFieldGaussian(nn.ReLU())
