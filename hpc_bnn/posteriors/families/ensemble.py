"""Deep ensembles (Lakshminarayanan, Pritzel, Blundell, 2017)."""

from __future__ import annotations

from ...capabilities import FAMILIES
from ...config import check_field
from .base import Family, Slot


class Ensemble(Family):
    """Sample s is member s: slot ``members``, a row [P] for each of this rank's samples.

    Each member trains as if it were alone, to its maximum a posteriori under a Gaussian prior. The parameters are those of
    `hpc_bnn.DeepEnsemble`.
    """

    name = "deep ensemble"
    capabilities = FAMILIES["ensemble"]
    rest_slot = "members"

    def __init__(self, num_members: int, prior_std: float = 1.0):
        check_field("posterior.prior_std", prior_std)
        self.num_samples = num_members
        self._precision = prior_std**-2

    def slots(self, weights, layout, samples):
        return {"members": Slot(weights, owner="sample")}

    def sample_(self, slots, work, samples, draw, out):
        out.copy_(slots["members"])

    def pull_back_(self, grads, slots, work, samples, g, draw):
        g.add_rows_to(grads["members"])

    def finish_(self, grads, slots, work, scalars):
        grads["members"].mul_(scalars.num_samples)  # the objective is a mean over members

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        if grads is not None:
            grads["members"].addcmul_(slots["members"], scalars.kl_weight * self._precision)
        return cross_entropy

    def log_prior(self, weights):
        return -0.5 * self._precision * weights.square().sum(), None

    def kl_by_weight(self, slots, span):
        return 0.5 * self._precision * slots["members"][:, span].double().square()
