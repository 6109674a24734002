"""The optimizer of a job: a `Reducer` that sums over the ranks, and an `Updater`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..comm import GridComm
from ..config import OptimizerConfig
from ..errors import ConfigError, Fault, import_object
from ..posteriors import Posterior
from .reducer import Reducer
from .schedules import learning_rate_factor
from .updaters import ELEMENTWISE, FUSED, DividedUpdater, Updater


@dataclass(frozen=True)
class JobOptimizer:
    """Sums the gradient of a job over the ranks, and updates the parameters on each of them."""

    reducer: Reducer
    updater: Updater

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, posterior: Posterior, comm: GridComm) -> JobOptimizer:
        """Return that of an optimizer over ``posterior.parameters()`` or ``posterior.weight_parameters()``. Local."""
        reducer = Reducer(posterior, comm)
        return cls(reducer, Updater(optimizer, posterior, reducer))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of torch."""
        return self.updater.optimizer


def OverlappingOptimizer(optimizer: torch.optim.Optimizer, posterior: Posterior, comm: GridComm) -> JobOptimizer:
    """Return `JobOptimizer.of`, which sums the gradient in blocks while the last backward pass of a step runs. Local.

    `ConfigError` where the posterior adds to all gradients after its backward pass, its ranks hold different
    parameters, or the gradient is compressed.
    """
    reducer = Reducer(posterior, comm, in_blocks=True)
    return JobOptimizer(reducer, Updater(optimizer, posterior, reducer))


def ShardedOptimizer(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], posterior: Posterior, comm: GridComm
) -> JobOptimizer:
    """Return an optimizer whose state is divided over the sample group: ZeRO stage 1 (Rajbhandari et al., 2020). Local.

    Each rank of a sample group receives its share of the gradient (reduce-scatter), sums it over its data group, which
    holds the same share, updates its share of the weights, and the shares are gathered. The numbers are those of the
    undivided optimizer.

    Parameters
    ----------
    make : callable
        Makes the optimizer of a list of parameters: ``lambda parameters: torch.optim.Adam(parameters, lr=1e-3)``. It
        has to treat every number by itself.
    posterior, comm
        Those of the step. `ConfigError` where it is an ensemble, or the optimizer looks at whole tensors.
    """
    reducer = Reducer(posterior, comm, divided=True)
    return JobOptimizer(reducer, DividedUpdater(make, posterior, reducer))


def build_optimizer(
    config: OptimizerConfig,
    posterior: Posterior,
    comm: GridComm,
    num_epochs: int,
    steps_per_epoch: int,
    overlap: bool = False,
) -> tuple[JobOptimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer and the schedule of its learning rate. Local.

    Optimizers of torch that treat every number by itself see the parameters flat, others a tensor per weight.
    `ConfigError` where the optimizer is unknown, or refuses its arguments.
    """
    make = optimizer_maker(config)
    if config.sharded:
        optimizer: JobOptimizer = ShardedOptimizer(make, posterior, comm)
    else:
        is_flat = _path(config) in [f"torch.optim.{name}" for name in ELEMENTWISE]
        parameters = posterior.parameters() if is_flat else posterior.weight_parameters()
        kind = OverlappingOptimizer if overlap else JobOptimizer.of
        optimizer = kind(make(parameters), posterior, comm)

    def factor(num_steps: int) -> float:
        return learning_rate_factor(config, num_steps / steps_per_epoch, num_epochs)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, factor)


def optimizer_maker(config: OptimizerConfig) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return what makes the optimizer of a config over some parameters; both raise as `build_optimizer` says. Local."""
    # The prior is the decay of the weights: an optimizer's own would pull the scales as well.
    kind = import_object("optimizer.name", _path(config))
    arguments = config.arguments
    names = inspect.signature(kind).parameters.keys() & {"weight_decay", "lambd"}
    arguments = dict.fromkeys(names, 0.0) | arguments
    can_fuse = kind in FUSED and not arguments.keys() & {"fused", "foreach", "differentiable", "capturable"}

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        # torch's fused kernels for CPUs read strided memory (shares of several rows) as if it were contiguous
        fused: dict[str, Any] = {"fused": True} if can_fuse and all(p.is_contiguous() for p in parameters) else {}
        try:
            return kind(parameters, lr=config.learning_rate, **arguments, **fused)
        except (TypeError, ValueError) as error:
            rule = f"{config.name} refuses them ({error})"
            raise ConfigError(Fault("optimizer.arguments", config.arguments, rule, "Fix the arguments")) from error

    return make


def _path(config: OptimizerConfig) -> str:
    return config.name if "." in config.name else f"torch.optim.{config.name}"
