"""What must be equal on ranks and is not: an error on all ranks before the update, or equal replicas; and no false alarm."""

import contextlib
import copy
import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import hpc_bnn
from hpc_bnn.config import AugmentationConfig, Config, ModelConfig
from hpc_bnn.errors import RankError
from hpc_bnn.run.experiment import check_same_start
from hpc_bnn.training import equality
from hpc_bnn.training.equality import NUM_PLACES

NUM_EXAMPLES = 13
"""Not a multiple of an extent."""


def make_step(comm, dtype=torch.float32, family="mean_field", **options):
    torch.manual_seed(0)
    norm = nn.LayerNorm(8) if family == "ensemble" else nn.BatchNorm1d(8)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), norm, nn.Linear(8, 3)).to(dtype)
    if family == "ensemble":
        mine = comm.grid.local_samples(4)
        posterior = hpc_bnn.DeepEnsemble(lambda: copy.deepcopy(net), 4, mine)
    else:
        of_posterior = {name: options.pop(name) for name in ("estimator", "prior") if name in options}
        posterior = hpc_bnn.MeanFieldGaussian(net, **of_posterior)
    optimizer = torch.optim.Adam(posterior.parameters())
    options = {"likelihood": hpc_bnn.Categorical(3), "num_samples": 4, "num_train_examples": 100} | options
    return hpc_bnn.VariationalStep(posterior, optimizer=optimizer, comm=comm, **options)


def batch(dtype=torch.float32, count=NUM_EXAMPLES):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 6, dtype=dtype, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def parts(comm, count=NUM_EXAMPLES, dtype=torch.float32):
    mine = comm.grid.local_examples(count)
    return [t[mine] for t in batch(dtype, count)]


def is_odd(comm):
    """Whether this rank is the one that differs: the last of the job."""
    return comm.grid.rank == comm.grid.world_size - 1


def one_bit(x, y):
    x = x.clone()
    x.view(torch.int32)[-1, -1] ^= 1
    return x, y


