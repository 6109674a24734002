"""What a forward pass may change besides its outputs: to notice it, and to put it back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_HOOKS = sorted(name for name in _OF_EVERY_MODULE if "_hooks" in name)

Restore = Callable[[], tuple[object, bool]]
"""Gives an object its former content back; returns it, and whether it had another."""


class Traces:
    """The state of a module when this is made.

    Buffers, weights that are not ``drawn`` anew, the layers that each layer holds, attributes of the layers (numbers, tensors,
    arrays, generators; lists, tuples, dictionaries and sets of them; and objects whose class comes from the package of the
    layer), the mode of each layer (``with_modes``), and, with a ``device``, all global generators of random numbers, that of
    this device among them. Hooks go back together with attributes: a layer that has registered its own notes it in one.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | None = None,
        drawn: Collection[nn.Parameter] = (),
        with_modes: bool = True,
    ):
        self._ours = _OF_EVERY_MODULE - ({"training"} if with_modes else set())
        seen: dict[int, Restore] = {id(p): lambda p=p: (p, False) for p in drawn}
        self._registries = []  # (registry, prefix, what it held, kind)
        self._hooks: list[Restore] = []
        for name, layer in module.named_modules():
            prefix = f"{name}." if name else ""
            attributes = {key: v for key, v in layer.__dict__.items() if key not in self._ours}
            for kind, registry, content in (
                ("buffer", layer._buffers, layer._buffers),
                ("weight", layer._parameters, layer._parameters),
                ("attribute", layer._modules, layer._modules),
                ("attribute", layer.__dict__, attributes),
            ):
                held = {key: _keep(value, seen, _package(layer)) for key, value in content.items()}
                self._registries.append((kind, prefix, registry, held))
            self._hooks += [_keep(layer.__dict__[key], {}, "") for key in _HOOKS if key in layer.__dict__]
        generators = _global_generators(device) if device is not None else []
        self._generators = [(name, get, put, get()) for name, get, put in generators]

    def generators_used(self) -> list[str]:
        """Return the names of the global generators that somebody has drawn from since. Local."""
        return [name for name, get, _, state in self._generators if not _same(get(), state)]

    def put_back(self) -> dict[str, list[str]]:
        """Put all back; return names of what had changed, by "buffer", "weight", "attribute" and "generator". Local."""
        changed: dict[str, list[str]] = {"buffer": [], "weight": [], "attribute": [], "generator": []}
        for kind, prefix, registry, held in self._registries:
            is_open = isinstance(registry, dict)  # not that of a scripted layer
            for key in registry.keys() - held.keys() - self._ours if is_open else ():
                del registry[key]
                changed[kind].append(prefix + key)
            for key, restore in held.items():
                value, is_other = restore()
                if is_other or (is_open and registry.get(key, self) is not value):  # None may be there, or nothing
                    changed[kind].append(prefix + key)
                    if is_open:
                        registry[key] = value
        for restore in self._hooks if changed["attribute"] else ():
            restore()
        for name, get, put, state in self._generators:
            if not _same(get(), state):
                changed["generator"].append(name)
                put(state)
        return changed


def _keep(value: object, seen: dict[int, Restore], package: str) -> Restore:
    """Return what gives an object its content of now back."""
    if id(value) in seen:  # shared, or within itself
        return lambda: (value, False)
    seen[id(value)] = restore = lambda: (value, False)
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            return restore
        restore = _keeping(value, value.detach().clone(), lambda v: v.detach(), _write)
    elif isinstance(value, np.ndarray):
        restore = _keeping(value, value.copy(), lambda v: v, lambda v, former: np.copyto(v, former))
    elif isinstance(value, random.Random):
        restore = _keeping(value, value.getstate(), lambda v: v.getstate(), lambda v, s: v.setstate(s))
    elif isinstance(value, (torch.Generator, np.random.RandomState)):
        restore = _keeping(value, value.get_state(), lambda v: v.get_state(), lambda v, s: v.set_state(s))
    elif isinstance(value, np.random.Generator):
        restore = _keeping(value, value.bit_generator.state, lambda v: v.bit_generator.state, _set_state)
    elif isinstance(value, dict):
        restore = _keeping_items(value, list(value), [_keep(v, seen, package) for v in value.values()])
    elif isinstance(value, (list, deque)):
        restore = _keeping_items(value, None, [_keep(v, seen, package) for v in value])
    elif isinstance(value, tuple):
        items = [_keep(v, seen, package) for v in value]
        restore = lambda: (value, any([item()[1] for item in items]))  # noqa: E731
    elif not isinstance(value, (type, nn.Module)) and hasattr(value, "__dict__") and _package(value) == package:
        content = _keep(vars(value), seen, package)
        restore = lambda: (value, content()[1])  # noqa: E731
    elif isinstance(value, set):
        restore = _keeping(value, set(value), set, lambda v, former: (v.clear(), v.update(former)))
    seen[id(value)] = restore
    return restore


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _keeping(value, former, get, put) -> Restore:
    def restore():
        if _same(get(value), former):
            return value, False
        put(value, former)
        return value, True

    return restore


def _keeping_items(value, keys: list | None, items: list[Restore]) -> Restore:
    def restore():
        former, were_other = zip(*(item() for item in items)) if items else ((), ())
        now = list(value) if keys is None else list(value.values())
        is_other = len(now) != len(former) or any(a is not b for a, b in zip(now, former))
        is_other |= keys is not None and list(value) != keys
        if is_other:
            value.clear()
            value.extend(former) if keys is None else value.update(zip(keys, former))
        return value, is_other or any(were_other)

    return restore


@torch.no_grad()
def _write(value: Tensor, former: Tensor) -> None:
    if value.shape != former.shape:  # of an observer that is empty before its first batch
        value.resize_(former.shape)
    value.detach().copy_(former)


def _set_state(value: np.random.Generator, state) -> None:
    value.bit_generator.state = state


def _same(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit; NaN is like NaN."""
    if isinstance(a, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, tuple) and set(map(type, a)) != {int}:  # Python's generator has 625 of these
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _global_generators(device: torch.device) -> list[tuple[str, Callable, Callable]]:
    found = [
        ("torch's global generator", torch.get_rng_state, torch.set_rng_state),
        ("NumPy's global generator", np.random.get_state, np.random.set_state),
        ("Python's random", random.getstate, random.setstate),
    ]
    if device.type in ("cuda", "xpu"):
        of = getattr(torch, device.type)
        name = f"torch's global generator of {device}"
        found.append((name, lambda: of.get_rng_state(device), lambda state: of.set_rng_state(state, device)))
    return found
