"""The weights of a module as one flat buffer, of which its parameters are views."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn


class FlatLayout:
    """Places of named tensors in a flat buffer.

    Tensors whose length is a multiple of 16 come first, so that each of them starts on a 64-byte
    boundary, as matrix kernels like it, without padding.

    Parameters
    ----------
    shapes : dict of str to torch.Size
        Shape of each tensor, by name.
    """

    def __init__(self, shapes: dict[str, torch.Size]):
        order = sorted(shapes, key=lambda name: shapes[name].numel() % 16 != 0)  # stable
        self.shapes = {name: shapes[name] for name in order}
        self.num_elements = sum(shape.numel() for shape in shapes.values())

    @classmethod
    def of(cls, parameters: dict[str, nn.Parameter]) -> FlatLayout:
        return cls({name: parameter.shape for name, parameter in parameters.items()})

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the named views of a flat tensor [num_elements]."""
        lengths = [shape.numel() for shape in self.shapes.values()]
        return {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), flat.split(lengths))
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its layers back into the mode that it had. Local."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


def tie(parameters: dict[str, nn.Parameter], views: dict[str, torch.Tensor]) -> None:
    """Make module parameters views of a buffer, keeping the buffer's values. Local.

    The parameter objects stay, so tied weights stay tied and references to them stay valid.
    """
    for name, view in views.items():
        parameters[name].data = view


def take_gradients(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
    """Return the gradients of parameters and forget them, so that the next backward makes new ones."""
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients
