"""Which weights a posterior takes, which are points, and what a look and a proof find out about them and about shapes."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hpc_bnn
from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, posteriors, predict_classes, predict_values
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.noise import Key, Stream

COMM, CLASSES = GridComm(Grid()), Categorical(3)
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(8) % 3
FAMILIES = {
    "mean_field": posteriors.MeanFieldGaussian,
    "low_rank": posteriors.LowRankGaussian,
    "deterministic": posteriors.DeterministicNetwork,
    "ensemble": lambda net: posteriors.DeepEnsemble(lambda: net, 2, range(2)),
}


def make_step(net, family=posteriors.MeanFieldGaussian, likelihood=CLASSES, lr=0.0, num_samples=4, **options):
    posterior = family(net, **{k: options.pop(k) for k in ("init_std", "deterministic", "estimator") if k in options})
    num_samples = 2 if posterior.family == "deep ensemble" else num_samples
    return VariationalStep(
        posterior, likelihood, torch.optim.SGD(posterior.parameters(), lr=lr), COMM, num_samples=num_samples,
        num_train_examples=10**6, **options,
    )  # fmt: skip


def members(step, **options):
    return predict_classes(
        step.posterior, CLASSES, COMM, X, num_samples=step.num_samples, keep_members=True, **options
    ).members


def seeded(make_net):
    torch.manual_seed(0)
    return make_net().double()


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


# --- weights that cannot be laid out --------------------------------------------------------------------


def expanded():
    net = mlp()
    net[0].bias = nn.Parameter(torch.zeros(1).double().expand(8))
    return net


def tied_by_data(name="weight"):
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    getattr(net[1], name).data = getattr(net[0], name).data
    return net


def with_view(hold):
    net = mlp()
    hold(net[0], net[0].weight)
    return net


VIEWS = {
    "buffer": lambda layer, w: layer.register_buffer("row", w.data[3]),
    "attribute": lambda layer, w: setattr(layer, "row", w.detach().t()),
    "view with a graph": lambda layer, w: setattr(layer, "row", w.t()),
    "list": lambda layer, w: setattr(layer, "row", [w.data[2:4]]),
    "dictionary": lambda layer, w: setattr(layer, "row", {"w": w.data}),
}


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class DistributedDataParallel(Wrapper):
    """As that of apex, which is no subclass of torch's."""


class Own(DistributedDataParallel):
    pass


def sparse():
    net = mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().to_sparse())
    return net


def subclassed():
    class Quantised(torch.Tensor):
        pass

    net = mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Quantised))
    net[0].weight.data = net[0].weight.data.as_subclass(Quantised)
    return net


LAZY = [
    lambda: nn.LazyLinear(3),
    lambda: nn.LazyConv1d(2, 1),
    lambda: nn.LazyBatchNorm1d(affine=False),
    lambda: nn.LazyInstanceNorm2d(affine=True),
]
REFUSED = {
    **{
        f"lazy {n}": (lambda make=make: nn.Sequential(nn.Linear(6, 3), make()), "no shape")
        for n, make in enumerate(LAZY)
    },
    **{
        str(dtype): (lambda dtype=dtype: mlp().to(dtype), r"updates of a weight are lost.* net\.float\(\)")
        for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    },
    "one layer in 16 bits": (lambda: nn.Sequential(mlp(), nn.Linear(3, 3).bfloat16()), "1.weight, 1.bias: .*bfloat16"),
    "two dtypes": (lambda: nn.Sequential(mlp(), nn.Linear(3, 3)), r"2 kinds.*0\.2\.bias.*1\.bias"),
    "two devices": (lambda: nn.Sequential(mlp(), nn.Linear(3, 3).double().to("meta")), "2 kinds.*meta"),
    "meta": (lambda: mlp().to("meta"), r"device meta, without numbers.*to_empty"),
    "inference": (torch.inference_mode()(mlp), r"made within torch.inference_mode.*copy.deepcopy"),
    "expanded": (expanded, "0.bias: numbers of it share memory"),
    "tied by data": (tied_by_data, "1.weight: it shares the memory of 0.weight"),
    "bias tied by data": (lambda: tied_by_data("bias"), "1.bias: it shares the memory of 0.bias"),
    **{
        f"{name} is a view": (lambda hold=hold: with_view(hold), "0.row: it shares the memory of 0.weight")
        for name, hold in VIEWS.items()
    },
    "sparse": (sparse, "0.weight: it is a torch.sparse_coo"),
    "DataParallel": (lambda: nn.DataParallel(mlp()), "DataParallel.*net.module"),
    "inner DataParallel": (lambda: nn.Sequential(nn.DataParallel(mlp())), r"0 \(DataParallel\)"),
    "of another library": (lambda: DistributedDataParallel(mlp()), "DistributedDataParallel"),
    "a subclass of it": (lambda: Own(mlp()), "DistributedDataParallel"),
}


