"""What estimators with noise per example share: which layers they take over, and how gradients come back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...noise import Key
from ...trees import Inputs, map_tensors, num_rows
from ..draws import Draw
from ..gradients import ListGradient, SlotViews
from ..layout import take_gradients
from ..network import Network, eval_mode
from .example_noise import ExampleNoise, override_forward


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
        self._forwards: dict[nn.Module, Callable] = {}
        self._leaves: dict[str, Tensor] = {}  # by weight

    def attach_(self, loc: Tensor, scale: Tensor, x: Inputs) -> None:
        """Find the layers in a forward pass of inputs x, which leaves no trace. Local.

        ``loc`` and ``scale`` [P] are means, and standard deviations as they are kept in the work of a step.
        """
        names = {id(self._network.parameters[name]): name for name in self._views.layout}
        before = self._network.traces()
        with eval_mode(self._network.module), torch.no_grad():
            layers = self._find(set(names), num_rows(x), lambda: self._network(map_tensors(Tensor.clone, x)))
        before.put_back()
        self._loc, scales = loc, self._views.layout.views(scale)
        for number, layer in enumerate(layers):
            weight, bias = names[id(layer.weight)], layer.bias is not None and names[id(layer.bias)]
            self._forwards[layer] = self._take(number, weight, bias or None, scales)
        self.is_attached = True

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

    def _find(self, random: set[int], num_examples: int, call: Callable[[], object]) -> list[nn.Module]:
        """Return the layers for which it is exact, and say which it leaves out. Local.

        ``random`` are the identities of the random parameters; ``call`` makes a forward pass of so many examples, which
        shows how layers are used.
        """
        module = self._network.module
        uses: dict[nn.Module, list[torch.Size]] = {}
        handles = [
            layer.register_forward_hook(
                lambda layer, args, kwargs, _: uses.setdefault(layer, []).append((*args, *kwargs.values())[0].shape),
                with_kwargs=True,
            )
            for layer in module.modules()
            if type(layer) in self.kinds and "forward" not in layer.__dict__
        ]
        try:
            call()
        finally:
            for handle in handles:
                handle.remove()
        owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
        found, covered = [], set()
        for layer in module.modules():
            own = {id(p) for p in layer.parameters(recurse=False)}
            if (
                type(layer) in self.kinds  # a subclass may do more in its forward
                and own <= random
                and layer._parameters.get("weight") is not None  # not one that is computed (weight_norm)
                and getattr(layer, "bias", None) is layer._parameters.get("bias")  # nor this one
                and all(owners[key] == 1 for key in own)
                and len(uses.get(layer, ())) == 1
                and uses[layer][0][0] == num_examples  # dim 0 is the batch, not the tokens of all examples
                and (len(uses[layer][0]) == 2 or not self.needs_2d_inputs)
                and getattr(layer, "groups", 1) == 1
                and getattr(layer, "padding_mode", "zeros") == "zeros"
            ):
                found.append(layer)
                covered |= own
        left = [name for name, p in module.named_parameters() if id(p) in random - covered]
        if left:
            self._network.notes.append(
                f"the {self.name} estimator is not exact for, or does not know, the layers of {', '.join(left)}: their "
                "weights are drawn once per sample"
            )
        return found


def _uncompiled(forward: Any) -> Any:
    """Return a function that torch.compile leaves as it is: always the same one, as graphs are made anew for others."""
    if not hasattr(forward, "is_uncompiled"):
        forward = torch.compiler.disable(forward)
        forward.is_uncompiled = True
    return forward
