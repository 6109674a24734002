"""The likelihood of a config."""

from __future__ import annotations

from ..config import LikelihoodConfig
from ..errors import ConfigError, Fault, build_object
from .base import Likelihood
from .classes import Bernoulli, Categorical
from .numbers import Gaussian, Implicit, Poisson, StudentT


def build_likelihood(config: LikelihoodConfig, num_classes: int | None, target_shape: tuple[int, ...]) -> Likelihood:
    """Return the likelihood of a config for the targets of a data set, with ``target_shape`` for one example. Local.

    `ConfigError` where classes and numbers are mixed up, or your own class refuses its arguments.
    """
    name = config.name
    if name == "auto":
        name = "gaussian" if num_classes is None else "categorical"
    num_targets = target_shape[0] if target_shape else 1
    if "." in name:
        own = {"num_targets": num_targets, **config.arguments}
        return build_object("likelihood.name", name, own, Likelihood, "likelihood.arguments")
    if num_classes is not None and name == "categorical":
        return Categorical(num_classes)
    if name == "categorical" or (num_classes is not None and (name, num_classes) != ("bernoulli", 2)):
        kind = "numbers" if num_classes is None else f"{num_classes} classes"
        raise ConfigError(Fault("likelihood.name", name, f"the targets of these data are {kind}", "Leave it at auto"))
    if name == "gaussian":
        return Gaussian(num_targets, config.scale, config.init_scale, min_scale=config.min_scale)
    if name == "student_t":
        return StudentT(num_targets, config.scale, config.init_scale, config.df, min_scale=config.min_scale)
    return {"bernoulli": Bernoulli, "poisson": Poisson, "implicit": Implicit}[name](num_targets)
