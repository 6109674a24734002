"""Running statistics over the samples of the job, for training and prediction.

Each adds the samples of this rank one after another; the sample group then exchanges it without gradient. Its size
does not grow with the number of samples of the job, K. ``add`` is Local; ``exchange`` makes it the statistic of all
samples, is collective over ``sample_comm``, and does nothing where no example was added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .comm import GridComm


class LogMeanExp:
    """Log-mean-exp of l[s, b] over samples: shifted by the largest, so that nothing under- or overflows."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        # [B] each, of the samples added: the largest l, and the sum of exp(l - largest)
        self._added: tuple[Tensor, Tensor] | None = None

    def add(self, statistic: Tensor) -> None:
        """Add l [c, B] of c samples."""
        if self._added is None:
            nothing = statistic.new_full(statistic.shape[1:], -math.inf)
            self._added = nothing, torch.zeros_like(nothing)
        if len(statistic) == 0:
            return
        former, total = self._added
        largest = torch.maximum(former, statistic.amax(0))
        shift = _finite(largest)
        self._added = largest, total * torch.exp(former - shift) + torch.exp(statistic - shift).sum(0)

    def exchange(self, comm: GridComm) -> None:
        if self._added is None:
            return
        own, total = self._added
        largest = own.clone()
        comm.max_(largest, "sample")
        self._shift = _finite(largest)
        total = total * torch.exp(own - self._shift)
        comm.sum_(total, "sample")
        self._log_sum = total.log()

    @property
    def log_mean(self) -> Tensor | None:
        """[B] log (1/K) sum_s exp l[s, b] of the job (nats); None where no example was added."""
        return None if self._added is None else self._shift + self._log_sum - math.log(self.num_samples)

    def responsibilities(self, statistic: Tensor) -> Tensor:
        """Return exp l[s, b] / sum_s exp l[s, b] of some samples, [c, B]. Local."""
        # The difference of the two large numbers first: it is exact.
        return torch.exp((statistic - self._shift) - self._log_sum)


def _finite(largest: Tensor) -> Tensor:
    """Return a shift that may be subtracted: a likelihood of exactly 0 under all samples (-inf) stays 0, not NaN."""
    return torch.where(largest.isinf(), 0, largest)


class Moments:
    """Mean and variances of predictions over samples.

    After ``exchange``, [B, ...] each: ``mean`` of the predictive, None where no example was added; ``aleatoric``, the
    mean over samples of the likelihood's variance; ``epistemic``, the variance over samples of its mean (divided by K).
    """

    mean: Tensor | None = None

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self._count = 0
        # [3, B, ...] of the samples added: mean, sum of squared differences from it, sum of the likelihood's variances
        self._added: Tensor | None = None

    def add(self, statistic: Tensor) -> None:
        """Add mean and variance of the likelihood, [c, B, 2, ...], of c samples."""
        # Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983
        mean, variance = statistic.unbind(2)
        if self._added is None:
            self._added = mean.new_zeros(3, *mean.shape[1:])
        if len(mean) == 0:
            return
        running_mean, squares, variances = self._added.unbind(0)
        count = self._count + len(mean)
        chunk_mean = mean.mean(0)
        delta = chunk_mean - running_mean
        squares += (mean - chunk_mean).square().sum(0)
        squares += delta.square() * (self._count * len(mean) / count)
        running_mean += delta * (len(mean) / count)
        variances += variance.sum(0)
        self._count = count

    def exchange(self, comm: GridComm) -> None:
        if self._added is None:
            return
        own_mean, squares, variances = self._added.unbind(0)
        sums = torch.stack([own_mean * (self._count / self.num_samples), variances / self.num_samples])
        comm.sum_(sums, "sample")
        self.mean, self.aleatoric = sums.unbind(0)
        squares = squares + self._count * (own_mean - self.mean).square()
        comm.sum_(squares, "sample")
        self.epistemic = squares / self.num_samples

    @property
    def total(self) -> Tensor:
        """[B, ...] variance of the predictive."""
        return self.aleatoric + self.epistemic
