"""Multi-layer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Fully connected network.

    Parameters
    ----------
    in_shape : sequence of int
        Shape of one example; it is flattened.
    num_outputs : int
        Number of outputs.
    hidden : sequence of int
        Widths of the hidden layers.
    activation : {"ReLU", "GELU", "SiLU", "Tanh"}
        Name of a module of ``torch.nn``.
    places : sequence of int
        Extents of the targets behind their channels, such as the steps of a forecast: the network then gives
        [B, num_outputs, *places].
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_outputs: int,
        hidden: Sequence[int] = (128, 128),
        activation: str = "ReLU",
        places: Sequence[int] = (),
    ):
        widths = [math.prod(in_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [nn.Linear(width_in, width_out), getattr(nn, activation)()]
        layers.append(nn.Linear(widths[-1], num_outputs * math.prod(places)))
        super().__init__(*layers, *([nn.Unflatten(1, (num_outputs, *places))] if places else []))

    def forward(self, x: Tensor) -> Tensor:  # [B, *in_shape] -> [B, num_outputs, *places]
        return super().forward(x)
