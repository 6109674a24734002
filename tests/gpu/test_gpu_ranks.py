"""Two ranks that share one GPU under NCCL: captured steps keep the layout law.

``HPC_BNN_GPU_CHECK=cpu`` runs the same code under Gloo.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import launch_environment, run_job

DEVICE = os.environ.get("HPC_BNN_GPU_CHECK", "cuda:0")
pytestmark = pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="no GPU is visible")


def test_two_ranks_give_what_one_gives():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    done = run_job([*command, Path(__file__).with_name("ranks.py"), DEVICE], env=launch_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": torch, ") == 2 * 8  # a line of each rank
