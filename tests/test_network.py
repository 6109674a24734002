"""Modules that are not made of torch's own layers, that change themselves, and that users change: right, or a clear error."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm, dropout
from torch.utils.checkpoint import checkpoint

import hpc_bnn
from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, posteriors, predict_classes
from hpc_bnn.config import OptimizerConfig
from hpc_bnn.errors import ConfigError
from hpc_bnn.posteriors import batch_norm as batch_norms
from hpc_bnn.training.optim import optimizer_maker

COMM, CLASSES = GridComm(Grid()), Categorical(3)
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(8) % 3


def make(net, family=posteriors.MeanFieldGaussian, num_samples=4, chunk_size=1, lr=0.0, **options):
    posterior = family(net, **options)
    return VariationalStep(
        posterior, CLASSES, torch.optim.SGD(posterior.parameters(), lr=lr), COMM,
        num_samples=num_samples, num_train_examples=10**9, chunk_size=chunk_size,
    )  # fmt: skip


def seeded(make_net):
    torch.manual_seed(0)
    return make_net().double()


def mlp(*between, width=8):
    return seeded(lambda: nn.Sequential(nn.Linear(6, width), *between, nn.Linear(width, 3)))


def members(step, num_samples=5, x=X):
    options = {"num_samples": num_samples, "keep_members": True}
    return predict_classes(step.posterior, CLASSES, COMM, x, **options).members


def loss_of_plain(net):
    return F.cross_entropy(copy.deepcopy(net)(X.clone()), Y).item()


# --- layers of other classes ---------------------------------------------------------------------------


class NormAct(nn.BatchNorm1d):
    """As timm's: the activation is in the layer."""

    def forward(self, x):
        return F.relu(super().forward(x))


class CopiedNorm(nn.BatchNorm1d):
    """As timm's BatchNormAct2d: a forward of its own around the function."""

    def forward(self, x):
        return F.silu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


class ForeignNorm(nn.Module):
    """No subclass, and the function under a name of its own."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x):
        return batch_norm(x, self.running_mean, self.running_var, None, None, self.training, 0.2).tanh()


class Keyword(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


NORMS = {
    "activation": lambda: NormAct(8),
    "own_forward": lambda: CopiedNorm(8),
    "foreign": lambda: ForeignNorm(8),
    "keyword": lambda: Keyword(nn.BatchNorm1d(8)),
    "without_bias": lambda: _without_bias(nn.BatchNorm1d(8)),
    "sync": lambda: nn.SyncBatchNorm(8),
}


def _without_bias(layer):
    layer.register_parameter("bias", None)
    return layer


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_keeps_what_it_adds_and_its_statistics_are_those_of_torch(name):
    net = mlp(NORMS[name]())
    plain = copy.deepcopy(net)
    expected = F.cross_entropy(plain(X), Y).item()  # moves its statistics
    step = make(net, num_samples=2, init_std=1e-9)
    assert step(X, Y, 8).data_term == pytest.approx(expected, abs=1e-7)
    for key, value in plain.state_dict().items():
        if "running" in key or "tracked" in key:
            torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(
            members(step)[:, 0], plain.eval()(X).softmax(-1), rtol=1e-6, atol=1e-7, check_stride=False
        )


class OwnStatistics(nn.BatchNorm1d):
    def forward(self, x):
        self.running_mean.lerp_(x.detach().mean(0), 0.1)
        return (x - x.mean(0)) / x.std(0)


class OwnNoise(nn.Dropout):
    def forward(self, x):
        return x * torch.empty_like(x).bernoulli_(1 - self.p) if self.training else x


class OwnSync(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) + 1


class BatchOnly(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: OwnStatistics(8), r"1 \(OwnStatistics\): its statistics .* torch.nn.functional.batch_norm. Call that"),
        (lambda: OwnNoise(0.5), r"1 \(OwnNoise\): its masks come from torch's global generator"),
        (lambda: OwnSync(8), r"1 \(OwnSync\): it sums over all ranks by itself"),
        (BatchOnly, "BatchOnly: it has no running statistics: a prediction would depend"),
    ],
)
def test_what_cannot_be_intercepted_is_an_error_that_names_the_layer(layer, message):
    with pytest.raises(ConfigError, match=message):
        make(mlp(layer()))(X, Y, 8)


class Standardised(nn.Linear):
    """Standardises its weight by batch_norm, as timm's StdConv2d."""

    def forward(self, x):
        weight = F.batch_norm(self.weight[None], None, None, training=True, momentum=0.0)
        return F.linear(x, weight[0], self.bias)


class Adaptive(nn.Module):
    """Each example by itself, with the batch folded into the channels, as in style transfer."""

    def forward(self, x):
        y = F.batch_norm(x.view(1, -1, 4), x.new_zeros(len(x) * 2), x.new_ones(len(x) * 2), None, None, True)
        return y.view(x.shape)


@pytest.mark.parametrize("layer", [lambda: Standardised(8, 8), Adaptive])
@pytest.mark.parametrize("num_examples", [8, 1])
def test_batch_norm_of_something_else_than_the_batch_is_left_alone(layer, num_examples):
    net = mlp(layer())
    with torch.no_grad():
        expected = net(X[:num_examples])
    step = make(net, init_std=1e-9)
    data_term = step(X[:num_examples], Y[:num_examples], num_examples).data_term
    assert data_term == pytest.approx(F.cross_entropy(expected, Y[:num_examples]).item(), abs=1e-6)
    drawn = members(step, x=X[:num_examples])[:, 0]
    torch.testing.assert_close(drawn, expected.softmax(-1), rtol=1e-6, atol=1e-7)


def test_scripted_modules_train_or_are_refused():
    scripted = [torch.jit.script(mlp(layer)) for layer in (nn.Tanh(), nn.BatchNorm1d(8).eval(), nn.BatchNorm1d(8))]
    for net in scripted[:2]:
        step = make(net, lr=0.1)
        assert step(X, Y, 8) != step(X, Y, 8) and members(step).std(1).max() > 0
    with pytest.raises(ConfigError, match=r"1 \(RecursiveScriptModule\): its statistics of the batch"):
        make(scripted[2])(X, Y, 8)


def test_a_layer_that_normalises_by_the_batch_in_a_predictive_is_refused():
    class Always(nn.BatchNorm1d):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)

    step = make(mlp(Always(8)))
    step(X, Y, 8)
    with pytest.raises(ConfigError, match="Always: it normalises by the batch in evaluation mode"):
        members(step)


