"""The batches of an epoch, read ahead of the step that needs them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..config import check_field
from ..errors import ConfigError, Fault
from ..grid import Grid
from ..trees import Inputs, rows_of
from .order import EpochOrder, batches_in_part, local_places, num_global_batches
from .source import Source, on_device


@dataclass(frozen=True)
class Batch:
    """The examples of one global batch for this rank."""

    x: Inputs
    """[B_local, ...] normalised inputs."""
    y: torch.Tensor
    """[B_local, ...] targets."""
    examples: torch.Tensor
    """[B_local] global indices of the examples in the split."""
    num_examples: int
    """Examples of the batch in the whole job."""
    partners: tuple[Inputs, torch.Tensor] | None = None
    """Inputs and targets of the mirrored positions of the global batch, if they are requested."""
    weights: torch.Tensor | None = None
    """[B_local] weights of the examples, if they have some."""


class BatchLoader:
    """Iterates over the batches of an epoch. Local, or as `Source.deliver` is.

    Parameters
    ----------
    dataset, grid : Source, Grid
        Where the examples come from; the ranks of the data axis take disjoint ranges of each batch.
    global_batch_size, seed : int
        Examples per batch in the whole job, and key of the order.
    drop_last, with_partners : bool
        Leave out the last batch if it is smaller; bring the examples of the mirrored positions as well (for `Mixup`).
    prefetch : int
        Batches that are read ahead; 0 reads each when it is needed.
    window : int, optional
        Shuffle within windows of so many examples (`EpochOrder`).
    """

    def __init__(
        self,
        dataset: Source,
        grid: Grid,
        global_batch_size: int,
        seed: int,
        *,
        drop_last: bool = False,
        prefetch: int = 2,
        with_partners: bool = False,
        window: int | None = None,
    ):
        check_field("global_batch_size", global_batch_size)
        check_field("data.shuffle_window", window, "window")
        check_field("data.prefetch", prefetch)
        self.dataset, self.grid = dataset, grid
        self.global_batch_size, self.seed, self.drop_last = global_batch_size, seed, drop_last
        self.prefetch, self.with_partners, self.window = prefetch, with_partners, window
        self.num_batches = num_global_batches(len(dataset), global_batch_size, drop_last)
        """Batches of an epoch."""
        self.num_examples = min(len(dataset), self.num_batches * global_batch_size)
        """Examples of an epoch."""
        if self.num_batches == 0:
            rule = f"the split has {len(dataset)} examples, and <data.drop_last> leaves out a smaller batch"
            raise ConfigError(Fault("global_batch_size", global_batch_size, rule, "Make it smaller"))
        remedy = "Leave it out, or use a map-style Dataset"
        if with_partners and dataset.has_own_order:
            rule = "it needs the examples at the mirrored places of a batch, and a stream gives each example once"
            raise ConfigError(Fault("augmentation.transforms", "mixup", rule, remedy))
        if window is not None and dataset.has_own_order:
            rule = "a stream has an order of its own"
            raise ConfigError(Fault("data.shuffle_window", window, rule, remedy, "window"))

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from ``first_batch`` on: an interrupted epoch continues where it stopped."""
        if not 0 <= first_batch <= self.num_batches:
            rule = f"an epoch has {self.num_batches} batches"
            raise ConfigError(Fault("first_batch", first_batch, rule, "Begin with one of them"))
        self.dataset.begin(epoch)
        size, own_order = len(self.dataset), self.dataset.has_own_order
        order = None if own_order else EpochOrder(size, self.seed, epoch, self.window)
        batches = batches_in_part(
            size, self.global_batch_size, order, self._places, drop_last=self.drop_last, first_batch=first_batch
        )
        with contextlib.closing(_read_ahead(self.dataset.read, batches, self.prefetch)) as read:
            for num_examples, examples, buffer in read:
                x, y, *given = self.dataset.deliver(buffer)
                count = len(examples) // 2 if self.with_partners else len(examples)
                mine, others = slice(count), slice(count, None)
                partners = (rows_of(x, others), y[others]) if self.with_partners else None
                weights = given[0][mine] if given else None
                indices = on_device(examples[mine], y.device)
                yield Batch(rows_of(x, mine), y[mine], indices, num_examples, partners, weights)

    def _places(self, size: int) -> torch.Tensor:
        """Return where in a global batch the examples stand that this rank needs: its own, then their mirrored ones."""
        mine = local_places(self.grid, size)
        return torch.cat([mine, size - 1 - mine]) if self.with_partners else mine


def _read_ahead(
    read: Callable[[torch.Tensor], Any], batches: Iterator[tuple[int, torch.Tensor]], count: int
) -> Generator[tuple[int, torch.Tensor, Any], None, None]:
    """Yield each batch (size, examples) and what ``read`` gives for it; a thread reads the next ``count`` meanwhile."""
    # No forked process: a fork after MPI has started is not safe. The main thread makes all exchanges between ranks
    if not count:
        for size, examples in batches:
            yield size, examples, read(examples)
        return
    waiting: deque[tuple[int, torch.Tensor, Future[Any]]] = deque()
    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        for size, examples in batches:
            waiting.append((size, examples, reader.submit(read, examples)))
            if len(waiting) > count:
                size, examples, reading = waiting.popleft()
                yield size, examples, reading.result()
        for size, examples, reading in waiting:
            yield size, examples, reading.result()
    finally:
        reader.shutdown(cancel_futures=True)
