"""Tensors by torch.distributed: NCCL between GPUs, Gloo between CPUs.

Under MPI hpc_bnn starts it over MPI: rank 0 opens a port and sends its address to the others; no environment variable
is needed. Under torchrun, and where the user's framework has started it, it also carries objects (`hpc_bnn.comm.torchrun`).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import resource
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist

from ..errors import CommunicationError
from ..grid import Axis, Grid
from .devices import ranks_on_one_gpu
from .mpi import MpiObjects
from .rendezvous import Rendezvous, find_meeting
from .stall import STALL_SECONDS, Waiting
from .transports import ObjectTransport, Operation, TensorTransport, agreed

START_SECONDS = 60.0
"""Longest wait for the port of rank 0."""
STALL = datetime.timedelta(seconds=STALL_SECONDS)
"""Of the store, and of NCCL, which no rank waits for."""
NO_LIMIT = datetime.timedelta(days=365)
"""Of Gloo: `Waiting` ends collectives of tensors, and those of objects may wait for a rank that prepares data."""

WITH_NCCL = "cpu:gloo,cuda:nccl"
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch < 2.13
_OPERATIONS = {"sum": "SUM", "max": "MAX"}


class TorchTensors(TensorTransport):
    """Tensors by torch.distributed, which MPI, torchrun or the user's framework has started.

    It has no `reduce_scatter`, as Gloo has none.
    """

    name = "torch"

    def __init__(self, grid: Grid, device: torch.device, objects: ObjectTransport):
        self._grid = grid
        # NCCL refuses two ranks on one GPU; Gloo does not mind.
        has_nccl = not ranks_on_one_gpu(device, objects)[0] and all(objects.gather(has_nccl_for(device)))
        self.is_through_host = device.type == "cuda" and not has_nccl
        if isinstance(objects, MpiObjects):
            start_over_mpi(WITH_NCCL if has_nccl else "gloo", objects)
        for axis in (*grid.axes, "world"):
            self.group(axis)

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Return the process group of an axis, None for one rank; made at the first call, which is collective over it.

        It is looked up and not kept: a group that outlives the interpreter crashes the process at its exit.
        """
        ranks, extent = self._grid.groups[axis], self._grid.extents[axis]
        return None if extent == 1 else group_of((axis, extent), ranks)

    def group_ranks(self, axis: Axis) -> list[int]:
        world = dist.get_process_group_ranks(Running.world())
        return [world.index(rank) for rank in dist.get_process_group_ranks(self.group(axis))]

    def reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        dist.all_reduce(flat, getattr(dist.ReduceOp, _OPERATIONS[operation]), group=self.group(axis))

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], object]:
        work: Any = dist.all_reduce(flat, group=self.group(axis), async_op=True)
        return work.wait

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        group = self.group(axis)
        # As bytes: Gloo does not know all kinds of integers.
        dist.broadcast(flat.view(torch.uint8), dist.get_process_group_ranks(group)[root], group)

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Gather from all ranks as much as the longest has, because the library gathers equal lengths only."""
        size, group = self._grid.extents[axis], self.group(axis)
        if lengths is None:
            found = torch.empty(size, dtype=torch.int64, device=tensor.device)
            getattr(dist, _GATHER)(found, found.new_tensor([len(tensor)]), group=group)
            lengths = found.tolist()
        longest = max(lengths)
        if longest == 0:
            return tensor
        if len(tensor) < longest:
            tensor = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        gathered = tensor.new_empty(size * longest, *tensor.shape[1:])
        getattr(dist, _GATHER)(gathered, tensor, group=group)
        if min(lengths) < longest:
            gathered = torch.cat([part[:count] for part, count in zip(gathered.split(longest), lengths)])
        return gathered

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis, rows: list[int]) -> torch.Tensor:
        index = self._grid.indices[axis]
        sent, taken = [rows[index] * count for count in counts], [num_rows * counts[index] for num_rows in rows]
        received = flat.new_empty(sum(taken))
        dist.all_to_all_single(received, flat, taken, sent, group=self.group(axis))
        return received

    def close(self) -> None:
        if Running.is_over_mpi:
            shutdown()  # otherwise the groups stay: other objects use them


@dataclass(frozen=True)
class DistributedFacts:
    """Capabilities of torch.distributed; a torch may be built without it."""

    is_available: bool = True
    gloo: bool = True
    nccl: str | None = None
    """Its version."""

    def why_not(self) -> str | None:
        """Return why it cannot carry tensors, or None if it can. Gloo carries host tensors, with or without NCCL."""
        if not self.is_available:
            return "torch was built without torch.distributed"
        return None if self.gloo else "torch was built without Gloo"


def distributed_facts() -> DistributedFacts:
    """Return how torch.distributed was built. Local; starts nothing."""
    if not dist.is_available():
        return DistributedFacts(is_available=False, gloo=False)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else None
    return DistributedFacts(gloo=dist.is_gloo_available(), nccl=nccl)


def has_nccl_for(device: torch.device) -> bool:
    """Whether NCCL can carry the tensors of a device. Local."""
    return device.type == "cuda" and dist.is_nccl_available()


# --- start and end -------------------------------------------------------------------------------------


class Running:
    """torch.distributed of this process: the store stays, the groups last until `shutdown`."""

    store: Any = None
    """Of class torch.distributed.Store."""
    token = ""
    """Part of all keys there: a secret of the job, as whoever reaches the port could read and write what it can name."""
    backend: str | None = None
    is_over_mpi = False
    framework: dist.ProcessGroup | None = None
    """The group of the user's framework (`adopt`)."""
    of_framework: dist.ProcessGroup | None = None
    """All ranks that it started."""
    num_starts = num_waits = 0
    groups: dict[tuple, dist.ProcessGroup] = {}  # noqa: RUF012

    @classmethod
    def world(cls) -> dist.ProcessGroup:
        """Return the group whose ranks are those of the grid."""
        return cls.framework or _world()


