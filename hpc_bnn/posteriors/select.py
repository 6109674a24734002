"""Which weights of a module are random, and which stay points."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..capabilities import Capabilities
from ..errors import ConfigError, Fault

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    # _NormBase: batch and instance norm
    "norm": (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
}
"""Words for types of layers whose weights one may keep deterministic."""

Rule = str | type[nn.Module]


def split_weights(
    module: nn.Module, deterministic: Sequence[Rule]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the trainable parameters of a module by name: random ones, and deterministic ones. Local.

    Those that a layer names in its attribute ``point_parameters`` are always deterministic. A tied parameter appears once,
    under its first name; it is deterministic when any of its places is.

    Parameters
    ----------
    module : nn.Module
        The network.
    deterministic : sequence of str or module class
        "norm" and "embedding" stand for layers of that kind (see `KINDS`); any other string is a pattern
        for parameter names (``"head.*"``, ``"*.bias"``); a class stands for its instances.

    Raises
    ------
    ConfigError
        A pattern matches no parameter: most likely a typing error.
    """
    names: dict[int, list[str]] = {}  # id of a parameter -> all its names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    excluded = {
        id(getattr(layer, name)) for layer in module.modules() for name in getattr(layer, "point_parameters", ())
    }
    for rule in deterministic:
        if not isinstance(rule, str) or rule in KINDS:
            types = KINDS[rule] if isinstance(rule, str) else rule
            owners = [layer for layer in module.modules() if isinstance(layer, types)]
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
    module: nn.Module, deterministic: Sequence[Rule], capabilities: Capabilities
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return random weights and points, as `split_weights` does, for a family with these capabilities. Local."""
    random, point = split_weights(module, deterministic if capabilities.owner == "all" else ())
    name = type(module).__name__
    if not capabilities.has_random_weights:
        random, point = {}, {**random, **point}
    elif not random:
        asked = ", ".join(map(str, deterministic)) or "()"
        rule = f"{name} has no trainable weight left to be random"
        remedy = "Exclude less, or unfreeze some weights"
        raise ConfigError(Fault("posterior.deterministic", asked, rule, remedy))
    kinds = {(p.dtype, p.device) for p in (*random.values(), *point.values())}
    if len(kinds) != 1:
        rule = f"its trainable weights are of {len(kinds)} kinds {sorted(map(str, kinds))}; exactly 1 is needed"
        raise ConfigError(Fault("model", name, rule, "Convert the module with module.to(device, dtype)"))
    return random, point
