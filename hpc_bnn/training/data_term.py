"""The data term of a step on one rank: its samples are evaluated, and the gradients folded in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..comm import GridComm
from ..likelihoods import Likelihood
from ..noise import Key, from_host
from ..objectives import Coupling, Objective
from ..posteriors import Tally
from ..posteriors.network import exactly
from ..posteriors.sample_loop import SampleLoop
from ..views import SharedView
from .reducer import Reducer

logger = logging.getLogger(__name__)

Use = Callable[[Sequence[int], Tensor], None]
"""``use(samples, statistic [c, B, ...])``: what becomes of the samples that were evaluated."""


def backward(statistic: Tensor, gradient: Tensor) -> None:
    """Go through the backward pass of a network, in the dtypes of its forward pass: the user's autocast is for that one. Local."""
    with exactly(statistic):
        statistic.backward(gradient)


class _BackwardError(Exception):
    """The backward pass of a batch of samples failed, with the cause; nothing of it was folded in."""


class DataTerm:
    """Evaluates the samples of a rank and folds in the gradient of the data term, in one pass or two.

    An objective that couples the samples needs what all of them gave before the gradient of any is known. Where one
    chunk holds all samples of this rank, its graph waits for the exchange: one pass. Otherwise a pass without gradient
    goes before. ``reducer()`` returns the `Reducer` of the step, whose sums may begin in the last backward pass.
    ``num_passes`` are the forward passes over the samples in the last call, 1 or 2; ``has_said_passes`` says that the
    user knows of the second.
    """

    def __init__(
        self,
        loop: SampleLoop,
        objective: Objective,
        likelihood: Likelihood,
        comm: GridComm,
        reducer: Callable[[], Reducer],
    ):
        self._loop, self._objective, self._likelihood, self._comm = loop, objective, likelihood, comm
        self._reducer = reducer
        self.num_passes, self.has_said_passes = 0, False

    def statistic(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the statistic [c, B, ...] of outputs [c, B, ...]. Local."""
        count = len(outputs)
        if count == 1:
            return self._objective.statistic(self._likelihood, outputs[0], y)[None]
        targets = y.expand(count, *y.shape).flatten(0, 1)
        statistic = self._objective.statistic(self._likelihood, outputs.flatten(0, 1), targets)
        return statistic.unflatten(0, (count, len(y)))

    def begin_(self, x: SharedView, y: Tensor, kl: tuple[float, float], is_first: bool) -> Tensor:
        """Begin a step, or (not ``is_first``) another micro-batch of it, and return the targets to work with. Local.

        Classes are indices: one outside of the support becomes another one, and is counted, so that all ranks raise.
        """
        if is_first:
            self._loop.posterior.read_slots_()
        return self._checked(y)

    def _checked(self, y: Tensor) -> Tensor:
        usable, misfits = self.usable(y)
        self._tally[Tally.NUM_MISFITS] += misfits.any()
        return usable

    def usable(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets that index no other memory, and which lie outside of the support. Local."""
        misfits = ~self._likelihood.fits(y)
        return y if y.is_floating_point() else torch.where(misfits, y.new_zeros(()), y), misfits

    @property
    def _tally(self) -> Tensor:
        return self._loop.posterior.buffer.tally

    def weights_(self, weights: Tensor | None) -> Tensor | None:
        """Return the weights [B] to work with; one that is negative or not finite is counted as a misfit. Local."""
        if weights is not None:
            self._tally[Tally.NUM_MISFITS] += self.unfit(weights).any()
        return weights

    @staticmethod
    def unfit(weights: Tensor) -> Tensor:
        """Return which weights cannot be. Local."""
        return ~((weights >= 0) & weights.isfinite())

    def add_(self, data_term: Tensor, global_batch_size: int, is_last: bool) -> None:
        """Add what a call returned to what is summed over the job. Local."""
        self._tally[Tally.DATA_TERM] += data_term / global_batch_size

    def complete_(self, checksum: Callable[[], Tensor], numbers: Sequence[int]) -> Tensor:
        """Write the rest of what is summed over the job, and return whether this rank's part is not finite. Local.

        ``numbers`` are those that the host knows, `Tally` from NUM_STOPS on.
        """
        is_broken = ~checksum().isfinite()
        self._tally[Tally.NUM_BROKEN] = is_broken
        self._tally[Tally.NUM_STOPS :] = from_host(numbers, self._tally.device, self._tally.dtype)
        return is_broken

    def __call__(
        self,
        samples: Sequence[int],
        x: SharedView,
        y: Tensor,
        key: Key,
        coupling: Coupling,
        share: float,
        kl: tuple[float, float],
        is_last: bool,
    ) -> Tensor:
        """Fold in the gradient of ``share`` times the data term, and return that of this rank, summed over its examples.

        Collective as the objective and BatchNorm say. ``key`` is that of any sample of the step, ``kl`` the arguments
        of `Posterior.fold_`; where ``is_last``, nothing more is folded in after the backward pass of the last sample.
        """
        last = samples[-1] if len(samples) and is_last else None
        differentiate = self._differentiate(coupling, share, last, kl)
        self.num_passes = 1
        if not self._objective.couples:
            self._walk(samples, x, y, key, differentiate)
            return coupling.data_term()
        outputs = None
        if len(samples) == 1:
            outputs = self._loop.walk(samples[0], x, key)
        elif 1 < len(samples) <= self._loop.chunk_size:
            outputs = self._loop.try_batch(samples, x, key)
        if outputs is not None:
            statistic = self.statistic(outputs, y)
            coupling.see(samples, statistic.detach())
            coupling.combine(self._comm)
            self._use(differentiate, samples, statistic, x, y, key)
            return coupling.data_term()
        self._say_two_passes(len(samples))
        with torch.no_grad():
            self._walk(samples, x, y, key, coupling.see)
        coupling.combine(self._comm)
        self._loop.posterior.network.batch_norms.begin(again=True)
        self._walk(samples, x, y, key, differentiate)
        return coupling.data_term()

    def _say_two_passes(self, num_samples: int) -> None:
        self.num_passes = 2
        if self._comm.grid.is_first("world") and not self.has_said_passes:
            remedy = f"chunk_size {num_samples} makes it one, with the memory of that many"
            remedy = remedy if self._loop.can_batch else "the module cannot be batched"
            text = "the objective %s couples the samples: two passes over the %d of this rank per step (%s)"
            logger.info(text, self._objective.name, num_samples, remedy)
        self.has_said_passes = True

    def _walk(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key, use: Use) -> None:
        """Evaluate samples, batched where that works, and hand on their statistics [c, B, ...]."""
        for some, outputs in self._loop(samples, x, key):
            self._use(use, some, self.statistic(outputs, y), x, y, key)

    def _use(self, use: Use, some: Sequence[int], statistic: Tensor, x: SharedView, y: Tensor, key: Key) -> None:
        """Use a chunk; where its backward pass failed, none of it is folded in, and its samples are evaluated singly."""
        try:
            use(some, statistic)
        except _BackwardError as error:
            self._loop.fall_back(error.__cause__)
            self._walk(some, x, y, key, use)

    def _differentiate(
        self, coupling: Coupling, share: float | Tensor, last: int | None, kl: tuple[float, float | Tensor]
    ) -> Use:
        """Return what folds in the gradient for some samples; ``last`` is the sample after which nothing more is."""
        reducer = self._reducer()

        def use(samples: Sequence[int], statistic: Tensor) -> None:
            before = dict(vars(coupling))
            gradient = coupling.weigh(share * coupling.gradient(samples, statistic.detach()), 1)
            is_last = samples[-1] == last
            with reducer.last_backward() if is_last else contextlib.nullcontext():
                try:
                    backward(statistic, gradient)
                except Exception as error:
                    if len(samples) == 1 or (is_last and reducer.in_blocks):  # its sums have begun
                        raise
                    coupling.__dict__ = before  # without what it has added up
                    raise _BackwardError from error
            self._loop.posterior.fold_(*kl)

        return use
