"""The weights of a module as one flat buffer, of which its parameters are views."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


class FlatLayout:
    """Where named tensors lie in a flat buffer.

    Tensors whose length is a multiple of 16 come first, so that each of them starts on a 64-byte
    boundary, as matrix kernels like it, without padding.

    Parameters
    ----------
    shapes : dict of str to torch.Size
        Shape of each tensor, by name.
    """

    def __init__(self, shapes: dict[str, torch.Size]):
        order = sorted(shapes, key=lambda name: shapes[name].numel() % 16 != 0)  # stable
        self.shapes = {name: shapes[name] for name in order}
        self.num_elements = sum(shape.numel() for shape in shapes.values())

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter]) -> FlatLayout:
        """Return the layout of parameters. Local."""
        return cls({name: parameter.shape for name, parameter in parameters.items()})

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named views of a flat tensor [num_elements]."""
        lengths = [shape.numel() for shape in self.shapes.values()]
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), flat.split(lengths))}

    def block(self, start: int, stop: int) -> Block:
        """Return the tensors with these numbers, from ``start`` to before ``stop``."""
        ends = [0, *itertools.accumulate(shape.numel() for shape in self.shapes.values())]
        layout = FlatLayout(dict(list(self.shapes.items())[start:stop]))
        return Block(slice(start, stop), slice(ends[start], ends[stop]), layout)

    def divide(self, num_elements: int) -> tuple[list[Block], list[Block]]:
        """Divide the tensors into blocks that a backward pass completes one after another, and the rest.

        Blocks come in the order of the backward pass, last tensors first, and have at least ``num_elements``. The rest are
        the first tensors, completed last, and those behind the boundary of the multiples of 16, which come from all layers.
        """
        lengths = [shape.numel() for shape in self.shapes.values()]
        last = stop = sum(length % 16 == 0 for length in lengths)
        blocks = []
        for start in range(stop - 1, 0, -1):
            if sum(lengths[start:stop]) >= num_elements:
                blocks.append(self.block(start, stop))
                stop = start
        rest = (self.block(0, stop), self.block(last, len(lengths)))
        return blocks, [block for block in rest if len(block.layout)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Block:
    """Some tensors of a `FlatLayout` that follow each other."""

    numbers: slice
    """Which, among all tensors."""
    span: slice
    """Where, in the flat buffer."""
    layout: FlatLayout
    """Of these alone."""


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
    """Return the gradients of parameters and forget them, so that the next backward makes new ones."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients
