"""Local reparameterisation and Flipout: unbiased, with less variance, loud where they do not apply."""

import functools
import logging

import pytest
import torch
from stepping import complete
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hpc_bnn import Gaussian, Grid, GridComm, VariationalStep
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import LowRankGaussian, MeanFieldGaussian, StudentTPrior
from hpc_bnn.posteriors.estimators import ExampleNoise

NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (8, 3)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (4, 5, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3)), (4, 1, 5, 5)),
}


def make(name, estimator, **options):
    with Key(0, Stream.INIT).global_generator():
        net = NETS[name][0]().double()
    return MeanFieldGaussian(net, init_std=0.4, estimator=estimator, **options)


def inputs(name):
    shape = NETS[name][1]
    return torch.randn(*shape, generator=Key(1, Stream.DATA_ORDER).generator(), dtype=torch.float64)


@functools.cache
def gradients(name, estimator, num_draws):
    """Return the gradient [num_draws, 2 P] of a nonlinear loss, one weight sample each."""
    posterior, x = make(name, estimator), inputs(name)
    posterior.sampler.prepare_(x)
    rows = []
    for step in range(num_draws):
        posterior.begin_()
        posterior.draw_(Key(0, Stream.NOISE, step=step))
        y = posterior.network(x)
        (y.square().mean() + y.sin().mean()).backward()
        posterior.fold_()
        complete(posterior)
        rows.append(posterior.buffer.gradient.clone())
    return torch.stack(rows)


def gradients_by_definition(name, num_draws):
    """Return the same of the reparameterisation: of w = mu + sigma eps, all draws at once, by torch alone."""
    posterior, x = make(name, "reparameterisation"), inputs(name)
    shape, generator = (num_draws, posterior.random.num_elements), Key(1, Stream.NOISE).generator()
    eps = torch.randn(shape, generator=generator, dtype=torch.float64)

    def loss(weights):
        y = functional_call(posterior.module, posterior.random.views(weights), x)
        return y.square().mean() + y.sin().mean()

    gradient = vmap(grad(loss))(posterior.loc.detach() + 0.4 * eps)
    return torch.cat([gradient, gradient * 0.4 * eps], dim=1)  # of mu, of log sigma


@pytest.mark.parametrize(
    "name, estimator", [("mlp", "local"), ("mlp", "flipout"), ("tokens", "flipout"), ("conv", "flipout")]
)
def test_unbiased_and_of_less_variance(name, estimator):
    n = 3000
    reference, mine = gradients_by_definition(name, n), gradients(name, estimator, n)
    error = (reference.var(0) / n + mine.var(0) / n).sqrt()
    z = (mine.mean(0) - reference.mean(0)) / error
    assert z.abs().max() < 5  # standard errors
    assert z.square().mean() < 1 + 5 * (2 / len(z)) ** 0.5 * 2  # all together: 2 for correlated components
    assert mine.var(0).sum() < 0.8 * reference.var(0).sum()


def test_local_draws_have_the_moments_of_the_weights():
    """Outputs of one linear layer: mean x mu, variance x^2 sigma^2, independent between examples."""
    with Key(0, Stream.INIT).global_generator():
        layer = nn.Linear(3, 2).double()
    posterior = MeanFieldGaussian(nn.Sequential(layer), init_std=0.4, estimator="local")
    x, n = inputs("mlp"), 4000
    posterior.sampler.prepare_(x)
    draws = []
    posterior.begin_()
    for sample in range(n):
        posterior.draw_(Key(0, Stream.NOISE, sample=sample))
        draws.append(posterior.network(x).detach())
    draws = torch.stack(draws)  # [n, B, 2]
    mean = nn.functional.linear(x, *(posterior.random.views(posterior.loc.detach())[k] for k in ("0.weight", "0.bias")))
    std = 0.4 * (x.square().sum(1, keepdim=True) + 1).sqrt()
    assert ((draws.mean(0) - mean) / (std * n**-0.5)).abs().max() < 5
    assert ((draws.std(0) / std - 1) * (2 * n) ** 0.5).abs().max() < 5
    standard = ((draws - mean) / std).flatten(1)
    correlation = standard.T @ standard / n - torch.eye(16).double()
    assert correlation.abs().max() < 6 * (2 / n) ** 0.5


def test_what_does_not_apply_is_said_and_drawn_once_per_sample(caplog):
    for name, estimator in (("tokens", "local"), ("conv", "local")):
        posterior = make(name, estimator)
        posterior.sampler.prepare_(inputs(name))
        posterior.network.say(logging.getLogger("rank"), Grid())
        assert "drawn once per sample" in caplog.text and "0.weight" in caplog.text
        caplog.clear()
        reference = gradients(name, "reparameterisation", 3)
        assert torch.equal(gradients(name, estimator, 3), reference)  # nothing left to estimate otherwise


def test_a_layer_used_twice_is_left_out(caplog):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    twice = nn.Sequential(net[0], net[1], net[0])
    posterior = MeanFieldGaussian(twice, estimator="flipout")
    posterior.sampler.prepare_(inputs("mlp"))
    posterior.network.say(logging.getLogger("rank"), Grid())
    assert "drawn once per sample" in caplog.text


def test_predictive_draws_weights():
    local, plain = make("mlp", "local"), make("mlp", "reparameterisation")
    x = inputs("mlp")
    local.sampler.prepare_(x)
    outputs = []
    for posterior in (local, plain):
        with posterior.evaluating():
            posterior.draw_(Key(0, Stream.PREDICTION, sample=3))
            outputs.append(posterior.network(x))
    assert torch.equal(*outputs)
    assert "forward" not in local.module[0].__dict__
    local.begin_()
    assert "forward" in local.module[0].__dict__  # a step goes on with its estimator
    complete(local)
    assert "forward" not in local.module[0].__dict__  # and who copies the module gets its own layers


def test_noise_of_an_example_depends_on_its_place_alone():
    noise = ExampleNoise()
    noise.begin_sample(Key(0, Stream.NOISE))
    whole = noise.draw(1, torch.empty(96, 1), 5)
    for start, stop in ((0, 7), (5, 35), (32, 64), (70, 96), (9, 9)):
        noise.first_example = start
        assert torch.equal(noise.draw(1, torch.empty(stop - start, 1), 5), whole[start:stop])
    assert whole.unique().numel() >= whole.numel() - 3  # float32 numbers may coincide
    signs = noise.draw(2, torch.empty(32, 1), 50, signs=True)
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(signs.mean()) < 5 * 1600**-0.5


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="mirrored pairs"):
        make("mlp", "flipout", antithetic=True)
    with pytest.raises(ConfigError, match="mean-field family only"):
        LowRankGaussian(NETS["mlp"][0](), estimator="flipout")
    with pytest.raises(ConfigError, match="Monte Carlo KL"):
        make("mlp", "local", prior=StudentTPrior())


def test_tokens_folded_into_the_batch_are_seen(caplog):
    """[B * T, in] has two dims as [B, in] has, but its rows are not the examples."""

    class Fold(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x):
            return self.layer(x.reshape(-1, 3))

    posterior = MeanFieldGaussian(Fold(), estimator="local")
    posterior.sampler.prepare_(inputs("tokens"))
    posterior.network.say(logging.getLogger("rank"), Grid())
    assert "drawn once per sample" in caplog.text and not posterior.sampler.noisy.layers


def test_mean_network_has_no_noise():
    posterior, x = make("mlp", "local"), inputs("mlp")
    posterior.sampler.prepare_(x)
    net = posterior.use_mean_()
    assert torch.equal(net(x), net(x))
    posterior.begin_()
    assert "forward" in net[0].__dict__  # the next step has its estimator again


