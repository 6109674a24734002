"""The batches of an epoch, read ahead of the step that needs them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ..config import check_field
from ..errors import ConfigError, Fault
from ..grid import Grid
from .dataset import ShardDataset
from .order import global_batches, num_global_batches


@dataclass(frozen=True)
class Batch:
    """The examples of one global batch for this rank."""

    x: torch.Tensor
    """[B_local, ...] normalised inputs."""
    y: torch.Tensor
    """[B_local, ...] targets."""
    examples: torch.Tensor
    """[B_local] global indices of the examples in the split."""
    num_examples: int
    """Examples of the batch in the whole job."""
    partners: tuple[torch.Tensor, torch.Tensor] | None = None
    """Inputs and targets of the mirrored positions of the global batch, if they are requested."""


class BatchLoader:
    """Iterates over the batches of an epoch. With the reading ``group`` collective over ``sample_comm``, else local.

    Batches are read ahead by a thread, not by a forked process: a fork after MPI has started is not safe. The main
    thread makes all exchanges between ranks.

    Parameters
    ----------
    dataset : ShardDataset
        Where the examples come from.
    grid : Grid
        Coordinates of this rank: the ranks of the data axis take disjoint ranges of each batch.
    global_batch_size : int
        Examples per batch in the whole job.
    seed : int
        Key of the order.
    drop_last : bool
        Leave out the last batch if it is smaller.
    prefetch : int
        Batches that are read ahead; 0 reads each when it is needed.
    with_partners : bool
        Whether each batch brings the examples of the mirrored positions of the global batch (for `Mixup`).
    """

    def __init__(
        self,
        dataset: ShardDataset,
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

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, from ``first_batch`` on: an interrupted epoch continues where it stopped."""
        if not 0 <= first_batch <= self.num_batches:
            rule = f"an epoch has {self.num_batches} batches"
            remedy = "Begin with one of them"
            raise ConfigError(Fault("first_batch", first_batch, rule, remedy))
        batches = global_batches(
            len(self.dataset),
            self.global_batch_size,
            self.seed,
            epoch,
            drop_last=self.drop_last,
            first_batch=first_batch,
        )
        if not self.prefetch:
            for batch in batches:
                yield self._deliver(batch, self.dataset.read(self._wanted(batch)))
            return
        waiting: deque = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            try:
                for batch in itertools.islice(batches, self.prefetch):
                    waiting.append((batch, reader.submit(self.dataset.read, self._wanted(batch))))
                while waiting:
                    batch, read = waiting.popleft()
                    for following in itertools.islice(batches, 1):
                        waiting.append((following, reader.submit(self.dataset.read, self._wanted(following))))
                    yield self._deliver(batch, read.result())
            finally:
                reader.shutdown(wait=True, cancel_futures=True)

    def _wanted(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the examples that this rank needs of a global batch."""
        part = self.grid.local_examples(len(batch))
        return torch.cat([batch[part], batch.flip(0)[part]]) if self.with_partners else batch[part]

    def _deliver(self, batch: torch.Tensor, buffer: torch.Tensor) -> Batch:
        part = self.grid.local_examples(len(batch))
        x, y = self.dataset.deliver(buffer)
        examples = batch[part].to(x.device)
        mine = len(examples)
        partners = (x[mine:], y[mine:]) if self.with_partners else None
        return Batch(x[:mine], y[:mine], examples, len(batch), partners)
