"""The inputs of each sample of a step: the same for all samples, or a view for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .trees import Inputs, device_of, num_rows, rows_of


class SharedView:
    """Inputs that are the same for all samples: a tensor, or a tree of them."""

    num_samples: int | None = None
    """Samples per step that the views are for; None: any number."""

    def __init__(self, x: Inputs):
        self.before_views = x
        """Inputs [B, ...], of which views are made."""
        self._num_rows = num_rows(x)
        self.device = device_of(x)

    def __len__(self) -> int:
        return self._num_rows

    def number(self, sample: int) -> int:
        """Return the number of the view of a sample."""
        return 0

    def of(self, sample: int) -> Inputs:
        """Return the inputs [B, ...] of a sample."""
        return self.before_views

    def parts(self, size: int | None) -> list[tuple[slice, SharedView]]:
        """Return parts of at most ``size`` examples, each with its span; all in one where ``size`` is None."""
        count = len(self)
        if size is None or count <= size:
            return [(slice(0, count), self)]
        spans = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        return [(span, _Part(self, span)) for span in spans]


class OwnView(SharedView):
    """Inputs of which each rank of a sample group has made a view by itself: they are not compared."""

    def __init__(self, x: Inputs | SharedView):
        whole = x if isinstance(x, SharedView) else SharedView(x)
        self._num_rows, self.before_views = len(whole), ()
        self.device, self.num_samples, self.number, self.of = whole.device, whole.num_samples, whole.number, whole.of


class _Part(SharedView):
    """The inputs of some examples of others."""

    def __init__(self, whole: SharedView, span: slice):
        self._whole, self._span = whole, span
        self.before_views = rows_of(whole.before_views, span)
        self.device, self.num_samples, self.number = whole.device, whole.num_samples, whole.number
        self._num_rows = len(range(len(whole))[span])

    def of(self, sample: int) -> Inputs:
        return rows_of(self._whole.of(sample), self._span)


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
            self._last = number, self._make(self.before_views, number)
        return self._last[1]