def test_a_module_of_torch_that_sums_gradients_is_refused():
    """Its own DistributedDataParallel and fully_shard, over a group of one rank."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        nets = {"DistributedDataParallel": nn.parallel.DistributedDataParallel(mlp().float())}
        if hasattr(dist.fsdp, "fully_shard"):  # torch >= 2.6
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            nets["FSDPModule"] = dist.fsdp.fully_shard(mlp().float(), mesh=mesh)
        for name, net in nets.items():
            with pytest.raises(ConfigError, match=rf"{name}.*hpc_bnn sums over the process grid.*net\.module"):
                posteriors.MeanFieldGaussian(net)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_laid_out_is_refused_with_a_remedy(name, family):
    make_net, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        FAMILIES[family](make_net())


def test_frozen_weights_and_lazy_ones_that_have_seen_a_batch_are_welcome():
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(3)).double()
    net(X)
    assert make_step(net, lr=0.1)(X, Y, 8).kl > 0
    net = nn.Sequential(mlp(), nn.Linear(3, 3).bfloat16().requires_grad_(False))
    assert list(posteriors.MeanFieldGaussian(net).random) == ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"]
    flat = torch.zeros(20)  # as cuDNN and fused optimizers lay weights out: side by side
    net = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    net[0].weight.data, net[0].bias.data = flat[:12].view(4, 3), flat[12:16]
    net[0].held = [net[0].weight, flat[16:], "words"]
    assert len(posteriors.MeanFieldGaussian(net).random) == 6
    half, whole = nn.Linear(2, 2), nn.Linear(2, 2)
    whole.weight = half.weight  # tied as it should be
    assert len(posteriors.MeanFieldGaussian(nn.Sequential(half, whole)).random) == 3


# --- complex and sparse ---------------------------------------------------------------------------------


class Spectral(nn.Module):
    """A Fourier layer, with complex weights or the same as pairs of real numbers."""

    def __init__(self, is_complex, head=True):
        super().__init__()
        weight = torch.randn(4, 3, dtype=torch.cfloat)
        self.scale = nn.Parameter(torch.randn(5))  # an odd number before
        self.weight = nn.Parameter(weight if is_complex else torch.view_as_real(weight).clone())
        self.head = nn.Linear(6, 3) if head else nn.Identity()

    def forward(self, x):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return self.head(torch.fft.irfft(torch.fft.rfft(x) @ weight, n=6) * self.scale.sum())[:, :3]


def spectral(is_complex, head=True):
    torch.manual_seed(0)
    net = Spectral(is_complex, head)
    return net._apply(lambda t: t.to(torch.complex128 if t.is_complex() else torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_complex_weights_are_pairs_of_real_numbers(family, chunk_size):
    results = []
    for is_complex in (True, False):
        step = make_step(spectral(is_complex), FAMILIES[family], lr=0.5, chunk_size=chunk_size)
        before = step.posterior.buffer.flat.clone()
        results.append([step(X, Y, 8).nelbo for _ in range(3)] + [members(step, chunk_size=chunk_size)])
        results[-1] += [step.posterior.state_dict()[name] for name in sorted(step.posterior.state_dict())]
        assert not torch.equal(step.posterior.buffer.flat, before)
        if is_complex:
            net = step.posterior.module
            assert net.weight.dtype == torch.complex128
            step.posterior.load_state_dict({k: v.clone() for k, v in step.posterior.state_dict().items()})
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_outputs_have_to_be_real():
    class Powers(nn.Module):
        def __init__(self, give):
            super().__init__()
            self.layer, self.give = nn.Linear(6, 3).double(), give

        def forward(self, x):
            return self.give(self.layer(x))

    for give, dtype in ((torch.fft.fft, "complex128"), (lambda y: y.argmax(1), "int64"), (lambda y: y > 0, "bool")):
        with pytest.raises(ConfigError, match=f"numbers of torch.{dtype}"):
            make_step(Powers(give))(X, Y, 8)
    picked = posteriors.MeanFieldGaussian(Powers(torch.fft.fft), output=torch.abs)
    assert make_step(None, lambda _: picked)(X, Y, 8).data_term > 0


@pytest.mark.parametrize("kind", ["embedding", "bag"])
@pytest.mark.parametrize("deterministic", [(), ("embedding",)])
@pytest.mark.parametrize("family", ["mean_field", "low_rank"])
def test_sparse_gradients_are_those_of_a_dense_table(kind, deterministic, family):
    tokens, states = torch.arange(16).view(8, 2) % 5, []
    for is_sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(9, 4, sparse=is_sparse) if kind == "embedding" else nn.EmbeddingBag(9, 8, sparse=is_sparse)
        net = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 3)).double()
        step = make_step(net, FAMILIES[family], lr=0.5, deterministic=deterministic)
        step(tokens, Y, 8), step(tokens, Y, 8)
        states.append(step.posterior.buffer.flat)
    assert torch.equal(*states)


# --- norms of other libraries ---------------------------------------------------------------------------


def norm_class(name, shapes):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            for key, shape in shapes.items():
                self.register_parameter(key, nn.Parameter(torch.ones(shape)))

        def forward(self, x):
            return x

    Norm.__name__ = name
    return Norm()


@pytest.mark.parametrize(
    ("name", "shapes", "is_norm"),
    [
        *((name, {"weight": (8,)}, True) for name in ("LlamaRMSNorm", "T5LayerNorm", "GroupNorm32", "ScaleNorm", "RMSNormGated")),
        ("GlobalResponseNorm", {"weight": (1, 1, 1, 8), "bias": (1, 1, 1, 8)}, True),
        ("LayerNorm2d", {"g": (8, 1, 1)}, True),
        ("ScaleNorm", {"g": ()}, True),
        ("NormedLinear", {"weight": (8, 8)}, False),
        ("Affine", {"weight": (8,)}, False),
    ],
)  # fmt: skip
def test_a_norm_is_known_by_its_name_and_its_vectors(name, shapes, is_norm):
    net = nn.Sequential(nn.Linear(8, 8), norm_class(name, shapes), nn.Linear(8, 3))
    names = {f"1.{key}" for key in shapes}
    posterior = posteriors.MeanFieldGaussian(net)
    assert names <= set(posterior.point if is_norm else posterior.random)
    posterior = posteriors.MeanFieldGaussian(net, deterministic=())
    assert names <= set(posterior.random)


@pytest.mark.parametrize("deterministic", [("norm", "embedding"), ("norm",), (nn.Linear,), ("embedding", nn.LayerNorm)])
def test_scripted_layers_are_known_by_what_they_were(deterministic):
    layers = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3)
    plain, scripted = nn.Sequential(*layers), torch.jit.script(nn.Sequential(*layers))
    expected = posteriors.MeanFieldGaussian(plain, deterministic=deterministic)
    posterior = posteriors.MeanFieldGaussian(scripted, deterministic=deterministic)
    assert list(posterior.point) == list(expected.point) and list(posterior.random) == list(expected.random)


# --- what a look finds out --------------------------------------------------------------------------------


class Keeps(nn.Module):
    """Keeps something from one forward pass for the next."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight, self.layer = kind, nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)
        self.table, self.calls, self.last = None, 0, {}
        self.register_buffer("state", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if self.kind == "table":
            if self.table is None:
                self.table = self.weight.detach().softmax(0)
            return self.layer(x @ self.table)
        if self.kind == "dictionary":
            return self.layer(x @ self.last.setdefault("w", self.weight.detach().softmax(0)))
        y = self.layer(x @ self.weight)
        if self.kind == "attribute":
            y, self.last = y + self.last.get("y", 0), {"y": y.detach().mean()}
        if self.kind == "graph":
            y, self.last = y + self.last.get("y", 0), {"y": y.mean()}
        if self.kind == "graph that is cut":
            y, self.last = y + (self.last["y"].detach() if self.last else 0), {"y": y.mean()}
        if self.kind == "buffer":
            y, self.state = y + self.state, y.detach().mean().to(self.state)
        if self.kind == "unused state":
            self.state += y.detach().mean()
        return y


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize(
    "kind", ["table", "dictionary", "attribute", "graph", "graph that is cut", "buffer", "unused state", "counter"]
)
def test_what_one_sample_keeps_for_the_next_is_refused_or_said(kind, chunk_size, caplog):
    step = make_step(seeded(lambda: Keeps(kind)), init_std=0.3, chunk_size=chunk_size)
    if kind in ("table", "dictionary"):
        with pytest.raises(ConfigError, match=r"Keeps.*|table|last.*keeps it from one sample"):
            step(X, Y, 8)
        return
    if kind == "graph":
        with pytest.raises(ConfigError, match=r"last: its forward pass keeps it with its graph.*state\.detach\(\)"):
            step(X, Y, 8)
        return
    step(X, Y, 8)
    assert step.posterior.module.calls == 4
    said = "keeps something of one sample for the next" in caplog.text
    assert said is (kind in ("attribute", "graph that is cut", "buffer"))


class Observes(nn.Module):
    """Has a buffer that is empty before the first batch, as an observer of torch's quantisation."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("most", torch.zeros(0))

    def forward(self, x):
        self.most.resize_(6).copy_(x.amax(0))
        return self.layer(x)


def test_a_buffer_that_gets_its_shape_in_the_first_pass_is_put_back():
    step = make_step(seeded(Observes))
    members(step)
    assert step.posterior.module.most.shape == (0,)
    step(X, Y, 8)
    assert torch.equal(step.posterior.module.most, X.amax(0))


class OfBatch(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.last = nn.Linear(6, 6), how, nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.how(self.layer(x)))


class Attends(nn.TransformerEncoderLayer):
    def forward(self, x):
        return super().forward(x.unsqueeze(0)).squeeze(0)  # with the sequence first each example sees itself alone


OF_BATCH = {
    "centred": (lambda: OfBatch(lambda x: x - x.mean(0)), True),
    "scaled": (lambda: OfBatch(lambda x: x / x.norm()), True),
    "attention over the batch": (lambda: OfBatch(Attends(6, 2, 8, 0.1, batch_first=True)), True),
    "attention": (lambda: OfBatch(Attends(6, 2, 8, 0.1)), False),
    "itself": (lambda: OfBatch(lambda x: x - x.mean(1, keepdim=True)), False),
    "dropout": (lambda: OfBatch(nn.Dropout(0.5)), False),
    "BatchNorm": (lambda: OfBatch(nn.BatchNorm1d(6)), False),
}


@pytest.mark.parametrize("num_examples", [2, 7])
@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("name", OF_BATCH)
def test_outputs_that_depend_on_the_examples_beside_them_are_said(name, predicts, num_examples, caplog):
    make_net, is_said = OF_BATCH[name]
    step, x = make_step(seeded(make_net), init_std=0.3), X[:num_examples]
    if predicts:
        predict_classes(step.posterior, CLASSES, COMM, x, num_samples=2)
    else:
        step(x, Y[:num_examples], num_examples)
    assert ("depend on the examples beside it" in caplog.text) is is_said


class Bag(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, **options), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.table(ids).sum(1))


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"padding_idx": 0}, {}])
@pytest.mark.parametrize("deterministic", ["embedding", ()])
def test_what_an_embedding_does_by_batch_or_to_single_rows_is_refused_or_said(option, deterministic, caplog):
    step = make_step(seeded(lambda: Bag(**option)), deterministic=deterministic)
    step(torch.arange(16).view(8, 2) % 9, Y, 8)
    assert ("row of padding_idx" in caplog.text) is ("padding_idx" in option and deterministic == ())
    is_by_count = "scale_grad_by_freq" in option
    for feature in ("micro_batches", "data_axis"):
        moves_rows = feature == "data_axis" and "max_norm" in option and deterministic == "embedding"
        context = contextlib.nullcontext()
        if is_by_count or moves_rows:
            context = pytest.raises(ConfigError, match="whole batch.*Leave" if is_by_count else "replicas drift.*Leave")
        with context:
            step.posterior.check_features(**{feature: True})


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Spread(nn.InstanceNorm1d(6, track_running_stats=True)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    ],
    ids=["InstanceNorm", "spectral norm", "spectral norm of old"],
)
def test_state_that_depends_on_the_number_of_samples_of_a_rank_is_said(layer):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 6), layer(), nn.Linear(6, 3)))
    posterior = posteriors.MeanFieldGaussian(net, init_std=0.3)
    posterior.begin_()
    look = posterior.network.look(X, lambda s: posterior.draw_(Key(0, Stream.NOISE, sample=s)), (0, 1))
    several = " ".join(look.warnings(world_size=2))
    assert "changes the buffers" in several or "keeps something of one sample for the next" in several, several
    assert ("changes the buffers" in several) == (look.warnings(world_size=1) == [])


class Spread(nn.Module):
    """Gives an InstanceNorm places to take its statistics over."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x[..., None] * torch.arange(1.0, 4.0, dtype=x.dtype)).mean(-1) + x


class Clipping(nn.Module):
    """Clips a weight in each forward pass, as critics of Wasserstein distances do."""

    def __init__(self, way, norm):
        super().__init__()
        self.layer, self.norm, self.way = nn.Linear(6, 6), norm, way
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for weight in (self.layer.weight, *self.norm.parameters()):
            if self.way == "other memory":
                weight.data = weight.data.clamp(-0.1, 0.1)
            elif self.way == "in place":
                weight.data.clamp_(-0.1, 0.1)
            else:
                with torch.no_grad():
                    weight.clamp_(-0.1, 0.1)
        return self.head(self.norm(self.layer(x)))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(6)])
