"""What comm does in one process and what it decides without communicating."""

import subprocess
import sys

import pytest
import torch
from conftest import JOB_SECONDS, patience

from hpc_bnn import Grid, GridComm
from hpc_bnn.comm import choose_device, mpi, mpi_tensors, packing
from hpc_bnn.comm.horovod import why_not_grid
from hpc_bnn.comm.launcher import without_launcher
from hpc_bnn.comm.packing import packed_buckets
from hpc_bnn.errors import ConfigError, DataError, RankError


def test_one_process_is_the_identity_and_costs_nothing():
    alone = GridComm(Grid())
    x = torch.arange(4.0)
    for axis in ("sample", "data", "world"):
        alone.sum_(x, axis)
        alone.max_([x], axis)
    alone.broadcast_(x)
    assert x.tolist() == [0, 1, 2, 3]
    assert alone.gather_objects("a") == ["a"] and alone.broadcast_object(5) == 5
    alone.check_replicas([x], "x")
    assert alone.traffic.num_collectives == 0


def test_agree_in_one_process_says_what_was_done():
    alone = GridComm(Grid())
    with pytest.raises(DataError, match="reading shards: gone"), alone.agree("reading shards"):
        raise DataError("gone")
    with pytest.raises(RankError, match="opening: OSError: disk full"), alone.agree("opening"):
        raise OSError("disk full")


@pytest.mark.parametrize(
    ("world_size", "sample_size", "count"),
    [(16384, 8, 2056), (4096, 2, 2050), (16384, 16, None), (8192, 1, None), (8192, 8192, None)],
)
def test_horovod_is_refused_where_mpich_has_too_few_communicators(world_size, sample_size, count):
    """A set for each group that is neither one rank nor the world."""
    grid = Grid(world_size, sample_size)
    assert why_not_grid(grid, "Open MPI 5.0.11") is None
    for library in ("MPICH 5.0.2", "CRAY MPICH version 8.1.29"):
        found = why_not_grid(grid, library)
        assert found is None if count is None else f"{count} process sets, and with {library}" in found


@pytest.mark.parametrize(
    "requested, local_rank, num_visible, expected",
    [
        ("auto", 0, 0, "cpu"),
        ("cpu", 3, 4, "cpu"),
        ("auto", 3, 4, "cuda:3"),
        ("cuda", 2, 4, "cuda:2"),
        ("cuda", 3, 1, "cuda:0"),  # the launcher shows each rank its own GPU only
        ("cuda:1", 0, 4, "cuda:1"),
    ],
)
def test_one_gpu_per_rank_of_a_node(requested, local_rank, num_visible, expected):
    assert choose_device(requested, local_rank, num_visible) == torch.device(expected)


@pytest.mark.parametrize("requested", ["gpu", "cuda:x", "cpu:0", "", "cuda", "cuda:0"])
def test_devices_that_are_not_there(requested):
    with pytest.raises(ConfigError, match=f"^device {requested}"):
        choose_device(requested, 0, 0)


def test_packing_uses_few_buffers_and_copies_back():
    a, b, c = torch.ones(3, 2), torch.full((4,), 2.0), torch.full((2,), 3.0, dtype=torch.float64)
    d = torch.ones(2, 3).T  # not contiguous
    half = torch.ones(5, dtype=torch.bfloat16)
    count = torch.tensor(7)
    with packed_buckets([a, c, b, count, d, half]) as buckets:
        assert sorted((str(x.dtype), x.numel()) for x in buckets) == [
            ("torch.float32", 6 + 4 + 6 + 5), ("torch.float64", 2), ("torch.int64", 1)
        ]  # fmt: skip
        for bucket in buckets:
            bucket.mul_(2)
    assert a.eq(2).all() and b.eq(4).all() and c.eq(6).all() and d.eq(2).all() and half.eq(2).all()
    assert count.item() == 14 and half.dtype == torch.bfloat16


def test_one_flat_tensor_is_not_copied(monkeypatch):
    x = torch.arange(100.0)
    with packed_buckets(x) as buckets:
        assert [b.data_ptr() for b in buckets] == [x.data_ptr()]
    monkeypatch.setattr(packing, "BUCKET_BYTES", 160)
    with packed_buckets([x, torch.ones(10)]) as buckets:
        assert [b.numel() for b in buckets] == [40, 40, 30]  # two views of x; its rest with the small one


def test_no_module_starts_mpi_or_horovod_at_import():
    code = (
        "import sys, pkgutil, importlib.util, hpc_bnn\n"
        "for m in pkgutil.walk_packages(hpc_bnn.__path__, 'hpc_bnn.'):\n"
        "    if importlib.util.find_spec('triton') or not m.name.endswith('triton_kernels'):\n"
        "        importlib.import_module(m.name)\n"
        "assert not [m for m in sys.modules if m in ('mpi4py.MPI', 'horovod')], 'started'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=patience(JOB_SECONDS))


@pytest.mark.parametrize(
    ("probe", "reads"), [("pass", True), ("import os; os.kill(os.getpid(), 11)", False), ("x", False)]
)
def test_an_mpi_that_cannot_read_the_memory_of_gpus_takes_no_rank_with_it(monkeypatch, probe, reads):
    """The trial is a process of its own, and no rank of this job; here it ends well, by a segmentation fault, by an error."""
    alone = "import os, sys; assert not [n for n in os.environ if n.startswith(('OMPI_COMM_', 'PMIX_', 'SLURM_'))]; "
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setattr(mpi_tensors, "PROBE", alone + "assert sys.argv[1] == 'cuda:3'; " + probe)
    assert mpi_tensors.reads_gpus.__wrapped__(torch.device("cuda:3")) == reads


def test_the_trial_of_an_mpi_moves_numbers():
    """Between host memories, where every MPI can."""
    assert mpi_tensors.reads_gpus.__wrapped__(torch.device("cpu"))


def test_a_process_that_is_no_rank_keeps_the_settings_of_the_user():
    ranks = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "OMPI_MCA_ess", "PALS_RANKID")
    users = ("PATH", "OMPI_MCA_pml", "OMPI_ALLOW_RUN_AS_ROOT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    assert set(without_launcher(dict.fromkeys((*ranks, *users), "1"))) == set(users)


@pytest.mark.parametrize(("num_cores", "yields", "sleeps"), [(8, None, None), (4, "1", None), (2, "1", "nanosleep")])
def test_ranks_that_share_cores_wait_asleep(monkeypatch, num_cores, yields, sleeps):
    """Four ranks; what a user has set stays."""
    ways = ("OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_threads_pthreads_yield_strategy")
    ranks = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    monkeypatch.setattr("os.cpu_count", lambda: num_cores)
    for users in ({}, dict.fromkeys(ways, "as told")):
        monkeypatch.setattr("os.environ", ranks | users)
        mpi._be_gentle_when_oversubscribed()
        assert [mpi.os.environ.get(way) for way in ways] == (list(users.values()) or [yields, sleeps])


def test_foreign_launcher_is_recognised():
    code = "from hpc_bnn import connect; connect()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**_plain_environment(), "PMI_SIZE": "4", "PMI_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=patience(JOB_SECONDS),
    )
    assert done.returncode == 1
    assert "started 4 ranks" in done.stderr and "another MPI" in done.stderr


def _plain_environment():
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
