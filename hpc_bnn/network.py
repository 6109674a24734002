"""The network between ranks, as two numbers: to measure it, and to say what a collective costs (floor 3)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from .comm import GridComm

Operation = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Network:
    """Latency and bandwidth of messages between ranks."""

    bandwidth: float
    """Bytes per second that a rank sends while it receives as many."""
    latency: float
    """Seconds of a message without content."""

    def seconds(self, operation: Operation, num_bytes: float, extent: int) -> float:
        """Return the time of a collective over some ranks.

        A ring for the bytes and a tree for the latency: 2 (P-1)/P n / bandwidth + 2 log2(P) latency for an all-reduce
        of n bytes, half of it for a reduce-scatter or an all-gather (Thakur, Rabenseifner and Gropp, 2005). It knows no
        contention between groups and no jitter.

        Parameters
        ----------
        operation : {"all-reduce", "reduce-scatter", "all-gather"}
            What is done.
        num_bytes : float
            Bytes of the whole buffer: of the result, for an all-gather.
        extent : int
            Ranks that take part, P.
        """
        if extent == 1:
            return 0.0
        one_way = (extent - 1) / extent * num_bytes / self.bandwidth + math.log2(extent) * self.latency
        return 2 * one_way if operation == "all-reduce" else one_way


def measure_network(comm: GridComm, num_rounds: int = 10) -> Network:
    """Return what sums over the world say of the network. Collective over the world, of two ranks or more.

    The latency from the smallest sums, the bandwidth from what 16 MiB cost above 4 MiB; medians of the slowest rank, after
    two rounds to warm up.
    """
    ranks = comm.grid.world_size
    small, medium, large = (_median_seconds(comm, size, num_rounds) for size in (2**10, 2**22, 2**24))
    traffic = 2 * (ranks - 1) / ranks * (2**24 - 2**22)
    return Network(
        bandwidth=traffic / max(large - medium, 1e-9), latency=max(small, 1e-8) / (2 * math.log2(ranks))
    )


def _median_seconds(comm: GridComm, num_bytes: int, num_rounds: int) -> float:
    flat, seconds = torch.zeros(num_bytes // 4, device=comm.device), []
    for _ in range(num_rounds + 2):
        comm.barrier()
        start = time.perf_counter()
        comm.sum_(flat)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)
        seconds.append(time.perf_counter() - start)
    return median(max(times) for times in zip(*comm.gather_objects(seconds[2:])))
