"""Whether a batch of samples gives what a walk over them gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import HpcBnnError
from ..noise import Key
from ..posteriors.sample_loop import SampleLoop
from ..views import SharedView
from .data_term import backward

FLOOR = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Differences of gradients, as a part of their norm, that are never more than rounding."""


class BatchTrial:
    """Tries a batch before the first step, without a trace: a faster way has to prove itself. Local.

    The loop walks where a batch fails, changes the module, or differs in the gradient of ``statistic(outputs, y)``.
    """

    def __init__(self, loop: SampleLoop, statistic: Callable[[Tensor, Tensor], Tensor]):
        self._loop, self._statistic = loop, statistic
        self.is_done = False

    def is_due(self, samples: Sequence[int]) -> bool:
        """Whether a call would try anything. Local."""
        return bool(self._loop.can_batch and min(len(samples), self._loop.chunk_size) > 1 and not self.is_done)

    def __call__(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> None:
        """Try a batch of the samples of this rank, once."""
        if self.is_due(samples):
            self.is_done = True
            self._try(samples[: self._loop.chunk_size], x, y, key)

    def _try(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> None:
        posterior, problem = self._loop.posterior, None
        before = posterior.network.traces()
        try:
            batched = self._gradients(samples, x, y, key, is_batch=True)
        except HpcBnnError:
            raise
        except Exception as error:
            problem = error.with_traceback(None)  # its frames hold the batch
        finally:
            posterior.sampler.forget_()
            changed = before.put_back()
        names = changed["buffer"] + changed["weight"] + changed["attribute"]
        if problem is None and names:
            problem = RuntimeError(f"its forward pass changes {', '.join(names[:5])}, once for each sample")
        if problem is None:
            walked = self._gradients(samples, x, y, key, is_batch=False)
            rounding, kind = [], x.device.type
            is_tf32 = kind == "cuda" and torch.backends.cuda.matmul.allow_tf32
            if self._loop.autocast_dtype or torch.is_autocast_enabled(kind) or is_tf32:
                rounding.append(self._exact_gradients(samples, x, y, key))
            if kind != "cpu":  # where kernels may use atomics, a walk differs from a walk
                rounding.append(self._gradients(samples, x, y, key, is_batch=False))
            before.put_back()
            if (name := _first_difference(batched, walked, rounding, FLOOR.get(posterior.dtype, 0.1))) is not None:
                problem = RuntimeError(f"a batch gives another gradient of {name} than a walk")
        if problem is not None:
            self._loop.fall_back(problem)

    def _exact_gradients(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> dict[str, Tensor]:
        """Return the gradients of a walk without autocast and TF32: what a walk differs by, a batch may differ by."""
        loop, kind = self._loop, x.device.type
        former, is_tf32 = loop.autocast_dtype, kind == "cuda" and torch.backends.cuda.matmul.allow_tf32
        loop.autocast_dtype = None
        if is_tf32:
            torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.autocast(kind, enabled=False):
                return self._gradients(samples, x, y, key, is_batch=False)
        finally:
            loop.autocast_dtype = former
            if is_tf32:
                torch.backends.cuda.matmul.allow_tf32 = True

    def _gradients(
        self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key, is_batch: bool
    ) -> dict[str, Tensor]:
        """Return the gradients of the sum of some samples' statistics, by the names of weights."""
        posterior = self._loop.posterior
        posterior.begin_()
        with posterior.network.interception.active():
            for some in [samples] if is_batch else [[sample] for sample in samples]:
                outputs = self._loop.batch(some, x, key) if is_batch else self._loop.walk(some[0], x, key)
                statistic = self._statistic(outputs, y)
                backward(statistic, torch.ones_like(statistic))
                posterior.fold_()
        posterior.network.allow_writes()
        return {name: gradient.clone() for name, gradient in posterior.buffer.named(posterior.buffer.grads).items()}


def _first_difference(
    batched: dict[str, Tensor], walked: dict[str, Tensor], rounding: Sequence[dict[str, Tensor]], floor: float
) -> str | None:
    """Return the first name under which a batch differs from a walk by more than ten times what rounding makes."""
    whole = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in walked.values()))
    for name, gradient in walked.items():
        norm = max(float(gradient.norm()), 1e-3 * whole)
        of_rounding = max((float((other[name] - gradient).norm()) for other in rounding), default=0.0)
        allowed = min(max(floor * norm, 10 * of_rounding), 0.5 * norm)
        if float((batched[name] - gradient).norm()) > allowed:  # NaN is no difference: the step will say it
            return name
    return None
