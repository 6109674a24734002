"""Shared by all serial tests. The tests in tests/mpi run under mpirun, started by test_mpi.py.

Every limit on a time passes through `patience`: ``HPC_BNN_TEST_PATIENCE=3 make test`` stretches all of them by three.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import hypothesis
import numpy as np
import pytest
from prepared import start

from hpc_bnn.run.plots import write_plots

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

collect_ignore = ["mpi"]
hypothesis.settings.register_profile("hpc_bnn", deadline=None)  # no limit ends a test on a slow machine
hypothesis.settings.load_profile("hpc_bnn")
sys.path.insert(0, str(REPOSITORY / "data_prep"))  # the scripts are imported by their names


def patience(seconds: float) -> float:
    """Return a limit in seconds, stretched by the factor in HPC_BNN_TEST_PATIENCE: 1 unless a machine is slow."""
    return seconds * float(os.environ.get("HPC_BNN_TEST_PATIENCE") or 1)


TEST_SECONDS = 3600
"""Limit of a single test that has no mark of its own. Tests take seconds; the longest, a job of 4 ranks, minutes."""
JOB_SECONDS = 1800
"""Limit of a process or a job of ranks that a test starts."""


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Shard directory of scikit-learn's digits, written by data_prep/digits.py in this process."""
    import common
    import digits as script

    from hpc_bnn import Grid, GridComm

    directory = tmp_path_factory.mktemp("data") / "digits"
    options = common.make_parser(script.__doc__).parse_args(["--output", str(directory)])
    script.prepare(options, GridComm(Grid()))
    return directory


@pytest.fixture(scope="session")
def digits_run(digits, tmp_path_factory):
    """A run of the digits, some epochs long."""
    from hpc_bnn.cli.commands import main

    run_dir = tmp_path_factory.mktemp("runs") / "digits"
    command = ["train", "--config", str(REPOSITORY / "configs/digits.yaml"), "--data.shards", str(digits)]
    command += ["--num_epochs", "3", "--num_samples", "2", "--num_test_samples", "8", "--run_dir", str(run_dir)]
    assert main(command) == 0
    return run_dir


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
    """Two shard directories of the same relation, the second with statistics of its own."""
    from hpc_bnn import write_shards

    directory, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    for name, shift in (("here", 0.0), ("elsewhere", 3.0)):
        x = rng.normal(size=(200, 2)) + shift
        y = np.stack([10 * x[:, 0], 1000 + 50 * x[:, 1]], axis=1) + rng.normal(size=(200, 2))
        facts = {"name": name, "source": "test", "licence": "none", "channels": {"y": ["a", "b"]}}
        write_shards(directory / name, {"train": (x[:150], y[:150]), "test": (x[150:], y[150:])}, **facts)
    return directory


@pytest.fixture(scope="session")
def numbers_run(numbers):
    """A run of these numbers."""
    from hpc_bnn.cli.commands import main

    run_dir = numbers / "run"
    command = ["train", "--data.shards", str(numbers / "here"), "--run_dir", str(run_dir), "--num_epochs", "30"]
    command += ["--num_samples", "4", "--num_test_samples", "16", "--optimizer.learning_rate", "0.02"]
    assert main([*command, "--global_batch_size", "50", "--posterior.init_std", "0.02"]) == 0
    return run_dir


def stored(directory, split="test"):
    """Return inputs as they lie in the shards."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = [directory / shard["file"] for shard in manifest["splits"][split]]
    return np.concatenate([h5py.File(file)["x"][()] for file in files])


@pytest.fixture
def former_noise(monkeypatch):
    """The noise with which frozen numbers and former checkpoints were made."""
    from former_noise import patches

    for of, name, value in patches():
        monkeypatch.setattr(of, name, value)


WRITE_PLOTS = write_plots


@pytest.fixture(scope="session", autouse=True)
def no_plots():
    """Runs in this process draw nothing, as that takes longer than to train; `with_plots` is for the tests of plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpc_bnn.run.plots.write_plots", lambda *_: [])
        yield


