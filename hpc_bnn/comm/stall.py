"""End the job where a rank hangs outside of collectives: in code of a user, or in a file system. Local."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from .world import abort

_PACKAGE = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)


class StallWatch:
    """Ends the job, with a traceback of this rank, where the block makes no progress for some time.

    A rank that waits for others in a collective waits half as long again, so that the one that hangs speaks first.
    Where a library does not let Python run, the interpreter's own watchdog prints the traceback.

    Parameters
    ----------
    seconds : float or None
        Longest time between two calls of `mark`; None: no limit.
    rank : int
        For the message.
    """

    def __init__(self, seconds: float | None, rank: int):
        self.seconds, self.rank = seconds, rank
        self._marked = time.monotonic()
        self._over = threading.Event()

    def mark(self) -> None:
        """Say that this rank made progress."""
        self._marked = time.monotonic()

    def __enter__(self) -> StallWatch:
        self.mark()
        if self.seconds is not None:
            arguments = (self.seconds, threading.get_ident())
            faulthandler.dump_traceback_later(2 * self.seconds + 1, exit=True)
            threading.Thread(target=self._look, args=arguments, daemon=True, name="stall").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _look(self, seconds: float, thread: int) -> None:
        while not self._over.wait(min(1.0, seconds / 10)):
            faulthandler.dump_traceback_later(2 * seconds + 1, exit=True)
            if self._over.is_set():  # between the two lines above
                faulthandler.cancel_dump_traceback_later()
            quiet, frame = time.monotonic() - self._marked, sys._current_frames().get(thread)
            place = _innermost(frame)
            if quiet > seconds * (1.5 if place is not None and place.f_code.co_filename.startswith(_HERE) else 1.0):
                self._end(quiet, place)

    def _end(self, quiet: float, place: FrameType | None) -> None:
        where = f"{place.f_code.co_filename}:{place.f_lineno} ({place.f_code.co_name})" if place else "other code"
        print(
            f"hpc-bnn: error: rank {self.rank} on {socket.gethostname()} has made no progress for {quiet:.0f} s, in {where}. "
            f"--stall_seconds is {self.seconds:g}: look at the traceback of the rank that says this first, or give it more time",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        abort(1)
        os._exit(1)


def _innermost(frame: FrameType | None) -> FrameType | None:
    """Return the frame of hpc_bnn that is closest to what a thread does now."""
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return frame
