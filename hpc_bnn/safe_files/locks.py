"""One process at a time writes to a directory, also on NFS and from several hosts. Local; without torch.

``DIR/.lock`` names its owner: host, process, job, and a random token. It is made with O_EXCL, which NFS keeps atomic. The
owner touches it again and again, so that the file server writes its own time; whoever wants the lock compares that with
the server's time of a file that it touches itself, because the clocks of two hosts differ. On the host of the owner the
process table answers at once, also for a process that is only stopped. The owner asks before each write whether the lock
is still its own (`Lock.check`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, Fault
from . import NEW, is_plain, link_new, read_bytes

logger = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
"""An owner on another host that has not touched its lock for so long has ended."""
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


class Lock:
    """The right of this process to write to a directory, which is there. Use it as a context, or call `release`.

    `ConfigError` where another process has it, and lives; the user calls it ``field``, such as ``run_dir``.
    """

    def __init__(self, directory: str | os.PathLike, field: str):
        self.directory, self.field = Path(directory), field
        self.token = secrets.token_hex(8)
        self._acquire()
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    @property
    def path(self) -> Path:
        """Where the lock is; the directory may be renamed while it is held (`moved_to`)."""
        return self.directory / LOCK

    def moved_to(self, directory: Path) -> None:
        """Follow the directory, which the owner has renamed."""
        self.directory = directory

    def check(self) -> None:
        """Raise `DataError` if another process has taken the directory, moved or removed it."""
        owner = _read(self.path)
        if owner.get("token") != self.token:
            now = f"now it is in use by {_words(owner)}" if owner else "its lock is gone"
            rule = f"{self.directory} is no longer that of this process ({now}): nothing more is written there"
            raise DataError(f"{rule}. Do not move or remove a directory in use; begin again with another one")

    def release(self) -> None:
        """Give the directory free, if it is still ours."""
        self._over.set()
        with contextlib.suppress(DataError, OSError):
            self.check()
            self.path.unlink()

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(DataError, OSError):
                self.check()
                os.utime(self.path)  # without numbers: the server's time

    # --- taking it --------------------------------------------------------------------------------

    def _acquire(self) -> None:
        while not self._create():
            owner, touched = _read(self.path), _touched(self.path)
            if touched is not None and self._is_over(owner, touched):
                self._remove(owner)

    def _create(self) -> bool:
        """Make the lock with its content at once, so that none is empty for longer than a moment."""
        content = json.dumps(_this_process() | {"token": self.token}).encode()
        made = self.path.with_name(f"{LOCK}.{self.token}")
        try:
            _write_new(made, content)
            if link_new(made, self.path):
                return True
            _write_new(self.path, content)  # a file system without links
            return True
        except FileExistsError:
            return False
        finally:
            made.unlink(missing_ok=True)

    def _is_over(self, owner: dict[str, Any], touched: float) -> bool:
        """Whether the owner has ended; `ConfigError` if it lives. It may take `STALE_SECONDS` to tell."""
        lives = _lives(owner)
        is_said = False
        while lives is None:
            age = self._now() - touched
            if age > STALE_SECONDS:
                logger.warning("%s: %s gave no sign of life for %.0f s", self.path, _words(owner), age)
                return True
            if not is_said:
                logger.warning(
                    "%s: %s has it, and gave its last sign of life %.0f s ago: waiting for another one, at most %.0f s",
                    self.path, _words(owner), age, STALE_SECONDS - age,
                )  # fmt: skip
                is_said = True
            time.sleep(min(1.0, STALE_SECONDS / 20))
            again = _touched(self.path)
            if again is None or _read(self.path) != owner:
                return False  # it is free, or another's
            lives = again != touched or None
        if lives:
            rule, remedy = f"it is in use by {_words(owner)}", "Wait for the end of that process, or name another one"
            raise ConfigError(Fault(self.field, self.directory, rule, remedy))
        return True

    def _remove(self, owner: dict[str, Any]) -> None:
        """Remove the lock of an owner that has ended: the only one of several takers that may is the first that says so."""
        claim = self.path.with_name(f"{LOCK}.{owner.get('token', 'empty')[:32]}.over")
        try:
            _write_new(claim, b"")
        except FileExistsError:
            time.sleep(0.1)
            made = _touched(claim)
            if made is not None and self._now() - made > STALE_SECONDS:  # that taker has ended, too
                claim.unlink(missing_ok=True)
            return
        try:
            if _read(self.path) == owner:
                self.path.unlink()
        finally:
            claim.unlink(missing_ok=True)

    def _now(self) -> float:
        """Return the time of the server of this directory."""
        mine = self.path.with_name(f"{LOCK}.{self.token}")
        descriptor = os.open(mine, NEW, 0o644)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            mine.unlink(missing_ok=True)


def _write_new(path: Path, content: bytes) -> None:
    """Write a small file that is not there yet; a full disk leaves none."""
    descriptor = os.open(path, NEW, 0o644)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Return what a lock says of its owner; nothing where it says nothing, or is not there."""
    content = read_bytes(path, "the lock")
    try:
        owner = json.loads(content or b"{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) and is_plain(owner.get("token")) else {}


def _touched(path: Path) -> float | None:
    """Return when a file was touched; None where it is not there. Opening it asks the server."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _this_process() -> dict[str, Any]:
    jobs = ", ".join(f"{name}={os.environ[name]}" for name in _JOBS if name in os.environ) or None
    here = {"host": socket.gethostname(), "kernel": _kernel()}
    return here | {"process": os.getpid(), "started": _started(os.getpid()), "job": jobs}


def _kernel() -> str | None:
    """Return a name of the running kernel and of this process's table of processes; None where there is none."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _started(process: int) -> int | None:
    """Return when a process was started (ticks of the kernel); None where it is not there, or a zombie."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the owner of a lock lives; None where this host cannot tell."""
    kernel, process = owner.get("kernel"), owner.get("process")
    if kernel is None or kernel != _kernel() or not isinstance(process, int):
        return None
    return owner.get("started") is not None and _started(process) == owner["started"]


def _words(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that has not written its name"
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('process')} on {owner.get('host')}{job}"
