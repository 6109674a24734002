"""Estimators with noise per example: local reparameterisation and Flipout.

Both leave the posterior as it is and only lower the variance of the gradient: each example of a batch meets
its own draw of a layer's weights, not one draw for all.

- *Local reparameterisation* (Kingma, Salimans, Welling, 2015) draws the outputs of a linear layer from the
  Gaussian that the weights induce. Exact only where an example meets the layer once: ``nn.Linear`` with inputs
  [B, in], called once per forward. Not for tokens or pixels, which share the weights.
- *Flipout* (Wen, Vicol, Ba, Tran, Grosse, 2018) multiplies one perturbation of the weights by random signs per
  example, the same for all its tokens or pixels: ``nn.Linear`` and ``nn.Conv1d/2d/3d``.

The noise of an example is keyed by (sample, layer, place in the global batch), in blocks, so that it does not
depend on the grid and a rank draws only what it needs.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import Estimator
from ..noise import Key, Stream

BLOCK = 32
"""Examples whose noise comes from one generator."""

_SUPPORTED = {"local": (nn.Linear,), "flipout": (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class ExampleNoise:
    """Noise per example of the sample being evaluated.

    Attributes
    ----------
    first_example : int
        Place in the global batch of this rank's first example.
    """

    def __init__(self):
        self.first_example = 0
        self._key = Key(0, Stream.NOISE)

    def begin_sample(self, key: Key) -> None:
        self._key = key

    def draw(self, layer: int, like: Tensor, width: int, signs: bool = False) -> Tensor:
        """Return noise [len(like), width], standard normal or +-1. Local."""
        first, stop = self.first_example, self.first_example + len(like)
        blocks = []
        for block in range(first // BLOCK, -(-stop // BLOCK)):
            generator = self._key.child(Stream.ACTIVATION, layer, block).generator(like.device)
            noise = torch.empty(BLOCK, width, dtype=like.dtype, device=like.device)
            if signs:
                noise.random_(0, 2, generator=generator).mul_(2).sub_(1)
            else:
                noise.normal_(generator=generator)
            blocks.append(noise)
        if not blocks:
            return like.new_empty(0, width)
        offset = first % BLOCK
        return torch.cat(blocks)[offset : offset + len(like)]


def find_layers(
    module: nn.Module,
    estimator: Estimator,
    random: set[int],
    num_examples: int,
    call: Callable[[], object],
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the layers, by name, for which an estimator is exact, and the random weights of all others. Local.

    Parameters
    ----------
    module : nn.Module
        The network.
    estimator : str
        "local" or "flipout".
    random : set of int
        Identities of the random parameters.
    num_examples : int
        Size of the batch of that pass.
    call : callable
        Makes one forward pass of the module, which shows how its layers are used.
    """
    uses: dict[nn.Module, list[torch.Size]] = {}
    handles = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, _: uses.setdefault(layer, []).append(
                (*args, *kwargs.values())[0].shape
            ),
            with_kwargs=True,
        )
        for layer in module.modules()
        if type(layer) in _SUPPORTED["flipout"] and "forward" not in layer.__dict__
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    owners: dict[int, int] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found, covered = {}, set()
    for name, layer in module.named_modules():
        own = {id(p) for p in layer.parameters(recurse=False)}
        if (
            type(layer) in _SUPPORTED[estimator]  # a subclass may do more in its forward
            and own <= random
            and layer._parameters.get("weight") is not None  # not one that is computed (weight_norm)
            and all(owners[key] == 1 for key in own)
            and len(uses.get(layer, ())) == 1
            and uses[layer][0][0] == num_examples  # dim 0 is the batch, not the tokens of all examples
            and (estimator == "flipout" or len(uses[layer][0]) == 2)
            and getattr(layer, "groups", 1) == 1
            and getattr(layer, "padding_mode", "zeros") == "zeros"
        ):
            found[name] = layer
            covered |= own
    return found, [name for name, p in module.named_parameters() if id(p) in random - covered]


def apply_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what an nn.Linear or nn.Conv gives with other weights."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def local_forward(number: int, noise: ExampleNoise, scale: Tensor, bias_scale: Tensor | None):
    """Return the forward of a linear layer by local reparameterisation; its parameters hold the means."""

    def forward(layer: nn.Linear, input: Tensor) -> Tensor:  # its name in nn.Linear
        x = input
        mean = nn.functional.linear(x, layer.weight, layer.bias)
        variance = nn.functional.linear(
            x.square(), scale.square(), None if bias_scale is None else bias_scale.square()
        )
        zeta = noise.draw(number, mean, mean.shape[1])
        tiny = torch.finfo(variance.dtype).tiny  # the square root has no slope at 0
        return mean + variance.clamp_min(tiny).sqrt() * zeta

    return forward


def flipout_forward(number: int, noise: ExampleNoise, perturbation: Tensor):
    """Return the forward of a layer by Flipout; its weight holds the mean, its bias a draw."""

    def forward(layer: nn.Module, input: Tensor) -> Tensor:
        x = input
        mean = apply_layer(layer, x, layer.weight, layer.bias)
        channel = -1 if isinstance(layer, nn.Linear) else 1

        def signs(which: int, of: Tensor) -> Tensor:
            shape = [1] * of.ndim
            shape[0], shape[channel] = len(of), of.shape[channel]
            return noise.draw(2 * number + which, of, of.shape[channel], signs=True).view(shape)

        return mean + apply_layer(layer, x * signs(0, x), perturbation, None) * signs(1, mean)

    return forward


def override_forward(layer: nn.Module, forward: Callable | None) -> None:
    """Give a layer another forward, or its own back."""
    if forward is None:
        layer.__dict__.pop("forward", None)
    else:
        layer.forward = types.MethodType(forward, layer)
