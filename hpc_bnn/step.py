"""One optimizer step: draw, forward, objective, backward, reduce, update (floor 5).

The only place that knows how samples are looped. The layout law rests here: each rank divides by the
global number of samples and examples, the job sums, and the KL enters once, after the sum.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import torch
from torch import Tensor

from .comm import GridComm
from .errors import NonFiniteError
from .likelihoods import Categorical
from .noise import Stream, keyed_generator
from .posteriors import MeanFieldGaussian


@dataclass(frozen=True)
class StepResult:
    """What one step measured, before its update; the same on all ranks."""

    nelbo: float
    """Negative ELBO per example (nats): ``data_term + kl_weight * kl / num_train_examples``."""
    data_term: float
    """Mean over samples and examples of the negative log-likelihood (nats)."""
    kl: float
    """KL(q || prior) of all weights (nats)."""


class VariationalStep:
    """Callable that makes one step of variational inference on the whole process grid.

    Parameters
    ----------
    posterior : MeanFieldGaussian
        Wrapped network.
    likelihood : Categorical
        Likelihood of an example given the network's outputs.
    optimizer : torch.optim.Optimizer
        Over ``posterior.parameters()``.
    comm : GridComm
        The process grid.
    num_samples : int
        Samples of the weights per step in the whole job, K; at least the extent of the sample axis.
    num_train_examples : int
        Size of the training set, N: the KL per example is KL / N.
    seed : int
        Key of the noise.
    kl_weight : float
        Factor of the KL; 1 is Bayes, below 1 a cold posterior.
    autocast_dtype : torch.dtype, optional
        Run the network in this dtype where torch's autocast allows; weights, gradients and reductions
        stay in their own.

    Attributes
    ----------
    num_steps : int
        Steps made so far: part of the noise key, to be stored with a checkpoint.
    """

    def __init__(
        self,
        posterior: MeanFieldGaussian,
        likelihood: Categorical,
        optimizer: torch.optim.Optimizer,
        comm: GridComm,
        *,
        num_samples: int,
        num_train_examples: int,
        seed: int = 0,
        kl_weight: float = 1.0,
        autocast_dtype: torch.dtype | None = None,
    ):
        comm.grid.check_num_samples(num_samples)
        self.posterior = posterior
        self.likelihood = likelihood
        self.optimizer = optimizer
        self.comm = comm
        self.num_samples = num_samples
        self.num_train_examples = num_train_examples
        self.seed = seed
        self.kl_weight = kl_weight
        self.autocast_dtype = autocast_dtype
        self.num_steps = 0

    def __call__(self, x: Tensor, y: Tensor, global_batch_size: int) -> StepResult:
        """Make one step. Collective over the world: one sum over each axis of extent above 1.

        Parameters
        ----------
        x : Tensor
            [B_local, ...] inputs of this rank's part of the batch; B_local may be 0 and may differ
            between data groups.
        y : Tensor
            [B_local, ...] targets.
        global_batch_size : int
            Examples of this step in the whole job.

        Raises
        ------
        NonFiniteError
            On all ranks, before the update, when the loss or a gradient of any rank is not finite.
        """
        self.accumulate_gradient_(x, y, global_batch_size)
        posterior = self.posterior
        data_sum, num_broken = posterior.tally[:2].tolist()
        if num_broken:
            self._raise_non_finite()
        kl = posterior.add_kl_gradient_(self.kl_weight / self.num_train_examples).item()
        self.optimizer.step()
        self.num_steps += 1
        return StepResult(data_sum + self.kl_weight * kl / self.num_train_examples, data_sum, kl)

    def accumulate_gradient_(self, x: Tensor, y: Tensor, global_batch_size: int) -> None:
        """Leave the job's gradient of the data term in ``.grad`` of the posterior's parameters.

        ``posterior.tally`` then holds the data term and the number of ranks with a non-finite gradient.
        Collective over the world.
        """
        posterior = self.posterior
        posterior.begin()
        scale = 1.0 / (self.num_samples * global_batch_size)
        for sample in self.comm.grid.local_samples(self.num_samples):
            posterior.draw_(keyed_generator(self.seed, Stream.NOISE, self.num_steps, sample, x.device))
            with self._autocast(x.device):
                outputs = posterior.module(x)
            loss = -scale * self.likelihood.log_prob(_in_own_dtype(outputs, posterior), y).sum()
            loss.backward()
            posterior.accumulate_()
            posterior.tally[0] += loss.detach()
        posterior.finish_()
        # NaN and infinity survive a sum. The flag travels with the gradient: no collective of its own.
        self._local_is_broken = ~posterior.reduced.sum().isfinite()
        posterior.tally[1] = self._local_is_broken
        self.comm.sum_(posterior.reduced, "world")

    def _autocast(self, device: torch.device):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast_dtype)

    def _raise_non_finite(self) -> None:
        mine = (self.comm.grid.rank, socket.gethostname()) if self._local_is_broken.item() else None
        places = [f"rank {p[0]} on {p[1]}" for p in self.comm.gather_objects(mine) if p is not None]
        raise NonFiniteError(
            f"step {self.num_steps}: the loss or a gradient is not finite on {', '.join(places)}. "
            "The parameters were not updated. Try a smaller learning rate or check the data"
        )


def _in_own_dtype(outputs: Tensor, posterior: MeanFieldGaussian) -> Tensor:
    """Take the likelihood of autocast outputs in the dtype of the weights."""
    return outputs.to(posterior.loc.dtype)
