"""The noise on CUDA, in Triton: drawn where it is used, drawn again where it is needed again, never stored.

Each program of a kernel takes one tile of `Segments`: 256 counters of Philox4x32-10, whose 1024 words are 1024 numbers of
one segment. All kernels are compiled without fused multiply-adds, so the numbers are those of a CPU, bit for bit.

The arguments that all functions share:

table : Tensor
    [4, T] int64, of `Segments.on`.
tiles : Tensor
    [num_tiles, 2] int32, of `Segments.on`.
words : Tensor
    [2] int64: the state of the key before its last word, and the step; or [3] with a sample. Kernels read it on the device,
    so that a graph that was captured once draws the numbers of any step and sample.
first_sample : int
    Sample of row 0, to which the third word is added. Row r of ``out`` belongs to sample ``first_sample + r``.
antithetic : bool
    Whether an odd sample has the numbers of the even one before it, with the opposite sign.

Tensors are contiguous and lie on one device. Only places within segments are written. No function reads memory of the
device from the host; only `fold` allocates. Importing this module imports triton. Everything here is Local.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import Segments, from_host

_COUNTERS = tl.constexpr(Segments.TILE // 4)
_TILE = tl.constexpr(Segments.TILE)
_OPTIONS = {"enable_fp_fusion": False, "num_warps": 2}

# log(1 + t) = t + t^2 (L0 + L1 t + ...), sin(a) = a + a^3 (S0 + S1 a^2 + ...), cos(a) = 1 + a^2 (C0 + C1 a^2 + ...)
_L0, _L1 = tl.constexpr(-0.49999961256980896), tl.constexpr(0.33336734771728516)
_L2, _L3 = tl.constexpr(-0.2500632405281067), tl.constexpr(0.19818177819252014)
_L4, _L5 = tl.constexpr(-0.16440801322460175), tl.constexpr(0.16990506649017334)
_L6 = tl.constexpr(-0.1526685357093811)
_S0, _S1, _S2 = (tl.constexpr(c) for c in (-0.16666655242443085, 0.008332177996635437, -0.00019517316832207143))
_C0, _C1, _C2 = (tl.constexpr(c) for c in (-0.49999895691871643, 0.04165629670023918, -0.0013597840443253517))
_LN2 = tl.constexpr(0.6931471824645996)
_QUARTER = tl.constexpr(1.4629180792671596e-09)  # pi / 2 * 2^-30, in float32 as all of them
_TWO_M23, _TWO_M32, _TWO_M33 = tl.constexpr(2.0**-23), tl.constexpr(2.0**-32), tl.constexpr(2.0**-33)


@triton.jit
def _mix64(x):
    """`philox.mix64` of uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _pair(x0, x1, flip):
    """Two normals of two words, by Box-Muller in float32 with IEEE +, * and square root; ``flip`` is xored to them."""
    u = x0.to(tl.float32) * _TWO_M32 + _TWO_M33
    i = u.to(tl.int32, bitcast=True)
    e = (i - 0x3F2AAAAB) & -8388608
    t = (i - e).to(tl.float32, bitcast=True) - 1.0
    s = t * t
    p = t * _L6 + _L5
    p = p * t + _L4
    p = p * t + _L3
    p = p * t + _L2
    p = p * t + _L1
    p = p * t + _L0
    log = (p * s + t) + (e.to(tl.float32) * _TWO_M23) * _LN2
    r = tl.sqrt_rn(log * -2.0)
    q = (x1 + 0x20000000) >> 30
    a = (x1 - (q << 30)).to(tl.int32, bitcast=True).to(tl.float32) * _QUARTER
    s = a * a
    sin = ((s * _S2 + _S1) * s + _S0) * (s * a) + a
    cos = ((s * _C2 + _C1) * s + _C0) * s + 1.0
    is_odd = (q & 1) != 0
    z0 = (r * tl.where(is_odd, sin, cos)).to(tl.uint32, bitcast=True) ^ (((q + 1) & 2) << 30) ^ flip
    z1 = (r * tl.where(is_odd, cos, sin)).to(tl.uint32, bitcast=True) ^ ((q & 2) << 30) ^ flip
    return z0.to(tl.float32, bitcast=True), z1.to(tl.float32, bitcast=True)


