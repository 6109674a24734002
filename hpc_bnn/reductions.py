"""Running statistics over the samples of the job, for training and prediction.

Each adds the samples of this rank one after another; the sample group then exchanges it without gradient. Its size
does not grow with the number of samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .comm import GridComm

__all__ = ["LogMeanExp", "Moments"]


class _Reduction:
    """Base class of the running statistics.

    Parameters
    ----------
    num_samples : int
        Samples in the whole job, K.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def add(self, statistic: Tensor) -> None:
        """Add the statistic [c, B, ...] of c samples, without gradient. Local."""
        raise NotImplementedError

    def exchange(self, comm: GridComm) -> None:
        """Make it the statistic of all samples of the job. Collective over ``sample_comm``, on a rank with examples."""
        raise NotImplementedError


class LogMeanExp(_Reduction):
    """Log-sum-exp of l[s, b] over samples: shifted by the largest, so that nothing under- or overflows."""

    _max: Tensor | None = None  # [B] of l over the samples seen
    _sum: Tensor | None = None  # [B] of exp(l - max)

    def add(self, statistic: Tensor) -> None:
        if self._max is None:
            self._max = statistic.new_full(statistic.shape[1:], -math.inf)
            self._sum = torch.zeros_like(self._max)
        if len(statistic) == 0:
            return
        top = torch.maximum(self._max, statistic.amax(0))
        shift = _finite(top)
        self._sum = self._sum * torch.exp(self._max - shift) + torch.exp(statistic - shift).sum(0)
        self._max = top

    def exchange(self, comm: GridComm) -> None:
        if self._max is None:
            return
        top = self._max.clone()
        comm.max_(top, "sample")
        self._shift = _finite(top)
        self._sum *= torch.exp(self._max - self._shift)
        comm.sum_(self._sum, "sample")
        self._log_sum = self._sum.log()

    @property
    def log_mean(self) -> Tensor | None:
        """[B] log (1/K) sum_s exp l[s, b] of the job (nats); None where no example was taken in."""
        return None if self._max is None else self._shift + self._log_sum - math.log(self.num_samples)

    def responsibilities(self, statistic: Tensor) -> Tensor:
        """Return exp l[s, b] / sum_s exp l[s, b] of some samples, [c, B]. Local."""
        # The difference of the two large numbers first: it is exact.
        return torch.exp((statistic - self._shift) - self._log_sum)


def _finite(top: Tensor) -> Tensor:
    """Return a shift that may be subtracted: a likelihood of exactly 0 under all samples (-inf) stays 0, not NaN."""
    return torch.where(top.isinf(), 0, top)


class Moments(_Reduction):
    """Mean and variances of predictions over samples: statistic [c, B, 2, ...] of mean and variance.

    Attributes
    ----------
    mean, aleatoric, epistemic : Tensor
        [B, ...] after `exchange`: mean of the predictive; mean over samples of the likelihood's variance; variance
        over samples of its mean (divided by K). Their sum is the total variance. `mean` is None if no example was
        added.
    """

    mean: Tensor | None = None
    _count = 0
    _mean: Tensor | None = None
    _square: Tensor | None = None  # sum of squared differences from the mean of the samples seen
    _variance: Tensor | None = None

    def add(self, statistic: Tensor) -> None:
        # Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983
        mean, variance = statistic.unbind(2)
        if self._mean is None:
            self._mean, self._square, self._variance = mean.new_zeros(3, *mean.shape[1:]).unbind(0)
        if len(mean) == 0:
            return
        total = self._count + len(mean)
        chunk_mean = mean.mean(0)
        delta = chunk_mean - self._mean
        self._square += (mean - chunk_mean).square().sum(0)
        self._square += delta.square() * (self._count * len(mean) / total)
        self._mean += delta * (len(mean) / total)
        self._variance += variance.sum(0)
        self._count = total

    def exchange(self, comm: GridComm) -> None:
        if self._mean is None:
            return
        sums = torch.stack([self._mean * (self._count / self.num_samples), self._variance / self.num_samples])
        comm.sum_(sums, "sample")
        self.mean, self.aleatoric = sums.unbind(0)
        square = self._square + self._count * (self._mean - self.mean).square()
        comm.sum_(square, "sample")
        self.epistemic = square / self.num_samples

    @property
    def total(self) -> Tensor:
        """[B, ...] variance of the predictive."""
        return self.aleatoric + self.epistemic
