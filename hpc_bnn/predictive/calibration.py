"""Calibration after training: temperature, and sets and intervals with a guarantee, from examples that the training never saw."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..data import Source
from ..errors import ConfigError, DataError, Fault, above_and_below
from ..likelihoods import Likelihood
from ..posteriors import Posterior
from .evaluation import See, predict_dataset
from .predictive import ClassPredictive, Predictive, examples_of, is_of_classes

TEMPERATURES = 0.05, 20.0
"""Least and greatest temperature."""

GATHERED_NUMBERS = 2**22
"""Scores that are gathered at once: 32 MiB on each rank."""

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
    """n, of the calibration: examples whose target is not missing, of several targets the fewest that one has."""
    thresholds: Tensor
    """[] of the scores of classes, without unit; [T, ...] of those of each target, in units of y, on the CPU.

    Infinite where n is too small for the level: every set and interval holds everything.
    """
    temperature: float | None = None
    """Of the class probabilities; None for numbers."""

    @property
    def holds_everything(self) -> bool:
        """Whether n is too small for the level."""
        return conformal_rank(self.num_examples, self.level) > self.num_examples

    def columns_of(self, predictive: Predictive) -> dict[str, Tensor]:
        """Return what the calibration says of examples. Local.

        Classes: ``calibrated_probabilities`` [B, C], `tempered`, and ``in_set`` [B, C] (int8), 1 for a class in the set.
        Numbers: ``lower``, ``upper`` [B, T, ...], ends of the interval in units of y; it is empty where lower is above upper.
        """
        if isinstance(predictive, ClassPredictive):
            p, temperature = predictive.probabilities, self.temperature
            assert temperature is not None, "classes have one"
            in_set = 1 - p <= self.thresholds.to(p)
            return {"calibrated_probabilities": tempered(p, temperature), "in_set": in_set.to(torch.int8)}
        (low, high), limits = ends_of(predictive, self.level), self.thresholds.to(predictive.mean)
        return {"lower": low - limits, "upper": high + limits}


def ends_of(predictive: Any, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the central interval of the mixture over samples, [B, T, ...] each (units of y). Local."""
    return predictive.mixture.quantile((1 - level) / 2), predictive.mixture.quantile((1 + level) / 2)


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Return class probabilities [B, C], ``p^(1/T)`` over their sum: flatter for T above 1 (Guo et al., 2017). Local."""
    return (log_of(probabilities) / temperature).softmax(1)


def log_of(probabilities: Tensor) -> Tensor:
    """Return logarithms (nats), finite for a probability of 0, as in the metric nll. Local."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def fit_temperature(log_p: Tensor, y: Tensor, comm: GridComm) -> float:
    """Return the temperature of `TEMPERATURES` with the least negative log-likelihood of all examples.

    Collective over the world: 60 sums of one number, for any number of examples and classes.

    Guo et al., On Calibration of Modern Neural Networks (ICML 2017), of the mean probabilities over the samples. The
    negative log-likelihood is convex in b = 1/T; its slope, the sum over examples of ``E[log p] - log p_y``, the
    expectation over the tempered probabilities, is halved in on (in log b).

    Parameters
    ----------
    log_p : Tensor
        [n, C] logarithms of the probabilities of examples that no other rank has; n may be 0.
    y : Tensor
        [n] their classes.
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


def conformal_rank(num_examples: int, level: float) -> int:
    """Return ``ceil((n + 1) level)``, exact for a level as it is written: which of n scores is the threshold. Local."""
    return math.ceil((num_examples + 1) * Fraction(str(float(level))))


def conformal_thresholds(scores: Tensor, level: float, num_examples: int, comm: GridComm) -> Tensor:
    """Return the score with `conformal_rank` among those of all examples, [T, ...] on the CPU; infinite where n is too small.

    Collective over the world: a gather of each `GATHERED_NUMBERS` scores. Equal scores count as often as they occur; the order
    of the examples does not matter, so every grid finds the same one.

    Parameters
    ----------
    scores : Tensor
        [m, T, ...] of examples that no other rank has, NaN where a target is missing; m may be 0.
    num_examples : int
        n, of all ranks; of several targets the fewest scores that one has.
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
    return torch.cat(found).view(shape)


