"""Plain networks; any ``nn.Module`` can stand in their place."""

from .mlp import MLP
from .resnet import ResNet
from .swin import Swin
from .vit import ViT

__all__ = ["MLP", "ResNet", "Swin", "ViT"]
