"""Nested mappings, lists, tuples and dataclasses of tensors: inputs of a network, states of an optimizer. Local."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .errors import ConfigError, Fault

Inputs = Any
"""A tensor [B, ...], or nested mappings, lists, tuples and dataclasses of them with the same B."""


def map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of a kind; others stay as they are."""
    if isinstance(tree, PackedSequence) or (isinstance(tree, Tensor) and tree.is_nested):
        rule = "its examples are no rows, which ranks and micro-batches divide"
        remedy = "Give padded tensors [B, T, ...] (and lengths), and pack them in forward: pack_padded_sequence, nested_tensor"
        raise ConfigError(Fault("x", f"of type {type(tree).__name__}", rule, remedy))
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        parts = [map_leaves(value, kind, function) for value in tree]
        if isinstance(tree, list):
            return parts
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)  # a namedtuple stays one
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        twin = copy.copy(tree)
        for field in dataclasses.fields(tree):
            if hasattr(tree, field.name):
                # Not by `replace`, which checks and computes anew what a class has made of its fields
                object.__setattr__(twin, field.name, map_leaves(getattr(tree, field.name), kind, function))
        return twin
    return tree


def map_tensors(function: Callable[[Tensor], Tensor], tree: Inputs) -> Inputs:
    """Apply a function to each tensor."""
    return map_leaves(tree, Tensor, function)


def tensors_of(tree: Inputs) -> list[Tensor]:
    """Return the tensors, in order."""
    found: list[Tensor] = []
    map_leaves(tree, Tensor, found.append)
    return found


def device_of(tree: Inputs) -> torch.device:
    """Return the device of the first tensor."""
    return tensors_of(tree)[0].device


def num_rows(tree: Inputs) -> int:
    """Return the common length of dim 0; `ConfigError` where there is no tensor, or the lengths differ."""
    lengths = {len(tensor) if tensor.ndim else -1 for tensor in tensors_of(tree)}
    if not lengths:
        rule = "must be a tensor, or a dict, list, tuple or dataclass of tensors"
        raise ConfigError(Fault("x", f"of type {type(tree).__name__}", rule, "Give torch.as_tensor(x)"))
    if len(lengths) != 1 or -1 in lengths:
        rule = "all tensors of the inputs need the same extent of dim 0, the examples"
        raise ConfigError(Fault("x", sorted(lengths), rule, "Leave out what does not belong to an example"))
    return lengths.pop()


def rows_of(tree: Inputs, span: slice) -> Inputs:
    """Return some rows of each tensor."""
    return map_tensors(lambda tensor: tensor[span], tree)


def as_arguments(tree: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a module is called with: ``net(**x)`` for a mapping, ``net(*x)`` for a list or tuple, or ``net(x)``."""
    if isinstance(tree, Mapping):
        return (), dict(tree)
    return (tuple(tree), {}) if isinstance(tree, (list, tuple)) else ((tree,), {})


def stack(trees: list[Inputs]) -> Inputs:
    """Return the trees along a new dim 0 of each tensor."""
    columns = iter(zip(*map(tensors_of, trees)))
    return map_tensors(lambda _: torch.stack(next(columns)), trees[0])