def refuse_foreign_start() -> None:
    """Raise where someone else has started torch.distributed. Local."""
    if Running.backend is None and dist.is_initialized():
        raise CommunicationError(
            "this program has called torch.distributed.init_process_group. Leave that to hpc_bnn, "
            "or give the group to hpc_bnn.connect(process_group=torch.distributed.group.WORLD)"
        )


def adopt(process_group: dist.ProcessGroup) -> None:
    """Take the ranks of a group of the user's framework, and carry tensors by groups of our own. Collective over it."""
    if Running.backend is not None and Running.framework is None:
        raise CommunicationError("hpc_bnn itself has started torch.distributed: leave <process_group> out")
    if Running.of_framework is not _world():
        Running.groups.clear()  # they ended with a former start
        Running.of_framework = _world()
    counts: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(counts, len(dist.distributed_c10d._world.pg_names), process_group)
    if len(set(counts)) > 1:  # torch names a new group by this number: the ranks would wait for each other
        raise CommunicationError(
            f"the ranks of <process_group> have made {min(counts)} to {max(counts)} process groups, and torch can make further "
            "ones only where these numbers are equal. Call torch.distributed.new_group alike on all ranks, or connect first"
        )
    Running.framework = process_group
    Running.backend = WITH_NCCL if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    atexit.register(shutdown)


def start_over_mpi(backend: str, objects: MpiObjects) -> None:
    """Start it for the ranks of an MPI job, unless it runs already. Collective over the world."""
    if Running.backend == backend:
        return
    shutdown()
    with agreed(objects, "starting torch.distributed"):
        refuse_foreign_start()
    if Running.store is None:
        Running.store = _open_store(objects)
    Running.is_over_mpi = True
    start(backend, objects.rank, objects.size)


def start(backend: str, rank: int, world_size: int) -> None:
    """Make the group of all ranks through the store. Collective over the world."""
    Running.num_starts += 1
    _prepare_sockets()
    if Running.num_starts == 1:
        atexit.register(shutdown)  # Gloo's threads must end before the interpreter, or they take the process down
    hook = sys.excepthook
    try:
        with _polite_threads(), Waiting("starting torch.distributed"):
            dist.init_process_group(
                backend,
                # The keys of a former group would be taken for those of the new one.
                store=dist.PrefixStore(f"hpc_bnn.{Running.token}.{Running.num_starts}", Running.store),
                rank=rank,
                world_size=world_size,
                timeout=STALL if backend == WITH_NCCL else NO_LIMIT,
            )
    except Exception as error:  # on this rank alone: it ends the job
        raise CommunicationError(
            f"torch.distributed does not start on rank {rank} on {socket.gethostname()} ({error}). "
            "Name the network interface of the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, "
            "or use <backend> mpi"
        ) from error
    finally:
        # torch keeps what the former hook prints until it returns, and ours ends the job before (`install_abort_hook`).
        sys.excepthook = hook
    Running.backend = backend


@contextlib.contextmanager
def _polite_threads() -> Iterator[None]:
    """Let threads that start here yield to threads that wake up (SCHED_BATCH). Local."""
    # If data arrive before the rank calls their sum, Gloo's thread polls and blocks the rank's core until the next tick
    # of the clock: a sum of 1 MiB over two ranks on two cores took 3 to 5 ms instead of 0.4
    if os.sched_getscheduler(0) != os.SCHED_OTHER:  # the user has chosen
        yield
        return
    with contextlib.suppress(OSError):  # some containers forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a new thread inherits it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _open_store(objects: MpiObjects) -> Any:
    """Open a port on rank 0 and connect to it from all ranks. Collective over the world."""
    meeting = find_meeting(objects.gather, objects.rank == 0)
    use_interface(meeting)
    timeout, store = datetime.timedelta(seconds=START_SECONDS), None
    with agreed(objects, "opening a port for torch.distributed"):
        if objects.rank == 0:  # by a socket of ours: torch's own would listen on all interfaces
            family = socket.AF_INET6 if ":" in meeting.address else socket.AF_INET
            listening = socket.create_server((meeting.address, 0), family=family, backlog=4096)
            port = listening.getsockname()[1]
            descriptor = listening.detach()
            store = dist.TCPStore(
                meeting.address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=descriptor
            )
    port, Running.token = objects.broadcast(store and (store.port, secrets.token_hex(16)))
    with agreed(objects, f"reaching port {port} of {meeting.address} for torch.distributed"):
        if store is None:
            store = dist.TCPStore(meeting.address, port, None, False, timeout, wait_for_workers=False)
    store.set_timeout(STALL)  # NCCL meets there at the first sum of a group
    return store


def use_interface(meeting: Rendezvous) -> None:
    """Let Gloo use the interface that leads to rank 0: by default it uses that of the host's name. Local."""
    if meeting.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)


def _world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None, "torch.distributed has not been started"
    return dist.group.WORLD


def group_of(key: tuple, ranks: Sequence[int], *, of_objects: bool = False) -> dist.ProcessGroup:
    """Return the process group of some ranks of the grid; make it if the key is new. Collective over these ranks.

    Objects may wait for long, and where NCCL carries tensors they have groups of their own, on the host.

    torch numbers the groups of each rank, and the number is a part of the name: all ranks must make as many. Those of a
    former grid are taken again, because a second one of the same name would find what the first left in the store.
    """
    has_nccl = Running.backend == WITH_NCCL
    is_apart = of_objects and has_nccl
    if Running.framework is None and len(ranks) == dist.get_world_size() and not is_apart:
        return _world()
    of_world = dist.get_process_group_ranks(Running.world())
    key = (*key, is_apart, *of_world)
    if key not in Running.groups:
        # A framework may have started with a backend that does not carry both host and GPU memory.
        backend = "gloo" if is_apart else None if Running.framework is None else Running.backend
        timeout = STALL if has_nccl and not is_apart else NO_LIMIT
        with _polite_threads(), Waiting("making a process group"):
            group = dist.new_group(
                [of_world[rank] for rank in ranks], timeout=timeout, backend=backend, use_local_synchronization=True
            )
        assert isinstance(group, dist.ProcessGroup), "this rank is one of them"
        Running.groups[key] = group
    return Running.groups[key]


def _prepare_sockets() -> None:
    """Have Gloo connect two ranks when they first talk, and allow this process as many open files as it may. Local."""
    # Otherwise each rank connects to each other one for each group: beyond 461 ranks more than the usual 1,024 files
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def shutdown() -> None:
    """Leave all groups that hpc_bnn has made. Local."""
    if Running.backend is None:
        return
    groups, is_ours = list(Running.groups.values()), Running.framework is None
    Running.groups.clear()
    Running.backend, Running.framework, Running.is_over_mpi = None, None, False
    if is_ours:
        dist.destroy_process_group()
    elif dist.is_initialized():
        for group in groups:
            dist.destroy_process_group(group)
