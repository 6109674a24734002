"""The predictive of one batch over all samples of the job."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from dataclasses import dataclass, fields, replace
from typing import TypeGuard

import torch
from torch import Tensor

from ..comm import GridComm
from ..errors import ConfigError, Fault, RankError, check_kind, count, number
from ..grid import share
from ..likelihoods import Categorical, Likelihood
from ..likelihoods.mixtures import GaussianMixture, Mixture
from ..noise import Key, Stream
from ..posteriors import Posterior
from ..posteriors.sample_loop import SampleLoop
from ..reductions import LogMeanExp, Moments, TargetShares
from ..trees import Inputs, device_of, num_rows, tensors_of
from ..views import SharedView


@dataclass(frozen=True)
class ClassPredictive:
    """Predictive of some examples over all samples of the job; B examples, C classes; "..." are the points of a field."""

    probabilities: Tensor
    """[B, C, ...] mean over samples of the class probabilities."""
    std: Tensor
    """[B, C, ...] standard deviation over samples of the class probabilities."""
    expected_entropy: Tensor
    """[B, ...] mean over samples of the entropy (nats): the aleatoric part."""
    members: Tensor | None = None
    """[B, K, C, ...] class probabilities of each sample, where they were asked for, on the first rank of a sample group."""

    @property
    def entropy(self) -> Tensor:
        """[B, ...] entropy of the mean probabilities (nats): the total uncertainty."""
        return torch.special.entr(self.probabilities).sum(1)

    @property
    def mutual_information(self) -> Tensor:
        """[B, ...] entropy minus expected entropy (nats): the epistemic uncertainty (Houlsby et al., 2011)."""
        return (self.entropy - self.expected_entropy).clamp_min(0)


@dataclass(frozen=True)
class Share:
    """The distributions of all samples, of one rank's share of the targets of some examples."""

    mixture: Mixture
    """Of n targets, [K, n]."""
    shares: TargetShares
    """Which these are."""

    def rescaled(self, factors: Tensor) -> Share:
        """Return the share with the scales of Gaussian components times factors, which broadcast to [B, T, ...]. Local."""
        assert isinstance(self.mixture, GaussianMixture), "others have no scale"
        return replace(self, mixture=self.mixture.rescaled(self.shares.of(factors)))

    def log_probs(self, y: Tensor, present: Tensor | None = None) -> Tensor:
        """Return the log densities [K, B] of y [B, T, ...] by each sample, over the targets that are ``present``; None: all.

        Of Gaussian components. Collective over ``sample_comm``: a sum of K B numbers.
        """
        assert isinstance(self.mixture, GaussianMixture), "others have no scale"
        of_targets = self.mixture.log_densities(self.shares.of(y))
        of_targets = of_targets if present is None else torch.where(self.shares.of(present), of_targets, 0)
        span = self.shares.span
        example = torch.arange(span.start, span.stop, device=y.device) // self.shares.width
        found = of_targets.new_zeros(self.shares.num_samples, len(y)).index_add_(1, example, of_targets)
        self.shares.comm.sum_(found, "sample")
        return found


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
    mixture: Mixture | None = None
    """The samples' distributions of each target, with `members` where the likelihood has them."""
    members: Tensor | None = None
    """[B, K, T, ...] mean of each sample, where they were asked for, on the first rank of a sample group."""
    log_probs: Tensor | None = None
    """[B, K] log p(y | x, w_s) of each sample (nats), where they were asked for, y was given and has a density; on the first
    rank of a sample group."""
    share: Share | None = None
    """The samples' distributions of the targets of this rank, where they were asked for and the likelihood has them."""
    origin: Tensor | None = None
    """[B, T, ...] what the number 0 of the network stands for (units of y): float32 rounds the distance from it. None: 0."""

    def quantile(self, level: float) -> Tensor:
        """Return the quantile [B, T, ...] of a level between 0 and 1, of the mixture over samples (units of y).

        With `share` collective over ``sample_comm``: a gather of one number for each target. Otherwise local, with `mixture`.
        """
        level = level.item() if isinstance(level, Tensor) and level.numel() == 1 else level
        number(lambda value: 0 <= value <= 1, "a number between 0 and 1", "Try 0.05").check("level", level)
        if self.share is not None:
            return self.share.shares.join(self.share.mixture.quantile(level))
        if self.mixture is None:
            rule = "the distributions of the samples were not kept, or are not on this rank, or the likelihood has none"
            raise ConfigError(Fault("quantile", level, rule, "Predict with keep_members=True or keep_share=True"))
        return self.mixture.quantile(level)

    @property
    def variance(self) -> Tensor:
        """[B, T, ...] total variance."""
        return self.aleatoric_variance + self.epistemic_variance

    def in_units(self, mean: Tensor, std: Tensor, present: Tensor | None = None) -> ValuePredictive:
        """Return the predictive of ``std * y + mean`` from that of y; they broadcast to [B, T, ...].

        Of examples, targets and further dims, not of samples: std [T] is that of each target. ``present`` says which targets
        of the log-likelihoods are not missing; None: all. The new one takes over the memory of `share`, which changes.
        """
        mean, std = (torch.as_tensor(number).to(self.mean) for number in (mean, std))
        mean, std = (t.view((1,) * (self.mean.ndim - t.ndim) + t.shape) for t in (mean, std))
        square, log_prob, log_probs = std.square(), self.log_prob, self.log_probs
        # Of an example, [B]; expanded, it takes no memory
        log_std = std.log().expand(self.mean.shape)
        log_std = log_std if present is None else torch.where(present.view_as(self.mean), log_std, 0)
        log_std = log_std.sum(tuple(range(1, self.mean.ndim)))
        if log_prob is not None:
            log_prob = log_prob - log_std
        if self.share is not None:
            self.share.mixture.in_units_(self.share.shares.of(mean), self.share.shares.of(std))
        return ValuePredictive(
            self.mean * std + mean,
            self.aleatoric_variance * square,
            self.epistemic_variance * square,
            log_prob,
            self.mixture and self.mixture.in_units(mean, std),
            None if self.members is None else self.members * std[:, None] + mean[:, None],
            None if log_probs is None else log_probs - log_std[:, None],
            self.share,
            mean.expand_as(self.mean) if self.origin is None else self.origin * std + mean,
        )


