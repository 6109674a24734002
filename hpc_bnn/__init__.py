"""Bayesian neural networks on supercomputers by sampling parallelism.

Samples of the weights, examples, or both are spread over the ranks of an MPI job; the result does not
depend on how.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Categorical": "likelihoods",
    "Config": "config",
    "connect": "comm",
    "DeepEnsemble": "posteriors",
    "DeterministicNetwork": "posteriors",
    "evaluate_classes": "evaluate",
    "GaussianPrior": "posteriors",
    "global_batches": "data",
    "Grid": "grid",
    "GridComm": "comm",
    "LaplacePrior": "posteriors",
    "LowRankGaussian": "posteriors",
    "MCDropout": "posteriors",
    "MeanFieldGaussian": "posteriors",
    "predict_classes": "evaluate",
    "ScaleMixturePrior": "posteriors",
    "ShardDataset": "data",
    "StudentTPrior": "posteriors",
    "VariationalStep": "step",
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
