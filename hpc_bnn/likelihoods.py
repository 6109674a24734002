"""Likelihoods: what a network's outputs say about an example (floor 4).

Log-likelihoods are in nats, one per example, summed over its targets; summing over samples and examples, and
dividing by their global numbers, is the business of `hpc_bnn.step`.

A network has its outputs on dim 1: [B, num_outputs] or, for fields, [B, num_outputs, ...]. Targets y are
[B, num_targets, ...], or [B] for one target. Everything here is Local and differentiable.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LikelihoodConfig
from .errors import ConfigError, DataError, Fault, check_positive
from .mixtures import BernoulliMixture, GaussianMixture, Members, Mixture, PoissonMixture, StudentTMixture


class Likelihood:
    """What all likelihoods share.

    Attributes
    ----------
    num_targets : int
        Extent of dim 1 of the targets (1 where they have none; for classes, see `Categorical`).
    num_outputs : int
        Extent of dim 1 that the network must have.
    num_classes : int or None
        Number of classes where the target is one.
    has_density : bool
        Whether `log_prob` exists.
    has_variance : bool
        Whether the variance of the target, given a sample, is positive and finite.
    is_equivariant : bool
        Whether it holds for shifted and rescaled targets as well, so that the network may see normalised ones.
    """

    num_classes: int | None = None
    has_density = True
    has_variance = True
    is_equivariant = False

    def __init__(self, num_targets: int = 1):
        if num_targets < 1:
            raise ConfigError(Fault("num_targets", num_targets, "must be at least 1", "Count the targets"))
        self.num_targets = self.num_outputs = num_targets

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module with what the likelihood itself learns; wrap before making a posterior."""
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
        """Return the predictive of every target by itself, from the outputs of all samples [K, B, num_outputs, ...].

        None where a likelihood has nothing to say: the predictive then has no quantiles and no CRPS.
        """
        return None

    @property
    def has_mixture(self) -> bool:
        """Whether `mixture` is there."""
        return type(self).mixture is not Likelihood.mixture

    support = "finite numbers"
    """Which targets there are, for messages."""

    def fits(self, y: Tensor) -> Tensor:
        """Return for each element of y whether it is in the support. Local."""
        return y.isfinite()

    def check_targets(self, y: Tensor) -> None:
        """Raise `DataError` where a target [B, ...] lies outside the support. Local."""
        wrong = ~self.fits(y)
        if wrong.any():
            raise DataError(
                f"a target is {y[wrong][0].item():g}, and the likelihood {type(self).__name__} is for {self.support}. "
                "Look at the data, or use another --likelihood.name"
            )

    def targets(self, y: Tensor, like: Tensor) -> Tensor:
        """Return y in the shape and dtype of predictions; a silent broadcast would be another model.

        Raises
        ------
        ConfigError
            The targets have another shape than the predictions.
        """
        y = y.unsqueeze(1) if y.ndim == like.ndim - 1 and like.shape[1] == 1 else y
        if y.shape != like.shape:
            raise ConfigError(
                Fault(
                    f"likelihood {type(self).__name__}",
                    f"num_targets {self.num_targets}",
                    f"the network gives {list(like.shape[1:])} per example, the targets are {list(y.shape[1:])}",
                    f"Let the network have num_outputs = {self.num_outputs} on dim 1",
                )
            )
        return y.to(like.dtype)


class Categorical(Likelihood):
    """Classes with softmax probabilities; one class per example or per place of a field.

    Parameters
    ----------
    num_classes : int
        Number of classes, C.
    """

    has_variance = False  # a class is no number

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = self.num_outputs = num_classes
        self.support = f"classes 0 to {num_classes - 1}, or their probabilities"

    def fits(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y <= (1 if y.is_floating_point() else self.num_classes - 1))

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | outputs), [B], from logits [B, C, ...] and classes [B, ...] of a whole-number dtype.

        Targets [B, C, ...] of a floating-point dtype are class probabilities: the mean over them of log p.
        """
        y = y.to(outputs.dtype) if y.is_floating_point() else y.long()
        return -_sum_targets(F.cross_entropy(outputs, y, reduction="none"))

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return class probabilities [B, C, ...] from logits [B, C, ...]."""
        return torch.softmax(outputs, dim=1)


