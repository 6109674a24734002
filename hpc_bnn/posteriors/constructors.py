"""The posteriors by their usual names: a `Posterior` of a family each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import ConfigError, Fault, check_kind, count
from ..noise import Key, Stream
from .families import Dropout, Ensemble, LowRank, MeanField, Point
from .layout import FlatLayout
from .network import Output
from .posterior import Posterior
from .priors import GaussianPrior, Prior
from .select import Rule, split_weights


class MeanFieldGaussian(Posterior):
    """Independent Gaussian over each random weight of a module.

    A sample of the weights is ``w = loc + exp(log_scale) * eps`` (Blundell et al., Weight Uncertainty in Neural Networks,
    2015). Memory does not grow with the number of samples.

    Parameters
    ----------
    module, prior : nn.Module, Prior
        Any module, already on its device and in its dtype, whose weights are the initial ``loc``; and the prior of each
        weight: ``GaussianPrior(mean="initial")`` centres it on a pretrained network.
    init_std : float
        Standard deviation of each weight at the start, in units of the weight.
    init_std_relative : float, optional
        Instead: standard deviation as this fraction of the weight's magnitude, the scale of MOPED
        (Krishnan et al., Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes,
        2020); at least 1e-6 of the largest weight.
    deterministic : str or module class, or sequence of them
        Weights that stay points (`split_weights`); by default those of normalisation layers and embeddings.
    **options
        Of `Posterior`: ``estimator``, ``antithetic``, ``output``, ``keeps_noise``.

    Attributes
    ----------
    loc, log_scale, points : nn.Parameter
        [P], [P] and [number of point weights]; what the optimizer updates.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prior: Prior = GaussianPrior(),
        init_std: float = 0.01,
        init_std_relative: float | None = None,
        deterministic: Rule | Sequence[Rule] = ("norm", "embedding"),
        **options: Any,
    ):
        family = MeanField(prior, init_std, init_std_relative)
        super().__init__(module, family, deterministic=deterministic, **options)


