"""The predictive of a data set, and its metrics."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..data import Source
from ..errors import ConfigError, DataError, Fault
from ..likelihoods import Likelihood
from ..posteriors import Posterior
from ..trees import rows_of
from .groups import ALL, Climatology, Group, check_references, persistence
from .metrics import (
    ChannelMean,
    ClassOverlaps,
    ClasswiseCalibrationError,
    ExampleMean,
    ExpectedCalibrationError,
    Metric,
    PitHistogram,
    adaptive_calibration_error,
    area_under_risk_coverage,
    detection,
    risk_coverage,
)
from .predictive import (
    ClassPredictive,
    Predictive,
    Share,
    ValuePredictive,
    examples_of,
    is_of_classes,
    predict_classes,
    predict_values,
)

if TYPE_CHECKING:
    from .calibration import Calibration

BLOCK_BYTES = 128 * 2**20
"""Bytes of inputs, and of outputs of all samples, that a rank processes at once."""

RISK_POINTS = 50
"""Points of the risk-coverage curve that is drawn, at most."""

INTERVALS = {50: 0.5, 90: 0.9, 95: 0.95}
"""Levels of the central intervals for coverage and width, by their names in percent."""


def block_size(likelihood: Likelihood, dataset: Source, num_samples: int, keep_members: bool) -> int:
    """Return the number of examples of a data set that a rank processes at once. Local."""
    num_bytes = dataset.manifest.num_inputs * dataset.dtype.itemsize
    places = math.prod(dataset.manifest.places)
    if keep_members:
        num_bytes = max(num_bytes, 8 * num_samples * likelihood.num_outputs * places)
    elif is_of_classes(likelihood):
        num_bytes = max(num_bytes, 8 * (2 * likelihood.num_classes + 1) * places)  # what is summed over the samples
    return max(1, BLOCK_BYTES // num_bytes)


@dataclass(frozen=True)
class Block:
    """Some examples of a data set and their predictive; numbers in units of y."""

    examples: Tensor
    """[B] their global indices."""
    predictive: Predictive
    y: Tensor
    """[B, ...] their targets; without ``with_targets`` as `Source.fetch` delivers them."""
    x: Any = None
    """Their inputs, as `Source.fetch` delivers them."""
    weights: Tensor | None = None
    """[B] their weights, where they have some."""


def predict_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    num_samples: int,
    keep_members: bool = False,
    keep_log_probs: bool = False,
    keep_share: bool = False,
    with_targets: bool = True,
    examples: Tensor | None = None,
    **options: Any,
) -> Iterator[Block]:
    """Yield the predictive of a data set in blocks of bounded size: each data group takes its range of the examples.

    Collective over ``sample_comm``; data groups may have different numbers of blocks. Each block is one pass over
    the samples. ``examples`` [n] are those to predict, all by default; ``keep_log_probs`` and ``keep_share`` are for numbers (`predict_values`).
    ``**options`` are ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.
    """
    wanted = torch.arange(len(dataset)) if examples is None else examples
    mine = wanted[comm.grid.local_examples(len(wanted))]
    size = block_size(likelihood, dataset, num_samples, keep_members or keep_share)
    options |= {"num_samples": num_samples, "keep_members": keep_members}
    for numbers in mine.split(size) if len(mine) else ():
        x, y, *weights = dataset.fetch(numbers)
        if is_of_classes(likelihood):
            predictive = predict_classes(posterior, likelihood, comm, x, **options)
        else:
            options |= {"keep_log_probs": keep_log_probs, "keep_share": keep_share}
            fits = with_targets and bool(likelihood.fits(y).all())  # else the caller says it, on all ranks
            predictive = predict_values(posterior, likelihood, comm, x, y if fits else None, **options)
            if dataset.target_scale:
                predictive = predictive.in_units(*dataset.target_scale, likelihood.present(y) if with_targets else None)
            if with_targets:
                y = likelihood.targets(dataset.in_units(y), predictive.mean)
        yield Block(numbers, predictive, y, x, *weights)


# --- evaluation ------------------------------------------------------------------------------------------


def check_classes(likelihood: Likelihood, dataset: Source) -> None:
    """Raise `DataError` where the targets of a data set are probabilities of classes, which a loss takes alone. Local."""
    dtype = dataset.manifest.arrays["y"].dtype
    if is_of_classes(likelihood) and "float" in dtype:
        rule = f"the targets of {dataset.manifest.name} are {dtype}: probabilities of classes"
        raise DataError(f"{rule}, and metrics compare with one class for each example. Give y.argmax(1)")


See = Callable[[Tensor, Any, Tensor], None]
"""``see(examples [B], predictive, y [B, ...])``: what becomes of a block of predictions."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a posterior on a data set; the same on all ranks."""

    metrics: dict[str, float]
    """Metrics of the whole data set, in units of y."""
    curves: dict[str, Any]
    """Data of the plots: "risk_coverage"; for classes "reliability", of fields "overlap", too; for numbers "pit", and "channels" with
    their metrics."""
    uncertainties: dict[str, Tensor]
    """[N] uncertainties of each example, in the order of the data set: see `uncertainties_of`; and "weight", where they have one."""
    groups: dict[str, Any]
    """Of each grouping its labels ("name") and, by metric, a number of each group ("metrics"), None where it is not finite; of
    numbers also those of each channel ("channels"), None where the group has none, and the histogram of the PIT ("pit")."""


