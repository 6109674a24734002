"""Metrics of a predictive.

Their states are sums and counts; `hpc_bnn.predictive` adds the states of all ranks and only then computes, so a
metric of the job is never a mean of the ranks' metrics. They are not torchmetrics objects: those sum over the ranks
by themselves if torch.distributed runs, and that package loads scipy and matplotlib on each rank (2.3 of the 4.8 s
in which a rank imports what it trains with).

`update` takes weights, float64 and like the values, which are 0 where a target is missing: a metric then is a weighted mean,
sum(weight * value) / sum(weight). Values must be finite there, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BINS = 15
"""Bins of the confidence in calibration errors."""

NUM_PIT_BINS = 200
"""Bins of the PIT."""


class Metric:
    """A metric of ``sums`` (and counts) in float64: `update` and the sum over the ranks change them in place."""

    def __init__(self, *shape: int):
        self.sums = torch.zeros(shape, dtype=torch.float64)

    def update(self, *values: Tensor, weights: Tensor | None = None) -> None:
        """Take in examples. Local."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the metric of all added examples, a scalar. Local."""
        raise NotImplementedError


class ExampleMean(Metric):
    """Mean over examples of a number of each."""

    def __init__(self):
        super().__init__(2)

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Take in numbers [B, ...]."""
        self.sums[0] += (values.double() if weights is None else values * weights).sum()
        self.sums[1] += values.numel() if weights is None else weights.sum()

    def compute(self) -> Tensor:
        return self.sums[0] / self.sums[1]


class ClassOverlaps(Metric):
    """Intersection over union of the points that are of a class and that are said to be, mean over classes (Jaccard, 1912).

    A class that no point is or is said to be does not count.
    """

    def __init__(self, num_classes: int):
        super().__init__(2, num_classes)  # points in the intersection, and in the union

    def update(self, said: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take in the classes [n, ...] that are said, and the true ones [n, ...]."""
        num_classes, said, y = self.sums.shape[1], said.flatten(), y.flatten()
        right, weights = said == y, None if weights is None else weights.flatten()
        pairs = (y[right], None if weights is None else weights[right]), (said, weights), (y, weights)
        both, ours, theirs = (torch.bincount(c.long(), w, minlength=num_classes) for c, w in pairs)
        self.sums.add_(torch.stack([both, ours + theirs - both]))

    def by_class(self) -> list[float | None]:
        """Return the overlap of each class, None where it does not count."""
        both, union = self.sums.unbind()
        return [part / whole if whole else None for part, whole in zip(both.tolist(), union.tolist())]

    def compute(self) -> Tensor:
        overlaps = [overlap for overlap in self.by_class() if overlap is not None]
        return torch.tensor(overlaps, dtype=torch.float64).mean()


