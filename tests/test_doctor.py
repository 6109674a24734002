"""`hpc-bnn doctor`: its rules on clusters that are not here, and the whole of it on real ranks."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from string import Formatter

import pytest
from conftest import JOB_SECONDS, REPOSITORY, launch_environment, patience, python
from hypothesis import given
from hypothesis import strategies as st

from hpc_bnn.comm import DistributedFacts
from hpc_bnn.comm.devices import free_memory_bytes, memory_limits
from hpc_bnn.comm.installed import HorovodFacts, MpiFacts, library_name, mpi_libraries
from hpc_bnn.comm.launcher import Launcher, launcher_of
from hpc_bnn.comm.timing import Network, read_network
from hpc_bnn.doctor.backend_choice import carrier_of
from hpc_bnn.doctor.examination import default_sample_size
from hpc_bnn.doctor.facts import VARIABLES, Gpu, Hdf5Facts, RankFacts
from hpc_bnn.doctor.problems import KINDS, Problem, has_errors
from hpc_bnn.doctor.rules import RULES, diagnose
from hpc_bnn.doctor.summarise import ranges

QUIET = {"HDF5_USE_FILE_LOCKING": "FALSE", "OMPI_MCA_mpi_yield_when_idle": "1", "HOROVOD_CYCLE_TIME": "1"}
HOROVOD = HorovodFacts(version="0.28.1", mpi=True, nccl=True, process_sets=True)
WITHOUT_NCCL = replace(HOROVOD, nccl=False)
GONE = HorovodFacts("gone", is_installed=False)


def cluster(num_nodes=2, per_node=4, gpus=4, cpus_per_rank=8, **changes):
    """Ranks bound to CPUs and GPUs of their own; ``changes`` are of all ranks."""
    ranks = []
    for rank in range(num_nodes * per_node):
        node, local = divmod(rank, per_node)
        size = num_nodes * per_node
        facts = RankFacts(
            rank=rank,
            host=f"n{node}",
            versions={"torch": "2.13.0", "python": "3.11.7"},
            launcher=Launcher("srun", size, rank, per_node, {"SLURM_STEP_NUM_TASKS": str(size)}),
            mpi=MpiFacts(None, "Open MPI v5.0.11", "3.1", "multiple", size),
            mpi_libraries=("/opt/mpi/lib/libmpi.so.40",),
            horovod=HOROVOD,
            distributed=DistributedFacts(nccl="2.27.3"),
            cpus=tuple(range(local * cpus_per_rank, (local + 1) * cpus_per_rank)),
            node_cpus=per_node * cpus_per_rank,
            torch_threads=cpus_per_rank,
            gpus=tuple(Gpu(f"GPU-{node}-{i}", "A100", 40 * 2**30, f"0000:0{i}:00") for i in range(gpus)),
            gpu=local if local < gpus else None,
            node_gpus=gpus,
            accelerator="CUDA 12.8",
            environment=QUIET,
        )
        ranks.append(replace(facts, **changes))
    return ranks


def change(ranks, which, **changes):
    return [replace(r, **changes) if r.rank in which else r for r in ranks]


def problems_of(ranks, backend="auto"):
    return diagnose(ranks, carrier_of(ranks, backend))


def codes(ranks, backend="auto"):
    return [problem.code for problem in problems_of(ranks, backend)]


def under_torchrun(*shape, **changes):
    ranks = cluster(*shape, mpi=None, horovod=None, has_runner=False, **changes)
    launcher = {"name": "torchrun", "variables": {"WORLD_SIZE": str(len(ranks))}}
    return [replace(r, launcher=replace(r.launcher, **launcher)) for r in ranks]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 4), (16, 8, 8), (3, 2, 0)])
def test_sound_clusters_have_no_problem(shape):
    ranks = cluster(*shape, node_gpus=shape[2])
    assert [problems_of(ranks, backend) for backend in ("auto", "horovod", "torch")] == [[], [], []]
    assert problems_of(under_torchrun(*shape, node_gpus=shape[2])) == []


SOUND = cluster()
MIG = [Gpu(f"MIG-{i}", "A100 MIG 1g.5gb", 5 * 2**30, "0000:01:00") for i in range(2)]
CASES = {
    "mixed_mpi": (change(SOUND, [5], mpi_libraries=("/a/libmpi.so.40", "/b/libmpi.so.12")), "rank 5 (n1)"),
    "foreign_launcher": (cluster(1, 1, 1, mpi=MpiFacts(library="MPICH 5.0.2"), launcher=Launcher("srun", 8)), "8 ranks"),
    "mpi_missing": (cluster(1, 1, 1, mpi=MpiFacts("ImportError: no"), launcher=Launcher("srun", 2)), "ImportError: no"),
    "horovod_missing": (change(SOUND, [0, 1], horovod=GONE), "ranks 0-1 (n0)", "horovod"),
    "horovod_broken": (change(SOUND, [7], horovod=HorovodFacts("undefined symbol")), "undefined symbol", "horovod"),
    "horovod_without_mpi": (cluster(horovod=replace(HOROVOD, mpi=False)), "ranks 0-7 (n0, n1)", "horovod"),
    "horovod_without_process_sets": (cluster(horovod=replace(HOROVOD, process_sets=False)), "0.28.1", "horovod"),
    "mpi_under_torchrun": (under_torchrun(), "WORLD_SIZE=8", "horovod"),
    "distributed_missing": (cluster(distributed=DistributedFacts(gloo=False)), "without Gloo", "torch"),
    "horovod_unusable": (change(SOUND, [3], horovod=WITHOUT_NCCL), "Horovod 0.28.1: it was built without NCCL, on rank 3"),
    "second_mpi": (change(SOUND, [5], mpi_libraries=("/a/libmpi.so.40", "/b/libmpi.so.12")), "rank 5 (n1)", "torch"),
    "no_mpi": (cluster(1, 1, 1, mpi=MpiFacts("ImportError: no")), "ImportError: no"),
    "no_horovod": (cluster(horovod=GONE), "gone, on ranks 0-7"),
    "mpi_threads": (cluster(mpi=replace(SOUND[0].mpi, thread_level="serialized")), "serialized"),
    "shared_gpu_nccl": (change(SOUND, [1, 2], gpu=0), "1 of 4 GPUs for several ranks, on n0 (ranks 0-2 on GPU-0-0)"),
    "mixed_devices": (change(SOUND, [3], gpu=None, gpus=()), "rank 3 (n0)"),
    "versions_differ": (change(SOUND, [4, 6], versions={"torch": "2.4.0", "python": "3.11.7"}), "torch 2.13.0 on ranks"),
    "hdf5_missing": (change(SOUND, [2], hdf5=Hdf5Facts("ImportError: libhdf5")), "libhdf5"),
    "check_failed": (change(SOUND, [2], failures={"gpus": "RuntimeError: odd"}), "gpus: RuntimeError: odd"),
    "shared_gpu": (cluster(1, 2, 1, gpu=0), "ranks 0-1", "torch"),
    "mig_slices": (
        [replace(r, gpus=(MIG[r.rank],), gpu=0) for r in cluster(1, 2, 0)], "2 slices of the GPU at 0000:01:00"),
    "idle_gpus": (cluster(2, 2, 4), "2 of 4 GPUs are used, on n0, n1"),
    "hidden_gpus": (cluster(1, 2, 0, node_gpus=4, accelerator=None), "4 GPUs, and torch is built for CPUs only"),
    "gpu_without_nccl": (cluster(horovod=WITHOUT_NCCL), "ranks 0-7", "horovod"),
    "more_ranks_than_cpus": (cluster(cpus=(0, 1), torch_threads=1), "4 ranks on 2 CPUs, on n0, n1"),
    "shared_cpus": (change(cluster(torch_threads=1), [0, 1], cpus=(3,)), "2 ranks on 1 CPU, on n0 (ranks 0-1 on 3)"),
    "oversubscribed_threads": (cluster(torch_threads=32), "4 ranks with 32 threads each on 32 CPUs, on n0, n1"),
    "uneven_nodes": (cluster()[:-1], "4 on n0, 3 on n1"),
    "spinning": (cluster(cpus=(0, 1), environment={**QUIET, "OMPI_MCA_mpi_yield_when_idle": "0"}), "not set"),
    "cycle_time": (cluster(cpus=(0, 1), environment={"HDF5_USE_FILE_LOCKING": "FALSE"}), "HOROVOD_CYCLE_TIME"),
    "batch_step": (cluster(1, 1, 1, launcher=Launcher(), environment={**QUIET, "SLURM_NTASKS": "8"}), "SLURM_NTASKS=8"),
    "plain_python": (cluster(has_runner=False), "ranks 0-7"),
    "file_locking": (cluster(environment={}), "HDF5_USE_FILE_LOCKING"),
}  # fmt: skip
OF_RANKS = {"grid_failed", "self_test_failed", "hung"}
"""What only a job in motion shows."""


@pytest.mark.parametrize("code", CASES)
def test_each_problem_is_recognised(code):
    ranks, seen, backend = (*CASES[code], "auto")[:3]
    (problem,) = [p for p in problems_of(ranks, backend) if p.code == code]
    assert seen in problem.seen and problem.why and "{" not in problem.remedy


def test_every_kind_of_problem_has_a_case():
    assert set(CASES) | OF_RANKS == set(KINDS)
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


def test_a_problem_of_a_thousand_nodes_is_said_once():
    problems = problems_of(cluster(1000, 4, 4, torch_threads=64))
    assert [p.code for p in problems] == ["oversubscribed_threads"]
    assert "on n0, n1, n2, n3 and 996 more (ranks 0-3 on 0-31)" in problems[0].seen
    assert problems[0].remedy.startswith("export OMP_NUM_THREADS=8,")


NO_NCCL = DistributedFacts()


@pytest.mark.parametrize(
    "ranks, backend, library, transport, why",
    [
        (SOUND, "auto", "horovod", "NCCL", "all ranks can use it"),
        (cluster(gpus=0), "auto", "horovod", "MPI", "all ranks can use it"),
        (cluster(gpus=0, horovod=WITHOUT_NCCL, distributed=NO_NCCL), "auto", "horovod", "MPI", "all ranks can use it"),
        (cluster(horovod=WITHOUT_NCCL, distributed=NO_NCCL), "auto", "horovod", "MPI", "all ranks can use it"),
        (cluster(horovod=WITHOUT_NCCL), "auto", "torch", "NCCL", "built without NCCL"),
        (change(SOUND, [5], horovod=GONE), "auto", "torch", "NCCL", "rank 5 (n1) (gone)"),
        (change(SOUND, [1], gpu=0), "torch", "torch", "Gloo", "--backend torch"),
        (change(SOUND, [1], distributed=NO_NCCL), "torch", "torch", "Gloo", "--backend torch"),
        (change(SOUND, [1], horovod=GONE), "horovod", "horovod", "MPI", "--backend horovod"),
        (under_torchrun(), "auto", "torch", "NCCL", "torchrun"),
        (under_torchrun(2, 4, 0), "auto", "torch", "Gloo", "torchrun"),
    ],
)
def test_what_carries_the_tensors(ranks, backend, library, transport, why):
    carrier = carrier_of(ranks, backend)
    assert (carrier.library, carrier.transport) == (library, transport) and why in carrier.why


HARMLESS_ELSEWHERE = [
    ("horovod_missing", "no_horovod"), ("horovod_broken", "horovod_unusable"), ("horovod_without_mpi", "horovod_unusable"),
    ("horovod_without_process_sets", "horovod_unusable"), ("gpu_without_nccl", "horovod_unusable"),
]  # fmt: skip


@pytest.mark.parametrize("code, instead", HARMLESS_ELSEWHERE)
def test_a_horovod_that_is_not_used_is_no_error(code, instead):
    ranks = CASES[code][0]
    assert codes(ranks, "horovod") == [code]
    assert codes(ranks, "auto") == [instead]
    assert codes(change(ranks, range(len(ranks)), horovod=None), "torch") == []


@pytest.mark.parametrize("code", ["mixed_mpi", "mpi_threads", "shared_gpu_nccl", "spinning", "cycle_time"])
def test_what_matters_to_horovod_only(code):
    ranks = change(CASES[code][0], range(8), horovod=None)
    assert code in codes(CASES[code][0], "horovod")
    left = {"mixed_mpi": ["second_mpi"], "shared_gpu_nccl": ["shared_gpu", "idle_gpus"]}
    assert set(codes(ranks, "torch")) - {"more_ranks_than_cpus", "oversubscribed_threads"} == set(left.get(code, []))


def test_a_torch_without_gloo_matters_where_it_is_used():
    ranks = change(SOUND, range(8), distributed=DistributedFacts(gloo=False))
    assert codes(ranks) == []
    assert codes(change(ranks, [2], horovod=GONE), "torch") == ["distributed_missing", "no_horovod"]
    cpus = change(cluster(1, 2, 0), range(2), distributed=DistributedFacts(gloo=False), horovod=GONE)
    assert codes(cpus) == ["no_horovod"]  # the MPI carries the tensors
    assert codes(change(under_torchrun(), [2], distributed=DistributedFacts(False, False))) == ["distributed_missing"]


def test_slices_of_a_gpu_matter_to_any_nccl():
    assert "mig_slices" in codes(CASES["mig_slices"][0], "torch")
    without = [replace(r, distributed=NO_NCCL) for r in CASES["mig_slices"][0]]
    assert codes(without, "torch") == ["gpu_without_nccl"]


def test_ranks_of_torchrun_need_neither_mpi_nor_horovod():
    odd = {"mpi_libraries": ("/a/libmpi.so.40", "/b/libmpi.so.12"), "versions": {"mpi4py": "4.0.1", "horovod": "none"}}
    ranks = under_torchrun(versions={"mpi4py": "none", "horovod": "0.28.1"})
    assert codes(change(ranks, [3], **odd)) == []
    assert codes(change(ranks, [3], versions={"torch": "2.4.0"})) == ["versions_differ"]


def test_what_stays_silent():
    """Sights that look like problems and are none."""
    alone = cluster(1, 1, 1)
    assert codes(change(alone, [0], has_runner=False)) == []  # nobody waits
    assert codes(cluster(cpus=tuple(range(32)))) == []  # bound to the node: the threads fit
    assert codes(cluster(1, 2, 0, node_gpus=0, accelerator=None)) == []
    inside = {**QUIET, "SLURM_NTASKS": "8"}
    assert codes(cluster(environment=inside)) == []
    assert codes([replace(r, gpus=(Gpu(f"MIG-{r.rank}"),), gpu=0) for r in cluster(1, 2, 0)]) == []


def test_ranks_that_a_launcher_without_numbers_started_and_that_are_alone():
    pmix = Launcher("PMIx", None, 3, None, {"PMIX_RANK": "3"})
    (problem,) = problems_of(cluster(1, 1, 1, launcher=pmix))
    assert problem.code == "foreign_launcher" and "at least 4 ranks" in problem.seen


def test_errors_come_first_and_decide():
    ranks = change(cluster(torch_threads=64, environment={}), [1], mpi_libraries=("a", "b"))
    problems = problems_of(ranks)
    assert [p.severity for p in problems] == ["error", "warning", "hint"]
    assert has_errors(problems) and not has_errors(problems[1:])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 3))
def test_threads_on_cpus_of_their_own(sizes, threads, copies):
    """Any number of ranks on disjoint sets of CPUs: a problem exactly where a set is smaller than what it holds."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    masks = [tuple(range(start, start + size)) for start, size in zip(starts, sizes)] * copies
    node = [RankFacts(rank=i, cpus=m, torch_threads=threads, environment=QUIET) for i, m in enumerate(masks)]
    found = set(codes(change(node, range(len(node)), horovod=HOROVOD))) - {"foreign_launcher"}
    too_many_ranks = any(copies > size for size in sizes)
    too_many_threads = threads > 1 and any(copies * threads > size for size in sizes)
    assert bool(found & {"more_ranks_than_cpus", "shared_cpus"}) == too_many_ranks
    assert ("oversubscribed_threads" in found) == too_many_threads


