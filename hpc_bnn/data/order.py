"""Order of the examples: one permutation per (seed, epoch), the same on every grid, that nobody has to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..grid import Grid
from ..noise import Key, Stream
from ..noise.philox import mix64_of

_CHUNK = 1 << 14
"""Places whose examples are computed at once: NumPy's cost of a call is spread over them."""


class EpochOrder:
    """The order of one epoch: a bijection of [0, num_examples), evaluated at the places that are asked for. Local.

    Parameters
    ----------
    num_examples, seed, epoch : int
        Extent, and key.
    window : int, optional
        Shuffle within windows of so many examples that are stored one after another, and the windows among each other, so
        that a reader needs few files at a time. The windows begin elsewhere in each epoch.
    stream : Stream
        Purpose of the order.
    """

    def __init__(
        self, num_examples: int, seed: int, epoch: int, window: int | None = None, stream: Stream = Stream.DATA_ORDER
    ):
        key = Key(seed, stream, step=epoch)
        self._keys = key.bits(2 + 2 * _ROUNDS).numpy().view(np.uint64)
        self._extent, self._window = num_examples, window

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        """Return the examples [n] at places [n] of the order."""
        return torch.from_numpy(self._of(places.numpy().astype(np.uint64)).astype(np.int64))

    def _of(self, places: np.ndarray) -> np.ndarray:
        extent, window, (shift, *keys) = self._extent, self._window, self._keys
        if window is None or window >= extent:
            return _permuted(places, extent, keys)
        number, place = np.divmod(places, np.uint64(window))
        num_whole = extent // window
        is_whole = number < num_whole
        found = places.copy()  # the rest, shorter than a window, comes last
        for some, size in ((is_whole, window), (~is_whole, extent % window)):
            if some.any():
                of = _permuted(number[some], num_whole, keys) if size == window else number[some]
                found[some] = of * np.uint64(window) + _permuted(place[some], size, keys, mix64_of(of + np.uint64(1)))
        return (found + shift % np.uint64(extent)) % np.uint64(extent)


_ROUNDS = 12


def _permuted(x: np.ndarray, extent: int, keys: list[np.uint64], tweak: np.ndarray | None = None) -> np.ndarray:
    """Return the places of x in a permutation of [0, extent): a Feistel network over a power of two, cycle walking."""
    # An element that leaves the range walks on until it is in it again: that keeps the map a bijection (Black and
    # Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002)
    num_bits = max(2, (extent - 1).bit_length())
    low_bits = np.uint64(num_bits // 2)
    masks = np.uint64((1 << (num_bits // 2)) - 1), np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    x, todo = x.copy(), np.arange(len(x))
    while len(todo):
        low, high = x[todo] & masks[0], x[todo] >> low_bits
        more = np.uint64(0) if tweak is None else tweak[todo]
        for number, key in enumerate(keys):
            if number % 2:
                high ^= mix64_of(low ^ key ^ more) & masks[1]
            else:
                low ^= mix64_of(high ^ key ^ more) & masks[0]
        x[todo] = (high << low_bits) | low
        todo = todo[x[todo] >= extent]
    return x


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
    window: int | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the example indices of each global batch of an epoch. Local; equal on all ranks.

    A rank evaluates the examples ``batch[comm.grid.local_examples(len(batch))]``. A smaller last batch is left out with
    ``drop_last``; otherwise it is kept, and is exact because of sums with counts. An interrupted epoch continues with
    ``first_batch``. With the seed None the examples keep their order; ``window`` as in `EpochOrder`.
    """
    order = None if seed is None else EpochOrder(num_examples, seed, epoch, window)
    for _, examples in batches_in_part(num_examples, global_batch_size, order, torch.arange, drop_last, first_batch):
        yield examples


def local_places(grid: Grid, size: int) -> torch.Tensor:
    """Return where in a global batch of some size the examples of this rank stand. Local."""
    span = grid.local_examples(size)
    return torch.arange(span.start, span.stop)


def batches_in_part(
    num_examples: int,
    global_batch_size: int,
    order: EpochOrder | None,
    part: Callable[[int], torch.Tensor],
    drop_last: bool = False,
    first_batch: int = 0,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield of each global batch its size, and the examples at the places ``part(size)`` in it: no others are computed. Local."""
    number = num_global_batches(num_examples, global_batch_size, drop_last)
    at_once = max(1, _CHUNK // max(1, len(part(global_batch_size))))
    for first in range(first_batch, number, at_once):
        starts = [batch * global_batch_size for batch in range(first, min(first + at_once, number))]
        sizes = [min(global_batch_size, num_examples - start) for start in starts]
        parts = [start + part(size) for start, size in zip(starts, sizes)]
        examples = torch.cat(parts) if order is None else order[torch.cat(parts)]
        yield from zip(sizes, examples.split(list(map(len, parts))))