Predictive = ClassPredictive | ValuePredictive


def examples_of(predictive: Predictive, start: int, stop: int) -> Predictive:
    """Return the predictive of some of its examples, without a share of their targets. Local."""
    values = {field.name: getattr(predictive, field.name) for field in fields(predictive)}
    if "share" in values:
        values["share"] = None
    for name, value in values.items():
        if value is not None:
            values[name] = value.rows(start, stop) if isinstance(value, Mixture) else value[start:stop]
    return type(predictive)(**values)


def is_of_classes(likelihood: Likelihood) -> TypeGuard[Categorical]:
    """Whether the targets are classes: the likelihood then has the methods of `Categorical`. Local."""
    return likelihood.num_classes is not None


def member_outputs(
    posterior: Posterior, comm: GridComm, x: Inputs, num_samples: int, seed: int, batch_size: int, chunk_size: int = 1
) -> Generator[tuple[range, Tensor], None, None]:
    """Yield (samples, outputs [c, B, ...] in float64) for the samples of this rank, chunk by chunk. Local.

    A rank without samples (fewer than ranks of the sample axis) yields once, with c = 0, to give the shape.
    """
    check_kind("posterior", posterior, Posterior, "Make it of the network: hpc_bnn.MeanFieldGaussian(net)")
    count("Try 64").check("num_samples", num_samples)
    count("Try 1024").check("batch_size", batch_size)
    count("Try 1").check("chunk_size", chunk_size)
    key, views, is_first = Key(seed, Stream.PREDICTION), SharedView(x), comm.grid.is_first("world")
    mine = comm.grid.local_samples(num_samples)
    posterior.check_num_samples(num_samples, mine)
    loop = SampleLoop(posterior, chunk_size, "vmap", speaks=is_first, max_examples=batch_size)
    with posterior.evaluating():
        loop.look(mine or range(1), views, key, comm.grid)
        loop.prove(mine, views, key)
        for samples, outputs in loop(mine or range(1), views, key):
            number = min(len(samples), len(mine))
            yield range(samples[0], samples[0] + number), outputs[:number].double()


