"""What a user may do to the module of a posterior between steps: it is followed, or an error that names it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from operator import methodcaller

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ConfigError, Fault


class Guard:
    """Notes what the module of a `Network` is like when it is left to the user, and says what has changed since.

    Attributes
    ----------
    views, layers : dict of str to Tensor, list of nn.Module
        The memory that each parameter was given, by name, and the layers of the module when it was left.
    """

    def __init__(self, module: nn.Module, parameters: dict[str, nn.Parameter], drawn: Sequence[str]):
        self._module, self._parameters, self._drawn = module, parameters, drawn
        self.views: dict[str, Tensor] = {}

    def leave(self) -> None:
        """Note what the module is like when it is left to the user. Local."""
        self.layers = list(self._module.modules())
        self._registries = [d for layer in self.layers for d in (layer._modules, layer._parameters)]
        self._members = self._ids()
        trainable = {id(p) for p in self._parameters.values()}
        self._frozen = {name: p for name, p in self._module.named_parameters() if id(p) not in trainable}
        self.leave_weights()

    def leave_weights(self) -> None:
        """Note where the weights are after a step or a predictive. Local."""
        self._addresses = addresses(self._parameters.values())
        self.allow_writes()

    def allow_writes(self) -> None:
        """Take what has been written into the weights so far for ours, or the module's own. Local."""
        self._versions = self.versions()

    def versions(self) -> list[int]:
        """Return how often each drawn weight was written by others than the draws. Local."""
        return [self._parameters[name]._version for name in self._drawn]

    def _ids(self) -> list[int]:
        """Return which layers and parameters stand where. Local; the layers are held, so that no identity comes twice."""
        return list(map(id, itertools.chain.from_iterable(map(methodcaller("values"), self._registries))))

    def check(self, norms: Collection[nn.Module]) -> bool:
        """Return whether the module is as it was left. Local; some microseconds.

        False: a layer without weights was put in or taken out, or has another name. `leave` it once more then. ``norms``
        are the BatchNorm layers that are known.

        Raises
        ------
        ConfigError
            Since the last step it was converted, moved, loaded or edited, or other weights were put in.
        """
        are_there = addresses(self._parameters.values()) == self._addresses
        if are_there and self.versions() == self._versions and self._ids() == self._members:
            return True
        now = dict(self._module.named_parameters(remove_duplicate=False))
        present = {id(p) for p in now.values()}
        trainable = {id(p) for p in self._parameters.values()}
        faults = []
        for name, parameter in now.items():
            if parameter.requires_grad and id(parameter) not in trainable:
                faults.append((name, "it came into the network after the posterior was made"))
        versions = dict(zip(self._drawn, self._versions))
        for name, parameter in self._parameters.items():
            view = self.views[name]
            if id(parameter) not in present:
                faults.append((name, "it is no longer in the network"))
            elif (parameter.dtype, parameter.device) != (view.dtype, view.device):
                faults.append((name, "it was converted or moved after the posterior was made"))
            elif parameter.data_ptr() != view.data_ptr():
                faults.append((name, "it has other memory than the posterior gave it"))
            elif parameter._version != versions.get(name, parameter._version):
                faults.append((name, "its values were changed; each draw writes them anew"))
        for name, layer in self._module.named_modules():
            if isinstance(layer, _BatchNorm) and layer not in norms:
                faults.append((name, "this BatchNorm layer came into the network after the posterior was made"))
        if faults:
            raise _changed([name for name, _ in faults], faults[0][1])
        return False

    def check_trainable(self) -> None:
        """Raise `ConfigError` where weights were frozen or unfrozen since the posterior was made. Local; microseconds."""
        if not all([p.requires_grad for p in self._parameters.values()]):
            frozen = [name for name, p in self._parameters.items() if not p.requires_grad]
            raise _changed(frozen, "it was frozen after the posterior was made: its noise would train on")
        if any([p.requires_grad for p in self._frozen.values()]):
            thawed = [name for name, p in self._frozen.items() if p.requires_grad]
            raise _changed(thawed, "it was unfrozen after the posterior was made: no optimizer would update it")


def _changed(names: Sequence[str], rule: str) -> ConfigError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    remedy = "Load, edit, freeze and convert the network first, and make the posterior then"
    return ConfigError(Fault("model", shown, rule, remedy))


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Return where tensors begin in memory; nothing for those without, with which `hpc-bnn plan` rehearses. Local."""
    tensors = list(tensors)
    if tensors and isinstance(tensors[0], FakeTensor):
        return []
    return list(map(Tensor.data_ptr, tensors))
