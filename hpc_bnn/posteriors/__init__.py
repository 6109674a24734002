"""Posteriors over the weights of an ordinary ``nn.Module``.

Nothing here knows of ranks: a posterior draws from generators that it is given, and turns the gradients of
module weights into gradients of its own parameters.
"""

from .base import DeterministicNetwork, Posterior, Tally
from .build import build_posterior, build_prior
from .ensemble import DeepEnsemble
from .flat import FlatLayout
from .low_rank import LowRankGaussian
from .mc_dropout import MCDropout
from .mean_field import MeanFieldGaussian
from .priors import GaussianPrior, LaplacePrior, Prior, ScaleMixturePrior, StudentTPrior
from .select import split_weights

__all__ = [
    "DeepEnsemble",
    "DeterministicNetwork",
    "FlatLayout",
    "GaussianPrior",
    "LaplacePrior",
    "LowRankGaussian",
    "MCDropout",
    "MeanFieldGaussian",
    "Posterior",
    "Prior",
    "ScaleMixturePrior",
    "StudentTPrior",
    "Tally",
    "build_posterior",
    "build_prior",
    "split_weights",
]
