"""Rank 0 of a grid whose other ranks do not exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..grid import Axis, Grid
from .timing import Operation
from .transports import TensorTransport


@dataclass(frozen=True)
class Collective:
    """A collective that a rank took part in."""

    operation: Operation
    axis: Axis
    num_bytes: int
    """Bytes of the whole buffer."""


class SimulatedTensors(TensorTransport):
    """Adds messages to a list and does not send them: sums are this rank's values, what comes from others copies of its own."""

    name = "simulated"

    def __init__(self, grid: Grid, collectives: list[Collective]):
        self._grid, self.collectives = grid, collectives

    def reduce_(self, flat: torch.Tensor, axis: Axis, operation: str) -> None:
        self.collectives.append(Collective("all-reduce", axis, flat.nbytes))

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], None]:
        self.reduce_(flat, axis, "sum")
        return lambda: None

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        pass  # at the start only

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        num_rows = sum(lengths) if lengths is not None else self._grid.extents[axis] * len(tensor)
        gathered = tensor[torch.arange(num_rows, device=tensor.device) % max(len(tensor), 1)]
        self.collectives.append(Collective("all-gather", axis, gathered.nbytes))
        return gathered

    def reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        self.collectives.append(Collective("reduce-scatter", axis, rows.nbytes))
        return rows[self._grid.indices[axis]]

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis, rows: list[int]) -> torch.Tensor:
        self.collectives.append(Collective("reduce-scatter", axis, flat.nbytes))  # as many bytes, sent in the same way
        index = self._grid.indices[axis]
        own = flat.split([rows[index] * count for count in counts])[index]
        received = flat.new_zeros(sum(rows) * counts[index])
        for part in received.split(max(len(own), 1)):
            part.copy_(own[: len(part)])
        return received
