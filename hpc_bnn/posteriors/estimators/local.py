"""Local reparameterisation (Kingma, Salimans, Welling, 2015): the outputs of a linear layer are drawn per example."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Estimator


class Local(Estimator):
    """Exact where an example meets the layer once: ``nn.Linear`` with inputs [B, in], called once per forward."""

    name = "local"
    kinds = (nn.Linear,)
    needs_2d_inputs = True

    @property
    def needs_weights(self) -> bool:
        return not (self._is_on and len(self._leaves) == len(self._views.layout))

    def _take(self, number, weight, bias, scales):
        leaves = {name: scales[name].detach().requires_grad_() for name in (weight, bias) if name}
        self._leaves |= leaves
        scale, bias_scale = leaves[weight], leaves[bias] if bias else None

        def forward(layer: nn.Linear, input: Tensor) -> Tensor:  # its name in nn.Linear
            mean = nn.functional.linear(input, layer.weight, layer.bias)
            of_bias = None if bias_scale is None else bias_scale.square()
            variance = nn.functional.linear(input.square(), scale.square(), of_bias)
            zeta = self.noise.draw(number, mean, mean.shape[1])
            tiny = torch.finfo(variance.dtype).tiny  # the square root has no slope at 0
            return mean + variance.clamp_min(tiny).sqrt() * zeta

        return forward

    def _fold_leaves_(self, g, grads, draw):
        g.add_to(grads["log_scale"])  # dL/dscale; the factor scale comes in `Family.finish_`
