"""What a network takes and returns: trees of tensors; parts of a batch; classes of a user by their import path."""

import collections
import dataclasses
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hpc_bnn import (
    Categorical,
    DeepEnsemble,
    Family,
    Gaussian,
    Grid,
    GridComm,
    LogPredictive,
    MeanFieldGaussian,
    Posterior,
    VariationalStep,
    predict_classes,
)
from hpc_bnn.capabilities import Capabilities
from hpc_bnn.config import LikelihoodConfig, OptimizerConfig, PosteriorConfig
from hpc_bnn.errors import ConfigError
from hpc_bnn.likelihoods import build_likelihood
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import Slot, build_posterior
from hpc_bnn.training import KlAnnealing
from hpc_bnn.training.schedules import learning_rate_factor
from hpc_bnn.views import Views

COMM = GridComm(Grid())
X = torch.randn(11, 4, generator=Key(1, Stream.DATA_ORDER).generator(), dtype=torch.float64)
MORE = X.flip(0).contiguous()
Y = torch.arange(11) % 3


class Net(nn.Module):
    """Two inputs; returns what ``wrap`` makes of the outputs."""

    def __init__(self, wrap=lambda outputs: outputs):
        super().__init__()
        self.a, self.b, self.head, self.wrap = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3), wrap

    def forward(self, x, more=None):
        hidden = self.a(x) + (0 if more is None else self.b(more))
        return self.wrap(self.head(hidden.tanh()))


def make(wrap=lambda outputs: outputs, output=None, **options):
    with Key(0, Stream.INIT).global_generator():
        net = Net(wrap).double()
    posterior = MeanFieldGaussian(net, init_std=0.2, output=output)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    return VariationalStep(posterior, Categorical(3), optimizer, COMM, num_samples=5, num_train_examples=40, **options)


WRAPS = {
    "dict": (lambda outputs: {"logits": outputs, "hidden": None}, "logits"),
    "object": (lambda outputs: SimpleNamespace(logits=outputs, loss=None), "logits"),
    "tuple": (lambda outputs: (None, outputs), 1),
    "function": (lambda outputs: [{"y": outputs}], lambda outputs: outputs[0]["y"]),
}


