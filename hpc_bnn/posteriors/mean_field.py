"""Mean-field Gaussian posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import ConfigError, Fault
from .flat import FlatLayout, take_gradients, tie
from .priors import GaussianPrior


class MeanFieldGaussian:
    """Independent Gaussian over each trainable weight of a module.

    A sample of the weights is ``w = loc + exp(log_scale) * eps`` with one flat draw of ``eps``, put
    where the module's parameters look: they are views of one flat buffer, and the module is called
    unchanged. Gradients of all samples are accumulated in one flat buffer, so memory does not grow
    with the number of samples (Blundell et al., Weight Uncertainty in Neural Networks, 2015, for the
    gradient; the flat buffer is ours).

    The life of a step::

        posterior.begin()                       # zero the gradient buffer
        for each sample:
            posterior.draw_(generator)          # put the sample into the module
            loss(posterior.module(x)).backward()
            posterior.accumulate_()             # fold the gradients of this sample in
        posterior.finish_()                     # .grad of loc and log_scale is complete
        posterior.add_kl_gradient_(weight)

    Parameters
    ----------
    module : nn.Module
        Any module, already on its device and in its dtype. Its weights are the initial ``loc``. It is
        used in place: its parameters become views of this object's buffers.
    prior : GaussianPrior
        Prior of each weight.
    init_std : float
        Standard deviation of each weight at the start, in units of the weight.
    num_tally : int
        Scalars that travel behind the gradient in `reduced` (see `tally`).

    Attributes
    ----------
    loc, log_scale : nn.Parameter
        [P] each; what the optimizer updates.
    reduced : Tensor
        [2 P + num_tally]: gradient of loc, gradient of log_scale, tally. What one collective sums.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        prior: GaussianPrior = GaussianPrior(),
        init_std: float = 0.01,
        num_tally: int = 4,
    ):
        if not (init_std > 0 and math.isfinite(init_std)):
            raise ConfigError(
                Fault("--posterior.init_std", init_std, "a standard deviation is positive", "Try 0.01")
            )
        self.module = module
        self.prior = prior
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ConfigError(
                Fault("--model", type(module).__name__, "the module has no trainable weight", "Unfreeze some")
            )
        kinds = {(p.dtype, p.device) for p in named.values()}
        if len(kinds) > 1:
            raise ConfigError(
                Fault(
                    "--model", type(module).__name__, f"its weights are of several kinds {kinds}", "Use one"
                )
            )
        self.layout = FlatLayout.of(named)
        self._module_parameters = [named[name] for name in self.layout]
        self._weights = torch.cat([p.detach().reshape(-1) for p in self._module_parameters])
        num = self.layout.num_elements
        self._theta = torch.cat([self._weights, torch.full_like(self._weights, math.log(init_std))])
        self.loc = nn.Parameter(self._theta[:num])
        self.log_scale = nn.Parameter(self._theta[num:])
        self._scale = self.log_scale.detach().exp()
        self._noise = torch.zeros_like(self._weights)
        self.reduced = torch.zeros(2 * num + num_tally, dtype=self.loc.dtype, device=self.loc.device)
        self._gradients = self.reduced[:num], self.reduced[num : 2 * num]
        self._loc_grads = list(self.layout.views(self._gradients[0]).values())
        self._scale_grads = list(self.layout.views(self._gradients[1]).values())
        self._noise_views = list(self.layout.views(self._noise).values())
        self.tally = self.reduced[2 * num :]
        tie(named, self.layout.views(self._weights))

    @property
    def num_weights(self) -> int:
        """Number of random weights, P."""
        return self.layout.num_elements

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what an optimizer updates: ``loc`` and ``log_scale``, flat."""
        yield self.loc
        yield self.log_scale

    # --- one step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step or a predictive: look at the parameters as they are now. Local."""
        self.reduced.zero_()
        torch.exp(self.log_scale, out=self._scale)
        take_gradients(self._module_parameters)

    @torch.no_grad()
    def draw_(self, generator: torch.Generator) -> None:
        """Put one sample of the weights into the module. Local.

        Parameters
        ----------
        generator : torch.Generator
            Keyed by the global sample index, on the device of the weights.
        """
        self._noise.normal_(generator=generator)
        torch.addcmul(self.loc, self._scale, self._noise, out=self._weights)

    @torch.no_grad()
    def accumulate_(self) -> None:
        """Fold the weight gradients of the sample drawn last into the gradient buffer. Local.

        With g = dL/dw of the sample: d loc += g, d log_scale += g * eps (times scale in `finish_`).
        """
        gradients = take_gradients(self._module_parameters)
        loc, scale, noise = self._loc_grads, self._scale_grads, self._noise_views
        if any(g is None for g in gradients):  # weights that this forward did not use
            used = [i for i, g in enumerate(gradients) if g is not None]
            gradients, loc, scale, noise = (
                [parts[i] for i in used] for parts in (gradients, loc, scale, noise)
            )
        if gradients:
            torch._foreach_add_(loc, gradients)
            torch._foreach_addcmul_(scale, gradients, noise)

    @torch.no_grad()
    def finish_(self) -> None:
        """Turn the buffer into gradients of ``loc`` and ``log_scale`` and attach them. Local."""
        self._gradients[1].mul_(self._scale)
        self.loc.grad, self.log_scale.grad = self._gradients

    @torch.no_grad()
    def add_kl_gradient_(self, weight: float) -> torch.Tensor:
        """Add ``weight`` times the gradient of the KL, in place, and return the KL (nats). Local.

        The KL is a function of replicated parameters: call it on each rank after the reduction.
        """
        self.prior.add_kl_gradient_(*self._gradients, self.loc, self._scale, weight)
        return self.prior.kl_from_gaussian(self.loc, self.log_scale, self._scale)

    @torch.no_grad()
    def kl(self) -> torch.Tensor:
        """Return KL(q || prior) of all weights (nats, 0-dim tensor). Local."""
        return self.prior.kl_from_gaussian(self.loc, self.log_scale, self.log_scale.exp())

    @torch.no_grad()
    def use_mean_(self) -> nn.Module:
        """Put the posterior mean into the module and return it: the deterministic network. Local."""
        self._weights.copy_(self.loc)
        return self.module

    # --- state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return ``NAME.loc`` and ``NAME.log_scale`` of each weight, and the module's buffers by name."""
        state = {f"{name}.loc": view for name, view in self.layout.views(self.loc.detach()).items()}
        state |= {f"{name}.log_scale": v for name, v in self.layout.views(self.log_scale.detach()).items()}
        return state | dict(self.module.named_buffers())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises
        ------
        ConfigError
            Names or shapes do not fit the module.
        """
        mine = self.state_dict()
        faults = [
            Fault("--model", name, "the checkpoint has another model: this name is on one side only", "")
            for name in sorted(mine.keys() ^ state.keys())
        ]
        faults += [
            Fault(
                "--model",
                name,
                f"shape {tuple(state[name].shape)} in the checkpoint, {tuple(v.shape)} here",
                "",
            )
            for name, v in mine.items()
            if name in state and state[name].shape != v.shape
        ]
        if faults:
            raise ConfigError(*faults)
        for name, value in mine.items():
            value.copy_(state[name])
