"""The noise of some samples, as a family meets it: it does not know whether the numbers are kept or drawn again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Key, Stream, operators
from .gradients import WeightGradient
from .layout import Block, FlatLayout


class Draw:
    """Standard normal noise eps of c samples, [c, P], signs of antithetic pairs included. Local in every method.

    A tensor ``like`` the weights has their dtype and device. Antithetic samples 2 i and 2 i + 1 have the same numbers
    with opposite signs.
    """

    keeps = False
    """Whether the noise of a draw stays in memory."""

    def __init__(self, layout: FlatLayout, like: Tensor, antithetic: bool = False):
        self._layout, self._like, self._antithetic = layout, like, antithetic
        self._key, self._samples = Key(0, Stream.NOISE), range(0)
        self._words: Tensor | None = None
        self._is_drawn = False

    @property
    def noise(self) -> Tensor:
        """[c, P]."""
        raise NotImplementedError

    def begin_(self, key: Key, samples: Sequence[int]) -> None:
        """Become the draw of other samples, which follow each other."""
        if self._words is None or not self._key.is_of(key):
            self._words = key.words_of_tensors(self._like.device)
        self._key, self._samples = key, samples

    def affine_(self, loc: Tensor, scale: Tensor, out: Tensor) -> None:
        """Write ``loc + scale * eps``, [P] or what broadcasts to [c, P], to ``out`` [c, P], maybe narrower."""
        if not self._is_drawn and loc.ndim == 1 == scale.ndim and loc.is_contiguous() and scale.is_contiguous():
            operators.affine(*self._named(), loc, scale, out, self._to_keep())
        else:
            out.copy_(torch.mul(scale, self.noise).add_(loc))  # rounded twice, as the operator does

    def fold_(self, g: WeightGradient, total: Tensor | None, product: Tensor) -> None:
        """Add the sum over samples of g to ``total`` [P], and that of g * eps to ``product`` [P]."""
        is_by_weight = len(g.gradients) == len(self._layout) and product.dtype == torch.float32
        if is_by_weight and (g.num_samples == 1 or not self.keeps):
            operators.fold(*self._named(), g.gradients, total, product, self._kept(), g.num_samples)
            return
        if total is not None:
            g.add_to(total)
        g.add_product_to(product, self.noise)

    def normal(self, path: Sequence[int], count: int) -> Tensor:
        """Return further normal numbers [c, count] of these samples, named by a path."""
        key = self._key.child(Stream.FACTOR, len(path), *path)  # two words or more: one is the number of a weight
        first, device = key.of(self._samples[0]), self._like.device
        return first.normal_of_samples(len(self._samples), count, device, self._antithetic).to(self._like.dtype)

    def cut(self, block: Block) -> Draw:
        """Return the draw of a block of weights."""
        part = copy.copy(self)
        part._layout = block.layout
        return part

    def _named(self) -> tuple[Any, ...]:
        """Return what names the numbers, for `hpc_bnn.noise.operators`."""
        return *self._layout.segments.on(self._like.device), self._words, self._samples[0], self._antithetic

    def _kept(self) -> Tensor | None:
        """Return the noise where it is kept."""
        return None

    def _to_keep(self) -> Tensor | None:
        """Return where to write noise that is to be kept."""
        return None


class KeptDraw(Draw):
    """Keeps its numbers in memory: a CPU reads them faster than it draws them again."""

    keeps = True

    def __init__(self, layout: FlatLayout, like: Tensor, antithetic: bool = False):
        super().__init__(layout, like, antithetic)
        self.single = self._noise = like.new_empty(1, layout.num_elements)
        """Where the noise of one sample lies, always."""

    @property
    def noise(self) -> Tensor:
        if not self._is_drawn:
            operators.draw(*self._named(), self._noise)
            self._is_drawn = True
        return self._noise

    def begin_(self, key: Key, samples: Sequence[int]) -> None:
        is_mirror = self._antithetic and self._is_drawn and len(samples) == len(self._samples) == 1
        is_mirror = is_mirror and samples[0] == self._samples[0] + 1 and samples[0] % 2 == 1 and self._key.is_of(key)
        super().begin_(key, samples)
        if is_mirror:  # half of the noise to draw
            self._noise.neg_()
            return
        is_one = len(samples) == 1
        self._noise = self.single if is_one else self._like.new_empty(len(samples), self._layout.num_elements)
        self._is_drawn = False

    def cut(self, block: Block) -> Draw:
        part: Any = super().cut(block)
        part._noise, part._is_drawn = self.noise[:, block.span], True
        return part

    def _kept(self) -> Tensor:
        return self.noise

    def _to_keep(self) -> Tensor:
        self._is_drawn = True
        return self._noise


class RedrawnDraw(Draw):
    """Draws its numbers whenever they are needed and keeps none."""

    @property
    def noise(self) -> Tensor:
        noise = self._like.new_empty(len(self._samples), self._layout.num_elements)
        operators.draw(*self._named(), noise)
        return noise
