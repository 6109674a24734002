"""Metrics of a predictive, as torchmetrics objects (floor 3).

Their states are sums and counts; `hpc_bnn.evaluate` reduces the states over the ranks and only then
computes, so that a metric of the job is never a mean of the ranks' metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy


class NegativeLogLikelihood(Metric):
    """Mean over examples of -log p(y | x) (nats), from class probabilities or log-densities; sums in float64."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictive: Tensor, y: Tensor | None = None) -> None:
        """Take in probabilities [B, C] and classes [B], or log-densities [B]."""
        log_prob = predictive
        if y is not None:
            p = predictive.gather(1, y.long().unsqueeze(1)).clamp_min(torch.finfo(predictive.dtype).tiny)
            log_prob = p.double().log()
        self.total -= log_prob.sum()
        self.count += len(predictive)

    def compute(self) -> Tensor:
        return self.total / self.count


def classification_metrics(num_classes: int, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a class predictive [B, C] by name; update them with (probabilities, y)."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "nll": NegativeLogLikelihood(),
    }
    return {name: metric.to(device) for name, metric in metrics.items()}


def regression_metrics(has_density: bool, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a predictive of numbers by name.

    Update "rmse" and "mae" with (mean, y), all targets flattened, and "nll" with the log-densities [B].
    """
    metrics = {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()}
    if has_density:
        metrics["nll"] = NegativeLogLikelihood()
    return {name: metric.set_dtype(torch.float64).to(device) for name, metric in metrics.items()}
