"""Collectives on every grid of this job."""

from dataclasses import replace

import pytest
import torch
from conftest import LIBRARY

from hpc_bnn import comm as comm_module
from hpc_bnn.comm import horovod, packing
from hpc_bnn.errors import CommunicationError, ConfigError, DataError, RankError
from hpc_bnn.grid import share


def test_communicators_and_process_sets_are_the_groups_of_the_grid(comm, world):
    grid = comm.grid
    assert (grid.world_size, grid.rank) == (world.size, world.rank)
    if world.size == 1:
        assert comm.library == "none"
        return
    assert (comm.sample_comm.size, comm.sample_comm.rank) == (grid.sample_size, grid.sample_index)
    assert (comm.data_comm.size, comm.data_comm.rank) == (grid.data_size, grid.data_index)
    assert comm.sample_comm.allgather(world.rank) == list(grid.sample_group())
    assert comm.data_comm.allgather(world.rank) == list(grid.data_group())
    assert comm.library == LIBRARY
    assert comm.group_ranks("sample") == list(grid.sample_group())
    assert comm.group_ranks("data") == list(grid.data_group())
    assert comm.group_ranks("world") == list(range(world.size))
    assert (comm.sample_set is None, comm.data_set is None) == (grid.sample_size == 1, grid.data_size == 1)


@pytest.mark.skipif(LIBRARY != "horovod", reason="only Horovod has process sets")
def test_a_grid_of_too_many_sets_is_refused_before_horovod_starts(sample_size, world, monkeypatch):
    if sample_size in (1, world.size):
        return  # no sets
    facts = replace(horovod.mpi_facts(), library="MPICH 5.0.2")
    monkeypatch.setattr(horovod, "mpi_facts", lambda: facts)
    monkeypatch.setattr(horovod, "MPICH_SETS", 3)
    with pytest.raises(CommunicationError, match=r"makes 4 process sets, and with MPICH.*Use .*backend.* mpi or torch"):
        comm_module.connect(sample_size, "cpu", backend="horovod")
    assert comm_module.connect(sample_size, "cpu", backend="auto").library == "mpi"


