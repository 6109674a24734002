"""Courses of the learning rate and of the factor of the KL."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from ..config import OptimizerConfig, check_field
from ..errors import import_object


def learning_rate_factor(config: OptimizerConfig, epochs: float, num_epochs: int) -> float:
    """Return the learning rate after some epochs, as a multiple of ``config.learning_rate``. Local."""
    warmup = config.warmup_epochs
    if epochs < warmup:
        return epochs / warmup
    done = min((epochs - warmup) / max(num_epochs - warmup, 1e-9), 1.0)
    if "." in config.schedule:
        return _own("optimizer.schedule", config.schedule)(done)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.decay ** math.floor(epochs / config.decay_every_epochs + 1e-9)
    return 1.0


@functools.cache
def _own(field: str, path: str) -> Callable[[float], float]:
    return import_object(field, path)


@dataclass(frozen=True)
class KlAnnealing:
    """Factor of the KL as a function of the steps made so far: it comes up to ``weight``.

    Call it with the number of steps, as `hpc_bnn.VariationalStep` does.

    Parameters
    ----------
    weight : float
        Factor that is reached; 1 is Bayes, below 1 a cold posterior.
    schedule : {"constant", "linear", "cosine", "cyclical"} or str
        From the start; up from 0 along a line (Sonderby et al., 2016) or half a cosine; or again and again: up from
        0 in the first half of each cycle, constant in the second (Fu et al., Cyclical Annealing Schedule, 2019). Or the
        import path of a function from steps / num_steps to a multiple of ``weight``.
    num_steps : float
        Steps until ``weight`` is reached; of cyclical the length of a cycle.
    """

    weight: float = 1.0
    schedule: str = "constant"
    num_steps: float = 1.0

    def __post_init__(self):
        check_field("kl_weight", self.weight, "weight")
        check_field("kl_annealing.schedule", self.schedule)
        check_field("kl_annealing.num_epochs", self.num_steps, "num_steps")

    def __call__(self, num_steps: int) -> float:
        """Return the factor after so many steps. Local."""
        done = num_steps / self.num_steps
        if "." in self.schedule:
            return self.weight * _own("kl_annealing.schedule", self.schedule)(done)
        if self.schedule == "cyclical":
            return self.weight * min(2 * (done % 1.0), 1.0)
        if self.schedule == "linear":
            return self.weight * min(done, 1.0)
        if self.schedule == "cosine":
            return self.weight * 0.5 * (1 - math.cos(math.pi * min(done, 1.0)))
        return self.weight
