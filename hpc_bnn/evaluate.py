"""The predictive of the whole ensemble, and its metrics (floor 6)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from .comm import GridComm
from .data import ShardDataset
from .likelihoods import Categorical, Likelihood
from .metrics import classification_metrics, regression_metrics
from .noise import Stream, keyed_generator
from .objectives import LogMeanExp, Moments
from .posteriors import Posterior


@dataclass(frozen=True)
class ClassPredictive:
    """Predictive of some examples over all samples of the job; B examples, C classes."""

    probabilities: Tensor
    """[B, C] mean over samples of the class probabilities."""
    std: Tensor
    """[B, C] standard deviation over samples of the class probabilities."""
    expected_entropy: Tensor
    """[B] mean over samples of the entropy (nats): the aleatoric part."""

    @property
    def entropy(self) -> Tensor:
        """[B] entropy of the mean probabilities (nats): the total uncertainty."""
        return torch.special.entr(self.probabilities).sum(-1)

    @property
    def mutual_information(self) -> Tensor:
        """[B] entropy less expected entropy (nats): the epistemic part (Houlsby et al., 2011)."""
        return (self.entropy - self.expected_entropy).clamp_min(0)


@dataclass(frozen=True)
class ValuePredictive:
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
        )


Predictive = ClassPredictive | ValuePredictive

BLOCK_BYTES = 256 * 2**20
"""Bytes of inputs that `evaluate_dataset` reads at once on a rank."""


def _member_outputs(
    posterior: Posterior, comm: GridComm, x: Tensor, num_samples: int, seed: int, batch_size: int
) -> Iterator[tuple[range, Tensor]]:
    """Yield (samples, outputs [c, B, ...] in float64) for the samples of this rank, one by one. Local.

    A rank without samples (fewer than ranks of the sample axis) yields once, with c = 0: it learns the shape.
    """

    def keyed(sample: int) -> torch.Generator:
        return keyed_generator(seed, Stream.PREDICTION, 0, sample, x.device)

    posterior.check_num_samples(num_samples)
    with posterior.evaluating():
        mine = comm.grid.local_samples(num_samples)
        for sample in mine or range(1):
            posterior.draw_(sample, keyed)
            outputs = torch.cat([posterior.module(part).double() for part in x.split(batch_size)])
            samples = range(sample, sample + min(len(mine), 1))
            yield samples, outputs[None][: len(samples)]


@torch.no_grad()
def predict_classes(
    posterior: Posterior,
    likelihood: Categorical,
    comm: GridComm,
    x: Tensor,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 1024,
) -> ClassPredictive:
    """Return the predictive of this rank's examples over the samples of all ranks of its sample group.

    Collective over ``sample_comm``: one sum of [B, 2 C + 1].

    Parameters
    ----------
    x : Tensor
        [B, ...] inputs; the same on all ranks of a sample group.
    num_samples : int
        Samples in the whole job, any number; the same samples on every grid.
    seed : int
        Key of the samples.
    batch_size : int
        Examples per forward pass on this rank.
    """
    num_classes = likelihood.num_classes
    # p, p^2, entropy; in float64, because the variance is a small difference
    sums = torch.zeros(len(x), 2 * num_classes + 1, dtype=torch.float64, device=x.device)
    for _, members in _member_outputs(posterior, comm, x, num_samples, seed, batch_size):
        for outputs in members:
            p = likelihood.probabilities(outputs)
            sums += torch.cat([p, p.square(), torch.special.entr(p).sum(-1, keepdim=True)], dim=-1)
    comm.sum_(sums, "sample")
    mean, square, entropy = (sums / num_samples).split([num_classes, num_classes, 1], dim=-1)
    return ClassPredictive(mean, (square - mean.square()).clamp_min(0).sqrt(), entropy.squeeze(-1))


@torch.no_grad()
def predict_values(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int,
    seed: int = 0,
    batch_size: int = 1024,
) -> ValuePredictive:
    """Return the predictive of this rank's examples over the samples of all ranks of its sample group.

    Collective over ``sample_comm``: two sums, of 2 and 1 numbers per target; with targets y a maximum and a sum of
    B numbers more.

    Parameters
    ----------
    x, y : Tensor
        [B, ...] inputs, and targets where their log-density is wanted; the same on all ranks of a sample group.
    num_samples, seed, batch_size
        As for `predict_classes`.
    """
    local_samples = comm.grid.local_samples(num_samples)
    moments, density = (kind(x, local_samples, num_samples) for kind in (Moments, LogMeanExp))
    has_density = y is not None and likelihood.has_density
    for samples, members in _member_outputs(posterior, comm, x, num_samples, seed, batch_size):
        form, outputs = (len(samples), len(x)), members.flatten(0, 1)
        mean_and_variance = torch.stack([likelihood.mean(outputs), likelihood.variance(outputs)], dim=1)
        moments.see(samples, mean_and_variance.unflatten(0, form))
        if has_density:
            targets = y.expand(len(samples), *y.shape).flatten(0, 1)
            density.see(samples, likelihood.log_prob(outputs, targets).unflatten(0, form))
    moments.combine(comm)
    if has_density:
        density.combine(comm)
    return ValuePredictive(
        moments.mean, moments.aleatoric, moments.epistemic, density.log_mean if has_density else None
    )


def evaluate_dataset(
    posterior: Posterior,
    likelihood: Likelihood,
    comm: GridComm,
    dataset: ShardDataset,
    *,
    num_samples: int,
    seed: int = 0,
    see: Callable[[Tensor, Predictive, Tensor], None] | None = None,
) -> dict[str, float]:
    """Evaluate a data set: each data group its part of the examples, each sample group all samples.

    Collective over the world. Examples are read in blocks of bounded size; every block is one pass over the samples.

    Parameters
    ----------
    dataset : ShardDataset
        What is evaluated.
    num_samples, seed
        As for `predict_classes`.
    see : callable, optional
        Called with the global indices [B], the predictive, and the targets of every block of this rank; numbers in
        units of y.

    Returns
    -------
    metrics : dict of str to float
        Of the whole data set; the same on all ranks.
    """
    is_class = likelihood.num_classes is not None
    if is_class:
        metrics = classification_metrics(likelihood.num_classes, dataset.device)
    else:
        metrics = regression_metrics(likelihood.has_density, dataset.device)
    part = torch.arange(len(dataset))[comm.grid.local_examples(len(dataset))]
    block_size = max(1, BLOCK_BYTES // (math.prod(dataset.in_shape) * dataset.dtype.itemsize))
    for examples in part.split(block_size) if len(part) else ():
        x, y = dataset.fetch(examples)
        if is_class:
            predictive = predict_classes(posterior, likelihood, comm, x, num_samples=num_samples, seed=seed)
            updates = dict.fromkeys(metrics, (predictive.probabilities, y))
        else:
            predictive = predict_values(posterior, likelihood, comm, x, y, num_samples=num_samples, seed=seed)
            if dataset.target_scale:
                predictive = predictive.in_units(*dataset.target_scale)
            y = likelihood.targets(dataset.in_units(y), predictive.mean)
            error = (predictive.mean.flatten(), y.flatten())
            updates = dict.fromkeys(metrics, error) | {"nll": (predictive.log_prob,)}
        for name, metric in metrics.items():
            metric.update(*updates[name])
        if see:
            see(examples, predictive, y)
    return compute_over_data_axis(metrics, comm)


def compute_over_data_axis(metrics: dict[str, Metric], comm: GridComm) -> dict[str, float]:
    """Sum the states of metrics over the data axis, then compute. Collective over ``data_comm``."""
    states = [state for metric in metrics.values() for state in metric.metric_state.values()]
    assert all(isinstance(state, Tensor) for state in states), "only states that are sums can be reduced"
    comm.sum_(states, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank without examples has no update of its own
        return {name: metric.compute().item() for name, metric in metrics.items()}
