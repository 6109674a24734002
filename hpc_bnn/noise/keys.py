"""Keys: the names of draws, and the numbers of one key.

A draw is named by a `Key`. Every rank that needs the noise of sample 7 at step 300 gets the same numbers, on any grid and
any device. No global generator is read or advanced anywhere in the package. Everything here is Local.

The numbers come from Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011). Its key is a hash of
seed, stream and path; its counter holds sample and step, which never share a number.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, Fault
from . import operators
from .philox import MASK64, mix64
from .segments import Segments, from_host, of_rows

GENERATOR = "philox"
"""Name of what makes the numbers of a `Key`. Checkpoints hold it."""


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
    """Noise per example of a draw of weights: in its path, before the layer."""
    HALF = 10
    """Which half of a split calibrates: step 0."""


def _mix32(x: int) -> int:
    """Finaliser of MurmurHash3 (Appleby, 2011): a bijection of 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


@functools.lru_cache(4096)
def _hash(seed: int, words: Sequence[int]) -> int:
    return functools.reduce(lambda k, word: mix64(k ^ (word & MASK64)), words, mix64(_word(seed)))


class Clock:
    """Step and sample of what is captured once and runs for many: its keys read them on the device. Local."""

    def __init__(self, device: torch.device | str):
        self.now = torch.zeros(2, dtype=torch.int64, device=device)
        """[2] int64: the step, and the sample from which the keys count."""
        self._kept: dict[Hashable, Any] = {}

    def keep(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Return what was made under this name at first: a capture copies nothing from the host."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def words(self, hashed: int) -> Tensor:
        """Return [3] int64, a hash and what is now."""
        return torch.cat([self.keep(hashed, lambda: from_host([hashed], self.now.device)), self.now])


@dataclass(frozen=True)
class Key:
    """The name of a draw: equal keys have equal numbers on every rank and every device."""

    seed: int
    """Seed of the run."""
    stream: Stream
    path: tuple[int, ...] = ()
    """Purpose within the stream, such as a layer."""
    step: int = 0
    """Optimizer step or epoch."""
    sample: int = 0
    """Global sample index."""
    clock: Clock | None = field(default=None, compare=False, repr=False)
    """Gives the step, and the sample from which ``sample`` counts, where the host does not know them."""

    def of(self, sample: int) -> Key:
        """Return the key of another sample."""
        return Key(self.seed, self.stream, self.path, self.step, sample, self.clock)

    def child(self, *path: int) -> Key:
        """Return a key within this one, such as that of a layer."""
        return Key(self.seed, self.stream, self.path + path, self.step, self.sample, self.clock)

    def is_of(self, step: Key) -> bool:
        """Whether both name the same draw but for the sample, as far as the host knows."""
        same_place = self.step == step.step and self.path == step.path
        is_known = self.clock is None and step.clock is None
        return is_known and same_place and self.stream == step.stream and self.seed == step.seed

    def words_of_tensors(self, device: torch.device | str = "cpu") -> Tensor:
        """Return what, with the word of a segment, names ``child(word)``: [2] int64, hash and step; a clock adds its sample."""
        return self._words((self.stream, len(self.path) + 1, *self.path), device)

    def bits(
        self, count: int, device: torch.device | str = "cpu", rows: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """Return numbers ``first`` to ``first + count - 1`` as 32 random bits each: [count] int32.

        With ``rows`` [B] int64 of each row: [B, count]. Those of a row depend on the key and the row alone.
        """
        return self._numbers(operators.bits, count, torch.int32, device, rows, first)

    def bits_of_samples(self, num_samples: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the first ``count`` numbers, as `bits`, of this sample and those that follow it: [num_samples, count] int32."""
        return self._numbers(operators.bits, count, torch.int32, device, num_samples=num_samples)

    def normal_of_samples(
        self, num_samples: int, count: int, device: torch.device | str = "cpu", antithetic: bool = False
    ) -> Tensor:
        """Return the first ``count`` numbers, as `normal`, of this sample and those that follow it: [num_samples, count] float32."""
        return self._numbers(operators.draw, count, torch.float32, device, None, 0, antithetic, num_samples)

    def normal(
        self,
        count: int,
        device: torch.device | str = "cpu",
        rows: Tensor | None = None,
        first: int = 0,
        antithetic: bool = False,
    ) -> Tensor:
        """Return numbers as `bits`, standard normal, float32; an odd antithetic sample negates the one before's."""
        return self._numbers(operators.draw, count, torch.float32, device, rows, first, antithetic)

    def uniform(self, rows: Tensor, count: int, first: int = 0) -> Tensor:
        """Return numbers of each row in [0, 1), 24 random bits each: [B, count] float32, as `bits`."""
        return ((self.bits(count, rows.device, rows, first) >> 8) & 0xFFFFFF).float() * 2.0**-24

    @contextlib.contextmanager
    def global_generator(self) -> Iterator[None]:
        """Run code (constructors of modules) with torch's global CPU generator at this key, and put it back."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed_of_torch())
            yield

    def generator(self) -> torch.Generator:
        """Return a new generator of torch, on the CPU, for numbers that no grid cuts: initial weights, synthetic data."""
        return torch.Generator().manual_seed(self._seed_of_torch())

    def _numbers(
        self, draw, count, dtype, device, rows=None, first=0, antithetic=False, num_samples: int | None = None
    ) -> Tensor:
        words = (self.stream, len(self.path), *self.path)
        if rows is None:
            hashed, named = words[:-1], self._segment(words[-1], first, count, torch.device(device))
        else:
            hashed, named = words, of_rows(rows, count, first)
        out = torch.empty(num_samples or 1, named[0].shape[1] * count, dtype=dtype, device=device)
        draw(*named, self._words(hashed, device), self.sample, antithetic, out)
        if rows is not None:
            return out.view(len(rows), count)
        return out[0] if num_samples is None else out

    def _segment(self, *named: Any) -> tuple[Tensor, Tensor]:
        def make() -> tuple[Tensor, Tensor]:
            word, first, count, device = named
            return Segments([word], [first], [0], [count]).on(device)

        return make() if self.clock is None else self.clock.keep(named, make)

    def _words(self, hashed: tuple[int, ...], device: torch.device | str) -> Tensor:
        first = _signed(_hash(self.seed, hashed))
        if self.clock is not None:
            return self.clock.words(first)
        return from_host([first, _signed(self.step)], device)

    def _seed_of_torch(self) -> int:
        seed = derive_seed(self.seed, self.stream, self.step, self.sample)
        return derive_seed(seed, *self.path) if self.path else seed


def derive_seed(seed: int, stream: int, step: int = 0, index: int = 0) -> int:
    """Map words to the 32-bit seed of a generator.

    torch's CPU generator keeps only the low 32 bits of its seed. For a fixed (seed, stream, step) the map is a
    bijection of ``index`` below 2^32: the samples of one step never share their noise. Two keys of different steps
    coincide with probability 2^-32.
    """
    key = mix64(mix64(mix64(_word(seed)) ^ stream) ^ step)
    return _mix32(_mix32((index ^ key) & 0xFFFFFFFF) ^ (key >> 32))


def _word(seed: int) -> int:
    """Return a seed as 64 bits, of any type that counts."""
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = 1 << 64
    if not -(1 << 63) <= whole <= MASK64:
        raise ConfigError(Fault("seed", repr(seed), "must be a whole number of 64 bits", "Try 0"))
    return whole & MASK64


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
