"""What a user does to module, posterior or optimizer after the wrap is followed, or is an error that says what to do.

The law: after an edit between steps a posterior is what a new one is over a copy of its network, edited alike before the
wrap; or the next step and prediction raise `ConfigError`, and nothing has changed.
"""

import contextlib
import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hpc_bnn
from hpc_bnn import Categorical, Grid, GridComm, VariationalStep, posteriors, predict_classes
from hpc_bnn.errors import ConfigError
from hpc_bnn.training.updaters import ELEMENTWISE

COMM, CLASSES = GridComm(Grid()), Categorical(3)
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(8) % 3

FAMILIES = {
    "mean_field": posteriors.MeanFieldGaussian,
    "flipout": lambda net: posteriors.MeanFieldGaussian(net, estimator="flipout"),
    "local": lambda net: posteriors.MeanFieldGaussian(net, estimator="local"),
    "low_rank": posteriors.LowRankGaussian,
    "mc_dropout": posteriors.MCDropout,
    "deterministic": posteriors.DeterministicNetwork,
    "ensemble": lambda net: posteriors.DeepEnsemble(lambda: net, 1, range(1)),
}


OF_BATCHES = {"buffers", "momentum", "norm without statistics", "norm without variance", "cumulative momentum"}
"""Edits of BatchNorm, which an ensemble does not take."""


def make_net(family=""):
    torch.manual_seed(0)
    norm = nn.GroupNorm(2, 8) if family == "ensemble" else nn.BatchNorm1d(8)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), norm, nn.Dropout(0.3), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


def make_posterior(family):
    return FAMILIES[family](make_net(family))


def cases(edits):
    """Each edit after a step and a prediction, and before the first of them; families that rest in different ways."""
    pairs = [(family, True) for family in ("mean_field", "flipout", "mc_dropout", "ensemble")] + [("low_rank", False)]
    every = [(edit, *pair) for edit in edits for pair in pairs]
    return [case for case in every if case[1] != "ensemble" or case[0] not in OF_BATCHES]


def make_step(posterior, lr=0.0, num_samples=None, **options):
    num_samples = num_samples or (1 if posterior.family == "deep ensemble" else 4)
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(posterior.parameters(), lr=lr)
    return VariationalStep(
        posterior, CLASSES, optimizer, COMM, num_samples=num_samples, num_train_examples=10**6, **options
    )


def measured(step):
    """Return what a step and a prediction give, or the error that both raise."""

    def predict():
        options = {"num_samples": step.num_samples, "keep_members": True}
        return predict_classes(step.posterior, CLASSES, COMM, X, **options).members

    try:
        first, members = predict(), predict()
        result = step(X, Y, 8)
    except ConfigError as error:
        with pytest.raises(ConfigError):
            step(X, Y, 8)
        return None, str(error)
    assert torch.equal(first, members)
    return (result.data_term, result.kl), members