def calibrate_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    level: float,
    examples: Tensor | None = None,
    see: See | None = None,
    **options: Any,
) -> Calibration:
    """Calibrate a posterior by a data set that the training has not seen, and that chose no checkpoint of it.

    Collective over the world. The ranks of a sample group divide the work on the scores of a block. A missing target has no score.

    Classes have the score ``1 - p_y`` of the mean probabilities (Sadinle, Lei, Wasserman, Least Ambiguous Set-Valued
    Classifiers, JASA 2019): their set holds each class with ``1 - p <= threshold``. The probabilities are not tempered there,
    because the temperature is found by the same examples, and the scores must not depend on them. Numbers have, for each target,
    the score ``max(low - y, y - high)`` of the central interval of the mixture; the interval is widened by the threshold at
    both ends, or narrowed (Romano, Patterson, Candès, Conformalized Quantile Regression, NeurIPS 2019).

    Parameters
    ----------
    dataset : Source
        The data set.
    level : float
        Above 0 and below 1.
    examples : Tensor, optional
        Which of its examples, in their order; all by default.
    see : callable, optional
        As for `evaluate_dataset`.
    **options
        ``num_samples``, ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.

    Raises
    ------
    ConfigError
        The level is none, or the predictive has neither one class per example nor quantiles.
    DataError
        On all ranks: a target lies outside the support of the likelihood or is missing in all examples, or the network predicts
        what is no number.
    """
    above_and_below(0, 1, "Try 0.9").check("--level", level)
    of_classes, places = is_of_classes(likelihood), dataset.manifest.places
    if places if of_classes else not likelihood.has_mixture:
        rule = "calibration needs one class per example, or numbers with quantiles"
        raise ConfigError(Fault("likelihood.name", type(likelihood).__name__, rule, "Use another likelihood"))
    fault: DataError | None = None
    scores = [torch.zeros(0, *(() if of_classes else (likelihood.num_targets, *places)), dtype=torch.float64)]
    logs = [torch.zeros(0, likelihood.num_classes or 0, dtype=torch.float64, device=comm.device)]
    classes = [torch.zeros(0, dtype=torch.int64, device=comm.device)]
    options |= {"keep_members": not of_classes, "examples": examples}
    for block in predict_dataset(posterior, likelihood, comm, dataset, **options):
        if see:
            see(block.examples, block.predictive, block.y)
        misfits, mine = ~likelihood.fits(block.y), comm.grid.share(len(block.examples), "sample")
        if misfits.any():  # the ranks of a sample group still have blocks to predict together
            fault = likelihood.fault_of(block.y[misfits][0].item())
        if fault is not None or not mine:
            continue
        part, y = examples_of(block.predictive, mine.start, mine.stop), block.y[mine.start : mine.stop]
        present = likelihood.present(y)
        if isinstance(part, ClassPredictive):
            rows = slice(None) if present is None else present
            p, y = part.probabilities[rows], y.long()[rows]
            score = 1 - p.gather(1, y[:, None])[:, 0]
            logs.append(log_of(p))
            classes.append(y)
        else:
            low, high = ends_of(part, level)
            score = torch.maximum(low - y, y - high)
        if not (score if isinstance(part, ClassPredictive) or present is None else score[present]).isfinite().all():
            fault = DataError("the network predicts what is no finite number. Look at its training")
        scores.append(score.double().cpu())
    with comm.agree("calibrating"):
        if fault is not None:
            raise fault
    of_all = torch.cat(scores)
    counts = (~of_all.isnan()).sum(0).double().view(-1).to(comm.device)
    comm.sum_(counts)
    num_examples = int(counts.min())
    if num_examples == 0:
        raise DataError("a target is missing in all examples of the calibration. Use others")
    thresholds = conformal_thresholds(of_all, level, num_examples, comm)
    temperature = fit_temperature(torch.cat(logs), torch.cat(classes), comm) if of_classes else None
    return Calibration(SETS if of_classes else INTERVALS, level, num_examples, thresholds, temperature)
