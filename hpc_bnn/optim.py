"""Optimizers and learning-rate schedules, from torch (floor 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .config import OptimizerConfig


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer and the schedule of its learning rate over ``num_steps``. Local."""
    # The prior is the decay of the weights: AdamW's own would pull the scales as well.
    optimizer = getattr(torch.optim, config.name)(parameters, lr=config.learning_rate, weight_decay=0.0)
    if config.schedule == "cosine":
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=0)
