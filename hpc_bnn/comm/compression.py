"""Encode gradients in half the bytes for sending between ranks."""

from __future__ import annotations

import torch

from ..config import Compression

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HEAD_BYTES = 4
"""Bytes of the scale in front of the numbers."""

_LARGEST = 2.0**15
"""Scaled value of the largest number; the largest float16 is 65504."""
_LEAST = 1e-30
"""Least magnitude that is scaled: of less the factor is no float32."""


def encoded_bytes(count: int) -> int:
    """Return the number of bytes of n encoded numbers."""
    return _HEAD_BYTES + 2 * count


def encode(flat: torch.Tensor, compression: Compression) -> torch.Tensor:
    """Return numbers [n] as bytes: their largest magnitude, then the numbers relative to it in 16 bits. Local.

    The scale keeps float16 from underflow: numbers down to 2e-12 of the largest survive, above 2e-9 of it with 11 bits;
    bfloat16 has 8 bits and needs no scale, but gets it. A NaN or an infinity makes everything NaN. Where all numbers are below
    `_LEAST` they are 0.
    """
    scale = flat.abs().max() if len(flat) else flat.new_zeros(())
    scale = torch.where(scale < _LEAST, 0, scale)
    factor = torch.where(scale > 0, _LARGEST / scale.float(), 0.0).to(flat)
    halves = (flat * factor).to(_DTYPES[compression])
    head = (scale.float() / _LARGEST).reshape(1).view(torch.uint8)
    return torch.cat([head, halves.view(torch.uint8)])


def decode(content: torch.Tensor, compression: Compression, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers [n] that `encode` was given, rounded. Local."""
    head, halves = content.split([_HEAD_BYTES, len(content) - _HEAD_BYTES])
    scale = head.clone().view(torch.float32)  # cloned: a view needs alignment
    return halves.clone().view(_DTYPES[compression]).to(dtype) * scale.to(dtype)
