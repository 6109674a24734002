"""Checkpoints: no rank and no grid in them, so that any grid can take them up (floor 6)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


def checkpoint_path(run_dir: str | os.PathLike, num_steps: int) -> Path:
    """Return RUN_DIR/checkpoints/step-NNNNNNNN.pt."""
    return Path(run_dir, "checkpoints", f"step-{num_steps:08d}.pt")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name, sync it, rename it. Local: one rank calls it.

    Parameters
    ----------
    path : Path
        Where it shall stand; its directory is made.
    state : dict
        ``"model"`` maps parameter names to tensors; the rest are plain numbers, strings, dicts and
        tensors, so that ``torch.load(path, weights_only=True)`` reads it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
