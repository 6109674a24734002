"""Segments of a step, each of which runs as one CUDA graph where it can be captured, and as it is elsewhere.

A segment is Python code that reads and writes tensors which stay where they are. What Python itself decides in it (shapes, modes,
rates, attributes) is fixed when it is captured, and is compared before each replay.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import operator
import types
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError, Fault
from ..noise import operators
from ..posteriors.layout import addresses

__all__ = ["Fixed", "Graph", "HostReads", "Recorder"]

logger = logging.getLogger(__name__)

Body = Callable[[], None]

NUM_EAGER, NUM_PROOFS = 2, 2
"""Steps of a segment that run as they are before it is captured: they allocate, compile and choose what lasts; and steps in
which its graph is compared with them."""
TOLERANCE = 1e-4
"""Of these comparisons, as a part of the norm."""


# --- what is fixed by a capture ----------------------------------------------------------------------------

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_COMPARED = (int, float, complex, str, bytes, types.MethodType)
"""Kinds that are alike where they are equal; all others where they are one object."""
_CONTAINERS = (dict, list, tuple, set)


def is_same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two lists of `Fixed.now` agree. Local."""

    def are_alike(x: object, y: object) -> bool:
        return x is y or (type(x) is type(y) and isinstance(x, _COMPARED) and x == y)

    return len(a) == len(b) and (_are_one(a, b) or all(map(are_alike, a, b)))


class Fixed:
    """What a capture of code that uses some objects fixes: modes, buffers and attributes of these, and of containers in them.

    It is found out anew only where something has become another object.
    """

    def __init__(self):
        self._objects: tuple[object, ...] = ()
        self._dicts: list[dict] = []
        self._lists: list[Iterable[object]] = []
        self._tensors: list[Tensor] = []
        self._seen: list[object] = []
        self._places: list[int] = []
        self._found: list[object] = []

    def now(self, *objects: object, also: Sequence[object] = ()) -> list[object]:
        """Return what objects fix, and ``also`` some more: one list as long as nothing changes. Local."""
        same = _are_one(objects, self._objects) and _are_one(self._contents(), self._seen)
        if not (same and addresses(self._tensors) == self._places):
            self._look(objects)
            # A tensor's memory may be replaced; a container may be another one with the same in it
            found = [len(value) if isinstance(value, _CONTAINERS) else value for value in self._seen]
            found += [*self._places, *also]
            self._found = self._found if is_same(found, self._found) else found
        elif not is_same(self._found[len(self._found) - len(also) :], also):
            self._found = [*self._found[: len(self._found) - len(also)], *also]
        return self._found

    def _look(self, objects: tuple[object, ...]) -> None:
        """Find the containers in which something could become another, and what is in them."""
        self._objects, self._dicts, self._lists = objects, [], []
        for one in objects:
            self._dicts.append(vars(one))
            self._dicts += [one._buffers] if isinstance(one, nn.Module) else []
        for content in list(self._dicts):
            self._nested(value for key, value in content.items() if key not in _OF_EVERY_MODULE)
        self._seen = self._contents()
        self._tensors = [value for value in self._seen if isinstance(value, Tensor)]
        self._places = addresses(self._tensors)

    def _nested(self, values: Iterable[object]) -> None:
        for value in values:
            if isinstance(value, dict):
                self._dicts.append(value)
                self._nested(value.values())
            elif isinstance(value, _CONTAINERS):
                self._lists.append(value)
                self._nested(value)

    def _contents(self) -> list[object]:
        of_dicts = itertools.chain.from_iterable(map(dict.values, self._dicts))
        return [*of_dicts, *itertools.chain.from_iterable(self._lists)]


def _are_one(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def has_hooks(layers: Iterable[nn.Module]) -> bool:
    """Whether functions of a user run with some layers: a graph would leave them out. Local."""
    return any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in layers
    )


# --- host reads --------------------------------------------------------------------------------------------

