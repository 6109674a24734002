"""Calibration after training, from examples that the training never saw: probabilities, noise, sets and intervals."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, get_args

import torch
from torch import Tensor

from ..comm import GridComm
from ..config import Scaling, SetScore
from ..data import Source
from ..errors import ConfigError, DataError, Fault, above_and_below, at_least
from ..likelihoods import Likelihood
from ..likelihoods.mixtures import GaussianMixture, Mixture
from ..posteriors import Posterior
from .evaluation import Block, See, check_classes, predict_dataset
from .predictive import ClassPredictive, Predictive, Share, ValuePredictive, examples_of, is_of_classes

logger = logging.getLogger(__name__)

TEMPERATURES = 0.05, 20.0
"""Least and greatest temperature."""

NOISE_FACTORS = 0.05, 20.0
"""Least and greatest factor of the noise scale."""

FITTED_NUMBERS = 2**22
"""Components of targets by which the noise scale is refitted, and probabilities of points of fields by which those of classes are
scaled, in the whole job: 64 MiB, seconds. Of more, a part of the targets."""

MAX_VECTOR_CLASSES = 1000
"""Classes of vector scaling, whose Newton steps sum the square of twice as many numbers."""

GATHERED_NUMBERS = 2**22
"""Scores that are gathered at once: 32 MiB on each rank."""

TIES = 2.0**-18
"""32 units in the last place of float32, relative: what scores may differ by in batches of other shapes. Sets and intervals are
wider by it, so that they hold targets whose score is the threshold; of numbers it is relative to `ValuePredictive.origin`."""

SETS, INTERVALS = "temperature, split conformal sets", "conformalised quantile regression"
"""Names of the methods, for classes and for numbers."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration has found; the same on all ranks.

    With ``n`` examples that are exchangeable with a new one, the set or interval of the new one holds its target with
    probability ``level`` or more, and, where no two scores are equal, less than ``level + 1 / (n + 1)``: of each target
    by itself, on average over calibrations and examples (Vovk, Gammerman, Shafer, Algorithmic Learning in a Random
    World, 2005). It does not hold for time series, nor for examples of another kind.
    """

    method: str
    """`SETS` or `INTERVALS`."""
    level: float
    """Probability that the target is inside, above 0 and below 1."""
    num_examples: int
    """n, of the calibration: examples whose target is not missing; of several targets the fewest that one with enough has."""
    thresholds: Tensor
    """[...] of the scores of classes, without unit, of each point of a field; [T, ...] of those of each target, in units of y,
    on the CPU.

    Infinite for a target that has too few examples for the level, or none: its set or interval holds everything.
    """
    temperature: float | None = None
    """Of the class probabilities; None for numbers."""
    vector: Tensor | None = None
    """[2, C] factors and summands of the logarithms of the class probabilities, where vector scaling was asked for."""
    score: SetScore = "threshold"
    """What the sets of classes are made by: see `set_scores`."""
    penalty: float = 0.0
    """Of each rank above ``free_rank``, for the score "raps"."""
    free_rank: int = 0
    noise_factors: Tensor | None = None
    """[T] factors of the standard deviation that the likelihood states, of each channel; None where it states no scale."""

    @property
    def holds_everything(self) -> bool:
        """Whether n is too small for the level, of all targets."""
        return conformal_rank(self.num_examples, self.level) > self.num_examples

    def columns_of(self, predictive: Predictive, quantiles: Sequence[float] = ()) -> dict[str, Tensor]:
        """Return what the calibration says of examples. Local; of numbers as `interval_of`.

        Classes: ``calibrated_probabilities`` [B, C, ...] of `applied`, and ``in_set`` [B, C, ...] (int8), 1 for a class in the set.
        Numbers: ``lower``, ``upper`` [B, T, ...], ends of the interval in units of y; it is empty where lower is above upper;
        with ``noise_factors`` also ``calibrated_std`` and, for the levels that are given, ``calibrated_quantiles``
        [B, levels, T, ...] of `applied`.
        """
        after = self.applied(predictive)
        if isinstance(predictive, ClassPredictive):
            in_set = self.set_of(predictive).to(torch.int8)
            return {"calibrated_probabilities": after.probabilities, "in_set": in_set}
        lower, upper = self.interval_of(predictive)
        columns = {"lower": lower, "upper": upper}
        if self.noise_factors is not None:
            columns["calibrated_std"] = after.variance.sqrt()
            if quantiles:
                columns["calibrated_quantiles"] = torch.stack([after.quantile(level) for level in quantiles], 1)
        return columns

    def set_of(self, predictive: ClassPredictive) -> Tensor:
        """Return whether each class [B, C, ...] is in the set of its example, or point. Local."""
        scores = set_scores(predictive.probabilities * (1 + TIES), self.score, self.penalty, self.free_rank)
        return scores <= self.thresholds.to(scores)

    def interval_of(self, predictive: Any) -> tuple[Tensor, Tensor]:
        """Return the ends [B, T, ...] of the interval of numbers (units of y). Local or collective as `ends_of`."""
        (low, high), limits = ends_of(predictive, self.level), self.thresholds.to(predictive.mean)
        origin = 0 if predictive.origin is None else predictive.origin
        tie = TIES * ((low - origin).abs() + (high - origin).abs() + limits.abs())
        return low - limits - tie, high + limits + tie

    def applied(self, predictive: Any, y: Tensor | None = None, present: Tensor | None = None) -> Any:
        """Return a predictive of examples after the calibration.

        Local; for numbers with y collective over ``sample_comm``: a sum of [K, B] numbers.

        Classes get probabilities of the temperature, or of vector scaling; the mutual information stays. For numbers the
        aleatoric standard deviation is multiplied by the ``noise_factors``, in the moments, the mixture, and with a `Share` in the
        log density of y [B, T, ...] (units of y), where y is given; ``present`` [B, T, ...] says which targets are not missing.
        """
        if isinstance(predictive, ClassPredictive):
            p, temperature = predictive.probabilities, self.temperature
            assert temperature is not None, "classes have one"
            p = tempered(p, temperature) if self.vector is None else vector_scaled(p, self.vector.to(p))
            aleatoric = torch.special.entr(p).sum(1) - predictive.mutual_information
            return replace(predictive, probabilities=p, expected_entropy=aleatoric)
        if self.noise_factors is None:
            return predictive
        factors = self.noise_factors.to(predictive.mean).view(-1, *(1,) * (predictive.mean.ndim - 2))
        after = replace(
            predictive,
            aleatoric_variance=predictive.aleatoric_variance * factors.square(),
            mixture=predictive.mixture and predictive.mixture.rescaled(factors),
            share=predictive.share and predictive.share.rescaled(factors),
            log_prob=None,
        )
        if y is None or after.share is None:
            return after
        of_samples = after.share.log_probs(y, present)
        return replace(after, log_prob=of_samples.logsumexp(0) - math.log(len(of_samples)))


def ends_of(predictive: Any, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends [B, T, ...] of the central interval (units of y). Local or collective as the quantiles."""
    return predictive.quantile((1 - level) / 2), predictive.quantile((1 + level) / 2)


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Return class probabilities [B, C, ...], ``p^(1/T)`` over their sum: flatter for T above 1 (Guo et al., 2017). Local."""
    return (log_of(probabilities) / temperature).softmax(1)


def vector_scaled(probabilities: Tensor, vector: Tensor) -> Tensor:
    """Return class probabilities [B, C, ...], ``p^w e^b`` over their sum; w, b = ``vector`` [2, C] (Guo et al., 2017). Local."""
    factors, summands = vector.view(2, -1, *(1,) * (probabilities.ndim - 2))
    return (log_of(probabilities) * factors + summands).softmax(1)


def set_scores(p: Tensor, score: SetScore, penalty: float = 0.0, free_rank: int = 0) -> Tensor:
    """Return the conformal score of each class, as p [B, C, ...]: a set holds those of the least scores. Local.

    "threshold": ``1 - p`` (Sadinle, Lei, Wasserman, Least Ambiguous Set-Valued Classifiers, JASA 2019). "aps": minus the
    probability of the classes that are less likely, which orders as the probability down to the class does (Romano, Sesia, Candès,
    Classification with Valid and Adaptive Coverage, NeurIPS 2020), without randomisation. "raps": with ``penalty`` for each
    rank above ``free_rank`` (Angelopoulos, Bates, Malik, Jordan, Uncertainty Sets for Image Classifiers, ICLR 2021). Of equal
    probabilities that of the lower class is the more likely one.
    """
    if score == "threshold":
        return 1 - p
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    after = ordered.flip(1).cumsum(1).flip(1)[:, 1:]  # summed from the least on: no digits are lost
    of_rank = -torch.cat([after, torch.zeros_like(p[:, :1])], 1)
    if score == "raps":
        ranks = torch.arange(1, p.shape[1] + 1).to(p).view(-1, *(1,) * (p.ndim - 2))
        of_rank = of_rank + penalty * (ranks - free_rank).clamp_min(0)
    return torch.empty_like(p).scatter_(1, order, of_rank)


def log_of(probabilities: Tensor) -> Tensor:
    """Return logarithms (nats), finite for a probability of 0, as in the metric nll. Local."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def fit_temperature(log_p: Tensor, y: Tensor, comm: GridComm) -> float:
    """Return the temperature of `TEMPERATURES` with the least negative log-likelihood of all examples.

    Collective over the world: 60 sums of one number, for any number of examples and classes.

    Guo et al., On Calibration of Modern Neural Networks (ICML 2017), of the mean probabilities over the samples. The
    negative log-likelihood is convex in b = 1/T; its slope, the sum over examples of ``E[log p] - log p_y``, the
    expectation over the tempered probabilities, is halved in on (in log b). ``log_p`` [n, C] are the logarithms of the
    probabilities of examples that no other rank has, y [n] their classes; n may be 0.
    """
    of_truth = log_p.gather(1, y.long()[:, None])[:, 0]
    low, high = (-math.log(temperature) for temperature in reversed(TEMPERATURES))  # of log b
    for _ in range(60):  # the same on all ranks: none waits for another
        middle = (low + high) / 2
        expected = ((math.exp(middle) * log_p).softmax(1) * log_p).sum(1)
        slope = (expected - of_truth).sum().view(1)
        comm.sum_(slope)
        low, high = (low, middle) if slope.item() > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def fit_vector(log_p: Tensor, y: Tensor, temperature: float, comm: GridComm) -> Tensor:
    """Return the factors and summands [2, C] of vector scaling, on the CPU.

    Collective over the world: in each of about ten rounds a sum of (2 C + 1)^2 numbers, and a broadcast of 2 C.

    Guo et al. (2017), of the mean probabilities over the samples: they minimise the negative log-likelihood of all
    examples (nats), and half the squared distance from those of the ``temperature``, 1/T and 0. This is a standard
    normal prior; it keeps them finite for a class that never occurs, and next to the temperature where the examples are
    few. Newton's method, whose steps are halved until the sum decreases; world rank 0 decides, so that all ranks take
    the same one. ``log_p`` and y are as for `fit_temperature`.
    """
    num_classes = log_p.shape[1]
    middle = torch.cat([log_p.new_full((num_classes,), 1 / temperature), log_p.new_zeros(num_classes)])
    truth = torch.nn.functional.one_hot(y.long(), num_classes).to(log_p)
    at, step, least, goes_on = middle, torch.zeros_like(middle), math.inf, log_p.new_ones(1)
    trial = at.clone()
    while goes_on.item():
        log_q = (log_p * trial[:num_classes] + trial[num_classes:]).log_softmax(1)
        q = log_q.exp()
        gradient = torch.cat([((q - truth) * log_p).sum(0), (q - truth).sum(0)])
        products = torch.cat([q * log_p, q], dim=1)
        curvature = -(products.T @ products).view(2, num_classes, 2, num_classes)
        powers = (q * log_p.square()).sum(0), (q * log_p).sum(0), q.sum(0)
        for row, column in itertools.product(range(2), range(2)):
            curvature[row, :, column].diagonal().add_(powers[row + column])
        sums = torch.cat([-(truth * log_q).sum().view(1), gradient, curvature.flatten()])
        comm.sum_(sums)
        value, gradient, curvature = sums.split([1, 2 * num_classes, 4 * num_classes**2])
        value = value.item() + (trial - middle).square().sum().item() / 2
        if value <= least + 1e-13 * abs(value):  # rounding is no increase
            at, least = trial, value
            curvature = curvature.view(2 * num_classes, -1) + torch.eye(2 * num_classes).to(trial)
            step = -torch.linalg.solve(curvature, gradient + trial - middle)
        else:
            step = step / 2
        trial = at + step
        # Convergence is quadratic: after a step of 1e-8 the error is that of rounding
        goes_on.fill_((step.abs() > 1e-8 * (1 + at.abs())).any())
        comm.broadcast_([trial, goes_on])
    return trial.view(2, num_classes).cpu()


