"""Pack many tensors into few flat buffers, and split shards into buckets (Local)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BUCKET_BYTES = 256 * 2**20
"""Largest buffer that one reduction of a list of tensors packs (bytes)."""


SHARE_BUCKET_BYTES = 4 * 2**20
"""Smallest buffer of a sum or gather by shards (bytes): its additional memory. There are at most `SHARE_BUCKETS`."""

SHARE_BUCKETS = 32

PIECE_BYTES = 16 * 2**20
"""Of a state that goes to or comes from one rank: what a rank has of it at a time, besides what it keeps (bytes)."""

LEAST_PIECE_BYTES = 2**16
"""Of what a rank sends at a time to one that gathers from many (bytes)."""


def as_list(tensors: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return one tensor or several as a list. Local."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


@dataclass(frozen=True)
class TensorSpec:
    """Shape, dtype and device of a tensor; a tensor on the CPU (a counter of an optimizer) stays there."""

    shape: torch.Size
    dtype: torch.dtype
    is_cpu: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """Return the outline of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device.type == "cpu")

    def empty(self, device: torch.device) -> torch.Tensor:
        """Return an empty tensor of this outline; on the CPU if the outline says so, otherwise on the device."""
        return torch.empty(self.shape, dtype=self.dtype, device="cpu" if self.is_cpu else device)


def share_buckets(shares: list[list[range]], item_bytes: int) -> Iterator[list[tuple[int, list[range]]]]:
    """Yield what fills a buffer: numbers of tensors, with a slice of each rank's share of them; nothing for one rank.

    ``shares`` has for each tensor those of the ranks, the longest first.
    """
    if not shares or len(shares[0]) == 1:
        return
    num_bytes = sum(len(s) for of_tensor in shares for s in of_tensor) * item_bytes
    most = max(SHARE_BUCKET_BYTES, num_bytes // SHARE_BUCKETS) // item_bytes // len(shares[0])
    bucket, room = [], max(1, most)
    for number, of_tensor in enumerate(shares):
        offset = 0
        while offset < len(of_tensor[0]):
            bucket.append((number, [s[offset : offset + room] for s in of_tensor]))
            taken = len(bucket[-1][1][0])
            offset, room = offset + taken, room - taken
            if room == 0:
                yield bucket
                bucket, room = [], max(1, most)
    if bucket:
        yield bucket


def pieces(specs: Sequence[TensorSpec]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield what fills a buffer of one dtype and device, `PIECE_BYTES` at most: (number of a tensor, start, stop). Local."""
    bucket, room, kind = [], 0, None
    for number, spec in enumerate(specs):
        start, item_bytes = 0, spec.dtype.itemsize
        while start < spec.shape.numel():
            if room == 0 or kind != (spec.dtype, spec.is_cpu):
                if bucket:
                    yield bucket
                bucket, room, kind = [], PIECE_BYTES // item_bytes, (spec.dtype, spec.is_cpu)
            stop = min(start + room, spec.shape.numel())
            bucket.append((number, start, stop))
            start, room = stop, room - (stop - start)
    if bucket:
        yield bucket


def byte_spans(tensors: Sequence[torch.Tensor], start: int, stop: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the bytes from ``start`` to ``stop`` of contiguous tensors one after another: (place behind start, view). Local."""
    offset = 0
    for tensor in tensors:
        first, last = max(start, offset), min(stop, offset + tensor.nbytes)
        if first < last:
            span = tensor.view(-1).view(torch.uint8)[first - offset : last - offset]
            yield slice(first - start, last - start), span
        offset += tensor.nbytes


@contextlib.contextmanager
def packed_buckets(tensors: torch.Tensor | Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Offer tensors as few flat buffers of one dtype; copy those back that had to be copied.

    A contiguous tensor that fills a bucket alone is offered as a view, without a copy.
    """
    with torch.no_grad():
        originals = [t.detach() for t in as_list(tensors)]
        # Horovod sums no bfloat16 and float16 loses too much; float32 is exact for both as operands.
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
        sources = [t.to(wide.get(t.dtype, t.dtype)).contiguous() for t in originals]
        pieces = [piece for t in sources for piece in t.view(-1).split(BUCKET_BYTES // t.element_size())]
        groups: list[list[torch.Tensor]] = []
        for piece in sorted(pieces, key=lambda p: (str(p.dtype), str(p.device))):  # sorted() is stable
            last = groups[-1] if groups else []
            fits = sum(p.numel() for p in last) + piece.numel() <= BUCKET_BYTES // piece.element_size()
            if last and fits and (last[0].dtype, last[0].device) == (piece.dtype, piece.device):
                last.append(piece)
            else:
                groups.append([piece])
        buckets = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
        yield buckets
        for group, bucket in zip(groups, buckets):
            if len(group) > 1:
                torch._foreach_copy_(group, list(bucket.split([p.numel() for p in group])))
        for original, source in zip(originals, sources):
            if source is not original:
                original.copy_(source)