@pytest.mark.parametrize("way", ["other memory", "in place", "without gradient"])
def test_a_forward_pass_may_write_weights_but_not_move_them(way, norm):
    step = make_step(seeded(lambda: Clipping(way, norm)), init_std=0.3)
    if way == "other memory":
        for call in (lambda: step(X, Y, 8), lambda: members(step)):
            with pytest.raises(ConfigError, match=r"layer.weight.*other memory .*weight\.data\.copy_"):
                call()
        return
    results = [step(X, Y, 8).data_term for _ in range(2)]
    assert results[0] != results[1] and (members(step).std(1) > 1e-3).all()
    assert step.posterior.module.layer.weight.abs().max() > 0.1  # the mean


class Cut(nn.Module):
    """Some of its weights reach the outputs without a gradient, or not at all."""

    def __init__(self, how):
        super().__init__()
        self.how, self.used, self.other = how, nn.Linear(6, 3), nn.Linear(6, 3)
        self.held = [self.other.weight.detach().clone().double()]

    def forward(self, x):
        y = self.used(x)
        if self.how == "all":
            return (y + self.other(x)).detach()
        if self.how == "detached":
            return y + self.other(x).detach()
        if self.how == "without gradient":
            with torch.no_grad():
                z = self.other(x)
            return y + z
        if self.how == "rounded":
            return y + self.other(x).argmax(1, keepdim=True)
        if self.how == "copied":
            return y + F.linear(x, self.held[0])
        return y if self.how == "unused" else y + self.other(x)


