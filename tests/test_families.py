"""Families, selection of weights, dropout masks, BatchNorm, chunks: in one process, in float64."""

import contextlib
import copy
import logging
import math

import pytest
import torch
from stepping import complete, keyed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, predict_classes
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import (
    DeepEnsemble,
    DeterministicNetwork,
    GaussianPrior,
    LowRankGaussian,
    MCDropout,
    MeanFieldGaussian,
    split_weights,
)
from hpc_bnn.posteriors.network import Network


def make_net(*layers):
    with Key(0, Stream.INIT).global_generator():
        return nn.Sequential(*(layers or (nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))).double()


def weights_of(posterior):
    parameters = dict(posterior.module.named_parameters())
    return torch.cat([parameters[name].detach().reshape(-1) for name in posterior.random])


def inputs(*shape):
    return torch.randn(*shape, generator=Key(1, Stream.DATA_ORDER).generator(), dtype=torch.float64)


# --- which weights are random --------------------------------------------------------------------------


def test_selection_by_kind_pattern_and_class():
    net = nn.ModuleDict({"embed": nn.Embedding(4, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 2)})
    random, point = split_weights(net, ("norm", "embedding"))
    assert list(random) == ["head.weight", "head.bias"]
    assert list(point) == ["embed.weight", "norm.weight", "norm.bias"]
    assert list(split_weights(net, ("*.bias",))[1]) == ["norm.bias", "head.bias"]
    assert list(split_weights(net, (nn.Linear,))[1]) == ["head.weight", "head.bias"]
    assert split_weights(net, ())[1] == {}
    net["head"].weight.requires_grad_(False)
    assert "head.weight" not in {**split_weights(net, ())[0], **split_weights(net, ())[1]}
    with pytest.raises(ConfigError, match=r"haed\.\*.*embed\.weight"):
        split_weights(net, ("haed.*",))


def test_tied_weight_is_deterministic_where_any_of_its_places_is():
    net = nn.ModuleDict({"out": nn.Linear(3, 4, bias=False), "embed": nn.Embedding(4, 3), "more": nn.Linear(1, 1)})
    net["embed"].weight = net["out"].weight
    random, point = split_weights(net, ("embedding",))
    assert list(point) == ["out.weight"] and list(random) == ["more.weight", "more.bias"]


