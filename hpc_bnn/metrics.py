"""Metrics of a predictive, as torchmetrics objects (floor 3).

Their states are sums and counts; `hpc_bnn.evaluate` reduces the states over the ranks and only then
computes, so that a metric of the job is never a mean of the ranks' metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy


class NegativeLogLikelihood(MeanMetric):
    """Mean over examples of -log p(y | x) under class probabilities (nats)."""

    def update(self, probabilities: Tensor, y: Tensor) -> None:  # [B, C], [B]
        p = probabilities.gather(1, y.long().unsqueeze(1)).clamp_min(torch.finfo(probabilities.dtype).tiny)
        super().update(-p.log())


def classification_metrics(num_classes: int, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a class predictive [B, C] by name; update them with (probabilities, y)."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "nll": NegativeLogLikelihood(),
    }
    # float64: the sum over a test set must not depend on how it is cut
    return {name: metric.set_dtype(torch.float64).to(device) for name, metric in metrics.items()}
