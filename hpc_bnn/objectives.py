"""Objectives: one data term from the samples of the whole job.

An objective uses a *statistic* t[s, b, ...] of each sample s and example b: its log-likelihood, or its prediction. It
gives the derivative of the data term with respect to the statistics of this rank's samples, and the step
differentiates these statistics; the job then sums the gradients. If the samples couple, the sample group exchanges
the values of the other samples without gradient, between a first pass over the samples and the gradient pass. No
gradient travels through a collective.

With K samples in the job, l the log-likelihood and f the predictions, the data term of one example is

==================  =====================================================================  ===================
name                data term                                                              exchanged per step
==================  =====================================================================  ===================
``elbo``            -(1/K) sum_s l[s]                                                      nothing
``log_predictive``  -log (1/K) sum_s exp l[s]                                              2 B
``moment_matched``  -log N(y; mean and variance of the predictive)                         3 B T
``crps``            mean over targets of (1/K) sum|f_s - y| - (c/2) sum_st |f_s - f_t|     2 B T a sample
``energy``          (1/K) sum ||f_s - y||^beta - (c/2) sum_st ||f_s - f_t||^beta           2 B T a sample
==================  =====================================================================  ===================

in floats of this rank, for B local examples of T targets. The last two need the members themselves: each rank of a sample
group gets those of all samples for its share of the targets (`hpc_bnn.reductions.TargetShares`), scores them, and sends
the derivatives back.

Targets that are missing (`Likelihood.present`) add nothing. The ELBO, the log predictive and the moment-matched Gaussian sum
over the targets that are present. The CRPS stays a sum over T targets divided by T, so that a target counts the same in every
example; the energy score is that of the targets that are present, jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .comm import GridComm
from .config import ObjectiveConfig, Score, check_field, check_pairs
from .errors import ConfigError, Fault, import_object
from .likelihoods import Implicit, Likelihood
from .likelihoods.mixtures import CHUNK_ELEMENTS
from .reductions import LogMeanExp, Moments, TargetShares

# --- the interface -------------------------------------------------------------------------------------


class Coupling:
    """State of one step for the samples of this rank; the step calls the methods in the order of their definition.

    Parameters
    ----------
    y : Tensor
        [B, ...] targets of this rank's examples.
    samples, num_samples : range, int
        Global indices of the samples of this rank; samples in the whole job, K.
    """

    def __init__(self, y: Tensor, samples: range, num_samples: int):
        self.y, self.samples, self.num_samples = y, samples, num_samples
        self.counts_group = samples.start == 0
        """True on the one rank of a sample group that adds group-wide values."""
        self.present: Tensor | None = None
        """Like y, which targets are not missing, where some may be (`Likelihood.present`); the step sets it."""
        self.weights: Tensor | None = None
        """[B] weights of the examples, where they have some; the step sets them, and applies them to `gradient`."""

    weighs = False
    """Whether `data_term` applies the weights of the examples (`weigh`); otherwise the step refuses them."""

    def weigh(self, values: Tensor, dim: int = 0) -> Tensor:
        """Return values with the examples on ``dim``, times the weights. Local."""
        if self.weights is None:
            return values
        return values * self.weights.to(values.dtype).view(-1, *(1,) * (values.ndim - 1 - dim))

    def see(self, samples: Sequence[int], statistic: Tensor) -> None:
        """Take in the statistic [c, B, ...] of some samples, without gradient. Local."""

    def combine(self, comm: GridComm) -> None:
        """Exchange the statistics that couple the samples. Collective over ``sample_comm``."""

    def gradient(self, samples: Sequence[int], statistic: Tensor) -> Tensor:
        """Return d(sum over examples of the data term) / d(statistic), [c, B, ...], without weights. Local."""
        raise NotImplementedError

    def data_term(self) -> Tensor:
        """Return this rank's contribution; the contributions of the sample group add up to the data term. Local."""
        raise NotImplementedError


