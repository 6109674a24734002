"""Augmentation: keyed by (seed, epoch, example, view), on batched tensors, on their device.

A *view* is one augmented version of a batch. The K samples of a step may all see the same view (``shared``), each its
own (``per_sample``), or each group of samples its own (``per_group``, the scheme of the paper, if a group is the
samples of one GPU). The views do not depend on rank or grid.

Inputs are normalised when they come here: 0 is the mean of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import AugmentationConfig, ViewKind, check_field, check_groups
from ..errors import ConfigError, Fault, Rule, at_least, count, import_object, number, positive
from ..grid import share
from ..noise import Key, Stream
from ..views import Views
from .loader import Batch
from .manifest import Manifest


class ExampleRandom:
    """Random numbers of ``examples``, the global indices [B] of a batch, for one transform of one view.

    Each call returns new numbers; those of an example do not depend on the other examples of the batch. The key holds
    the number of the view, and the position of the transform in the list.
    """

    def __init__(self, seed: int, epoch: int, examples: Tensor, view: int, transform: int):
        self._key = Key(seed, Stream.AUGMENTATION, path=((transform << 32) + view,), step=epoch)
        self._examples = examples
        self._num_drawn = 0

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers [B, *shape] in [0, 1)."""
        num, first = self._next(shape)
        return self._key.child(0).uniform(self._examples, num, first).view(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers [B, *shape]."""
        num, first = self._next(shape)
        key = self._key.child(1)  # a normal number is made of the words of several uniform ones
        return key.normal(num, self._examples.device, self._examples, first).view(-1, *shape)

    def _next(self, shape: tuple[int, ...]) -> tuple[int, int]:
        num, first = math.prod(shape), self._num_drawn
        self._num_drawn += num
        return num, first


Transform = Callable[[Tensor, ExampleRandom], Tensor]
"""From inputs [B, channels, ...] and their random numbers to inputs of the same shape."""


# --- transforms ----------------------------------------------------------------------------------------


class Crop:
    """Shift an image [C, H, W] by up to ``padding`` pixels in both directions; pixels from outside are 0."""

    num_dims, moves = 3, True

    def __init__(self, padding: int = 4):
        _check("padding", padding, count("Try 4"))
        self.padding = padding

    def __call__(self, x: Tensor, random: ExampleRandom) -> Tensor:
        height, width = x.shape[-2:]
        shift = (random.uniform(2) * (2 * self.padding + 1)).long()  # [B, 2] in 0..2 padding
        rows, columns = (shift[:, i, None] + torch.arange(n, device=x.device) for i, n in enumerate((height, width)))
        padded = F.pad(x, [self.padding] * 4).permute(0, 2, 3, 1)  # [B, H + 2p, W + 2p, C]
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Flip:
    """Mirror an image [C, H, W] left to right with some probability."""

    num_dims, moves = 3, True

    def __init__(self, probability: float = 0.5):
        self.probability = _probability(probability)

    def __call__(self, x: Tensor, random: ExampleRandom) -> Tensor:
        return torch.where(_along(x, random.uniform(1) < self.probability), x.flip(-1), x)


class Erase:
    """Set a rectangle of an image [C, H, W] to 0 with some probability (Zhong et al., 2017).

    The bounds of its area are fractions of the image; ``max_aspect`` is the largest ratio of its height to its width,
    and of its width to its height.
    """

    num_dims = 3

    def __init__(
        self, probability: float = 0.5, min_area: float = 0.02, max_area: float = 0.33, max_aspect: float = 3.0
    ):
        self.probability = _probability(probability)
        _check("min_area", min_area, number(lambda area: 0 < area <= 1, "above 0, at most 1", "Try 0.02"))
        largest = number(lambda area: min_area <= area <= 1, "min_area or more, at most 1", "Try 0.33")
        _check("max_area", max_area, largest)
        _check("max_aspect", max_aspect, at_least(1, "Try 3"))
        self.min_area, self.max_area, self.max_aspect = min_area, max_area, max_aspect

    def __call__(self, x: Tensor, random: ExampleRandom) -> Tensor:
        u = random.uniform(5)
        area = self.min_area + u[:, 0] * (self.max_area - self.min_area)
        root = torch.exp((u[:, 1] - 0.5) * math.log(self.max_aspect))  # of the aspect
        height, width = x.shape[-2:]
        rows = _stretch(height, (area.sqrt() * root * height).round(), u[:, 2])
        columns = _stretch(width, (area.sqrt() / root * width).round(), u[:, 3])
        chosen = _along(x, u[:, 4] < self.probability)
        return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :] & chosen, 0)


class Mask:
    """Set a stretch of a series [C, length], uniform up to ``max_share`` of it, to 0 with some probability."""

    num_dims = 2

    def __init__(self, probability: float = 0.5, max_share: float = 0.2):
        self.probability, self.max_share = _probability(probability), _probability(max_share)

    def __call__(self, x: Tensor, random: ExampleRandom) -> Tensor:
        u = random.uniform(3)
        inside = _stretch(x.shape[-1], (u[:, 0] * self.max_share * x.shape[-1]).ceil(), u[:, 1])
        inside &= (u[:, 2] < self.probability)[:, None]
        return x.masked_fill(inside.view(len(x), *(1,) * (x.ndim - 2), -1), 0)


def _along(x: Tensor, values: Tensor) -> Tensor:
    """Return one value per example, [B] or [B, 1], in a shape that broadcasts over x [B, ...]."""
    return values.view(-1, *(1,) * (x.ndim - 1))


def _stretch(extent: int, length: Tensor, u: Tensor) -> Tensor:
    """Return which of ``extent`` positions lie in a stretch of length [B], placed by u [B] in [0, 1): [B, extent]."""
    length = length.clamp(1, extent)
    start = (u * (extent - length + 1)).floor()
    positions = torch.arange(extent, device=length.device)
    return (positions >= start[:, None]) & (positions < (start + length)[:, None])


class Noise:
    """Add normal noise, with ``std`` in standard deviations of a channel over the training split."""

    def __init__(self, std: float = 0.05):
        _check("std", std, positive("Try 0.05"))
        self.std = std

    def __call__(self, x: Tensor, random: ExampleRandom) -> Tensor:
        return torch.add(x, random.normal(*x.shape[1:]).to(x.dtype), alpha=self.std)


class Mixup:
    """Mix each example with the one at the mirrored position of the global batch (Zhang et al., 2018).

    ``x = w x1 + (1 - w) x2`` with w from Beta(alpha, alpha), keyed by the example; targets are mixed in the same way,
    classes as probabilities. All samples get the same mixture with every kind of views: objectives that couple the
    samples need the same targets.
    """

    def __init__(self, alpha: float = 0.2):
        _check("alpha", alpha, positive("Try 0.2"))
        self.alpha = alpha
        # Quantiles of Beta(alpha, alpha) below 1/2: with t = s^(1/alpha) the density is bounded.
        s = np.linspace(0, 0.5**alpha, 4097)
        density = (1 - s ** (1 / alpha)) ** (alpha - 1)
        cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
        self._table = torch.from_numpy(np.interp(np.linspace(0, 1, 4097), cumulated / cumulated[-1], s) ** (1 / alpha))

    def weights(self, random: ExampleRandom) -> Tensor:
        """Return w [B], float64."""
        u, side = random.uniform(2).double().unbind(1)
        table = self._table = self._table.to(u.device)
        position = u * (len(table) - 1)
        below = position.long().clamp(max=len(table) - 2)
        w = torch.lerp(table[below], table[below + 1], position - below)
        return torch.where(side < 0.5, w, 1 - w)

    def mix(self, batch: Batch, random: ExampleRandom, num_classes: int | None) -> tuple[Tensor, Tensor]:
        """Return the mixed inputs [B, ...] and targets [B, ...] or class probabilities [B, C, ...]."""
        if batch.partners is None or (num_classes is None and not batch.y.is_floating_point()):
            rule = "it needs the mirrored examples of a batch, and for classes their number"
            remedy = "Give BatchLoader with_partners=True, and Augmentation num_classes"
            raise ConfigError(Fault("mixup", f"targets {batch.y.dtype}", rule, remedy))
        x, (other_x, other_y) = batch.x, batch.partners
        targets = (batch.y, other_y)
        if num_classes is not None:
            targets = (F.one_hot(y.long(), num_classes).movedim(-1, 1) for y in targets)
        y, other_y = (y.to(x.dtype) for y in targets)
        w = self.weights(random).to(x.dtype)
        return torch.lerp(other_x, x, _along(x, w)), torch.lerp(other_y, y, _along(y, w))


TRANSFORMS: dict[str, type] = {kind.__name__.lower(): kind for kind in (Crop, Flip, Erase, Mask, Noise, Mixup)}


# --- augmentation ----------------------------------------------------------------------------------------


class Augmentation:
    """The augmentation of the batches of a run. Local.

    Parameters
    ----------
    transforms : sequence
        Transforms in order: functions ``transform(x, random)``; a `Mixup` acts on the batch before all others.
    kind : {"per_sample", "per_group", "shared"}
        Which samples get the same view.
    num_samples, num_groups : int
        Samples per step in the whole job, K, and groups of them with one view each, with ``per_group``.
    seed, num_classes : int
        Key of the random numbers; number of classes where targets are classes.
    """

    def __init__(
        self,
        transforms: Sequence[Transform | Mixup],
        kind: ViewKind = "per_sample",
        *,
        num_samples: int,
        num_groups: int = 1,
        seed: int = 0,
        num_classes: int | None = None,
    ):
        self._mixups = [(i, t) for i, t in enumerate(transforms) if isinstance(t, Mixup)]
        self._transforms = [(i, t) for i, t in enumerate(transforms) if not isinstance(t, Mixup)]
        check_field("augmentation.views", kind, "kind")
        check_groups(kind, num_groups, num_samples)
        if len(self._mixups) > 1:
            raise ConfigError(Fault("augmentation.transforms", "mixup, mixup", "one mixup is possible", "Drop one"))
        self.seed, self.num_classes = seed, num_classes
        groups = {"shared": 1, "per_sample": num_samples, "per_group": num_groups}[kind]
        self._numbers = [g for g in range(groups) for _ in share(num_samples, groups, g)]

    @property
    def needs_partners(self) -> bool:
        """Whether a batch needs the examples of the mirrored positions."""
        return bool(self._mixups)

    def __call__(self, batch: Batch, epoch: int) -> tuple[Views, Tensor]:
        """Return the views of a batch, and its targets."""
        x, y = batch.x, batch.y
        for position, mixup in self._mixups:
            random = ExampleRandom(self.seed, epoch, batch.examples, 0, position)
            x, y = mixup.mix(batch, random, self.num_classes)

        def make(inputs: Tensor, view: int) -> Tensor:
            x, version = inputs, inputs._version
            for position, transform in self._transforms:
                before = x
                x = transform(before, ExampleRandom(self.seed, epoch, batch.examples, view, position))
                rule = None
                if inputs._version != version:
                    rule, remedy = "it changes its inputs in place, which other samples see, too", "Return new ones"
                elif not isinstance(x, Tensor):
                    rule, remedy = f"it returns {type(x).__name__}", "Return a tensor"
                elif (x.shape, x.dtype) != (before.shape, before.dtype):
                    rule = f"it makes {x.dtype} {list(x.shape)} of {before.dtype} {list(before.shape)}"
                    remedy = "Keep shape and dtype"
                if rule:
                    name = getattr(transform, "__name__", type(transform).__name__)
                    raise ConfigError(Fault("augmentation.transforms", name, rule, remedy))
            return x

        return Views(x, self._numbers, make), y


def build_augmentation(
    config: AugmentationConfig, manifest: Manifest, *, num_samples: int, seed: int
) -> Augmentation | None:
    """Return the augmentation of a config, None without transforms; `ConfigError` if it does not fit the data. Local."""
    transforms = [_build_transform(dict(entry)) for entry in config.transforms]
    if not transforms:
        return None
    if "x" not in manifest.arrays:
        rule = f"transforms change one tensor of inputs, and these data have {', '.join(manifest.inputs)}"
        raise ConfigError(Fault("augmentation.transforms", config.transforms, rule, "Leave them out"))
    x, y = manifest.arrays["x"].shape, manifest.arrays["y"].shape
    for transform in transforms:
        num_dims, rule = getattr(transform, "num_dims", len(x)), None
        if num_dims != len(x):
            kind = {2: "series [channels, length]", 3: "images [channels, height, width]"}.get(num_dims)
            rule = f"it is for {kind}, and an input is {list(x)}"
        elif getattr(transform, "moves", False) and manifest.places:
            rule = f"it would move the inputs {list(x)} and not the targets {list(y)}"
        elif isinstance(transform, Mixup) and manifest.ignore_index is not None:
            rule = "classes of these data are missing, and a missing class has no probabilities to mix"
        elif isinstance(transform, Mixup) and manifest.has_weights:
            rule = "the examples have weights, and a mixture of two has none"
        if rule:
            name = type(transform).__name__.lower()
            raise ConfigError(Fault("augmentation.transforms", name, rule, "Leave it out"))
    options = {"num_groups": config.num_groups, "num_classes": manifest.num_classes}
    return Augmentation(transforms, config.views, num_samples=num_samples, seed=seed, **options)


def _build_transform(entry: dict[str, Any]) -> Transform | Mixup:
    name = entry.pop("name", None)
    if not isinstance(name, str) or not (name in TRANSFORMS or "." in name):
        rule = f"its name must be one of {', '.join(TRANSFORMS)}, or package.module.name"
        raise ConfigError(Fault("augmentation.transforms", name, rule, "Try {name: flip}"))
    found = TRANSFORMS.get(name) or import_object("augmentation.transforms", name)
    if not isinstance(found, type) and not entry:
        return found
    try:
        return found(**entry)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        rule, value = f"it refuses them ({error})", {"name": name, **entry}
        raise ConfigError(Fault("augmentation.transforms", value, rule, "Fix the arguments")) from error


def _check(name: str, value: object, rule: Rule) -> None:
    if not rule.fits(value):
        raise ConfigError(Fault("augmentation.transforms", f"{name}: {value}", f"must be {rule.text}", rule.remedy))


def _probability(value: float) -> float:
    _check("probability", value, number(lambda p: 0 <= p <= 1, "a number between 0 and 1", "Try 0.5"))
    return value
