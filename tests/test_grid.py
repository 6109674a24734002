"""Rank arithmetic, for as many ranks as one likes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_bnn.errors import ConfigError
from hpc_bnn.grid import Grid, share

sizes = st.integers(1, 40)


@given(count=st.integers(0, 10**6), parts=st.integers(1, 1000))
def test_shares_partition_the_items_evenly(count, parts):
    shares = [share(count, parts, part) for part in range(parts)]
    assert shares[0].start == 0 and shares[-1].stop == count
    assert all(a.stop == b.start for a, b in itertools.pairwise(shares))
    lengths = [len(s) for s in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_sixteen_samples_on_three_ranks():
    grids = [Grid(world_size=3, sample_size=3, rank=rank) for rank in range(3)]
    assert [len(grid.local_samples(16)) for grid in grids] == [6, 5, 5]


@given(sample_size=sizes, data_size=sizes)
def test_coordinates_are_a_bijection_and_groups_partition_the_world(sample_size, data_size):
    world = sample_size * data_size
    grids = [Grid(world, sample_size, rank) for rank in range(world)]
    assert {(g.sample_index, g.data_index) for g in grids} == {
        (s, d) for s in range(sample_size) for d in range(data_size)
    }
    assert all(g.sample_size * g.data_size == world for g in grids)
    sample_groups = [grids[0].sample_group(d) for d in range(data_size)]
    data_groups = [grids[0].data_group(s) for s in range(sample_size)]
    assert sorted(r for group in sample_groups for r in group) == list(range(world))
    assert sorted(r for group in data_groups for r in group) == list(range(world))
    for axis, size in grids[0].extents.items():
        assert sum(g.is_first(axis) for g in grids) == world // size
    for g in grids:
        assert g.rank in g.sample_group() and g.rank in g.data_group()
        assert set(g.sample_group()) & set(g.data_group()) == {g.rank}
        assert all(grids[r].data_index == g.data_index for r in g.sample_group())
        assert all(grids[r].sample_index == g.sample_index for r in g.data_group())
        assert all(grids[group[0]].is_first(axis) for axis, group in g.groups.items())
        assert g.rank or all(
            [i for r in group for i in grids[r].share(7, axis)] == list(range(7)) for axis, group in g.groups.items()
        )


@given(sample_size=sizes, data_size=sizes, num_samples=st.integers(0, 500), batch_size=st.integers(0, 500))
def test_every_sample_meets_every_example_once(sample_size, data_size, num_samples, batch_size):
    world = sample_size * data_size
    met = 0
    for rank in range(world):
        grid = Grid(world, sample_size, rank)
        part = grid.local_examples(batch_size)
        met += len(grid.local_samples(num_samples)) * (part.stop - part.start)
    assert met == num_samples * batch_size
    first_row = [Grid(world, sample_size, rank).local_samples(num_samples) for rank in range(sample_size)]
    assert [s for samples in first_row for s in samples] == list(range(num_samples))


def test_large_world_costs_nothing():
    grid = Grid(world_size=100_000, sample_size=250, rank=99_999)
    assert (grid.sample_index, grid.data_index) == (249, 399)
    assert grid.sample_group() == range(99_750, 100_000)
    assert len(grid.data_group()) == 400


def test_sample_index_varies_fastest():
    assert [Grid(6, 3, rank).sample_index for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [Grid(6, 3, rank).data_index for rank in range(6)] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("sample_size", [0, -1, 3, 8])
def test_wrong_extent_is_named_with_its_remedy(sample_size):
    with pytest.raises(ConfigError) as caught:
        Grid(4, sample_size, 0)
    text = str(caught.value)
    assert text.startswith(f"sample_size {sample_size}") and "has 4" in text and "1, 2, 4" in text


def test_too_few_samples_for_the_axis():
    with pytest.raises(ConfigError, match=r"^num_samples 3.*4 ranks.*Use num_samples 4 or a smaller sample_size"):
        Grid(4, 4, 0).check_num_samples(3)
    Grid(4, 4, 0).check_num_samples(4)
