"""Imports run downwards only; only comm knows MPI and Horovod (contracts in setup.cfg). What training imports."""

import subprocess
import sys

from conftest import REPOSITORY


def test_import_contracts():
    done = subprocess.run(
        ["lint-imports", "--config", "setup.cfg"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_training_imports_no_more_than_it_needs():
    """Each rank pays for it, in seconds and in files that it opens: pictures and checks of tests wait until they are asked for."""
    program = (
        "import sys, hpc_bnn.__main__, hpc_bnn.cli, hpc_bnn.run.train\n"
        "large = 'scipy', 'matplotlib', 'torchmetrics', 'torchvision', 'sklearn', 'pandas', 'sympy', 'torch._dynamo'\n"
        "print([name for name in large if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr
