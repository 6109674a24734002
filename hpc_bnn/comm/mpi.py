"""MPI by mpi4py: its start, its end, objects and shared memory. The only module that imports mpi4py."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CommunicationError
from ..grid import Axis, Grid
from .launcher import launcher_of
from .transports import NodeArray, ObjectAxis, ObjectTransport, no_shared_memory

if TYPE_CHECKING:
    import torch

MAX_COUNT = 2**30
"""Most numbers in a message: counts and displacements of MPI before its version 4 are below 2^31."""


class MpiObjects(ObjectTransport):
    """Objects and shared memory by mpi4py, and the communicators of the axes.

    At most ``node_size`` ranks share memory, where it is given: each socket of a node then has its own copy.
    """

    def __init__(self, mpi, node_size: int | None = None):
        self.mpi = mpi
        world = mpi.COMM_WORLD
        node = world.Split_type(mpi.COMM_TYPE_SHARED)
        self.rank, self.size = world.rank, world.size
        self.rank_on_node, self.ranks_on_node = node.rank, node.size
        if node_size is not None:
            whole, node = node, node.Split(color=node.rank // node_size, key=node.rank)
            whole.Free()
        self.local_rank, self.local_size = node.rank, node.size
        self.comms = {"world": world, "node": node}
        self._windows: list[Any] = []

    def enter(self, grid: Grid) -> None:
        for axis in grid.axes:
            first = grid.groups[axis][0]  # a group has the rank of its first as its colour
            self.comms[axis] = self.comms["world"].Split(color=first, key=grid.indices[axis])

    def broadcast(self, value: Any, root: int = 0) -> Any:
        return self.comms["world"].bcast(value, root)

    def gather(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        return self.comms[axis].allgather(value)

    def gather_first(self, value: Any, axis: Axis) -> list[Any]:
        return self.comms[axis].gather(value) or []

    def barrier(self) -> None:
        self.comms["world"].Barrier()

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype) -> NodeArray:
        node, num_bytes = self.comms["node"], math.prod(shape) * dtype.itemsize
        try:
            # The first rank of the node gives all of it.
            mine = max(num_bytes, 1) if self.local_rank == 0 else 0
            window = self.mpi.Win.Allocate_shared(mine, 1, comm=node)
        except self.mpi.Exception as error:
            raise no_shared_memory(num_bytes, error) from error
        self._windows.append(window)
        buffer, _ = window.Shared_query(0)
        window.Lock_all()

        def publish() -> None:
            window.Sync()
            node.Barrier()
            window.Sync()

        return NodeArray(np.frombuffer(buffer, np.uint8, num_bytes).view(dtype).reshape(shape), publish)

    def close(self) -> None:
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._windows.clear()
        world = self.comms.pop("world")
        for comm in self.comms.values():
            comm.Free()
        self.comms = {"world": world}


def memory_of(tensor: torch.Tensor) -> Any:
    """Return the memory of a tensor in one piece, as mpi4py reads it. Local."""
    if tensor.is_cuda:
        import torch  # here: help and errors of the command line need this module, and no torch

        torch.cuda.current_stream().synchronize()  # MPI knows no streams
        return tensor
    return tensor.numpy()


def broadcast_(comm: Any, flat: torch.Tensor, root: int) -> None:
    """Overwrite [n] with that of the rank ``root`` of a communicator. Collective over it."""
    import torch

    for piece in flat.view(torch.uint8).split(MAX_COUNT):
        comm.Bcast(memory_of(piece), root)


# --- start and end -------------------------------------------------------------------------------------


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
            rule = f"{launched} ranks were launched, but mpi4py does not work here ({error})"
            remedy = "Install mpi4py for the MPI of this launcher, or load its module"
            raise CommunicationError(f"{rule}. {remedy}") from error
        return None
    if launched > 1 and MPI.COMM_WORLD.size == 1:
        raise CommunicationError(
            f"the launcher started {launched} ranks, but {_mpi_name(MPI)} sees only one: the launcher belongs "
            f"to another MPI. Use the mpirun of this MPI (this is {sys.executable}), or srun --mpi=pmix"
        )
    return MPI


def _be_gentle_when_oversubscribed() -> None:
    """Let MPI yield the core while it waits, if ranks fill the node, and sleep, if there are more of them than cores.

    Call it before MPI starts. Horovod adds a thread to each rank; with spinning waits the two fight for the core (measured
    on two ranks and two cores: a training step of 31 ms instead of 5 ms). Where ranks share a core, ranks
    that yield may slow each other down: of four ranks on two cores with Horovod (Linux 6.18; no other kernel was tried) a
    step took 28 to more than 400 ms, and 16 with waits that sleep. On two ranks such waits cost: 6 ms instead of 4.
    """
    num_ranks, num_cores = launcher_of(os.environ).local_size or 1, os.cpu_count() or 1
    if num_ranks >= num_cores:
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if num_ranks > num_cores:
        os.environ.setdefault("OMPI_MCA_threads_pthreads_yield_strategy", "nanosleep")


def _mpi_name(mpi) -> str:
    return mpi.Get_library_version().replace("\0", "").splitlines()[0].split(",")[0]


def running_mpi() -> Any:
    """Return mpi4py.MPI if MPI runs in this process, otherwise None. Local."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


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
    """End the whole job with an exit code, from this rank alone, and from any thread. Local."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    mpi = running_mpi()
    if mpi is not None:
        if threading.current_thread() is not threading.main_thread() and mpi.Query_thread() != mpi.THREAD_MULTIPLE:
            os._exit(code)  # the launcher ends the job
        mpi.COMM_WORLD.Abort(code)


def install_abort_hook(abort: Callable[[int], None] = abort) -> None:
    """Let an exception of one rank end the job, as ``python -m mpi4py`` does. Local."""
    former = sys.excepthook

    def hook(kind, error, traceback):
        former(kind, error, traceback)
        abort(1)

    if getattr(former, "__module__", None) != __name__:
        sys.excepthook = hook
