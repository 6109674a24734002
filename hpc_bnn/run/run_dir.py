"""The directory of a run, as the one process that writes to it sees it. Local: rank 0 owns it.

::

    RUN_DIR/run.json         identity of the run: a new one for each run, also in config, rows, checkpoints, notes, summary
    RUN_DIR/config.yaml      resolved config; it is written last, so that a directory without it holds no run
    RUN_DIR/manifest.json    of the training data
    RUN_DIR/metrics.jsonl    a row per epoch
    RUN_DIR/.lock            its owner, while a process writes (`hpc_bnn.safe_files.locks`)
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from ..data.manifest import MANIFEST
from ..errors import ConfigError, DataError, Fault
from ..safe_files import (
    append_line,
    is_leftover,
    names_in,
    read_bytes,
    refuse_world_writable,
    remove_leftovers,
    sync_directory,
    write_atomically,
)
from ..safe_files.locks import LOCK, Lock
from .checkpoint import RUN_FILE, read_identity, write_identity
from .plots import ROWS_FILE, read_rows

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
_OF_A_START = {RUN_FILE, CONFIG, MANIFEST, LOCK}
"""What a run that was killed before its first row leaves."""
_TEMPORARY = re.compile(r"lock|(run|manifest|summary)\.json|config\.yaml|metrics\.jsonl")
"""Names of which a killed process may leave temporary files; a process without the lock may be writing evaluation.json."""
_SIGN = "# run "


class RunDir:
    """The right to write to the directory of a run."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(os.path.realpath(path))
        self.identity: str | None = None
        """Of the run; None before `begin`, and of a run of hpc_bnn 0.1."""
        self._lock: Lock | None = None

    def open(self, resumes: bool) -> None:
        """Take the lock of the directory, if it is there, and read its identity if a run goes on.

        `ConfigError` if another process has it or it holds other things than a run, `DataError` if it is unreadable.
        """
        file = next((path for path in (self.path, *self.path.parents) if path.is_file()), None)
        if file is not None:
            raise ConfigError(Fault("run_dir", self.path, f"{file} is a file", "Name a new directory"))
        names = {name for name in names_in(self.path) if not is_leftover(name, _TEMPORARY)}
        if names - {LOCK} and not names & {RUN_FILE, CONFIG, *(["checkpoints"] if resumes else [])}:
            raise ConfigError(Fault("run_dir", self.path, "it holds files, but no run", "Name a new directory"))
        if not self.path.exists():
            return
        refuse_world_writable(self.path, "the run directory")
        self._lock = Lock(self.path, "run_dir")
        if not resumes:
            return
        self.identity = read_identity(self.path)
        config = read_bytes(self.path / CONFIG, "the config") or b""
        first = config.partition(b"\n")[0].decode(errors="replace")
        if first.startswith(_SIGN) and self.identity not in (None, first.removeprefix(_SIGN)):
            raise DataError(
                f"{self.path / CONFIG} is of run {first.removeprefix(_SIGN)}, and {RUN_FILE} says {self.identity}: "
                "two runs are mixed here. Put back the files of one of them"
            )

    def begin(self, manifest: str, config: str) -> None:
        """Make the directory, whole or not at all, and move a former run aside; `ConfigError` if another makes it."""
        if self._lock is not None:
            remove_leftovers(self.path, _TEMPORARY)
        if self._lock is not None and set(names_in(self.path)) <= _OF_A_START:
            self._fill(self.path, manifest, config)  # it may have rights and a striping that the user wants
            return
        former, aside = self._lock, None
        if former is not None:
            names = (self.path.with_name(f"{self.path.name}.{number}") for number in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            former.check()
            self.path.rename(aside)
            former.moved_to(aside)
            logger.warning("%s holds a former run: moved to %s", self.path, aside)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        made = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        made.mkdir(mode=0o775)
        try:
            self._lock = Lock(made, "run_dir")
            self._fill(made, manifest, config)
            try:
                made.rename(self.path)
            except OSError as error:
                if not self.path.exists():
                    raise
                rule = "another process has made it in the meantime"
                raise ConfigError(Fault("run_dir", self.path, rule, "Name another directory")) from error
            self._lock.moved_to(self.path)
            sync_directory(self.path.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
            if former is not None:
                former.release()

    def _remove_leftovers(self) -> None:
        """Remove what processes that were killed in `begin` left beside the directory."""
        for name in names_in(self.path.parent):
            left = self.path.with_name(name)
            if re.fullmatch(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{16}}", name) and left.is_dir():
                with contextlib.suppress(ConfigError, OSError), Lock(left, "run_dir"):
                    shutil.rmtree(left)

    def _fill(self, directory: Path, manifest: str, config: str) -> None:
        self.identity = write_identity(directory)
        write_atomically(directory / MANIFEST, manifest)
        write_atomically(directory / CONFIG, f"{_SIGN}{self.identity}\n{config}")

    def resume(self, identity: str | None, config: str, last_epoch: int, last_row: dict[str, Any]) -> None:
        """Go on with a run: write its config, and keep the rows of complete epochs; the run writes those of the others again.

        ``identity`` is that of the checkpoint. A row that cannot be read is left out, and said; ``last_row`` is put
        back if it is not there.
        """
        if self.identity is None:
            self.identity = write_identity(self.path, identity)
        remove_leftovers(self.path, _TEMPORARY)
        path = self.path / ROWS_FILE
        rows, num_lost = read_rows(path)
        if num_lost:
            logger.warning("%s: %d rows cannot be read and are left out", path, num_lost)
        ours = [row for row in rows if row.get("run", self.identity) == self.identity]
        kept = [row for row in ours if isinstance(row.get("epoch"), int) and row["epoch"] <= last_epoch]
        if 0 < last_row.get("epoch", 0) <= last_epoch and last_row["epoch"] not in [row["epoch"] for row in kept]:
            kept.append(self._signed(last_row))
        self.write(ROWS_FILE, "".join(f"{json.dumps(row)}\n" for row in kept))
        self.write_config(config)

    def write_config(self, config: str) -> None:
        """Write the resolved config, signed with the identity of the run."""
        self.write(CONFIG, f"{_SIGN}{self.identity}\n{config}")

    def check(self) -> None:
        """Raise `DataError` unless the directory is still that of this run and of this process."""
        assert self._lock is not None, "begin or open comes first"
        self._lock.check()
        found = read_identity(self.path)
        if found != self.identity:
            raise DataError(f"{self.path} is now that of run {found}: run {self.identity} writes no more to it")

    def write(self, name: str, content: str) -> None:
        """Write a file of the run, after a `check`."""
        self.check()
        write_atomically(self.path / name, content)

    def append_row(self, row: dict[str, Any]) -> None:
        """Add a row to the metrics, after a `check`."""
        self.check()
        append_line(self.path / ROWS_FILE, json.dumps(self._signed(row)))

    def close(self) -> None:
        """Give the directory free."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _signed(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "run": self.identity}
