"""Jobs of torchrun, where mpi4py and Horovod cannot be imported."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPOSITORY, free_port, launch_environment, patience, python, run_job

WITHOUT_MPI = "import sys; sys.modules['mpi4py'] = sys.modules['horovod'] = None\n"
COMMAND = WITHOUT_MPI + "from hpc_bnn.__main__ import run\nrun()\n"


@pytest.fixture
def torchrun(tmp_path):
    """Start a program: ``torchrun(2, "import hpc_bnn ...", "train", ...)``; returns the finished process."""

    def start(num_ranks, program, *arguments):
        path = tmp_path / "program.py"
        path.write_text(program)
        command = [*python(), "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--no-python"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
        return run_job([*command, *python(), path, *map(str, arguments)], env=launch_environment())

    return start


def test_the_layout_law_without_mpi(torchrun, digits, tmp_path):
    """float64, uneven samples, shared memory of the node, sharded optimiser."""
    runs = []
    for ranks, sample_size, reading in ((1, 1, "auto"), (4, 2, "node")):
        run_dir = tmp_path / str(ranks)
        done = torchrun(
            ranks, COMMAND, "train", "--config", "configs/digits.yaml", "--data.shards", digits, "--run_dir", run_dir,
            "--dtype", "float64", "--max_steps", 5, "--num_samples", 16, "--num_test_samples", 5,
            "--grid.sample_size", sample_size, "--data.reading", reading, "--optimizer.sharded", "true",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (checkpoint,) = (run_dir / "checkpoints").glob("*.pt")
        summary = json.loads((run_dir / "summary.json").read_text())
        runs.append((summary, torch.load(checkpoint, weights_only=True)["model"]))
    (alone, expected), (summary, model) = runs
    assert [s["communication"]["library"] for s, _ in runs] == ["none", "torch"]
    assert summary["test/nll"] == pytest.approx(alone["test/nll"], rel=1e-12)
    for name, value in model.items():
        assert (value - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


OBJECTS = """
import numpy as np, torch, hpc_bnn.comm
files = hpc_bnn.comm.connect_for_files(node_size=3)  # uneven: one rank is alone
with hpc_bnn.connect(2, "cpu") as comm:
    rank = comm.grid.rank
    assert comm.library == "torch" and files.local_size == (3 if rank < 3 else 1) and comm.local_size == 4
    assert comm.gather_objects(rank, "sample") == list(comm.grid.sample_group())
    assert comm.gather_objects(rank, "data") == list(comm.grid.data_group())
    assert comm.broadcast_object({"from": rank}, 3) == {"from": 3}
    for axis in ("sample", "data"):
        found = [tree["x"].item() for tree in comm.gather_trees({"x": torch.tensor([rank])}, axis)]
        assert found == (list(comm.grid.groups[axis]) if comm.grid.is_first(axis) else [])
    for ranks in (files, comm):
        shared = ranks.node_array((ranks.local_size, 3), "float64")
        shared.array[ranks.local_rank] = rank
        shared.publish()
        first = rank - ranks.local_rank
        assert shared.array[:, 0].tolist() == list(range(first, first + ranks.local_size))
        shared.publish()
assert files.gather_objects(rank) == [0, 1, 2, 3]
"""


def test_objects_and_shared_memory_without_mpi(torchrun):
    done = torchrun(4, WITHOUT_MPI + OBJECTS)
    assert done.returncode == 0, done.stderr


FRAMEWORK = f"""
import sys, torch, torch.distributed as dist
sys.path.insert(0, {str(REPOSITORY / "tests/mpi")!r})
import hpc_bnn
from hpc_bnn.errors import CommunicationError
from reference import assert_layout_law, train, train_alone
dist.init_process_group("gloo")  # as Lightning and Accelerate do
try:
    hpc_bnn.connect(2, "cpu")
    raise AssertionError("it is not ours")
except CommunicationError as error:
    assert "process_group=" in str(error), error
rank = dist.get_rank()
halves = [dist.new_group([3, 1]), dist.new_group([0, 2])]
for group, size in ((dist.group.WORLD, 2), (halves[rank in (0, 2)], 2), (dist.group.WORLD, 1)):
    comm = hpc_bnn.connect(size, "cpu", process_group=group)
    assert comm.library == "torch" and comm.grid.rank == dist.get_rank(group)
    assert comm.grid.world_size == dist.get_world_size(group) == comm.local_size
    assert comm.gather_objects(rank) == dist.get_process_group_ranks(group)
    assert comm.group_ranks("sample") == list(comm.grid.sample_group())
    shared = comm.node_array((comm.local_size,), "float64")
    shared.array[comm.local_rank] = rank
    shared.publish()
    assert shared.array.tolist() == comm.gather_objects(rank, "node")
    tree = comm.broadcast_tree({{"x": torch.full((3,), rank)}}, 1)
    assert tree["x"].tolist() == [dist.get_process_group_ranks(group)[1]] * 3
    assert_layout_law(train(comm)[1], train_alone())
    comm.close()
