"""Ranks that torchrun has started, without MPI: objects and shared memory by torch.distributed, too."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import pickle
import socket
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config import Compression, Reduction
from ..errors import CommunicationError
from ..grid import Grid
from .base import NodeArray, ObjectAxis, no_shared_memory
from .launcher import Launcher, launcher_of
from .rendezvous import find_meeting
from .torch_distributed import (
    STALL,
    START_SECONDS,
    WITH_NCCL,
    Running,
    TorchTensors,
    has_nccl_for,
    refuse_foreign_start,
    start,
    use_interface,
)

SHARED_MEMORY = "/dev/shm"


class TorchrunComm(TorchTensors):
    """The collectives of `GridComm` by torch.distributed alone; call `join` first.

    Parameters
    ----------
    node_size : int, optional
        As for `MpiComm`.
    """

    def __init__(
        self,
        grid: Grid,
        device: torch.device | str = "cpu",
        reduction: Reduction = "axes",
        compression: Compression = "none",
        *,
        node_size: int | None = None,
    ):
        super().__init__(grid, device, reduction, compression)
        place, total = local_place()
        part = node_size or total
        first = place // part * part  # among the ranks of the node, which follow each other in the world
        self.local_rank, self.local_size = place - first, min(part, total - first)
        start_of_part = grid.rank - self.local_rank
        self._node_size = node_size
        self._ranks["node"] = range(start_of_part, start_of_part + self.local_size)
        self._enter_groups()
        self._through_host = self.device.type == "cuda" and not self._can_use_nccl()

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        self.traffic.num_object_collectives += 1
        box = [value]
        dist.broadcast_object_list(box, root, device=torch.device("cpu"))
        return box[0]

    def gather_objects(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        self.traffic.num_object_collectives += 1
        group = self._group(axis)
        return [value] if group is None else allgather(value, group)

    def barrier(self) -> None:
        self.traffic.num_object_collectives += 1
        dist.all_reduce(torch.zeros(1))  # on the host: torch's own barrier would wait for the GPUs, too

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype | str) -> NodeArray:
        if self.local_size == 1:
            return super().node_array(shape, dtype)
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        path = problem = None
        if self.local_rank == 0:
            try:
                path = _shared_file(max(num_bytes, 1))
            except OSError as error:
                problem = str(error)
        path, problem = self.gather_objects((path, problem), "node")[0]
        if problem is not None:
            raise no_shared_memory(num_bytes, problem)
        memory = None
        try:
            memory = np.memmap(path, np.uint8, "r+")
        except OSError as error:
            problem = str(error)
        problems = [p for p in self.gather_objects(problem, "node") if p is not None]
        if self.local_rank == 0:
            os.unlink(path)  # all have it open
        if problems:
            raise no_shared_memory(num_bytes, problems[0])
        return NodeArray(
            memory[:num_bytes].view(np.ndarray).view(dtype).reshape(shape),
            lambda: dist.all_reduce(torch.zeros(1), group=self._group("node")),
        )

    def close(self) -> None:
        self.barrier()  # the groups stay: other objects use them


def _shared_file(num_bytes: int) -> str:
    """Return a new file in shared memory of this size, with its memory really allocated."""
    descriptor, path = tempfile.mkstemp(prefix="hpc_bnn.", dir=SHARED_MEMORY)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return path


def allgather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the objects of all ranks of a group (the world). Collective over it."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


# --- start and end -------------------------------------------------------------------------------------


def launcher() -> Launcher | None:
    """Return torchrun if it has started several ranks. Local."""
    found = launcher_of(os.environ)
    return found if found.needs_no_mpi else None


def local_place() -> tuple[int, int]:
    """Return this rank among those of its node, and their number. Local."""
    return int(os.environ["LOCAL_RANK"]), launcher_of(os.environ).local_size


def join() -> None:
    """Start torch.distributed from what torchrun has set, once. Collective over the world."""
    if Running.backend is not None:
        return
    refuse_foreign_start()
    job, kind = launcher(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _open_store()
    use_interface(find_meeting(_allgather_before_start, job.rank == 0))
    start(WITH_NCCL if has_nccl_for(kind) else "gloo", job.rank, job.size)


def _allgather_before_start(value: Any) -> list[Any]:
    """Gather by the store alone, through rank 0, so that no rank has to ask every other. Collective over the world."""
    Running.num_waits += 1
    key, job = f"hpc_bnn.gather.{Running.num_waits}", launcher()
    try:
        Running.store.set(f"{key}.{job.rank}", pickle.dumps(value))
        if job.rank == 0:
            values = Running.store.multi_get([f"{key}.{rank}" for rank in range(job.size)])
            Running.store.set(key, pickle.dumps([pickle.loads(value) for value in values]))
        return pickle.loads(Running.store.get(key))
    except dist.DistError as error:
        raise CommunicationError(
            f"rank {job.rank} on {socket.gethostname()} timed out waiting for the other ranks of torchrun ({error}). "
            "Look for the first rank that failed"
        ) from error


def wait_for_others(seconds: float) -> bool:
    """Do the same as `hpc_bnn.comm.wait_for_others`; return False if torchrun and its store have ended."""
    try:
        _open_store(seconds)
    except CommunicationError:  # whoever needed it before has said it
        return False
    Running.num_waits += 1
    key, size = f"hpc_bnn.wait.{Running.num_waits}", launcher().size
    end, pause = time.monotonic() + seconds, 0.01
    with contextlib.suppress(dist.DistError):
        Running.store.add(key, 1)
        while time.monotonic() < end:
            if Running.store.add(key, 0) >= size:
                return True
            time.sleep(pause)
            pause = min(1.5 * pause, 0.5)  # one server answers all ranks
    return False


def _open_store(seconds: float | None = None) -> None:
    if Running.store is not None:
        return
    timeout = datetime.timedelta(seconds=seconds or START_SECONDS)
    try:
        Running.store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        Running.store.set_timeout(STALL)  # ranks may come from a slow file system
    except Exception as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise CommunicationError(
            f"the store of torchrun at {where} cannot be reached from rank {launcher().rank} ({error}). "
            "Give torchrun an address that all nodes reach (--rdzv-endpoint)"
        ) from error
