"""Deep ensemble: each sample index owns a network of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..config import check_field
from ..errors import ConfigError, Fault
from ..noise import Key, Stream
from .base import Posterior, Tally
from .flat import take_gradients


class DeepEnsemble(Posterior):
    """Networks that are trained side by side and averaged (Lakshminarayanan, Pritzel, Blundell, 2017).

    Sample s of the job is member s. A rank holds its own members only, so parameters and gradients are shared
    with the ranks of its data group and with no other; each member trains as if it were alone, to its maximum
    a posteriori under a Gaussian prior.

    Parameters
    ----------
    make_module : callable
        Makes the network; it is called once per member, with torch's global generator keyed by the member, so
        that members start at different weights.
    num_members : int
        Members in the whole job; the number of samples of the step and of the predictive.
    members : sequence of int
        Global indices of the members that this rank holds: ``grid.local_samples(num_members)``.
    seed : int
        Key of the initial weights.
    prior_std : float
        Standard deviation of the prior of each weight, in units of the weight.

    Attributes
    ----------
    members : nn.Parameter
        [local members, number of weights]; what the optimizer updates.
    """

    family = "deep ensemble"
    kl_kind = "point"
    is_replicated = False

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        num_members: int,
        members: Sequence[int],
        *,
        seed: int = 0,
        prior_std: float = 1.0,
    ):
        check_field("posterior.prior_std", prior_std)
        modules = []
        for member in members:
            with Key(seed, Stream.INIT, sample=member).global_generator():
                modules.append(make_module())
        super().__init__(modules[0])
        if self.batch_norms.layers:
            raise ConfigError(
                Fault(
                    "model",
                    type(self.module).__name__,
                    "members would share the running statistics of BatchNorm",
                    "Use GroupNorm or LayerNorm in an ensemble",
                )
            )
        fixed = _fixed_tensors(self.module)
        weights = []
        for module in modules:
            theirs = _fixed_tensors(module)
            if any(not torch.equal(fixed[name], theirs[name]) for name in fixed):
                raise ConfigError(
                    Fault(
                        "model",
                        type(module).__name__,
                        "members differ in frozen weights or buffers, which they would share",
                        "Make those the same for all members, or trainable",
                    )
                )
            named = dict(module.named_parameters())
            weights.append(torch.cat([named[name].detach().reshape(-1) for name in self.point]))
        self._member_parameters = {name: self._named[name] for name in self.point}
        self._point_parameters = []  # the members take the place of the point weights
        self.num_members = num_members
        self._indices = list(members)
        self.precision = prior_std**-2
        self._allocate(members=torch.stack(weights))

    def _lay_out_(self, slots: dict[str, Tensor]) -> None:
        super()._lay_out_(slots)
        self._member_views = [self.point.views(row) for row in self.members.detach()]
        self._grads = [list(self.point.views(row).values()) for row in self._gradients["members"]]
        self.network.use(self._member_views[0])

    @torch.no_grad()
    def draw_(self, key: Key) -> None:
        super().draw_(key)
        self._current = self._indices.index(key.sample)
        with self.network.drawing():
            self.network.use(self._member_views[self._current])

    @torch.no_grad()
    def begin(self, first_example: int = 0) -> None:
        super().begin(first_example)
        take_gradients(list(self._member_parameters.values()))

    @torch.no_grad()
    def accumulate_(self, prior_share: float = 0.0, kl_weight: float = 0.0) -> None:
        for grad, gradient in zip(
            self._grads[self._current], take_gradients(list(self._member_parameters.values()))
        ):
            if gradient is not None:
                grad.add_(gradient)
        member = self.members[self._current]
        self.tally[Tally.CROSS_ENTROPY] += prior_share * 0.5 * self.precision * torch.dot(member, member)

    @torch.no_grad()
    def attach_gradients_(self) -> None:
        self._gradients["members"].mul_(self.num_members)  # the objective is a mean over members
        super().attach_gradients_()

    @torch.no_grad()
    def add_kl_gradient_(self, weight: float) -> Tensor:
        """Add the gradient of -log prior, and return its mean over the members of the job (nats, no constant)."""
        self._gradients["members"].add_(self.members, alpha=weight * self.precision)
        return self.tally[Tally.CROSS_ENTROPY].clone()

    @torch.no_grad()
    def clip_gradient_(self, max_norm: float) -> None:
        """Scale the gradient of each member down: they train alone. Local."""
        gradient = self._gradients["members"]
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        gradient.mul_((max_norm / (norms + 1e-6)).clamp(max=1))

    def kl(self) -> Tensor:
        raise NotImplementedError("points have no KL")

    def use_mean_(self) -> nn.Module:
        raise NotImplementedError("an ensemble has no mean network")

    def check_num_samples(self, num_samples: int) -> None:
        if num_samples != self.num_members:
            raise ConfigError(
                Fault(
                    "num_samples",
                    num_samples,
                    f"an ensemble of {self.num_members} members has that many samples, in training and for tests",
                    f"Set <num_samples> and <num_test_samples> to {self.num_members}",
                )
            )

    def _views(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return views by ``members.K.NAME``, for the members of this rank."""
        views = {}
        for member, row in zip(self._indices, slots["members"]):
            views |= {f"members.{member}.{name}": view for name, view in self.point.views(row).items()}
        return views


def _fixed_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what training does not change: frozen parameters and buffers."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | dict(module.named_buffers())
