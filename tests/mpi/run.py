"""``mpirun -np N python -m mpi4py tests/mpi/run.py [pytest arguments]``: rank 0 reports for all."""

import os
import sys
from pathlib import Path

import pytest

from hpc_bnn.comm import launched_rank

if __name__ == "__main__":
    if launched_rank() != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    here = str(Path(__file__).parent)
    code = pytest.main(
        [
            here,
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:timeout",
            "-W",
            "ignore:Unknown config option",
            "--color=no",
            f"--confcutdir={here}",
            *sys.argv[1:],
        ]
    )
    sys.exit(int(code))
