"""What all posteriors share: one flat buffer of parameters, one of gradients, one of random weights."""

from __future__ import annotations

import contextlib
import copy
import enum
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from ..noise import Key
from .flat import FlatLayout, Part, take_gradients
from .network import Network, addresses
from .select import Rule, split_weights


class Tally(enum.IntEnum):
    """Places of the scalars that travel behind the gradient (`Posterior.tally`)."""

    DATA_TERM = 0
    """Data term of the objective (nats per example)."""
    NUM_BROKEN = 1
    """Ranks whose gradient is not finite."""
    NUM_STOPS = 2
    """Ranks that want to stop after this step."""
    CROSS_ENTROPY = 3
    """-(1/K) sum over samples of log prior(w_s) (nats), for a Monte Carlo KL."""


class Posterior:
    """Weights of a module, some random, some points; this class: all points, a deterministic network.

    The module is used in place and called unchanged: its parameters become views of flat buffers. A posterior may be copied
    and pickled (``copy.deepcopy``, ``torch.save``), its module with it.

    The life of a step::

        posterior.begin()                        # zero the gradient buffer
        with posterior.network.running():        # BatchNorm and dropout of the module are ours
            for each sample:
                posterior.draw_(key)             # put the sample into the module
                loss(posterior.network(x)).backward()
                posterior.accumulate_()          # fold the gradients of this sample in
        posterior.finish_(batch_norm_share)      # this rank's part of everything that is summed
        sum posterior.reduced over the job
        posterior.attach_gradients_()
        posterior.add_kl_gradient_(weight)       # once, after the sum
        optimizer.step()

    Parameters
    ----------
    module : nn.Module
        Any module, already on its device and in its dtype.
    deterministic : sequence of str or module class
        Weights that stay points: "norm", "embedding", name patterns, classes of layers (`split_weights`).

    Attributes
    ----------
    network : Network
        Calls the module: with the masks of the sample drawn last, and statistics of the global batch.
    flat : Tensor
        [number of parameters] memory of all parameters; ``gradient`` that of their gradients, in the same order.
    reduced : Tensor
        Gradient of all parameters, statistics of BatchNorm layers, tally: what one collective sums.
    tally : Tensor
        The scalars at its end, see `Tally`.
    kl_kind : str
        "none", "closed form", "Monte Carlo" or "point".
    is_replicated : bool
        Whether all ranks hold the same parameters; otherwise those of a data group do.
    """

    family = "deterministic"
    kl_kind = "none"
    has_random_weights = False
    is_replicated = True

    def __init__(self, module: nn.Module, *, deterministic: Sequence[Rule] = ()):
        if torch.is_inference_mode_enabled():
            rule = "what is made within torch.inference_mode() can never be trained"
            raise ConfigError(Fault("posterior", self.family, rule, "Make it outside"))
        random, point = split_weights(module, deterministic)
        if not self.has_random_weights:
            random, point = {}, {**random, **point}
        if self.has_random_weights and not random:
            raise ConfigError(
                Fault(
                    "posterior.deterministic",
                    ", ".join(map(str, deterministic)) or "()",
                    f"{type(module).__name__} has no trainable weight left to be random",
                    "Exclude less, or unfreeze some weights",
                )
            )
        kinds = {(p.dtype, p.device) for p in (*random.values(), *point.values())}
        if len(kinds) != 1:
            raise ConfigError(
                Fault(
                    "model",
                    type(module).__name__,
                    f"its trainable weights are of {len(kinds)} kinds {sorted(map(str, kinds))}; exactly 1 is needed",
                    "Convert the module with module.to(device, dtype)",
                )
            )
        self.module = module
        self.random = FlatLayout.of(random)
        self.point = FlatLayout.of(point)
        self._random_parameters = [random[name] for name in self.random]
        self._point_parameters = [point[name] for name in self.point]
        self._named = {**random, **point}
        drawn = (
            self.random if self.is_replicated else self._named
        )  # each draw ties an ensemble's weights to a member
        self.network = Network(module, self._named, list(drawn))
        self.batch_norms, self.dropout = self.network.batch_norms, self.network.dropout

    def _allocate(self, **slots: Tensor) -> None:
        """Lay out the parameters: named slots, then the point weights. A constructor's last call.

        Each slot becomes an attribute, an ``nn.Parameter`` that the optimizer updates.
        """
        if self._point_parameters:
            slots["points"] = torch.cat([p.detach().reshape(-1) for p in self._point_parameters])
        self._kept = frozenset(self.__dict__)
        self._lay_out_(slots)
        self.network.leave()

    def _lay_out_(self, slots: dict[str, Tensor]) -> None:
        """Make the flat buffers, all views of them, and the module's parameters such views. Local.

        A copy does it once more, with what the constructor had set before `_allocate` and the values of the slots.
        """
        lengths = [slot.numel() for slot in slots.values()]
        num_statistics = self.batch_norms.num_statistics
        self.flat = flat = torch.cat([slot.detach().reshape(-1) for slot in slots.values()])
        self.reduced = flat.new_zeros(len(flat) + num_statistics + len(Tally))
        gradients, self._statistics, self.tally = self.reduced.split([len(flat), num_statistics, len(Tally)])
        self.behind_gradient = self.reduced[len(flat) :]
        self._parameters: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, Tensor] = {}
        for (name, slot), part, gradient in zip(slots.items(), flat.split(lengths), gradients.split(lengths)):
            self._parameters[name] = slot if isinstance(slot, nn.Parameter) else nn.Parameter(slot)
            self._parameters[name].data = part.view(slot.shape)
            self._gradients[name] = gradient.view(slot.shape)
            setattr(self, name, self._parameters[name])
        self._slots = dict(zip(slots, flat.split(lengths)))
        self.gradient = gradients
        if "points" in slots:
            self.network.use(self.point.views(self.points.detach()))
            self._point_grads = list(self.point.views(self._gradients["points"]).values())
        self._weight_parameters: dict[str, nn.Parameter] = {}

    def _state(self) -> dict[str, Any]:
        """Return what a copy is made of: all that was there before `_allocate`, and the parameters."""
        return {name: self.__dict__[name] for name in (*self._kept, "_kept")} | {"slots": self._parameters}

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        return state | {"slots": {name: p.detach().clone() for name, p in state["slots"].items()}}

    def __copy__(self) -> Posterior:
        return copy.deepcopy(self)  # two posteriors cannot share a module

    def __deepcopy__(self, memo: dict[int, Any]) -> Posterior:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(
            copy.deepcopy(self._state(), memo)
        )  # an optimizer that is copied along keeps its parameters
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        slots = state.pop("slots")
        self.__dict__.update(state)
        self._lay_out_(slots)
        self.network.leave()

    @property
    def num_weights(self) -> int:
        """Number of random weights, P."""
        return self.random.num_elements

    @property
    def dtype(self) -> torch.dtype:
        return self.reduced.dtype

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer updates: a few flat tensors."""
        yield from self._parameters.values()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the same with their names, for example ``loc``, ``log_scale``, ``points``."""
        yield from self._parameters.items()

    def weight_parameters(self) -> Iterator[nn.Parameter]:
        """Yield a parameter for each weight of the module and slot instead, for an optimizer that looks at whole tensors.

        Such as LAMB, which scales the step of each tensor by its norm. They are views of what `parameters` yields.
        """
        if not self._weight_parameters:
            views = self._views({name: p.detach() for name, p in self._parameters.items()})
            self._weight_parameters = {name: nn.Parameter(view) for name, view in views.items()}
        yield from self._weight_parameters.values()

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer may update, in either form: flat, and by weight where somebody has asked for those."""
        yield from self._parameters.values()
        yield from self._weight_parameters.values()

    def named_gradients(self) -> dict[str, Tensor]:
        """Return views of the gradient buffer by the names that `state_dict` has. Local."""
        return self._views(self._gradients)

    def has_prior(self, parameter: nn.Parameter) -> bool:
        """Return whether something that an optimizer updates belongs to weights that have a prior. Local."""
        if not self.has_random_weights:
            return self.kl_kind != "none"
        without = [
            self._parameters.get("points"),
            *(self._weight_parameters.get(name) for name in self.point),
        ]
        return all(parameter is not other for other in without)

    def _views(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return views of slots (parameters or their gradients) by the names of weights."""
        return self.point.views(slots["points"]) if "points" in slots else {}

    # --- one step ---------------------------------------------------------------------------------

    def check_num_samples(self, num_samples: int) -> None:
        """Raise `ConfigError` where a family cannot give so many samples. Local."""

    def prepare_(self, x: Tensor) -> None:
        """Look at how the module treats inputs like x, before the first step. Local."""

    @torch.no_grad()
    def begin(self, first_example: int = 0) -> None:
        """Begin a step or a predictive: look at the parameters as they are now. Local.

        Parameters
        ----------
        first_example : int
            Place in the global batch of this rank's first example.

        Raises
        ------
        ConfigError
            See `check_`.
        """
        self.check_()
        self.reduced.zero_()
        take_gradients(self._random_parameters + self._point_parameters)
        self.batch_norms.begin()

    def check_(self) -> None:
        """Verify that the module and these parameters are as they were left. Local; some microseconds.

        Raises
        ------
        ConfigError
            Somebody has changed them in a way that cannot be followed.
        """
        self.network.check()
        if addresses(self._parameters.values()) != addresses(self._slots.values()):
            for name in [
                n for n, p in self._parameters.items() if addresses([p]) != addresses([self._slots[n]])
            ]:
                rule = "its memory was replaced (by .data =, or a conversion) since the posterior was made"
                raise ConfigError(
                    Fault(name, self.family, rule, f"Write into it: {name}.detach().copy_(...)")
                )

    @torch.no_grad()
    def draw_(self, key: Key) -> None:
        """Put the weights (and the dropout masks) of ``key.sample`` into the module. Local."""
        self.network.put_attributes_back()
        self.dropout.begin_sample(key)
        self.batch_norms.begin_sample()

    def why_indivisible(self) -> str | None:
        """Return why `divide_` is not for this posterior, None where it is. Local."""
        if self.has_random_weights or not self.is_replicated:
            return f"not for the family {self.family}"
        return self._why_batch_norm_is_in_the_way()

    def _why_batch_norm_is_in_the_way(self) -> str | None:
        return "BatchNorm makes sums of its own in the backward pass" if self.batch_norms.layers else None

    def divide_(self, num_bytes: int, see: Callable[[int, int], None]) -> list[Part]:
        """Divide the weights in parts whose gradients can be completed during the last backward pass. Local.

        The others stay for `finish_`. Each part of the list has then to be completed before it, by `complete_`.

        Parameters
        ----------
        num_bytes : int
            Least size of a part's gradients.
        see : callable
            Is called in each backward pass with the number of a part and how many of its gradients have come.

        Returns
        -------
        list of Part
            In the order of the backward pass; may be empty.
        """
        parts = self._divide(num_bytes // self.dtype.itemsize)
        for number, part in enumerate(parts):
            for parameter in self.parameters_of(part):
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: see(number, 1))
        return parts

    def _divide(self, num_elements: int) -> list[Part]:
        return self.point.divide(num_elements)[0]

    def parameters_of(self, part: Part) -> list[nn.Parameter]:
        """Return the module's parameters in a part. Local."""
        return self._point_parameters[part.numbers]

    @torch.no_grad()
    def complete_(self, part: Part) -> list[Tensor]:
        """Fold in the gradients of a part after its last backward, and return what is to be summed over the job. Local."""
        self._fold_points_(part.numbers)
        return [self._gradients["points"][part.place]]

    @torch.no_grad()
    def accumulate_(self, prior_share: float = 0.0, kl_weight: float = 0.0) -> None:
        """Fold the weight gradients of the sample drawn last into the gradient buffer. Local.

        Parameters
        ----------
        prior_share : float
            Share of this sample in a Monte Carlo KL: 1 / num_samples on one rank of each data group, 0 on
            the others, so that a sample counts once. Ignored where the KL has a closed form.
        kl_weight : float
            Factor of the KL per example: kl_weight / num_train_examples.
        """
        if self._point_parameters:
            self._fold_points_(slice(None))

    def _fold_points_(self, numbers: slice) -> None:
        gradients = take_gradients(self._point_parameters[numbers])
        used = [gradient is not None for gradient in gradients]  # this forward may leave weights out
        if any(used):
            torch._foreach_add_(
                list(itertools.compress(self._point_grads[numbers], used)),
                list(itertools.compress(gradients, used)),
            )

    @torch.no_grad()
    def finish_(self, batch_norm_share: float = 1.0) -> None:
        """Complete this rank's part of `reduced`. Local.

        Parameters
        ----------
        batch_norm_share : float
            Weight of this rank's sum of BatchNorm statistics over its samples: 1 / num_samples on one rank
            of each data group, 0 on the others.
        """
        self.batch_norms.write_statistics_(self._statistics, batch_norm_share)
        self.network.leave_weights()

    @torch.no_grad()
    def attach_gradients_(self) -> None:
        """After the sum over the job: attach gradients to parameters, update BatchNorm statistics. Local."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._gradients[name]
        if self._weight_parameters:
            for name, gradient in self.named_gradients().items():
                self._weight_parameters[name].grad = gradient
        if self.batch_norms.layers and self.module.training:
            self.batch_norms.update_running_(self._statistics)

    @torch.no_grad()
    def clip_gradient_(self, max_norm: float) -> None:
        """Scale the whole gradient down to a norm of at most ``max_norm``. Local: it is the same on all replicas."""
        torch.nn.utils.clip_grad_norm_(list(self.parameters()), max_norm)

    @torch.no_grad()
    def add_kl_gradient_(self, weight: float) -> Tensor:
        """Add ``weight`` times the gradient of the KL, in place, and return the KL (nats). Local.

        The KL is a function of replicated parameters: call it on each rank after the reduction.
        """
        return self.reduced.new_zeros(())

    def kl(self) -> Tensor:
        """Return the KL of the parameters as they are now (nats), where it has a closed form. Local.

        Between steps only: it clears the gradient buffer.
        """
        if self.kl_kind == "Monte Carlo":
            raise NotImplementedError("a Monte Carlo KL exists for the samples of a step only")
        self.begin()
        return self.add_kl_gradient_(0.0)

    def check_batchable(self) -> None:
        """Raise `NotImplementedError` when samples cannot be evaluated in one batch. Local."""
        if not self.has_random_weights:
            raise NotImplementedError(f"a {self.family} posterior has no random weights to stack")
        if self.module.training and self.batch_norms.layers:
            raise NotImplementedError("BatchNorm in training mode")
        if self.module.training and any(layer.p > 0 for layer in self.dropout.layers):
            raise NotImplementedError("dropout in training mode")

    def forget_chunk_(self) -> None:
        """Forget what a chunk that failed half-way has left behind. Local."""
        take_gradients(self._random_parameters + self._point_parameters)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Draw for a predictive: the module in evaluation mode, no gradients. Local."""
        self.check_()
        with self.network.evaluating():
            self.begin()
            yield
            self.network.leave_weights()

    @torch.no_grad()
    def use_mean_(self) -> nn.Module:
        """Put the posterior mean of the weights into the module and return it. Local."""
        self.check_()
        self.dropout.begin_sample(None)
        return self.module

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the parameters by the names of the module's weights, and its buffers.

        A point weight keeps its name; a random weight ``NAME`` is there as ``NAME.loc``,
        ``NAME.log_scale`` and so on, by family. The tensors are views.
        """
        views = self._views({name: parameter.detach() for name, parameter in self._parameters.items()})
        return views | dict(self.module.named_buffers())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        ConfigError
            Names or shapes do not fit the module.
        """
        mine = self.state_dict()
        faults = [
            Fault(
                "model", name, "this weight is only in the checkpoint or only in the model", "Use its config"
            )
            for name in sorted(mine.keys() ^ state.keys())
        ]
        faults += [
            Fault(
                "model",
                name,
                f"{tuple(state[name].shape)} in the checkpoint, {tuple(v.shape)} here",
                "Use its config",
            )
            for name, v in mine.items()
            if name in state and state[name].shape != v.shape
        ]
        if faults:
            raise ConfigError(*faults)
        for name, value in mine.items():
            value.copy_(state[name])


class DeterministicNetwork(Posterior):
    """A posterior of one point: the ordinary network, for comparison, on the same process grid."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._allocate()
