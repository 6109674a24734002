"""Checkpoints of format 2, as hpc_bnn 0.1 wrote them, as sections of format 3.

Their optimizer has the form of torch, by the numbers of its parameters: a parameter is a flat slot (all means, all
scales, all points; all members, row by row) or, for optimizers that look at whole tensors, a weight. In each case the
parameters hold, one after another, the weights in the order in which ``model`` names them. Their low-rank factor is
absolute: w = loc + scale eps + z F, today w = loc + scale (eps + z D / sqrt(P)), with D of NAME.directions.R.
"""

from __future__ import annotations

import itertools
import logging
import os
from typing import Any

from torch import Tensor

from ..errors import DataError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2


def convert(former: dict[str, Any], path: str | os.PathLike) -> dict[str, Any]:
    """Return a checkpoint of format 2 as one of format 3; `DataError` if optimizer and weights do not fit. Local."""
    family, model = former["config"]["posterior"]["family"], former["model"]
    if family == "low_rank":
        unit = sum(value.numel() for name, value in model.items() if name.endswith(".log_scale")) ** -0.5
        model, state = dict(_with_directions(name, model, unit) for name in model), {}
        logger.warning(
            "%s has format 2: its low-rank factor is converted into directions, relative to the scale; the state of the "
            "optimizer does not fit them and is left out, a resumed run starts it anew",
            path,
        )
    else:
        weights = {n: t for n, t in model.items() if family != "ensemble" or n.startswith("members.")}
        state = _by_name(former["optimizer"], weights, path)
    options = [{k: v for k, v in g.items() if k != "params"} for g in former["optimizer"]["param_groups"]]
    sections = {
        "model": model,
        "optimizer": {"state": state, "groups": options},
        "schedule": former["schedule"],
        "place": {"num_steps": former["num_steps"], **former["place"]},
        "generator": "torch",
        "config": former["config"],
        "run": {"identity": None, "hpc_bnn": "0.1"},
    }
    return {"format_version": 3, "sections": dict.fromkeys(sections, 1), **sections}


def _with_directions(name: str, model: dict[str, Tensor], unit: float) -> tuple[str, Tensor]:
    """Return a tensor of the model with its name, or NAME.directions.R for NAME.factor.R."""
    weight, is_factor, row = name.rpartition(".factor.")
    log_scale = model.get(f"{weight}.log_scale") if is_factor else None
    if log_scale is None:
        return name, model[name]
    return f"{weight}.directions.{row}", model[name] / (log_scale.exp() * unit)


def _by_name(
    optimizer: dict[str, Any], weights: dict[str, Tensor], path: str | os.PathLike
) -> dict[str, dict[str, Any]]:
    """Return the state of each weight from that of the parameters; buffers may stand behind the weights."""
    state: dict[str, dict[str, Any]] = {}
    rest = iter(weights.items())
    for number in itertools.chain.from_iterable(group["params"] for group in optimizer["param_groups"]):
        values = {k: v for k, v in optimizer["state"].get(number, {}).items() if v is not None}
        size = max((v.numel() for v in values.values() if isinstance(v, Tensor)), default=1)
        mine: dict[str, Tensor] = {}
        length = 0
        while not mine or length < size:
            name, weight = next(rest, ("", None))
            if weight is None:
                break
            mine[name] = weight
            length += weight.numel()
        if length < size or (length > size and len(mine) > 1):  # of a single weight Adafactor keeps fewer numbers
            raise DataError(f"the state of the optimizer in {path} does not fit its model. Use another checkpoint")
        for key, value in values.items():
            for name, part in _split(value, mine).items():
                state.setdefault(name, {})[key] = part
    return state


def _split(value: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the parts of a parameter's state; a counter of its own for each, because optimizers count in place."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return {name: value.clone() if isinstance(value, Tensor) else value for name in weights}
    lengths = [weight.numel() for weight in weights.values()]
    if value.numel() != sum(lengths):
        return dict.fromkeys(weights, value)
    parts = value.flatten().split(lengths)
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts)}
