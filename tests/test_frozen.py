"""The numbers of 20 steps and of a resumed run are those that are stored: a refactoring does not change them.

A test that fails here says that numbers changed. Where that is meant, write them anew with ``python benchmarks/frozen.py
--store``; what changed against a commit, bit for bit, says ``python benchmarks/frozen.py --against COMMIT``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from frozen_cases import CORE, digests, run

import hpc_bnn
from hpc_bnn.cli.commands import main

pytestmark = pytest.mark.usefixtures("former_noise")
TOLERANCE = 1e-10
STORED = json.loads((REPOSITORY / "tests/frozen.json").read_text())
FORMER_RUN = Path(__file__).parent / "former_run"


def assert_unchanged(tensors, stored):
    """Compare norms and projections; a projection is as exact as the norm is."""
    found = digests(tensors)
    assert found.keys() == stored.keys()
    for name, pair in found.items():
        scale = stored[name][0]
        assert pair == pytest.approx(stored[name], rel=0, abs=TOLERANCE * scale), name


def test_the_stored_cases_are_those_of_the_suite():
    assert STORED.keys() == CORE.keys()


@pytest.mark.parametrize("name", CORE)
def test_numbers_of_20_steps(name, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_unchanged(run(CORE[name], hpc_bnn.GridComm(hpc_bnn.Grid()), tmp_path / "shards"), STORED[name])
    finally:
        torch.set_num_threads(threads)


def test_a_checkpoint_of_commit_6e97177_goes_on_to_the_same_numbers(digits, tmp_path, caplog):
    """See former_run/README.md. The run stopped within an epoch; Adam, clipping, annealing, views per sample."""
    run_dir = shutil.copytree(FORMER_RUN, tmp_path / "run")
    former, now = (json.loads((path / "manifest.json").read_text()) for path in (run_dir, digits))
    examples = [[shard["crc_sha256"] for shard in m["splits"]["train"]] for m in (former, now)]
    assert examples[0] == examples[1]
    if former["splits"] != now["splits"]:  # the same examples, in files of another HDF5 library
        shutil.copy(digits / "manifest.json", run_dir)
    flags = ["--data.shards", digits, "--device", "cpu", "--max_steps", 50, "--resume", "true"]
    command = ["train", "--config", run_dir / "config.yaml", "--run_dir", run_dir, *flags]
    assert main([*map(str, command)]) == 0
    assert "the checkpoint was written with 30" in caplog.text  # --max_steps: it went on, and did not begin
    expected = json.loads((FORMER_RUN / "expected.json").read_text())
    state = torch.load(run_dir / "checkpoints/step-00000050.pt", weights_only=True)
    assert_unchanged(state["model"], expected["model"])
    summary = json.loads((run_dir / "summary.json").read_text())
    for name, value in expected["summary"].items():
        assert summary[name] == pytest.approx(value, rel=TOLERANCE), name