class LowRankGaussian(Posterior):
    """Gaussian whose covariance is diagonal plus low rank: weights vary together in a few directions.

    ``w = loc + scale (eps + z F)`` with ``F = directions / sqrt(P)``: see `families.LowRank`.

    Parameters
    ----------
    rank : int
        Rank of the factor F, R.
    module, prior, init_std, init_std_relative, deterministic, **options
        As for `MeanFieldGaussian`; there is no other estimator than reparameterisation.

    Attributes
    ----------
    loc, log_scale, directions, points : nn.Parameter
        [P], [P], [R, P] and [number of point weights]; what the optimizer updates.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        rank: int = 4,
        prior: Prior = GaussianPrior(),
        init_std: float = 0.01,
        init_std_relative: float | None = None,
        deterministic: Rule | Sequence[Rule] = ("norm", "embedding"),
        **options: Any,
    ):
        family = LowRank(rank, prior, init_std, init_std_relative)
        super().__init__(module, family, deterministic=deterministic, **options)

    @property
    def factor(self) -> Tensor:
        """F, [R, P], relative to the scale. Local."""
        return self.directions * self.directions.shape[1] ** -0.5


class MCDropout(Posterior):
    """Dropout as a variational posterior: all weights are points, and a sample is a mask per dropout layer.

    The masks are keyed by the global sample index and shared by the examples of a batch (`DropoutMasks`), in training
    and for the predictive.

    Parameters
    ----------
    module, output
        See `Posterior`; with at least one dropout layer of p > 0.
    prior_std : float
        Standard deviation of the prior of each weight, in units of the weight.
    """

    def __init__(self, module: nn.Module, *, prior_std: float = 1.0, output: Output = None):
        rates = _rates(module.modules())
        name = type(module).__name__
        if not rates:
            raise ConfigError(Fault("model", name, "it has no dropout layer with p > 0", "Add nn.Dropout(0.1)"))
        if len(rates) > 1:
            rule = "all dropout layers must have the same rate for the weight decay"
            raise ConfigError(Fault("model", sorted(rates), rule, "Use one rate"))
        self._rates = set(rates)
        super().__init__(module, Dropout(rates.pop(), prior_std), output=output)
        self.network.dropout.always = True

    def check_(self) -> None:  # noqa: D102
        super().check_()
        if (rates := _rates(self.network.layers)) != self._rates:
            rule = f"the rate of its dropout was changed from {self._rates} to {rates or 0}, and the prior goes by the first"
            remedy = "Make the posterior anew"
            raise ConfigError(Fault("model", type(self.module).__name__, rule, remedy))


class DeepEnsemble(Posterior):
    """Networks that are trained side by side and averaged (Lakshminarayanan, Pritzel, Blundell, 2017).

    Sample s of the job is member s. A rank holds its own members only, so parameters and gradients are shared
    with the ranks of its data group and with no other; each member trains as if it were alone, to its maximum
    a posteriori under a Gaussian prior.

    Parameters
    ----------
    make_module : callable
        Makes the network; it is called once per member, with torch's global generator keyed by ``seed`` and the member, so
        that members start at different weights.
    num_members, members : int, sequence of int
        Members in the whole job, the number of samples of the step and of the predictive; and global indices of those that
        this rank holds: ``grid.local_samples(num_members)``.
    seed, prior_std, output
        Key of the initial weights; as for `MCDropout`.

    Attributes
    ----------
    members : nn.Parameter
        [local members, number of weights]; what the optimizer updates.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        num_members: int,
        members: Sequence[int],
        *,
        seed: int = 0,
        prior_std: float = 1.0,
        output: Output = None,
    ):

        def make(member: int) -> nn.Module:
            with Key(seed, Stream.INIT, sample=member).global_generator():
                return make_module()

        if isinstance(make_module, nn.Module) or not callable(make_module):
            rule = f"it is a {type(make_module).__name__}, and each member needs a network of its own"
            raise ConfigError(Fault("make_module", "of another kind", rule, "Give what makes it: lambda: Net()"))
        count("Try 4").check("num_members", num_members)
        remedy = "Give comm.grid.local_samples(num_members)"
        check_kind("members", members, Sequence, remedy)
        if not members or not 0 <= min(members) <= max(members) < num_members:
            rule = f"there must be one or more, of 0 to {num_members - 1}"
            raise ConfigError(Fault("members", list(members), rule, remedy))
        modules = [make(member) for member in members]
        fixed = _fixed_tensors(modules[0])
        order = FlatLayout.of(split_weights(modules[0], ())[0])
        shapes = [{name: p.shape for name, p in module.named_parameters()} for module in modules]
        if any(other != shapes[0] for other in shapes):
            rule, remedy = "members differ in the names or shapes of their weights", "Make the same network each time"
            raise ConfigError(Fault("model", type(modules[0]).__name__, rule, remedy))
        for module in modules:
            theirs = _fixed_tensors(module)
            if any(not torch.equal(fixed[name], theirs[name]) for name in fixed):
                rule = "members differ in frozen weights or buffers, which they would share"
                remedy = "Make those the same for all members, or trainable"
                raise ConfigError(Fault("model", type(module).__name__, rule, remedy))
        weights = torch.stack([order.flatten(split_weights(module, ())[0]) for module in modules])
        has_numbers = type(weights) is Tensor and not weights.is_meta  # not in a rehearsal
        others = weights[1:] if has_numbers else ()
        if has_numbers and len(members) == 1 < num_members and members[0] == 0:  # who says what there is to say
            others = order.flatten(split_weights(make(1), ())[0])[None]
        super().__init__(modules[0], Ensemble(num_members, prior_std), samples=members, weights=weights, output=output)
        if any(torch.equal(weights[0], other) for other in others):
            self.network.notes.append(
                "members of the ensemble start from equal weights: without dropout or views of their own they stay equal for "
                "ever. Let make_module make a new network from torch's global generator, and neither seed nor load weights"
            )


class DeterministicNetwork(Posterior):
    """A posterior of one point: the ordinary network, for comparison, on the same process grid."""

    def __init__(self, module: nn.Module, *, output: Output = None):
        super().__init__(module, Point(), output=output)


def _rates(layers: Iterable[nn.Module]) -> set[float]:
    return {layer.p for layer in layers if isinstance(layer, _DropoutNd) and layer.p > 0}


def _fixed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what training does not change: frozen parameters and buffers."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | dict(module.named_buffers())
