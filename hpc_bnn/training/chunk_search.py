"""How many samples at once are fastest: measured in the first steps of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Iterator

import torch

from .capture import NUM_EAGER, NUM_PROOFS
from .step import VariationalStep

logger = logging.getLogger(__name__)

NUM_BEFORE, NUM_TIMED = NUM_EAGER + NUM_PROOFS + 1, 5
"""Steps of each size that look, allocate and capture, and those whose time counts."""
FACTOR = 4
"""From a size to the next one."""
GAIN = 0.9
"""A larger chunk has to need less than this part of the time of the best one so far: it takes more memory."""
MEMORY = 0.5
"""Of the memory that is free, what a larger chunk may take."""


class ChunkSearch:
    """Times chunks of 1, 4, 16, ... samples in steps of a run, until one is not faster, and keeps the fastest.

    These are steps like all others, because their numbers do not depend on the chunk (to rounding). The slowest rank
    counts, and the one with the least memory; where one cannot batch, all walk. Collective as `VariationalStep.settle`.

    Attributes
    ----------
    found : int, optional
        The size, on all ranks the same; None while the search goes on.
    seconds : dict of int to float
        Of the slowest rank, by size: the median of a step.
    """

    def __init__(self, step: VariationalStep):
        self._step, self._rest = step, 0
        self.found: int | None = None
        self.seconds: dict[int, float] = {}
        self._largest = -(-step.num_samples // step.comm.grid.sample_size)
        step.loop.speaks = False  # nobody has asked for batches
        self._begin(1)

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Time the step that is made in a block. Collective over the world behind the last one of a size."""
        step = self._step
        if self.found is not None:
            yield
            return
        step.settle()
        begun = time.perf_counter()
        yield
        step.settle()
        self._times.append(time.perf_counter() - begun)
        if (device := step.comm.device).type == "cuda" and len(self._times) == 1:  # the first one makes what lasts
            torch.cuda.reset_peak_memory_stats(device)
            self._rest = torch.cuda.memory_allocated(device)
        if len(self._times) == NUM_BEFORE + NUM_TIMED:
            self._go_on()

    def _begin(self, size: int) -> None:
        self._times: list[float] = []
        self._step.set_chunk_size_(size)

    def _go_on(self) -> None:
        """Try the next size, or end the search. Collective over the world."""
        step, size = self._step, self._step.loop.chunk_size
        mine = [statistics.median(self._times[NUM_BEFORE:]), -self._room(size), float(not step.loop.can_batch)]
        of_all = torch.tensor(mine, dtype=torch.float64, device=step.comm.device)
        step.comm.max_(of_all)
        seconds, room, cannot_batch = of_all.tolist()
        best = min(self.seconds, key=self.seconds.__getitem__, default=1)
        is_better = size == 1 or seconds < GAIN * self.seconds[best]
        self.seconds[size] = seconds
        larger = min(size * FACTOR, self._largest)
        if not cannot_batch and is_better and size < larger <= -room:
            self._begin(larger)
            return
        self.found = 1 if cannot_batch else size if is_better else best
        step.loop.speaks = step.comm.grid.is_first("world")
        if self.found != size:
            step.set_chunk_size_(self.found)
        if step.loop.speaks:
            times = ", ".join(f"{n}: {1000 * s:.3g} ms" for n, s in self.seconds.items())
            why = f"; {step.loop.why_not}" if step.loop.why_not else ""
            logger.info("chunk_size auto: %d (a step of the slowest rank by size: %s%s)", self.found, times, why)

    def _room(self, size: int) -> float:
        """Return how many samples would fit at once, by what those of this size have taken. Local."""
        if (device := self._step.comm.device).type != "cuda":
            return math.inf
        per_sample = (torch.cuda.max_memory_allocated(device) - self._rest) / size
        free = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
        return MEMORY * free / max(per_sample, 1)
