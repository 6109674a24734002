"""Likelihoods: p(y | outputs of a network), and the mixture over samples."""

from .base import Likelihood
from .build import build_likelihood
from .classes import Bernoulli, Categorical
from .numbers import Gaussian, Implicit, LearnedScale, LocationScale, Poisson, StudentT

__all__ = [
    "Bernoulli", "Categorical", "Gaussian", "Implicit", "LearnedScale", "Likelihood", "LocationScale", "Poisson",
    "StudentT", "build_likelihood",
]  # fmt: skip
