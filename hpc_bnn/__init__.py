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
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    # Imported on first use: `hpc_bnn.grid` needs no torch.
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
