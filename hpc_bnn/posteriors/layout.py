"""The weights of a module as one flat buffer, of which its parameters are views."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..noise import Segments


class FlatLayout:
    """Where named tensors lie in a flat buffer.

    Tensors whose length is a multiple of 16 come first, so that each of them starts on a 64-byte
    boundary, as matrix kernels like it, without padding. ``numbers`` name the noise of each tensor, by default in order.
    A complex tensor [...] lies there as its real and imaginary parts, [..., 2] (`as_real`).
    """

    def __init__(self, shapes: dict[str, torch.Size], numbers: Mapping[str, int] | None = None):
        order = sorted(shapes, key=lambda name: shapes[name].numel() % 16 != 0)  # stable
        self.shapes = {name: shapes[name] for name in order}
        self._lengths = [shape.numel() for shape in self.shapes.values()]
        self.num_elements = sum(self._lengths)
        self.numbers = dict(zip(shapes, itertools.count())) if numbers is None else numbers

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter], module: nn.Module | None = None) -> FlatLayout:
        """Return the layout of parameters, whose noise is named by their numbers among all of the module. Local."""
        numbers = None if module is None else dict(zip(dict(module.named_parameters()), itertools.count()))
        shapes = {name: as_real(parameter).shape for name, parameter in parameters.items()}
        # Complex numbers, also those that a module keeps as pairs of real ones, have to begin at even places
        order = sorted(shapes, key=lambda name: not (len(shapes[name]) > 1 and shapes[name][-1] == 2))
        return cls({name: shapes[name] for name in order}, numbers)

    @functools.cached_property
    def segments(self) -> Segments:
        """What names the noise of [num_elements]: that of a tensor depends on its number only, not on where it lies."""
        starts = [0, *itertools.accumulate(self._lengths)][:-1]
        return Segments([self.numbers[name] for name in self], [0] * len(self), starts, self._lengths)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the named views of a flat tensor [..., num_elements]."""
        parts, rows = flat.split(self._lengths, -1), flat.shape[:-1]
        return {name: part.view(rows + shape) for (name, shape), part in zip(self.shapes.items(), parts)}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a copy of the tensors of this layout, among others, as one flat tensor. Local."""
        like = as_real(next(iter(tensors.values())))  # for a layout of none
        return torch.cat([like.new_empty(0), *(as_real(tensors[name]).reshape(-1) for name in self)])

    def block(self, start: int, stop: int) -> Block:
        """Return the tensors with these numbers, from ``start`` to before ``stop``."""
        ends = [0, *itertools.accumulate(self._lengths)]
        layout = FlatLayout(dict(list(self.shapes.items())[start:stop]), self.numbers)
        return Block(slice(start, stop), slice(ends[start], ends[stop]), layout)

    def divide(self, num_elements: int) -> tuple[list[Block], list[Block]]:
        """Divide the tensors into blocks that a backward pass completes one after another, and the rest.

        Blocks come in the order of the backward pass, last tensors first, and have at least ``num_elements``. The rest are
        the first tensors, completed last, and those behind the boundary of the multiples of 16, which come from all layers.
        """
        last = stop = sum(length % 16 == 0 for length in self._lengths)
        blocks = []
        for start in range(stop - 1, 0, -1):
            if sum(self._lengths[start:stop]) >= num_elements:
                blocks.append(self.block(start, stop))
                stop = start
        rest = (self.block(0, stop), self.block(last, len(self)))
        return blocks, [block for block in rest if len(block.layout)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Block:
    """Some tensors of a `FlatLayout` that follow each other."""

    numbers: slice  # which, among all tensors
    span: slice  # where, in the flat buffer
    layout: FlatLayout  # of these alone


def take_gradients(parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of parameters and forget them, so that the next backward makes new ones."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    is_odd = any([g is not None and (g.is_sparse or g.is_complex()) for g in gradients])
    return [g if g is None else as_real(g.to_dense()) for g in gradients] if is_odd else gradients


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of a tensor [...], without graph; of a complex one its real and imaginary parts, [..., 2]. Local."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return where tensors begin in memory; nothing for those without, with which `hpc-bnn plan` rehearses. Local."""
    tensors = list(tensors)
    if tensors and isinstance(tensors[0], FakeTensor):
        return []
    return list(map(Tensor.data_ptr, tensors))
