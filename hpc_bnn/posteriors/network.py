"""The module of a posterior: an ordinary ``nn.Module``, used in place, with the weights that a posterior gives it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from ..errors import ConfigError, Fault
from ..grid import Grid
from .batch_norm import BatchNorms, SumOverData, of_one_rank
from .dropout_layers import FUNCTIONS, DropoutMasks
from .flat import FlatLayout
from .interception import Interception, Shapes, batch_dims
from .traces import Traces


class Network:
    """Calls a module, so that one sample's weights, masks and statistics are what it meets, and nothing else.

    Parameters
    ----------
    module : nn.Module
        It is used in place and stays as it is; its parameters become views of a posterior's buffers (`use`).
    parameters : dict of str to nn.Parameter
        Its trainable parameters, by name.
    drawn : sequence of str
        Names of those that each draw writes anew.

    Attributes
    ----------
    batch_norms, dropout
        What its BatchNorm layers and its dropout have in place of torch's.
    notes : list of str
        What a user should know, for `say`.
    looks : bool
        Whether somebody is to look at the module before it is used.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], drawn: Sequence[str]):
        self.module = module
        self.batch_norms = BatchNorms(module)
        self.dropout = DropoutMasks(module)
        handlers = {name: functools.partial(self.dropout.handle, drops) for name, drops in FUNCTIONS.items()}
        handlers["scaled_dot_product_attention"] = self.dropout.attend
        self.interception = Interception({"batch_norm": self.batch_norms.handle, **handlers})
        off = ", ".join(self.dropout.switched_off)
        text = f"the dropout inside {off} cannot be keyed by the sample and is switched off"
        self.notes, self._said = [text] if off else [], set()
        self._parameters = parameters
        self._drawn = list(drawn)
        self._views: dict[str, Tensor] = {}
        self._changes_input = self._changes_attributes = False
        self._attributes: Traces | None = None  # to put back before each member of a predictive
        self.looks = True
        self._looked_at: set[tuple[bool, bool]] = set()
        self.leave()

    # --- weights ------------------------------------------------------------------------------------

    def use(self, views: dict[str, Tensor]) -> None:
        """Make parameters of the module views of other memory. Local.

        The parameter objects stay, so tied weights stay tied and references to them stay valid.
        """
        for name, view in views.items():
            self._parameters[name].data = view
        self._views |= views

    def leave(self) -> None:
        """Note what the module is like when it is left to the user; see `check`. Local."""
        self._layers = list(self.module.modules())
        self._deriving = [layer for layer in self._layers if _has_own_modes(type(layer))]
        self.interception.find(self._layers)
        self.dropout.find(self.module)
        self._registries = [d for layer in self._layers for d in (layer._modules, layer._parameters)]
        self._members = self._ids()
        names: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
        self._names = {name: names.get(id(p), name) for name, p in self._parameters.items()}
        trainable = {id(p) for p in self._parameters.values()}
        self._frozen = {name: p for name, p in self.module.named_parameters() if id(p) not in trainable}
        self.leave_weights()

    def leave_weights(self) -> None:
        """Note where the weights are after a step or a predictive. Local."""
        self._addresses = addresses(self._parameters.values())
        self.allow_writes()

    def allow_writes(self) -> None:
        """Take what has been written into the weights so far for ours, or the module's own. Local."""
        self._versions = self._written()

    def _written(self) -> list[int]:
        return [self._parameters[name]._version for name in self._drawn]

    def _ids(self) -> list[int]:
        """Return which layers and parameters stand where. Local; the layers are held, so that no identity comes twice."""
        return list(map(id, itertools.chain.from_iterable(map(methodcaller("values"), self._registries))))

    def check(self) -> None:
        """Verify that the module still reads the weights that it was given. Local; some microseconds.

        Raises
        ------
        ConfigError
            Since the last step it was converted, moved, loaded or edited, or other weights were put in.
        """
        are_there = addresses(self._parameters.values()) == self._addresses
        if are_there and self._written() == self._versions and self._ids() == self._members:
            return
        now = dict(self.module.named_parameters(remove_duplicate=False))
        present = {id(p) for p in now.values()}
        trainable = {id(p) for p in self._parameters.values()}
        faults = []
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in trainable:
                faults.append((name, "it came into the network after the posterior was made"))
        versions = dict(zip(self._drawn, self._versions))
        for name, parameter in self._parameters.items():
            view = self._views[name]
            if id(parameter) not in present:
                faults.append((name, "it is no longer in the network"))
            elif (parameter.dtype, parameter.device) != (view.dtype, view.device):
                faults.append((name, "it was converted or moved after the posterior was made"))
            elif parameter.data_ptr() != view.data_ptr():
                faults.append((name, "it has other memory than the posterior gave it"))
            elif parameter._version != versions.get(name, parameter._version):
                faults.append((name, "its values were changed; each draw writes them anew"))
        for name, layer in self.module.named_modules():
            if isinstance(layer, _BatchNorm) and layer not in self.batch_norms.layers:
                faults.append(
                    (name, "this BatchNorm layer came into the network after the posterior was made")
                )
        if faults:
            raise _changed([name for name, _ in faults], faults[0][1])
        self._looked_at.clear()
        self.leave()  # a layer without weights was put in or taken out, and others may have other names

    def check_trainable(self) -> None:
        """Raise `ConfigError` where weights were frozen or unfrozen since the posterior was made. Local; microseconds."""
        if not all([p.requires_grad for p in self._parameters.values()]):
            frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
            raise _changed(frozen, "it was frozen after the posterior was made: its noise would train on")
        if any([p.requires_grad for p in self._frozen.values()]):
            thawed = [name for name, p in self._frozen.items() if p.requires_grad]
            raise _changed(
                thawed, "it was unfrozen after the posterior was made: no optimizer would update it"
            )

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Write weights: layers that derive something from them in evaluation mode do it anew. Local.

        As timm's LeViT, which keeps a table of attention biases until ``train`` is called.
        """
        torch.clear_autocast_cache()  # the casts of the former weights
        parametrize._cache.clear()  # what a user's parametrize.cached() keeps of them
        with self._nothing_derived():
            yield

    def put_attributes_back(self) -> None:
        """Before each member of a predictive: forget what the passes of others have left in the module. Local."""
        if self._attributes is not None:
            with self._nothing_derived():
                self._attributes.put_back()

    @contextlib.contextmanager
    def _nothing_derived(self) -> Iterator[None]:
        """Put layers whose ``train`` or ``eval`` derives something (a table, merged weights) into training mode. Local."""
        derived = [layer for layer in self._deriving if not layer.training]
        if not derived:
            yield
            return
        modes = _modes(self.module)
        for layer in derived:
            layer.train(True)
        try:
            yield
        finally:
            for layer in derived:
                layer.train(False)
            _set_modes(modes)

    # --- calls --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self, sum_over_data: SumOverData = of_one_rank) -> Iterator[None]:
        """Intercept what the module calls, in its forward and backward passes. Local."""
        former, self.batch_norms.sum_over_data = self.batch_norms.sum_over_data, sum_over_data
        try:
            with self.interception.active():
                yield
        finally:
            self.batch_norms.sum_over_data = former

    def __call__(self, x: Tensor, autocast_dtype: torch.dtype | None = None) -> Tensor:
        """Return the outputs of the sample drawn last. In training with BatchNorm collective as `running` says."""
        with self.interception.active(), _casting(x.device.type, autocast_dtype):
            return self.module(x.clone() if self._changes_input else x)

    def batched(
        self,
        layouts: Sequence[FlatLayout],
        leaves: Sequence[Tensor],
        x: Tensor,
        is_shared: bool,
        autocast_dtype=None,
    ) -> Tensor:
        """Return the outputs [c, B, ...] of c samples at once, by ``torch.vmap``. Local.

        Parameters
        ----------
        layouts, leaves : sequence
            Layouts of the random weights, and their values [c, P_i].
        x : Tensor
            [B, ...] inputs of all samples where ``is_shared``, otherwise [c, B, ...].
        """

        def forward(flats: tuple[Tensor, ...], inputs: Tensor) -> Tensor:
            weights = {}
            for layout, flat in zip(layouts, flats):
                weights |= {self._names[name]: view for name, view in layout.views(flat).items()}
            return torch.func.functional_call(self.module, weights, (inputs,))

        self.batch_norms.is_batched = self.dropout.is_batched = True
        try:
            with self.interception.active(), _casting(x.device.type, autocast_dtype):
                x = x.clone() if self._changes_input else x
                return torch.vmap(forward, (0, None if is_shared else 0))(tuple(leaves), x)
        finally:
            self.batch_norms.is_batched = self.dropout.is_batched = False

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the module into evaluation mode, without gradients, and then each layer back into its own. Local."""
        with torch.no_grad():
            self._keep_attributes()  # before anything is derived, and put back after: to the bit
            try:
                with eval_mode(self.module), self.interception.active():
                    self.batch_norms.is_evaluating = True
                    yield
            finally:
                self.batch_norms.is_evaluating = False
                self.put_attributes_back()
                self._attributes = None

    def _keep_attributes(self) -> None:
        if self._attributes is None and (self._changes_attributes or self._deriving):
            with self._nothing_derived():
                self._attributes = Traces(self.module, drawn=self._drawn_parameters(), with_modes=False)

    def traces(self) -> Traces:
        """Return what a pass may change, as it is now, with all global generators. Local."""
        device = next(iter(self._parameters.values())).device
        return Traces(self.module, device, self._drawn_parameters())

    def _drawn_parameters(self) -> list[nn.Parameter]:
        return [self._parameters[name] for name in self._drawn]

    # --- looks --------------------------------------------------------------------------------------

    def needs_look(self) -> bool:
        """Whether nobody has looked at the module in the mode that it is in, for a step or a predictive."""
        return self.looks and self._occasion() not in self._looked_at

    def _occasion(self) -> tuple[bool, bool]:
        return self.batch_norms.is_evaluating, self.module.training

    def look(
        self,
        x: Tensor,
        draw: Callable[[int], None],
        samples: Sequence[int],
        autocast_dtype: torch.dtype | None = None,
    ) -> Look:
        """See how the module treats inputs like x, with up to four passes that leave no trace. Local.

        Parameters
        ----------
        x : Tensor
            [B, ...] inputs, B > 0.
        draw : callable
            Puts the weights of a global sample into the module.
        samples : sequence of int
            One or two of them; the outputs of two must differ where their weights do.

        Raises
        ------
        ConfigError
            The module is not what a posterior can train: a layer whose statistics or masks cannot be intercepted, or
            weights that do not reach the outputs.
        """
        norms, dropout = self.batch_norms, self.dropout
        sum_over_data, norms.sum_over_data = norms.sum_over_data, of_one_rank  # a look: no collective
        with self._nothing_derived():
            before = self.traces()

        def put_back() -> dict[str, list[str]]:
            with self._nothing_derived():
                return before.put_back()

        def one(sample: int, inputs: Tensor, scale: float = 1.0) -> _Pass:
            norms.shapes, dropout.shapes = {}, {}
            try:
                draw(sample)
                for parameter in self._drawn_parameters() if scale != 1 else ():
                    parameter.detach().mul_(scale)
                versions = self._written()
                outputs = _first_tensor(self(inputs, autocast_dtype))
                written = [
                    name for name, *ab in zip(self._drawn, versions, self._written()) if ab[0] != ab[1]
                ]
                return _Pass(outputs, put_back(), written, norms.shapes, dropout.shapes)
            finally:
                put_back()
                norms.shapes = dropout.shapes = None

        try:
            with self.interception.watching(set(self._layers)) as unseen:
                norms.begin()
                inputs = x.clone()
                with self._subclasses_that_run() as ran:
                    first = one(samples[0], inputs)
                self._refuse_what_is_not_intercepted(unseen, ran, first)
                is_written = not inputs.is_inference() and inputs._version > 0
                self._changes_input |= is_written or not _alike(inputs, x, 0.0)
                if norms.is_evaluating:
                    self._changes_attributes |= bool(first.changed["attribute"] + first.changed["buffer"])
                again = one(samples[0], x.clone())
                if (
                    self._drawn
                    and len(samples) > 1
                    and first.outputs is not None
                    and first.outputs.isfinite().all()
                ):
                    self._check_that_weights_matter(one, x, first.outputs, samples[1])
                if first.normalised or first.dropped:
                    with contextlib.suppress(Exception):  # some modules want all of their examples
                        part = one(samples[0], x[: len(x) // 2] if len(x) > 1 else torch.cat([x, x]))
                        norms.batch_dims |= batch_dims(first.normalised, part.normalised)
                        dropout.batch_dims |= batch_dims(first.dropped, part.dropped)
                    norms.check_calls(first.normalised)
        finally:
            put_back()
            norms.sum_over_data = sum_over_data
            self.allow_writes()
        self._looked_at.add(self._occasion())
        if norms.is_evaluating:
            self._keep_attributes()
        tolerance = 1e-6 if x.device.type == "cpu" else 2e-2  # elsewhere kernels may be chosen anew
        is_repeatable = _alike(first.outputs, again.outputs, tolerance)
        return Look(
            type(self.module).__name__, first.changed["generator"], is_repeatable, self._own_buffers(first)
        )

    def say(self, logger: logging.Logger, grid: Grid, look: Look | None = None) -> None:
        """Log what a user should know, and what a look has found: each once, on rank 0. Local."""
        found = self.notes + (look.warnings(grid.world_size) if look else [])
        for note in found if self.looks and grid.is_first("world") else ():
            if note not in self._said:
                logger.warning("%s", note)
        self._said.update(found)

    def _own_buffers(self, a_pass: _Pass) -> list[str]:
        """Return the buffers that a pass has changed, but for the counters of BatchNorm layers, which a step mends."""
        counters = {id(getattr(layer, "num_batches_tracked", None)) for layer in self.batch_norms.layers}
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        return [name for name in a_pass.changed["buffer"] if id(buffers.get(name)) not in counters]

    @contextlib.contextmanager
    def _subclasses_that_run(self) -> Iterator[list[nn.Module]]:
        """Give a list of those BatchNorm and dropout layers that run with a forward of their own."""
        ran: list[nn.Module] = []
        handles = [
            layer.register_forward_hook(lambda layer, *_: ran.append(layer))
            for layer in self._layers
            if isinstance(layer, (_BatchNorm, _DropoutNd))
            and not type(layer).forward.__module__.startswith("torch.")
        ]
        try:
            yield ran
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_what_is_not_intercepted(
        self, unseen: Sequence[nn.Module], ran: Sequence[nn.Module], first: _Pass
    ) -> None:
        changed = first.changed
        layers = dict(self.module.named_modules())
        names = {layer: name for name, layer in layers.items()}
        norms, faults = self.batch_norms, []
        for layer in dict.fromkeys(unseen):
            what = "it keeps dropout or batch_norm of torch.nn.functional in a way in which it cannot be replaced"
            remedy = "Call it as torch.nn.functional.dropout, or use the layer nn.Dropout (nn.BatchNorm2d)"
            faults.append(Fault("model", f"{names[layer]} ({type(layer).__name__})", what, remedy))
        moved = {
            name.removesuffix("running_mean") for name in changed["buffer"] if name.endswith("running_mean")
        }
        moved = [layers[prefix.rstrip(".")] for prefix in moved]
        ran = [layer for layer in ran if layer.training]
        candidates = [layer for layer in ran if isinstance(layer, _BatchNorm)] + [
            layer for layer in moved if layer in norms.layers
        ]
        for layer in dict.fromkeys(candidates):
            if not norms.has_called(layer):
                what = "its statistics of the batch are made elsewhere than in torch.nn.functional.batch_norm"
                remedy = (
                    "Call that function, use torch's BatchNorm or GroupNorm, or freeze the layer with eval()"
                )
                faults.append(Fault("model", f"{names[layer]} ({type(layer).__name__})", what, remedy))
        if first.written and (self._own_buffers(first) or changed["attribute"]):
            rule = "its forward pass writes these weights and notes that it has: the next draw would undo it"
            remedy = "Run the network once on a batch before the posterior is made"
            faults.append(Fault("model", ", ".join(first.written[:3]), rule, remedy))
        dropping = [layer for layer in ran if isinstance(layer, _DropoutNd) and layer.p > 0]
        for layer in dict.fromkeys(dropping) if changed["generator"] else ():
            if not self.dropout.asked(layer, first.dropped):
                what = f"its masks come from {' and '.join(changed['generator'])}, not from torch.nn.functional.dropout"
                remedy = "Call that function, or use nn.Dropout: then they are keyed by the sample"
                faults.append(Fault("model", f"{names[layer]} ({type(layer).__name__})", what, remedy))
        if faults:
            raise ConfigError(*faults)

    def _check_that_weights_matter(self, one, x: Tensor, outputs: Tensor, other: int) -> None:
        """Raise `ConfigError` where the outputs of two samples are equal, and those of far away weights, too."""
        if not torch.equal(outputs, one(other, x.clone()).outputs):
            return
        noise = (
            torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
            if x.is_floating_point()
            else x
        )
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:  # a last layer of zeros, for example, hides the others: move all weights, and try other inputs
            for number, name in enumerate(kept):
                if name not in self._drawn:
                    self._parameters[name].detach().add_(0.1 + 0.01 * number)
            for inputs in (x, noise):
                near, far = (one(other, inputs.clone(), scale).outputs for scale in (1.0, 1.5))
                if not torch.equal(near, far):
                    return
        finally:
            for name, former in kept.items():
                self._parameters[name].detach().copy_(former)
        rule = (
            f"the outputs do not depend on its {len(self._drawn)} random weights: all samples would be equal"
        )
        remedy = (
            "Its forward must read its own parameters: look for copies, caches and weights held elsewhere"
        )
        raise ConfigError(Fault("model", type(self.module).__name__, rule, remedy))


def _changed(names: Sequence[str], rule: str) -> ConfigError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    remedy = "Load, edit, freeze and convert the network first, and make the posterior then"
    return ConfigError(Fault("model", shown, rule, remedy))


class _Pass(NamedTuple):
    """What a pass of a look has given, and what it had changed."""

    outputs: Tensor | None
    changed: dict[str, list[str]]
    written: list[str]
    """Drawn weights that the forward pass has written itself."""
    normalised: Shapes
    dropped: Shapes


@dataclass(frozen=True)
class Look:
    """What a look at a module has found."""

    name: str
    """Class of the module."""
    generators: Sequence[str]
    """Global generators of random numbers that its forward pass draws from."""
    is_repeatable: bool
    """Whether two passes with the same sample gave the same outputs."""
    buffers: Sequence[str]
    """Buffers that its forward pass changes by itself."""

    def warnings(self, world_size: int) -> list[str]:
        """Return what a user should know, on so many ranks."""
        found = []
        if self.generators or not self.is_repeatable:
            source = " and ".join(self.generators) or "generators of its own: two passes of one sample differ"
            found.append(
                f"the forward pass of {self.name} draws from {source}; these numbers are not keyed by the sample, and "
                "the result depends on the process grid. Use nn.Dropout or torch.nn.functional.dropout, and set the "
                "rates of other noise (stochastic depth) to 0"
            )
        if self.buffers and world_size > 1:
            names = ", ".join(self.buffers[:5]) + (" and more" if self.buffers[5:] else "")
            found.append(
                f"the forward pass of {self.name} changes the buffers {names}, once for each sample and rank: they, and "
                "what depends on them, differ by the process grid"
            )
        return found


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its layers back into the mode that it had. Local."""
    modes = _modes(module)
    module.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def _modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(layer, layer.training) for layer in module.modules()]


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for layer, training in modes:  # parents first
        if layer.training != training and _has_own_modes(type(layer)):
            layer.train(training)
    for layer, training in modes:
        layer.training = training


@functools.cache
def _has_own_modes(kind: type[nn.Module]) -> bool:
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return where tensors begin in memory; nothing for those without, with which `hpc-bnn plan` rehearses. Local."""
    tensors = list(tensors)
    if tensors and isinstance(tensors[0], FakeTensor):
        return []
    return list(map(Tensor.data_ptr, tensors))


def _casting(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Run in a dtype, or in that of the user's autocast, without its cache of casts.

    The cache knows weights by their identity, which all samples share: it would keep the first sample's.
    """
    if dtype is None and not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype or torch.get_autocast_dtype(device_type), cache_enabled=False)


def _first_tensor(outputs: object) -> Tensor | None:
    return outputs.detach().clone() if isinstance(outputs, Tensor) else None


def _alike(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    """Whether two tensors are equal up to a part of their norm; NaN is like NaN."""
    if a is None or b is None or a.shape != b.shape:
        return a is b
    if torch.equal(a, b):
        return True
    a, b = (t.double().nan_to_num() for t in (a, b))
    return bool((a - b).norm() <= tolerance * b.norm())
