"""Likelihoods: what a network's outputs say about an example (floor 4).

Log-likelihoods are in nats, one per example; summing over samples and examples, and dividing by their
global numbers, is the business of `hpc_bnn.step`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Categorical:
    """Classes with softmax probabilities.

    Parameters
    ----------
    num_classes : int
        Number of classes, C.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes

    @property
    def num_outputs(self) -> int:
        """Outputs that the network must have per example."""
        return self.num_classes

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | outputs), [B], from logits [B, C] and classes [B]."""
        return -F.cross_entropy(outputs, y.long(), reduction="none")

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return class probabilities [B, C] from logits [B, C]."""
        return torch.softmax(outputs, dim=-1)
