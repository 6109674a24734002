"""Posteriors over the weights of an ordinary ``nn.Module``.

Nothing here knows of ranks: a posterior draws from generators that it is given, and turns the gradients of
module weights into gradients of its own parameters.
"""

from .buffer import Tally
from .build import build_posterior, build_prior
from .constructors import DeepEnsemble, DeterministicNetwork, LowRankGaussian, MCDropout, MeanFieldGaussian
from .families import Family, Slot
from .layout import FlatLayout
from .posterior import Posterior
from .priors import GaussianPrior, LaplacePrior, Prior, ScaleMixturePrior, StudentTPrior
from .select import split_weights

__all__ = [
    "DeepEnsemble", "DeterministicNetwork", "Family", "FlatLayout", "GaussianPrior", "LaplacePrior", "LowRankGaussian",
    "MCDropout", "MeanFieldGaussian", "Posterior", "Prior", "ScaleMixturePrior", "Slot", "StudentTPrior", "Tally",
    "build_posterior", "build_prior", "split_weights",
]  # fmt: skip
