"""What a user can get wrong with a family, a posterior, a step or a checkpoint: it is followed, or it is an error."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from stepping import keyed
from torch import nn

from hpc_bnn import (
    Categorical,
    Gathered,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    MeanFieldGaussian,
    NegativeElbo,
    OverlappingOptimizer,
    Poisson,
    VariationalStep,
)
from hpc_bnn.capabilities import Capabilities
from hpc_bnn.comm import TensorTransport
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import DeepEnsemble, Family, GaussianPrior, Posterior, Slot
from hpc_bnn.posteriors.families import MeanField, Scalars
from hpc_bnn.predictive import predict_classes, predict_values
from hpc_bnn.run.checkpoint import SECTIONS, CheckpointStore
from hpc_bnn.training.updaters import Updater


def make_net(seed=0):
    with Key(seed, Stream.INIT).global_generator():
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def batch(count=6):
    x = torch.randn(count, 4, generator=Key(1, Stream.DATA_ORDER).generator(), dtype=torch.float64)
    return x, torch.arange(count) % 3


def make_step(posterior, optimizer=None, num_samples=2, num_train_examples=10, **options):
    optimizer = optimizer or torch.optim.SGD(posterior.parameters(), lr=0.1)
    return VariationalStep(
        posterior,
        Categorical(3),
        optimizer,
        GridComm(Grid()),
        num_samples=num_samples,
        num_train_examples=num_train_examples,
        **options,
    )


# --- families -------------------------------------------------------------------------------------------


def test_posteriors_that_are_given_one_family_each_have_their_own_prior():
    family = MeanField(GaussianPrior(1.0, mean="initial"))
    shared, alone = [], []
    for seed in (0, 1):
        shared.append(Posterior(make_net(seed), family))
        alone.append(Posterior(make_net(seed), MeanField(GaussianPrior(1.0, mean="initial"))))
    assert [p.kl().item() for p in shared] == [p.kl().item() for p in alone]


class Chain(Family):
    """A point that is moved by noise after each update."""

    name = "chain"

    def slots(self, weights, layout, samples):
        return {"place": Slot(weights)}

    def sample_(self, slots, work, samples, draw, out):
        out.copy_(slots["place"])

    def pull_back_(self, grads, slots, work, samples, g, draw):
        g.add_to(grads["place"])

    def after_update_(self, grads, slots, samples, draw, scalars):
        slots["place"].add_(draw.normal((), slots["place"].shape[-1])[0])


def test_noise_after_the_update_is_the_same_on_all_ranks_that_hold_the_same_slots():
    places = []
    for mine in (range(0, 2), range(2, 3)):  # the samples of two ranks
        posterior = Posterior(make_net(), Chain(), samples=mine)
        posterior.after_update_(Scalars.on("cpu"), keyed(0))
        places.append(posterior.place.detach())
    assert torch.equal(*places)


class Rebinding(MeanField):
    def begin_(self, slots, work):
        work["scale"] = slots["log_scale"].exp()


def test_work_has_to_be_overwritten_in_place():
    posterior = Posterior(make_net(), Rebinding())
    posterior.begin_()
    with pytest.raises(ConfigError, match=r"begin_.*scale.*in place"):
        posterior.begin_()


class WithNumber(MeanField):
    """Work with a 0-dim tensor, which belongs to no block of weights."""

    def begin_(self, slots, work):
        super().begin_(slots, work)
        work.setdefault("number", torch.zeros(()))


def test_blocks_leave_numbers_of_the_work_whole(monkeypatch):
    monkeypatch.setattr("hpc_bnn.training.reducer.OVERLAP_BYTES", 8)
    posterior = Posterior(make_net(), WithNumber())
    optimizer = OverlappingOptimizer(torch.optim.SGD(posterior.parameters(), 0.1), posterior, GridComm(Grid()))
    make_step(posterior, optimizer)(*batch(), 6)


class Twofold(MeanField):
    """Rows [2, P] and a few numbers that no block holds, beside the slots of mean field."""

    def slots(self, weights, layout, samples):
        few = Slot(torch.ones(3, dtype=weights.dtype), per_weight=False)
        return super().slots(weights, layout, samples) | {"rows": Slot(torch.stack([weights, weights])), "few": few}

    def pull_back_(self, grads, slots, work, samples, g, draw):
        super().pull_back_(grads, slots, work, samples, g, draw)
        g.outer_to(grads["rows"], draw.normal((), 2))
        total = torch.zeros_like(slots["loc"])
        g.add_to(total)
        grads["few"].add_(total.sum())


class Doubling(TensorTransport):
    """The sums of one of two ranks, as if the other had the same numbers; notes when they are begun and waited for."""

    name = "doubling"

    def __init__(self):
        self.begun, self.waited = [], []

    def reduce_(self, flat, axis, operation):
        flat.mul_(2)

    def start_sum_(self, flat, axis):
        self.begun.append(len(flat))
        flat.mul_(2)
        return lambda number=len(self.begun): self.waited.append(number)


def doubling():
    return GridComm(Grid(2, 1, 0), tensors=Doubling())


def test_blocks_sum_every_number_of_any_slot_once(monkeypatch):
    monkeypatch.setattr("hpc_bnn.training.reducer.OVERLAP_BYTES", 8)
    monkeypatch.setattr("hpc_bnn.training.reducer.OVERLAP_BLOCKS", 10**6)
    reduced = []
    for overlap in (False, True):
        posterior, comm = Posterior(make_net(), Twofold()), doubling()
        optimizer = torch.optim.SGD(posterior.parameters(), 0.1)
        optimizer = OverlappingOptimizer(optimizer, posterior, comm) if overlap else optimizer
        step = VariationalStep(posterior, Categorical(3), optimizer, comm, num_samples=2, num_train_examples=10)
        step.leave_out_checks()  # the other rank does not exist
        step.accumulate_(*batch(), 6)
        step.reduce_()
        reduced.append(posterior.buffer.reduced)
    torch.testing.assert_close(*reduced, rtol=1e-12, atol=1e-12)


def family_of(slots, **capabilities):
    class Strange(Chain):
        def slots(self, weights, layout, samples):
            return slots(weights)

    Strange.capabilities = Capabilities(**capabilities)
    return Strange()


@pytest.mark.parametrize(
    ("slots", "capabilities", "message"),
    [
        (lambda w: {"place": Slot(w[:-1])}, {}, r"place.*last dim"),
        (lambda w: {"place": Slot(w.sum(), per_weight=False)}, {}, r"place.*0-dim"),
        (lambda w: {"points": Slot(w)}, {}, r"points.*name"),
        (lambda w: {"place": Slot(w[None], owner="sample")}, {}, r"place.*Capabilities\.owner"),
        (lambda w: {"place": Slot(w[0])}, {"owner": "sample"}, r"place.*Capabilities\.owner"),
        (lambda w: {"place": Slot(w[:1], owner="sample")}, {"owner": "sample"}, r"place.*row"),
    ],
)
def test_slots_that_do_not_fit_are_named(slots, capabilities, message):
    with pytest.raises(ConfigError, match=message):
        Posterior(make_net(), family_of(slots, **capabilities), samples=[0, 1])


def test_slots_that_are_not_trained_have_memory_of_their_own():
    kept = {"is_trained": False, "owner": "sample"}
    family = family_of(
        lambda w: {"place": Slot(w, owner="sample"), "first": Slot(w, **kept), "second": Slot(w, **kept)},
        owner="sample",
    )
    posterior = Posterior(make_net(), family, samples=[0, 1])
    before = posterior.second.clone()
    posterior.first[0].zero_()
    assert torch.equal(posterior.second, before) and torch.equal(posterior.first[1], before[1])


def test_a_slot_cannot_be_replaced_by_an_assignment():
    posterior = MeanFieldGaussian(make_net())
    with pytest.raises(ConfigError, match=r"loc.*copy_"):
        posterior.loc = torch.zeros_like(posterior.loc)


# --- the order of a step --------------------------------------------------------------------------------


def test_a_prediction_between_the_parts_of_a_step_is_an_error():
    posterior = MeanFieldGaussian(make_net())
    step, (x, y) = make_step(posterior), batch()
    step.accumulate_(x[:3], y[:3], 6, is_last=False)
    predict_classes(posterior, Categorical(3), step.comm, x, num_samples=2)
    with pytest.raises(ConfigError, match="begun anew"):
        step.accumulate_(x[3:], y[3:], 6)
    step(x, y, 6)
    step.accumulate_(x, y, 6)
    with torch.no_grad():
        posterior.begin_()
    with pytest.raises(ConfigError, match="begun anew"):
        step.reduce_()


@pytest.mark.parametrize("estimator", ["reparameterisation", "local", "flipout"])
def test_a_backward_pass_of_the_user_between_micro_batches_adds_nothing(estimator):
    (x, y), locs = batch(), []
    for is_astray in (False, True):
        posterior = MeanFieldGaussian(make_net(), estimator=estimator, deterministic=["4.bias"])
        step = make_step(posterior)
        step.accumulate_(x[:3], y[:3], 6, is_last=False)
        if is_astray:
            posterior.module(x).sum().backward()
        step.accumulate_(x[3:], y[3:], 6)
        step.reduce_()
        step.update_()
        locs += [torch.cat([posterior.loc.detach(), posterior.points.detach()])]
    assert torch.equal(*locs)


@pytest.mark.parametrize(("name", "other"), [("global_batch_size", 12), ("num_steps", 7)])
def test_parts_of_one_batch_are_of_one_step(name, other):
    (x, y), step = batch(), make_step(MeanFieldGaussian(make_net()))
    step.accumulate_(x[:3], y[:3], 6, is_last=False)
    step.num_steps = other if name == "num_steps" else 0
    with pytest.raises(ConfigError, match=rf"^{name} {other}: the first part of this batch had"):
        step.accumulate_(x[3:], y[3:], other if name == "global_batch_size" else 6)


def test_a_step_that_was_given_up_leaves_no_sums_of_blocks_behind(monkeypatch):
    monkeypatch.setattr("hpc_bnn.training.reducer.OVERLAP_BYTES", 8)
    monkeypatch.setattr("hpc_bnn.training.reducer.OVERLAP_BLOCKS", 10**6)
    counts = []
    for gives_up in (False, True):
        comm, posterior = doubling(), MeanFieldGaussian(make_net())
        optimizer = OverlappingOptimizer(torch.optim.SGD(posterior.parameters(), 0.1), posterior, comm)
        step = make_step(posterior, optimizer)
        step.leave_out_checks()
        x, y = batch()
        if gives_up:
            step.accumulate_(x, y, 6)
            assert comm.tensors.begun
        num_before = len(comm.tensors.begun)
        step(x, y, 6)
        counts.append(len(comm.tensors.begun) - num_before)
        assert len(comm.tensors.waited) == len(comm.tensors.begun)
    assert counts[0] == counts[1] > 1


def test_flipout_with_batch_norm_on_a_rank_without_examples():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    step = make_step(MeanFieldGaussian(net, estimator="flipout"))
    step.posterior.network.batch_norms.reads_counts = False  # the ranks that have the examples do not exist
    x, y = batch()
    step.accumulate_(x[:0], y[:0], 6)


def test_features_are_checked_again_when_the_mode_of_the_module_changes():
    def make():
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double().eval()

    posterior = DeepEnsemble(make, 2, range(2))
    step = make_step(posterior)
    step(*batch(), 6)
    posterior.module.train()
    with pytest.raises(ConfigError, match="running statistics"):
        step(*batch(), 6)


class Mixed(Chain):
    """Rows that belong to samples, beside a few numbers that all share."""

    capabilities = Capabilities(owner="sample")

    def slots(self, weights, layout, samples):
        shared = Slot(torch.ones(2, dtype=weights.dtype), per_weight=False)
        return {"place": Slot(weights, owner="sample"), "shared": shared}

    def pull_back_(self, grads, slots, work, samples, g, draw):
        g.add_rows_to(grads["place"])
        grads["shared"].add_(100.0)

    def after_update_(self, grads, slots, samples, draw, scalars):
        pass


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.register_hook(lambda g: g * 0),
        lambda p: p.register_post_accumulate_grad_hook(lambda p: None),
        lambda p: p.square().sum().backward(),
    ],
)
def test_what_torch_would_do_with_gradients_of_a_posterior_is_an_error_with_the_way(use, by_weight):
    posterior = MeanFieldGaussian(make_net())
    parameters = list(posterior.weight_parameters() if by_weight else posterior.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    step = make_step(posterior, optimizer)
    step(*batch(), 6)
    use(parameters[0])
    with pytest.raises(ConfigError, match=r"max_gradient_norm.*register_step_pre_hook"):
        step(*batch(), 6)
    if parameters[0].grad is not None:  # the remedies
        optimizer.zero_grad()
        optimizer.register_step_pre_hook(lambda *_: (parameters[0].grad.zero_(), None)[1])
        former = parameters[0].detach().clone()
        step(*batch(), 6)
        assert torch.equal(parameters[0], former)


class LearnedNoise(Gaussian):
    def __init__(self, at):
        super().__init__(3, 1.0)
        setattr(self, at, {"of": [nn.Parameter(torch.zeros(()))], "in": nn.Linear(1, 1)}[at])


class LearnedObjective(NegativeElbo):
    def __init__(self):
        self.factor = torch.ones((), requires_grad=True)


@pytest.mark.parametrize("likelihood, objective", [("of", None), ("in", None), (None, LearnedObjective())])
def test_what_is_not_in_the_network_is_not_trained_in_silence(likelihood, objective):
    likelihood = Categorical(3) if likelihood is None else LearnedNoise(likelihood)
    posterior, options = MeanFieldGaussian(make_net()), {"num_samples": 2, "num_train_examples": 10}
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"wants a gradient.*wrap.*requires_grad_"):
        VariationalStep(posterior, likelihood, optimizer, GridComm(Grid()), objective=objective, **options)


TEMPERATURE = nn.Parameter(torch.ones(()))


def of_closure(temperature=None):
    temperature = nn.Linear(3, 3) if temperature is None else temperature
    return Gathered(lambda statistics, y: -(temperature(statistics)).mean(0), of="log_prob")


@pytest.mark.parametrize(
    "objective", [of_closure(), Gathered(lambda statistics, y: -(TEMPERATURE * statistics).mean(0), of="log_prob")]
)
def test_what_a_function_reads_around_it_is_not_trained_in_silence(objective):
    with pytest.raises(ConfigError, match=r"Gathered.function: .*wants a gradient"):
        make_step(MeanFieldGaussian(make_net()), objective=objective)
    make_step(MeanFieldGaussian(make_net()), objective=of_closure(torch.abs))(*batch(), 6)


class LearnedPrior(GaussianPrior):
    checked = ()


def test_a_prior_is_not_trained_in_silence():
    scale = nn.Parameter(torch.ones(()).double())
    with pytest.raises(ConfigError, match=r"LearnedPrior.std: a prior is not trained.*requires_grad_\(False\)"):
        make_step(MeanFieldGaussian(make_net(), prior=LearnedPrior(scale)))
    make_step(MeanFieldGaussian(make_net(), prior=LearnedPrior(scale.requires_grad_(False))))(*batch(), 6)


class Hides(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.hidden = make_net(), [nn.Linear(3, 3).double()]

    def forward(self, x):
        return self.hidden[0](self.first(x.clone().requires_grad_()))  # a leaf that is no parameter may want one


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("way", ["list", "output"])
def test_a_parameter_outside_of_the_network_that_enters_its_outputs_is_an_error(way, chunk_size):
    net, head = Hides() if way == "list" else make_net(), nn.Linear(3, 3).double()
    step = make_step(MeanFieldGaussian(net, output=head if way == "output" else None), chunk_size=chunk_size)
    with pytest.raises(ConfigError, match=r"^model .* outside of it .*ModuleList.*requires_grad_\(False\)"):
        step(*batch(), 6)
    for layer in (head, *getattr(net, "hidden", ())):
        layer.requires_grad_(False)
    step(*batch(), 6)


def test_a_likelihood_may_hold_what_its_wrap_puts_into_the_network():
    likelihood, net = LearnedNoise("in"), nn.Sequential(make_net())
    getattr(likelihood, "in").double()
    net.add_module("noise", nn.Identity())
    net.noise.held = getattr(likelihood, "in")
    posterior = MeanFieldGaussian(net, deterministic=["noise.*"])
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    VariationalStep(posterior, likelihood, optimizer, GridComm(Grid()), num_samples=2, num_train_examples=10)


def test_parameters_that_are_not_the_posteriors_need_an_optimizer_of_their_own():
    posterior, other = MeanFieldGaussian(make_net()), nn.Parameter(torch.zeros(3))
    with pytest.raises(ConfigError, match=r"1 of its parameters.*not the posterior's.*into the network"):
        make_step(posterior, torch.optim.SGD([*posterior.parameters(), other], lr=0.1))
    step = make_step(posterior)
    step(*batch(), 6)
    step.optimizer.optimizer.add_param_group({"params": [other]})
    with pytest.raises(ConfigError, match="not the posterior's"):
        step(*batch(), 6)


@pytest.mark.parametrize("views", ["shared", "own"])
@pytest.mark.parametrize("of", ["x", "in x", "parameter", "y", "weights"])
def test_a_batch_with_a_graph_is_refused(of, views):
    x, y = batch()
    y, weights = y.double()[:, None].expand(6, 3) * 1.0, torch.ones(6, dtype=torch.float64)
    made = nn.Linear(4, 4).double()(x)
    posterior = MeanFieldGaussian(make_net())
    options = {"num_samples": 2, "num_train_examples": 10}
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    step = VariationalStep(posterior, Gaussian(3, 1.0), optimizer, GridComm(Grid()), **options)
    given = {"x": x, "y": y, "weights": weights} | {
        "x": {"x": made},
        "in x": {"x": [made]},
        "parameter": {"x": nn.Parameter(x)},
        "y": {"y": made[:, :3]},
        "weights": {"weights": made[:, 0].square()},
    }[of]
    with pytest.raises(ConfigError, match=r"with a graph.*detach\(\)"):
        step(given["x"], given["y"], 6, views=views, weights=given["weights"])
    step(x.requires_grad_(), y, 6, views=views, weights=weights)  # as for a forward pass that differentiates by x


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("posterior", make_net(), "MeanFieldGaussian"),
        ("likelihood", nn.CrossEntropyLoss(), "Categorical"),
        ("optimizer", None, "posterior.parameters()"),
        ("comm", None, "connect()"),
        ("num_samples", 2.0, "whole number"),
        ("num_samples", None, "whole number"),
        ("num_samples", 0, "whole number"),
    ],
)
def test_what_a_step_is_made_of_is_checked(name, value, remedy):
    posterior = MeanFieldGaussian(make_net())
    given = {
        "posterior": posterior, "likelihood": Categorical(3), "comm": GridComm(Grid()), "num_samples": 2,
        "optimizer": torch.optim.SGD(posterior.parameters(), lr=0.1), "num_train_examples": 10, name: value,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=rf"^{name} (?s:.*){re.escape(remedy)}"):
        VariationalStep(**given)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeanFieldGaussian(make_net), "model of another kind.*nn.Module"),
        (lambda: MeanFieldGaussian(MeanFieldGaussian(make_net())), "model of another kind.*nn.Module"),
        (lambda: MeanFieldGaussian(make_net(), prior=1.0), r"prior of another kind.*GaussianPrior\(0.1\)"),
        (lambda: MeanFieldGaussian(make_net(), prior=GaussianPrior), r"prior of another kind.*GaussianPrior\(0.1\)"),
        (lambda: MeanFieldGaussian(make_net(), deterministic=None), "deterministic of another kind.*for none"),
        (lambda: MeanFieldGaussian(make_net(), deterministic=[nn.Tanh()]), "deterministic of another kind.*classes"),
        (lambda: DeepEnsemble(make_net(), 2, range(2)), r"make_module of another kind.*lambda: Net\(\)"),
        (lambda: DeepEnsemble([make_net()], 2, range(2)), r"make_module of another kind.*lambda: Net\(\)"),
        (lambda: DeepEnsemble(make_net, 2, 2), "members of another kind.*local_samples"),
        (lambda: DeepEnsemble(make_net, 2, range(1, 3)), r"members \[1, 2\]: .*0 to 1.*local_samples"),
        (lambda: DeepEnsemble(make_net, 2, []), r"members \[\]: .*one or more.*local_samples"),
        (lambda: DeepEnsemble(iter([make_net(), nn.Linear(4, 3)]).__next__, 2, range(2)), "differ in the names or shapes"),
    ],
)  # fmt: skip
def test_what_a_posterior_is_made_of_is_checked(make, message):
    with pytest.raises(ConfigError, match=f"^(model Sequential: members )?{message}"):
        make()


@pytest.mark.parametrize(
    "predict, likelihood, posterior, options, message",
    [
        (predict_classes, Categorical(3), make_net(), {}, "posterior of another kind.*MeanFieldGaussian"),
        (predict_classes, Categorical(3), None, {"num_samples": 0}, "num_samples 0: must be a whole number"),
        (predict_values, Gaussian(3, 1.0), None, {"num_samples": 2.5}, "num_samples 2.5: must be a whole number"),
        (predict_classes, Gaussian(3, 1.0), None, {}, "likelihood Gaussian: .*predict_values"),
        (predict_values, Categorical(3), None, {}, "likelihood Categorical: .*predict_classes"),
        (predict_classes, Categorical(3), None, {"batch_size": 0}, "batch_size 0: must be a whole number"),
        (predict_values, Gaussian(3, 1.0), None, {"batch_size": -1}, "batch_size -1: must be a whole number"),
        (predict_values, Gaussian(3, 1.0), None, {"chunk_size": "auto"}, "chunk_size auto: must be a whole number"),
        (predict_values, Gaussian(3, 1.0), None, {"y": np.ones((6, 3))}, r"y of another kind.*torch.as_tensor\(y\)"),
    ],
)
def test_what_a_predictive_is_made_of_is_checked(predict, likelihood, posterior, options, message):
    posterior = posterior or MeanFieldGaussian(make_net())
    with pytest.raises(ConfigError, match=f"^{message}"):
        predict(posterior, likelihood, GridComm(Grid()), batch()[0], **{"num_samples": 4, **options})


@pytest.mark.parametrize("likelihood", [Gaussian(3, 1.0), Implicit(3), Poisson(3)])
def test_levels_of_quantiles_are_between_0_and_1(likelihood):
    """50 is no level: of members it would be the largest, of a Gaussian NaN."""
    options = {"num_samples": 4, "keep_members": True}
    found = predict_values(MeanFieldGaussian(make_net()), likelihood, GridComm(Grid()), batch()[0], **options)
    for level in (50, -0.1, math.nan, "0.5", [0.1, 0.2]):
        with pytest.raises(ConfigError, match=r"^level .*: must be a number between 0 and 1"):
            found.quantile(level)
    assert torch.equal(found.quantile(0.5), found.quantile(torch.tensor(0.5)))
    with pytest.raises(ConfigError, match=r"^quantile 0.5: .*keep_members=True"):
        dataclasses.replace(found, mixture=None).quantile(0.5)


@pytest.mark.parametrize("name", ["y", "weights"])
@pytest.mark.parametrize("kind", [lambda t: t.numpy(), lambda t: t.tolist(), lambda t: {"a": t}, lambda t: None])
def test_targets_and_weights_are_tensors(name, kind):
    x, y = batch()
    given = {"y": y, "weights": torch.ones(6)}
    given[name] = kind(given[name])
    if given["weights"] is None:
        return
    with pytest.raises(ConfigError, match=rf"^{name} of type .*torch.as_tensor\({name}\)"):
        make_step(MeanFieldGaussian(make_net()))(x, global_batch_size=6, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.cfloat(), r"of torch.complex64.*torch.view_as_real\(y\)"),
        (lambda y: y.float().to_sparse(), r"of .*torch.sparse_coo.*y.to_dense\(\)"),
        (lambda y: y.to("meta"), r"on meta: the weights are on cpu. Give y.to\('cpu'\)"),
    ],
)
def test_targets_of_another_kind_or_place_are_named(change, message):
    x, y = batch()
    with pytest.raises(ConfigError, match=rf"^y {message}"):
        make_step(MeanFieldGaussian(make_net()))(x, change(y), 6)


@pytest.mark.parametrize("count", [0, -6, 6.0, None, "6"])
def test_the_size_of_a_batch_is_a_whole_number(count):
    with pytest.raises(ConfigError, match=r"^global_batch_size .*whole number"):
        make_step(MeanFieldGaussian(make_net()))(*batch(), count)


def test_float16_is_refused_and_said(caplog):
    posterior = MeanFieldGaussian(make_net().float())
    with pytest.raises(ConfigError, match=r"autocast_dtype torch.float16.*bfloat16"):
        make_step(posterior, autocast_dtype=torch.float16)
    x, y = batch()
    with torch.autocast("cpu", torch.float16):
        make_step(posterior)(x.float(), y, 6)
    assert caplog.text.count("torch.bfloat16") == 1


OF_CONSTRUCTOR = (
    "posterior", "likelihood", "comm", "num_samples", "objective", "seed", "autocast_dtype", "chunk_size", "batching", "capture"
)  # fmt: skip


@pytest.mark.parametrize("name", OF_CONSTRUCTOR)
def test_what_a_step_reads_once_cannot_be_set_later(name):
    step = make_step(MeanFieldGaussian(make_net()))
    with pytest.raises(ConfigError, match=rf"^{name} .*Make a new VariationalStep"):
        setattr(step, name, getattr(step, name, None))


@pytest.mark.parametrize(
    "name, wrong, value", [("kl_weight", -1.0, 0.0), ("max_gradient_norm", 0.0, 1e-3), ("num_train_examples", 0, 1000)]
)
@pytest.mark.parametrize("capture", ["off", "on"])
def test_what_is_set_later_is_checked_and_followed(name, wrong, value, capture):
    locs = []
    for options in ({}, {name: value}):
        step = make_step(MeanFieldGaussian(make_net()), capture=capture, **options)
        setattr(step, name, value)
        for _ in range(3):
            step(*batch(), 6)
        step.settle()
        locs.append(step.posterior.loc.detach().clone())
        with pytest.raises(ConfigError, match=name):
            setattr(step, name, wrong)
    assert torch.equal(*locs)


@pytest.mark.parametrize(("name", "value"), [("num_steps", -1), ("num_steps", 2.5), ("micro_batch_size", 0)])
def test_a_number_that_cannot_be_is_refused_when_it_is_set(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} {value}: must be"):
        setattr(make_step(MeanFieldGaussian(make_net())), name, value)


@pytest.mark.parametrize("what", ["step", "predictive"])
def test_what_cannot_be_compiled_is_an_error_with_the_way(what):
    step, (x, y) = make_step(MeanFieldGaussian(make_net())), batch()
    predict = lambda: predict_classes(step.posterior, Categorical(3), step.comm, x, num_samples=2)  # noqa: E731
    function = torch.compile((lambda: step(x, y, 6)) if what == "step" else predict, backend="eager")
    try:
        with pytest.raises(ConfigError, match=r"within torch.compile.*torch.compile\(net\)"):
            function()
    finally:
        torch.compiler.reset()
    assert predict() and step(x, y, 6).kl > 0


@pytest.mark.parametrize("name", ["eval", "to", "zero_grad", "modules", "buffers"])
def test_what_a_posterior_is_asked_for_as_if_it_were_a_module_is_of_its_network(name):
    with pytest.raises(AttributeError, match=rf"no attribute {name}\. The network has it: posterior\.module\.{name}$"):
        getattr(MeanFieldGaussian(make_net()), name)
    with pytest.raises(AttributeError, match=r"no attribute nothing$"):
        _ = MeanFieldGaussian(make_net()).nothing


def test_an_optimizer_may_be_replaced():
    posterior = MeanFieldGaussian(make_net())
    step = make_step(posterior)
    step(*batch(), 6)
    step.optimizer = torch.optim.SGD(posterior.parameters(), lr=0.0)
    former = posterior.loc.detach().clone()
    step(*batch(), 6)
    assert torch.equal(posterior.loc, former)
    with pytest.raises(ConfigError, match=r"^optimizer of another kind.*posterior.parameters\(\)"):
        step.optimizer = nn.Linear(1, 1)


def test_an_update_that_failed_can_be_made_again():
    posterior = MeanFieldGaussian(make_net())
    step = make_step(posterior)
    hook = step.optimizer.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(*batch(), 6)
    hook.remove()
    step(*batch(), 6)


def test_clipping_reaches_slots_beside_rows_of_samples():
    posterior = Posterior(make_net(), Mixed(), samples=[0, 1])
    step = make_step(posterior, torch.optim.SGD(posterior.parameters(), lr=0.0), max_gradient_norm=0.5)
    step(*batch(), 6)
    assert posterior.buffer.grads["shared"].norm() <= 0.5


def test_clipping_does_not_count_what_nobody_updates():
    updates = []
    for max_norm in (0.5, None):
        posterior = MeanFieldGaussian(make_net())
        weights = list(posterior.weight_parameters())
        for weight in weights[1:]:
            weight.requires_grad_(False)
        step = make_step(posterior, torch.optim.SGD(weights, lr=1.0), max_gradient_norm=max_norm)
        former = weights[0].detach().clone()
        step(*batch(), 6)
        updates.append((weights[0].detach() - former).norm())
    torch.testing.assert_close(updates[0], updates[1].clamp(max=0.5), rtol=1e-3, atol=0)
    assert updates[0] > 0


# --- checkpoints ----------------------------------------------------------------------------------------


def test_a_state_with_another_number_of_groups_is_refused():
    posterior = MeanFieldGaussian(make_net(), deterministic=["4.*"])
    groups = [{"params": [posterior.loc, posterior.log_scale]}, {"params": [posterior.points], "lr": 0.5}]
    step = make_step(posterior, torch.optim.Adam(groups))
    step(*batch(), 6)
    state = step.gather_state()
    other = make_step(posterior)
    assert isinstance(other.updater, Updater)
    with pytest.raises(ConfigError, match=r"2 groups.*1"):
        other.load_state_dict(state)


def test_a_checkpoint_of_another_run_is_not_overwritten(tmp_path):
    state = {name: {} for name in SECTIONS if name != "run"}
    store = CheckpointStore(tmp_path)
    store.identity = "theirs"
    store.save(state, 10)
    before = (tmp_path / "step-00000010.pt").read_bytes()
    store.identity = "mine"
    with pytest.raises(DataError, match="run theirs"):
        store.save(state, 10)
    assert (tmp_path / "step-00000010.pt").read_bytes() == before


class Unkeyed(Chain):
    """Draws numbers that have no key."""

    def sample_(self, slots, work, samples, draw, out):
        out.copy_(slots["place"] + 0.1 * torch.randn_like(slots["place"]))


def test_a_family_that_draws_without_a_key_is_named_and_not_the_network(caplog):
    posterior = Posterior(make_net(), Unkeyed())
    step = make_step(posterior, torch.optim.SGD(posterior.parameters(), 0.1))
    with caplog.at_level("WARNING", "hpc_bnn"):
        step(*batch(), 6)
    assert "sample_ of the posterior's family draws from torch's global generator" in caplog.text
    assert "the forward pass" not in caplog.text


def test_a_function_that_is_no_objective_and_inputs_that_are_no_tensors_are_errors_with_the_remedy():
    posterior = MeanFieldGaussian(make_net())
    optimizer, comm = torch.optim.SGD(posterior.parameters(), 0.1), GridComm(Grid())
    with pytest.raises(ConfigError, match=r"objective .*Gathered"):
        VariationalStep(
            posterior, Categorical(3), optimizer, comm,
            num_samples=2, num_train_examples=10, objective=lambda f, y: f.mean(),
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"of type ndarray: .*torch.as_tensor"):
        make_step(posterior, optimizer)(batch()[0].numpy(), batch()[1], 6)
