"""Optimizers and learning-rate schedules, from torch, and the annealing of the KL (floor 4)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .config import OptimizerConfig
from .errors import ConfigError, Fault, check_positive, import_object


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], num_epochs: int, steps_per_epoch: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer and the schedule of its learning rate. Local.

    Raises
    ------
    ConfigError
        The optimizer is unknown, or refuses its arguments.
    """
    # The prior is the decay of the weights: an optimizer's own would pull the scales as well.
    path = config.name if "." in config.name else f"torch.optim.{config.name}"
    make = import_object("--optimizer.name", path)
    arguments = config.arguments
    try:
        if "weight_decay" in inspect.signature(make).parameters:
            arguments = {"weight_decay": 0.0, **arguments}
        optimizer = make(parameters, lr=config.learning_rate, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            Fault("--optimizer.arguments", arguments, f"{config.name} refuses them ({error})", "Mend them")
        ) from error

    def factor(num_steps: int) -> float:
        return learning_rate_factor(config, num_steps / steps_per_epoch, num_epochs)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def learning_rate_factor(config: OptimizerConfig, epochs: float, num_epochs: int) -> float:
    """Return the learning rate after some epochs, as a multiple of ``config.learning_rate``. Local."""
    warmup = config.warmup_epochs
    if epochs < warmup:
        return epochs / warmup
    if config.schedule == "cosine":
        done = (epochs - warmup) / max(num_epochs - warmup, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return config.decay ** math.floor(epochs / config.decay_every_epochs + 1e-9)
    return 1.0


@dataclass(frozen=True)
class KlAnnealing:
    """Factor of the KL as a function of the steps made so far: it comes up to ``weight``.

    Call it with the number of steps, as `hpc_bnn.step.VariationalStep` does.

    Parameters
    ----------
    weight : float
        Factor that is reached; 1 is Bayes, below 1 a cold posterior.
    schedule : {"constant", "linear", "cosine", "cyclical"}
        From the start; up from 0 along a line (Sonderby et al., 2016) or half a cosine; or again and again: up from
        0 in the first half of each cycle, constant in the second (Fu et al., Cyclical Annealing Schedule, 2019).
    num_steps : float
        Steps until ``weight`` is reached; of cyclical the length of a cycle.
    """

    weight: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "cyclical"] = "constant"
    num_steps: float = 1.0

    def __post_init__(self):
        check_positive("--kl_annealing.num_epochs", self.num_steps, 10)

    def __call__(self, num_steps: int) -> float:
        done = num_steps / self.num_steps
        if self.schedule == "cyclical":
            return self.weight * min(2 * (done % 1.0), 1.0)
        if self.schedule == "linear":
            return self.weight * min(done, 1.0)
        if self.schedule == "cosine":
            return self.weight * 0.5 * (1 - math.cos(math.pi * min(done, 1.0)))
        return self.weight
