"""Which feature goes with which: the one table that config, constructors and docs read. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from .errors import ConfigError, Fault


@dataclass(frozen=True)
class Capabilities:
    """What a family of posteriors is and allows."""

    kl: Literal["none", "closed form", "Monte Carlo", "point"] = "none"
    """How its KL is had. point: no KL but -log prior of the points (nats)."""
    has_random_weights: bool = True
    owner: Literal["all", "sample"] = "all"
    """sample: its slots are rows that belong to samples, so that ranks of other samples hold other numbers."""
    is_separable: bool = False
    """Whether `sample_` and `pull_back_` may get a block of weights."""
    has_estimators: bool = False
    """Whether it has the slots ``loc`` and ``log_scale`` and nothing else, so that noise per example is exact."""

    def but(self, **changes) -> Capabilities:
        """Return these with some changed."""
        return replace(self, **changes)


FAMILIES = {
    "mean_field": Capabilities("closed form", is_separable=True, has_estimators=True),
    "low_rank": Capabilities("closed form"),
    "mc_dropout": Capabilities("closed form", has_random_weights=False, is_separable=True),
    "ensemble": Capabilities("point", owner="sample"),
    "deterministic": Capabilities(has_random_weights=False, is_separable=True),
}
"""Families that a config can name, with a prior whose KL has a closed form."""


@dataclass(frozen=True)
class Features:
    """What a run asks of its posterior, as far as it is known where it is checked."""

    couples: bool = False
    """Whether the objective couples the samples."""
    overlap: bool = False
    can_overlap: bool = True
    """Whether sums go on while the ranks compute, with the communication library."""
    sharded: bool = False
    compression: bool = False
    estimator: str = "reparameterisation"
    antithetic: bool = False
    batch_norm: bool = False
    """Whether the module has BatchNorm layers in training mode."""
    batched: bool = False
    """Whether samples are evaluated several at once."""
    micro_batches: bool = False
    data_axis: bool = False
    """Whether several ranks have examples."""
    counts_ids: bool = False
    """Whether an embedding divides gradients by how often the batch has an id."""
    bounds_norms: bool = False
    """Whether an embedding whose weights are points rescales the rows that the batch has."""


class Refusal(NamedTuple):
    """Two things that do not go together."""

    field: str
    applies: Callable[[Capabilities, Features], bool]
    reason: str
    remedy: str


_NOISY = "noise per example"
_ONE_GROUP = "Leave it out, or make <grid.sample_size> the number of ranks"
TABLE = (
    Refusal("objective.name", lambda c, f: f.couples and c.owner == "sample",
            "the members of an ensemble train alone", "Use elbo, or another family"),
    Refusal("posterior.estimator", lambda c, f: _is_noisy(f) and not c.has_estimators,
            f"{_NOISY} is exact for the mean-field family only", "Use reparameterisation, or mean_field"),
    Refusal("posterior.estimator", lambda c, f: _is_noisy(f) and c.has_estimators and c.kl != "closed form",
            f"{_NOISY} has no single draw of the weights for a Monte Carlo KL",
            "Use reparameterisation, or a gaussian or laplace prior"),
    Refusal("posterior.estimator", lambda c, f: _is_noisy(f) and f.antithetic,
            f"{_NOISY} has no mirrored pairs", "Use reparameterisation, or set antithetic to false"),
    Refusal("model", lambda c, f: f.batch_norm and c.owner == "sample",
            "members would share the running statistics of BatchNorm", "Use GroupNorm or LayerNorm in an ensemble"),
    Refusal("optimizer.sharded", lambda c, f: f.sharded and c.owner == "sample",
            "an ensemble has its members, and their optimizer states, spread over the sample axis already", "Leave it out"),
    Refusal("grid.overlap", lambda c, f: f.overlap and f.sharded,
            "a sharded optimizer sums by shares, not by blocks", "Leave one of the two out"),
    Refusal("grid.overlap", lambda c, f: f.overlap and not f.can_overlap,
            "MPI makes no progress with a sum while the ranks compute", "Leave it out, or use <backend> horovod or torch"),
    Refusal("grid.overlap", lambda c, f: f.overlap and f.compression,
            "compressed sums are made in shares, one after another", "Leave one of the two out"),
    Refusal("grid.overlap", lambda c, f: f.overlap and not c.is_separable,
            "the weights of this family cannot be divided into blocks", "Leave it out, or use mean_field"),
    Refusal("grid.overlap", lambda c, f: f.overlap and c.kl == "Monte Carlo",
            "a Monte Carlo KL adds to all weights after the backward pass", "Leave it out, or use a gaussian or laplace prior"),
    Refusal("grid.overlap", lambda c, f: f.overlap and _is_noisy(f),
            f"{_NOISY} folds its gradients in after the backward pass", "Leave it out, or use reparameterisation"),
    Refusal("grid.overlap", lambda c, f: f.overlap and f.batch_norm,
            "BatchNorm makes sums of its own in the backward pass", "Leave it out, or use GroupNorm or LayerNorm"),
    Refusal("chunk_size", lambda c, f: f.batched and _is_noisy(f),
            f"{_NOISY} evaluates samples one after another", "Use chunk_size 1"),
    Refusal("chunk_size", lambda c, f: f.batched and f.batch_norm,
            "BatchNorm in training mode takes its statistics of one sample", "Use chunk_size 1"),
    Refusal("micro_batch_size", lambda c, f: f.micro_batches and f.batch_norm,
            "BatchNorm takes its statistics of the whole batch", "Leave it out, or use GroupNorm or LayerNorm"),
    Refusal("micro_batch_size", lambda c, f: f.micro_batches and f.counts_ids,
            "scale_grad_by_freq of an embedding counts ids in the whole batch", "Leave one of the two out"),
    Refusal("model", lambda c, f: f.data_axis and f.counts_ids,
            "scale_grad_by_freq of an embedding counts ids in the whole batch, and ranks have parts of it", _ONE_GROUP),
    Refusal("model", lambda c, f: f.data_axis and f.bounds_norms,
            "max_norm of an embedding rescales its rows on the ranks whose examples have them, and replicas drift", _ONE_GROUP),
)  # fmt: skip


def _is_noisy(features: Features) -> bool:
    return features.estimator != "reparameterisation"


def refusals(capabilities: Capabilities, features: Features) -> list[Refusal]:
    """Return what does not go together. Local."""
    return [refusal for refusal in TABLE if refusal.applies(capabilities, features)]


def check_features(
    capabilities: Capabilities, features: Features, value_of: Callable[[str], object] = lambda field: True
) -> None:
    """Raise `ConfigError` with everything that does not go together; ``value_of(field)`` is for the messages. Local."""
    faults = [Fault(r.field, value_of(r.field), r.reason, r.remedy) for r in refusals(capabilities, features)]
    if faults:
        raise ConfigError(*faults)
