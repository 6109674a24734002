"""Tensors by Horovod. The only module that imports horovod."""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..grid import Axis, Grid
from .installed import horovod_facts, mpi_facts
from .mpi import broadcast_, running_mpi, wait_for_others
from .transports import ObjectTransport, Operation, TensorTransport

logger = logging.getLogger(__name__)

MPICH_SETS = 2030
"""Most process sets with MPICH and its kin: a process can have 2,046 communicators there (measured with MPICH 5.0.2), Horovod makes
one on each rank for each set, also of others, and some are in use besides."""


class HorovodTensors(TensorTransport):
    """Tensors by Horovod; between host memories, broadcasts by the MPI below it."""

    name = "horovod"

    def __init__(self, grid: Grid, device: torch.device, objects: ObjectTransport):
        import horovod.torch as hvd

        self._grid, self._comms, self._hvd = grid, objects.comms, hvd
        self._under_way: set[int] = set()
        self._start(grid, objects)
        self._operations = {"sum": hvd.Sum, "max": hvd.Max}
        self.needs_own_gpu = bool(hvd.nccl_built())
        self.is_through_host = device.type == "cuda" and not hvd.nccl_built()
        if self.is_through_host and grid.is_first("world"):
            logger.warning(
                "Horovod was built without NCCL: tensors go through host memory. "
                "Build it with HOROVOD_GPU_OPERATIONS=NCCL for direct reductions between GPUs"
            )

    def _start(self, grid: Grid, objects: ObjectTransport) -> None:
        """Initialise Horovod with one process set per sample group and per data group."""
        # It refuses a set that equals the world (there the global set is used), and needs all sets at init, as the same
        # list in the same order on each rank
        hvd = self._hvd
        sets: dict[Axis, dict[range, Any]] = {}
        for axis in grid.axes:
            groups = grid.all_groups(axis) if axis in _axes_of_sets(grid) else []
            sets[axis] = {group: hvd.ProcessSet(list(group)) for group in groups}
        if objects.local_size == grid.world_size:
            # Within a node look for work more often: a step of the digits on two ranks took 3.0 instead of 3.5 ms.
            # Across nodes each look is a message to everyone: Horovod's default of 1 ms stays.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        if hvd.is_initialized():
            hvd.shutdown()
        hvd.init(comm=objects.comms["world"], process_sets=[s for of_axis in sets.values() for s in of_axis.values()])
        # Horovod's own exit handler stops it on all ranks: one that ends early would take it from the
        # others. Registered after Horovod's, this one runs before it.
        atexit.unregister(wait_a_moment_for_the_others)
        atexit.register(wait_a_moment_for_the_others)
        self._sets: dict[Axis, Any] = {"world": hvd.global_process_set}
        for axis in grid.axes:
            self._sets[axis] = sets[axis].get(grid.groups[axis], hvd.global_process_set)

    def group(self, axis: Axis) -> Any:
        return self._sets[axis] if self._grid.extents[axis] > 1 else None

    def group_ranks(self, axis: Axis) -> list[int]:
        return list(self._sets[axis].ranks or range(self._grid.world_size))  # the global set lists none

    def reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        # A stable name per buffer lets Horovod's response cache skip the negotiation.
        name = f"hpc_bnn.{operation}.{axis}.{flat.dtype}.{flat.numel()}"
        self._hvd.allreduce_(flat, op=self._operations[operation], process_set=self._sets[axis], name=name)

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], object]:
        # Sums that are under way together need names of their own, the same on all ranks and in each step
        number = next(n for n in itertools.count() if n not in self._under_way)
        self._under_way.add(number)
        name = f"hpc_bnn.start_sum.{number}.{axis}.{flat.dtype}.{flat.numel()}"
        handle = self._hvd.allreduce_async_(flat, op=self._hvd.Sum, process_set=self._sets[axis], name=name)

        def wait() -> None:
            self._hvd.synchronize(handle)
            self._under_way.discard(number)

        return wait

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        if not flat.is_cuda:
            # From host to host by MPI alone: 34,000 images per second reached a group of two ranks on two cores,
            # through Horovod's negotiation 8,000 to 28,000.
            broadcast_(self._comms[axis], flat, root)
            return
        name = f"hpc_bnn.broadcast.{axis}.{flat.dtype}.{flat.numel()}"
        # Horovod counts the root by its world rank, in a process set too.
        self._hvd.broadcast_(flat, self._grid.groups[axis][root], process_set=self._sets[axis], name=name)

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        name = f"hpc_bnn.gather.{axis}.{tensor.dtype}.{tuple(tensor.shape[1:])}"
        return self._hvd.allgather(tensor, name=name, process_set=self._sets[axis])

    def reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.reduce_scatter.{axis}.{rows.dtype}.{rows.numel()}"
        return self._hvd.reducescatter(rows, name=name, op=self._hvd.Sum, process_set=self._sets[axis]).view(-1)

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis, rows: list[int]) -> torch.Tensor:
        name = f"hpc_bnn.all_to_all.{axis}.{flat.dtype}.{sum(rows)}.{sum(counts)}"
        splits = torch.tensor(counts, dtype=torch.int32) * rows[self._grid.indices[axis]]
        return self._hvd.alltoall(flat, splits, name=name, process_set=self._sets[axis])[0]

    def close(self) -> None:
        shutdown()


def why_not(objects: ObjectTransport, needs_nccl: bool = False) -> str | None:
    """Return why Horovod cannot be used, or None if it can. Collective over the world, with one answer."""
    if not objects.comms:
        return "it needs MPI, and these ranks were started without it"
    problem, level = horovod_facts().why_not(needs_nccl), mpi_facts().thread_level
    if problem is None and level != "multiple":
        problem = f"MPI has the thread level {level}, and Horovod calls it from a thread of its own (unset MPI4PY_RC_THREAD_LEVEL)"
    problems = [(rank, p) for rank, p in enumerate(objects.gather(problem)) if p]
    return f"it cannot be used on rank {problems[0][0]} ({problems[0][1]})" if problems else None


def why_not_grid(grid: Grid, library: str | None = None) -> str | None:
    """Return why it cannot be used for a grid with this MPI (default: the one that runs), or None if it can. Local."""
    count = sum(grid.world_size // grid.extents[axis] for axis in _axes_of_sets(grid))
    if count <= MPICH_SETS:
        return None
    library = mpi_facts().library if library is None else library
    if "MPICH" not in library.upper():
        return None
    return f"for the grid {grid} it makes {count} process sets, and with {library} at most {MPICH_SETS} are possible"


def _axes_of_sets(grid: Grid) -> list[Axis]:
    """Return the axes whose groups have process sets. Local."""
    return [axis for axis in grid.axes if 1 < grid.extents[axis] < grid.world_size]


def shutdown() -> None:
    """Shut Horovod down if it runs. Collective over the world."""
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        hvd.shutdown()


def wait_a_moment_for_the_others() -> None:
    """At exit, wait for slower ranks to finish. The wait has a limit, because one of them may have failed."""
    if running_mpi() is not None and sys.modules["horovod.torch"].is_initialized():
        wait_for_others(5.0)