@contextlib.contextmanager
def with_plots():
    """Runs in this process draw their plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpc_bnn.run.plots.write_plots", WRITE_PLOTS)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """A kernel that fails takes the GPU away from its process: no test after it could pass there."""
    torch = sys.modules.get("torch")
    if item.path.parent.name == "gpu" and torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)  # another worker takes its place; this test counts as one that crashed
            pytest.exit(f"before {item.name}: the GPU serves this process no more: {error}", returncode=1)


@pytest.fixture(scope="session")
def mpirun():
    """Start a job: ``mpirun(4, "-m", "hpc_bnn", ...)``; returns the finished process with its output."""

    def start(num_ranks, *arguments, runner=("-m", "mpi4py"), timeout=JOB_SECONDS, environment=()):
        variables = dict(environment)
        command = ["mpirun", "-np", str(num_ranks), *python(variables), *runner, *map(str, arguments)]
        return run_job(command, timeout, env=launch_environment() | variables)

    return start


AT_START = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "HPC_BNN_NOISE")
"""What begins the names of variables that Python and libraries read when they start."""


def python(variables=()) -> list[str]:
    """Return the command of a Python whose imports are done (tests/prepared.py), unless one of the variables forbids it.

    It is ``sys.executable`` to its parent, for a program or ``-m module``.
    """
    can_wait = hasattr(os, "pidfd_open")  # on Linux
    return [sys.executable] if not can_wait or any(name.startswith(AT_START) for name in variables) else prepared()


@functools.cache
def prepared(*place) -> list[str]:
    """Return the command of a Python whose imports are done, at a place. Its server ends with this process."""
    return start(*place, env=launch_environment())[1]


def write_program(path: Path, script: str) -> None:
    """Write a shell script that can be started by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run_job(command, timeout=JOB_SECONDS, **options) -> subprocess.CompletedProcess:
    """Run a launcher. At the limit it gets SIGTERM, with which it takes its ranks along; SIGKILL would leave them."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY} | options
    job = subprocess.Popen(command, **options)
    try:
        output, errors = job.communicate(timeout=patience(timeout))
    except BaseException as error:
        job.terminate()
        try:
            output, errors = job.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            job.kill()
            output, errors = job.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            print(output, errors, sep="\n")
        raise
    return subprocess.CompletedProcess(command, job.returncode, output, errors)


def assert_learnt(summary, library):
    """The quickstart's run was a good one, and its sums went by the library."""
    assert summary["communication"]["library"] == library
    assert summary["communication"]["num_collectives"] > 2 * summary["num_steps"]
    assert summary["test/accuracy"] >= 0.97 and summary["test/nll"] <= 0.12


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def launch_environment() -> dict[str, str]:
    """The settings of tools/activate.sh, wherever pytest was started."""
    script = ". tools/activate.sh && env -0"
    output = subprocess.run(["sh", "-c", script], cwd=REPOSITORY, capture_output=True, check=True).stdout
    environment = dict(entry.split("=", 1) for entry in output.decode().split("\0") if "=" in entry)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    # Jobs run beside other tests, and the two nodes of test_slurm.py share their cores, which hpc_bnn cannot know
    environment["OMPI_MCA_threads_pthreads_yield_strategy"] = "nanosleep"
    return environment


# --- how the tests run: limits, what is shown, and in which order ------------------------------------------


def pytest_configure(config):
    """SIGTERM, as `timeout` and batch systems send it, ends the tests like Ctrl-C: with the list of what failed."""
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_sessionstart(session):
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(FailuresAtOnce(reporter))


class FailuresAtOnce:
    """Says what failed and why in one line, when it fails; the whole story comes at the end."""

    def __init__(self, reporter):
        self.reporter = reporter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().partition("\n")[0]
            self.reporter.ensure_newline()
            self.reporter.write_line(f"FAILED {report.nodeid} ({report.when}): {reason[:300]}", red=True)


LONG = (
    "test_mpi.py",
    "test_readme.py",
    "test_slurm.py",
    "test_torchrun.py",
    "test_checkpoint.py",
    "test_doctor.py",
    "test_cli.py",
)
"""Files that take long come first, so that the workers end together. A file stays in one piece: its fixtures are dear. Those of
Slurm and torchrun wait more than they compute: beside the jobs of the other worker."""
OF_RANKS = ("test_mpi.py", "test_readme.py")
"""Files that start jobs of up to four ranks: one worker takes them all. Two such jobs at once would take 1.7 times the
CPU time of one after the other on two cores."""
SLOW = {
    "test_after_wrap.py": "contexts_of_torch",
    "test_calibration.py": "another_format",
    "test_capture.py": "bits_of_plain_ones",
    "test_checkpoint.py": "interrupted_anywhere by_time waits_for_no_step signal_stops_with signal_while_libraries",
    "test_cli.py": "output_that_takes_nothing regression_from missing_shards_are_prepared without_horovod",
    "test_comm.py": "foreign_launcher trial_of_an_mpi",
    "test_configs.py": "swin_of_full_size",
    "test_data.py": "every_flipped_byte mnist_from_its_files every_corruption orders_of_epochs",
    "test_estimators.py": "unbiased_and_of_less_variance",
    "test_export.py": "bit_for_bit_what_its_run",
    "test_families.py": "memory_does_not_grow low_rank_samples_have",
    "test_faults.py": "what_cannot_be_read killed suspended_does_not_count error_at_a_file_operation",
    "test_frozen.py": "numbers_of_20_steps",
    "test_groups.py": "command_writes_groups",
    "test_missing.py": "numbers_from_shards",
    "test_mpi.py": "[2-mpi] [3-torch] [4-torch] [4-mpi] shared_memory_that_is_too_small sixteen_ranks layout_law all_libraries",
    "test_notebook.py": "notebook_runs",
    "test_plan.py": "rehearsed_memory a_grid_fits_only memory_grows",
    "test_predict.py": "full_disk",
    "test_prepare_arrays.py": "60000_images",
    "test_prepare_trains.py": "epoch_on_the_shards full_disk",
    "test_readme.py": "same_numbers_on_every_grid",
    "test_report.py": "junk_in_the_files a_browser",
    "test_sources.py": "netcdf_store",
    "test_torchrun.py": "layout_law_without error_on_which signals_and_exit_codes rank_that_fails objects_and_shared",
}
"""Words in the names of tests that take five seconds and more, and whose subject a quicker one touches as well."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    def rank(item):
        name = item.path.name
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=rank)  # stable: within a file as it is written
    for item in items:
        of_cluster = item.path.name == "test_slurm.py" and "cluster" in item.fixturenames
        if of_cluster or any(word in item.name for word in SLOW.get(item.path.name, "").split()):
            item.add_marker(pytest.mark.slow)
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(patience(TEST_SECONDS)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n 2``: a file per worker, and those of OF_RANKS together, in our order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "of ranks" if file.rpartition("/")[2] in OF_RANKS else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)
