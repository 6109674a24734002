"""Residual convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn


class ResNet(nn.Module):
    """Residual network for small images, with pre-activation blocks.

    He, Zhang, Ren, Sun, Identity mappings in deep residual networks, 2016.

    Parameters
    ----------
    in_shape, num_outputs : sequence of int, int
        Channels, height and width of an image; number of outputs.
    width, depths : int, sequence of int
        Channels of the first stage, doubled from stage to stage with half the resolution; blocks of each stage.
    norm, dropout : {"group", "batch"}, float
        Normalisation: groups of 8 channels do not depend on the batch, and suit ensembles and evaluation in chunks;
        rate of the dropout layer within a block (for MC dropout).
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        num_outputs: int,
        width: int = 16,
        depths: Sequence[int] = (2, 2, 2),
        norm: Literal["group", "batch"] = "group",
        dropout: float = 0.0,
    ):
        if norm not in ("group", "batch"):
            raise ValueError(f"ResNet: norm={norm} must be group or batch")
        if norm == "group" and width % 8:
            raise ValueError(f"ResNet: width={width} must be a multiple of 8 for norm=group")
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_shape[0], width, 3, padding=1, bias=False)]
        channels = width
        for stage, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(ResidualBlock(channels, width << stage, stride, norm, dropout))
                channels = width << stage
        self.features = nn.Sequential(*layers)
        self.norm = _norm(norm, channels)
        self.head = nn.Linear(channels, num_outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, height, width] -> [B, num_outputs]
        return self.head(self.norm(self.features(x)).relu().mean((2, 3)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or a 1 x 1 convolution where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = _norm(norm, in_channels), _norm(norm, channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        is_same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x).relu())
        return self.shortcut(x) + self.conv2(self.dropout(self.norm2(y).relu()))


def _norm(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(channels // 8, channels)
