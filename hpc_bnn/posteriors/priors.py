"""Priors over weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import ConfigError, Fault


@dataclass(frozen=True)
class GaussianPrior:
    """Independent Gaussian prior over each weight.

    Parameters
    ----------
    std : float
        Standard deviation, in units of the weight.
    mean : float
        Mean, in units of the weight.
    """

    std: float = 1.0
    mean: float = 0.0

    def __post_init__(self):
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ConfigError(
                Fault("--posterior.prior_std", self.std, "a standard deviation is positive", "Try 1.0")
            )

    def kl_from_gaussian(
        self, loc: torch.Tensor, log_scale: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Return KL(N(loc, scale^2) || prior), summed over all weights (nats, 0-dim tensor).

        Closed form, for example Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B.
        """
        precision = self.std**-2
        deviation = loc - self.mean if self.mean else loc
        squares = torch.dot(scale, scale) + torch.dot(deviation, deviation)
        return 0.5 * precision * squares - log_scale.sum() + loc.numel() * (math.log(self.std) - 0.5)

    def add_kl_gradient_(
        self,
        loc_grad: torch.Tensor,
        log_scale_grad: torch.Tensor,
        loc: torch.Tensor,
        scale: torch.Tensor,
        weight: float,
    ) -> None:
        """Add ``weight`` times the gradient of the KL to two gradients, in place."""
        precision = self.std**-2
        loc_grad.add_(loc, alpha=weight * precision)
        if self.mean:
            loc_grad.sub_(weight * precision * self.mean)
        log_scale_grad.addcmul_(scale, scale, value=weight * precision).sub_(weight)
