"""Likelihoods of classes and of binary targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, Fault, count
from .base import Likelihood, sum_targets
from .mixtures import BernoulliMixture, Mixture


def _wide(y: Tensor) -> Tensor:
    """Return targets of which classes are compared in 64 bits: 8 hold neither 300 nor -100."""
    return y if y.is_floating_point() else y.long()


class Categorical(Likelihood):
    """C = ``num_classes`` classes with softmax probabilities; one class per example or per point of a field.

    ``ignore_index``, none of 0 to C - 1, stands for a class that is missing, as in torch's ``cross_entropy``: it adds
    nothing.
    """

    num_classes: int
    has_variance = False  # a class is no number

    def __init__(self, num_classes: int, *, ignore_index: int | None = None):
        super().__init__()
        count("Count the classes").check("num_classes", num_classes)
        self.num_classes = self.num_outputs = num_classes
        self.ignore_index = ignore_index
        if ignore_index is not None and (not isinstance(ignore_index, int) or 0 <= ignore_index < num_classes):
            rule = f"must be a whole number that is no class, below 0 or above {num_classes - 1}"
            raise ConfigError(Fault("ignore_index", ignore_index, rule, "Try -1"))
        self.support = f"classes 0 to {num_classes - 1} of a whole-number dtype (y.long()), or their probabilities, which add up to 1"

    def fits(self, y: Tensor) -> Tensor:
        y = _wide(y)
        fits = (y >= 0) & (y <= (1 if y.is_floating_point() else self.num_outputs - 1))
        if y.is_floating_point() and y.ndim > 1:
            fits &= (y.sum(1, keepdim=True) - 1).abs() < 1e-2  # bfloat16 has 8 bits
        return self.or_missing(fits, y)

    def present(self, y: Tensor) -> Tensor | None:
        return None if self.ignore_index is None or y.is_floating_point() else _wide(y) != self.ignore_index

    def only_present(self, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        present = self.present(y)
        if present is None:
            return outputs, y, None
        return torch.where(present.unsqueeze(1), outputs, 0), torch.where(present, _wide(y), 0), present

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return log p(y | outputs), [B], from logits [B, C, ...] and classes [B, ...] of a whole-number dtype.

        Targets [B, C, ...] of a floating-point dtype are class probabilities: the mean over them of log p.
        """
        self._check_outputs(outputs, y)
        of_class = outputs.shape[:1] + outputs.shape[2:]
        if y.shape != (outputs.shape if y.is_floating_point() else of_class):
            rule = "targets are classes [B, ...] of a whole-number dtype, or probabilities of the shape of the outputs"
            ways: dict[tuple[int, ...], str] = {of_class: "y.long()", outputs.shape: "y.argmax(1)"}
            ways[(*of_class[:1], 1, *of_class[1:])] = "y.squeeze(1)"
            raise self.misfit(outputs, y, rule, f"Give {ways.get(y.shape, 'targets of such a shape')}")
        outputs, y, present = self.only_present(outputs, y)
        y = y.to(outputs.dtype) if y.is_floating_point() else y.long()
        return -sum_targets(F.cross_entropy(outputs, y, reduction="none"), present)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return class probabilities [B, C, ...] from logits [B, C, ...]."""
        self._check_outputs(outputs)
        return torch.softmax(outputs, dim=1)

    def _check_outputs(self, outputs: Tensor, y: Tensor | None = None) -> None:
        if outputs.shape[1:2] != (self.num_classes,):
            remedy = f"Let the network give logits [B, {self.num_classes}, ...], examples first"
            raise self.misfit(outputs, y, f"there are {self.num_classes} classes", remedy)


class Bernoulli(Likelihood):
    """Independent yes-no targets; the outputs are logits."""

    support = "0, 1, and probabilities between them"

    def fits(self, y: Tensor) -> Tensor:
        return self.or_missing((y >= 0) & (y <= 1), y)

    def log_prob(self, outputs: Tensor, y: Tensor) -> Tensor:
        outputs, y, present = self.only_present(outputs, y)
        y = self.targets(y, outputs)
        return -sum_targets(F.binary_cross_entropy_with_logits(outputs, y, reduction="none"), present)

    def mean(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)

    def variance(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def mixture(self, outputs: Tensor) -> Mixture:
        return BernoulliMixture(torch.sigmoid(outputs))
