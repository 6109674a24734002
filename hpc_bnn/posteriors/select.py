"""Which weights of a module are random, and which stay points."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedTensorMixin  # pyright: ignore[reportAttributeAccessIssue]

from ..capabilities import Capabilities
from ..errors import ConfigError, Fault, check_kind
from .layout import addresses

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    # _NormBase: batch and instance norm
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
}
"""Words for types of layers whose weights one may keep deterministic."""

Rule = str | type[nn.Module]

_SUMS_BY_ITSELF = {"DistributedDataParallel", "DDP", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}
"""Names of classes of torch, and of other libraries that call theirs the same."""
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def check_layers(module: nn.Module) -> None:
    """Raise `ConfigError` where a layer spreads examples or sums gradients over devices or ranks by itself. Local."""
    check_kind("model", module, nn.Module, "Give the network itself, an nn.Module")
    for name, layer in module.named_modules():
        found = [kind.__name__ for kind in type(layer).__mro__ if kind.__name__ in _SUMS_BY_ITSELF]
        if found:
            rule = "it spreads examples or sums gradients by itself, and hpc_bnn sums over the process grid"
            raise ConfigError(Fault("model", f"{name} ({found[0]})".strip(), rule, "Use the module inside: net.module"))


def _check_weights(module: nn.Module) -> None:
    """Raise `ConfigError` where a trainable weight cannot be laid out in flat memory, or not without losing updates."""
    faults: dict[tuple[str, str], list[str]] = {}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in tensors:
        if (fault := _fault_of(tensor)) is not None:
            faults.setdefault(fault, []).append(name)
    for name, other in {} if faults else _sharing(module):
        remedy = "Use one nn.Parameter for both, or compute what depends on it in the forward pass"
        faults.setdefault((f"it shares the memory of {other}, and would come apart", remedy), []).append(name)
    if faults:
        raise ConfigError(*(Fault("model", shortened(names), *fault) for fault, names in faults.items()))
    kinds = {f"{t.dtype.to_real()} on {t.device}": name for name, t in tensors if t.requires_grad}
    if len(kinds) > 1:
        rule = f"its trainable weights are of {len(kinds)} kinds, such as {kinds}; exactly 1 is needed"
        remedy = "Convert the real weights: net.float(), net.to(device)"
        raise ConfigError(Fault("model", type(module).__name__, rule, remedy))
    if any(t.is_meta and type(t.data) is Tensor for _, t in tensors if t.requires_grad):
        rule, remedy = "its weights are on the device meta, without numbers", "Use net.to_empty(device=...), load some"
        raise ConfigError(Fault("model", type(module).__name__, rule, remedy))


def _fault_of(tensor: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with a weight or buffer, and the remedy."""
    if isinstance(tensor, UninitializedTensorMixin):
        return "it has no shape before its first batch", "Run the network once on a batch: net(x)"
    if tensor.is_inference():
        return "it was made within torch.inference_mode(), and can never be trained", "Use a copy: copy.deepcopy(net)"
    if not tensor.requires_grad:
        return None
    kind = type(tensor.data)
    if kind not in (Tensor, FakeTensor) or tensor.layout != torch.strided:
        what = kind.__name__ if kind is not Tensor else tensor.layout
        return f"it is a {what}, and flat memory holds ordinary tensors", "Use an nn.Parameter of a dense Tensor"
    if tensor.dtype.to_real() not in (torch.float32, torch.float64):
        remedy = "Use net.float(); <dtype> bfloat16 (in a step autocast_dtype=torch.bfloat16) computes in 16 bits"
        return f"it is of {tensor.dtype}, in which the small updates of a weight are lost", remedy
    if tensor.numel() > 1 and 0 in tensor.stride():
        return "numbers of it share memory (expand), and would come apart", "Use a Parameter of the small tensor"
    return None


