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
from .buffer import Tally
from .draws import RedrawnDraw
from .families.base import Family, Scalars, Slot, check_slots
from .layout import FlatLayout
from .memory import SlotMemory
from .network import Network, Output, exactly
from .select import KINDS, Rule, divide_weights, shortened


class Posterior(SlotMemory):
    """A family of distributions over weights of a module, of which some may stay points.

    The module is used in place and called unchanged: its parameters become views of flat buffers. Between steps and
    predictives they are views of the mean (of the first member, for an ensemble): the module is then that network, to call,
    to store, to load into and to edit. A posterior may be copied and pickled (``copy.deepcopy``, ``torch.save``), its
    module with it.

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
    deterministic : str or module class, or sequence of them
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
    keeps_noise : bool, optional
        Keep the noise of a draw until its gradient is folded in, [c, P] numbers; False draws it again. By default on CPUs
        only: a GPU draws faster than it reads.

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
        deterministic: Rule | Sequence[Rule] = (),
        estimator: str = "reparameterisation",
        antithetic: bool = False,
        samples: Sequence[int] = (0,),
        weights: Tensor | None = None,
        output: Output = None,
        keeps_noise: bool | None = None,
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
        self.random, self.point = FlatLayout.of(random, module), FlatLayout.of(point)
        tables: list[Any] = [layer for layer in module.modules() if isinstance(layer, KINDS["embedding"])]
        names = {id(p): name for name, p in (random | point).items()}
        trained = [(names[id(table.weight)], table) for table in tables if id(table.weight) in names]
        padding = [name for name, table in trained if table.padding_idx is not None and name in random]
        self._counts_ids = any(table.scale_grad_by_freq for _, table in trained)
        self._bounds_norms = any(table.max_norm is not None and name in point for name, table in trained)
        self.network = Network(module, {**random, **point}, list(self.random), output)
        self.check_features()
        self.dtype = next(iter(self.network.parameters.values())).dtype.to_real()
        if weights is None:
            weights = self.random.flatten(self.network.parameters)
            weights = weights if can.owner == "all" else weights.expand(len(self.samples), -1)
        slots = family.slots(weights, self.random, self.samples)
        check_slots(family, slots, self.num_weights, len(self.samples), {"points", *dir(self)})
        if point:
            slots["points"] = Slot(self.point.flatten(point))
        if padding and can.owner == "all":
            self.network.notes.append(
                f"{shortened(padding)}: torch keeps the row of padding_idx as it is, and here it is random as the others: each padded "
                "place adds noise to the outputs, in the end that of the prior. Keep these weights points (deterministic "
                '"embedding"), or multiply padded places by 0'
            )
        self._lay_out_(slots)

    # --- what a user asks --------------------------------------------------------------------------

    @property
    def num_weights(self) -> int:
        """Number of random weights, P."""
        return self.random.num_elements

    def features(self, **more: Any) -> Features:
        """Return what is asked of this posterior, for `hpc_bnn.capabilities`. Local."""
        return Features(
            estimator=self.estimator,
            antithetic=self.antithetic,
            batch_norm=self.module.training and bool(self.network.batch_norms.layers),
            counts_ids=self._counts_ids,
            bounds_norms=self._bounds_norms,
            **more,
        )

    def check_features(self, values: dict[str, object] | None = None, **asked: Any) -> None:
        """Raise `ConfigError` with what of `Features` does not fit; ``values`` of fields are for messages. Local."""
        named = {"posterior.estimator": self.estimator, "model": type(self.module).__name__, **(values or {})}
        capabilities.check_features(self.capabilities, self.features(**asked), lambda f: named.get(f, True))

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
        if torch.compiler.is_dynamo_compiling():
            rule = "a step or a predictive looks at tensors and modules as torch.compile cannot"
            raise ConfigError(
                Fault("posterior", "within torch.compile", rule, "Compile the network: torch.compile(net)")
            )
        self.sampler.switch_(False)
        self.network.show_(draw=False)
        self.network.check()
        for name in self.buffer.moved():
            rule = "its memory was replaced (by .data =, or a conversion) since the posterior was made"
            raise ConfigError(Fault(name, self.family, rule, f"Write into it: {name}.detach().copy_(...)"))

    @torch.no_grad()
    def begin_(self) -> None:
        """Begin a step or a predictive, after `check_`: look at the slots as they are now. Local."""
        self.prepare_()
        self.read_slots_()

    @torch.no_grad()
    def prepare_(self) -> None:
        """Do what the host does of `begin_`. Local."""
        self.check_()
        self.num_begun += 1
        self.network.batch_norms.begin()
        self.sampler.forget_()
        self.sampler.switch_(True)

    @torch.no_grad()
    def read_slots_(self) -> None:
        """Do what the device does of `begin_`: it can be captured. Local."""
        self.buffer.reduced.zero_()
        self.sampler.begin_()

    @torch.no_grad()
    def draw_(self, key: Key) -> None:
        """Put the weights (and the dropout masks) of ``key.sample`` into the module. Local."""
        self.network.begin_sample(key)
        self.sampler.draw_(key)

    def draw_batch_(self, samples: Sequence[int], key: Key) -> dict[str, Tensor]:
        """Return random weights by name, [len(samples), *shape], of samples in a row; ``key`` is that of any. Local."""
        self.network.dropout.begin_samples(key.of(samples[0]), len(samples))
        return self.sampler.draw_batch_(samples, key)

    @torch.no_grad()
    def fold_(self, prior_share: float = 0.0, kl_weight: float | Tensor = 0.0) -> None:
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
        self.network.show_(draw=False)
        self.network.leave_weights()

    @torch.no_grad()
    def finish_(self, scalars: Scalars) -> None:
        """Complete the gradient of the data term, after the sum over the job, and attach it to the parameters. Local."""
        with exactly(self.buffer.flat):
            self.family_.finish_(self.buffer.grads, self.buffer.values, self.sampler.work, scalars)
        self.buffer.attach_gradients_()  # before the KL: it writes into the same memory
        if self.network.batch_norms.layers and self.module.training:
            self.network.batch_norms.update_running_(self.buffer.statistics)

    @torch.no_grad()
    def add_kl_(self, scalars: Scalars) -> Tensor:
        """Add the gradient of the KL and return the KL (nats), once on each rank after the sum. Local."""
        cross_entropy = self.buffer.tally[Tally.CROSS_ENTROPY].clone()
        with exactly(self.buffer.flat):
            return self.family_.kl_(self.buffer.grads, self.buffer.values, self.sampler.work, scalars, cross_entropy)

    @torch.no_grad()
    def after_update_(self, scalars: Scalars, key: Key) -> None:
        """Let the family change its slots after the update; ``key`` is that of any sample of the step. Local."""
        if type(self.family_).after_update_ is Family.after_update_:
            return  # most change nothing
        draw = RedrawnDraw(self.random, self.network.weights)
        samples = [0] if self.is_replicated else self.samples  # ranks that hold the same slots draw the same
        draw.begin_(key.child(Stream.UPDATE), samples)
        with exactly(self.buffer.flat):
            self.family_.after_update_(self.buffer.grads, self.buffer.values, samples, draw, scalars)

    @torch.no_grad()
    def kl(self) -> Tensor:
        """Return the KL of the parameters as they are now (nats), where it has a closed form. Local."""
        if self.capabilities.kl in ("Monte Carlo", "point"):
            raise NotImplementedError(f"a {self.capabilities.kl} KL exists for the samples of a step only")
        flat, values, work = self.buffer.flat, self.buffer.values, {}
        with exactly(flat):
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
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    @torch.no_grad()
    def use_mean_(self) -> nn.Module:
        """Put the posterior mean of the weights into the module and return it. Local."""
        if not self.is_replicated:
            raise NotImplementedError(f"a {self.family} has no mean network")
        self.check_()
        self.network.dropout.begin_samples(None)
        if self.num_weights:
            mean, rest = self.family_.mean(self.buffer.values), self.buffer.values.get(self.family_.rest_slot)
            if rest is None or mean.data_ptr() != rest.data_ptr():
                self.network.show_(draw=True)
                with self.network.drawing():
                    self.network.weights.copy_(mean)
                self.network.allow_writes()
        return self.module
