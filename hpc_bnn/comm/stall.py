"""End the job where a rank hangs: in a collective of tensors, in code of a user, in a file system. Local.

Time counts in which this process ran: a job that the batch system suspended (SIGSTOP) for an hour has not hung.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from .launcher import launched_rank

STALL_SECONDS = 600.0
"""Time that a collective of tensors waits for a missing rank."""
end_job: Callable[[int], object] = os._exit
"""Ends the whole job with an exit code; set where the job is joined."""
_PACKAGE = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)


# --- a rank that never comes to a collective ------------------------------------------------------------


class Waiting:
    """What may take `STALL_SECONDS` and no longer, as a context: MPI, Gloo and Horovod would wait for ever.

    A thread of the process looks at it. Contexts inside each other count as the outer one.
    """

    _current: Waiting | None = None
    _thread: threading.Thread | None = None

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        if Waiting._thread is None or not Waiting._thread.is_alive():  # this process was forked
            Waiting._thread = threading.Thread(target=_look, daemon=True, name="waiting")
            Waiting._thread.start()
        self._outer, Waiting._current = Waiting._current, Waiting._current or self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        Waiting._current = self._outer


def _look() -> None:
    seen: Waiting | None = None
    for seconds in _ticks(STALL_SECONDS):
        if Waiting._current is not seen or seen is None:
            seen, since = Waiting._current, seconds
        elif seconds - since > STALL_SECONDS:
            said = (
                f"hpc-bnn: error: rank {launched_rank()} on {socket.gethostname()} has waited {STALL_SECONDS:.0f} s in "
                f"{seen.what}. A rank that does not say this has failed or hangs: look there"
            )
            print(said, file=sys.stderr, flush=True)
            time.sleep(min(2.0, STALL_SECONDS / 10))  # the other ranks that wait say it, too
            end_job(1)
            os._exit(1)


def _ticks(limit: float) -> Iterator[float]:
    """Yield the seconds in which this process ran; a pause in which it was stopped counts twice at most."""
    pause, seconds, last = min(1.0, limit / 10), 0.0, time.monotonic()
    while True:
        time.sleep(pause)
        now = time.monotonic()
        seconds, last = seconds + min(now - last, 2 * pause), now
        yield seconds


# --- a rank that hangs elsewhere ------------------------------------------------------------------------


class StallWatch:
    """Ends the job, with a traceback of this rank, where the block makes no progress for some time.

    A rank that waits for others in a collective waits half as long again, so that the one that hangs speaks first.
    Where a library does not let Python run, a process beside this one (`hpc_bnn.comm.watchdog`) ends it: the
    interpreter prints the traceback. ``seconds`` is the longest time between two calls of `mark`, None no limit;
    ``rank`` is for the message.
    """

    def __init__(self, seconds: float | None, rank: int):
        self.seconds, self.rank = seconds, rank
        self._num_marks = 0

    def mark(self) -> None:
        """Say that this rank made progress."""
        self._num_marks += 1

    def __enter__(self) -> StallWatch:
        if self.seconds is not None:
            faulthandler.enable()
            program, name = Path(__file__).with_name("watchdog.py"), f"rank {self.rank} on {socket.gethostname()}"
            limit = str(2 * self.seconds + 1)
            command = [sys.executable, "-I", "-S", str(program), str(os.getpid()), limit, name]
            self._watchdog = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)
            self._over = threading.Event()
            arguments = (self.seconds, threading.get_ident(), self._over, self._watchdog.stdin)
            threading.Thread(target=self._look, args=arguments, daemon=True, name="stall").start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.seconds is not None:
            self._over.set()
            self._watchdog.kill()
            self._watchdog.communicate()

    def _look(self, seconds: float, thread: int, over: threading.Event, watchdog: IO[bytes]) -> None:
        seen, since = self._num_marks, 0.0
        os.set_blocking(watchdog.fileno(), False)
        for now in _ticks(seconds):
            if over.is_set():
                return
            with contextlib.suppress(OSError, ValueError):  # it has just ended
                watchdog.write(b".")  # this interpreter runs
            if self._num_marks != seen:
                seen, since = self._num_marks, now
            place = _innermost(sys._current_frames().get(thread))
            waits = place is not None and place.f_code.co_filename.startswith(_HERE)
            if now - since > seconds * (1.5 if waits else 1.0):
                self._end(now - since, place)

    def _end(self, quiet: float, place: FrameType | None) -> None:
        where = f"{place.f_code.co_filename}:{place.f_lineno} ({place.f_code.co_name})" if place else "other code"
        me = f"rank {self.rank} on {socket.gethostname()}"
        remedy = "look at the traceback of the rank that says this first, or give it more time"
        said = f"hpc-bnn: error: {me} has made no progress for {quiet:.0f} s, in {where}. --stall_seconds is"
        print(f"{said} {self.seconds:g}: {remedy}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        end_job(1)
        os._exit(1)


def _innermost(frame: FrameType | None) -> FrameType | None:
    """Return the frame of hpc_bnn that is closest to what a thread does now."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame
