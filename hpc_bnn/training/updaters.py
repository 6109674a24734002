"""The update of the parameters, and its state: whole on each rank, or divided over the sample group."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from ..posteriors import Posterior
from ..posteriors.select import shortened
from .places import Leaf, Places
from .reducer import Reducer, rows_of

logger = logging.getLogger(__name__)

ELEMENTWISE = ("Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")
"""Optimizers of torch that treat every number by itself, so that they may see parameters flat or in shares."""

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Those that torch updates in one pass over memory, on CPUs and on GPUs."""

_NOT_FIXED = ("lr", "initial_lr", "params")
"""Options of a group that a captured update reads anew, or whose parts count one by one."""

OF_POSTERIOR = "Make it with posterior.parameters()"
_CHANGE_GRADIENTS = "Clip with <optimizer.max_gradient_norm>; else change gradients in optimizer.register_step_pre_hook"


class Updater:
    """Updates the parameters of a posterior by an optimizer of torch.

    Its state is stored per weight, under the names of `Posterior.state_dict`, so that neither the layout of memory nor
    the grid enters a checkpoint. The optimizer is over ``posterior.parameters()`` or ``posterior.weight_parameters()``;
    the reducer says which ranks hold what.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, posterior: Posterior, reducer: Reducer):
        self.optimizer, self.posterior, self.reducer = optimizer, posterior, reducer
        self.comm = reducer.comm
        self.check()

    # --- what a user can do to an optimizer ------------------------------------------------------------

    def check(self) -> None:
        """Raise `ConfigError` where it decays weights with a prior, ascends, or updates too much or too little. Local."""
        groups = self.optimizer.param_groups
        for group in groups:
            if group.get("maximize"):
                raise ConfigError(Fault("maximize", True, "the objective is minimised", "Leave it out"))
            if group.get("differentiable"):
                raise ConfigError(Fault("differentiable", True, "nobody differentiates an update", "Leave it out"))
            for key, value in group.items():
                is_decay = ("weight_decay" in key or key == "lambd") and not isinstance(value, bool) and value
                if is_decay and any(map(self._has_prior, group["params"])):
                    rule = (
                        "the prior is what decays the weights of a posterior, and a decay of the optimizer would shrink them "
                        "once more, and pull the logarithms of the scales to 0, which is scales to 1"
                    )
                    remedy = (
                        f"Set {key} to 0 and choose the prior (<posterior.prior_std>, GaussianPrior(std)); weights without a "
                        "prior (posterior.points) may decay in a group of their own"
                    )
                    raise ConfigError(Fault("optimizer.arguments", f"{key} {value}", rule, remedy))
        buffer = self.posterior.buffer
        ours = buffer.updated()
        if any([p._backward_hooks or p._post_accumulate_grad_hooks for p in ours]):
            rule = "its gradient does not come through autograd, so that no hook of it runs"
            raise ConfigError(Fault("posterior", "with hooks on its parameters", rule, _CHANGE_GRADIENTS))
        if any([p.grad is not None and p.grad._base is not buffer.reduced for p in ours]):
            rule = "a step writes the gradients itself, and these would be lost"
            remedy = f"Call optimizer.zero_grad() before it. A penalty of the weights is a prior. {_CHANGE_GRADIENTS}"
            raise ConfigError(Fault("posterior", "with gradients of its parameters", rule, remedy))
        updated = [id(p) for group in groups for p in group["params"]]
        now = updated, [(id(p), p.requires_grad) for p in ours]
        if now != self._checked:
            closure = inspect.signature(self.optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                rule = "it evaluates the loss several times in an update, and a step draws its samples once"
                raise ConfigError(Fault("optimizer.name", type(self.optimizer).__name__, rule, "Use Adam or SGD"))
            self._check_parameters(set(updated))
            self._checked = now

    _checked: tuple[list[int], list[tuple[int, bool]]] | None = None

    def _has_prior(self, parameter: nn.Parameter) -> bool:
        can, names = self.posterior.capabilities, self._names(parameter)
        if not names:  # not one of the posterior's
            return False
        return names[0] not in self.posterior.point if can.has_random_weights else can.kl != "none"

    def _check_parameters(self, updated: set[int]) -> None:
        of_network = {id(p) for p in self.posterior.module.parameters()} & updated
        ours = {id(p) for p in self.posterior.buffer.updated()}
        if of_network or not ours & updated:
            rule = f"it updates {len(of_network)} parameters of the network itself, which each draw writes anew"
            rule = rule if of_network else "it updates none of the posterior's parameters"
            raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, OF_POSTERIOR))
        if foreign := updated - ours:
            rule = f"{len(foreign)} of its parameters are not the posterior's: no rank sums their gradients or sets them to 0"
            remedy = "Put them into the network before the posterior is made, or give them an optimizer of their own"
            raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, remedy))
        buffer, kind = self.posterior.buffer, type(self.optimizer)
        flat = [slot for slot, parameter in buffer.parameters.items() if id(parameter) in updated]
        is_known = any(base.__name__ in ELEMENTWISE for base in kind.__mro__)
        if flat and not is_known and self.comm.grid.is_first("world"):
            logger.warning(
                "%s may look at whole tensors, as LAMB and Adafactor do, and posterior.%s is one tensor of all weights: if it does, make it "
                "with posterior.weight_parameters()", kind.__name__, flat[0],
            )  # fmt: skip
        for slot, parameter in buffer.parameters.items():
            weights = buffer.by_weight(slot)
            left = [name for name, p in weights.items() if id(p) not in updated and p.requires_grad]
            if id(parameter) in updated and len(left) < len(weights):
                rule = f"it updates posterior.{slot} twice: whole, and weight by weight"
                raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, OF_POSTERIOR))
            if id(parameter) not in updated and parameter.requires_grad and (left or not weights):
                rule = f"it does not update posterior.{slot}" + (f" ({shortened(left)})" if weights else "")
                remedy = f"{OF_POSTERIOR}, or freeze what is to stay: posterior.{slot}.requires_grad_(False)"
                raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, remedy))

    # --- a step -------------------------------------------------------------------------------------

    def clip_(self, max_norm: float) -> None:
        """Scale the gradient of the job (of each row that belongs to a sample) down to a norm of at most ``max_norm``. Local."""
        buffer = self.posterior.buffer
        for slot, gradient in buffer.grads.items():  # nobody updates what is frozen
            frozen = [name for name, p in buffer.by_weight(slot).items() if not p.requires_grad]
            views = buffer.named({slot: gradient}) if frozen else {}
            for name in frozen:
                views[name].zero_()
        for name in buffer.owned & buffer.grads.keys():
            norms = torch.linalg.vector_norm(buffer.grads[name], dim=-1, keepdim=True)
            buffer.grads[name].mul_((max_norm / (norms + 1e-6)).clamp(max=1))
        whole = [p for name, p in self.posterior.named_parameters() if name not in buffer.owned]
        if whole:
            torch.nn.utils.clip_grad_norm_(whole, max_norm)

    def update_(self) -> None:
        """Update the parameters. Local."""
        self.optimizer.step()

    # --- an update that the device decides on -----------------------------------------------------------

    def why_not_latched(self) -> str | None:
        """Return why only the host can decide whether to update, or None where torch's fused kernels can. Local."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        kind, like = type(optimizer), self.posterior.buffer.flat
        if kind not in FUSED:
            return f"{kind.__name__} cannot leave an update out by itself, as Adam, AdamW and SGD can"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "the optimizer has hooks"
        if any(isinstance(group["lr"], Tensor) for group in groups):
            return "the learning rate is a tensor"
        if like.device.type == "cuda" and like.dtype != torch.float32:
            return f"torch rounds the learning rate of {like.dtype} weights to float32 there"
        return None

    def rates(self) -> list[float]:
        """Return the learning rate of each group. Local."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def fixed(self) -> list[Any]:
        """Return what a capture of `update_latched_` fixes besides tensors. Local."""
        found: list[Any] = [self.optimizer]
        for group in self.optimizer.param_groups:
            found += [len(group), *(v for key, v in group.items() if key not in _NOT_FIXED), *group["params"]]
        return found

    def state(self) -> list[Tensor]:
        """Return the tensors of the optimizer's state. Local."""
        return [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]

    def update_latched_(self, found_inf: Tensor, rates: Sequence[Tensor]) -> None:
        """Update the parameters where ``found_inf`` is 0, with these learning rates of the groups, all 0-dim tensors. Local."""
        optimizer: Any = self.optimizer
        groups = optimizer.param_groups
        former = [dict(group) for group in groups]
        try:
            for group, rate in zip(groups, rates):
                group |= {"lr": rate, "fused": True, "foreach": False}
                if "capturable" in group:
                    group["capturable"] = rate.device.type == "cuda"
            for parameter, state in optimizer.state.items():
                if "step" in state and state["step"].device != parameter.device:  # of an update that was not latched
                    state["step"] = state["step"].to(parameter.device, torch.float32)
            optimizer.found_inf = found_inf
            optimizer.step()
        finally:
            vars(optimizer).pop("found_inf", None)
            for group, options in zip(groups, former):
                group |= options

    # --- state --------------------------------------------------------------------------------------

    def gather_state(self) -> dict[str, Any]:
        """Return the state of the job by the names of weights. Collective over ``sample_comm`` where ranks differ.

        It is whole on the first rank of a sample group. On the others it is where ranks do not differ.

        "state": name of a weight in `Posterior.state_dict` -> key -> number or tensor; "groups": the options of each group
        of parameters.
        """
        state: dict[str, dict[str, Any]] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    # Trees are gathered one after another where the state is divided: all ranks meet keys in one order
                    for name, part in self._split(parameter, value).items():
                        state.setdefault(name, {})[key] = part
        if not self.posterior.is_replicated:
            state = {name: v for part in self.comm.gather_trees(state, "sample") for name, v in part.items()}
        options = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return {"state": state, "groups": options}

    def begin_load(self, state: dict[str, Any], places: Places) -> Callable[[], None]:
        """Find places for what `gather_state` returned, on this or another grid, of which this is the outline. Local.

        Return what takes it over once they are filled. The optimizer must have as many groups of parameters.
        """
        num_theirs, num_mine = len(state["groups"]), len(self.optimizer.param_groups)
        if num_theirs != num_mine:
            rule = f"the checkpoint has {num_theirs} groups of parameters, and this optimizer has {num_mine}"
            remedy = "Make it with the groups that it was trained with"
            raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, remedy))
        numbers, packed, groups = itertools.count(), {}, []
        for group, options in zip(self.optimizer.param_groups, state["groups"]):
            ids = [next(numbers) for _ in group["params"]]
            how = {
                key: group[key] for key in ("fused", "foreach") if key in group
            }  # of this optimizer, not of the state
            groups.append({**group, **options, **how, "params": ids})  # an option of a newer torch stays as it is
            for number, parameter in zip(ids, group["params"]):
                if values := self._join(parameter, state["state"], places):
                    packed[number] = values
        return lambda: self.optimizer.load_state_dict({"state": packed, "param_groups": groups})

    # A parameter is a slot, whole or this rank's share of it, or a single weight.

    def _slot_of(self, parameter: nn.Parameter) -> str | None:
        return next((name for name, ours in self.posterior.named_parameters() if ours is parameter), None)

    def _whole(self, slot: str, value: Tensor) -> Tensor | None:
        """Return the state of a whole slot from that of this rank's share; None where another rank has it."""
        return value

    def _own(self, slot: str) -> tuple[Tensor, dict[str, list[tuple[int, Tensor]]]]:
        """Return memory for the state of this rank's share of a slot, and by weight, from which number on, what goes there."""
        whole = torch.empty_like(self.posterior.buffer.values[slot])
        return whole, {name: [(0, view)] for name, view in self.posterior.buffer.named({slot: whole}).items()}

    def _names(self, parameter: nn.Parameter) -> list[str]:
        slot = self._slot_of(parameter)
        if slot is None:
            return self.posterior.buffer.weights_of(parameter)
        return list(self.posterior.buffer.named({slot: self.posterior.buffer.values[slot]}))

    def _split(self, parameter: nn.Parameter, value: Any) -> dict[str, Any]:
        """Return the state of a parameter by the names of weights: views, or copies of what a whole parameter has."""
        slot = self._slot_of(parameter)
        if slot is not None and isinstance(value, Tensor) and value.shape == parameter.shape:
            whole = self._whole(slot, value)
            return {} if whole is None else self.posterior.buffer.named({slot: whole})
        is_counter = isinstance(value, Tensor) and value.ndim == 0  # one for each: optimizers count in place
        return {name: value.clone() if is_counter else value for name in self._names(parameter)}

    def _join(self, parameter: nn.Parameter, state: dict[str, dict[str, Any]], places: Places) -> dict[str, Any]:
        """Return memory for the state of a parameter, to which that of its weights goes."""
        slot = self._slot_of(parameter)
        of_weights = {name: state[name] for name in self._names(parameter) if name in state}
        values: dict[str, Any] = dict(next(iter(of_weights.values()), {}))
        for key, value in values.items():
            if slot is None or not self._is_by_number(key, slot, of_weights):
                values[key] = places.new(value)
                continue
            values[key], parts = self._own(slot)
            weights = self.posterior.buffer.named({slot: self.posterior.buffer.values[slot]})
            for name, spans in parts.items():
                leaf = state[name][key]
                if leaf.shape != weights[name].shape:
                    theirs, mine = tuple(leaf.shape), tuple(weights[name].shape)
                    rule = f"{key} of {name} is {theirs} in the checkpoint, {mine} here"
                    remedy = "Make the optimizer that it was trained with"
                    raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, remedy))
                for first, view in spans:
                    places.add(leaf, view, first)
        return values

    def _is_by_number(self, key: str, slot: str, of_weights: dict[str, dict[str, Any]]) -> bool:
        """Whether a state has a number for each number of the weights: then it is 0-dim for weights that are, as counters are."""
        found = [state[key] for state in of_weights.values() if key in state]
        if any(isinstance(value, Leaf) for value in found):
            return True
        weights = self.posterior.buffer.named({slot: self.posterior.buffer.values[slot]}).values()
        return key != "step" and all(isinstance(v, Tensor) for v in found) and all(w.ndim == 0 for w in weights)


