"""The module of a posterior: an ordinary ``nn.Module``, used in place, with the weights that a posterior gives it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..errors import ConfigError, Fault
from ..grid import Grid
from ..noise import Key
from ..trees import Inputs, as_arguments, device_of, map_tensors
from .batch_norm import BatchNorms, SumOverData, of_one_rank
from .dropout_layers import FUNCTIONS, DropoutMasks
from .interception import Interception
from .layout import FlatLayout, addresses
from .look import Look, Looker
from .traces import Traces

Output = str | int | Callable[[Any], Tensor] | None
"""Key, attribute or place of the tensor of what a module returns, or a function that picks it; None: it is the tensor."""


class Network:
    """Calls a module, so that one sample's weights, masks and statistics are what it meets, and nothing else.

    The module is used in place and stays as it is; its parameters become views of a posterior's buffers (`use`).

    Attributes
    ----------
    parameters, drawn : dict of str to nn.Parameter, list of str
        Its trainable parameters, by name, and the names of those that each draw writes anew.
    layers : list of nn.Module
        The layers of the module when it was left to the user.
    batch_norms, dropout
        What its BatchNorm layers and its dropout have in place of torch's.
    weights : Tensor
        [P] the memory in which a draw lies.
    notes, looks : list of str, bool
        What a user should know, for `say`; whether somebody is to look at the module before it is used.
    """

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], drawn: Sequence[str], output: Output = None
    ):
        self.module, self._output = module, output
        self.batch_norms = BatchNorms(module)
        self.dropout = DropoutMasks(module)
        drop = {name: functools.partial(self.dropout.handle, drops) for name, drops in FUNCTIONS.items()}
        attend = {"scaled_dot_product_attention": self.dropout.attend}
        self.interception = Interception({"batch_norm": self.batch_norms.handle, **drop, **attend})
        off = ", ".join(self.dropout.switched_off)
        text = f"the dropout inside {off} cannot be keyed by the sample and is switched off"
        self.notes, self._said = [text] if off else [], set()
        self.parameters = parameters
        self.drawn = list(drawn)
        self._views: dict[str, Tensor] = {}  # the memory that each parameter was given
        self.weights = torch.zeros(0)
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
            self.parameters[name].data = view
        self._views |= views

    def leave(self) -> None:
        """Find what of ours the module calls, and note what it is like when it is left to the user. Local."""
        self.layers = list(self.module.modules())
        self._registries = [d for layer in self.layers for d in (layer._modules, layer._parameters)]
        self._members = self._ids()
        trainable = {id(p) for p in self.parameters.values()}
        self._frozen = {name: p for name, p in self.module.named_parameters() if id(p) not in trainable}
        self._deriving = [layer for layer in self.layers if _has_own_modes(type(layer))]
        self.interception.find(self.layers)
        self.dropout.find(self.module)
        names: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), name)
        self._names = {name: names.get(id(p), name) for name, p in self.parameters.items()}
        self.leave_weights()

    def leave_weights(self) -> None:
        """Note where the weights are after a step or a predictive. Local."""
        self._addresses = addresses(self.parameters.values())
        self.allow_writes()

    def allow_writes(self) -> None:
        """Take what has been written into the weights so far for ours, or the module's own. Local."""
        self._versions = self.versions()

    def versions(self) -> list[int]:
        """Return how often each drawn weight was written by others than the draws. Local."""
        return [self.parameters[name]._version for name in self.drawn]

    def _ids(self) -> list[int]:
        """Return which layers and parameters stand where. Local; the layers are held, so that no identity comes twice."""
        return list(map(id, itertools.chain.from_iterable(map(methodcaller("values"), self._registries))))

    def check(self) -> None:
        """Follow what a user did to the module since it was left, or say why not. Local; some microseconds.

        It is left once more where a layer without weights was put in or taken out, or has another name.

        Raises
        ------
        ConfigError
            It was converted, moved, loaded or edited, or other weights were put in.
        """
        are_there = addresses(self.parameters.values()) == self._addresses
        if are_there and self.versions() == self._versions and self._ids() == self._members:
            return
        now = dict(self.module.named_parameters(remove_duplicate=False))
        present = {id(p) for p in now.values()}
        trainable = {id(p) for p in self.parameters.values()}
        faults = []
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in trainable:
                faults.append((name, "it came into the network after the posterior was made"))
        versions = dict(zip(self.drawn, self._versions))
        for name, parameter in self.parameters.items():
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
                faults.append((name, "this BatchNorm layer came into the network after the posterior was made"))
        if faults:
            raise _changed([name for name, _ in faults], faults[0][1])
        self._looked_at.clear()
        self.leave()

    def check_trainable(self) -> None:
        """Raise `ConfigError` where weights were frozen or unfrozen since the posterior was made. Local; microseconds."""
        if not all([p.requires_grad for p in self.parameters.values()]):
            frozen = [name for name, p in self.parameters.items() if not p.requires_grad]
            raise _changed(frozen, "it was frozen after the posterior was made: its noise would train on")
        if any([p.requires_grad for p in self._frozen.values()]):
            thawed = [name for name, p in self._frozen.items() if p.requires_grad]
            raise _changed(thawed, "it was unfrozen after the posterior was made: no optimizer would update it")

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Write weights: layers that derive something from them in evaluation mode do it anew. Local.

        As timm's LeViT, which keeps a table of attention biases until ``train`` is called.
        """
        torch.clear_autocast_cache()  # the casts of the former weights
        parametrize._cache.clear()  # what a user's parametrize.cached() keeps of them
        with self.nothing_derived():
            yield

    def begin_sample(self, key: Key) -> None:
        """Begin a sample: its dropout masks; and what passes of other samples have left in the module is forgotten. Local."""
        self._put_attributes_back()
        self.dropout.begin_sample(key)
        self.batch_norms.begin_sample()

    def _put_attributes_back(self) -> None:
        if self._attributes is not None:
            with self.nothing_derived():
                self._attributes.put_back()

    @contextlib.contextmanager
    def nothing_derived(self) -> Iterator[None]:
        """Put layers whose ``train`` or ``eval`` derives something (a table, merged weights) into training mode. Local."""
        derived = [layer for layer in self._deriving if not layer.training]
        if not derived:
            yield
            return
        modes = [(layer, layer.training) for layer in self.module.modules()]
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

    def __call__(self, x: Inputs, autocast_dtype: torch.dtype | None = None) -> Tensor:
        """Return the outputs of the sample drawn last. In training with BatchNorm collective as `running` says."""
        with self.interception.active(), _casting(device_of(x).type, autocast_dtype):
            arguments, named = as_arguments(map_tensors(Tensor.clone, x) if self._changes_input else x)
            return self._picked(self.module(*arguments, **named))

    def _picked(self, outputs: Any) -> Tensor:
        """Return the tensor that is meant, of what the module returns."""
        pick, kind = self._output, type(outputs).__name__
        remedy = "Say which tensor the likelihood gets: <model.output> logits (a key or attribute), 0 (a place), or a function"
        try:
            if callable(pick):
                outputs = pick(outputs)
            elif isinstance(pick, int) or (pick is not None and isinstance(outputs, Mapping)):
                outputs = outputs[pick]
            elif pick is not None:
                outputs = getattr(outputs, pick)
        except (LookupError, AttributeError, TypeError) as error:
            rule = f"the {kind} that {type(self.module).__name__} returns does not have it ({error})"
            raise ConfigError(Fault("model.output", pick, rule, remedy)) from error
        if not isinstance(outputs, Tensor):
            rule = f"{type(self.module).__name__} returns a {kind}, from which it picks no tensor"
            raise ConfigError(Fault("model.output", pick, rule, remedy))
        return outputs

    def batched(
        self, layouts: Sequence[FlatLayout], leaves: Sequence[Tensor], x: Inputs, is_shared: bool, autocast_dtype=None
    ) -> Tensor:
        """Return the outputs [c, B, ...] of c samples at once, by ``torch.vmap``. Local.

        The random weights are ``leaves`` [c, P_i] of some layouts; the inputs are [B, ...] where all samples share them,
        otherwise [c, B, ...].
        """

        def forward(flats: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
            weights = {}
            for layout, flat in zip(layouts, flats):
                weights |= {self._names[name]: view for name, view in layout.views(flat).items()}
            return self._picked(torch.func.functional_call(self.module, weights, *as_arguments(inputs)))

        self.batch_norms.is_batched = self.dropout.is_batched = True
        try:
            with self.interception.active(), _casting(device_of(x).type, autocast_dtype):
                x = map_tensors(Tensor.clone, x) if self._changes_input else x
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
                self._put_attributes_back()
                self._attributes = None

    def _keep_attributes(self) -> None:
        if self._attributes is None and (self._changes_attributes or self._deriving):
            with self.nothing_derived():
                self._attributes = Traces(self.module, drawn=self.drawn_parameters(), with_modes=False)

    def traces(self) -> Traces:
        """Return what a pass may change, as it is now, with all global generators. Local."""
        return Traces(self.module, next(iter(self.parameters.values())).device, self.drawn_parameters())

    def drawn_parameters(self) -> list[nn.Parameter]:
        """Return the random weights of the module. Local."""
        return [self.parameters[name] for name in self.drawn]

    # --- looks --------------------------------------------------------------------------------------

    def needs_look(self) -> bool:
        """Whether nobody has looked at the module in the mode that it is in, for a step or a predictive."""
        return self.looks and self._occasion() not in self._looked_at

    def _occasion(self) -> tuple[bool, bool]:
        return self.batch_norms.is_evaluating, self.module.training

    def look(
        self, x: Inputs, draw: Callable[[int], None], samples: Sequence[int], autocast_dtype: torch.dtype | None = None
    ) -> Look:
        """See how the module treats inputs like x (`hpc_bnn.posteriors.look.Looker`), and note it. Local."""
        look = Looker(self, draw, autocast_dtype).look(x, samples)
        self._changes_input |= look.changes_input
        self._looked_at.add(self._occasion())
        if self.batch_norms.is_evaluating:
            self._changes_attributes |= look.changes_attributes
            self._keep_attributes()
        return look

    def say(self, logger: logging.Logger, grid: Grid, look: Look | None = None) -> None:
        """Log what a user should know, and what a look has found: each once, on rank 0. Local."""
        found = self.notes + (look.warnings(grid.world_size) if look else [])
        for note in found if self.looks and grid.is_first("world") else ():
            if note not in self._said:
                logger.warning("%s", note)
        self._said.update(found)


def _changed(names: Sequence[str], rule: str) -> ConfigError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    remedy = "Load, edit, freeze and convert the network first, and make the posterior then"
    return ConfigError(Fault("model", shown, rule, remedy))


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its layers back into the mode that it had. Local."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for layer, training in modes:  # parents first
        if layer.training != training and _has_own_modes(type(layer)):
            layer.train(training)
    for layer, training in modes:
        layer.training = training


@functools.cache
def _has_own_modes(kind: type[nn.Module]) -> bool:
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def _casting(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Run in a dtype, or in that of the user's autocast, without its cache of casts.

    The cache knows weights by their identity, which all samples share: it would keep the first sample's.
    """
    if dtype is None and not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype or torch.get_autocast_dtype(device_type), cache_enabled=False)
