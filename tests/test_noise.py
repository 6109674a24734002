"""Keys, and the numbers that belong to them. The bits are in test_noise_bits.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hpc_bnn import MeanFieldGaussian
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Clock, Key, Stream, operators
from hpc_bnn.noise.keys import derive_seed
from hpc_bnn.noise.philox import mix64, philox4x32
from hpc_bnn.posteriors.draws import KeptDraw, RedrawnDraw
from hpc_bnn.posteriors.gradients import ListGradient, SlotViews
from hpc_bnn.posteriors.layout import FlatLayout


def draw(seed, stream, step, sample, n=100, path=()):
    return Key(seed, stream, path, step, sample).normal(n)


def test_a_key_always_gives_the_same_numbers_whatever_was_drawn_before():
    first = draw(3, Stream.NOISE, 17, 5)
    draw(4, Stream.NOISE, 1, 1)
    torch.randn(7)
    assert torch.equal(first, draw(3, Stream.NOISE, 17, 5))


def test_each_part_of_the_key_matters():
    keys = [(0, Stream.NOISE, 0, 0), (1, Stream.NOISE, 0, 0), (0, Stream.INIT, 0, 0), (0, Stream.NOISE, 1, 0)]
    keys += [(0, Stream.NOISE, 0, 1), (0, Stream.NOISE, 1 << 32, 0), (1 << 32, Stream.NOISE, 0, 0)]
    draws = [draw(*key) for key in keys]
    draws += [draw(0, Stream.NOISE, 0, 0, path=path) for path in ((0,), (1,), (0, 0), (0, 1), (1, 0))]
    for a, b in itertools.combinations(draws, 2):
        assert not np.intersect1d(a.numpy(), b.numpy()).size > 2  # float32 numbers may coincide


@given(
    seed=st.integers(0, 2**63), path=st.lists(st.integers(0, 2**40), max_size=3), step=st.integers(0, 2**40),
    sample=st.integers(0, 2**32 - 1), first=st.integers(0, 2**34 - 200),
)  # fmt: skip
def test_the_bits_are_those_of_the_definition(seed, path, step, sample, first):
    """k = mix64(seed), mix64(k ^ word) for each word; counter (c, sample, step); number n is word n % 64 // 16 of its c."""
    k = mix64(seed)
    for word in (Stream.MASK, len(path), *path):
        k = mix64(k ^ word)
    got = Key(seed, Stream.MASK, tuple(path), step, sample).bits(80, first=first)
    for n in (first, first + 17, first + 79):
        words = philox4x32(16 * (n // 64) + n % 16, sample, step & 0xFFFFFFFF, step >> 32, k & 0xFFFFFFFF, k >> 32)
        assert got[n - first].item() & 0xFFFFFFFF == int(words[n % 64 // 16])


def test_neighbouring_keys_are_uncorrelated():
    n = 20_000
    draws = torch.stack([draw(0, Stream.NOISE, step, s, n=n) for step in range(4) for s in range(4)])
    correlation = draws @ draws.T / n - torch.eye(16)
    assert correlation.abs().max() < 6 * n**-0.5 * 2**0.5  # six standard errors (diagonal: sqrt(2)/sqrt(n))


# --- the noise of a weight -----------------------------------------------------------------------------


def test_the_noise_of_a_weight_depends_on_its_place_in_the_module_alone():
    """Not on the layout of memory, on which other weights are random, or on blocks."""
    key, noise = Key(5, Stream.NOISE, step=9, sample=3), {}
    for deterministic in ((), ("0.weight",), ("0.*", "1.bias")):
        net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 16), nn.Linear(16, 2))
        posterior = MeanFieldGaussian(net, deterministic=deterministic)
        posterior.begin_()
        posterior.draw_(key)
        views = posterior.random.views(posterior.sampler._draw.noise[0])
        for name, eps in views.items():
            number = [n for n, _ in net.named_parameters()].index(name)
            assert torch.equal(eps.flatten(), key.child(number).normal(eps.numel()))
            assert torch.equal(noise.setdefault(name, eps.clone()), eps)
    layout = posterior.random
    block = layout.block(1, 3)
    whole = KeptDraw(layout, torch.empty(0))
    for kind in (KeptDraw, RedrawnDraw):
        part = kind(layout, torch.empty(0))
        part.begin_(key, [3])
        whole.begin_(key, [3])
        assert torch.equal(part.cut(block).noise, whole.noise[:, block.span])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_and_redrawn_noise_give_the_same_numbers(dtype):
    layout = FlatLayout({"a": torch.Size([3, 7]), "b": torch.Size([5]), "c": torch.Size([4, 16])})
    like = torch.zeros(layout.num_elements, dtype=dtype)
    loc, scale = torch.linspace(-1, 1, len(like), dtype=dtype), torch.linspace(0.1, 2, len(like), dtype=dtype)
    gradients = [torch.linspace(-3, 3, shape.numel(), dtype=dtype).view(shape) for shape in layout.shapes.values()]
    gradients[1] = None  # a forward may leave weights out
    ends = []
    for kind in (KeptDraw, RedrawnDraw):
        draw = kind(layout, like, True)
        draw.begin_(Key(0, Stream.NOISE), range(2, 5))
        out = torch.empty(3, len(like), dtype=dtype)
        draw.affine_(loc, scale, out)
        assert torch.equal(draw.noise[1], -draw.noise[0]) and not torch.equal(draw.noise[2].abs(), draw.noise[0].abs())
        assert torch.equal(out, loc + scale * draw.noise)
        draw.begin_(Key(0, Stream.NOISE), [3])
        total, product = torch.ones_like(like), torch.ones_like(like)
        draw.fold_(ListGradient(gradients, SlotViews(layout)), total, product)
        shapes = layout.shapes.values()
        flat = torch.cat([like.new_zeros(s.numel()) if g is None else g.flatten() for g, s in zip(gradients, shapes)])
        torch.testing.assert_close(total, 1 + flat)
        torch.testing.assert_close(product, 1 + flat * draw.noise[0])
        ends.append((out, total, product))
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("kind", [KeptDraw, RedrawnDraw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_family_may_pass_what_broadcasts_and_ask_twice(kind, dtype):
    layout = FlatLayout({"a": torch.Size([3, 7])})
    draw = kind(layout, torch.zeros(21, dtype=dtype))
    draw.begin_(Key(0, Stream.NOISE), range(4, 6))
    loc, rows, out = (
        torch.linspace(-1, 1, 21, dtype=dtype),
        torch.ones(2, 21, dtype=dtype),
        torch.empty(2, 21, dtype=dtype),
    )
    half = torch.tensor(0.5, dtype=dtype)
    for centre, scale in (
        (loc, half.expand(21)),
        (loc, half),
        (rows, half),
        (loc, loc.exp()),
        (rows, rows),
        (loc, loc.exp()),
    ):
        draw.affine_(centre, scale, out)
        assert torch.equal(out, torch.mul(scale, draw.noise).add_(centre))
    chains = rows.clone()
    draw.affine_(chains, half, chains)  # in place, as chains do
    assert torch.equal(chains, 0.5 * draw.noise + 1)


def test_antithetic_pairs_are_mirrors_however_they_are_met():
    layout, like = FlatLayout({"a": torch.Size([70])}), torch.empty(0)
    draw, key = KeptDraw(layout, like, True), Key(0, Stream.NOISE)
    expected = {s: (1 - 2 * (s % 2)) * key.child(0).of(s & ~1).normal(70) for s in range(6)}
    for sample in (0, 1, 3, 2, 3, 3, 5, 4):
        draw.begin_(key, [sample])
        out = torch.empty(1, 70)
        draw.affine_(torch.zeros(70), torch.ones(70), out)
        assert torch.equal(out[0], expected[sample]) and torch.equal(draw.noise[0], expected[sample]), sample
    draw.begin_(Key(0, Stream.NOISE, step=1), [5])  # not the mirror of sample 4 of another step
    assert not torch.equal(draw.noise[0], expected[5])


def test_a_fold_checks_what_it_reads_and_writes():
    table, tiles = FlatLayout({"a": torch.Size([10])}).segments.on(torch.device("cpu"))
    words = Key(0, Stream.NOISE).words_of_tensors()
    for size, of_product in ((5, 10), (10, 9), (11, 11)):
        with pytest.raises((ValueError, RuntimeError)):
            operators.fold(table, tiles, words, 0, False, [torch.ones(size)], None, torch.zeros(of_product), None)


def test_masks_compare_integers():
    """p = 2^-32 drops one word of 2^32; a float would round it."""
    from hpc_bnn.posteriors.dropout_layers import DropoutMasks

    bits = {}

    class Words(Key):
        def child(self, *path):
            return self

        def bits_of_samples(self, num_samples, count, device="cpu"):
            return torch.tensor([[0, 1, -1, -(2**31)]], dtype=torch.int32)

    for p in (2**-32, 1.5 * 2**-32, 0.5, 1 - 2**-33, 1.0):
        mask = DropoutMasks(nn.Dropout(p))._mask(Words(0, Stream.NOISE), 0, p, torch.empty(1, 4), False)
        bits[p] = (mask[0] == 0).tolist()
        words = [0, 1, 2**32 - 1, 2**31]
        assert bits[p] == [word < math.ceil(p * 2**32) for word in words], p


# --- operators -----------------------------------------------------------------------------------------


def test_operators_do_nothing_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        numbers = Key(0, Stream.NOISE).normal(100)
        layout = FlatLayout({"a": torch.Size([3, 7])})
        draw = RedrawnDraw(layout, torch.empty(21))
        draw.begin_(Key(0, Stream.NOISE), [0])
        draw.affine_(torch.zeros(21), torch.ones(21), torch.empty(1, 21))
    assert numbers.shape == (100,) and type(numbers).__name__ == "FakeTensor"


def test_operators_are_those_of_torch():
    table, tiles = FlatLayout({"a": torch.Size([70])}).segments.on(torch.device("cpu"))
    out, loc, scale = torch.empty(2, 70), torch.ones(70), torch.full((70,), 0.5)
    words = Key(0, Stream.NOISE).words_of_tensors()
    torch.ops.hpc_bnn.affine(table, tiles, words, 0, False, loc, scale, out, None)
    assert torch.equal(out[1], 1 + 0.5 * Key(0, Stream.NOISE, (0,), sample=1).normal(70))
    for operator, more in ((operators.draw, (out,)), (operators.affine, (loc, scale, out, None))):
        torch.library.opcheck(
            operator, (table, tiles, words, 0, False, *more), test_utils=("test_schema", "test_faketensor")
        )


# --- what torch itself draws: initial weights -----------------------------------------------------------


def test_seeds_are_whole_numbers_of_any_type_and_of_64_bits():
    for same in (np.int64(12), np.uint64(12), 12):
        assert torch.equal(draw(same, Stream.MASK, 0, 0), draw(12, Stream.MASK, 0, 0))
        assert derive_seed(same, Stream.MASK) == derive_seed(12, Stream.MASK)
    for seed in (0.5, None, "a", 2**64):
        for use in (lambda seed: draw(seed, Stream.MASK, 0, 0), lambda seed: Key(seed, Stream.INIT).generator()):
            with pytest.raises(ConfigError, match=r"seed .*whole number"):
                use(seed)


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**7))
def test_samples_of_a_step_never_share_a_seed_of_torch(seed, step):
    seeds = [derive_seed(seed, Stream.NOISE, step, sample) for sample in range(512)]
    assert len(set(seeds)) == 512
    assert all(0 <= s < 2**32 for s in seeds)


def test_foreign_code_is_keyed_and_the_global_generator_put_back():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    with Key(0, Stream.INIT).global_generator():
        inside = torch.nn.Linear(2, 2).weight.detach().clone()
    assert torch.equal(torch.randn(3), expected)
    with Key(0, Stream.INIT).global_generator():
        assert torch.equal(torch.nn.Linear(2, 2).weight, inside)
    with Key(1, Stream.INIT).global_generator():
        assert not torch.equal(torch.nn.Linear(2, 2).weight, inside)


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_clock_gives_step_and_sample(antithetic):
    """What was captured draws any step and sample: weights, masks, numbers of rows and of a path, folded gradients."""

    def drawn(key, samples, clock=None):
        layout = FlatLayout({"a": torch.Size([5, 16]), "b": torch.Size([7])})
        places, found = torch.arange(3, 6), []
        for kind in (KeptDraw, RedrawnDraw):
            draw = kind(layout, torch.zeros(87), antithetic)
            for some in samples:
                draw.begin_(key, some)
                out, total, product = torch.zeros(len(some), 87), torch.zeros(87), torch.zeros(87)
                draw.affine_(torch.ones(87), torch.full((87,), 0.5), out)
                if len(some) == 1:
                    gradient = ListGradient([torch.ones(5, 16), torch.ones(7)], SlotViews(layout))
                    draw.fold_(gradient, total, product)
                found += [out, total, product, draw.normal((2,), 70)]
        for some in samples:
            of_sample = key.of(some[0]).child(Stream.MASK, 4)
            found += [of_sample.bits(70), of_sample.normal(5, rows=places, first=3), of_sample.normal(9)]
        return found

    clock = Clock("cpu")
    named = Key(11, Stream.NOISE, clock=clock)
    for step, first in ((0, 0), (2**33 + 5, 3), (7, 2**31 + 1)):
        clock.now.copy_(torch.tensor([step, first]))
        got = drawn(named, [[0], [1], [0, 1, 2]])
        want = drawn(Key(11, Stream.NOISE, step=step), [[first], [first + 1], [first, first + 1, first + 2]])
        assert all(map(torch.equal, got, want))
