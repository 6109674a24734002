"""Imports run downwards only; only comm knows MPI and Horovod (contracts in setup.cfg). What training imports."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import REPOSITORY

DOORS = ("doctor", "plan", "predictive", "run")
"""Rooms that others enter by their package alone."""


def test_import_contracts():
    done = subprocess.run(["lint-imports", "--config", "setup.cfg"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("room", DOORS)
def test_a_room_has_one_door(room):
    """Nobody outside imports its modules, and the names at the door are there, and no module hides one of them."""
    package = import_module(f"hpc_bnn.{room}")
    modules = {path.stem for path in (REPOSITORY / "hpc_bnn" / room).glob("*.py")}
    assert not modules & {*package.__all__}
    for name in package.__all__:
        assert not isinstance(getattr(package, name), type(sys)), name
    for path in (REPOSITORY / "hpc_bnn").rglob("*.py"):
        if room in path.relative_to(REPOSITORY / "hpc_bnn").parts or path == REPOSITORY / "hpc_bnn/__init__.py":
            continue  # inside; and what type checkers alone see of the names behind a door
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                assert room not in parts or parts[-1] == room, f"{path}: {ast.unparse(node)}"


def test_every_package_says_its_names():
    packages = {path.parent for path in (REPOSITORY / "hpc_bnn").rglob("__init__.py")}
    for path in packages:
        name = ".".join(path.relative_to(REPOSITORY).parts)
        assert import_module(name).__all__, name


def test_training_imports_no_more_than_it_needs():
    """Each rank pays for it, in seconds and in files that it opens: pictures and checks of tests wait until they are asked for."""
    program = (
        "import sys, hpc_bnn.__main__, hpc_bnn.cli, hpc_bnn.run.train\n"
        "large = 'scipy', 'matplotlib', 'torchmetrics', 'torchvision', 'sklearn', 'pandas', 'sympy', 'torch._dynamo'\n"
        "print([name for name in large if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
