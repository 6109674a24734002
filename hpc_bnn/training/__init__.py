"""The step: samples and examples of this rank, one sum over the job, one update."""

from .latch import StepResult
from .optim import JobOptimizer, OverlappingOptimizer, ShardedOptimizer, build_optimizer
from .schedules import KlAnnealing
from .step import VariationalStep

__all__ = [
    "JobOptimizer",
    "KlAnnealing",
    "OverlappingOptimizer",
    "ShardedOptimizer",
    "StepResult",
    "VariationalStep",
    "build_optimizer",
]
