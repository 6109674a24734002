"""MPI by mpi4py: its start, its end, objects and shared memory. The only module that imports mpi4py."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..config import Compression, Reduction
from ..errors import CommunicationError
from ..grid import Grid
from .base import GridComm, NodeArray, ObjectAxis, no_shared_memory
from .launcher import launcher_of

STALL_SECONDS = 600.0
"""Time that a collective of tensors waits for a missing rank."""


class MpiComm(GridComm):
    """Objects and shared memory by mpi4py; tensors are left to a subclass.

    Parameters
    ----------
    mpi : module
        mpi4py.MPI.
    node_size : int, optional
        Largest number of ranks that share memory, to give each socket of a node its own copy.
    """

    library = "mpi4py"

    def __init__(
        self,
        grid: Grid,
        device: torch.device | str = "cpu",
        reduction: Reduction = "axes",
        compression: Compression = "none",
        *,
        mpi,
        node_size: int | None = None,
    ):
        super().__init__(grid, device, reduction, compression)
        self._mpi = mpi
        self.world_comm = mpi.COMM_WORLD
        self.sample_comm = self.world_comm.Split(color=grid.data_index, key=grid.sample_index)
        self.data_comm = self.world_comm.Split(color=grid.sample_index, key=grid.data_index)
        self.node_comm = split_by_node(mpi, node_size)
        self.local_rank, self.local_size = self.node_comm.rank, self.node_comm.size
        self._object_comms = {
            "sample": self.sample_comm,
            "data": self.data_comm,
            "world": self.world_comm,
            "node": self.node_comm,
        }
        self._windows = []
        self._start_library()

    def _start_library(self) -> None:
        """Start the communication library for tensors when communicators and grid are known.

        Collective over the world.
        """

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        self.traffic.num_object_collectives += 1
        return self.world_comm.bcast(value, root)

    def gather_objects(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        self.traffic.num_object_collectives += 1
        return self._object_comms[axis].allgather(value)

    def barrier(self) -> None:
        self.traffic.num_object_collectives += 1
        self.world_comm.Barrier()

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype | str) -> NodeArray:
        if self.local_size == 1:
            return super().node_array(shape, dtype)
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            # The first rank of the node gives all of it.
            mine = max(num_bytes, 1) if self.local_rank == 0 else 0
            window = self._mpi.Win.Allocate_shared(mine, 1, comm=self.node_comm)
        except self._mpi.Exception as error:
            raise no_shared_memory(num_bytes, error) from error
        self._windows.append(window)
        buffer, _ = window.Shared_query(0)
        window.Lock_all()

        def publish() -> None:
            window.Sync()
            self.node_comm.Barrier()
            window.Sync()

        return NodeArray(np.frombuffer(buffer, np.uint8, num_bytes).view(dtype).reshape(shape), publish)

    def close(self) -> None:
        self.barrier()
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._windows.clear()
        for comm in (self.sample_comm, self.data_comm, self.node_comm):
            comm.Free()


def start_mpi():
    """Import and thereby start mpi4py.MPI; return None if it is missing and one process does not need it."""
    launched = launcher_of(os.environ).size or 1
    _be_gentle_when_oversubscribed()
    # Shared memory needs no network; Open MPI's UCX prints an error for each window where it has no device.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        if launched > 1:
            raise CommunicationError(
                f"{launched} ranks were launched, but mpi4py does not work here ({error}). "
                "Install mpi4py for the MPI of this launcher, or load its module"
            ) from error
        return None
    if launched > 1 and MPI.COMM_WORLD.size == 1:
        raise CommunicationError(
            f"the launcher started {launched} ranks, but {_mpi_name(MPI)} sees only one: the launcher belongs "
            f"to another MPI. Use the mpirun of this MPI (this is {sys.executable}), or srun --mpi=pmix"
        )
    return MPI


def _be_gentle_when_oversubscribed() -> None:
    """Let MPI yield the core while it waits, if ranks fill the node. Call it before MPI starts.

    Horovod adds a thread to each rank; with spinning waits the two fight for the core (measured on two
    ranks and two cores: a training step of 31 ms instead of 5 ms).
    """
    if (launcher_of(os.environ).local_size or 1) >= (os.cpu_count() or 1):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


def _mpi_name(mpi) -> str:
    return mpi.Get_library_version().replace("\0", "").splitlines()[0].split(",")[0]


def running_mpi():
    """Return mpi4py.MPI if MPI runs in this process, otherwise None. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def split_by_node(mpi, node_size: int | None = None):
    """Return the communicator of the ranks that share memory, in groups of at most ``node_size``. Collective."""
    node = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    if node_size is None:
        return node
    part = node.Split(color=node.rank // node_size, key=node.rank)
    node.Free()
    return part


def wait_for_others(seconds: float) -> bool:
    """Wait for all ranks to call this, at most some seconds; return whether they did. Collective."""
    mpi = running_mpi()
    if mpi is None:
        return True
    request = mpi.COMM_WORLD.Ibarrier()
    end = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def abort(code: int) -> None:
    """End the whole job with an exit code, from this rank alone. Local."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = running_mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)


def install_abort_hook(abort: Callable[[int], None] = abort) -> None:
    """Let an exception of one rank end the job, as ``python -m mpi4py`` does. Local."""
    former = sys.excepthook

    def hook(kind, error, traceback):
        former(kind, error, traceback)
        abort(1)

    if getattr(former, "__module__", None) != __name__:
        sys.excepthook = hook
