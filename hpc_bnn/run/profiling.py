"""A trace of a few steps of a run, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..training import VariationalStep

NUM_BEFORE = 8
"""Steps of a run that are not recorded: the first ones look, allocate and capture."""


class Profiler:
    """Records steps by ``torch.profiler``, and after them one that is launched anew, with ranges for its parts.

    Names of ranges inside of a graph are lost when it is replayed, hence the last step. All ranks take the same steps
    in the same way; one writes. Without ``num_steps`` to record nothing is; ``path`` is the file of the trace (JSON),
    None on ranks that do not write.
    """

    def __init__(self, step: VariationalStep, num_steps: int | None, path: Path | None):
        self._step, self._path = step, path
        self._first = step.num_steps + NUM_BEFORE
        self._last = self._first + (num_steps or 0)
        self._is_over = num_steps is None
        self._trace: torch.profiler.profile | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the step that is made in a block, if it is one of those. Collective as `VariationalStep.settle`."""
        number = self._step.num_steps
        if self._is_over or number < self._first:
            yield
            return
        if number == self._first:
            self._step.settle()  # what was launched before is not in the trace
            if self._path is not None:
                kinds = [torch.profiler.ProfilerActivity.CPU]
                kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
                self._trace = torch.profiler.profile(activities=kinds)
                self._trace.start()
        with _named(self._step) if number == self._last else contextlib.nullcontext():
            yield
        if number == self._last:
            self._is_over = True
            self._step.settle()
            if self._trace is not None and self._path is not None:
                self._trace.stop()
                self._trace.export_chrome_trace(str(self._path))
                self._trace = None


@contextlib.contextmanager
def _named(step: VariationalStep) -> Iterator[None]:
    """Launch a step operation by operation, with a range for each of its parts. Local."""
    parts: list[tuple[object, str, str]] = [
        (step, "accumulate_", "accumulate"), (step.loop, "walk", "draw and forward"), (step.loop, "batch", "draw and forward"),
        (step.posterior, "draw_", "draw"), (step.posterior, "fold_", "fold"), (step.reducer, "reduce_", "reduce"),
        (step, "update_", "update"),
    ]  # fmt: skip
    for of, method, name in parts:
        setattr(of, method, _ranged(name, getattr(of, method)))
    if step.recorder is not None:
        step.recorder.is_paused = True
    try:
        yield
    finally:
        for of, method, _ in parts:
            delattr(of, method)
        if step.recorder is not None:
            step.recorder.is_paused = False


def _ranged(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*arguments, **options):
        nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
        with torch.profiler.record_function(f"hpc_bnn: {name}"), nvtx:
            return function(*arguments, **options)

    return call
