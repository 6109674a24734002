"""Families without random weights: all weights are points, the slot ``points``."""

from __future__ import annotations

import torch

from ...capabilities import FAMILIES
from ...config import check_field
from .base import Family


class Point(Family):
    """The ordinary network: one point."""

    name = "deterministic"
    capabilities = FAMILIES["deterministic"]

    def slots(self, weights, layout, samples):
        return {}


class Dropout(Point):
    """Dropout masks as samples of the weights (Gal and Ghahramani, Dropout as a Bayesian Approximation, 2016).

    The KL to a Gaussian prior is, up to a constant, weight decay: ``keep / (2 prior_std^2) * ||w||^2`` (equation 7 with
    length scale 1 / prior_std). ``rate`` is the probability that dropout sets a number to 0, ``prior_std`` in units of
    the weight.
    """

    name = "MC dropout"
    capabilities = FAMILIES["mc_dropout"]

    def __init__(self, rate: float, prior_std: float = 1.0):
        check_field("posterior.prior_std", prior_std)
        self.prior_std = prior_std
        self._decay = (1 - rate) / prior_std**2

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        points = slots["points"]
        if grads is not None:
            grads["points"].addcmul_(points, scalars.kl_weight * self._decay)
        return 0.5 * self._decay * torch.dot(points, points)

    def kl_by_weight(self, slots, span):
        return 0.5 * self._decay * slots["points"][span].double().square()
