"""Posteriors from a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..config import PosteriorConfig
from ..errors import build_object
from ..noise import Key, Stream
from .constructors import DeepEnsemble, DeterministicNetwork, LowRankGaussian, MCDropout, MeanFieldGaussian
from .families import Family
from .network import Output
from .posterior import Posterior
from .priors import GaussianPrior, LaplacePrior, Prior, ScaleMixturePrior, StudentTPrior


def build_prior(config: PosteriorConfig) -> Prior:
    """Return the prior that a config describes."""
    std: Any = config.prior_std  # a number for a mixture, which a config checks
    if config.prior == "laplace":
        return LaplacePrior(std, config.prior_mean)
    if config.prior == "student_t":
        return StudentTPrior(config.prior_df, std)
    if config.prior == "scale_mixture":
        return ScaleMixturePrior(std, config.prior_narrow_std, config.prior_fraction)
    return GaussianPrior(std, config.prior_mean)


def build_posterior(
    config: PosteriorConfig,
    make_module: Callable[[], nn.Module],
    *,
    num_samples: int,
    local_samples: Sequence[int],
    seed: int,
    output: Output = None,
) -> Posterior:
    """Return the posterior that a config describes, over the weights of a module. Local.

    ``make_module`` makes the network on its device and in its dtype; the weights come from torch's global generator,
    which is keyed here by ``seed``. ``num_samples`` are the samples per step in the whole job (the members of an
    ensemble), ``local_samples`` those of this rank; ``output`` is that of `Posterior`. `ConfigError` where the module
    does not go with the family or with ``config.deterministic``.
    """
    options: dict[str, Any] = {"prior_std": config.prior_std, "output": output}
    if config.family == "ensemble":
        return DeepEnsemble(make_module, num_samples, local_samples, seed=seed, **options)
    with Key(seed, Stream.INIT).global_generator():
        module = make_module()
    if config.family == "deterministic":
        return DeterministicNetwork(module, output=output)
    if config.family == "mc_dropout":
        return MCDropout(module, **options)
    if "." in config.family:
        family = build_object("posterior.family", config.family, config.arguments, Family, "posterior.arguments")
        return Posterior(
            module, family, deterministic=config.deterministic, estimator=config.estimator,
            antithetic=config.antithetic, samples=local_samples, output=output,
        )  # fmt: skip
    names = ("init_std", "init_std_relative", "deterministic", "estimator", "antithetic")
    options = {name: getattr(config, name) for name in names} | {"prior": build_prior(config), "output": output}
    if config.family == "low_rank":
        return LowRankGaussian(module, rank=config.rank, **options)
    return MeanFieldGaussian(module, **options)