@given(st.sets(st.integers(0, 60)))
def test_ranges(numbers):
    parts = [part.split("-") for part in ranges(numbers).split(",") if part]
    assert sorted(numbers) == [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)]


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_grid_of_the_test_fits_the_job(num_nodes, per_node):
    ranks = [RankFacts(rank=i, host=f"n{i // per_node}") for i in range(num_nodes * per_node)]
    size = default_sample_size(ranks)
    assert len(ranks) % size == 0
    assert size == per_node if num_nodes > 1 else size * size <= per_node


@pytest.mark.parametrize("num_ranks, size", [(1, 1), (2, 1), (4, 2), (7, 1), (12, 3), (16, 4)])
def test_one_node_is_tested_as_a_square(num_ranks, size):
    assert default_sample_size([RankFacts(rank=i) for i in range(num_ranks)]) == size


def test_nodes_that_differ_are_tested_as_a_square():
    assert default_sample_size([RankFacts(host=host) for host in "aaab"]) == 2


@pytest.mark.parametrize(
    "environment, name, size, rank",
    [
        ({}, None, None, 0),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "2"}, "mpirun of Open MPI", 4, 2),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpiexec of MPICH or its kin", 2, 1),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None, None, 0),  # the shell of a batch script
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, "srun", 8, 3),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "PMI_SIZE": "8", "PMI_RANK": "3"},
         "srun", 8, 3),
        ({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
          "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}, "mpirun of Open MPI", 8, 5),
        ({"PALS_RANKID": "4"}, "PALS", None, 4),
        ({"PALS_RANKID": "4", "PMI_SIZE": "8", "PMI_RANK": "4"}, "mpiexec of MPICH or its kin", 8, 4),
    ],
)  # fmt: skip
def test_launchers(environment, name, size, rank):
    launcher = launcher_of(environment)
    assert (launcher.name, launcher.size, launcher.rank) == (name, size, rank)
    assert launcher.least_size == (size or rank + 1)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["libmpi.so.40", "libmpi_mpifh.so.40", "libmpi_usempif08.so.40", "libmpi_cxx.so.40"], ["libmpi.so.40"]),
        (["libmpi.so.12.5.2", "libmpifort.so.12", "libmpicxx.so.12"], ["libmpi.so.12.5.2"]),
        (["libmpi_gnu_91.so.12", "libmpi_gtl_cuda.so.0"], ["libmpi_gnu_91.so.12"]),
        (["libmpi_cray.so.12", "libmpich.so.12"], ["libmpi_cray.so.12", "libmpich.so.12"]),
        (["libmpi_abi.so.0", "libm.so.6", "libmpi4py.so"], ["libmpi_abi.so.0"]),
    ],
)
def test_libraries_of_mpi_among_mapped_files(names, expected, tmp_path):
    lines = [f"7f0000000000-7f0000001000 r-xp 00000000 fe:00 42   {tmp_path}/my libs/{name}" for name in names]
    maps = "\n".join([*lines, *lines, "7ffd00000000-7ffd00001000 rw-p 00000000 00:00 0   [stack]", "7f-8f rw-p 0 0 0"])
    assert mpi_libraries(maps) == tuple(f"{tmp_path}/my libs/{name}" for name in expected)


