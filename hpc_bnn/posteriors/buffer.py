"""The memory of a step: parameters, by slot and by weight, and what one collective sums."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .families.base import Slot
from .layout import FlatLayout, addresses


class Tally(enum.IntEnum):
    """The scalars that travel behind the gradient (`StepBuffer.tally`)."""

    DATA_TERM = 0
    """Data term of the objective (nats per example)."""
    CROSS_ENTROPY = 1
    """-(1/K) sum over samples of log prior(w_s) (nats), for a Monte Carlo KL."""
    NUM_BROKEN = 2
    """Ranks whose gradient is not finite."""
    NUM_MISFITS = 3
    """Micro-batches of ranks with a target outside of the support of the likelihood."""
    NUM_STOPS = 4
    """Ranks that want to stop after this step; this and what follows the host knows."""
    NUM_CHECKPOINTS = 5
    """Ranks that want a checkpoint after this step."""
    NUM_EXAMPLES = 6
    """Examples of the step, each counted once."""
    NUM_MISPLACED = 7
    """Ranks whose examples are not those of their place in the global batch, where noise goes by places."""
    SETTINGS = 8
    """0 where all ranks have the same settings (`hpc_bnn.training.equality`)."""
    BATCH = 9
    """0 where the ranks of each sample group have the same examples; `BATCH_TOO` likewise, of other bits."""
    BATCH_TOO = 10
    PARAMETERS = 11
    """0 where the ranks that share parameters have the same."""


class StepBuffer:
    """Flat memory of the slots, and of what is summed over the job: gradient, statistics of BatchNorm, tally.

    Slots whose rows belong to samples come first: the gradient of these is summed over the data axis only, all behind
    it over the world. So each axis is one contiguous sum.

    Attributes
    ----------
    random, point, samples : FlatLayout, FlatLayout, list of int
        Where random weights lie in [P], and points in theirs; global indices of the rows that belong to samples.
    slots, owned : dict of str to Slot, set of str
        What kind each slot is, without its values, and the names of those whose rows belong to samples.
    values, grads, parameters : dict of str to Tensor
        The slots, and the gradients and parameters of those that are trained; views of the flat memory.
    flat, gradient : Tensor
        [number of trained numbers] memory of the trained slots, and of their gradients in the same order.
    reduced : Tensor
        ``gradient``, ``statistics``, ``tally``; the first ``num_owned`` numbers belong to samples.
    """

    def __init__(
        self, slots: dict[str, Slot], num_statistics: int, random: FlatLayout, point: FlatLayout, samples: list[int]
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
        self._memory = dict(zip(trained, self.flat.split(lengths)))
        self.grads = {n: g.view(slots[n].value.shape) for n, g in zip(trained, self.gradient.split(lengths))}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, memory in self._memory.items():
            slot = slots[name].value
            self.parameters[name] = slot if isinstance(slot, nn.Parameter) else nn.Parameter(slot)
            self.parameters[name].data = memory.view(slot.shape)
        # Memory of its own: a family may give one tensor, or one row for all samples, for several slots
        self.values = {
            name: self.parameters[name].detach()
            if slot.is_trained
            else slot.value.detach().clone(memory_format=torch.contiguous_format)
            for name, slot in slots.items()
        }
        self._by_weight: dict[str, nn.Parameter] = {}

    def moved(self) -> Iterator[str]:
        """Yield the names of parameters whose memory somebody has replaced. Local."""
        for name, memory in self._memory.items():
            if addresses([self.parameters[name]]) != addresses([memory]):
                yield name

    # --- by the names of the module's weights: no layout of memory enters a name ------------------------

    def named(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return views of slots, or of what has their shapes, by weight. Local.

        A point keeps its name; other slots are NAME.SLOT, the rows of [R, P] NAME.SLOT.r, the row of sample k SLOT.k.NAME.
        """
        views: dict[str, Tensor] = {}
        for slot, value in slots.items():
            kind = self.slots[slot]
            if slot == "points":
                views |= self.point.views(value)
            elif kind.owner == "sample":
                for sample, row in zip(self.samples, value):
                    parts = self.random.views(row) if kind.per_weight else {}
                    views |= {f"{slot}.{sample}.{name}": v for name, v in parts.items()}
                    views |= {} if kind.per_weight else {f"{slot}.{sample}": row}
            elif not kind.per_weight:
                views[slot] = value
            else:
                for number, row in enumerate(value.view(-1, value.shape[-1])):
                    end = f"{slot}.{number}" if value.ndim > 1 else slot
                    views |= {f"{name}.{end}": v for name, v in self.random.views(row).items()}
        return views

    def weight_parameters(self) -> dict[str, nn.Parameter]:
        """Return a parameter for each weight and trained slot, always the same ones; views of the flat ones. Local."""
        if not self._by_weight:
            flat = {name: p.detach() for name, p in self.parameters.items()}
            self._by_weight = {name: nn.Parameter(view) for name, view in self.named(flat).items()}
        return self._by_weight

    def by_weight(self, slot: str) -> dict[str, nn.Parameter]:
        """Return the `weight_parameters` of a slot; none where nobody has asked for those. Local."""
        names = self.named({slot: self.values[slot]}) if self._by_weight else ()
        return {name: self._by_weight[name] for name in names}

    def updated(self) -> list[nn.Parameter]:
        """Return what an optimizer may update: flat, and by weight where somebody has asked for those. Local."""
        return [*self.parameters.values(), *self._by_weight.values()]

    def weights_of(self, parameter: nn.Parameter) -> list[str]:
        """Return the name of one of `weight_parameters`; nothing where it is none, or nobody has asked for those. Local."""
        return [name for name, p in self._by_weight.items() if p is parameter]

    def attach_gradients_(self) -> None:
        """Give each of `updated` its gradient; a slot or weight that a user has frozen gets none. Local."""
        for slot, parameter in self.parameters.items():
            parameter.grad = self.grads[slot] if parameter.requires_grad else None
            for name, gradient in self.named({slot: self.grads[slot]}).items() if self._by_weight else ():
                of_weight = self._by_weight[name]
                of_weight.grad = gradient if parameter.requires_grad and of_weight.requires_grad else None

    def take_gradients_away_(self) -> None:
        """Leave none to an optimizer that somebody steps once more. Local."""
        for parameter in self.updated():
            parameter.grad = None
