"""The gradient of a sample's weights, in either form, and what a family does with it.

Walking over the samples, autograd leaves a list of tensors, one for each weight; a batch leaves such a list with c
rows in each. A family sees one algebra (`WeightGradient`). Lists are added by torch's foreach kernels to views
of the flat slots: a copy into a flat tensor first would cost 2 to 4 P of memory traffic per sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .layout import FlatLayout


class WeightGradient(Protocol):
    """Gradients g of P weights for c samples; a weight without gradient counts as 0. Local in every method."""

    gradients: Sequence[Tensor | None]
    """By weight, where there is one for each of a layout."""
    num_samples: int

    def add_to(self, slot: Tensor) -> None:
        """Add the sum over samples of g to a slot [P]."""

    def add_product_to(self, slot: Tensor, noise: Tensor) -> None:
        """Add the sum over samples of g times noise [c, P] to a slot [P]."""

    def add_rows_to(self, slot: Tensor) -> None:
        """Add g to a slot [c, P]."""

    def outer_to(self, slot: Tensor, z: Tensor) -> None:
        """Add z^T g to a slot [R, P], with z [c, R]."""


class SlotViews:
    """Views of flat tensors by weight, made once for tensors that live as long as their posterior."""

    def __init__(self, layout: FlatLayout):
        self.layout = layout
        self._kept: dict[int, tuple[Tensor, list[list[Tensor]]]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Remember the views of a tensor [P] or [R, P], which stays where it is."""
        self._kept[id(tensor)] = tensor, self.of(tensor)

    def of(self, tensor: Tensor) -> list[list[Tensor]]:
        """Return the views of each row of a tensor [P] or [R, P]."""
        kept = self._kept.get(id(tensor))
        if kept is not None:
            return kept[1]
        return [list(self.layout.views(row).values()) for row in tensor.view(-1, tensor.shape[-1])]


class ListGradient:
    """The gradients of one sample: for each weight of a layout a tensor, or None."""

    def __init__(self, gradients: Sequence[Tensor | None], views: SlotViews):
        self.gradients, self.num_samples = gradients, 1
        self._used = [gradient is not None for gradient in gradients]  # a forward may leave weights out
        self._gradients = [gradient for gradient in gradients if gradient is not None]
        self._views = views

    def _of(self, tensor: Tensor) -> list[list[Tensor]]:
        rows = self._views.of(tensor) if self._gradients else []
        return [list(itertools.compress(row, self._used)) for row in rows]

    def add_to(self, slot: Tensor) -> None:
        for row in self._of(slot):
            torch._foreach_add_(row, self._gradients)  # pyright: ignore[reportPrivateImportUsage]

    add_rows_to = add_to  # a row for the one sample

    def add_product_to(self, slot: Tensor, noise: Tensor) -> None:
        for row, numbers in zip(self._of(slot), self._of(noise)):
            torch._foreach_addcmul_(row, self._gradients, numbers)  # pyright: ignore[reportPrivateImportUsage]

    def outer_to(self, slot: Tensor, z: Tensor) -> None:
        # a tensor, not .item(): nothing waits for the device
        for row, number in zip(self._of(slot), z[0]):
            numbers = [number] * len(self._gradients)
            torch._foreach_addcmul_(row, self._gradients, numbers)  # pyright: ignore[reportPrivateImportUsage]


class BatchGradient:
    """The gradients of c samples: for each weight of a layout [c, *shape], or None; or those of all weights in one, [c, P]."""

    def __init__(self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor] = ()):
        self.gradients, self._weights = gradients, weights
        self.num_samples = len(next(gradient for gradient in gradients if gradient is not None))

    @functools.cached_property
    def numbers(self) -> Tensor:
        """[c, P]."""
        if len(self.gradients) == 1 and self.gradients[0] is not None:
            return self.gradients[0].reshape(self.num_samples, -1)
        whole = [torch.zeros_like(w) if g is None else g for g, w in zip(self.gradients, self._weights)]
        return torch.cat([gradient.reshape(len(gradient), -1) for gradient in whole], 1)  # of 0-dim weights [c]

    def add_to(self, slot: Tensor) -> None:
        slot.add_(self.numbers.sum(0))

    def add_product_to(self, slot: Tensor, noise: Tensor) -> None:
        slot.add_((self.numbers * noise).sum(0))

    def add_rows_to(self, slot: Tensor) -> None:
        slot.add_(self.numbers)

    def outer_to(self, slot: Tensor, z: Tensor) -> None:
        slot.addmm_(z.T, self.numbers)
