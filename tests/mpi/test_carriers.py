"""What each communication library does under `GridComm`, beyond what test_comm.py asks of all of them."""

import pytest
import torch
from conftest import LIBRARY
from reference import assert_layout_law, make_step, train, train_alone

from hpc_bnn import OverlappingOptimizer, connect
from hpc_bnn.comm import HorovodTensors, MpiTensors, TensorTransport, TorchTensors, mpi, torch_dist
from hpc_bnn.errors import ConfigError


@pytest.mark.skipif(LIBRARY != "mpi", reason="a limit of MPI alone")
@pytest.mark.parametrize("limit", [1, 7, 64])
def test_messages_with_more_numbers_than_mpi_counts_go_in_pieces(comm, limit, monkeypatch):
    """Counts of MPI are below 2^31; here below 64. Uneven lengths, one of them 0, and rows of several numbers."""
    grid, rank = comm.grid, comm.grid.rank

    def results():
        flat = torch.arange(37.0) * (rank + 1)
        comm.sum_(flat)
        sent = torch.arange(23.0) + rank
        comm.broadcast_(sent, grid.world_size - 1)
        wide = comm.gather(torch.arange(6.0 * rank).view(2 * rank, 3) + 100 * rank, "data")
        few = comm.gather(torch.arange(5.0 * (grid.sample_index % 2)), "sample")
        (shares,) = comm.reduce_scatter_([torch.arange(41.0) * (rank + 1)], "sample")
        rows, counts = range(grid.sample_size), range(1, 4 * grid.sample_size, 4)
        pieces = torch.arange(float(rows[grid.sample_index] * sum(counts))) + 1000 * rank
        return flat, sent, wide, few, shares.clone(), comm.all_to_all(pieces, counts, "sample", rows)

    expected = results()
    monkeypatch.setattr(mpi, "MAX_COUNT", limit)
    for one, other in zip(results(), expected, strict=True):
        assert one.shape == other.shape and torch.equal(one, other)


@pytest.mark.skipif(LIBRARY != "mpi", reason="a limit of MPI alone")
def test_overlap_is_refused_where_mpi_carries_the_tensors(comm):
    step = make_step(comm)
    optimizer = torch.optim.SGD(step.posterior.parameters(), lr=0.1)
    if comm.grid.world_size == 1:
        OverlappingOptimizer(optimizer, step.posterior, comm)  # nothing is sent
        return
    with pytest.raises(ConfigError, match=r"overlap.*no progress"):
        OverlappingOptimizer(optimizer, step.posterior, comm)


def test_gpus_and_cores_are_those_of_the_node_and_memory_that_of_its_part(world):
    """Two ranks share memory; four share the GPUs."""
    comm = connect(1, "cpu", node_size=2)
    if world.size > 1:
        assert (comm.objects.rank_on_node, comm.objects.ranks_on_node) == (world.rank, world.size)
        part = world.rank - world.rank % 2
        assert (comm.local_rank, comm.local_size) == (world.rank - part, min(2, world.size - part))


@pytest.mark.skipif(LIBRARY == "horovod", reason="Horovod can overlap")
def test_auto_leaves_mpi_out_where_sums_overlap(world):
    if world.size > 1:
        assert connect(1, "cpu", backend="auto").library == "mpi"
        assert connect(1, "cpu", backend="auto", overlaps=True).library == "torch"


def test_nothing_is_broadcast_of_tensors_without_numbers(comm):
    before = comm.traffic.num_collectives
    comm.broadcast_([torch.empty(0), torch.empty(2, 0, dtype=torch.uint8)])
    comm.sum_([torch.empty(0)])
    assert comm.traffic.num_collectives == before


def test_sums_of_one_length_are_under_way_together(comm):
    if not comm.tensors.can_overlap:
        return
    flats = [torch.full((5,), 10.0**n) * (comm.grid.rank + 1) for n in range(4)]
    waits = [comm.start_sum_(flat) for flat in flats]
    for n, (flat, wait) in enumerate(zip(flats, waits)):
        wait()
        assert flat.tolist() == [10.0**n * sum(range(1, comm.grid.world_size + 1))] * 5


BASE = {"horovod": HorovodTensors, "torch": TorchTensors, "mpi": MpiTensors}[LIBRARY]


class Counting(BASE):
    """A carrier as a user writes it: it counts the bytes that this rank gives away."""

    name = "counting"

    def __init__(self, grid, device, objects):
        super().__init__(grid, device, objects)
        self.num_bytes = 0

    def reduce_(self, flat, axis, operation):
        self.num_bytes += flat.nbytes
        super().reduce_(flat, axis, operation)

    def broadcast_(self, flat, root, axis):
        self.num_bytes += flat.nbytes
        super().broadcast_(flat, root, axis)

    def gather(self, tensor, axis, lengths=None):
        self.num_bytes += tensor.nbytes
        return super().gather(tensor, axis, lengths)

    all_to_all = TensorTransport.all_to_all  # it has none of its own


def test_a_carrier_without_an_all_to_all_gathers(sample_size):
    pieces, trees, sums = [], [], []
    for backend in (LIBRARY, Counting):
        comm = connect(sample_size, "cpu", "shares", "bf16", backend=backend)
        rows, counts = range(sample_size), range(1, 4 * sample_size, 4)
        own = torch.arange(float(rows[comm.grid.sample_index] * sum(counts))) + 1000 * comm.grid.rank
        pieces.append(comm.all_to_all(own, counts, "sample", rows))
        trees.append([tree["own"].tolist() for tree in comm.gather_trees({"own": own}, "sample")])
        sums.append([torch.arange(10.0) * (comm.grid.rank + 1) for _ in range(2)])
        comm.sum_(sums[-1][0])
        comm.sum_(sums[-1][1], compressed=True)
    assert torch.equal(*(torch.stack(of_carrier) for of_carrier in sums))
    assert trees[0] == trees[1] and len(trees[0]) == sample_size * comm.grid.is_first("sample")
    assert torch.equal(*pieces) and (comm.tensors.num_bytes > 0 if sample_size > 1 and own.numel() else True)


@pytest.mark.parametrize("backend", [Counting, "test_carriers.Counting"], ids=["class", "path"])
def test_a_carrier_of_the_user_carries_a_run(sample_size, backend):
    comm = connect(sample_size, "cpu", backend=backend)
    results = train(comm)[1]
    assert_layout_law(results, train_alone())
    if comm.grid.world_size > 1:
        x = comm.gather(torch.ones(3), "data")
        comm.broadcast_(x)
        assert comm.library == "counting" and comm.tensors.num_bytes == comm.traffic.num_bytes > 0


@pytest.mark.parametrize("backend", ["test_carriers.Missing", "test_carriers.train"])
def test_what_is_no_carrier_is_refused(world, backend):
    if world.size > 1:
        with pytest.raises(ConfigError, match=r"^backend test_carriers"):
            connect(1, "cpu", backend=backend)


@pytest.mark.skipif(LIBRARY != "torch", reason="only torch opens a port")
def test_the_store_listens_where_the_ranks_meet_and_nowhere_else(comm):
    """The ranks of a node meet on its loopback; keys have a secret in their names."""
    if comm.grid.rank or comm.grid.world_size == 1:
        return
    listening = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/net/{name}") as file:
            lines = [line.split() for line in file]
        listening += [line[1].rpartition(":") for line in lines[1:] if line[3] == "0A"]
    port = f"{torch_dist.Running.store.port:04X}"
    assert [address for address, _, number in listening if number == port] == ["0100007F"]
    assert len(torch_dist.Running.token) == 32
