"""Plain networks; any ``nn.Module`` can stand in their place (floor 3)."""

from .mlp import MLP

__all__ = ["MLP"]
