"""The likelihood of a config."""

from __future__ import annotations

from ..config import LikelihoodConfig
from ..errors import ConfigError, Fault, build_object
from .base import Likelihood
from .classes import Bernoulli, Categorical
from .numbers import Gaussian, Implicit, Poisson, StudentT


def build_likelihood(
    config: LikelihoodConfig,
    num_classes: int | None,
    target_shape: tuple[int, ...],
    *,
    missing_targets: bool = False,
    ignore_index: int | None = None,
) -> Likelihood:
    """Return the likelihood of a config for targets of ``target_shape`` each; what is missing as in `Manifest`. Local.

    `ConfigError` where classes and numbers are mixed up, or your own class refuses its arguments.
    """
    name = config.name
    if name == "auto":
        name = "gaussian" if num_classes is None else "categorical"
    num_targets = target_shape[0] if target_shape else 1
    if "." in name:
        own = {"num_targets": num_targets, **config.arguments}
        likelihood = build_object("likelihood.name", name, own, Likelihood, "likelihood.arguments")
        if missing_targets > likelihood.missing_targets or ignore_index != getattr(likelihood, "ignore_index", None):
            option = f"ignore_index: {ignore_index}" if ignore_index is not None else "missing_targets: true"
            rule = "targets of these data are missing, and the likelihood does not know it"
            raise ConfigError(Fault("likelihood.arguments", config.arguments, rule, f"Give it {option}"))
        return likelihood
    if num_classes is not None and name == "categorical":
        return Categorical(num_classes, ignore_index=ignore_index)
    is_binary = (name, num_classes, target_shape) == ("bernoulli", 2, ())
    if name == "categorical" or (num_classes is not None and not is_binary):
        kind = "numbers" if num_classes is None else f"{'fields of ' * bool(target_shape)}{num_classes} classes"
        raise ConfigError(Fault("likelihood.name", name, f"the targets of these data are {kind}", "Leave it at auto"))
    if ignore_index is not None:
        raise ConfigError(Fault("likelihood.name", name, "classes of these data are missing", "Use categorical"))
    if name == "gaussian":
        scale = config.scale, config.init_scale
        return Gaussian(num_targets, *scale, min_scale=config.min_scale, missing_targets=missing_targets)
    if name == "student_t":
        scale = config.scale, config.init_scale, config.df
        return StudentT(num_targets, *scale, min_scale=config.min_scale, missing_targets=missing_targets)
    kind = {"bernoulli": Bernoulli, "poisson": Poisson, "implicit": Implicit}[name]
    return kind(num_targets, missing_targets=missing_targets)
