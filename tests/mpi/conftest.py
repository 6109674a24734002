"""Tests that run under mpirun: every test on all ranks, with one verdict.

A failing test on one rank must neither hang the others nor go unseen: the verdicts of all ranks are
gathered after each test, and a rank that waits too long ends the job with a traceback of every rank.
"""

import faulthandler
import os
import sys
import traceback

import pytest

from hpc_bnn import comm as comm_module

LIBRARY = os.environ.get("TEST_LIBRARY", "horovod")
"""What must carry the tensors: the same tests run on each."""

if LIBRARY != "horovod":
    sys.modules["horovod"] = None  # as if it were not installed: every connect() finds another
comm_module.world_size()  # starts MPI with the settings of hpc_bnn
from mpi4py import MPI  # noqa: E402

WORLD = MPI.COMM_WORLD
TEST_SECONDS = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    faulthandler.dump_traceback_later(TEST_SECONDS, exit=True)
    error = result = None
    try:
        result = yield
    except pytest.skip.Exception:
        raise
    except Exception as caught:
        error = caught
        print(f"rank {WORLD.rank}, {item.name}:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
    verdicts = WORLD.allgather(None if error is None else repr(error))
    faulthandler.cancel_dump_traceback_later()
    failed = {rank: verdict for rank, verdict in enumerate(verdicts) if verdict}
    if failed:
        raise AssertionError(f"failed on ranks {failed}") from error
    return result


def pytest_generate_tests(metafunc):
    """Run a test that takes ``sample_size`` on every grid of this job."""
    if "sample_size" in metafunc.fixturenames:
        divisors = [size for size in range(1, WORLD.size + 1) if WORLD.size % size == 0]
        metafunc.parametrize("sample_size", divisors, ids=lambda s: f"{s}x{WORLD.size // s}")


@pytest.fixture
def comm(sample_size):
    """The process grid of this test."""
    return comm_module.connect(sample_size, device="cpu")


@pytest.fixture(scope="session")
def world():
    return WORLD
