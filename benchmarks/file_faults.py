"""Faults at the file operations of this process, and a run that is small enough to have hundreds of them.

`Faults` counts the operations of Python on the files below a directory, and kills the process, or raises an error, at one of
them. `benchmarks/faults.py` and `tests/test_faults.py` try each. Operations inside HDF5 and torch pass through files that
Python opens, so they are among them.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import logging
import os
import pathlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import hpc_bnn.run.plots
from hpc_bnn import write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.run.checkpoint import CheckpointStore
from hpc_bnn.safe_files import Disk

KILLED = 77
"""Exit code of a process that `Faults` has killed."""
BY_PATH = (
    "open", "mkdir", "unlink", "rmdir", "rename", "replace", "link", "stat", "lstat", "listdir", "scandir", "utime", "chmod",
)  # fmt: skip
BY_DESCRIPTOR = ("fsync", "write", "pread", "fstat")


class Faults:
    """File operations below a directory, counted from 1; `act` is called at number ``number``, before it is carried out.

    Parameters
    ----------
    directory : path
        What counts.
    number : int, optional
        The operation; by default none.
    act : callable, optional
        Kills or raises; it gets the name of the operation and the path.
    """

    def __init__(self, directory: Path, number: int = 0, act: Callable[[str, str], None] | None = None):
        self.directory, self.number, self.act = os.path.realpath(directory), number, act
        self.seen: list[tuple[str, str]] = []
        self._is_inside = False

    def _at(self, operation: str, path: Any, half: Callable[[], object] = lambda: None) -> None:
        if self._is_inside:
            return
        self._is_inside = True
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            name = os.path.abspath(os.fsdecode(path))
            if not name.startswith(self.directory):
                return
            self.seen.append((operation, name.removeprefix(self.directory)))
            if len(self.seen) == self.number and self.act is not None:
                half()
                self.act(operation, name)
        except (FileNotFoundError, TypeError):
            return
        finally:
            self._is_inside = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[Faults]:
        """Watch the operations of this process while the block runs."""
        former: list[tuple[Any, str, Any]] = []

        def patch(owner: Any, name: str, half: Callable[..., object] | None = None) -> None:
            usual = getattr(owner, name)

            def watched(path: Any = ".", *arguments: Any, **options: Any) -> Any:
                self._at(name, path, (lambda: half(usual, path, *arguments)) if half else lambda: None)
                return usual(path, *arguments, **options)

            former.append((owner, name, usual))
            setattr(owner, name, watched)

        def half_of(write: Callable, path: Any, content: Any, *_: Any) -> None:
            write(path, bytes(content)[: len(content) // 2])

        for name in BY_PATH:
            patch(os, name)
        for name in BY_DESCRIPTOR:
            patch(os, name, half_of if name == "write" else None)
        patch(io, "open")
        builtin = builtins.open
        former.append((builtins, "open", builtin))
        builtins.open = io.open
        patch(pathlib.Path, "write_bytes", half_of)
        usual_write = Disk.write

        def write(disk: Disk, content: Any) -> int:
            self._at("write", disk.name)
            return usual_write(disk, content)

        former.append((Disk, "write", usual_write))
        Disk.write = write  # type: ignore[method-assign]
        try:
            yield self
        finally:
            for owner, name, usual in reversed(former):
                setattr(owner, name, usual)


def kill(operation: str, path: str) -> None:
    """End this process as SIGKILL does."""
    os._exit(KILLED)


def failing(number: int) -> Callable[[str, str], None]:
    """Return what raises an error of the system."""

    def act(operation: str, path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    return act


ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EACCES", "ESTALE")}


# --- the run --------------------------------------------------------------------------------------------


def write_data(directory: Path, num_files: int = 3) -> Path:
    """Write a small regression as shards."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(36, 3)).astype(np.float32)
    y = x @ rng.normal(size=(3, 1)).astype(np.float32)
    facts = {"name": "toy", "source": "made", "licence": "none"}
    write_shards(
        directory, {"train": (x[:24], y[:24]), "test": (x[24:], y[24:])}, examples_per_shard=24 // num_files, **facts
    )
    return directory


def words(data: Path, run_dir: Path, *flags: str) -> list[str]:
    """Return the command of a run of 6 steps with a checkpoint after each."""
    return [
        "train", "--data.shards", str(data), "--run_dir", str(run_dir), "--num_epochs", "2", "--global_batch_size", "8",
        "--num_samples", "2", "--num_test_samples", "2", "--test_every_epochs", "1", "--checkpoint.every_steps", "1",
        "--checkpoint.keep_last", "1", "--model.arguments", "{hidden: [4]}", "--dtype", "float64", *flags,
    ]  # fmt: skip


def train(data: Path, run_dir: Path, *flags: str) -> int:
    """Train in this process and return the exit code."""
    former, hpc_bnn.run.plots.write_plots = hpc_bnn.run.plots.write_plots, lambda *_: []
    try:
        return main(words(data, run_dir, *flags))
    finally:
        hpc_bnn.run.plots.write_plots = former


def predict(run_dir: Path, output: Path) -> int:
    """Predict in this process and return the exit code."""
    return main(["predict", str(run_dir), "--output", str(output), "--num_test_samples", "3"])


def result(run_dir: Path, output: Path | None = None) -> dict[str, Any]:
    """Return what must not depend on faults: parameters, optimizer, rows without times, predictions."""
    state = CheckpointStore(run_dir / "checkpoints").load_newest()
    assert state is not None
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("epoch", "step", "train/nelbo", "train/kl", "test/nll", "test/rmse", "learning_rate")
    found = {"model": state["model"], "optimizer": state["optimizer"], "steps": state["place"]["num_steps"]}
    found["rows"] = [{name: row.get(name) for name in names} for row in rows]
    if output is not None:
        with h5py.File(output) as file:
            found["predictions"] = {name: file[name][()].tobytes() for name in file}
    return found


def is_same(a: Any, b: Any) -> bool:
    """Whether nested dicts and lists hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    return bool(a == b)


def in_child(work: Callable[[], int], seconds: float = 120.0) -> tuple[int, str]:
    """Run a function in a process of its own; return its exit code (-N for signal N, 124 for no end) and what it said."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                sys.stdout, sys.stderr = (
                    os.fdopen(stream, "w", closefd=False) for stream in (1, 2)
                )  # pytest has its own
                logging.basicConfig(force=True)
                signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
                signal.setitimer(signal.ITIMER_REAL, seconds)
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")