@pytest.mark.parametrize("estimator", ["reparameterisation", "local", "flipout"])
@pytest.mark.parametrize("how", ["detached", "without gradient", "rounded", "copied", "unused", "used"])
def test_weights_without_a_gradient_are_named(how, estimator, caplog):
    step = make_step(seeded(lambda: Cut(how)), init_std=0.3, estimator=estimator)
    for _ in range(2):
        step(X, Y, 8)
    said = [r.getMessage() for r in caplog.records if "no gradient reaches" in r.getMessage()]
    assert len(said) == (how != "used")
    if said:
        assert "other.weight, other.bias of Cut" in said[0]
        assert ("do not depend on them" in said[0]) is (how in ("copied", "unused"))


class Checkpointed(nn.Module):
    """A part of it, or all, runs once more in the backward pass."""

    def __init__(self, part, use_reentrant):
        super().__init__()
        self.first, self.head, self.part, self.use_reentrant = nn.Linear(6, 6), nn.Linear(6, 3), part, use_reentrant

    def run(self, function, x):
        if self.use_reentrant is None:
            return function(x)
        return checkpoint(function, x.clone().requires_grad_(), use_reentrant=self.use_reentrant)

    def forward(self, x):
        if self.part == "all":
            return self.run(lambda x: self.head(self.first(x).tanh()), x)
        return self.head(self.run(lambda x: self.first(x).tanh(), x))


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("estimator", ["reparameterisation", "local", "flipout"])
@pytest.mark.parametrize("part", ["some", "all"])
def test_weights_of_checkpointed_blocks_have_a_gradient(part, estimator, chunk_size, caplog):
    results = []
    for use_reentrant in (None, False, True):
        net = seeded(lambda: Checkpointed(part, use_reentrant))  # noqa: B023
        chunk = 1 if use_reentrant is None else chunk_size
        step = make_step(net, estimator=estimator, init_std=0.3, lr=0.5, chunk_size=chunk)
        results.append([step(X, Y, 8).nelbo for _ in range(3)])
    assert results[0] == results[1] == results[2]  # what cannot be batched walks
    assert "no gradient reaches" not in caplog.text