def fit_noise_factors(parts: Sequence[tuple[Any, Tensor, Tensor, Tensor]], num_targets: int, comm: GridComm) -> Tensor:
    """Return the factors [T] of the scales with the greatest likelihood, on the CPU.

    Collective over the world: one sum of 26 T numbers, 40 of T. The likelihood is that of each target by itself, of its
    mixture over the samples whose scales are multiplied by the factor of its channel. The greatest of 25 values tells
    where to look; there the slope is halved in on (in the logarithm of the factor). ``parts`` have the components [K,
    m] of m targets that no other rank has, the targets [m], whether each is there, and its channel.
    """

    def total(log_factor: Tensor, is_slope: bool) -> Tensor:
        """Return the log-likelihood, or its slope, [T]."""
        found = log_factor.new_zeros(num_targets)
        for mixture, y, present, channel in parts:
            rescaled = mixture.rescaled(log_factor.exp().expand(num_targets)[channel])
            logs = rescaled.log_densities(y)
            of_targets = (logs.softmax(0) * rescaled.slopes(y)).sum(0) if is_slope else logs.logsumexp(0)
            found.index_add_(0, channel, torch.where(present, of_targets, 0))
        return found

    ends = [math.log(factor) for factor in NOISE_FACTORS]
    nodes = torch.linspace(ends[0], ends[1], 25, dtype=torch.float64, device=comm.device)
    count = nodes.new_zeros(num_targets)
    for _, _, present, channel in parts:
        count.index_add_(0, channel, present.to(count))
    found = torch.stack([*(total(node, False) for node in nodes), count])
    comm.sum_(found)
    best = found[:-1].argmax(0)
    low, high = nodes[(best - 1).clamp_min(0)], nodes[(best + 1).clamp_max(len(nodes) - 1)]
    for _ in range(40):  # to 1e-12; the same on all ranks: none waits for another
        middle = (low + high) / 2
        slope = total(middle, True)
        comm.sum_(slope)
        low, high = torch.where(slope > 0, middle, low), torch.where(slope > 0, high, middle)
    return torch.where(found[-1] > 0, ((low + high) / 2).exp(), 1).cpu()


