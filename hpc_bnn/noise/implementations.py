"""How keyed noise is drawn on a CPU: by the C extension where there is one, by NumPy otherwise; the bits are the same.

Everything here is Local. In all methods ``table`` [4, T] int64 is that of `Segments`, and ``words`` [2] int64 holds the hash
of the key without its last word, and the step. ``out`` and ``noise`` are [c, P] with contiguous rows, of which row r belongs to
sample ``first_sample + r``; what lies outside of the segments is not written. ``loc``, ``scale``, ``total`` and ``product`` are
[P]. ``gradients`` are T tensors of the segments' lengths; None adds nothing. All are float32, but for ``out`` of `bits`: int32.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, Fault
from . import philox

logger = logging.getLogger(__name__)

VARIABLE = "HPC_BNN_NOISE"
NAMES = ("avx512", "avx2", "plain", "numpy")
PINNED = "e3fedf1d613dc8fbd671c257ffcfc7974ba2b036af7880b7f6374d0a6e5f4e6b"
"""Digest of what `_answer` draws."""


class NumpyImplementation:
    """`philox` itself, the definition of each method: runs everywhere, slowly."""

    name = "numpy"

    def bits(self, table, words, first_sample, antithetic, out):
        """Draw random words; an odd antithetic sample has those of the sample before it."""
        for row, sample in enumerate(range(first_sample, first_sample + len(out))):
            for some, first, length, place in _runs(table):
                sample = sample & ~1 if antithetic else sample
                drawn = philox.bits(*_unsigned(words), sample, some, first, length)
                out[row, place] = torch.from_numpy(drawn.view(np.int32)).flatten()

    def draw(self, table, words, first_sample, antithetic, out):
        """Draw standard normals; an odd antithetic sample has those of the sample before it with the other sign."""
        for row, sample in enumerate(range(first_sample, first_sample + len(out))):
            for some, first, length, place in _runs(table):
                drawn = philox.normals(*_unsigned(words), sample, some, first, length, antithetic)
                out[row, place] = torch.from_numpy(drawn).flatten()

    @torch.no_grad()
    def affine(self, table, words, first_sample, antithetic, loc, scale, out, noise):
        """Write ``loc + scale * normals``, rounded twice, and the normals to ``noise`` if it is given."""
        drawn = torch.empty_like(out) if noise is None else noise  # out may be loc
        self.draw(table, words, first_sample, antithetic, drawn)
        for _, _, place in _segments(table):
            torch.mul(drawn[:, place], scale[place], out=out[:, place])
            out[:, place] += loc[place]

    @torch.no_grad()
    def fold(self, gradients, table, words, sample, antithetic, total, product, noise):
        """Add the gradients of one sample to ``total`` if it is given, and gradients * normals to ``product``.

        ``noise`` [P] holds the normals of the sample; without it they are drawn again.
        """
        for gradient, (word, first, place) in zip(gradients, _segments(table)):
            if gradient is None:
                continue
            gradient = gradient.reshape(-1)
            if total is not None:
                total[place] += gradient
            if noise is None:
                length = place.stop - place.start
                drawn = torch.from_numpy(philox.normals(*_unsigned(words), sample, word, first, length, antithetic))
            else:
                drawn = noise[place]
            product[place] += gradient * drawn  # in two steps: addcmul may round once


class NativeImplementation:
    """A variant of the C extension, on the threads of torch."""

    def __init__(self, extension: Any, name: str):
        self._extension = extension
        self.name = name

    def bits(self, table, words, first_sample, antithetic, out):
        self._rows(self._selected().bits, torch.int32, table, words, first_sample, antithetic, out)

    def draw(self, table, words, first_sample, antithetic, out):
        self._rows(self._selected().draw, torch.float32, table, words, first_sample, antithetic, out)

    def affine(self, table, words, first_sample, antithetic, loc, scale, out, noise):
        if noise is not None and noise.stride() != out.stride():
            raise ValueError("noise and out must have the same strides")
        if not len(loc) == len(scale) == out.shape[1]:
            raise ValueError(f"loc {len(loc)}, scale {len(scale)} and out {out.shape[1]} must have the same size")
        self._selected().affine(
            *_addresses(table, words), first_sample, len(out), antithetic, _address(loc), _address(scale),
            _address(out), 0 if noise is None else _address(noise), _stride(out), torch.get_num_threads(),
        )  # fmt: skip

    def fold(self, gradients, table, words, sample, antithetic, total, product, noise):
        if any(t is not None and t.shape != product.shape for t in (total, noise)):
            raise ValueError(f"total and noise must have the shape of product, {list(product.shape)}")
        gradients = [g if g is None or g.is_contiguous() else g.contiguous() for g in gradients]
        sized = [n for g in gradients for n in ((0, 0) if g is None else (_address(g), g.numel()))]
        self._selected().fold(
            sized, *_addresses(table, words), sample, antithetic, 0 if total is None else _address(total),
            _address(product), 0 if noise is None else _address(noise), len(product), torch.get_num_threads(),
        )  # fmt: skip

    def _selected(self) -> Any:
        self._extension.set_variant(self.name)
        return self._extension

    @staticmethod
    def _rows(function, dtype, table, words, first_sample, antithetic, out):
        function(
            *_addresses(table, words), first_sample, len(out), antithetic, _address(out, dtype), _stride(out),
            torch.get_num_threads(),
        )  # fmt: skip


def _address(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
    # A call of the step: what is contiguous needs no further look
    if tensor.dtype is dtype and tensor.is_cpu and (tensor.is_contiguous() or tensor.stride(-1) == 1):
        return tensor.data_ptr()
    raise ValueError(f"{tensor.dtype} on {tensor.device}, strides {tensor.stride()}: not rows of {dtype} on the CPU")


def _addresses(table: Tensor, words: Tensor) -> tuple[int, int, int]:
    """Return the first arguments of each function of the extension."""
    if not table.is_contiguous():
        raise ValueError("the table must be contiguous")
    return _address(table, torch.int64), table.shape[1], _address(words, torch.int64)


def _stride(rows: Tensor) -> int:
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


def _segments(table: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yield word, first number and place of each segment."""
    for word, first, start, length in table.T.tolist():
        yield word, first, slice(start, start + length)