def optimised(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    F.cross_entropy(net(X), Y).backward()
    optimizer.step()


def averaged(net):
    twin = torch.optim.swa_utils.AveragedModel(net)
    twin.module[0].weight.data.add_(1.0)
    twin.update_parameters(net)
    for p, average in zip(net.parameters(), twin.module.parameters()):
        p.data.copy_(average)


def other_state(net):
    return {name: value + 0.1 if value.is_floating_point() else value for name, value in net.state_dict().items()}


FOLLOWED = {
    "in place": lambda net: [p.detach().mul_(1.5) for p in net.parameters()],
    "by data": lambda net: net[0].weight.data.add_(0.1),
    "by a view": lambda net: net[0].weight.detach().view(-1)[3:7].fill_(2.0),
    "initialised": lambda net: [nn.init.constant_(p, 0.2) for p in net.parameters()],
    "by apply": lambda net: net.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None),
    "loaded": lambda net: net.load_state_dict(other_state(net)),
    "loaded in part": lambda net: net.load_state_dict({"0.bias": torch.ones(8)}, strict=False),
    "trained": optimised,
    "averaged": averaged,
    "buffers": lambda net: [
        net[3].running_mean.fill_(0.5),
        setattr(net[3], "running_var", torch.full((8,), 3.0).double()),
    ],
    "momentum": lambda net: setattr(net[3], "momentum", 0.5),
    "eps": lambda net: setattr(net[3], "eps", 0.5),
    "activation": lambda net: net.__setitem__(2, nn.ReLU()),
    "hook": lambda net: net[0].register_forward_hook(lambda *args: args[2] + 1),
    "forward": lambda net: setattr(net[2], "forward", torch.sin),
    "evaluation mode": lambda net: net.eval(),
    "a layer in evaluation mode": lambda net: net[3].eval(),
    "the same dtype": lambda net: net.double().to("cpu"),
    "shared memory": lambda net: net.share_memory(),
    "compiled": lambda net: net.compile(backend="eager"),
    "called": lambda net: net(X),
    "without gradients": lambda net: net.zero_grad(set_to_none=False),
    "renamed": lambda net: setattr(net, "_modules", {f"layer{name}": layer for name, layer in net.named_children()}),
}
REFUSED = {
    "float32": (lambda net: net.float(), "converted or moved"),
    "16 bits": (lambda net: net[0].bfloat16(), "converted or moved"),
    "meta": (lambda net: net.to("meta"), "came into the network"),
    "emptied": (lambda net: net.to_empty(device="cpu"), "memory"),
    "as a vector": (
        lambda net: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(net.parameters()) + 1, net.parameters()
        ),
        "memory",
    ),
    "new data": (lambda net: setattr(net[5].weight, "data", torch.zeros(3, 8).double()), "5.weight: .*memory"),
    "assigned": (lambda net: net.load_state_dict(other_state(net), assign=True), "came into the network"),
    "new head": (lambda net: net.__setitem__(5, nn.Linear(8, 3).double()), "5.weight.* came into the network"),
    "new parameter": (lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(8, 6).double())), "came into"),
    "one more layer": (lambda net: net.append(nn.Linear(3, 3).double()), "6.weight.* came into"),
    "one layer less": (lambda net: net.__delitem__(0), "no longer in the network"),
    "tied": (lambda net: setattr(net[5], "bias", net[1].bias), "5.bias: it is no longer in the network"),
    "frozen": (lambda net: net[0].requires_grad_(False), "frozen after"),
    "weight norm": (lambda net: nn.utils.parametrizations.weight_norm(net[0]), "0.*original0"),
    "old weight norm": (lambda net: nn.utils.weight_norm(net[0]), "0.weight_g.* came into"),
    "second posterior": (lambda net: posteriors.MeanFieldGaussian(net), "memory"),
    "norm without statistics": (lambda net: setattr(net[3], "track_running_stats", False), "no running statistics"),
    "norm without variance": (lambda net: setattr(net[3], "running_var", None), "no running statistics"),
    "cumulative momentum": (lambda net: setattr(net[3], "momentum", None), "momentum=None"),
    "another norm": (lambda net: net.__setitem__(2, nn.BatchNorm1d(8, affine=False).double()), "this BatchNorm layer"),
    "alpha dropout": (lambda net: net.__setitem__(2, nn.AlphaDropout(0.5)), "cannot be keyed"),
    "parallel": (lambda net: net.__setitem__(2, nn.DataParallel(nn.Tanh())), "sums gradients by itself"),
}


