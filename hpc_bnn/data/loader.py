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
from .order import global_batches, num_global_batches
from .source import Source


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
    ):
        check_field("global_batch_size", global_batch_size)
        check_field("data.prefetch", prefetch)
        self.dataset, self.grid = dataset, grid
        self.global_batch_size, self.seed, self.drop_last = global_batch_size, seed, drop_last
        self.prefetch, self.with_partners = prefetch, with_partners
        self.num_batches = num_global_batches(len(dataset), global_batch_size, drop_last)
        """Batches of an epoch."""
        self.num_examples = min(len(dataset), self.num_batches * global_batch_size)
        """Examples of an epoch."""
        if self.num_batches == 0:
            rule = f"the split has {len(dataset)} examples, and <data.drop_last> leaves out a smaller batch"
            raise ConfigError(Fault("global_batch_size", global_batch_size, rule, "Make it smaller"))
        if with_partners and dataset.has_own_order:
            rule = "it needs the examples at the mirrored places of a batch, and a stream gives each example once"
            raise ConfigError(
                Fault("augmentation.transforms", "mixup", rule, "Leave it out, or use a map-style Dataset")
            )

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from ``first_batch`` on: an interrupted epoch continues where it stopped."""
        if not 0 <= first_batch <= self.num_batches:
            rule = f"an epoch has {self.num_batches} batches"
            raise ConfigError(Fault("first_batch", first_batch, rule, "Begin with one of them"))
        self.dataset.begin(epoch)
        batches = global_batches(
            len(self.dataset),
            self.global_batch_size,
            None if self.dataset.has_own_order else self.seed,
            epoch,
            drop_last=self.drop_last,
            first_batch=first_batch,
        )
        with contextlib.closing(_read_ahead(self._read, batches, self.prefetch)) as read:
            for batch, buffer in read:
                x, y = self.dataset.deliver(buffer)
                examples = batch[self.grid.local_examples(len(batch))].to(y.device)
                mine, others = slice(len(examples)), slice(len(examples), None)
                partners = (rows_of(x, others), y[others]) if self.with_partners else None
                yield Batch(rows_of(x, mine), y[mine], examples, len(batch), partners)

    def _read(self, batch: torch.Tensor) -> Any:
        """Return what the source reads of the examples that this rank needs of a global batch."""
        span = self.grid.local_examples(len(batch))
        return self.dataset.read(torch.cat([batch[span], batch.flip(0)[span]]) if self.with_partners else batch[span])


def _read_ahead(
    read: Callable[[torch.Tensor], Any], batches: Iterator[torch.Tensor], count: int
) -> Generator[tuple[torch.Tensor, Any], None, None]:
    """Yield each batch and what ``read`` returns for it; the next ``count`` batches are read meanwhile.

    They are read by a thread, not by a forked process: a fork after MPI has started is not safe. The main thread makes
    all exchanges between ranks.
    """
    if not count:
        for batch in batches:
            yield batch, read(batch)
        return
    waiting: deque[tuple[torch.Tensor, Future[Any]]] = deque()
    reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    try:
        for batch in batches:
            waiting.append((batch, reader.submit(read, batch)))
            if len(waiting) > count:
                first, reading = waiting.popleft()
                yield first, reading.result()
        for first, reading in waiting:
            yield first, reading.result()
    finally:
        reader.shutdown(cancel_futures=True)