@triton.jit
def _tile(table_ptr, tiles_ptr, words_ptr, num_segments):
    """Return of this program's tile: segment, its length, Philox's key, first counter, and where its numbers are.

    Word l of counter j is the number ``number + o`` of the segment and lies at ``place + o`` with o = 64 (j // 16) +
    j % 16 + 16 l, where ``low <= o < high``: a tile begins at a multiple of 64 numbers of the tensor, a segment anywhere.
    """
    at = tiles_ptr + 2 * tl.program_id(0).to(tl.int64)
    segment = tl.load(at)
    tile = tl.load(at + 1).to(tl.int64)
    word = tl.load(table_ptr + segment)
    first = tl.load(table_ptr + num_segments + segment)
    start = tl.load(table_ptr + 2 * num_segments + segment)
    length = tl.load(table_ptr + 3 * num_segments + segment)
    key = _mix64((tl.load(words_ptr) ^ word).to(tl.uint64, bitcast=True))
    number = tile * _TILE - first % 64
    low = tl.maximum(-number, 0).to(tl.int32)
    high = tl.minimum(length - number, _TILE).to(tl.int32)
    counter = ((first // 64) * 16 + tile * _COUNTERS).to(tl.uint32)
    return segment, length, key.to(tl.uint32), (key >> 32).to(tl.uint32), counter, number, start + number, low, high


@triton.jit
def _words4(counter, sample, words_ptr, k0, k1, ANTITHETIC: tl.constexpr):
    """Return the four words of each counter of a tile, and the sign bit of the sample where it is flipped."""
    sample = sample.to(tl.uint32)
    flip = sample & 0
    if ANTITHETIC:
        flip = sample << 31
        sample = sample - (sample & 1)
    step = tl.load(words_ptr + 1).to(tl.uint64, bitcast=True)
    c0 = counter + tl.arange(0, _COUNTERS).to(tl.uint32)
    x0, x1, x2, x3 = _philox(c0, sample, step.to(tl.uint32), (step >> 32).to(tl.uint32), k0, k1)
    return x0, x1, x2, x3, flip


@triton.jit
def _offsets():
    j = tl.arange(0, _COUNTERS)
    return (j // 16) * 64 + j % 16


@triton.jit
def _load(ptr, o, low, high, MASKED: tl.constexpr):
    return tl.load(ptr + o, mask=(o >= low) & (o < high), other=0) if MASKED else tl.load(ptr + o)


@triton.jit
def _store(ptr, o, x, low, high, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + o, x, mask=(o >= low) & (o < high))
    else:
        tl.store(ptr + o, x)


@triton.jit
def _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o, x, low, high, AFFINE: tl.constexpr, NOISE: tl.constexpr,
         MASKED: tl.constexpr):  # fmt: skip
    """Store one number of each counter, or what is made of it."""
    if NOISE:
        _store(noise_ptr + row + place, o, x, low, high, MASKED)
    if AFFINE:
        loc = _load(loc_ptr + place, o, low, high, MASKED)
        x = loc + _load(scale_ptr + place, o, low, high, MASKED) * x.to(loc.dtype)
    _store(out_ptr + row + place, o, x.to(out_ptr.dtype.element_ty), low, high, MASKED)


@triton.jit(do_not_specialize=["first_sample", "num_segments"])
def draw_kernel(out_ptr, noise_ptr, loc_ptr, scale_ptr, table_ptr, tiles_ptr, words_ptr, first_sample, num_segments,
                size, BITS: tl.constexpr, AFFINE: tl.constexpr, NOISE: tl.constexpr, ANTITHETIC: tl.constexpr,
                SAMPLE: tl.constexpr):  # fmt: skip
    """Words, normals or loc + scale * normals of tile ``program_id(0)`` and row ``program_id(1)``; size: of a row."""
    _, _, k0, k1, counter, _, place, low, high = _tile(table_ptr, tiles_ptr, words_ptr, num_segments)
    sample = first_sample + tl.program_id(1)
    if SAMPLE:
        sample += tl.load(words_ptr + 2).to(tl.int32)  # modulo 2^32, as the counter takes it
    x0, x1, x2, x3, flip = _words4(counter, sample, words_ptr, k0, k1, ANTITHETIC)
    if BITS:
        z0, z1 = x0.to(tl.int32, bitcast=True), x1.to(tl.int32, bitcast=True)
        z2, z3 = x2.to(tl.int32, bitcast=True), x3.to(tl.int32, bitcast=True)
    else:
        z0, z1 = _pair(x0, x1, flip)
        z2, z3 = _pair(x2, x3, flip)
    o = _offsets()
    row = tl.program_id(1).to(tl.int64) * size
    if (low == 0) & (high == _TILE) & (place % 16 == 0):
        # The compiler sees that 16 bytes can be moved at once; tl.multiple_of would mark `place` for the else branch too
        place = (place // 16) * 16
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o, z0, low, high, AFFINE, NOISE, False)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 16, z1, low, high, AFFINE, NOISE, False)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 32, z2, low, high, AFFINE, NOISE, False)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 48, z3, low, high, AFFINE, NOISE, False)
    else:
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o, z0, low, high, AFFINE, NOISE, True)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 16, z1, low, high, AFFINE, NOISE, True)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 32, z2, low, high, AFFINE, NOISE, True)
        _put(out_ptr, noise_ptr, loc_ptr, scale_ptr, row, place, o + 48, z3, low, high, AFFINE, NOISE, True)


