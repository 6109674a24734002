"""Bayesian neural networks on supercomputers by sampling parallelism.

hpc_bnn distributes samples of the weights, examples, or both over the ranks of an MPI job. The result does not depend
on the grid.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Augmentation": "data",
    "BatchLoader": "data",
    "Bernoulli": "likelihoods",
    "Categorical": "likelihoods",
    "Config": "config",
    "connect": "comm",
    "Crps": "objectives",
    "DeepEnsemble": "posteriors",
    "DeterministicNetwork": "posteriors",
    "Energy": "objectives",
    "evaluate_dataset": "predictive",
    "Examples": "data",
    "Family": "posteriors",
    "Gathered": "objectives",
    "Gaussian": "likelihoods",
    "GaussianPrior": "posteriors",
    "global_batches": "data",
    "Grid": "grid",
    "GridComm": "comm",
    "Implicit": "likelihoods",
    "KlAnnealing": "training",
    "LaplacePrior": "posteriors",
    "Likelihood": "likelihoods",
    "LogPredictive": "objectives",
    "LowRankGaussian": "posteriors",
    "MCDropout": "posteriors",
    "MeanFieldGaussian": "posteriors",
    "MomentMatched": "objectives",
    "NegativeElbo": "objectives",
    "OverlappingOptimizer": "training",
    "Poisson": "likelihoods",
    "Posterior": "posteriors",
    "predict_classes": "predictive",
    "predict_dataset": "predictive",
    "predict_values": "predictive",
    "ScaleMixturePrior": "posteriors",
    "ShardDataset": "data",
    "ShardedOptimizer": "training",
    "StudentT": "likelihoods",
    "StudentTPrior": "posteriors",
    "VariationalStep": "training",
    "write_shards": "data",
}


def door(package: str, homes: dict[str, str]):
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported on first use.

    So `hpc_bnn.grid` needs no torch, and a report does not import training.

    Parameters
    ----------
    package : str
        Its name.
    homes : dict of str to str
        Name -> module within the package.
    """

    def get(name: str):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return get, lambda: sorted(homes), list(homes)


__getattr__, __dir__, __all__ = door(__name__, _HOMES)
__all__ += ["__version__"]