def evaluate_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    see: See | None = None,
    groups: Sequence[Group] = (),
    references: Sequence[str] = (),
    train_set: Source | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a data set: each data group takes its range of the examples, each sample group takes all samples.

    Collective over the world; `DataError` on all ranks where a target lies outside the support of the likelihood, or all are
    missing or have the weight 0. A missing target adds nothing to any metric, and is not counted; the nll is a mean over examples
    that have one. Where examples have weights, metrics are weighted means.
    Examples are read in blocks of bounded size; every block is one pass over the samples.
    The ranks of a sample group divide the work on its scores: of numbers each has the members of all samples for its share of the
    targets, and none has all. All ranks then sum sums and counts over the world, never means.

    Parameters
    ----------
    see : callable, optional
        Called with the global indices [B], the predictive, and the targets of every block of this rank; numbers in
        units of y, with `ValuePredictive.share` and without `mixture` and `members`.
    groups : sequence of Group
        Parts of the data set that have metrics of their own (`find_groups`).
    references : sequence of {"persistence", "climatology"}
        Forecasts of numbers to compare with: their RMSE, CRPS, and the skill ``1 - ours / theirs``. The CRPS of persistence, which
        knows no doubt, is its absolute error. The climatology is the normal distribution of each target in ``train_set``.
    calibration : Calibration, optional
        Evaluate the predictive after it (`Calibration.applied`), and the coverage and size of its sets or intervals.
    **options
        ``num_samples``, ``seed``, ``batch_size`` and ``chunk_size`` of `predict_classes`.
    """
    climatology = None
    check_references(references)
    check_classes(likelihood, dataset)
    if references and is_of_classes(likelihood):
        rule = "forecasts of numbers are compared with these, and the targets are classes"
        raise ConfigError(Fault("--references", " ".join(references), rule, "Leave it out"))
    if "climatology" in references:
        climatology = Climatology.of(comm, train_set or dataset)
    options |= {"groups": groups, "references": references, "climatology": climatology, "calibration": calibration}
    scores = score_dataset(posterior, likelihood, comm, dataset, see=see, **options)
    with comm.agree("evaluating"):
        if scores.fault is not None:
            raise scores.fault
    scores.combine(comm)
    if not scores.has_targets:
        rule = f"all targets of this split of {dataset.manifest.name} are missing or have the weight 0"
        raise DataError(f"{rule}: there is nothing to evaluate")
    uncertainties = {name: scores.gathered[name] for name in UNCERTAINTIES[is_of_classes(likelihood)]}
    if dataset.manifest.has_weights:
        uncertainties["weight"] = scores.gathered["example_weight"]
    return Evaluation(scores.compute(), scores.curves(), uncertainties, scores.by_group())


def score_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    num_samples: int,
    see: See | None = None,
    groups: Sequence[Group] = (),
    references: Sequence[str] = (),
    climatology: Climatology | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> _Scores:
    """Return this rank's scores, before `evaluate_dataset` combines those of all. Collective over ``sample_comm``."""
    kind = _ClassScores if is_of_classes(likelihood) else _ValueScores
    scores = kind(likelihood, dataset, num_samples, groups, references, climatology, calibration)
    options |= {"num_samples": num_samples, "keep_share": likelihood.has_mixture}
    for block in predict_dataset(posterior, likelihood, comm, dataset, **options):
        misfits = ~likelihood.fits(block.y)
        if misfits.any():  # the ranks of a sample group still have blocks to predict together
            scores.fault = likelihood.fault_of(block.y[misfits][0].item())
            continue
        predictive, ends = block.predictive, None
        if calibration is not None and isinstance(predictive, ValuePredictive):  # all ranks: each has a share
            y, weights = _targets_of(block, likelihood, slice(None))
            ends = calibration.interval_of(predictive)
            predictive = calibration.applied(predictive, y.double(), None if weights is None else weights > 0)
        mine = comm.grid.share(len(block.examples), "sample")
        if mine:
            span = slice(mine.start, mine.stop)
            y, weights = _targets_of(block, likelihood, span)
            forecasts = {}
            if "persistence" in references:
                forecasts["persistence"] = persistence(dataset, rows_of(block.x, span), y.double())
            if climatology is not None:
                forecasts["climatology"] = climatology.mean.expand_as(y)
            of_part = examples_of(predictive, mine.start, mine.stop)
            of_examples = None if block.weights is None else block.weights[span]
            interval = None if ends is None else (ends[0][span], ends[1][span])
            scores.add(_Part(block.examples[span], of_part, y, weights, of_examples, forecasts, interval))
        share = predictive.share if isinstance(predictive, ValuePredictive) else None
        if share is not None and share.shares.span:
            rows = share.shares.examples
            scores.add_share(block.examples[rows], share, *_targets_of(block, likelihood, rows))
        if see:
            see(block.examples, block.predictive, block.y)
    return scores


