"""Exceptions of hpc_bnn."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class HpcBnnError(Exception):
    """Base of every error that hpc_bnn raises on purpose."""

    exit_code = 1
    label = "error"
    """What a message on the terminal begins with."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in what the user asked for."""

    flag: str
    """The flag as it is typed, for example ``--grid.sample_size``."""
    value: object
    """The value that was given."""
    rule: str
    """The rule that the value breaks."""
    remedy: str
    """What to do instead."""

    def __str__(self) -> str:
        return f"{self.flag} {self.value}: {self.rule}. {self.remedy}"


class ConfigError(HpcBnnError, ValueError):
    """The request of the user cannot be carried out.

    Parameters
    ----------
    *faults : Fault or str
        Everything that is wrong, so that the user mends it in one go.
    """

    exit_code = 2

    def __init__(self, *faults: Fault | str):
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def check_positive(flag: str, value: float, example: float) -> None:
    """Raise `ConfigError` unless a value is a positive, finite number; ``example`` is the remedy."""
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ConfigError(Fault(flag, value, "must be positive and finite", f"Try {example}"))


def import_object(flag: str, path: str) -> Any:
    """Return what ``package.module.name`` stands for, or raise a `ConfigError` that names the flag."""
    module_path, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            Fault(flag, path, f"it cannot be imported ({error})", "Give package.module.Class")
        ) from error


def check_all(*checks: Callable[[], object]) -> None:
    """Run checks and raise one `ConfigError` with the faults of all that failed."""
    faults: list[Fault | str] = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(*faults)


class DataError(HpcBnnError):
    """A shard directory is missing, incomplete, corrupt or of another format."""


class Interrupted(HpcBnnError):
    """A run stopped before its end, with a checkpoint, because it was told to or its time was over."""

    exit_code = 75  # EX_TEMPFAIL: try again
    label = "stopped"


class CommunicationError(HpcBnnError):
    """The ranks of the job cannot work together (launcher, MPI or Horovod)."""


class RankError(HpcBnnError):
    """An error that some rank saw and that all ranks agreed to raise."""


class NonFiniteError(HpcBnnError):
    """The loss or a gradient is infinite or not a number."""
