"""For one config and one seed the result does not depend on the grid; and its mirror."""

import importlib
import math
from contextlib import nullcontext

import pytest
import torch
from conftest import LIBRARY
from reference import (
    GLOBAL_BATCH_SIZE,
    assert_layout_law,
    make_problem,
    make_step,
    relative_difference,
    train,
    train_alone,
)
from torch import nn

from hpc_bnn import (
    Categorical,
    Gaussian,
    Grid,
    GridComm,
    MeanFieldGaussian,
    NegativeElbo,
    VariationalStep,
    connect,
    predict_classes,
    predict_values,
    testing,
)
from hpc_bnn.errors import ConfigError, DataError, NonFiniteError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.training.optim import JobOptimizer
from hpc_bnn.training.reducer import Reducer

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}  # float32: 1e-5 per step, five steps


@pytest.mark.parametrize("num_samples", [16, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_parameters_after_five_steps_equal_those_of_one_process(comm, dtype, num_samples):
    expected = train_alone(dtype, num_samples)
    step, results = train(comm, dtype, num_samples)
    assert_layout_law(results, expected, TOLERANCE[dtype])
    comm.check_replicas(list(step.posterior.parameters()), "parameters")


@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-5), (3e3, 2e-3)])
def test_batch_norm_takes_two_sums_per_layer_and_sample(comm, mean, tolerance):
    """One forward, one backward; in float32 with the digits of two passes: those that a mean of float32 leaves."""
    x = mean + torch.randn(13, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(13) % 3
    found = []
    for one in (comm, GridComm(Grid())):
        with Key(0, Stream.INIT).global_generator():
            net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        posterior = MeanFieldGaussian(net, init_std=0.05)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        step = VariationalStep(posterior, Categorical(3), optimizer, one, num_samples=4, num_train_examples=13)
        mine = one.grid.local_examples(13)
        results = [step(x[mine], y[mine], 13) for _ in range(3)]
        before = one.traffic.num_collectives
        step(x[mine], y[mine], 13)
        taken = one.traffic.num_collectives - before
        axes = (one.grid.sample_size > 1) + (one.grid.data_size > 1)
        samples = len(one.grid.local_samples(4))
        # the inputs of the first layer need no gradient
        assert taken == axes + (3 * samples if one.grid.data_size > 1 else 0)
        found.append(
            (results[-1].nelbo, torch.cat([b.flatten().float() for b in net.buffers()]), posterior.buffer.flat)
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=tolerance)
    for got, expected in zip(found[0][1:], found[1][1:]):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_broken_layout_law_names_the_parameter_the_step_and_the_grids(comm, monkeypatch):
    """Broken on purpose: from the second step on, one bias is moved."""
    expected = train_alone()
    reduce_, count = Reducer.reduce_, iter(range(5))

    def broken(self):
        reduce_(self)
        if next(count) >= 1:
            self.posterior.state_dict()["2.bias.loc"].add_(1e-6)

    monkeypatch.setattr(Reducer, "reduce_", broken)
    _, results = train(comm)
    grid = f"{comm.grid.sample_size} x {comm.grid.data_size}"
    with pytest.raises(AssertionError, match=f"grid {grid} and grid 1 x 1 differ first after step 2.*2.bias.loc by"):
        assert_layout_law(results, expected)


@pytest.mark.parametrize("reduction", ["axes", "world", "shares", "auto"])
def test_the_route_of_the_reduction_does_not_matter(sample_size, reduction):
    comm = connect(sample_size, "cpu", reduction)
    assert_layout_law(train(comm)[1], train_alone())


def test_mirror_samples_differ_on_every_rank_and_only_with_the_sample(comm):
    step = make_step(comm, num_samples=comm.grid.sample_size)  # one sample per rank
    posterior = step.posterior
    (sample,) = comm.grid.local_samples(comm.grid.sample_size)
    posterior.begin_()
    posterior.draw_(Key(5, Stream.NOISE, sample=sample))
    drawn = comm.gather_objects([p.detach().clone() for p in posterior.module.parameters()])
    grids = [Grid(comm.grid.world_size, comm.grid.sample_size, rank) for rank in range(comm.grid.world_size)]
    for a in grids:
        for b in grids:
            same = [torch.equal(x, y) for x, y in zip(drawn[a.rank], drawn[b.rank])]
            assert all(same) if a.sample_index == b.sample_index else not any(same)


def test_mirror_the_local_gradients_differ_and_their_sum_is_the_jobs(comm, monkeypatch):
    step = make_step(comm)
    x, y = make_problem(torch.float64)
    local = []
    original = comm.sum_

    def spy(tensors, axis="world"):
        local.append(tensors.clone())
        original(tensors, axis)

    monkeypatch.setattr(comm, "sum_", spy)
    part = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    step.accumulate_(x[:GLOBAL_BATCH_SIZE][part], y[:GLOBAL_BATCH_SIZE][part], GLOBAL_BATCH_SIZE)
    step.reduce_()
    everyones = comm.gather_objects(local[0])
    for i, a in enumerate(everyones):
        assert not any(torch.equal(a, b) for b in everyones[:i])
    torch.testing.assert_close(step.posterior.buffer.reduced, sum(everyones), rtol=1e-12, atol=1e-15)


FUNCTIONS = {
    "horovod": (
        "horovod.torch",
        ("allreduce_", "allreduce", "allreduce_async_", "allgather", "broadcast", "broadcast_",
         "grouped_allreduce", "grouped_allreduce_", "alltoall", "reducescatter", "barrier"),
    ),
    "torch": (
        "torch.distributed",
        ("all_reduce", "all_gather", "all_gather_into_tensor", *[n for n in dir(torch.distributed) if n == "all_gather_single"], "broadcast", "all_to_all_single", "reduce_scatter_tensor",
         "reduce", "gather", "scatter", "barrier"),
    ),
}  # fmt: skip
"""The collectives of each library; the first is the one that a step makes."""


class Counting:
    """A communicator of MPI whose calls are noted."""

    def __init__(self, comm, calls):
        self._comm, self._calls = comm, calls

    def __getattr__(self, name):
        def call(*arguments):
            self._calls.append((name, arguments[1].nbytes))
            return getattr(self._comm, name)(*arguments)

        return call


def test_a_step_makes_one_collective_per_axis_and_moves_the_gradient_once(comm, monkeypatch):
    step = make_step(comm)
    x, y = make_problem(torch.float64)
    part, calls = comm.grid.local_examples(GLOBAL_BATCH_SIZE), []
    step(x[:GLOBAL_BATCH_SIZE][part], y[:GLOBAL_BATCH_SIZE][part], GLOBAL_BATCH_SIZE)  # the first compares more
    module, names = FUNCTIONS.get(LIBRARY, (None, ("Allreduce",)))
    if comm.library == "mpi":
        for axis in comm.grid.axes:
            monkeypatch.setitem(comm.objects.comms, axis, Counting(comm.objects.comms[axis], calls))
    elif comm.library != "none":
        library = importlib.import_module(module)
        for name in names:
            original = getattr(library, name)

            def spy(*args, _name=name, _original=original, **kwargs):
                calls.append((_name, args[0].numel() * args[0].element_size()))
                return _original(*args, **kwargs)

            monkeypatch.setattr(library, name, spy)
    objects = comm.traffic.num_object_collectives
    before = comm.traffic.num_collectives, comm.traffic.num_bytes
    step(x[:GLOBAL_BATCH_SIZE][part], y[:GLOBAL_BATCH_SIZE][part], GLOBAL_BATCH_SIZE)
    axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
    num_bytes = 8 * (2 * step.posterior.num_weights + len(step.posterior.buffer.tally))
    assert calls == [(names[0], num_bytes)] * axes
    assert comm.traffic.num_collectives - before[0] == axes
    assert comm.traffic.num_bytes - before[1] == axes * num_bytes
    assert comm.traffic.num_object_collectives == objects


def test_more_data_groups_than_examples(comm):
    """A rank without examples adds nothing and the step stays exact."""
    x, y = make_problem(torch.float64)
    alone, step = make_step(GridComm(Grid())), make_step(comm)
    expected = alone(x[:1], y[:1], 1)
    part = comm.grid.local_examples(1)
    got = step(x[:1][part], y[:1][part], 1)
    assert got.nelbo == pytest.approx(expected.nelbo, rel=1e-12)
    assert relative_difference(step.posterior.loc, alone.posterior.loc) < 1e-12


@pytest.mark.parametrize("wrong", [3, -100])
@pytest.mark.parametrize("number", [0, 1])
def test_a_class_that_is_none_stops_all_before_the_update(comm, number, wrong):
    """Of the last example of a batch, which only the last data group sees; on a CPU torch would raise there alone."""
    step, (x, y) = make_step(comm), make_problem(torch.float64)
    y = torch.where(torch.arange(len(y)) == GLOBAL_BATCH_SIZE - 1, wrong, y) if number == 0 else y.clone()
    mine = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    if number:
        step(x[mine], y[mine], GLOBAL_BATCH_SIZE)
        y[GLOBAL_BATCH_SIZE - 1] = wrong
    before = [p.detach().clone() for p in step.posterior.parameters()]
    who = [
        rank for rank, part in enumerate(comm.gather_objects(mine)) if GLOBAL_BATCH_SIZE - 1 in range(*part.indices(99))
    ]
    with pytest.raises(
        DataError, match=rf"a target is {wrong} on rank {', '.join(map(str, who))} in step {number}, and"
    ):
        step(x[mine], y[mine], GLOBAL_BATCH_SIZE)
    assert all(map(torch.equal, before, step.posterior.parameters())) and step.num_steps == number


def test_batch_norm_of_one_example_in_the_job_stops_all(comm):
    """With one example on each rank there are several in the job, unless there is one data group."""
    with Key(5, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    posterior = MeanFieldGaussian(net)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    step = VariationalStep(posterior, Categorical(3), optimizer, comm, num_samples=16, num_train_examples=31)
    x, y = make_problem(torch.float64)
    for size in (comm.grid.data_size + 1, max(2, comm.grid.data_size), 1, 2):
        mine = comm.grid.local_examples(size)
        if size == 1:
            with pytest.raises(ConfigError, match="one value per channel in the whole job"):
                step(x[mine], y[mine], 1)
        else:
            step(x[mine], y[mine], size)
    comm.check_replicas(list(posterior.parameters()), "parameters")


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_an_embedding_that_looks_at_the_whole_batch_wants_one_data_group(comm, option):
    net = nn.Sequential(nn.Embedding(9, 4, **option), nn.Flatten(), nn.Linear(8, 3)).double()
    posterior = MeanFieldGaussian(net)
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    is_divided = comm.grid.data_size > 1
    with pytest.raises(ConfigError, match="sample_size the number of ranks") if is_divided else nullcontext():
        VariationalStep(posterior, Categorical(3), optimizer, comm, num_samples=16, num_train_examples=31)


def test_nan_on_one_rank_stops_all_before_the_update(comm):
    step = make_step(comm)
    x, y = make_problem(torch.float64)
    last = comm.grid.world_size - 1
    part = comm.grid.local_examples(GLOBAL_BATCH_SIZE)
    mine = x[:GLOBAL_BATCH_SIZE][part].clone()
    if comm.grid.rank == last:
        mine[0] = math.nan
    before = step.posterior.loc.detach().clone()
    with pytest.raises(NonFiniteError, match=rf"step 0.*on rank {last} on "):
        step(mine, y[:GLOBAL_BATCH_SIZE][part], GLOBAL_BATCH_SIZE)
    assert torch.equal(step.posterior.loc, before)


@pytest.mark.parametrize("num_samples", [7, 1])
def test_predictive_equals_that_of_one_process(comm, num_samples):
    """Also with fewer samples than ranks of the sample axis."""
    x, _ = make_problem(torch.float64)
    step = make_step(GridComm(Grid()))
    expected = predict_classes(step.posterior, Categorical(3), GridComm(Grid()), x, num_samples=num_samples)
    got = predict_classes(step.posterior, Categorical(3), comm, x, num_samples=num_samples)
    torch.testing.assert_close(got.probabilities, expected.probabilities, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got.std, expected.std, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_samples", [7, 1])
def test_predictive_of_numbers_equals_that_of_one_process(comm, num_samples):
    """Also with fewer samples than ranks of the sample axis."""
    alone, here = (
        testing.make_step(c, NegativeElbo(), Gaussian(2), torch.float64, num_samples=4)
        for c in (GridComm(Grid()), comm)
    )
    x, y = testing.make_examples(alone.likelihood, torch.float64)
    expected, got = (
        predict_values(step.posterior, step.likelihood, step.comm, x, y, num_samples=num_samples)
        for step in (alone, here)
    )
    for name in ("mean", "aleatoric_variance", "epistemic_variance", "log_prob"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-11, atol=1e-14)


def test_the_norm_of_the_jobs_gradient_is_clipped(comm):
    """Not that of a rank's: with SGD a clipped step has exactly the length of the norm."""
    lengths, ends = [], []
    for max_norm in (None, 0.05):
        for grid in (GridComm(Grid()), comm):
            step = make_step(grid, max_gradient_norm=max_norm)
            optimizer = torch.optim.SGD(step.posterior.parameters(), lr=1.0)
            step.optimizer = JobOptimizer.of(optimizer, step.posterior, grid)
            before = [p.detach().clone() for p in step.posterior.parameters()]
            x, y = make_problem(torch.float64)
            mine = torch.arange(GLOBAL_BATCH_SIZE)[grid.grid.local_examples(GLOBAL_BATCH_SIZE)]
            step(x[mine], y[mine], GLOBAL_BATCH_SIZE)
            moved = [p.detach() - b for p, b in zip(step.posterior.parameters(), before)]
            lengths.append(torch.cat([m.flatten() for m in moved]).norm().item())
            ends.append(torch.cat([p.detach().flatten() for p in step.posterior.parameters()]))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-12) and lengths[0] > 0.1
    assert lengths[2:] == pytest.approx([0.05, 0.05], rel=1e-4)
    assert relative_difference(ends[3], ends[2]) < 1e-12


@pytest.mark.parametrize("wish", ["wants_stop", "wants_checkpoint"])
def test_what_a_rank_wishes_reaches_all_with_the_next_step(comm, wish):
    step, other = make_step(comm), {"wants_stop": "wants_checkpoint", "wants_checkpoint": "wants_stop"}[wish]
    x, y = make_problem(torch.float64)
    mine = torch.arange(GLOBAL_BATCH_SIZE)[comm.grid.local_examples(GLOBAL_BATCH_SIZE)]
    assert not getattr(step(x[mine], y[mine], GLOBAL_BATCH_SIZE), wish)
    setattr(step, wish, comm.grid.rank == comm.grid.world_size - 1)
    before = comm.traffic.num_collectives, comm.traffic.num_object_collectives
    result = step(x[mine], y[mine], GLOBAL_BATCH_SIZE)
    assert getattr(result, wish) and not getattr(result, other)
    made = comm.traffic.num_collectives - before[0]
    assert made == sum(extent > 1 for extent in (comm.grid.sample_size, comm.grid.data_size))
    assert comm.traffic.num_object_collectives == before[1]


def test_a_tree_of_tensors_reaches_all_ranks(comm):
    mine = comm.grid.rank
    tree = {"a": [torch.full((3,), mine), {"b": torch.tensor(float(mine))}], "n": mine, "none": None}
    got = comm.broadcast_tree(tree if mine == comm.grid.world_size - 1 else None, comm.grid.world_size - 1)
    root = comm.grid.world_size - 1
    assert got["a"][0].tolist() == [root] * 3 and got["a"][1]["b"].item() == root
    assert got["n"] == root and got["none"] is None