_READS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave",
}  # fmt: skip
"""Operations whose result the host has to know before it goes on."""
_METHODS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__bool__, Tensor.__float__,
            Tensor.__int__, Tensor.__index__}  # fmt: skip
"""Methods that read; on a CPU some do it without an operation."""
_FACTORIES = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
"""Functions that bring numbers of the host."""


class HostReads:
    """Sees what makes the host wait for the device, or copies from the host to it: neither can be in a graph.

    On a CPU it sees the same as on a GPU, so that tests need none. It raises `RuntimeError` at the first where it is to
    ``refuse``, otherwise it notes them all in ``found``; ``num_operations`` would be launched: all but views.
    """

    def __init__(self, refuse: bool = False):
        self.refuse, self.found, self.num_operations = refuse, [], 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[HostReads]:
        """Look at a block, with its backward passes. Local."""
        with _Functions(self), _Operations(self):
            yield self

    def see(self, name: str) -> None:
        """Note an operation, or refuse it. Local."""
        if self.refuse:
            raise RuntimeError(f"{name}: the host would wait for the device")
        self.found.append(name)


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # With pin_memory somebody has thought of it (`hpc_bnn.noise.from_host`)
        is_copy = function in _FACTORIES and "pin_memory" not in (kwargs or {})
        is_copy &= not (function is torch.as_tensor and isinstance(args[0], Tensor))
        if function in _METHODS or is_copy:
            self._reads.see(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, reads: HostReads):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in _READS and not (name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is not None):
            self._reads.see(name)
        elif name in ("aten::index", "aten::index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._reads.see(f"{name} by a mask")
        elif name in ("aten::_to_copy", "aten::copy_"):
            device = (kwargs or {}).get("device")
            between = {args[0].device.type, device.type if device is not None else args[0].device.type}
            between |= {args[1].device.type} if name == "aten::copy_" else set()
            if len(between) > 1:
                self._reads.see(f"{name} between {' and '.join(sorted(between))}")
        self._reads.num_operations += not function.is_view
        return function(*args, **(kwargs or {}))


# --- graphs ------------------------------------------------------------------------------------------------


class Graph(Protocol):
    """What was captured once and can run again."""

    def capture(self, body: Body, num_gradients: int) -> None:
        """Record what a body launches; nothing runs. It folds in at most so many gradients."""

    def replay(self) -> None:
        """Run it on what its tensors hold now."""


class Pool:
    """The memory that all graphs of a step share: they run in the order of their captures.

    torch ends a pool with the last graph in it, and refuses to capture into it again: after that there is a new one.
    """

    def __init__(self, new_handle: Callable[[], Any]):
        self._new_handle, self._graphs, self._handle = new_handle, weakref.WeakSet(), None

    def handle_for(self, graph: Any) -> Any:
        """Return the handle of the pool that a graph is captured into. Local."""
        if not len(self._graphs):
            self._handle = self._new_handle()
        self._graphs.add(graph)
        return self._handle


class CudaGraph:
    """A graph of CUDA, from a pool of memory that it shares with others."""

    def __init__(self, pool: Pool, stream: torch.cuda.Stream):
        self._graph, self._pool, self._stream = torch.cuda.CUDAGraph(), pool, stream
        self._held: list[Tensor] = []

    def capture(self, body: Body, num_gradients: int) -> None:
        addresses = operators.Addresses(num_gradients, self._stream.device)
        gc.collect()  # what dies in a capture would free its memory there
        torch.cuda.synchronize(self._stream.device)
        is_collecting = gc.isenabled()
        gc.disable()
        try:
            # thread_local: the watchdog of NCCL may look at its events
            pool = self._pool.handle_for(self)
            with torch.cuda.graph(self._graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                body()
        finally:
            if is_collecting:
                gc.enable()
        self._held = addresses.fill_()

    def replay(self) -> None:
        self._graph.replay()


def _nothing() -> None:
    pass


def _run(bodies: Sequence[Body], between: Body) -> None:
    for number, body in enumerate(bodies):
        if number:
            between()
        body()


BLOCK = 2**20


def _digest(tensors: Sequence[Tensor]) -> Tensor:
    """Return norm and a projection of each tensor, float64 [n, 2]. Local."""
    found = []
    for tensor in tensors:
        flat, projection = tensor.detach().reshape(-1), torch.zeros((), dtype=torch.float64, device=tensor.device)
        square = projection.clone()
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK].double()
            places = torch.arange(start, start + len(part), dtype=torch.float64, device=tensor.device)
            projection += torch.dot(part, torch.cos(places * places))  # no period
            square += torch.dot(part, part)
        found.append(torch.stack([square.sqrt(), projection]))
    return torch.stack(found) if found else torch.zeros(0, 2)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two digests are alike to rounding, as kernels with atomics may differ; NaN is like NaN. Local."""
    tolerance = TOLERANCE * b[:, :1].abs().nan_to_num(0.0, 0.0, 0.0)
    return bool((((a - b).abs() <= tolerance) | (a == b) | (a.isnan() & b.isnan())).all())


class _Segment:
    """One or more bodies that are captured together, with what the capture fixed."""

    def __init__(self, fixed: Sequence[object]):
        self.fixed = fixed
        self.steps: set[int] = set()
        self.graphs: list[Graph] = []
        self.proofs: set[int] = set()  # steps in which a replay gave what the bodies give
        self.is_eager = False


class Recorder:
    """Runs segments: twice as they are, and then as graphs, where there is something to capture with.

    On a device; where it ``speaks``, as rank 0 does, it says what the user should know.

    Attributes
    ----------
    new_graph : callable, optional
        Returns an empty `Graph`. None, as on a CPU: all segments run as they are.
    num_captures, said : int, set of str
        Segments that were captured so far, and why others were not.
    is_paused : bool
        Whether everything runs as it is, for now.
    """

    def __init__(self, device: torch.device, speaks: bool = True):
        self._speaks, self.num_captures, self.is_paused = speaks, 0, False
        self._segments: dict[Hashable, _Segment] = {}
        self.said: set[str] = set()
        self.new_graph: Callable[[], Graph] | None = None
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda" and not operators.draws_on(device):
            self.say("the CPU draws the noise of this GPU")
        elif device.type == "cuda":
            self.stream = stream = torch.cuda.Stream(device)
            pool = Pool(torch.cuda.graph_pool_handle)
            self.new_graph = lambda: CudaGraph(pool, stream)

    def run(
        self,
        name: Hashable,
        fixed: Sequence[object],
        num_steps: int,
        *bodies: Body,
        between: Body = _nothing,
        may_capture: bool = True,
        state: Sequence[Tensor] = (),
        times: int = 1,
    ) -> None:
        """Run bodies one after another, ``between`` as it is behind each but the last. Collective as ``between`` is.

        A graph has to prove itself in two steps: on the same numbers it leaves the same in ``state`` as its bodies.

        ``name`` says which segment it is, with the shapes of what it works on; ``fixed`` is what `Fixed.now` returned:
        where it is another list than at the capture, the capture is given up. ``may_capture`` says that what Python
        does in the bodies may be left out in later steps; they change ``state``, and run so many ``times``.
        `ConfigError` where the segment cannot be captured.
        """
        for number in range(times):
            segment = None if self.is_paused else self._segment(name, fixed)
            graphs = [] if segment is None else segment.graphs
            if segment is not None and graphs and (len(segment.proofs) == NUM_PROOFS or num_steps in segment.proofs):
                for _ in range(number, times):
                    _run([graph.replay for graph in graphs], between)
                return
            self._run_once(segment, num_steps, bodies, between, may_capture, state)

    def _segment(self, name: Hashable, fixed: Sequence[object]) -> _Segment:
        segment = self._segments.get(name)
        if segment is None or not (segment.fixed is fixed or is_same(segment.fixed, fixed)):
            segment = self._segments[name] = _Segment(fixed)
        segment.fixed = fixed  # the next chunk of this step comes with the same list
        return segment

    def _run_once(
        self,
        segment: _Segment | None,
        num_steps: int,
        bodies: Sequence[Body],
        between: Body,
        may_capture: bool,
        state: Sequence[Tensor],
    ) -> None:
        """Run what is not, or not yet, a graph that has proven itself."""
        if segment is None or not may_capture or segment.is_eager or self.new_graph is None:
            self._run_as_it_is(bodies, between)
            return
        num_eager = len(segment.steps - {num_steps})
        if num_eager >= NUM_EAGER:
            self._prove(segment, num_steps, bodies, between, state)
            return
        # The first step makes what lasts, which may come from the host
        reads = HostReads() if num_eager == NUM_EAGER - 1 and num_steps not in segment.steps else None
        self._run_as_it_is(bodies, between, reads)
        segment.steps.add(num_steps)
        if reads is not None and reads.found:
            seen = ", ".join(dict.fromkeys(reads.found))
            self._give_up(segment, f"it makes the host wait for the device ({seen})")

    def _prove(
        self, segment: _Segment, num_steps: int, bodies: Sequence[Body], between: Body, state: Sequence[Tensor]
    ) -> None:
        """Run the bodies, capture them where that is still to be done, and compare what a replay leaves in the state.

        What lies between the bodies runs once: it may be collective, and other ranks capture at other steps.
        """
        try:
            before = [tensor.clone() for tensor in state]
        except torch.OutOfMemoryError:
            self._give_up(segment, "the memory is not enough to compare a graph with the operations that it comes from")
            self._run_as_it_is(bodies, between)
            return

        def again(*runs: Body) -> None:
            for tensor, former in zip(state, before):
                tensor.copy_(former)
            for run in runs:
                run()

        num_folded = operators.Addresses.num_folded
        self._run_as_it_is(bodies, between)
        wanted = _digest(state)
        if not segment.graphs:
            num_gradients = operators.Addresses.num_folded - num_folded
            segment.graphs = [self._captured(body, num_gradients) for body in bodies]
            self.num_captures += 1
        again(*(graph.replay for graph in segment.graphs))
        segment.proofs.add(num_steps)
        if not _agree(_digest(state), wanted):
            self._give_up(segment, "a graph gave other numbers than the operations that it comes from")
            again(lambda: self._run_as_it_is(bodies, _nothing))

    def _give_up(self, segment: _Segment, reason: str) -> None:
        segment.is_eager, segment.graphs = True, []
        self.say(reason)

    def forget(self) -> None:
        """Forget all graphs, as nothing of what they work on will come again. Local; the device has run them."""
        self._segments.clear()

    def say(self, reason: str) -> None:
        """Say once why a part of the step is not captured. Local."""
        if self._speaks and reason not in self.said:
            logger.info("a part of each step is launched anew, which may take longer: %s", reason)
        self.said.add(reason)

    def _run_as_it_is(self, bodies: Sequence[Body], between: Body, reads: HostReads | None = None) -> None:
        def launched(body: Body) -> None:
            # On the stream of the captures: nodes of autograd, and workspaces of libraries, belong to a stream
            with self._on_stream(), reads.watching() if reads else contextlib.nullcontext():
                body()

        _run([functools.partial(launched, body) for body in bodies], between)

    def _captured(self, body: Body, num_gradients: int) -> Graph:
        assert self.new_graph is not None
        graph = self.new_graph()
        try:
            graph.capture(body, num_gradients)
        except Exception as error:  # allocator and generator may be broken now: nothing is tried again
            rule = f"a part of the step cannot be captured ({(str(error).splitlines() or [type(error).__name__])[0]})"
            raise ConfigError(Fault("capture", "auto", rule, "Set it to off")) from error
        return graph

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
