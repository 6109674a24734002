"""What a command imports: each rank pays for it, in seconds and in files that it opens. And the names behind the doors."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import JOB_SECONDS, REPOSITORY, patience

PROGRAM = """
import atexit, sys
unwanted = sys.argv.pop().split(",")
atexit.register(lambda: print("loaded:", *[name for name in unwanted if name in sys.modules], file=sys.stderr))
import hpc_bnn.run.plots
hpc_bnn.run.plots.write_plots = lambda *_: []
from hpc_bnn.__main__ import run
run()
"""
"""A command that draws nothing; at its end the last line of its errors names the modules that it has imported."""

OPTIONAL = (
    "scipy",
    "matplotlib",
    "torchmetrics",
    "torchvision",
    "sklearn",
    "pandas",
    "jinja2",
    "torch.utils.tensorboard",
)
TENSORS = ("torch", "h5py")
SLOW = ("numpy", "mpi4py.MPI", "tqdm")


def imported(words, *unwanted):
    """Return the exit code of a command, and which modules of these it imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words, ",".join(unwanted)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=patience(JOB_SECONDS),
    )  # fmt: skip
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "loaded:", done.stderr
    return done.returncode, last[1:]


@pytest.mark.parametrize(
    "words", ["--help", "--version", "train --help", "evaluate --help", "plan --help", "doctor --help"]
)
def test_help_imports_neither_tensors_nor_mpi(words):
    assert imported(words.split(), *OPTIONAL, *TENSORS, *SLOW) == (0, [])


@pytest.mark.parametrize(
    "words", ["train --nothing 3", "train --num_samples many", "evaluate nowhere", "doctor --nothing", "no"]
)
def test_errors_of_the_command_line_import_no_tensors(words):
    assert imported(words.split(), *OPTIONAL, *TENSORS) == (2, [])


def test_a_run_that_draws_nothing_imports_no_more_than_it_needs(digits, tmp_path):
    data = ["--data.shards", str(digits), "--run_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert imported(["train", "--config", "configs/digits.yaml", *data], *OPTIONAL) == (0, [])
    assert (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("name", ["hpc_bnn", "hpc_bnn.comm"])
def test_type_checkers_see_the_names_behind_a_door(name):
    package = import_module(name)
    tree = ast.parse((REPOSITORY / name.replace(".", "/") / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: f"{name}.{node.module}" for node in block.body for alias in node.names}
    assert sorted({*package.__all__} - {"__version__"}) == sorted(seen)
    assert dir(package) == sorted(package.__all__)
    for public, module in seen.items():
        assert getattr(package, public) is getattr(import_module(module), public)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
