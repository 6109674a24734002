"""Tests that run under mpirun: every test on all ranks, with one verdict.

A failing test on one rank must neither hang the others nor go unseen: the verdicts of all ranks are
gathered after each test, and a rank that waits too long ends the job with a traceback of every rank.

The tests of a grid run one after another on one grid: to join it takes longer than many a test.

Jobs of several sizes and libraries can share the cases (TEST_SHARE=0/3, 1/3, 2/3): tests of communication run in each of
them on all grids, each case of another test in one job, chosen by its name, so that every test meets all sizes and
libraries; on 4 ranks it runs on 2 x 2, as jobs of 2 and 3 ranks have the grids of one axis. A job with TEST_SHARE=none runs
the tests of communication only, one without TEST_SHARE everything.
"""

import faulthandler
import os
import sys
import traceback
import zlib
from pathlib import Path

import pytest

from hpc_bnn import comm as comm_module

LIBRARY = os.environ.get("TEST_LIBRARY", "horovod")
"""What must carry the tensors."""
SHARE = os.environ.get("TEST_SHARE")
WITH_EACH = {"test_carriers.py", "test_collectives.py", "test_comm.py", "test_layout_law.py", "test_overlap.py"}
ON_ALL_GRIDS = WITH_EACH | {"test_missing.py", "test_predict.py"}
"""On 4 ranks; those with groups that have no target, no example or no sample only on the longest axis."""

if LIBRARY != "horovod":
    sys.modules["horovod"] = None  # as if it were not installed
comm_module.connect.__kwdefaults__["backend"] = LIBRARY
comm_module.world_size()  # starts MPI with the settings of hpc_bnn
from mpi4py import MPI  # noqa: E402

from hpc_bnn.comm.mpi import MpiObjects  # noqa: E402

WORLD = MPI.COMM_WORLD
TEST_SECONDS = float(os.environ.get("TEST_SECONDS", 300))
"""Limit of a test; test_mpi.py gives it, stretched by HPC_BNN_TEST_PATIENCE."""


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
        JOINED.clear()
        raise AssertionError(f"failed on ranks {failed}") from error
    return result


def pytest_generate_tests(metafunc):
    """Run a test that takes ``sample_size`` on every grid of this job."""
    if "sample_size" in metafunc.fixturenames:
        divisors = [size for size in range(1, WORLD.size + 1) if WORLD.size % size == 0]
        if SHARE and WORLD.size == 4 and metafunc.definition.path.name not in ON_ALL_GRIDS:
            divisors = [2]
        metafunc.parametrize("sample_size", divisors, ids=lambda s: f"{s}x{WORLD.size // s}")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """The tests of one grid together; those without a grid, which may join their own, first."""
    left_out = [item for item in items if not is_ours(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if item not in left_out), key=sample_size_of)


def sample_size_of(item):
    return item.callspec.params.get("sample_size", 0) if hasattr(item, "callspec") else 0


def is_ours(item):
    """Whether this job runs a case: on all of its grids or on none, as they are compared with one reference."""
    if item.path.name in WITH_EACH:
        return (item.path.name, LIBRARY) != ("test_overlap.py", "mpi")  # refused there: test_carriers.py
    if not SHARE or SHARE == "none":
        return not SHARE
    share, num_shares = map(int, SHARE.split("/"))
    size = sample_size_of(item)
    name = item.name.replace(f"{size}x{WORLD.size // size}", "") if size else item.name
    return zlib.crc32(name.encode()) % num_shares == share


JOINED = {}
"""The grid that stands: its sample_size -> the grid, and how many had been joined then."""
num_joined = 0
join = MpiObjects.__init__


def count_and_join(self, *arguments, **options):
    global num_joined
    num_joined += 1
    join(self, *arguments, **options)


MpiObjects.__init__ = count_and_join  # whoever calls connect(): a former grid is then of no use


@pytest.fixture
def comm(sample_size):
    """The process grid of this test: that of the test before, if it is the same and nobody joined another."""
    grid, when = JOINED.get(sample_size, (None, None))
    if grid is None or when != num_joined:
        grid = comm_module.connect(sample_size, device="cpu")
        JOINED.clear()
        JOINED[sample_size] = grid, num_joined
    return grid


@pytest.fixture(scope="session")
def world():
    return WORLD


@pytest.fixture
def former_noise(monkeypatch):
    """As in tests/conftest.py."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from former_noise import patches

    for of, name, value in patches():
        monkeypatch.setattr(of, name, value)


@pytest.fixture
def directory(comm, tmp_path_factory):
    """Return a new directory, the same on all ranks."""
    return Path(comm.broadcast_object(str(tmp_path_factory.mktemp("run")) if comm.grid.rank == 0 else None))
