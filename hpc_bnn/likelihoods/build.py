"""The likelihood of a config."""

from __future__ import annotations

from ..config import LikelihoodConfig
from ..errors import ConfigError, Fault, build_object
from .base import Likelihood
from .classes import Bernoulli, Categorical
from .numbers import Gaussian, Implicit, Poisson, StudentT

__all__ = ["build_likelihood"]


def build_likelihood(config: LikelihoodConfig, num_classes: int | None, target_shape: tuple[int, ...]) -> Likelihood:
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
    is_ours = "." not in name and (name, num_classes) != ("bernoulli", 2)
    if is_ours and (name == "categorical") != (num_classes is not None):
        kind = "numbers" if num_classes is None else f"{num_classes} classes"
        raise ConfigError(Fault("likelihood.name", name, f"the targets of these data are {kind}", "Leave it at auto"))
    num_targets = target_shape[0] if target_shape else 1
    if "." in name:
        own = {"num_targets": num_targets, **config.arguments}
        return build_object("likelihood.name", name, own, Likelihood, "likelihood.arguments")
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