class Domains(nn.Module):
    """Runs one of its two norms: by `which`, or by a weight of the sample."""

    def __init__(self, which=0):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(NormAct(8) for _ in range(2))
        self.which = which

    def forward(self, x):
        which = int(self.first.bias[0] > 0) if self.which is None else self.which
        return self.last(self.norms[which](self.first(x)))


def test_a_norm_that_did_not_run_is_not_updated():
    net = seeded(Domains)
    step = make(net)
    for _ in range(5):
        step(X, Y, 8)
    used, unused = net.norms
    assert used.num_batches_tracked == 5 and not used.running_mean.eq(0).all()
    assert unused.num_batches_tracked == 0
    assert unused.running_mean.eq(0).all() and unused.running_var.eq(1).all()


def test_a_norm_that_ran_for_some_samples_goes_to_their_mean():
    net = seeded(lambda: Domains(None))
    step = make(net, num_samples=6, init_std=1.0)
    hidden = {0: [], 1: []}
    hook = net.first.register_forward_hook(lambda layer, _, out: hidden[int(layer.bias[0] > 0)].append(out.detach()))
    step(X, Y, 8)  # with a look
    hidden[0].clear(), hidden[1].clear()
    before = [norm.running_mean.clone() for norm in net.norms]
    step(X, Y, 8)
    hook.remove()
    assert 0 < len(hidden[0]) < 6
    for which, norm in enumerate(net.norms):
        expected = before[which].lerp(torch.stack(hidden[which]).mean((0, 1)), 0.1)
        torch.testing.assert_close(norm.running_mean, expected, rtol=1e-10, atol=1e-12)


# --- dropout -------------------------------------------------------------------------------------------


class Doubled(nn.Dropout):
    def forward(self, x):
        return 2 * super().forward(x)


class Functional(nn.Module):
    def forward(self, x):
        first = F.dropout(x, 0.5, self.training)
        second = F.dropout(x, 0.5, self.training)
        return torch.cat([first, second], 1)


class ByName(nn.Module):
    def forward(self, x):
        first = dropout(x, 0.5, self.training)
        second = torch.dropout(x, 0.5, self.training)
        return torch.cat([first, second], 1)


@pytest.mark.parametrize("layer", [Functional, ByName])
def test_functional_dropout_is_keyed_by_sample_and_call(layer, caplog):
    net = mlp(layer(), nn.Linear(16, 8))
    step = make(net)
    seen = []
    net[1].register_forward_hook(lambda *args: seen.append(args[2].detach().eq(0)))
    step(X, Y, 8)
    masks = seen[-4:]
    assert all(torch.equal(mask, mask[:1].expand_as(mask)) for mask in masks)  # shared by the examples
    assert len({tuple(mask[0].tolist()) for mask in masks}) == 4
    assert not any(torch.equal(mask[0, :8], mask[0, 8:]) for mask in masks)  # two calls, two masks
    assert 0.3 < torch.stack(masks).double().mean() < 0.7
    first = make(mlp(layer(), nn.Linear(16, 8)))(X, Y, 8)
    assert make(mlp(layer(), nn.Linear(16, 8)))(X, Y, 8) == first
    assert "generator" not in caplog.text


def test_a_dropout_subclass_keeps_what_it_adds():
    net = mlp(Doubled(0.0))
    assert make(net, init_std=1e-9)(X, Y, 8).data_term == pytest.approx(loss_of_plain(net), abs=1e-7)


class Always(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, True)


def test_dropout_that_a_user_wrote_to_stay_on_in_evaluation_stays_on():
    step = make(mlp(Always(0.5)), init_std=1e-9)
    assert members(step).std(1).max() > 0.01
    assert torch.equal(members(step), members(step))


class Checkpointed(nn.Module):
    def __init__(self, checkpoints, functions):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), NormAct(8), functions(), nn.Dropout(0.3))
        self.head, self.checkpoints = nn.Linear(16, 3), checkpoints

    def forward(self, x):
        y = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
        return self.head(y)


@pytest.mark.parametrize("functions", [Functional, ByName])
def test_a_checkpointed_block_meets_the_same_masks_and_statistics(functions):
    steps = [make(seeded(lambda c=c: Checkpointed(c, functions)), lr=0.1) for c in (False, True)]
    results = [[step(X, Y, 8) for _ in range(3)] for step in steps]
    assert results[0] == results[1]
    for a, b in zip(*(step.posterior.state_dict().values() for step in steps)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class Attention(nn.Module):
    """As timm's and Hugging Face's: the rate of a dropout layer goes to the kernel."""

    def __init__(self, p, **options):
        super().__init__()
        self.qkv, self.head, self.drop = nn.Linear(3, 3 * 8), nn.Linear(8, 3), nn.Dropout(p)
        self.options = options

    def forward(self, x):
        x = torch.stack([x[:, :3], x[:, 3:], x[:, :3] + 1], 1)  # [B, 3, 3]
        q, k, v = self.qkv(x).view(len(x), 3, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mask = self.options.get("attn_mask")
        mask = torch.zeros(3, 3).to(q).tril() if mask is True else mask
        options = self.options | {"attn_mask": mask, "dropout_p": self.drop.p if self.training else 0.0}
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": True, "scale": 0.3}])
def test_dropout_within_attention_is_keyed(options, caplog):
    plain, tiny = (make(seeded(lambda p=p: Attention(p, **options)), init_std=1e-9) for p in (0.0, 1e-12))
    assert tiny(X, Y, 8).data_term == pytest.approx(plain(X, Y, 8).data_term, rel=1e-7)
    a, b = (make(seeded(lambda: Attention(0.5, **options)))(X, Y, 8) for _ in range(2))
    assert a == b != plain(X, Y, 8) and "generator" not in caplog.text
    torch.testing.assert_close(a.data_term, _mean_of_halves(lambda: make(seeded(lambda: Attention(0.5, **options)))))


def _mean_of_halves(make_step):
    """Data term of the batch from those of its halves: the same masks for both."""
    return (make_step()(X[:4], Y[:4], 4).data_term + make_step()(X[4:], Y[4:], 4).data_term) / 2


class OnlyInTraining(nn.Module):
    """Its dropout is asked for in training only, and, where it is so, another one in both modes."""

    def __init__(self, way, more):
        super().__init__()
        self.way, self.drop, self.last = way, nn.Dropout(0.5), nn.Linear(6, 3)
        self.more = nn.Dropout(0.5) if more else nn.Identity()

    def forward(self, x):
        if self.way == "attention":
            x = x[:, None, None]
            x = F.scaled_dot_product_attention(x, x, x, dropout_p=self.drop.p if self.training else 0.0)[:, 0, 0]
        elif self.training:
            x = self.drop(x) if self.way == "layer" else F.dropout(x)
        return self.last(self.more(x))


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("way", ["attention", "layer", "function"])
def test_dropout_that_is_asked_for_in_training_only_is_missed_in_a_predictive(way, more, caplog):
    step = make(seeded(lambda: OnlyInTraining(way, more)), posteriors.MCDropout)
    step(X, Y, 8)
    if not more:
        with pytest.raises(ConfigError, match="all samples of the predictive would be equal"):
            members(step)
    else:
        assert members(step).std(1).max() > 0 and "not in evaluation mode" in caplog.text
        assert (": drop" if way == "layer" else "OnlyInTraining") in ": " + caplog.messages[-1]
    caplog.clear()
    step = make(seeded(lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 3))), posteriors.MCDropout)
    step(X, Y, 8), members(step)
    assert not caplog.text