CHANGES = {
    "a bit of an input": (one_bit, "inputs"),
    "two inputs exchanged": (lambda x, y: (x.flip(1), y), "inputs"),
    "examples in another order": (lambda x, y: (x.flip(0), y.flip(0)), "inputs"),
    "a target": (lambda x, y: (x, (y + (torch.arange(len(y)) == 0)) % 3), "targets"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_examples_in_a_sample_group_are_an_error_on_all_ranks(comm, change):
    """Whatever differs; the parameters stay as they are, and the next, sound step is made."""
    step, (function, named) = make_step(comm), CHANGES[change]
    if comm.grid.sample_size == 1:
        pytest.skip("no sample group of several ranks")
    x, y = parts(comm)
    step(x, y, NUM_EXAMPLES)
    before = step.posterior.buffer.flat.clone()
    with pytest.raises(RankError, match=f"the digest of the {named} is .* on rank"):
        step(*(function(x, y) if is_odd(comm) else (x, y)), NUM_EXAMPLES)
    assert torch.equal(step.posterior.buffer.flat, before) and step.num_steps == 1
    step(x, y, NUM_EXAMPLES)


def test_large_batches_are_compared_at_other_places_in_each_step(comm):
    """A difference in one number of many is met after some steps."""
    if comm.grid.sample_size == 1:
        pytest.skip("no sample group of several ranks")
    step, count = make_step(comm), NUM_PLACES * comm.grid.data_size
    x, y = parts(comm, count)  # of 6 numbers each: one place in six
    x = one_bit(x, y)[0] if is_odd(comm) else x
    with pytest.raises(RankError, match="the digest of the inputs"):
        for _ in range(20):
            step(x, y, count)
    assert step.num_steps < 20


SETTINGS = {
    "kl_weight": lambda step: setattr(step, "kl_weight", lambda num_steps: 0.5),
    "the learning rate": lambda step: step.optimizer.optimizer.param_groups[0].update(lr=0.5),
    "num_train_examples": lambda step: setattr(step, "num_train_examples", 99),
    "the number of steps": lambda step: setattr(step, "num_steps", 7),
    "seed": lambda step: vars(step).update(seed=1),
    # Not the BatchNorm, whose sums the others would wait for
    "the number of layers in training mode": lambda step: step.posterior.module[1].eval(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_an_error_that_names_them_and_the_ranks(comm, name):
    if comm.grid.world_size == 1:
        pytest.skip("one rank")
    step = make_step(comm)
    if is_odd(comm):
        SETTINGS[name](step)
    with pytest.raises(RankError, match=f"{name} is .* on rank"):
        step(*parts(comm), NUM_EXAMPLES)


class OfDevice(torch.Tensor):
    is_cpu = False


OF_WEIGHTS = {
    "other weights are loaded": lambda step: step.posterior.module.load_state_dict(
        {name: value + 1 for name, value in step.posterior.module.state_dict().items()}
    ),
    "a weight is edited": lambda step: step.posterior.module[0].weight.data[1, 2].mul_(-1),
    "all signs": lambda step: step.posterior.module[0].weight.data.neg_(),
    "the posterior's state is loaded": lambda step: step.posterior.load_state_dict(
        {name: value + 1 for name, value in step.posterior.state_dict().items()}
    ),
}
"""They are found before the next update."""
OF_ONE_RANK = OF_WEIGHTS | {
    "a slot is frozen": lambda step: next(step.posterior.parameters()).requires_grad_(False),
    "gradients are clipped": lambda step: setattr(step, "max_gradient_norm", 1e-3),
    "options of the optimizer": lambda step: step.updater.optimizer.param_groups[0].update(betas=(0.5, 0.5)),
    "the optimizer's state is lost": lambda step: step.updater.optimizer.state.clear(),
    "a rate that is a tensor": lambda step: step.updater.optimizer.param_groups[0].update(lr=torch.tensor(0.5)),
}


@pytest.mark.parametrize("family", ["mean_field", "ensemble"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edit", OF_ONE_RANK)
def test_what_one_rank_does_to_its_replica_after_the_first_step_is_an_error_on_all(
    comm, edit, dtype, family, monkeypatch
):
    """At once, or once the update has made the parameters differ; the ranks go on together when they have the same again."""
    if comm.grid.world_size == 1 or (family == "ensemble" and comm.grid.data_size == 1):
        pytest.skip("nobody else has these parameters")
    if edit == "all signs":  # digests as on a GPU
        bits = equality._bits
        monkeypatch.setattr(equality, "_bits", lambda tensor: bits(tensor).as_subclass(OfDevice))
    step, lr = make_step(comm, dtype, family), torch.tensor(1e-3)
    step.updater.optimizer.param_groups[0].update(lr=lr)
    step(*parts(comm, dtype=dtype), NUM_EXAMPLES)
    state = {name: value.clone() for name, value in step.posterior.state_dict().items()}
    if is_odd(comm):
        OF_ONE_RANK[edit](step)
    with pytest.raises(RankError, match=r"the digest of the parameters is .* on rank .*broadcast_"):
        for _ in range(1 if edit in OF_WEIGHTS else 2):
            step(*parts(comm, dtype=dtype), NUM_EXAMPLES)
    step.posterior.load_state_dict(state)
    step(*parts(comm, dtype=dtype), NUM_EXAMPLES)
    step.comparison.looks = False
    if is_odd(comm):
        OF_ONE_RANK[edit](step)
    step(*parts(comm, dtype=dtype), NUM_EXAMPLES)


PREDICTED = {
    "the digest of x": lambda posterior, asked: asked["x"].add_(1),
    "the digest of x ": lambda posterior, asked: asked.update(x=asked["x"][1:]),
    "the digest of the parameters": lambda posterior, asked: posterior.module[0].weight.data.add_(1),
    "num_samples": lambda posterior, asked: asked.update(num_samples=3),
    "seed": lambda posterior, asked: asked.update(seed=3),
}


@pytest.mark.parametrize("likelihood", [hpc_bnn.Categorical(3), hpc_bnn.Gaussian(3, scale=1.0)])
@pytest.mark.parametrize("named", PREDICTED)
def test_ranks_of_a_sample_group_that_do_not_predict_the_same_are_an_error(comm, named, likelihood):
    """Each group is compared by itself: data groups predict other examples."""
    predict = hpc_bnn.predict_classes if likelihood.num_classes else hpc_bnn.predict_values
    posterior, x = make_step(comm).posterior, batch()[0] + comm.grid.data_index
    asked = {"x": x, "num_samples": 4, "seed": 0}
    before = comm.traffic.num_collectives
    predict(posterior, likelihood, comm, **asked)
    sums = 2 if likelihood.num_classes else 3
    assert comm.traffic.num_collectives - before == sums * (comm.grid.sample_size > 1)
    if comm.grid.sample_index == comm.grid.sample_size - 1:
        PREDICTED[named](posterior, asked)
    with (
        contextlib.nullcontext()
        if comm.grid.sample_size == 1
        else pytest.raises(RankError, match=f"{named.strip()} is ")
    ):
        predict(posterior, likelihood, comm, **asked)


MODELS = {
    "the objective is .*LogPredictive": {"objective": hpc_bnn.LogPredictive()},
    "the likelihood is .*Gaussian": {"likelihood": hpc_bnn.Gaussian(3, scale=1.0)},
    "the prior is .*std=0.5": {"prior": hpc_bnn.GaussianPrior(0.5)},
}


@pytest.mark.parametrize("said", MODELS)
def test_another_model_on_one_rank_is_an_error_before_the_objective_exchanges_anything(comm, said):
    if comm.grid.world_size == 1:
        pytest.skip("one rank")
    step = make_step(comm, **(MODELS[said] if is_odd(comm) else {}))
    x, y = parts(comm)
    if isinstance(step.likelihood, hpc_bnn.Gaussian):
        y = nn.functional.one_hot(y, 3).float()
    with pytest.raises(RankError, match=f"{said}.* on rank"):
        step(x, y, NUM_EXAMPLES)


@pytest.mark.parametrize("chunk_size", [1, 2, 99])
def test_a_chunk_size_of_one_on_one_rank_hangs_nothing(comm, chunk_size):
    """As where a rank has fewer samples than others, and each takes them all at once."""
    step = make_step(comm, chunk_size=chunk_size if is_odd(comm) else 2)
    assert step(*parts(comm), NUM_EXAMPLES).nelbo > 0


@pytest.mark.parametrize("told", [NUM_EXAMPLES - 1, 2 * NUM_EXAMPLES])
def test_a_wrong_global_batch_size_is_an_error(comm, told):
    """As of the last, smaller batch of an epoch, or of a batch that each rank counts by itself."""
    step = make_step(comm)
    with pytest.raises(RankError, match=rf"global_batch_size {told}: .*13 examples"):
        step(*parts(comm), told)


def test_noise_by_places_wants_the_examples_of_the_place(comm):
    """Other shares of the batch are right without such noise, and an error with it."""
    if comm.grid.data_size == 1:
        pytest.skip("one data group")
    x, y = batch()
    odd = slice(0, 1) if comm.grid.data_index == 0 else slice(1, None)
    odd = odd if comm.grid.data_index < 2 else slice(0, 0)
    make_step(comm)(x[odd], y[odd], NUM_EXAMPLES)
    step = make_step(comm, estimator="flipout")
    with pytest.raises(RankError, match=r"the data groups have .*place"):
        step(x[odd], y[odd], NUM_EXAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["mean_field", "ensemble"])
def test_no_false_alarm(comm, dtype, family):
    """Uneven parts, empty parts, micro-batches, inputs of any dtype, own views."""
    step = make_step(comm, dtype, family)
    step.posterior.module.eval()  # a batch norm refuses micro-batches in training
    for count in (NUM_EXAMPLES, comm.grid.data_size, 64):
        step(*parts(comm, count, dtype), count)
    step.micro_batch_size = 2
    x, y = parts(comm, dtype=dtype)
    step(x, y, NUM_EXAMPLES)
    step(x + comm.grid.sample_index, y, NUM_EXAMPLES, views="own")
    assert step.num_steps == 5
    with pytest.raises(RankError) if comm.grid.sample_size > 1 else contextlib.nullcontext():
        step(x, (y + comm.grid.sample_index) % 3, NUM_EXAMPLES, views="own")


@pytest.mark.parametrize("family", ["mean_field", "ensemble"])
def test_replicas_that_differ_at_the_start_become_equal_and_that_is_said(comm, family, caplog):
    step = make_step(comm, family=family)
    others = make_step(comm, family=family)
    with torch.no_grad():
        if is_odd(comm):
            step.posterior.buffer.flat[0] += 1
            for buffer in step.posterior.module.buffers():
                buffer += 1
    with caplog.at_level(logging.WARNING, "hpc_bnn"):
        step(*parts(comm), NUM_EXAMPLES)
    others(*parts(comm), NUM_EXAMPLES)
    speaks = comm.grid.world_size > 1 and comm.grid.is_first("world")
    if family == "mean_field":
        assert all((name in caplog.text) == speaks for name in ("2.running_var", "2.num_batches_tracked", "loc"))
    if comm.grid.world_size > 1 and (family == "mean_field" or comm.grid.data_size > 1):
        assert torch.equal(step.posterior.buffer.flat, others.posterior.buffer.flat)
        for a, b in zip(step.posterior.module.buffers(), others.posterior.module.buffers()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("prior", [hpc_bnn.GaussianPrior(mean="initial"), hpc_bnn.LaplacePrior(0.5, mean="initial")])
def test_priors_and_frozen_weights_of_other_seeds_become_equal(comm, prior):
    """What belongs to no slot, and still decides the loss: a prior around the initial weights, layers without gradients."""
    posteriors = []
    for seed in (0, int(is_odd(comm))):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        net[0].requires_grad_(False)
        posterior = hpc_bnn.MeanFieldGaussian(net, prior=prior)
        step = hpc_bnn.VariationalStep(
            posterior, hpc_bnn.Categorical(3), torch.optim.SGD(posterior.parameters(), lr=0.1), comm,
            num_samples=4, num_train_examples=100,
        )  # fmt: skip
        for _ in range(2):
            step(*parts(comm), NUM_EXAMPLES)
        comm.check_replicas([*posterior.parameters(), *posterior.module.parameters()], "the network")
        posteriors.append(posterior)
    assert comm.grid.world_size == 1 or torch.equal(posteriors[0].buffer.flat, posteriors[1].buffer.flat)


def test_ranks_that_ask_for_other_grids_are_an_error(comm):
    if comm.grid.world_size == 1:
        pytest.skip("one rank")
    with pytest.raises(RankError, match=r"joining the grid: .*sample_size is .* on rank"):
        hpc_bnn.connect(comm.grid.world_size if is_odd(comm) else 1, device="cpu")


def other_seed(config):
    return dataclasses.replace(config, seed=1)


def other_content(config):
    Path("net.pt").write_text("other")
    return config


def other_transform(config):
    Path("users_transform.py").write_text("# another version\n")
    return config


def other_mask(config):
    Path("mask.npy").write_text("other")
    return config


def other_code(config):
    Path("users_network.py").write_text("# another version\n")
    return config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_seed, "seed is 0 on rank"),
        (other_content, "the content of model.pretrained is"),
        (other_code, "the content of model.name is"),
        (other_transform, "the content of augmentation.transforms, users_transform.Mix is"),
        (other_mask, "the content of model.arguments.*, mask.npy is|the content of model.arguments.mask is"),
    ],
)
def test_runs_that_start_from_different_things_are_an_error(comm, change, named, tmp_path, monkeypatch):
    """Each rank has a directory of its own, as on nodes without a common file system."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("net.pt").write_text("weights")
    Path("users_network.py").write_text("# a network\n")
    Path("users_transform.py").write_text("# a transform\n")
    Path("mask.npy").write_text("mask")
    config = Config(
        model=ModelConfig(name="users_network.Net", pretrained="net.pt", arguments={"mask": "mask.npy"}),
        augmentation=AugmentationConfig(transforms=[{"name": "users_transform.Mix", "rate": 0.5}]),
    )
    check_same_start(config, comm)
    with pytest.raises(RankError, match=named) if comm.grid.world_size > 1 else contextlib.nullcontext():
        check_same_start(change(config) if is_odd(comm) else config, comm)
