"""The memory of a step: parameters, and what one collective sums."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .families.base import Slot
from .guard import addresses
from .layout import FlatLayout

__all__ = ["StepBuffer", "Tally"]


class Tally(enum.IntEnum):
    """The scalars that travel behind the gradient (`StepBuffer.tally`)."""

    DATA_TERM = 0
    """Data term of the objective (nats per example)."""
    NUM_BROKEN = 1
    """Ranks whose gradient is not finite."""
    NUM_STOPS = 2
    """Ranks that want to stop after this step."""
    CROSS_ENTROPY = 3
    """-(1/K) sum over samples of log prior(w_s) (nats), for a Monte Carlo KL."""


class StepBuffer:
    """Flat memory of the slots, and of what is summed over the job: gradient, statistics of BatchNorm, tally.

    Slots whose rows belong to samples come first: the gradient of these is summed over the data axis only, all behind
    it over the world. So each axis is one contiguous sum.

    Parameters
    ----------
    slots : dict of str to Slot
        By name.
    num_statistics : int
        Numbers of BatchNorm statistics.
    random, point : FlatLayout
        Where random weights lie in [P], and points in theirs.
    samples : sequence of int
        Global indices of the rows that belong to samples.

    Attributes
    ----------
    slots, owned : dict of str to Slot, set of str
        What kind each slot is, without its values, and the names of those whose rows belong to samples.
    values, grads : dict of str to Tensor
        The slots, and the gradients of those that are trained; views of the flat memory.
    flat, gradient : Tensor
        [number of trained numbers] memory of the trained slots, and of their gradients in the same order.
    reduced : Tensor
        ``gradient``, ``statistics``, ``tally``.
    num_owned : int
        Numbers at the beginning of ``reduced`` that belong to samples.
    """

    def __init__(
        self, slots: dict[str, Slot], num_statistics: int, random: FlatLayout, point: FlatLayout, samples: Sequence[int]
    ):
        self.random, self.point, self.samples = random, point, samples
        self.slots = {name: slot._replace(value=slot.value[..., :0]) for name, slot in slots.items()}
        self.owned = {name for name, slot in slots.items() if slot.owner == "sample"}
        # Stable: rows of samples first, so that what goes over the data axis, and over the world, is one span each
        trained = sorted((n for n, s in slots.items() if s.is_trained), key=lambda n: n not in self.owned)
        lengths = [slots[name].value.numel() for name in trained]
        self.flat = torch.cat([slots[name].value.detach().reshape(-1) for name in trained])
        self.reduced = self.flat.new_zeros(len(self.flat) + num_statistics + len(Tally))
        self.gradient, self.statistics, self.tally = self.reduced.split([len(self.flat), num_statistics, len(Tally)])
        self.behind_gradient = self.reduced[len(self.flat) :]
        self.num_owned = sum(n for name, n in zip(trained, lengths) if name in self.owned)
        shapes = {name: slots[name].value.shape for name in trained}
        self._memory = dict(zip(trained, self.flat.split(lengths)))
        self.grads = {n: g.view(shapes[n]) for n, g in zip(trained, self.gradient.split(lengths))}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, memory in self._memory.items():
            slot = slots[name].value
            self.parameters[name] = slot if isinstance(slot, nn.Parameter) else nn.Parameter(slot)
            self.parameters[name].data = memory.view(slot.shape)
        self.values = {
            name: self.parameters[name].detach() if slot.is_trained else _own(slot.value)
            for name, slot in slots.items()
        }

    def moved(self) -> Iterator[str]:
        """Yield the names of parameters whose memory somebody has replaced. Local."""
        for name, memory in self._memory.items():
            if addresses([self.parameters[name]]) != addresses([memory]):
                yield name


def _own(value: torch.Tensor) -> torch.Tensor:
    """Return memory of its own: a family may give one tensor, or one row for all samples, for several slots."""
    return value.detach().clone(memory_format=torch.contiguous_format)
