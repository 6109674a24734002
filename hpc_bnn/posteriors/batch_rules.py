"""How ``torch.vmap`` evaluates linear layers and attention of several weight samples: with fewer operations than by itself.

A linear layer is one batched product of matrices. Attention gets the samples folded into its batch, so that its kernels see
ordinary tensors: under vmap alone the memory-efficient kernel of CUDA keeps no sums for its backward pass, which fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class BatchedLinear(TorchFunctionMode):
    """Context in which calls of ``F.linear`` within ``torch.vmap`` follow the rule."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            return _linear(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.ndim == 2 and _is_batched(input, weight, bias):
        return _Linear.apply(input, weight, bias)
    return F.linear(input, weight, bias)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options,
) -> Any:
    """Take the place of ``F.scaled_dot_product_attention`` within ``torch.vmap``; NotImplemented without a rule. Local."""
    if min(query.ndim, key.ndim, value.ndim) < 3 or dropout_p or not _is_batched(query, key, value, attn_mask):
        return NotImplemented
    return _Attention.apply(query, key, value, attn_mask, {"is_causal": is_causal, **options})


def _is_batched(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and is_batchedtensor(tensor) for tensor in tensors)


class _Rule(torch.autograd.Function):
    """What has a rule for vmap. Autograd sees what the rule is made of; `forward` and `backward` never run."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def forward(*inputs):
        raise NotImplementedError("for vmap only")

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("for vmap only")


def _rows(tensor: Tensor, dim: int | None, count: int) -> Tensor:
    """Return [count, ...], without a copy where all rows are alike."""
    return tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Linear(_Rule):
    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, weight: Tensor, bias: Tensor | None):
        count = info.batch_size
        if dims[1] is None:  # a weight that all samples share
            out = F.linear(x if dims[0] is None else x.movedim(dims[0], 0), weight, bias if dims[2] is None else None)
            if bias is None or dims[2] is None:
                return out, 0
            bias = bias.movedim(dims[2], 0)
            out = out.expand(count, *out.shape) if dims[0] is None else out
            return out + bias.view(count, *(1,) * (out.ndim - 2), -1).to(out.dtype), 0
        weight, rows = weight.movedim(dims[1], 0), _rows(x, dims[0], count)
        width = rows.shape[-1]
        flat = rows.reshape(count, -1, width) if dims[0] is not None else x.reshape(-1, width).expand(count, -1, -1)
        bias = None if bias is None else _rows(bias, dims[2], count)
        if torch.is_autocast_enabled(flat.device.type):
            dtype = torch.get_autocast_dtype(flat.device.type)
            flat, weight, bias = (t if t is None else t.to(dtype) for t in (flat, weight, bias))
        out = _Product.apply(flat, weight, bias)
        return out.view(*rows.shape[:-1], weight.shape[1]), 0


class _Product(torch.autograd.Function):
    """x [c, n, in] W^T + b, of which autograd would give the gradient of W [c, out, in] transposed, to be copied."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None):
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needs_x else None,
            torch.bmm(gradient.mT, x) if needs_weight else None,
            gradient.sum(1) if needs_bias else None,
        )


class _Attention(_Rule):
    @staticmethod
    def vmap(info: Any, dims: tuple, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict):
        count = info.batch_size
        query, key, value = (_rows(t, dim, count) for t, dim in zip((query, key, value), dims))
        if mask is not None and (dims[3] is not None or mask.ndim > 2):
            mask = _rows(mask, dims[3], count)
            mask = mask.view(count, *(1,) * (query.ndim - mask.ndim), *mask.shape[1:])
            mask = mask.expand(*query.shape[:-2], *mask.shape[-2:]).flatten(0, 1)
        folded = (tensor.flatten(0, 1) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(*folded, attn_mask=mask, **options)
        return out.unflatten(0, (count, -1)), 0
