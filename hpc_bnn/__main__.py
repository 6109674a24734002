"""``python -m mpi4py -m hpc_bnn``, and the console command ``hpc-bnn`` that runs it."""

import importlib.util
import os
import sys


def entry() -> None:
    """Run ``hpc-bnn`` as ``python -m mpi4py -m hpc_bnn``: an exception of one rank then ends the job."""
    runner = ["-m", "mpi4py"] if importlib.util.find_spec("mpi4py") else []
    os.execv(sys.executable, [sys.executable, *runner, "-m", "hpc_bnn", *sys.argv[1:]])


def run() -> None:
    """Run the command line, shut MPI down, and exit with the command's code."""
    from . import comm
    from .cli.commands import main

    code = main()  # an exception that the ranks did not agree on passes here, and aborts the job
    comm.finalize()
    sys.exit(code)


if __name__ == "__main__":
    run()
