"""Where the tensors of a state go: it comes from one rank in pieces, of which each rank keeps what it needs. Local."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..comm.packing import TensorSpec
from ..trees import map_leaves


@dataclass(frozen=True)
class Leaf:
    """Stands for a tensor of a state, the ``number``-th of it."""

    number: int
    spec: TensorSpec

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        return self.spec.shape


def outline_of(state: Any) -> tuple[Any, list[Tensor]]:
    """Return nested dicts and lists with a `Leaf` for each tensor, and these; 0-dim tensors (counters) stay, on the CPU."""
    tensors: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor | Leaf:
        if tensor.ndim == 0:
            return tensor.detach().cpu()
        tensors.append(tensor)
        return Leaf(len(tensors) - 1, TensorSpec.of(tensor))

    return map_leaves(state, Tensor, leaf), tensors


class Places:
    """Memory of this rank for the tensors of an outline, or for parts of them; ``device`` is that of `new` tensors."""

    def __init__(self, outline: Any, device: torch.device):
        self._specs: list[TensorSpec] = []
        map_leaves(outline, Leaf, lambda leaf: self._specs.append(leaf.spec))
        self._device = device
        self._spans: dict[int, list[tuple[int, Tensor]]] = {}
        self._later: list[tuple[Tensor, Tensor]] = []

    def add(self, leaf: Leaf | Tensor, to: Tensor, first: int = 0) -> None:
        """Let the numbers of a tensor, row-major from ``first`` on, go to this one."""
        if isinstance(leaf, Tensor):
            self._later.append((to, leaf))
            return
        if not to.is_contiguous():
            strided, to = to, torch.empty_like(to, memory_format=torch.contiguous_format)
            self._later.append((strided, to))
        self._spans.setdefault(leaf.number, []).append((first, to.view(-1)))

    def new(self, tree: Any) -> Any:
        """Return a part of the outline with new tensors, to which the numbers go."""

        def made(leaf: Leaf) -> Tensor:
            tensor = leaf.spec.empty(self._device)
            self.add(leaf, tensor)
            return tensor

        return map_leaves(map_leaves(tree, Tensor, Tensor.clone), Leaf, made)

    def fill_(self, comm: GridComm, tensors: list[Tensor]) -> None:
        """Fill them with the tensors of world rank 0; the other ranks give none. Collective over the world."""
        for number, start, piece in comm.broadcast_pieces(tensors, self._specs):
            for first, to in self._spans.get(number, ()):
                begin, end = max(start, first), min(start + len(piece), first + len(to))
                if begin < end:
                    to[begin - first : end - first].copy_(piece[begin - start : end - start])
        for to, value in self._later:
            to.copy_(value)