NORMS = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "weight_norm of old": nn.utils.weight_norm,
    "weight_norm of the bias": lambda layer: nn.utils.weight_norm(layer, "bias"),
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm of old": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("norm", NORMS)
def test_layers_with_computed_weights_are_left_out_and_that_is_said(norm, estimator, caplog):
    """All others have the estimator; where nothing is random, the outputs are those of drawn weights."""
    outputs = []
    for name in ("reparameterisation", estimator):
        torch.manual_seed(0)
        net = nn.Sequential(NORMS[norm](nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
        posterior = MeanFieldGaussian(net, init_std=1e-9, estimator=name)
        posterior.sampler.prepare_(inputs("mlp"))
        posterior.begin_()
        posterior.draw_(Key(0, Stream.NOISE))
        outputs.append(posterior.network(inputs("mlp")).detach())
    assert (outputs[0] - outputs[1]).abs().max() < 1e-6
    posterior.network.say(logging.getLogger("rank"), Grid())
    assert "drawn once per sample" in caplog.text and set(posterior.sampler.noisy.layers) == {posterior.module[2]}


class Called(nn.Module):
    """Calls its layers by the names of their arguments, or by their places."""

    def __init__(self, by_name):
        super().__init__()
        self.by_name = by_name
        self.first, self.drop, self.last = nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        for layer in (self.first, self.drop, self.last):
            x = layer(input=x) if self.by_name else layer(x)
        return x


@pytest.mark.parametrize("estimator", ["reparameterisation", "local", "flipout"])
def test_layers_that_are_called_by_name(estimator):
    outputs = []
    for by_name in (False, True):
        torch.manual_seed(0)
        posterior = MeanFieldGaussian(Called(by_name).double(), init_std=0.4, estimator=estimator)
        posterior.sampler.prepare_(inputs("mlp"))
        posterior.begin_()
        posterior.draw_(Key(0, Stream.NOISE))
        outputs.append(posterior.network(inputs("mlp")))
        outputs[-1].square().sum().backward()
        posterior.fold_()
        complete(posterior)
        outputs.append(posterior.buffer.gradient.clone())
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert (outputs[0] != 0).any() and outputs[1].norm() > 0


class Used(nn.Module):
    """Uses its layer in a way of which only its first call is the estimator's."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.last = way, nn.Linear(3, 4), nn.Linear(4, 2)
        if way == "tied convolution":
            self.first = nn.Conv1d(1, 4, 2)
        elif way == "complex":
            self.first = nn.Linear(3, 4, dtype=torch.complex128)

    def forward(self, x):
        if self.way == "sequence first":  # of as many tokens as examples
            return self.last(self.first(x.expand(len(x), *x.shape)).tanh().mean(0))
        if self.way == "tied convolution":
            h = F.conv_transpose1d(self.first(x[:, None]), self.first.weight).mean(1)
            return self.last(torch.cat([h, h[:, :1]], 1))
        y = self.first(x.to(self.first.weight.dtype)).abs()
        if self.way == "tied":
            y = y + F.linear(y @ self.first.weight, self.first.weight)
        if self.way == "twice in training" and self.training:
            y = y + self.first(-x)
        return self.last(y)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("way", ["tied", "tied convolution", "twice in training", "sequence first", "complex"])
def test_a_layer_is_left_out_where_its_noise_would_not_be_that_of_the_weights(way, estimator):
    posterior = MeanFieldGaussian(Used(way).double(), estimator=estimator)
    before = posterior.loc.detach().clone()
    posterior.sampler.prepare_(inputs("mlp"))
    assert posterior.sampler.noisy.layers == [posterior.module.last] and torch.equal(posterior.loc, before)
    assert "first.weight, first.bias" in posterior.network.notes[0] and "last" not in posterior.network.notes[0]


def test_a_network_that_differentiates_in_its_forward_pass_has_noise_per_example():
    class Slope(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.net(x).sum(), x, create_graph=torch.is_grad_enabled())[0]

    posterior = MeanFieldGaussian(Slope().double(), estimator="local")
    posterior.sampler.prepare_(inputs("mlp"))
    assert len(posterior.sampler.noisy.layers) == 2


def set_forward(net):
    net[0].forward = lambda input: input.sum(1, keepdim=True).expand(-1, 3)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
@pytest.mark.parametrize("edit", [set_forward, lambda net: net.append(net[0]), lambda net: net.eval()])
def test_the_layers_are_looked_for_anew_after_an_edit_and_in_another_mode(edit, estimator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Twice(nn.Linear(3, 3))).double()
    posterior = MeanFieldGaussian(net, estimator=estimator)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.0)
    step = VariationalStep(
        posterior, Gaussian(3, 1.0), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=8
    )
    x, noisy = inputs("mlp"), posterior.sampler.noisy
    step(x, x, 8)
    assert noisy.layers == [net[0], net[2].layer]
    edit(net)
    forwards = [layer.__dict__.get("forward") for layer in net]
    step(x, x, 8)
    assert noisy.layers == [net[0] if not net.training else net[2].layer]
    assert [layer.__dict__.get("forward") for layer in net] == forwards


class Twice(nn.Module):
    """Calls its layer a second time in evaluation mode."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if self.training else self.layer(self.layer(x))
