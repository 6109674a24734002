"""Ranks without MPI: objects and shared memory by torch.distributed, too. How torchrun's ranks meet, and end."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import json
import math
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..errors import CommunicationError
from ..grid import Axis, Grid
from .launcher import launcher_of
from .rendezvous import find_meeting
from .torch_dist import (
    STALL,
    START_SECONDS,
    WITH_NCCL,
    Running,
    group_of,
    has_nccl_for,
    refuse_foreign_start,
    start,
    use_interface,
)
from .transports import NodeArray, ObjectAxis, ObjectTransport, no_shared_memory

SHARED_MEMORY = "/dev/shm"
SECRET = "HPC_BNN_SECRET"
"""Variable with a secret that the ranks of a job share; the batch scripts set it."""


class TorchObjects(ObjectTransport):
    """Objects and shared memory by torch.distributed, with ``node_size`` of `MpiObjects`.

    Call `join` or `torch_dist.adopt` before.
    """

    def __init__(self, node_size: int | None = None):
        self._grid = Grid()
        self._node_size = node_size
        world = Running.world()
        self.rank, self.size = dist.get_rank(world), dist.get_world_size(world)
        nodes = self.gather(_node())
        here = [rank for rank, node in enumerate(nodes) if node == nodes[self.rank]]
        place = here.index(self.rank)
        self.rank_on_node, self.ranks_on_node = place, len(here)
        if Running.framework is not None:  # other ranks of the node may be in another group
            on_device = torch.cuda.current_device() if torch.cuda.is_available() else place
            self.rank_on_node = int(os.environ.get("LOCAL_RANK", on_device))
        first = place - place % (node_size or len(here))
        self._node = here[first:][: node_size or len(here)]
        self.local_rank, self.local_size = place - first, len(self._node)

    def enter(self, grid: Grid) -> None:
        self._grid = grid
        self._group("node")  # on a node with one rank as well

    def _group(self, axis: ObjectAxis) -> dist.ProcessGroup:
        if axis == "node":
            return group_of(("node", self._node_size), self._node, of_objects=True)
        if axis == "world":
            return group_of(("world", self.size), range(self.size), of_objects=True)
        return group_of((axis, self._grid.extents[axis]), self._grid.groups[axis], of_objects=True)

    def broadcast(self, value: Any, root: int = 0) -> Any:
        box, group = [value], self._group("world")
        dist.broadcast_object_list(box, dist.get_global_rank(group, root), group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        if axis != "world" and (self.local_size if axis == "node" else self._grid.extents[axis]) == 1:
            return [value]
        values = [None] * (self.local_size if axis == "node" else dist.get_world_size(self._group(axis)))
        dist.all_gather_object(values, value, self._group(axis))
        return values

    def gather_first(self, value: Any, axis: Axis) -> list[Any]:
        if self._grid.extents[axis] == 1:
            return [value]
        group = self._group(axis)
        ranks = dist.get_process_group_ranks(group)
        values = [None] * len(ranks) if dist.get_rank(group) == 0 else None
        dist.gather_object(value, values, ranks[0], group)
        return values or []

    def barrier(self) -> None:
        self._wait("world")

    def _wait(self, axis: ObjectAxis) -> None:
        dist.all_reduce(torch.zeros(1), group=self._group(axis))  # on the host: torch's own barrier waits for GPUs, too

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype) -> NodeArray:
        num_bytes = math.prod(shape) * dtype.itemsize
        path, memory, problem = None, np.empty(0, np.uint8), None
        if self.local_rank == 0:
            try:
                path = _shared_file(max(num_bytes, 1))
            except OSError as error:
                problem = str(error)
        path, problem = self.gather((path, problem), "node")[0]
        if problem is not None:
            raise no_shared_memory(num_bytes, problem)
        try:
            memory = np.memmap(path, np.uint8, "r+")
        except OSError as error:
            problem = str(error)
        problems = [p for p in self.gather(problem, "node") if p is not None]
        if self.local_rank == 0:
            os.unlink(path)  # all have it open
        if problems:
            raise no_shared_memory(num_bytes, problems[0])
        array = memory[:num_bytes].view(np.ndarray).view(dtype).reshape(shape)
        return NodeArray(array, lambda: self._wait("node"))


def _node() -> tuple[Any, ...]:
    """Return what ranks that share memory have in common, and no others: containers may share a name, or a kernel. Local."""
    boot, memory = Path("/proc/sys/kernel/random/boot_id"), Path(SHARED_MEMORY)
    return (
        socket.gethostname(),
        boot.read_text(encoding="utf-8") if boot.exists() else "",
        memory.stat().st_dev if memory.exists() else None,
    )


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


# --- start and end -------------------------------------------------------------------------------------


def join() -> None:
    """Start torch.distributed from what torchrun has set, once. Collective over the world."""
    if Running.framework is not None:
        raise CommunicationError("the ranks of <process_group> form the grid already: give it here as well")
    if Running.backend is not None:
        return
    refuse_foreign_start()
    job, kind = launcher_of(os.environ), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _open_store()
    use_interface(find_meeting(_allgather_before_start, job.rank == 0))
    start(WITH_NCCL if has_nccl_for(kind) else "gloo", job.rank, job.least_size)


def _allgather_before_start(value: Any) -> list[Any]:
    """Gather by the store alone, through rank 0, so that no rank has to ask every other. Collective over the world."""
    # Whoever reaches the port of the store can write to it: what is read there is JSON, which runs no code, and is
    # signed with the secret of the job, where there is one (`SECRET`)
    Running.num_waits += 1
    key, job = f"hpc_bnn.{_token()}.gather.{Running.num_waits}", launcher_of(os.environ)
    try:
        Running.store.set(f"{key}.{job.rank}", _signed(value))
        if job.rank == 0:
            values = Running.store.multi_get([f"{key}.{rank}" for rank in range(job.least_size)])
            Running.store.set(key, _signed([_verified(value) for value in values]))
        return _verified(Running.store.get(key))
    except dist.DistError as error:
        rule = f"rank {job.rank} on {socket.gethostname()} timed out waiting for the other ranks of torchrun ({error})"
        raise CommunicationError(f"{rule}. Look for the first rank that failed") from error


def _token() -> str:
    """Return a name of the job that only its own ranks know; empty without a secret."""
    secret = os.environ.get(SECRET, "")
    return hashlib.sha256(b"token" + secret.encode()).hexdigest()[:32] if secret else ""


def _signed(value: Any) -> bytes:
    content = json.dumps(value).encode()
    return hmac.digest(os.environ.get(SECRET, "").encode(), content, "sha256") + content


def _verified(signed: bytes) -> Any:
    digest, content = signed[:32], signed[32:]
    if not hmac.compare_digest(digest, hmac.digest(os.environ.get(SECRET, "").encode(), content, "sha256")):
        raise CommunicationError(
            "the store of torchrun holds what no rank of this job has written: somebody else writes to its port, or "
            f"{SECRET} differs between the nodes. Set it to one secret on all of them"
        )
    return json.loads(content)


def wait_for_others(seconds: float) -> bool:
    """Do the same as `hpc_bnn.comm.wait_for_others`; return False if torchrun and its store have ended."""
    try:
        _open_store(seconds)
    except CommunicationError:  # whoever needed it before has said it
        return False
    Running.num_waits += 1
    key, size = f"hpc_bnn.{_token()}.wait.{Running.num_waits}", launcher_of(os.environ).least_size
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
        Running.token = _token()
        Running.store.set_timeout(STALL)  # ranks may come from a slow file system
    except Exception as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        rule = f"the store of torchrun at {where} cannot be reached from rank {launcher_of(os.environ).rank} ({error})"
        raise CommunicationError(f"{rule}. Give torchrun an address that all nodes reach (--rdzv-endpoint)") from error
