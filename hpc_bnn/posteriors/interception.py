"""Calls of torch's own functions, handed to functions of ours while a network runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Handler = Callable[..., object]
"""Takes the original function, then its arguments."""


def _dropout(input, p, train):
    return input, p, train


def _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled):
    return input, running_mean, running_var, weight, bias, training, momentum, eps


_BUILT_IN = {torch.dropout: ("dropout", _dropout), torch.batch_norm: ("batch_norm", _batch_norm)}
"""Functions of ``torch`` itself: their names in ``torch.nn.functional``, and what orders their arguments as there."""


class Interception:
    """Replaces functions of ``torch.nn.functional`` by their handlers, as a context.

    Layers, subclasses of layers and functional calls all look the functions up there when they run, so that what a
    subclass adds to a layer stays, and other operations of the network cost nothing more. Code that holds a function by
    a name of its own (``from torch.nn.functional import dropout``) is seen by a TorchFunctionMode only. That one costs
    some microseconds for *each* operation of the network: it is entered where a look has found such a call.

    Parameters
    ----------
    handlers : dict of str to callable
        By the names of the functions.

    Attributes
    ----------
    needs_mode : bool
        Whether to enter the mode.
    num_by_mode : int
        Calls that the mode alone has seen and a handler has changed.
    """

    def __init__(self, handlers: dict[str, Handler]):
        self.needs_mode = False
        self.num_by_mode = 0
        self._handlers = handlers
        self._is_active = self._is_in_mode = False
        self._replacements: dict[tuple, Handler] = {}

    @contextlib.contextmanager
    def active(self, with_mode: bool | None = None) -> Iterator[None]:
        """Intercept, in this thread and in those of its backward passes. Local; contexts may be nested."""
        with_mode = self.needs_mode if with_mode is None else with_mode
        if self._is_active and (self._is_in_mode or not with_mode):
            yield
            return
        former = {name: getattr(functional, name) for name in self._handlers}
        before = self._is_active, self._is_in_mode
        self._is_active, self._is_in_mode = True, with_mode
        try:
            if not before[0]:
                for name, function in former.items():
                    setattr(functional, name, self._replacement(name, function))
            with _Mode(self) if with_mode else contextlib.nullcontext():
                yield
        finally:
            self._is_active, self._is_in_mode = before
            for name, function in former.items():
                setattr(functional, name, function)

    def _replacement(self, name: str, original: Handler) -> Handler:
        """Return the same function for each call: a compiled module asks whether it is another one."""
        is_compiling = "torch._dynamo" in sys.modules
        key = name, original, is_compiling
        if key not in self._replacements:

            @functools.wraps(original)
            def replacement(*args, **kwargs):
                return self._handlers[name](original, *args, **kwargs)

            # What a handler counts cannot be part of a compiled graph
            self._replacements[key] = torch.compiler.disable(replacement) if is_compiling else replacement
        return self._replacements[key]

    def __getstate__(self):
        return self.__dict__ | {"_is_active": False, "_is_in_mode": False, "_replacements": {}}


class _Mode(TorchFunctionMode):
    """Gives calls of the original functions to the handlers of an active interception."""

    def __init__(self, owner: Interception):
        super().__init__()
        self._owner = owner
        # torch's functions report themselves by their global names: as what replaces them
        self._names = {getattr(functional, name): name for name in owner._handlers}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _BUILT_IN:
            name, order = _BUILT_IN[function]
            args, kwargs = order(*args, **kwargs), {}
        elif (name := self._names.get(function)) is None:
            return function(*args, **kwargs)
        calls_of_original = []

        def original(*args, **kwargs):
            calls_of_original.append(True)
            return inspect.unwrap(getattr(functional, name))(*args, **kwargs)

        result = self._owner._handlers[name](original, *args, **kwargs)
        self._owner.num_by_mode += not calls_of_original
        return result


def calling_layer(layers: Collection[nn.Module]) -> tuple[nn.Module, int] | None:
    """Return the innermost of some layers in whose method the intercepted call stands, and the line within it. Local.

    By the call stack: it holds in every thread, and when a checkpointed block runs once more in the backward pass.
    None where the call stands in none of them.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module) and first in layers:
                return first, frame.f_lineno - code.co_firstlineno
        frame = frame.f_back
    return None
