"""Objectives: how the samples of the whole job make one data term (floor 4).

With the log-likelihood l[s, b] of example b under sample s, and K samples in the job, an objective gives each
(sample, example) a weight such that the gradient of the data term is ``-(1/B) sum_sb weight[s, b] grad l[s, b]``.

The negative ELBO has the weight 1/K: it is linear in the samples and needs nothing from the sample group. Where the
weights couple the samples they are computed across the sample group without gradient, in a first pass, and no
gradient travels through a collective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .comm import GridComm


class LogPredictive:
    """Negative log of the *mean likelihood* over the samples: the direct loss. Two passes.

    ``-log (1/K) sum_s exp l[s, b]``, the loss of the method's published code, where it is taken per rank and so
    depends on the samples per rank; here over all samples of the job. The first pass, without gradient, gives
    the normaliser of the responsibilities ``p_s / sum_s p_s``; the second weighs the gradients by them.

    Collective over ``sample_comm``: 2 B floats per step (a maximum and a sum), whatever K and C are.

    Parameters
    ----------
    num_examples : int
        Examples of this rank, B.
    like : Tensor
        Of the dtype and on the device of the log-likelihoods.
    """

    def __init__(self, num_examples: int, like: Tensor):
        self._max = like.new_full((num_examples,), -math.inf)  # of l[s, b] over the samples seen
        self._sum = like.new_zeros(num_examples)  # of exp(l[s, b] - max)

    def see(self, log_prob: Tensor) -> None:
        """Take in l [c, B] of some samples, in the first pass. Local."""
        top = torch.maximum(self._max, log_prob.amax(0))
        # -inf - -inf is NaN: a likelihood of exactly 0 under all samples stays 0
        shift = torch.where(top.isinf(), 0, top)
        self._sum = self._sum * torch.exp(self._max - shift) + torch.exp(log_prob - shift).sum(0)
        self._max = top

    def combine(self, comm: GridComm) -> None:
        """Make the normaliser log sum_s exp l[s, b] of the job, [B]. Collective over ``sample_comm``."""
        top = self._max.clone()
        comm.max_(top, "sample")
        shift = torch.where(top.isinf(), 0, top)
        self._sum *= torch.exp(self._max - shift)
        comm.sum_(self._sum, "sample")
        self.log_normaliser = shift + self._sum.log()

    def weights(self, log_prob: Tensor) -> Tensor:
        """Return the responsibilities [c, B] of some samples, in the second pass. Local."""
        return torch.exp(log_prob - self.log_normaliser)

    def data_term(self, num_samples: int) -> Tensor:
        """Return the sum over this rank's examples of the data term (nats). Local."""
        return -(self.log_normaliser - math.log(num_samples)).sum()
