"""The step: samples and examples of this rank, one sum over the job, one update."""

from .optim import JobOptimizer, OverlappingOptimizer, ShardedOptimizer, build_optimizer
from .schedules import KlAnnealing
from .step import StepResult, VariationalStep

__all__ = [
    "JobOptimizer",
    "KlAnnealing",
    "OverlappingOptimizer",
    "ShardedOptimizer",
    "StepResult",
    "VariationalStep",
    "build_optimizer",
]
