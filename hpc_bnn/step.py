"""One optimizer step: draw, forward, objective, backward, reduce, update (floor 5).

The only place that knows how samples are looped. The layout law rests here: each rank divides by the
global number of samples and examples, the job sums, and the KL enters once, after the sum.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .comm import GridComm
from .data.augment import SharedView
from .errors import ConfigError, Fault, HpcBnnError, NonFiniteError
from .likelihoods import Likelihood
from .noise import Stream, keyed_generator
from .objectives import Coupling, NegativeElbo, Objective
from .optim import JobOptimizer
from .posteriors import Posterior, Tally

logger = logging.getLogger(__name__)

Use = Callable[[Sequence[int], Tensor, bool], None]
"""What is done with some samples: their statistic [c, B, ...], and whether they were drawn in one batch."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, before its update; the same on all ranks."""

    nelbo: float
    """Objective per example: ``data_term + kl_weight * kl / num_train_examples``; with the objective "elbo" and
    ``kl_weight`` 1 the negative ELBO (nats)."""
    data_term: float
    """Data term of the objective per example (nats; units of the target for a score)."""
    kl: float
    """KL(q || prior) of all weights (nats)."""
    kl_weight: float = 1.0
    """Factor of the KL at this step."""
    wants_stop: bool = False
    """Whether some rank of the job wants to stop after this step (`VariationalStep.wants_stop`)."""


