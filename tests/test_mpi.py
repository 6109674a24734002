"""Start the tests of tests/mpi on 1, 2, 3 and 4 ranks, and jobs that fail on purpose."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TEST_SECONDS, launch_environment, patience, run_job

from hpc_bnn import write_shards
from hpc_bnn.cli.commands import main

SUITES = [(1, "horovod"), (2, "mpi"), (3, "torch"), (4, "horovod"), (4, "torch"), (4, "mpi")]
"""Ranks, and what carries their tensors."""
SHARED = [SUITES[1:3], SUITES[3:]]
"""Suites that share the cases: each runs all tests of communication, and its part of the others (tests/mpi/conftest.py).
So each case meets grids of both axes alone, and 2 x 2."""
RANK_SECONDS = 300
"""Limit of a test on the ranks: the watchdog of tests/mpi/conftest.py."""


@pytest.mark.parametrize(("num_ranks", "library"), SUITES)
def test_suite_on_ranks(mpirun, request, num_ranks, library):
    """The tests of tests/mpi; those marked `slow` with `make test-all`, on 4 ranks."""
    environment = {"TEST_LIBRARY": library, "TEST_SECONDS": str(patience(RANK_SECONDS)), "TEST_SHARE": "none"}
    for suites in SHARED:
        if (num_ranks, library) in suites:
            environment["TEST_SHARE"] = f"{suites.index((num_ranks, library))}/{len(suites)}"
    # Horovod's own pace: with hpc_bnn's, ten times as quick, the threads of 4 ranks take 2 cores from the tests
    environment["HOROVOD_CYCLE_TIME"] = "1"
    selected = ("-m", request.config.option.markexpr if num_ranks == 4 else "not slow")
    done = mpirun(num_ranks, "tests/mpi/run.py", *selected, timeout=TEST_SECONDS - 60, environment=environment)
    print(done.stdout, done.stderr)
    signs = ("FAILED", "ERROR", "rank ", "Timeout")
    signs = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(signs)]
    signs += sorted(set(re.findall(r'tests/mpi/test_\w+\.py", line \d+ in test_\w+', done.stderr)))
    assert done.returncode == 0, "; ".join(signs) + done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


FAILING = """
import sys, os, signal, time
import torch, hpc_bnn, hpc_bnn.comm.stall
hpc_bnn.comm.stall.STALL_SECONDS = 2.0
comm = hpc_bnn.connect(sample_size={sample_size}, device="cpu", backend="{backend}")
assert comm.library == "{backend}"
comm.sum_(torch.ones(3))
if comm.grid.rank == 1:
    print("FAULT", time.time(), flush=True)
    {fault}
{others}
"""

FAULTS = {
    "raises": "raise RuntimeError('deliberate fault')",
    "exits": "sys.exit(3)",
    "is_killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "hangs": "time.sleep(1000)",  # the others would wait for ever
}
OTHERS = {"tensor_collective": "comm.sum_(torch.ones(3))", "object_collective": "comm.gather_objects(1)"}


# Objects go by MPI with all libraries.
QUICK_FAULTS = {("raises", "horovod"), ("is_killed", "torch"), ("hangs", "mpi")}
FAULTY = [
    pytest.param(
        fault,
        others,
        backend,
        marks=[] if others == "tensor_collective" and (fault, backend) in QUICK_FAULTS else pytest.mark.slow,
    )
    for others, backend in (
        ("tensor_collective", "horovod"),
        ("tensor_collective", "torch"),
        ("tensor_collective", "mpi"),
        ("object_collective", "horovod"),
    )
    for fault in FAULTS
    if fault != "hangs" or others == "tensor_collective"
]


def seconds_after_fault(done) -> float:
    """Return how long ago a job that has just ended met its fault: how long it took to start does not count."""
    return time.time() - float(done.stdout.split("FAULT")[1].split()[0])


@pytest.mark.parametrize(("fault", "others", "backend"), FAULTY)
def test_a_rank_that_fails_ends_the_job_within_ten_seconds(mpirun, fault, others, backend, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(FAILING.format(sample_size=2, backend=backend, fault=FAULTS[fault], others=OTHERS[others]))
    done = mpirun(2 if backend == "mpi" else 4, program)
    assert seconds_after_fault(done) < patience(10)
    assert done.returncode != 0
    if fault == "raises":
        assert "RuntimeError: deliberate fault" in done.stderr
    if fault == "hangs":
        assert re.search(r"rank 0 on .* has waited 2 s in reduce over sample", done.stderr), done.stderr
        assert "rank 1 on" not in done.stderr


def test_the_abort_hook_works_without_mpi4py_as_runner(mpirun, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        FAILING.format(sample_size=1, backend="horovod", fault=FAULTS["raises"], others=OTHERS["object_collective"])
    )
    done = mpirun(2, program, runner=())
    assert seconds_after_fault(done) < patience(10)
    assert done.returncode != 0 and "deliberate fault" in done.stderr


def test_a_stuck_test_cannot_hang_the_suite(mpirun, tmp_path):
    """The watchdog of tests/mpi/conftest.py, with one rank that never comes."""
    (tmp_path / "test_stuck.py").write_text(
        "import time\ndef test_stuck(world):\n    if world.rank == 1: time.sleep(1000)\n    world.barrier()\n"
    )
    for name in ("conftest.py", "run.py"):
        shutil.copy(REPOSITORY / "tests/mpi" / name, tmp_path)
    done = mpirun(2, tmp_path / "run.py", environment={"TEST_SECONDS": "3"})
    assert done.returncode != 0 and "test_stuck.py" in done.stderr and "Timeout" in done.stderr


COMMANDS = (REPOSITORY / "tests/commands.py").read_text()
COMMAND = "from hpc_bnn.__main__ import run\nrun()\n"
WITHOUT_HOROVOD = f"import sys; sys.modules['horovod'] = None\n{COMMAND}"


@pytest.mark.parametrize(
    ("start", "environment", "why"),
    [(WITHOUT_HOROVOD, {}, ""), (COMMAND, {"MPI4PY_RC_THREAD_LEVEL": "single"}, "MPI has the thread level single")],
    ids=["not there", "not with this MPI"],
)
def test_horovod_that_is_asked_for_and_cannot_be_used_is_a_clear_error(mpirun, tmp_path, start, environment, why):
    program = tmp_path / "program.py"
    program.write_text(start)
    arguments = ("train", "--config", "configs/digits.yaml", "--backend", "horovod")
    done = mpirun(2, program, *arguments, environment=environment)
    assert done.returncode == 1 and why in done.stderr
    assert done.stderr.count("2 ranks need Horovod") == 1 and "install_horovod" in done.stderr
    assert "Traceback" not in done.stderr


# --- runs that are compared: several in each job of ranks -----------------------------------------------------


EXACT = ("--dtype", "float64")
LAYOUT_LAW = (*EXACT, "--max_steps", 5, "--num_samples", 16, "--num_test_samples", 5, "--augmentation.transforms",
              "[{name: crop, padding: 1}, {name: noise}, {name: mixup}]")  # fmt: skip
LIBRARY = (*EXACT, "--max_steps", 5, "--num_test_samples", 5, "--optimizer.sharded", "true")
ACROSS = (*EXACT, "--num_samples", 6, "--num_test_samples", 6, "--resume", "true")
FAMILIES = ("mean_field", pytest.param("ensemble", marks=pytest.mark.slow))


class Runs:
    """The run directories of the tests below, of jobs that train several after each other."""

    def __init__(self, directory, digits, mpirun, with_slow):
        self.directory, self.digits, self.mpirun = directory, digits, mpirun
        families = ("mean_field", "ensemble")[: 1 + with_slow]

        def across(run_dir, family, steps, size, sharded="false"):
            flags = ("--max_steps", steps, "--posterior.family", family, "--optimizer.sharded", sharded)
            return self.train(f"{run_dir}-{family}", size, *ACROSS, *flags)

        def sharded(family):  # with and without is the same, too
            return "true" if family == "mean_field" else "false"

        self.run(
            4,
            self.train("law-4", 2, *LAYOUT_LAW, "--data.reading", "group"),
            *(across("parts", family, 9, 4, sharded(family)) for family in families),
            *(across("parts", family, 23, 2, sharded(family)) for family in families),
            *(self.train(f"library-{name}", 2, *LIBRARY, "--backend", name) for name in ("horovod", "torch")),
        )
        alone = [self.train("law-1", 1, *LAYOUT_LAW)]
        alone += [across("whole", family, 40, 1) for family in families]
        alone += [across("parts", family, 30, 1) for family in families]
        assert [main(command) for command in alone] == [0] * len(alone)
        self.run(
            3,
            self.train("law-3", 3, *LAYOUT_LAW, "--data.reading", "node"),
            *(across("parts", family, 40, 3) for family in families),
        )
        self.run(2, *(["evaluate", str(directory / f"parts-{family}")] for family in families))

    def train(self, run_dir, sample_size, *flags):
        """Return the command of a run."""
        command = ["train", "--config", REPOSITORY / "configs/digits.yaml", "--data.shards", self.digits]
        command += ["--run_dir", self.directory / run_dir, "--grid.sample_size", sample_size, *flags]
        return list(map(str, command))

    def run(self, num_ranks, *commands, program="tests/commands.py"):
        """Run commands in one job, and return what it said."""
        done = self.mpirun(num_ranks, program, json.dumps(commands))
        assert done.returncode == 0, done.stderr
        is_said = done.stderr.count("MPI carries the tensors")
        assert is_said == (program != "tests/commands.py"), done.stderr

    def result(self, run_dir):
        """Return the summary of a run, and its parameters."""
        checkpoint = max((self.directory / run_dir / "checkpoints").glob("*.pt"))
        summary = json.loads((self.directory / run_dir / "summary.json").read_text())
        return summary, torch.load(checkpoint, weights_only=True)["model"]


@pytest.fixture(scope="module")
def runs(mpirun, digits, tmp_path_factory, request):
    return Runs(tmp_path_factory.mktemp("runs"), digits, mpirun, request.config.option.markexpr != "not slow")


def assert_equal(model, expected, tolerance):
    assert model.keys() == expected.keys()
    for name, value in model.items():
        assert (value - expected[name]).norm() <= tolerance * expected[name].norm(), name


def test_layout_law_through_the_command_line(runs):
    """The whole way: shards, order, views, init, five steps, evaluation, checkpoint; float64, uneven samples."""
    summaries, models = zip(*map(runs.result, ("law-1", "law-4", "law-3")))
    assert [s["grid"]["data_size"] for s in summaries] == [1, 2, 1]
    assert [s["reading"]["mode"] for s in summaries] == ["node", "group", "node"]
    for summary, model in zip(summaries[1:], models[1:]):
        assert summary["test/accuracy"] == summaries[0]["test/accuracy"]
        assert summary["test/nll"] == pytest.approx(summaries[0]["test/nll"], rel=1e-12)
        assert_equal(model, models[0], 1e-12)


def test_all_libraries_give_the_same_run_and_auto_finds_the_one_that_is_there(runs, tmp_path):
    """2 x 2 ranks, sharded optimiser, float64. That such a run learns, test_readme.py shows with Horovod. The third run has no Horovod and names no library: MPI carries it."""
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.modules['horovod'] = None\n" + COMMANDS)
    runs.run(4, runs.train("library-auto", 2, *LIBRARY, "--backend", "auto"), program=program)
    found = [runs.result(f"library-{name}") for name in ("horovod", "torch", "auto")]
    assert [s["communication"]["library"] for s, _ in found] == ["horovod", "torch", "mpi"]
    for summary, model in found[1:]:
        assert summary["test/nll"] == pytest.approx(found[0][0]["test/nll"], rel=1e-12)
        assert summary["communication"]["num_bytes"] == found[0][0]["communication"]["num_bytes"]
        assert_equal(model, found[0][1], 1e-12)


@pytest.mark.slow
def test_sixteen_ranks_are_one(runs, mpirun):
    """4 x 4 ranks; as the others of the layout law."""
    runs.run(16, runs.train("law-16", 4, *LAYOUT_LAW, "--backend", "mpi"))
    (expected, whole), (summary, model) = runs.result("law-1"), runs.result("law-16")
    assert summary["grid"] == {"world_size": 16, "sample_size": 4, "data_size": 4}
    assert summary["test/nll"] == pytest.approx(expected["test/nll"], rel=1e-12)
    assert_equal(model, whole, 1e-12)


@pytest.mark.slow
def test_two_jobs_at_once_on_a_node_do_not_meet(runs):
    """They have other ports and other shared memory, and leave none behind."""
    before, commands = set(os.listdir("/dev/shm")), {}
    for backend in ("torch", "mpi"):
        words = runs.train(f"beside-{backend}", 2, *LIBRARY, "--backend", backend, "--data.reading", "node")
        commands[backend] = threading.Thread(target=runs.run, args=(2, words))
    for job in commands.values():
        job.start()
    for job in commands.values():
        job.join()
    (_, expected), (summary, model) = (runs.result(f"beside-{name}") for name in commands)
    assert summary["reading"]["mode"] == "node"
    assert_equal(model, expected, 1e-12)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("hpc_bnn")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_across_grids(runs, family):
    """4 x 1, 2 x 2, 1 x 1, 3 x 1 against the uninterrupted 1 x 1, stopped in the middle of epochs; float64."""
    (expected, whole), (summary, model) = (runs.result(f"{name}-{family}") for name in ("whole", "parts"))
    assert summary["num_steps"] == expected["num_steps"] == 40
    assert summary["test/nll"] == pytest.approx(expected["test/nll"], rel=1e-10)
    assert summary["train/nelbo"] == pytest.approx(expected["train/nelbo"], rel=1e-10)
    assert_equal(model, whole, 1e-11)  # 40 steps: rounding adds up
    evaluated = json.loads((runs.directory / f"parts-{family}/evaluation.json").read_text())
    assert evaluated["metrics"]["nll"] == pytest.approx(summary["test/nll"], rel=1e-12)


# --- jobs that fail, and what they say ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["mpirun -np 2 {python} -m mpi4py", "{python} -m torch.distributed.run --nproc-per-node 2"]
)
def test_shared_memory_that_is_too_small_is_said(tmp_path, launcher):
    """On a real /dev/shm of 32 MiB, in a namespace of its own; the images take 40 MB."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("unshare is not allowed here: a small /dev/shm cannot be mounted")
    x, y = np.ones((100_000, 100), np.float32), np.arange(100_000) % 3
    splits = {"train": (x, y), "test": (x[:9], y[:9])}
    write_shards(tmp_path / "big", splits, name="big", source="made here", licence="none", num_classes=3)
    start = launcher.format(python=sys.executable)
    words = f"-m hpc_bnn train --data.shards {tmp_path}/big --data.reading node --max_steps 1 --run_dir {tmp_path}/run"
    script = f"mount -t tmpfs -o size=32m tmpfs /dev/shm; exec {start} {words} --model.arguments '{{hidden: [4]}}'"
    done = run_job(["unshare", "--mount", "sh", "-ec", script], env=launch_environment())
    assert done.returncode != 0
    assert "Traceback" not in done.stderr or "ChildFailedError" in done.stderr, done.stderr  # of torchrun itself
    assert done.stderr.count("0.04 GB of shared memory cannot be had") == 1
    assert "Make /dev/shm larger, or use --data.reading group or rank" in done.stderr


