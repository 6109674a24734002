"""The memory of a posterior: its slots as attributes, parameters and states, and its copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from .buffer import StepBuffer
from .families import Family, Slot
from .layout import FlatLayout
from .network import Network
from .sampler import Sampler


class SlotMemory:
    """Holds the slots of a family over a network in flat memory, of which module and optimizer see views."""

    module: nn.Module
    family_: Family
    network: Network
    random: FlatLayout
    point: FlatLayout
    samples: list[int]
    estimator: str
    antithetic: bool
    keeps_noise: bool | None
    buffer: StepBuffer
    sampler: Sampler
    num_begun: int

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.family_.name

    @property
    def is_replicated(self) -> bool:
        """Whether all ranks hold the same parameters; otherwise those of a data group do."""
        return self.family_.capabilities.owner == "all"

    def _lay_out_(self, slots: dict[str, Slot]) -> None:
        """Make the flat buffers, all views of them, and the module's parameters such views. Local."""
        network = self.network
        self.num_begun = 0
        self.buffer = StepBuffer(slots, network.batch_norms.num_statistics, self.random, self.point, self.samples)
        network.weights = self.random.flatten(network.parameters)
        rest = self.buffer.values.get(self.family_.rest_slot)
        at_rest = {} if rest is None else self.random.views(rest.view(-1, self.random.num_elements)[0])
        network.use(self.random.views(network.weights), at_rest)
        if "points" in slots:
            network.use(self.point.views(self.buffer.values["points"]))
        network.show_(draw=False)
        self.sampler = Sampler(self.family_, network, self.buffer, self.estimator, self.antithetic, self.keeps_noise)
        network.leave()

    # --- slots --------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Slots are attributes: ``posterior.loc``."""
        buffer = self.__dict__.get("buffer")
        if buffer is not None and name in buffer.values:
            return buffer.parameters.get(name, buffer.values[name])
        of_network = f". The network has it: posterior.module.{name}" if hasattr(nn.Module, name) else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name}{of_network}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in getattr(self.__dict__.get("buffer"), "values", ()):
            super().__setattr__(name, value)
        elif value is not getattr(self, name):  # it is after `posterior.loc += 1`
            rule = "optimizer and module look at the memory of a slot, which an assignment would not change"
            raise ConfigError(Fault(name, self.family, rule, f"Write into it: {name}.detach().copy_(...)"))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer updates: a few flat tensors."""
        yield from self.buffer.parameters.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the same with their names, for example ``loc``, ``log_scale``, ``points``."""
        yield from self.buffer.parameters.items()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """Yield a parameter for each weight of the module and slot instead, for an optimizer that looks at whole tensors.

        Such as LAMB, which scales the step of each tensor by its norm. They are views of what `parameters` yields.
        """
        yield from self.buffer.weight_parameters().values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the slots by the names of the module's weights, and its persistent buffers. Local.

        A point weight keeps its name; a random weight ``NAME`` is there as ``NAME.loc``,
        ``NAME.log_scale`` and so on, by family. The tensors are views.
        """
        left = self._not_kept()
        buffers = {name: buffer for name, buffer in self.module.named_buffers() if name not in left}
        return self.buffer.named(self.buffer.values) | buffers

    def _not_kept(self) -> set[str]:
        """Return the names of buffers that the module leaves out of its state (persistent=False)."""
        layers = self.module.named_modules()
        return {f"{prefix}.{key}".strip(".") for prefix, m in layers for key in m._non_persistent_buffers_set}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, of this or another grid: rows of other ranks' samples are left out. Local.

        `ConfigError` where names or shapes do not fit the module.
        """
        for name, value in self.places_of(state).items():
            value.copy_(state[name])

    def places_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors that take over those of a state or its outline; `ConfigError` if one is unfit. Local."""
        mine = self.state_dict()
        if state.keys() == self.module.state_dict().keys() != mine.keys():
            rule = "it is the state of a plain network, without the other slots of a posterior"
            remedy = "Load it into the network, which is the mean: posterior.module.load_state_dict(state)"
            raise ConfigError(Fault("state", self.family, rule, remedy))
        left = self._not_kept()  # older states hold them
        state = {name: tensor for name, tensor in state.items() if name not in left}
        if not self.is_replicated:
            state = {name: tensor for name, tensor in state.items() if name in mine}
        rule = "this weight is only in the checkpoint or only in the model"
        faults = [Fault("model", name, rule, "Use its config") for name in sorted(mine.keys() ^ state.keys())]
        for name, value in mine.items():
            if name in state and state[name].shape != value.shape:
                rule = f"{tuple(state[name].shape)} in the checkpoint, {tuple(value.shape)} here"
                faults.append(Fault("model", name, rule, "Use its config"))
        if faults:
            raise ConfigError(*faults)
        return mine

    # --- copies -------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        """Return what a copy is made of: the slots, and all but what `_lay_out_` makes anew."""
        self.sampler.switch_(False)
        values = self.buffer.values | self.buffer.parameters
        slots = {name: kind._replace(value=values[name]) for name, kind in self.buffer.slots.items()}
        return self.__dict__ | {"slots": slots, "buffer": None, "sampler": None}

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        slots = {name: s._replace(value=s.value.detach().clone()) for name, s in state["slots"].items()}
        return state | {"slots": slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lay_out_(self.__dict__.pop("slots"))

    def __copy__(self) -> SlotMemory:
        return copy.deepcopy(self)  # two posteriors cannot share a module

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotMemory:
        memo[id(self)] = twin = type(self).__new__(type(self))
        # With memo: an optimizer copied along keeps its parameters
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin
