"""Keyed noise on CPUs: every implementation gives the bits of its definition, and these are normal and independent."""

import importlib
import itertools
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, patience
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import implementations, philox
from hpc_bnn.noise.implementations import NativeImplementation, NumpyImplementation, available, chosen, passes

FOUND = available()
NATIVE = [name for name in FOUND if name != "numpy"]
REFERENCE = NumpyImplementation()
every = pytest.mark.parametrize("name", FOUND)
every_native = pytest.mark.parametrize("name", NATIVE or [pytest.param("", marks=pytest.mark.skip("no C extension"))])
WORDS = torch.tensor([-0x0123456789ABCDEF, (7 << 32) + 5])
MIDDLE_RADIUS = 2605029376
"""A radius word whose radius is 1."""


def extension(name):
    """Return the C extension with a variant selected."""
    native = importlib.import_module("hpc_bnn.noise._native")
    native.set_variant(name)
    return native


def table_of(words, first, starts, lengths):
    return torch.tensor([words, first, starts, lengths], dtype=torch.int64)


def unsigned(words):
    return [word & (1 << 64) - 1 for word in words.tolist()]


def tight(*segments):
    """Return a table of (word, first, length), placed one after the other from 3 on, with gaps of one, and the size."""
    words, first, lengths = zip(*segments)
    starts = [3 + end for end in itertools.accumulate((n + 1 for n in lengths), initial=0)]
    return table_of(words, first, starts[:-1], lengths), starts[-1] + 5


