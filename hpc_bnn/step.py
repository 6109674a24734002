"""One optimizer step: draw, forward, objective, backward, reduce, update (floor 5).

The only place that knows how samples are looped. The layout law rests here: each rank divides by the
global number of samples and examples, the job sums, and the KL enters once, after the sum.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .comm import GridComm
from .errors import ConfigError, Fault, NonFiniteError
from .likelihoods import Categorical
from .noise import Stream, keyed_generator
from .objectives import LogPredictive
from .posteriors import Posterior, Tally

logger = logging.getLogger(__name__)

Use = Callable[[Tensor, Tensor | None], None]
"""What is done with the log-likelihoods [c, B] of some samples, and the leaf [c, P] of a batched draw."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, before its update; the same on all ranks."""

    nelbo: float
    """Objective per example (nats): ``data_term + kl_weight * kl / num_train_examples``; with the objective "elbo"
    the negative ELBO."""
    data_term: float
    """Data term per example (nats): mean over samples of the negative log-likelihood, or the negative log
    predictive, by objective."""
    kl: float
    """KL(q || prior) of all weights (nats)."""


class VariationalStep:
    """Callable that makes one step of variational inference on the whole process grid.

    Parameters
    ----------
    posterior : Posterior
        Wrapped network.
    likelihood : Categorical
        Likelihood of an example given the network's outputs.
    optimizer : torch.optim.Optimizer
        Over ``posterior.parameters()``.
    comm : GridComm
        The process grid.
    num_samples : int
        Samples of the weights per step in the whole job, K; at least the extent of the sample axis.
    num_train_examples : int
        Size of the training set, N: the KL per example is KL / N.
    seed : int
        Key of the noise.
    kl_weight : float
        Factor of the KL; 1 is Bayes, below 1 a cold posterior.
    objective : {"elbo", "log_predictive"}
        Data term: the mean over samples of the negative log-likelihood, or the negative log of the mean
        likelihood over *all* samples of the job (`hpc_bnn.objectives.LogPredictive`: two passes over the samples
        and two more small collectives over the sample axis).
    autocast_dtype : torch.dtype, optional
        Run the network in this dtype where torch's autocast allows; weights, gradients and reductions
        stay in their own.
    chunk_size : int or "auto"
        Samples that a rank evaluates at once, batched by ``torch.vmap``. Memory grows with it, not with the
        number of samples. 1 walks over the samples, which is fastest on CPUs and for large networks; "auto"
        is 1 on a CPU and measured at the first step on a GPU. A module that cannot be batched falls back to
        1, which is said once.

    Attributes
    ----------
    num_steps : int
        Steps made so far: part of the noise key, to be stored with a checkpoint.
    """

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Categorical,
        optimizer: torch.optim.Optimizer,
        comm: GridComm,
        *,
        num_samples: int,
        num_train_examples: int,
        seed: int = 0,
        kl_weight: float = 1.0,
        objective: Literal["elbo", "log_predictive"] = "elbo",
        autocast_dtype: torch.dtype | None = None,
        chunk_size: int | Literal["auto"] = 1,
    ):
        comm.grid.check_num_samples(num_samples)
        posterior.check_num_samples(num_samples)
        if chunk_size != "auto" and chunk_size < 1:
            raise ConfigError(Fault("--chunk_size", chunk_size, "must be auto or at least 1", "Try auto"))
        if objective != "elbo" and not posterior.is_replicated:
            raise ConfigError(
                Fault(
                    "--objective",
                    objective,
                    "the members of an ensemble train alone",
                    "Use elbo, or another family",
                )
            )
        self.posterior = posterior
        self.likelihood = likelihood
        self.optimizer = optimizer
        self.comm = comm
        self.num_samples = num_samples
        self.num_train_examples = num_train_examples
        self.seed = seed
        self.kl_weight = kl_weight
        self.objective = objective
        self.autocast_dtype = autocast_dtype
        self.chunk_size = chunk_size
        self.num_steps = 0
        self._can_batch = True
        self._is_prepared = False

    def __call__(self, x: Tensor, y: Tensor, global_batch_size: int) -> StepResult:
        """Make one step. Collective over the world: one sum over each axis of extent above 1.

        The log predictive adds a maximum and a sum of B_local floats over the sample axis; a module with
        BatchNorm three small sums over the data axis per layer and sample (five with two passes). A deep
        ensemble sums its gradient over the data axis only, and a few scalars over both.

        Parameters
        ----------
        x : Tensor
            [B_local, ...] inputs of this rank's part of the batch; B_local may be 0 and may differ
            between data groups.
        y : Tensor
            [B_local, ...] targets.
        global_batch_size : int
            Examples of this step in the whole job.

        Raises
        ------
        NonFiniteError
            On all ranks, before the update, when the loss or a gradient of any rank is not finite.
        """
        self.accumulate_gradient_(x, y, global_batch_size)
        posterior = self.posterior
        tally = posterior.tally.tolist()
        if tally[Tally.NUM_BROKEN]:
            self._raise_non_finite()
        posterior.attach_gradients_()
        kl = posterior.add_kl_gradient_(self.kl_weight / self.num_train_examples).item()
        self.optimizer.step()
        self.num_steps += 1
        data_term = tally[Tally.DATA_TERM]
        return StepResult(data_term + self.kl_weight * kl / self.num_train_examples, data_term, kl)

    def accumulate_gradient_(self, x: Tensor, y: Tensor, global_batch_size: int) -> None:
        """Leave the job's sums in ``posterior.reduced``: gradient of the data term, statistics, tally.

        Collective over the world.
        """
        posterior, comm = self.posterior, self.comm
        posterior.batch_norms.sum_over_data = lambda tensor: comm.sum_(tensor, "data")
        mine = comm.grid.local_samples(self.num_samples)
        counts_samples = posterior.kl_kind in ("Monte Carlo", "point") and self._prior_share > 0
        if len(x) == 0 and not posterior.batch_norms.layers and not counts_samples:
            mine = range(0)  # nothing to evaluate, and nobody waits for this rank
        scale = 1.0 / (self.num_samples * global_batch_size)
        if self.chunk_size == "auto":
            self.chunk_size = self._measure_chunk_size(x, y, mine)
        if not self._is_prepared and len(x):
            posterior.prepare_(x)
            self._warn_of_foreign_noise(x)
            self._is_prepared = True
        posterior.begin(comm.grid.local_examples(global_batch_size).start)
        if self.objective == "elbo":
            self._walk(mine, x, y, self._differentiate(lambda log_prob: scale))
        else:
            predictive = LogPredictive(len(x), posterior.reduced)
            with torch.no_grad():
                self._walk(mine, x, y, lambda log_prob, leaf: predictive.see(log_prob))
            predictive.combine(comm)
            posterior.batch_norms.begin()  # the second pass gives the statistics
            share = 1.0 / global_batch_size
            self._walk(mine, x, y, self._differentiate(lambda log_prob: share * predictive.weights(log_prob)))
            is_first = comm.grid.sample_index == 0  # the same on all ranks of a sample group: it counts once
            posterior.tally[Tally.DATA_TERM] = share * is_first * predictive.data_term(self.num_samples)
        posterior.finish_(self._prior_share)
        # NaN and infinity survive a sum. The flag travels with the gradient: no collective of its own.
        self._local_is_broken = ~posterior.reduced.sum().isfinite()
        posterior.tally[Tally.NUM_BROKEN] = self._local_is_broken
        if posterior.is_replicated:
            comm.sum_(posterior.reduced, "world")
        else:  # the parameters of a sample belong to its data group
            comm.sum_(posterior.gradient, "data")
            comm.sum_(posterior.behind_gradient, "world")

    def _warn_of_foreign_noise(self, x: Tensor) -> None:
        """Say it when the module draws random numbers that are keyed by nothing."""
        before = torch.get_rng_state()
        self.posterior.begin()
        self.posterior.draw_(self.comm.grid.local_samples(self.num_samples)[0], self._keyed)
        sum_over_data = self.posterior.batch_norms.sum_over_data
        self.posterior.batch_norms.sum_over_data = lambda tensor: None  # a look, not a step: no collective
        with torch.no_grad(), self._autocast(x.device):
            self.posterior.module(x)
        self.posterior.batch_norms.sum_over_data = sum_over_data
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            logger.warning(
                "the forward pass of %s draws from torch's global generator (a functional dropout, for example): "
                "these numbers are not keyed by the sample, and the result depends on the process grid. "
                "Use nn.Dropout layers",
                type(self.posterior.module).__name__,
            )

    # --- samples ------------------------------------------------------------------------------------

    @property
    def _prior_share(self) -> float:
        """Share of a sample of this rank in what depends on the sample alone: it counts once in the job."""
        return 1.0 / self.num_samples if self.comm.grid.data_index == 0 else 0.0

    def _keyed(self, sample: int) -> torch.Generator:
        return keyed_generator(self.seed, Stream.NOISE, self.num_steps, sample, self.posterior.reduced.device)

    def _differentiate(self, weigh: Callable[[Tensor], Tensor | float]) -> Use:
        """Return what folds in the gradient of -sum(weigh(l) * l) for l [c, B] of some samples."""
        posterior = self.posterior
        kl = self._prior_share, self.kl_weight / self.num_train_examples

        def use(log_prob: Tensor, leaf: Tensor | None) -> None:
            loss = -(weigh(log_prob.detach()) * log_prob).sum()
            loss.backward()
            if leaf is None:
                posterior.accumulate_(*kl)
            else:
                posterior.accumulate_chunk_(leaf, *kl)
            posterior.tally[Tally.DATA_TERM] += loss.detach()

        return use

    def _walk(self, samples: Sequence[int], x: Tensor, y: Tensor, use: Use) -> None:
        """Evaluate samples, batched where that works, and hand on l [c, B]."""
        size = self.chunk_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            if len(chunk) > 1 and self._can_batch:
                try:
                    self._evaluate_batched(chunk, x, y, use)
                    continue
                except torch.cuda.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    self._fall_back(error)
            for sample in chunk:
                self._evaluate_one(sample, x, y, use)

    def _fall_back(self, error: Exception) -> None:
        if self.comm.grid.rank == 0:
            reason = str(error).splitlines()[0]
            logger.warning(
                "samples are evaluated one after another: the module cannot be batched (%s)", reason
            )
        self._can_batch = False
        self.posterior.forget_chunk_()

    def _evaluate_one(self, sample: int, x: Tensor, y: Tensor, use: Use) -> None:
        posterior = self.posterior
        posterior.draw_(sample, self._keyed)
        with self._autocast(x.device):
            outputs = posterior.module(x)
        use(self.likelihood.log_prob(outputs.to(posterior.dtype), y)[None], None)

    def _evaluate_batched(self, samples: Sequence[int], x: Tensor, y: Tensor, use: Use) -> None:
        posterior = self.posterior
        posterior.check_batchable()
        weights = posterior.draw_chunk(samples, self._keyed)  # [c, P]

        def forward(flat: Tensor) -> Tensor:
            return torch.func.functional_call(posterior.module, posterior.random.views(flat), (x,))

        with self._autocast(x.device):
            outputs = torch.vmap(forward)(weights)  # [c, B, ...]
        targets = y.expand(len(samples), *y.shape).flatten(0, 1)
        log_prob = self.likelihood.log_prob(outputs.to(posterior.dtype).flatten(0, 1), targets)
        use(log_prob.unflatten(0, (len(samples), -1)), weights)

    def _measure_chunk_size(self, x: Tensor, y: Tensor, mine: range) -> int:
        """Return the chunk size with the least time per sample, of powers of two. Local.

        Measured on GPUs only: on CPUs walking over the samples is fastest, and a choice by the clock would
        make runs differ in rounding.
        """
        if x.device.type == "cpu" or len(mine) < 2:
            return 1
        best, best_seconds, size = 1, float("inf"), 1
        while size <= len(mine):
            try:
                seconds = min(self._seconds_per_sample(mine[:size], x, y) for _ in range(3))
            except torch.cuda.OutOfMemoryError:
                break
            if not self._can_batch:
                return 1
            if seconds < best_seconds:
                best, best_seconds = size, seconds
            size *= 2
        return best

    def _seconds_per_sample(self, samples: Sequence[int], x: Tensor, y: Tensor) -> float:
        self.posterior.begin()
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        former, self.chunk_size = self.chunk_size, len(samples)
        self._walk(samples, x, y, self._differentiate(lambda log_prob: 1.0))
        self.chunk_size = former
        torch.cuda.synchronize(x.device)
        return (time.perf_counter() - start) / len(samples)

    def _autocast(self, device: torch.device):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast_dtype)

    def _raise_non_finite(self) -> None:
        mine = (self.comm.grid.rank, socket.gethostname()) if self._local_is_broken.item() else None
        places = [f"rank {p[0]} on {p[1]}" for p in self.comm.gather_objects(mine) if p is not None]
        raise NonFiniteError(
            f"step {self.num_steps}: the loss or a gradient is not finite on {', '.join(places)}. "
            "The parameters were not updated. Try a smaller learning rate or check the data"
        )
