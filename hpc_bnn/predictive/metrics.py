"""Metrics of a predictive.

Their states are sums and counts; `hpc_bnn.predictive` reduces the states over the ranks and only then computes, so a
metric of the job is never a mean of the ranks' metrics. They are not torchmetrics objects: those sum over the ranks
by themselves if torch.distributed runs, and that package loads scipy and matplotlib on each rank (2.3 of the 4.8 s
in which a rank imports what it trains with).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NUM_BINS = 15
"""Bins of the confidence in calibration errors."""

NUM_PIT_BINS = 200
"""Bins of the PIT; central intervals of 50, 90 and 95 % end at their edges."""


class Metric:
    """A metric whose states are sums and counts: tensors that `update` changes in place.

    Parameters
    ----------
    **states : Tensor
        The states at the start, attributes of these names.
    """

    def __init__(self, **states: Tensor):
        self._names = tuple(states)
        vars(self).update(states)

    @property
    def states(self) -> dict[str, Tensor]:
        """The states by name: the ranks add them up in place."""
        return {name: getattr(self, name) for name in self._names}

    def to(self, device: torch.device) -> Metric:
        """Move the states to a device."""
        vars(self).update({name: state.to(device) for name, state in self.states.items()})
        return self

    def update(self, *values: Any) -> None:
        """Take in examples. Local."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the metric of all added examples, a scalar. Local."""
        raise NotImplementedError


class _MeanOverExamples(Metric):
    """A sum over examples in float64, and their number."""

    def __init__(self):
        super().__init__(total=torch.zeros((), dtype=torch.float64), count=torch.zeros((), dtype=torch.int64))

    def compute(self) -> Tensor:
        return self.total / self.count


class Accuracy(_MeanOverExamples):
    """Fraction of the examples whose most probable class is the true one."""

    def update(self, probabilities: Tensor, y: Tensor) -> None:
        """Take in probabilities [B, C] and classes [B]."""
        self.total += (probabilities.argmax(1) == y).sum()
        self.count += len(y)


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

    def __init__(self, num_bins: int = NUM_BINS):
        names = ("confidence", "correct", "count")
        super().__init__(**{name: torch.zeros(num_bins, dtype=torch.float64) for name in names})
        self.num_bins = num_bins

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

    def curve(self) -> dict[str, list[float]]:
        """Return the reliability diagram: of each bin that is not empty its mean confidence, accuracy and count."""
        is_used = self.count > 0
        count = self.count[is_used]
        return {
            "confidence": (self.confidence[is_used] / count).tolist(),
            "accuracy": (self.correct[is_used] / count).tolist(),
            "count": count.tolist(),
        }


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, num_bins: int = NUM_BINS) -> float:
    """Return the calibration error over bins of equal *count* of the confidence (Nguyen and O'Connor, 2015). Local.

    Parameters
    ----------
    confidence, correct : Tensor
        [N] largest class probability, and whether its class is right, of all examples in the order of the data set:
        equal confidences keep this order.
    """
    order = confidence.argsort(stable=True)
    difference = (confidence.double() - correct.double())[order]
    return sum(part.sum().abs().item() for part in difference.tensor_split(num_bins)) / len(order)


# --- numbers -------------------------------------------------------------------------------------------


class ChannelMean(Metric):
    """Mean over examples and places of a quantity of every target, by channel and of all together.

    Parameters
    ----------
    num_channels : int
        Extent of dim 1 of the targets.
    weights : Tensor, optional
        Weights of the targets of an example; they broadcast to [channels, ...].
    is_root : bool
        Whether the metric is the root of the mean.
    """

    def __init__(self, num_channels: int, weights: Tensor | None = None, is_root: bool = False):
        super().__init__(**{name: torch.zeros(num_channels, dtype=torch.float64) for name in ("total", "count")})
        self.weights, self.is_root = weights, is_root

    def update(self, values: Tensor) -> None:
        """Take in values [B, channels, ...]."""
        shape, count = values.shape[1:], len(self.total)
        values = values.double().flatten(1).unflatten(1, (count, -1))  # [B, channels, places]
        weights = _expanded(self.weights, shape, values).reshape(count, -1)
        self.total += (values * weights).sum((0, 2))
        self.count += len(values) * weights.sum(1)

    def _finish(self, mean: Tensor) -> Tensor:
        return mean.sqrt() if self.is_root else mean

    def compute(self) -> Tensor:
        return self._finish(self.total.sum() / self.count.sum())

    def by_channel(self) -> list[float]:
        """Return the metric of each channel."""
        return self._finish(self.total / self.count).tolist()


def _expanded(weights: Tensor | None, shape: torch.Size, like: Tensor) -> Tensor:
    """Return weights of targets, 1 where there are none, in a shape."""
    return (like.new_ones(()) if weights is None else weights.to(like)).expand(shape)


class PitHistogram(Metric):
    """Histogram of the probability integral transform: the positions of observations in their predictives.

    Coverage of central intervals and calibration follow from it, because the edges of the bins hold all levels.

    Parameters
    ----------
    weights : Tensor, optional
        As for `ChannelMean`.
    """

    def __init__(self, weights: Tensor | None = None):
        super().__init__(mass=torch.zeros(NUM_PIT_BINS, dtype=torch.float64))
        self.weights = weights

    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in the intervals of `hpc_bnn.likelihoods.mixtures.Mixture.pit`, [B, channels, ...] each."""
        low, high = low.double() * NUM_PIT_BINS, high.double() * NUM_PIT_BINS
        weights = _expanded(self.weights, low.shape, low)
        is_point = high - low < 1e-9
        place = low[is_point].long().clamp(0, NUM_PIT_BINS - 1)
        self.mass.index_add_(0, place, weights[is_point])
        low, high, weights = low[~is_point], high[~is_point], weights[~is_point]
        if len(low):
            for number in range(NUM_PIT_BINS):
                inside = high.clamp(max=number + 1) - low.clamp(min=number)
                self.mass[number] += (weights * inside.clamp_min(0) / (high - low)).sum()

    def compute(self) -> Tensor:
        """Return the mean absolute distance of the PIT's distribution function from the level, over 199 levels.

        The mean absolute calibration error of Kuleshov, Fenner, Ermon (2018), of quantiles.
        """
        level = torch.arange(1, NUM_PIT_BINS, dtype=torch.float64, device=self.mass.device) / NUM_PIT_BINS
        return ((self.mass / self.mass.sum()).cumsum(0)[:-1] - level).abs().mean()

    def coverage(self, level: float) -> float:
        """Return the fraction of observations in the central interval of a level, such as 0.9."""
        skipped = round((1 - level) / 2 * NUM_PIT_BINS)
        return (self.mass[skipped : NUM_PIT_BINS - skipped].sum() / self.mass.sum()).item()

    def curve(self, num_bins: int = 20) -> list[float]:
        """Return the fractions of coarser bins; each is 1 / num_bins if calibration is perfect."""
        return (self.mass / self.mass.sum()).view(num_bins, -1).sum(1).tolist()
