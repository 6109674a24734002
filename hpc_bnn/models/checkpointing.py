"""Activations that are computed once more in the backward pass, instead of being kept (Chen et al., 2016)."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, Fault


def checkpoint_layers(module: nn.Module, patterns: Sequence[str]) -> nn.Module:
    """Let layers keep their inputs only, and run once more in the backward pass; return the module. Local.

    It takes less memory and more time, and the numbers are the same, because masks and weights belong to the sample.

    The layers get a ``forward`` of their own, in place. Patterns are of their names, such as ``blocks.*``; of layers
    within each other the outer ones are taken. `ConfigError` where a pattern fits no layer.
    """
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            some = ", ".join(names[:5]) + (" and more" if len(names) > 5 else "")
            rule = f"no layer of {type(module).__name__} has such a name (there are {some})"
            raise ConfigError(Fault("model.checkpoint_layers", pattern, rule, "Try a pattern such as blocks.*"))
    taken: list[str] = []
    for name, layer in module.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in taken)
        if name and not is_inside and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            taken.append(name)
            layer.forward = functools.partial(_forward, layer)  # it can be copied and pickled
    return module


def _forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    plain = type(layer).forward
    if not torch.is_grad_enabled():
        return plain(layer, *arguments, **named)
    # A capture cannot read the state of a generator; what is captured draws from none
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return checkpoint(plain, layer, *arguments, use_reentrant=False, preserve_rng_state=not is_capturing, **named)
