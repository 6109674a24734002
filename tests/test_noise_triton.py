"""The Triton kernels without a GPU: interpreted, bit for bit; compiled, without fused multiply-adds."""

import collections
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import patience

from hpc_bnn.noise.philox import mix64
from hpc_bnn.noise.segments import Segments

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")

import triton.language as tl  # noqa: E402

from hpc_bnn.noise import triton_kernels  # noqa: E402


# The definition, in NumPy, with the signatures of the kernels
def philox(c0, c1, c2, c3, k0, k1):
    c = [np.asarray(v, np.uint64) for v in np.broadcast_arrays(c0, c1, c2, c3)]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(p1 >> half) ^ c[1] ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c[3] ^ np.uint64(k1), p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [v.astype(np.uint32) for v in c]


def pair(x0, x1):
    f = np.float32
    u = x0.astype(f) * f(2.0**-32) + f(2.0**-33)
    i = u.view(np.int32)
    e = (i - np.int32(0x3F2AAAAB)) & np.int32(-8388608)
    t = (i - e).view(f) - f(1)
    p = f(-0.1526685357093811)
    for c in (
        0.16990506649017334,
        -0.16440801322460175,
        0.19818177819252014,
        -0.2500632405281067,
        0.33336734771728516,
        -0.49999961256980896,
    ):
        p = p * t + f(c)
    log = (p * (t * t) + t) + e.astype(f) * f(2.0**-23) * f(0.6931471824645996)
    r = np.sqrt(log * f(-2))
    q = (x1 + np.uint32(0x20000000)) >> np.uint32(30)
    a = (x1 - (q << np.uint32(30))).view(np.int32).astype(f) * f(np.pi / 2 * 2.0**-30)
    s = a * a
    sin = ((s * f(-0.00019517316832207143) + f(0.008332177996635437)) * s + f(-0.16666655242443085)) * (s * a) + a
    cos = ((s * f(-0.0013597840443253517) + f(0.04165629670023918)) * s + f(-0.49999895691871643)) * s + f(1)
    turns = [(cos, sin), (-sin, cos), (-cos, -sin), (sin, -cos)]
    return [r * np.choose(q & np.uint32(3), [turn[k] for turn in turns]) for k in range(2)]


