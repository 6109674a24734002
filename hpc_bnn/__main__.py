"""``python -m mpi4py -m hpc_bnn``, and the console command ``hpc-bnn`` that runs it."""

import importlib.util
import os
import sys


def entry() -> None:
    """Run ``hpc-bnn`` as ``python -m mpi4py -m hpc_bnn``: an exception of one rank then ends the job."""
    runner = ["-m", "mpi4py"] if importlib.util.find_spec("mpi4py") else []
    os.execv(sys.executable, [sys.executable, *runner, "-m", "hpc_bnn", *sys.argv[1:]])


if __name__ == "__main__":
    from hpc_bnn.cli import main

    sys.exit(main())
