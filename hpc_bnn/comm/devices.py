"""The GPU, the threads and the memory of a rank."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from pathlib import Path

import torch

from ..errors import CommunicationError, ConfigError, Fault
from .grid_comm import GridComm
from .transports import ObjectTransport

logger = logging.getLogger(__name__)


def choose_device(requested: str, local_rank: int, num_visible: int) -> torch.device:
    """Return the device of a rank. Local.

    One rank per GPU of the node; if the launcher shows each rank only its own GPU, the number is 0. ``local_rank`` counts
    the ranks of the node, ``num_visible`` the GPUs that this process sees.
    """
    kind, _, number = requested.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(Fault("device", requested, "the device is auto, cpu, cuda or cuda:N", "Leave it at auto"))
    if kind == "cpu" or (kind == "auto" and num_visible == 0):
        return torch.device("cpu")
    index = int(number) if number else local_rank % max(num_visible, 1)
    if index >= num_visible:
        rule = f"this process sees {num_visible} GPUs"
        remedy = "Ask the batch system for GPUs, check CUDA_VISIBLE_DEVICES, or use <device> cpu"
        raise ConfigError(Fault("device", requested, rule, remedy))
    return torch.device("cuda", index)


def num_visible_gpus() -> int:
    """Return the number of GPUs that this process can use. Local."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def set_num_threads(local_size: int) -> None:
    """Divide the cores among the ranks of a node, unless the user has set OMP_NUM_THREADS. Local."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        bound = cores < (os.cpu_count() or 1)  # the launcher gave this rank cores of its own
        torch.set_num_threads(max(1, cores if bound else cores // local_size))


def agree_on_device(objects: ObjectTransport, requested: str) -> torch.device:
    """Choose the device of this rank, or raise the same error on all. Collective over the world."""
    device, faults = torch.device("cpu"), ()
    try:
        device = choose_device(requested, objects.rank_on_node, num_visible_gpus())
    except ConfigError as error:
        faults = error.faults
    seen = objects.gather((faults, device.type, socket.gethostname()))
    for rank, (theirs, _, host) in enumerate(seen):
        if theirs:
            raise ConfigError(*theirs, where=f"rank {rank} on {host}: ")
    kinds = {kind: (rank, host) for rank, (_, kind, host) in reversed(list(enumerate(seen)))}
    if len(kinds) > 1:
        places = ", ".join(f"{kind} on rank {rank} ({host})" for kind, (rank, host) in sorted(kinds.items()))
        rule = f"the ranks must compute on one kind of device, and there is {places}"
        remedy = "Check the GPUs of that node, or use <device> cpu"
        raise ConfigError(Fault("device", requested, rule, remedy))
    return device


def ranks_on_one_gpu(device: torch.device, objects: ObjectTransport) -> tuple[list[int], str]:
    """Return the ranks that use one GPU together, and its name; no ranks if each has its own. Collective."""
    uuid = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuids = objects.gather(uuid)
    counts = Counter(uuids)  # in one pass, however many ranks
    shared = sorted(u for u, count in counts.items() if u is not None and count > 1)
    if not shared:
        return [], ""
    return [rank for rank, u in enumerate(uuids) if u == shared[0]], shared[0]


def check_one_rank_per_gpu(comm: GridComm) -> None:
    """Raise an error for two ranks on one GPU if NCCL would, otherwise warn. Collective over the world."""
    ranks, uuid = ranks_on_one_gpu(comm.device, comm.objects)
    if not ranks:
        return
    text = f"ranks {ranks} share one GPU ({uuid})"
    if comm.tensors.needs_own_gpu:
        raise CommunicationError(
            f"{text}, which NCCL refuses. Start one rank per GPU of a node; for a trial <backend> torch sends "
            "through host memory"
        )
    if comm.grid.is_first("world"):
        logger.warning("%s: right for a trial, slow for work. Start one rank per GPU of a node", text)


# --- memory of the node --------------------------------------------------------------------------------


def memory_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Return limit and use (bytes) of the control groups around this process that have a limit. Local.

    A batch system may set the limit on any of them. The use is without the cache of files, which the system gives up where
    memory is needed. Tests name another ``root``, where ``proc`` and ``sys`` are.
    """
    groups, found = root / "proc/self/cgroup", []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for place in (inner, *inner.parents):
            limit, used, stat = (_text(base / place / name) for name in (*names[:2], "memory.stat"))
            if limit.isdigit() and int(limit) < 2**60:  # version 1 says "no limit" by a huge number
                cache = next((row.split()[1] for row in stat.splitlines() if row.startswith(f"{names[2]} ")), 0)
                found.append((int(limit), int(used or 0) - int(cache)))
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


def free_memory_bytes(is_shared: bool, root: Path = Path("/")) -> float:
    """Return the memory that this process may still take; the shared memory if a node has several ranks. Local."""
    limits = [float("inf")]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        limits += [limit - used for limit, used in memory_limits(root)]
    if is_shared:
        with contextlib.suppress(OSError):
            room = os.statvfs("/dev/shm")
            limits.append(room.f_bavail * room.f_frsize)
    return max(0, min(limits))
