"""A posterior over the weights of a module: its slots, its draws, and the way of gradients back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import capabilities
from ..capabilities import Features
from ..config import check_field
from ..errors import ConfigError, Fault
from ..noise import Key, Stream
from .buffer import StepBuffer, Tally
from .draws import RedrawnDraw
from .families.base import Family, Scalars, Slot, check_slots
from .layout import FlatLayout
from .network import Network, Output
from .sampler import Sampler
from .select import Rule, divide_weights

__all__ = ["Posterior"]


class Posterior:
    """A family of distributions over weights of a module, of which some may stay points.

    The module is used in place and called unchanged: its parameters become views of flat buffers. A posterior may be
    copied and pickled (``copy.deepcopy``, ``torch.save``), its module with it.

    The order of a step, which `hpc_bnn.training.VariationalStep` keeps::

        posterior.begin_()
        with posterior.network.running():     # BatchNorm and dropout of the module are ours
            for each sample:
                posterior.draw_(key)          # put the sample into the module
                loss(posterior.network(x)).backward()
                posterior.fold_()             # its gradients, into the buffer
        posterior.complete_()                 # this rank's part of what is summed
        sum posterior.buffer.reduced over the job
        posterior.finish_(scalars)            # what is linear
        posterior.add_kl_(scalars)            # once, after the sum
        update posterior.parameters()

    Parameters
    ----------
    module, family : nn.Module, Family
        Any module, already on its device and in its dtype, and what q(w) is.
    deterministic : sequence of str or module class
        Weights that stay points: "norm", "embedding", name patterns, classes of layers (`split_weights`).
    estimator : {"reparameterisation", "local", "flipout"}
        How the gradient is estimated (`hpc_bnn.posteriors.estimators`): one draw of the weights per sample, or noise per
        example where the layer allows, with less variance. Layers that do not allow it fall back to one draw per sample,
        which is said. The predictive always draws weights.
    antithetic : bool
        Samples 2 i and 2 i + 1 share their noise with opposite signs: half the noise to draw, and the odd part of the
        estimator's error cancels in a pair.
    samples, weights : sequence of int, Tensor, optional
        For a family whose slots belong to samples: global indices of this rank's samples
        (``grid.local_samples(num_samples)``), and [len(samples), P] what the rows start from; by default the weights of the
        module for all.
    output : str, int or callable, optional
        Which tensor the likelihood gets, where the module returns a dict, a tuple or an object: a key or attribute
        (``"logits"``), a place, or a function. Inputs may be trees of tensors as well: a dict is ``module(**x)``, a list
        or tuple ``module(*x)``.
    keeps_noise : bool
        Keep the noise of a draw until its gradient is folded in, [c, P] numbers; False draws it again.

    Attributes
    ----------
    network : Network
        Calls the module: with the masks of the sample drawn last, and statistics of the global batch.
    buffer, sampler : StepBuffer, Sampler
        Memory of parameters and gradients, and what draws into the module and folds gradients in.
    random, point : FlatLayout
        Where random weights lie in [P], and points in theirs.
    num_begun : int
        How often `begin_` was called: who has come half-way through a step sees whether another has begun one since.
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        *,
        deterministic: Sequence[Rule] = (),
        estimator: str = "reparameterisation",
        antithetic: bool = False,
        samples: Sequence[int] = (0,),
        weights: Tensor | None = None,
        output: Output = None,
        keeps_noise: bool = True,
    ):
        if torch.is_inference_mode_enabled():
            rule = "what is made within torch.inference_mode() can never be trained"
            raise ConfigError(Fault("posterior", family.name, rule, "Make it outside"))
        check_field("posterior.estimator", estimator)
        family = copy.copy(family)  # it may note what it is over: the weights that its prior starts from
        self.module, self.family_, self.estimator = module, family, estimator
        self.antithetic, self.samples, self.keeps_noise = antithetic, list(samples), keeps_noise
        can = self.capabilities = family.capabilities
        random, point = divide_weights(module, deterministic, can)
        self.random, self.point = FlatLayout.of(random), FlatLayout.of(point)
        self.network = Network(module, {**random, **point}, list(self.random), output)
        self.check_features()
        self.dtype = next(iter(self.network.parameters.values())).dtype
        if weights is None:
            weights = self.random.flatten(self.network.parameters)
            weights = weights if can.owner == "all" else weights.expand(len(self.samples), -1)
        slots = family.slots(weights, self.random, self.samples)
        check_slots(family, slots, self.num_weights, len(self.samples), {"points", *dir(self)})
        if point:
            slots["points"] = Slot(self.point.flatten(point))
        self._lay_out_(slots)

    def _lay_out_(self, slots: dict[str, Slot]) -> None:
        """Make the flat buffers, all views of them, and the module's parameters such views. Local."""
        network = self.network
        self.num_begun = 0
        self.buffer = StepBuffer(slots, network.batch_norms.num_statistics, self.random, self.point, self.samples)
        network.weights = self.random.flatten(network.parameters)
        network.use(self.random.views(network.weights))
        if "points" in slots:
            network.use(self.point.views(self.buffer.values["points"]))
        self.sampler = Sampler(self.family_, network, self.buffer, self.estimator, self.antithetic, self.keeps_noise)
        network.leave()

    # --- what a user asks --------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """Name of the family."""
        return self.family_.name

    @property
    def num_weights(self) -> int:
        """Number of random weights, P."""
        return self.random.num_elements

    @property
    def is_replicated(self) -> bool:
        """Whether all ranks hold the same parameters; otherwise those of a data group do."""
        return self.capabilities.owner == "all"

    def features(self, **more: Any) -> Features:
        """Return what is asked of this posterior, for `hpc_bnn.capabilities`. Local."""
        is_training = self.module.training
        return Features(
            estimator=self.estimator,
            antithetic=self.antithetic,
            batch_norm=is_training and bool(self.network.batch_norms.layers),
            dropout=is_training and any(layer.p > 0 for layer in self.network.dropout.layers),
            **more,
        )

    def check_features(self, values: dict[str, object] | None = None, **asked: Any) -> None:
        """Raise `ConfigError` with what, of `Features`, does not go with this posterior. Local.

        ``values`` are what fields were set to, for the messages.
        """
        named = {"posterior.estimator": self.estimator, "model": type(self.module).__name__, **(values or {})}
        capabilities.check_features(self.capabilities, self.features(**asked), lambda f: named.get(f, True))

    # --- slots --------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Slots are attributes: ``posterior.loc``."""
        buffer = self.__dict__.get("buffer")
        if buffer is not None and name in buffer.values:
            return buffer.parameters.get(name, buffer.values[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

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
        """Return the slots by the names of the module's weights, and its buffers. Local.

        A point weight keeps its name; a random weight ``NAME`` is there as ``NAME.loc``,
        ``NAME.log_scale`` and so on, by family. The tensors are views.
        """
        return self.buffer.named(self.buffer.values) | dict(self.module.named_buffers())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, of this or another grid: rows of other ranks' samples are left out. Local.

        Raises
        ------
        ConfigError
            Names or shapes do not fit the module.
        """
        mine = self.state_dict()
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
        for name, value in mine.items():
            value.copy_(state[name])

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

    def __copy__(self) -> Posterior:
        return copy.deepcopy(self)  # two posteriors cannot share a module

    def __deepcopy__(self, memo: dict[int, Any]) -> Posterior:
        memo[id(self)] = twin = type(self).__new__(type(self))
        # With memo: an optimizer copied along keeps its parameters
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin

    # --- one step ---------------------------------------------------------------------------------

    def check_num_samples(self, num_samples: int, mine: Sequence[int]) -> None:
        """Raise `ConfigError` where it cannot give ``num_samples`` in the job, ``mine`` of them on this rank. Local."""
        fixed = getattr(self.family_, "num_samples", num_samples)
        if num_samples != fixed:
            rule = f"a {self.family} of {fixed} has that many samples, in training and for tests"
            remedy = f"Set <num_samples> and <num_test_samples> to {fixed}"
            raise ConfigError(Fault("num_samples", num_samples, rule, remedy))
        if not self.is_replicated and list(mine) != self.samples:
            has, asked = (f"{s[0]} to {s[-1]}" if s else "none" for s in (self.samples, mine))
            rule = f"the rows of this {self.family} belong to the samples {has}, and this rank is asked for {asked}"
            remedy = "Make it with samples=grid.local_samples(num_samples), and predict with as many"
            raise ConfigError(Fault("num_samples", num_samples, rule, remedy))

    def check_(self) -> None:
        """Raise `ConfigError` where module or parameters were changed in a way that cannot be followed. Local; microseconds."""
        self.sampler.switch_(False)
        self.network.check()
        for name in self.buffer.moved():
            rule = "its memory was replaced (by .data =, or a conversion) since the posterior was made"
            raise ConfigError(Fault(name, self.family, rule, f"Write into it: {name}.detach().copy_(...)"))

    @torch.no_grad()
    def begin_(self) -> None:
        """Begin a step or a predictive, after `check_`: look at the slots as they are now. Local."""
        self.check_()
        self.num_begun += 1
        self.buffer.reduced.zero_()
        self.network.batch_norms.begin()
        self.sampler.begin_()
        self.sampler.switch_(True)

    @torch.no_grad()
    def draw_(self, key: Key) -> None:
        """Put the weights (and the dropout masks) of ``key.sample`` into the module. Local."""
        self.network.begin_sample(key)
        self.sampler.draw_(key)

    @torch.no_grad()
    def fold_(self, prior_share: float = 0.0, kl_weight: float = 0.0) -> None:
        """Fold the weight gradients of the samples drawn last into the gradient buffer. Local.

        Where the KL is a Monte Carlo one, ``prior_share`` is the weight of each of these samples in it (1 / num_samples
        on one rank of each data group, 0 on the others, so that a sample counts once), and ``kl_weight`` the factor of the
        KL per example, kl_weight / num_train_examples.
        """
        self.sampler.fold_(prior_share, kl_weight)

    @torch.no_grad()
    def complete_(self, batch_norm_share: float = 1.0) -> None:
        """Complete this rank's part of what is summed, after the last sample. Local.

        ``batch_norm_share`` is the weight of this rank's sum of BatchNorm statistics over its samples: 1 / num_samples on
        one rank of each data group, 0 on the others.
        """
        self.network.batch_norms.write_statistics_(self.buffer.statistics, batch_norm_share)
        self.sampler.switch_(False)
        self.network.leave_weights()

    @torch.no_grad()
    def finish_(self, scalars: Scalars) -> None:
        """Complete the gradient of the data term, after the sum over the job, and attach it to the parameters. Local."""
        self.family_.finish_(self.buffer.grads, self.buffer.values, self.sampler.work, scalars)
        self.buffer.attach_gradients_()  # before the KL: it writes into the same memory
        if self.network.batch_norms.layers and self.module.training:
            self.network.batch_norms.update_running_(self.buffer.statistics)

    @torch.no_grad()
    def add_kl_(self, scalars: Scalars) -> Tensor:
        """Add the gradient of the KL and return the KL (nats), once on each rank after the sum. Local."""
        cross_entropy = self.buffer.tally[Tally.CROSS_ENTROPY].clone()
        return self.family_.kl_(self.buffer.grads, self.buffer.values, self.sampler.work, scalars, cross_entropy)

    @torch.no_grad()
    def after_update_(self, scalars: Scalars, key: Key) -> None:
        """Let the family change its slots after the update; ``key`` is that of any sample of the step. Local."""
        draw = RedrawnDraw(self.num_weights, self.network.weights)
        samples = [0] if self.is_replicated else self.samples  # ranks that hold the same slots draw the same
        draw.begin_(key.child(Stream.UPDATE), samples)
        self.family_.after_update_(self.buffer.grads, self.buffer.values, samples, draw, scalars)

    @torch.no_grad()
    def kl(self) -> Tensor:
        """Return the KL of the parameters as they are now (nats), where it has a closed form. Local."""
        if self.capabilities.kl in ("Monte Carlo", "point"):
            raise NotImplementedError(f"a {self.capabilities.kl} KL exists for the samples of a step only")
        flat, values, work = self.buffer.flat, self.buffer.values, {}
        self.family_.begin_(values, work)
        return self.family_.kl_(None, values, work, Scalars.on(flat.device), flat.new_zeros(()))

    # --- predictives --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Draw for a predictive: the module in evaluation mode, no gradients. Local."""
        self.check_()
        # The fused path of nn.TransformerEncoderLayer for evaluation would pass its dropout layers by.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(fast and not self.network.dropout.always)
        try:
            with self.network.evaluating():
                self.begin_()
                self.sampler.switch_(False)
                yield
                self.network.leave_weights()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    @torch.no_grad()
    def use_mean_(self) -> nn.Module:
        """Put the posterior mean of the weights into the module and return it. Local."""
        if not self.is_replicated:
            raise NotImplementedError(f"a {self.family} has no mean network")
        self.check_()
        self.network.dropout.begin_sample(None)
        if self.num_weights:
            with self.network.drawing():
                self.network.weights.copy_(self.family_.mean(self.buffer.values))
            self.network.leave_weights()
        return self.module
