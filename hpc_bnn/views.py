"""The inputs of each sample of a step: the same for all samples, or a view for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["SharedView", "Views"]


class SharedView:
    """Inputs that are the same for all samples."""

    num_samples: int | None = None
    """Samples per step that the views are for; None: any number."""

    def __init__(self, x: Tensor):
        self._x = x
        self.device = x.device

    def __len__(self) -> int:
        return len(self._x)

    def number(self, sample: int) -> int:
        """Return the number of the view of a sample."""
        return 0

    def of(self, sample: int) -> Tensor:
        """Return the inputs [B, ...] of a sample."""
        return self._x


class Views(SharedView):
    """Inputs with different views for samples; a view is made on request, and the last one is kept."""

    def __init__(self, x: Tensor, numbers: Sequence[int], make: Callable[[Tensor, int], Tensor]):
        super().__init__(x)
        self._numbers, self._make = numbers, make
        self.num_samples = len(numbers)
        self._last: tuple[int, Tensor] | None = None

    def number(self, sample: int) -> int:
        return self._numbers[sample]

    def of(self, sample: int) -> Tensor:
        number = self.number(sample)
        if self._last is None or self._last[0] != number:
            self._last = None  # before the next one is made: one view in memory
            self._last = number, self._make(self._x, number)
        return self._last[1]