@pytest.mark.parametrize("is_bool", [True, False])
def test_attention_with_dropout_gives_0_where_a_query_may_see_no_key(is_bool):
    mask = torch.ones(3, 3, dtype=torch.bool).tril().index_fill(0, torch.tensor(1), False)
    mask = mask if is_bool else torch.zeros(3, 3).double().masked_fill(~mask, float("-inf"))
    found = []
    for p in (0.0, 1e-12):
        step = make(seeded(lambda p=p: Attention(p, attn_mask=mask)), init_std=1e-9)
        result = step(X, Y, 8)
        found.append([torch.tensor(result.data_term), step.posterior.buffer.gradient])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_examples", [8, 6, 1])  # 6: as many as there are numbers of an example
def test_the_batch_is_found_where_the_sequence_comes_first(num_examples):
    net = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5, batch_first=False)).double()
    seen = []
    net[0].dropout2.register_forward_hook(lambda _, args, out: seen.append(out.detach().eq(0) | args[0].eq(0)))

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = net, nn.Linear(6, 3).double()

        def forward(self, x):
            tokens = torch.stack([x, x + 1, x - 1, x * 2])  # [4, B, 6]
            return self.head(self.encoder(tokens).mean(0))

    make(SequenceFirst(), num_samples=1)(X[:num_examples], Y[:num_examples], num_examples)
    mask = seen[-1]
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert not torch.equal(mask, mask[:1].expand_as(mask))  # each token has its own


# --- all samples equal ---------------------------------------------------------------------------------


class Casting(nn.Module):
    """A module with an autocast of its own inside."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("ours", [None, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_samples_differ_under_a_users_autocast(inner, ours, chunk_size):
    net = mlp(nn.Tanh()).float()
    seen = []
    net.register_forward_hook(lambda *args: seen.append(args[2].detach()) if chunk_size == 1 else None)
    x, terms = X.float(), []
    for outer in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            torch.manual_seed(0)
            same = copy.deepcopy(net)  # a posterior leaves a sample of its weights in the network
            again = make(Casting(same) if inner else same, init_std=0.3, chunk_size=chunk_size, num_samples=4)
            again.loop.autocast_dtype = ours
            terms.append(again(x, Y, 8).data_term)
            if chunk_size == 1:
                outputs = seen[-4:]
                assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
            drawn = members(again, x=x)
            assert (drawn.std(1) > 1e-3).any(1).all()
    assert terms[0] == pytest.approx(terms[1], rel=0.05)


class InFull(nn.Module):
    """A module that switches the autocast of others off."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.net(x)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("objective", [hpc_bnn.Crps(), hpc_bnn.Energy(), hpc_bnn.NegativeElbo()])
@pytest.mark.parametrize("family", [posteriors.LowRankGaussian, posteriors.MeanFieldGaussian, posteriors.MCDropout])
def test_a_users_autocast_is_for_the_network_alone(family, objective, chunk_size):
    """Draws, scores, gradients and KL have the bits that they have without it."""
    found = []
    for outer in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
        posterior = family(InFull(net))
        step = VariationalStep(
            posterior, hpc_bnn.Gaussian(3, scale=0.5) if objective.name == "elbo" else hpc_bnn.Implicit(3),
            torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
            num_samples=4, num_train_examples=100, objective=objective, chunk_size=chunk_size,
        )  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            results = [step(X.float(), X[:, :3].float(), 8) for _ in range(2)]
        found.append((*(r.nelbo for r in results), *(r.kl for r in results), posterior.buffer.flat.clone()))
    assert found[0][:-1] == found[1][:-1] and torch.equal(found[0][-1], found[1][-1])


def changed_by(edit):
    net = mlp(nn.Tanh())
    step = make(net)
    step(X, Y, 8)
    edit(net, step.posterior)
    return step


def test_a_slot_with_other_memory_is_an_error_in_training_and_prediction():
    step = changed_by(lambda _, p: setattr(p.loc, "data", p.loc.data.clone()))
    before = step.posterior.buffer.flat.clone()
    for call in (lambda: step(X, Y, 8), lambda: members(step)):
        with pytest.raises(ConfigError, match=r"loc mean-field.*copy_"):
            call()
    assert torch.equal(step.posterior.buffer.flat, before)


@pytest.mark.parametrize(
    "edit",
    [
        lambda _, posterior: posterior.log_scale.detach().add_(1.0),
        lambda _, posterior: posterior.load_state_dict(make(mlp(nn.Tanh()), init_std=0.5).posterior.state_dict()),
    ],
)
def test_what_can_be_followed_is_followed(edit):
    plain, edited = changed_by(lambda *_: None), changed_by(edit)
    assert edited(X, Y, 8).nelbo != plain(X, Y, 8).nelbo
    assert not torch.equal(members(edited), members(plain))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_layers_without_weights_may_come_and_go(chunk_size):
    results = []
    for is_early in (True, False):
        net = nn.Sequential(*mlp(nn.Linear(8, 8)))
        net.insert(0, nn.Flatten()) if is_early else None
        step = make(net, chunk_size=chunk_size, lr=0.1)
        net.insert(0, nn.Flatten()) if not is_early else None  # all names change
        results.append([step(X, Y, 8).data_term for _ in range(3)])
        assert members(step).std(1).max() > 0
    assert results[0] == results[1]


