"""Which numbers are drawn, and where they go: the tensors of a layout, or the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def from_host(numbers: Sequence[float], device: torch.device | str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers of the host on a device; the host does not wait for a GPU. Local."""
    device = torch.device(device)
    is_gpu = device.type == "cuda"
    found = torch.tensor(numbers, dtype=dtype, device="cpu" if is_gpu else device, pin_memory=is_gpu)
    return found.to(device, non_blocking=True) if is_gpu else found


class Segments:
    """Numbers of several keyed tensors that lie in one flat tensor. Local.

    Segment t holds the numbers ``first[t]`` to ``first[t] + lengths[t] - 1`` of the tensor (or row) whose last key word is
    ``words[t]``, at ``starts[t]`` of the flat tensor. A tensor has at most 2^34 numbers.
    """

    TILE = 1024
    """Numbers of a tile, of which kernels of a GPU take one each; a tile begins at a multiple of 64 of the tensor's."""

    def __init__(self, words: Sequence[int], first: Sequence[int], starts: Sequence[int], lengths: Sequence[int]):
        self._columns = list(words), list(first), list(starts), list(lengths)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return, on a device, the table [4, T] int64 (words, first, starts, lengths) and `tiles`; the CPU needs no tiles."""
        if device not in self._on:
            tiles = self.tiles(device) if device.type != "cpu" else torch.empty(0, 2, dtype=torch.int32, device="cpu")
            self._on[device] = self.table(device), tiles
        return self._on[device]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return words, first, starts and lengths: [4, T] int64."""
        return torch.tensor(self._columns, dtype=torch.int64, device=device)

    def tiles(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the tiles, [num_tiles, 2] int32: segment, number of the tile in it."""
        _, first, _, lengths = np.array(self._columns, np.int64)
        counts = -(-(first % 64 + lengths) // self.TILE) * (lengths > 0)
        segment = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(segment)) - np.repeat(counts.cumsum() - counts, counts)
        return torch.tensor(np.stack([segment, number], 1), dtype=torch.int32, device=device)

    def __getstate__(self):
        return self.__dict__ | {"_on": {}}


def of_rows(rows: Tensor, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return what `Segments.on` does, for numbers ``first`` on of a tensor [len(rows), length] with a key word for each row."""
    number, count = torch.arange(len(rows), device=rows.device), -(-(first % 64 + length) // Segments.TILE)
    table = torch.stack([rows, torch.full_like(rows, first), number * length, torch.full_like(rows, length)])
    if rows.device.type == "cpu":
        return table, torch.empty(0, 2, dtype=torch.int32, device="cpu")
    tiles = torch.arange(count, device=rows.device)
    return table, torch.stack([number.repeat_interleave(count), tiles.repeat(len(rows))], 1).int()