@pytest.fixture
def reset():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("edit", "family", "is_late"), cases(FOLLOWED))
def test_an_edit_is_followed_as_if_it_were_made_before_the_wrap(edit, family, is_late, reset):
    step = make_step(make_posterior(family))
    if is_late:  # moves the statistics of BatchNorm, and has drawn
        measured(step)
    net = copy.deepcopy(step.posterior.module)  # an ordinary network
    for edited in (net, step.posterior.module):
        torch.manual_seed(2)
        FOLLOWED[edit](edited)
    step.num_steps = 0
    plain = make_step(FAMILIES[family](net))
    scales = [name for name in ("log_scale", "directions") if name in step.posterior.buffer.values]
    for name in scales:
        assert torch.equal(getattr(plain.posterior, name), getattr(step.posterior, name))
    (result, members), (expected, theirs) = measured(step), measured(plain)
    assert result is not None and result == pytest.approx(expected, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(members, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("edit", "family", "is_late"), cases(REFUSED))
def test_what_cannot_be_followed_is_refused(edit, family, is_late):
    change, message = REFUSED[edit]
    step = make_step(make_posterior(family), lr=0.1)
    if is_late:
        measured(step)
    before = step.posterior.buffer.flat.clone()
    change(step.posterior.module)
    if edit == "frozen":  # it predicts on
        with pytest.raises(ConfigError, match=message):
            step(X, Y, 8)
    else:
        result, error = measured(step)
        assert result is None
        with pytest.raises(ConfigError, match=message):
            raise ConfigError(error)
    assert torch.equal(step.posterior.buffer.flat, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_between_steps_the_module_is_an_ordinary_network(family):
    """Its outputs, its state and its averages are those of the mean (of the member, for an ensemble)."""
    step = make_step(make_posterior(family), lr=0.5)
    net, posterior = step.posterior.module, step.posterior
    for _ in range(2):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        step(X, Y, 8), measured(step)
        center = getattr(posterior, posterior.family_.rest_slot or "points").detach().view(-1)
        layout = posterior.random if posterior.family_.rest_slot else posterior.point
        for name, value in layout.views(center).items():
            assert torch.equal(net.state_dict()[name], value) and not torch.equal(value, before[name])
        net.eval()
        assert torch.equal(net(X), net(X)) and torch.equal(net(X), copy.deepcopy(net)(X))
        assert torch.equal(net(X), torch.load(_stored(net), weights_only=False)(X))
        net.train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    outputs = net.eval()(X)
    net.train()
    step(X, Y, 8)
    net.load_state_dict(state)
    assert torch.equal(net.eval()(X), outputs)


def _stored(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


class Stubborn(nn.Module):
    """Fails when it is told."""

    def __init__(self, family):
        super().__init__()
        self.net, self.fails = make_net(family), False

    def forward(self, x):
        y = self.net(x)
        if self.fails:
            raise ValueError("stubborn")
        return y


@pytest.mark.parametrize("way", ["step", "prediction", "part of a step", "abandoned prediction"])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_failure_the_module_is_at_rest_again(family, way):
    step = make_step(FAMILIES[family](Stubborn(family)))
    net = step.posterior.module
    measured(step)
    expected = net.net.eval()(X)
    net.train()
    if way == "part of a step":
        with contextlib.suppress(ConfigError):  # BatchNorm wants the whole batch
            step.accumulate_(X[:4], Y[:4], 8, is_last=False)
    elif way == "abandoned prediction":
        loop = hpc_bnn.predictive.member_outputs(step.posterior, COMM, X, step.num_samples, 0, 4)
        next(loop), loop.close()
    else:
        net.fails = True
        with pytest.raises(ValueError, match="stubborn"):
            step(X, Y, 8) if way == "step" else measured(step)
        net.fails = False
    assert torch.equal(net.net.eval()(X), expected)
    net.train()
    assert measured(step)[0] is not None


def test_a_family_without_a_slot_to_rest_at_keeps_its_last_draw_and_refuses_edits():
    class Shifted(posteriors.families.MeanField):
        """Its mean is no slot of its own."""

        rest_slot = ""

        def sample_(self, slots, work, samples, draw, out):
            draw.affine_(slots["loc"] + 1, work["scale"], out)

        def mean(self, slots):
            return slots["loc"] + 1

    posterior = hpc_bnn.Posterior(make_net(), Shifted())
    step = make_step(posterior)
    measured(step)
    nn.init.zeros_(posterior.module[0].weight)
    assert "values were changed" in measured(step)[1]
    for rest_slot in ("", "loc", "none"):
        Shifted.rest_slot = rest_slot
        step = make_step(posterior := hpc_bnn.Posterior(make_net(), Shifted()))
        for _ in range(2):
            assert torch.equal(posterior.use_mean_()[5].bias, posterior.state_dict()["5.bias.loc"] + 1)
            assert measured(step)[0] is not None


def test_a_state_of_a_plain_network_is_told_where_to_go():
    posterior = posteriors.MeanFieldGaussian(make_net())
    with pytest.raises(ConfigError, match=r"plain network.* posterior\.module\.load_state_dict") as error:
        posterior.load_state_dict(state := other_state(make_net()))
    assert len(str(error.value).splitlines()) == 1
    posterior.module.load_state_dict(state)
    assert torch.equal(posterior.state_dict()["0.weight.loc"], state["0.weight"])


# --- contexts ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype):
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


CONTEXTS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: torch.device("meta"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved tensors": torch.autograd.graph.save_on_cpu,
    "gradients": torch.enable_grad,
    "dispatch": lambda: FlopCounterMode(display=False),
    "parametrizations": nn.utils.parametrize.cached,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("context", CONTEXTS)
def test_contexts_of_torch_change_nothing(context, family):
    plain, within = (make_step(make_posterior(family), lr=0.1) for _ in range(2))
    for _ in range(2):
        with CONTEXTS[context](), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result, members = measured(within)
        expected, theirs = measured(plain)
        assert result == expected and torch.equal(members, theirs)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_in_inference_mode_trains_later(family, chunk_size):
    results = []
    for context in (contextlib.nullcontext, torch.inference_mode):
        step = make_step(make_posterior(family), lr=0.1, chunk_size=chunk_size)
        seen = []
        for _ in range(2):
            with context():
                x = X.clone()
                options = {"num_samples": step.num_samples, "chunk_size": chunk_size}
                seen.append(predict_classes(step.posterior, CLASSES, COMM, x, **options).probabilities.clone())
                with contextlib.suppress(NotImplementedError):  # an ensemble has no mean
                    step.posterior.use_mean_()
                twin = copy.deepcopy(step.posterior) if context is contextlib.nullcontext else None
                assert twin is None or twin.num_weights == step.posterior.num_weights
                step.posterior.load_state_dict({name: v.clone() for name, v in step.posterior.state_dict().items()})
            seen.append(torch.tensor(step(x, Y, 8).nelbo))
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results))


# --- optimizers ----------------------------------------------------------------------------------------


def with_points(family):
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    return family(net)


SLOTTED = {"mean_field": posteriors.MeanFieldGaussian, "low_rank": posteriors.LowRankGaussian}
SUBSETS = [
    (family, kept)
    for family, slots in (("mean_field", 3), ("low_rank", 4))
    for number in range(1, slots)
    for kept in itertools.combinations(range(slots), number)
]


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize(("family", "kept"), SUBSETS)
def test_an_optimizer_updates_every_slot_that_is_not_frozen(family, kept, by_weight):
    posterior = with_points(SLOTTED[family])
    names = list(dict(posterior.named_parameters()))
    of_slot = {name: posterior.buffer.by_weight(name) for name in names if list(posterior.weight_parameters())}
    parameters = [
        p for n in kept for p in (of_slot[names[n]].values() if by_weight else [getattr(posterior, names[n])])
    ]
    left = [name for number, name in enumerate(names) if number not in kept]
    with pytest.raises(ConfigError, match=rf"does not update posterior\.{left[0]}.* posterior\.{left[0]}\.requires"):
        make_step(posterior, optimizer=torch.optim.SGD(parameters, lr=0.5))
    for name in left:
        getattr(posterior, name).requires_grad_(False)
    for given in (parameters, list(posterior.weight_parameters() if by_weight else posterior.parameters())):
        before = {name: value.clone() for name, value in posterior.buffer.values.items()}
        step = make_step(posterior, optimizer=torch.optim.SGD(given, lr=0.5))
        step(X, Y, 8), step(X, Y, 8)
        moved = [name for name in names if not torch.equal(before[name], posterior.buffer.values[name])]
        assert moved == [names[n] for n in kept]


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_slot_that_is_frozen_later_stays(is_sharded):
    posterior = with_points(posteriors.MeanFieldGaussian)
    make = lambda parameters: torch.optim.Adam(parameters, lr=0.1)  # noqa: E731
    optimizer = hpc_bnn.ShardedOptimizer(make, posterior, COMM) if is_sharded else make(posterior.parameters())
    step = make_step(posterior, optimizer=optimizer)
    step(X, Y, 8)
    posterior.log_scale.requires_grad_(False)
    before = posterior.log_scale.detach().clone(), posterior.loc.detach().clone()
    step(X, Y, 8)
    assert torch.equal(posterior.log_scale, before[0]) and not torch.equal(posterior.loc, before[1])
    posterior.log_scale.requires_grad_(True)
    step(X, Y, 8)
    assert not torch.equal(posterior.log_scale, before[0])


@pytest.mark.parametrize("number", range(3))
def test_an_optimizer_that_updates_a_slot_twice_is_refused(number):
    posterior = with_points(posteriors.MeanFieldGaussian)
    weights = list(posterior.weight_parameters())
    some = list(posterior.buffer.by_weight(["loc", "log_scale", "points"][number]).values())[:1]
    for extra in (weights, some):
        with pytest.raises(ConfigError, match="twice"):
            make_step(posterior, optimizer=torch.optim.SGD([*posterior.parameters(), *extra], lr=0.1))
    step = make_step(posterior)
    step.optimizer.optimizer.add_param_group({"params": some})
    with pytest.raises(ConfigError, match="twice"):
        step(X, Y, 8)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_second_update_of_a_step_is_none(name):
    """``optimizer.zero_grad(); step(...); optimizer.step()``, as in an ordinary loop."""
    twins = []
    for habit in (False, True):
        posterior = with_points(posteriors.MeanFieldGaussian)
        optimizer = getattr(torch.optim, name)(posterior.parameters(), lr=1e-3)
        for group in optimizer.param_groups:
            group |= {key: 0.0 for key in ("weight_decay", "lambd") if key in group}
        torch.manual_seed(0)
        step = make_step(posterior, optimizer=optimizer)
        posterior.load_state_dict({k: torch.full_like(v, 0.1) for k, v in posterior.state_dict().items()})
        for _ in range(3):
            optimizer.zero_grad() if habit else None
            step(X, Y, 8)
            optimizer.step() if habit else None
        twins.append(posterior.buffer.flat)
    assert torch.equal(*twins)


class Lamb(torch.optim.Optimizer):
    """Scales the step of each tensor by its norm."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.norm() / p.grad.norm() * p.grad)


OwnAdam = type("OwnAdam", (torch.optim.Adam,), {})


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, Lamb, OwnAdam, torch.optim.SGD])
def test_an_optimizer_that_looks_at_whole_tensors_is_told_what_it_is_given(kind, caplog):
    posterior = with_points(posteriors.MeanFieldGaussian)
    for given, says in (
        (posterior.parameters(), kind in (torch.optim.Adafactor, Lamb)),
        (posterior.weight_parameters(), False),
    ):
        caplog.clear()
        step = make_step(posterior, optimizer=kind(given))
        step(X, Y, 8), step(X, Y, 8)
        assert caplog.text.count(f"{kind.__name__} may look at whole tensors") == says
        assert ("weight_parameters()" in caplog.text) == says


def test_an_optimizer_that_is_differentiable_is_refused():
    posterior = with_points(posteriors.MeanFieldGaussian)
    with pytest.raises(ConfigError, match="differentiable"):
        make_step(posterior, optimizer=torch.optim.Adam(posterior.parameters(), differentiable=True))


class Closing(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Closing])
def test_an_optimizer_that_wants_a_closure_is_refused(kind):
    posterior = with_points(posteriors.MeanFieldGaussian)
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: it evaluates the loss several times"):
        make_step(posterior, optimizer=kind(posterior.parameters(), lr=0.1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rate_of_dropout_that_is_changed_counts_or_is_refused(family):
    """With MC dropout it is in the KL as well, which knows it from the wrap."""
    step, plain = (make_step(make_posterior(family)) for _ in range(2))
    step.posterior.module[4].p = 0.5
    result, members = measured(step)
    if family == "mc_dropout":
        assert result is None and "the rate of its dropout was changed" in members
    else:
        assert result != measured(plain)[0]


def test_a_copied_posterior_rests_at_its_own_mean():
    step = make_step(posteriors.MeanFieldGaussian(make_net()), lr=0.1)
    for way in (copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))):
        twin = way(step.posterior)
        step(X, Y, 8)
        net = twin.module
        assert torch.equal(net[0].weight, twin.state_dict()["0.weight.loc"])
        nn.init.ones_(net[0].weight)
        assert (twin.state_dict()["0.weight.loc"] == 1).all() and not (step.posterior.loc == 1).any()
