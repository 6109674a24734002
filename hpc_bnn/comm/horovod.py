"""Tensors by Horovod. The only module that imports horovod."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable

import torch

from .base import Axis, Operation
from .installed import horovod_facts
from .mpi import STALL_SECONDS, MpiComm, running_mpi, wait_for_others

logger = logging.getLogger(__name__)


class HorovodComm(MpiComm):
    """The collectives of `GridComm` by Horovod (tensors) and mpi4py (objects)."""

    library = "horovod"

    def _start_library(self) -> None:
        import horovod.torch as hvd

        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", f"{STALL_SECONDS:.0f}")
        self._hvd = hvd
        self._start_horovod()
        self._operations = {"sum": hvd.Sum, "max": hvd.Max}
        self.needs_own_gpu = hvd.nccl_built()
        self._through_host = self.device.type == "cuda" and not hvd.nccl_built()
        if self._through_host and self.grid.is_first("world"):
            logger.warning(
                "Horovod was built without NCCL: tensors go through host memory. "
                "Build it with HOROVOD_GPU_OPERATIONS=NCCL for direct reductions between GPUs"
            )

    def _start_horovod(self) -> None:
        """Initialise Horovod with one process set per sample group and per data group.

        Horovod refuses a set that equals the world (there the global set is used), needs all sets at init, as the
        same list in the same order on each rank.
        """
        grid, hvd = self.grid, self._hvd
        sets = {"sample": [], "data": []}
        if 1 < grid.sample_size < grid.world_size:
            sets["sample"] = [hvd.ProcessSet(list(grid.sample_group(d))) for d in range(grid.data_size)]
        if 1 < grid.data_size < grid.world_size:
            sets["data"] = [hvd.ProcessSet(list(grid.data_group(s))) for s in range(grid.sample_size)]
        if self.local_size == grid.world_size:
            # Within a node look for work more often: a step of the digits on two ranks took 3.0 instead of 3.5 ms.
            # Across nodes each look is a message to everyone: Horovod's default of 1 ms stays.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        if hvd.is_initialized():
            hvd.shutdown()
        hvd.init(comm=self.world_comm, process_sets=sets["sample"] + sets["data"])
        # Horovod's own exit handler stops it on all ranks: one that ends early would take it from the
        # others. Registered after Horovod's, this one runs before it.
        atexit.unregister(wait_a_moment_for_the_others)
        atexit.register(wait_a_moment_for_the_others)
        world = hvd.global_process_set
        if grid.sample_size > 1:
            self.sample_set = sets["sample"][grid.data_index] if sets["sample"] else world
        if grid.data_size > 1:
            self.data_set = sets["data"][grid.sample_index] if sets["data"] else world
        self._sets = {"sample": self.sample_set, "data": self.data_set, "world": world}

    def group_ranks(self, axis: Axis) -> list[int]:
        process_set = self._sets[axis]
        if process_set is None:
            return [self.grid.rank]
        return list(process_set.ranks or range(self.grid.world_size))  # the global set lists none

    def _reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        # A stable name per buffer lets Horovod's response cache skip the negotiation.
        name = f"hpc_bnn.{operation}.{axis}.{flat.dtype}.{flat.numel()}"
        buffer = self._near(flat)
        self._hvd.allreduce_(buffer, op=self._operations[operation], process_set=self._sets[axis], name=name)
        if buffer is not flat:
            flat.copy_(buffer)

    def _start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], None]:
        buffer, hvd = self._near(flat), self._hvd
        # Sums that are under way together need names of their own, the same in each step.
        name = f"hpc_bnn.start_sum.{axis}.{flat.dtype}.{flat.storage_offset()}.{flat.numel()}"
        handle = hvd.allreduce_async_(buffer, op=hvd.Sum, process_set=self._sets[axis], name=name)
        return lambda: self._end_sum_(lambda: hvd.synchronize(handle), buffer, flat)

    def _broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        if self._through_host or not flat.is_cuda:
            # From host to host by MPI alone: 34,000 images per second reached a group of two ranks on two cores,
            # through Horovod's negotiation 8,000 to 28,000.
            buffer = flat.cpu()
            self._object_comms[axis].Bcast(buffer.view(torch.uint8).numpy(), root)
            flat.copy_(buffer) if flat.is_cuda else None
            return
        name = f"hpc_bnn.broadcast.{axis}.{flat.dtype}.{flat.numel()}"
        # Horovod counts the root by its world rank, in a process set too.
        self._hvd.broadcast_(flat, self._ranks[axis][root], process_set=self._sets[axis], name=name)

    def _gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.gather.{axis}.{tensor.dtype}.{tuple(tensor.shape[1:])}"
        buffer = self._near(tensor)
        return self._hvd.allgather(buffer, name=name, process_set=self._sets[axis]).to(tensor.device)

    def _reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.reduce_scatter.{axis}.{rows.dtype}.{rows.numel()}"
        buffer = self._near(rows)
        total = self._hvd.reducescatter(buffer, name=name, op=self._hvd.Sum, process_set=self._sets[axis])
        return total.view(-1).to(rows.device)

    def _all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.all_to_all.{axis}.{flat.dtype}.{flat.numel()}"
        buffer = self._near(flat)
        splits = torch.tensor(counts, dtype=torch.int32)
        received, _ = self._hvd.alltoall(buffer, splits, name=name, process_set=self._sets[axis])
        return received.to(flat.device)

    def close(self) -> None:
        self.barrier()
        if self._hvd.is_initialized():
            self._hvd.shutdown()
        super().close()


def why_not(world, needs_nccl: bool = False) -> str | None:
    """Return why Horovod cannot be used, or None if it can. Collective over the world, with one answer."""
    problem = horovod_facts().why_not(needs_nccl)
    problems = [(rank, p) for rank, p in enumerate(world.allgather(problem)) if p]
    return f"it cannot be used on rank {problems[0][0]} ({problems[0][1]})" if problems else None


def shutdown() -> None:
    """Shut Horovod down if it runs. Collective over the world."""
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        hvd.shutdown()


def wait_a_moment_for_the_others() -> None:
    """At exit, wait for slower ranks to finish. The wait has a limit, because one of them may have failed."""
    if running_mpi() is not None and sys.modules["horovod.torch"].is_initialized():
        wait_for_others(5.0)
