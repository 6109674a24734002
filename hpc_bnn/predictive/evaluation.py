"""The predictive of the whole ensemble, and its metrics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..data import ShardDataset
from ..likelihoods import Categorical, Likelihood
from ..likelihoods.mixtures import Mixture
from ..noise import Key, Stream
from ..posteriors import Posterior
from ..posteriors.sample_loop import SampleLoop
from ..reductions import LogMeanExp, Moments
from ..trees import Inputs, device_of, num_rows
from ..views import SharedView
from .metrics import (
    Accuracy,
    BrierScore,
    ChannelMean,
    ExpectedCalibrationError,
    Metric,
    NegativeLogLikelihood,
    PitHistogram,
    adaptive_calibration_error,
)


class _Rows:
    """A dataclass of tensors with a row for each example."""

    def rows(self, start: int, stop: int):
        """Return the predictive of some examples."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {name: part[start:stop] for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **cut)


@dataclass(frozen=True)
class ClassPredictive(_Rows):
    """Predictive of some examples over all samples of the job; B examples, C classes."""

    probabilities: Tensor
    """[B, C] mean over samples of the class probabilities."""
    std: Tensor
    """[B, C] standard deviation over samples of the class probabilities."""
    expected_entropy: Tensor
    """[B] mean over samples of the entropy (nats): the aleatoric part."""
    members: Tensor | None = None
    """[B, K, C] class probabilities of each sample, where they were asked for."""

    @property
    def entropy(self) -> Tensor:
        """[B] entropy of the mean probabilities (nats): the total uncertainty."""
        return torch.special.entr(self.probabilities).sum(-1)

    @property
    def mutual_information(self) -> Tensor:
        """[B] entropy minus expected entropy (nats): the epistemic uncertainty (Houlsby et al., 2011)."""
        return (self.entropy - self.expected_entropy).clamp_min(0)


@dataclass(frozen=True)
class ValuePredictive(_Rows):
    """Predictive of numbers over all samples of the job; B examples, targets [T, ...].

    The total variance is the mean over samples of the likelihood's variance (aleatoric) and the variance over
    samples of its mean (epistemic): the law of total variance.
    """

    mean: Tensor
    """[B, T, ...] mean (units of y)."""
    aleatoric_variance: Tensor
    """[B, T, ...] mean over samples of the variance that the likelihood states."""
    epistemic_variance: Tensor
    """[B, T, ...] variance over samples of the mean that the likelihood states."""
    log_prob: Tensor | None = None
    """[B] log of the mean over samples of p(y | x, w_s) (nats), where y was given and has a density."""
    mixture: Mixture | None = None
    """The samples' distributions of each target, where they were asked for and the likelihood has them."""
    members: Tensor | None = None
    """[B, K, T, ...] mean of each sample, where they were asked for."""

    def rows(self, start: int, stop: int) -> ValuePredictive:
        mixture = self.mixture and self.mixture.rows(start, stop)
        return replace(super().rows(start, stop), mixture=mixture)

    @property
    def variance(self) -> Tensor:
        """[B, T, ...] total variance."""
        return self.aleatoric_variance + self.epistemic_variance

    def in_units(self, mean: Tensor, std: Tensor) -> ValuePredictive:
        """Return the predictive of ``std * y + mean`` from that of y; they broadcast to [B, T, ...]."""
        log_prob = self.log_prob
        if log_prob is not None:
            log_prob = log_prob - std.to(log_prob).expand(self.mean[:1].shape).log().sum()
        square = std.square()
        return ValuePredictive(
            self.mean * std + mean,
            self.aleatoric_variance * square,
            self.epistemic_variance * square,
            log_prob,
            self.mixture and self.mixture.in_units(mean, std),
            None if self.members is None else self.members * std[:, None] + mean[:, None],
        )


Predictive = ClassPredictive | ValuePredictive

BLOCK_BYTES = 128 * 2**20
"""Bytes of inputs, and of outputs of all samples, that a rank processes at once."""


def member_outputs(
    posterior: Posterior, comm: GridComm, x: Inputs, num_samples: int, seed: int, batch_size: int, chunk_size: int = 1
) -> Iterator[tuple[range, Tensor]]:
    """Yield (samples, outputs [c, B, ...] in float64) for the samples of this rank, chunk by chunk. Local.

    A rank without samples (fewer than ranks of the sample axis) yields once, with c = 0, to give the shape.
    """
    key, views, is_first = Key(seed, Stream.PREDICTION), SharedView(x), comm.grid.is_first("world")
    mine = comm.grid.local_samples(num_samples)
    posterior.check_num_samples(num_samples, mine)
    loop = SampleLoop(posterior, chunk_size, "vmap", speaks=is_first, max_examples=batch_size)
    with posterior.evaluating():
        loop.look(mine or range(1), views, key, comm.grid)
        for samples, outputs in loop(mine or range(1), views, key):
            count = min(len(samples), len(mine))
            yield range(samples[0], samples[0] + count), outputs[:count].double()


