"""The module of a posterior: an ordinary ``nn.Module``, used in place, with the weights that a posterior gives it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import methodcaller
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..errors import ConfigError, Fault, HpcBnnError
from ..grid import Grid
from ..noise import Key
from ..trees import Inputs, as_arguments, device_of, map_tensors, tensors_of
from .batch_norm import BatchNorms, SumOverData, of_one_rank
from .batch_rules import BatchedLinear, attend
from .dropout_layers import FUNCTIONS, DropoutMasks
from .interception import Interception
from .layout import addresses
from .look import Look, Looker
from .select import check_layers, shortened
from .traces import Traces

Output = str | int | Callable[[Any], Tensor] | None
"""Key, attribute or place of the tensor of what a module returns, or a function that picks it; None: it is the tensor."""

_WHOLE = re.compile(r"\b(Byte|unsigned char|Char|Short|Int|Long|Bool)\b|torch\.u?int|mixed dtype")
"""What torch calls whole numbers, where a layer takes none."""
_NO_ROW = re.compile("out of range in self|out of bounds for dimension 0|found idx to be|not in the valid range")
"""What torch says of an id that a table, nn.Embedding or nn.EmbeddingBag does not have."""


class Network:
    """Calls a module, so that one sample's weights, masks and statistics are what it meets, and nothing else.

    The module is used in place and stays as it is; its parameters become views of a posterior's buffers (`use`): in a step
    and a predictive of the draws, between them of the mean, so that the module is then an ordinary network of its own.

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
    output : str, int or callable, optional
        Which tensor of what the module returns, as `Posterior` takes it.
    batches : bool, optional
        Whether several samples of a predictive at once give what one after another gives; None: nobody has tried.
    is_replayable : bool
        Whether a forward pass in training leaves nothing behind, and draws nothing, as far as a look has shown.
    """

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], drawn: Sequence[str], output: Output = None
    ):
        self.module, self.output = module, output
        self.batch_norms = BatchNorms(module)
        self.dropout = DropoutMasks(module)
        drop = {name: functools.partial(self.dropout.handle, drops) for name, drops in FUNCTIONS.items()}
        others = {"scaled_dot_product_attention": self._attend, "batch_norm": self.batch_norms.handle}
        # nn.LSTM would give its weights other memory on a GPU, one piece for cuDNN: no draw would reach it
        others["_use_cudnn_rnn_flatten_weight"] = bool  # False
        self.interception = Interception({**drop, **others})
        self.notes: list[str] = []
        self._said: set[str] = set()
        self.parameters = parameters
        self.drawn = list(drawn)
        self._views: dict[str, Tensor] = {}  # the memory that each parameter was given, in a step
        self._rest: dict[str, Tensor] = {}  # and between steps, of those that then look elsewhere
        self._shows_draw = True
        self.weights = torch.zeros(0)
        self._changes_input = self._changes_attributes = False
        self._attributes: Traces | None = None  # to put back before each member of a predictive
        self.looks, self.is_replayable = True, False
        self.batches: bool | None = None
        self._looked_at: set[tuple[bool, bool]] = set()
        self.leave()

    def _attend(self, *arguments, **options) -> object:
        """Take the place of ``F.scaled_dot_product_attention``. Local."""
        result = attend(*arguments, **options) if self.dropout.row is not None else NotImplemented
        return self.dropout.attend(*arguments, **options) if result is NotImplemented else result

    # --- weights ------------------------------------------------------------------------------------

    def use(self, views: Mapping[str, Tensor], rest: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Make parameters of the module views of other memory: between steps of that of ``rest``. Local.

        The parameter objects stay, so tied weights stay tied and references to them stay valid.
        """
        self._views |= self._as_weights(views)
        self._rest |= self._as_weights(rest)
        for name in views:
            at_rest = not self._shows_draw and name in self._rest
            self.parameters[name].data = (self._rest if at_rest else self._views)[name]

    def _as_weights(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return views of flat memory as the weights are: real or complex. Local."""
        pairs = views.items()
        return {name: torch.view_as_complex(v) if self.parameters[name].is_complex() else v for name, v in pairs}

    def show_(self, draw: bool) -> None:
        """Let the parameters look at the sample drawn last, or, between steps, at what the module rests at. Local."""
        if draw is not self._shows_draw:
            views = self._views if draw else self._rest
            with self.nothing_derived():
                for name in self._rest:
                    self.parameters[name].data = views[name]
            self._shows_draw = draw

    def put_memory_back(self) -> list[str]:
        """Give the weights the memory of the draw again, and return those that a forward pass gave another. Local."""
        moved = [name for name, p in self.parameters.items() if addresses([p]) != addresses([self._views[name]])]
        for name in moved:
            self.parameters[name].data = self._views[name]
        return moved

    def leave(self) -> None:
        """Find what of ours the module calls, and note what it is like when it is left to the user. Local."""
        check_layers(self.module)
        self.dropout.find(self.module)
        self.layers = list(self.module.modules())
        self._registries = [d for layer in self.layers for d in (layer._modules, layer._parameters)]
        self._members = self._ids()  # once nothing is refused any more
        trainable = {id(p) for p in self.parameters.values()}
        self._frozen = {name: p for name, p in self.module.named_parameters() if id(p) not in trainable}
        self._deriving = [layer for layer in self.layers if _has_own_modes(type(layer))]
        self.interception.find(self.layers)
        if off := self.dropout.switched_off:
            self.notes.append(f"the dropout inside {', '.join(off)} cannot be keyed by the sample and is switched off")
            off.clear()
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
        self._guarded = self._guards()

    def versions(self) -> list[int]:
        """Return how often each drawn weight was written by others than the draws. Local."""
        return [self.parameters[name]._version for name in self.drawn]

    def _guards(self) -> dict[str, int]:
        """Return the versions of weights that only draws may write: the others rest at memory of the posterior's. Local."""
        return {name: self.parameters[name]._version for name in self.drawn if name not in self._rest}

    def _ids(self) -> list[int]:
        """Return which layers and parameters stand where. Local; the layers are held, so that no identity comes twice."""
        return list(map(id, itertools.chain.from_iterable(map(methodcaller("values"), self._registries))))

    def check(self) -> None:
        """Follow what a user did to the module since it was left, or say why not. Local; some microseconds.

        It is left once more where a layer without weights was put in or taken out, or has another name. `ConfigError`
        if it was converted, moved, loaded or edited, or other weights were put in.
        """
        are_there = addresses(self.parameters.values()) == self._addresses
        if are_there and self._guards() == self._guarded and self._ids() == self._members:
            return
        now = dict(self.module.named_parameters(remove_duplicate=False))
        present = {id(p) for p in now.values()}
        trainable = {id(p) for p in self.parameters.values()}
        faults = []
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in trainable:
                faults.append((name, "it came into the network after the posterior was made"))
        for name, parameter in self.parameters.items():
            view = (self._views | self._rest)[name]
            if id(parameter) not in present:
                faults.append((name, "it is no longer in the network"))
            elif (parameter.dtype, parameter.device) != (view.dtype, view.device):
                faults.append((name, "it was converted or moved after the posterior was made"))
            elif parameter.data_ptr() != view.data_ptr():
                faults.append((name, "it has other memory than the posterior gave it"))
            elif parameter._version != self._guarded.get(name, parameter._version):
                faults.append((name, "its values were changed; each draw writes them anew"))
        for name, layer in self.module.named_modules():
            if isinstance(layer, _BatchNorm) and layer not in self.batch_norms.layers:
                faults.append((name, "this BatchNorm layer came into the network after the posterior was made"))
        if faults:
            raise _changed([name for name, _ in faults], faults[0][1])
        self.look_again()

    def look_again(self) -> None:
        """Leave the module once more, which wants another look. Local."""
        self._looked_at.clear()
        self.batches = None
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
        """Write weights: layers that derive something from them in evaluation mode (timm's LeViT) do it anew. Local."""
        torch.clear_autocast_cache()  # the casts of the former weights
        parametrize._cache.clear()  # what a user's parametrize.cached() keeps of them
        with self.nothing_derived():
            yield

    def begin_sample(self, key: Key) -> None:
        """Begin a sample: its dropout masks; and what passes of other samples have left in the module is forgotten. Local."""
        self.show_(draw=True)
        self._put_attributes_back()
        self.dropout.begin_samples(key)
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
        """Intercept what the module calls, in its forward and backward passes; leave it at rest. Local."""
        former, self.batch_norms.sum_over_data = self.batch_norms.sum_over_data, sum_over_data
        try:
            with self.interception.active():
                yield
        finally:
            self.batch_norms.sum_over_data = former
            self.show_(draw=False)

    def __call__(self, x: Inputs, autocast_dtype: torch.dtype | None = None) -> Tensor:
        """Return the outputs of the sample drawn last. In training with BatchNorm collective as `running` says."""
        with self.interception.active(), _casting(device_of(x).type, autocast_dtype):
            arguments, named = as_arguments(map_tensors(Tensor.clone, x) if self._changes_input else x)
            try:
                outputs = self.module(*arguments, **named)
            except (RuntimeError, IndexError, ValueError) as error:
                if isinstance(error, HpcBnnError) or (fault := self._misfit(x, error)) is None:
                    raise
                raise ConfigError(fault) from error
            return picked(outputs, self.output, type(self.module).__name__)

    def _misfit(self, x: Inputs, error: Exception) -> Fault | None:
        """Return what the module cannot do with the dtypes or the whole numbers of its inputs; None for another error. Local."""
        inputs, whose, said = tensors_of(x), type(self.module).__name__, str(error)
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in inputs}))
        ids = [tensor for tensor in inputs if not tensor.is_floating_point() and tensor.numel()]
        weight = next(iter(self.parameters.values()))
        dtype, elsewhere = weight.dtype.to_real(), {str(t.device) for t in inputs if t.device != weight.device}
        others = {str(t.dtype) for t in inputs if (t.is_floating_point() or t.is_complex()) and t.dtype != dtype}
        if "'indices'" in said:  # of F.embedding
            rule = f"an nn.Embedding of {whose} takes whole numbers"
            remedy = "Write the shards with --ids (data_prep/arrays.py) or write_shards(ids=...): ids then stay whole numbers"
        elif ids and _NO_ROW.search(said):
            least, greatest = min(int(t.min()) for t in ids), max(int(t.max()) for t in ids)
            kinds = f"{least} to {greatest}"
            sizes = {m.num_embeddings for m in self.module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
            rows = f", num_embeddings {', '.join(map(str, sorted(sizes)))}" if sizes else ""
            rule = f"{whose} has no row for one of these ids ({said}{rows})"
            remedy = "Give ids from 0 to num_embeddings - 1, or train with more rows"
        elif elsewhere and "device" in said:
            kinds, rule = ", ".join(sorted(elsewhere)), f"the weights of {whose} are on {weight.device}"
            remedy = f"Give x.to({str(weight.device)!r})"
        elif others and any(t.is_complex() for t in inputs):
            rule, remedy = f"{whose} takes real numbers ({said})", "Give torch.view_as_real(x), and flatten it"
        elif others and "type" in said:
            rule, kinds = f"the weights of {whose} are of {dtype}", ", ".join(sorted(others))
            remedy = f"Give x.to({dtype}), or convert the network before the posterior is made"
        elif ids and _WHOLE.search(said):
            rule, remedy = (
                f"{whose} takes floating-point numbers ({said})",
                "Give them as such: x.float(), or x.float() / 255",
            )
        else:
            return None
        return Fault("inputs of the network", kinds, rule, remedy)

    def batched(self, weights: dict[str, Tensor], x: Inputs, is_shared: bool, autocast_dtype=None) -> Tensor:
        """Return the outputs [c, B, ...] of the samples of `Posterior.draw_batch_` at once, by ``torch.vmap``. Local.

        The random weights are [c, *shape] by name; the inputs are [B, ...] where all samples share them, otherwise
        [c, B, ...].
        """
        rows = torch.arange(self.dropout.num_samples, device=device_of(x))[:, None]

        def forward(weights: dict[str, Tensor], inputs: Inputs, row: Tensor) -> Tensor:
            self.dropout.row = row
            named = {self._names[name]: weight for name, weight in self._as_weights(weights).items()}
            outputs = torch.func.functional_call(self.module, named, *as_arguments(inputs))
            return picked(outputs, self.output, type(self.module).__name__)

        self.batch_norms.is_batched = True
        try:
            with self.interception.active(), _casting(device_of(x).type, autocast_dtype), BatchedLinear():
                x = map_tensors(Tensor.clone, x) if self._changes_input else x
                return torch.vmap(forward, (0, None if is_shared else 0, 0))(weights, x, rows)
        finally:
            self.batch_norms.is_batched, self.dropout.row = False, None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the module into evaluation mode, without gradients, and then each layer back into its own. Local."""
        # What a user's inference_mode made could not be trained later: work of the step, buffers of the module
        with torch.inference_mode(False), torch.no_grad():
            self._keep_attributes()  # before anything is derived, and put back after: to the bit
            try:
                with eval_mode(self.module), self.interception.active():
                    self.batch_norms.is_evaluating = True
                    yield
            finally:
                self.batch_norms.is_evaluating = False
                self.show_(draw=False)
                self._put_attributes_back()
                self._attributes = None
                self.leave_weights()

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

    def __getstate__(self) -> dict[str, Any]:
        none = torch.zeros(0)  # a copy of the posterior makes its memory anew
        return self.__dict__ | {"_views": {}, "_rest": {}, "weights": none, "_attributes": None}

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
        if not self.batch_norms.is_evaluating:
            self.is_replayable = look.is_replayable
        else:
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


def picked(outputs: Any, pick: Output, network: str) -> Tensor:
    """Return the tensor that is meant, of what a module returns; ``network`` names it in errors. Local."""
    kind = type(outputs).__name__
    if isinstance(pick, int) and isinstance(outputs, Tensor):
        rule = f"{network} returns a tensor (in this mode), in which the place would be an example"
        remedy = "Where it returns a tuple in one mode only, give a function that tells them apart"
        raise ConfigError(Fault("model.output", pick, rule, f"Leave <model.output> out. {remedy}"))
    places = "<model.output> logits (a key or attribute), 0 (a place), or a function"
    remedy = f"Say which tensor the likelihood gets: {places}"
    try:
        if callable(pick):
            outputs = pick(outputs)
        elif isinstance(pick, int) or (pick is not None and isinstance(outputs, Mapping)):
            outputs = outputs[pick]
        elif pick is not None:
            outputs = getattr(outputs, pick)
    except (LookupError, AttributeError, TypeError) as error:
        rule = f"the {kind} that {network} returns does not have it ({error})"
        raise ConfigError(Fault("model.output", pick, rule, remedy)) from error
    if not isinstance(outputs, Tensor):
        rule = f"{network} returns a {kind}, from which it picks no tensor"
        raise ConfigError(Fault("model.output", pick, rule, remedy))
    if not outputs.is_floating_point():
        rule = f"{network} returns numbers of {outputs.dtype}, and a likelihood takes real numbers"
        raise ConfigError(Fault("model.output", pick, rule, "Give a function, such as torch.view_as_real or torch.abs"))
    return outputs


def _changed(names: Sequence[str], rule: str) -> ConfigError:
    remedy = "Load, edit, freeze and convert the network first, and make the posterior then"
    return ConfigError(Fault("model", shortened(names), rule, remedy))


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


def exactly(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Compute in the dtype of tensors on this device, whatever autocast the user has: it is for the network. Local."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _casting(device_type: str, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Run in a dtype, or that of the user's autocast, without its cache: it would keep the first sample's casts."""
    if dtype is None and not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype or torch.get_autocast_dtype(device_type), cache_enabled=False)
