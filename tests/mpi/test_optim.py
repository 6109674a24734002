"""Optimizers of the job: sharded, layer-wise, clipped, compressed; the same parameters on every grid."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from reference import GLOBAL_BATCH_SIZE, NUM_EXAMPLES, by_one, computed_once, make_problem, relative_difference
from torch import nn

from hpc_bnn import (
    Categorical,
    DeepEnsemble,
    DeterministicNetwork,
    Grid,
    GridComm,
    LowRankGaussian,
    MCDropout,
    MeanFieldGaussian,
    ShardedOptimizer,
    VariationalStep,
    connect,
    global_batches,
)
from hpc_bnn.config import OptimizerConfig
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.training.optim import build_optimizer

NUM_SAMPLES = 5

FAMILIES = {
    "mean_field": lambda comm: MeanFieldGaussian(make_net(), init_std=0.1),
    "with_points": lambda comm: MeanFieldGaussian(make_net(), init_std=0.1, deterministic=["2.*"]),
    "scalar_first": lambda comm: MeanFieldGaussian(Scaled(), init_std=0.1),
    "scalars": lambda comm: MeanFieldGaussian(Scaled(), init_std=0.1, deterministic=["factor", "shift"]),
    "frozen_scale": lambda comm: frozen(MeanFieldGaussian(make_net(), init_std=0.1)),
    "low_rank": lambda comm: LowRankGaussian(make_net(), init_std=0.1, rank=2),
    "mc_dropout": lambda comm: MCDropout(make_net(dropout=0.2)),
    "deterministic": lambda comm: DeterministicNetwork(make_net()),
    "ensemble": lambda comm: DeepEnsemble(make_module, NUM_SAMPLES, comm.grid.local_samples(NUM_SAMPLES), seed=5),
}


def make_module():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()


class Scaled(nn.Module):
    """A network whose first weights have no dims, as temperatures and gates have none."""

    def __init__(self):
        super().__init__()
        self.factor, self.shift = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.5, 0.1))
        self.net = make_net()

    def forward(self, x):
        return self.factor * self.net(x) + self.shift * x[:, :3]


def frozen(posterior):
    posterior.log_scale.requires_grad_(False)
    return posterior


def make_net(dropout=0.0):
    with Key(5, Stream.INIT).global_generator():
        net = make_module()
    net.insert(2, nn.Dropout(dropout)) if dropout else None
    return net


def make_step(comm, family, **options):
    posterior = FAMILIES[family](comm)
    max_gradient_norm = options.pop("max_gradient_norm", None)
    config = OptimizerConfig(learning_rate=0.02, schedule="constant", **options)
    optimizer, _ = build_optimizer(config, posterior, comm, 1, 1)
    return VariationalStep(
        posterior, Categorical(3), optimizer, comm,
        num_samples=NUM_SAMPLES, num_train_examples=NUM_EXAMPLES, seed=5, max_gradient_norm=max_gradient_norm,
    )  # fmt: skip


def train(step, epochs):
    x, y = make_problem(torch.float64)
    for epoch in epochs:
        for batch in global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 5, epoch):
            mine = batch[step.comm.grid.local_examples(len(batch))]
            step(x[mine], y[mine], len(batch))
    return step


class End(NamedTuple):
    """The parameters after a training: by name, and flat."""

    state: dict
    flat: torch.Tensor

    @classmethod
    def of(cls, step):
        return cls(step.gather_state()["model"], step.posterior.buffer.flat.detach().clone())


@computed_once
def alone(family, **options):
    return End.of(train(make_step(GridComm(Grid()), family, **options), range(2)))


def assert_equal_to(end, expected, tolerance=1e-12):
    assert end.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        assert relative_difference(end.state[name], value) < tolerance, name


REPLICATED = [name for name in FAMILIES if name != "ensemble"]
LAMB = {"name": "pytorch_optimizer.Lamb"}


@pytest.mark.parametrize(
    "options",
    [{}, {"name": "SGD", "arguments": {"momentum": 0.9}}, {"name": "AdamW"}, {"max_gradient_norm": 0.05}],
    ids=["adam", "sgd", "adamw", "clipped"],
)
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in ("mean_field", "with_points") else pytest.mark.slow) for f in REPLICATED],
)
def test_a_sharded_optimizer_gives_the_numbers_of_the_whole_one(comm, family, options):
    expected = alone(family, **options)
    step = train(make_step(comm, family, sharded=True, **options), range(2))
    assert_equal_to(End.of(step), expected)
    comm.check_replicas(list(step.posterior.parameters()), "parameters")


@pytest.mark.parametrize("family", ["mean_field", "with_points", "low_rank"])
def test_each_rank_of_a_sample_group_keeps_the_state_of_its_weights_only(comm, family):
    step = train(make_step(comm, family, sharded=True), range(1))
    slots, state = dict(step.posterior.named_parameters()), step.optimizer.optimizer.state_dict()["state"]
    assert len(state) == len(slots)
    for slot, of_slot in zip(slots.values(), state.values()):
        count = comm.grid.share(slot.shape[-1], "sample")  # a range of weights, the same for all their slots
        for name in ("exp_avg", "exp_avg_sq"):
            assert of_slot[name].shape == (*slot.shape[:-1], len(count))
    before = comm.traffic.num_collectives
    train(step, range(1, 2))
    per_step = (comm.traffic.num_collectives - before) / len(
        list(global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 5, 1))
    )
    # over samples: reduce-scatter, what stands behind the gradient, gather; over data: the part, what stands behind
    assert per_step == 3 * (comm.grid.sample_size > 1) + 2 * (comm.grid.data_size > 1)


@pytest.mark.parametrize("family", ["mean_field", "with_points", "low_rank", "ensemble"])
@pytest.mark.parametrize(
    "options",
    [LAMB, pytest.param({"name": "torch.optim.Adafactor"}, marks=pytest.mark.slow)],
    ids=["lamb", "adafactor"],
)
def test_optimizers_that_look_at_tensors_see_each_weight(comm, family, options):
    expected = alone(family, **options)
    step = train(make_step(comm, family, **options), range(2))
    assert_equal_to(End.of(step), expected)
    norms = [p.norm() for p in step.optimizer.optimizer.param_groups[0]["params"]]
    assert len(norms) == len(step.posterior.buffer.named(dict(step.posterior.named_parameters()))) > 3


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sharded": True},
        pytest.param(LAMB, marks=pytest.mark.slow),
        pytest.param({"name": "SGD"}, marks=pytest.mark.slow),
    ],
    ids=["adam", "sharded", "lamb", "sgd"],
)
def test_a_state_of_this_grid_goes_on_in_one_process_and_back(comm, family, options):
    if family == "ensemble" and options.get("sharded"):
        pytest.skip("an ensemble is spread already")
    expected = alone(family, **options)
    step = train(make_step(comm, family, **options), range(1))
    state = step.gather_state()
    copied = comm.gather_objects(state)[0]
    without = {name: value for name, value in options.items() if name != "sharded"}

    def go_on():
        one = make_step(GridComm(Grid()), family, **without)
        one.load_state_dict(copied)
        assert one.num_steps == step.num_steps
        train(one, range(1, 2))
        return End.of(one), train(make_step(GridComm(Grid()), family, **without), range(1)).state_dict()

    end, state = by_one(go_on)
    assert_equal_to(end, expected)
    back = make_step(comm, family, **options)
    is_spread = (family == "ensemble" or options.get("sharded")) and comm.grid.sample_size > 1
    with pytest.raises(ConfigError, match="gather_state") if is_spread else contextlib.nullcontext():
        back.state_dict()
    back.load_state_dict(state)
    with pytest.raises(ConfigError, match="generator other"):
        back.load_state_dict({**state, "generator": "other"})
    assert_equal_to(End.of(train(back, range(1, 2))), expected)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("compression", "tolerance"), [("fp16", 5e-3), ("bf16", 4e-2)])
def test_compressed_gradients_train_alike_and_stay_replicas(sample_size, compression, tolerance, sharded):
    """SGD: the error of the parameters is that of the gradients. Adam's would not be: it divides by their size."""
    options = {"name": "SGD", "arguments": {"momentum": 0.9}}
    comm = connect(sample_size, "cpu", "axes", compression)
    start, expected = make_step(GridComm(Grid()), "mean_field", **options), alone("mean_field", **options)
    step = train(make_step(comm, "mean_field", sharded=sharded, **options), range(2))
    comm.check_replicas(list(step.posterior.parameters()), "parameters")
    moved = (expected.flat - start.posterior.buffer.flat).norm()
    error = ((step.posterior.buffer.flat - expected.flat).norm() / moved).item()
    assert error < tolerance
    if comm.grid.world_size > 1:
        assert error > 1e-7  # its mirror: something was rounded


def test_what_cannot_be_sharded_is_refused(comm):
    with pytest.raises(ConfigError, match=r"^sharded True.*spread over the sample axis"):
        make_step(comm, "ensemble", sharded=True)
    with pytest.raises(ConfigError, match=r"^sharded Lamb.*every number by itself"):
        make_step(comm, "mean_field", sharded=True, **LAMB)
    with pytest.raises(ConfigError, match=r"^arguments .*nonsense"):
        make_step(comm, "mean_field", arguments={"nonsense": 1})
    posterior = FAMILIES["mean_field"](comm)
    optimizer = ShardedOptimizer(lambda parameters: torch.optim.Adam(parameters, lr=1e-3), posterior, comm)
    assert (
        VariationalStep(posterior, Categorical(3), optimizer, comm, num_samples=4, num_train_examples=31).optimizer
        is optimizer
    )