class VariationalStep:
    """Callable that makes one step of variational inference on the whole process grid.

    Parameters
    ----------
    posterior : Posterior
        Wrapped network.
    likelihood : Likelihood
        Likelihood of an example given the network's outputs.
    optimizer : torch.optim.Optimizer or hpc_bnn.optim.JobOptimizer
        Over ``posterior.parameters()``; or `hpc_bnn.optim.ShardedOptimizer`.
    comm : GridComm
        The process grid.
    num_samples : int
        Samples of the weights per step in the whole job, K; at least the extent of the sample axis.
    num_train_examples : int
        Size of the training set, N: the KL per example is KL / N, so that the objective is that of the whole
        data set, divided by N, whatever the batch is.
    seed : int
        Key of the noise.
    kl_weight : float or callable
        Factor of the KL; 1 is Bayes, below 1 a cold posterior. A function of the number of steps made so far
        anneals it (`hpc_bnn.optim.KlAnnealing`).
    objective : Objective
        How the samples make one data term (`hpc_bnn.objectives`); by default the negative ELBO.
    autocast_dtype : torch.dtype, optional
        Run the network in this dtype where torch's autocast allows; weights, gradients and reductions
        stay in their own.
    max_gradient_norm : float, optional
        Scale the gradient of the job (of each member of an ensemble), the KL's part included, down to this norm.
    chunk_size : int or "auto"
        Samples that a rank evaluates at once, batched by ``torch.vmap``. Memory grows with it, not with the
        number of samples. 1 walks over the samples, which is fastest on CPUs and for large networks; "auto"
        is 1 on a CPU and measured at the first step on a GPU. A module that cannot be batched falls back to
        1, which is said once.

    Attributes
    ----------
    num_steps : int
        Steps made so far: part of the noise key, to be stored with a checkpoint.
    wants_stop : bool
        Set it on any rank, for example in a signal handler: the result of the next step tells all ranks, so that they
        stop together. It travels with the gradient.
    num_passes : int
        Forward passes over the samples in the last step on this rank: 2 where the objective couples the samples
        and not all of them are evaluated at once, otherwise 1.
    """

    def __init__(
        self,
        posterior: Posterior,
        likelihood: Likelihood,
        optimizer: torch.optim.Optimizer | JobOptimizer,
        comm: GridComm,
        *,
        num_samples: int,
        num_train_examples: int,
        seed: int = 0,
        kl_weight: float | Callable[[int], float] = 1.0,
        objective: Objective | None = None,
        autocast_dtype: torch.dtype | None = None,
        max_gradient_norm: float | None = None,
        chunk_size: int | Literal["auto"] = 1,
    ):
        comm.grid.check_num_samples(num_samples)
        posterior.check_num_samples(num_samples)
        if chunk_size != "auto" and chunk_size < 1:
            raise ConfigError(Fault("--chunk_size", chunk_size, "must be auto or at least 1", "Try auto"))
        objective = objective or NegativeElbo()
        objective.check(likelihood, num_samples)
        if objective.couples and not posterior.is_replicated:
            raise ConfigError(
                Fault(
                    "--objective.name",
                    objective.name,
                    "the members of an ensemble train alone",
                    "Use elbo, or another family",
                )
            )
        self.posterior = posterior
        self.likelihood = likelihood
        is_of_job = isinstance(optimizer, JobOptimizer)
        self.optimizer = optimizer if is_of_job else JobOptimizer.of(optimizer, posterior, comm)
        self.comm = comm
        self.num_samples = num_samples
        self.num_train_examples = num_train_examples
        self.seed = seed
        self.kl_weight = kl_weight if callable(kl_weight) else lambda num_steps: kl_weight
        self.objective = objective
        self.autocast_dtype = autocast_dtype
        self.max_gradient_norm = max_gradient_norm
        self.chunk_size = chunk_size
        self.num_steps = 0
        self.wants_stop = False
        self._can_batch = True
        self._is_prepared = self._has_said_passes = False
        self.num_passes = 0

    def __call__(self, x: Tensor | SharedView, y: Tensor, global_batch_size: int) -> StepResult:
        """Make one step. Collective over the world: one sum over each axis of extent above 1.

        An objective that couples the samples adds what its docstring says over the sample axis; a module with
        BatchNorm three small sums over the data axis per layer and sample (five with two passes). A deep
        ensemble sums its gradient over the data axis only, and a few scalars over both.

        Parameters
        ----------
        x : Tensor or Views
            [B_local, ...] inputs of this rank's part of the batch; B_local may be 0 and may differ
            between data groups. `hpc_bnn.data.Augmentation` makes views, of which samples see different ones.
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
        kl_weight = self.kl_weight(self.num_steps)
        kl = posterior.add_kl_gradient_(kl_weight / self.num_train_examples).item()
        if self.max_gradient_norm is not None:
            self.optimizer.clip_(self.max_gradient_norm)
        self.optimizer.step()
        self.num_steps += 1
        data_term = tally[Tally.DATA_TERM]
        nelbo = data_term + kl_weight * kl / self.num_train_examples
        return StepResult(nelbo, data_term, kl, kl_weight, tally[Tally.NUM_STOPS] > 0)

    def accumulate_gradient_(self, x: Tensor | SharedView, y: Tensor, global_batch_size: int) -> None:
        """Leave the job's sums in ``posterior.reduced``: gradient of the data term, statistics, tally.

        Collective over the world.
        """
        posterior, comm = self.posterior, self.comm
        x = SharedView(x) if isinstance(x, Tensor) else x
        if x.num_samples not in (None, self.num_samples):
            rule = f"the views are made for {x.num_samples} samples"
            raise ConfigError(
                Fault("--num_samples", self.num_samples, rule, "Make them for as many as the step has")
            )
        posterior.batch_norms.sum_over_data = lambda tensor: comm.sum_(tensor, "data")
        mine = samples = comm.grid.local_samples(self.num_samples)
        counts_samples = posterior.kl_kind in ("Monte Carlo", "point") and self._prior_share > 0
        if len(x) == 0 and not posterior.batch_norms.layers and not counts_samples:
            mine = range(0)  # nothing to evaluate, and nobody waits for this rank
        if self.chunk_size == "auto":
            self.chunk_size = self._measure_chunk_size(x, y, mine)
        if not self._is_prepared and len(x):
            self.likelihood.check_targets(y)
            posterior.prepare_(x.of(samples[0]))
            self._warn_of_foreign_noise(x.of(samples[0]))
            self._is_prepared = True
        posterior.begin(comm.grid.local_examples(global_batch_size).start)
        coupling = self.objective.begin(y, samples, self.num_samples)
        self._pass_over(mine, x, y, coupling, 1.0 / global_batch_size)
        posterior.tally[Tally.DATA_TERM] = coupling.data_term() / global_batch_size
        self.optimizer.start_()
        posterior.finish_(self._prior_share)
        # NaN and infinity survive a sum. The flag travels with the gradient: no collective of its own.
        self._local_is_broken = ~self.optimizer.local_checksum().isfinite()
        posterior.tally[Tally.NUM_BROKEN] = self._local_is_broken
        posterior.tally[Tally.NUM_STOPS] = self.wants_stop
        self.optimizer.reduce_()

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

    def _pass_over(self, mine: range, x: SharedView, y: Tensor, coupling: Coupling, share: float) -> None:
        """Evaluate the samples of this rank and fold in the gradient of ``share`` times the data term.

        Where the samples couple and one chunk holds all of this rank, its graph waits for the exchange: one
        pass. Otherwise a pass without gradient goes before.
        """
        differentiate = self._differentiate(coupling, share, mine[-1] if len(mine) else None)
        self.num_passes = 1
        if not self.objective.couples:
            self._walk(mine, x, y, differentiate)
            return
        if len(mine) == 1 or (1 < len(mine) <= self.chunk_size and self._can_batch):
            whole = self._try_chunk(mine, x, y) if len(mine) > 1 else self._evaluate_one(mine[0], x, y)
            if whole is not None:
                statistic, is_batch = whole
                coupling.see(mine, statistic.detach())
                coupling.combine(self.comm)
                differentiate(mine, statistic, is_batch)
                return
        self.num_passes = 2
        self._say_two_passes(len(mine))
        with torch.no_grad():
            self._walk(mine, x, y, lambda samples, statistic, _: coupling.see(samples, statistic))
        coupling.combine(self.comm)
        self.posterior.batch_norms.begin()  # the second pass gives the statistics
        self._walk(mine, x, y, differentiate)

    def _say_two_passes(self, num_local_samples: int) -> None:
        if self.comm.grid.rank == 0 and not self._has_said_passes:
            remedy = f"--chunk_size {num_local_samples} makes it one, with the memory of that many"
            logger.info(
                "the objective %s couples the samples: two passes over the %d of this rank per step (%s)",
                self.objective.name,
                num_local_samples,
                remedy if self._can_batch else "the module cannot be batched",
            )
        self._has_said_passes = True

    def _differentiate(self, coupling: Coupling, share: float, last: int | None = None) -> Use:
        """Return what folds in the gradient of ``share`` times the data term for some samples.

        After the backward pass of the sample ``last`` nothing more is folded in.
        """
        posterior = self.posterior
        kl = self._prior_share, self.kl_weight(self.num_steps) / self.num_train_examples

        def use(samples: Sequence[int], statistic: Tensor, is_batch: bool) -> None:
            gradient = share * coupling.gradient(samples, statistic.detach())
            with self.optimizer.overlapping() if samples[-1] == last else contextlib.nullcontext():
                statistic.backward(gradient)
            accumulate = posterior.accumulate_chunk_ if is_batch else posterior.accumulate_
            accumulate(*kl)

        return use

    def _walk(self, samples: Sequence[int], x: SharedView, y: Tensor, use: Use) -> None:
        """Evaluate samples, batched where that works, and hand on their statistics [c, B, ...]."""
        size = self.chunk_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            whole = self._try_chunk(chunk, x, y) if len(chunk) > 1 and self._can_batch else None
            if whole is not None:
                use(chunk, *whole)
                continue
            for sample in chunk:
                use([sample], *self._evaluate_one(sample, x, y))

    def _try_chunk(self, chunk: Sequence[int], x: SharedView, y: Tensor) -> tuple[Tensor, bool] | None:
        """Return what `_evaluate_batched` does, or None from now on where the module cannot be batched."""
        try:
            return self._evaluate_batched(chunk, x, y)
        except (torch.cuda.OutOfMemoryError, HpcBnnError):
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:
            self._fall_back(error)
            return None

    def _fall_back(self, error: Exception) -> None:
        if self.comm.grid.rank == 0:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(
                "samples are evaluated one after another: the module cannot be batched (%s)", reason
            )
        self._can_batch = False
        self.posterior.forget_chunk_()

    def _evaluate_one(self, sample: int, x: SharedView, y: Tensor) -> tuple[Tensor, bool]:
        """Return the statistic [1, B, ...] of a sample, and that it was not drawn in a batch."""
        posterior = self.posterior
        posterior.draw_(sample, self._keyed)
        with self._autocast(x.device):
            outputs = posterior.module(x.of(sample))
        return self.objective.statistic(self.likelihood, outputs.to(posterior.dtype), y)[None], False

    def _evaluate_batched(self, samples: Sequence[int], x: SharedView, y: Tensor) -> tuple[Tensor, bool]:
        """Return the statistics [c, B, ...] of some samples, and that they were drawn in a batch."""
        posterior = self.posterior
        posterior.check_batchable()
        layouts, leaves = zip(*posterior.draw_chunk(samples, self._keyed))  # [c, P_i] each

        def forward(flats: tuple[Tensor, ...], inputs: Tensor) -> Tensor:
            views = (layout.views(flat).items() for layout, flat in zip(layouts, flats))
            weights = dict(itertools.chain(*views))
            return torch.func.functional_call(posterior.module, weights, (inputs,))

        is_shared = len({x.number(sample) for sample in samples}) == 1
        inputs = x.of(samples[0]) if is_shared else torch.stack([x.of(sample) for sample in samples])
        with self._autocast(x.device):
            outputs = torch.vmap(forward, (0, None if is_shared else 0))(leaves, inputs)  # [c, B, ...]
        targets = y.expand(len(samples), *y.shape).flatten(0, 1)
        outputs = outputs.to(posterior.dtype).flatten(0, 1)
        statistic = self.objective.statistic(self.likelihood, outputs, targets)
        return statistic.unflatten(0, (len(samples), len(y))), True

    def _measure_chunk_size(self, x: SharedView, y: Tensor, mine: range) -> int:
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

    def _seconds_per_sample(self, samples: Sequence[int], x: SharedView, y: Tensor) -> float:
        self.posterior.begin()
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        former, self.chunk_size = self.chunk_size, len(samples)
        some_gradient = NegativeElbo().begin(y, range(len(samples)), len(samples))
        self._walk(samples, x, y, self._differentiate(some_gradient, 1.0))
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