def _sharing(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield names of tensors of a module that lie in the memory of a trainable weight, and of that weight."""
    found: dict[int, tuple[str, Tensor]] = {id(p): (name, p) for name, p in module.named_parameters()}
    for prefix, layer in module.named_modules():
        for key, value in (*layer._buffers.items(), *layer.__dict__.items()):
            held = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            for tensor in held if key not in _OF_EVERY_MODULE else ():
                if isinstance(tensor, Tensor):
                    found.setdefault(id(tensor), (f"{prefix}.{key}".strip("."), tensor))
    spans = []
    for name, tensor in found.values():
        if tensor.layout == torch.strided and tensor.numel() and (begin := [*addresses([tensor]), 0][0]):
            steps = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
            # Of tensors that begin at one place the trained one first
            is_weight = tensor.requires_grad and tensor.is_leaf
            spans.append((begin, not is_weight, begin + (steps + 1) * tensor.element_size(), name))
    last, last_end, last_is_weight = "", 0, False
    for begin, is_other, end, name in sorted(spans):
        if begin < last_end and (last_is_weight or not is_other):
            yield (name, last) if last_is_weight else (last, name)
        if end > last_end:
            last, last_end, last_is_weight = name, end, not is_other


def shortened(names: Sequence[str]) -> str:
    """Return a list of names for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


def _is_of(layer: nn.Module, rule: Rule) -> bool:
    """Whether a rule of classes stands for a layer; "norm" also for those of other libraries with vectors for weights."""
    types = KINDS[rule] if isinstance(rule, str) else (rule,)
    scripted = getattr(layer, "original_name", "")  # what torch.jit has scripted has a class of its own
    if isinstance(layer, types) or scripted in [kind.__name__ for kind in types]:
        return True
    own = [p.numel() == max(p.shape, default=1) for p in layer.parameters(recurse=False)]
    return rule == "norm" and "norm" in (scripted or type(layer).__name__).lower() and all(own)


def split_weights(
    module: nn.Module, deterministic: Sequence[Rule]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the trainable parameters of a module by name: random ones, and deterministic ones. Local.

    "norm" means layers of other libraries, too, which are called a norm and whose own weights are vectors. Those that a layer
    names in its attribute ``point_parameters`` are always deterministic. A tied parameter appears once, under its first name;
    it is deterministic when any of its places is.

    Parameters
    ----------
    deterministic : sequence of str or module class
        "norm" and "embedding" stand for layers of that kind (see `KINDS`); any other string is a pattern
        for parameter names (``"head.*"``, ``"*.bias"``); a class stands for its instances. `ConfigError` if a pattern
        matches no parameter, or a weight has no shape yet, has fewer than 32 bits, is not dense, or shares its memory.
    """
    check_layers(module)
    _check_weights(module)
    names: dict[int, list[str]] = {}  # id of a parameter -> all its names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    excluded = {
        id(getattr(layer, name)) for layer in module.modules() for name in getattr(layer, "point_parameters", ())
    }
    for rule in deterministic:
        if not isinstance(rule, str) or rule in KINDS:
            owners = [layer for layer in module.modules() if _is_of(layer, rule)]
            excluded |= {id(p) for layer in owners for p in layer.parameters(recurse=False)}
            continue
        matched = {key for key, places in names.items() if any(fnmatchcase(place, rule) for place in places)}
        if not matched:
            remedy = f"The names are {', '.join(name for name, _ in module.named_parameters())}"
            raise ConfigError(Fault("posterior.deterministic", rule, "no parameter has such a name", remedy))
        excluded |= matched
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    point = {name: p for name, p in trainable.items() if id(p) in excluded}
    return {name: p for name, p in trainable.items() if name not in point}, point


def divide_weights(
    module: nn.Module, deterministic: Rule | Sequence[Rule], capabilities: Capabilities
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return random weights and points, as `split_weights` does, for a family with these capabilities. Local."""
    deterministic = [deterministic] if isinstance(deterministic, (str, type, nn.Module, type(None))) else deterministic
    for rule in deterministic:
        remedy = 'Give names (patterns as "head.*"), "norm", "embedding" or classes of layers; () for none'
        check_kind("posterior.deterministic", rule, (str, type), remedy)
    random, point = split_weights(module, deterministic if capabilities.owner == "all" else ())
    if not capabilities.has_random_weights:
        random, point = {}, {**random, **point}
    if not random and (capabilities.has_random_weights or not point):
        asked = ", ".join(map(str, deterministic)) or "()"
        to_be = " to be random" if capabilities.has_random_weights else ""
        rule = f"{type(module).__name__} has no trainable weight left{to_be}"
        remedy = "Exclude less, or unfreeze some weights"
        raise ConfigError(Fault("posterior.deterministic", asked, rule, remedy))
    return random, point
