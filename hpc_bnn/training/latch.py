"""What a step measured; and the numbers of a step that stay on the device, so that no step waits for it."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..noise import Clock
from ..posteriors import Posterior, Tally
from ..posteriors.families import Scalars

NUM_SLOTS = 4
"""Steps whose numbers may be on their way between host and device at once."""
POLL_SECONDS = 2e-5
"""Between two looks at whether a step has ended: meanwhile Python hears signals."""


@dataclass(frozen=True)
class StepResult:
    """What one step measured, before its update; the same on all ranks.

    Where a step waits for no device, the first number that is read waits for its step.
    """

    nelbo: float
    """Objective per example: ``data_term + kl_weight * kl / num_train_examples``; with the objective "elbo" and
    ``kl_weight`` 1 the negative ELBO (nats)."""
    data_term: float
    """Data term of the objective per example (nats; units of the target for a score)."""
    kl: float
    """KL(q || prior) of all weights (nats)."""
    kl_weight: float
    """Factor of the KL at this step."""
    wants_stop: bool
    """Whether some rank of the job wants to stop after this step (`VariationalStep.wants_stop`)."""
    wants_checkpoint: bool
    """Whether some rank of the job wants a checkpoint after this step (`VariationalStep.wants_checkpoint`)."""

    @classmethod
    def of(cls, tally: list[float], kl: float, kl_weight: float, num_train_examples: int) -> StepResult:
        """Return that of a step by its `Tally`. Local."""
        data_term = tally[Tally.DATA_TERM]
        wishes = tally[Tally.NUM_STOPS] > 0, tally[Tally.NUM_CHECKPOINTS] > 0
        return StepResult(data_term + kl_weight * kl / num_train_examples, data_term, kl, kl_weight, *wishes)


class PendingResult(StepResult):
    """The result of a step that may still run."""

    def __init__(self, read: Callable[[], StepResult]):
        self.__dict__["_read"] = read

    def __getattr__(self, name: str):
        if name not in {field.name for field in fields(StepResult)}:
            raise AttributeError(name)
        self.__dict__.update(vars(self._read()))
        return self.__dict__[name]


def wait_for(event: torch.cuda.Event) -> None:
    """Wait for a GPU, and hear signals meanwhile: torch's own waits do not return to Python. Local."""
    while not event.query():
        time.sleep(POLL_SECONDS)


class Found(NamedTuple):
    """What a step leaves on the device to be read."""

    tally: list[float]
    """`Tally`, summed over the job."""
    kl: float
    is_broken_here: float
    is_sound: float
    """Whether this step and all before it were sound; otherwise it has changed nothing."""


class Pending(NamedTuple):
    """A step whose numbers are on their way to the host."""

    num_steps: int
    result: PendingResult
    wait: Callable[[], Found]
    evidence: Any
    """What the host needs to say why the step was not sound."""


class _Slot:
    """Numbers of the host, float64, as an array and as the tensor that a GPU reads and writes without a wait."""

    def __init__(self, length: int, is_pinned: bool):
        if is_pinned:
            self.tensor = torch.zeros(length, dtype=torch.float64, pin_memory=True)
            self.array = self.tensor.numpy()
        else:
            self.array = np.zeros(length)
            self.tensor = torch.from_numpy(self.array)


