"""Statistics over the samples of the job, for training and prediction.

Those of `LogMeanExp` and `Moments` are running ones: each adds the samples of this rank one after another; the sample group
then exchanges it without gradient. Its size does not grow with the number of samples of the job, K. ``add`` is Local;
``exchange`` makes it the statistic of all samples, is collective over ``sample_comm``, and does nothing where no example was
added. What needs the numbers of all samples themselves has them by targets, `TargetShares`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .comm import GridComm
from .grid import share


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
        self._added = None  # of a field it is as large as three members

    @property
    def total(self) -> Tensor:
        """[B, ...] variance of the predictive."""
        return self.aleatoric + self.epistemic


# --- the members themselves --------------------------------------------------------------------------------


class TargetShares:
    """What the ranks of a sample group have of the members of all K samples: each the targets of its share.

    A rank has evaluated all targets of its own samples. It sends each other rank the share of that one, and then has
    [K, n] numbers, n about B T / S, where a gather would give it [K, B T]. The way back is the same. B examples of T targets
    are B T flat targets, one example after another.

    Parameters
    ----------
    comm, num_samples, shape : GridComm, int, torch.Size
        The process grid; K; [B, ...] of one member.
    whole : bool
        Whether the targets of an example stay together, on one rank, however uneven the shares are.

    Attributes
    ----------
    span, num_own : range, int
        Flat targets of this rank, empty if there are fewer than ranks; samples of this rank, c.
    """

    def __init__(self, comm: GridComm, num_samples: int, shape: torch.Size, *, whole: bool = False):
        self.comm, self.shape, self.num_samples, self.whole = comm, shape, num_samples, whole
        self.width = shape[1:].numel()
        """Targets of an example, T."""
        size, index = comm.grid.sample_size, comm.grid.sample_index
        count, grain = (shape[0], self.width) if whole else (shape.numel(), 1)
        shares = [share(count, size, n) for n in range(size)]
        self._spans = [range(items.start * grain, items.stop * grain) for items in shares]
        self._counts = [len(span) for span in self._spans]
        self._rows = [len(share(num_samples, size, n)) for n in range(size)]
        self.num_own, self.span = self._rows[index], self._spans[index]

    @property
    def examples(self) -> slice:
        """The examples of which this rank has any targets."""
        return slice(self.span.start // self.width, -(-self.span.stop // self.width))

    @property
    def own(self) -> slice:
        """Its targets among the flat targets of `examples`."""
        start = self.span.start % self.width
        return slice(start, start + len(self.span))

    def buffer(self, like: Tensor) -> Tensor:
        """Return memory [c B T] for the samples of this rank, in the order in which it is sent; `put_` fills it. Local."""
        return like.new_empty(self.num_own * self.shape.numel())

    def put_(self, buffer: Tensor, row: int, chunk: Tensor) -> None:
        """Write members [c, B, ...] into a `buffer`, from the ``row``-th sample of this rank on. Local."""
        chunk = chunk.flatten(1)
        for block, span in zip(self._blocks(buffer), self._spans):
            block[row : row + len(chunk)] = chunk[:, span.start : span.stop]

    def collect(self, buffer: Tensor) -> Tensor:
        """Return the members [K, n] of all samples, from the full `buffer` of each rank.

        Collective over ``sample_comm``: one exchange of the numbers of this rank's samples.
        """
        return self.comm.all_to_all(buffer, self._counts, "sample", self._rows).view(self.num_samples, len(self.span))

    def _blocks(self, flat: Tensor) -> list[Tensor]:
        """Return [c, n] of the samples of this rank for each rank of the group, as views."""
        parts = flat.split([self.num_own * count for count in self._counts])
        return [part.view(self.num_own, count) for part, count in zip(parts, self._counts)]

    def give_back(self, members: Tensor) -> list[Tensor]:
        """Return [c, n] for the samples of this rank and the targets of each rank, from [K, n] on each rank.

        Collective over ``sample_comm``: one exchange of K n numbers. `rows` makes whole members of them.
        """
        return self._blocks(self.comm.all_to_all(members.view(-1), self._rows, "sample", self._counts))

    def of(self, whole: Tensor) -> Tensor:
        """Return numbers [n] of this rank's targets from those of all, which broadcast to [B, ...]. Local."""
        return whole.expand(self.shape).reshape(-1)[self.span.start : self.span.stop]

    def join(self, own: Tensor) -> Tensor:
        """Return numbers [B, ...] of all targets from those [n] of each rank. Collective over ``sample_comm``: one gather."""
        return self.comm.gather(own, "sample").view(self.shape)

    def rows(self, blocks: list[Tensor], start: int, stop: int) -> Tensor:
        """Return some members [stop - start, B, ...] of this rank's samples from what `give_back` returned. Local."""
        return torch.cat([block[start:stop] for block in blocks], dim=1).view(-1, *self.shape)

    def parts(self, members: Tensor, most: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield views [K, b, t] of members [K, n] with at most ``most`` flat targets: some whole examples, or targets of one.

        With them go their examples in the batch, and their targets in each example. Local. Where examples stay together, one may
        have more.
        """
        place = self.span.start
        while place < self.span.stop:
            (example, target), left = divmod(place, self.width), self.span.stop - place
            if target == 0 and left >= self.width and (most >= self.width or self.whole):
                count = max(1, min(left, most) // self.width)
                examples, targets = slice(example, example + count), slice(0, self.width)
            else:
                stop = min(self.width, target + min(most, left))
                examples, targets = slice(example, example + 1), slice(target, stop)
            num = (examples.stop - examples.start) * (targets.stop - targets.start)
            offset = place - self.span.start
            part = members[:, offset : offset + num]
            yield examples, targets, part.unflatten(1, (-1, targets.stop - targets.start))
            place += num