def test_sums_run_over_the_right_ranks(comm):
    grid = comm.grid
    for axis, group in (
        ("sample", grid.sample_group()),
        ("data", grid.data_group()),
        ("world", range(grid.world_size)),
    ):
        x = torch.tensor([1.0, 10.0**grid.rank], dtype=torch.float64)
        n = torch.tensor(grid.rank)
        comm.sum_([x, n], axis)
        assert x.tolist() == [len(group), sum(10.0**r for r in group)]
        assert n.item() == sum(group)
        top = torch.tensor([float(grid.rank), -float(grid.rank)])
        comm.max_(top, axis)
        assert top.tolist() == [max(group), -min(group)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows, num_columns", [(9, 13), (3, 2), (0, 5), (5, 0)])
def test_columns_of_all_rows_come_to_the_rank_of_their_share_and_go_back(comm, num_rows, num_columns, dtype):
    """Rows and columns are divided unevenly, and some ranks have none of them."""
    table = torch.arange(float(num_rows * num_columns), dtype=torch.float64).view(num_rows, num_columns).to(dtype)
    before = comm.traffic.num_collectives
    for axis in ("sample", "data"):
        size, index = comm.grid.extents[axis], comm.grid.indices[axis]
        rows, columns = ([share(n, size, part) for part in range(size)] for n in (num_rows, num_columns))
        counts = [len(part) for part in columns], [len(part) for part in rows]
        own = table[rows[index].start : rows[index].stop]
        sent = torch.cat([own[:, part.start : part.stop].flatten() for part in columns])
        came = comm.all_to_all(sent, counts[0], axis, counts[1])
        mine = columns[index]
        assert torch.equal(came.view(num_rows, len(mine)), table[:, mine.start : mine.stop]) and came.dtype == dtype
        assert torch.equal(comm.all_to_all(came, counts[1], axis, counts[0]), sent)
    axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
    assert comm.traffic.num_collectives - before == 2 * axes * bool(table.numel())


@pytest.mark.parametrize("bucket_bytes", [2**20, 100])
@pytest.mark.parametrize("count", [37, 8, 3, 1])
def test_reduce_scatter_gives_each_rank_its_share_of_the_sum(comm, count, bucket_bytes, monkeypatch):
    monkeypatch.setattr(packing, "SHARE_BUCKET_BYTES", bucket_bytes)
    before = comm.traffic.num_collectives
    comm.reduce_scatter_([torch.zeros(n, dtype=torch.float64) for n in (20, 3, 14)], "sample")
    num_buckets = 1 if bucket_bytes > 1000 else 4
    assert comm.traffic.num_collectives - before == num_buckets * (comm.grid.sample_size > 1)
    for axis, group, index in (
        ("sample", comm.grid.sample_group(), comm.grid.sample_index),
        ("data", comm.grid.data_group(), comm.grid.data_index),
    ):
        numbers = [torch.arange(1.0, n + 1, dtype=torch.float64) for n in (count, 2, count + 5)]
        flats = [n * 10**comm.grid.rank for n in numbers]
        before = [flat.clone() for flat in flats]
        parts = [part.clone() for part in comm.reduce_scatter_(flats, axis)]
        expected = [n * sum(10.0**rank for rank in group) for n in numbers]
        for flat, former, part, total in zip(flats, before, parts, expected):
            mine = share(len(flat), len(group), index)
            assert torch.equal(part, total[mine.start : mine.stop])
            flat[mine.start : mine.stop] = former[mine.start : mine.stop]
            assert torch.equal(flat, former)  # the rest is untouched
            flat[mine.start : mine.stop] = part
        comm.gather_shares_(flats, axis)
        assert all(map(torch.equal, flats, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("compression", "tolerance"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_compressed_sums_are_the_same_everywhere_and_right_to_the_bits_that_travel(
    sample_size, compression, tolerance, dtype
):
    comm = comm_module.connect(sample_size, "cpu", "axes", compression)
    plain = comm_module.connect(sample_size, "cpu")
    generator = torch.Generator().manual_seed(comm.grid.rank)
    flat = torch.randn(1001, generator=generator, dtype=dtype)
    flat *= torch.logspace(0, -8, 1001)  # as gradients are: of many sizes
    exact, got, untouched = flat.clone(), flat.clone(), flat.clone()
    plain.sum_(exact)
    traffic = comm.traffic.num_bytes
    comm.sum_(got, compressed=True)
    comm.check_replicas(got, "the sum")
    if comm.grid.world_size == 1:
        assert torch.equal(got, flat)
        return
    # Each number travels twice per axis; the errors are those of the addends
    num_axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
    size = flat.abs()
    plain.sum_(size)
    assert ((got - exact).abs() <= 3 * num_axes * tolerance * size + 1e-11 * num_axes).all()
    assert relative_error(got, exact) > tolerance / 100  # its mirror: it is rounded
    # halves of all numbers and of the own share, and the scales
    assert comm.traffic.num_bytes - traffic <= num_axes * (2 * 1001 * 1.5 + 2 + 4 * (comm.grid.world_size + 1))
    comm.sum_(untouched)
    torch.testing.assert_close(untouched, exact, rtol=1e-6, atol=1e-9)  # only where it is asked for
    (part,) = comm.reduce_scatter_([flat.clone()], "sample", compressed=True)
    mine = share(1001, comm.grid.sample_size, comm.grid.sample_index)
    of_group = flat.clone()
    plain.sum_(of_group, "sample")
    assert relative_error(part, of_group[mine.start : mine.stop]) < 2 * tolerance


def relative_error(got, exact):
    return ((got - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("compression", ["fp16", "bf16"])
@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-40, 0.0])
def test_the_smallest_numbers_are_compressed_to_numbers(sample_size, compression, size):
    comm = comm_module.connect(sample_size, "cpu", "axes", compression)
    flat = torch.tensor([size, 0.0, -size] * 20)
    comm.sum_(flat, compressed=True)
    torch.testing.assert_close(
        flat, comm.grid.world_size * torch.tensor([size, 0.0, -size] * 20), rtol=0.02, atol=1e-29
    )


def test_a_compressed_nan_is_not_lost(sample_size):
    comm = comm_module.connect(sample_size, "cpu", "axes", "fp16")
    for bad in (float("nan"), float("inf")):
        flat = torch.ones(9)
        if comm.grid.rank == comm.grid.world_size - 1:
            flat[4] = bad
        comm.sum_(flat, compressed=True)
        assert not flat.isfinite().all()


def test_all_reductions_give_the_same_sum(sample_size, world):
    sums = []
    for reduction in ("axes", "world", "shares", "auto"):
        comm = comm_module.connect(sample_size, "cpu", reduction)
        x = torch.arange(5.0) * (comm.grid.rank + 1)
        before = comm.traffic.num_collectives
        comm.sum_(x)
        sums.append(x)
        axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
        expected = {"world": min(axes, 1), "shares": 3 if axes == 2 else axes}.get(reduction, axes)
        assert comm.traffic.num_collectives - before == expected
    assert all(torch.equal(x, sums[0]) for x in sums)


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_by_shares_each_rank_sends_its_part_over_the_data_axis(sample_size, monkeypatch, compression):
    comm = comm_module.connect(sample_size, "cpu", "shares", compression)
    sent = []
    for name in ("_carry", "_carry_"):

        def noting(given, *arguments, carry=getattr(comm, name)):
            sent.extend([given.nbytes] if "data" in arguments else [])
            return carry(given, *arguments)

        monkeypatch.setattr(comm, name, noting)
    flat = torch.arange(1000.0) * (comm.grid.rank + 1)
    comm.sum_(flat, compressed=True)
    whole = torch.arange(1000.0) * sum(range(1, comm.grid.world_size + 1))
    assert (flat - whole).norm() <= (1e-2 if compression == "bf16" else 0) * whole.norm()
    comm.check_replicas([flat], "the sum")
    if comm.grid.data_size > 1 and compression == "none":
        assert sum(sent) == 4 * len(range(1000)[comm.grid.sample_index :: comm.grid.sample_size])


def test_a_list_travels_in_few_buffers_and_low_precision_is_summed_in_float32(comm):
    size = comm.grid.world_size
    tensors = [torch.full((n,), 1.0 + comm.grid.rank) for n in range(1, 40)]
    tensors.append(torch.full((3,), 0.001 * (comm.grid.rank + 1), dtype=torch.bfloat16))
    expected = sum(torch.tensor(0.001 * (r + 1), dtype=torch.bfloat16).float() for r in range(size)).bfloat16()
    before = comm.traffic.num_collectives
    comm.sum_(tensors)
    axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
    assert comm.traffic.num_collectives - before == axes
    total = size * (size + 1) / 2
    assert all(t.eq(total).all() for t in tensors[:-1])
    assert tensors[-1].dtype == torch.bfloat16 and tensors[-1].eq(expected).all()


def test_large_buffers_are_cut_into_buckets(comm, monkeypatch):
    monkeypatch.setattr(packing, "BUCKET_BYTES", 4 * 1000)
    x = torch.arange(2500.0) + comm.grid.rank
    comm.sum_(x)
    size = comm.grid.world_size
    assert torch.equal(x, torch.arange(2500.0) * size + sum(range(size)))


def test_broadcast_of_parameters_and_optimizer_state(comm):
    torch.manual_seed(comm.grid.rank)  # ranks that differ
    root = comm.grid.world_size - 1
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1 * (comm.grid.rank + 1))
    if comm.grid.rank == root:  # only the root has a state
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    comm.broadcast_([p.data for p in net.parameters()], root)
    is_root = comm.grid.rank == root
    state = comm.broadcast_tree(optimizer.state_dict() if is_root else None, root)
    if not is_root:
        optimizer.load_state_dict(state)  # a new optimizer is filled
    comm.check_replicas([p.data for p in net.parameters()], "parameters")
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lr"] == pytest.approx(0.1 * (root + 1))
    assert [float(slot["step"]) for slot in state["state"].values()] == [1.0, 1.0]
    comm.check_replicas([slot["exp_avg"] for slot in state["state"].values()], "moments")
    optimizer.zero_grad()
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # the filled state works, and keeps the ranks together
    comm.check_replicas([p.data for p in net.parameters()], "parameters")


def test_objects(comm, world):
    grid = comm.grid
    assert comm.broadcast_object({"from": grid.rank}, root=world.size - 1) == {"from": world.size - 1}
    assert comm.gather_objects(grid.rank) == list(range(world.size))
    assert comm.gather_objects(grid.rank, "sample") == list(grid.sample_group())
    assert comm.gather_objects(grid.rank, "data") == list(grid.data_group())
    comm.barrier()


def test_replicas_that_drift_are_found(comm):
    x = torch.zeros(4, dtype=torch.float64)
    comm.check_replicas(x, "x")
    if comm.grid.world_size == 1:
        return
    if comm.grid.rank == 1:
        x[2] = 5e-324  # one bit
    with pytest.raises(RankError, match=r"x: .* the digest is .* on rank 1"):
        comm.check_replicas(x, "x")


def test_one_ranks_error_is_raised_on_all_with_its_place(comm):
    last = comm.grid.world_size - 1

    def fail(kind, ranks):
        with comm.agree("reading shards"):
            if comm.grid.rank in ranks:
                raise kind("no such file")

    fail(DataError, [])  # nobody fails, nobody raises
    place = rf"rank {last} on .*reading shards: " if last else "reading shards: "
    with pytest.raises(DataError, match=place + "no such file"):
        fail(DataError, [last])
    with pytest.raises(RankError, match=place + "OSError: no such file"):
        fail(OSError, [last])
    with pytest.raises(ConfigError):
        fail(ConfigError, [last])
    if last:
        with pytest.raises(DataError, match=rf"rank 0 on .*and {last} other ranks"):
            fail(DataError, range(last + 1))


def test_wrong_grid_is_refused_on_all_ranks_before_a_collective(world):
    with pytest.raises(ConfigError, match=r"^sample_size"):
        comm_module.connect(world.size + 1, device="cpu")


def test_ranks_of_a_node(comm, world):
    assert comm.local_size == world.size  # these tests run on one machine
    assert world.allgather(comm.local_rank) == list(range(world.size))
