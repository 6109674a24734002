"""Shifted-window transformer for fields on a latitude-longitude grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .vit import Block


class Swin(nn.Module):
    """U-shaped SWIN transformer from fields to fields, periodic in longitude or of a region.

    Attention within windows that shift by half their size from block to block (Liu et al., Swin Transformer, 2021), in
    stages of half the resolution and twice the width each, and back up with skip connections (Cao et al., Swin-Unet,
    2021). Windows that shift over the date line contain both sides of it; attention does not cross a pole.

    Parameters
    ----------
    in_shape, num_outputs : sequence of int, int
        Channels (variables and levels), latitudes and longitudes of a field; channels of the output.
    target_shape : sequence of int
        Latitudes and longitudes of the output: those of the input.
    patch, dim : int
        Side of a square patch (grid points); width of the first stage, a multiple of its heads.
    depths, heads : sequence of int
        Blocks and attention heads of each stage on the way down; the way up repeats all but the last.
    window : sequence of int
        Latitudes and longitudes of a window (patches).
    mlp_ratio, dropout : float
        Width of the hidden layer of a block, in multiples of its dim; rate of the dropout layers behind attention and
        MLP (for MC dropout).
    is_periodic : bool
        Whether the last longitude is the neighbour of the first; False for a region.

    The network repeats latitudes at the southern edge up to a multiple of ``patch * window[0] * 2 ** (stages - 1)``, and
    cuts them off at the end. Longitudes must be a multiple of ``patch * window[1] * 2 ** (stages - 1)`` if they are
    periodic; for a region the network repeats them at the eastern edge.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_outputs: int,
        target_shape: Sequence[int] = (),
        patch: int = 4,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6),
        heads: Sequence[int] = (3, 6, 12),
        window: Sequence[int] = (4, 8),
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        is_periodic: bool = True,
    ):
        super().__init__()
        channels, rows, columns = in_shape
        theirs = tuple(target_shape or (rows, columns))
        if theirs != (rows, columns):
            raise ValueError(f"Swin: the targets have the spatial shape {theirs}, the inputs {(rows, columns)}")
        if len(heads) != len(depths) or any((dim << i) % h for i, h in enumerate(heads)):
            raise ValueError(f"Swin: heads={tuple(heads)} must divide dim={dim}, doubled from stage to stage")
        down, right = (side * (patch << (len(depths) - 1)) for side in window)  # a window of the coarsest stage
        if is_periodic and columns % right:
            rule = f"must be a multiple of patch * window[1] * 2 ** (stages - 1) = {right}"
            raise ValueError(f"Swin: {columns} longitudes {rule}")
        self.patch = patch
        self.shape = (rows, columns)
        self.padding = (-rows % down, -columns % right)
        size = ((rows + self.padding[0]) // patch, (columns + self.padding[1]) // patch)

        def stage(index: int) -> nn.Sequential:
            here, width = (size[0] >> index, size[1] >> index), dim << index
            same = (width, heads[index], int(mlp_ratio * width), dropout, here, window, is_periodic)
            return nn.Sequential(*(SwinBlock(*same, is_shifted=bool(i % 2)) for i in range(depths[index])))

        stages = range(len(depths))
        self.embed = nn.Linear(channels * patch * patch, dim)
        self.down = nn.ModuleList(stage(i) for i in stages)
        self.merge = nn.ModuleList(PatchMerging(dim << i) for i in stages[:-1])
        self.expand = nn.ModuleList(PatchExpanding(dim << (i + 1)) for i in stages[:-1])
        self.fuse = nn.ModuleList(nn.Linear(2 * (dim << i), dim << i) for i in stages[:-1])
        self.up = nn.ModuleList(stage(i) for i in stages[:-1])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_outputs * patch * patch)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, rows, columns] -> [B, num_outputs, rows, columns]
        for dim, count in zip((2, 3), self.padding):
            if count:
                edge = x.narrow(dim, x.shape[dim] - 1, 1)
                x = torch.cat([x, edge.repeat_interleave(count, dim)], dim)
        x = self.embed(F.pixel_unshuffle(x, self.patch).movedim(1, -1))  # [B, H, W, dim]
        skips = []
        for stage, merge in zip(self.down, self.merge):
            skips.append(stage(x))
            x = merge(skips[-1])
        x = self.down[-1](x)
        for index in reversed(range(len(self.up))):
            x = self.fuse[index](torch.cat([self.expand[index](x), skips[index]], dim=-1))
            x = self.up[index](x)
        x = F.pixel_shuffle(self.head(self.norm(x)).movedim(-1, 1), self.patch)
        return x[:, :, : self.shape[0], : self.shape[1]]


