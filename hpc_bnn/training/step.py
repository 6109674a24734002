"""One optimizer step: draw, forward, objective, backward, reduce, update.

The only place that knows how samples are looped. The layout law rests here: each rank divides by the
global number of samples and examples, the job sums, and the KL enters once, after the sum.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import GridComm
from ..config import Auto, check_field
from ..errors import ConfigError, Fault, HpcBnnError, NonFiniteError
from ..likelihoods import Likelihood
from ..noise import Key, Stream
from ..objectives import Coupling, NegativeElbo, Objective
from ..posteriors import Posterior, Tally
from ..views import SharedView
from .optim import JobOptimizer

logger = logging.getLogger(__name__)

Use = Callable[[Sequence[int], Tensor, bool], None]
"""What is done with some samples: their statistic [c, B, ...], and whether they were drawn in one batch."""


class _BackwardError(Exception):
    """The backward pass of a batch of samples failed, with the cause; nothing of it was folded in."""


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
    optimizer : torch.optim.Optimizer or hpc_bnn.training.optim.JobOptimizer
        Over ``posterior.parameters()``; or `hpc_bnn.ShardedOptimizer`.
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
        anneals it (`hpc_bnn.KlAnnealing`).
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
        chunk_size: int | Auto = 1,
    ):
        comm.grid.check_num_samples(num_samples)
        posterior.check_num_samples(num_samples)
        check_field("chunk_size", chunk_size)
        check_field("optimizer.max_gradient_norm", max_gradient_norm)
        if not callable(kl_weight):
            check_field("kl_weight", kl_weight)
        objective = objective or NegativeElbo()
        objective.check(likelihood, num_samples)
        if objective.couples and not posterior.is_replicated:
            raise ConfigError(
                Fault(
                    "objective.name",
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
        self._is_prepared = self._has_tried_batch = self._has_said_passes = False
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
        ConfigError
            The module, the posterior or the optimizer is not what can be trained, or was changed in a way that cannot be
            followed; or gradients are switched off.
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
        self._check()
        x = SharedView(x) if isinstance(x, Tensor) else x
        if x.num_samples not in (None, self.num_samples):
            rule = f"the views are made for {x.num_samples} samples"
            raise ConfigError(
                Fault("num_samples", self.num_samples, rule, "Make them for as many as the step has")
            )
        mine = samples = comm.grid.local_samples(self.num_samples)
        counts_samples = posterior.kl_kind in ("Monte Carlo", "point") and self._prior_share > 0
        if len(x) == 0 and not posterior.batch_norms.layers and not counts_samples:
            mine = range(0)  # nothing to evaluate, and nobody waits for this rank
        if len(x):
            self._prepare(x, y, samples)
        if self.num_steps == 0 and comm.grid.is_first("world") and global_batch_size < comm.grid.data_size:
            logger.warning(
                "a batch of %d examples for %d data groups: the others have nothing to do. Use a larger "
                "global_batch_size or sample_size",
                global_batch_size,
                comm.grid.data_size,
            )
        if self.chunk_size == "auto":
            self.chunk_size = self._measure_chunk_size(x, y, mine)
        if len(x) and min(len(mine), self.chunk_size) > 1 and not self._has_tried_batch:
            self._try_batch(mine[: self.chunk_size], x, y)
        with posterior.network.running(lambda tensor: comm.sum_(tensor, "data")):
            self._accumulate(mine, x, y, samples, global_batch_size)

    def _accumulate(
        self, mine: range, x: SharedView, y: Tensor, samples: range, global_batch_size: int
    ) -> None:
        posterior, comm = self.posterior, self.comm
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

    def _check(self) -> None:
        """Raise `ConfigError` where what is around this step makes it wrong. Local; a few microseconds."""
        if not torch.is_grad_enabled():
            context = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            rule = f"a step differentiates, and here torch.{context}() is in force"
            raise ConfigError(Fault("VariationalStep", "call", rule, f"Call it outside of torch.{context}()"))
        self.posterior.network.check_trainable()
        self.optimizer.check()

    def _prepare(self, x: SharedView, y: Tensor, samples: range) -> None:
        """Before the first step: check the targets, and look at what the module does. Local."""
        posterior, network = self.posterior, self.posterior.network
        posterior.check_()
        if not self._is_prepared:
            self.likelihood.check_targets(y)
            posterior.prepare_(x.of(samples[0]))
            self._is_prepared = True
        look = None
        if network.needs_look():
            some = samples[:1]  # the members of an ensemble are alike or not by themselves
            if posterior.is_replicated:
                some = (samples[0], samples[0] + 1)  # any sample can be drawn on any rank
            posterior.begin()
            look = network.look(
                x.of(samples[0]), lambda s: posterior.draw_(self.key.of(s)), some, self.autocast_dtype
            )
        network.say(logger, self.comm.grid, look)

    def _try_batch(self, samples: Sequence[int], x: SharedView, y: Tensor) -> None:
        """Fall back where a chunk of samples fails, changes the module, or differs from a walk over them. Local."""
        self._has_tried_batch, problem = True, None
        before = self.posterior.network.traces()
        try:
            batched = self._gradients_of(samples, x, y, self._evaluate_batched)
        except HpcBnnError:
            raise
        except Exception as error:
            problem = error.with_traceback(None)  # its frames hold the batch
        finally:
            self.posterior.forget_chunk_()
            changed = before.put_back()
        names = changed["buffer"] + changed["weight"] + changed["attribute"]
        if problem is None and names:
            problem = RuntimeError(f"its forward pass changes {', '.join(names[:5])}, once for each sample")
        if problem is None:
            walked = self._gradients_of(samples, x, y, self._evaluate_one)
            before.put_back()
            if (name := _first_difference(batched, walked, self._tolerance)) is not None:
                problem = RuntimeError(f"a batch gives another gradient of {name} than a walk")
        if problem is not None:
            self._fall_back(problem)

    def _gradients_of(self, samples: Sequence[int], x: SharedView, y: Tensor, evaluate) -> dict[str, Tensor]:
        """Return the gradients of the sum of some samples' statistics, by the names of weights. Local."""
        posterior = self.posterior
        posterior.begin()
        for chunk in [samples] if evaluate == self._evaluate_batched else [[sample] for sample in samples]:
            statistic, is_batch = evaluate(chunk, x, y)
            statistic.backward(torch.ones_like(statistic))
            (posterior.accumulate_chunk_ if is_batch else posterior.accumulate_)()
        posterior.network.allow_writes()
        return {name: gradient.clone() for name, gradient in posterior.named_gradients().items()}

    @property
    def _tolerance(self) -> float:
        """Relative difference of gradients that rounding may make: TF32 and bfloat16 have 11 and 8 bits."""
        if self.autocast_dtype is not None or torch.is_autocast_enabled(self.comm.device.type):
            return 0.1
        return {torch.float64: 1e-8}.get(self.posterior.dtype, 1e-2)

    # --- samples ------------------------------------------------------------------------------------

    @property
    def _prior_share(self) -> float:
        """Share of a sample of this rank in what depends on the sample alone: it counts once in the job."""
        return 1.0 / self.num_samples if self.comm.grid.is_first("data") else 0.0

    @property
    def key(self) -> Key:
        """Of the weights of sample 0 in the next step."""
        return Key(self.seed, Stream.NOISE, step=self.num_steps)

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
            whole = self._try_chunk(mine, x, y) if len(mine) > 1 else self._evaluate_one(mine, x, y)
            if whole is not None:
                coupling.see(mine, whole[0].detach())
                coupling.combine(self.comm)
                if not self._try_use(differentiate, mine, whole):
                    self._walk(mine, x, y, differentiate)
                return
        self.num_passes = 2
        self._say_two_passes(len(mine))
        with torch.no_grad():
            self._walk(mine, x, y, lambda samples, statistic, _: coupling.see(samples, statistic))
        coupling.combine(self.comm)
        self.posterior.batch_norms.begin_again()
        self._walk(mine, x, y, differentiate)

    def _say_two_passes(self, num_local_samples: int) -> None:
        if self.comm.grid.is_first("world") and not self._has_said_passes:
            remedy = f"chunk_size {num_local_samples} makes it one, with the memory of that many"
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
            before = dict(vars(coupling))
            gradient = share * coupling.gradient(samples, statistic.detach())
            is_last = samples[-1] == last
            with self.optimizer.overlapping() if is_last else contextlib.nullcontext():
                try:
                    statistic.backward(gradient)
                except Exception as error:
                    if not is_batch or (is_last and self.optimizer.overlaps):  # its sums have begun
                        raise
                    coupling.__dict__ = before  # without what it has added up
                    raise _BackwardError from error
            accumulate = posterior.accumulate_chunk_ if is_batch else posterior.accumulate_
            accumulate(*kl)

        return use

    def _walk(self, samples: Sequence[int], x: SharedView, y: Tensor, use: Use) -> None:
        """Evaluate samples, batched where that works, and hand on their statistics [c, B, ...]."""
        size = self.chunk_size
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            whole = self._try_chunk(chunk, x, y) if len(chunk) > 1 and self._can_batch else None
            if whole is not None and self._try_use(use, chunk, whole):
                continue
            for sample in chunk:
                use([sample], *self._evaluate_one([sample], x, y))

    def _try_chunk(self, chunk: Sequence[int], x: SharedView, y: Tensor) -> tuple[Tensor, bool] | None:
        """Return what `_evaluate_batched` does, or None from now on where the module cannot be batched."""
        try:
            return self._evaluate_batched(chunk, x, y)
        except HpcBnnError:
            raise
        except Exception as error:  # what is wrong without a batch as well, the walk will raise
            self._fall_back(error)
            return None

    def _try_use(self, use: Use, chunk: Sequence[int], whole: tuple[Tensor, bool]) -> bool:
        """Return whether a chunk could be used; where its backward pass failed, none of it is folded in."""
        try:
            use(chunk, *whole)
        except _BackwardError as error:
            self._fall_back(error.__cause__)
            return False
        return True

    def _fall_back(self, error: BaseException | None) -> None:
        if self.comm.grid.is_first("world"):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if isinstance(error, torch.OutOfMemoryError):
                reason = f"its memory is not enough for chunks of {self.chunk_size}; set chunk_size to fewer"
            logger.warning(
                "samples are evaluated one after another: the module cannot be batched (%s)", reason
            )
        self._can_batch = False
        self.posterior.forget_chunk_()

    def _evaluate_one(self, samples: Sequence[int], x: SharedView, y: Tensor) -> tuple[Tensor, bool]:
        """Return the statistic [1, B, ...] of one sample, and that it was not drawn in a batch."""
        (sample,), posterior = samples, self.posterior
        posterior.draw_(self.key.of(sample))
        outputs = posterior.network(x.of(sample), self.autocast_dtype)
        return self.objective.statistic(self.likelihood, outputs.to(posterior.dtype), y)[None], False

    def _evaluate_batched(self, samples: Sequence[int], x: SharedView, y: Tensor) -> tuple[Tensor, bool]:
        """Return the statistics [c, B, ...] of some samples, and that they were drawn in a batch."""
        posterior = self.posterior
        posterior.check_batchable()
        layouts, leaves = zip(*posterior.draw_chunk(samples, self.key))  # [c, P_i] each

        is_shared = len({x.number(sample) for sample in samples}) == 1
        inputs = x.of(samples[0]) if is_shared else torch.stack([x.of(sample) for sample in samples])
        outputs = posterior.network.batched(layouts, leaves, inputs, is_shared, self.autocast_dtype)
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
        before = self.posterior.network.traces()
        best, best_seconds, size = 1, float("inf"), 1
        while size <= len(mine) and self._can_batch:
            try:
                seconds = min(self._seconds_per_sample(mine[:size], x, y) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            except HpcBnnError:
                raise
            except Exception as error:
                if size == 1:
                    raise
                self._fall_back(error)
                return 1
            finally:
                self.posterior.forget_chunk_()
                before.put_back()
            if seconds < best_seconds:
                best, best_seconds = size, seconds
            size *= 2
        return best

    def _seconds_per_sample(self, samples: Sequence[int], x: SharedView, y: Tensor) -> float:
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        self._gradients_of(samples, x, y, self._evaluate_batched if len(samples) > 1 else self._evaluate_one)
        torch.cuda.synchronize(x.device)
        return (time.perf_counter() - start) / len(samples)

    def _raise_non_finite(self) -> None:
        mine = (self.comm.grid.rank, socket.gethostname()) if self._local_is_broken.item() else None
        places = [f"rank {p[0]} on {p[1]}" for p in self.comm.gather_objects(mine) if p is not None]
        raise NonFiniteError(
            f"step {self.num_steps}: the loss or a gradient is not finite on {', '.join(places)}. "
            "The parameters were not updated. Try a smaller learning rate or check the data"
        )


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> str | None:
    """Return the first name under which two gradients differ by more than a part of their norm."""
    floor = 1e-3 * math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in b.values()))
    for name, gradient in b.items():
        difference = float((a[name] - gradient).norm())
        if difference > tolerance * max(
            float(gradient.norm()), floor
        ):  # NaN is no difference: the step will say it
            return name
    return None
