"""Which weights of a module are random, and which stay points."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import ConfigError, Fault

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "norm": (
        nn.modules.batchnorm._NormBase,  # batch and instance norm
        nn.LayerNorm,
        nn.GroupNorm,
        *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
    ),
    "embedding": (nn.Embedding, nn.EmbeddingBag),
}
"""Words for types of layers whose weights one may keep deterministic."""

Rule = str | type[nn.Module]


def split_weights(
    module: nn.Module, deterministic: Sequence[Rule]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return the trainable parameters of a module by name: random ones, and deterministic ones.

    Frozen parameters are in neither. Those that a layer names in its attribute ``point_parameters`` are always
    deterministic. A tied parameter appears once, under its first name; it is
    deterministic when any of its places is.

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
    names = {}  # id of a parameter -> all its names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    excluded = {
        id(getattr(layer, name))
        for layer in module.modules()
        for name in getattr(layer, "point_parameters", ())
    }
    for rule in deterministic:
        types = KINDS.get(rule) if isinstance(rule, str) else (rule,)
        if types is not None:
            owners = [layer for layer in module.modules() if isinstance(layer, types)]
            excluded |= {id(p) for layer in owners for p in layer.parameters(recurse=False)}
            continue
        matched = {key for key, places in names.items() if any(fnmatchcase(place, rule) for place in places)}
        if not matched:
            raise ConfigError(
                Fault(
                    "posterior.deterministic",
                    rule,
                    "no parameter has such a name",
                    f"The names are {', '.join(name for name, _ in module.named_parameters())}",
                )
            )
        excluded |= matched
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    random = {name: p for name, p in trainable.items() if id(p) not in excluded}
    return random, {name: p for name, p in trainable.items() if id(p) in excluded}
