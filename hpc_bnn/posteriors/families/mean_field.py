"""Independent Gaussians (Blundell et al., Weight Uncertainty in Neural Networks, 2015)."""

from __future__ import annotations

import math

import torch

from ...capabilities import FAMILIES
from ...config import check_field
from ...errors import check_kind
from ..priors import GaussianPrior, Prior, gaussian_entropy
from .base import Family, Slot


class MeanField(Family):
    """w = loc + exp(log_scale) eps; slots ``loc``, ``log_scale``, [P]; parameters as of `hpc_bnn.MeanFieldGaussian`."""

    name = "mean-field Gaussian"
    capabilities = FAMILIES["mean_field"]
    rest_slot = "loc"

    def __init__(self, prior: Prior = GaussianPrior(), init_std: float = 0.01, init_std_relative: float | None = None):
        check_kind("prior", prior, Prior, "Give one of hpc_bnn, as GaussianPrior(0.1)")
        check_field("posterior.init_std", init_std)
        check_field("posterior.init_std_relative", init_std_relative)
        self.prior, self.init_std, self.init_std_relative = prior, init_std, init_std_relative
        if not prior.closed_form:
            self.capabilities = self.capabilities.but(kl="Monte Carlo")

    def slots(self, weights, layout, samples):
        self.prior = self.prior.bind(layout, weights)
        log_scale = torch.full_like(weights, math.log(self.init_std))
        if self.init_std_relative is not None:
            magnitude = weights.abs()
            log_scale = (self.init_std_relative * magnitude.clamp_min(1e-6 * magnitude.max())).log()
        return {"loc": Slot(weights), "log_scale": Slot(log_scale)}

    def begin_(self, slots, work):
        scale = work.setdefault("scale", torch.empty_like(slots["log_scale"]))
        torch.exp(slots["log_scale"], out=scale)

    def sample_(self, slots, work, samples, draw, out):
        draw.affine_(slots["loc"], work["scale"], out)

    def pull_back_(self, grads, slots, work, samples, g, draw):
        # With g = dL/dw of a sample: dL/dloc = g, dL/dlog_scale = g eps scale; the factor scale comes in `finish_`.
        draw.fold_(g, grads["loc"], grads["log_scale"])

    def finish_(self, grads, slots, work, scalars):
        grads["log_scale"].mul_(work["scale"])

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        loc, log_scale, scale = slots["loc"], slots["log_scale"], work["scale"]
        if self.prior.closed_form:
            if grads is not None:
                self.prior.add_kl_gradient_(grads["loc"], grads["log_scale"], loc, scale, scalars.kl_weight)
            return self.prior.kl_from_gaussian(loc, log_scale, scale)
        if grads is not None:
            grads["log_scale"].sub_(scalars.kl_weight)  # of the entropy
        return cross_entropy - gaussian_entropy(log_scale)

    def log_prior(self, weights):
        return self.prior.log_prob(weights), self.prior.score(weights)

    def mean(self, slots):
        return slots["loc"]

    def marginals(self, slots, span):
        return slots["loc"][span], slots["log_scale"][span].exp()

    def kl_by_weight(self, slots, span):
        loc, scale = (numbers.double() for numbers in self.marginals(slots, span))
        return self.prior.kl_by_weight(loc, scale, span)

    def least_kl(self, slots):
        return self.prior.least_kl(slots["loc"])
