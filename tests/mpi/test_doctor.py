"""The self-test and the measurements of `hpc-bnn doctor` through the collectives of training."""

import pytest

from hpc_bnn.comm import timing as network
from hpc_bnn.doctor import examination as doctor
from hpc_bnn.doctor.examination import AXES, measure, self_test


def test_sums_of_a_sound_grid_are_right(comm):
    assert self_test(comm) == {}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("axis", AXES)
def test_a_sum_that_lacks_a_rank_is_seen(comm, axis, which, monkeypatch):
    extent = {"sample": comm.grid.sample_size, "data": comm.grid.data_size, "world": comm.grid.world_size}[axis]
    sum_, last = comm.sum_, comm.grid.world_size - 1

    def forgetful(tensors, over):
        if over == axis and comm.grid.rank == last:
            tensors[which].zero_()
        sum_(tensors, over)

    monkeypatch.setattr(comm, "sum_", forgetful)
    groups = {"sample": comm.grid.sample_group(), "data": comm.grid.data_group()}
    wrong = self_test(comm)
    assert set(wrong) == ({axis} if last in groups.get(axis, [last]) else set())
    if wrong:
        assert f"rank {comm.grid.rank} on " in wrong[axis] and f", {extent}]" in wrong[axis]


def test_all_ranks_measure_the_same(comm, monkeypatch):
    monkeypatch.setattr(doctor, "LARGE_BYTES", 2**16)
    monkeypatch.setattr(network, "MAX_REPETITIONS", 5)
    for axis, extent in zip(AXES, (comm.grid.sample_size, comm.grid.data_size, comm.grid.world_size)):
        measured = measure(comm, axis)
        assert (measured is None) == (extent == 1)
        assert all(0 < seconds < 10 for seconds in measured or ())
        assert comm.gather_objects(measured) == [measured] * comm.grid.world_size
