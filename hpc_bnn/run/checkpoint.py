"""Checkpoints: they contain no rank, no grid and no layout of memory, so a run can resume on any grid.

::

    RUN_DIR/run.json                          identity of the run
    RUN_DIR/checkpoints/step-00000100.pt      the sections below; for torch.load(weights_only=True)
    RUN_DIR/checkpoints/step-00000100.json    file, step, metric, size, SHA-256 and run

A checkpoint is written under a temporary name, synced and renamed, then its note, which has a checksum of itself: a
checkpoint without a note is one that was never completed. One of a step that is there already gets a new name
(step-00000100.1.pt), and the note, replaced in one moment, decides. A checkpoint is a dict (format 3)::

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

import contextlib
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..errors import DataError
from ..safe_files import is_plain, names_in, read_bytes, remove_leftovers, sync_directory, write_atomically
from ..trees import map_leaves
from . import former_checkpoint

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
SECTIONS = {"model": 1, "optimizer": 1, "schedule": 1, "place": 1, "generator": 1, "config": 1, "run": 1}
"""The sections of a checkpoint, and the version of each that this hpc_bnn writes and reads."""
RUN_FILE = "run.json"


_FILE = re.compile(r"step-\d{8,}(\.\d+)?\.(pt|json)")


class DamagedError(DataError):
    """A checkpoint is not what its note says."""


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
    metric_name: str | None = None
    """What ``metric`` is of: checkpoints of another one are never the best."""

    def to_json(self) -> str:
        """Return the text of a note, with its own SHA-256."""
        content = asdict(self)
        return json.dumps(content | {"note_sha256": _digest_of(content)})

    @classmethod
    def read(cls, path: Path) -> CheckpointInfo | None:
        """Return the note in a file; None where there is none, `ValueError` if it is damaged, `DataError` if unreadable."""
        text = read_bytes(path, "the note")
        if text is None:
            return None
        content = json.loads(text.decode())
        if not isinstance(content, dict):
            raise ValueError("it is no note")
        digest = content.pop("note_sha256", None)  # none in notes of hpc_bnn 0.1
        if digest is not None and digest != _digest_of(content):
            raise ValueError("it was changed after it was written (SHA-256)")
        note = cls(**{name: content[name] for name in _NOTE if name in content})  # a newer hpc_bnn may write more
        is_file = is_plain(note.file) and _FILE.fullmatch(note.file) and note.file.endswith(".pt")
        if not is_file or _stem(note.file) != path.stem:
            raise ValueError(f"it names {note.file}")
        is_metric = note.metric is None or (isinstance(note.metric, (int, float)) and math.isfinite(note.metric))
        texts = (note.sha256, note.run or "", note.metric_name or "")
        if not (is_metric and f"step-{note.step:08d}" == path.stem and all(isinstance(text, str) for text in texts)):
            raise ValueError("it misstates a field")
        return note


class CheckpointStore:
    """The checkpoints of a run: the newest ones and the best one are kept. Local: one rank owns it.

    What is damaged is named when it is found, and moved aside (``NAME.damaged``) by the next `save`; it counts for none of
    those that are kept. What cannot be read (an error of the file system) is an error, and nothing is changed.

    Parameters
    ----------
    keep_last : int
        Newest sound checkpoints to keep, at least 1; the one with the lowest metric is kept in addition.
    asynchronous : bool
        Write in a thread; the state is copied to the CPU first. An error is raised by the next `save` or `close`.

    Attributes
    ----------
    identity : str or None
        Of the run (`read_identity`). Checkpoints of another run are named, and neither used nor removed; None: any run.
    before_write : callable
        Called before each write; it raises if the directory is no longer that of the run (`RunDir.check`).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int = 2,
        asynchronous: bool = False,
        metric_name: str | None = None,
    ):
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.metric_name = metric_name
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future | None = None
        self.identity: str | None = None
        self.before_write: Callable[[], None] = lambda: None
        self._checked: set[CheckpointInfo] = set()
        self._damaged: set[CheckpointInfo] = set()

    def save(self, state: dict[str, Any], step: int, metric: float | None = None) -> None:
        """Write a checkpoint and remove those that are not kept; raise `DataError` if its name is that of another run's.

        ``state`` are the sections, besides ``run``: nested dicts and lists of tensors, numbers and strings, so that
        ``torch.load(path, weights_only=True)`` reads them. ``step``, the optimizer steps made so far, names the file:
        one of the same step is replaced in one moment. Of ``metric`` less is better.
        """
        if self._writer is None:
            self._write(state, step, metric)
            return
        self._finish()
        copied = map_leaves(state, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._pending = self._writer.submit(self._write, copied, step, metric)

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

    def load_newest(self, falls_back: bool = True) -> dict[str, Any] | None:
        """Return the newest sound state, on the CPU, and name those that are not used; None if there is no checkpoint.

        It raises `DataError` if none is sound or one cannot be read, or if this hpc_bnn does not know the format of the
        newest sound one. Without ``falls_back``, which is for a run that goes on to the same end, also if the newest one is
        damaged.
        """
        notes, problems = self._scan(aloud=falls_back)
        for note in notes:
            own = _stem(note.file)
            later = [p for path, p in problems.items() if not falls_back and _stem(path.name) > own]
            try:
                content = self._read(note)
            except DamagedError as error:
                if not (self.directory / f"{own}.json").exists():  # another process goes on with the run: pruned
                    return self.load_newest(falls_back)
                later.append(str(error))
                if falls_back:
                    logger.error("%s: the one before it is used", error)
                    continue
            if later:
                raise DataError(
                    f"{later[0]}. Put back a copy of it; hpc-bnn train with <resume> true goes on from the one before it; or move "
                    "the damaged files elsewhere to use an older state"
                )
            return self._known(note, content)  # one of a newer format is sound: no fall-back to what is older
        if notes or problems:
            found = "; ".join(problems.values())
            raise DataError(
                f"{self.directory} holds no sound checkpoint, but files of {len(notes) + len(problems)} {f'({found}) ' if found else ''}. "
                "Put back a copy of one, or begin the run anew with <resume> false"
            )
        return None

    def load_best(self) -> dict[str, Any] | None:
        """Return the state with the lowest metric (`load`); None if there is none, `DataError` if a note is damaged."""
        notes, problems = self._scan(aloud=True)
        damaged = [problem for path, problem in problems.items() if path.suffix == ".json"]
        if damaged:
            remedy = "Use --which newest, or move it elsewhere"
            raise DataError(f"{damaged[0]}, and it may be that of the best checkpoint. {remedy}")
        note = self._best(notes)
        return None if note is None else self.load(note)

    def load(self, note: CheckpointInfo) -> dict[str, Any]:
        """Return the state of a checkpoint, on the CPU; `DataError` if missing, changed, or of an unknown format."""
        return self._known(note, self._read(note))

    def _scan(self, aloud: bool = False) -> tuple[list[CheckpointInfo], dict[Path, str]]:
        """Return this run's notes, newest first, and problems by path: .json of a note, .pt of another's checkpoint."""
        found, problems = [], {}
        try:
            names = names_in(self.directory)
        except OSError as error:
            raise DataError(
                f"{self.directory} cannot be read ({error.strerror}), which does not mean that it holds no checkpoint. "
                "Look at the file system and the rights, and try again"
            ) from error
        for name in names:
            path = self.directory / name
            if not (_FILE.fullmatch(name) and name.endswith(".json")):
                continue
            try:
                note = CheckpointInfo.read(path)
            except (ValueError, TypeError, RecursionError) as error:
                problems[path] = f"the note {path} cannot be read ({error})"
                continue
            if note is None:  # removed at this moment
                continue
            if None in (self.identity, note.run) or note.run == self.identity:
                found.append(note)
            else:
                other = self.directory / note.file
                problems[other] = f"the checkpoint {other} is one of run {note.run}, and this is run {self.identity}"
        for problem in problems.values() if aloud else ():
            logger.error("%s: it is not used", problem)
        return sorted(found, key=lambda note: -note.step), problems

    def _read(self, note: CheckpointInfo) -> dict[str, Any]:
        """Return what a checkpoint holds; `DamagedError` where that is not what its note says."""
        path = self.directory / note.file
        content = self._content(note)
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            identity = state.get("run", {}).get("identity")
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, pickle.UnpicklingError) as error:
            raise DamagedError(f"the checkpoint {path} cannot be loaded ({error})") from error
        if identity != note.run:
            raise DamagedError(f"the checkpoint {path} is not of run {note.run}, as its note says")
        return state

    def _content(self, note: CheckpointInfo) -> bytes:
        path = self.directory / note.file
        content = read_bytes(path, "the checkpoint")
        if content is None:
            self._damaged.add(note)
            raise DamagedError(f"the checkpoint {path} is missing, and its note is there")
        if len(content) != note.num_bytes or hashlib.sha256(content).hexdigest() != note.sha256:
            self._damaged.add(note)
            raise DamagedError(f"the checkpoint {path} is damaged (SHA-256)")
        self._checked.add(note)
        return content

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
            rule = f"the checkpoint {path} has {', '.join(faults)}, which hpc_bnn {__version__} does not know"
            remedy = f"hpc_bnn {state.get('run', {}).get('hpc_bnn')} wrote it: use that version, or a newer one"
            raise DataError(f"{rule}. {remedy}")
        return state

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict[str, Any], step: int, metric: float | None) -> None:
        buffer, name = io.BytesIO(), f"step-{step:08d}"
        state = {**state, "run": {"identity": self.identity, "hpc_bnn": __version__}}
        sections = {name: SECTIONS[name] for name in state}
        torch.save({"format_version": FORMAT_VERSION, "sections": sections, **state}, buffer)
        content = buffer.getvalue()
        self.before_write()
        self.directory.mkdir(parents=True, exist_ok=True)
        notes, problems = self._scan()
        self._move_damaged_aside(notes, problems)
        for other, problem in problems.items():
            if other.suffix == ".pt" and _stem(other.name) == name:
                raise DataError(f"{problem}: it is not overwritten. Move it elsewhere")
        # A new name each time: until the note is replaced, it names the former file of this step
        numbers = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
        path = next(p for n in numbers if not os.path.lexists(p := self.directory / f"{name}{n}.pt"))
        metric = metric if metric is not None and math.isfinite(metric) else None
        digest = hashlib.sha256(content).hexdigest()
        note = CheckpointInfo(path.name, step, metric, len(content), digest, self.identity, self.metric_name)
        write_atomically(path, content)
        self.before_write()
        write_atomically(self.directory / f"{name}.json", note.to_json())
        self._checked.add(note)
        self._prune()

    def _move_damaged_aside(self, notes: list[CheckpointInfo], problems: dict[Path, str]) -> None:
        """Give damaged notes, and checkpoints that were found damaged, other names, and say so."""
        stems = {_stem(note.file) for note in notes if note in self._damaged}
        stems |= {_stem(path.name) for path in problems if path.suffix == ".json"}
        for name in names_in(self.directory) if stems else ():
            if _FILE.fullmatch(name) and _stem(name) in stems:
                path = self.directory / name
                places = (path.with_name(f"{name}.damaged{number}") for number in itertools.count(1))
                aside = next(place for place in places if not os.path.lexists(place))
                path.rename(aside)
                logger.error("%s is damaged, or belongs to a damaged file: moved to %s", path, aside.name)
        self._damaged.clear()

    def _prune(self) -> None:
        """Remove what is not kept, as soon as the sound ones that are kept have been looked at."""
        notes, problems = self._scan()
        sound = list(itertools.islice(filter(self._is_sound, notes), self.keep_last))
        best = self._best(notes)
        if best is not None and not self._is_sound(best):
            best = self._best([note for note in notes if note not in self._damaged])
        kept = {note for note in notes if note == best or note in self._damaged or note.step >= sound[-1].step}
        if len(sound) < self.keep_last:
            kept = set(notes)
        for note in set(notes) - kept:  # without its note it is no checkpoint
            (self.directory / f"{_stem(note.file)}.json").unlink(missing_ok=True)
        stems, files = {_stem(path.name) for path in problems}, {note.file for note in kept}
        for name in names_in(self.directory):  # pruned, replaced, or a process was killed before it wrote the note
            if _FILE.fullmatch(name) and name.endswith(".pt") and name not in files and _stem(name) not in stems:
                (self.directory / name).unlink(missing_ok=True)
        remove_leftovers(self.directory, _FILE)
        sync_directory(self.directory)

    def _is_sound(self, note: CheckpointInfo) -> bool:
        """Whether a checkpoint is what its note says; those that this process has read or written are known."""
        if note not in self._checked | self._damaged:
            with contextlib.suppress(DamagedError):
                self._content(note)
        return note in self._checked

    def _best(self, notes: list[CheckpointInfo]) -> CheckpointInfo | None:
        """Return the one with the lowest metric, of those with the metric of the run, or of the newest of them."""
        measured = [note for note in notes if note.metric is not None]
        name = self.metric_name or next((note.metric_name for note in measured), None)
        measured = [note for note in measured if note.metric_name in (name, None)]
        return min(measured, key=lambda note: (note.metric, note.step), default=None)


_HEADER = ("format_version", "sections")
_NOTE = [field.name for field in fields(CheckpointInfo)]


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _digest_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- the identity of a run -----------------------------------------------------------------------------


def read_identity(run_dir: str | os.PathLike) -> str | None:
    """Return the identity of a run directory, None without one (hpc_bnn 0.1); `DataError` if unreadable. Local."""
    path = Path(run_dir, RUN_FILE)
    text = read_bytes(path, "the identity of a run")
    if text is None:
        return None
    try:
        identity = json.loads(text.decode())["identity"]
        if not is_plain(identity):
            raise ValueError(f"{identity!r} is no identity")
        return identity
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}). Put back a copy of it; without the file, a resumed run takes the identity "
            "of its newest checkpoint"
        ) from error


def write_identity(run_dir: str | os.PathLike, identity: str | None = None) -> str:
    """Give a run directory an identity, by default a new one, and return it. Local."""
    identity = identity or uuid.uuid4().hex
    write_atomically(Path(run_dir, RUN_FILE), json.dumps({"identity": identity}) + "\n")
    return identity
