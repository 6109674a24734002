"""Draws samples of the weights into a module, and brings their gradients back to the slots of a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Fault
from ..noise import Key
from ..trees import Inputs
from .buffer import StepBuffer, Tally
from .draws import KeptDraw, RedrawnDraw
from .estimators import ESTIMATORS, Estimator
from .families.base import Family, Slots
from .gradients import BatchGradient, ListGradient, SlotViews, WeightGradient
from .layout import Block, take_gradients
from .network import Network, exactly


class Sampler:
    """The way from slots to the weights of samples, and of the gradients of these back; its arguments are `Posterior`'s.

    ``work`` is what `Family.begin_` computes once per step; ``noisy``, if there is one, gives layers noise per example.
    """

    def __init__(
        self, family: Family, network: Network, buffer: StepBuffer, estimator: str, antithetic: bool,
        keeps_noise: bool | None,
    ):  # fmt: skip
        self.family, self.network, self.buffer = family, network, buffer
        self.random, self.point = random, point = buffer.random, buffer.point
        self._random_parameters = [network.parameters[name] for name in random]
        self._point_parameters = [network.parameters[name] for name in point]
        self._weights = network.weights
        self._out = self._weights[None]
        self.work: Slots = {}
        self._views, self._point_views = SlotViews(random), SlotViews(point)
        keeps = self._weights.device.type == "cpu" if keeps_noise is None else keeps_noise
        self._draw = (KeptDraw if keeps else RedrawnDraw)(random, self._weights, antithetic)
        self._whole = {name for name, slot in buffer.slots.items() if not slot.per_weight} | {"points"}
        if isinstance(self._draw, KeptDraw) and len(random):
            self._views.keep(self._draw.single)
        for name, gradient in buffer.grads.items():
            if name == "points":
                self._point_views.keep(gradient)
            elif buffer.slots[name].per_weight and name not in buffer.owned:
                self._views.keep(gradient)
        self._blocks = [random.block(0, len(random))] if len(random) else []
        self._num_early, self._arrived = 0, lambda number, num_gradients: None
        self._cuts: dict[int, tuple[Slots, Slots, Slots, SlotViews]] = {}
        self._rows: dict[tuple[int, ...], tuple[Slots, Slots]] = {}
        self._drawn = buffer.samples[:1]
        kind = ESTIMATORS[estimator]
        self.noisy: Estimator | None = None if kind is None else kind(network, self._views)
        self.forget_()

    def prepare_(self, x: Inputs) -> None:
        """Look at how the module treats inputs like x, before the first step and after changes of the module. Local."""
        if self.noisy is not None and self.noisy.is_due:
            self.forget_()
            self.begin_()
            self.noisy.attach_(self.buffer.values["loc"], self.work["scale"], x)

    def switch_(self, on: bool, first_example: int | Tensor = 0) -> None:
        """Give layers noise per example, from a place in the global batch on; or give them back as they were. Local."""
        if self.noisy is not None:
            self.noisy.switch_(on)
            self.noisy.noise.first_example = first_example

    def begin_(self) -> None:
        """Look at the slots as they are now. Local."""
        former = dict(self.work)
        with exactly(self._weights):
            self.family.begin_(self.buffer.values, self.work)
        # Blocks and estimators keep views of the work: they would go on reading a tensor that has been replaced
        if replaced := [name for name, tensor in former.items() if self.work.get(name) is not tensor]:
            rule = f"its begin_ replaces {', '.join(replaced)} of the work"
            remedy = "Overwrite it in place: torch.exp(..., out=work.setdefault(name, torch.empty_like(...)))"
            raise ConfigError(Fault("posterior.family", self.family.name, rule, remedy))

    def forget_(self) -> None:
        """Forget gradients and what a batch that failed half-way has left behind. Local."""
        take_gradients(self._random_parameters + self._point_parameters)
        if self.noisy is not None:
            self.noisy.forget_()
        self._leaves: dict[str, Tensor] = {}
        self._batch = self._weights[None][:0]

    # --- draws --------------------------------------------------------------------------------------

    def draw_(self, key: Key) -> None:
        """Put the weights of ``key.sample`` into the module. Local."""
        self._drawn = [key.sample]
        if not len(self.random):
            return
        if self.noisy is None or self.noisy.needs_weights:
            self._draw.begin_(key, self._drawn)
            with self.network.drawing():
                self._sample_(self._out)
        if self.noisy is not None and self.noisy.is_attached:  # not on a rank that has had no examples yet
            self.noisy.begin_sample_(key, self._draw, self.work["scale"])

    def draw_batch_(self, samples: Sequence[int], key: Key) -> dict[str, Tensor]:
        """Return the random weights of some samples by name, [len(samples), *shape]: leaves that want a gradient. Local."""
        self.forget_()
        self._drawn = list(samples)
        if not len(self.random):
            return {}
        self._draw.begin_(key, samples)
        self._batch = self._weights.new_empty(len(samples), self.random.num_elements)
        self._sample_(self._batch)
        views = self.random.views(self._batch)
        self._leaves = {name: view.detach().requires_grad_() for name, view in views.items()}
        for number, block in enumerate(self._blocks[: self._num_early]):
            for name in block.layout:
                self._leaves[name].register_post_accumulate_grad_hook(lambda _, number=number: self._arrived(number, 1))
        return self._leaves

    def _sample_(self, out: Tensor) -> None:
        is_predictive = self.network.batch_norms.is_evaluating
        sample_ = self.family.predict_ if is_predictive else self.family.sample_
        with exactly(out):
            sample_(self._of_samples()[0], self.work, self._drawn, self._draw, out)

    def _of_samples(self) -> tuple[Slots, Slots]:
        """Return slots and gradients, cut to the rows of the samples drawn last where they belong to samples. Local."""
        buffer = self.buffer
        if not buffer.owned:
            return buffer.values, buffer.grads
        if (key := tuple(self._drawn)) not in self._rows:
            first = buffer.samples.index(key[0])  # a rank's samples follow each other
            values, grads = (
                {name: t[first : first + len(key)] if name in buffer.owned else t for name, t in of.items()}
                for of in (buffer.values, buffer.grads)
            )
            for name in buffer.owned & grads.keys() if len(key) == 1 else ():
                self._views.keep(grads[name])
            self._rows[key] = values, grads
        return self._rows[key]

    # --- gradients ----------------------------------------------------------------------------------

    def fold_(self, prior_share: float = 0.0, kl_weight: float | Tensor = 0.0) -> None:
        """Fold the weight gradients of the samples drawn last into the gradient buffer (`Posterior.fold_`). Local."""
        if self.noisy is not None:
            self.noisy.fold_(self.buffer.grads, self._draw)
        for block in self._blocks:
            self._fold_block_(block)
        # Where the prior has a score it is taken at the drawn weights, which are still there: [c, P] numbers more
        if prior_share and self.family.capabilities.kl in ("Monte Carlo", "point"):
            log_prior, score = self.family.log_prior(self._batch if self._leaves else self._out)
            self.buffer.tally[Tally.CROSS_ENTROPY] -= prior_share * log_prior
            if score is not None:
                self._pull_back_(BatchGradient([score.mul_(-prior_share * kl_weight)]))
        self._leaves.clear()
        if "points" in self.buffer.grads:
            points = ListGradient(take_gradients(self._point_parameters), self._point_views)
            points.add_to(self.buffer.grads["points"])

    def _fold_block_(self, block: Block) -> None:
        if self._leaves:
            leaves = [self._leaves[name] for name in block.layout]
            gradients = take_gradients(leaves)
            if any(gradient is not None for gradient in gradients):
                self._pull_back_(BatchGradient(gradients, leaves), block)
            return
        gradients = take_gradients(self._random_parameters[block.numbers])
        if any(gradient is not None for gradient in gradients):
            views = self._cut(block)[3] if len(self._blocks) > 1 else self._views
            self._pull_back_(ListGradient(gradients, views), block)

    def _pull_back_(self, g: WeightGradient, block: Block | None = None) -> None:
        draw, work = self._draw, self.work
        if block is None or len(self._blocks) == 1:
            slots, grads = self._of_samples()
        else:
            (slots, grads, work, _), draw = self._cut(block), draw.cut(block)
        with exactly(self._weights):
            self.family.pull_back_(grads, slots, work, self._drawn, g, draw)

    # --- blocks, whose gradients are complete before the backward pass ends -----------------------------

    def divide_(self, num_bytes: int, arrived: Callable[[int, int], None]) -> list[Block]:
        """Divide the weights into blocks whose gradients are complete during the last backward pass. Local.

        Return them in the order of the backward pass; there may be none. The gradients of a block have at least
        ``num_bytes``; ``arrived(block, n)`` is called when n more of them are ready.
        """
        num_elements = num_bytes // self._weights.element_size()
        self._arrived = arrived
        if len(self.random):
            early, rest = self.random.divide(num_elements // 2)  # means and scales
            self._blocks, self._num_early = [*early, *rest], len(early)
        else:
            early, _ = self.point.divide(num_elements)
        # The hooks stay for good; `arrived` counts in the last backward pass of a step only
        for number, block in enumerate(early):
            for parameter in self.parameters_of(block):
                parameter.register_post_accumulate_grad_hook(lambda _, number=number: arrived(number, 1))
        return early

    def parameters_of(self, block: Block) -> list[nn.Parameter]:
        """Return the module's parameters in a block. Local."""
        return (self._random_parameters or self._point_parameters)[block.numbers]

    @torch.no_grad()
    def fold_block_(self, block: Block) -> list[Tensor]:
        """Fold in the gradients of a block after its last backward, and return what is to be summed over the job. Local."""
        if not len(self.random):
            total = self.buffer.grads["points"][block.span]
            ListGradient(take_gradients(self.parameters_of(block)), SlotViews(block.layout)).add_to(total)
            return [total]
        self._fold_block_(block)
        cut = [gradient for name, gradient in self._cut(block)[1].items() if name not in self._whole]
        return [row for gradient in cut for row in gradient.view(-1, gradient.shape[-1])]

    def _cut(self, block: Block) -> tuple[Slots, Slots, Slots, SlotViews]:
        """Return slots, gradients and work of a block, and views of its gradients. Local."""
        start, num_weights = block.span.start, self.random.num_elements
        if start not in self._cuts:

            def cut(tensors: Slots) -> Slots:
                parts = {name: t for name, t in tensors.items() if name not in self._whole}
                return tensors | {n: t[..., block.span] for n, t in parts.items() if t.shape[-1:] == (num_weights,)}

            slots, grads, work = map(cut, (self.buffer.values, self.buffer.grads, self.work))
            views = SlotViews(block.layout)
            for name in grads.keys() - self._whole:
                views.keep(grads[name])
            self._cuts[start] = slots, grads, work, views
        return self._cuts[start]
