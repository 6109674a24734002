"""Gaussian posterior with low-rank plus diagonal covariance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import check_field
from ..errors import ConfigError, Fault
from .base import Tally
from .mean_field import MeanFieldGaussian
from .priors import gaussian_entropy


class LowRankGaussian(MeanFieldGaussian):
    """Gaussian with covariance ``diag(scale^2) + factor^T factor`` over all random weights together.

    A sample is ``w = loc + scale * eps + z @ factor`` with z of ``rank`` numbers (Ong, Nott, Smith, Gaussian
    variational approximation with a factor covariance structure, 2018).

    Parameters
    ----------
    module : nn.Module
        See `MeanFieldGaussian`, as for all other parameters.
    rank : int
        Rank R of the factor; memory and optimizer state grow by R floats per weight.

    Attributes
    ----------
    factor : nn.Parameter
        [R, P]; starts at a tenth of ``scale``, with signs that alternate at another pace in each row.
    """

    family = "low-rank Gaussian"

    def __init__(self, module: nn.Module, *, rank: int = 4, **options):
        check_field("posterior.rank", rank)
        estimator = options.get("estimator", "reparameterisation")
        if estimator != "reparameterisation":
            raise ConfigError(
                Fault(
                    "posterior.estimator",
                    estimator,
                    "noise per example knows independent weights only",
                    "Use reparameterisation with the low_rank family",
                )
            )
        self.rank = self._num_common_noise = rank
        super().__init__(module, **options)

    def _lay_out_(self, slots: dict[str, Tensor]) -> None:
        super()._lay_out_(slots)
        views = [self.random.views(row) for row in self._gradients["factor"]]
        self._factor_grads = [list(view.values()) for view in views]  # [R][weight]

    def _more_slots(self, scale: Tensor) -> dict[str, Tensor]:
        places = torch.arange(self.num_weights, device=scale.device)
        rows = [0.1 * scale * (1 - 2 * ((places >> row) % 2)) for row in range(self.rank)]
        return {"factor": torch.stack(rows)}

    def _assemble(self, noise: Tensor, out: Tensor | None = None) -> Tensor:
        out = super()._assemble(noise, out)
        return out.addmv_(self.factor.T, noise[self.num_weights :])

    def _accumulate_common_(self, used: list[bool], gradients: list[Tensor]) -> None:
        for z, grads in zip(self._all_noise[self.num_weights :], self._factor_grads):
            mine = [g for g, is_used in zip(grads, used) if is_used]
            torch._foreach_addcmul_(
                mine, gradients, [z] * len(mine)
            )  # a tensor: nothing waits for the device

    def _accumulate_flat_(self, gradient: Tensor, noise: Tensor, place: slice = slice(None)) -> None:
        super()._accumulate_flat_(gradient, noise, place)
        self._gradients["factor"][:, place].addmm_(noise[:, self.num_weights :].T, gradient)

    def add_kl_gradient_(self, weight: float) -> Tensor:
        # By autograd: the entropy couples the weights (matrix determinant lemma), and the cross entropy to
        # an independent prior sees only the marginal standard deviations.
        names = ("loc", "log_scale", "factor")
        with torch.enable_grad():
            loc, log_scale, factor = leaves = [getattr(self, n).detach().requires_grad_() for n in names]
            kl = -self._entropy(log_scale, factor)
            if self.prior.closed_form:
                marginal = (torch.exp(2 * log_scale) + factor.square().sum(0)).sqrt()
                kl = kl + self.prior.cross_entropy(loc, marginal)
        for name, gradient in zip(names, torch.autograd.grad(kl, leaves, allow_unused=True)):
            if gradient is not None:
                self._gradients[name].add_(gradient, alpha=weight)
        return kl.detach() + (0 if self.prior.closed_form else self.tally[Tally.CROSS_ENTROPY])

    @staticmethod
    def _entropy(log_scale: Tensor, factor: Tensor) -> Tensor:
        whitened = factor * torch.exp(-log_scale)
        gram = whitened @ whitened.T  # [R, R]
        return gaussian_entropy(log_scale) + 0.5 * torch.logdet(gram + torch.eye(len(gram)).to(gram))

    def _views(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        views = super()._views(slots)
        for row, values in enumerate(slots["factor"]):
            views |= {f"{name}.factor.{row}": view for name, view in self.random.views(values).items()}
        return views
