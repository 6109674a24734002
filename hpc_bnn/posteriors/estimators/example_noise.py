"""Estimators with noise per example: local reparameterisation and Flipout.

Both leave the posterior as it is and only lower the variance of the gradient: each example of a batch meets
its own draw of a layer's weights, not one draw for all.

- *Local reparameterisation* (Kingma, Salimans, Welling, 2015) draws the outputs of a linear layer from the
  Gaussian that the weights induce. Exact only where an example meets the layer once: ``nn.Linear`` with inputs
  [B, in], called once per forward. Not for tokens or pixels, which share the weights.
- *Flipout* (Wen, Vicol, Ba, Tran, Grosse, 2018) multiplies one perturbation of the weights by random signs per
  example, the same for all its tokens or pixels: ``nn.Linear`` and ``nn.Conv1d/2d/3d``.

The noise of an example is keyed by (sample, layer, place in the global batch): it does not depend on the grid, and a rank
draws only what it needs.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...noise import Key, Stream

logger = logging.getLogger(__name__)


class ExampleNoise:
    """Noise per example of the sample being evaluated."""

    def __init__(self):
        self.first_example: int | Tensor = 0
        """Place in the global batch of this rank's first example, in a 0-dim tensor where what draws is captured."""
        self._key = Key(0, Stream.NOISE)

    def begin_sample(self, key: Key) -> None:
        """Draw for the sample of this key from now on. Local."""
        self._key = key

    def draw(self, layer: int, like: Tensor, width: int, signs: bool = False) -> Tensor:
        """Return noise [len(like), width], standard normal or +-1. Local."""
        key = self._key.child(Stream.ACTIVATION, layer)
        first, count = self.first_example, len(like)
        if isinstance(first, Tensor):
            places = torch.arange(count, device=like.device) + first
        else:
            places = torch.arange(first, first + count, device=like.device)
        if signs:
            return (1 - 2 * (key.bits(width, like.device, places) & 1)).to(like.dtype)
        return key.normal(width, like.device, places).to(like.dtype)


def apply_layer(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what an nn.Linear or nn.Conv gives with other weights."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def override_forward(layer: nn.Module, forward: Callable | None) -> None:
    """Give a layer another forward, or its own back."""
    if forward is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.forward = types.MethodType(forward, layer)
