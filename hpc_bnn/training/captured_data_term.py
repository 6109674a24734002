"""The data term of a step, of which each chunk of samples is one segment that can be captured."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..noise import Key, Stream
from ..objectives import Coupling
from ..posteriors import Posterior, Tally
from ..trees import Inputs, map_leaves, map_tensors, stack, tensors_of
from ..views import SharedView
from .capture import Fixed, Recorder, has_hooks
from .data_term import DataTerm, backward
from .latch import Latch


class CapturedDataTerm(DataTerm):
    """Does what `DataTerm` does, in segments: a chunk of samples, and behind an exchange its backward pass.

    Segments work on copies of the batch that stay where they are, and count their samples on the device: one graph serves
    all chunks of all steps whose batches have the same shapes.
    """

    num_steps = 0
    """Number of the step."""

    def __init__(self, *arguments, recorder: Recorder, latch: Latch, seed: int, num_samples: int):
        super().__init__(*arguments)
        self._recorder, self._latch, self._num_samples, self._fixes = recorder, latch, num_samples, Fixed()
        self._key = Key(seed, Stream.NOISE, clock=latch.clock)
        self._memories: dict[Hashable, _Memory] = {}
        self._targets: dict[Hashable, tuple[Tensor, Tensor]] = {}  # as they came, and checked
        self._all_weights: dict[Hashable, Tensor] = {}
        self._weights: Tensor | None = None  # of this batch
        self._sum = torch.zeros((), dtype=self._posterior.dtype, device=latch.share.device)

    @property
    def _posterior(self) -> Posterior:
        return self._loop.posterior

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
        """See `DataTerm`."""
        if not (len(samples) and len(x)):
            return super().__call__(samples, x, y, key, coupling, share, kl, is_last)
        size = self._loop.chunk_size if self._loop.can_batch else 1
        chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
        for memory in self._memories.values():
            memory.number = None  # it holds another batch
        if not self._objective.couples:
            self.num_passes = 1
            for alike in self._alike(chunks, x):
                self._run("differentiate", self._load(alike[0], x, y), self._differentiating, times=len(alike))
            return self._sum
        if len(chunks) == 1:
            self.num_passes = 1
            return self._around_exchange(self._load(samples, x, y), coupling, share)
        self._say_two_passes(len(samples))
        return self._twice(chunks, x, y, coupling, share)

    def begin_(self, x: SharedView, y: Tensor, kl: tuple[float, float], is_first: bool) -> Tensor:
        """See `DataTerm`; the targets are a copy that stays where it is."""
        self._fix(kl[0], x.device.type)
        name = tuple(y.shape), y.dtype
        if name not in self._targets:
            self._targets[name] = torch.empty_like(y), torch.empty_like(y)
        given, checked = self._targets[name]
        given.copy_(y)

        def body() -> None:
            if is_first:
                self._posterior.read_slots_()
                self._latch.take_rates_()
            self._rewind()
            self._sum.zero_()
            checked.copy_(self._checked(given))

        state = [self._posterior.buffer.reduced, *self._posterior.sampler.work.values(), self._latch.clock.now]
        state += [self._sum, checked]
        self._recorder.run(("begin", is_first, name), self._fixed, self.num_steps, body, state=state)
        return checked

    def weights_(self, weights: Tensor | None) -> Tensor | None:
        """See `DataTerm`; they are a copy that stays where it is."""
        self._weights = weights = super().weights_(weights)
        if weights is not None:
            name = weights.shape, weights.dtype
            if name not in self._all_weights:
                self._all_weights[name] = torch.empty_like(weights)
            self._weights = self._all_weights[name].copy_(weights)
        return self._weights

    def add_(self, data_term: Tensor, global_batch_size: int, is_last: bool) -> None:
        """See `DataTerm`; what is last waits for `completing_`."""
        if not is_last:
            super().add_(data_term, global_batch_size, is_last)
        elif data_term is not self._sum:
            self._sum.copy_(data_term)

    def completing_(self, checksum: Callable[[], Tensor]) -> None:
        """Do what `DataTerm.complete_` does, within a capture. Local."""
        self._tally[Tally.DATA_TERM] += (self._sum / self._latch.num_examples).to(self._sum.dtype)
        self._latch.complete_(checksum())

    def forget(self) -> None:
        """Forget the memory that captured segments read and write. Local."""
        self._memories.clear()

    def _fix(self, prior_share: float, device_type: str) -> None:
        """Note what a capture would fix, and whether there can be one. Local."""
        posterior, ours = self._posterior, "hpc_bnn."
        family, layers = posterior.family_, posterior.network.layers
        # What is not ours may look at the numbers of the samples: a graph for each chunk, and no count on the device
        of = map(type, (family, self._objective))
        self._counts = posterior.is_replicated and all(kind.__module__.startswith(ours) for kind in of)
        self._kl = prior_share, self._latch.scalars.kl_weight
        self._fixed = self._fixes.now(
            *layers, family, self._objective, self._likelihood,
            also=[
                prior_share, self._loop.can_batch, torch.is_autocast_enabled(device_type),
                torch.get_autocast_dtype(device_type), _float32_precision(),
                torch.are_deterministic_algorithms_enabled(),
            ],
        )  # fmt: skip
        self._may_capture = posterior.network.is_replayable and not has_hooks(layers)
        if not self._may_capture:
            reason = "its forward pass changes attributes or buffers, or draws numbers of its own"
            self._recorder.say(f"the network has hooks, or {reason}")

    def _alike(self, chunks: Sequence[Sequence[int]], x: SharedView) -> Iterator[list[Sequence[int]]]:
        """Yield chunks, those together that are as long as each other and meet the same inputs. Local."""

        def kind(chunk: Sequence[int]) -> object:
            numbers = {x.number(sample) for sample in chunk}
            return (len(chunk), numbers) if self._counts and len(numbers) == 1 else chunk

        for _, some in itertools.groupby(chunks, kind):
            yield list(some)

    def _rewind(self) -> None:
        """Go to the first sample. Local."""
        self._latch.begin_samples_()
        if not self._counts:
            self._latch.clock.now[1:].zero_()

    def _load(self, chunk: Sequence[int], x: SharedView, y: Tensor) -> _Memory:
        """Return the memory of a segment, with the inputs of some samples in it. Local."""
        numbers = [x.number(sample) for sample in chunk]
        is_shared = len(set(numbers)) == 1
        inputs = x.of(chunk[0]) if is_shared else stack([x.of(sample) for sample in chunk])
        dtypes = y.dtype, None if self._weights is None else self._weights.dtype
        name = _form(inputs), tuple(y.shape), dtypes, len(chunk), is_shared, None if self._counts else tuple(chunk)
        if name not in self._memories:
            view = None if is_shared else 0 if self._counts else chunk[0]
            self._memories[name] = _Memory(name, inputs, view)
        memory = self._memories[name]
        memory.y, memory.weights = y, self._weights
        if memory.number is None or not is_shared or memory.number != numbers[0]:
            for mine, given in zip(tensors_of(memory.x), tensors_of(inputs)):
                mine.copy_(given)
        memory.number, memory.chunk = numbers[0], chunk
        memory.offsets = range(len(chunk)) if self._counts else chunk
        return memory

    def _run(
        self, what: str, memory: _Memory, *bodies: Callable[[_Memory], None], between=lambda: None, times: int = 1
    ) -> None:
        norms, count = self._posterior.network.batch_norms, len(memory.chunk)

        def counting(body: Callable[[_Memory], None], is_last: bool) -> None:
            before, _ = norms.counted()
            body(memory)
            after, momenta = norms.counted()
            memory.counted[body] = [b - a for a, b in zip(before, after)], momenta
            if is_last and self._counts:
                self._latch.clock.now[1:].add_(count)

        former = norms.counted()[0]
        runs = [functools.partial(counting, body, body is bodies[-1]) for body in bodies]
        seen = [memory.tensors["seen"]] if "seen" in memory.tensors else []
        state = [self._posterior.buffer.reduced, self._latch.clock.now, self._sum, *seen, *norms.state()]
        options = {"between": between, "may_capture": self._may_capture, "state": state, "times": times}
        self._recorder.run((what, memory.name), self._fixed, self.num_steps, *runs, **options)
        if norms.layers:  # a replay has not counted, a proof more than once
            added = [memory.counted[body] for body in bodies]
            norms.count_([n + times * sum(more) for n, *more in zip(former, *(c for c, _ in added))], added[0][1])

    # --- segments -----------------------------------------------------------------------------------

    def _differentiating(self, memory: _Memory) -> None:
        offsets = range(memory.offsets[0], memory.offsets[-1] + 1)
        coupling = self._objective.begin(memory.y, offsets, self._num_samples)
        coupling.present, coupling.weights = self._likelihood.present(memory.y), memory.weights
        use = self._differentiate(coupling, self._latch.share, None, self._kl)
        self._walk(memory.offsets, memory.view, memory.y, self._key, use)
        self._sum.add_(coupling.data_term())

    def _statistics(self, memory: _Memory) -> Iterator[tuple[slice, Tensor]]:
        """Yield the statistics [c, B, ...] of the samples, and which these are."""
        for some, outputs in self._loop(memory.offsets, memory.view, self._key):
            start = some[0] - memory.offsets[0]
            yield slice(start, start + len(some)), self.statistic(outputs, memory.y)

    def _seeing(self, memory: _Memory) -> None:
        with torch.no_grad():
            for span, statistic in self._statistics(memory):
                memory.of_all("seen", statistic)[span] = statistic

    def _differentiating_again(self, memory: _Memory) -> None:
        for span, statistic in self._statistics(memory):
            backward(statistic, memory.of_all("gradient", statistic)[span])
            self._posterior.fold_(*self._kl)

    def _going_forward(self, memory: _Memory) -> None:
        first, *others = memory.offsets
        outputs = None if others else self._loop.walk(first, memory.view, self._key)
        outputs = self._loop.batch(memory.offsets, memory.view, self._key) if outputs is None else outputs
        memory.statistic = self.statistic(outputs, memory.y)
        memory.of_all("seen", memory.statistic).copy_(memory.statistic.detach())

    def _going_backward(self, memory: _Memory) -> None:
        backward(memory.statistic, memory.of_all("gradient", memory.statistic))
        self._posterior.fold_(*self._kl)

    # --- objectives that couple the samples ------------------------------------------------------------

    def _around_exchange(self, memory: _Memory, coupling: Coupling, share: float) -> Tensor:
        """Make one pass over all samples of this rank. Collective as the objective is."""

        def exchange() -> None:
            statistic = memory.tensors["seen"].clone()
            coupling.see(memory.chunk, statistic)
            coupling.combine(self._comm)
            gradient = coupling.weigh(share * coupling.gradient(memory.chunk, statistic), 1)
            memory.of_all("gradient", statistic).copy_(gradient)

        self._run("exchange", memory, self._going_forward, self._going_backward, between=exchange)
        return coupling.data_term()

    def _twice(self, chunks: Sequence[Sequence[int]], x: SharedView, y: Tensor, coupling: Coupling, share: float):
        """Make one pass over the chunks for what they exchange, and one for the gradients. Collective as the objective is."""
        seen = []
        for chunk in chunks:
            memory = self._load(chunk, x, y)
            self._run("see", memory, self._seeing)
            seen.append(memory.tensors["seen"].clone())
            coupling.see(chunk, seen[-1])
        coupling.combine(self._comm)
        self._posterior.network.batch_norms.begin(again=True)
        self._rewind()
        for chunk, statistic in zip(chunks, seen):
            memory = self._load(chunk, x, y)
            gradient = coupling.weigh(share * coupling.gradient(chunk, statistic), 1)
            memory.of_all("gradient", statistic).copy_(gradient)
            self._run("differentiate again", memory, self._differentiating_again)
        return coupling.data_term()


class _Memory:
    """What a segment reads and writes, where it stays: the inputs of a chunk of samples, and what it exchanges.

    The targets stay as well, in memory that all segments share.
    """

    number: int | None = None
    """Of the view that is in it; None: of another batch."""
    y: Tensor
    weights: Tensor | None
    chunk: Sequence[int]
    offsets: Sequence[int]
    """Numbers of its samples, and their distances from the sample of the clock."""
    statistic: Tensor

    def __init__(self, name: Hashable, x: Inputs, first: int | None):
        self.name = name
        self.x = map_tensors(torch.empty_like, x)
        self.view = SharedView(self.x) if first is None else _Rows(self.x, first)
        self.tensors: dict[str, Tensor] = {}
        self.counted: dict[Callable, tuple[list[int], list[float]]] = {}  # by BatchNorm, in each body

    def of_all(self, name: str, like: Tensor) -> Tensor:
        """Return what is kept of all samples of the chunk, [c, B, ...], for a statistic of some."""
        if name not in self.tensors:
            self.tensors[name] = torch.empty(len(self.chunk), *like.shape[1:], dtype=like.dtype, device=like.device)
        return self.tensors[name]


class _Rows(SharedView):
    """Inputs [c, B, ...] of consecutive samples, each its own."""

    def __init__(self, x: Inputs, first: int):
        super().__init__(map_tensors(lambda tensor: tensor[0], x))
        self._rows, self._first = x, first

    def number(self, sample: int) -> int:
        return sample

    def of(self, sample: int) -> Inputs:
        return map_tensors(lambda tensor: tensor[sample - self._first], self._rows)


def _float32_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say it where its newer functions have set it
        return "unknown"


def _form(x: Inputs) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype
    return repr(map_leaves(x, Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype)))
