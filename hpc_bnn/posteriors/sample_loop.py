"""How samples are evaluated: one after another, or several in a batch. Training and prediction use the same loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import capabilities
from ..config import Batching
from ..errors import HpcBnnError
from ..grid import Grid
from ..noise import Key
from ..trees import stack
from ..views import SharedView
from .posterior import Posterior

logger = logging.getLogger(__name__)


class SampleLoop:
    """Evaluates samples of a posterior and yields their outputs; what becomes of these is the caller's.

    Walking writes each sample into the module and calls it. A batch evaluates c samples at once by ``torch.vmap``; its
    memory grows with c, not with the number of samples. A module that cannot be batched walks from then on, and this is
    said once.

    Parameters
    ----------
    chunk_size, batching : int, {"auto", "walking", "vmap"}
        Samples in a batch; 1 walks. walking: samples one after another; vmap: in batches; auto: in batches, but for samples
        that have weights of their own (members of an ensemble), which walk.
    autocast_dtype, max_examples : torch.dtype, int, optional
        Run the module in this dtype where torch's autocast allows; examples of one forward pass, without gradients.
    """

    def __init__(
        self,
        posterior: Posterior,
        chunk_size: int = 1,
        batching: Batching = "auto",
        autocast_dtype: torch.dtype | None = None,
        speaks: bool = True,
        max_examples: int | None = None,
    ):
        self.posterior, self.chunk_size, self.autocast_dtype = posterior, chunk_size, autocast_dtype
        self.speaks, self._max_examples = speaks, max_examples  # rank 0 says what the user should know
        self.can_batch = batching == "vmap" or (batching == "auto" and posterior.is_replicated)
        self.why_not: str | None = None

    def __call__(self, samples: Sequence[int], x: SharedView, key: Key) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yield (samples, outputs [c, B, ...]) chunk by chunk. With BatchNorm collective as `Network.running` says.

        ``samples`` are global indices, ``x`` the inputs [B, ...] of each, ``key`` that of any sample of this draw.
        """
        for start in range(0, len(samples), self.chunk_size):
            chunk = samples[start : start + self.chunk_size]
            outputs = self.try_batch(chunk, x, key) if len(chunk) > 1 else None
            if outputs is not None:
                yield chunk, outputs
                continue
            for sample in chunk:
                yield [sample], self.walk(sample, x, key)

    def look(self, samples: Sequence[int], x: SharedView, key: Key, grid: Grid) -> None:
        """Look at what the module does where nobody has in its mode, and say on rank 0 what a user should know. Local."""
        posterior, look = self.posterior, None
        if posterior.network.needs_look() and len(x):
            first = samples[0]
            few = (first, first + 1) if posterior.is_replicated else samples[:2]  # outputs of two have to differ
            inputs = self._parts(x)[0].of(first)
            posterior.sampler.switch_(False)  # a look changes the drawn weights, and not the means
            if not posterior.network.batch_norms.is_evaluating:
                posterior.sampler.prepare_(inputs)
            look = posterior.network.look(inputs, lambda s: posterior.draw_(key.of(s)), few, self.autocast_dtype)
        posterior.network.say(logger, grid, look)

    def prove(self, samples: Sequence[int], x: SharedView, key: Key) -> None:
        """Walk from now on where a batch of two samples of a predictive is not what a walk gives; tried once. Local."""
        network, few = self.posterior.network, samples[:2]
        if not self.can_batch or min(len(samples), self.chunk_size) < 2 or len(x) == 0:
            return
        if network.batches is None:
            part, before = self._parts(x)[0], network.traces()
            outputs = self.try_batch(few, part, key)
            changed = [name for names in before.put_back().values() for name in names]
            if outputs is not None and changed:
                self.fall_back(RuntimeError(f"its forward pass changes {', '.join(changed[:5])}, once for each sample"))
            elif outputs is not None and not _alike(outputs, torch.cat([self.walk(s, part, key) for s in few])):
                self.fall_back(RuntimeError("a batch gives other outputs than a walk"))
            network.batches = self.can_batch
        self.can_batch = network.batches

    def walk(self, sample: int, x: SharedView, key: Key) -> Tensor:
        """Return the outputs [1, B, ...] of one sample."""
        self.posterior.draw_(key.of(sample))
        outputs = [self.posterior.network(part.of(sample), self.autocast_dtype) for part in self._parts(x)]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(self.posterior.dtype)[None]

    def batch(self, samples: Sequence[int], x: SharedView, key: Key) -> Tensor:
        """Return the outputs [c, B, ...] of some samples at once; `NotImplementedError` where they cannot be batched."""
        posterior = self.posterior
        for refusal in capabilities.refusals(posterior.capabilities, posterior.features(batched=True)):
            raise NotImplementedError(refusal.reason)
        weights = posterior.draw_batch_(samples, key)
        is_shared = len({x.number(sample) for sample in samples}) == 1
        outputs = []
        for part in self._parts(x):
            inputs = part.of(samples[0]) if is_shared else stack([part.of(sample) for sample in samples])
            outputs.append(posterior.network.batched(weights, inputs, is_shared, self.autocast_dtype))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).to(posterior.dtype)

    def _parts(self, x: SharedView) -> list[SharedView]:
        """Return the inputs in parts of one forward pass each."""
        return [part for _, part in x.parts(self._max_examples)]

    def try_batch(self, chunk: Sequence[int], x: SharedView, key: Key) -> Tensor | None:
        """Return what `batch` does, or None from now on where the module cannot be batched."""
        if not self.can_batch:
            return None
        try:
            return self.batch(chunk, x, key)
        except HpcBnnError:
            raise
        except Exception as error:  # what is wrong without a batch as well, the walk will raise
            self.fall_back(error)
            return None

    def fall_back(self, error: BaseException | None) -> None:
        """Walk from now on, and say why. Local."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, torch.OutOfMemoryError):
            reason = f"its memory is not enough for chunks of {self.chunk_size}; set chunk_size to fewer"
        if self.speaks:
            logger.warning("samples are evaluated one after another: the module cannot be batched (%s)", reason)
        self.can_batch, self.why_not = False, reason
        self.posterior.sampler.forget_()


def _alike(batched: Tensor, walked: Tensor) -> bool:
    """Whether outputs of two samples [2, B, ...] are equal, up to rounding and a part of what the samples differ by."""
    is_wide = walked.dtype == torch.float64
    is_coarse = not is_wide and torch.get_float32_matmul_precision() != "highest"  # 8 to 11 bits
    is_coarse |= torch.is_autocast_enabled(walked.device.type)
    rounding = 1e-2 if is_coarse else 1e-10 if is_wide else 1e-4
    spread = (walked[0] - walked[1]).double().norm()
    difference = (batched - walked).double().nan_to_num().norm()
    return bool(difference <= rounding * walked.double().nan_to_num().norm() + 1e-3 * spread.nan_to_num())
