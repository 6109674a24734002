"""Checkpoints: they contain no rank and no grid, so a run can resume on any grid.

::

    RUN_DIR/checkpoints/step-00000100.pt      parameters, optimizer, place in the run; for torch.load(weights_only=True)
    RUN_DIR/checkpoints/step-00000100.json    its step, metric, size and SHA-256

Both are written under temporary names, synced and renamed, the note last: a checkpoint without a note, or with a note
that does not match, is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import pickle
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm, map_leaves
from ..errors import DataError
from ..posteriors import Posterior
from ..safe_files import write_atomically
from ..training.optim import JobOptimizer

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


@dataclass(frozen=True)
class Note:
    """Metadata of a checkpoint."""

    file: str
    step: int
    metric: float | None
    """Of the evaluation at this step, less is better; None where there was none."""
    num_bytes: int
    sha256: str


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
    """

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2, asynchronous: bool = False):
        self.directory = Path(directory)
        self.keep_last = keep_last
        self._writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future | None = None

    def save(self, state: dict[str, Any], step: int, metric: float | None = None) -> None:
        """Write a checkpoint and remove those that are not kept.

        Parameters
        ----------
        state : dict
            Nested dicts and lists of tensors, numbers and strings, so that ``torch.load(path, weights_only=True)`` reads it.
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

    def notes(self) -> list[Note]:
        """Return the notes of all checkpoints, the newest first."""
        found = []
        for path in self.directory.glob("step-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(Note(**json.loads(path.read_text())))
        return sorted(found, key=lambda note: -note.step)

    def load_newest(self) -> dict[str, Any] | None:
        """Return the newest sound state, on the CPU, and warn about damaged ones; None if there is none."""
        for note in self.notes():
            try:
                return self.load(note)
            except DataError as error:
                logger.error("%s: the one before it is used", error)
        return None

    def load_best(self) -> dict[str, Any] | None:
        """Return the state with the lowest metric, on the CPU; None if no checkpoint has one.

        Raises
        ------
        DataError
            It is damaged.
        """
        note = _best(self.notes())
        return None if note is None else self.load(note)

    def load(self, note: Note) -> dict[str, Any]:
        """Return the state of a checkpoint, on the CPU.

        Raises
        ------
        DataError
            It is missing, changed, or of another format.
        """
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
        if state.get("format_version") != FORMAT_VERSION:
            raise DataError(f"the checkpoint {path} is of another version of hpc_bnn")
        return state

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, state: dict[str, Any], step: int, metric: float | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save({"format_version": FORMAT_VERSION, **state}, buffer)
        content = buffer.getvalue()
        path = self.directory / f"step-{step:08d}.pt"
        metric = metric if metric is not None and math.isfinite(metric) else None
        note = Note(path.name, step, metric, len(content), hashlib.sha256(content).hexdigest())
        write_atomically(path, content)
        write_atomically(path.with_suffix(".json"), json.dumps(asdict(note)))
        self._prune()

    def _prune(self) -> None:
        notes = self.notes()
        best = _best(notes)
        for note in notes[self.keep_last :]:
            if note != best:
                path = self.directory / note.file
                # The note first: the rest is no checkpoint without it
                path.with_suffix(".json").unlink(missing_ok=True)
                path.unlink(missing_ok=True)
        known = {note.file for note in notes}
        for path in self.directory.iterdir():  # left by a process that was killed
            if path.name.startswith(".step-") or (path.suffix == ".pt" and path.name not in known):
                path.unlink(missing_ok=True)


def _best(notes: list[Note]) -> Note | None:
    measured = [note for note in notes if note.metric is not None]
    return min(measured, key=lambda note: (note.metric, note.step), default=None)


def _copied(tree: Any) -> Any:
    """Return nested dicts and lists with copies of their tensors on the CPU."""
    return map_leaves(tree, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))


# --- the state of the job ------------------------------------------------------------------------------


def gather_state(posterior: Posterior, optimizer: JobOptimizer, comm: GridComm) -> dict[str, Any]:
    """Return the parameters and the optimizer's state of the whole job, with views of the existing tensors.

    Collective over ``sample_comm`` for an ensemble, whose members are spread over it, and for an optimizer whose state
    is; otherwise local.
    """
    model = posterior.state_dict()
    if not posterior.is_replicated:
        parts = comm.gather_objects(_copied(model), "sample")
        model = {name: tensor for part in parts for name, tensor in part.items()}
    return {"model": model, "optimizer": optimizer.state_dict()}


def restore_model(model: dict[str, Tensor], posterior: Posterior) -> None:
    """Take over the parameters of a state that `gather_state` returned, on any grid. Local.

    Raises
    ------
    ConfigError
        The network is another one.
    """
    if not posterior.is_replicated:
        mine = posterior.state_dict().keys()
        model = {name: tensor for name, tensor in model.items() if name in mine}
    posterior.load_state_dict(model)


def restore_state(state: dict[str, Any], posterior: Posterior, optimizer: JobOptimizer) -> None:
    """Take over what `gather_state` returned, on any grid. Local.

    Raises
    ------
    ConfigError
        The network is another one.
    """
    restore_model(state["model"], posterior)
    optimizer.load_state_dict(state["optimizer"])
