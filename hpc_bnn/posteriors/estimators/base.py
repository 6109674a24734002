"""What estimators with noise per example share: which layers they take over, and how gradients come back."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...noise import Key
from ...trees import Inputs, map_tensors, num_rows
from ..batch_norm import of_one_rank
from ..draws import Draw
from ..gradients import ListGradient, SlotViews
from ..layout import take_gradients
from ..look import is_alike, other_number
from ..network import Network
from .example_noise import ExampleNoise, apply_layer, override_forward


class Estimator:
    """Gives some layers of a module noise per example in training, for families with slots ``loc`` and ``log_scale``.

    While it is on, the parameters of these layers look at the means, so that the gradient of a weight is that of its
    mean; the gradient of its scale comes by a leaf of its own.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[type[nn.Module], ...]]
    """Exact types of layers that it knows."""
    needs_2d_inputs: ClassVar[bool]
    """Whether an example may meet a layer only once: [B, in], no tokens."""

    def __init__(self, network: Network, views: SlotViews):
        self._network, self._views = network, views
        self.noise = ExampleNoise()
        self._is_on = self.is_attached = False
        self._seen: list[nn.Module] = []  # the layers of the network when somebody looked, and in which modes
        self._modes: set[bool] = set()
        self._forwards: dict[nn.Module, Callable] = {}
        self._leaves: dict[str, Tensor] = {}  # by weight

    def attach_(self, loc: Tensor, scale: Tensor, x: Inputs) -> None:
        """Find the layers in forward passes of inputs x, in the mode of the module, which leave no trace. Local.

        ``loc`` and ``scale`` [P] are means, and standard deviations as they are kept in the work of a step. Of the same layers
        in another mode those stay for which it is exact in both.
        """
        network = self._network
        self.switch_(False)
        network.show_(draw=True)
        names = {id(network.parameters[name]): name for name in self._views.layout}
        with torch.no_grad():
            layers, former = self._find(set(names), x), self._forwards
        if self._seen is network.layers:
            layers = [layer for layer in layers if layer in former]
        else:
            self._modes.clear()
        self._seen = network.layers
        self._modes.add(network.module.training)
        self._loc, scales = loc, self._views.layout.views(scale)
        self._forwards, self._leaves = {}, {}
        for number, layer in enumerate(layers):
            weight, bias = names[id(layer.weight)], layer.bias is not None and names[id(layer.bias)]
            self._forwards[layer] = self._take(number, weight, bias or None, scales)
        left = [name for key, name in names.items() if key not in _own(layers)]
        note = f"the {self.name} estimator is not exact for, or does not know, the layers of {', '.join(left)}: their "
        note += "weights are drawn once per sample"
        if left and note not in network.notes:
            network.notes.append(note)
        self.is_attached = True

    @property
    def is_due(self) -> bool:
        """Whether nobody has looked for its layers since the module was changed, or in the mode of the module."""
        network = self._network
        return not self.is_attached or self._seen is not network.layers or network.module.training not in self._modes

    def _take(self, number: int, weight: str, bias: str | None, scales: dict[str, Tensor]) -> Callable:
        """Make the leaves of a layer, and return its forward."""
        raise NotImplementedError

    @property
    def layers(self) -> list[nn.Module]:
        """The layers that it takes over."""
        return list(self._forwards)

    @property
    def needs_weights(self) -> bool:
        """Whether a draw of the weights is looked at."""
        return True

    def switch_(self, on: bool) -> None:
        """Take the layers over, for a step; or give them their own forwards, and the drawn weights back. Local."""
        if on is self._is_on or not self.is_attached:
            return
        if on and any(["forward" in layer.__dict__ for layer in self._forwards]):  # a user's: look for the layers anew
            self.is_attached, self._forwards, self._leaves = False, {}, {}
            self._network.look_again()
            return
        self._is_on = on
        if "torch._dynamo" in sys.modules:  # what a key hashes cannot be part of a compiled graph
            self._forwards = {layer: _uncompiled(forward) for layer, forward in self._forwards.items()}
        for layer, forward in self._forwards.items():
            override_forward(layer, forward if on else None)
        views = self._views.layout.views(self._loc if on else self._network.weights)
        self._network.use({name: views[name] for name in self._leaves})

    def begin_sample_(self, key: Key, draw: Draw, scale: Tensor) -> None:
        """Begin another sample. Local."""
        self.noise.begin_sample(key)

    def fold_(self, grads: dict[str, Tensor], draw: Draw) -> None:
        """Fold in the gradients of means and leaves, and take them away, so that nobody finds them. Local."""
        layout, leaves = self._views.layout, self._leaves
        means = [self._network.parameters[name].grad if name in leaves else None for name in layout]
        ListGradient(means, self._views).add_to(grads["loc"])
        scales = [leaves[name].grad if name in leaves else None for name in layout]
        self._fold_leaves_(ListGradient(scales, self._views), grads, draw)
        self.forget_()
        take_gradients([self._network.parameters[name] for name in leaves])

    def forget_(self) -> None:
        """Forget gradients of a backward pass that nobody folds in. Local."""
        take_gradients(list(self._leaves.values()))

    def _fold_leaves_(self, g: ListGradient, grads: dict[str, Tensor], draw: Draw) -> None:
        raise NotImplementedError

    def _find(self, random: set[int], x: Inputs) -> list[nn.Module]:
        """Return the layers for which it is exact. Local; ``random`` are the identities of the random parameters."""
        module = self._network.module
        kinds = [layer for layer in module.modules() if type(layer) in self.kinds and "forward" not in layer.__dict__]
        count, uses, fewer = num_rows(x), self._uses(kinds, x), {}
        with contextlib.suppress(Exception):  # some modules want all of their examples
            half = other_number(x)
            size, fewer = num_rows(half), self._uses(kinds, half)
        owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
        found = []
        for layer in kinds:  # a subclass may do more in its forward
            shape, own = [*uses.get(layer, ()), ()][0], _own([layer])
            other = [*fewer.get(layer, ()), ()][0]
            dims = [d for d, n in enumerate(shape) if n == count and (len(other) <= d or other[d] == size)]
            if (
                own <= random
                and layer._parameters.get("weight") is not None  # not one that is computed (weight_norm)
                and getattr(layer, "bias", None) is layer._parameters.get("bias")  # nor this one
                and not any(p.is_complex() for p in layer.parameters(recurse=False))
                and all(owners[key] == 1 for key in own)
                and len(uses.get(layer, ())) == 1
                and dims == [0]  # of the batch, not of the tokens of all examples
                and (len(shape) == 2 or not self.needs_2d_inputs)
                and getattr(layer, "groups", 1) == 1
                and getattr(layer, "padding_mode", "zeros") == "zeros"
            ):
                found.append(layer)
        if found and self._are_used_elsewhere(found, x):
            found = [layer for layer in found if not self._are_used_elsewhere([layer], x)]
        return found

    def _call(self, x: Inputs) -> Tensor:
        """Make a forward pass in the mode of the module: it leaves no trace and waits for no rank. Local."""
        network = self._network
        norms, dropout, before = network.batch_norms, network.dropout, network.traces()
        sum_over_data, norms.sum_over_data = norms.sum_over_data, of_one_rank
        norms.shapes, dropout.shapes = {}, {}
        has_stance = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")  # torch 2.6
        try:
            with torch.compiler.set_stance("force_eager") if has_stance else contextlib.nullcontext():
                return network(map_tensors(Tensor.clone, x))
        finally:
            norms.shapes, dropout.shapes, norms.sum_over_data = None, None, sum_over_data
            before.put_back()

    def _uses(self, layers: Sequence[nn.Module], x: Inputs) -> dict[nn.Module, list[torch.Size]]:
        """Return the shapes of the inputs of each call of some layers in a forward pass. Local."""
        uses: dict[nn.Module, list[torch.Size]] = {}

        def note(layer, args, kwargs, _):
            uses.setdefault(layer, []).append((*args, *kwargs.values())[0].shape)

        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        try:
            self._call(x)
        finally:
            for handle in handles:
                handle.remove()
        return uses

    def _are_used_elsewhere(self, layers: Sequence[Any], x: Inputs) -> bool:
        """Whether the outputs change with weights of some layers where the layers themselves keep the former ones. Local."""
        weights = [p for layer in layers for p in layer.parameters(recurse=False)]
        kept = [weight.detach().clone() for weight in weights]
        former = dict(zip(map(id, weights), kept))
        for layer in layers:
            own = former[id(layer.weight)], None if layer.bias is None else former[id(layer.bias)]
            override_forward(layer, lambda layer, input, own=own: apply_layer(layer, input, *own))
        try:
            outputs = self._call(x)
            with self._network.drawing():
                for weight in weights:
                    weight.detach().mul_(-1.5).add_(0.1)
            return not is_alike(self._call(x), outputs, 0.0 if outputs.device.type == "cpu" else 1e-6)
        finally:
            for layer in layers:
                override_forward(layer, None)
            with self._network.drawing():
                for weight, value in zip(weights, kept):
                    weight.detach().copy_(value)
            self._network.allow_writes()


def _own(layers: Iterable[nn.Module]) -> set[int]:
    return {id(p) for layer in layers for p in layer.parameters(recurse=False)}


def _uncompiled(forward: Any) -> Any:
    """Return a function that torch.compile leaves as it is: always the same one, as graphs are made anew for others."""
    if not hasattr(forward, "is_uncompiled"):
        forward = torch.compiler.disable(forward)
        forward.is_uncompiled = True
    return forward
