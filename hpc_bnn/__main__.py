"""``python -m mpi4py -m hpc_bnn``, and the console command ``hpc-bnn`` that runs it."""

import contextlib
import gc
import importlib.util
import os
import sys
from pathlib import Path

from .run import signals


class Output:
    """A stream that loses what cannot be written, and keeps why: a reader that has gone ends no run, nor does a full disk."""

    def __init__(self, stream):
        self.stream, self.error = stream, None
        with contextlib.suppress(AttributeError, OSError):  # where a tool has put something else there
            stream.reconfigure(errors="replace")  # an ASCII terminal has no µ

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:  # noqa: D102
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:  # noqa: D102
        self._try(self.stream.flush)

    def _try(self, action) -> None:
        try:
            action()
        except OSError as error:
            self.error, self.stream = self.error or error, Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115


def guard_output() -> None:
    """Let no output end the program: what is closed, full or without a reader loses what is printed."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # where stdout was closed at the start, a file of the run would get its number, and what a library prints
    sys.stdout, sys.stderr = Output(sys.stdout or os.fdopen(1, "w")), Output(sys.stderr or os.fdopen(2, "w"))


def code_of_output(code: int) -> int:
    """Return the exit code of a program that ends with ``code``, after its last output; 1 where some of it is lost, and say so."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None and not isinstance(error, BrokenPipeError):  # `head` wanted no more
        print(f"hpc-bnn: error: stdout: {error.strerror}. The rest of the output is lost", file=sys.stderr, flush=True)
        code = code or 1
    return code


if __name__ == "__main__":
    guard_output()
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
    except Exception as error:
        # The traceback of a rank does not say whose it is, and jobscripts/lib.sh looks for a node that failed
        module = sys.modules.get(f"{__package__}.comm.launcher")
        if module is not None and module.launcher_of(os.environ).name:
            me = f"rank {module.launched_rank()} on {os.environ.get('SLURMD_NODENAME') or os.uname().nodename}"
            print(f"hpc-bnn: error: {me}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    code = code_of_output(code)
    gc.freeze()  # the end of the process would look through a million objects of imported modules for cycles: 2 s
    sys.exit(code)


if __name__ == "__main__":
    run()