class ExpectedCalibrationError(Metric):
    """Mean distance of confidence and accuracy over bins of equal width (Naeini et al., 2015; Guo et al., 2017)."""

    def __init__(self):
        super().__init__(3, NUM_BINS)  # confidence, number of right classes, count

    def update(self, confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> None:
        """Take in the largest class probability [B, ...], and whether its class is right [B, ...]."""
        confidence, correct = confidence.flatten(), correct.flatten()
        bins = (confidence * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        rows = torch.stack([confidence, correct.double(), torch.ones_like(confidence)])
        self.sums.index_add_(1, bins, rows if weights is None else rows * weights.flatten())

    def compute(self) -> Tensor:
        confidence, correct, count = self.sums.unbind()
        return (confidence - correct).abs().sum() / count.sum()

    def curve(self) -> dict[str, list[float]]:
        """Return the reliability diagram: of each bin that is not empty its mean confidence, accuracy and count."""
        confidence, correct, count = self.sums[:, self.sums[2] > 0].unbind()
        means = {"confidence": confidence / count, "accuracy": correct / count, "count": count}
        return {name: values.tolist() for name, values in means.items()}


class ClasswiseCalibrationError(Metric):
    """Calibration error of the probability of each class, over bins of equal width, mean over classes (Kull et al., 2019).

    Kull et al., Beyond Temperature Scaling (NeurIPS 2019): mean over classes j of the sum over bins of
    ``|sum of p_j - number of examples of class j| / number of examples``.
    """

    def __init__(self, num_classes: int):
        super().__init__(num_classes, NUM_BINS + 1)  # by bin the sum of p_j minus that of the truth, and the count

    def update(self, p: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """Take in class probabilities [B, C, ...], and the true classes [B, 1, ...]."""
        difference = p.scatter_add(1, y, torch.full_like(p[:, :1], -1.0))
        if weights is not None:
            difference = difference * weights
        bins = (p * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        bins += NUM_BINS * torch.arange(p.shape[1], device=p.device).view(-1, *(1,) * (p.ndim - 2))
        found = difference.new_zeros(p.shape[1] * NUM_BINS).index_add_(0, bins.flatten(), difference.flatten())
        self.sums[:, :-1] += found.view(p.shape[1], NUM_BINS)
        self.sums[:, -1] += y.numel() if weights is None else weights.sum()

    def compute(self) -> Tensor:
        return self.sums[:, :-1].abs().sum() / self.sums[:, -1].sum()


def adaptive_calibration_error(confidence: Tensor, correct: Tensor, weights: Tensor | None = None) -> float:
    """Return the calibration error over bins of equal *count* of the confidence (Nguyen and O'Connor, 2015). Local.

    All are [N], of all examples in the order of the data set: equal confidences keep this order. Those of weight 0 are in no bin.
    """
    if weights is not None:
        confidence, correct, weights = (column[weights > 0] for column in (confidence, correct, weights))
    order = confidence.argsort(stable=True)
    difference = confidence.double() - correct.double()
    difference = (difference if weights is None else difference * weights)[order]
    whole = len(order) if weights is None else weights.sum().item()
    return sum(part.sum().abs().item() for part in difference.tensor_split(NUM_BINS)) / whole


# --- ranks of the uncertainty ---------------------------------------------------------------------------


def _by_value(values: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Return the sum of each column [N] by distinct value in float32, [m] each, from the least value on. Local."""
    # Examples that only rounding tells apart are ties, on every grid
    distinct, number = values.float().unique(return_inverse=True)
    return tuple(column.new_zeros(len(distinct)).index_add_(0, number, column) for column in columns)


def risk_coverage(uncertainty: Tensor, loss: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return coverage [m] and risk [m] of those examples that are at most as uncertain as a threshold. Local.

    Geifman and El-Yaniv, Selective Classification for Deep Neural Networks (NeurIPS 2017). There is a threshold at
    every distinct uncertainty: ties are accepted or rejected together, so that their order does not matter. The
    coverage is the fraction of examples, the risk their mean loss; the last risk is the mean of all. All are [N], of
    all examples; those of weight 0 do not count.
    """
    weights = torch.ones_like(loss) if weights is None else weights
    counts = weights > 0
    uncertainty, loss, weights = uncertainty[counts], loss[counts], weights[counts]
    accepted, lost = (column.cumsum(0) for column in _by_value(uncertainty, weights, weights * loss))
    return accepted / weights.sum(), lost / accepted


def area_under_risk_coverage(coverage: Tensor, risk: Tensor) -> float:
    """Return the mean over examples of the risk at their uncertainty (AURC), from `risk_coverage`. Local.

    Geifman, Uziel, El-Yaniv, Bias-Reduced Uncertainty Estimation (ICLR 2019).
    """
    return (coverage.diff(prepend=coverage.new_zeros(1)) * risk).sum().item()


def detection(inside: Tensor, outside: Tensor, of_inside: Tensor, of_outside: Tensor) -> dict[str, float]:
    """Return how well an uncertainty detects foreign examples, the positives; ties are exact. Local.

    ``auroc`` is the fraction of pairs whose foreign example is the less certain one, ties by half (Mann and Whitney,
    1947). ``aupr`` is the average precision, the sum over thresholds of the precision times the gain in recall (Davis
    and Goadrich, 2006). ``fpr95`` is the fraction of the data that is said to be foreign at the greatest threshold at
    which 95 % of the foreign examples are (Hendrycks, Mazeika, Dietterich, 2019). Uncertainties are [N] of the data and
    [M] of the foreign examples; ``of_inside`` and ``of_outside`` are their weights.
    """
    values, zeros = torch.cat([inside, outside]), torch.zeros_like
    columns = torch.cat([of_inside, zeros(outside)]), torch.cat([zeros(inside), of_outside])
    own, foreign = _by_value(values, *columns)
    false, true = (column.flip(0).cumsum(0).flip(0) for column in (own, foreign))  # at a threshold or above
    whole, positives = of_inside.sum(), of_outside.sum()
    pairs = foreign * (whole - false + own / 2)
    precision = true / (true + false).clamp_min(torch.finfo(true.dtype).tiny)
    found = {
        "auroc": pairs.sum() / (whole * positives),
        "aupr": (foreign * precision).sum() / positives,
        "fpr95": false[20 * true >= 19 * positives].min() / whole,
    }
    return {name: value.item() for name, value in found.items()}


# --- numbers -------------------------------------------------------------------------------------------


class ChannelMean(Metric):
    """Mean over examples and places of a quantity of every target, or its root, by channel and of all together.

    ``weights`` of the targets of an example broadcast to [channels, ...].
    """

    def __init__(self, num_channels: int, weights: Tensor, is_root: bool = False):
        super().__init__(2, num_channels)
        self.weights, self.is_root = weights, is_root

    def update(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Take in values [B, channels, ...]."""
        shape, num_channels = values.shape[1:], self.sums.shape[1]
        values = values.double().flatten(1).unflatten(1, (num_channels, -1))  # [B, channels, places]
        of_targets = self.weights.to(values).expand(shape).reshape(num_channels, -1)
        of_each = of_targets if weights is None else of_targets * weights.reshape(values.shape)
        self.sums[0] += (values * of_each).sum((0, 2))
        self.sums[1] += len(values) * of_targets.sum(1) if weights is None else of_each.sum((0, 2))

    def _mean(self, sums: Tensor) -> Tensor:
        mean = sums[0] / sums[1]
        return mean.sqrt() if self.is_root else mean

    def compute(self) -> Tensor:
        return self._mean(self.sums.sum(1))

    def by_channel(self) -> list[float]:
        """Return the metric of each channel."""
        return self._mean(self.sums).tolist()


class PitHistogram(Metric):
    """Histogram of the probability integral transform: the positions of observations in their predictives.

    Calibration follows from it, because the edges of the bins hold all levels. The weights are as for `ChannelMean`.
    """

    def __init__(self, weights: Tensor):
        super().__init__(NUM_PIT_BINS)
        self.weights = weights

    def update(self, low: Tensor, high: Tensor, weights: Tensor | None = None) -> None:
        """Take in the intervals of `hpc_bnn.likelihoods.mixtures.Mixture.pit`, [B, channels, ...] each."""
        low, high = low.double() * NUM_PIT_BINS, high.double() * NUM_PIT_BINS
        of_targets = self.weights.to(low).expand(low.shape)
        weights = of_targets if weights is None else of_targets * weights
        is_point = high - low < 1e-9
        bins = low[is_point].long().clamp(0, NUM_PIT_BINS - 1)
        self.sums.index_add_(0, bins, weights[is_point])
        low, high, weights = low[~is_point], high[~is_point], weights[~is_point]
        if len(low):
            for number in range(NUM_PIT_BINS):
                inside = high.clamp(max=number + 1) - low.clamp(min=number)
                self.sums[number] += (weights * inside.clamp_min(0) / (high - low)).sum()

    @property
    def fractions(self) -> Tensor:
        """Of the observations, [NUM_PIT_BINS], by bin."""
        return self.sums / self.sums.sum()

    def compute(self) -> Tensor:
        """Return the mean absolute distance of the PIT's distribution function from the level, over 199 levels.

        The mean absolute calibration error of Kuleshov, Fenner, Ermon (2018), of quantiles.
        """
        level = torch.arange(1, NUM_PIT_BINS, dtype=torch.float64, device=self.sums.device) / NUM_PIT_BINS
        return (self.fractions.cumsum(0)[:-1] - level).abs().mean()

    def curve(self) -> list[float]:
        """Return the fractions of 20 coarser bins; each is 1/20 if calibration is perfect."""
        return self.fractions.view(20, -1).sum(1).tolist()
