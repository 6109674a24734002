"""The numbers of a key, in NumPy: what every faster implementation must reproduce bit for bit.

Number n of a tensor is word (n % 64) // 16 of Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) at the counter
(c, sample, low and high word of the step) with c = 16 (n // 64) + n % 16: a group of 64 numbers belongs to 16 counters,
which suits the lanes of CPUs and GPUs alike. Normals are a Box-Muller of words (0, 1) and (2, 3) that consists of
additions, products and square roots of float32, each rounded by itself, and of operations on integers.
Everything here is Local.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_NUMBERS = 1 << 34
"""Numbers of a tensor."""

LN2 = np.float32(0.6931471824645996)
HALF_PI = np.float32(float.fromhex("0x1.921fb6p-30"))
"""A quarter turn, per 2^30."""
LOG = (
    *(-0.49999961256980896, 0.33336734771728516, -0.2500632405281067, 0.19818177819252014),
    *(-0.16440801322460175, 0.16990506649017334, -0.1526685357093811),
)
"""log(1 + t) = t + t^2 (LOG[0] + LOG[1] t + ...) for t in [-1/3, 1/3); the constants are numbers of float32."""
SIN = (-0.16666655242443085, 0.008332177996635437, -0.00019517316832207143)
COS = (-0.49999895691871643, 0.04165629670023918, -0.0013597840443253517)

_CHUNK = 1 << 10  # groups whose numbers are made at once: their arrays stay in the cache
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


MASK64 = (1 << 64) - 1


def mix64(x: int) -> int:
    """Finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def mix64_of(x: NDArray) -> NDArray:
    """Return `mix64` of each element, uint64; arithmetic of NumPy wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def philox4x32(
    c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike, k0: ArrayLike, k1: ArrayLike
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return the four words of Philox4x32-10 at each counter and key: [...] uint32 each."""
    a, b, c, d, k0, k1 = (np.asarray(word, np.uint64) for word in (c0, c1, c2, c3, k0, k1))
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> _HALF) ^ b ^ k0, q & _LOW, (p >> _HALF) ^ d ^ k1, p & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return a.astype(np.uint32), b.astype(np.uint32), c.astype(np.uint32), d.astype(np.uint32)


def pairs(x0: NDArray, x1: NDArray) -> tuple[NDArray, NDArray]:
    """Return the Box-Muller of pairs of words [...] uint32: two normals [...] float32 for each."""
    f = np.float32
    u = x0.astype(f) * f(2.0**-32) + f(2.0**-33)
    i = u.view(np.int32)
    e = (i - np.int32(0x3F2AAAAB)) & np.int32(-0x800000)  # u = (1 + t) 2^k
    t, k = (i - e).view(f) - f(1), e.astype(f) * f(2.0**-23)
    log = (_polynomial(LOG, t) * (t * t) + t) + k * LN2
    r = np.sqrt(log * f(-2))
    y = x1 + np.uint32(0x20000000)  # the quarter turn, rounded, in its two upper bits
    a = (x1 - (y & np.uint32(0xC0000000))).view(np.int32).astype(f) * HALF_PI
    s = a * a
    sine = _polynomial(SIN, s) * (s * a) + a
    cosine = _polynomial(COS, s) * s + f(1)
    odd = (y & np.uint32(0x40000000)) != 0
    sign = np.uint32(0x80000000)
    z0 = (r * np.where(odd, sine, cosine)).view(np.uint32) ^ ((y + np.uint32(0x40000000)) & sign)
    z1 = (r * np.where(odd, cosine, sine)).view(np.uint32) ^ (y & sign)
    return z0.view(f), z1.view(f)


def _polynomial(coefficients: tuple[float, ...], x: NDArray) -> NDArray:
    value = np.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + np.float32(c)
    return value


def bits(prefix: int, step: int, sample: int, word: int | Sequence[int], first: int, length: int) -> NDArray:
    """Return numbers ``first`` to ``first + length - 1`` of a tensor as random words: [length] uint32.

    Of several tensors, or rows of a batch, [len(word), length]. ``prefix`` is the hash of the key without its last word (64
    bits), which is ``word``: the number of the tensor, or the row. ``step`` is below 2^64, ``sample`` below 2^32,
    ``first + length`` at most 2^34.
    """
    return _made(prefix, step, sample, word, first, length, lambda *x: x).view(np.uint32)


def normals(
    prefix: int, step: int, sample: int, word: int | Sequence[int], first: int, length: int, antithetic: bool = False
) -> NDArray:
    """Return numbers of a tensor as standard normals: [length] float32; otherwise as `bits`.

    ``antithetic``: an odd sample has the numbers of the sample before it with the other sign.
    """

    def box_muller(*x: NDArray) -> tuple[NDArray, ...]:
        return *pairs(x[0], x[1]), *pairs(x[2], x[3])

    odd = sample & 1 if antithetic else 0
    drawn = _made(prefix, step, sample - odd, word, first, length, box_muller)
    if odd:
        drawn.view(np.uint32)[:] ^= np.uint32(0x80000000)
    return drawn


def _made(
    prefix: int, step: int, sample: int, word: int | Sequence[int], first: int, length: int,
    convert: Callable[..., tuple[NDArray, ...]],
) -> NDArray:  # fmt: skip
    if not (first >= 0 and length >= 0 and first + length <= MAX_NUMBERS):
        raise ValueError(f"numbers {first} to {first + length} are not within the 2^34 numbers of a tensor")
    keys = mix64_of(np.uint64(prefix) ^ np.atleast_1d(np.asarray(word, np.int64)).view(np.uint64))[:, None]
    out = np.empty((len(keys), length), np.float32)
    end, at_once = -(-(first + length) // 64), max(1, _CHUNK // len(keys))
    for group in range(first // 64, end, at_once):
        counters = np.arange(16 * group, 16 * min(group + at_once, end), dtype=np.uint64)
        words = philox4x32(counters, sample, step & 0xFFFFFFFF, step >> 32, keys & _LOW, keys >> _HALF)
        columns = [c.view(np.float32).reshape(len(keys), -1, 16) for c in convert(*words)]
        drawn = np.stack(columns, 2).reshape(len(keys), -1)
        low, high = max(first - 64 * group, 0), min(first + length - 64 * group, 64 * at_once)
        out[:, 64 * group + low - first : 64 * group + high - first] = drawn[:, low:high]
    return out[0] if np.ndim(word) == 0 else out