@torch.no_grad()
def predict_classes(
    posterior: Posterior,
    likelihood: Categorical,
    comm: GridComm,
    x: Inputs,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 1024,
    chunk_size: int = 1,
    keep_members: bool = False,
) -> ClassPredictive:
    """Return the predictive of this rank's examples over the samples of all ranks of its sample group.

    Collective over ``sample_comm``: one sum of [B, 2 C + 1]; a gather of [K, B, C] to keep the members.

    Parameters
    ----------
    x : Tensor or tree of tensors
        [B, ...] inputs; the same on all ranks of a sample group. A dict is ``module(**x)``, a list or tuple
        ``module(*x)``.
    num_samples : int
        Samples in the whole job, any number; the same samples on every grid.
    seed : int
        Key of the samples.
    batch_size : int
        Examples per forward pass on this rank.
    chunk_size : int
        Samples that a rank evaluates at once, by ``torch.vmap``; 1 walks over them.
    keep_members : bool
        Whether the probabilities of each sample are kept as well.
    """
    num_classes = likelihood.num_classes
    # p, p^2, entropy; in float64, because the variance is a small difference
    sums = torch.zeros(num_rows(x), 2 * num_classes + 1, dtype=torch.float64, device=device_of(x))
    kept = []
    for _, outputs in member_outputs(posterior, comm, x, num_samples, seed, batch_size, chunk_size):
        p = likelihood.probabilities(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
        parts = torch.cat([p, p.square(), torch.special.entr(p).sum(-1, keepdim=True)], dim=-1)
        sums += parts.sum(0)
        kept += [p] if keep_members else []
    comm.sum_(sums, "sample")
    mean, square, entropy = (sums / num_samples).split([num_classes, num_classes, 1], dim=-1)
    members = comm.gather(torch.cat(kept), "sample").movedim(0, 1) if keep_members else None
    return ClassPredictive(mean, (square - mean.square()).clamp_min(0).sqrt(), entropy.squeeze(-1), members)


@torch.no_grad()
def predict_values(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    x: Inputs,
    y: Tensor | None = None,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 1024,
    chunk_size: int = 1,
    keep_members: bool = False,
) -> ValuePredictive:
    """Return the predictive of this rank's examples over the samples of all ranks of its sample group.

    Collective over ``sample_comm``: two sums, of 2 and 1 numbers per target; with targets y a maximum and a sum of
    B numbers more; a gather of the outputs of all samples to keep the members.

    Parameters
    ----------
    x, y : Tensor
        [B, ...] inputs, and targets where their log-density is wanted; the same on all ranks of a sample group.
    num_samples, seed, batch_size, chunk_size
        As for `predict_classes`.
    keep_members : bool
        Whether the distribution of each sample is kept as well: for quantiles, PIT and CRPS.
    """
    moments, density = Moments(num_samples), LogMeanExp(num_samples)
    has_density = y is not None and likelihood.has_density
    kept = []
    for samples, members in member_outputs(posterior, comm, x, num_samples, seed, batch_size, chunk_size):
        form, outputs = (len(samples), num_rows(x)), members.flatten(0, 1)
        mean_and_variance = torch.stack([likelihood.mean(outputs), likelihood.variance(outputs)], dim=1)
        moments.add(mean_and_variance.unflatten(0, form))
        if has_density:
            targets = y.expand(len(samples), *y.shape).flatten(0, 1)
            density.add(likelihood.log_prob(outputs, targets).unflatten(0, form))
        kept += [members] if keep_members else []
    moments.exchange(comm)
    if has_density:
        density.exchange(comm)
    predictive = ValuePredictive(
        moments.mean, moments.aleatoric, moments.epistemic, density.log_mean if has_density else None
    )
    if not keep_members:
        return predictive
    outputs = comm.gather(torch.cat(kept), "sample")  # [K, B, ...]
    means = likelihood.mean(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
    return replace(predictive, mixture=likelihood.mixture(outputs), members=means.movedim(0, 1))


def block_size(likelihood: Likelihood, dataset: ShardDataset, num_samples: int, keep_members: bool) -> int:
    """Return the number of examples of a data set that a rank processes at once. Local."""
    num_bytes = math.prod(dataset.in_shape) * dataset.dtype.itemsize
    if keep_members:
        places = math.prod(dataset.manifest.arrays["y"].shape[1:])
        num_bytes = max(num_bytes, 8 * num_samples * likelihood.num_outputs * places)
    return max(1, BLOCK_BYTES // num_bytes)


@dataclass(frozen=True)
class Block:
    """Some examples of a data set and their predictive; numbers in units of y."""

    examples: Tensor
    """[B] their global indices."""
    predictive: Predictive
    y: Tensor | None
    """[B, ...] their targets, where they were asked for."""


def predict_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: ShardDataset,
    *,
    num_samples: int,
    keep_members: bool = False,
    with_targets: bool = True,
    **options: Any,
) -> Iterator[Block]:
    """Yield the predictive of a data set in blocks of bounded size: each data group takes its range of the examples.

    Collective over ``sample_comm``; data groups may have different numbers of blocks. Each block is one pass over
    the samples. ``**options`` are ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.
    """
    is_class = likelihood.num_classes is not None
    part = torch.arange(len(dataset))[comm.grid.local_examples(len(dataset))]
    size = block_size(likelihood, dataset, num_samples, keep_members)
    options |= {"num_samples": num_samples, "keep_members": keep_members}
    for examples in part.split(size) if len(part) else ():
        x, y = dataset.fetch(examples)
        y = y if with_targets else None
        if is_class:
            yield Block(examples, predict_classes(posterior, likelihood, comm, x, **options), y)
            continue
        predictive = predict_values(posterior, likelihood, comm, x, y, **options)
        if dataset.target_scale:
            predictive = predictive.in_units(*dataset.target_scale)
        if with_targets:
            y = likelihood.targets(dataset.in_units(y), predictive.mean)
        yield Block(examples, predictive, y)


# --- evaluation ------------------------------------------------------------------------------------------


See = Callable[[Tensor, Predictive, Tensor], None]
"""``see(examples [B], predictive, y [B, ...])``: what becomes of a block of predictions."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a posterior on a data set; the same on all ranks."""

    metrics: dict[str, float]
    """Metrics of the whole data set, in units of y."""
    curves: dict[str, Any]
    """Data of the plots: for classes "reliability"; for numbers "pit", and "channels" with their metrics."""
    uncertainties: dict[str, Tensor]
    """[N] uncertainties of each example, in the order of the data set: see `uncertainties_of`."""


def evaluate_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: ShardDataset,
    *,
    see: See | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a data set: each data group takes its range of the examples, each sample group takes all samples.

    Collective over the world. Examples are read in blocks of bounded size; every block is one pass over the samples.
    The ranks of a sample group divide the work on its scores. All ranks then sum sums and counts over the world,
    never means.

    Parameters
    ----------
    dataset : ShardDataset
        The data set.
    see : callable, optional
        Called with the global indices [B], the predictive, and the targets of every block of this rank; numbers in
        units of y.
    **options
        ``num_samples``, ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.
    """
    scores = score_dataset(posterior, likelihood, comm, dataset, see=see, **options)
    scores.combine(comm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank without examples has no update of its own
        return Evaluation(scores.compute(), scores.curves(), scores.uncertainties)


def score_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: ShardDataset,
    *,
    num_samples: int,
    see: See | None = None,
    **options: Any,
) -> _Scores:
    """Return this rank's evaluation of its examples, before `evaluate_dataset` combines those of all ranks.

    Collective over ``sample_comm``.
    """
    is_class = likelihood.num_classes is not None
    scores = (_ClassScores if is_class else _ValueScores)(likelihood, dataset, num_samples)
    options |= {"num_samples": num_samples, "keep_members": likelihood.has_mixture}
    for block in predict_dataset(posterior, likelihood, comm, dataset, **options):
        mine = comm.grid.share(len(block.examples), "sample")
        if mine:
            start, stop = mine.start, mine.stop
            scores.see(block.examples[start:stop], block.predictive.rows(start, stop), block.y[start:stop])
        if see:
            see(block.examples, block.predictive, block.y)
    return scores


def uncertainties_of(predictive: Predictive, unit: Tensor | None = None) -> dict[str, Tensor]:
    """Return scalar uncertainties [B] of examples: a larger value means less certainty. Local.

    Parameters
    ----------
    predictive : ClassPredictive or ValuePredictive
        For classes entropy and mutual information (nats); for numbers the means over targets of the total and the
        epistemic standard deviation.
    unit : Tensor, optional
        Unit by which standard deviations are divided first, so that targets of different units can be averaged.
    """
    if isinstance(predictive, ClassPredictive):
        return {"entropy": predictive.entropy, "mutual_information": predictive.mutual_information}
    unit = 1.0 if unit is None else unit
    parts = {"std": predictive.variance, "epistemic_std": predictive.epistemic_variance}
    return {name: (variance.sqrt() / unit).flatten(1).mean(1) for name, variance in parts.items()}


def uncertainties_of_dataset(
    posterior: Posterior, likelihood: Likelihood, comm: GridComm, dataset: ShardDataset, **options: Any
) -> dict[str, Tensor]:
    """Return `uncertainties_of` all examples of a data set, [N]; its targets are not used.

    Collective over the world. ``**options`` as for `evaluate_dataset`.
    """
    columns = _Columns()
    unit = dataset.target_scale and dataset.target_scale[1]
    for block in predict_dataset(posterior, likelihood, comm, dataset, with_targets=False, **options):
        if comm.grid.is_first("sample"):
            columns.see(block.examples, uncertainties_of(block.predictive, unit))
    return columns.gather(comm, UNCERTAINTIES[likelihood.num_classes is not None])


def out_of_distribution_auroc(inside: dict[str, Tensor], outside: dict[str, Tensor]) -> dict[str, float]:
    """Return how well each uncertainty detects out-of-distribution examples, as an AUROC.

    Local. 0.5: not at all; 1: every out-of-distribution example is less certain than every one of the data.
    """
    found = {}
    for name, values in inside.items():
        # The share of pairs in which the foreign example is the less certain one, ties by half (Mann and Whitney, 1947)
        ordered, foreign = values.sort().values, outside[name]
        below, up_to = (torch.searchsorted(ordered, foreign, right=right) for right in (False, True))
        found[f"ood_auroc/{name}"] = (below + up_to).double().mean().item() / (2 * len(ordered))
    return found


def metrics_to_minimise(likelihood: Likelihood) -> tuple[str, ...]:
    """Return the metrics by which one checkpoint is better than another, less is better. Local."""
    if likelihood.num_classes is not None:
        return ("nll", "brier", "ece", "adaptive_ece")
    density = ("nll",) if likelihood.has_density else ()
    mixture = ("crps", "fair_crps", "calibration_error") if likelihood.has_mixture else ()
    return (*density, "rmse", "mae", *mixture)


UNCERTAINTIES = {True: ("entropy", "mutual_information"), False: ("std", "epistemic_std")}
"""Names of the uncertainties of `uncertainties_of`, for classes and for numbers."""

INTERVALS = (0.5, 0.9, 0.95)
"""Levels of the central intervals for coverage and width."""


class _Columns:
    """Numbers of every example of the job."""

    def __init__(self):
        self._seen: list[Tensor] = []

    def see(self, examples: Tensor, columns: dict[str, Tensor]) -> None:
        """Add columns [B] of examples that no other rank adds. Local."""
        parts = [examples.to(next(iter(columns.values())).device), *columns.values()]
        self._seen.append(torch.stack([part.double() for part in parts], dim=1).cpu())

    def gather(self, comm: GridComm, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the columns [N] of all examples, in their order, on the CPU. Collective over the world."""
        mine = torch.cat([torch.zeros(0, 1 + len(names), dtype=torch.float64), *self._seen])
        for axis in ("sample", "data"):
            mine = comm.gather(mine.to(comm.device), axis)
        mine = mine.cpu()
        ordered = mine[mine[:, 0].argsort()]
        return dict(zip(names, ordered[:, 1:].unbind(1)))


class _Scores:
    """Accumulates the metrics of a data set."""

    columns: tuple[str, ...]

    def __init__(self, likelihood: Likelihood, dataset: ShardDataset, num_samples: int):
        self.metrics: dict[str, Metric] = {}
        self._columns = _Columns()

    def _add(self, device: torch.device, **metrics: Metric) -> None:
        self.metrics |= {name: metric.to(device) for name, metric in metrics.items()}

    def see(self, examples: Tensor, predictive: Predictive, y: Tensor) -> None:
        """Add examples that no other rank adds. Local."""
        raise NotImplementedError

    def combine(self, comm: GridComm) -> None:
        """Sum the states of the metrics, gather the columns. Collective over the world."""
        comm.sum_([state for metric in self.metrics.values() for state in metric.states.values()])
        self.gathered = self._columns.gather(comm, self.columns)

    def compute(self) -> dict[str, float]:
        return {name: metric.compute().item() for name, metric in self.metrics.items()}

    def curves(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def uncertainties(self) -> dict[str, Tensor]:
        return {name: self.gathered[name] for name in self.columns if name in sum(UNCERTAINTIES.values(), ())}


class _ClassScores(_Scores):
    columns = (*UNCERTAINTIES[True], "confidence", "correct")

    def __init__(self, likelihood: Likelihood, dataset: ShardDataset, num_samples: int):
        super().__init__(likelihood, dataset, num_samples)
        nll, ece = NegativeLogLikelihood(), ExpectedCalibrationError()
        self._add(dataset.device, accuracy=Accuracy(), nll=nll, brier=BrierScore(), ece=ece)

    def see(self, examples: Tensor, predictive: ClassPredictive, y: Tensor) -> None:
        for metric in self.metrics.values():
            metric.update(predictive.probabilities, y)
        confidence, said = predictive.probabilities.max(1)
        columns = {"confidence": confidence, "correct": said == y}
        self._columns.see(examples, uncertainties_of(predictive) | columns)

    def compute(self) -> dict[str, float]:
        adaptive = adaptive_calibration_error(self.gathered["confidence"], self.gathered["correct"])
        return super().compute() | {"adaptive_ece": adaptive}

    def curves(self) -> dict[str, Any]:
        return {"reliability": self.metrics["ece"].curve()}


class _ValueScores(_Scores):
    columns = UNCERTAINTIES[False]

    def __init__(self, likelihood: Likelihood, dataset: ShardDataset, num_samples: int):
        super().__init__(likelihood, dataset, num_samples)
        self._unit = dataset.target_scale and dataset.target_scale[1]
        self._names = dataset.manifest.arrays["y"].channels
        self._num_samples = num_samples
        weights = dataset.manifest.target_weights
        weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        count = likelihood.num_targets
        means = {name: ChannelMean(count, weights) for name in ("mae", "crps", "fair_crps")}
        roots = {name: ChannelMean(count, weights, is_root=True) for name in ("rmse", "spread")}
        widths = {_percent("width", level): ChannelMean(count, weights) for level in INTERVALS}
        nll = {"nll": NegativeLogLikelihood()} if likelihood.has_density else {}
        self._add(dataset.device, **roots, **means, **nll, **widths, pit=PitHistogram(weights))
        self._has_mixture = likelihood.has_mixture

    def see(self, examples: Tensor, predictive: ValuePredictive, y: Tensor) -> None:
        metrics, mixture, y = self.metrics, predictive.mixture, y.double()
        error = predictive.mean - y
        metrics["rmse"].update(error.square())
        metrics["mae"].update(error.abs())
        # The variance that the squared error of the mean has if y is like one more sample (Fortin et al., 2014)
        count = self._num_samples
        factor = (count + 1) / (count - 1) if count > 1 else 0.0
        metrics["spread"].update(predictive.aleatoric_variance + factor * predictive.epistemic_variance)
        if predictive.log_prob is not None:
            metrics["nll"].update(predictive.log_prob)
        if mixture is not None:
            for name, score in zip(("crps", "fair_crps"), mixture.crps(y)):
                metrics[name].update(score)
            metrics["pit"].update(*mixture.pit(y))
            for level in INTERVALS:
                low, high = (mixture.quantile(end) for end in ((1 - level) / 2, (1 + level) / 2))
                metrics[_percent("width", level)].update(high - low)
        self._columns.see(examples, uncertainties_of(predictive, self._unit))

    def compute(self) -> dict[str, float]:
        values = super().compute()
        values["spread_skill"] = values.pop("spread") / values["rmse"] if values["rmse"] else math.nan
        pit = self.metrics["pit"]
        values["calibration_error"] = values.pop("pit")
        values |= {_percent("coverage", level): pit.coverage(level) for level in INTERVALS}
        return {name: value for name, value in values.items() if math.isfinite(value) or name == "nll"}

    def curves(self) -> dict[str, Any]:
        means = {n: metric.by_channel() for n, metric in self.metrics.items() if isinstance(metric, ChannelMean)}
        spread = means.pop("spread")
        means["spread_skill"] = [s / r if r else math.nan for s, r in zip(spread, means["rmse"])]
        means = {n: values for n, values in means.items() if all(map(math.isfinite, values))}
        names = list(self._names) or [str(number) for number in range(len(spread))]
        pit = {"pit": self.metrics["pit"].curve()} if self._has_mixture else {}
        return {**pit, "channels": {"name": names, **means}}


def _percent(name: str, level: float) -> str:
    return f"{name}_{100 * level:.0f}"