class SwinBlock(Block):
    """Pre-norm block with attention within windows of [B, H, W, dim]."""

    _offsets: Tensor
    _mask: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        dropout: float,
        size: tuple[int, int],
        window: Sequence[int],
        is_periodic: bool,
        is_shifted: bool,
    ):
        super().__init__(dim, heads, mlp_dim, dropout)
        height, width = self.window = tuple(window)
        # A window that spans an axis has nothing to shift there
        self.shift = tuple(w // 2 if is_shifted and w < s else 0 for w, s in zip(window, size))
        self.position_bias = nn.Parameter(0.02 * torch.randn((2 * height - 1) * (2 * width - 1), heads))
        self.register_buffer("_offsets", _offsets(height, width), persistent=False)
        self.register_buffer("_mask", self._edge_mask(size, is_periodic), persistent=False)

    def attend(self, x: Tensor) -> Tensor:
        """Return the attention of the tokens of each window to each other."""
        (height, width), shift = self.window, self.shift
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        windows = x.unflatten(2, (-1, width)).unflatten(1, (-1, height))  # [B, rows, h, columns, w, dim]
        form = windows.shape
        windows = windows.transpose(2, 3).flatten(3, 4)  # [B, rows, columns, h w, dim]
        bias = self.position_bias[self._offsets].movedim(-1, 0)  # [heads, h w, h w]
        if self._mask is not None:
            bias = bias + self._mask.to(bias.dtype)  # [rows, columns or 1, heads, h w, h w]
        x = self.attention(windows, bias).unflatten(3, (height, width)).transpose(2, 3)
        x = x.reshape(form).flatten(3, 4).flatten(1, 2)
        return x.roll(shift, (1, 2)) if any(shift) else x

    def _edge_mask(self, size: tuple[int, int], is_periodic: bool) -> Tensor | None:
        """Return what keeps opposite edges apart in the windows that hold both, [rows, columns or 1, 1, h w, h w]."""
        (height, width), (down, right) = self.window, self.shift
        right = 0 if is_periodic else right
        if not (down or right):
            return None
        region = torch.zeros(size)  # what came from the other edge by the shift
        region[size[0] - down :] += 1
        region[:, size[1] - right :] += 2
        region = region.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [rows, h, columns, w]
        region = region.transpose(1, 2).flatten(2)[:, : 1 if not right else None]  # [rows, columns or 1, h w]
        is_apart = region[..., :, None] != region[..., None, :]
        return torch.zeros(is_apart.shape).masked_fill(is_apart, -100.0)[:, :, None]


def _offsets(height: int, width: int) -> Tensor:
    """Return for each pair of patches of a window the number of their offset, [h w, h w]."""
    positions = torch.cartesian_prod(torch.arange(height), torch.arange(width))  # [h w, 2]
    down, right = (positions[:, None] - positions).unbind(-1)
    return (down + height - 1) * (2 * width - 1) + right + width - 1


class PatchMerging(nn.Module):
    """Half the resolution, twice the width: [B, H, W, dim] -> [B, H/2, W/2, 2 dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        return self.reduce(self.norm(x))


class PatchExpanding(nn.Module):
    """Twice the resolution, half the width: [B, H, W, dim] -> [B, 2 H, 2 W, dim / 2]."""

    def __init__(self, dim: int):
        super().__init__()
        self.widen = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(x).unflatten(3, (2, 2, -1))  # [B, H, W, 2, 2, dim / 2]
        return self.norm(x.transpose(2, 3).flatten(3, 4).flatten(1, 2))