class Bernoulli(Likelihood):
    """Independent yes-no targets; the outputs are logits."""

    support = "0, 1, and probabilities between them"

    def fits(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y <= 1)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        y = self.targets(y, outputs)
        return -_sum_targets(F.binary_cross_entropy_with_logits(outputs, y, reduction="none"))

    def mean(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def mixture(self, outputs: Tensor) -> Mixture:
        return BernoulliMixture(torch.sigmoid(outputs))


class Poisson(Likelihood):
    """Independent counts; the outputs are logarithms of the rates."""

    support = "whole numbers from 0 on"

    def fits(self, y: Tensor) -> Tensor:
        return (y >= 0) & (y == y.floor())

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        y = self.targets(y, outputs)
        return _sum_targets(y * outputs - outputs.exp() - torch.lgamma(y + 1))

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    def variance(self, outputs: Tensor) -> Tensor:
        return outputs.exp()

    def mixture(self, outputs: Tensor) -> Mixture:
        return PoissonMixture(outputs.exp())


class LocationScale(Likelihood):
    """A location per target, and a scale that is fixed, learned once, or given by the network.

    Parameters
    ----------
    num_targets : int
        Extent of dim 1 of the targets.
    scale : float, "learned" or "heteroscedastic"
        A number fixes it (units of the targets as the network sees them: of their standard deviation where the
        shards are normalised). "learned": one scale per target, a point parameter that `wrap` adds
        to the network. "heteroscedastic": the network gives the logarithms of the scales behind the
        locations, [B, 2 num_targets, ...].
    init_scale : float
        Start of a learned scale (in the same units).
    """

    is_equivariant = True

    def __init__(
        self,
        num_targets: int = 1,
        scale: float | Literal["learned", "heteroscedastic"] = "heteroscedastic",
        init_scale: float = 1.0,
    ):
        super().__init__(num_targets)
        self.scale, self.init_scale = scale, init_scale
        if scale == "heteroscedastic":
            self.num_outputs = 2 * num_targets
        elif scale != "learned":
            check_positive("--likelihood.scale", scale, 1.0)
        check_positive("--likelihood.init_scale", init_scale, 1.0)

    def wrap(self, module: nn.Module) -> nn.Module:
        if self.scale != "learned":
            return module
        return LearnedScale(module, self.num_targets, self.init_scale)

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return locations and logarithms of the scales, alike in shape."""
        if isinstance(self.scale, str):
            if outputs.shape[1] != 2 * self.num_targets:
                remedy = "Wrap the network with likelihood.wrap" if self.scale == "learned" else "Widen it"
                raise ConfigError(
                    Fault(
                        "--likelihood.scale",
                        self.scale,
                        f"needs {2 * self.num_targets} outputs on dim 1, and there are {outputs.shape[1]}",
                        remedy,
                    )
                )
            return outputs.split(self.num_targets, dim=1)
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
        loc, log_scale = self._split(outputs)
        z = (self.targets(y, loc) - loc) * torch.exp(-log_scale)
        return -_sum_targets(0.5 * z.square() + log_scale + 0.5 * math.log(2 * math.pi))

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.exp(2 * self._split(outputs)[1])

    def mixture(self, outputs: Tensor) -> Mixture:
        return GaussianMixture(*self._loc_and_scale(outputs))


class StudentT(LocationScale):
    """Independent Student-t targets: heavy tails, for data with outliers.

    Parameters
    ----------
    num_targets, scale, init_scale
        As for `LocationScale`; the scale is not the standard deviation.
    df : float
        Degrees of freedom, above 0; the variance is finite above 2.
    """

    def __init__(
        self,
        num_targets: int = 1,
        scale: float | Literal["learned", "heteroscedastic"] = "heteroscedastic",
        init_scale: float = 1.0,
        df: float = 4.0,
    ):
        super().__init__(num_targets, scale, init_scale)
        check_positive("--likelihood.df", df, 4.0)
        self.df = df
        self.has_variance = df > 2

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        loc, log_scale = self._split(outputs)
        df = self.df
        z = (self.targets(y, loc) - loc) * torch.exp(-log_scale)
        constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        return _sum_targets(constant - log_scale - (df + 1) / 2 * torch.log1p(z.square() / df))

    def variance(self, outputs: Tensor) -> Tensor:
        factor = self.df / (self.df - 2) if self.has_variance else math.inf
        return factor * torch.exp(2 * self._split(outputs)[1])

    def mixture(self, outputs: Tensor) -> Mixture:
        return StudentTMixture(*self._loc_and_scale(outputs), df=self.df)


class Implicit(Likelihood):
    """No density: the outputs themselves are the members of the predictive.

    For objectives that score the members (CRPS, energy score), where the weights carry all uncertainty.
    """

    has_density = has_variance = False
    is_equivariant = True

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        raise ConfigError(
            Fault("--likelihood.name", "implicit", "it has no density", "Use gaussian, or the objective crps")
        )

    def mean(self, outputs: Tensor) -> Tensor:
        return outputs

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.zeros_like(outputs)

    def mixture(self, outputs: Tensor) -> Mixture:
        return Members(outputs)


class LearnedScale(nn.Module):
    """A network with one learned scale per target, the same for all inputs.

    The scale is a point weight whatever the posterior is (maximum likelihood of the second kind).

    Parameters
    ----------
    network : nn.Module
        Gives [B, num_targets, ...].
    num_targets : int
        Number of scales.
    init_scale : float
        Their start (units of y).
    """

    point_parameters = ("log_scale",)

    def __init__(self, network: nn.Module, num_targets: int, init_scale: float = 1.0):
        super().__init__()
        self.network = network
        like = next(network.parameters())
        self.log_scale = nn.Parameter(like.new_full((num_targets,), math.log(init_scale)))

    def forward(self, x: Tensor) -> Tensor:  # -> [B, 2 num_targets, ...]
        loc = self.network(x)
        log_scale = self.log_scale.view(-1, *(1,) * (loc.ndim - 2)).expand_as(loc)
        return torch.cat([loc, log_scale], dim=1)


def build_likelihood(
    config: LikelihoodConfig, num_classes: int | None, target_shape: tuple[int, ...]
) -> Likelihood:
    """Return the likelihood of a config for targets of a data set. Local.

    Parameters
    ----------
    num_classes : int or None
        Number of classes where the targets are classes.
    target_shape : tuple of int
        Shape of the targets of one example.

    Raises
    ------
    ConfigError
        Classes and numbers are mixed up.
    """
    name = config.name
    if name == "auto":
        name = "gaussian" if num_classes is None else "categorical"
    if (name == "categorical") != (num_classes is not None) and (name, num_classes) != ("bernoulli", 2):
        kind = "numbers" if num_classes is None else f"{num_classes} classes"
        raise ConfigError(
            Fault("--likelihood.name", name, f"the targets of these data are {kind}", "Leave it at auto")
        )
    num_targets = target_shape[0] if target_shape else 1
    match name:
        case "categorical":
            return Categorical(num_classes)
        case "gaussian":
            return Gaussian(num_targets, config.scale, config.init_scale)
        case "student_t":
            return StudentT(num_targets, config.scale, config.init_scale, config.df)
        case "bernoulli":
            return Bernoulli(num_targets)
        case "poisson":
            return Poisson(num_targets)
        case "implicit":
            return Implicit(num_targets)
    raise AssertionError(name)


def _sum_targets(per_target: Tensor) -> Tensor:
    return per_target.flatten(1).sum(1) if per_target.ndim > 1 else per_target
