"""Shared by all serial tests. The tests in tests/mpi run under mpirun, started by test_mpi.py."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

collect_ignore = ["mpi"]
sys.path.insert(0, str(REPOSITORY / "data_prep"))  # the scripts are imported by their names


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Shard directory of scikit-learn's digits, written by data_prep/digits.py."""
    directory = tmp_path_factory.mktemp("data") / "digits"
    command = [sys.executable, "data_prep/digits.py", "--output", str(directory)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120)
    return directory


@pytest.fixture(scope="session")
def mpirun():
    """Start a job: ``mpirun(4, "-m", "hpc_bnn", ...)``; returns the finished process with its output."""

    def start(num_ranks, *arguments, runner=("-m", "mpi4py"), timeout=120, environment=()):
        command = ["mpirun", "-np", str(num_ranks), sys.executable, *runner, *map(str, arguments)]
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**launch_environment(), **dict(environment)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return start


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
    return environment