def _targets_of(block: Block, likelihood: Likelihood, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return targets [b, ...] of some examples of a block, 0 where one is missing, and their weights, None for all 1. Local."""
    y = block.y[rows]
    present, weights = likelihood.present(y), None
    if block.weights is not None:
        weights = block.weights[rows].double().view(-1, *(1,) * (y.ndim - 1)).expand(y.shape)
    if present is not None:
        y = torch.where(present, y, 0)
        weights = present.double() if weights is None else present * weights
    return y, weights


UNCERTAINTIES = {True: ("entropy", "mutual_information"), False: ("std", "epistemic_std")}
"""Names of the uncertainties of `uncertainties_of`, for classes and for numbers."""


def uncertainties_of(predictive: Predictive, unit: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Return scalar uncertainties [B] of examples: a larger value means less certainty. Local.

    For classes entropy and mutual information (nats), of a field their means over its points; for numbers the means over
    targets of the total and the epistemic standard deviation, both divided by ``unit`` first, so that targets of different
    units can be averaged.
    """
    if isinstance(predictive, ClassPredictive):
        parts = {"entropy": predictive.entropy, "mutual_information": predictive.mutual_information}
        return {name: part.flatten(1).mean(1) if part.ndim > 1 else part for name, part in parts.items()}
    parts = {"std": predictive.variance, "epistemic_std": predictive.epistemic_variance}
    return {name: (variance.sqrt() / unit).flatten(1).mean(1) for name, variance in parts.items()}


def uncertainties_of_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: Source,
    *,
    see: See | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Return `uncertainties_of` all examples of a data set, [N], and their "weight" where they have one; its targets are not used.

    Collective over the world. ``see``, ``calibration`` and ``**options`` as for `evaluate_dataset`.
    """
    weight = ("weight",) if dataset.manifest.has_weights else ()
    columns = _Columns((*UNCERTAINTIES[is_of_classes(likelihood)], *weight))
    for block in predict_dataset(posterior, likelihood, comm, dataset, with_targets=False, **options):
        if see:
            see(block.examples, block.predictive, block.y)
        if comm.grid.is_first("sample"):
            predictive = block.predictive if calibration is None else calibration.applied(block.predictive)
            found = uncertainties_of(predictive, _unit(dataset))
            columns.add(block.examples, found if block.weights is None else found | {"weight": block.weights})
    return columns.gather(comm)


def _unit(dataset: Source) -> Tensor | float:
    return dataset.target_scale[1] if dataset.target_scale else 1.0


def out_of_distribution_metrics(inside: dict[str, Tensor], outside: dict[str, Tensor]) -> dict[str, float]:
    """Return how well each uncertainty detects out-of-distribution examples: ``ood_auroc/``, ``ood_aupr/``, ``ood_fpr95/`` its name.

    Local; `hpc_bnn.predictive.metrics.detection` defines them. An AUROC of 0.5: not at all; of 1: every
    out-of-distribution example is less certain than every one of the data. ``inside`` are `Evaluation.uncertainties`
    [N], ``outside`` [M] those of `uncertainties_of_dataset`.
    """
    weights = [found.get("weight", torch.ones_like(next(iter(found.values())))) for found in (inside, outside)]
    names = [name for name in inside if name != "weight"]
    found = {name: detection(inside[name], outside[name], *weights) for name in names}
    return {f"ood_{metric}/{name}": found[name][metric] for metric in ("auroc", "aupr", "fpr95") for name in names}


def metrics_to_minimise(likelihood: Likelihood, places: tuple[int, ...] = ()) -> tuple[str, ...]:
    """Return the metrics, less is better, that judge checkpoints, for ``places``, the points of a target. Local."""
    if is_of_classes(likelihood):
        return ("nll", "brier", "ece", "classwise_ece", *(() if places else ("adaptive_ece",)), "aurc")
    density = ("nll",) if likelihood.has_density else ()
    mixture = ("crps", "fair_crps", "calibration_error") if likelihood.has_mixture else ()
    return (*density, "rmse", "mae", *mixture, "aurc")


class _Columns:
    """Numbers of every example of the job, by name."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self._mine = [torch.zeros(0, 1 + len(names), dtype=torch.float64)]

    def add(self, examples: Tensor, columns: dict[str, Tensor]) -> None:
        """Add columns [B] of examples that no other rank adds. Local."""
        values = torch.stack([columns[name].double() for name in self.names], dim=1)
        self._mine.append(torch.cat([examples[:, None].to(values), values], dim=1).cpu())

    def gather(self, comm: GridComm) -> dict[str, Tensor]:
        """Return the columns [N] of all examples, in their order, on the CPU. Collective over the world."""
        rows = torch.cat(self._mine).to(comm.device)
        rows = comm.gather(comm.gather(rows, "sample"), "data").cpu()
        ordered = rows[rows[:, 0].argsort()]
        return dict(zip(self.names, ordered[:, 1:].unbind(1)))


@dataclass(frozen=True)
class _Part:
    """Examples that no other rank scores."""

    examples: Tensor
    predictive: Any
    y: Tensor
    weights: Tensor | None
    """Of each target, like y: 0 where it is missing."""
    of_examples: Tensor | None
    """[B] weights of the examples."""
    forecasts: dict[str, Tensor]
    """What others say of the targets."""
    interval: tuple[Tensor, Tensor] | None


class _Scores:
    """Accumulates the metrics of a data set, and of its groups."""

    total_uncertainty: str
    """Name of the uncertainty by which selective prediction abstains."""

    def __init__(
        self, likelihood: Any, dataset: Source, num_samples: int, groups: Sequence[Group], references: Sequence[str],
        climatology: Climatology | None, calibration: Calibration | None,
    ):  # fmt: skip
        self._likelihood, self._dataset, self._num_samples = likelihood, dataset, num_samples
        self._references, self._climatology, self._calibration = references, climatology, calibration
        self._places = dataset.manifest.places
        self.groups = [ALL, *groups]
        self.parts = [self.make_metrics(group) for group in self.groups]
        """Metrics of the whole data set, and of each group."""
        for metric in self.all_metrics():
            metric.sums = metric.sums.to(dataset.device)
        beside = ("example_weight",) if dataset.manifest.has_weights else ()
        self._columns = _Columns((*self.column_names(), "loss", *beside))
        self.fault: DataError | None = None

    def column_names(self) -> tuple[str, ...]:
        raise NotImplementedError

    def make_metrics(self, group: Group) -> dict[str, Metric]:
        raise NotImplementedError

    def all_metrics(self) -> list[Metric]:
        """Return the metrics of the whole and of all groups, in one order on all ranks. Local."""
        return [metric for metrics in self.parts for metric in metrics.values()]

    def add(self, part: _Part) -> None:
        """Add examples that no other rank adds, and what others forecast of them. Local."""
        raise NotImplementedError

    def add_share(self, examples: Tensor, share: Share, y: Tensor, weights: Tensor | None) -> None:
        """Add what the distributions of all samples say of this rank's share of the targets of some examples. Local.

        ``y`` [b, ...] and ``weights``, like y, are of all targets of the examples [b] of which this rank has any.
        """
        raise NotImplementedError

    def update(self, examples: Tensor, values: dict[str, tuple[Tensor, ...]], weights: Tensor | None) -> None:
        """Update the metrics with values [B, ...] by name: a group with its own. Local."""
        for group, metrics in zip(self.groups, self.parts):
            rows = None if group.examples is None else group.examples[examples].nonzero()[:, 0]
            for name, of_metric in values.items():
                if weights is not None:
                    of_examples = weights.flatten(1).amax(1)  # of one that has any target
                    of_metric = (*of_metric, weights if of_metric[0].ndim > 1 else of_examples)
                if rows is not None:
                    of_metric = tuple(value[rows.to(value.device)] for value in of_metric)
                if group.places is not None and of_metric[0].ndim > 2:
                    of_metric = tuple(value.flatten(2)[..., group.places.to(value.device)] for value in of_metric)
                if name in metrics and len(of_metric[0]):
                    metrics[name].update(*of_metric)

    @property
    def has_targets(self) -> bool:
        """Whether any target of the job counts. Local, after `combine`."""
        counts = next(iter(self.parts[0].values())).sums[1]
        return bool(counts.sum() > 0)

    def combine(self, comm: GridComm) -> None:
        """Sum the states of the metrics, gather the columns. Collective over the world."""
        comm.sum_([metric.sums for metric in self.all_metrics()])
        self.gathered = self._columns.gather(comm)

    def add_columns(self, part: _Part, columns: dict[str, Tensor], losses: Tensor, weights: Tensor) -> None:
        """Add columns by name, the loss, and weights: [B], or [B, ...] as the losses, whose mean counts. Local."""
        weight = weights.expand(losses.shape).flatten(1).sum(1)
        whole = weight.clamp_min(torch.finfo(torch.float64).tiny)
        for name, values in (columns | {"loss": losses}).items():
            if values.ndim > 1:  # what does not count may be infinite: the standard deviation of heavy tails
                values = torch.where(weights > 0, values * weights, 0).flatten(1).sum(1) / whole
            columns[name] = values
        columns["weight"] = weight
        columns |= {} if part.of_examples is None else {"example_weight": part.of_examples}
        self._columns.add(part.examples, columns)

    def risk_coverage(self, group: Group = ALL) -> tuple[Tensor, Tensor]:
        rows, found = slice(None) if group.examples is None else group.examples, self.gathered
        weights = found["weight"][rows] if "weight" in found else None
        return risk_coverage(found[self.total_uncertainty][rows], found["loss"][rows], weights)

    def aurc_of(self, group: Group) -> dict[str, float]:
        """Return the "aurc"; nothing of points, nor where no example counts. Local."""
        coverage, risk = self.risk_coverage(group)
        return {"aurc": area_under_risk_coverage(coverage, risk)} if len(risk) and group.places is None else {}

    def compute(self) -> dict[str, float]:
        return self.compute_of(self.parts[0]) | self.aurc_of(ALL)

    def compute_of(self, metrics: dict[str, Any]) -> dict[str, float]:
        return {name: metric.compute().item() for name, metric in metrics.items()}

    def curves(self) -> dict[str, Any]:
        coverage, risk = self.risk_coverage()
        points = torch.arange(1, RISK_POINTS + 1).to(coverage) / RISK_POINTS - 1e-12
        shown = torch.searchsorted(coverage, points).unique()
        return {"risk_coverage": {"coverage": coverage[shown].tolist(), "risk": risk[shown].tolist()}}

    def by_group(self) -> dict[str, Any]:
        """Return the metrics of the groups, by grouping. Local."""
        found = {}
        for grouping, of_grouping in itertools.groupby(range(1, len(self.groups)), lambda n: self.groups[n].grouping):
            numbers = list(of_grouping)
            whole = [self.compute_of(self.parts[n]) | self.aurc_of(self.groups[n]) for n in numbers]
            metrics = {name: list(map(_known, values)) for name, values in _by_name(whole).items()}
            channels = _by_name([self.by_channel(self.parts[n]) for n in numbers])
            labels = [self.groups[n].label for n in numbers]
            found[grouping] = {"name": labels, "metrics": metrics, "channels": channels}
        return found

    def by_channel(self, metrics: dict[str, Any]) -> dict[str, list[float | None]]:
        """Return metrics of which any channel has one, None for those that have none. Local."""
        return {}


class _ClassScores(_Scores):
    """Of a class per example; or of a field of classes, whose points count alike."""

    total_uncertainty = "entropy"

    def column_names(self) -> tuple[str, ...]:
        has_weight = self._likelihood.ignore_index is not None or self._dataset.manifest.has_weights
        beside = () if self._places else ("confidence",)
        return *UNCERTAINTIES[True], *beside, *(("weight",) if has_weight else ())

    def make_metrics(self, group: Group) -> dict[str, Metric]:
        num_classes = self._likelihood.num_classes
        means = {name: ExampleMean() for name in ("accuracy", "nll", "brier")}
        overlaps = {"mean_iou": ClassOverlaps(num_classes)} if self._places else {}
        # One number for each class and bin: of the whole only
        classwise = {"classwise_ece": ClasswiseCalibrationError(num_classes)} if group is ALL else {}
        sets = {name: ExampleMean() for name in ("set_coverage", "set_size") if self._calibration is not None}
        return {**means, "ece": ExpectedCalibrationError(), **classwise, **overlaps, **sets}

    def add(self, part: _Part) -> None:
        predictive, y, sets = part.predictive, part.y.long()[:, None], {}
        if self._calibration is not None:
            in_set = self._calibration.set_of(predictive).double()
            sets = {"set_coverage": (in_set.gather(1, y),), "set_size": (in_set.sum(1, keepdim=True),)}
            predictive = self._calibration.applied(predictive)
        p, columns = predictive.probabilities, uncertainties_of(predictive)
        # [B, 1, ...]: as numbers are, with one channel
        confidence, said = p.max(1, keepdim=True)
        correct, of_truth = said == y, p.gather(1, y)
        nll = -of_truth.clamp_min(torch.finfo(p.dtype).tiny).log()
        # The squared distance of the probabilities from the truth, between 0 and 2
        brier = p.square().sum(1, keepdim=True) - 2 * of_truth + 1
        values = {
            "accuracy": (correct,),
            "nll": (nll,),
            "brier": (brier,),
            "ece": (confidence, correct),
            "classwise_ece": (p, y),
            "mean_iou": (said, y),
            **sets,
        }
        weights = None if part.weights is None else part.weights[:, None]
        self.update(part.examples, values, weights)
        if not self._places:
            columns["confidence"] = confidence[:, 0]
        self.add_columns(part, columns, (~correct).double(), torch.ones_like(of_truth) if weights is None else weights)

    def compute(self) -> dict[str, float]:
        if self._places:
            return super().compute()
        found = self.gathered
        adaptive = adaptive_calibration_error(found["confidence"], 1 - found["loss"], found.get("weight"))
        return super().compute() | {"adaptive_ece": adaptive}

    def curves(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.parts[0]
        names = self._dataset.manifest.details.get("classes") or list(range(self._likelihood.num_classes))
        overlaps = {"overlap": {"class": names, "iou": metrics["mean_iou"].by_class()}} if self._places else {}
        return {"reliability": metrics["ece"].curve(), **overlaps, **super().curves()}


class _ValueScores(_Scores):
    total_uncertainty = "std_in_units"

    def column_names(self) -> tuple[str, ...]:
        return *UNCERTAINTIES[False], self.total_uncertainty, "weight"

    @functools.cached_property
    def _weights(self) -> Tensor:
        given = self._dataset.manifest.target_weights
        return torch.tensor(1.0 if given is None else given, dtype=torch.float64)

    def make_metrics(self, group: Group) -> dict[str, Metric]:
        likelihood, weights = self._likelihood, self._weights
        if group.places is not None:
            weights = weights.expand(likelihood.num_targets, *self._places).flatten(1)[:, group.places]

        def channel_mean(is_root: bool = False) -> ChannelMean:
            return ChannelMean(likelihood.num_targets, weights, is_root)

        roots = {name: channel_mean(is_root=True) for name in ("rmse", "spread")}
        means = {name: channel_mean() for name in ("mae", "crps", "fair_crps")}
        nll = {"nll": ExampleMean()} if likelihood.has_density and group.places is None else {}
        widths = {f"{of}_{name}": channel_mean() for of in ("width", "coverage") for name in INTERVALS}
        theirs = {f"{name}/rmse": channel_mean(is_root=True) for name in self._references}
        theirs |= {f"{name}/crps": channel_mean() for name in self._references}
        ends = ("interval_coverage", "interval_width") if self._calibration is not None else ()
        intervals = {name: channel_mean() for name in ends}
        return {**roots, **means, **nll, **widths, **theirs, **intervals, "pit": PitHistogram(weights)}

    def add(self, part: _Part) -> None:
        predictive, y, weights, intervals = part.predictive, part.y.double(), part.weights, {}

        def counted(value: Tensor) -> Tensor:
            """Return a value that need not be finite where nothing is known: of land in a field of the sea."""
            return value if weights is None else torch.where(weights > 0, value, 0)

        if part.interval is not None:
            low, high = part.interval
            inside, width = (low <= y) & (y <= high), counted((high - low).clamp_min(0))
            intervals = {"interval_coverage": (inside,), "interval_width": (width,)}
        error = predictive.mean - y
        # The variance that the squared error of the mean has if y is like one more sample (Fortin et al., 2014)
        count = self._num_samples
        factor = (count + 1) / (count - 1) if count > 1 else 0.0
        spread = predictive.aleatoric_variance + factor * predictive.epistemic_variance
        values: dict[str, tuple[Tensor, ...]] = {"rmse": (error.square(),), "mae": (error.abs(),), "spread": (spread,)}
        values |= intervals
        if predictive.log_prob is not None:
            values["nll"] = (-predictive.log_prob,)
        for name, forecast in part.forecasts.items():
            error = counted(forecast - y)
            values |= {f"{name}/rmse": (error.square(),), f"{name}/crps": (error.abs(),)}
        if self._climatology is not None:
            values["climatology/crps"] = (counted(self._climatology.crps(y)),)
        self.update(part.examples, values, weights)
        of_targets = self._weights.to(y).expand(y.shape)
        columns = uncertainties_of(predictive, _unit(self._dataset))
        columns[self.total_uncertainty] = predictive.variance.sqrt()  # in the units and weights of the loss
        self.add_columns(part, columns, values["mae"][0], of_targets if weights is None else of_targets * weights)

    def add_share(self, examples: Tensor, share: Share, y: Tensor, weights: Tensor | None) -> None:
        mixture, y, own = share.mixture, y.double(), share.shares.own
        if own.stop - own.start < y.numel():  # others have the rest: it gets the weight 0
            mine = torch.zeros_like(y).flatten()
            mine[own] = 1.0 if weights is None else weights.flatten()[own]
            weights = mine.view_as(y)

        def add(name: str, *values: Tensor) -> None:
            whole = [torch.zeros_like(y).flatten() for _ in values]
            for number, value in zip(whole, values):
                number[own] = value
            self.update(examples, {name: tuple(number.view_as(y) for number in whole)}, weights)

        of_own = y.flatten()[own]
        for name, score in zip(("crps", "fair_crps"), mixture.crps(of_own)):
            add(name, score)
        add("pit", *mixture.pit(of_own))
        for name, level in INTERVALS.items():
            low, high = (mixture.quantile(end) for end in ((1 - level) / 2, (1 + level) / 2))
            add(f"width_{name}", high - low)
            add(f"coverage_{name}", ((low <= of_own) & (of_own <= high)).double())

    def compute_of(self, metrics: dict[str, Any]) -> dict[str, float]:
        values = super().compute_of(metrics)
        values["spread_skill"] = values.pop("spread") / values["rmse"] if values["rmse"] else math.nan
        values["calibration_error"] = values.pop("pit")
        for name, reference in itertools.product(("rmse", "crps"), self._references):
            values[f"{name}_skill/{reference}"] = _skill(values[name], values[f"{reference}/{name}"])
        return {name: value for name, value in values.items() if math.isfinite(value) or name == "nll"}

    def by_channel(self, metrics: dict[str, Any]) -> dict[str, list[float | None]]:
        means = {n: metric.by_channel() for n, metric in metrics.items() if isinstance(metric, ChannelMean)}
        means["spread_skill"] = [s / r if r else math.nan for s, r in zip(means.pop("spread"), means["rmse"])]
        for name, reference in itertools.product(("rmse", "crps"), self._references):
            means[f"{name}_skill/{reference}"] = list(map(_skill, means[name], means[f"{reference}/{name}"]))
        return {name: list(map(_known, v)) for name, v in means.items() if any(map(math.isfinite, v))}

    def by_group(self) -> dict[str, Any]:
        found = super().by_group()
        if self._likelihood.has_mixture:
            parts: list[dict[str, Any]] = self.parts[1:]
            for group, metrics in zip(self.groups[1:], parts):
                curve = metrics["pit"].curve() if metrics["pit"].sums.any() else None  # all its targets are missing
                found[group.grouping].setdefault("pit", []).append(curve)
        return found

    def curves(self) -> dict[str, Any]:
        metrics: dict[str, Any] = self.parts[0]
        names = list(self._dataset.manifest.arrays["y"].channels) or list(map(str, range(self._likelihood.num_targets)))
        counts = metrics["rmse"].sums[1].tolist()  # a channel without a target has no metrics
        names = [name for name, count in zip(names, counts) if count]
        found = self.by_channel(metrics).items()
        means = {name: [v for v, count in zip(values, counts) if count] for name, values in found}
        means = {name: values for name, values in means.items() if None not in values}
        pit = {"pit": metrics["pit"].curve()} if self._likelihood.has_mixture else {}
        return {**pit, "channels": {"name": names, **means}, **super().curves()}


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in {key: 0 for row in rows for key in row}}


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _skill(ours: float, theirs: float) -> float:
    return 1 - ours / theirs if 0 < theirs < math.inf else math.nan
