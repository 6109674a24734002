"""Dropout whose masks belong to the weight sample, not to a global generator.

Calls of ``F.dropout``, ``F.dropout1d``, ``F.dropout2d``, ``F.dropout3d`` and ``F.scaled_dot_product_attention`` are
intercepted (`hpc_bnn.posteriors.interception`), whether a layer of torch, a subclass of one, or any other code of the module makes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from ..noise import Key, Stream
from .interception import BatchDims, Shapes, calling_layer

_KEYED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNKEYED = (nn.AlphaDropout, nn.FeatureAlphaDropout)

FUNCTIONS = {"dropout": False, "dropout1d": True, "dropout2d": True, "dropout3d": True}
"""Names in ``torch.nn.functional``, and whether they drop whole channels."""

_FIRST_CALL, _LINES = 1 << 20, 1 << 12
"""Numbers of masks that no dropout layer asks for: `_LINES` for each layer in whose method the call stands, one for each place
(line) there. Calls in a loop share their mask, as the uses of one dropout layer do."""


class DropoutMasks:
    """The dropout of a module, drawing one mask per layer and weight sample.

    A mask is shared by all examples of the batch, so that it is a property of the sample as a draw of
    the weights is (Gal and Ghahramani, Dropout as a Bayesian Approximation, 2016), and does not depend on
    how the batch is cut. Which dims of an input belong to the batch a look has to see (`batch_dims`); as long as that is not
    known, it is dim 0.

    Attributes
    ----------
    layers, switched_off : list of nn.Module, list of str
        The dropout layers; recurrent and attention layers, whose dropout cannot be keyed and is switched off.
    always : bool
        Whether layers drop in evaluation too (MC dropout).
    num_samples, row : int, Tensor or None
        How many samples are evaluated at once; and, within such a call, [1] int64 under ``torch.vmap``, the place of a sample.
    shapes, batch_dims : dict or None, dict
        During a look: shapes of the inputs that were dropped, by the number of the mask; and dims that belong to the batch,
        by the number of the mask and that of the dims.
    in_training : set of int
        Numbers of the masks that looks in training mode have seen.
    """

    def __init__(self, module: nn.Module):
        self.layers = [layer for layer in module.modules() if isinstance(layer, _KEYED)]
        self.switched_off: list[str] = []
        self.always = False
        self.row: Tensor | None = None
        self._numbers: dict[nn.Module, int] = {layer: number for number, layer in enumerate(self.layers)}
        self._modules: dict[nn.Module, int] = {}
        self._key: Key | None = None
        self.num_samples = 1
        self._masks: dict[tuple[int, torch.Size, float], Tensor] = {}
        self.shapes: Shapes | None = None
        self.batch_dims: BatchDims = {}
        self.in_training: set[int] = set()

    def find(self, module: nn.Module) -> None:
        """Give layers numbers, switch off dropout without keys; `ConfigError` if that were another network. Local."""
        for name, layer in module.named_modules():
            if not hasattr(layer, "_orig_mod"):  # what torch.compile puts around a module
                self._modules.setdefault(layer, len(self._modules))
            if isinstance(layer, _UNKEYED) and layer.p > 0:
                what = f"{name} ({type(layer).__name__})"
                raise ConfigError(Fault("model", what, "its masks cannot be keyed", "Use Dropout"))
            if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and layer.dropout > 0:
                self.switched_off.append(f"{name} ({type(layer).__name__})".strip())
                layer.dropout = 0.0

    def begin_samples(self, key: Key | None, num_samples: int = 1) -> None:
        """Forget the masks; draw new ones when they are needed. None: nothing is dropped. Local.

        ``key`` is that of the first of samples that follow each other; several are evaluated at once.
        """
        self._masks.clear()
        self._key, self.num_samples = key, num_samples

    def handle(
        self, drops_channels: bool, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Take the place of one of `FUNCTIONS`. Local."""
        called = calling_layer(self._modules) if 0 < p <= 1 and (training or self.always) else None
        if called is None:
            return NotImplemented
        if (key := self._key) is None:
            return input
        layer, place = called
        number = self._numbers.get(layer)
        if number is None:
            number = _FIRST_CALL + _LINES * self._modules[layer] + place % _LINES
        if self.shapes is not None:
            self.shapes.setdefault(number, []).append(input.shape)
        mask = self._mask(key, number, p, input, drops_channels)
        return input.mul_(mask) if inplace else input * mask

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Take the place of ``F.scaled_dot_product_attention`` where it drops: its kernels draw masks of their own. Local."""
        if dropout_p == 0 or calling_layer(self._modules) is None:
            return NotImplemented
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for t in (key, value))
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is None:
            return self.handle(False, scores.softmax(-1), dropout_p) @ value
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_bool else scores + attn_mask
        is_empty = (scores == float("-inf")).all(-1, keepdim=True)  # torch gives 0 where a query may see no key
        shares = scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
        return self.handle(False, shares, dropout_p) @ value

    def _mask(self, key: Key, number: int, p: float, x: Tensor, drops_channels: bool) -> Tensor:
        batch_dims = self.batch_dims.get((number, x.ndim), [0])
        shape = torch.Size(
            1 if dim in batch_dims or (drops_channels and dim > 1) else size for dim, size in enumerate(x.shape)
        )
        if (number, shape, p) not in self._masks:
            # Unsigned words of 32 bits against p: a float would round them
            of_layer = key.child(Stream.MASK, number, shape.numel())
            bits = of_layer.bits_of_samples(self.num_samples, shape.numel(), x.device).view(self.num_samples, *shape)
            keep = (bits.long() & 0xFFFFFFFF) >= math.ceil(p * 2**32)
            self._masks[number, shape, p] = keep.to(x.dtype) / (1 - p) if p < 1 else keep.to(x.dtype)
        masks = self._masks[number, shape, p]
        return (masks[0] if self.row is None else masks.index_select(0, self.row)[0]).to(x.dtype)

    def drawn(self) -> dict[nn.Module, Tensor]:
        """Return the mask of each layer in the sample drawn last; `ConfigError` where a layer has several. Local."""
        found = [number for number, _, _ in self._masks]
        if unfit := [n for n in found if n >= len(self.layers) or found.count(n) > 1]:
            rule = "its forward calls F.dropout"
            if unfit[0] < len(self.layers):
                rule = "one of its dropout layers has masks of several shapes"
            raise ConfigError(Fault("model", type(self).__name__, rule, "Use one nn.Dropout for each place that drops"))
        return {self.layers[number]: masks[0] for (number, _, _), masks in self._masks.items()}

    def layer_of(self, number: int) -> nn.Module:
        """Return the layer in whose method a mask was asked for. Local."""
        if number < _FIRST_CALL:
            return self.layers[number]
        return list(self._modules)[(number - _FIRST_CALL) // _LINES]

    def asked(self, layer: nn.Module, shapes: Shapes) -> bool:
        """Whether a dropout layer has asked for a mask in a look. Local."""
        return self._numbers.get(layer) in shapes

    def __getstate__(self):
        return self.__dict__ | {"_key": None, "_masks": {}}
