"""The sum of a step over the job: whole or in blocks, for all or a share for each, compressed or not."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..comm import GridComm
from ..errors import ConfigError, Fault
from ..posteriors import Posterior

OVERLAP_BYTES = 4 * 2**20
"""Least size of a sum that is begun during the backward pass; at most `OVERLAP_BLOCKS` are (bytes)."""

OVERLAP_BLOCKS = 16


class Reducer:
    """Sums over the ranks what a step has accumulated, as ``reduction`` of `GridComm` says, unless it is set otherwise.

    Rows that belong to samples are summed over the data axis, all else over the world. With ``comm.compression`` the
    gradient is sent in half the bytes, statistics and scalars never.

    ``in_blocks`` the first sums begin while the last backward pass of a step still runs. It pays where ranks wait for a
    network while they could compute: docs/collectives.md says what was measured. Where the sum is ``divided``, each
    rank of a sample group gets its share only: a range of weights with all their slots (`own_share`).
    """

    def __init__(self, posterior: Posterior, comm: GridComm, *, in_blocks: bool = False, divided: bool = False):
        is_compressed, can_overlap = comm.compression != "none", comm.tensors.can_overlap
        posterior.check_features(overlap=in_blocks, sharded=divided, compression=is_compressed, can_overlap=can_overlap)
        self.posterior, self.comm, self.in_blocks, self.divided = posterior, comm, in_blocks, divided
        self._blocks = []
        if in_blocks:
            num_bytes = max(OVERLAP_BYTES, posterior.buffer.gradient.nbytes // OVERLAP_BLOCKS)
            self._blocks = posterior.sampler.divide_(num_bytes, self._arrived)
        self._is_last, self._waits = False, []
        self.begin_()

    def own_share(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's share of slots or gradients, by name: all of them unless the sum is divided. Local."""
        if not self.divided:
            return tensors
        share = self.comm.grid.share
        spans = {name: share(t.shape[-1], "sample") for name, t in tensors.items()}
        return {name: t[..., spans[name].start : spans[name].stop] for name, t in tensors.items()}

    def reduce_(self) -> None:
        """Sum the gradient of the data term, and what stands behind it, over the job. Collective over the world."""
        buffer, comm = self.posterior.buffer, self.comm
        if self.divided:
            # Three sums: shares within the sample group, these over the data axis, and what is not divided
            shares = comm.reduce_scatter_(list(rows_of(buffer.grads)), "sample", compressed=True)
            comm.sum_(shares, "data", compressed=True)
            comm.sum_(buffer.behind_gradient)
            return
        if self.in_blocks:
            self._reduce_rest_()
            return
        if buffer.num_owned:
            comm.sum_(buffer.reduced[: buffer.num_owned], "data", compressed=True)
        if comm.compression == "none":
            comm.sum_(buffer.reduced[buffer.num_owned :])
        else:
            comm.sum_(buffer.gradient[buffer.num_owned :], compressed=True)
            comm.sum_(buffer.behind_gradient)

    def local_checksum(self) -> Tensor:
        """Return the sum of this rank's part of what is summed over the job. Local, before `reduce_`."""
        total = self._checksum + sum(span.sum() for span in self._rest())
        assert isinstance(total, Tensor), "what stands behind the gradient is in no block"
        return total

    # --- blocks -------------------------------------------------------------------------------------

    def begin_(self) -> None:
        """Begin a step. Collective over the world where one that was given up has begun sums: it waits for them."""
        for wait in self._waits:
            wait()
        self._num_started = 0
        self._missing = [len(block.layout) for block in self._blocks]
        self._spans: list[Tensor] = []
        self._waits: list[Callable[[], None]] = []
        self._checksum: Tensor | float = 0.0  # of the blocks whose sums have begun

    def _arrived(self, number: int, num_gradients: int) -> None:
        """Note that gradients of a block have come, and begin the sums of complete ones, on all ranks in one order."""
        if self._is_last:
            self._missing[number] -= num_gradients
            while self._num_started < len(self._blocks) and self._missing[self._num_started] <= 0:
                self._start_next()

    def _start_next(self) -> None:
        for span in self.posterior.sampler.fold_block_(self._blocks[self._num_started]):
            self._checksum = self._checksum + span.sum()
            self._waits.append(self.comm.start_sum_(span))
            self._spans.append(span)
        self._num_started += 1

    @contextlib.contextmanager
    def last_backward(self) -> Iterator[None]:
        """Context for the last backward pass of a step. With blocks collective over the world, together with `start_`."""
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False
        started = itertools.chain(*map(self.posterior.sampler.parameters_of, self._blocks[: self._num_started]))
        if any(parameter.grad is not None for parameter in started):
            rule = "a weight of this network receives several partial gradients (reentrant checkpointing)"
            raise ConfigError(Fault("grid.overlap", True, rule, "Leave it out, or use use_reentrant=False"))

    def start_(self) -> None:
        """Begin the sums of blocks that the backward pass has not begun; after the last sample."""
        while self._num_started < len(self._blocks):
            self._start_next()

    def _reduce_rest_(self) -> None:
        """Sum what belongs to no block, one sum more over the same ranks, and wait for all."""
        rest = self._rest()
        packed = torch.cat(rest)
        for wait in [*self._waits, self.comm.start_sum_(packed)]:
            wait()
        parts = list(packed.split([len(span) for span in rest]))
        torch._foreach_copy_(rest, parts)  # pyright: ignore[reportPrivateImportUsage]
        self._waits.clear()

    def _rest(self) -> list[Tensor]:
        """Return what stands between the spans of the blocks, and behind them."""
        reduced = self.posterior.buffer.reduced
        begun = sorted((span.storage_offset(), span.storage_offset() + len(span)) for span in self._spans)
        starts, ends = [0, *(end for _, end in begun)], [*(start for start, _ in begun), len(reduced)]
        return [reduced[start:end] for start, end in zip(starts, ends) if start < end]


def rows_of(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield the flat rows of slots or gradients: [P] is one, [R, P] are R."""
    for tensor in tensors.values():
        yield from tensor.view(-1, tensor.shape[-1])
