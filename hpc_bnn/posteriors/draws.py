"""The noise of some samples, as a family meets it: it does not know whether the numbers are kept or drawn again."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..noise import Key, Stream
from .gradients import WeightGradient
from .layout import Block

__all__ = ["Draw", "KeptDraw", "RedrawnDraw"]


class Draw:
    """Standard normal noise eps of c samples, [c, P], signs of antithetic pairs included. Local in every method."""

    def __init__(self, num_weights: int, like: Tensor, antithetic: bool = False):
        self._num_weights, self._like, self._antithetic = num_weights, like, antithetic
        self._keys: list[Key] = []

    @property
    def noise(self) -> Tensor:
        """[c, P]."""
        raise NotImplementedError

    def begin_(self, key: Key, samples: Sequence[int]) -> None:
        """Become the draw of other samples."""
        self._keys = [key.of(sample) for sample in samples]

    def affine_(self, loc: Tensor, scale: Tensor, out: Tensor) -> None:
        """Write ``loc + scale * eps`` to ``out`` [c, P], which may be of a narrower dtype."""
        if out.dtype == loc.dtype:
            torch.addcmul(loc, scale, self.noise, out=out)
        else:
            out.copy_(torch.addcmul(loc, scale, self.noise))

    def fold_(self, g: WeightGradient, total: Tensor | None, product: Tensor) -> None:
        """Add the sum over samples of g to ``total`` [P], and that of g * eps to ``product`` [P]."""
        if total is not None:
            g.add_to(total)
        g.add_product_to(product, self.noise)

    def normal(self, path: Sequence[int], count: int) -> Tensor:
        """Return further normal numbers [c, count] of these samples, named by a path of up to two words."""
        out = self._like.new_empty(len(self._keys), count)
        for row, key in zip(out, self._keys):
            self._fill_(row, key.child(Stream.FACTOR, *path))
        return out

    def cut(self, block: Block) -> Draw:
        """Return the draw of a block of weights."""
        raise NotImplementedError

    def _fill_(self, row: Tensor, key: Key) -> None:
        """Draw the numbers of one sample; the second of an antithetic pair has those of the first, negated."""
        first = key.of(key.sample & ~1) if self._antithetic else key
        row.normal_(generator=first.generator(row.device))
        if first.sample != key.sample:
            row.neg_()


class KeptDraw(Draw):
    """Keeps its numbers in memory: a CPU reads them faster than it draws them again."""

    def __init__(self, num_weights: int, like: Tensor, antithetic: bool = False):
        super().__init__(num_weights, like, antithetic)
        self.single = self._noise = like.new_empty(1, num_weights)
        """Where the noise of one sample lies, always."""

    @property
    def noise(self) -> Tensor:
        return self._noise

    def begin_(self, key: Key, samples: Sequence[int]) -> None:
        former = self._keys
        super().begin_(key, samples)
        if self._noise is self.single and self._is_mirror_of(former):
            self._noise.neg_()
            return
        is_one = len(samples) == 1
        self._noise = self.single if is_one else self._like.new_empty(len(samples), self._num_weights)
        for row, of_sample in zip(self._noise, self._keys):
            self._fill_(row, of_sample)

    def _is_mirror_of(self, former: list[Key]) -> bool:
        """Whether the one sample is the second of the antithetic pair whose first is there: half of the noise to draw."""
        if not self._antithetic or len(former) != 1 or former[0].sample % 2:
            return False
        return self._keys == [former[0].of(former[0].sample + 1)]

    def cut(self, block: Block) -> Draw:
        part = copy.copy(self)
        part._noise = self._noise[:, block.span]
        return part


class RedrawnDraw(Draw):
    """Draws its numbers whenever they are needed and keeps none."""

    _span = slice(None)

    @property
    def noise(self) -> Tensor:
        noise = self._like.new_empty(len(self._keys), self._num_weights)
        for row, key in zip(noise, self._keys):
            self._fill_(row, key)
        return noise[:, self._span]

    def cut(self, block: Block) -> Draw:
        # Each block draws all P numbers anew and keeps its part: a generator of torch cannot begin in the middle
        part = copy.copy(self)
        part._span = block.span
        return part