@triton.jit
def _fold_rows(g_ptr, total_ptr, product_ptr, words_ptr, first_sample, rows, length, number, low, high, counter, k0, k1,
               TOTAL: tl.constexpr, ANTITHETIC: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Add the rows of one tile, in their order: a sum does not depend on how many samples a call has."""
    o0 = _offsets()
    o1, o2, o3 = o0 + 16, o0 + 32, o0 + 48
    b0 = _load(product_ptr, o0, low, high, MASKED)
    b1 = _load(product_ptr, o1, low, high, MASKED)
    b2 = _load(product_ptr, o2, low, high, MASKED)
    b3 = _load(product_ptr, o3, low, high, MASKED)
    if TOTAL:
        a0 = _load(total_ptr, o0, low, high, MASKED)
        a1 = _load(total_ptr, o1, low, high, MASKED)
        a2 = _load(total_ptr, o2, low, high, MASKED)
        a3 = _load(total_ptr, o3, low, high, MASKED)
    dtype: tl.constexpr = product_ptr.dtype.element_ty
    for r in range(rows):
        at = length * r + number
        if not MASKED:
            at = (at // 4) * 4
        g0 = _load(g_ptr + at, o0, low, high, MASKED).to(dtype)
        g1 = _load(g_ptr + at, o1, low, high, MASKED).to(dtype)
        g2 = _load(g_ptr + at, o2, low, high, MASKED).to(dtype)
        g3 = _load(g_ptr + at, o3, low, high, MASKED).to(dtype)
        x0, x1, x2, x3, flip = _words4(counter, first_sample + r, words_ptr, k0, k1, ANTITHETIC)
        z0, z1 = _pair(x0, x1, flip)
        z2, z3 = _pair(x2, x3, flip)
        b0, b1 = b0 + g0 * z0.to(dtype), b1 + g1 * z1.to(dtype)
        b2, b3 = b2 + g2 * z2.to(dtype), b3 + g3 * z3.to(dtype)
        if TOTAL:
            a0, a1, a2, a3 = a0 + g0, a1 + g1, a2 + g2, a3 + g3
    _store(product_ptr, o0, b0, low, high, MASKED)
    _store(product_ptr, o1, b1, low, high, MASKED)
    _store(product_ptr, o2, b2, low, high, MASKED)
    _store(product_ptr, o3, b3, low, high, MASKED)
    if TOTAL:
        _store(total_ptr, o0, a0, low, high, MASKED)
        _store(total_ptr, o1, a1, low, high, MASKED)
        _store(total_ptr, o2, a2, low, high, MASKED)
        _store(total_ptr, o3, a3, low, high, MASKED)


@triton.jit(do_not_specialize=["like_ptr", "first_sample", "num_segments", "rows"])
def fold_kernel(addresses_ptr, like_ptr, total_ptr, product_ptr, table_ptr, tiles_ptr, words_ptr, first_sample,
                num_segments, rows, TOTAL: tl.constexpr, ANTITHETIC: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """Add gradients, and gradients * normals, of tile ``program_id(0)`` and all rows; like_ptr: to their dtype."""
    segment, length, k0, k1, counter, number, place, low, high = _tile(table_ptr, tiles_ptr, words_ptr, num_segments)
    if SAMPLE:
        first_sample += tl.load(words_ptr + 2).to(tl.int32)
    address = tl.load(addresses_ptr + segment)
    g_ptr = address.to(like_ptr.dtype)
    is_full = (low == 0) & (high == _TILE) & (place % 16 == 0)
    if is_full & (number % 4 == 0) & (length % 4 == 0) & (address % 16 == 0) & (address != 0):
        place = (place // 16) * 16  # as in draw_kernel
        g_ptr = tl.multiple_of(((address // 16) * 16).to(like_ptr.dtype), 16)
        _fold_rows(g_ptr, total_ptr + place, product_ptr + place, words_ptr, first_sample, rows, length, number, low,
                   high, counter, k0, k1, TOTAL, ANTITHETIC, False)  # fmt: skip
    elif address != 0:
        _fold_rows(g_ptr, total_ptr + place, product_ptr + place, words_ptr, first_sample, rows, length, number, low,
                   high, counter, k0, k1, TOTAL, ANTITHETIC, True)  # fmt: skip


def bits(table: Tensor, tiles: Tensor, words: Tensor, first_sample: int, antithetic: bool, out: Tensor) -> None:
    """Write Philox's words to ``out`` [c, P] int32. Antithetic samples have the same words."""
    _draw(table, tiles, words, first_sample, antithetic, out, is_bits=True)


def draw(table: Tensor, tiles: Tensor, words: Tensor, first_sample: int, antithetic: bool, out: Tensor) -> None:
    """Write normals to ``out`` [c, P]: float32, or float32 that is cast to bfloat16 or float64."""
    _draw(table, tiles, words, first_sample, antithetic, out)


def affine(
    table: Tensor,
    tiles: Tensor,
    words: Tensor,
    first_sample: int,
    antithetic: bool,
    loc: Tensor,
    scale: Tensor,
    out: Tensor,
    noise: Tensor | None = None,
) -> None:
    """Write loc + scale * eps to ``out``: rounded twice in the dtype of ``loc``, then cast.

    ``loc`` and ``scale`` are [P], both float32 or both float64, ``out`` [c, P] float32, bfloat16 or float64. The
    normals eps are float32, and are stored in ``noise`` [c, P] where it is given.
    """
    _draw(table, tiles, words, first_sample, antithetic, out, loc, scale, noise)


def _draw(table, tiles, words, first_sample, antithetic, out, loc=None, scale=None, noise=None, is_bits=False):
    pointers = out, *(out if tensor is None else tensor for tensor in (noise, loc, scale)), table, tiles, words
    flags = {"BITS": is_bits, "AFFINE": loc is not None, "NOISE": noise is not None}
    with torch.cuda.device_of(table):
        draw_kernel[(len(tiles), len(out))](
            *pointers, first_sample, table.shape[1], out.shape[1], **flags, ANTITHETIC=bool(antithetic),
            SAMPLE=len(words) == 3, **_OPTIONS,
        )  # fmt: skip


_DTYPES = {torch.float32, torch.bfloat16, torch.float64}


def addresses_of(gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return a new tensor [T] int64 on a device: where the gradients lie, and 0 for None. The host does not wait."""
    return from_host([0 if g is None else g.data_ptr() for g in gradients], device)


def fold(
    gradients: Sequence[Tensor | None],
    table: Tensor,
    tiles: Tensor,
    words: Tensor,
    first_sample: int,
    antithetic: bool,
    total: Tensor | None,
    product: Tensor,
    samples: int = 1,
    addresses: Tensor | None = None,
) -> None:
    """Add gradients of samples, and gradients * eps, in one launch for all tensors; eps is drawn again.

    Each sum begins with what is there and takes one row after the other, so chunks of samples do not change it.

    ``gradients`` are T tensors [samples, *shape] of the segments' lengths (for one sample also [*shape]), of one dtype:
    float32, bfloat16 or float64; None adds nothing. ``total`` and ``product`` are [P] of one dtype, in which ``total[p]
    += sum_r g[r, p]`` and ``product[p] += sum_r g[r, p] * eps[r, p]`` are computed. ``addresses`` [T] int64 on the
    device are where the kernel looks for the gradients, by default those of `addresses_of`; a capture needs some that
    are filled after it: ``addresses.copy_(addresses_of(gradients, device))``.

    It raises `ValueError` where gradients are not contiguous or have several dtypes, or a capture has no ``addresses``.
    """
    given = [g for g in gradients if g is not None]
    if len(gradients) != table.shape[1] or not all(g.is_contiguous() for g in given):
        raise ValueError(f"fold needs {table.shape[1]} contiguous gradients (or None), one for each segment")
    dtypes = {g.dtype for g in given}
    if len(dtypes) > 1 or not dtypes <= _DTYPES:
        found = sorted(map(str, dtypes))
        raise ValueError(f"fold needs gradients of one dtype, float32, bfloat16 or float64, not {found}")
    if not given:
        return
    if addresses is None:
        if product.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError("fold in a capture needs addresses: a copy from the host would be repeated at each replay")
        addresses = addresses_of(gradients, product.device)
    pointers = addresses, given[0], product if total is None else total, product, table, tiles, words
    with torch.cuda.device_of(table):
        fold_kernel[(len(tiles),)](
            *pointers, first_sample, table.shape[1], samples, TOTAL=total is not None, ANTITHETIC=bool(antithetic),
            SAMPLE=len(words) == 3, **_OPTIONS,
        )  # fmt: skip


_PINNED = {"draw": "23f711059f9a50cb", "affine": "eacbfe570ab07352", "fold": "24e6e35e1a40e8c6"}
"""SHA-256 of what `matches` computes, its first 16 digits."""


def matches(device: torch.device | str = "cuda") -> bool:
    """Whether the kernels give the pinned numbers on a device; errors of the compiler pass through."""
    return _self_test(torch.device(device)) == _PINNED


def _self_test(device: torch.device) -> dict[str, str]:
    segments = Segments([5, -(2**62) + 3, 7], [0, 2**33 + 37, 63], [0, 2048, 4160], [2000, 2085, 1])
    words = torch.tensor([0x0123456789ABCDEF, 2**32 + 7], device=device)
    on = segments.table(device), segments.tiles(device), words
    real: Any = {"dtype": torch.float32, "device": device}  # whatever a user's default is
    noise, size = torch.zeros(3, 4224, **real), 4224
    draw(*on, 2**31 - 2, True, noise)
    loc = torch.arange(size, **real) * 2.0**-9 - 3
    scale = torch.arange(size, **real) % 97 * 2.0**-7 + 2.0**-10
    weights, product = torch.zeros(3, size, **real), scale.clone()
    affine(*on, 5, True, loc, scale, weights)
    at = zip(*segments.table()[2:].tolist())
    fold([weights[:, a : a + n].contiguous() for a, n in at], *on, 5, True, loc, product, samples=3)
    results = {"draw": noise, "affine": weights, "fold": torch.stack([loc, product])}
    return {name: hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16] for name, x in results.items()}