def test_wrong_grid_is_said_once_and_ends_in_order(mpirun, digits, tmp_path):
    done = mpirun(4, "-m", "hpc_bnn", "train", "--config", "configs/digits.yaml", "--data.shards", digits,
                  "--grid.sample_size", 3, "--run_dir", tmp_path / "run", "--num_epochs", 0)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("--grid.sample_size 3") == 1 and done.stderr.count("--num_epochs 0") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reading", "fault"),
    [
        ("group", "flipped"),
        pytest.param("rank", "flipped", marks=pytest.mark.slow),
        pytest.param("node", "flipped", marks=pytest.mark.slow),
        pytest.param("group", "vanished", marks=pytest.mark.slow),
        ("node", "vanished"),
    ],
)
def test_a_shard_that_is_damaged_or_gone_ends_the_job_with_one_message(mpirun, digits, tmp_path, reading, fault):
    shutil.copytree(digits, tmp_path / "digits")
    path = tmp_path / "digits/train-00000.h5"
    with h5py.File(path) as file:
        chunk = file["x"].id.get_chunk_info(3)
    whole = bytearray(path.read_bytes())
    whole[chunk.byte_offset + 5] ^= 2
    path.write_bytes(whole) if fault == "flipped" else path.unlink()
    program = tmp_path / "program.py"
    program.write_text(
        "import time, hpc_bnn.run.train as t\n"
        "from hpc_bnn.__main__ import run\n"
        "init = t.Run.__init__\n"
        "def begin(self, *arguments):\n"
        "    print('FAULT', time.time(), flush=True)\n"  # it meets it from here on
        "    init(self, *arguments)\n"
        "t.Run.__init__ = begin\n"
        "run()\n"
    )
    done = mpirun(4, program, "train", "--config", "configs/digits.yaml", "--data.shards", tmp_path / "digits",
                  "--data.reading", reading, "--grid.sample_size", 2, "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode != 0 and seconds_after_fault(done) < patience(30)
    assert "train-00000.h5" in done.stderr and "Traceback" not in done.stderr
    if reading == "node" or fault == "vanished":
        assert done.stderr.count("hpc-bnn: error") == 1
    else:
        assert "corrupt" in done.stderr


def test_an_error_of_one_rank_says_on_which_node(mpirun, digits, tmp_path):
    """jobscripts/lib.sh looks for it: from the traceback nobody learns whose device failed."""
    program = tmp_path / "program.py"
    program.write_text(
        "import hpc_bnn.run.train as t\n"
        "from hpc_bnn.__main__ import run\n"
        "def fail(self, *arguments):\n"
        "    if self.comm.grid.rank: raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\n"
        "    self.comm.barrier()\n"
        "t.Run.train = fail\n"
        "run()\n"
    )
    done = mpirun(
        2, program, "train", "--config", "configs/digits.yaml", "--data.shards", digits, "--run_dir", tmp_path / "run"
    )
    said = f"hpc-bnn: error: rank 1 on {os.uname().nodename}: RuntimeError: CUDA error: uncorrectable ECC error"
    assert done.returncode != 0 and done.stderr.count(said) == 1 and done.stderr.count("hpc-bnn: error") == 1


def test_unwritable_run_dir_on_rank_0_ends_all_ranks(mpirun, digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = mpirun(2, "-m", "hpc_bnn", "train", "--config", "configs/digits.yaml", "--data.shards", digits,
                  "--run_dir", tmp_path / "file/run")  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("hpc-bnn: error") == 1 and "is a file" in done.stderr, done.stderr


@pytest.mark.parametrize("backend", ["horovod", *(pytest.param(b, marks=pytest.mark.slow) for b in ("torch", "mpi"))])
def test_a_rank_that_ends_early_does_not_take_the_library_from_the_others(mpirun, backend, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time, torch, hpc_bnn\n"
        f"with hpc_bnn.connect(sample_size=2, device='cpu', backend='{backend}') as comm:\n"
        "    if comm.grid.data_index == 1:\n"
        "        time.sleep(7)\n"
        "    x = torch.ones(2)\n"
        "    comm.sum_(x, 'sample')\n"
        "    assert x.tolist() == [2, 2]\n"
    )
    done = mpirun(4, program)
    assert done.returncode == 0, done.stderr


def test_an_error_on_which_the_ranks_did_not_agree_is_printed_and_ends_the_job(mpirun, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time, hpc_bnn.cli.commands, hpc_bnn.comm, hpc_bnn.errors\n"
        "from hpc_bnn.__main__ import run\n"
        "def command(*_):\n"
        "    comm = hpc_bnn.comm.connect(1, 'cpu')\n"
        "    if comm.grid.rank == 1:\n"
        "        print('FAULT', time.time(), flush=True)\n"
        "        raise hpc_bnn.errors.DataError('only here')\n"
        "    comm.gather_objects(1)\n"
        "commands = hpc_bnn.cli.commands.COMMANDS\n"
        "commands['train'] = commands['train']._replace(run=command)\n"
        "run()\n"
    )
    done = mpirun(2, program, "train", "--config", "configs/digits.yaml")
    assert done.returncode != 0 and "error: only here" in done.stderr
    assert seconds_after_fault(done) < patience(25)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(mpirun, digits, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, threading, time\n"
        "import hpc_bnn.comm\n"
        "from hpc_bnn.__main__ import run\n"
        "def signal_after_the_first_epoch():\n"
        "    while not os.path.exists(sys.argv[-1] + '/metrics.jsonl'): time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "if hpc_bnn.comm.launched_rank() == 1:\n"
        "    threading.Thread(target=signal_after_the_first_epoch, daemon=True).start()\n"
        "run()\n"
    )
    done = mpirun(2, program, "train", "--config", "configs/digits.yaml", "--data.shards", digits, "--grid.sample_size", 2,
                  "--num_epochs", 100000, "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("hpc-bnn: stopped: after step") == 1 and "SIGUSR1" in done.stderr
    assert len(list((tmp_path / "run/checkpoints").glob("*.pt"))) >= 1


def test_a_rank_that_hangs_is_named_with_its_traceback(mpirun, digits, tmp_path):
    """Not the one that waits for it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, hpc_bnn.comm\n"
        "from hpc_bnn.__main__ import run\n"
        "class Hang:\n"
        "    def __call__(self, x, *_):\n"
        "        if hpc_bnn.comm.launched_rank() == 1: time.sleep(600)\n"
        "        return x\n"
        "sys.modules['program'] = sys.modules['__main__']\n"
        "run()\n"
    )
    done = mpirun(2, program, "train", "--config", "configs/digits.yaml", "--data.shards", digits, "--grid.sample_size", 2,
                  "--augmentation.transforms", "[{name: program.Hang}]", "--stall_seconds", 3, "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("made no progress") == 1 and "error: rank 1 on" in done.stderr
    assert 'program.py", line 5 in __call__' in done.stderr


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_and_keeps_the_last(mpirun, digits, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time, hpc_bnn.run.checkpoint as c\n"
        "from hpc_bnn.__main__ import run\n"
        "write, calls = c.write_atomically, []\n"
        "def full(path, content):\n"
        "    calls.append(path)\n"
        "    if len(calls) > 4 and path.suffix == '.pt':\n"
        "        print('FAULT', time.time(), flush=True)\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    write(path, content)\n"
        "c.write_atomically = full\n"
        "run()\n"
    )
    done = mpirun(2, program, "train", "--config", "configs/digits.yaml", "--data.shards", digits, "--grid.sample_size", 2,
                  "--num_epochs", 20, "--run_dir", tmp_path / "run")  # fmt: skip
    assert done.returncode == 1 and seconds_after_fault(done) < patience(40)
    assert done.stderr.count("No space left on device") == 1 and "writing a checkpoint" in done.stderr
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000023.json", "step-00000023.pt", "step-00000046.json", "step-00000046.pt"]


SOCKETS = """
import os, torch, hpc_bnn
comm = hpc_bnn.connect(sample_size=2, device="cpu", backend="torch")
tensor = torch.full((3,), comm.grid.rank + 1.0)
comm.sum_(tensor)
links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
mine = sum(os.readlink(link).startswith("socket") for link in links if os.path.islink(link))
counts = comm.gather_objects(mine)
if comm.grid.rank == 0:
    print("sum", tensor[0].item(), "sockets", max(counts))
comm.close()
"""


def test_ranks_connect_when_they_talk(mpirun, tmp_path):
    """Gloo's own way, a connection of each two ranks for each group, needs more open files the more ranks there are."""
    (tmp_path / "program.py").write_text(SOCKETS)
    counts = {}
    for lazy in ("0", "1"):
        environment = {"TORCH_GLOO_LAZY_INIT": lazy} if lazy == "0" else {}
        done = mpirun(6, tmp_path / "program.py", environment=environment)
        found = re.search(r"sum 21\.0 sockets (\d+)", done.stdout)
        assert done.returncode == 0 and found, done.stdout + done.stderr
        counts[lazy] = int(found[1])
    assert counts["1"] < counts["0"], counts
