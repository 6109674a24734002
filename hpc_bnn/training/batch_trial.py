"""Whether a batch of samples gives what a walk over them gives, and how many pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import HpcBnnError
from ..noise import Key
from ..posteriors.sample_loop import SampleLoop
from ..views import SharedView


class BatchTrial:
    """Tries a batch before the first step, without a trace: a faster way has to prove itself. Local.

    The loop walks where a batch fails, changes the module, or differs in the gradient of ``statistic(outputs, y)``
    [c, B, ...]. With ``measures`` its chunk size becomes the one with the least time per sample: on GPUs only. On a CPU
    walking is fastest, and a choice by the clock would make runs differ in rounding.
    """

    def __init__(self, loop: SampleLoop, statistic: Callable[[Tensor, Tensor], Tensor], measures: bool):
        self._loop, self._statistic, self._measures = loop, statistic, measures
        self.is_done = False

    def is_due(self, samples: Sequence[int]) -> bool:
        """Whether a call would try or measure anything. Local."""
        can_batch = self._loop.can_batch and min(len(samples), self._loop.chunk_size) > 1
        return self._measures or bool(can_batch and not self.is_done)

    def __call__(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> None:
        """Try a batch of the samples of this rank, once."""
        loop = self._loop
        if self._measures and x.device.type != "cpu" and len(samples) > 1:
            loop.chunk_size = self._measure(samples, x, y, key)
        self._measures = False
        if self.is_due(samples):
            self.is_done = True
            self._try(samples[: loop.chunk_size], x, y, key)

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
            before.put_back()
            is_autocast = torch.is_autocast_enabled(posterior.buffer.flat.device.type)
            # What rounding may make: TF32 and bfloat16 have 11 and 8 bits
            tolerance = 1e-8 if posterior.dtype == torch.float64 else 1e-2
            tolerance = 0.1 if self._loop.autocast_dtype is not None or is_autocast else tolerance
            if (name := _first_difference(batched, walked, tolerance)) is not None:
                problem = RuntimeError(f"a batch gives another gradient of {name} than a walk")
        if problem is not None:
            self._loop.fall_back(problem)

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
                statistic.backward(torch.ones_like(statistic))
                posterior.fold_()
        posterior.network.allow_writes()
        return {name: gradient.clone() for name, gradient in posterior.buffer.named(posterior.buffer.grads).items()}

    def _measure(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> int:
        """Return the chunk size with the least time per sample, of powers of two."""
        posterior = self._loop.posterior
        before = posterior.network.traces()
        best, best_seconds, size = 1, float("inf"), 1
        while size <= len(samples) and self._loop.can_batch:
            try:
                seconds = min(self._seconds_per_sample(samples[:size], x, y, key) for _ in range(3))
            except torch.OutOfMemoryError:
                break
            except HpcBnnError:
                raise
            except Exception as error:
                if size == 1:
                    raise
                self._loop.fall_back(error)
                return 1
            finally:
                posterior.sampler.forget_()
                before.put_back()
            if seconds < best_seconds:
                best, best_seconds = size, seconds
            size *= 2
        return best

    def _seconds_per_sample(self, samples: Sequence[int], x: SharedView, y: Tensor, key: Key) -> float:
        torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        self._gradients(samples, x, y, key, is_batch=len(samples) > 1)
        torch.cuda.synchronize(x.device)
        return (time.perf_counter() - start) / len(samples)


def _first_difference(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> str | None:
    """Return the first name under which two gradients differ by more than a part of their norm."""
    floor = 1e-3 * math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in b.values()))
    for name, gradient in b.items():
        difference = float((a[name] - gradient).norm())
        if difference > tolerance * max(float(gradient.norm()), floor):  # NaN is no difference: the step will say it
            return name
    return None
