"""tools/setup.sh says what is missing and how to get it, before it does anything."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, patience

TOOLS = ("sh", "cat", "cksum", "dirname", "env", "grep", "sort", "tr", "make", "c++", "python3")


def setup_with(tmp_path, without=(), python="python3", **variables):
    """Run a copy of the set-up on a PATH that holds only a few tools."""
    tree, path = tmp_path / "tree", tmp_path / "bin"
    tree.mkdir()
    path.mkdir()
    shutil.copytree(REPOSITORY / "tools", tree / "tools")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tree)
    for name in set(TOOLS) - set(without):
        target = sys.executable if name == "python3" else shutil.which(name)
        (path / name).symlink_to(target)
    environment = {"PATH": str(path), "HOME": os.environ["HOME"], "PYTHON": python, **variables}
    done = subprocess.run(
        ["/bin/sh", "tools/setup.sh"], cwd=tree, env=environment, capture_output=True, text=True, timeout=patience(60)
    )
    assert not (tree / ".venv").exists()
    return done


@pytest.mark.parametrize(
    "without, remedy",
    [("c++", "apt install make g++"), ("make", "apt install make g++"), ("python3", "apt install python3")],
)
def test_missing_tool(tmp_path, without, remedy):
    done = setup_with(tmp_path, without=[without], HOROVOD="yes")
    assert done.returncode == 1 and f"{without} is missing" in done.stderr and remedy in done.stderr


def test_old_python(tmp_path):
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1;; --version) echo Python 3.8.1;; esac\n')
    old.chmod(0o755)
    done = setup_with(tmp_path, python=str(old))
    assert done.returncode == 1 and "Python 3.8.1 is too old: 3.10" in done.stderr


def test_system_mpi_that_is_not_there(tmp_path):
    done = setup_with(tmp_path, MPI="system")
    assert done.returncode == 1 and "mpicc is not on the PATH" in done.stderr and "module" in done.stderr
    (tmp_path / "again").mkdir()
    done = setup_with(tmp_path / "again", MPI="lam")
    assert done.returncode == 1 and "system, openmpi or mpich" in done.stderr
    (tmp_path / "horovod").mkdir()
    done = setup_with(tmp_path / "horovod", MPI="openmpi", HOROVOD="maybe")
    assert done.returncode == 1 and "HOROVOD=maybe: must be yes or no" in done.stderr
