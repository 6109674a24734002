"""Signals that ask a run to stop, honoured from the first instruction on. Local; the standard library alone.

The process notes the first of SIGUSR1, SIGTERM and SIGINT (Ctrl-C), and the run stops with a checkpoint after its step. A
second Ctrl-C ends the process at once, whatever its main thread does.
"""

from __future__ import annotations

import os
import signal
import threading

STOPPING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that Ctrl-C has ended."""


class _State:
    first: str | None = None
    is_watching = False


def received() -> str | None:
    """Return the name of the first signal since `watch`; None where none came."""
    return _State.first


def is_watching() -> bool:
    """Whether `watch` was called in this process."""
    return _State.is_watching


def block() -> None:
    """Keep the signals pending until `watch`, also over an exec: before that, they would end the process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def watch() -> None:
    """Note the signals from now on, until the process ends. Call it in the main thread."""
    if _State.is_watching:
        return
    _State.is_watching = True
    # The C level writes each signal to the pipe at once, also while the main thread is in a library
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in STOPPING:
        signal.signal(number, _note)
    threading.Thread(target=_end_at_second_interrupt, args=(readable,), daemon=True, name="signals").start()
    os.register_at_fork(after_in_child=_forget)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _note(number: int, _) -> None:
    _State.first = _State.first or signal.Signals(number).name


def _end_at_second_interrupt(readable: int) -> None:
    num_interrupts = 0
    while num_interrupts < 2:
        num_interrupts += os.read(readable, 1) == bytes([signal.SIGINT])
    os.write(2, b"hpc-bnn: ended at the second Ctrl-C, without a further checkpoint\n")
    os._exit(INTERRUPTED)


def _forget() -> None:
    """In a process that this one forked, such as a worker of a DataLoader, the signals do what they do elsewhere."""
    signal.set_wakeup_fd(-1)
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
