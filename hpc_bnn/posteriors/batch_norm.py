"""Batch normalisation whose statistics do not depend on the grid or on the order of the samples.

In training, a BatchNorm layer of an ordinary module would normalise by the examples of its rank and
update its running statistics once per sample, in an order that the grid decides. Here it normalises each
weight sample by the statistics of the *global* batch, and the running statistics take one step per
optimizer step, towards the mean over all samples of the job.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault

SumOverData = Callable[[Tensor], None]
"""Replaces a tensor, in place, by its sum over the ranks with the same samples and other examples."""


class BatchNorms:
    """The BatchNorm layers of a module.

    Parameters
    ----------
    module : nn.Module
        Its BatchNorm layers are taken over; parameters, buffers and their names stay.

    Attributes
    ----------
    sum_over_data : callable
        What sums the statistics of a layer over the data axis. One process: the identity.
    """

    def __init__(self, module: nn.Module):
        self.layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.sum_over_data: SumOverData = lambda tensor: None
        self._sums: list[Tensor] = []
        self._uses: list[int] = []
        self._num_samples = 0
        for number, layer in enumerate(self.layers):
            if not layer.track_running_stats or layer.momentum is None:
                raise ConfigError(
                    Fault(
                        "--model",
                        type(layer).__name__,
                        "track_running_stats=False and momentum=None are not supported",
                        "Use momentum=0.1, or GroupNorm",
                    )
                )
            layer.forward = types.MethodType(self._forward_of(number), layer)

    @property
    def num_statistics(self) -> int:
        """Floats that `write_statistics_` writes: mean and variance per channel and layer."""
        return 2 * sum(layer.num_features for layer in self.layers)

    def begin(self) -> None:
        """Begin a pass over the samples of an optimizer step. Local."""
        self._uses = [0] * len(self.layers)
        self._num_samples = 0
        self._sums = [
            torch.zeros(2, layer.num_features, dtype=_dtype(layer), device=_device(layer))
            for layer in self.layers
        ]

    def begin_sample(self) -> None:
        """Begin a sample. Local."""
        self._num_samples += 1

    def write_statistics_(self, out: Tensor, share: float) -> None:
        """Write this rank's sums over samples of mean and variance, times a share, into [num_statistics]."""
        if self.layers:
            # A layer that a forward uses several times counts with the mean over its uses.
            shares = [share * self._num_samples / max(uses, 1) for uses in self._uses]
            torch.cat([s.reshape(-1) * own for s, own in zip(self._sums, shares)], out=out)

    @torch.no_grad()
    def update_running_(self, statistics: Tensor) -> None:
        """Move the running statistics towards the mean over all samples of the job. Local."""
        for layer, part in zip(self.layers, statistics.split([2 * m.num_features for m in self.layers])):
            if layer.training:  # not one that the user has frozen
                mean, variance = part.view(2, -1)
                layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
                layer.running_var.lerp_(variance.to(layer.running_var.dtype), layer.momentum)
                layer.num_batches_tracked += 1

    def _forward_of(self, number: int):
        def forward(layer: nn.Module, x: Tensor) -> Tensor:
            layer._check_input_dim(x)
            if not layer.training:
                return nn.functional.batch_norm(
                    x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.0, layer.eps
                )
            y, mean, variance, count = _Normalise.apply(x, layer.eps, self.sum_over_data)
            if self._sums:
                self._uses[number] += 1
                with torch.no_grad():  # unbiased, as torch keeps it
                    self._sums[number][0] += mean
                    self._sums[number][1] += variance * (count / (count - 1).clamp_min(1))
            if layer.affine:
                form = (1, -1) + (1,) * (x.ndim - 2)
                y = y * layer.weight.view(form).to(y.dtype) + layer.bias.view(form).to(y.dtype)
            return y

        return forward


class _Normalise(torch.autograd.Function):
    """(x - mean) / std over the global batch, with its exact adjoint.

    Ioffe and Szegedy, Batch Normalization, 2015. Both directions sum over the data axis themselves; no
    library's backward of a collective is involved.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, sum_over_data: SumOverData):
        channels = x.transpose(0, 1).reshape(x.shape[1], -1)  # [C, n]
        if channels.dtype in (torch.float16, torch.bfloat16):
            channels = channels.float()
        num_channels = len(channels)
        # Shifted by the first sum's mean: two passes, as E[x^2] - E[x]^2 loses digits.
        first = torch.cat([channels.sum(1), channels.new_full((1,), channels.shape[1])])
        sum_over_data(first)
        count = first[-1]
        mean = first[:num_channels] / count
        variance = (channels - mean[:, None]).square().sum(1)
        sum_over_data(variance)
        variance = variance / count
        inverse_std = (variance + eps).rsqrt()
        form = (1, -1) + (1,) * (x.ndim - 2)
        y = (x - mean.view(form).to(x.dtype)) * inverse_std.view(form).to(x.dtype)
        ctx.save_for_backward(y, inverse_std, count)
        ctx.sum_over_data = sum_over_data
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        y, inverse_std, count = ctx.saved_tensors
        over = [dim for dim in range(y.ndim) if dim != 1]
        sums = torch.stack([grad.sum(over), (grad * y).sum(over)]).to(inverse_std.dtype)  # [2, C]
        ctx.sum_over_data(sums)
        form = (1, -1) + (1,) * (y.ndim - 2)
        mean_grad, mean_grad_y = ((s / count).view(form).to(y.dtype) for s in sums)
        return (grad - mean_grad - y * mean_grad_y) * inverse_std.view(form).to(y.dtype), None, None


def _dtype(layer: nn.Module) -> torch.dtype:
    return layer.running_mean.dtype


def _device(layer: nn.Module) -> torch.device:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")