def test_weights_that_are_frozen_after_the_wrap_do_not_train_but_predict():
    step = changed_by(lambda net, _: net[0].requires_grad_(False))
    with pytest.raises(ConfigError, match=r"0\.weight, 0\.bias: it was frozen"):
        step(X, Y, 8)
    assert members(step).std(1).max() > 0


FAMILIES = {
    "mean_field": posteriors.MeanFieldGaussian,
    "student_t": lambda net: posteriors.MeanFieldGaussian(net, prior=posteriors.StudentTPrior()),
    "moped": lambda net: posteriors.MeanFieldGaussian(net, prior=posteriors.GaussianPrior(mean="initial")),
    "local": lambda net: posteriors.MeanFieldGaussian(net, estimator="local"),
    "flipout": lambda net: posteriors.MeanFieldGaussian(net, estimator="flipout"),
    "antithetic": lambda net: posteriors.MeanFieldGaussian(net, antithetic=True),
    "low_rank": lambda net: posteriors.LowRankGaussian(net, rank=2),
    "mc_dropout": posteriors.MCDropout,
    "deterministic": posteriors.DeterministicNetwork,
    "ensemble": lambda net: posteriors.DeepEnsemble(lambda: copy.deepcopy(net), 4, range(4)),
}


def by_torch(posterior):
    file = io.BytesIO()
    torch.save(posterior, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), by_torch])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_trains_and_predicts_as_the_original(family, way):
    between = (nn.LayerNorm(8), nn.Dropout(0.3)) if family == "ensemble" else (nn.BatchNorm1d(8), nn.Dropout(0.3))
    step = make(mlp(*between), FAMILIES[family], lr=0.1)
    step(X, Y, 8), step(X, Y, 8)
    twin = way(step.posterior)
    assert twin.module is not step.posterior.module
    other = make(None, lambda _: twin, lr=0.1)
    other.num_steps = step.num_steps
    for _ in range(2):
        assert other(X, Y, 8) == step(X, Y, 8)
    states = [p.state_dict() for p in (twin, step.posterior)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert torch.equal(members(other, 4), members(step, 4))
    before = twin.buffer.flat.clone()
    step(X, Y, 8)
    assert torch.equal(twin.buffer.flat, before)  # they share nothing


def test_a_copy_of_the_module_alone_is_an_ordinary_network():
    for estimator in ("reparameterisation", "flipout"):
        step = make(mlp(nn.BatchNorm1d(8), nn.Dropout(0.5)), estimator=estimator)
        step(X, Y, 8)
        net = copy.deepcopy(step.posterior.use_mean_())
        pickle.dumps(net)
        assert not torch.equal(net(X), net(X))  # torch's own dropout
        assert torch.equal(net.eval()(X), net(X))
        torch.optim.SGD(net.parameters(), lr=0.1)
        assert members(step).std(1).max() > 0


class Deaf(nn.Module):
    """Reads a copy of its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.held = [p.detach().double() for p in self.layer.parameters()]

    def forward(self, x):
        return F.linear(x, *self.held) + 0 * self.layer(x).detach()


def test_weights_that_do_not_reach_the_outputs_are_an_error():
    with pytest.raises(ConfigError, match="Deaf: the outputs do not depend on its 2 random weights"):
        make(seeded(Deaf))(X, Y, 8)
    with pytest.raises(ConfigError, match="Deaf: the outputs do not depend"):
        members(make(seeded(Deaf)))


def test_a_last_layer_of_zeros_or_tiny_scales_are_no_error():
    net = mlp(nn.Tanh())
    nn.init.zeros_(net[2].weight), nn.init.zeros_(net[2].bias)
    step = make(net, deterministic=("2.*",), lr=0.1)
    before = [p.detach().clone() for p in net[2].parameters()]
    assert step(X, Y, 8).nelbo != step(X, Y, 8).nelbo
    assert not any(torch.equal(a, b) for a, b in zip(before, net[2].parameters()))
    make(mlp(nn.Tanh()).float(), init_std=1e-12)(X.float(), Y, 8)
    make(mlp(nn.Tanh()), init_std=1e-3)(torch.zeros_like(X), Y, 8)


# --- traces --------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.number, self.list, self.table = 0, [], {"calls": [0]}
        self.array, self.tensor = np.zeros(2), torch.zeros(2)

    def forward(self, x):
        self.count += 1
        self.replaced = self.replaced + 1
        self.number += 1
        self.list.append(self.number)
        self.table["calls"][0] += 1
        self.array += 1
        self.tensor += 1
        return self.layer(x)


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_looks_and_chunks_that_fail_leave_no_trace(chunk_size, caplog):
    net = seeded(Counting)
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    step = make(net, num_samples=4, chunk_size=chunk_size)
    step(X, Y, 8)
    assert net.count == net.replaced == net.number == net.table["calls"][0] == 4
    assert net.list == [1, 2, 3, 4] and net.array.tolist() == net.tensor.tolist() == [4, 4]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1]) and random.getstate() == generators[2]
    if chunk_size > 1:
        assert "its forward pass changes count, replaced" in caplog.text


class InPlace(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.layer = first, nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(self.first(x))


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("first", [lambda: nn.LeakyReLU(0.1, inplace=True), lambda: Minus(), lambda: Minus(True)])
def test_an_input_that_is_changed_in_place_is_copied(first, chunk_size):
    net = seeded(lambda: InPlace(first()))
    expected, x = loss_of_plain(net), X.clone()
    step = make(net, init_std=1e-9, chunk_size=chunk_size)
    drawn = members(step, x=x)
    assert step(x, Y, 8).data_term == pytest.approx(expected, abs=1e-7)
    assert drawn.std(1).max() < 1e-6 and torch.equal(x, X)


@pytest.mark.parametrize("family", [posteriors.MeanFieldGaussian, posteriors.MCDropout])
def test_a_look_at_half_the_batch_leaves_the_input_as_it_is(family):
    """Where dropout makes it look which dims are those of the batch: in a step, and in a predictive."""
    for use in (lambda step, x: members(step, x=x), lambda step, x: step(x, Y, 8)):
        x = X.clone()
        use(make(seeded(lambda: InPlace(nn.Sequential(Minus(), nn.Dropout(0.5)))), family), x)
        assert torch.equal(x, X)


class Minus(nn.Module):
    def __init__(self, of_data=False):
        super().__init__()
        self.of_data = of_data

    def forward(self, x):
        if self.of_data:
            x.data.sub_(0.5)  # unseen by the version of x
        else:
            x.view(-1).sub_(0.5)
        return x


class Table(nn.Module):
    """As timm's LeViT, TinyViT, and one that never forgets: a table derived from weights in evaluation mode."""

    def __init__(self, kind):
        super().__init__()
        self.weight, self.kind, self.table = nn.Parameter(torch.randn(6, 3)), kind, None
        if kind == "buffer":
            self.register_buffer("kept", None)
        if kind == "in_place_of_a_layer":
            self.table = nn.Identity()

    def train(self, mode=True):
        super().train(mode)
        if self.kind == "forgets_in_train" and mode:
            self.table = None
        if self.kind == "made_by_eval" and not mode:
            self.table = self.weight.softmax(0)
        return self

    def forward(self, x):
        if self.training:
            return x @ self.weight.softmax(0)
        if self.kind in ("layer", "in_place_of_a_layer"):
            if not isinstance(self.table, nn.Linear):
                self.table = nn.Linear(6, 3, bias=False, dtype=self.weight.dtype, device="meta").to_empty(device="cpu")
                self.table.weight.data.copy_(self.weight.softmax(0).T)
            return self.table(x)
        name = "kept" if self.kind == "buffer" else "table"
        if getattr(self, name) is None and self.kind != "made_by_eval":  # which makes it before
            setattr(self, name, self.weight.softmax(0).detach())
        return x @ getattr(self, name)


@pytest.mark.parametrize(
    "kind", ["forgets_in_train", "made_by_eval", "never_forgets", "buffer", "layer", "in_place_of_a_layer"]
)
def test_a_table_derived_from_weights_is_made_anew_for_each_member(kind):
    net = seeded(lambda: Table(kind))
    step = make(net, init_std=0.5, lr=1.0)
    drawn = members(step)
    for k in range(5):
        posterior = step.posterior
        with posterior.evaluating():
            posterior.draw_(hpc_bnn.noise.Key(0, hpc_bnn.noise.Stream.PREDICTION, sample=k))
            expected = (X @ net.weight.softmax(0)).softmax(-1)
        torch.testing.assert_close(drawn[:, k], expected, rtol=1e-12, atol=1e-14)
    for _ in range(3):
        step(X, Y, 8)
    assert (members(step) - drawn).abs().max() > 1e-3 and net.training
    if kind in ("forgets_in_train", "made_by_eval"):
        mean = step.posterior.use_mean_().eval()
        expected = X @ step.posterior.loc.detach().view(6, 3).softmax(0)
        torch.testing.assert_close(mean(X).detach(), expected, rtol=1e-12, atol=1e-14)


class Listens(nn.Module):
    """As transformers: registers hooks of its own in its first forward pass, notes that, and computes with what they hear."""

    def __init__(self, by_hooks):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
        self.last, self.by_hooks, self.is_ready, self.heard = nn.Linear(6, 3), by_hooks, False, []

    def forward(self, x):
        if self.by_hooks and not self.is_ready:
            for layer in self.layers:
                layer.register_forward_hook(lambda layer, arguments, output: self.heard.append(output))
            self.is_ready = True
        self.heard = []
        for layer in self.layers:
            x = layer(x)
            if not self.by_hooks:
                self.heard.append(x)
        heard, self.heard = self.heard, []
        return self.last(heard[1] * len(heard))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_hooks_that_a_forward_pass_registers_are_registered_once(chunk_size):
    steps = [
        make(seeded(lambda by=by: Listens(by)), init_std=0.1, lr=0.1, chunk_size=chunk_size) for by in (True, False)
    ]
    for _ in range(2):
        assert torch.equal(*map(members, steps))
        results = [step(X, Y, 8) for step in steps]
        assert results[0].nelbo == results[1].nelbo
        assert torch.equal(*[step.posterior.loc for step in steps])
    assert [len(layer._forward_hooks) for layer in steps[0].posterior.module.layers] == [1, 1, 1]


class Merging(nn.Module):
    """Low-rank adaptation as in loralib: the frozen weight holds the product in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.layer.weight.requires_grad_(False)
        self.a, self.b, self.is_merged = (nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(3, 2)), False)

    def train(self, mode=True):
        super().train(mode)
        if self.is_merged is mode:
            self.layer.weight.data += (self.b @ self.a).detach() * (-1 if mode else 1)
            self.is_merged = not mode
        return self

    def forward(self, x):
        y = self.layer(x)
        return y if self.is_merged else y + x @ self.a.T @ self.b.T


def test_weights_that_are_merged_in_evaluation_mode_come_apart_again(caplog):
    net = seeded(Merging)
    frozen = net.layer.weight.detach().clone()
    step = make(net, init_std=0.5)
    for _ in range(2):
        drawn = members(step, 7)
        assert torch.equal(net.layer.weight, frozen) and net.training and not net.is_merged
        step(X, Y, 8)
    with step.posterior.evaluating():
        step.posterior.draw_(hpc_bnn.noise.Key(0, hpc_bnn.noise.Stream.PREDICTION, sample=3))
        expected = X @ (frozen + net.b @ net.a).T + net.layer.bias
    torch.testing.assert_close(drawn[:, 3], expected.softmax(-1), rtol=1e-10, atol=1e-12)
    assert not caplog.text


class Rescaling(nn.Module):
    """As RWKV of transformers: its forward pass divides weights when it finds itself in evaluation mode, and takes that back."""

    def __init__(self, in_place):
        super().__init__()
        self.layer, self.last, self.in_place, self.is_less = nn.Linear(6, 6), nn.Linear(6, 3), in_place, False

    def forward(self, x):
        if self.in_place and self.is_less is self.training:
            self.layer.weight.detach().mul_(2 if self.training else 0.5)
            self.is_less = not self.training
        weight = self.layer.weight / (1 if self.training or self.in_place else 2)
        return self.last(nn.functional.linear(x, weight, self.layer.bias).tanh())


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("family", [posteriors.MeanFieldGaussian, posteriors.LowRankGaussian, posteriors.MCDropout])
def test_weights_that_are_rescaled_for_evaluation_are_so_once_for_each_member(family, chunk_size):
    steps = []
    for in_place in (True, False):
        net = seeded(lambda in_place=in_place: nn.Sequential(Rescaling(in_place), nn.Dropout(0.1)))
        steps.append(make(net, family, lr=0.1, chunk_size=chunk_size))
    for _ in range(2):
        assert torch.equal(*map(members, steps))
        for step in steps:
            step(X, Y, 8)
        states = [step.posterior.state_dict() for step in steps]
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items() if torch.is_tensor(value))


class Initialising(nn.Module):
    """As ActNorm of flows: the first batch sets the weights."""

    def __init__(self):
        super().__init__()
        self.layer, self.shift, self.is_done = nn.Linear(6, 3), nn.Parameter(torch.zeros(3)), False

    def forward(self, x):
        y = self.layer(x)
        if not self.is_done:
            self.shift.detach().copy_(y.mean(0))
            self.is_done = True
        return y - self.shift


def test_initialisation_by_the_first_batch_wants_to_come_before_the_wrap():
    with pytest.raises(ConfigError, match=r"shift: its forward pass writes these weights.* Run the network once"):
        make(seeded(Initialising))(X, Y, 8)
    net = seeded(Initialising)
    net(X)
    make(net)(X, Y, 8)


class Cache:
    def __init__(self):
        self.calls, self.table = 0, (torch.zeros(1), [0])


class WithObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.cache = nn.Linear(6, 3), Cache()

    def forward(self, x):
        self.cache.calls += 1
        self.cache.table[0].add_(1)
        self.cache.table[1][0] += 1
        return self.layer(x)


def test_looks_put_objects_of_the_users_classes_back():
    net = seeded(WithObject)
    make(net, num_samples=2, chunk_size=2)(X, Y, 8)
    assert net.cache.calls == net.cache.table[0].item() == net.cache.table[1][0] == 2


class Noisy(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.layer, self.draw = nn.Linear(6, 3), draw
        self.own, self.own_torch = np.random.default_rng(0), torch.Generator()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x) * (1 + self.draw(self))


SOURCES = {
    "torch's global generator": lambda _: torch.rand(()),
    "NumPy's global generator": lambda _: np.random.rand(),
    "Python's random": lambda _: random.random(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_noise_of_every_global_generator_is_noticed(source, caplog):
    step = make(seeded(lambda: Noisy(SOURCES[source])))
    step(X, Y, 8), step(X, Y, 8)
    assert caplog.text.count(source) == 1 and "not keyed" in caplog.text
    members(step)
    assert caplog.text.count(source) == 1  # a process says it once
    members(make(seeded(lambda: Noisy(SOURCES[source]))))
    assert caplog.text.count(source) == 2  # in the predictive as well


def test_noise_from_nowhere_is_noticed(caplog):
    import secrets

    make(seeded(lambda: Noisy(lambda _: secrets.randbelow(1000) / 1000)))(X, Y, 8)
    assert "two passes of one sample differ" in caplog.text


# --- batches that fail ---------------------------------------------------------------------------------


class Fails(torch.autograd.Function):
    """Fails in its backward pass where it sees a batch of samples."""

    generate_vmap_rule = False
    error = RuntimeError("LSE is not correctly aligned")

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.is_batched = False

    @staticmethod
    def vmap(info, in_dims, x):
        return FailsInBackward.apply(x), in_dims[0]

    @staticmethod
    def backward(ctx, grad):
        return grad


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if isinstance(Fails.error, str):
            raise torch.OutOfMemoryError(Fails.error)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise Fails.error


@pytest.mark.parametrize("objective", [None, hpc_bnn.LogPredictive()])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("LSE is not aligned"),
        torch.OutOfMemoryError("CUDA out of memory"),
        "in the forward pass",
        KeyError("x"),
    ],
)
def test_a_batch_that_fails_in_either_pass_or_in_memory_walks(error, objective, caplog, monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(nn.Tanh())

        def forward(self, x):
            return Fails.apply(self.net(x))

    monkeypatch.setattr(Fails, "error", error)
    results = []
    for chunk_size in (1, 4):
        posterior = posteriors.MeanFieldGaussian(Net())
        step = VariationalStep(
            posterior, CLASSES, torch.optim.SGD(posterior.parameters(), lr=0.1), COMM, num_samples=4,
            num_train_examples=100, chunk_size=chunk_size, objective=objective,
        )  # fmt: skip
        results.append([step(X, Y, 8) for _ in range(2)])
    for a, b in zip(*results):
        assert a.nelbo == pytest.approx(b.nelbo, rel=1e-12)
    assert caplog.text.count("samples are evaluated one after another") == 1


class Listed(nn.Module):
    """Holds a parameter in a plain list as well, where functional_call does not see it."""

    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(3, 6)), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x @ self.list[0].T)


def test_a_batch_that_gives_another_gradient_walks(caplog):
    gradients = []
    for chunk_size in (1, 2):
        net = seeded(Listed)
        net.list = [net.weight]
        step = make(net, chunk_size=chunk_size)
        step(X, Y, 8)
        gradients.append(step.posterior.buffer.gradient.clone())
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert "a batch gives another gradient of weight.loc than a walk" in caplog.text


def test_a_batch_that_fails_later_is_folded_in_once(monkeypatch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(nn.Tanh())

        def forward(self, x):
            return Fails.apply(self.net(x)) if len(x) > 4 else self.net(x)

    monkeypatch.setattr(Fails, "error", RuntimeError("later"))
    walking, batched = (make(Net(), chunk_size=c, lr=0.1) for c in (1, 2))
    for x, y in ((X[:4], Y[:4]), (X, Y), (X, Y)):
        assert walking(x, y, len(x)).nelbo == pytest.approx(batched(x, y, len(x)).nelbo, rel=1e-12)


# --- optimizers and contexts ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mean_field", "low_rank", "mc_dropout", "ensemble"])
def test_weight_decay_on_weights_with_a_prior_is_an_error(family):
    posterior = FAMILIES[family](mlp(nn.LayerNorm(8), nn.Dropout(0.3)))
    options = {"num_samples": 4, "num_train_examples": 100}
    for optimizer in (
        torch.optim.AdamW(posterior.parameters()),  # its default is 0.01
        torch.optim.SGD(posterior.weight_parameters(), lr=0.1, weight_decay=1e-4),
        torch.optim.ASGD(posterior.parameters()),  # its default is 0.0001
    ):
        with pytest.raises(ConfigError, match=r"(weight_decay 0\.0|lambd 0\.0).*prior.*Set (.*) to 0.*prior_std"):
            VariationalStep(posterior, CLASSES, optimizer, COMM, **options)
    step = VariationalStep(
        posterior, CLASSES, torch.optim.AdamW(posterior.parameters(), weight_decay=0.0), COMM, **options
    )
    step(X, Y, 8)
    assert optimizer_maker(OptimizerConfig(name="ASGD"))(posterior.parameters()).param_groups[0]["lambd"] == 0
    step.optimizer.optimizer.param_groups[0]["weight_decay"] = 0.1  # later
    with pytest.raises(ConfigError, match="weight_decay"):
        step(X, Y, 8)


def test_weights_without_a_prior_may_decay():
    posterior = posteriors.MeanFieldGaussian(mlp(nn.LayerNorm(8)))
    groups = [
        {"params": [posterior.loc, posterior.log_scale], "weight_decay": 0.0},
        {"params": [posterior.points], "weight_decay": 0.1},
    ]
    options = {"num_samples": 2, "num_train_examples": 100}
    VariationalStep(posterior, CLASSES, torch.optim.AdamW(groups), COMM, **options)(X, Y, 8)
    plain = posteriors.DeterministicNetwork(mlp())
    VariationalStep(plain, CLASSES, torch.optim.AdamW(plain.parameters()), COMM, **options)(X, Y, 8)


@pytest.mark.parametrize(
    ("make_optimizer", "message"),
    [
        (lambda p: torch.optim.Adam(p.module.parameters()), "updates 4 parameters of the network itself"),
        (lambda p: torch.optim.Adam([nn.Parameter(torch.zeros(1))]), "none of the posterior's parameters"),
        (lambda p: torch.optim.Adam(p.parameters(), maximize=True), "minimised"),
    ],
)
def test_an_optimizer_that_cannot_train_the_posterior_is_an_error(make_optimizer, message):
    posterior = posteriors.MeanFieldGaussian(mlp())
    with pytest.raises(ConfigError, match=message):
        VariationalStep(posterior, CLASSES, make_optimizer(posterior), COMM, num_samples=2, num_train_examples=10)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_says_what_to_do(context):
    step = make(mlp())
    with context(), pytest.raises(ConfigError, match=rf"Call it outside of torch\.{context.__name__}\(\)"):
        step(X, Y, 8)
    step(X, Y, 8)
    with torch.inference_mode(), pytest.raises(ConfigError, match="can never be trained"):
        make(mlp())


def test_a_step_that_failed_or_was_refused_can_be_repeated():
    class Refused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.is_bad = nn.Linear(6, 3), True

        def forward(self, x):
            if self.is_bad:
                raise ValueError("bad")
            return self.layer(x)

    for estimator in ("reparameterisation", "flipout"):
        net, plain = (seeded(Refused) for _ in range(2))
        plain.is_bad = False
        step, expected = (make(n, estimator=estimator) for n in (net, plain))
        for _ in range(2):
            with pytest.raises(ValueError, match="bad"):
                step(X, Y, 8)
        net.is_bad = False
        assert step(X, Y, 8) == expected(X, Y, 8)
        net.is_bad = True
        with pytest.raises(ValueError, match="bad"):
            step(X, Y, 8)
        net.is_bad = False
        assert step(X, Y, 8) == expected(X, Y, 8)
    assert F.dropout is torch.nn.functional.dropout and F.dropout.__module__ == "torch.nn.functional"
    for _ in range(2):  # what is refused once is refused again
        with pytest.raises(ConfigError, match="masks come from"):
            make(mlp(OwnNoise(0.5)))(X, Y, 8)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_weights_that_a_forward_writes_itself_are_no_fault_of_the_user(chunk_size):
    class Renormed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(10, 6, max_norm=0.5), nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(self.embed(x).mean(1))

    step = make(seeded(Renormed), deterministic=(), chunk_size=chunk_size, lr=0.1)
    tokens = torch.arange(24).view(8, 3) % 10
    results = [step(tokens, Y, 8).nelbo for _ in range(3)]
    assert len(set(results)) == 3
    members(step, x=tokens)
    step(tokens, Y, 8)


def test_training_in_evaluation_mode_trains_points_and_leaves_state_alone():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last, self.calls = mlp(nn.LayerNorm(8), nn.BatchNorm1d(8)), None, 0

        def forward(self, x):
            self.calls += 1
            self.last = x.mean()
            return self.net(x)

    net = Remembers().eval()
    step = make(net, num_samples=2, lr=0.5)
    before = step.posterior.points.detach().clone()
    results = [step(X, Y, 8).nelbo for _ in range(5)]
    assert len(set(results)) == 5 and (step.posterior.points - before).abs().max() > 1e-3
    assert net.calls == 10 and net.net[2].num_batches_tracked == 0
    members(step)
    net.train()
    step(X, Y, 8)
    assert net.net[2].num_batches_tracked == 1 and net.calls == 12


def test_a_step_is_copied_with_its_optimizer():
    step = make(mlp(nn.BatchNorm1d(8)), lr=0.5)
    step(X, Y, 8)
    twin = copy.deepcopy(step)
    assert twin.data_term._reducer() is twin.reducer is not step.reducer
    assert [twin(X, Y, 8) for _ in range(3)] == [step(X, Y, 8) for _ in range(3)]
    assert torch.equal(twin.posterior.buffer.flat, step.posterior.buffer.flat)
    shallow = copy.copy(step.posterior)
    assert torch.equal(members(step), members(make(None, lambda _: shallow)))
    vars(step)["posterior"] = copy.deepcopy(step.posterior)  # and the optimizer still has the former's
    step.updater.posterior = step.posterior
    with pytest.raises(ConfigError, match="none of the posterior's parameters"):
        step(X, Y, 8)


def test_networks_in_threads_and_within_each_other_do_not_disturb_each_other():
    import threading

    def train(step, results):
        for _ in range(10):
            step.num_steps = 0
            results.append(step(X, Y, 8).data_term)
        results.append(step.posterior.module[1].num_batches_tracked.item())

    seen = [[], []]
    steps = [make(mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))) for _ in seen]
    threads = [threading.Thread(target=train, args=both) for both in zip(steps, seen)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert seen[0] == seen[1] and len(set(seen[0])) == 2 and seen[0][-1] == 10
    assert F.dropout.__module__ == "torch.nn.functional" and not hasattr(F.dropout, "original")

    teacher = make(mlp(nn.Dropout(0.3))).posterior

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.teacher = mlp(nn.BatchNorm1d(8), nn.Dropout(0.3)), [teacher]

        def forward(self, x):
            with torch.no_grad():
                self.teacher[0].network(x)
            return self.net(x)

    alone, taught = make(mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))), make(Student())
    assert [taught(X, Y, 8).data_term for _ in range(2)] == [alone(X, Y, 8).data_term for _ in range(2)]
    assert not hasattr(F.dropout, "original")


def test_a_layer_that_is_made_at_first_use_leaves_torch_alone():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.act = mlp(nn.Dropout(0.5)), None

        def forward(self, x):
            if self.act is None:
                self.act = nn.Tanh()
            return self.net(self.act(x))

    net = seeded(Lazy)
    step = make(net)
    step(X, Y, 8), step(X, Y, 8)
    assert not hasattr(F.dropout, "original")
    assert not torch.equal(net(X), net(X))


def test_weights_that_are_unfrozen_later_are_an_error():
    net = mlp(nn.Tanh())
    net[0].requires_grad_(False)
    step = make(net)
    step(X, Y, 8)
    net.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"0\.weight, 0\.bias: it was unfrozen"):
        step(X, Y, 8)


def test_a_computed_weight_that_a_user_caches_is_computed_for_each_sample():
    net = mlp(nn.Tanh())
    nn.utils.parametrizations.weight_norm(net[0])
    steps = [make(copy.deepcopy(net), init_std=0.3, lr=0.1) for _ in range(2)]
    expected = steps[0](X, Y, 8), members(steps[0])
    with nn.utils.parametrize.cached():
        assert (steps[1](X, Y, 8), True) == (expected[0], torch.equal(members(steps[1]), expected[1]))
    torch.testing.assert_close(steps[0].posterior.buffer.flat, steps[1].posterior.buffer.flat, rtol=0, atol=0)


def test_an_input_that_is_changed_in_place_only_later_is_copied():
    net = seeded(lambda: InPlace(nn.ReLU(inplace=True)))
    step = make(net, init_std=1e-9)
    step(X.abs(), Y, 8)  # nothing to change
    x = X.clone()
    expected = F.cross_entropy(net.layer(X.relu()), Y).item()
    assert step(x, Y, 8).data_term == pytest.approx(expected, abs=1e-6) and torch.equal(x, X)


def test_a_network_that_differentiates_in_its_forward_pass():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = self.net(x)
                (force,) = torch.autograd.grad(y.sum(), x, create_graph=self.training)
            return y + force[:, :3]

    step = make(seeded(Forces), lr=0.1)
    assert step(X, Y, 8).nelbo != step(X, Y, 8).nelbo and members(step).std(1).max() > 0


@pytest.mark.parametrize("way", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_network_with_sync_batch_norm_is_wrapped_again(way):
    net = mlp(nn.SyncBatchNorm(8))
    first = make(net)(X, Y, 8).data_term
    second = make(way(net))
    assert second(X, Y, 8).data_term == pytest.approx(first, rel=0.5)
    net[1].forward = lambda x: x
    with pytest.raises(ConfigError, match="sums over all ranks by itself"):
        make(net)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3)])
def test_batch_norm_has_a_second_derivative_on_one_rank_and_an_error_on_more(shape):
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def loss(x, sum_over_data=batch_norms.of_one_rank):
        return batch_norms._Normalise.apply(x, 1e-5, sum_over_data)[0].sin()

    assert torch.autograd.gradgradcheck(loss, x)
    torch.autograd.grad(loss(x, lambda tensor: None).sum(), x)
    with pytest.raises(ConfigError, match="differentiates through it"):
        torch.autograd.grad(loss(x, lambda tensor: None).sum(), x, create_graph=True)


def helper(x, training):
    x = F.dropout(x, 0.5, training)
    return torch.cat([x, F.dropout(torch.ones_like(x), 0.5, training)], 1)


@pytest.mark.parametrize("compiles", [False, True])
def test_calls_within_a_helper_have_masks_of_their_own(compiles):
    class Helped(nn.Module):
        def forward(self, x):
            return helper(torch.ones_like(x), self.training)

    net = mlp(Helped(), nn.Linear(16, 8))
    seen = []
    net[1].register_forward_hook(lambda *args: seen.append(args[2].detach()))
    step = make(torch.compile(net, backend="eager") if compiles else net)
    step(X, Y, 8)
    assert not any(torch.equal(y[:, :8], y[:, 8:]) for y in seen[-4:])


def test_batch_norm_of_16_bits_subtracts_before_it_rounds():
    norm = nn.BatchNorm1d(4)
    posterior = posteriors.DeterministicNetwork(norm)
    x = (100 + torch.randn(4096, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    posterior.begin_()
    posterior.draw_(hpc_bnn.noise.Key(0, hpc_bnn.noise.Stream.NOISE))
    y = posterior.network(x)
    assert y.float().mean(0).abs().max() < 5e-3


def test_a_norm_that_comes_in_later_is_an_error():
    net = mlp(nn.Identity())
    step = make(net)
    step(X, Y, 8)
    net[1] = nn.BatchNorm1d(8, affine=False).double()
    with pytest.raises(ConfigError, match="1: this BatchNorm layer came into the network"):
        step(X, Y, 8)


# --- a batch after an edit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hook", [lambda w: w.register_hook(lambda g: g * 0), lambda w: w.register_post_accumulate_grad_hook(_no_gradient)]
)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_hooks_on_a_weight_run_in_each_step_from_then_on(hook, chunk_size):
    step = make(mlp(), chunk_size=chunk_size, lr=0.1)
    step(X, Y, 8)
    weight = step.posterior.module[0].weight
    hook(weight)
    former = weight.detach().clone()
    step(X, Y, 8)
    assert (weight - former).abs().max() < 1e-6  # the KL of 10**9 examples
    assert not step.loop.can_batch or chunk_size == 1


def _no_gradient(weight):
    weight.grad = torch.zeros_like(weight)


class HoldsAWeight(nn.Module):
    """In training mode it reads a weight that a batch cannot replace."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
        self.held = [self.a.weight]

    def forward(self, x):
        x = torch.tanh(self.a(x))
        return self.b(torch.tanh(x @ self.held[0]) if self.training else x)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_batch_proves_itself_again_in_another_mode(chunk_size):
    torch.manual_seed(0)
    step = make(HoldsAWeight().double(), chunk_size=chunk_size, init_std=0.5)
    step.posterior.module.eval()
    step(X, Y, 8)
    assert step.loop.can_batch
    step.posterior.module.train()
    step(X, Y, 8)
    assert step.loop.can_batch == (chunk_size == 1)


def test_a_batch_proves_itself_again_after_an_edit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    step = make(net, chunk_size=4, init_std=0.5)
    step(X, Y, 8)
    assert step.loop.can_batch
    net[1] = Reads([net[0].weight])
    step(X, Y, 8)
    assert not step.loop.can_batch


class Reads(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held

    def forward(self, x):
        return torch.tanh(x @ self.held[0])
