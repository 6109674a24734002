"""The noise of hpc_bnn up to format 3 of checkpoints: a generator of torch for each draw.

Frozen numbers and former checkpoints were made with it, so that they go on to be compared: `patches` brings it back.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import hpc_bnn.data.loader
import hpc_bnn.data.order
import hpc_bnn.posteriors.posterior
import hpc_bnn.posteriors.sampler
import hpc_bnn.run.train
import hpc_bnn.training.state
from hpc_bnn.data.augment import ExampleRandom
from hpc_bnn.noise import Key, Stream
from hpc_bnn.noise.keys import derive_seed
from hpc_bnn.noise.philox import mix64
from hpc_bnn.posteriors.draws import Draw
from hpc_bnn.posteriors.dropout_layers import DropoutMasks
from hpc_bnn.posteriors.estimators.example_noise import ExampleNoise

BLOCK = 32  # examples whose noise comes from one generator


def generator_of(key: Key) -> torch.Generator:
    seed = derive_seed(key.seed, key.stream, key.step, key.sample)
    return torch.Generator().manual_seed(derive_seed(seed, *key.path) if key.path else seed)


class FormerDraw(Draw):
    """One draw of all P weights of a sample."""

    def __init__(self, layout, like, antithetic=False):
        super().__init__(layout, like, antithetic)
        self._num_all, self._span = layout.num_elements, slice(None)
        self.single = like.new_empty(1, layout.num_elements)

    def _fill(self, count, *path):
        out = self._like.new_empty(len(self._samples), count)
        for row, sample in zip(out, self._samples):
            first = self._key.of(sample & ~1 if self._antithetic else sample)
            row.normal_(generator=generator_of(first.child(*path) if path else first))
            if first.sample != sample:
                row.neg_()
        return out

    @property
    def noise(self):
        return self._fill(self._num_all)[:, self._span]

    def affine_(self, loc, scale, out):
        out.copy_(torch.addcmul(loc, scale, self.noise))

    def fold_(self, g, total, product):
        if total is not None:
            g.add_to(total)
        g.add_product_to(product, self.noise)

    def normal(self, path, count):
        return self._fill(count, Stream.FACTOR, *path)

    def cut(self, block):
        part = super().cut(block)
        part._span = block.span
        return part


class FormerOrder:
    def __init__(self, num_examples, seed, epoch, window=None):
        key = Key(seed, Stream.DATA_ORDER, step=epoch)
        self._order = torch.randperm(num_examples, generator=generator_of(key))

    def __getitem__(self, places):
        return self._order[places]


def former_mask(self, key, number, p, x, drops_channels):
    batch_dims = self.batch_dims.get((number, x.ndim), [0])
    shape = torch.Size(
        1 if dim in batch_dims or (drops_channels and dim > 1) else size for dim, size in enumerate(x.shape)
    )
    if (number, shape) not in self._masks:
        generator = generator_of(key.child(Stream.MASK, number, shape.numel()))
        keep = torch.rand(shape, generator=generator) >= p
        self._masks[number, shape] = keep.to(x.dtype) / (1 - p) if p < 1 else keep.to(x.dtype)
    return self._masks[number, shape].to(x.dtype)


def former_example_noise(self, layer, like, width, signs=False):
    first, stop = self.first_example, self.first_example + len(like)
    blocks = []
    for block in range(first // BLOCK, -(-stop // BLOCK)):
        generator = generator_of(self._key.child(Stream.ACTIVATION, layer, block))
        noise = torch.empty(BLOCK, width, dtype=like.dtype)
        if signs:
            noise.random_(0, 2, generator=generator).mul_(2).sub_(1)
        else:
            noise.normal_(generator=generator)
        blocks.append(noise)
    if not blocks:
        return like.new_empty(0, width)
    return torch.cat(blocks)[first % BLOCK : first % BLOCK + len(like)]


def former_uniform(self, rows, count, first=0):
    key = self.seed & ((1 << 64) - 1)
    for word in (self.stream, self.step, self.path[0]):
        key = mix64(key) ^ word
    state = _mixed(rows ^ _signed(mix64(key)))
    counter = torch.arange(first, first + count) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mixed(state[:, None] + counter), 40).float() * 2.0**-24


def former_normal(self, *shape):
    num = math.prod(shape)
    radius, angle = self.uniform(2, -(-num // 2)).unbind(1)
    radius, angle = (-2 * torch.log1p(-radius)).sqrt(), 2 * math.pi * angle
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num].reshape(-1, *shape)


def _mixed(x):
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x, bits):
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x):
    return x - (1 << 64) if x >> 63 else x


def patches() -> list[tuple[Any, str, Any]]:
    """Return (object, name, value) of all that draws."""
    sampler, posterior = hpc_bnn.posteriors.sampler, hpc_bnn.posteriors.posterior
    places = [(sampler, "KeptDraw"), (sampler, "RedrawnDraw"), (posterior, "RedrawnDraw")]
    orders = [(hpc_bnn.data.loader, "EpochOrder"), (hpc_bnn.data.order, "EpochOrder")]
    return [
        *((module, name, FormerDraw) for module, name in places),
        *((module, name, FormerOrder) for module, name in orders),
        *((module, "GENERATOR", "torch") for module in (hpc_bnn.training.state, hpc_bnn.run.train)),
        (DropoutMasks, "_mask", former_mask),
        (ExampleNoise, "draw", former_example_noise),
        (Key, "uniform", former_uniform),
        (ExampleRandom, "normal", former_normal),
    ]


def use_former_noise() -> None:
    """Draw with it from now on, in this process."""
    for of, name, value in patches():
        setattr(of, name, value)
