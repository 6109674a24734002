"""Gaussians whose covariance is diagonal plus low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ...capabilities import FAMILIES
from ...config import check_field
from ..priors import GaussianPrior, Prior, gaussian_entropy
from .base import Slot, Slots
from .mean_field import MeanField


class LowRank(MeanField):
    """w = loc + scale (eps + F^T z) with eps of P and z of R normal numbers, and F = directions / sqrt(P).

    Slots are ``loc``, ``log_scale`` and ``directions`` [R, P]. The covariance is S (I + F^T F) S with S = diag(scale): F is
    relative to the scale. An optimizer that moves each number by about its learning rate, as Adam, changes the norm of
    a row of ``directions`` by up to its sqrt(P) times, and that of F, on which the KL depends, as much for a million weights
    as for ten. The parameters are those of `hpc_bnn.LowRankGaussian`.
    """

    name = "low-rank Gaussian"
    capabilities = FAMILIES["low_rank"]

    def __init__(
        self, rank: int = 4, prior: Prior = GaussianPrior(), init_std: float = 0.01,
        init_std_relative: float | None = None,
    ):  # fmt: skip
        check_field("posterior.rank", rank)
        super().__init__(prior, init_std, init_std_relative)
        self.rank = rank

    def slots(self, weights, layout, samples):
        # Rows of signs that differ from each other: a factor of 0 would have no gradient.
        numbers = torch.arange(len(weights), device=weights.device)
        rows = [(1 - 2 * ((numbers >> row) % 2)).to(weights) for row in range(self.rank)]
        return super().slots(weights, layout, samples) | {"directions": Slot(torch.stack(rows))}

    def sample_(self, slots, work, samples, draw, out):
        super().sample_(slots, work, samples, draw, out)
        common = (draw.normal((), self.rank) * _unit(slots)) @ slots["directions"]  # [c, P]
        out.addcmul_(work["scale"], common)

    def pull_back_(self, grads, slots, work, samples, g, draw):
        # dL/dF = z (g scale)^T; dL/dlog_scale = g scale (eps + F^T z): the factor scale of both comes in `finish_`.
        super().pull_back_(grads, slots, work, samples, g, draw)
        g.outer_to(grads["directions"], draw.normal((), self.rank) * _unit(slots))

    def finish_(self, grads, slots, work, scalars):
        # sum_c g z_c F is what the gradient of the directions gives along them: no pass over the samples more
        grads["log_scale"].add_((grads["directions"] * slots["directions"]).sum(0))
        super().finish_(grads, slots, work, scalars)
        grads["directions"].mul_(work["scale"])

    def marginals(self, slots, span):
        loc, scale = super().marginals(slots, span)
        return loc, scale * _inflation(slots["directions"][:, span], _unit(slots))

    def coupling(self, slots):
        # The total correlation (Watanabe, 1960): the entropies of the weights, minus that of all together
        factor = slots["directions"].double() * _unit(slots)
        gram = factor @ factor.T
        return 0.5 * (factor.square().sum(0).log1p().sum() - torch.logdet(gram + torch.eye(len(gram)).to(gram)))

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        # By autograd: the entropy couples the weights (matrix determinant lemma), and the cross entropy to an independent
        # prior sees only the marginal standard deviations.
        names = ("loc", "log_scale", "directions")
        with torch.set_grad_enabled(grads is not None):
            leaves = [slots[name].detach().requires_grad_(grads is not None) for name in names]
            loc, log_scale, directions = leaves
            gram = directions @ directions.T * _unit(slots) ** 2  # F F^T
            one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            kl = -gaussian_entropy(log_scale) - 0.5 * torch.logdet(gram + one)
            if self.prior.closed_form:
                marginal = log_scale.exp() * _inflation(directions, _unit(slots))
                kl = kl + self.prior.cross_entropy(loc, marginal)
        if grads is not None:
            for name, gradient in zip(names, torch.autograd.grad(kl, leaves, allow_unused=True)):
                if gradient is not None:
                    grads[name].addcmul_(gradient, scalars.kl_weight)
        return kl.detach() + (0 if self.prior.closed_form else cross_entropy)


def _unit(slots: Slots) -> float:
    return slots["directions"].shape[1] ** -0.5


def _inflation(directions: Tensor, unit: float) -> Tensor:
    """Return what F makes of the standard deviation of each weight, as a multiple."""
    return (1 + directions.square().sum(0) * unit**2).sqrt()
