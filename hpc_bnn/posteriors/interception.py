"""Calls of torch's own functions, handed to functions of ours while a network runs."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Handler = Callable[..., object]
"""Takes the arguments of a function, and returns what it gives, or NotImplemented to leave the call to torch."""


def _dropout(input, p, train):
    return input, p, train


def _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return input, running_mean, running_var, weight, bias, training, momentum, eps


_NAMES = ("batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d", "scaled_dot_product_attention")
_FUNCTIONS: dict[Callable, tuple[str, Callable | None]] = {getattr(functional, name): (name, None) for name in _NAMES}
_OF_TORCH = ("dropout", "batch_norm", "_use_cudnn_rnn_flatten_weight")
_FUNCTIONS |= {torch.dropout: ("dropout", _dropout), torch.batch_norm: ("batch_norm", _batch_norm)}
_FUNCTIONS[getattr(torch, _OF_TORCH[2])] = _OF_TORCH[2], None
"""What can be intercepted: the name of its handler, and what brings its arguments into the handler's order."""


class Interception:
    """Replaces functions of ``torch.nn.functional`` by their handlers, as a context.

    They are replaced in ``torch`` and in the Python modules of the network's layers, under whatever name they have there
    (``F.dropout``, ``from torch.nn.functional import dropout``): layers, subclasses of layers and functional calls look
    them up when they run. So what a subclass adds to a layer stays, no other operation costs more, and a checkpointed
    block meets them again in whichever thread its backward pass runs. A TorchFunctionMode would cost some microseconds
    for each operation, and is left in the backward pass: it only watches a look, for calls that come another way.

    There is a handler for each of `_NAMES` and `_OF_TORCH`.
    """

    def __init__(self, handlers: dict[str, Handler]):
        self._handlers = handlers
        self._places: list[tuple[dict[str, Any], str, Callable]] = []  # (namespace, name there, function)

    def find(self, layers: Iterable[nn.Module]) -> None:
        """Find where the Python code of some layers has the functions. Local."""
        classes = {kind for layer in layers for kind in type(layer).__mro__}
        names = {kind.__module__ for kind in classes if not kind.__module__.startswith("torch.")}
        namespaces = [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]
        self._places = [
            *_places_in(vars(functional), _NAMES),
            *_places_in(vars(torch), _OF_TORCH),  # of its 2,000 names
            *(place for namespace in namespaces for place in _places_in(namespace, namespace)),
        ]

    def handler_of(self, function: Callable) -> Handler:
        """Return what takes the arguments of a function of torch. Local."""
        name, order = _FUNCTIONS[function]
        handler = self._handlers[name]
        return handler if order is None else lambda *args, **kwargs: handler(*order(*args, **kwargs))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Intercept, in all threads. Local; contexts may be nested, and those of several networks may overlap."""
        if self in _RUNNING:
            yield
            return
        places = self._places
        with _LOCK:
            _RUNNING.append(self)
            for namespace, name, function in places:
                place = _REPLACED.setdefault((id(namespace), name), _Replaced(namespace[name]))
                place.num_users += 1
                namespace[name] = _dispatcher(function)
        try:
            yield
        finally:
            with _LOCK:
                _RUNNING.remove(self)
                for namespace, name, _ in places:
                    place = _REPLACED[id(namespace), name]
                    place.num_users -= 1
                    if place.num_users == 0:
                        namespace[name] = _REPLACED.pop((id(namespace), name)).former

    @contextlib.contextmanager
    def watching(self, layers: Collection[nn.Module]) -> Iterator[list[nn.Module]]:
        """Give a list of those of some layers that call a function in a way that is not intercepted. Local."""
        unseen: list[nn.Module] = []
        handlers = {function: self.handler_of(function) for function in _FUNCTIONS}
        with self.active(), _Watch(handlers, layers, unseen):
            yield unseen

    def __getstate__(self):
        return self.__dict__ | {"_places": []}


@dataclass
class _Replaced:
    """A name in a namespace that some networks have replaced, and what stood there before."""

    former: Callable
    num_users: int = 0


_LOCK = threading.RLock()
_RUNNING: list[Interception] = []
_REPLACED: dict[tuple[int, str], _Replaced] = {}
_DISPATCHERS: dict[tuple[Callable, bool], Callable] = {}


def _dispatcher(function: Callable) -> Callable:
    """Return the same function for each context: a compiled module asks whether it is another one."""
    key = function, "torch._dynamo" in sys.modules
    if key not in _DISPATCHERS:

        @functools.wraps(function)
        def dispatch(*args, **kwargs):
            for interception in reversed(_RUNNING):
                result = interception.handler_of(function)(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

        # What a handler counts cannot be part of a compiled graph
        replacing: Any = torch.compiler.disable(dispatch) if key[1] else dispatch
        replacing.original = function
        _DISPATCHERS[key] = replacing
    return _DISPATCHERS[key]


def _places_in(namespace: Any, names: Iterable[str]) -> Iterator[tuple[dict[str, Any], str, Callable]]:
    """Yield where, among some names of a namespace, functions stand that can be intercepted."""
    for name in names:
        value = namespace.get(name)
        is_function = isinstance(value, (FunctionType, BuiltinFunctionType))
        if is_function and (function := _original(value)) in _FUNCTIONS:
            yield namespace, name, function


def _original(function: Any) -> Any:
    """Return the function of torch for which another one may stand."""
    return getattr(function, "original", function)


class _Watch(TorchFunctionMode):
    """Sees every call of torch, the replaced functions apart."""

    def __init__(self, handlers: dict[Callable, Handler], layers: Collection[nn.Module], unseen: list[nn.Module]):
        super().__init__()
        # torch's functions report themselves by their global names: as what replaces them
        self._handlers = handlers | {
            value: handlers[function]
            for value in vars(functional).values()
            if isinstance(value, FunctionType) and (function := _original(value)) in _FUNCTIONS
        }
        self._layers, self._unseen = layers, unseen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (handler := self._handlers.get(function)) is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                self._unseen += [called[0] for called in [calling_layer(self._layers)] if called]
                return result
        return function(*args, **kwargs)


Shapes = dict[Any, list[torch.Size]]
"""Shapes of the inputs of calls, by what tells the calls apart."""
BatchDims = dict[tuple[Any, int], list[int]]
"""Dims that belong to the batch, by call and number of dims."""


def batch_dims(whole: Shapes, part: Shapes) -> BatchDims:
    """Return the dims that differ between looks at two numbers of examples; without calls that differ otherwise. Local."""
    found = {}
    for call, shapes in whole.items():
        if [len(shape) for shape in shapes] == [len(shape) for shape in part.get(call, ())]:
            for shape, other in zip(shapes, part[call]):
                dims = [dim for dim, sizes in enumerate(zip(shape, other)) if len(set(sizes)) > 1]
                found[call, len(shape)] = dims
    return found


def calling_layer(layers: Collection[nn.Module]) -> tuple[nn.Module, int] | None:
    """Return the innermost of some layers in whose method the intercepted call stands, and which lines lead to it. Local.

    By the call stack: it holds in every thread, and when a checkpointed block runs once more in the backward pass.
    None where the call stands in none of them.
    """
    frame, place = sys._getframe(1), 0
    while frame is not None:
        code, package = frame.f_code, frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("hpc_bnn", "torch"):
            place = 31 * place + frame.f_lineno - code.co_firstlineno
        for name in code.co_varnames[: code.co_argcount]:  # the first, but for code that torch.compile makes
            value = frame.f_locals.get(name)
            if isinstance(value, nn.Module) and value in layers:
                return value, place
            if not name.startswith("__"):
                break
        frame = frame.f_back
    return None