class Objective:
    """Base class of all objectives.

    Attributes
    ----------
    couples : bool
        Whether the samples couple: a rank that does not evaluate all its samples at once then needs two passes.
    """

    name = ""
    couples = True

    def check(self, likelihood: Likelihood, num_samples: int) -> None:
        """Raise `ConfigError` if the objective does not exist for a likelihood or a number of samples. Local."""

    def statistic(self, likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
        """Return t [n, ...] of n examples from a network's outputs [n, ...] and targets [n, ...]. Local."""
        raise NotImplementedError

    def begin(self, y: Tensor, samples: range, num_samples: int) -> Coupling:
        """Begin a step. Local."""
        raise NotImplementedError

    def _fault(self, likelihood: Likelihood, rule: str, remedy: str) -> ConfigError:
        text = f"{self.name} with likelihood {type(likelihood).__name__}"
        return ConfigError(Fault("objective.name", text, rule, remedy))


class _OfLogLikelihood(Objective):
    def check(self, likelihood: Likelihood, num_samples: int) -> None:
        if not likelihood.has_density:
            raise self._fault(likelihood, "it has no density", "Use crps or energy, or another likelihood")

    def statistic(self, likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
        return likelihood.log_prob(outputs, y)


class _Reduced(Coupling):
    """Samples that couple by a running statistic."""

    reduction: type[LogMeanExp | Moments]
    weighs = True

    def __init__(self, y: Tensor, samples: range, num_samples: int):
        super().__init__(y, samples, num_samples)
        self._over_samples = self.reduction(num_samples)

    def see(self, samples: Sequence[int], statistic: Tensor) -> None:
        self._over_samples.add(statistic)

    def combine(self, comm: GridComm) -> None:
        self._over_samples.exchange(comm)


# --- negative ELBO -------------------------------------------------------------------------------------


class NegativeElbo(_OfLogLikelihood):
    """Mean over samples of the negative log-likelihood; with the KL, the negative ELBO. One pass, no exchange."""

    name = "elbo"
    couples = False

    def begin(self, y: Tensor, samples: range, num_samples: int) -> Coupling:
        return _Mean(y, samples, num_samples)


class _Mean(Coupling):
    _sum: Tensor | float = 0.0
    weighs = True

    def gradient(self, samples: Sequence[int], statistic: Tensor) -> Tensor:
        self._sum = self._sum - self.weigh(statistic, 1).sum() / self.num_samples
        return torch.full_like(statistic, -1.0 / self.num_samples)

    def data_term(self) -> Tensor:
        return self.y.new_zeros(()) + self._sum


# --- log predictive ------------------------------------------------------------------------------------


class LogPredictive(_OfLogLikelihood):
    """Negative log of the *mean likelihood* over all samples of the job: the direct loss.

    The method's published code computes it per rank, so that it depends on the samples per rank. Its gradient weighs each
    sample by its responsibility ``p_s / sum_s p_s``.

    Collective over ``sample_comm``: 2 B floats per step (a maximum and a sum), for all K and C.
    """

    name = "log_predictive"

    def begin(self, y: Tensor, samples: range, num_samples: int) -> Coupling:
        return _LogPredictiveCoupling(y, samples, num_samples)


class _LogPredictiveCoupling(_Reduced):
    reduction = LogMeanExp
    _over_samples: LogMeanExp

    def gradient(self, samples: Sequence[int], statistic: Tensor) -> Tensor:
        return -self._over_samples.responsibilities(statistic)

    def data_term(self) -> Tensor:
        log_mean = self._over_samples.log_mean
        if log_mean is None or not self.counts_group:
            return self.y.new_zeros(())
        return -self.weigh(log_mean).sum()


# --- moment-matched Gaussian ---------------------------------------------------------------------------


class MomentMatched(Objective):
    """Negative log density of the Gaussian with the predictive's mean and variance, target by target.

    The variance is the total one: the mean over samples of the likelihood's variance, and the variance over
    samples of its mean (law of total variance, `hpc_bnn.reductions.Moments`). It is positive with one sample, too.

    Collective over ``sample_comm``: 3 B T floats per step in two sums: of means and likelihood variances, then of
    squared differences from the mean of the job, which stay precise if the spread is small.
    """

    name = "moment_matched"

    def check(self, likelihood: Likelihood, num_samples: int) -> None:
        if not likelihood.has_variance:
            remedy = "Use gaussian, student_t with df above 2, poisson or bernoulli"
            raise self._fault(likelihood, "it needs a finite variance of the target", remedy)

    def statistic(self, likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
        """Return mean and variance of each target, [n, 2, num_targets, ...]."""
        outputs, y, _ = likelihood.only_present(outputs, y)
        mean = likelihood.mean(outputs)
        likelihood.targets(y, mean)  # the same shape
        return torch.stack([mean, likelihood.variance(outputs)], dim=1)

    def begin(self, y: Tensor, samples: range, num_samples: int) -> Coupling:
        return _MomentMatchedCoupling(y, samples, num_samples)


class _MomentMatchedCoupling(_Reduced):
    reduction = Moments
    _over_samples: Moments

    def combine(self, comm: GridComm) -> None:
        super().combine(comm)
        mean = self._over_samples.mean
        if mean is not None:
            self._mean, self._error = mean, mean - self.y.view_as(mean).to(mean)
            if self.present is not None:  # the statistic lets no gradient through there
                self._error = torch.where(self.present.view_as(mean), self._error, 0)

    def gradient(self, samples: Sequence[int], statistic: Tensor) -> Tensor:
        total = self._over_samples.total
        by_mean = self._error / total
        by_variance = 0.5 / total * (1 - by_mean * self._error)
        by_mean = by_mean + 2 * by_variance * (statistic[:, :, 0] - self._mean)
        return torch.stack([by_mean, by_variance.expand_as(by_mean)], dim=2) / self.num_samples

    def data_term(self) -> Tensor:
        if self._over_samples.mean is None or not self.counts_group:
            return self.y.new_zeros(())
        total = self._over_samples.total
        per_target = torch.log(2 * math.pi * total) + self._error.square() / total
        if self.present is not None:
            per_target = torch.where(self.present.view_as(per_target), per_target, 0)
        return 0.5 * self.weigh(per_target).sum()


# --- objectives of all members -------------------------------------------------------------------------

Statistic = Literal["mean", "log_prob"] | Callable[[Likelihood, Tensor, Tensor], Tensor]


class Gathered(Objective):
    """An objective of the statistics of *all* samples, given as one pure function.

    The ranks of a sample group divide the examples: each evaluates the function for its own, and sends the derivatives to the
    ranks that have the samples.

    Collective over ``sample_comm``: two exchanges, of B T floats per sample of this rank and of as many on average for its
    targets, for a statistic of T numbers. Memory: 2 K B' T floats, and what the function needs, for B' examples, B / S or one
    more.

    Parameters
    ----------
    function : callable
        ``function(statistics, y) -> loss``: statistics [K, B, ...] of all samples and targets y of the examples (in
        shape and dtype of the predictions where those are the statistic) to losses [B], each of its example alone;
        differentiable by autograd and free of randomness. A missing target is 0 in y and in all predictions: differences add
        nothing.
    of : {"mean", "log_prob"} or callable
        The statistic: predictions, log-likelihoods, or a function ``(likelihood, outputs [n, ...],
        y [n, ...]) -> [n, ...]``.
    name : str
        Name in messages.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], of: Statistic = "mean", name: str | None = None):
        self.function = function
        self.of: Statistic = of
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def check(self, likelihood: Likelihood, num_samples: int) -> None:
        if self.of == "log_prob" and not likelihood.has_density:
            raise self._fault(likelihood, "it has no density", "Use another likelihood")
        if self.of == "mean" and likelihood.num_classes is not None:
            raise self._fault(likelihood, "a class has no mean", 'Use Gathered(function, of="log_prob")')

    def statistic(self, likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
        if self.of == "mean":
            outputs, y, present = likelihood.only_present(outputs, y)
            mean = likelihood.mean(outputs)
            mean = mean if present is None else torch.where(present, mean, 0)
            likelihood.targets(y, mean)  # the same shape
            return mean
        if self.of == "log_prob":
            return likelihood.log_prob(outputs, y)
        return self.of(likelihood, outputs, y)

    def begin(self, y: Tensor, samples: range, num_samples: int) -> Coupling:
        return _Members(self, y, samples, num_samples)

    def stays_whole(self, num_samples: int, num_targets: int, sample_size: int) -> bool:
        """Whether one rank needs all targets of an example."""
        return True

    def evaluate_(self, members: Tensor, y: Tensor, shares: TargetShares) -> Tensor:
        """Return this rank's contribution to the losses [B], and overwrite members with the derivative of their sum.

        Collective over ``sample_comm`` where an example does not stay whole, otherwise Local. ``members`` [K, n] are those of
        all samples, for this rank's share of the targets of y [B, ...].
        """
        losses = members.new_zeros(len(y))
        for examples, _, part in shares.parts(members, len(shares.span)):
            with torch.enable_grad():
                leaf = part.detach().reshape(*part.shape[:2], *shares.shape[1:]).requires_grad_()
                loss = self.function(leaf, y[examples])
                if loss.shape != leaf.shape[1:2]:
                    rule = f"the function must give one loss per example, {list(leaf.shape[1:2])}, and gave {list(loss.shape)}"
                    remedy = "Sum or average over samples and targets only"
                    raise ConfigError(Fault("objective.name", self.name, rule, remedy))
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            losses[examples] = loss.detach().to(losses.dtype)
            part.copy_(gradient.reshape(part.shape))
        return losses


class _Members(Coupling):
    """Statistics of all samples, of this rank's share of the targets."""

    weighs = True
    _blocks: list[Tensor] | None = None

    def __init__(self, objective: Gathered, y: Tensor, samples: range, num_samples: int):
        super().__init__(y, samples, num_samples)
        self.objective = objective
        self._seen: list[Tensor] = []
        self._part = y.new_zeros(())

    def see(self, samples: Sequence[int], statistic: Tensor) -> None:
        self._seen.append(statistic)

    def combine(self, comm: GridComm) -> None:
        shape = self._seen[0].shape[1:] if self._seen else torch.Size([0])
        if shape.numel() == 0:  # a rank without examples
            return
        whole = self.objective.stays_whole(self.num_samples, shape[1:].numel(), comm.grid.sample_size)
        self._shares = shares = TargetShares(comm, self.num_samples, shape, whole=whole)
        members = shares.collect(self._packed(shares))
        y = self.y
        if self.objective.of == "mean":  # [B] becomes [B, 1]: a difference never broadcasts
            y = y if self.present is None else torch.where(self.present, y, 0)
            y = y.view(shape).to(members.dtype)
        with torch.autocast(members.device.type, enabled=False):  # of the user's, for the network
            losses = self.objective.evaluate_(members, y, shares)
        self._part = self.weigh(losses).sum()
        self._blocks = shares.give_back(members)

    def _packed(self, shares: TargetShares) -> Tensor:
        """Return what this rank sends, and forget what it has seen."""
        if shares.num_own == 1 and len(shares.span) < shares.shape.numel():
            return self._seen.pop().reshape(-1)  # it lies there as it is sent
        buffer, row = shares.buffer(self._seen[0]), 0
        while self._seen:
            chunk = self._seen.pop(0)
            shares.put_(buffer, row, chunk)
            row += len(chunk)
        return buffer

    def gradient(self, samples: Sequence[int], statistic: Tensor) -> Tensor:
        if self._blocks is None:
            return torch.zeros_like(statistic)
        first = self.samples.start
        return self._shares.rows(self._blocks, samples[0] - first, samples[-1] + 1 - first)

    def data_term(self) -> Tensor:
        return self._part


class _Score(Gathered):
    """A proper scoring rule of the members, fair or partly fair to their finite number.

    The factor of the pairs is ``c = (1 - (1 - fairness) / K) / (K (K - 1))``: with fairness 0 the
    ordinary score (c = 1 / K^2), with 1 the fair one, unbiased in K (Ferro, 2014), between them the
    almost fair one (Lang et al., AIFS-CRPS, 2024), whose members cannot diverge without cost.
    """

    def __init__(self, fairness: float = 0.95, weights: ArrayLike | None = None):
        check_field("objective.fairness", fairness)
        super().__init__(self.score, "mean", self.name)
        self.fairness = fairness
        self.weights: Tensor | None = None
        if weights is not None:
            try:
                given = weights.numpy(force=True) if isinstance(weights, Tensor) else weights
                numbers = np.ma.array(given, dtype=np.float64).filled(math.nan)
            except (TypeError, ValueError):  # words, or rows of several lengths
                numbers = np.array(math.nan)
            if not (np.isfinite(numbers).all() and (numbers >= 0).all() and numbers.any()):
                given, rule = f"of shape {list(numbers.shape)}", "must be finite, 0 or more, and not all 0"
                raise ConfigError(Fault("objective.weights", given, rule, "Use cos(latitude)"))
            self.weights = torch.from_numpy(numbers)

    def check(self, likelihood: Likelihood, num_samples: int) -> None:
        if not isinstance(likelihood, Implicit):
            rule = "it scores the members and knows no noise of a likelihood"
            raise self._fault(likelihood, rule, "Use <likelihood.name> implicit")
        check_pairs(self.name, self.fairness, num_samples)

    def score(self, members: Tensor, y: Tensor) -> Tensor:
        """Return the score [B] of members [K, B, ...] and targets [B, ...]: the definition."""
        raise NotImplementedError

    def pair_factor(self, num_samples: int) -> float:
        """Return c, the factor of half the sum over ordered pairs of samples."""
        if num_samples == 1:
            return 0.0  # a sample has no distance from itself
        return (1 - (1 - self.fairness) / num_samples) / (num_samples * (num_samples - 1))

    def location_weights(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return the weights [T] of the targets of an example, their mean 1, in the dtype of a tensor and on its device."""
        if self.weights is None:
            return like.new_ones(math.prod(shape))
        try:
            weights = self.weights.to(like).expand(*shape)
        except RuntimeError:
            given, rule = list(self.weights.shape), f"must broadcast to the targets of an example, {list(shape)}"
            remedy = "Use [latitudes, 1] for targets [channels, latitudes, longitudes]"
            raise ConfigError(Fault("objective.weights", f"of shape {given}", rule, remedy)) from None
        return (weights / weights.mean()).flatten()


def _targets_at_once(members: Tensor, num_parts: int) -> int:
    """Return how many targets of members [K, n] are worked on at once: few, but in no more parts than these. Local."""
    numbers = max(CHUNK_ELEMENTS["cuda" if members.is_cuda else "cpu"], members.numel() // num_parts)
    return max(1, numbers // len(members))


class Crps(_Score):
    """Continuous ranked probability score of the members, mean over the targets of an example (units of y).

    Gneiting and Raftery, 2007. The sum over pairs comes from the sorted members, O(K log K) for each target.

    Collective over ``sample_comm``: two exchanges, each of B T floats per sample of this rank (of the way back on average).

    Parameters
    ----------
    fairness : float
        0 the ordinary CRPS, 1 the fair one, 0.95 the almost fair one (α of AIFS-CRPS).
    weights : array, optional
        Weights of the points of a field, such as cos(latitude) as [latitudes, 1]; they broadcast to the targets of
        an example and are normalised to a mean of 1. Default: all alike.
    """

    name = "crps"

    def stays_whole(self, num_samples: int, num_targets: int, sample_size: int) -> bool:
        return False

    def score(self, members: Tensor, y: Tensor) -> Tensor:
        per_target = self._of_targets(members, y)[0].flatten(1)
        return (per_target * self.location_weights(y.shape[1:], members)).mean(1)

    def _of_targets(self, members: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score [B, ...] of each target, and its derivative by the members [K, B, ...]."""
        num_samples, factor = len(members), self.pair_factor(len(members))
        places = members.movedim(0, -1).contiguous()
        ordered = places.sort(-1).values  # [B, ..., K]
        rank = torch.arange(1 - num_samples, num_samples, 2, dtype=members.dtype, device=members.device)
        centred = ordered - members.mean(0).unsqueeze(-1)  # keeps the digits of a small spread
        score = (members - y).abs().mean(0) - factor * (centred @ rank)  # the product: half the sum over ordered pairs
        # d/df_s of half the pairs: members below less members above; ties cancel
        below, not_above = (torch.searchsorted(ordered, places, right=right) for right in (False, True))
        side = (below + not_above - num_samples).movedim(-1, 0).to(members.dtype)
        return score, (members - y).sign() / num_samples - factor * side

    def evaluate_(self, members: Tensor, y: Tensor, shares: TargetShares) -> Tensor:
        losses, y = members.new_zeros(len(y)), y.flatten(1)
        weights = self.location_weights(shares.shape[1:], members) / shares.width
        most = _targets_at_once(members, 64)  # a sort needs 13 times a part
        for examples, targets, part in shares.parts(members, most):
            score, gradient = self._of_targets(part, y[examples, targets])
            losses[examples] += score @ weights[targets]
            torch.mul(gradient, weights[targets], out=part)
        return losses


class Energy(_Score):
    """Energy score of the members over all targets of an example; with another ``beta`` than 1 the β-energy score.

    With the norm ``||d||^2 = sum_j w_j d_j^2`` (Gneiting and Raftery, 2007).

    Collective over ``sample_comm``: two exchanges, as `Crps`. A norm is over all targets of an example. Where these are
    many, 4 K S and more, they lie on several ranks, which sum the squared distances of the pairs: one sum of B K (K + 1)
    floats, no more than a quarter of the exchange. Otherwise each rank has whole examples.

    Parameters
    ----------
    fairness, weights
        As for `Crps`; the weights are the w of the norm, so that for one target the score is the CRPS.
    beta : float
        Exponent of the norm, above 0 and below 2.
    """

    name = "energy"

    def __init__(self, fairness: float = 0.95, beta: float = 1.0, weights: ArrayLike | None = None):
        super().__init__(fairness, weights)
        check_field("objective.beta", beta)
        self.beta = beta

    def stays_whole(self, num_samples: int, num_targets: int, sample_size: int) -> bool:
        return num_targets < 4 * num_samples * sample_size

    def _power(self, square: Tensor) -> tuple[Tensor, Tensor]:
        """Return ||d||^beta of ||d||^2, and the factor of ``w d`` in its derivative by d."""
        at_zero = square == 0  # no direction there: derivative 0, like that of |x|
        square = square.masked_fill(at_zero, 1)
        factor = (self.beta * square.pow(self.beta / 2 - 1)).masked_fill(at_zero, 0)
        return square.pow(self.beta / 2).masked_fill(at_zero, 0), factor

    def _scores(self, to_y: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what r rows of squared distances, from y [r, B] and of pairs [r, K, B], add to scores and slopes."""
        num_samples, factor = pairs.shape[1], self.pair_factor(pairs.shape[1])
        (values, of_y), (of_pairs, between) = self._power(to_y), self._power(pairs)
        loss = values.sum(0) / num_samples - 0.5 * factor * of_pairs.sum((0, 1))
        return loss, of_y / num_samples, factor * between

    def score(self, members: Tensor, y: Tensor) -> Tensor:
        members, weights, y = members.flatten(2), self.location_weights(y.shape[1:], members), y.flatten(1)
        loss = members.new_zeros(len(y))
        for rows, difference in _differences(members):
            from_y = members[rows] - y
            loss = loss + self._scores(from_y.square() @ weights, difference.square() @ weights)[0]
        return loss

    def _of_examples_(self, members: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Return the scores [B] of members [K, B, T], and overwrite these with the derivative."""
        loss, gradients = members.new_zeros(len(y)), torch.empty_like(members)
        for rows, difference in _differences(members):
            from_y = members[rows] - y
            squares = (from_y.square() @ weights), (difference.square() @ weights)
            of_rows, of_y, between = self._scores(*squares)
            loss += of_rows
            slope = of_y.unsqueeze(-1) * from_y - torch.einsum("rkb,rkbt->rbt", between, difference)
            torch.mul(slope, weights, out=gradients[rows])
        members.copy_(gradients)
        return loss

    def evaluate_(self, members: Tensor, y: Tensor, shares: TargetShares) -> Tensor:
        num_samples, y = len(members), y.flatten(1)
        losses, weights = members.new_zeros(len(y)), self.location_weights(shares.shape[1:], members)
        most = _targets_at_once(members, 16)  # it needs three times a part, and goes K times over it
        if shares.whole:
            for examples, _, part in shares.parts(members, most):
                losses[examples] = self._of_examples_(part, y[examples], weights)
            return losses
        to_y, pairs = members.new_zeros(num_samples, len(y)), members.new_zeros(num_samples, num_samples, len(y))
        for examples, targets, part in shares.parts(members, most):
            w = weights[targets]
            to_y[:, examples] += (part - y[examples, targets]).square() @ w
            for rows, difference in _differences(part):
                pairs[rows, :, examples] += difference.square() @ w
        shares.comm.sum_([to_y, pairs], "sample")
        losses, of_y, between = self._scores(to_y, pairs)
        for examples, targets, part in shares.parts(members, most):
            gradients = of_y[:, examples].unsqueeze(-1) * (part - y[examples, targets])
            for rows, difference in _differences(part):
                gradients[rows] -= torch.einsum("rkb,rkbt->rbt", between[rows, :, examples], difference)
            torch.mul(gradients, weights[targets], out=part)
        return losses if shares.comm.grid.is_first("sample") else torch.zeros_like(losses)


def _differences(members: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some members less all others [r, K, b, t], of members [K, b, t], and which these are. Local."""
    at_once = max(1, CHUNK_ELEMENTS["cuda" if members.is_cuda else "cpu"] // members.numel())
    for start in range(0, len(members), at_once):
        rows = slice(start, start + at_once)
        yield rows, members[rows, None] - members


# --- by name -------------------------------------------------------------------------------------------

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (NegativeElbo, LogPredictive, MomentMatched, Crps, Energy)
}


def build_objective(config: ObjectiveConfig, target_weights: list | None = None) -> Objective:
    """Return the objective of a config, with ``target_weights`` for "auto"; `ConfigError` if there is none. Local."""
    name = config.name
    if name in get_args(Score):
        weights = target_weights if config.weights == "auto" else _read_weights(config.weights)
        return Crps(config.fairness, weights) if name == "crps" else Energy(config.fairness, config.beta, weights)
    if name in OBJECTIVES:
        return OBJECTIVES[name]()
    found = import_object("objective.name", name)
    objective = found() if isinstance(found, type) else found
    return objective if isinstance(objective, Objective) else Gathered(objective)


def _read_weights(path: str | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return np.load(path, allow_pickle=False).astype(np.float64)
    except (OSError, EOFError, ValueError, TypeError) as error:
        fault = Fault("objective.weights", path, f"it cannot be read ({error})", "Write it with numpy.save")
        raise ConfigError(fault) from error
