"""The noise as operators of torch: ``torch.ops.hpc_bnn.bits``, ``draw``, ``affine`` and ``fold``.

They take what `Segments.on` gives, and on the same device ``words`` [2] int64: hash and step (`Key.words_of_tensors`). Row r
of what they draw, [c, P], belongs to sample ``first_sample + r``; of an antithetic pair the second sample has the numbers of
the first, negated. A third word is a sample that is added to ``first_sample``: what was captured once then draws any sample
(`Clock`). All are Local. Under fake tensors, as `hpc-bnn plan` has them, they do nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from .implementations import chosen
from .segments import from_host

logger = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("hpc_bnn", "DEF")


def _define(name: str, arguments: str) -> Callable[..., None]:
    given = "Tensor table, Tensor tiles, Tensor words, int first_sample, bool antithetic"
    _LIBRARY.define(f"{name}({given}, {arguments}) -> ()")
    on_cpu, elsewhere = globals()[f"_{name}_on_cpu"], globals()[f"_{name}_elsewhere"]
    _LIBRARY.impl(name, lambda *given: None, "Meta")
    _LIBRARY.impl(name, on_cpu, "CPU")
    _LIBRARY.impl(name, elsewhere, "CompositeExplicitAutograd")
    return getattr(torch.ops.hpc_bnn, name).default


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the kernels for CUDA; None where Triton is missing, or gives other numbers here."""
    reason = "Triton gives other numbers here than hpc_bnn defines"
    try:
        from . import triton_kernels

        if triton_kernels.matches():
            return triton_kernels
    except Exception as error:  # no Triton, no C compiler for its launcher, another Triton, another GPU
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    remedy = "Install triton, and load a C compiler"
    logger.warning("the CPU draws the noise of this GPU, which is slow: %s. %s", reason, remedy)
    return None


def draws_on(device: torch.device) -> bool:
    """Whether the noise of a device is drawn there, and not by the CPU. Local; it may compile kernels."""
    return device.type == "cpu" or (device.type == "cuda" and _kernels() is not None)


def _on_gpu(like: Tensor) -> ModuleType | None:
    return _kernels() if like.device.type == "cuda" else None


def _sample(words: Tensor, first_sample: int) -> int:
    return first_sample if len(words) == 2 else first_sample + int(words[2])


# --- draws ---------------------------------------------------------------------------------------------


def _bits_on_cpu(table, tiles, words, first_sample, antithetic, out) -> None:
    chosen().bits(table, words, _sample(words, first_sample), antithetic, out)


def _bits_elsewhere(table, tiles, words, first_sample, antithetic, out) -> None:
    if (kernels := _on_gpu(out)) is not None:
        return kernels.bits(table, tiles, words, first_sample, antithetic, out)
    _through_host(_bits_on_cpu, torch.int32, table, words, first_sample, antithetic, out)


def _draw_on_cpu(table, tiles, words, first_sample, antithetic, out) -> None:
    numbers = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device="cpu")
    chosen().draw(table, words, _sample(words, first_sample), antithetic, numbers)
    if numbers is not out:
        out.copy_(numbers)


def _draw_elsewhere(table, tiles, words, first_sample, antithetic, out) -> None:
    if (kernels := _on_gpu(out)) is not None:
        return kernels.draw(table, tiles, words, first_sample, antithetic, out)
    _through_host(_draw_on_cpu, torch.float32, table, words, first_sample, antithetic, out)


def _through_host(draw_on_cpu, dtype, table, words, first_sample, antithetic, out) -> None:
    host = torch.empty(out.shape, dtype=dtype, device="cpu")
    draw_on_cpu(table.cpu(), None, words.cpu(), first_sample, antithetic, host)
    out.copy_(host)


def _affine_on_cpu(table, tiles, words, first_sample, antithetic, loc, scale, out, noise) -> None:
    if loc.dtype == out.dtype == torch.float32:
        return chosen().affine(table, words, _sample(words, first_sample), antithetic, loc, scale, out, noise)
    _affine_apart(table, tiles, words, first_sample, antithetic, loc, scale, out, noise)