def equal(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@every
def test_a_sample_that_a_clock_adds_is_no_part_of_the_key(name):
    table, size = tight((1, 0, 40), (9, 3, 7))
    draws = [
        all_draws(FOUND[name], table, size, words=words) for words in (WORDS, torch.cat([WORDS, torch.ones(1).long()]))
    ]
    assert all(map(equal, *draws))


def all_draws(implementation, table, size, sample=6, antithetic=True, words=WORDS, rows=3):
    """Return what each method makes of a table, where nothing else is written: a list of tensors."""
    seed = torch.Generator().manual_seed(0)
    loc, scale, gradient = torch.randn(3, size, generator=seed)
    gradients = [gradient[:n] if t % 3 else None for t, n in enumerate(table[3].tolist())]
    bits = torch.full((rows, size), 17, dtype=torch.int32)
    normals, weights, with_noise, noise = torch.full((4, rows, size), -9.5)
    kept, redrawn, alone = torch.ones(3, 2, size)
    implementation.bits(table, words, sample, antithetic, bits)
    implementation.draw(table, words, sample, antithetic, normals)
    implementation.affine(table, words, sample, antithetic, loc, scale, weights, None)
    implementation.affine(table, words, sample, antithetic, loc, scale, with_noise, noise)
    implementation.fold(gradients, table, words, sample, antithetic, *kept, noise[0])
    implementation.fold(gradients, table, words, sample, antithetic, *redrawn, None)
    implementation.fold(gradients, table, words, sample, antithetic, None, alone[1], None)
    assert equal(normals, noise) and equal(weights, with_noise)
    assert equal(kept, redrawn) and equal(alone[1], redrawn[1])
    return [bits, normals, weights, *redrawn]


def assert_same_draws(name, *arguments, **options):
    for drawn, expected in zip(all_draws(FOUND[name], *arguments, **options), reference(*arguments, **options)):
        assert equal(drawn, expected)


def reference(*arguments, **options):
    return all_draws(REFERENCE, *arguments, **options)


# --- the definition ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert [int(word) for word in philox.philox4x32(*counter, *key)] == expected


def test_numbers_by_their_definition():
    """One number at a time, in Python."""
    prefix, step, sample, word = 0xFEDCBA9876543210, (9 << 32) + 1, 12, 3
    drawn = philox.bits(prefix, step, sample, word, 100, 300)
    key = philox.mix64(prefix ^ word)
    for n in (100, 101, 127, 128, 143, 144, 399):
        counter = [16 * (n // 64) + n % 16, sample, step & 0xFFFFFFFF, step >> 32]
        words = philox.philox4x32(*counter, key & 0xFFFFFFFF, key >> 32)
        assert drawn[n - 100] == words[n % 64 // 16]
    normals = philox.normals(prefix, step, sample, word, 0, 64)
    words = philox.bits(prefix, step, sample, word, 0, 64).reshape(4, 16)
    expected = [*philox.pairs(*words[:2]), *philox.pairs(*words[2:])]
    assert np.array_equal(normals, np.concatenate(expected))


def test_normals_are_those_of_exact_functions():
    x0, x1 = np.random.default_rng(0).integers(0, 1 << 32, (2, 1 << 18), dtype=np.uint32)
    u = x0.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)  # rounded: near 1 it moves the radius
    radius = np.sqrt(-2 * np.log(u.astype(float)))
    angle = x1.view(np.int32) * (np.pi * 2.0**-31)
    for z, expected in zip(philox.pairs(x0, x1), (radius * np.cos(angle), radius * np.sin(angle))):
        assert np.abs(z - expected).max() < 2e-6


def test_numbers_beyond_a_tensor_are_refused():
    for first, length in ((philox.MAX_NUMBERS, 1), (-1, 2), (0, -1)):
        with pytest.raises(ValueError, match="2\\^34"):
            philox.bits(1, 2, 3, 4, first, length)
    assert len(philox.bits(1, 2, 3, 4, philox.MAX_NUMBERS, 0)) == 0


# --- every implementation ------------------------------------------------------------------------------------------


@every_native
def test_four_million_numbers(name):
    n = 1 << 22
    table = table_of([5], [0], [0], [n])
    drawn, bits = torch.empty(1, n), torch.empty(1, n, dtype=torch.int32)
    FOUND[name].draw(table, WORDS, 4, False, drawn)
    FOUND[name].bits(table, WORDS, 4, False, bits)
    assert np.array_equal(drawn[0].numpy().view(np.int32), philox.normals(*unsigned(WORDS), 4, 5, 0, n).view(np.int32))
    assert np.array_equal(bits[0].numpy().view(np.uint32), philox.bits(*unsigned(WORDS), 4, 5, 0, n))


def edges():
    """Return words of the radius around each change of the exponent, and of the angle around each eighth of a turn."""
    switch = float(np.array(0x3F2AAAAB, np.uint32).view(np.float32))
    powers = [int(c * 2.0**k) for k in range(33) for c in (1, switch)]
    near = np.add.outer(np.array([*powers, 0, 1 << 24, 1 << 31, MIDDLE_RADIUS]), np.arange(-300, 301))
    turns = np.add.outer(np.arange(9) << 29, np.arange(-300, 301))
    return (np.unique(x.ravel() % (1 << 32)).astype(np.uint32) for x in (near, turns))


@every_native
def test_edges_of_the_normals(name):
    radius, angle = edges()
    x0 = np.concatenate([radius, np.resize(radius, 17 * len(angle))])
    x1 = np.concatenate([np.resize(angle, len(radius)), np.repeat(angle, 17)])
    z = torch.empty(2, len(x0))
    extension(name).pairs(x0.ctypes.data, x1.ctypes.data, z[0].data_ptr(), z[1].data_ptr(), len(x0))
    for drawn, expected in zip(z.numpy(), philox.pairs(x0, x1)):
        assert np.array_equal(drawn.view(np.int32), expected.view(np.int32))
        assert np.isfinite(drawn).all() and np.abs(drawn).max() < 6.8


def hash_of(varied, other, first, count):
    """`hash_words` of the extension in NumPy."""
    words = np.arange(first, first + count, dtype=np.uint64)
    x = [np.full(count, other, np.uint32), words.astype(np.uint32)]
    z0, z1 = (z.view(np.uint32).astype(np.uint64) for z in philox.pairs(*(x if varied else x[::-1])))
    w = words * np.uint64(0x9E3779B97F4A7C15)
    terms = (w ^ z0) * np.uint64(0xBF58476D1CE4E5B9) ^ (w + z1) * np.uint64(0x94D049BB133111EB)
    return int(terms.sum(dtype=np.uint64))


@every_native
def test_hashes_of_ranges_of_words(name):
    """`benchmarks/noise.py --full` goes through all words."""
    hash_words = extension(name).hash_words
    for varied, other in ((0, 0), (1, MIDDLE_RADIUS)):
        for first, count in ((0, 1 << 15), ((1 << 32) - 5000, 5000), ((1 << 31) - 7, 12345)):
            assert hash_words(varied, other, first, count) == hash_of(varied, other, first, count)
        parts = [hash_words(varied, other, first, 1000) for first in (0, 1000)]
        assert sum(parts) % (1 << 64) == hash_words(varied, other, 0, 2000)


def test_the_middle_radius_is_one():
    """So the hash of the words of the angle is that of its sines and cosines."""
    assert philox.pairs(np.array([MIDDLE_RADIUS], np.uint32), np.array([0], np.uint32))[0] == 1


@every_native
@pytest.mark.parametrize("antithetic", [False, True])
def test_all_slices(name, antithetic):
    lengths = (0, 1, 15, 16, 17, 63, 64, 65, 128, 1000, 1023, 1024, 1025, 3000)
    segments = [(t % 5, first, n) for n in lengths for t, first in enumerate((0, 1, 15, 16, 17, 63, 64, 65, 1000, -n))]
    table, size = tight(*((word, first % philox.MAX_NUMBERS, n) for word, first, n in segments))
    assert_same_draws(name, table, size, antithetic=antithetic)


@every_native
@given(
    segments=st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1),
            st.integers(0, 200) | st.integers(0, philox.MAX_NUMBERS - 200),
            st.integers(0, 200),
        ),
        min_size=1,
        max_size=6,
    ),
    words=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2),
    sample=st.integers(0, 10) | st.integers(0, 2**32 - 3),
    antithetic=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_key(name, segments, words, sample, antithetic):
    assert_same_draws(name, *tight(*segments), sample, antithetic, torch.tensor(words))


@every
def test_slices_are_of_the_same_tensor(name):
    whole, parts = (torch.zeros(2, 1000) for _ in range(2))
    FOUND[name].draw(table_of([1], [0], [0], [1000]), WORDS, 0, False, whole)
    cuts = [0, 1, 17, 64, 65, 500, 1000]
    lengths = [b - a for a, b in itertools.pairwise(cuts)]
    FOUND[name].draw(table_of([1] * len(lengths), cuts[:-1], cuts[:-1], lengths), WORDS, 0, False, parts)
    assert equal(whole, parts)


@every
def test_antithetic_samples_come_in_pairs(name):
    table = table_of([1], [3], [0], [150])
    pairs, plain = torch.zeros(2, 4, 150)
    FOUND[name].draw(table, WORDS, 6, True, pairs)
    FOUND[name].draw(table, WORDS, 6, False, plain)
    assert equal(pairs[0], plain[0]) and equal(pairs[1], -plain[0])
    assert equal(pairs[2], plain[2]) and equal(pairs[3], -plain[2])


@every
def test_each_part_of_the_key_matters(name):
    def draw(prefix=1, step=1, sample=1, word=1, first=0):
        out = torch.zeros(1, 100)
        FOUND[name].draw(table_of([word], [first], [0], [100]), torch.tensor([prefix, step]), sample, False, out)
        return out

    changes = [{}, {"prefix": 0}, {"step": 0}, {"step": (1 << 32) + 1}, {"sample": 0}, {"word": 2}, {"first": 1}]
    for a, b in itertools.combinations([draw(**change) for change in changes], 2):
        assert not torch.equal(a, b)