def _check_equal(posterior: Posterior, comm: GridComm, x: Inputs, y: Tensor | None, **numbers: int) -> None:
    """Raise `RankError` where the ranks of a sample group do not predict the same. Collective over ``sample_comm``: a sum."""
    grid = comm.grid
    if grid.sample_size == 1 or not isinstance(posterior, Posterior) or not posterior.network.looks:
        return
    found: dict[str, object] = dict(numbers)
    parameters = posterior.buffer.flat if posterior.is_replicated else None
    for name, tree in (("x", x), ("y", y), ("the parameters", parameters)):
        digest = 0
        for tensor in tensors_of(tree) if tree is not None else ():
            digest = zlib.crc32(repr((tensor.shape, tensor.dtype)).encode(), digest)
            if tensor.layout is torch.strided and tensor.numel():
                places = torch.arange(0, tensor.numel(), max(tensor.numel() // 2048, 1), device=tensor.device)
                digest = zlib.crc32(tensor.detach().take(places).cpu().view(torch.uint8).numpy().data, digest)
        found[f"the digest of {name}"] = f"{digest:08x}"
    weight = 1 if grid.sample_index < grid.sample_size - 1 else 1 - grid.sample_size
    total = torch.full((1,), zlib.crc32(repr(found).encode()) * weight, dtype=torch.float64, device=device_of(x))
    comm.sum_(total, "sample")  # of whole numbers below 2^53: 0 where all have the same
    others = comm.gather_objects(found, "sample") if total.item() else [found]
    differ = {name: [other[name] for other in others] for name in found if len({o[name] for o in others}) > 1}
    if differ:  # in a plan nothing does, and the sum is none
        values = "; ".join(f"{name} is {', '.join(map(str, of_ranks))}" for name, of_ranks in differ.items())
        raise RankError(
            f"a predictive: the ranks of sample group {grid.data_index} differ, and must not: {values}. Each evaluates a part of the "
            "samples, of one posterior and for the same examples: give all of them the same x, those of comm.grid.data_index of "
            "comm.grid.data_size, and load or edit the posterior on all, or call comm.broadcast_(list(posterior.parameters())) after it"
        )


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

    Collective over ``sample_comm``: a sum of one number, which compares what the ranks predict, and one of [B, 2 C + 1, ...];
    an exchange of [K, B, C, ...] to keep the members.

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
        Whether the probabilities of each sample are kept as well, on the first rank of a sample group.
    """
    num_classes = likelihood.num_classes
    if num_classes is None:
        rule = "its targets are numbers, which have no probabilities of classes"
        raise ConfigError(Fault("likelihood", type(likelihood).__name__, rule, "Use predict_values"))
    _check_equal(posterior, comm, x, None, num_samples=num_samples, seed=seed)
    sums: Tensor | float = 0.0  # of p, p^2, entropy; in float64, because the variance is a small difference
    kept = []
    for _, outputs in member_outputs(posterior, comm, x, num_samples, seed, batch_size, chunk_size):
        p = likelihood.probabilities(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
        parts = torch.cat([p, p.square(), torch.special.entr(p).sum(2, keepdim=True)], dim=2)
        sums = parts.sum(0) + sums
        kept += [p] if keep_members else []
    assert isinstance(sums, Tensor), "each rank of a sample group adds one chunk or more"
    comm.sum_(sums, "sample")
    mean, square, entropy = (sums / num_samples).split([num_classes, num_classes, 1], dim=1)
    members = _on_first(comm, kept, num_samples) if keep_members else None
    return ClassPredictive(mean, (square - mean.square()).clamp_min(0).sqrt(), entropy.squeeze(1), members)


def _on_first(comm: GridComm, kept: list[Tensor], num_samples: int) -> Tensor | None:
    """Return what the ranks of a sample group have kept, [c, B, ...] of chunks of samples, as [B, K, ...] on the first of them.

    None elsewhere. Collective over ``sample_comm``: an exchange of it. The list is empty afterwards: the memory goes as soon as
    it can.
    """
    mine = torch.cat(kept)
    kept.clear()
    size, form = comm.grid.sample_size, mine.shape[1:]
    counts, rows = [form.numel(), *[0] * (size - 1)], [len(share(num_samples, size, index)) for index in range(size)]
    found = comm.all_to_all(mine.flatten(), counts, "sample", rows)
    return found.view(num_samples, *form).movedim(0, 1) if comm.grid.is_first("sample") else None


class _Divided:
    """The mixture over samples, by targets: `add` the samples of this rank one after another, then `exchange`."""

    def __init__(self, comm: GridComm, num_samples: int):
        self._comm, self._num_samples, self._num_added = comm, num_samples, 0
        self._buffers: list[Tensor] = []

    def add(self, mixture: Mixture) -> None:
        """Add the components [c, B, T, ...] of some samples. Local."""
        if not self._buffers:
            self._shares = TargetShares(self._comm, self._num_samples, mixture.components[0].shape[1:])
            self._buffers = [self._shares.buffer(component) for component in mixture.components]
            self._like = mixture.map(lambda component: component.new_empty(0))
        for buffer, component in zip(self._buffers, mixture.components):
            self._shares.put_(buffer, self._num_added, component)
        self._num_added += mixture.num_components

    def exchange(self) -> Share | None:
        """Return this rank's share, None if nothing was added. Collective over ``sample_comm``: one exchange a component."""
        if not self._buffers:
            return None
        components = []
        while self._buffers:
            components.append(self._shares.collect(self._buffers.pop(0)))
        return Share(self._like.of(*components), self._shares)


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
    keep_log_probs: bool = False,
    keep_share: bool = False,
) -> ValuePredictive:
    """Return the predictive of this rank's examples over the samples of all ranks of its sample group.

    Collective over ``sample_comm``: a sum of one number, which compares what the ranks predict, and two of 2 and 1 numbers per
    target; with targets y a maximum and a sum of
    B numbers more; an exchange of the outputs of all samples to keep the members, of [K, B] to keep the log-densities; one
    of one or two numbers for each target of this rank's samples to keep a share.

    Parameters
    ----------
    x, y : Tensor
        [B, ...] inputs, and targets where their log-density is wanted; the same on all ranks of a sample group.
    num_samples, seed, batch_size, chunk_size
        As for `predict_classes`.
    keep_members : bool
        Whether the distribution of each sample is kept as well, on the first rank of a sample group.
    keep_log_probs : bool
        Whether the log-density of each sample is kept as well, there.
    keep_share : bool
        Whether each rank keeps the distributions of all samples for its share of the targets, 1 / S of the memory: for
        quantiles, PIT and CRPS.
    """
    if is_of_classes(likelihood):
        rule = "its targets are classes, which have no mean"
        raise ConfigError(Fault("likelihood", type(likelihood).__name__, rule, "Use predict_classes"))
    if y is not None:
        check_kind("y", y, Tensor, "Give torch.as_tensor(y)")
    _check_equal(posterior, comm, x, y, num_samples=num_samples, seed=seed)
    if y is not None:
        likelihood.check_targets(y)
    moments, density = Moments(num_samples), LogMeanExp(num_samples)
    kept, log_probs, divided = [], [], _Divided(comm, num_samples)
    for samples, members in member_outputs(posterior, comm, x, num_samples, seed, batch_size, chunk_size):
        form, outputs = (len(samples), num_rows(x)), members.flatten(0, 1)
        mean_and_variance = torch.stack([likelihood.mean(outputs), likelihood.variance(outputs)], dim=1)
        moments.add(mean_and_variance.unflatten(0, form))
        if y is not None and likelihood.has_density:
            targets = y.expand(len(samples), *y.shape).flatten(0, 1)
            log_prob = likelihood.log_prob(outputs, targets).unflatten(0, form)
            density.add(log_prob)
            log_probs += [log_prob] if keep_log_probs else []
        kept += [members] if keep_members else []
        if keep_share and (mixture := likelihood.mixture(members)) is not None:
            divided.add(mixture)
        del members, outputs, mean_and_variance  # of a field each takes as much memory as all else here
    of_targets = divided.exchange()  # first: it needs the most memory
    moments.exchange(comm)
    density.exchange(comm)
    assert moments.mean is not None, "each rank of a sample group adds one chunk or more"
    predictive = ValuePredictive(moments.mean, moments.aleatoric, moments.epistemic, density.log_mean, share=of_targets)
    if log_probs:
        predictive = replace(predictive, log_probs=_on_first(comm, log_probs, num_samples))
    members = _on_first(comm, kept, num_samples) if keep_members else None
    if members is None:
        return predictive
    outputs = members.movedim(1, 0)  # [K, B, ...]
    means = likelihood.mean(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2])
    return replace(predictive, mixture=likelihood.mixture(outputs), members=means.movedim(0, 1))
