"""Priors over weights.

A prior is described without a network (`GaussianPrior(std=0.5)`) and *bound* to the weights of one: then
"fan_in" scales and the initial weights as means become tensors.

Where the KL to a Gaussian has a closed form it is used. Elsewhere the KL is the Monte Carlo estimate
``-entropy(q) - mean over samples of log prior(w_s)``, with the entropy in closed form: unbiased, and visible
as ``posterior.capabilities.kl``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import check_field
from .layout import FlatLayout

Bindable = Any
"""A number, or a word in whose place `Prior.bind` puts a tensor [P]."""

NUM_NODES = 64
"""Of the quadrature of a KL without a closed form, for a check-up; training takes the samples of the step."""


@dataclass(frozen=True)
class Prior:
    """Base of all priors: independent over weights."""

    closed_form: ClassVar[bool] = False
    """Whether `cross_entropy`, and with it the KL from a Gaussian, is known in closed form."""
    checked: ClassVar[Sequence[tuple[str, str]]] = ()
    """Parameters that have the rule of a field of a config, each with this field."""

    def __post_init__(self):
        for name, field in self.checked:
            check_field(field, getattr(self, name), name)

    def bind(self, layout: FlatLayout, weights: Tensor) -> Prior:
        """Return the prior with tensors [P] in the place of words, for initial weights [P] in a layout."""
        bound = copy.copy(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == "fan_in":
                flat = torch.empty_like(weights)
                for view in layout.views(flat).values():
                    view.fill_(view[0].numel() ** -0.5 if view.ndim > 1 else 1.0)
                object.__setattr__(bound, field.name, flat)
            elif value == "initial":
                object.__setattr__(bound, field.name, weights.clone())
        return bound

    def cross_entropy(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Return -E[log prior(w)] for Gaussian w of that mean and standard deviation, summed (nats)."""
        raise NotImplementedError

    def kl_from_gaussian(self, loc: Tensor, log_scale: Tensor, scale: Tensor) -> Tensor:
        """Return KL(N(loc, scale^2) || prior), summed over all weights (nats, 0-dim tensor)."""
        return self.cross_entropy(loc, scale) - gaussian_entropy(log_scale)

    def kl_by_weight(self, loc: Tensor, scale: Tensor, span: slice) -> Tensor:
        """Return KL(N(loc, scale^2) || prior) of each of the weights ``span`` of [P], [n] (nats). Local.

        Without a closed form the expectation of -log prior is a sum over `NUM_NODES` equidistant nodes within 6 scales
        (trapezoids). What of the prior is much narrower than q falls between them: at a tenth of the scale of q the error
        is below 0.01 nats.

        Parameters
        ----------
        loc, scale : Tensor
            [n], float64, of these weights.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        bound = {name: value[span, None].to(loc) for name, value in values.items() if torch.is_tensor(value)}
        entropy = scale.log() + (_HALF_LOG_2PI + 0.5)

        def of_each(method: str, *of_weights: Tensor) -> Tensor:  # the same formula as for all, one weight at a time
            def of_one(tensors: dict[str, Tensor], *numbers: Tensor) -> Tensor:
                prior = copy.copy(self)
                for name, tensor in tensors.items():
                    object.__setattr__(prior, name, tensor)
                return getattr(prior, method)(*numbers)

            return torch.vmap(of_one)(bound, *(numbers[:, None] for numbers in of_weights))

        if self.closed_form:
            return of_each("cross_entropy", loc, scale) - entropy
        nodes, mean_log_prob = torch.linspace(-6, 6, NUM_NODES, dtype=torch.float64), torch.zeros_like(loc)
        for node, share in zip(nodes.tolist(), (-0.5 * nodes.square()).softmax(0).tolist()):
            mean_log_prob += share * of_each("log_prob", loc + node * scale)
        return -mean_log_prob - entropy

    def least_kl(self, like: Tensor) -> float:
        """Return the least KL of a Gaussian around the prior's mean to the prior of the first weight (nats). Local.

        It is 0 for a Gaussian prior, 0.048 for a Laplace. Of standard deviations 0.9 % apart; ``like`` has the device.
        """
        scale = torch.logspace(-4, 4, 2001, dtype=torch.float64, device=like.device)
        first = copy.copy(self)
        for field in dataclasses.fields(self):
            if torch.is_tensor(value := getattr(self, field.name)):
                object.__setattr__(first, field.name, value[0].to(scale).expand_as(scale))
        mean = torch.zeros_like(scale) + getattr(first, "mean", 0.0)
        return first.kl_by_weight(mean, scale, slice(None)).min().item()

    def add_kl_gradient_(
        self, loc_grad: Tensor, log_scale_grad: Tensor, loc: Tensor, scale: Tensor, weight: Tensor
    ) -> None:
        """Add ``weight`` times the gradient of that KL to two gradients [P], in place."""
        raise NotImplementedError

    def log_prob(self, w: Tensor) -> Tensor:
        """Return the log density summed over all weights (nats)."""
        raise NotImplementedError

    def score(self, w: Tensor) -> Tensor:
        """Return the gradient of the log density, [P]."""
        raise NotImplementedError


@dataclass(frozen=True)
class GaussianPrior(Prior):
    """Independent Gaussian.

    Parameters
    ----------
    std : float or "fan_in"
        Standard deviation, in units of the weight.
    mean : float or "initial"
        Mean, in units of the weight; "initial" takes the weights that the module comes with, as MOPED
        does for a pretrained network (Krishnan et al., 2020).
    """

    closed_form = True
    checked = (("std", "posterior.prior_std"), ("mean", "posterior.prior_mean"))
    std: Bindable = 1.0
    mean: Bindable = 0.0

    def cross_entropy(self, loc: Tensor, scale: Tensor) -> Tensor:
        # With the entropy: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, appendix B.
        deviation = loc - self.mean if torch.is_tensor(self.mean) or self.mean else loc
        if torch.is_tensor(self.std):
            deviation, scale = deviation / self.std, scale / self.std
            squares = torch.dot(scale, scale) + torch.dot(deviation, deviation)
            return 0.5 * squares + self.std.log().sum() + loc.numel() * _HALF_LOG_2PI
        squares = torch.dot(scale, scale) + torch.dot(deviation, deviation)
        return 0.5 * self.std**-2 * squares + loc.numel() * (math.log(self.std) + _HALF_LOG_2PI)

    def add_kl_gradient_(
        self, loc_grad: Tensor, log_scale_grad: Tensor, loc: Tensor, scale: Tensor, weight: Tensor
    ) -> None:
        precision = self.std**-2
        if torch.is_tensor(self.std):
            loc_grad.addcmul_((loc - self.mean).mul_(weight), precision)
            log_scale_grad.addcmul_((scale * precision).mul_(weight), scale).sub_(weight)
            return
        loc_grad.addcmul_(loc, weight * precision)
        if torch.is_tensor(self.mean) or self.mean:
            loc_grad.sub_(self.mean * (weight * precision))
        log_scale_grad.addcmul_(scale * (weight * precision), scale).sub_(weight)

    def log_prob(self, w: Tensor) -> Tensor:
        return -self.cross_entropy(w, torch.zeros_like(w))

    def score(self, w: Tensor) -> Tensor:
        return (self.mean - w) / (self.std * self.std)


@dataclass(frozen=True)
class LaplacePrior(Prior):
    """Independent Laplace: density exp(-|w - mean| / scale) / (2 scale).

    Parameters
    ----------
    scale, mean : float or "fan_in", float or "initial"
        In units of the weight.
    """

    closed_form = True
    checked = (("scale", "posterior.prior_std"), ("mean", "posterior.prior_mean"))
    scale: Bindable = 1.0
    mean: Bindable = 0.0

    def cross_entropy(self, loc: Tensor, scale: Tensor) -> Tensor:
        # E|w - mean| is the mean of a folded normal (Leone, Nelson, Nottingham, 1961).
        z = (loc - self.mean) / scale
        folded = scale * (math.sqrt(2 / math.pi) * torch.exp(-0.5 * z * z) + z * torch.erf(z * math.sqrt(0.5)))
        return (folded / self.scale + _log_like(self.scale, loc)).sum() + loc.numel() * math.log(2)

    def add_kl_gradient_(
        self, loc_grad: Tensor, log_scale_grad: Tensor, loc: Tensor, scale: Tensor, weight: Tensor
    ) -> None:
        z = (loc - self.mean) / scale
        loc_grad.addcmul_(torch.erf(z * math.sqrt(0.5)) / self.scale, weight)
        density = scale * (math.sqrt(2 / math.pi) * torch.exp(-0.5 * z * z))
        log_scale_grad.addcmul_(density / self.scale, weight).sub_(weight)

    def log_prob(self, w: Tensor) -> Tensor:
        return -((w - self.mean).abs() / self.scale + _log_like(self.scale, w)).sum() - w.numel() * math.log(2)

    def score(self, w: Tensor) -> Tensor:
        return torch.sign(self.mean - w) / self.scale


@dataclass(frozen=True)
class ScaleMixturePrior(Prior):
    """Mixture of two centred Gaussians (Blundell et al., Weight Uncertainty in Neural Networks, 2015).

    Parameters
    ----------
    std, narrow_std, fraction : float
        Standard deviations, in units of the weight; weight of the first, in (0, 1).
    """

    checked = tuple((name, f"posterior.prior_{name}") for name in ("std", "narrow_std", "fraction"))
    std: float = 1.0
    narrow_std: float = 0.1
    fraction: float = 0.5

    def _log_parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        square = w * w
        return (
            math.log(self.fraction / self.std) - _HALF_LOG_2PI - square / (2 * self.std**2),
            math.log((1 - self.fraction) / self.narrow_std) - _HALF_LOG_2PI - square / (2 * self.narrow_std**2),
        )

    def log_prob(self, w: Tensor) -> Tensor:
        return torch.logaddexp(*self._log_parts(w)).sum()

    def score(self, w: Tensor) -> Tensor:
        wide, narrow = self._log_parts(w)
        responsibility = torch.sigmoid(wide - narrow)
        return -w * (responsibility * self.std**-2 + (1 - responsibility) * self.narrow_std**-2)


@dataclass(frozen=True)
class StudentTPrior(Prior):
    """Independent Student-t, centred.

    Parameters
    ----------
    df, scale : float, float or "fan_in"
        Degrees of freedom; scale in units of the weight.
    """

    checked = (("df", "posterior.prior_df"), ("scale", "posterior.prior_std"))
    df: float = 3.0
    scale: Bindable = 1.0

    def log_prob(self, w: Tensor) -> Tensor:
        nu = self.df
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
        z = w / self.scale
        return (-(nu + 1) / 2 * torch.log1p(z * z / nu) - _log_like(self.scale, w)).sum() + w.numel() * constant

    def score(self, w: Tensor) -> Tensor:
        return -(self.df + 1) * w / (self.df * self.scale * self.scale + w * w)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def _log_like(scale: Bindable, like: Tensor) -> Tensor:
    scale = scale.to(like) if torch.is_tensor(scale) else like.new_full((), scale)  # made where it is used
    return scale.log().expand_as(like)


def gaussian_entropy(log_scale: Tensor) -> Tensor:
    """Return the entropy of independent Gaussians, summed (nats)."""
    return log_scale.sum() + log_scale.numel() * (_HALF_LOG_2PI + 0.5)