def _affine_elsewhere(table, tiles, words, first_sample, antithetic, loc, scale, out, noise) -> None:
    if (kernels := _on_gpu(out)) is not None:
        return kernels.affine(table, tiles, words, first_sample, antithetic, loc, scale, out, noise)
    _affine_apart(table, tiles, words, first_sample, antithetic, loc, scale, out, noise)


def _affine_apart(table, tiles, words, first_sample, antithetic, loc, scale, out, noise) -> None:
    """Draw first, then compute."""
    if noise is None:
        noise = torch.empty(out.shape, dtype=loc.dtype, device=loc.device)
    draw(table, tiles, words, first_sample, antithetic, noise)
    out.copy_(torch.mul(scale, noise).add_(loc))  # addcmul may round once


# --- gradients -----------------------------------------------------------------------------------------


def _fold_on_cpu(table, tiles, words, first_sample, antithetic, gradients, total, product, noise, samples) -> None:
    is_one = samples == 1 and product.dtype == torch.float32
    if is_one and all(g is None or g.dtype == torch.float32 for g in gradients):
        kept = None if noise is None else noise[0]
        return chosen().fold(gradients, table, words, _sample(words, first_sample), antithetic, total, product, kept)
    _fold_apart(table, tiles, words, first_sample, antithetic, gradients, total, product, noise, samples)


def _fold_elsewhere(table, tiles, words, first_sample, antithetic, gradients, total, product, noise, samples) -> None:
    if (kernels := _on_gpu(product)) is not None and product.dtype == torch.float32 and noise is None:
        rows = [g if g is None or g.is_contiguous() else g.contiguous() for g in gradients]
        Addresses.num_folded += len(rows)
        addresses = Addresses.of_capture.take(rows) if torch.cuda.is_current_stream_capturing() else None
        given = table, tiles, words, first_sample, antithetic, total, product, samples
        return kernels.fold(rows, *given, addresses=addresses)
    _fold_apart(table, tiles, words, first_sample, antithetic, gradients, total, product, noise, samples)


class Addresses:
    """Where the folds of the next capture look for the addresses of gradients.

    A copy from the host would be a node of the graph, so the table is filled once, when the capture is over. Its memory is
    made before the capture: that of a capture is written anew in each replay, by what had the same place earlier in it.
    ``count`` are the gradients of all folds of the capture, ``device`` is where it is.
    """

    num_folded = 0
    """Gradients of all folds of this process so far."""
    of_capture: Addresses

    def __init__(self, count: int, device: torch.device):
        self._table = torch.zeros(count, dtype=torch.int64, device=device)
        self._gradients: list[Tensor | None] = []
        Addresses.of_capture = self

    def take(self, gradients: list[Tensor | None]) -> Tensor:
        """Return the part of the table for the gradients of a fold. Local."""
        start, most = len(self._gradients), len(self._table)
        self._gradients += gradients
        if len(self._gradients) > most:
            raise RuntimeError(f"{len(self._gradients)} gradients were folded where {most} were seen before")
        return self._table[start : start + len(gradients)]

    def fill_(self) -> list[Tensor]:
        """Fill the table, and return what has to live as long as the graph. Local."""
        found = [0 if g is None else g.data_ptr() for g in self._gradients]
        self._table[: len(found)] = from_host(found, self._table.device)
        return [self._table, *(g for g in self._gradients if g is not None)]


def _fold_apart(table, tiles, words, first_sample, antithetic, gradients, total, product, noise, samples) -> None:
    """Draw first where nothing is kept, then add tensor by tensor."""
    if noise is None:
        noise = torch.empty(samples, len(product), dtype=product.dtype, device=product.device)
        draw(table, tiles, words, first_sample, antithetic, noise)
    for g, start, length in zip(gradients, *table[2:].tolist()):
        for row, numbers in zip(() if g is None else g.reshape(samples, -1), noise):
            span = slice(start, start + length)
            product[span].addcmul_(row, numbers[span])
            if total is not None:
                total[span].add_(row)


bits = _define("bits", "Tensor(a!) out")
draw = _define("draw", "Tensor(a!) out")
affine = _define("affine", "Tensor loc, Tensor scale, Tensor(a!) out, Tensor(b!)? noise")
fold = _define("fold", "Tensor?[] gradients, Tensor(a!)? total, Tensor(b!) product, Tensor? noise, int samples")
