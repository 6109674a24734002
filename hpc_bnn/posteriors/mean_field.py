"""Mean-field Gaussian posterior."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Estimator, check_field
from ..errors import ConfigError, Fault
from ..noise import Key
from .base import Posterior, Tally
from .estimators import (
    ExampleNoise,
    find_layers,
    flipout_forward,
    local_forward,
    override_forward,
)
from .flat import FlatLayout, Part, take_gradients
from .network import eval_mode
from .priors import GaussianPrior, Prior, gaussian_entropy
from .select import Rule


class MeanFieldGaussian(Posterior):
    """Independent Gaussian over each random weight of a module.

    A sample of the weights is ``w = loc + exp(log_scale) * eps`` with one flat draw of ``eps``, put where
    the module's parameters look. Gradients of all samples are accumulated in one flat buffer, so memory
    does not grow with the number of samples (Blundell et al., Weight Uncertainty in Neural Networks, 2015,
    for the gradient; the flat buffer is ours).

    Parameters
    ----------
    module : nn.Module
        Any module, already on its device and in its dtype. Its weights are the initial ``loc``.
    prior : Prior
        Prior of each weight. ``GaussianPrior(mean="initial")`` centres it on a pretrained network.
    init_std : float
        Standard deviation of each weight at the start, in units of the weight.
    init_std_relative : float, optional
        Instead: standard deviation as this fraction of the weight's magnitude, the scale of MOPED
        (Krishnan et al., Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes,
        2020); at least 1e-6 of the largest weight.
    deterministic : sequence of str or module class
        Weights that stay points (`split_weights`); by default those of normalisation layers and embeddings.
    estimator : {"reparameterisation", "local", "flipout"}
        How the gradient is estimated (`hpc_bnn.posteriors.estimators`): one draw of the weights per sample, or
        noise per example where the layer allows, with less variance. Layers that do not allow it fall back
        to one draw per sample, which is said. The predictive always draws weights.
    antithetic : bool
        Samples 2 i and 2 i + 1 share their noise with opposite signs: half the noise to draw, and the odd
        part of the estimator's error cancels in a pair.

    Attributes
    ----------
    loc, log_scale, points : nn.Parameter
        [P], [P] and [number of point weights]; what the optimizer updates.
    """

    family = "mean-field Gaussian"
    has_random_weights = True

    def __init__(
        self,
        module: nn.Module,
        *,
        prior: Prior = GaussianPrior(),
        init_std: float = 0.01,
        init_std_relative: float | None = None,
        deterministic: Sequence[Rule] = ("norm", "embedding"),
        estimator: Estimator = "reparameterisation",
        antithetic: bool = False,
    ):
        super().__init__(module, deterministic=deterministic)
        weights = torch.cat([p.detach().reshape(-1) for p in self._random_parameters])
        self.prior = prior.bind(self.random, weights)
        self.kl_kind = "closed form" if prior.closed_form else "Monte Carlo"
        self.antithetic = antithetic
        self.estimator = estimator
        check_field("posterior.estimator", estimator)
        if estimator != "reparameterisation" and (antithetic or not prior.closed_form):
            raise ConfigError(
                Fault(
                    "posterior.estimator",
                    estimator,
                    "noise per example has no mirrored pairs and no single draw for a Monte Carlo KL",
                    "Use reparameterisation, or antithetic false and a Gaussian or Laplace prior",
                )
            )
        log_scale = _initial_log_scale(weights, init_std, init_std_relative)
        self._allocate(loc=weights, log_scale=log_scale, **self._more_slots(log_scale.exp()))

    def _lay_out_(self, slots: dict[str, Tensor]) -> None:
        super()._lay_out_(slots)
        self._weights = torch.cat([p.detach().reshape(-1) for p in self._random_parameters])
        self._scale = self.log_scale.detach().exp()
        self._all_noise = self._weights.new_zeros(self.num_weights + self._num_common_noise)
        self._noise = self._all_noise[: self.num_weights]
        self._pair: int | None = None
        self._loc_grads = list(self.random.views(self._gradients["loc"]).values())
        self._scale_grads = list(self.random.views(self._gradients["log_scale"]).values())
        self._noise_views = list(self.random.views(self._noise).values())
        self.network.use(self.random.views(self._weights))
        self._parts, self._completed = [self.random.part(0, len(self.random))], set()
        self._see, self._num_early = lambda number, num_gradients: None, 0
        self._forget_leaves_()
        self._noisy = _NoisyLayers(self) if self.estimator != "reparameterisation" else None

    _num_common_noise = 0
    """Numbers of a sample's noise that all weights share, drawn behind those of the single weights."""

    def _more_slots(self, scale: Tensor) -> dict[str, Tensor]:
        """Return slots of a family's own, as they start."""
        return {}

    # --- one step ---------------------------------------------------------------------------------

    def prepare_(self, x: Tensor) -> None:
        if self._noisy is not None and not self._noisy.layers:
            self._noisy.find_(x)

    @torch.no_grad()
    def begin(self, first_example: int = 0) -> None:
        super().begin(first_example)
        if self._noisy is not None:
            self._noisy.begin_()
            self._noisy.noise.first_example = first_example
        torch.exp(self.log_scale, out=self._scale)
        self._pair = None
        self._completed.clear()

    @torch.no_grad()
    def draw_(self, key: Key) -> None:
        super().draw_(key)
        if self._noisy is None or self._noisy.needs_weights:
            self._draw_noise_(key)
            with self.network.drawing():
                self._assemble(self._all_noise, out=self._weights)
        if self._noisy is not None:
            self._noisy.begin_sample_(key)

    def _assemble(self, noise: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weights of a sample, [P], from its noise."""
        return torch.addcmul(self.loc, self._scale, noise[: self.num_weights], out=out)

    def _draw_noise_(self, key: Key) -> None:
        """Fill the noise buffer for a sample; the second of an antithetic pair turns the first's around."""
        if not self.antithetic:
            self._all_noise.normal_(generator=key.generator(self._all_noise.device))
            return
        pair, is_mirror = divmod(key.sample, 2)
        if self._pair == pair and is_mirror:
            self._all_noise.neg_()
        else:
            self._all_noise.normal_(generator=key.of(2 * pair).generator(self._all_noise.device))
            if is_mirror:
                self._all_noise.neg_()
        self._pair = pair if not is_mirror else None

    @torch.no_grad()
    def accumulate_(self, prior_share: float = 0.0, kl_weight: float = 0.0) -> None:
        # With g = dL/dw of the sample: d loc += g, d log_scale += g * eps (times scale in finish_).
        if self._noisy is not None:
            self._noisy.accumulate_()
        self._fold_weights_(slice(None))
        if prior_share and not self.prior.closed_form:
            self.tally[Tally.CROSS_ENTROPY] -= prior_share * self.prior.log_prob(self._weights)
            score = self.prior.score(self._weights).mul_(-prior_share * kl_weight)
            self._accumulate_flat_(score[None], self._all_noise[None])
        super().accumulate_()

    def _fold_weights_(self, numbers: slice) -> None:
        all_gradients = take_gradients(self._random_parameters[numbers])
        used = [gradient is not None for gradient in all_gradients]
        gradients, loc, scale, noise = (
            list(itertools.compress(parts, used))
            for parts in (
                all_gradients,
                self._loc_grads[numbers],
                self._scale_grads[numbers],
                self._noise_views[numbers],
            )
        )
        if gradients:
            torch._foreach_add_(loc, gradients)
            torch._foreach_addcmul_(scale, gradients, noise)
            self._accumulate_common_(used, gradients)

    def _accumulate_common_(self, used: list[bool], gradients: list[Tensor]) -> None:
        """Fold the gradients of the used weights into slots of a family's own."""

    @torch.no_grad()
    def finish_(self, batch_norm_share: float = 1.0) -> None:
        for part in self._parts:
            if part.place.start not in self._completed:
                self._finish_part_(part)
        if self._noisy is not None:
            self._noisy.switch_(on=False)  # a user who calls or copies the module meets its own layers
        super().finish_(batch_norm_share)

    def _finish_part_(self, part: Part) -> Tensor:
        return self._gradients["log_scale"][part.place].mul_(self._scale[part.place])

    def why_indivisible(self) -> str | None:
        if type(self) is not MeanFieldGaussian:
            return super().why_indivisible()
        if not self.prior.closed_form:
            return "a Monte Carlo KL adds to all weights after the backward pass"
        if self._noisy is not None:
            return f"not for the estimator {self.estimator}"
        return self._why_batch_norm_is_in_the_way()

    def divide_(self, num_bytes: int, see: Callable[[int, int], None]) -> list[Part]:
        self._see = see
        return super().divide_(num_bytes, see)

    def _divide(self, num_elements: int) -> list[Part]:
        early, rest = self.random.divide(num_elements // 2)  # means and scales
        self._parts, self._num_early = [*early, *rest], len(early)
        return early

    def parameters_of(self, part: Part) -> list[nn.Parameter]:
        return self._random_parameters[part.numbers]

    @torch.no_grad()
    def complete_(self, part: Part) -> list[Tensor]:
        self._fold_weights_(part.numbers)
        self._fold_leaf_(part)
        self._completed.add(part.place.start)
        return [self._gradients["loc"][part.place], self._finish_part_(part)]

    @torch.no_grad()
    def add_kl_gradient_(self, weight: float) -> Tensor:
        loc_grad, log_scale_grad = self._gradients["loc"], self._gradients["log_scale"]
        if self.prior.closed_form:
            self.prior.add_kl_gradient_(loc_grad, log_scale_grad, self.loc, self._scale, weight)
            return self.prior.kl_from_gaussian(self.loc, self.log_scale, self._scale)
        log_scale_grad.sub_(weight)  # of the entropy; that of the cross entropy came with the samples
        return self.tally[Tally.CROSS_ENTROPY] - gaussian_entropy(self.log_scale)

    @torch.no_grad()
    def use_mean_(self) -> nn.Module:
        module = super().use_mean_()
        with self.network.drawing():
            self._weights.copy_(self.loc)
        self.network.leave_weights()
        return module

    def check_(self) -> None:
        if self._noisy is not None:
            self._noisy.switch_(on=False)  # as `finish_` left it, also after a step that did not come so far
        super().check_()

    def _state(self) -> dict[str, Any]:
        if self._noisy is not None:
            self._noisy.switch_(on=False)
        return super()._state()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            if self._noisy is not None:
                self._noisy.switch_(on=False)
            yield

    def check_batchable(self) -> None:
        super().check_batchable()
        if self._noisy is not None:
            raise NotImplementedError(f"the {self.estimator} estimator evaluates samples one after another")

    # --- samples in batches -----------------------------------------------------------------------

    @torch.no_grad()
    def draw_chunk(self, samples: Sequence[int], key: Key) -> list[tuple[FlatLayout, Tensor]]:
        """Return the random weights of some samples: layouts, and leaves [len(samples), P_i] that want a gradient. Local.

        One for all weights, or one for each part where they are divided (`divide_`).
        """
        self._forget_leaves_()
        self._chunk_noise = self._all_noise.new_empty(len(samples), len(self._all_noise))
        weights = self.loc.new_empty(len(samples), self.num_weights)
        for sample, noise, row in zip(samples, self._chunk_noise, weights):
            self._draw_noise_(key.of(sample))
            noise.copy_(self._all_noise)
            self._assemble(noise, out=row)
        self._chunk_weights = weights
        self._leaves = {
            part.place.start: weights[:, part.place].detach().requires_grad_() for part in self._parts
        }
        for number, part in enumerate(self._parts[: self._num_early]):
            self._leaves[part.place.start].register_post_accumulate_grad_hook(
                lambda _, number=number, part=part: self._see(number, len(part.layout))
            )
        return [(part.layout, self._leaves[part.place.start]) for part in self._parts]

    @torch.no_grad()
    def accumulate_chunk_(self, prior_share: float = 0.0, kl_weight: float = 0.0) -> None:
        """Fold in the gradients of what `draw_chunk` returned (see `accumulate_`). Local."""
        for part in self._parts:
            self._fold_leaf_(part)
        if prior_share and not self.prior.closed_form:
            for row in self._chunk_weights:
                self.tally[Tally.CROSS_ENTROPY] -= prior_share * self.prior.log_prob(row)
            score = self.prior.score(self._chunk_weights).mul_(-prior_share * kl_weight)
            self._accumulate_flat_(score, self._chunk_noise)
        self._forget_leaves_()
        Posterior.accumulate_(self)

    def _fold_leaf_(self, part: Part) -> None:
        leaf = self._leaves.get(part.place.start)
        if leaf is not None and leaf.grad is not None:
            gradient, leaf.grad = leaf.grad, None
            self._accumulate_flat_(gradient, self._chunk_noise, part.place)

    def _accumulate_flat_(self, gradient: Tensor, noise: Tensor, place: slice = slice(None)) -> None:
        """Fold in gradients [c, n] of the weights at a place, of c samples with noise [c, P + common]."""
        self._gradients["loc"][place].add_(gradient.sum(0))
        mine = noise[:, : self.num_weights][:, place]
        self._gradients["log_scale"][place].add_((gradient * mine).sum(0))

    def forget_chunk_(self) -> None:
        super().forget_chunk_()
        self._forget_leaves_()

    def _forget_leaves_(self) -> None:
        self._leaves: dict[int, Tensor] = {}
        self._chunk_weights = self._weights[:0]

    # --- state --------------------------------------------------------------------------------------

    def _views(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        loc, log_scale = (self.random.views(slots[slot]) for slot in ("loc", "log_scale"))
        views = {f"{name}.loc": value for name, value in loc.items()}
        views |= {f"{name}.log_scale": value for name, value in log_scale.items()}
        return views | super()._views(slots)


class _NoisyLayers:
    """The layers of a mean-field posterior that meet noise per example in training.

    Their parameters then look at the means, so that the gradient of a weight is that of its mean; the gradient
    of its scale comes by a leaf of its own.
    """

    def __init__(self, posterior: MeanFieldGaussian):
        self.posterior = posterior
        self.noise = ExampleNoise()
        self._is_on = False
        self.layers: list[nn.Module] = []
        self._forwards: list = []
        self._parameters: dict[str, nn.Parameter] = {}  # that look at the means
        self._leaves: dict[str, Tensor] = {}  # [*shape]: scale (local) or perturbation (flipout)

    def find_(self, x: Tensor) -> None:
        """See in a forward pass which layers allow it, and take them over. Local."""
        posterior = self.posterior
        random = {id(p): name for name, p in posterior._named.items() if name in posterior.random.shapes}
        before = posterior.network.traces()
        with eval_mode(posterior.module), torch.no_grad():
            layers, left = find_layers(
                posterior.module,
                posterior.estimator,
                set(random),
                len(x),
                lambda: posterior.network(x.clone()),
            )
        before.put_back()
        if left:
            posterior.network.notes.append(
                f"the {posterior.estimator} estimator is not exact for, or does not know, the layers of "
                f"{', '.join(left)}: their weights are drawn once per sample"
            )
        self.layers = list(layers.values())
        scales = posterior.random.views(posterior._scale)
        for number, layer in enumerate(self.layers):
            weight, bias = random[id(layer.weight)], layer.bias is not None and random[id(layer.bias)]
            if posterior.estimator == "local":
                names = [weight] + ([bias] if bias else [])
                leaves = [scales[name].detach().requires_grad_() for name in names]
                forward = local_forward(number, self.noise, leaves[0], leaves[1] if bias else None)
            else:  # the bias is added outside of the signs: it is drawn once per sample
                names, leaves = [weight], [torch.zeros_like(scales[weight]).requires_grad_()]
                forward = flipout_forward(number, self.noise, leaves[0])
            self._forwards.append(forward)
            self._leaves |= dict(zip(names, leaves))
            self._parameters |= {name: posterior._named[name] for name in names}

    def begin_(self) -> None:
        """Begin a step: take the layers over. Local."""
        self.switch_(on=True)

    @property
    def needs_weights(self) -> bool:
        """Whether a draw of the weights is looked at; with local reparameterisation everywhere it is not."""
        is_local = self.posterior.estimator == "local"
        return not (self._is_on and is_local and len(self._leaves) == len(self.posterior.random))

    def switch_(self, on: bool) -> None:
        """Take the layers over, or give them their own forwards and the drawn weights back. Local."""
        if on is self._is_on:
            return
        self._is_on = on
        for layer, forward in zip(self.layers, self._forwards):
            override_forward(layer, forward if on else None)
        source = self.posterior.loc.detach() if on else self.posterior._weights
        views = self.posterior.random.views(source)
        self.posterior.network.use({name: views[name] for name in self._parameters})

    def begin_sample_(self, key: Key) -> None:
        self.noise.begin_sample(key)
        if self.posterior.estimator == "flipout":
            noise, scales = (
                self.posterior.random.views(t) for t in (self.posterior._noise, self.posterior._scale)
            )
            for name, leaf in self._leaves.items():
                torch.mul(noise[name], scales[name], out=leaf.detach())

    def accumulate_(self) -> None:
        """Fold in the gradients of means and leaves; the rest of the weights find no gradient there."""
        posterior = self.posterior
        loc, scale, noise = (
            posterior.random.views(t)
            for t in (posterior._gradients["loc"], posterior._gradients["log_scale"], posterior._noise)
        )
        for name, leaf in self._leaves.items():
            parameter = self._parameters[name]
            if parameter.grad is not None:
                loc[name].add_(parameter.grad)
                parameter.grad = None
            if leaf.grad is not None:
                # local: dL/dscale; flipout: dL/d(scale * eps)
                scale[name].add_(leaf.grad if posterior.estimator == "local" else leaf.grad * noise[name])
                leaf.grad = None


def _initial_log_scale(weights: Tensor, std: float, relative: float | None) -> Tensor:
    check_field("posterior.init_std", std)
    check_field("posterior.init_std_relative", relative)
    if relative is None:
        return torch.full_like(weights, math.log(std))
    magnitude = weights.abs()
    return (relative * magnitude.clamp_min(1e-6 * magnitude.max())).log()
