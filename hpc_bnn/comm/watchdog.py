"""``python watchdog.py PID SECONDS NAME``: end the process that started this one when it is silent for too long.

It writes a byte to this one's stdin whenever its interpreter runs, and closes it at its end. What holds the interpreter
(an extension, a library in a file system that hangs) is silent; a process that is stopped is not counted. SIGABRT lets
the interpreter print where it was. It needs the standard library only.
"""

import contextlib
import os
import select
import signal
import sys

PAUSE = 0.2
"""Between two looks (seconds)."""


def is_stopped(pid: int) -> bool:
    """Whether a process stands still by SIGSTOP or a debugger; not known without /proc."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def watch(pid: int, limit: float, name: str) -> None:
    """Return when the process has ended; end it when it was silent for some seconds."""
    quiet = 0.0
    while os.getppid() == pid:
        if select.select([0], [], [], PAUSE)[0]:
            if not os.read(0, 4096):
                return
            quiet = 0.0
        elif not is_stopped(pid):
            quiet += PAUSE
        if quiet > limit:
            said = f"hpc-bnn: error: {name} has made no progress for {quiet:.0f} s, and Python cannot run there\n"
            os.write(2, said.encode())
            os.kill(pid, signal.SIGABRT)
            return


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # launchers signal all processes of a job
    watch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
