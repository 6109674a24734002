"""Bayesian neural networks on supercomputers by sampling parallelism.

hpc_bnn distributes samples of the weights, examples, or both over the ranks of an MPI job. The result does not depend
on the grid.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def door(package: str, names_of: dict[str, str]):
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported on first use.

    So `hpc_bnn.grid` and the help of a command need no torch, and a report does not import training. ``names_of`` has for
    each module within the package its names, with spaces between.
    """
    homes = {name: module for module, names in names_of.items() for name in names.split()}
    public = list(homes)

    def get(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return get, lambda: sorted(public), public


if TYPE_CHECKING:
    from .comm import GridComm, TensorTransport, connect
    from .config import Config
    from .data.augment import Augmentation
    from .data.dataset import ShardDataset
    from .data.loader import BatchLoader
    from .data.order import global_batches
    from .data.source import DatasetSource, GlobalBatchSampler, Source, StreamSource, TensorSource
    from .data.writer import Examples, write_shards
    from .grid import Grid
    from .likelihoods import Bernoulli, Categorical, Gaussian, Implicit, Likelihood, Poisson, StudentT
    from .objectives import Crps, Energy, Gathered, LogPredictive, MomentMatched, NegativeElbo
    from .posteriors import Family, MeanFieldGaussian, Posterior
    from .posteriors.constructors import DeepEnsemble, DeterministicNetwork, LowRankGaussian, MCDropout
    from .posteriors.priors import GaussianPrior, LaplacePrior, ScaleMixturePrior, StudentTPrior
    from .predictive import evaluate_dataset, predict_classes, predict_dataset, predict_values
    from .run.inference_data import to_arviz
    from .run.predictor import Predictor, load
    from .training import KlAnnealing, OverlappingOptimizer, ShardedOptimizer, VariationalStep
else:
    __getattr__, __dir__, __all__ = door(
        __name__,
        {
            "comm": "connect GridComm TensorTransport",
            "config": "Config",
            "data": (
                "Augmentation BatchLoader DatasetSource Examples global_batches GlobalBatchSampler ShardDataset Source "
                "StreamSource TensorSource write_shards"
            ),
            "grid": "Grid",
            "likelihoods": "Bernoulli Categorical Gaussian Implicit Likelihood Poisson StudentT",
            "objectives": "Crps Energy Gathered LogPredictive MomentMatched NegativeElbo",
            "posteriors": "DeepEnsemble DeterministicNetwork Family GaussianPrior LaplacePrior LowRankGaussian MCDropout "
            "MeanFieldGaussian Posterior ScaleMixturePrior StudentTPrior",
            "run": "Predictor load to_arviz",
            "predictive": "evaluate_dataset predict_classes predict_dataset predict_values",
            "training": "KlAnnealing OverlappingOptimizer ShardedOptimizer VariationalStep",
        },
    )
    __all__ += ["__version__"]
