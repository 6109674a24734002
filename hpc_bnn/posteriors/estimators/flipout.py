"""Flipout (Wen, Vicol, Ba, Tran, Grosse, 2018): one perturbation of the weights, with random signs per example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Estimator
from .example_noise import apply_layer


class Flipout(Estimator):
    """For ``nn.Linear`` and ``nn.Conv1d/2d/3d``. A bias is drawn once per sample, outside of the signs."""

    name = "flipout"
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    needs_2d_inputs = False

    def attach_(self, loc, scale, x):
        self._perturbation = torch.zeros_like(scale)[None]  # [1, P]: scale * eps
        self._zero = torch.zeros_like(scale)
        super().attach_(loc, scale, x)

    def _take(self, number, weight, bias, scales):
        perturbation = self._views.layout.views(self._perturbation[0])[weight].detach().requires_grad_()
        self._leaves[weight] = perturbation

        def forward(layer: Any, input: Tensor) -> Tensor:
            mean = apply_layer(layer, input, layer.weight, layer.bias)
            channel = -1 if isinstance(layer, nn.Linear) else 1

            def signs(which: int, of: Tensor) -> Tensor:
                shape = [1] * of.ndim
                shape[0], shape[channel] = len(of), of.shape[channel]
                return self.noise.draw(2 * number + which, of, of.shape[channel], signs=True).view(shape)

            return mean + apply_layer(layer, input * signs(0, input), perturbation, None) * signs(1, mean)

        return forward

    def begin_sample_(self, key, draw, scale):
        super().begin_sample_(key, draw, scale)
        draw.affine_(self._zero, scale, self._perturbation)

    def _fold_leaves_(self, g, grads, draw):
        draw.fold_(g, None, grads["log_scale"])  # dL/d(scale eps)
