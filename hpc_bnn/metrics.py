"""Metrics of a predictive, as torchmetrics objects (floor 3).

Their states are sums and counts; `hpc_bnn.evaluate` reduces the states over the ranks and only then
computes, so that a metric of the job is never a mean of the ranks' metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


class NegativeLogLikelihood(Metric):
    """Mean over examples of -log p(y | x) under class probabilities (nats); sums in float64."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, y: Tensor) -> None:  # [B, C], [B]
        p = probabilities.gather(1, y.long().unsqueeze(1)).clamp_min(torch.finfo(probabilities.dtype).tiny)
        self.total -= p.double().log().sum()
        self.count += len(y)

    def compute(self) -> Tensor:
        return self.total / self.count


def classification_metrics(num_classes: int, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a class predictive [B, C] by name; update them with (probabilities, y)."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "nll": NegativeLogLikelihood(),
    }
    return {name: metric.to(device) for name, metric in metrics.items()}
