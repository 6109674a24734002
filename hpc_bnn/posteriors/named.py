"""The slots of a posterior by the names of the module's weights: no layout of memory enters a name."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ConfigError, Fault
from .buffer import StepBuffer


class NamedSlots:
    """Views of slots, and of what has their shapes, by weight.

    A point keeps its name; other slots are NAME.SLOT, the rows of [R, P] NAME.SLOT.r, the row of sample k SLOT.k.NAME.

    Parameters
    ----------
    buffer : StepBuffer
        Memory of the slots.
    """

    def __init__(self, buffer: StepBuffer):
        self._buffer = buffer
        self._parameters: dict[str, nn.Parameter] = {}

    def of(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return views of slots, or of what has their shapes, by name. Local."""
        views: dict[str, Tensor] = {}
        layout = self._buffer.random
        for slot, value in slots.items():
            kind = self._buffer.slots[slot]
            if slot == "points":
                views |= self._buffer.point.views(value)
            elif kind.owner == "sample":
                for sample, row in zip(self._buffer.samples, value):
                    parts = layout.views(row) if kind.per_weight else {}
                    views |= {f"{slot}.{sample}.{name}": v for name, v in parts.items()}
                    views |= {} if kind.per_weight else {f"{slot}.{sample}": row}
            elif not kind.per_weight:
                views[slot] = value
            else:
                for number, row in enumerate(value.view(-1, value.shape[-1])):
                    end = f"{slot}.{number}" if value.ndim > 1 else slot
                    views |= {f"{name}.{end}": v for name, v in layout.views(row).items()}
        return views

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return a parameter for each weight and trained slot, always the same ones; views of the flat ones. Local."""
        if not self._parameters:
            flat = {name: p.detach() for name, p in self._buffer.parameters.items()}
            self._parameters = {name: nn.Parameter(view) for name, view in self.of(flat).items()}
        return self._parameters

    def updated(self) -> list[nn.Parameter]:
        """Return what an optimizer may update: flat, and by weight where somebody has asked for those. Local."""
        return [*self._buffer.parameters.values(), *self._parameters.values()]

    def weights_of(self, parameter: nn.Parameter) -> list[str]:
        """Return the name of one of `parameters`; nothing where it is none, or nobody has asked for those. Local."""
        return [name for name, p in self._parameters.items() if p is parameter]

    def attach_gradients_(self) -> None:
        """Give each of `updated` its gradient. Local."""
        for name, parameter in self._buffer.parameters.items():
            parameter.grad = self._buffer.grads[name]
        for name, gradient in self.of(self._buffer.grads).items() if self._parameters else ():
            self._parameters[name].grad = gradient


def check_alike(mine: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Raise `ConfigError` where names or shapes of a state differ from those here. Local."""
    rule = "this weight is only in the checkpoint or only in the model"
    faults = [Fault("model", name, rule, "Use its config") for name in sorted(mine.keys() ^ state.keys())]
    for name, value in mine.items():
        if name in state and state[name].shape != value.shape:
            rule = f"{tuple(state[name].shape)} in the checkpoint, {tuple(value.shape)} here"
            faults.append(Fault("model", name, rule, "Use its config"))
    if faults:
        raise ConfigError(*faults)
