"""Tensors by torch.distributed: NCCL between GPUs, Gloo between CPUs. The only module that imports it.

Under MPI hpc_bnn starts it over MPI: rank 0 opens a port and sends its address to the others; no environment variable
is needed. Under torchrun it also carries objects (`hpc_bnn.comm.torchrun`).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import CommunicationError
from .base import Axis, GridComm, ObjectAxis, Operation
from .devices import ranks_on_one_gpu
from .mpi import STALL_SECONDS, MpiComm
from .rendezvous import Meeting, find_meeting

START_SECONDS = 60.0
"""Longest wait for the port of rank 0."""
STALL = datetime.timedelta(seconds=STALL_SECONDS)

WITH_NCCL = "cpu:gloo,cuda:nccl"
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch < 2.13
_OPERATIONS = {"sum": "SUM", "max": "MAX"}


class TorchTensors(GridComm):
    """The tensors of `GridComm` by torch.distributed; objects and shared memory are left to another class."""

    library = "torch"

    def _can_use_nccl(self) -> bool:
        """Whether NCCL carries the tensors of all ranks. Collective over the world."""
        # NCCL refuses two ranks on one GPU; Gloo does not mind.
        return not ranks_on_one_gpu(self)[0] and all(self.gather_objects(has_nccl_for(self.device)))

    _node_size: int | None = None
    """As for `MpiComm`, where the class makes a group of the node."""

    def _enter_groups(self) -> None:
        """Make the groups of the axes. Collective over the world."""
        for axis in self._ranks:
            self._group(axis)

    def _group(self, axis: ObjectAxis) -> dist.ProcessGroup | None:
        """Return the process group of an axis, None for one rank; made at the first call, which is collective over it.

        It is looked up and not kept: a group that outlives the interpreter crashes the process at its exit.
        """
        ranks = self._ranks[axis]
        if len(ranks) == self.grid.world_size:
            return dist.group.WORLD
        if len(ranks) > 1 or axis == "node":
            # torch numbers the groups of each rank, and the number is a part of the name: all ranks must make as many,
            # on a node with one rank as well. Those of a former grid are taken again.
            group = group_of((axis, self._extents.get(axis, self._node_size)), ranks)
            return group if len(ranks) > 1 else None
        return None

    @property
    def sample_set(self) -> dist.ProcessGroup | None:
        return self._group("sample")

    @property
    def data_set(self) -> dist.ProcessGroup | None:
        return self._group("data")

    def group_ranks(self, axis: Axis) -> list[int]:
        group = self._group(axis)
        return [self.grid.rank] if group is None else dist.get_process_group_ranks(group)

    def _reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        buffer = self._near(flat)
        dist.all_reduce(buffer, getattr(dist.ReduceOp, _OPERATIONS[operation]), group=self._group(axis))
        if buffer is not flat:
            flat.copy_(buffer)

    def _start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], None]:
        buffer = self._near(flat)
        work = dist.all_reduce(buffer, group=self._group(axis), async_op=True)
        return lambda: self._end_sum_(work.wait, buffer, flat)

    def _broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        buffer = self._near(flat)
        # As bytes: Gloo does not know all kinds of integers.
        dist.broadcast(buffer.view(torch.uint8), self._ranks[axis][root], group=self._group(axis))
        if buffer is not flat:
            flat.copy_(buffer)

    def _gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Gather from all ranks as much as the longest has, because the library gathers equal lengths only."""
        buffer, size, group = self._near(tensor), self._extents[axis], self._group(axis)
        lengths = torch.empty(size, dtype=torch.int64, device=buffer.device)
        getattr(dist, _GATHER)(lengths, lengths.new_tensor([len(buffer)]), group=group)
        counts = lengths.tolist()
        longest = max(counts)
        if longest == 0:
            return tensor
        if len(buffer) < longest:
            buffer = torch.cat([buffer, buffer.new_zeros(longest - len(buffer), *buffer.shape[1:])])
        gathered = buffer.new_empty(size * longest, *buffer.shape[1:])
        getattr(dist, _GATHER)(gathered, buffer, group=group)
        if min(counts) < longest:
            parts = gathered.split(longest)
            gathered = torch.cat([part[:count] for part, count in zip(parts, counts)])
        return gathered.to(tensor.device)

    def _reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Each rank sums its row from all others: Gloo has no sum of its own."""
        return self._all_to_all(rows.view(-1), [rows.shape[1]] * len(rows), axis).view_as(rows).sum(0)

    def _all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis) -> torch.Tensor:
        buffer, size = self._near(flat), self._extents[axis]
        mine = counts[self.grid.indices[axis]]
        received = buffer.new_empty(size * mine)
        dist.all_to_all_single(received, buffer, [mine] * size, counts, group=self._group(axis))
        return received.to(flat.device)


class TorchComm(TorchTensors, MpiComm):
    """The collectives of `GridComm` by torch.distributed (tensors) and mpi4py (objects)."""

    def _start_library(self) -> None:
        has_nccl = self._can_use_nccl()
        self._through_host = self.device.type == "cuda" and not has_nccl
        backend = WITH_NCCL if has_nccl else "gloo"
        if Running.backend != backend:
            shutdown()
            with self.agree("starting torch.distributed"):
                refuse_foreign_start()
            if Running.store is None:
                Running.store = _open_store(self)
            start(backend, self.grid.rank, self.grid.world_size)
        self._enter_groups()

    def close(self) -> None:
        self.barrier()
        shutdown()
        super().close()


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

    store: dist.Store | None = None
    backend: str | None = None
    num_starts = num_waits = 0
    groups: dict[tuple, dist.ProcessGroup] = {}  # noqa: RUF012


def refuse_foreign_start() -> None:
    """Raise where someone else has started torch.distributed. Local."""
    if Running.backend is None and dist.is_initialized():
        raise CommunicationError(
            "this program has called torch.distributed.init_process_group. Leave that to hpc_bnn, "
            "or use <backend> horovod"
        )


def start(backend: str, rank: int, world_size: int) -> None:
    """Make the group of all ranks through the store. Collective over the world."""
    Running.num_starts += 1
    if Running.num_starts == 1:
        atexit.register(shutdown)  # Gloo's threads must end before the interpreter, or they take the process down
    hook = sys.excepthook
    try:
        with _polite_threads():
            dist.init_process_group(
                backend,
                # The keys of a former group would be taken for those of the new one.
                store=dist.PrefixStore(f"hpc_bnn.{Running.num_starts}", Running.store),
                rank=rank,
                world_size=world_size,
                timeout=STALL,
            )
    except Exception as error:  # on this rank alone: it ends the job
        raise CommunicationError(
            f"torch.distributed does not start on rank {rank} on {socket.gethostname()} ({error}). "
            "Name the network interface of the nodes in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, "
            "or use <backend> horovod"
        ) from error
    finally:
        # torch keeps what the former hook prints until it returns, and ours ends the job before (`install_abort_hook`).
        sys.excepthook = hook
    Running.backend = backend


@contextlib.contextmanager
def _polite_threads() -> Iterator[None]:
    """Let threads that start here yield to threads that wake up (SCHED_BATCH, if the system has it). Local.

    If data arrive before the rank calls their sum, Gloo's thread polls and blocks the rank's core until the next tick
    of the clock: a sum of 1 MiB over two ranks on two cores took 3 to 5 ms instead of 0.4.
    """
    usual = getattr(os, "SCHED_OTHER", None)
    if usual is None or os.sched_getscheduler(0) != usual:  # the user has chosen, or there is no choice
        yield
        return
    with contextlib.suppress(OSError):  # some containers forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a new thread inherits it
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, usual, os.sched_param(0))


def _open_store(comm: MpiComm) -> dist.Store:
    """Open a port on rank 0 and connect to it from all ranks. Collective over the world."""
    meeting = find_meeting(comm.gather_objects, comm.grid.is_first("world"))
    use_interface(meeting)
    options = {"timeout": datetime.timedelta(seconds=START_SECONDS), "wait_for_workers": False}
    store = None
    with comm.agree("opening a port for torch.distributed"):
        if comm.grid.is_first("world"):
            store = dist.TCPStore(meeting.address, 0, None, True, **options)
    port = comm.broadcast_object(store and store.port)
    with comm.agree(f"reaching port {port} of {meeting.address} for torch.distributed"):
        if store is None:
            store = dist.TCPStore(meeting.address, port, None, False, **options)
    store.set_timeout(STALL)  # NCCL meets there at the first sum of a group
    return store


def use_interface(meeting: Meeting) -> None:
    """Let Gloo use the interface that leads to rank 0: by default it uses that of the host's name. Local."""
    if meeting.interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", meeting.interface)


def group_of(key: tuple, ranks: range) -> dist.ProcessGroup:
    """Return the process group of some ranks; make it if the key is new. Collective over these ranks."""
    if key not in Running.groups:
        with _polite_threads():
            Running.groups[key] = dist.new_group(list(ranks), timeout=STALL, use_local_synchronization=True)
    return Running.groups[key]


def shutdown() -> None:
    """Leave all groups, if hpc_bnn has made them. Local."""
    if Running.backend is not None:
        Running.groups.clear()
        Running.backend = None
        dist.destroy_process_group()
