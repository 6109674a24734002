"""Plain networks; any ``nn.Module`` can replace them."""

from .mlp import MLP
from .resnet import ResNet
from .swin import Swin
from .vit import ViT

__all__ = ["MLP", "ResNet", "Swin", "ViT"]