class Graph(nn.Module):
    """One convolution over the neighbours of each node (Kipf and Welling, 2017)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, neighbours):
        return neighbours @ self.linear(x)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("form", ["to_sparse", "to_sparse_csr"])
def test_inputs_may_be_sparse(form, chunk_size):
    neighbours = (torch.arange(121).view(11, 11) % 5 == 0).double()
    terms = []
    for matrix in (neighbours, getattr(neighbours, form)()):
        with Key(0, Stream.INIT).global_generator():
            posterior = MeanFieldGaussian(Graph().double(), init_std=0.2)
        step = VariationalStep(
            posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
            num_samples=3, num_train_examples=11, chunk_size=chunk_size,
        )  # fmt: skip
        terms.append([step((X, matrix), Y, 11).data_term for _ in range(2)])
    assert terms[0] == pytest.approx(terms[1], rel=1e-12) and terms[0][0] != terms[0][1]


@pytest.mark.parametrize("inputs", [{"x": X, "more": MORE}, (X, MORE), [X, MORE]], ids=["dict", "tuple", "list"])
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_inputs_may_be_trees(inputs, chunk_size):
    """The same numbers as by a network that takes one tensor and divides it itself."""

    class Joined(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(*x.chunk(2, 1))

    step = make(chunk_size=chunk_size)
    with Key(0, Stream.INIT).global_generator():
        net = Joined(Net()).double()
    posterior = MeanFieldGaussian(net, init_std=0.2)
    joined = VariationalStep(
        posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
        num_samples=5, num_train_examples=40,
    )  # fmt: skip
    for _ in range(2):
        result, expected = step(inputs, Y, 11), joined(torch.cat([X, MORE], 1), Y, 11)
        assert result.nelbo == pytest.approx(expected.nelbo, rel=1e-12)
    torch.testing.assert_close(step.posterior.loc, posterior.loc, rtol=1e-12, atol=1e-14)
    options = {"num_samples": 6, "batch_size": 4, "chunk_size": chunk_size}
    got = predict_classes(step.posterior, step.likelihood, COMM, inputs, **options)
    expected = predict_classes(posterior, step.likelihood, COMM, torch.cat([X, MORE], 1), num_samples=6)
    torch.testing.assert_close(got.probabilities, expected.probabilities, rtol=1e-12, atol=1e-14)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    more: torch.Tensor
    size: torch.Size = dataclasses.field(default_factory=lambda: torch.Size([4]))


@dataclasses.dataclass(slots=True)
class Derived:
    x: torch.Tensor
    more: torch.Tensor
    twice: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.twice = 2 * self.x


@pytest.mark.parametrize("pair", [collections.namedtuple("Pair", ["x", "more"]), Frozen, Derived])
def test_a_namedtuple_or_dataclass_among_the_inputs_stays_one(pair):
    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, pair):
            assert not isinstance(pair, Frozen) or isinstance(pair.size, torch.Size)
            return self.net(pair.x, pair.more)

    for options in ({}, {"chunk_size": 3}, {"micro_batch_size": 4}):
        with Key(0, Stream.INIT).global_generator():
            posterior = MeanFieldGaussian(Named(Net()).double(), init_std=0.2)
        step = VariationalStep(
            posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
            num_samples=5, num_train_examples=40, **options,
        )  # fmt: skip
        got, expected = (one({"pair": pair(X, MORE)} if one is step else (X, MORE), Y, 11) for one in (step, make()))
        assert got.nelbo == pytest.approx(expected.nelbo, rel=1e-12)


def test_changes_in_place_in_a_dataclass_do_not_reach_the_next_sample():
    class Shifts(Net):
        def forward(self, pair):
            pair.more.add_(1)
            return super().forward(pair.x, pair.more)

    terms = []
    for given in (Frozen(X, MORE.clone()), (X, MORE.clone())):
        with Key(0, Stream.INIT).global_generator():
            net = Shifts().double() if isinstance(given, Frozen) else Net().double()
        posterior = MeanFieldGaussian(net, init_std=0.2)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(posterior, Categorical(3), optimizer, COMM, num_samples=5, num_train_examples=40)
        x = [given] if isinstance(given, Frozen) else (X, MORE + 1)
        terms.append(step(x, Y, 11).data_term)
        assert not isinstance(given, Frozen) or torch.equal(given.more, MORE)
    assert terms[0] == pytest.approx(terms[1], rel=1e-12)


@pytest.mark.parametrize("kind", [collections.UserDict, types.MappingProxyType])
def test_a_mapping_is_what_a_dict_is(kind):
    for options in ({}, {"chunk_size": 3}, {"micro_batch_size": 4}):
        got, expected = (make(**options)(x, Y, 11).nelbo for x in (kind({"x": X, "more": MORE}), (X, MORE)))
        assert got == expected


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 3), nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 4)), nn.GRUCell(4, 3), nn.LayerNorm(4)],
)
def test_inputs_of_another_precision_than_the_weights_are_refused(layer):
    net = nn.Sequential(layer, nn.Flatten()).float()
    posterior = MeanFieldGaussian(net, deterministic=())
    with pytest.raises(
        ConfigError, match=r"torch.float64: the weights of Sequential are of torch.float32.*x.to\(torch.fl"
    ):
        predict_classes(posterior, Categorical(3), COMM, X, num_samples=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (MORE.to("meta"), r"meta: the weights of Net are on cpu. Give x.to\('cpu'\)"),
        (MORE.cfloat(), r"complex64, torch.float64: Net takes real numbers.*view_as_real"),
    ],
)
def test_inputs_on_another_device_or_with_imaginary_parts_are_refused(more, message):
    with pytest.raises(ConfigError, match=rf"^inputs of the network .*{message}"):
        make()((X, more), Y, 11)


def test_tensors_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"^x \[5, 11\]: all tensors .* same extent of dim 0"):
        make()({"x": X, "more": MORE[:5]}, Y, 11)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "pack",
    [
        lambda x: torch.nested.nested_tensor(list(x)),
        lambda x: {"x": nn.utils.rnn.pack_padded_sequence(x, [4] * 6 + [2] * 5, batch_first=True)},
    ],
    ids=["nested", "packed"],
)
def test_inputs_whose_examples_are_no_rows_are_refused(pack):
    with pytest.raises(ConfigError, match=r"^x of type .*no rows.*padded tensors.*in forward"):
        make()(pack(X), Y, 11)


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_outputs_are_picked(name, chunk_size):
    wrap, output = WRAPS[name]
    step, expected = make(wrap, output, chunk_size=chunk_size), make(chunk_size=chunk_size)
    assert [step(X, Y, 11) for _ in range(2)] == [expected(X, Y, 11) for _ in range(2)]
    got, plain = (predict_classes(s.posterior, s.likelihood, COMM, X, num_samples=4) for s in (step, expected))
    assert torch.equal(got.probabilities, plain.probabilities)


@pytest.mark.parametrize("name, output", [("dict", None), ("dict", "logit"), ("object", "logit"), ("tuple", 7)])
def test_outputs_that_are_not_picked_are_an_error_with_the_remedy(name, output):
    with pytest.raises(ConfigError, match=r"^output .*returns.* Say which tensor"):
        make(WRAPS[name][0], output)(X, Y, 11)


def test_a_place_in_a_tensor_is_an_error_in_either_mode():
    with pytest.raises(ConfigError, match="the place would be an example"):
        make(output=0)(X, Y, 11)
    step = make(output=0)
    step.posterior.module.wrap = lambda y: (y, y / 2) if step.posterior.module.training else y
    step(X, Y, 11)
    with pytest.raises(ConfigError, match="the place would be an example"):
        predict_classes(step.posterior, step.likelihood, COMM, X, num_samples=4)


# --- parts of a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 11, 100])
@pytest.mark.parametrize(
    "options", [{}, {"objective": LogPredictive()}, {"chunk_size": 2}], ids=["plain", "coupled", "chunks"]
)
def test_micro_batches_give_the_step_of_the_whole_batch(size, options):
    views = Views(X, range(5), lambda x, number: x * (1 + 0.1 * number))
    for inputs in (X, views):
        step, expected = make(micro_batch_size=size, **options), make(**options)
        for _ in range(2):
            got, whole = step(inputs, Y, 11), expected(inputs, Y, 11)
            assert got.nelbo == pytest.approx(whole.nelbo, rel=1e-12)
        torch.testing.assert_close(step.posterior.loc, expected.posterior.loc, rtol=1e-12, atol=1e-14)


def test_micro_batches_bound_the_examples_of_a_pass():
    step, seen = make(micro_batch_size=4), []
    step.posterior.module.a.register_forward_hook(lambda layer, args, outputs: seen.append(len(outputs)))
    step(X, Y, 11), seen.clear()
    step(X, Y, 11)
    assert seen == [4] * 5 + [4] * 5 + [3] * 5


def test_micro_batches_refuse_batch_norm():
    posterior = MeanFieldGaussian(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    with pytest.raises(ConfigError, match=r"^micro_batch_size 4: BatchNorm takes its statistics of the whole batch"):
        VariationalStep(
            posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
            num_samples=2, num_train_examples=9, micro_batch_size=4,
        )  # fmt: skip


def test_the_order_of_a_step_is_asserted():
    step = make()
    with pytest.raises(ConfigError, match=r"reduce_: accumulate_\(.*\) comes before it, and the step is idle"):
        step.reduce_()
    step.accumulate_(X[:4], Y[:4], 11, is_last=False)
    with pytest.raises(ConfigError, match="reduce_: accumulate_"):
        step.reduce_()
    step.accumulate_(X[4:], Y[4:], 11)
    with pytest.raises(ConfigError, match=r"update_: reduce_\(\) comes before it"):
        step.update_()
    step.reduce_()
    result = step.update_()
    assert result.nelbo == pytest.approx(make()(X, Y, 11).nelbo, rel=1e-12)


@pytest.mark.parametrize("batching", ["auto", "walking", "vmap"])
def test_batching_says_how_samples_are_evaluated(batching):
    """Members of an ensemble walk unless vmap is named; the calls of a step are counted."""
    calls = []

    def net():
        module = nn.Linear(4, 3).double()
        module.register_forward_hook(lambda *_: calls.append(1))
        return module

    counts = {}
    for name in ("mean_field", "ensemble"):
        posterior = MeanFieldGaussian(net()) if name == "mean_field" else DeepEnsemble(net, 6, range(6))
        step = VariationalStep(
            posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM,
            num_samples=6, num_train_examples=9, chunk_size=3, batching=batching,
        )  # fmt: skip
        step(X, Y, 11)
        calls.clear()
        step(X, Y, 11)
        counts[name] = len(calls)
    assert counts == {"mean_field": 6 if batching == "walking" else 2, "ensemble": 2 if batching == "vmap" else 6}


# --- by import path --------------------------------------------------------------------------------------


class Spread(Family):
    """Gaussian with one scale for all weights, which a config knows by its path."""

    name = "one scale"
    capabilities = Capabilities("closed form")

    def __init__(self, std=0.1):
        self.std = std

    def slots(self, weights, layout, samples):
        return {"loc": Slot(weights), "log_std": Slot(weights.new_tensor([self.std]).log(), per_weight=False)}

    def sample_(self, slots, work, samples, draw, out):
        draw.affine_(slots["loc"], slots["log_std"].exp().expand_as(slots["loc"]), out)

    def pull_back_(self, grads, slots, work, samples, g, draw):
        product = torch.zeros_like(slots["loc"])
        draw.fold_(g, grads["loc"], product)
        grads["log_std"].add_(product.sum() * slots["log_std"].exp())

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        loc, log_std = slots["loc"], slots["log_std"]
        if grads is not None:
            grads["loc"].addcmul_(loc, scalars.kl_weight)
            grads["log_std"].addcmul_(len(loc) * ((2 * log_std).exp() - 1), scalars.kl_weight)
        return 0.5 * (loc.square().sum() + len(loc) * ((2 * log_std).exp() - 2 * log_std - 1)).sum()


class Rounded(Gaussian):
    def __init__(self, num_targets, width=1.0):
        super().__init__(num_targets, scale=width)


def half(done):
    return 0.5 * done


def test_a_family_of_a_user_by_its_import_path():
    def build(**options):
        config = PosteriorConfig(family=f"{__name__}.Spread", **options)
        return build_posterior(config, lambda: nn.Linear(3, 2), num_samples=4, local_samples=range(4), seed=0)

    posterior = build(arguments={"std": 0.3})
    assert isinstance(posterior, Posterior) and posterior.family == "one scale"
    assert posterior.state_dict()["log_std"].exp().item() == pytest.approx(0.3)
    with pytest.raises(ConfigError, match=r"^arguments .*refuses them"):
        build(arguments={"nonsense": 0.3})
    with pytest.raises(ConfigError, match="mean-field family only"):
        build(estimator="local")
    for path, why in (("nowhere.Family", "cannot be imported"), (f"{__name__}.Rounded", "a Family is needed")):
        config = PosteriorConfig(family=path, arguments={"num_targets": 2} if "Rounded" in path else {})
        with pytest.raises(ConfigError, match=why):
            build_posterior(config, lambda: nn.Linear(3, 2), num_samples=4, local_samples=range(4), seed=0)


def test_a_likelihood_and_schedules_of_a_user_by_their_import_paths():
    config = LikelihoodConfig(f"{__name__}.Rounded", arguments={"width": 0.25})
    likelihood = build_likelihood(config, None, (3,))
    assert isinstance(likelihood, Rounded) and likelihood.num_targets == 3
    config = OptimizerConfig(schedule=f"{__name__}.half", warmup_epochs=2)
    assert [learning_rate_factor(config, epochs, 10) for epochs in (1, 2, 6, 10)] == [0.5, 0.0, 0.25, 0.5]
    annealing = KlAnnealing(0.8, f"{__name__}.half", 4)
    assert [annealing(step) for step in (0, 4)] == [0.0, 0.4]


def test_rows_that_belong_to_other_samples_are_refused():
    from hpc_bnn.posteriors.families import Ensemble

    posterior = Posterior(nn.Linear(4, 3), Ensemble(6), samples=range(4))
    with pytest.raises(ConfigError, match=r"belong to the samples 0 to 3, and this rank is asked for 0 to 5"):
        predict_classes(posterior, Categorical(3), COMM, X.float(), num_samples=6)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_numbers_for_an_embedding_name_the_flag_that_keeps_ids_whole(layer, chunk_size):
    width = 12 if layer is nn.Embedding else 3
    posterior = MeanFieldGaussian(nn.Sequential(layer(5, 3), nn.Flatten(), nn.Linear(width, 3)).double())
    step = VariationalStep(
        posterior, Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), COMM, num_samples=2,
        num_train_examples=11, chunk_size=chunk_size,
    )  # fmt: skip
    words = r"inputs of the network torch.float64: an nn.Embedding of Sequential takes whole numbers\. .*--ids"
    with pytest.raises(ConfigError, match=words):
        step(X, Y, 11)
    with pytest.raises(ConfigError, match=words):
        predict_classes(posterior, Categorical(3), COMM, X, num_samples=2, chunk_size=chunk_size)
    step((4 * X.sigmoid()).long(), Y, 11)


class Rows(nn.Module):
    """A table that a user wrote."""

    def __init__(self, num_rows, width):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_rows, width))

    def forward(self, ids):
        return self.table[ids]


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize(
    ("layer", "size"), [(nn.Embedding, "num_embeddings 5"), (nn.EmbeddingBag, "num_embeddings 5"), (Rows, "size 5")]
)
def test_ids_that_a_table_does_not_have_are_named(layer, size, chunk_size):
    width = 3 if layer is nn.EmbeddingBag else 12
    posterior = MeanFieldGaussian(nn.Sequential(layer(5, 3), nn.Flatten(), nn.Linear(width, 3)).double())
    options = {"num_samples": 2, "chunk_size": chunk_size}
    step = VariationalStep(
        posterior,
        Categorical(3),
        torch.optim.SGD(posterior.parameters(), lr=0.1),
        COMM,
        num_train_examples=11,
        **options,
    )
    ids = (4 * X.sigmoid()).long()
    step(ids, Y, 11)
    ids[3, 1] = 7
    words = rf"inputs of the network 0 to 7: Sequential has no row for one of these ids \(.*{size}.*\). Give ids"
    with pytest.raises(ConfigError, match=words):
        step(ids, Y, 11)
    with pytest.raises(ConfigError, match=words):
        predict_classes(posterior, Categorical(3), COMM, ids, **options)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GELU(), nn.RNN(4, 3)])
def test_whole_numbers_for_a_layer_of_floats_are_an_error_with_the_way(layer):
    layers = [layer, nn.Linear(4, 3)] if not isinstance(layer, (nn.Linear, nn.RNN)) else [layer]
    posterior = MeanFieldGaussian(nn.Sequential(*layers), output=0 if isinstance(layer, nn.RNN) else None)
    with pytest.raises(
        ConfigError, match=r"inputs of the network torch.uint8: Sequential takes floating.*x\.float\(\)"
    ):
        predict_classes(posterior, Categorical(3), COMM, (9 * X.sigmoid()).to(torch.uint8), num_samples=2)
