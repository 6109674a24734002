"""Imports run downwards only; only comm knows MPI and Horovod (contracts in setup.cfg)."""

import subprocess

from conftest import REPOSITORY


def test_import_contracts():
    done = subprocess.run(
        ["lint-imports", "--config", "setup.cfg"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
