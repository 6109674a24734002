"""The notebook runs from its first cell to the last, without MPI and Horovod, in an empty directory."""

import json
import subprocess
import sys

from conftest import REPOSITORY, patience

HIDDEN = """
import matplotlib, sys
matplotlib.use("agg")
sys.modules["mpi4py"] = sys.modules["horovod"] = None  # as if they were not installed
"""


def test_the_notebook_runs_without_mpi(tmp_path):
    notebook = json.loads((REPOSITORY / "examples/after_training.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(
        not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"
    )  # nothing that goes stale
    (tmp_path / "cells.py").write_text("\n".join([HIDDEN, *cells]))
    for _ in range(2):  # who opens it again runs it again
        done = subprocess.run(
            [sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=patience(400)
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy 0.9" in done.stdout and "of the true classes are in their sets" in done.stdout
    assert (tmp_path / "runs/notebook/digits.safetensors").exists()