class Latch:
    """The numbers of a step, on its device. Once a step is not sound, no later one changes anything, until that is read.

    Attributes
    ----------
    scalars, clock, share, rates
        What families and keys read; 1 / examples of the global batch; learning rates of the optimizer's groups: 0-dim.
    is_sound, found_inf : Tensor
        Whether all steps since the last reading were sound, 0-dim bool; and the opposite as torch's fused optimizers take it,
        0-dim float32.
    is_broken_here, first_example : Tensor
        Whether this rank's part of the sum is not finite, 0-dim bool; place of its first example in the global batch, 0-dim.
    pending : deque of Pending
        Steps whose numbers were not read yet, the oldest first.
    """

    def __init__(self, posterior: Posterior, num_samples: int, num_groups: int):
        device = posterior.buffer.flat.device
        self._tally, is_cuda = posterior.buffer.tally, device.type == "cuda"
        num_known = len(Tally) - Tally.NUM_STOPS
        self._given = torch.zeros(6 + num_groups + num_known, dtype=torch.float64, device=device)
        kl_weight, count, step, _, self.share, self.num_examples, rate, *_ = self._given.unbind()
        self.scalars, self.clock = Scalars(kl_weight, count, step, rate), Clock(device)
        self._given_rates, self._known = self._given[6:].split([num_groups, num_known])
        # torch's fused kernels on GPUs read a rate as float32, those on CPUs as it is
        self._rates = self._given_rates.float() if is_cuda else self._given_rates
        self.rates = list(self._rates.unbind())
        self._numbers: Sequence[int] = ()
        self._found = torch.zeros(len(Tally) + 3, dtype=torch.float64, device=device)
        self._to_device, self._to_device_later, self._to_host = (
            [_Slot(len(of), is_cuda) for _ in range(NUM_SLOTS)] for of in (self._given, self._known, self._found)
        )
        self._events = [torch.cuda.Event() for _ in range(NUM_SLOTS)] if is_cuda else []
        self.is_sound = torch.ones((), dtype=torch.bool, device=device)
        self.is_broken_here = torch.zeros((), dtype=torch.bool, device=device)
        self.first_example = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self.pending: deque[Pending] = deque()
        self._num_samples = float(num_samples)

    def give_(
        self,
        num_steps: int,
        first_sample: int,
        kl_weight: float,
        global_batch_size: int,
        rates: Sequence[float],
        numbers: Sequence[int],
    ) -> None:
        """Send what the host knows of a step, without a wait. Local.

        ``kl_weight`` is that per example; ``numbers`` go into `Tally` from NUM_STOPS on, as far as they are known
        (`amend_`).
        """
        slot = self._to_device[num_steps % NUM_SLOTS]
        batch = 1.0 / global_batch_size, global_batch_size
        slot.array[:] = [kl_weight, self._num_samples, num_steps, first_sample, *batch, *rates, *numbers]
        self._given.copy_(slot.tensor, non_blocking=True)
        self._numbers = numbers

    def amend_(self, num_steps: int, numbers: Sequence[int]) -> None:
        """Send the numbers of `give_` once more, where they have become others. Local."""
        if numbers != self._numbers:
            slot = self._to_device_later[num_steps % NUM_SLOTS]
            slot.array[:] = numbers
            self._known.copy_(slot.tensor, non_blocking=True)

    def take_rates_(self) -> None:
        """Take the learning rates that were given. Local."""
        if self._rates is not self._given_rates:
            self._rates.copy_(self._given_rates)

    def begin_samples_(self) -> None:
        """Set the clock to the step, and to the first of this rank's samples. Local."""
        self.clock.now.copy_(self._given[2:4])

    def complete_(self, checksum: Tensor) -> None:
        """Write what is summed: whether this rank's part of the sum is finite, and what the host knows. Local."""
        self.is_broken_here.copy_(~checksum.isfinite())
        self._tally[Tally.NUM_BROKEN] = self.is_broken_here
        self._tally[Tally.NUM_STOPS :] = self._known

    def look_(self, kl: Tensor) -> None:
        """Take in whether the step is sound, after the sum over the job, and the KL finite; it stays unsound. Local."""
        zeros = self._tally[Tally.NUM_BROKEN :].clone()
        zeros[Tally.NUM_STOPS - Tally.NUM_BROKEN] = kl - kl
        zeros[Tally.NUM_CHECKPOINTS - Tally.NUM_BROKEN] = 0
        zeros[Tally.NUM_EXAMPLES - Tally.NUM_BROKEN] -= self.num_examples
        self.is_sound.logical_and_((zeros == 0).all())
        self.found_inf.copy_(self.is_sound.logical_not())

    def find_(self, kl: Tensor) -> None:
        """Note what the step leaves to be read. Local."""
        numbers = [number.to(self._found.dtype) for number in (kl, self.is_broken_here, self.is_sound)]
        torch.cat([self._tally.to(self._found.dtype), torch.stack(numbers)], out=self._found)

    def state(self) -> list[Tensor]:
        """Return what an update changes of it. Local."""
        return [self.is_sound, self.found_inf, self.clock.now, self._found]

    @contextlib.contextmanager
    def keeping(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Undo what a block does to some tensors, where a step is not sound. Local."""
        kept = [(tensor, tensor.clone()) for tensor in tensors]
        yield
        for tensor, former in kept:
            tensor.copy_(torch.where(self.is_sound, tensor, former))  # not a product: NaN times 0 is NaN

    def send_(self, num_steps: int, kl_weight: float, num_train_examples: int, evidence: Any) -> StepResult:
        """Begin to send what the step has found, and return its result; ``evidence`` as of `Pending`. Local."""
        number = num_steps % NUM_SLOTS
        slot, event = self._to_host[number], self._events[number] if self._events else None
        slot.tensor.copy_(self._found, non_blocking=True)
        if event is not None:
            event.record()

        @functools.cache
        def wait() -> Found:
            if event is not None:
                wait_for(event)
            *tally, kl, is_broken_here, is_sound = slot.array.tolist()
            return Found(tally, kl, is_broken_here, is_sound)

        def read() -> StepResult:
            return StepResult.of(*wait()[:2], kl_weight, num_train_examples)

        result = PendingResult(read)
        self.pending.append(Pending(num_steps, result, wait, evidence))
        return result
