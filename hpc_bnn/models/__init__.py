"""Plain networks; any ``nn.Module`` can stand in their place (floor 3)."""

from .mlp import MLP
from .vit import ViT

__all__ = ["MLP", "ViT"]
