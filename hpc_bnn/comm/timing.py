"""Describe the network between ranks by latency and bandwidth, measure them, and predict the time of a collective."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from ..errors import ConfigError, Fault
from ..grid import Axis
from .grid_comm import GridComm

Operation = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Network:
    """Latency and bandwidth of messages between ranks."""

    bandwidth: float
    """Bytes per second that a rank sends while it receives at the same rate."""
    latency: float
    """Seconds of a message without content."""

    def seconds(self, operation: Operation, num_bytes: float, extent: int) -> float:
        """Return the time of a collective over P = ``extent`` ranks.

        A ring for the bytes and a tree for the latency: 2 (P-1)/P n / bandwidth + 2 log2(P) latency for an all-reduce
        of n bytes, half of it for a reduce-scatter or an all-gather (Thakur, Rabenseifner and Gropp, 2005), whose n is
        the whole buffer. It does not model contention between groups or jitter.
        """
        if extent == 1:
            return 0.0
        one_way = (extent - 1) / extent * num_bytes / self.bandwidth + math.log2(extent) * self.latency
        return 2 * one_way if operation == "all-reduce" else one_way


SMALL_BYTES, LARGE_BYTES = 8, 16 * 2**20
"""Sizes of the sums for the latency and for the bandwidth."""

MAX_REPETITIONS, MAX_SECONDS = 30, 0.5
"""A measurement ends when one of the two is reached, but not before three repetitions."""


def measure_network(comm: GridComm) -> Network:
    """Measure the network by sums over the world. Collective over the world, of two ranks or more."""
    small, large = (seconds_of_sum(comm, "world", num_bytes) for num_bytes in (SMALL_BYTES, LARGE_BYTES))
    return network_of_sums(small, large, comm.grid.world_size)


def network_of_sums(small_seconds: float, large_seconds: float, num_ranks: int) -> Network:
    """Return the network on which sums of `SMALL_BYTES` and `LARGE_BYTES` over some ranks take these times. Local."""
    traffic = 2 * (num_ranks - 1) / num_ranks * LARGE_BYTES
    latency = max(small_seconds, 1e-8) / (2 * math.log2(num_ranks))
    return Network(bandwidth=traffic / max(large_seconds - small_seconds, 1e-9), latency=latency)


def seconds_of_sum(comm: GridComm, axis: Axis, num_bytes: int) -> float:
    """Return the median time of a sum over an axis on the slowest rank. Collective over the world."""
    buffer = torch.zeros(num_bytes // 4, dtype=torch.float32, device=comm.device)

    return seconds_of(comm, comm.sum_, buffer, axis)


def seconds_of(
    comm: GridComm,
    call: Callable,
    *arguments,
    limit: float = MAX_SECONDS,
    repetitions: tuple[int, int] = (3, MAX_REPETITIONS),
) -> float:
    """Return the median time on the slowest rank, of calls for about ``limit`` seconds. Collective over the world."""

    def once() -> float:
        comm.barrier()
        start = time.perf_counter()
        call(*arguments)
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    warm = [once() for _ in range(3)]  # the first negotiates and allocates
    slowest = max(comm.gather_objects(warm[-1]))
    least, most = repetitions
    number = max(least, min(most, int(limit / max(slowest, 1e-9))))
    return max(comm.gather_objects(median(once() for _ in range(number))))


def read_network(path: str) -> Network:
    """Return what ``hpc-bnn doctor --json`` measured over the world; `ConfigError` where a file holds none. Local."""
    try:
        return Network(**json.loads(Path(path).read_text(encoding="utf-8"))["network"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"it holds no network ({type(error).__name__}: {error})"
        remedy = "Write it with mpirun -np 2 hpc-bnn doctor --json FILE, on two ranks or more"
        raise ConfigError(Fault("--network", path, rule, remedy)) from error
