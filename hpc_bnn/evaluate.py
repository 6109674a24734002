"""The predictive of the whole ensemble, and its metrics (floor 6)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from .comm import GridComm
from .data import ShardDataset
from .likelihoods import Categorical
from .metrics import classification_metrics
from .noise import Stream, keyed_generator
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

    def keyed(sample: int) -> torch.Generator:
        return keyed_generator(seed, Stream.PREDICTION, 0, sample, x.device)

    posterior.check_num_samples(num_samples)
    with posterior.evaluating():
        for sample in comm.grid.local_samples(num_samples):
            posterior.draw_(sample, keyed)
            for part, row in zip(x.split(batch_size), sums.split(batch_size)):
                p = likelihood.probabilities(posterior.module(part).double())
                row += torch.cat([p, p.square(), torch.special.entr(p).sum(-1, keepdim=True)], dim=-1)
    comm.sum_(sums, "sample")
    mean, square, entropy = (sums / num_samples).split([num_classes, num_classes, 1], dim=-1)
    return ClassPredictive(mean, (square - mean.square()).clamp_min(0).sqrt(), entropy.squeeze(-1))


def evaluate_classes(
    posterior: Posterior,
    likelihood: Categorical,
    comm: GridComm,
    dataset: ShardDataset,
    *,
    num_samples: int,
    seed: int = 0,
) -> tuple[dict[str, float], ClassPredictive, slice]:
    """Evaluate a data set: each data group its part of the examples, each sample group all samples.

    Collective over the world.

    Returns
    -------
    metrics : dict of str to float
        Of the whole data set; the same on all ranks.
    predictive : ClassPredictive
        Of this rank's examples.
    part : slice
        Which examples of the data set those are.
    """
    part = comm.grid.local_examples(len(dataset))
    x, y = dataset.fetch(part)
    predictive = predict_classes(posterior, likelihood, comm, x, num_samples=num_samples, seed=seed)
    metrics = classification_metrics(likelihood.num_classes, x.device)
    for metric in metrics.values():
        if len(y):
            metric.update(predictive.probabilities, y)
    return compute_over_data_axis(metrics, comm), predictive, part


def compute_over_data_axis(metrics: dict[str, Metric], comm: GridComm) -> dict[str, float]:
    """Sum the states of metrics over the data axis, then compute. Collective over ``data_comm``."""
    states = [state for metric in metrics.values() for state in metric.metric_state.values()]
    assert all(isinstance(state, Tensor) for state in states), "only states that are sums can be reduced"
    comm.sum_(states, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rank without examples has no update of its own
        return {name: metric.compute().item() for name, metric in metrics.items()}
