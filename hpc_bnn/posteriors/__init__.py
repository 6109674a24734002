"""Variational posteriors over the weights of an ordinary ``nn.Module`` (floor 3).

Nothing here knows of ranks: a posterior draws from a generator that it is given, and turns the
gradients of module weights into gradients of its own parameters.
"""

from .flat import FlatLayout
from .mean_field import MeanFieldGaussian
from .priors import GaussianPrior

__all__ = ["FlatLayout", "GaussianPrior", "MeanFieldGaussian"]
