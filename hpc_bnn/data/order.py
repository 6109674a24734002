"""Order of the examples: one permutation per (seed, epoch), the same on every grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..noise import Key, Stream


def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation [num_examples] of one epoch. Local; equal on all ranks."""
    return torch.randperm(num_examples, generator=Key(seed, Stream.DATA_ORDER, step=epoch).generator())


def num_global_batches(num_examples: int, global_batch_size: int, drop_last: bool = False) -> int:
    """Return the number of batches of an epoch. Local."""
    return num_examples // global_batch_size if drop_last else -(-num_examples // global_batch_size)


def global_batches(
    num_examples: int,
    global_batch_size: int,
    seed: int | None,
    epoch: int,
    *,
    drop_last: bool = False,
    first_batch: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield the example indices of each global batch of an epoch. Local; equal on all ranks.

    A rank evaluates the examples ``batch[comm.grid.local_examples(len(batch))]``. A smaller last batch is left out with
    ``drop_last``; otherwise it is kept, and is exact because of sums with counts. An interrupted epoch continues with
    ``first_batch``. With the seed None the examples keep their order.
    """
    order = torch.arange(num_examples) if seed is None else epoch_order(num_examples, seed, epoch)
    number = num_global_batches(num_examples, global_batch_size, drop_last)
    yield from order[: number * global_batch_size].split(global_batch_size)[first_batch:] if number else ()