only_of_some = dist.new_group([0, 1])
try:
    hpc_bnn.connect(2, "cpu", process_group=halves[rank in (0, 2)])
    raise AssertionError("torch would wait for ever")
except CommunicationError as error:
    assert "to" in str(error) and "alike on all ranks" in str(error), error
dist.barrier()
dist.destroy_process_group()
"""


def test_the_ranks_of_a_framework_form_a_grid(torchrun):
    """All of them, some of them, and all of them once more on another grid."""
    done = torchrun(4, WITHOUT_MPI + FRAMEWORK)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fault", ["raise RuntimeError('deliberate fault')", "os.kill(os.getpid(), 9)", "time.sleep(1000)"]
)
def test_a_rank_that_fails_ends_the_job(torchrun, fault):
    program = (
        "import os, time, torch, hpc_bnn, hpc_bnn.comm.stall\n"
        "hpc_bnn.comm.stall.STALL_SECONDS = 2.0\n"
        "comm = hpc_bnn.connect(1, 'cpu')\n"
        "comm.sum_(torch.ones(3))\n"
        "if comm.grid.rank == 1:\n"
        f"    print('FAULT', time.time(), flush=True)\n    {fault}\n"
        "comm.sum_(torch.ones(3))\n"
    )
    done = torchrun(2, WITHOUT_MPI + program)
    ended = time.time()
    assert done.returncode != 0
    assert ended - float(done.stdout.split("FAULT")[1].split()[0]) < patience(10)
    assert "raise" not in fault or "RuntimeError: deliberate fault" in done.stderr
    assert "sleep" not in fault or "has waited 2 s in reduce over data" in done.stderr


def test_doctor_without_mpi(torchrun, tmp_path):
    path = tmp_path / "facts.json"
    done = torchrun(2, COMMAND, "doctor", "--grid.sample_size", 2, "--json", path)
    assert done.returncode == 0, done.stderr
    assert "launcher  torchrun (WORLD_SIZE=2" in done.stdout and done.stdout.count("right on all ranks") == 3
    facts = json.loads(path.read_text())
    assert facts["tensors"]["library"] == "torch" and "torchrun" in facts["tensors"]["why"]
    assert [(r["rank"], r["mpi"], r["horovod"]) for r in facts["ranks"]] == [(0, None, None), (1, None, None)]
    cpus = {"more_ranks_than_cpus", "oversubscribed_threads"}
    assert {p["code"] for p in facts["problems"]} <= cpus


def test_a_store_that_is_not_reached_is_a_problem_of_doctor(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import hpc_bnn.comm.torchrun as torchrun\n"
        "torchrun.START_SECONDS = 1.0\n"
        "wait = torchrun.wait_for_others\n"
        "torchrun.wait_for_others = lambda seconds: wait(1.0)\n" + COMMAND
    )
    environment = launch_environment() | {
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9",
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0",
    }  # fmt: skip
    done = run_job([*python(), program, "doctor"], env=environment)
    assert done.returncode == 1
    assert "grid_failed: the store of torchrun at 127.0.0.1:9 cannot be reached from rank 0" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_error_on_which_the_ranks_agree_is_said_once(torchrun, digits, tmp_path):
    flags = ("--config", "configs/digits.yaml", "--data.shards", digits, "--run_dir", tmp_path / "run")
    done = torchrun(2, COMMAND, "train", *flags, "--num_epochs", 0)
    assert done.returncode != 0 and done.stderr.count("--num_epochs 0") == 1
    done = torchrun(2, COMMAND, "train", *flags, "--backend", "horovod")
    assert done.returncode != 0 and done.stderr.count("these ranks were started without MPI, and Horovod needs it") == 1


STOPPING = """
import os, signal, sys, time
stopped = []
signal.signal(signal.SIGUSR1, lambda *_: stopped.append(1))
os.write(1, b"READY\\n")  # in one piece: two ranks write
end = time.time() + {seconds}
while not stopped and time.time() < end: time.sleep(0.05)
sys.exit(75 if stopped else 3)
"""


def test_signals_and_exit_codes_pass_through_the_agent_of_the_job_scripts(tmp_path):
    (program := tmp_path / "program.py").write_text(STOPPING.format(seconds=patience(20)))
    agent = (REPOSITORY / "jobscripts/torchrun.py", "--nproc-per-node", 2, "--master-port", free_port(), program)
    job = subprocess.Popen(
        [sys.executable, *map(str, agent)], env=launch_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert [job.stdout.readline() for _ in range(2)] == [b"READY\n"] * 2
        job.send_signal(signal.SIGUSR1)
        assert job.wait(patience(30)) == 75
    finally:
        job.kill()
        job.communicate()