class FailsInBackward(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head, self.fails = nn.Linear(6, 6), nn.Linear(6, 3), False

    def forward(self, x):
        y = self.first(x)
        if self.fails and y.requires_grad:
            y.register_hook(self.fail)
        return self.head(y)

    def fail(self, gradient):
        raise ValueError("in the backward pass")


@pytest.mark.parametrize("estimator", ["reparameterisation", "local", "flipout"])
def test_a_backward_pass_that_failed_leaves_no_gradient_behind(estimator):
    step, plain = (make_step(seeded(FailsInBackward), estimator=estimator, init_std=0.3, lr=0.5) for _ in range(2))
    for each in (step, plain):
        each(X, Y, 8)
    step.posterior.module.fails = True
    with pytest.raises(ValueError, match="in the backward pass"):
        step(X, Y, 8)
    step.posterior.module.fails = False
    assert [step(X, Y, 8) for _ in range(2)] == [plain(X, Y, 8) for _ in range(2)]
    assert torch.equal(step.posterior.buffer.flat, plain.posterior.buffer.flat)


def test_outputs_without_any_gradient_are_an_error():
    with pytest.raises(ConfigError, match="Cut: no gradient reaches any of its weights"):
        make_step(seeded(lambda: Cut("all")))(X, Y, 8)
    assert members(make_step(seeded(lambda: Cut("all")))).std(1).max() > 0


# --- predictions in chunks ---------------------------------------------------------------------------------


class Held(nn.Module):
    """Reads a weight from somewhere else, where functional_call does not put it."""

    def __init__(self, where):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 3)
        self.where, self.kept, self.cache = where, [], None

    def forward(self, x):
        if self.where == "list":
            return self.layer(x @ self.kept[0])
        if self.where == "closure":
            return self.layer(self.kept[0](x))
        if self.where == "cache":
            if self.cache is None:
                self.cache = self.weight.softmax(0)
            return self.layer(x @ self.cache)
        return self.layer(x @ self.weight)


