"""Keyed generators."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_bnn.noise import Key, Stream, derive_seed


def draw(seed, stream, step, sample, n=100):
    return torch.randn(n, generator=Key(seed, stream, step=step, sample=sample).generator())


def test_a_key_always_gives_the_same_numbers_whatever_was_drawn_before():
    first = draw(3, Stream.NOISE, 17, 5)
    draw(4, Stream.NOISE, 1, 1)
    torch.randn(7)
    assert torch.equal(first, draw(3, Stream.NOISE, 17, 5))


def test_each_part_of_the_key_matters():
    keys = [(0, Stream.NOISE, 0, 0), (1, Stream.NOISE, 0, 0), (0, Stream.INIT, 0, 0), (0, Stream.NOISE, 1, 0)]
    keys += [(0, Stream.NOISE, 0, 1), (0, Stream.NOISE, 1 << 32, 0), (1 << 32, Stream.NOISE, 0, 0)]
    for a, b in itertools.combinations(keys, 2):
        assert not torch.equal(draw(*a), draw(*b)), (a, b)


@given(seed=st.integers(0, 2**63), step=st.integers(0, 10**7))
def test_samples_of_a_step_never_share_a_seed(seed, step):
    seeds = [derive_seed(seed, Stream.NOISE, step, sample) for sample in range(512)]
    assert len(set(seeds)) == 512
    assert all(0 <= s < 2**32 for s in seeds)


def test_steps_and_samples_rarely_collide():
    """40,000 keys in 2^32 places: 0.19 collisions expected, P(more than 3) < 1e-4."""
    seeds = {derive_seed(0, Stream.NOISE, step, sample) for step in range(2500) for sample in range(16)}
    assert len(seeds) >= 40_000 - 3


def test_neighbouring_keys_are_uncorrelated():
    n = 20_000
    draws = torch.stack([draw(0, Stream.NOISE, step, s, n=n) for step in range(4) for s in range(4)])
    correlation = draws @ draws.T / n - torch.eye(16)
    assert correlation.abs().max() < 6 * n**-0.5 * 2**0.5  # six standard errors (diagonal: sqrt(2)/sqrt(n))


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_keys_on_a_gpu():
    a = torch.randn(10, device="cuda", generator=Key(0, Stream.NOISE).generator("cuda"))
    b = torch.randn(10, device="cuda", generator=Key(0, Stream.NOISE, sample=1).generator("cuda"))
    assert not torch.equal(a, b)