def test_names_of_mpi_libraries():
    assert library_name("Open MPI v5.0.11, package: x\n") == "Open MPI v5.0.11"
    assert library_name("MPICH Version:\t5.0.2\nMPICH Release date: x\0") == "MPICH 5.0.2"


CACHE = "anon 7\nfile 900\ninactive_file 600\n"


@pytest.mark.parametrize(
    "group, files, limit, free",
    [
        ("0::/job/step", {"job/memory.max": "4096", "job/step/memory.max": "max"}, 4096, 4096),
        ("0::/job/step", {"job/memory.max": "4096", "job/step/memory.max": "2048"}, 2048, 2048),
        (
            "0::/job/step",
            {"job/memory.max": "4096", "job/memory.current": "96", "job/step/memory.current": "5"},
            4096,
            4000,
        ),
        ("0::/job/step", {"job/memory.max": "4096", "job/memory.current": "4000", "job/step/memory.max": "8"}, 8, 8),
        ("0::/job/step", {"job/memory.max": "4096", "job/memory.current": "4000", "job/step/memory.max": "97"}, 97, 96),
        ("0::/job", {"job/memory.max": "4096", "job/memory.current": "4000", "job/memory.stat": CACHE}, 4096, 696),
        ("0::/job", {"job/memory.max": "4096", "job/memory.current": "5000"}, 4096, 0),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": "5"}, None, 8192),
        ("0::/of/the/host", {"memory.max": "4096", "memory.current": "96"}, 4096, 4000),
        ("4:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "9000"}, 9000, 8192),
        (
            "4:memory:/job/step",
            {
                "memory/job/memory.limit_in_bytes": "4096",
                "memory/job/memory.usage_in_bytes": "4000",
                "memory/job/memory.stat": f"{CACHE}total_inactive_file 700",
            },
            4096,
            796,
        ),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": str(2**63 - 4096)}, None, 8192),
        ("0::/not/mounted", {}, None, 8192),
    ],
)
def test_memory_limits_of_control_groups(tmp_path, group, files, limit, free):
    contents = {
        "proc/self/cgroup": f"9:name=systemd:/\n{group}\n",
        "proc/meminfo": "MemFree: 1 kB\nMemAvailable: 8 kB\n",
    }
    contents |= {f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in files.items()}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert min((limit for limit, _ in memory_limits(tmp_path)), default=None) == limit
    assert free_memory_bytes(False, tmp_path) == free


def test_docs_have_every_problem():
    """Each with a title, which stands there only."""
    rows = re.findall(
        r"^\| (\w+), `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", (REPOSITORY / "docs/doctor.md").read_text(), re.M
    )
    found = {code: (severity, why, remedy) for severity, code, _, why, remedy in rows}
    assert [*found] == [*KINDS]
    for code, kind in KINDS.items():
        names = {name: f"*{name}*" for _, name, _, _ in Formatter().parse(kind.remedy) if name}
        assert found[code] == (kind.severity, kind.why.rstrip("."), kind.remedy.format(**names))


# --- real ranks ----------------------------------------------------------------------------------------


def without_launcher(**variables):
    prefixes = ("OMPI_COMM", "PMI", "SLURM", "PBS", "LSB", "JSM")
    environment = {k: v for k, v in launch_environment().items() if not k.startswith(prefixes)}
    return environment | variables


def start_alone(*arguments, command=None, **variables):
    return subprocess.Popen(
        [*(command or python(variables)), "-m", "hpc_bnn", "doctor", *map(str, arguments)],
        cwd=REPOSITORY, env=without_launcher(**variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def problems_in(output):
    return re.findall(r"^  (error|warning|hint) +(\w+): ", output, flags=re.MULTILINE)


def test_alone(tmp_path):
    path = tmp_path / "facts.json"
    job = start_alone("--json", path, command=[sys.executable])  # the process is the one whose number is said
    output, errors = job.communicate(timeout=patience(JOB_SECONDS))
    assert job.returncode == 0, errors
    for title in (
        "this process",
        "job",
        "MPI",
        "Horovod",
        "torch.distributed",
        "HDF5",
        "threads and binding",
        "memory",
        "GPUs",
    ):
        assert output.count(f"\n{title}\n") + output.startswith(f"{title}\n") == 1
    assert "start it under mpirun" in output and "Horovod" in output
    facts = json.loads(path.read_text())
    assert facts["grid"] == {"world_size": 1, "sample_size": 1, "data_size": 1} and facts["axes"] == {}
    assert facts["ranks"][0]["pid"] == job.pid
    assert facts["ranks"][0]["cpus"] == sorted(os.sched_getaffinity(0))
    assert not [p for p in facts["problems"] if p["severity"] == "error"]


def test_four_ranks(mpirun, tmp_path):
    path = tmp_path / "facts.json"
    done = mpirun(4, "-m", "hpc_bnn", "doctor", "--grid.sample_size", 2, "--json", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x 2 (samples x data)") == 1 and done.stdout.count("right on all ranks") == 3
    facts = json.loads(path.read_text())
    assert facts["tensors"] == {
        "backend": "auto",
        "library": "horovod",
        "transport": "MPI",
        "why": "all ranks can use it",
    }
    assert "bandwidth of sums (Horovod, cpu)" in done.stdout
    assert read_network(path) == Network(**facts["network"]) and facts["network"]["bandwidth"] > 0
    assert [r["rank"] for r in facts["ranks"]] == [0, 1, 2, 3] and len({r["pid"] for r in facts["ranks"]}) == 4
    assert list(facts["nodes"].values()) == [[0, 1, 2, 3]]
    for axis, extent in (("sample", 2), ("data", 2), ("world", 4)):
        assert facts["axes"][axis]["ranks"] == extent
        assert 1e-6 < facts["axes"][axis]["latency_seconds"] < 10
        assert 1e5 < facts["axes"][axis]["bandwidth_bytes_per_second"] < 1e12
    shown = {code for _, code in problems_in(done.stdout)}
    assert shown == {p["code"] for p in facts["problems"]}
    too_few = len({cpu for r in facts["ranks"] for cpu in r["cpus"]}) < 4
    assert ("more_ranks_than_cpus" in shown) == too_few


COMMAND = "from hpc_bnn.__main__ import run\nrun()\n"
DEADLY_HOROVOD = """
import os, sys
class Finder:
    def find_spec(name, *_):
        if name == 'horovod': os._exit(9)
sys.meta_path.insert(0, Finder)
"""
HIDDEN_HOROVOD = "import sys; sys.modules['horovod'] = None\n"


@pytest.mark.parametrize(
    "backend, hiding, library, problem, shown",
    [
        ("auto", HIDDEN_HOROVOD, "mpi", ("hint", "no_horovod"), "Horovod cannot be used on ranks 0-1"),
        ("horovod", HIDDEN_HOROVOD, "horovod", ("error", "horovod_missing"), "--backend horovod"),
        ("torch", DEADLY_HOROVOD, "torch", None, "--backend torch"),
    ],
)
def test_ranks_without_horovod(mpirun, tmp_path, backend, hiding, library, problem, shown):
    program, path = tmp_path / "program.py", tmp_path / "facts.json"
    program.write_text(hiding + COMMAND)
    done = mpirun(2, program, "doctor", "--backend", backend, "--json", path)
    is_error = backend == "horovod"
    assert done.returncode == is_error, done.stderr
    tensors = json.loads(path.read_text())["tensors"]
    assert tensors["library"] == library and shown in tensors["why"]
    assert [p for p in problems_in(done.stdout) if "horovod" in p[1]] == ([problem] if problem else [])
    if not is_error:
        transport, name = {"mpi": ("MPI", "MPI"), "torch": ("Gloo", "torch.distributed")}[library]
        assert tensors["transport"] == transport and f"bandwidth of sums ({name}, cpu)" in done.stdout
        assert done.stdout.count("right on all ranks") == 3


def test_a_second_mpi_library_is_no_error_without_horovod(mpirun, tmp_path):
    """A copy of the library stands for another MPI."""
    program = tmp_path / "program.py"
    program.write_text(
        "import ctypes, shutil, hpc_bnn.comm as comm, hpc_bnn.comm.installed as stack\n"
        "comm.world_size()\n"
        f"copy = shutil.copy(stack.mpi_libraries()[0], f'{tmp_path}/libmpi.so.{{comm.launched_rank()}}')\n"
        "ctypes.CDLL(copy, ctypes.RTLD_LOCAL)\n" + COMMAND
    )
    done = mpirun(2, program, "doctor", "--backend", "torch")
    assert done.returncode == 0, done.stderr
    assert ("warning", "second_mpi") in problems_in(done.stdout)
    assert done.stdout.count("right on all ranks") == 3


def test_a_launcher_of_another_mpi():
    """Two processes as mpiexec of MPICH starts them: each is alone, one speaks, both fail."""
    jobs = [start_alone("--grid.sample_size", 2, PMI_SIZE="2", PMI_RANK=str(rank)) for rank in range(2)]
    (first, _), (second, _) = (job.communicate(timeout=patience(JOB_SECONDS)) for job in jobs)
    assert [job.returncode for job in jobs] == [1, 1]
    assert problems_in(first)[0] == ("error", "foreign_launcher") and "started 2 ranks (PMI_SIZE=2" in first
    assert "self-test and bandwidth\n  not run" in first
    assert second == ""


def test_threads_that_are_too_many_and_a_rank_that_cannot_look(mpirun, tmp_path):
    """Rank 1 fails in one check: the others hear of it, nobody waits, and the rest is known nevertheless."""
    program = tmp_path / "program.py"
    program.write_text(
        "import hpc_bnn.comm, hpc_bnn.doctor.facts\n"
        "from hpc_bnn.__main__ import run\n"
        "def broken(): raise RuntimeError('deliberate fault')\n"
        "if hpc_bnn.comm.launched_rank() == 1: hpc_bnn.doctor.facts.visible_gpus = broken\n"
        "run()\n"
    )
    threads = str(max(8, os.cpu_count()))
    many = {"OMP_NUM_THREADS": threads, "MKL_DYNAMIC": "FALSE"}  # MKL would cut them to the cores
    done = mpirun(2, program, "doctor", runner=(), environment=many)
    assert done.returncode == 1
    assert problems_in(done.stdout)[0] == ("error", "check_failed")
    assert "gpus: RuntimeError: deliberate fault, on rank 1" in done.stdout
    assert ("warning", "oversubscribed_threads") in problems_in(done.stdout)
    assert f"2 ranks with {threads} threads each" in done.stdout
    assert ("hint", "plain_python") in problems_in(done.stdout)


def test_a_sum_that_fails_on_one_rank_ends_the_job(mpirun, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import hpc_bnn.comm as comm, hpc_bnn.doctor.examination\n"
        "from hpc_bnn.__main__ import run\n"
        "def broken(*_): raise RuntimeError('deliberate fault')\n"
        "hpc_bnn.doctor.examination.GRACE_SECONDS = 1.0\n"
        "if comm.launched_rank() == 1: comm.GridComm.sum_ = broken\n"
        "run()\n"
    )
    done = mpirun(2, program, "doctor")
    assert done.returncode != 0
    assert "on one rank only" in done.stderr and "RuntimeError: deliberate fault" in done.stderr
    assert "threads and binding" in done.stdout  # what was known stays


def test_a_step_that_does_not_end_is_named():
    code = (
        "import time\n"
        "from hpc_bnn.doctor.examination import Report, Watch\n"
        "with Watch(1.0, Report(True)) as watch:\n"
        "    watch.step('waiting for Godot')\n"
        "    time.sleep(3600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience(JOB_SECONDS))
    assert done.returncode == 1
    assert ": waiting for Godot for more than 1 s" in done.stderr
    assert "Timeout" not in done.stderr  # faulthandler comes after it, where no thread of Python can run
    assert problems_in(done.stdout) == [("error", "hung")]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--grid.sample_size", "3"), "--grid.sample_size 3"),
        (("--seconds", "0"), "--seconds 0"),
        (("--backend", "gloo"), '"backend"'),
    ],
)
def test_impossible_requests(flags, said, capfd):
    from hpc_bnn.cli.commands import main

    assert main(["doctor", *flags]) == 2
    assert said in capfd.readouterr().err


def test_remedies_need_no_more_than_problems_give():
    given = {"gpus": 4, "cpus": 2, "threads": 1, "library": "an MPI", "debug": "A=1", "another": "--backend torch"}
    assert all(Problem(code, "", given).remedy for code in KINDS)
    assert set(VARIABLES) > {"SLURM_NTASKS", "HDF5_USE_FILE_LOCKING"}
