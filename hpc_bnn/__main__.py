"""``python -m mpi4py -m hpc_bnn``, and the console command ``hpc-bnn`` that runs it."""

import gc
import importlib.util
import os
import sys

from . import signals

if __name__ == "__main__":
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # where stdout was closed at the start, a file of the run would get its number, and what a library prints
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    if sys.argv[1:2] == ["train"]:
        signals.watch()  # before what takes long to import


def entry() -> None:
    """Run ``hpc-bnn`` as ``python -m mpi4py -m hpc_bnn``: an exception of one rank then ends the job."""
    if sys.argv[1:2] == ["train"]:
        signals.block()  # until the new program watches them
    runner = ["-m", "mpi4py"] if importlib.util.find_spec("mpi4py") else []
    os.execv(sys.executable, [sys.executable, *runner, "-m", "hpc_bnn", *sys.argv[1:]])


def run() -> None:
    """Run the command line, shut MPI down, and exit with the command's code."""
    try:
        from . import comm
        from .cli.commands import main

        code = main()  # an exception that the ranks did not agree on passes here, and aborts the job
        comm.finalize()
    except KeyboardInterrupt:  # of a command that writes nothing which would be lost
        module = sys.modules.get(f"{__package__}.comm")
        if module is None or module.launched_rank() == 0:
            print("hpc-bnn: interrupted", file=sys.stderr, flush=True)
        if module is not None:
            module.abort(signals.INTERRUPTED)
        os._exit(signals.INTERRUPTED)
    gc.freeze()  # the end of the process would look through a million objects of imported modules for cycles: 2 s
    sys.exit(code)


if __name__ == "__main__":
    run()
