"""Order of the examples: one permutation per (seed, epoch), the same on every grid."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..noise import Stream, keyed_generator


def epoch_order(num_examples: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation [num_examples] of one epoch. Local; equal on all ranks."""
    return torch.randperm(num_examples, generator=keyed_generator(seed, Stream.DATA_ORDER, epoch))


def global_batches(
    num_examples: int, global_batch_size: int, seed: int, epoch: int
) -> Iterator[torch.Tensor]:
    """Yield the example indices of each global batch of an epoch. Local; equal on all ranks.

    Nothing is dropped: the last batch may be smaller. A rank evaluates the part
    ``batch[comm.grid.local_examples(len(batch))]``.
    """
    yield from epoch_order(num_examples, seed, epoch).split(global_batch_size)
