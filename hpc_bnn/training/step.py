"""One optimizer step: draw, forward, objective, backward, reduce, update.

The layout law rests here: each rank divides by the global number of samples and examples, the job sums, and the KL
enters once, after the sum.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..comm import GridComm
from ..config import Auto, Batching, check_field
from ..errors import ConfigError, Fault, NonFiniteError
from ..likelihoods import Likelihood
from ..objectives import NegativeElbo, Objective
from ..posteriors import Posterior, Tally
from ..posteriors.families import Scalars
from ..posteriors.sample_loop import SampleLoop
from ..trees import Inputs
from ..views import OwnView, SharedView
from .batch_trial import BatchTrial
from .data_term import DataTerm
from .equality import Comparison
from .optim import JobOptimizer
from .reducer import Reducer
from .state import StepState
from .updaters import Updater

logger = logging.getLogger(__name__)

StepViews = Literal["shared", "own"]
"""Whether the ranks of a sample group have the same inputs of an example, or each its own view of it."""


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


class VariationalStep(StepState):
    """Callable that makes one step of variational inference on the whole process grid.

    Parameters
    ----------
    posterior, likelihood, comm : Posterior, Likelihood, GridComm
        Over the weights of the network; of an example given its outputs; the process grid.
    optimizer : torch.optim.Optimizer or hpc_bnn.training.optim.JobOptimizer
        Over ``posterior.parameters()``; or `hpc_bnn.ShardedOptimizer`.
    num_samples, num_train_examples : int
        Samples of the weights per step in the whole job, K, at least the extent of the sample axis; and size of the
        training set, N: the KL per example is KL / N, whatever the batch is.
    seed, kl_weight : int, float or callable
        Key of the noise; factor of the KL: 1 is Bayes, below 1 a cold posterior. A function of the steps made so far
        anneals it (`hpc_bnn.KlAnnealing`).
    objective : Objective
        How the samples make one data term (`hpc_bnn.objectives`); by default the negative ELBO.
    autocast_dtype, max_gradient_norm : torch.dtype, float, optional
        Run the network in this dtype where torch's autocast allows; weights, gradients and sums stay in their own. Scale
        the gradient of the job (of each member of an ensemble), the KL's part included, down to this norm.
    chunk_size, batching
        Samples that a rank evaluates at once, and how: see `SampleLoop`. "auto" is 1 on a CPU, where walking is fastest,
        and measured at the first step on a GPU.
    micro_batch_size : int, optional
        Examples of this rank in one forward pass: memory is bounded, the result is the same. Not with BatchNorm.

    Attributes
    ----------
    comparison : Comparison
        What ranks must have in common (`hpc_bnn.training.equality`).
    num_steps : int
        Steps made so far: part of the noise key, to be stored with a checkpoint.
    wants_stop : bool
        Set it on any rank, for example in a signal handler: the result of the next step tells all ranks, so that they
        stop together. It travels with the gradient.
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
        batching: Batching = "auto",
        micro_batch_size: int | None = None,
    ):
        comm.grid.check_num_samples(num_samples)
        posterior.check_num_samples(num_samples, comm.grid.local_samples(num_samples))
        check_field("chunk_size", chunk_size)
        check_field("batching", batching)
        check_field("micro_batch_size", micro_batch_size)
        check_field("optimizer.max_gradient_norm", max_gradient_norm)
        if not callable(kl_weight):
            check_field("kl_weight", kl_weight)
        objective = objective or NegativeElbo()
        if not isinstance(objective, Objective):
            remedy = "Wrap a function of all members: hpc_bnn.Gathered(function)"
            raise ConfigError(Fault("objective", objective, "must be an hpc_bnn.objectives.Objective", remedy))
        objective.check(likelihood, num_samples)
        self.posterior, self.likelihood, self.comm = posterior, likelihood, comm
        is_of_job = isinstance(optimizer, JobOptimizer)
        self.optimizer = optimizer if is_of_job else JobOptimizer.of(optimizer, posterior, comm)
        self.num_samples, self.num_train_examples, self.seed = num_samples, num_train_examples, seed
        self.kl_weight = kl_weight if callable(kl_weight) else lambda num_steps: kl_weight
        self.objective, self.max_gradient_norm = objective, max_gradient_norm
        self.num_steps, self.micro_batch_size = 0, micro_batch_size
        self.wants_stop = self._is_prepared = False
        size, speaks = 1 if chunk_size == "auto" else chunk_size, comm.grid.is_first("world")
        self.loop = SampleLoop(posterior, size, batching, autocast_dtype, speaks)
        self.data_term = DataTerm(self.loop, objective, likelihood, comm, lambda: self.reducer)
        self._trial = BatchTrial(self.loop, self.data_term.statistic, measures=chunk_size == "auto")
        # Of a sample in what depends on the sample alone: it counts once in the job
        self._prior_share = 1.0 / num_samples if comm.grid.is_first("data") else 0.0
        self.comparison = Comparison(comm)
        self._targets: list[tuple[Tensor, Tensor]] = []
        self._phase: Literal["idle", "accumulating", "accumulated", "reduced"] = "idle"
        self._begun = 0  # what `Posterior.num_begun` was
        self._check_features()
        self.scalars = Scalars.on(posterior.buffer.flat.device)
        self.scalars.num_samples.fill_(num_samples)

    @property
    def reducer(self) -> Reducer:
        """What sums over the job."""
        return self.optimizer.reducer

    @property
    def updater(self) -> Updater:
        """What updates the parameters."""
        return self.optimizer.updater

    @property
    def num_passes(self) -> int:
        """Forward passes over the samples in the last step on this rank: 1 or 2 (`DataTerm`)."""
        return self.data_term.num_passes

    def __call__(
        self, x: Inputs | SharedView, y: Tensor, global_batch_size: int, *, views: StepViews = "shared"
    ) -> StepResult:
        """Make one step. Collective over the world: one sum over each axis of extent above 1.

        An objective that couples the samples adds what its docstring says over the sample axis; a module with
        BatchNorm three small sums over the data axis per layer and sample (five with two passes). A deep
        ensemble sums its gradient over the data axis only, and a few scalars over both.

        Parameters
        ----------
        x : Tensor, tree of tensors, or Views
            [B_local, ...] inputs of this rank's part of the batch; B_local may be 0 and may differ between data groups.
            A dict is ``module(**x)``, a list or tuple ``module(*x)``. `hpc_bnn.data.Augmentation` makes views, of which
            samples see different ones.
        y : Tensor
            [B_local, ...] targets.
        global_batch_size : int
            Examples of this step in the whole job.
        views : {"shared", "own"}
            Whether the ranks of a sample group have the same x, or each its own view of the same examples, as of an
            augmentation in the loader.

        Raises
        ------
        NonFiniteError
            On all ranks, before the update, when the loss or a gradient of any rank is not finite.
        DataError
            On all ranks, before the update, when a target of any rank lies outside the support of the likelihood.
        RankError
            On all ranks, before the update, when ranks differ in what they must have in common (`Comparison`), or have not
            ``global_batch_size`` examples together.
        ConfigError
            The module, the posterior or the optimizer is not what can be trained, or was changed in a way that cannot be
            followed; or gradients are switched off.
        """
        if views not in get_args(StepViews):
            raise ConfigError(Fault("views", views, "must be shared or own", "Leave it out"))
        self.accumulate_batch_(OwnView(x) if views == "own" else x, y, global_batch_size)
        self.reduce_()
        return self.update_()

    # --- the order of a step ------------------------------------------------------------------------

    def accumulate_batch_(self, x: Inputs | SharedView, y: Tensor, global_batch_size: int) -> None:
        """Begin a step and accumulate this rank's examples, in micro-batches where they are set. Collective as `accumulate_`."""
        self._phase = "idle"  # of a step that was given up
        x = x if isinstance(x, SharedView) else SharedView(x)
        _check_rows(x, y)
        for span, part in x.parts(self.micro_batch_size):
            self.accumulate_(part, y[span], global_batch_size, is_last=span.stop == len(x))

    def accumulate_(self, x: Inputs | SharedView, y: Tensor, global_batch_size: int, *, is_last: bool = True) -> None:
        """Add the gradient of some examples' data term on this rank's samples. Call it for each micro-batch.

        Local for the negative ELBO; otherwise collective as `__call__` says, for each micro-batch. ``global_batch_size``
        counts all micro-batches; after the one that ``is_last`` no other follows.
        """
        posterior, comm = self.posterior, self.comm
        self._check()
        x = x if isinstance(x, SharedView) else SharedView(x)
        _check_rows(x, y)
        if x.num_samples not in (None, self.num_samples):
            rule, remedy = f"the views are made for {x.num_samples} samples", "Make them for as many"
            raise ConfigError(Fault("num_samples", self.num_samples, rule, remedy))
        is_first = self._phase == "idle" or self.comparison.num_examples == 0  # no example yet: nothing is lost
        self._expect(("idle", "accumulating"), "accumulate_", "update_()")
        if not (is_first and is_last):
            posterior.check_features({"micro_batch_size": len(x)}, micro_batches=True)
        mine = samples = comm.grid.local_samples(self.num_samples)
        counts_samples = posterior.capabilities.kl in ("Monte Carlo", "point") and self._prior_share > 0
        if len(x) == 0 and not posterior.network.batch_norms.layers and not (is_last and counts_samples):
            mine = range(0)  # nothing to evaluate, and nobody waits for this rank
        # On the device: the flag travels with the sum, so that all ranks raise. Classes are indices: a wrong one is no memory
        misfits = ~self.likelihood.fits(y)
        self._targets = [*([] if is_first else self._targets), (y, misfits)]
        y = y if y.is_floating_point() else y.masked_fill(misfits, 0)
        if is_first:
            self._begin(x, y, samples, global_batch_size)
        posterior.buffer.tally[Tally.NUM_MISFITS] += misfits.any()
        posterior.sampler.switch_(True, self._first_example + self.comparison.num_examples)
        self.comparison.add_(x, y)
        try:
            with posterior.network.running(lambda tensor: comm.sum_(tensor, "data")):
                # One coupling for each micro-batch: objectives couple samples, not examples
                coupling = self.objective.begin(y, samples, self.num_samples)
                kl = self._prior_share * is_last, self.kl_weight(self.num_steps) / self.num_train_examples
                self.data_term(mine, x, y, self.key, coupling, 1.0 / global_batch_size, kl, is_last)
                posterior.buffer.tally[Tally.DATA_TERM] += coupling.data_term() / global_batch_size
        finally:
            posterior.sampler.switch_(False)
        self._phase = "accumulated" if is_last else "accumulating"

    def _expect(self, phases: Sequence[str], what: str, before: str) -> None:
        """Raise `ConfigError` where the step is in none of some phases; otherwise it is idle until it is set again."""
        phase = self._phase
        if phase not in phases:
            rule = f"{before} comes before it, and the step is {phase}"
            raise ConfigError(Fault("VariationalStep", what, rule, "Call them in this order, or the step itself"))
        self._phase = "idle"  # of a step that is given up here
        if phase != "idle" and self._begun != self.posterior.num_begun:
            rule = (
                "since accumulate_ the posterior was begun anew, by a prediction or another step: the gradient is lost"
            )
            raise ConfigError(Fault("VariationalStep", what, rule, "Finish the step first"))

    def reduce_(self) -> None:
        """Sum gradient, statistics of BatchNorm and scalars over the job. Collective over the world."""
        self._expect(("accumulated",), "reduce_", "accumulate_(..., is_last=True)")
        posterior, tally = self.posterior, self.posterior.buffer.tally
        self.reducer.start_()
        posterior.complete_(self._prior_share)
        # NaN and infinity survive a sum. The flag travels with the gradient: no collective of its own.
        self._local_is_broken = ~self.reducer.local_checksum().isfinite()
        tally[Tally.NUM_BROKEN] = self._local_is_broken
        tally[Tally.NUM_STOPS] = self.wants_stop
        settings = {
            "kl_weight": self.kl_weight(self.num_steps),
            "the learning rate": [g["lr"] for g in self.updater.optimizer.param_groups if not torch.is_tensor(g["lr"])],
            "num_samples": self.num_samples,
            "num_train_examples": self.num_train_examples,
            "seed": self.seed,
        }
        self.comparison.fill_(tally, settings, by_place=posterior.sampler.noisy is not None)
        self.reducer.reduce_()
        self._phase = "reduced"

    def update_(self) -> StepResult:
        """Add the KL, clip, and update the parameters. Local, where the optimizer's state is not divided.

        `NonFiniteError` and `DataError` as in `__call__`: they are collective over the world, and name the ranks.
        """
        self._expect(("reduced",), "update_", "reduce_()")
        posterior = self.posterior
        tally = posterior.buffer.tally.tolist()
        if tally[Tally.NUM_MISFITS]:
            mine = next((y[misfits][0].item() for y, misfits in self._targets if misfits.any()), None)
            wrong = {rank: target for rank, target in enumerate(self.comm.gather_objects(mine)) if target is not None}
            where = f" on rank {', '.join(map(str, wrong))} in step {self.num_steps}"
            raise self.likelihood.fault_of(next(iter(wrong.values())), where)
        if tally[Tally.NUM_BROKEN]:
            mine = (self.comm.grid.rank, socket.gethostname()) if self._local_is_broken else None
            ranks = [f"rank {p[0]} on {p[1]}" for p in self.comm.gather_objects(mine) if p is not None]
            raise NonFiniteError(
                f"step {self.num_steps}: the loss or a gradient is not finite on {', '.join(ranks)}. "
                "The parameters were not updated. Try a smaller learning rate or check the data"
            )
        self.comparison.check(tally)
        kl_weight = self.kl_weight(self.num_steps)
        self.scalars.kl_weight.fill_(kl_weight / self.num_train_examples)
        self.scalars.step.fill_(self.num_steps)
        self.scalars.learning_rate.fill_(self.updater.optimizer.param_groups[0]["lr"])
        # The order is that of the mathematics: what is linear first (it scales the sum of the job), then the KL, which is a
        # function of replicated numbers and enters once, then the norm of both together.
        posterior.finish_(self.scalars)
        kl = posterior.add_kl_(self.scalars).item()
        if self.max_gradient_norm is not None:
            self.updater.clip_(self.max_gradient_norm)
        self.updater.update_()
        posterior.buffer.take_gradients_away_()
        posterior.after_update_(self.scalars, self.key)
        self.num_steps += 1
        data_term = tally[Tally.DATA_TERM]
        nelbo = data_term + kl_weight * kl / self.num_train_examples
        return StepResult(nelbo, data_term, kl, kl_weight, tally[Tally.NUM_STOPS] > 0)

    def leave_out_checks(self) -> None:
        """Leave out what looks at numbers before the first step: `hpc-bnn plan` has none. Local."""
        self._is_prepared = self.data_term.has_said_passes = self._trial.is_done = True
        self.posterior.network.looks = self.posterior.network.batch_norms.reads_counts = self.comparison.looks = False

    def _check_features(self) -> None:
        """Raise `ConfigError` where posterior, objective and optimizer do not go together in the module's mode. Local."""
        named = {"objective.name": self.objective.name, "micro_batch_size": self.micro_batch_size}
        self.posterior.check_features(
            named, couples=self.objective.couples, micro_batches=self.micro_batch_size is not None,
            overlap=self.reducer.in_blocks, sharded=self.reducer.divided,
        )  # fmt: skip
        self._was_training = self.posterior.module.training

    def _begin(self, x: SharedView, y: Tensor, samples: range, global_batch_size: int) -> None:
        """Check and try, once each, what can be on a batch, and begin the step. Local, but for `Reducer.begin_`."""
        posterior = self.posterior
        self.comparison.make_replicas_equal_(posterior)
        self.reducer.begin_()  # waits for sums that write into the buffer, before it is emptied
        posterior.begin_()  # it notices changed layers, which ask for another look
        if len(x) and (not self._is_prepared or posterior.network.needs_look() or self._trial.is_due(samples)):
            if not self._is_prepared:
                posterior.sampler.prepare_(x.of(samples[0]))
                self._is_prepared = True
            self.loop.look(samples, x, self.key, self.comm.grid)
            self._trial(samples, x, y, self.key)
            posterior.begin_()  # these have drawn
        self.comparison.begin_(self.num_steps, global_batch_size)
        self._first_example = self.comm.grid.local_examples(global_batch_size).start
        self._begun = self.posterior.num_begun
        grid = self.comm.grid
        if self.num_steps == 0 and grid.is_first("world") and global_batch_size < grid.data_size:
            logger.warning(
                "a batch of %d examples for %d data groups: the others have nothing to do. Use a larger "
                "global_batch_size or sample_size",
                global_batch_size,
                grid.data_size,
            )

    def _check(self) -> None:
        """Raise `ConfigError` where what is around this step makes it wrong. Local; a few microseconds."""
        if not torch.is_grad_enabled():
            context = "inference_mode" if torch.is_inference_mode_enabled() else "no_grad"
            rule = f"a step differentiates, and here torch.{context}() is in force"
            raise ConfigError(Fault("VariationalStep", "call", rule, f"Call it outside of torch.{context}()"))
        if self.posterior.module.training is not self._was_training:
            self._check_features()
        self.posterior.network.check_trainable()
        self.updater.check()


def _check_rows(x: SharedView, y: Tensor) -> None:
    """Raise `ConfigError` where inputs and targets are of different numbers of examples. Local."""
    if y.shape[:1] != (len(x),):
        rule = f"x has {len(x)} examples, and y needs a target for each on dim 0"
        raise ConfigError(Fault("y", list(y.shape), rule, "Give x and y of the same examples"))