@every_native
def test_threads_do_not_matter(name):
    size = (1 << 18) + 12345
    table = table_of([1, 2, 3], [0, 7, 64], [0, 100, 200_001], [90, 199_000, size - 200_001])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_draws(FOUND[name], table, size, rows=2)
        torch.set_num_threads(2)
        for a, b in zip(alone, all_draws(FOUND[name], table, size, rows=2)):
            assert equal(a, b)
    finally:
        torch.set_num_threads(before)


@every_native
def test_rows_of_a_larger_tensor(name):
    table = table_of([1], [3], [2], [100])
    large, expected = torch.zeros(3, 200), torch.zeros(3, 110)
    FOUND[name].draw(table, WORDS, 0, False, large[:, 50:160])
    REFERENCE.draw(table, WORDS, 0, False, expected)
    assert equal(large[:, 50:160], expected)
    assert not large[:, :50].any() and not large[:, 160:].any()


@every_native
def test_gradients_in_another_order_of_memory(name):
    table = table_of([1], [0], [0], [60])
    gradient = torch.arange(60.0).view(6, 10).T
    products = torch.zeros(2, 60)
    for implementation, product in zip((FOUND[name], REFERENCE), products):
        implementation.fold([gradient], table, WORDS, 0, False, None, product, None)
    assert equal(*products) and products.any()


@every_native
def test_what_does_not_fit_is_refused(name):
    out = torch.zeros(1, 50)
    draws = FOUND[name].draw
    for first, start, length in ((philox.MAX_NUMBERS - 9, 0, 10), (-1, 0, 1), (0, 0, -1), (0, 45, 6), (0, -1, 5)):
        with pytest.raises(ValueError, match="segment 1 is not within"):
            draws(table_of([1, 2], [0, first], [0, start], [1, length]), WORDS, 0, False, out)
    table = table_of([1], [0], [0], [50])
    for sample in (-1, 1 << 32):
        with pytest.raises(ValueError, match="2\\^32"):
            draws(table, WORDS, sample, False, out)
    for wrong in (out.double(), torch.zeros(1, 100)[:, ::2]):
        with pytest.raises(ValueError, match="not rows of"):
            draws(table, WORDS, 0, False, wrong)
    with pytest.raises(ValueError, match="same strides"):
        FOUND[name].affine(table, WORDS, 0, False, out[0], out[0], out.clone(), torch.zeros(1, 60))
    with pytest.raises(ValueError, match="same size"):
        FOUND[name].affine(table, WORDS, 0, False, out[0, 1:], out[0], out.clone(), None)
    with pytest.raises(ValueError, match="one gradient"):
        FOUND[name].fold([], table, WORDS, 0, False, None, out[0], None)


# --- the distribution ----------------------------------------------------------------------------------------------


def normals_of(table, sample=0, count=1, prefix=99, step=0):
    out = torch.zeros(count, int(table[3].sum()))
    chosen().draw(table, torch.tensor([prefix, step]), sample, False, out)
    return out.double().numpy()


def test_moments_and_distribution():
    n = 1 << 20
    z = normals_of(table_of([0], [0], [0], [n]))[0]
    for power, moment in enumerate((0, 1, 0, 3, 0, 15), start=1):
        variance = {1: 1, 2: 2, 3: 15, 4: 96, 5: 945, 6: 10170}[power]
        assert abs((z**power).mean() - moment) < 4 * (variance / n) ** 0.5, power
    assert stats.kstest(z, "norm").pvalue > 1e-3
    for column in z.reshape(-1, 64)[:, ::9].T:  # each word of the generator by itself
        assert stats.kstest(column, "norm").pvalue > 1e-4


