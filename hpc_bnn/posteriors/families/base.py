"""What a family of posteriors is: mathematics over slots, which knows no module, no rank and no memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...capabilities import Capabilities
from ...errors import ConfigError, Fault
from ..draws import Draw
from ..gradients import WeightGradient
from ..layout import FlatLayout

Slots = dict[str, Tensor]
"""Slots, their gradients, or what is computed from them once per step, by name."""


class Slot(NamedTuple):
    """Numbers that describe a posterior, by weight: means, scales, members."""

    value: Tensor
    """What it starts with; the last dim is P, all weights, unless ``per_weight`` is False."""
    is_trained: bool = True
    """Whether the optimizer updates it; otherwise it is kept, and stored with a checkpoint."""
    per_weight: bool = True
    owner: Literal["all", "sample"] = "all"
    """sample: a row for each of this rank's samples, as in an ensemble; its gradient stays in their data group."""


class Scalars(NamedTuple):
    """Numbers of a step, 0-dim tensors where the posterior is. `x.addcmul_(y, s)` reads one without the host."""

    kl_weight: Tensor
    """Factor of the KL per example: kl_weight / num_train_examples."""
    num_samples: Tensor
    """Samples per step in the whole job, K."""
    step: Tensor
    """Number of the step, from 0."""
    learning_rate: Tensor

    @classmethod
    def on(cls, device: torch.device | str) -> Scalars:
        """Return zeros, to be filled in place. Local."""
        return cls(*torch.zeros(len(cls._fields), dtype=torch.float64, device=device))


class Family:
    """A family q(w) of posteriors over the weights of a module, and nothing else.

    A step calls `begin_` once; `sample_` and `pull_back_` for each sample or chunk of samples; then, after the sum over
    the ranks, `finish_` and `kl_` once; and `after_update_` once when the optimizer has updated the slots. Slots, their
    gradients and what is in ``work`` come by the names of `slots`. Weights that stay points are the slot ``points``,
    which needs no code unless the family gives them a prior. A family whose slots belong to samples gets the rows of
    the samples in question, and has no points.

    With blocks of weights (`Capabilities.is_separable`) `sample_` and `pull_back_` get everything cut to a block.
    """

    name = ""
    """As a run names it."""
    capabilities = Capabilities()
    rest_slot = ""
    """Name of the slot whose (first) row the weights of the module are between steps; "": they stay the last draw."""

    def slots(self, weights: Tensor, layout: FlatLayout, samples: Sequence[int]) -> dict[str, Slot]:
        """Return the slots as they start, of weights [P] of the module in a layout.

        Where the slots belong to samples, weights are [len(samples), P] for the global indices of this rank's samples.
        """
        raise NotImplementedError

    def begin_(self, slots: Slots, work: Slots) -> None:
        """Fill the empty ``work`` with what all samples of a step read; later overwrite its tensors in place."""

    def sample_(self, slots: Slots, work: Slots, samples: Sequence[int], draw: Draw, out: Tensor) -> None:
        """Write the weights of c samples to ``out`` [c, P]."""
        raise NotImplementedError

    def predict_(self, slots: Slots, work: Slots, samples: Sequence[int], draw: Draw, out: Tensor) -> None:
        """Write the weights of c samples of a predictive to ``out`` [c, P]."""
        self.sample_(slots, work, samples, draw, out)

    def pull_back_(
        self, grads: Slots, slots: Slots, work: Slots, samples: Sequence[int], g: WeightGradient, draw: Draw
    ) -> None:
        """Add what the gradients g of c samples' weights are for the slots to ``grads``: the transpose of `sample_`."""
        raise NotImplementedError

    def finish_(self, grads: Slots, slots: Slots, work: Slots, scalars: Scalars) -> None:
        """Complete the gradients, after the sum over the job: what is linear and the same for all samples."""

    def kl_(self, grads: Slots | None, slots: Slots, work: Slots, scalars: Scalars, cross_entropy: Tensor) -> Tensor:
        """Add ``scalars.kl_weight`` times the gradient of the KL, and return the KL (nats, 0-dim tensor).

        Without ``grads`` the value only; ``scalars`` are then not those of a step. Where the KL is a Monte Carlo one
        (`Capabilities.kl`), ``cross_entropy`` is the mean over the samples of the job of -log prior(w) (nats), whose
        gradient came with the samples.
        """
        return cross_entropy

    def log_prior(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return log prior(w) of weights [c, P], summed (nats), and its gradient [c, P], for a Monte Carlo KL.

        None instead of the gradient where `kl_` adds it.
        """
        raise NotImplementedError

    def mean(self, slots: Slots) -> Tensor:
        """Return the mean of the weights, [P]."""
        raise NotImplementedError(f"{self.name} has no mean network")

    def marginals(self, slots: Slots, span: slice) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the weights ``span`` of [P], [n] each (units of the weights)."""
        raise NotImplementedError(f"a {self.name} states no standard deviation of its weights")

    def kl_by_weight(self, slots: Slots, span: slice) -> Tensor | None:
        """Return what the weights ``span`` of [P] add to the KL, [n] (nats, float64); None where that is not known.

        ``span`` of the points where no weight is random; [rows, n] where the slots belong to samples.
        """
        return None

    def coupling(self, slots: Slots) -> Tensor:
        """Return by how much the KL is above the sum of `kl_by_weight` (nats, 0-dim): what the weights know of each other."""
        return torch.zeros((), dtype=torch.float64)

    def least_kl(self, slots: Slots) -> float | None:
        """Return the least value that `kl_by_weight` has for a weight (nats), of a weight at the prior; None: there is none."""
        return None

    def after_update_(self, grads: Slots, slots: Slots, samples: Sequence[int], draw: Draw, scalars: Scalars) -> None:
        """Change the slots once more after the update, for example by the noise of a chain.

        ``samples`` and ``draw`` are those of the rows of this rank; where all ranks hold the slots, one draw that is the
        same on all of them.
        """


def check_slots(
    family: Family, slots: dict[str, Slot], num_weights: int, num_samples: int, taken: Collection[str]
) -> None:
    """Raise `ConfigError` where slots are not what `Slot` and the capabilities of their family say. Local."""
    owner, faults = family.capabilities.owner, []
    for name, (value, _, per_weight, slot_owner) in slots.items():
        shape = tuple(value.shape)
        if name in taken:
            rule = "a posterior has something else of this name"
        elif not shape:
            rule = "it is a 0-dim tensor, and numbers have a dim at least"
        elif slot_owner != owner and (per_weight or slot_owner == "sample"):
            rule = f"its owner is {slot_owner}, and Capabilities.owner of the family is {owner}"
        elif per_weight and shape[-1] != num_weights:
            rule = f"the last dim of {shape} is not that of the {num_weights} random weights, and per_weight is True"
        elif slot_owner == "sample" and shape[0] != num_samples:
            rule = f"it needs a row for each of the {num_samples} samples of this rank, and has {shape[0]}"
        else:
            continue
        faults.append(Fault("posterior.family", f"{family.name}, slot {name}", rule, "Change its slots()"))
    if faults:
        raise ConfigError(*faults)
