"""Find all errors in flags and config files at once.

jsonargparse stops at the first error; this module tries each key by itself.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ..config import FIELDS, NAMES, Config, read_tree, words_of
from ..errors import ConfigError, Fault


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are `ConfigError`, and that does not accept abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, *args: Any, **kwargs: Any):
        raise ConfigError(f"{message}\nSee {self.prog} --help")

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Parse a config file, in UTF-8: jsonargparse would read it in the encoding of the locale."""
        if args or not Path(path).is_file():  # a pipe
            return super().parse_path(path, *args, **kwargs)
        return self.parse_string(Path(path).read_text(encoding="utf-8"), path=Path(path).name, **kwargs)


def refuse_nulls(options: jsonargparse.Namespace) -> None:
    """Raise `ConfigError` for each field, or group of fields, that is null and may not be: jsonargparse lets it pass. Local."""
    faults = []
    for name in sorted(NAMES) if "num_epochs" in options else ():  # other commands have flags of their own
        if options.get(name, name) is None and (name not in FIELDS or None not in words_of(FIELDS[name].type)):
            rule = f"must be {_in_words(FIELDS[name].type if name in FIELDS else dict)}"
            faults.append(Fault(name, "null", rule, "Leave it out for the default"))
    if faults:
        raise ConfigError(*faults)


def faults_of(words: Sequence[str], known: set[str]) -> tuple[list[Fault], dict[str, Any]]:
    """Return every unknown key and wrong type in the words after a subcommand, and the correct values by field. Local.

    ``known`` are the options of the subcommand, such as ``--config``; those that are not fields of `Config` are ignored.
    """
    of_users = tuple(f"{name}." for name, field in FIELDS.items() if typing.get_origin(field.type) is dict)
    faults, values = [], {}
    for name, value, _ in settings(words):
        if name.startswith(of_users):  # arguments of a user's class: anything
            continue
        if name not in FIELDS and f"--{name}" not in known:
            near = difflib.get_close_matches(name, FIELDS, 1)
            remedy = f"Did you mean <{near[0]}>?" if near else "See --help for all"
            shown = "" if value is None else value
            faults.append(Fault(f"--{name}", shown, "there is no such field", remedy))
        elif name in FIELDS and _fits(name, value):
            values[name] = value
        elif name in FIELDS:
            values.pop(name, None)
            default = yaml.safe_dump(FIELDS[name].default).split("\n")[0]
            rule = f"must be {_in_words(FIELDS[name].type)}"
            faults.append(Fault(name, value, rule, f"The default is {default}"))
    return faults, values


def make_config(values: dict[str, Any]) -> Config:
    """Return a config from dotted names, with defaults for the rest. Local."""
    parser, nested = Parser(prog="hpc-bnn"), jsonargparse.Namespace()
    parser.add_class_arguments(Config, fail_untyped=True)
    for name, value in values.items():
        nested[name] = value
    return Config(**parser.instantiate(parser.parse_object(nested)).as_dict())


def check_together(words: Sequence[str], known: set[str], check: Callable[[Config], object]) -> None:
    """Raise one `ConfigError` with all faults, also those of ``check``, where a key or type by itself is wrong. Local."""
    faults, values = faults_of(words, known)
    if not faults:
        return
    try:
        check(make_config(values))
    except ConfigError as error:
        faults += [fault for fault in error.faults if isinstance(fault, Fault)]
    raise ConfigError(*faults)


def _fits(name: str, value: Any) -> bool:
    parser = Parser()
    parser.add_argument("--value", type=FIELDS[name].type)
    try:
        parser.parse_object({"value": value})
    except ConfigError:
        return False
    return True


def settings(words: Sequence[str]) -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted name, value, whether by a flag) of what files and flags set, in their order. Local.

    `ConfigError` where a config file holds no fields: jsonargparse fails at some of them in words of its own.
    """
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = words.pop(0) if words and not words[0].startswith("--") else None
        if name == "config":
            path = Path(text or "")
            yield from ((*leaf, False) for leaf in _leaves(read_tree(path) if path.is_file() else {}))
        else:
            yield from ((*leaf, True) for leaf in _leaves({name: _load(text)}))


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in NAMES - FIELDS.keys():
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _load(text: str | None) -> Any:
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _in_words(type_: Any) -> str:
    """Return the name of a type in the user's words."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if type_ in names:
        return names[type_]
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_in_words(argument) for argument in arguments)
    if origin is list:
        return "a list such as [a, b]"
    return "key-value pairs such as {a: 1}" if dict in (origin, type_) else str(type_)