def test_samples_steps_tensors_and_neighbours_are_uncorrelated():
    n = 1 << 15
    one = [table_of([word], [0], [0], [n]) for word in range(4)]
    draws = [normals_of(one[0], 0, 6), *(normals_of(table, 0, 2) for table in one[1:])]
    draws += [normals_of(one[0], 0, 2, step=step) for step in (1, 2, 1 << 32)]
    draws += [normals_of(one[0], 0, 2, prefix=1 << 40)]
    z = np.concatenate(draws)
    for values in (z, np.abs(z) - (2 / np.pi) ** 0.5):
        correlation = values @ values.T / n
        bound = 5 * n**-0.5
        assert np.abs(correlation - np.diag(np.diag(correlation))).max() < bound
        for lag in (1, 2, 15, 16, 17, 32, 48, 63, 64):
            assert abs((values[0, lag:] * values[0, :-lag]).mean()) < bound, lag


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.fixture
def choice(monkeypatch):
    """Choose anew, with HPC_BNN_NOISE set."""

    def choose(name=None):
        chosen.cache_clear()
        monkeypatch.delenv("HPC_BNN_NOISE", raising=False)
        if name:
            monkeypatch.setenv("HPC_BNN_NOISE", name)
        return chosen()

    yield choose
    monkeypatch.undo()
    chosen.cache_clear()


@every
def test_pinned_answer(name):
    assert implementations._answer(FOUND[name]) == implementations.PINNED


def test_the_fastest_is_chosen_or_what_the_variable_names(choice, caplog):
    assert choice().name == next(iter(FOUND))
    assert chosen() is chosen()
    for name in FOUND:
        assert choice(name).name == name
    assert NATIVE == [] or caplog.text == ""
    for name, rule in (("fortran", "no such implementation"), *((n, "on this machine") for n in missing())):
        with pytest.raises(ConfigError, match=rule) as raised:
            choice(name)
        assert f"HPC_BNN_NOISE {name}" in str(raised.value) and "Set auto or" in str(raised.value)


def missing():
    return set(implementations.NAMES) - set(FOUND)


@every_native
@pytest.mark.parametrize("method", ["bits", "draw", "affine", "fold"])
def test_one_that_draws_other_numbers_is_not_used(name, method, choice, monkeypatch, caplog):
    right = getattr(NativeImplementation, method)

    def wrong(self, *arguments):
        right(self, *arguments)
        if self.name == name:
            changed = arguments[{"bits": 4, "draw": 4, "affine": 6, "fold": 6}[method]]
            changed.view(-1)[160] += 1

    monkeypatch.setattr(NativeImplementation, method, wrong)
    assert not passes(FOUND[name])
    with caplog.at_level(logging.WARNING):
        assert choice().name == next(other for other in FOUND if other != name or name != NATIVE[0])
        chosen()
    assert caplog.text.count(f"{name} does not draw the numbers that it must") == (name == NATIVE[0])
    with pytest.raises(ConfigError, match="does not draw the numbers"):
        choice(name)


def test_an_extension_of_another_version_is_not_used(choice, monkeypatch):
    def refuse(self, *arguments):
        raise TypeError("9 arguments instead of 8")

    monkeypatch.setattr(NativeImplementation, "draw", refuse)
    assert choice().name == "numpy"


def test_no_implementation_is_left(choice, monkeypatch):
    monkeypatch.setattr(implementations, "PINNED", "0")
    with pytest.raises(ConfigError, match="none draws"):
        choice()


def test_without_the_extension_numpy_draws_and_this_is_said_once(choice, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "hpc_bnn.noise._native", None)
    with caplog.at_level(logging.WARNING):
        assert choice().name == "numpy"
        chosen()
    assert caplog.text.count("NumPy draws it at about") == 1 and "make setup" in caplog.text
    caplog.clear()
    assert choice("numpy").name == "numpy"
    assert caplog.text == ""


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_the_package_is_built_without_a_compiler(tmp_path, compiler):
    for name in (
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "README.md",
        "hpc_bnn/__init__.py",
        "hpc_bnn/noise/native.c",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"CC": compiler}, capture_output=True, text=True, timeout=patience(60)
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("hpc_bnn/noise/*.so"))
