"""Checkpoints: they contain no rank, no grid and no layout of memory, so a run can resume on any grid.

::

    RUN_DIR/run.json                          identity of the run
    RUN_DIR/checkpoints/step-00000100.pt      the sections below; for torch.load(weights_only=True)
    RUN_DIR/checkpoints/step-00000100.json    its step, metric, size, SHA-256 and run

A checkpoint is written under a temporary name, synced and renamed, then its note: a checkpoint without a note is one
that was never completed. It is a dict (format 3)::

    format_version    3
    sections          name of each section -> its version
    model             parameters and buffers by the names of `Posterior.state_dict`
    optimizer         state: by the same names; groups: options of the optimizer's groups (`Updater.gather_state`)
    schedule          of the learning rate
    place             progress of the run; num_steps of the optimizer
    generator         name of the noise generator (`hpc_bnn.noise.GENERATOR`)
    config            of the run
    run               its identity, and the version of hpc_bnn that wrote this

A section that changes its content gets another version. Checkpoints of format 2 are converted when they are read
(`hpc_bnn.run.former_checkpoint`).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import pickle
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import DataError
from ..safe_files import write_atomically
from ..trees import map_leaves
from . import former_checkpoint

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
SECTIONS = {"model": 1, "optimizer": 1, "schedule": 1, "place": 1, "generator": 1, "config": 1, "run": 1}
"""The sections of a checkpoint, and the version of each that this hpc_bnn writes and reads."""
RUN_FILE = "run.json"


@dataclass(frozen=True)
class CheckpointInfo:
    """Metadata of a checkpoint."""

    file: str
    step: int
    metric: float | None
    """Of the evaluation at this step, less is better; None where there was none."""
    num_bytes: int
    sha256: str
    run: str | None = None
    """Identity of the run; None in notes of hpc_bnn 0.1."""


class CheckpointStore:
    """The checkpoints of a run: the newest ones and the best one are kept. Local: one rank owns it.

    Parameters
    ----------
    directory : path
        Made where it is missing.
    keep_last : int
        Newest checkpoints to keep, at least 1; the one with the lowest metric is kept in addition.
    asynchronous : bool
        Write in a thread; the state is copied to the CPU first. An error is raised by the next `save` or `close`.

    Attributes
    ----------
    identity : str or None
        Of the run (`read_identity`). Checkpoints of another run are named, and neither used nor removed; None: any run.
    """

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2, asynchronous: bool = False):
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future | None = None
        self.identity: str | None = None
        self._damaged: set[str] = set()

    def save(self, state: dict[str, Any], step: int, metric: float | None = None) -> None:
        """Write a checkpoint and remove those that are not kept; raise `DataError` if its name is that of another run's.

        Parameters
        ----------
        state : dict
            The sections, besides ``run``: nested dicts and lists of tensors, numbers and strings, so that
            ``torch.load(path, weights_only=True)`` reads them.
        step : int
            Optimizer steps made so far; names the file.
        metric : float, optional
            Less is better.
        """
        if self._writer is None:
            self._write(state, step, metric)
            return
        self._finish()
        self._pending = self._writer.submit(self._write, _copied(state), step, metric)

    def close(self) -> None:
        """Wait for what is being written."""
        if self._writer is not None:
            try:
                self._finish()
            finally:
                self._writer.shutdown()

    def notes(self) -> list[CheckpointInfo]:
        """Return the notes of the checkpoints of this run, the newest first."""
        return self._scan()[0]

    def load_newest(self) -> dict[str, Any] | None:
        """Return the newest sound state, on the CPU, and name those that are not used; None if there is no checkpoint.

        It raises `DataError` if none is sound, or if this hpc_bnn does not know the format of the newest sound one.
        """
        notes, problems = self._scan(aloud=True)
        for note in notes:
            try:
                content = self._read(note)
            except DataError as error:
                logger.error("%s: the one before it is used", error)
                self._damaged.add(note.file)
            else:
                return self._known(note, content)  # one of a newer format is sound: no fall-back to what is older
        if notes or problems:
            raise DataError(
                f"{self.directory} holds no sound checkpoint, but files of {len(notes) + len(problems)}. "
                "Put back a copy of one, or begin the run anew with <resume> false"
            )
        return None

    def load_best(self) -> dict[str, Any] | None:
        """Return the state with the lowest metric, as `load` does; None if no checkpoint has one."""
        note = _best(self._scan(aloud=True)[0])
        return None if note is None else self.load(note)

    def load(self, note: CheckpointInfo) -> dict[str, Any]:
        """Return the state of a checkpoint, on the CPU.

        It raises `DataError` if it is missing, changed, or of a format that this hpc_bnn does not know.
        """
        return self._known(note, self._read(note))

    def _scan(self, aloud: bool = False) -> tuple[list[CheckpointInfo], dict[Path, str]]:
        """Return the notes of this run, the newest first, and what is wrong with the others by their paths."""
        found, problems = [], {}
        for path in sorted(self.directory.glob("step-*.json")):
            try:
                content = json.loads(path.read_text())
                note = CheckpointInfo(**{name: content[name] for name in _NOTE if name in content})
                if note.file != path.with_suffix(".pt").name:
                    raise ValueError(f"it names {note.file}")
            except (OSError, ValueError, TypeError) as error:
                problems[path] = f"the note {path} cannot be read ({error})"
                continue
            if None in (self.identity, note.run) or note.run == self.identity:
                found.append(note)
            else:
                checkpoint = self.directory / note.file
                problems[checkpoint] = (
                    f"the checkpoint {checkpoint} is one of run {note.run}, and this is run {self.identity}"
                )
        for problem in problems.values() if aloud else ():
            logger.error("%s: it is not used", problem)
        return sorted(found, key=lambda note: -note.step), problems

    def _read(self, note: CheckpointInfo) -> dict[str, Any]:
        """Return what a checkpoint holds; `DataError` where that is not what its note says."""
        path = self.directory / note.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"the checkpoint {path} cannot be read ({error.strerror})") from error
        if len(content) != note.num_bytes or hashlib.sha256(content).hexdigest() != note.sha256:
            raise DataError(f"the checkpoint {path} is damaged (SHA-256)")
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise DataError(f"the checkpoint {path} cannot be loaded ({error})") from error
        if state.get("run", {}).get("identity") != note.run:
            raise DataError(f"the checkpoint {path} is not of run {note.run}, as its note says")
        return state

    def _known(self, note: CheckpointInfo, state: dict[str, Any]) -> dict[str, Any]:
        """Return the sections of what a checkpoint holds; `DataError` where this hpc_bnn does not know them."""
        path = self.directory / note.file
        version = state.get("format_version")
        if version == former_checkpoint.FORMAT_VERSION:
            return former_checkpoint.convert(state, path)
        if version != FORMAT_VERSION:
            raise DataError(
                f"the checkpoint {path} has format {version}: hpc_bnn {__version__} reads formats "
                f"{former_checkpoint.FORMAT_VERSION} and {FORMAT_VERSION}. Use the hpc_bnn that wrote it, or a newer one"
            )
        versions = state["sections"]
        faults = [
            f"section {name} of version {versions.get(name)}"
            for name in {**versions, **state}
            if name not in _HEADER and (name not in SECTIONS or versions.get(name) != SECTIONS[name])
        ]
        faults += [f"no section {name}" for name in SECTIONS if name not in state]
        if faults:
            raise DataError(
                f"the checkpoint {path} has {', '.join(faults)}, which hpc_bnn {__version__} does not know. "
                f"hpc_bnn {state.get('run', {}).get('hpc_bnn')} wrote it: use that version, or a newer one"
            )
        return state

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict[str, Any], step: int, metric: float | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer, path = io.BytesIO(), self.directory / f"step-{step:08d}.pt"
        state = {**state, "run": {"identity": self.identity, "hpc_bnn": __version__}}
        sections = {name: SECTIONS[name] for name in state}
        torch.save({"format_version": FORMAT_VERSION, "sections": sections, **state}, buffer)
        content = buffer.getvalue()
        problems = self._scan()[1]
        if path in problems:
            raise DataError(f"{problems[path]}: it is not overwritten. Move it elsewhere")
        metric = metric if metric is not None and math.isfinite(metric) else None
        digest = hashlib.sha256(content).hexdigest()
        note = CheckpointInfo(path.name, step, metric, len(content), digest, self.identity)
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(asdict(note)))
        self._damaged.discard(path.name)
        self._prune()

    def _prune(self) -> None:
        notes = [note for note in self.notes() if note.file not in self._damaged]
        best = _best(notes)
        for note in notes[self.keep_last :]:
            if note != best:  # without its note it is no checkpoint
                (self.directory / note.file).with_suffix(".json").unlink(missing_ok=True)
        for path in self.directory.glob("step-*.pt"):
            if not path.with_suffix(".json").exists():  # its note is gone, or a process was killed before it wrote one
                path.unlink(missing_ok=True)
        for path in self.directory.glob(".step-*"):
            path.unlink(missing_ok=True)


_HEADER = ("format_version", "sections")
_NOTE = [field.name for field in fields(CheckpointInfo)]  # a newer hpc_bnn may write more


def _best(notes: list[CheckpointInfo]) -> CheckpointInfo | None:
    metrics = {note: note.metric for note in notes if note.metric is not None}
    return min(metrics, key=lambda note: (metrics[note], note.step), default=None)


def _copied(tree: Any) -> Any:
    """Return nested dicts and lists with copies of their tensors on the CPU."""
    return map_leaves(tree, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


# --- the identity of a run -----------------------------------------------------------------------------


def read_identity(run_dir: str | os.PathLike) -> str | None:
    """Return the identity of a run directory; None where it has none, as in hpc_bnn 0.1. Local.

    A file that cannot be read raises `DataError`.
    """
    path = Path(run_dir, RUN_FILE)
    try:
        return str(json.loads(path.read_text())["identity"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}). Put back a copy of it; without the file, a resumed run takes the identity "
            "of its newest checkpoint"
        ) from error


def write_identity(run_dir: str | os.PathLike, identity: str | None = None) -> str:
    """Give a run directory an identity, by default a new one, and return it. Local."""
    identity = identity or uuid.uuid4().hex
    write_atomically(Path(run_dir, RUN_FILE), json.dumps({"identity": identity}) + "\n")
    return identity


# --- the state of the job ------------------------------------------------------------------------------
