"""One optimizer step: draw, forward, objective, backward, reduce, update.

The layout law rests here: each rank divides by the global number of samples and examples, the job sums, and the KL
enters once, after the sum.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import logging
import math
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..comm import GridComm
from ..config import Auto, Batching, Capture, check_field
from ..errors import ConfigError, DataError, Fault, NonFiniteError, at_least, check_kind, count
from ..likelihoods import Likelihood
from ..noise import Key, Stream
from ..objectives import NegativeElbo, Objective
from ..posteriors import Posterior, Tally
from ..posteriors.batch_norm import of_one_rank
from ..posteriors.families import Family, Scalars
from ..posteriors.sample_loop import SampleLoop
from ..posteriors.sampler import Sampler
from ..trees import Inputs, map_leaves, tensors_of
from ..views import OwnView, SharedView
from .batch_trial import BatchTrial
from .capture import Fixed, Recorder
from .captured_data_term import CapturedDataTerm
from .data_term import DataTerm
from .equality import Comparison, definition_of
from .latch import Latch, Pending, StepResult, wait_for
from .optim import JobOptimizer
from .places import Places
from .reducer import Reducer
from .state import StepState
from .updaters import OF_POSTERIOR, Updater

logger = logging.getLogger(__name__)

LAG = 2
"""Steps that are launched before the numbers of the first of them are read."""

_READ_ONCE = (
    "posterior", "likelihood", "comm", "num_samples", "seed", "objective", "autocast_dtype", "chunk_size", "batching", "capture"
)  # fmt: skip

_UNDERFLOW = "gradients below 6e-8 become 0 in it, and a step does not scale the loss"

StepViews = Literal["shared", "own"]
"""Whether the ranks of a sample group have the same inputs of an example, or each its own view of it."""


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
        Samples that a rank evaluates at once, and how: see `SampleLoop`. "auto" is 1.
    micro_batch_size : int, optional
        Examples of this rank in one forward pass: memory is bounded, the result is the same. Not with BatchNorm.
    capture : {"auto", "on", "off"}
        Launch the operations of a step as CUDA graphs, and wait for no step: the numbers are the same. auto: on a GPU. On
        a CPU, on goes the same way without graphs.

    Attributes
    ----------
    comparison : Comparison
        What ranks must have in common (`hpc_bnn.training.equality`).
    num_steps : int
        Steps made so far: part of the noise key, to be stored with a checkpoint.
    wants_stop, wants_checkpoint : bool
        Set them on any rank, for example in a signal handler: the result of the next step tells all ranks, so that they
        stop, or write a checkpoint, together. They travel with the gradient.
    recorder : Recorder, optional
        What captures; None where nothing is captured.
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
        capture: Capture = "auto",
    ):
        check_kind("posterior", posterior, Posterior, "Make it of the network: hpc_bnn.MeanFieldGaussian(net)")
        check_kind("likelihood", likelihood, Likelihood, "Use one of hpc_bnn, as Categorical(num_classes) for classes")
        check_kind("comm", comm, GridComm, "Give what hpc_bnn.connect() returns")
        count("Try 8").check("num_samples", num_samples)
        comm.grid.check_num_samples(num_samples)
        posterior.check_num_samples(num_samples, comm.grid.local_samples(num_samples))
        if autocast_dtype == torch.float16:
            raise ConfigError(Fault("autocast_dtype", autocast_dtype, _UNDERFLOW, "Use torch.bfloat16"))
        check_field("chunk_size", chunk_size)
        check_field("batching", batching)
        check_field("capture", capture)
        objective = objective or NegativeElbo()
        if not isinstance(objective, Objective):
            remedy = "Wrap a function of all members: hpc_bnn.Gathered(function)"
            raise ConfigError(Fault("objective", objective, "must be an hpc_bnn.objectives.Objective", remedy))
        objective.check(likelihood, num_samples)
        prior = getattr(posterior.family_, "prior", None)
        _check_learned(posterior, likelihood=likelihood, objective=objective, prior=prior)
        self.posterior, self.likelihood, self.comm = posterior, likelihood, comm
        self.optimizer: Any = optimizer  # a JobOptimizer (`__setattr__`)
        self.num_samples, self.num_train_examples, self.seed = num_samples, num_train_examples, seed
        self.kl_weight: Any = kl_weight  # a function
        self.objective, self.max_gradient_norm = objective, max_gradient_norm
        self.num_steps, self.micro_batch_size = 0, micro_batch_size
        self.wants_stop = self.wants_checkpoint = self._is_prepared = self._has_agreed = False
        size, speaks = 1 if chunk_size == "auto" else chunk_size, comm.grid.is_first("world")
        self.loop = SampleLoop(posterior, size, batching, autocast_dtype, speaks)
        given = self.loop, objective, likelihood, comm, self._reducer
        self.data_term = self._plain_data_term = DataTerm(*given)
        self._trial = BatchTrial(self.loop, self.data_term.statistic)
        # Of a sample in what depends on the sample alone: it counts once in the job
        self._prior_share = 1.0 / num_samples if comm.grid.is_first("data") else 0.0
        self.comparison = Comparison(comm)
        self._targets: list[tuple[Tensor, Tensor | None]] = []  # and weights
        self._phase: Literal["idle", "accumulating", "accumulated", "reduced"] = "idle"
        self._begun = 0  # what `Posterior.num_begun` was
        self._check_features()
        device = posterior.buffer.flat.device
        self.scalars = Scalars.on(device)
        self.recorder: Recorder | None = None
        self._is_captured = self._is_latched = self._completes_with_update = False
        self._num_updates = 0  # of this object
        if capture == "on" or (capture == "auto" and device.type == "cuda"):
            self.recorder, self._fixes = Recorder(device, speaks), Fixed()
            self._latch = Latch(posterior, num_samples, len(self.updater.optimizer.param_groups))
            self.scalars, options = self._latch.scalars, {"seed": seed, "num_samples": num_samples}
            self._captured = CapturedDataTerm(*given, recorder=self.recorder, latch=self._latch, **options)
        self.scalars.num_samples.fill_(num_samples)

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a new value as that of the constructor, or refuse one that comes too late."""
        if name in _READ_ONCE and "scalars" in vars(self):
            raise ConfigError(Fault(name, value, "a step reads it when it is made", "Make a new VariationalStep"))
        if name == "kl_weight":
            value = _checked_weight(value)
        elif name == "optimizer" and not isinstance(value, JobOptimizer):
            check_kind(name, value, torch.optim.Optimizer, OF_POSTERIOR)
            value = JobOptimizer.of(value, self.posterior, self.comm)
        elif name == "max_gradient_norm":
            check_field("optimizer.max_gradient_norm", value)
        elif name == "micro_batch_size":
            check_field(name, value)
        elif name == "num_steps":
            count("Leave it alone", least=0).check(name, value)
        elif name == "num_train_examples":
            at_least(1, "Give the size of the training set").check(name, value)
        super().__setattr__(name, value)

    @property
    def reducer(self) -> Reducer:
        """What sums over the job."""
        return self.optimizer.reducer

    def _reducer(self) -> Reducer:  # a method: a copy of the step has its own
        return self.reducer

    @property
    def updater(self) -> Updater:
        """What updates the parameters."""
        return self.optimizer.updater

    @property
    def num_passes(self) -> int:
        """Forward passes over the samples in the last step on this rank: 1 or 2 (`DataTerm`)."""
        return self.data_term.num_passes

    def __call__(
        self,
        x: Inputs | SharedView,
        y: Tensor,
        global_batch_size: int,
        *,
        views: StepViews = "shared",
        weights: Tensor | None = None,
    ) -> StepResult:
        """Make one step. Collective over the world: the gradient is summed as ``reduction`` of `GridComm` says.

        An objective that couples the samples adds what its docstring says over the sample axis; a module with
        BatchNorm two small sums over the data axis per layer and sample (three with two passes; in float64 three and five). A deep
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
        weights : Tensor, optional
            [B_local] weights of the examples, finite and 0 or more: each multiplies the data term of its example. The sum is
            divided by ``global_batch_size`` all the same, and N stays: weights of mean 1 keep the balance with the KL.

        Raises
        ------
        NonFiniteError, DataError
            On all ranks, before the update, when the loss, the KL or a gradient of any rank is not finite; when a
            target of any rank lies outside the support of the likelihood, or a weight is negative or not finite.
        RankError
            Likewise, when ranks differ in what they must have in common (`Comparison`), or together have other than
            ``global_batch_size`` examples.
        ConfigError
            The module, the posterior or the optimizer is not what can be trained, or was changed in a way that cannot be
            followed; or gradients are switched off.
        """
        if views not in get_args(StepViews):
            raise ConfigError(Fault("views", views, "must be shared or own", "Leave it out"))
        self.accumulate_batch_(OwnView(x) if views == "own" else x, y, global_batch_size, weights)
        self.reduce_()
        return self.update_()

    # --- the order of a step ------------------------------------------------------------------------

    def accumulate_batch_(
        self, x: Inputs | SharedView, y: Tensor, global_batch_size: int, weights: Tensor | None = None
    ) -> None:
        """Begin a step and accumulate this rank's examples, in micro-batches where they are set. Collective as `accumulate_`."""
        self._phase = "idle"  # of a step that was given up
        x = _as_view(x)
        _check_rows(x, y, weights, self.posterior.buffer.flat.device)
        for span, part in x.parts(self.micro_batch_size):
            of_part, is_last = None if weights is None else weights[span], span.stop == len(x)
            self.accumulate_(part, y[span], global_batch_size, is_last=is_last, weights=of_part)

    def accumulate_(
        self,
        x: Inputs | SharedView,
        y: Tensor,
        global_batch_size: int,
        *,
        is_last: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        """Add the gradient of some examples' data term on this rank's samples. Call it for each micro-batch.

        Local for the negative ELBO; otherwise collective as `__call__` says, for each micro-batch. ``global_batch_size``
        counts all micro-batches; after the one that ``is_last`` no other follows.
        """
        posterior, comm = self.posterior, self.comm
        self._check()
        x = x if isinstance(x, SharedView) else _as_view(x)
        _check_rows(x, y, weights, self.posterior.buffer.flat.device)
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
        self._targets = [*([] if is_first else self._targets), (y, weights)]
        if is_first:
            self._begin(x, y, samples, global_batch_size)
        else:
            self.comparison.check_part_of(self.num_steps, global_batch_size)
            posterior.sampler.forget_()  # what a backward pass of the user has left in the weights
        kl = self._prior_share * is_last, self.kl_weight(self.num_steps) / self.num_train_examples
        given, y = y, self.data_term.begin_(x, y, kl, is_first)
        given_weights, weights = weights, self.data_term.weights_(weights)
        first_example: int | Tensor = self._first_example + self.comparison.num_examples
        if self._is_captured and posterior.sampler.noisy is not None:
            first_example = self._latch.first_example.fill_(first_example)
        posterior.sampler.switch_(True, first_example)
        self.comparison.add_(x, given, given_weights)
        try:
            is_alone = comm.grid.data_size == 1
            with posterior.network.running(of_one_rank if is_alone else lambda tensor: comm.sum_(tensor, "data")):
                # One coupling for each micro-batch: objectives couple samples, not examples
                coupling = self.objective.begin(y, samples, self.num_samples)
                coupling.present, coupling.weights = self.likelihood.present(y), weights
                if weights is not None and not coupling.weighs:
                    rule, remedy = f"{self.objective.name} is not defined for weights of examples", "Leave them out"
                    raise ConfigError(Fault("weights", list(weights.shape), rule, f"{remedy}, or set Coupling.weighs"))
                data_term = self.data_term(mine, x, y, self.key, coupling, 1.0 / global_batch_size, kl, is_last)
            self.data_term.add_(data_term, global_batch_size, is_last)
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
            rule = "since accumulate_ the posterior was begun anew, by a prediction or another step"
            raise ConfigError(Fault("VariationalStep", what, f"{rule}: the gradient is lost", "Finish the step first"))

    def reduce_(self) -> None:
        """Sum gradient, statistics of BatchNorm and scalars over the job. Collective over the world.

        The parameters get their gradients in `update_` only: between the two ``clip_grad_norm_`` would find none.
        """
        self._expect(("accumulated",), "reduce_", "accumulate_(..., is_last=True)")
        posterior, tally = self.posterior, self.posterior.buffer.tally
        self.reducer.start_()
        posterior.complete_(self._prior_share)
        # NaN and infinity survive a sum. The flag travels with the gradient: no collective of its own.
        checksum, numbers = self.reducer.local_checksum, self._numbers(self.comparison.num_examples)
        if self._is_captured and self.recorder is not None:
            self._latch.amend_(self.num_steps, numbers)
            self._is_broken_here = self._latch.is_broken_here
            if not self._completes_with_update:
                complete, state = functools.partial(self._captured.completing_, checksum), [tally, self._is_broken_here]
                self.recorder.run("complete", (), self.num_steps, complete, state=state)
        else:
            self._is_broken_here = self.data_term.complete_(checksum, numbers)
        self.comparison.fill_(tally)
        self.reducer.reduce_()
        self._phase = "reduced"

    def update_(self) -> StepResult:
        """Add the KL, clip, and update the parameters. Local, where the optimizer's state is not divided.

        `NonFiniteError` and `DataError` as in `__call__`: they are collective over the world, and name the ranks.
        """
        self._expect(("reduced",), "update_", "reduce_()")
        self._num_updates += 1
        if self._is_latched:
            return self._update_latched_()
        self._settle(0)  # no update on top of a step that was not sound
        posterior = self.posterior
        if posterior.buffer.tally.is_cuda:
            event = torch.cuda.Event()
            event.record()
            wait_for(event)
        tally = posterior.buffer.tally.tolist()
        self._check_sound(tally, self._is_broken_here, self._targets, self.comparison)
        kl_weight = self.kl_weight(self.num_steps)
        self.scalars.kl_weight.fill_(kl_weight / self.num_train_examples)
        self.scalars.step.fill_(self.num_steps)
        self.scalars.learning_rate.fill_(self.updater.optimizer.param_groups[0]["lr"])
        # The order is that of the mathematics: what is linear first (it scales the sum of the job), then the KL, which is a
        # function of replicated numbers and enters once, then the norm of both together.
        posterior.finish_(self.scalars)
        kl = posterior.add_kl_(self.scalars).item()
        self._check_kl(kl)
        if self.max_gradient_norm is not None:
            self.updater.clip_(self.max_gradient_norm)
        self.updater.update_()
        posterior.buffer.take_gradients_away_()
        posterior.after_update_(self.scalars, self.key)
        self.num_steps += 1
        return StepResult.of(tally, kl, kl_weight, self.num_train_examples)

    def _check_sound(
        self,
        tally: list[float],
        is_broken_here: Tensor | float,
        targets: Sequence[tuple[Tensor, Tensor | None]],
        comparison: Comparison,
    ) -> None:
        """Raise what the sums of a step say, on all ranks. Collective over the world if they do."""
        if tally[Tally.NUM_MISFITS]:
            misfits = [(False, y[~self.likelihood.fits(y)]) for y, _ in targets]
            misfits += [(True, weights[DataTerm.unfit(weights)]) for _, weights in targets if weights is not None]
            mine = next(((is_weight, found[0].item()) for is_weight, found in misfits if len(found)), None)
            wrong = {rank: found for rank, found in enumerate(self.comm.gather_objects(mine)) if found is not None}
            where = f" on rank {', '.join(map(str, wrong))} in step {self.num_steps}"
            if not wrong:  # the tensors have been written anew since: on a GPU the host looks two steps later
                raise DataError(
                    f"a target or a weight of step {self.num_steps} cannot be. The batch has been overwritten since: give each "
                    "step tensors of its own, or check the data"
                )
            is_weight, value = next(iter(wrong.values()))
            if is_weight:
                raise DataError(f"a weight is {value:g}{where}: weights of examples are finite, and 0 or more")
            raise self.likelihood.fault_of(value, where)
        if tally[Tally.NUM_BROKEN]:
            mine = (self.comm.grid.rank, socket.gethostname()) if is_broken_here else None
            ranks = [f"rank {p[0]} on {p[1]}" for p in self.comm.gather_objects(mine) if p is not None]
            rule = f"step {self.num_steps}: the loss or a gradient is not finite on {', '.join(ranks)}"
            remedy = "The parameters were not updated. Try a smaller learning rate or check the data"
            raise NonFiniteError(f"{rule}. {remedy}")
        comparison.check(tally)

    def _check_kl(self, kl: float) -> None:
        if not math.isfinite(kl):
            self.posterior.buffer.take_gradients_away_()
            raise NonFiniteError(
                f"step {self.num_steps}: the KL is {kl}. The parameters were not updated. Look at them (scales of "
                "exp(log_scale) may be infinite), at the prior, and at the learning rate"
            )

    # --- without a wait for the device ------------------------------------------------------------------

    @property
    def lag(self) -> int:
        """Steps that may still run when the next one begins: their errors, and what they know of a stop, come that late."""
        return 0 if self.recorder is None else LAG

    def settle(self) -> None:
        """Wait for all steps. Collective over the world where one of them was not sound: it raises what `__call__` does."""
        self._settle(0)

    def _settle(self, lag: int) -> None:
        """Read what all steps but the last few have found: the same steps on all ranks."""
        pending: deque[Pending] = self._latch.pending if self.recorder is not None else deque()
        while len(pending) > lag:
            num_steps, result, wait, evidence = pending.popleft()
            found, _ = wait(), result.nelbo  # before its memory is used again
            if not found.is_sound:
                self._forget_pending()
                self.num_steps = num_steps  # the parameters are those of that step
                self._check_sound(found.tally, found.is_broken_here, *evidence)
                self._check_kl(found.kl)

    def _forget_pending(self) -> None:
        if self.recorder is not None:
            while self._latch.pending:
                _ = self._latch.pending.popleft().result.nelbo  # somebody may hold it
            self._latch.is_sound.fill_(True)

    def set_chunk_size_(self, chunk_size: int) -> None:
        """Evaluate so many samples at once from the next step on, after a new proof. Collective as `settle`; alike on all ranks."""
        count("Try 8").check("chunk_size", chunk_size)
        self.settle()
        self.loop.chunk_size, self._trial.is_done = chunk_size, False
        if self.recorder is not None:
            self.recorder.forget()
            self._captured.forget()

    def gather_state(self, *, to_first: bool = False) -> dict[str, Any]:  # noqa: D102
        self.settle()
        return super().gather_state(to_first=to_first)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        for pending in self._latch.pending if self.recorder is not None and self.comm.grid.world_size > 1 else ():
            if not pending.wait().is_sound:  # to say why is collective
                raise NonFiniteError(f"step {pending.num_steps} was not sound. Call settle() on all ranks to hear why")
        return super().state_dict()

    def _begin_load(self, state: dict[str, Any]) -> tuple[Places, Callable[[], None]]:
        places, end = super()._begin_load(state)

        def end_too() -> None:
            end()
            self._forget_pending()
            self._num_updates = 0  # the next update makes what the state may lack

        return places, end_too

    def _choose_path(self) -> None:
        """Decide whether the samples of a step are captured, and say why not. Local."""
        if self.recorder is None:
            return
        why, self._is_latched = None, False
        has_norms = self.posterior.network.batch_norms.layers and self.posterior.module.training
        if has_norms and self.comm.grid.data_size > 1:
            why = "BatchNorm sums its statistics over the data axis in each pass"
        elif self.reducer.in_blocks:
            why = "sums overlap with the backward pass"
        elif len(self._latch.rates) != len(self.updater.optimizer.param_groups):
            why = "the optimizer has got another group of parameters"
        elif (reason := self.updater.why_not_latched()) is not None:
            self.recorder.say(f"the host waits before each update: {reason}")
        else:
            self._is_latched = self._num_updates > 0  # the first makes the state of the optimizer
        if why is not None:
            self.recorder.say(why)
        self._is_captured = why is None
        # With nothing to sum over ranks, one graph less
        self._completes_with_update = self._is_latched and self.comm.grid.world_size == 1
        self.data_term = self._captured if self._is_captured else self._plain_data_term

    def _update_latched_(self) -> StepResult:
        """Do what `update_` does where the device finds the step sound, and wait for nothing. Local."""
        posterior, latch, recorder = self.posterior, self._latch, self.recorder
        family, norms = posterior.family_, posterior.network.batch_norms
        completes = self._completes_with_update
        assert recorder is not None

        def body() -> None:
            if completes:
                self._captured.completing_(self.reducer.local_checksum)
            with latch.keeping(norms.running()):
                posterior.finish_(self.scalars)
                kl = posterior.add_kl_(self.scalars)
                latch.look_(kl)
            if self.max_gradient_norm is not None:
                self.updater.clip_(self.max_gradient_norm)
            self.updater.update_latched_(latch.found_inf, latch.rates)
            posterior.buffer.take_gradients_away_()
            if type(family).after_update_ is not Family.after_update_:
                latch.clock.now[1:].zero_()
                with latch.keeping(posterior.buffer.values.values()):
                    posterior.after_update_(self.scalars, Key(self.seed, Stream.NOISE, clock=latch.clock))
            latch.find_(kl)

        also = [*self.updater.fixed(), *norms.fixed(), posterior.module.training, self.max_gradient_norm]
        fixed = self._fixes.now(family, also=also)
        slots = [*posterior.buffer.values.values(), posterior.buffer.reduced, *norms.running()]
        state = [*slots, *self.updater.state(), *latch.state(), *posterior.sampler.work.values()]
        recorder.run(("update", completes), fixed, self.num_steps, body, state=state)
        evidence = self._targets, copy.copy(self.comparison)  # the next step begins others
        result = latch.send_(self.num_steps, self.kl_weight(self.num_steps), self.num_train_examples, evidence)
        self.num_steps += 1
        return result

    def leave_out_checks(self) -> None:
        """Leave out what looks at numbers in the first step: `hpc-bnn plan` has none. Local."""
        self._num_updates = 1
        self._is_prepared = self._has_agreed = self.data_term.has_said_passes = self._trial.is_done = True
        self.posterior.network.looks = self.posterior.network.batch_norms.reads_counts = self.comparison.looks = False

    def _check_features(self) -> None:
        """Raise `ConfigError` where posterior, objective and optimizer do not go together in the module's mode. Local."""
        named = {"objective.name": self.objective.name, "micro_batch_size": self.micro_batch_size}
        self.posterior.check_features(
            named, couples=self.objective.couples, micro_batches=self.micro_batch_size is not None,
            overlap=self.reducer.in_blocks, sharded=self.reducer.divided, data_axis=self.comm.grid.data_size > 1,
        )  # fmt: skip
        self._was_training = self.posterior.module.training

    def _begin(self, x: SharedView, y: Tensor, samples: range, global_batch_size: int) -> None:
        """Check and try, once each, what can be on a batch, and begin the step. Local, but for the first step."""
        posterior = self.posterior
        count("Count the examples of the step in the whole job").check("global_batch_size", global_batch_size)
        self._settle(LAG - 1)
        self.comparison.make_replicas_equal_(posterior)
        self.reducer.begin_()  # waits for sums that write into the buffer, before it is emptied
        posterior.prepare_()  # it notices changed layers, which ask for another look
        self._trial.is_done &= not posterior.network.needs_look()
        if self.loop.can_batch and self.loop.chunk_size > 1 and _has_hooks(posterior.network.drawn_parameters()):
            self.loop.fall_back(RuntimeError("a weight has hooks, which a batch would not run"))
        if len(x) and (not self._is_prepared or posterior.network.needs_look() or self._trial.is_due(samples)):
            posterior.read_slots_()
            if not self._is_prepared:
                posterior.sampler.prepare_(x.of(samples[0]))
                self._is_prepared = True
            self.loop.look(samples, x, self.key, self.comm.grid)
            self._trial(samples, x, self.data_term.usable(y)[0], self.key)
            posterior.prepare_()  # these have drawn
        if not self._has_agreed:
            self._agree()
        self.comparison.begin_(self.num_steps, global_batch_size, self._settings(), posterior)
        self._first_example = self.comm.grid.local_examples(global_batch_size).start
        self._begun = self.posterior.num_begun
        self._choose_path()
        if self._is_captured:
            kl_weight = self.kl_weight(self.num_steps) / self.num_train_examples
            self._captured.num_steps = self.num_steps
            rates, numbers = self.updater.rates(), self._numbers(len(x))
            self._latch.give_(self.num_steps, samples.start, kl_weight, global_batch_size, rates, numbers)
        if self.num_steps == 0 and self.comm.grid.is_first("world"):
            self._warn(global_batch_size)

    def _warn(self, global_batch_size: int) -> None:
        """Say before the first step what is allowed, and seldom meant. Local."""
        kind, num_groups = self.posterior.buffer.flat.device.type, self.comm.grid.data_size
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            logger.warning("torch.autocast to float16 is in force: %s. Use torch.bfloat16", _UNDERFLOW)
        if global_batch_size > self.num_train_examples:
            text = "a batch of %d examples, and num_train_examples is %g: the smaller it is the more the KL counts"
            logger.warning(text, global_batch_size, self.num_train_examples)
        if global_batch_size < num_groups:
            text = "a batch of %d examples for %d data groups: the others have nothing to do"
            logger.warning(f"{text}. Use a larger global_batch_size or sample_size", global_batch_size, num_groups)

    def _settings(self) -> dict[str, Any]:
        """Return what all ranks must have in common besides the batch."""
        return {
            "kl_weight": self.kl_weight(self.num_steps),
            "the learning rate": [g["lr"] for g in self.updater.optimizer.param_groups if not torch.is_tensor(g["lr"])],
            "the number of layers in training mode": sum([layer.training for layer in self.posterior.network.layers]),
            "num_samples": self.num_samples,
            "num_train_examples": self.num_train_examples,
            "seed": self.seed,
        }

    def _numbers(self, num_examples: int) -> list[int]:
        """Return what the host knows of what is summed, `Tally` from NUM_STOPS on."""
        known = self.comparison.numbers(num_examples, by_place=self.posterior.sampler.noisy is not None)
        return [int(self.wants_stop), int(self.wants_checkpoint), *known]

    def _agree(self) -> None:
        """Compare objective, likelihood and prior, and walk on all ranks where one cannot batch. Collective over the world.

        Once, before the first exchange of an objective; also for a rank that walks: others may have more samples, and a
        larger chunk_size.
        """
        self._has_agreed = True
        if self.comm.grid.world_size == 1:
            return
        model = {
            "the objective": definition_of(self.objective),
            "the likelihood": definition_of(self.likelihood),
            "the prior": definition_of(getattr(self.posterior.family_, "prior", None)),
        }
        self.comm.check_equal(model, "in the first step: ", "Give all ranks the same model")
        reasons = [(rank, why) for rank, why in enumerate(self.comm.gather_objects(self.loop.why_not)) if why]
        if reasons and self.loop.can_batch:
            self.loop.fall_back(RuntimeError("on rank {}: {}".format(*reasons[0])))

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


def _has_hooks(weights: Sequence[nn.Parameter]) -> bool:
    """Whether a user has put hooks on the gradients of weights; those of blocks (`Sampler.divide_`) are ours. Local."""
    after = [w._post_accumulate_grad_hooks for w in weights]
    hooks = [hook for of in after if of for hook in of.values()]
    return any([w._backward_hooks for w in weights]) or any(hook.__module__ != Sampler.__module__ for hook in hooks)


def _checked_weight(kl_weight: float | Callable[[int], float]) -> Callable[[int], float]:
    """Return a function of the steps made so far that gives numbers of 0 or more, or raises `ConfigError`. Local."""

    def weight(num_steps: int) -> float:
        now = kl_weight(num_steps) if callable(kl_weight) else kl_weight
        check_field("kl_weight", now)
        return now

    if not callable(kl_weight):
        weight(0)
    return weight


def _check_learned(posterior: Posterior, **parts: Any) -> None:
    """Raise `ConfigError` where what a step is made of holds what wants a gradient and is not in the network. Local."""
    in_network = {id(p) for p in posterior.module.parameters()}
    for name, part in parts.items():
        for key, value in getattr(part, "__dict__", {}).items():
            modules: list[nn.Module] = []
            value = _read_by(value) if inspect.isfunction(value) else value
            map_leaves(value, nn.Module, modules.append)
            held = [*tensors_of(value), *(p for module in modules for p in module.parameters())]
            if any(t.requires_grad and (name == "prior" or id(t) not in in_network) for t in held):
                rule = "only what the network holds is trained, and this wants a gradient"
                remedy = (
                    "Let wrap() of the likelihood put it into the network (Gaussian(scale='learned') does), or call "
                    "requires_grad_(False)"
                )
                if name == "prior":
                    rule, remedy = "a prior is not trained, and this wants a gradient", "Call requires_grad_(False)"
                raise ConfigError(Fault(name, f"{type(part).__name__}.{key}", rule, remedy))


def _read_by(function: Any) -> list[Tensor | nn.Module]:
    """Return tensors and modules that a function has from around it. Local."""
    names = [code.argval for code in dis.get_instructions(function) if code.opname == "LOAD_GLOBAL"]
    found = [*map(function.__globals__.get, names), *inspect.getclosurevars(function).nonlocals.values()]
    return [value for value in found if isinstance(value, (Tensor, nn.Module))]


_DETACH = "Call detach() on it; what made it trains as a part of the network"


def _as_view(x: Inputs | SharedView) -> SharedView:
    """Return inputs as a view; `ConfigError` where they have a graph. A leaf may want a gradient, as that of a PINN. Local."""
    view = x if isinstance(x, SharedView) else SharedView(x)
    tensors = tensors_of(view.before_views if view.num_samples is not None else view.of(0))
    if any([t.requires_grad and (not t.is_leaf or isinstance(t, nn.Parameter)) for t in tensors]):
        raise ConfigError(Fault("x", "with a graph", "a step trains the weights of the posterior only", _DETACH))
    return view


def _check_rows(x: SharedView, y: Tensor, weights: Tensor | None, device: torch.device) -> None:
    """Raise `ConfigError` where inputs, targets and weights are of different numbers of examples, or elsewhere. Local."""
    for name, tensor in (("y", y), *([] if weights is None else [("weights", weights)])):
        if not isinstance(tensor, Tensor):
            rule = "must be a tensor with one entry for each example on dim 0"
            raise ConfigError(Fault(name, f"of type {type(tensor).__name__}", rule, f"Give torch.as_tensor({name})"))
        if tensor.layout is not torch.strided or tensor.is_complex():
            remedy = f"Give torch.view_as_real({name})" if tensor.is_complex() else f"Give {name}.to_dense()"
            rule = "must be a dense tensor of real numbers"
            raise ConfigError(Fault(name, f"of {tensor.dtype}, {tensor.layout}", rule, remedy))
        if tensor.device != device:
            raise ConfigError(
                Fault(name, f"on {tensor.device}", f"the weights are on {device}", f"Give {name}.to({str(device)!r})")
            )
        if tensor.requires_grad:
            raise ConfigError(Fault(name, "with a graph", "a step trains the weights of the posterior only", _DETACH))
    if weights is not None and not (weights.shape == (len(x),) and weights.is_floating_point()):
        rule = f"x has {len(x)} examples, and weights are one floating-point number for each"
        raise ConfigError(Fault("weights", f"{list(weights.shape)} of {weights.dtype}", rule, "Give weights [B]"))
    if y.shape[:1] != (len(x),):
        rule = f"x has {len(x)} examples, and y needs a target for each on dim 0"
        raise ConfigError(Fault("y", list(y.shape), rule, "Give x and y of the same examples"))
