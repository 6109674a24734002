"""Keyed random numbers: noise belongs to its key, never to a rank or a time.

A draw is named by a `Key`. Every rank that needs the noise of sample 7 at step 300 makes the same generator and gets
the same numbers, on any grid. No global generator is read or advanced anywhere in the package.

The numbers of one key depend on the kind of device (a CPU and a GPU have different generators) and on the dtype that is
drawn, not on the number of threads. Everything here is Local.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["GENERATOR", "Key", "Stream"]

GENERATOR = "torch"
"""Name of what makes the numbers of a `Key`: the generator of torch on the device. Checkpoints hold it."""


class Stream(enum.IntEnum):
    """Purpose of random numbers. The values belong to the checkpoint format."""

    INIT = 1
    DATA_ORDER = 2
    AUGMENTATION = 3
    NOISE = 4
    """Draws of weight samples during training."""
    PREDICTION = 5
    """Draws of weight samples for a predictive: step 0."""
    MASK = 6
    """Dropout masks of a draw of weights: in its path, before layer and size."""
    FACTOR = 8
    """Noise that weights of a draw share: in its path, before its number."""
    UPDATE = 9
    """Noise of an update, as a chain needs it: in the path of the draws of a step."""
    ACTIVATION = 7
    """Noise per example of a draw of weights: in its path, before layer and block."""


_MASK64 = (1 << 64) - 1


def _mix64(x: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """Finaliser of MurmurHash3 (Appleby, 2011): a bijection of 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Key:
    """The name of a draw: equal keys have equal numbers on every rank."""

    seed: int
    """Seed of the run."""
    stream: Stream
    path: tuple[int, ...] = ()
    """Purpose within the stream, such as a layer; at most three words."""
    step: int = 0
    """Optimizer step or epoch."""
    sample: int = 0
    """Global sample index."""

    def of(self, sample: int) -> Key:
        """Return the key of another sample."""
        return Key(self.seed, self.stream, self.path, self.step, sample)  # in every step: a fifth of `replace`

    def child(self, *path: int) -> Key:
        """Return a key within this one, such as that of a layer."""
        return Key(self.seed, self.stream, self.path + path, self.step, self.sample)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a new generator on a device, at the first number of this key."""
        return torch.Generator(device).manual_seed(self._derive_seed())

    @contextlib.contextmanager
    def global_generator(self) -> Iterator[None]:
        """Run code that draws from torch's global CPU generator under this key, and put back the generator's state.

        It is for the constructors of modules, which take no generator.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._derive_seed())
            yield

    def _derive_seed(self) -> int:
        seed = derive_seed(self.seed, self.stream, self.step, self.sample)
        return derive_seed(seed, *self.path) if self.path else seed

    def uniform(self, rows: torch.Tensor, count: int, first: int = 0) -> torch.Tensor:
        """Return numbers ``first`` to ``first + count - 1`` of each row [B] int64, in [0, 1): [B, count] float32.

        Number j of a row depends on the key and the row alone: not on the other rows, their order, the device or the
        threads. (SplitMix64 of a hash of the key and a counter; 24 random bits each.)
        """
        key = self.seed & _MASK64
        for word in (self.stream, self.step, *(self.path or (0,))):
            key = _mix64(key) ^ word
        state = _mix64_of(rows ^ _signed(_mix64(key)))
        counter = torch.arange(first, first + count, device=rows.device) * _signed(0x9E3779B97F4A7C15)
        bits = _mix64_of(state[:, None] + counter)
        return _shift_right(bits, 40).float() * 2.0**-24


def derive_seed(seed: int, stream: int, step: int = 0, index: int = 0) -> int:
    """Map words to the 32-bit seed of a generator.

    torch's CPU generator keeps only the low 32 bits of its seed. For a fixed (seed, stream, step) the map is a
    bijection of ``index`` below 2^32: the samples of one step never share their noise. Two keys of different steps
    coincide with probability 2^-32.
    """
    key = _mix64(_mix64(_mix64(seed & _MASK64) ^ stream) ^ step)
    return _mix32(_mix32((index ^ key) & 0xFFFFFFFF) ^ (key >> 32))


def _mix64_of(x: torch.Tensor) -> torch.Tensor:
    """`_mix64` of each element; int64 arithmetic of torch wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
