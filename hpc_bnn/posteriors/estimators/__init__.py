"""Estimators with noise per example; the ordinary one, a draw of the weights per sample, is their absence."""

from .base import Estimator
from .example_noise import ExampleNoise
from .flipout import Flipout
from .local import Local

__all__ = ["ESTIMATORS", "Estimator", "ExampleNoise", "Flipout", "Local"]

ESTIMATORS = {"reparameterisation": None, "local": Local, "flipout": Flipout}
