"""Exceptions of hpc_bnn. They name a field in the words of the caller: a flag on the command line, an argument in Python.

In a text ``<grid.sample_size>`` stands for a field of `hpc_bnn.Config`: it is read as ``--grid.sample_size`` or as
``sample_size``. Other words in angle brackets stay as they are.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

_NAME = re.compile(r"<([a-z_.]+)>")
Spell = Callable[[str], str]


def _as_flag(name: str) -> str:
    return f"--{name}"


def _as_argument(name: str) -> str:
    """Return the last word of a name; of ``objective.name`` it is the objective that Python takes."""
    *groups, last = name.split(".")
    return groups[-1] if groups and last == "name" else last


def _spelled_field(name: str, otherwise: str, spell: Spell) -> str:
    from .config import NAMES  # here, because config imports this module

    return spell(name) if name in NAMES else otherwise


def _spelled(text: str, spell: Spell) -> str:
    return _NAME.sub(lambda match: _spelled_field(match[1], match[0], spell), text)


@dataclass(frozen=True)
class Fault:
    """One error in the user's request."""

    field: str
    """Name in `hpc_bnn.Config`, such as ``grid.sample_size``; anything else is written as it is."""
    value: object
    """The value that was given."""
    rule: str
    """The rule that the value breaks."""
    remedy: str
    """The remedy: what the user should do."""
    argument: str = ""
    """Name of the argument in Python, where it is not the last word of the field."""

    def __str__(self) -> str:
        return self._text(self.argument or self.field, _as_argument, self.value)

    def on_command_line(self) -> str:
        """Return the text with flags."""
        value = str(self.value).lower() if isinstance(self.value, bool) else self.value
        return self._text(self.field, _as_flag, value)

    def _text(self, name: str, spell: Spell, value: object) -> str:
        return f"{_spelled_field(name, name, spell)} {value}: {_spelled(f'{self.rule}. {self.remedy}', spell)}"

    def __reduce__(self):  # a value may be anything; its text can travel to other ranks
        return Fault, (self.field, str(self.value), self.rule, self.remedy, self.argument)


class HpcBnnError(Exception):
    """Base of every error that hpc_bnn raises on purpose: all ``parts``, so the user can fix them at once, after ``where``."""

    exit_code = 1
    label = "error"
    """Prefix of a message on the terminal."""

    def __init__(self, *parts: Fault | str, where: str = ""):
        super().__init__(*parts)
        self.where = where

    def __str__(self) -> str:
        return self._text(str, _as_argument)

    def on_command_line(self) -> str:
        """Return the text with flags."""
        return self._text(Fault.on_command_line, _as_flag)

    def _text(self, of_fault: Callable[[Fault], str], spell: Spell) -> str:
        parts = [of_fault(part) if isinstance(part, Fault) else _spelled(str(part), spell) for part in self.args]
        return self.where + "\n".join(parts)


class ConfigError(HpcBnnError, ValueError):
    """The request of the user cannot be carried out."""

    exit_code = 2

    @property
    def faults(self) -> tuple[Fault | str, ...]:
        """All errors."""
        return self.args


class Rule(NamedTuple):
    """What a value must be. It stands once, beside the field of the config; constructors ask for it by the field's name."""

    fits: Callable[[Any], bool]
    text: str
    """Goes on after "must be"."""
    remedy: str

    def check(self, field: str, value: object, argument: str = "") -> None:
        """Raise `ConfigError` unless a value fits."""
        if not self.fits(value):
            shown = value if str(value).strip() else repr(value)
            if not isinstance(value, (Real, str, list, tuple, dict, type(None))):
                shown = f"{str(value).splitlines()[-1]} (a {type(value).__name__})"
            raise ConfigError(Fault(field, shown, f"must be {self.text}", self.remedy, argument))


def check_kind(field: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    """Raise `ConfigError` unless a value is an object of a kind."""
    if not isinstance(value, kind):
        rule = f"it is a {type(value).__name__}, which cannot be used in this place"
        raise ConfigError(Fault(field, "of another kind", rule, remedy))


def number(fits: Callable[[Any], bool], text: str, remedy: str) -> Rule:
    """Return the rule of a real number."""
    return Rule(lambda value: isinstance(value, Real) and fits(value), text, remedy)


def positive(remedy: str) -> Rule:
    """Return the rule of a positive, finite number."""
    return number(lambda value: 0 < value < math.inf, "positive and finite", remedy)


def at_least(least: int, remedy: str, text: str = "") -> Rule:
    """Return the rule of a finite number that has a least value."""
    text = text or (f"at least {least}" if least else "0 or more")
    return number(lambda value: least <= value < math.inf, text, remedy)


def count(remedy: str, least: int = 1) -> Rule:
    """Return the rule of a whole number of things, of any type that counts (NumPy's, too)."""
    return Rule(
        lambda value: isinstance(value, Integral) and int(value) >= least, f"a whole number from {least} on", remedy
    )


def above_and_below(low: float, high: float, remedy: str) -> Rule:
    """Return the rule of a number between two others, which it must not reach."""
    return number(lambda value: low < value < high, f"above {low} and below {high}", remedy)


def import_object(field: str, path: str) -> Any:
    """Return what ``package.module.name`` stands for, or raise a `ConfigError` that names the field."""
    module_path, _, name = path.rpartition(".")
    try:
        if path.startswith("."):
            raise ImportError("it is relative to no package")
        return getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError, ValueError) as error:
        rule = f"it cannot be imported ({error})"
        raise ConfigError(Fault(field, path, rule, "Give package.module.Class")) from error


def build_object(field: str, path: str, arguments: dict[str, Any], kind: type, arguments_field: str) -> Any:
    """Return an object of a user's class, which has to be a ``kind``; `ConfigError` names the field at fault. Local."""
    made = import_object(field, path)
    try:
        made = made(**arguments)
    except TypeError as error:
        rule = f"{path} refuses them ({error})"
        raise ConfigError(Fault(arguments_field, arguments, rule, "Fix the arguments")) from error
    if not isinstance(made, kind):
        rule = f"it makes a {type(made).__name__}, and a {kind.__name__} is needed"
        raise ConfigError(Fault(field, path, rule, f"Let your class inherit from hpc_bnn.{kind.__name__}"))
    return made


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