def test_point_weights_train_beside_random_ones():
    net = make_net(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    posterior = MeanFieldGaussian(net)
    assert posterior.num_weights == 3 * 4 + 4 + 4 * 2 + 2 and posterior.points.shape == (8,)
    posterior.begin_()
    for sample in range(2):
        posterior.draw_(keyed(sample))
        net(inputs(5, 3)).square().sum().backward()
        posterior.fold_()
    complete(posterior)
    assert posterior.points.grad.abs().min() > 0
    with torch.no_grad():
        posterior.points += 1
    assert net[1].weight.eq(2).all()  # a view: no copy per step
    assert {"1.weight", "0.weight.loc"} <= set(posterior.state_dict())


def test_start_from_a_pretrained_network():
    net = make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    posterior = MeanFieldGaussian(net, prior=GaussianPrior(1.0, mean="initial"), init_std_relative=0.1)
    state = posterior.state_dict()
    for name, value in before.items():
        assert torch.equal(state[f"{name}.loc"], value)
        torch.testing.assert_close(state[f"{name}.log_scale"].exp(), 0.1 * value.abs(), rtol=1e-12, atol=1e-7)
    with torch.no_grad():  # KL of the mean alone is 0
        centred = posterior.kl() - MeanFieldGaussian(make_net(), init_std_relative=0.1).kl()
    squares = sum(value.square().sum() for value in before.values())
    assert centred.item() == pytest.approx(-0.5 * squares.item(), rel=1e-10)


# --- low rank ------------------------------------------------------------------------------------------


def make_low_rank(prior=GaussianPrior(0.8, mean=0.1)):
    posterior = LowRankGaussian(make_net(nn.Linear(3, 2)), rank=2, prior=prior, init_std=0.3)
    with torch.no_grad():
        posterior.directions.copy_(0.6 * inputs(2, 8))
        posterior.log_scale += 0.3 * inputs(8)
    return posterior


def covariance(log_scale, factor):
    scale = log_scale.exp()
    return scale[:, None] * (torch.eye(len(scale)).double() + factor.T @ factor) * scale


def test_low_rank_samples_have_its_covariance():
    posterior, n = make_low_rank(), 20_000
    posterior.begin_()
    draws = []
    for sample in range(n):
        posterior.draw_(keyed(sample))
        draws.append(weights_of(posterior))
    draws = torch.stack(draws) - posterior.loc.detach()
    expected = covariance(posterior.log_scale.detach(), posterior.factor.detach())
    diagonal = expected.diagonal()
    error = (draws.T @ draws / n - expected) * (n / (diagonal[:, None] * diagonal + expected**2)) ** 0.5
    assert error.abs().max() < 5  # standard errors of a covariance


# --- antithetic pairs ----------------------------------------------------------------------------------


def test_antithetic_pairs_mirror_each_other_in_any_order():
    posterior = MeanFieldGaussian(make_net(), init_std=0.3, antithetic=True)
    loc = posterior.loc.detach()
    drawn = {}
    posterior.begin_()
    for sample in (3, 0, 1, 2, 5, 4):
        posterior.begin_() if sample == 5 else None
        posterior.draw_(keyed(sample))
        drawn[sample] = weights_of(posterior) - loc
    for first in (0, 2, 4):
        torch.testing.assert_close(drawn[first], -drawn[first + 1], rtol=1e-12, atol=1e-15)
    assert not torch.equal(drawn[0], drawn[2])


# --- dropout -------------------------------------------------------------------------------------------


def drop(net, sample):
    """Return what makes a module meet the masks of a sample."""
    network = Network(net, dict(net.named_parameters()), [])
    network.dropout.begin_samples(keyed(sample))
    return network.running()


def test_masks_belong_to_the_sample_and_the_layer():
    net = make_net(nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout2d(0.5))
    x = torch.ones(6, 40, 3, 3, dtype=torch.float64)
    with drop(net, 0):
        first = net[0](x)
        assert torch.equal(first, first[:1].expand_as(first))  # all examples share it
        assert torch.equal(net[0](x[:2]), first[:2])  # however the batch is cut
        assert not torch.equal(net[1](x), first)
        channels = net[2](x)
        assert torch.equal(channels, channels[:, :, :1, :1].expand_as(channels))
    with drop(net, 1):
        assert not torch.equal(net[0](x), first)
    with drop(net, 0):
        assert torch.equal(net[0](x), first)
        assert set(first.unique().tolist()) == {0.0, 2.0}
        net.eval()
        assert torch.equal(net[0](x), x)


def test_calls_of_a_loop_share_a_mask_and_have_their_own_rates():
    class Rates(nn.Module):
        def forward(self, x):
            return torch.stack([F.dropout(x, p, self.training) for p in (0.2, 0.2, 0.6, 0.0, 1.0)])

    net = Rates()
    with drop(net, 0):
        low, again, high, none, nothing = net(torch.ones(3, 200, dtype=torch.float64))
        assert net(torch.ones(0, 200)).shape == (5, 0, 200) and net(torch.ones(3, 0)).shape == (5, 3, 0)
    assert torch.equal(low, again) and none.eq(1).all() and nothing.eq(0).all()
    assert low.unique().tolist() == [0, 1.25] and high.unique().tolist() == [0, 2.5]
    assert (low[high > 0] > 0).all() and (low[high == 0] > 0).any()  # of the same numbers


def test_dropout_keeps_the_mean():
    net, n = make_net(nn.Dropout(0.3)), 4000
    total = 0
    for sample in range(n):
        with drop(net, sample):
            total = total + net(torch.ones(1, 50, dtype=torch.float64))
    standard_error = (0.3 / 0.7 / n) ** 0.5
    assert ((total / n - 1) / standard_error).abs().max() < 5


def test_mc_dropout_samples_in_the_predictive_and_decays_weights():
    net = make_net(nn.Linear(3, 8), nn.Dropout(0.25), nn.Linear(8, 2))
    posterior = MCDropout(net, prior_std=0.5)
    x = inputs(4, 3)
    with posterior.evaluating():
        posterior.draw_(keyed(0))
        first = net(x)
        posterior.draw_(keyed(1))
        assert not torch.equal(net(x), first)
        posterior.draw_(keyed(0))
        assert torch.equal(net(x), first)
    squares = sum(p.square().sum().item() for p in net.parameters())
    assert posterior.kl().item() == pytest.approx(0.75 / (2 * 0.25) * squares, rel=1e-12)
    posterior.begin_()
    complete(posterior, 2.0)
    torch.testing.assert_close(posterior.points.grad, 2 * 0.75 / 0.25 * posterior.points.detach())


def test_dropout_that_cannot_be_keyed_is_said_or_refused(caplog):
    layers = {"a": nn.LSTM(3, 4, num_layers=2, dropout=0.5), "b": nn.MultiheadAttention(4, 2, 0.1)}
    network, logger = Network(nn.ModuleDict(layers), {}, []), logging.getLogger("rank")
    assert layers["a"].dropout == layers["b"].dropout == 0
    copy.deepcopy(network).say(logger, Grid(2, 1, 1))
    assert not caplog.text  # rank 0 says it
    network.say(logger, Grid(2)), network.say(logger, Grid(2))
    assert caplog.text.count("cannot be keyed") == 1 and "a (LSTM), b (MultiheadAttention)" in caplog.text
    with pytest.raises(ConfigError, match="AlphaDropout"):
        Network(nn.Sequential(nn.AlphaDropout(0.1)), {}, [])
    with pytest.raises(ConfigError, match="no dropout layer"):
        MCDropout(make_net())


# --- BatchNorm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 4), (7, 4, 5), (7, 4, 3, 3)])
def test_batch_norm_equals_torch_for_one_sample(shape):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    reference, mine = kind(4).double(), kind(4).double()
    posterior = DeterministicNetwork(nn.Sequential(mine))
    x, weight = inputs(*shape), inputs(*shape).flip(0)
    grads = []
    for layer in (reference, mine):
        leaf = x.clone().requires_grad_()
        if layer is mine:
            posterior.begin_()
            posterior.draw_(keyed(0))
        with posterior.network.running() if layer is mine else contextlib.nullcontext():
            y = layer(leaf)
            (y * weight).sum().backward()
        grads.append((y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    complete(posterior)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(mine, name), getattr(reference, name), rtol=1e-12, atol=1e-14)
    reference.eval(), mine.eval()
    torch.testing.assert_close(mine(x), reference(x), rtol=1e-12, atol=1e-14)


SINGLE = {
    "layer": (nn.BatchNorm1d(4), (4,)),
    "series of one": (nn.BatchNorm1d(4), (4, 1)),
    "pixel": (nn.BatchNorm2d(4), (4, 1, 1)),
    "field": (nn.BatchNorm2d(4), (4, 2, 3)),
    "volume": (nn.BatchNorm3d(4), (4, 1, 1, 2)),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_batch_of_one_value_per_channel_has_no_variance(kind):
    """As in torch, and with the remedy; where an example has several values it is a batch."""
    norm, shape = SINGLE[kind]
    numbers = math.prod(shape[1:])
    posterior = MeanFieldGaussian(nn.Sequential(copy.deepcopy(norm), nn.Flatten(), nn.Linear(4 * numbers, 2)).double())
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    step = VariationalStep(posterior, Categorical(2), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=9)
    x, y = torch.randn(5, *shape).double(), torch.arange(5) % 2
    step(x, y, 5)
    before = {name: value.clone() for name, value in posterior.state_dict().items()}
    if numbers > 1:
        step(x[:1], y[:1], 1)
        return
    with pytest.raises(ConfigError, match=r"model BatchNorm.d: the batch has one value per channel .*drop_last"):
        step(x[:1], y[:1], 1)
    assert all(torch.equal(value, before[name]) for name, value in posterior.state_dict().items())
    step(x[:2], y[:2], 2)
    predictive = predict_classes(posterior, Categorical(2), GridComm(Grid()), x[:1], num_samples=2)
    assert predictive.probabilities.isfinite().all()


def test_batch_norm_gradient_against_finite_differences():
    net = nn.Sequential(nn.BatchNorm1d(3)).double()
    network = DeterministicNetwork(net).network
    x = inputs(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: network(x).pow(3), (x,))


def test_running_statistics_take_one_step_towards_the_mean_over_samples():
    net = make_net(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    posterior, x = MeanFieldGaussian(net, init_std=0.5), inputs(9, 3)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.0)
    step = VariationalStep(posterior, Categorical(2), optimizer, GridComm(Grid()), num_samples=6, num_train_examples=9)
    step(x, torch.zeros(9, dtype=torch.long), 9)
    hidden = []
    posterior.begin_()
    for sample in range(6):
        posterior.draw_(keyed(sample))
        hidden.append(net[0](x).detach())
    hidden = torch.stack(hidden)  # [S, B, 4]
    torch.testing.assert_close(net[1].running_mean, 0.1 * hidden.mean((0, 1)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net[1].running_var, 0.9 + 0.1 * hidden.var(1).mean(0), rtol=1e-10, atol=1e-12)
    assert net[1].num_batches_tracked == 1


def test_batch_norm_that_is_used_twice_or_frozen():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()

        def forward(self, x):
            return self.frozen(self.norm(x) + self.norm(x + 4))

    net = Twice()
    net.frozen.eval()
    posterior = DeterministicNetwork(net)
    x = inputs(6, 3)
    posterior.begin_()
    for sample in range(2):
        posterior.draw_(keyed(sample))
        posterior.network(x)
    complete(posterior, batch_norm_share=0.5)
    torch.testing.assert_close(net.norm.running_mean, 0.1 * (x.mean(0) + 2), rtol=1e-10, atol=1e-12)
    assert net.frozen.running_mean.eq(0).all() and net.frozen.running_var.eq(1).all()
    with posterior.evaluating():
        assert not net.norm.training
    assert net.norm.training and not net.frozen.training
    with pytest.raises(ConfigError, match="track_running_stats"):
        DeterministicNetwork(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)))


# --- chunks --------------------------------------------------------------------------------------------


def gradient(net, chunk_size, caplog=None):
    posterior = MeanFieldGaussian(net, init_std=0.3)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    step = VariationalStep(
        posterior, Categorical(2), optimizer, GridComm(Grid()),
        num_samples=7, num_train_examples=20, chunk_size=chunk_size,
    )  # fmt: skip
    x, y = inputs(6, 3), torch.arange(6) % 2
    return [step(x, y, 6).nelbo for _ in range(2)], posterior.loc.detach()


@pytest.mark.parametrize("chunk_size", [2, 3, 7, 100, "auto"])
def test_every_chunk_size_gives_the_same_step(chunk_size):
    expected, loc = gradient(make_net(), 1)
    got, other = gradient(make_net(), chunk_size)
    assert got == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(other, loc, rtol=1e-12, atol=1e-14)


class Dropping(nn.Module):
    """Drops numbers and channels by layers, weights of attention, and by torch's function in place."""

    def __init__(self):
        super().__init__()
        self.embed, self.numbers, self.head = nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2)
        self.channels = nn.Dropout1d(0.3)

    def forward(self, x):
        x = self.channels(self.numbers(self.embed(x).tanh()).view(-1, 2, 4))
        x = F.scaled_dot_product_attention(x, x, x, dropout_p=0.2 * self.training)
        return self.head(F.dropout(x.flatten(1), 0.5, self.training, inplace=True))


@pytest.mark.parametrize("family", [MCDropout, MeanFieldGaussian, DeterministicNetwork])
def test_a_chunk_has_the_masks_of_its_samples(family, caplog):
    def run(chunk_size):
        with Key(0, Stream.INIT).global_generator():
            posterior = family(Dropping().double())
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(
            posterior, Categorical(2), optimizer, GridComm(Grid()),
            num_samples=7, num_train_examples=20, chunk_size=chunk_size, batching="vmap",
        )  # fmt: skip
        x, y = inputs(6, 3), torch.arange(6) % 2
        nelbos = [step(x, y, 6).nelbo for _ in range(2)]
        found = predict_classes(posterior, Categorical(2), GridComm(Grid()), x, num_samples=7, chunk_size=chunk_size)
        return torch.tensor(nelbos), *(p.detach() for p in posterior.parameters()), found.probabilities

    expected = run(1)
    for chunk_size in (2, 7):
        for got, wanted in zip(run(chunk_size), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    assert "one after another" not in caplog.text


def test_module_that_cannot_be_batched_falls_back_and_says_so_once(caplog):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, x):
            return self.net(x) if self.net[0].bias.sum() > 0 else -self.net(x)

    expected, loc = gradient(Branch(), 1)
    with caplog.at_level(logging.WARNING):
        got, other = gradient(Branch(), 3)
    assert got == expected and torch.equal(other, loc)
    assert caplog.text.count("cannot be batched") == 1


def test_memory_does_not_grow_with_the_number_of_samples():
    """Live tensors of a step, counted: the same for 2 and for 12 samples."""
    import gc

    def peak(num_samples):
        net, live = make_net(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)), []
        count = lambda *_: live.append(  # noqa: E731
            sum(t.numel() for t in gc.get_objects() if isinstance(t, torch.Tensor))
        )
        net[1].register_forward_hook(count)
        posterior = MeanFieldGaussian(net)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(
            posterior, Categorical(2), optimizer, GridComm(Grid()), num_samples=num_samples, num_train_examples=20
        )
        x = inputs(6, 3)
        gc.collect()
        step(x, torch.zeros(6, dtype=torch.long), 6)
        return max(live[-1:]) - live[0]

    assert peak(12) <= peak(2) + 10


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_modules_give_the_same_step(backend):
    expected, loc = gradient(make_net(), 1)
    got, other = gradient(torch.compile(make_net(), backend=backend), 1)
    assert got == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(other, loc, rtol=1e-10, atol=1e-12)


NET = nn.Linear(3, 2)


def seeding():
    torch.manual_seed(3)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("members", [range(3), range(1)])
@pytest.mark.parametrize(
    "make_module, are_equal", [(seeding, True), (lambda: NET, True), (lambda: nn.Linear(3, 2), False)]
)
def test_members_that_start_from_equal_weights_are_said(make_module, are_equal, members):
    ensemble = DeepEnsemble(make_module, 3, members)
    assert any("equal weights" in note for note in ensemble.network.notes) is are_equal


@pytest.mark.parametrize("members", [range(3), range(1)])
def test_an_ensemble_is_made_without_numbers(members):
    """As `hpc-bnn plan` makes it."""
    with FakeTensorMode():
        assert DeepEnsemble(lambda: nn.Linear(3, 2), 3, members).network.notes == []
