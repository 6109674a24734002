"""Dropout layers whose masks belong to the weight sample, not to a global generator."""

from __future__ import annotations

import logging
import types

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from ..noise import Stream, keyed_generator

logger = logging.getLogger(__name__)

_ELEMENTS = (nn.Dropout,)
_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNKEYED = (nn.AlphaDropout, nn.FeatureAlphaDropout)


class DropoutMasks:
    """The dropout layers of a module, drawing one mask per layer and weight sample.

    A mask is shared by all examples of the batch, so that it is a property of the sample as a draw of
    the weights is (Gal and Ghahramani, Dropout as a Bayesian Approximation, 2016), and does not depend on
    how the batch is cut. Dim 0 of the input of a dropout layer must be the batch.

    Parameters
    ----------
    module : nn.Module
        Its dropout layers are taken over. Dropout hidden inside recurrent and attention layers, which
        cannot be keyed, is switched off with a warning.
    """

    def __init__(self, module: nn.Module):
        self.layers = [layer for layer in module.modules() if isinstance(layer, _ELEMENTS + _CHANNELS)]
        self.always = False
        """Whether layers drop in evaluation too: MC dropout."""
        self._seed = None
        self._masks: dict[tuple[int, torch.Size], Tensor] = {}
        for name, layer in module.named_modules():
            if isinstance(layer, _UNKEYED) and layer.p > 0:
                raise ConfigError(
                    Fault(
                        "--model",
                        f"{name} ({type(layer).__name__})",
                        "its masks cannot be keyed",
                        "Use Dropout",
                    )
                )
            if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and layer.dropout > 0:
                logger.warning(
                    "the dropout inside %s (%s) cannot be keyed by the sample and is switched off",
                    name,
                    type(layer).__name__,
                )
                layer.dropout = 0.0
        for number, layer in enumerate(self.layers):
            layer.forward = types.MethodType(self._forward_of(number), layer)

    def begin_sample(self, generator: torch.Generator | None) -> None:
        """Forget the masks; draw new ones from the key of a generator when they are needed. Local."""
        self._masks.clear()
        self._seed = None if generator is None else generator.initial_seed()

    def _forward_of(self, number: int):
        def forward(layer: nn.Module, x: Tensor) -> Tensor:
            if layer.p == 0 or not (layer.training or self.always) or self._seed is None:
                return x
            mask = self._mask(number, layer, x)
            return x.mul_(mask) if layer.inplace and not x.requires_grad else x * mask

        return forward

    def _mask(self, number: int, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, _CHANNELS):
            shape = torch.Size((1, x.shape[1])) + (1,) * (x.ndim - 2)
        else:
            shape = torch.Size((1, *x.shape[1:]))
        if (number, shape) not in self._masks:
            generator = keyed_generator(self._seed, Stream.MASK, number, shape.numel(), x.device)
            keep = torch.rand(shape, generator=generator, device=x.device) >= layer.p
            self._masks[number, shape] = keep.to(x.dtype) / (1 - layer.p) if layer.p < 1 else keep.to(x.dtype)
        return self._masks[number, shape].to(x.dtype)
