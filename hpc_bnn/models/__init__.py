"""Plain networks; any ``nn.Module`` can replace them."""

from .checkpointing import checkpoint_layers
from .mlp import MLP
from .resnet import ResNet
from .swin import Swin
from .vit import ViT

__all__ = ["MLP", "ResNet", "Swin", "ViT", "checkpoint_layers"]