class DividedUpdater(Updater):
    """Updates this rank's share of the weights, with all their slots, and gathers those of the others.

    See `hpc_bnn.ShardedOptimizer`. Mean-field doubles the parameters, so that Adam keeps four numbers per weight: they are
    divided by the extent of the sample axis. The reducer's result is divided.
    """

    def __init__(
        self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], posterior: Posterior, reducer: Reducer
    ):
        own = reducer.own_share({name: p.detach() for name, p in posterior.named_parameters()})
        self._shares = {name: nn.Parameter(share) for name, share in own.items()}
        optimizer = make(list(self._shares.values()))
        kind = type(optimizer)
        if kind.__name__ not in ELEMENTWISE or not kind.__module__.startswith("torch.optim"):
            rule = f"its state can be divided for {', '.join(ELEMENTWISE)} only, which treat every number by itself"
            remedy = "Leave it out, or use <optimizer.name> AdamW"
            raise ConfigError(Fault("optimizer.sharded", kind.__name__, rule, remedy))
        is_strided = not all(share.is_contiguous() for share in own.values())
        if is_strided and any(group.get("fused") for group in optimizer.param_groups):
            rule = "shares of several rows are strided memory, which torch's fused kernels for CPUs misread"
            raise ConfigError(Fault("optimizer.arguments", "fused True", rule, "Leave it out"))
        super().__init__(optimizer, posterior, reducer)

    def _check_parameters(self, updated: set[int]) -> None:
        pass  # it has made its parameters itself

    def clip_(self, max_norm: float) -> None:
        """See `Updater.clip_`. Collective over ``sample_comm``: one number."""
        grads = self.posterior.buffer.grads
        trained = {name: grads[name] for name, p in self.posterior.named_parameters() if p.requires_grad}
        shares = list(self.reducer.own_share(trained).values())
        zero = torch.zeros((), dtype=torch.float64, device=self.posterior.buffer.flat.device)
        square = sum((torch.linalg.vector_norm(share.double()).square() for share in shares), zero)
        self.comm.sum_(square, "sample")
        factor = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1)
        for share in shares:
            share.mul_(factor)

    def why_not_latched(self) -> str | None:
        """See `Updater.why_not_latched`."""
        return "the optimizer's state is divided"

    def update_(self) -> None:
        """Update the parameters. Collective over ``sample_comm``."""
        for name, gradient in self.reducer.own_share(self.posterior.buffer.grads).items():
            is_trained = self.posterior.buffer.parameters[name].requires_grad
            self._shares[name].grad = gradient if is_trained else None
        self.optimizer.step()
        self.gather_()

    def gather_(self) -> None:
        """Give each rank the updated weights of the others. Collective over ``sample_comm``."""
        parameters = {name: p.detach() for name, p in self.posterior.named_parameters()}
        self.comm.gather_shares_(list(rows_of(parameters)), "sample")

    def _slot_of(self, parameter: nn.Parameter) -> str | None:
        return next((name for name, share in self._shares.items() if share is parameter), None)

    def _whole(self, slot: str, value: Tensor) -> Tensor | None:
        parts = self.comm.gather_trees(value, "sample")
        return torch.cat(parts, -1) if parts else None

    def _own(self, slot: str) -> tuple[Tensor, dict[str, list[tuple[int, Tensor]]]]:
        share, whole = torch.empty_like(self._shares[slot].detach()), self.posterior.buffer.values[slot].to("meta")
        length, mine = whole.shape[-1], self.comm.grid.share(whole.shape[-1], "sample")
        rows, parts = share.reshape(whole.numel() // length, len(mine)), {}
        for name, view in self.posterior.buffer.named({slot: whole}).items():
            begin, end, parts[name] = view.storage_offset(), view.storage_offset() + view.numel(), []
            for number, row in enumerate(rows):
                first = number * length + mine.start  # of this row of the share, in the whole slot
                start, stop = max(begin, first), min(end, first + len(mine))
                if start < stop:
                    parts[name].append((start - begin, row[start - first : stop - first]))
        return share, parts