def rows(table, words, first_sample, antithetic, samples, is_bits=False):
    """Yield number of the segment, row, its places, its numbers."""
    prefix, step = (x % 2**64 for x in words.tolist()[:2])
    first_sample += sum(words.tolist()[2:])
    for (t, (word, first, start, length)), r in itertools.product(enumerate(table.T.tolist()), range(samples)):
        key = mix64(prefix ^ (word % 2**64))
        n = first + np.arange(length)
        sample = (first_sample + r) % 2**32
        flip = bool(antithetic and sample % 2)
        counter = (16 * (n // 64) + n % 16).astype(np.uint32)
        x = philox(counter, sample - flip, step % 2**32, step >> 32, key % 2**32, key >> 32)
        x = [v.view(np.int32) for v in x] if is_bits else [*pair(x[0], x[1]), *pair(x[2], x[3])]
        x = np.choose(n % 64 // 16, x)
        yield t, r, slice(start, start + length), torch.from_numpy(-x if flip and not is_bits else x)


def cast(x, dtype):
    """Cast as the interpreter does: it cuts the bits that bfloat16 does not have; a compiled kernel rounds (below)."""
    if dtype == torch.bfloat16:
        x = (x.float().view(torch.int32) & -(2**16)).view(torch.float32)
    return x.to(dtype)


def bits(table, tiles, words, first_sample, antithetic, out):
    for _, r, at, x in rows(table, words, first_sample, antithetic, len(out), is_bits=True):
        out[r, at] = x


def draw(table, tiles, words, first_sample, antithetic, out):
    for _, r, at, x in rows(table, words, first_sample, antithetic, len(out)):
        out[r, at] = cast(x, out.dtype)


def affine(table, tiles, words, first_sample, antithetic, loc, scale, out, noise=None):
    for _, r, at, x in rows(table, words, first_sample, antithetic, len(out)):
        out[r, at] = cast(loc[at] + scale[at] * x.to(loc.dtype), out.dtype)
        if noise is not None:
            noise[r, at] = x


def fold(gradients, table, tiles, words, first_sample, antithetic, total, product, samples=1):
    for t, r, at, x in rows(table, words, first_sample, antithetic, samples):
        if gradients[t] is not None:
            g = gradients[t].reshape(samples, -1)[r].to(product.dtype)
            product[at] += g * x.to(product.dtype)
            if total is not None:
                total[at] += g


# What the process with the interpreter runs
FIRST = (0, 1, 37, 63, 64, 1000, 2**33 + 37)
LENGTHS = ((1, 15, 16, 17, 63, 64, 65, 0), (1023, 1024, 1025, 2048))
SAMPLES = ((0, False), (5, True), (2**31 - 2, True), (2**32 - 2, False))
STEPS = (3, 2**32 + 5, 2**40 - 1, 0)
PREFIXES = (0x0123456789ABCDEF, -3, -(2**63), 0)


@triton.jit
def probe_kernel(p, q, n):
    for i in range(n):
        tl.store(q + i, tl.load(p) + i)


def find_fault():
    """Return why the interpreter cannot be used (old ones do not know the NumPy of today), or None."""
    out = torch.zeros(3, dtype=torch.int64)
    try:
        probe_kernel[(1,)](torch.tensor([3]), out, 3)
    except Exception as error:
        return str(error)
    return None if out.tolist() == [3, 4, 5] else "it reads wrong numbers"


def segment_cases():
    """Yield [table, tiles], size of a row: short and long segments, at multiples of 64 and packed."""
    for shift, (is_packed, lengths) in enumerate(itertools.product((False, True), LENGTHS)):
        lengths = [*lengths, 85]
        first = [FIRST[(i + 2 * shift) % len(FIRST)] for i in range(len(lengths) - 1)] + [2**34 - 85]
        starts, at = [], 3 if is_packed else 0
        for n in lengths:
            starts.append(at)
            at += n + 1 if is_packed else -(-n // 64) * 64
        words = [(i * 0x9E3779B97F4A7C15 % 2**64) - 2**63 for i in range(len(lengths))]
        segments = Segments(words, first, starts, lengths)
        yield [segments.table(), segments.tiles()], at + 5 * is_packed


def same(got, want):
    assert all(torch.equal(g.view(torch.uint8), w.view(torch.uint8)) for g, w in zip(got, want))


def compare(name, outs, *before, on, after=(), **options):
    """Run a kernel and the definition on copies of what they write, and return what both wrote."""
    got, want = ([None if x is None else x.clone() for x in outs] for _ in range(2))
    getattr(triton_kernels, name)(*before, *on, *after, *got, **options)
    globals()[name](*before, *on, *after, *want, **options)
    same(*([x for x in xs if x is not None] for xs in (got, want)))
    return got


def interpret():
    generator = torch.Generator().manual_seed(0)
    for i, (on, size) in enumerate(segment_cases()):
        sample, antithetic = SAMPLES[i]
        third = [[], [sample - 1]][i % 2]  # the sample on the device
        on += [torch.tensor([PREFIXES[i], STEPS[i], *third]), sample - sum(third), antithetic]
        dtype, out = ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2)[i % 3]
        compare("bits", [torch.full((2, size), 7, dtype=torch.int32)], on=on)
        compare("draw", [torch.full((3, size), 7, dtype=out)], on=on)
        loc, scale = torch.randn(2, size, dtype=dtype, generator=generator)
        outs = [torch.full((3, size), 7, dtype=out), None if i == 2 else torch.full((3, size), 7.0)]
        compare("affine", outs, on=on, after=(loc, scale))

        lengths = on[0][3].tolist()
        at = i % 2  # the gradients begin at a multiple of 16 bytes or do not
        flat = torch.randn(3 * sum(lengths) + 1, generator=generator).to(out)
        three = [x.view(3, -1) for x in flat[at : at + 3 * sum(lengths)].split([3 * n for n in lengths])]
        three[1] = None
        sums = [None if i == 1 else loc, scale]
        got = compare("fold", sums, three, on=on, samples=3)
        if i == 2:  # chunks of one sample: the same sums
            sums = [x.clone() for x in sums]
            for r in range(3):
                one = [None if x is None else x[r].view(-1, 1) for x in three]
                addresses = triton_kernels.addresses_of(one, torch.device("cpu"))
                triton_kernels.fold(one, *on[:3], on[3] + r, on[4], *sums, addresses=addresses)
            same(sums, got)
    assert triton_kernels.matches("cpu")


def test_interpreted_kernels_have_the_bits_of_the_definition():
    run = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=patience(300),
    )
    if run.returncode == 77:
        pytest.skip(f"Triton {triton.__version__} cannot interpret with NumPy {np.__version__}: {run.stdout.strip()}")
    assert run.returncode == 0, run.stdout + run.stderr


def test_pinned_numbers_are_those_of_the_definition(monkeypatch):
    for function in (draw, affine, fold):
        monkeypatch.setattr(triton_kernels, function.__name__, function)
    assert triton_kernels._self_test(torch.device("cpu")) == triton_kernels._PINNED
    assert triton_kernels.matches("cpu")


def test_gradients_that_a_kernel_would_misread_are_refused():
    segments = Segments([1, 2], [0, 0], [0, 64], [6, 6])
    on = [segments.table(), segments.tiles(), torch.zeros(2, dtype=torch.int64), 0, False, None, torch.zeros(128)]
    good = torch.zeros(2, 3)
    for gradients in ([good, good.T], [good, good.bfloat16()], [good], [good.int(), None]):
        with pytest.raises(ValueError, match="fold needs"):
            triton_kernels.fold(gradients, *on)
    triton_kernels.fold([None, None], *on)


# Compiled for GPUs that are not there
TABLES = {"table_ptr": "*i64", "tiles_ptr": "*i32", "words_ptr": "*i64", "num_segments": "i32", "first_sample": "i32"}
DRAW = {"out_ptr": "*fp32", "noise_ptr": "*fp32", "loc_ptr": "*fp32", "scale_ptr": "*fp32", "size": "i32", **TABLES}
FOLD = {"addresses_ptr": "*i64", "like_ptr": "*fp32", "total_ptr": "*fp32", "product_ptr": "*fp32", "rows": "i32"}
KERNELS = {
    "bits": ("draw_kernel", {"out_ptr": "*i32"}, {"BITS": True, "AFFINE": False, "NOISE": False}),
    "draw": ("draw_kernel", {}, {"BITS": False, "AFFINE": False, "NOISE": False}),
    "affine": ("draw_kernel", {"out_ptr": "*bf16"}, {"BITS": False, "AFFINE": True, "NOISE": True}),
    "affine64": (
        "draw_kernel",
        {"out_ptr": "*fp64", "loc_ptr": "*fp64", "scale_ptr": "*fp64"},
        {"BITS": False, "AFFINE": True, "NOISE": False},
    ),
    "fold": ("fold_kernel", {}, {"TOTAL": True}),
    "fold16": ("fold_kernel", {"like_ptr": "*bf16"}, {"TOTAL": False}),
    "fold64": ("fold_kernel", dict.fromkeys(("like_ptr", "total_ptr", "product_ptr"), "*fp64"), {"TOTAL": True}),
}


def compile_for(capability, name, has_fusion):
    """Return the PTX, which Triton's own assembler has accepted; addresses and rows are multiples of 16, as usually."""
    kernel, types, constants = KERNELS[name]
    kernel = getattr(triton_kernels, kernel)
    types = {**(DRAW if kernel is triton_kernels.draw_kernel else {**FOLD, **TABLES}), **types}
    constants = {**constants, "ANTITHETIC": True, "SAMPLE": "64" not in name}
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    aligned = [
        n for n in ("out_ptr", "noise_ptr", "loc_ptr", "scale_ptr", "total_ptr", "product_ptr", "size") if n in types
    ]
    places = [kernel.arg_names.index(n) for n in aligned]
    attributes = {(place,): [["tt.divisibility", 16]] for place in places} if HAS_ATTRIBUTES else None
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {**triton_kernels._OPTIONS, "enable_fp_fusion": has_fusion}
    return triton.compile(source, target=target, options=options).asm["ptx"]


# Before Triton 3.3 alignment was said in another way in each version
HAS_ATTRIBUTES = not any(hasattr(m, "AttrsDescriptor") for m in (triton.compiler, triton.backends.compiler))
FUSED = r"\bfma\.rn\.f(?:32|64)\b"


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_compiled_kernels_round_as_a_cpu_does(name, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compile_for(capability, name, has_fusion=False)
    assert not re.findall(FUSED + r"|\S*\.approx\S*", ptx)
    assert name != "affine" or set(re.findall(r"cvt\S*\.bf16\S*", ptx)) <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}
    # Subnormals: the square root's arguments are 0 or above 1e-8, so Triton 3.0's flush does nothing
    assert {x for x in re.findall(r"\S*\.ftz\S*", ptx)} <= {"sqrt.rn.ftz.f32"}


@pytest.mark.skipif(not HAS_ATTRIBUTES, reason="Triton before 3.3: the test cannot say that memory is aligned")
@pytest.mark.parametrize("name", ["draw", "affine", "fold", "fold16"])
def test_16_bytes_are_moved_at_once_only_where_a_tile_is_full_and_aligned(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    accesses = re.findall(r"(@%p\d+ )?(?:ld|st)\.global(\.v\d)?\S*", compile_for(90, name, has_fusion=False))
    counts = collections.Counter((bool(mask), vector) for mask, vector in accesses)
    assert counts[False, ".v4"] >= 4
    assert counts[True, ""] >= 16
    assert not counts[True, ".v2"] + counts[True, ".v4"]


@pytest.mark.parametrize("name", ["draw", "affine64", "fold"])
def test_the_search_for_fused_operations_finds_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert re.findall(FUSED, compile_for(90, name, has_fusion=True))


if __name__ == "__main__":
    fault = find_fault()
    if fault:
        print(fault)
        sys.exit(77)
    interpret()
