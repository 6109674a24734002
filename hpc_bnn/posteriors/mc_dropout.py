"""MC dropout: a sample is a set of dropout masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import check_field
from ..errors import ConfigError, Fault
from .base import Posterior


class MCDropout(Posterior):
    """Dropout as a variational posterior: all weights are points, and a sample is a mask per dropout layer.

    Gal and Ghahramani, Dropout as a Bayesian Approximation, 2016: the KL of the dropout posterior to a
    Gaussian prior is, up to a constant, weight decay: ``keep / (2 prior_std^2) * ||w||^2`` (equation 7 with
    length scale 1 / prior_std). The masks are keyed by the global sample index and shared by the examples
    of a batch (`DropoutMasks`), in training and for the predictive.

    Parameters
    ----------
    module : nn.Module
        A module with at least one dropout layer of p > 0.
    prior_std : float
        Standard deviation of the prior of each weight, in units of the weight.
    """

    family = "MC dropout"
    kl_kind = "closed form"

    def __init__(self, module: nn.Module, *, prior_std: float = 1.0):
        check_field("posterior.prior_std", prior_std)
        super().__init__(module)
        self.prior_std = prior_std
        rates = [layer.p for layer in self.dropout.layers if layer.p > 0]
        if not rates:
            raise ConfigError(
                Fault(
                    "model",
                    type(module).__name__,
                    "it has no dropout layer with p > 0",
                    "Add nn.Dropout(0.1)",
                )
            )
        if len(set(rates)) > 1:
            raise ConfigError(
                Fault(
                    "model",
                    rates,
                    "all dropout layers must have the same rate for the weight decay",
                    "Use one",
                )
            )
        self.dropout.always = True
        self._decay = (1 - rates[0]) / prior_std**2
        self._allocate()

    @torch.no_grad()
    def add_kl_gradient_(self, weight: float) -> Tensor:
        self._gradients["points"].add_(self.points, alpha=weight * self._decay)
        return 0.5 * self._decay * torch.dot(self.points, self.points)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        # The fused path of nn.TransformerEncoderLayer for evaluation would pass its dropout layers by.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with super().evaluating():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