def conformal_rank(num_examples: int, level: float) -> int:
    """Return ``ceil((n + 1) level)``, exact for a level as it is written: which of n scores is the threshold. Local."""
    return math.ceil((num_examples + 1) * Fraction(str(float(level))))


def conformal_thresholds(scores: Tensor, level: float, num_examples: int, comm: GridComm) -> Tensor:
    """Return the score with `conformal_rank` among those of all examples, [...] on the CPU; infinite where those of a target are too few.

    Collective over the world: a gather of each `GATHERED_NUMBERS` scores. Equal scores count as often as they occur;
    the order of the examples does not matter, so every grid finds the same one. Scores are [m, ...] of examples that no
    other rank has, NaN where a target is missing; m may be 0. ``num_examples`` are those of all ranks
    (`Calibration.num_examples`).
    """
    shape = scores.shape[1:]
    if conformal_rank(num_examples, level) > num_examples:
        return torch.full(shape, math.inf, dtype=torch.float64)
    found = []
    for part in scores.view(len(scores), shape.numel()).split(max(1, GATHERED_NUMBERS // num_examples), dim=1):
        part = comm.gather(comm.gather(part.to(comm.device), "sample"), "data")
        ordered, counts = part.sort(0).values, (~part.isnan()).sum(0).view(-1).tolist()  # NaN comes last
        rank_of = {count: conformal_rank(count, level) for count in set(counts)}
        rank = torch.tensor([rank_of[count] for count in counts], device=part.device).view(part.shape[1:])
        found.append(ordered.gather(0, rank[None] - 1)[0].view(-1).cpu())
    thresholds = torch.cat(found).view(shape)
    return torch.where(thresholds.isnan(), math.inf, thresholds)


def calibrate_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    level: float,
    scaling: Scaling = "temperature",
    score: SetScore = "threshold",
    penalty: float = 0.01,
    free_rank: int = 5,
    examples: Tensor | None = None,
    see: See | None = None,
    **options: Any,
) -> Calibration:
    """Calibrate a posterior by a data set that the training has not seen, and that chose no checkpoint of it.

    Collective over the world. The ranks of a sample group divide the work on the scores of a block. A missing target has no score,
    nor has an example of weight 0; all others count once, whatever their weights.

    Classes have a score of `set_scores`, of the mean probabilities: their set holds each class whose score is at most the
    threshold, that of its point in a field. The probabilities are not tempered there, because the temperature is found by the same
    examples, and the scores must not depend on them; the points of all fields share it. Numbers have, for each target, the score ``max(low - y, y - high)`` of the central interval of the mixture;
    the interval is widened by the threshold at both ends, or narrowed (Romano, Patterson, Candès, Conformalized Quantile
    Regression, NeurIPS 2019). Likelihoods with a scale also have `fit_noise_factors`.

    Parameters
    ----------
    level : float
        Above 0 and below 1.
    scaling, score, penalty, free_rank
        Of classes: `fit_temperature` alone or `fit_vector`, too; and `set_scores`.
    examples : Tensor, optional
        Which of its examples, in their order; all by default.
    see : callable, optional
        As for `evaluate_dataset`.
    **options
        ``num_samples``, ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.

    It raises `ConfigError` where the level is none, the predictive has neither classes nor quantiles, or a method does
    not fit the targets; `DataError`, on all ranks, where a target lies outside the support of the likelihood, all are
    missing, or the network predicts what is no number.
    """
    above_and_below(0, 1, "Try 0.9").check("--level", level)
    of_classes, places = is_of_classes(likelihood), dataset.manifest.places
    if not of_classes and not likelihood.has_mixture:
        rule = "calibration needs classes, or numbers with quantiles"
        raise ConfigError(Fault("likelihood.name", type(likelihood).__name__, rule, "Use another likelihood"))
    check_methods(likelihood, scaling, score, penalty, free_rank)
    check_classes(likelihood, dataset)
    fault: DataError | None = None
    noise: list[tuple[Any, Tensor, Tensor, Tensor]] = []
    num_points = len(dataset if examples is None else examples) * math.prod(places)
    of_point = likelihood.num_classes or likelihood.num_targets * options["num_samples"]
    stride = -(-num_points * of_point // FITTED_NUMBERS) if places or not of_classes else 1
    scores = [torch.zeros(0, *(() if of_classes else (likelihood.num_targets,)), *places, dtype=torch.float64)]
    logs = [torch.zeros(0, likelihood.num_classes or 0, dtype=torch.float64, device=comm.device)]
    classes = [torch.zeros(0, dtype=torch.int64, device=comm.device)]
    options |= {"keep_share": not of_classes, "examples": examples}
    for block in predict_dataset(posterior, likelihood, comm, dataset, **options):
        if see:
            see(block.examples, block.predictive, block.y)
        ends = () if of_classes else ends_of(block.predictive, level)
        misfits, mine = ~likelihood.fits(block.y), comm.grid.share(len(block.examples), "sample")
        if misfits.any():  # the ranks of a sample group still have blocks to predict together
            fault = likelihood.fault_of(block.y[misfits][0].item())
        share = block.predictive.share if isinstance(block.predictive, ValuePredictive) else None
        counts = _counts(block, likelihood)
        if fault is None and share is not None and share.shares.span and isinstance(share.mixture, GaussianMixture):
            noise.append(_thinned(share, block.y, counts, block.examples, stride))
        if fault is not None or not mine:
            continue
        part, y = examples_of(block.predictive, mine.start, mine.stop), block.y[mine.start : mine.stop]
        there = counts[mine.start : mine.stop]
        if isinstance(part, ClassPredictive):
            p, y = part.probabilities, torch.where(there, y.long(), 0)
            values = set_scores(p, score, penalty, free_rank).gather(1, y[:, None])[:, 0]
            point = torch.arange(y[:1].numel(), device=y.device).view(y.shape[1:])
            numbers = block.examples[mine.start : mine.stop].to(y.device).view(-1, *(1,) * (y.ndim - 1))
            kept = there & ((point + numbers) % stride == 0)
            logs.append(log_of(p.movedim(1, -1)[kept]))
            classes.append(y[kept])
        else:
            low, high = (end[mine.start : mine.stop] for end in ends)
            values = torch.maximum(low - y, y - high)
        if not values[there].isfinite().all():
            fault = DataError("the network predicts what is no finite number. Look at its training")
        scores.append(torch.where(there, values, math.nan).double().cpu())
    with comm.agree("calibrating"):
        if fault is not None:
            raise fault
    of_all = torch.cat(scores)
    counts = torch.cat([(~of_all.isnan()).sum(0).double().view(-1), torch.tensor([float(len(noise))])]).to(comm.device)
    comm.sum_(counts)
    of_targets, has_noise = counts[:-1].view(1 if of_classes else likelihood.num_targets, -1), bool(counts[-1] > 0)
    numbers = [int(count) for count in of_targets.unique().tolist()]  # from the least; a point of a field may have none
    if numbers[-1] == 0:
        raise DataError(
            "all targets are missing in all examples of the calibration, or these have the weight 0. Use others"
        )
    num_examples = next((n for n in numbers if conformal_rank(n, level) <= n), numbers[-1])
    is_known = (of_targets > 0) | ~of_targets.any(1, keepdim=True)  # not land in a field of the sea
    too_few = int((is_known & (of_targets < num_examples)).sum())
    if too_few and comm.grid.is_first("world"):
        rule = "%d of %d targets have too few examples for the level %g: their sets or intervals hold everything"
        logger.warning(rule, too_few, of_targets.numel(), level)
    thresholds = conformal_thresholds(of_all, level, num_examples, comm)
    found = Calibration(SETS if of_classes else INTERVALS, level, num_examples, thresholds)
    if of_classes:
        log_p, y = torch.cat(logs), torch.cat(classes)
        temperature = fit_temperature(log_p, y, comm)
        vector = fit_vector(log_p, y, temperature, comm) if scaling == "vector" else None
        found = replace(found, temperature=temperature, vector=vector, score=score)
        return replace(found, penalty=penalty, free_rank=free_rank) if score == "raps" else found
    return replace(found, noise_factors=fit_noise_factors(noise, likelihood.num_targets, comm) if has_noise else None)


def _counts(block: Block, likelihood: Likelihood) -> Tensor:
    """Return for each target of a block, as y, whether it is there, in an example whose weight is not 0. Local."""
    present = likelihood.present(block.y)
    counts = torch.ones_like(block.y, dtype=torch.bool) if present is None else present
    return counts if block.weights is None else counts & (block.weights > 0).view(-1, *(1,) * (block.y.ndim - 1))


def _thinned(
    share: Share, y: Tensor, there: Tensor, examples: Tensor, stride: int
) -> tuple[Mixture, Tensor, Tensor, Tensor]:
    """Return a part of `fit_noise_factors` of this rank's share: every ``stride``-th of the places of all examples.

    Local. y [B, T, ...] are the targets of the block, ``examples`` [B] its global indices, so that every grid takes the same.
    """
    shares = share.shares
    flat = torch.arange(shares.span.start, shares.span.stop)
    example, target = flat // shares.width, flat % shares.width
    num_places = shares.width // shares.shape[1]
    kept = ((target % num_places + examples[example]) % stride == 0).to(y.device)
    y, there = (shares.of(values)[kept] for values in (y, there))
    return share.mixture.map(lambda c: c[:, kept]), y, there, (target // num_places).to(y.device)[kept]


def check_methods(likelihood: Likelihood, scaling: str, score: str, penalty: float, free_rank: int) -> None:
    """Raise `ConfigError` where a method of classes is none, or does not fit the targets. Local."""
    for flag, value, words in (("--scaling", scaling, get_args(Scaling)), ("--sets", score, get_args(SetScore))):
        if value not in words:
            raise ConfigError(Fault(flag, value, f"must be one of {', '.join(words)}", "Choose one"))
        if value != words[0] and not is_of_classes(likelihood):
            raise ConfigError(Fault(flag, value, "it is for classes, and the targets are numbers", "Leave it out"))
    if scaling == "vector" and is_of_classes(likelihood) and likelihood.num_classes > MAX_VECTOR_CLASSES:
        rule = f"it takes at most {MAX_VECTOR_CLASSES} classes, and there are {likelihood.num_classes}"
        raise ConfigError(Fault("--scaling", scaling, rule, "Use temperature"))
    at_least(0, "Try 0.01").check("--raps_penalty", penalty)
    at_least(0, "Try 5").check("--raps_rank", free_rank)
