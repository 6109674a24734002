"""A check-up of a posterior after training: what each weight tensor has learned beyond its prior, and the mean network."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..posteriors import DeterministicNetwork, Posterior

AT_PRIOR = 0.01
"""KL (nats) below which a weight counts as at its prior.

By Pinsker's inequality the total variation is then below 0.071: whoever sees one draw guesses right, prior or posterior, in at
most 53.5 % of cases. For a Gaussian prior: sigma is within 10 % of the prior's, and mu within 0.14 prior sigmas of its mean.
"""

BINS = -3.0, 3.0, 48
"""Ends (log10) and number of the bins of the signal-to-noise ratio; the outermost bins also hold what is beyond them."""

QUANTILES = {"snr_05": 0.05, "snr_median": 0.5, "snr_95": 0.95}

KLS = {
    "closed form": "KL(q || prior) is {:.6g} nats, in closed form.",
    "Monte Carlo": "KL(q || prior) is {:.6g} nats, by a quadrature; the training has a Monte Carlo estimate of it.",
    "point": "The column KL is -log prior of the points without its constant, {:.6g} nats, mean over the members: no KL.",
    "none": "",
}
"""What the column ``kl`` is, by `hpc_bnn.capabilities.Capabilities.kl`."""


@torch.no_grad()
def check_up(posterior: Posterior, comm: GridComm) -> dict[str, Any]:
    """Return what a posterior knows of its weights, by tensor, as plain numbers, texts and lists; the same on all ranks.

    Collective over ``sample_comm`` where the weights are rows that belong to samples (two sums of each tensor); otherwise
    Local. It passes over the parameters once, in float64, tensor by tensor.

    Parameters
    ----------
    posterior : Posterior
        As it is now. The row ``train/kl`` of a run is of its last step, before the update.

    Returns
    -------
    dict of str to object
        ``family``; ``kl`` (nats, the sum) and ``coupling`` (nats, the part of it that belongs to no tensor: the total
        correlation of a low-rank Gaussian), None where there is none; ``at_prior`` [0, 1], share of the random weights whose
        KL is less than `AT_PRIOR` above the least KL that the family can have; ``notes``, sentences on what the numbers are.

        ``tensors``: columns, a list of one value for each tensor: ``name``; ``kind``, "random" or "point"; ``num_weights``;
        ``rms``, root mean square of the means (units of the weights); ``kl``, ``kl_per_weight`` (nats); ``at_prior``;
        ``snr_05``, ``snr_median``, ``snr_95``, quantiles of the signal-to-noise ratio ``|mu| / sigma`` of its weights
        (Blundell et al., Weight Uncertainty in Neural Networks, 2015). Where sigma does not exist, None.

        ``snr``: ``log10_edges`` [49] and ``counts`` [48] of the ratio over all random weights; empty without sigma.
    """
    family, slots, can = posterior.family_, posterior.buffer.values, posterior.capabilities
    least = family.least_kl(slots)
    counts = torch.zeros(BINS[2], dtype=torch.int64)
    lines, num_at_prior, why = [], 0, None
    for kind, layout in (("random", posterior.random), ("point", posterior.point)):
        start = 0
        for name, shape in layout.shapes.items():
            span = slice(start, start := start + shape.numel())
            if not shape.numel():
                continue
            line: dict[str, Any] = {"name": name, "kind": kind, "num_weights": shape.numel()}
            mean = sigma = kl = None
            if kind == "point":
                mean = slots["points"][span].double()
                kl = None if can.has_random_weights else family.kl_by_weight(slots, span)
            elif can.owner == "sample":
                mean, sigma, kl = _over_rows(posterior, comm, span)
            else:
                kl = family.kl_by_weight(slots, span)
                try:
                    mean, sigma = (numbers.double() for numbers in family.marginals(slots, span))
                except NotImplementedError as error:
                    why = str(error)
            line["rms"] = None if mean is None else mean.square().mean().sqrt().item()
            line["kl"], line["kl_per_weight"] = (None, None) if kl is None else (kl.sum().item(), kl.mean().item())
            count = None if kl is None or least is None else (kl < least + AT_PRIOR).sum().item()
            line["at_prior"] = None if count is None else count / shape.numel()
            num_at_prior += count or 0
            line |= dict.fromkeys(QUANTILES)
            if mean is not None and sigma is not None:
                ratio = (mean.abs() / sigma).nan_to_num(0.0, posinf=math.inf).sort().values
                at = {name: ratio[round(q * (len(ratio) - 1))].item() for name, q in QUANTILES.items()}
                line |= {name: value if math.isfinite(value) else None for name, value in at.items()}
                low, high, num_bins = BINS
                places = ((ratio.log10() - low) * (num_bins / (high - low))).floor().clamp(0, num_bins - 1)
                counts += places.long().bincount(minlength=num_bins).cpu()
            lines.append(line)
    order = [name for name, _ in posterior.module.named_parameters()]
    lines.sort(key=lambda line: order.index(line["name"]))
    kls, coupling = [line["kl"] for line in lines if line["kl"] is not None], family.coupling(slots).item()
    total = math.fsum(kls) + coupling if kls else None
    notes = ["The family has no KL, or does not say it by weight." if total is None else KLS[can.kl].format(total)]
    if coupling:
        of_all = f"{coupling:.4g} nats are their total correlation."
        notes.append(f"The KL of a tensor is that of its weights one by one; {of_all}")
    share = None if least is None or not posterior.num_weights else num_at_prior / posterior.num_weights
    if share is not None:
        notes.append(
            f"{share:.1%} of the random weights are at their prior: their KL is less than {AT_PRIOR} nats above the least "
            "that a weight can have."
        )
    if can.owner == "sample" and counts.any():
        notes.append("mu and sigma are mean and standard deviation over the members, which may have swapped units.")
    elif not can.has_random_weights:
        notes.append("The weights are points: there is no sigma, and a KL is their weight decay, up to a constant.")
    elif not counts.any():
        why = why or "that takes several members, and a family that names its rest_slot"
        notes.append(f"There is no sigma: {why}.")
    low, high, num_bins = BINS
    edges = [low + (high - low) * number / num_bins for number in range(num_bins + 1)]
    return {
        "family": posterior.family,
        "kl": total,
        "coupling": coupling or None,
        "at_prior": share,
        "notes": notes,
        "tensors": {name: [line[name] for line in lines] for name in (lines[0] if lines else ())},
        "snr": {"log10_edges": edges, "counts": counts.tolist()} if counts.any() else {},
    }


def _over_rows(posterior: Posterior, comm: GridComm, span: slice) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return mean, standard deviation, mean part of the KL, [n] over rows, or None. Collective over ``sample_comm``."""
    rows = posterior.buffer.values.get(posterior.family_.rest_slot)
    if rows is None:
        return None, None, None
    rows, kl = rows[:, span].double(), posterior.family_.kl_by_weight(posterior.buffer.values, span)
    count = torch.full((1,), float(len(rows))).to(rows)
    sums = [rows.sum(0), count, *([] if kl is None else [kl.sum(0)])]
    comm.sum_(sums, "sample")
    mean = sums[0] / count
    squares = (rows - mean).square().sum(0)  # not from the sum of squares: it would be a small difference
    comm.sum_(squares, "sample")
    sigma = (squares / (count - 1)).sqrt() if count.item() > 1 else None
    return mean, sigma, None if kl is None else sums[2] / count


def mean_network(posterior: Posterior) -> DeterministicNetwork:
    """Return a copy of the network at the posterior mean of its weights, as a posterior of one sample. Local.

    Of MC dropout it is the network without masks. `NotImplementedError` where a family has no mean network, as an ensemble.
    """
    return DeterministicNetwork(copy.deepcopy(posterior.use_mean_()), output=posterior.network.output)
