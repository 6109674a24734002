"""Metrics of a predictive, as torchmetrics objects (floor 3).

Their states are sums and counts; `hpc_bnn.evaluate` reduces the states over the ranks and only then
computes, so that a metric of the job is never a mean of the ranks' metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy


class _MeanOverExamples(Metric):
    """A sum over examples in float64, and their number."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        return self.total / self.count


class NegativeLogLikelihood(_MeanOverExamples):
    """Mean over examples of -log p(y | x) (nats), from class probabilities or log-densities."""

    def update(self, predictive: Tensor, y: Tensor | None = None) -> None:
        """Take in probabilities [B, C] and classes [B], or log-densities [B]."""
        log_prob = predictive
        if y is not None:
            p = predictive.gather(1, y.long().unsqueeze(1)).clamp_min(torch.finfo(predictive.dtype).tiny)
            log_prob = p.double().log()
        self.total -= log_prob.sum()
        self.count += len(predictive)


class BrierScore(_MeanOverExamples):
    """Mean over examples of the squared distance of the class probabilities from the truth, between 0 and 2."""

    def update(self, probabilities: Tensor, y: Tensor) -> None:
        """Take in probabilities [B, C] and classes [B]."""
        p = probabilities.double()
        of_truth = p.gather(1, y.long().unsqueeze(1)).sum()
        self.total += p.square().sum() - 2 * of_truth + len(y)
        self.count += len(y)


class ExpectedCalibrationError(Metric):
    """Mean distance of confidence and accuracy over bins of equal width (Naeini et al., 2015; Guo et al., 2017).

    Parameters
    ----------
    num_bins : int
        Bins of the confidence, the largest class probability.
    """

    full_state_update = False

    def __init__(self, num_bins: int = 15):
        super().__init__()
        self.num_bins = num_bins
        for name in ("confidence", "correct", "count"):
            self.add_state(name, torch.zeros(num_bins, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: Tensor, y: Tensor) -> None:
        """Take in probabilities [B, C] and classes [B]."""
        confidence, said = probabilities.double().max(1)
        place = (confidence * self.num_bins).ceil().long().clamp(1, self.num_bins) - 1
        for state, value in (
            (self.confidence, confidence),
            (self.correct, (said == y).double()),
            (self.count, torch.ones_like(confidence)),
        ):
            state.index_add_(0, place, value)

    def compute(self) -> Tensor:
        return (self.confidence - self.correct).abs().sum() / self.count.sum()


def classification_metrics(num_classes: int, device: torch.device) -> dict[str, Metric]:
    """Return the metrics of a class predictive [B, C] by name; update them with (probabilities, y)."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "nll": NegativeLogLikelihood(),
        "brier": BrierScore(),
        "ece": ExpectedCalibrationError(),
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