@pytest.mark.parametrize("init_std", [0.3, 1e-4])
@pytest.mark.parametrize("where", ["list", "closure", "cache", "where it belongs"])
def test_members_of_a_prediction_in_chunks_are_those_of_a_walk(where, init_std, caplog):
    def make():
        net = seeded(lambda: Held(where))
        net.kept = [net.weight if where == "list" else lambda x: x @ net.weight.view(6, 6)]
        if where == "closure":
            weight = net.weight
            net.kept = [lambda x: x @ weight]
        net.eval()
        return net

    walked = members(make_step(make(), init_std=init_std))
    step = make_step(make(), init_std=init_std)
    for size in (4, 3, 2):
        torch.testing.assert_close(members(step, chunk_size=size), walked, rtol=1e-9, atol=1e-12)
    assert (walked.std(1) > 0).all()
    assert caplog.text.count("evaluated one after another") == (where != "where it belongs")


# --- outputs and targets --------------------------------------------------------------------------------

SHAPES = [(), (1,), (2,), (3,), (6,), (3, 2), (2, 3), (3, 2, 2)]
TARGETS = [torch.long, torch.float64]


class Shaped(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, self.layer = shape, nn.Linear(6, max(torch.Size(shape).numel(), 1))

    def forward(self, x):
        return self.layer(x).view(len(x), *self.shape)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(("outputs", "targets"), list(itertools.product(SHAPES, SHAPES)))
def test_classes_of_any_shape_are_those_of_torch_or_an_error_that_names_both(outputs, targets, dtype):
    step = make_step(seeded(lambda: Shaped(outputs)), init_std=1e-9, num_samples=1)
    y = torch.zeros(8, *targets, dtype=dtype)
    y = y + 1 / 3 if dtype == torch.float64 else y
    fits = outputs[:1] == (3,) and (targets == outputs if dtype == torch.float64 else targets == outputs[1:])
    if not fits:
        with pytest.raises((ConfigError, DataError)) as error:
            step(X, y, 8)
        found = str(error.value)
        assert isinstance(error.value, DataError) or (str([8, *outputs]) in found and str([8, *targets]) in found)
        return
    expected = F.cross_entropy(step.posterior.module(X), y, reduction="sum").item() / 8
    assert step(X, y, 8).data_term == pytest.approx(expected, rel=1e-6)
    p = predict_classes(step.posterior, CLASSES, COMM, X, num_samples=1, keep_members=True)
    torch.testing.assert_close(p.probabilities, step.posterior.module(X).softmax(1).detach(), rtol=1e-6, atol=0)
    assert p.entropy.shape == p.mutual_information.shape == (8, *outputs[1:]) and p.members.shape == (8, 1, *outputs)


NUMBERS = {
    "gaussian": lambda n: hpc_bnn.Gaussian(n, 0.5),
    "student_t": lambda n: hpc_bnn.StudentT(n, 0.5),
    "heteroscedastic": hpc_bnn.Gaussian,
    "poisson": hpc_bnn.Poisson,
    "bernoulli": hpc_bnn.Bernoulli,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(("outputs", "targets"), list(itertools.product(SHAPES, SHAPES)))
def test_numbers_of_any_shape_fit_or_are_an_error_that_names_both(outputs, targets, name):
    likelihood = NUMBERS[name](3)
    step = make_step(seeded(lambda: Shaped(outputs)), likelihood=likelihood)
    y = torch.zeros(8, *targets, dtype=torch.float64)
    of_means = (3, *outputs[1:]) if name == "heteroscedastic" and outputs[:1] == (6,) else outputs
    alike = {of_means} | ({of_means[1:]} if of_means[:1] == (1,) else set())
    if targets in alike and (name != "heteroscedastic" or outputs[:1] == (6,)):
        assert step(X, y, 8).data_term != 0
        assert predict_values(step.posterior, likelihood, COMM, X, y, num_samples=2).log_prob.shape == (8,)
        return
    with pytest.raises(ConfigError) as error:
        step(X, y, 8)
    assert str([8, *(outputs if "scale" in str(error.value) else of_means)]) in str(error.value)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("num_targets", [0, 4, 7, 16])
def test_as_many_targets_as_examples(num_targets, micro_batch_size):
    step = make_step(mlp(), micro_batch_size=micro_batch_size)
    with pytest.raises(ConfigError, match=rf"y \[{num_targets}\]: x has 8 examples"):
        step(X, torch.zeros(num_targets, dtype=torch.long), 8)
    with pytest.raises(ConfigError, match=r"y \[\]: x has 8 examples"):
        step(X, torch.zeros((), dtype=torch.long), 8)
    step(X, Y, 8)
