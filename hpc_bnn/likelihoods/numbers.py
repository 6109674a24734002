"""Likelihoods of numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LikelihoodScale, check_field
from ..errors import ConfigError, Fault
from ..trees import map_tensors
from .base import Likelihood, sum_targets
from .mixtures import GaussianMixture, Members, Mixture, PoissonMixture, StudentTMixture, student_t_log_norm


class Poisson(Likelihood):
    """Independent counts; the outputs are logarithms of the rates."""

    support = "whole numbers from 0 on"

    def fits(self, y: Tensor) -> Tensor:
        return self.or_missing((y >= 0) & (y == y.floor()) & y.isfinite(), y)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        outputs, y, present = self.only_present(outputs, y)
        y = self.targets(y, outputs)
        return sum_targets(y * outputs - outputs.exp() - torch.lgamma(y + 1), present)

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    variance = mean

    def mixture(self, outputs: Tensor) -> Mixture:
        return PoissonMixture(outputs.exp())


class LocationScale(Likelihood):
    """A location per target, and a scale that is fixed, learned once, or given by the network.

    Parameters
    ----------
    num_targets, missing_targets
        As for `Likelihood`.
    scale, init_scale : float, "learned" or "heteroscedastic"; float
        A number fixes it (units of the network's targets: standard deviations if the shards are normalised).
        "learned": one scale per target from ``init_scale`` on, a point parameter that `wrap` adds to the network.
        "heteroscedastic": the network gives the locations and then the logs of the scales, [B, 2 num_targets, ...].
    min_scale : float
        Floor of a scale that is not fixed, to which it is added: ``min_scale + exp(log scale)``.
    """

    is_equivariant = True

    def __init__(
        self,
        num_targets: int = 1,
        scale: LikelihoodScale = "heteroscedastic",
        init_scale: float = 1.0,
        *,
        min_scale: float = 0.0,
        missing_targets: bool = False,
    ):
        super().__init__(num_targets, missing_targets=missing_targets)
        self.scale, self.init_scale, self.min_scale = scale, init_scale, min_scale
        if scale == "heteroscedastic":
            self.num_outputs = 2 * num_targets
        check_field("likelihood.scale", scale)
        check_field("likelihood.init_scale", init_scale)
        check_field("likelihood.min_scale", min_scale)
        if scale == "learned" and min_scale >= init_scale:
            rule = f"must be below <likelihood.init_scale>, {init_scale}"
            raise ConfigError(Fault("likelihood.min_scale", min_scale, rule, "Make it smaller"))

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.scale != "learned":
            return module
        return LearnedScale(module, self.num_targets, self.init_scale - self.min_scale)

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return locations and logarithms of the scales, [B, num_targets, ...] both."""
        if isinstance(self.scale, str):
            if outputs.shape[1:2] != (2 * self.num_targets,):
                number, given = f"{2 * self.num_targets} outputs on dim 1", list(outputs.shape)
                rule = f"needs {number}, locations and logarithms of scales, and the network gives {given}"
                fixed = "or give a number for <likelihood.scale>, as in Gaussian(1, 0.1)"
                remedy = f"Let the network have {number}, {fixed}"
                if self.scale == "learned":
                    remedy = f"Wrap, with likelihood.wrap, a network that gives {self.num_targets} on dim 1: a tensor, dict or tuple"
                raise ConfigError(Fault("likelihood.scale", self.scale, rule, remedy))
            log_scale = outputs[:, self.num_targets :]
            if self.min_scale:
                log_scale = torch.logaddexp(log_scale, log_scale.new_tensor(math.log(self.min_scale)))
            return outputs[:, : self.num_targets], log_scale
        return outputs, torch.full_like(outputs, math.log(self.scale))

    def mean(self, outputs: Tensor) -> Tensor:
        return self._split(outputs)[0]

    def _loc_and_scale(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return locations and scales [K, B, num_targets, ...] from the outputs of all samples."""
        loc, log_scale = self._split(outputs.flatten(0, 1))
        return loc.unflatten(0, outputs.shape[:2]), log_scale.exp().unflatten(0, outputs.shape[:2])


class Gaussian(LocationScale):
    """Independent Gaussian targets; parameters as for `LocationScale`."""

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        outputs, y, present = self.only_present(outputs, y)
        loc, log_scale = self._split(outputs)
        z = (self.targets(y, loc) - loc) * torch.exp(-log_scale)
        return -sum_targets(0.5 * z.square() + log_scale + 0.5 * math.log(2 * math.pi), present)

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.exp(2 * self._split(outputs)[1])

    def mixture(self, outputs: Tensor) -> Mixture:
        return GaussianMixture(*self._loc_and_scale(outputs))


class StudentT(LocationScale):
    """Independent Student-t targets: heavy tails, for data with outliers.

    Parameters
    ----------
    num_targets, scale, init_scale, min_scale, missing_targets
        As for `LocationScale`; the scale is not the standard deviation.
    df : float
        Degrees of freedom, above 0; the variance is finite above 2.
    """

    def __init__(
        self,
        num_targets: int = 1,
        scale: LikelihoodScale = "heteroscedastic",
        init_scale: float = 1.0,
        df: float = 4.0,
        *,
        min_scale: float = 0.0,
        missing_targets: bool = False,
    ):
        super().__init__(num_targets, scale, init_scale, min_scale=min_scale, missing_targets=missing_targets)
        check_field("likelihood.df", df)
        self.df = df
        self.has_variance = df > 2

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        outputs, y, present = self.only_present(outputs, y)
        loc, log_scale = self._split(outputs)
        df = self.df
        z = (self.targets(y, loc) - loc) * torch.exp(-log_scale)
        return sum_targets(student_t_log_norm(df) - log_scale - (df + 1) / 2 * torch.log1p(z.square() / df), present)

    def variance(self, outputs: Tensor) -> Tensor:
        factor = self.df / (self.df - 2) if self.has_variance else math.inf
        return factor * torch.exp(2 * self._split(outputs)[1])

    def mixture(self, outputs: Tensor) -> Mixture:
        return StudentTMixture(*self._loc_and_scale(outputs), df=self.df)


class Implicit(Likelihood):
    """No density: the outputs are the members of the predictive, which CRPS and energy score.

    The weights then describe all uncertainty.
    """

    has_density = has_variance = False
    is_equivariant = True

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        remedy = "Use gaussian, or the objective crps"
        raise ConfigError(Fault("likelihood.name", "implicit", "it has no density", remedy))

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.zeros_like(outputs)

    def mixture(self, outputs: Tensor) -> Mixture:
        return Members(outputs)


class LearnedScale(nn.Module):
    """A network that gives [B, num_targets, ...], or dicts, lists and tuples with it; one learned scale per target.

    The scale is a point weight with every posterior (maximum likelihood of the second kind).
    """

    point_parameters = ("log_scale",)

    def __init__(self, network: nn.Module, num_targets: int, init_scale: float = 1.0):
        super().__init__()
        self.network = network
        like = next(network.parameters())
        self.log_scale = nn.Parameter(like.new_full((num_targets,), math.log(init_scale), dtype=like.dtype.to_real()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return map_tensors(self._scaled, self.network(*args, **kwargs))

    def _scaled(self, loc: Tensor) -> Tensor:  # -> [B, 2 num_targets, ...]
        """Append the scales to each tensor that may be the locations: the posterior picks one (``output=``)."""
        loc = loc[:, None] if loc.ndim == 1 and len(self.log_scale) == 1 else loc
        if loc.shape[1:2] != self.log_scale.shape:
            return loc
        log_scale = self.log_scale.view(-1, *(1,) * (loc.ndim - 2)).expand_as(loc)
        return torch.cat([loc, log_scale], dim=1)
