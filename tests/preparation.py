"""What the tests of data_prep share."""

import subprocess

import h5py
import numpy as np
import pytest
from conftest import JOB_SECONDS, REPOSITORY, SHARED_DATA, patience, python

from hpc_bnn.comm import GridComm
from hpc_bnn.data import Manifest
from hpc_bnn.grid import Grid


def start(script, *flags):
    """Run a script in a process of its own."""
    return subprocess.run(
        [*python(), f"data_prep/{script}.py", *map(str, flags)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=patience(JOB_SECONDS),
    )


def prepare(script, output, *flags):
    """Run a script in this process; return the manifest and x, y of each split."""
    options = script.make_parser().parse_args(["--output", str(output), *map(str, flags)])
    script.prepare(options, GridComm(Grid(1, 1, 0)))
    return stored(output)


def stored(directory):
    """Return the manifest, and x and y of each split as they stand in the files."""
    manifest, splits = Manifest.read(directory), {}
    for split, shards in manifest.splits.items():
        parts = []
        for shard in shards:
            with h5py.File(directory / shard.file) as file:
                parts.append((file["x"][()], file["y"][()]))
        splits[split] = tuple(np.concatenate(arrays) for arrays in zip(*parts))
    return manifest, splits


def check_statistics(manifest, x=None, y=None):
    """Compare the statistics in the manifest with those of x, y [n, channels, ...]."""
    for name, array in {"x": x, "y": y}.items():
        if array is None:
            continue
        found, dims = manifest.statistics[name], (0, *range(2, array.ndim))
        np.testing.assert_allclose(found.mean, array.mean(dims, dtype=np.float64), rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.std, array.std(dims, dtype=np.float64), rtol=1e-6, atol=1e-9)


def shared(*path):
    """Return the path of a shared data set, or skip."""
    source = SHARED_DATA.joinpath(*path)
    if not source.exists():
        pytest.skip("the shared data sets are not beside this clone")
    return source
