"""Base class of all likelihoods.

Log-likelihoods are in nats, one per example, summed over its targets; `hpc_bnn.training.step` sums over samples
and examples and divides by their global numbers.

A network has its outputs on dim 1: [B, num_outputs] or, for fields, [B, num_outputs, ...]. Targets y are
[B, num_targets, ...], or [B] for one target. Everything here is Local and differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, Fault, count
from .mixtures import Mixture


class Likelihood:
    """Base class of all likelihoods.

    Parameters
    ----------
    num_targets : int
        Extent of dim 1 of the targets.
    missing_targets : bool
        Whether NaN stands for a target that is missing. It adds nothing: `log_prob` sums over the targets that are present.
        Without it NaN is an error.
    """

    num_targets: int
    """Extent of dim 1 of the targets (1 if they have no dim 1; for classes, see `Categorical`)."""
    num_outputs: int
    """Extent of dim 1 that the network must have."""
    num_classes: int | None = None
    """Number of classes if the target is a class."""
    has_density = True
    """Whether `log_prob` exists."""
    has_variance = True
    """Whether the variance of the target, given a sample, is positive and finite."""
    is_equivariant = False
    """Whether the likelihood also holds for shifted and rescaled targets, so the network may get normalised ones."""
    support = "finite numbers"
    """Name of the allowed targets, for messages."""
    missing_targets = False
    """Whether NaN stands for a missing target."""

    def __init__(self, num_targets: int = 1, *, missing_targets: bool = False):
        count("Count the targets").check("num_targets", num_targets)
        self.num_targets = self.num_outputs = num_targets
        self.missing_targets = missing_targets

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module with the parameters of the likelihood added; wrap before you make a posterior."""
        return module

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | outputs), [B], summed over the targets of an example (nats)."""
        raise NotImplementedError

    def mean(self, outputs: Tensor) -> Tensor:
        """Return the mean of y given the outputs of a sample, [B, num_targets, ...]."""
        raise NotImplementedError

    def variance(self, outputs: Tensor) -> Tensor:
        """Return the variance of y given the outputs of a sample, like `mean`: the aleatoric part."""
        raise NotImplementedError

    def mixture(self, outputs: Tensor) -> Mixture | None:
        """Return the predictive of each target, from [K, B, num_outputs, ...]; None: no quantiles and no CRPS."""
        return None

    @property
    def has_mixture(self) -> bool:
        """Whether `mixture` returns one."""
        return type(self).mixture is not Likelihood.mixture

    def fits(self, y: Tensor) -> Tensor:
        """Return for each element of y whether it is in the support."""
        return self.or_missing(y.isfinite(), y)

    def present(self, y: Tensor) -> Tensor | None:
        """Return for each element of y whether it is not missing; None where this likelihood takes no missing targets."""
        return ~y.isnan() if self.missing_targets else None

    def or_missing(self, fits: Tensor, y: Tensor) -> Tensor:
        """Return for each element of y whether it fits or is missing."""
        present = self.present(y)
        return fits if present is None else fits | ~present

    def only_present(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return outputs and y with 0 for what is missing, and `present` in the shape of `mean`.

        No gradient reaches the outputs of a missing target. It is stopped before the density, whose derivative there may be
        infinite: 0 times infinity is NaN.
        """
        present = self.present(y)
        if present is None:
            return outputs, y, None
        mean = self.mean(outputs)
        self.targets(y, mean)  # the same shape
        present = present.view_as(mean)
        of_outputs = torch.cat([present] * (outputs.shape[1] // mean.shape[1]), dim=1)
        return torch.where(of_outputs, outputs, 0), torch.where(present, y.view_as(mean), 0), present

    def check_targets(self, y: Tensor) -> None:
        """Raise `DataError` if a target [B, ...] lies outside the support."""
        misfits = ~self.fits(y)
        if misfits.any():
            raise self.fault_of(y[misfits][0].item())

    def fault_of(self, target: float, where: str = "") -> DataError:
        """Return the error that a target lies outside the support."""
        rule = f"a target is {target:g}{where}, and the likelihood {type(self).__name__} is for {self.support}"
        return DataError(f"{rule}. Look at the data, or use another <likelihood.name>")

    def targets(self, y: Tensor, like: Tensor) -> Tensor:
        """Return y in the shape and dtype of predictions; `ConfigError` where a broadcast would be another model."""
        y = y.unsqueeze(1) if y.ndim == like.ndim - 1 and like.shape[1] == 1 else y
        if y.shape != like.shape:
            number = y.shape[1] if y.ndim > 1 else 1
            remedy = f"Let the network have num_outputs = {self.num_outputs} on dim 1"
            if number != self.num_targets:
                remedy += f", or make the likelihood with num_targets = {number}"
            raise self.misfit(like, y, f"num_targets is {self.num_targets}", remedy)
        return y.to(like.dtype)

    def misfit(self, outputs: Tensor, y: Tensor | None, rule: str, remedy: str) -> ConfigError:
        """Return the error that outputs of a network, or what becomes of them, do not fit the targets or this likelihood."""
        found = f"the network gives {list(outputs.shape)}"
        found += "" if y is None else f", the targets are {list(y.shape)} of {y.dtype}"
        return ConfigError(Fault("likelihood", type(self).__name__, f"{found}; {rule}", remedy))


def sum_targets(per_target: Tensor, present: Tensor | None = None) -> Tensor:
    """Return the sums [B] over the targets of each example, of those that are present, from [B, ...] or [B]."""
    per_target = per_target if present is None else torch.where(present, per_target, 0)
    return per_target.flatten(1).sum(1) if per_target.ndim > 1 else per_target