def _runs(table: Tensor) -> Iterator[tuple[list[int], int, int, slice]]:
    """Yield words, first number, length and place of segments that follow each other and differ in their word only."""
    run: list[int] = []
    first = length = start = 0
    for word, its_first, its_start, its_length in table.T.tolist():
        if run and (its_first, its_length, its_start) != (first, length, start + len(run) * length):
            yield run, first, length, slice(start, start + len(run) * length)
            run = []
        if not run:
            first, length, start = its_first, its_length, its_start
        run.append(word)
    if run:
        yield run, first, length, slice(start, start + len(run) * length)


def _unsigned(words: Tensor) -> tuple[int, int]:
    prefix, step = (word & (1 << 64) - 1 for word in words[:2].tolist())
    return prefix, step


Implementation = NumpyImplementation | NativeImplementation


# --- the choice --------------------------------------------------------------------------------------------------------


def available() -> dict[str, Implementation]:
    """Return what this machine can run, the fastest first; nothing is tested."""
    extension, _ = _load()
    names = extension.variants() if extension else []
    native: dict[str, Implementation] = {name: NativeImplementation(extension, name) for name in names}
    return native | {NumpyImplementation.name: NumpyImplementation()}


def _load() -> tuple[Any, str]:
    """Return the extension, or None and why it cannot be loaded."""
    try:
        return importlib.import_module(f"{__package__}._native"), ""
    except ImportError as error:
        return None, str(error)


@functools.cache
def chosen() -> Implementation:
    """Return the fastest implementation that draws the pinned answer, or HPC_BNN_NOISE; `ConfigError` if none does."""
    found, wanted = available(), os.environ.get(VARIABLE) or "auto"
    names = " or ".join(["auto", *found])
    if wanted not in ("auto", *found):
        rule = "no such implementation on this machine" if wanted in NAMES else "no such implementation"
        raise ConfigError(Fault(VARIABLE, wanted, rule, f"Set {names}"))
    for name, implementation in found.items() if wanted == "auto" else [(wanted, found[wanted])]:
        if passes(implementation):
            break
        if wanted != "auto":
            raise ConfigError(Fault(VARIABLE, wanted, "it does not draw the numbers that it must", "Set auto"))
        logger.warning("noise: the implementation %s does not draw the numbers that it must, and is not used", name)
    else:
        raise ConfigError(Fault("noise", ", ".join(found), "none draws the numbers that it must", "Use another NumPy"))
    if wanted == "auto" and implementation.name == NumpyImplementation.name:
        why = f" ({reason})" if (reason := _load()[1]) else ""
        remedy = "With a C compiler `make setup`, or `pip install`, builds the extension"
        rule = "noise: NumPy draws it at about 30 ns per number, where the C extension needs 1 to 4%s. %s"
        logger.warning(rule, why, remedy)
    return implementation


def passes(implementation: Implementation) -> bool:
    """Return whether an implementation draws the pinned answer."""
    try:
        return _answer(implementation) == PINNED
    except Exception as error:  # an extension that was built from another version may fail in any way
        logger.debug("%s: %s", implementation.name, error)
        return False


def _answer(implementation: Implementation) -> str:
    """Return a digest of what an implementation draws: whole groups and parts of them, all methods, edges of keys."""
    lengths = [0, 1, 17, 130, 200, 64]
    firsts = [5, 63, philox.MAX_NUMBERS - 17, 3, 1088, 128]
    starts = [1, 2, 3, 21, 152, 353]
    on: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever a user's defaults are
    table = torch.tensor([[0, 1, 2, (1 << 62) + 7, 3, 4], firsts, starts, lengths], device="cpu")
    words = torch.tensor([-0x1234567890ABCDEF, (5 << 32) + 6], device="cpu")
    size, sample = 420, (1 << 32) - 3
    loc, scale = torch.arange(size, **on) / 8 - 20, torch.arange(size, **on) % 7 / 64 + 0.3
    gradients = [None if n == 1 else loc[:n] / 3 for n in lengths]
    bits = torch.zeros(3, size, dtype=torch.int32, device="cpu")
    drawn, out, noise = torch.zeros(3, 3, size, **on)
    total, product, again = torch.ones(3, size, **on)
    implementation.bits(table, words, sample, False, bits)
    implementation.draw(table, words, 7, True, drawn)
    implementation.affine(table, words, sample, True, loc, scale, out, noise)
    implementation.fold(gradients, table, words, 7, True, total, product, drawn[0])
    implementation.fold(gradients, table, words, 8, False, None, again, None)
    digest = hashlib.sha256()
    for tensor in (bits, drawn, out, noise, total, product, again):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
