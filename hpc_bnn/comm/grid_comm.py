"""Collectives over the axes of the process grid."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..config import Compression, Reduction
from ..grid import Axis, Grid, share
from ..trees import map_leaves, tensors_of
from . import packing
from .compression import decode, encode, encoded_bytes
from .packing import TensorSpec, as_list, byte_spans, packed_buckets, pieces, share_buckets
from .stall import Waiting
from .transports import NodeArray, ObjectAxis, ObjectTransport, Operation, TensorTransport, agreed, check_equal


@dataclass
class Traffic:
    """What this rank has sent into collectives since the start."""

    num_collectives: int = 0
    """Tensor collectives that this rank took part in."""
    num_bytes: int = 0
    """Bytes of the tensors that it gave to them."""
    seconds: float = 0.0
    """Time in them, waiting for the other ranks included (seconds). Where the host does not wait for a GPU, the GPU's, of
    those that had ended when the last one began."""
    num_object_collectives: int = 0
    """Collectives of Python objects (start, checks, errors; never in a training step)."""


LEAST_SHARED_BYTES = 2**20
"""Of a sum that goes by shares where the reduction is "auto": below, three collectives cost more than two (bytes)."""


@final
class GridComm:
    """Collectives over the axes of the process grid; without transports: one process, nothing to do.

    What is the same for all communication libraries stands here: which axes a sum takes, packing, shares, compression,
    copies through host memory, counting, errors on which the ranks agree. The rest is left to two transports.

    Parameters
    ----------
    reduction : {"auto", "axes", "shares", "world"}
        How `sum_` over the world goes. axes: over the sample group and then over the data group. shares: each rank of a
        sample group sums its share of the numbers over the data group, and the group then exchanges the shares, so that
        each number crosses between nodes once per data group, not once per rank. world: at once. auto: shares where the
        ranks of the job are on several nodes, a sum has `LEAST_SHARED_BYTES` and the library an all-to-all, otherwise axes.
    compression : {"none", "fp16", "bf16"}
        What `sum_` and `reduce_scatter_` send where they are asked to compress.
    tensors, objects : TensorTransport, ObjectTransport, optional
        What carries tensors, and Python objects.
    """

    def __init__(
        self,
        grid: Grid,
        device: torch.device | str = "cpu",
        reduction: Reduction = "auto",
        compression: Compression = "none",
        *,
        tensors: TensorTransport | None = None,
        objects: ObjectTransport | None = None,
    ):
        self.grid = grid
        self.compression: Compression = compression
        self.device = torch.device(device)
        self.objects = objects or ObjectTransport()
        self.tensors = tensors or TensorTransport(grid, self.device, self.objects)
        self.traffic = Traffic()  # so far
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # begin and end of a collective
        self._extents = grid.extents
        self._reduction = reduction if grid.sample_size > 1 and grid.data_size > 1 else "axes"
        routes: dict[Axis, tuple[Axis, ...]] = {axis: (axis,) for axis in grid.axes}
        routes["world"] = ("world",) if reduction == "world" else grid.axes
        self._routes: dict[Axis, list[Axis]] = {
            axis: [step for step in route if self._extents[step] > 1] for axis, route in routes.items()
        }

    @property
    def library(self) -> str:
        """Name of the communication library for tensors; "none" for one process."""
        return self.tensors.name

    @property
    def sample_comm(self) -> Any:
        """``mpi4py.MPI.Intracomm`` of the ranks with the same examples; None without MPI."""
        return self.objects.comms.get("sample")

    @property
    def data_comm(self) -> Any:
        """``mpi4py.MPI.Intracomm`` of the ranks with the same samples; None without MPI."""
        return self.objects.comms.get("data")

    @property
    def world_comm(self) -> Any:
        """``mpi4py.MPI.Intracomm`` of all ranks; None without MPI."""
        return self.objects.comms.get("world")

    @property
    def sample_set(self) -> Any:
        """What the library for tensors has for the sample group; None for an axis of extent 1."""
        return self.tensors.group("sample")

    @property
    def data_set(self) -> Any:
        """What the library for tensors has for the data group; None for an axis of extent 1."""
        return self.tensors.group("data")

    @property
    def local_rank(self) -> int:
        """Number of this rank among the ranks of its node."""
        return self.objects.local_rank

    @property
    def local_size(self) -> int:
        """Number of ranks of this node."""
        return self.objects.local_size

    # --- tensors --------------------------------------------------------------------------------

    def sum_(
        self, tensors: torch.Tensor | Sequence[torch.Tensor], axis: Axis = "world", *, compressed: bool = False
    ) -> None:
        """Replace each tensor, in place, by its sum over an axis.

        A list is packed into few large buffers, one reduction each, not one per tensor; a single
        contiguous tensor is reduced where it lies. bfloat16 and float16 are summed in float32.

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``. An axis of extent 1
        costs nothing.

        Parameters
        ----------
        tensors : Tensor or sequence of Tensor
            The same shapes and dtypes in the same order on each rank.
        compressed : bool
            Send the numbers as ``compression`` says, half the bytes for rounding to 11 or 8 bits: each rank
            sums its part of the numbers of all others, not in halves, and sends the sums around. All ranks get the same.
        """
        if axis != "world" or self._reduction not in ("shares", "auto"):
            self._sum_along_(tensors, axis, compressed)
            return
        with packed_buckets(tensors) as buckets:
            for flat in buckets:
                if not self._goes_by_shares(flat):
                    self._sum_along_(flat, axis, compressed)
                    continue
                shares = self.reduce_scatter_([flat], "sample", compressed=compressed)
                self._sum_along_(shares, "data", compressed)
                self.gather_shares_([flat], "sample", compressed=compressed)

    def start_sum_(self, flat: torch.Tensor, axis: Axis = "world") -> Callable[[], None]:
        """Begin to replace a tensor, in place, by its sum over an axis; return what waits until it is there.

        The tensor is [n], contiguous, of float32 or float64, alike on each rank. The world is summed at once, whatever
        ``reduction`` says. Leave the tensor alone until then, and begin the same sums in the same order on each rank.
        Where the library does not come back before the sum is there, it still is right.

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``; it costs nothing over one rank.
        """
        if self._extents[axis] == 1 or flat.numel() == 0:
            return lambda: None
        flat = flat.detach()
        near = self._near(flat)
        with self._counted(flat, axis, self.tensors.start_sum_):
            end = self.tensors.start_sum_(near, axis)

        def wait() -> None:
            begun = time.perf_counter()
            with Waiting(f"start_sum over {axis}"):
                end()
            if near is not flat:
                flat.copy_(near)
            self.traffic.seconds += time.perf_counter() - begun

        return wait

    def reduce_scatter_(
        self, tensors: Sequence[torch.Tensor], axis: Axis, *, compressed: bool = False
    ) -> list[torch.Tensor]:
        """Sum flat tensors [n] over an axis, each rank its share of each (`hpc_bnn.grid.share`), and return views of these.

        In place; what is not this rank's share is left as it was. In buckets, so that little memory is needed besides.
        The tensors are contiguous, all of float32 or all of float64, alike on each rank; ``compressed`` is as for
        `sum_`.

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``; it costs nothing over one rank.
        """
        flats, shares, index = self._shares_of(tensors, axis)

        def chunk_of(rank: int, bucket: list[tuple[int, list[range]]]) -> torch.Tensor:
            return torch.cat([flats[number][s[rank].start : s[rank].stop] for number, s in bucket])

        for bucket in share_buckets(shares, flats[0].element_size()):
            chunks = [chunk_of(rank, bucket) for rank in range(len(shares[0]))]
            length = len(chunks[index])
            if compressed and self.compression != "none":
                encoded = [encode(chunk, self.compression) for chunk in chunks]
                packed = torch.cat(encoded)
                received = self._exchange(packed, [len(chunk) for chunk in encoded], axis)
                contents = received.view(len(chunks), -1)
                total = torch.zeros_like(chunks[index])
                for content in contents:
                    total += decode(content, self.compression, flats[0].dtype)
            else:
                packed = pad_sequence(chunks, batch_first=True)  # of one length, as the libraries want them
                if self._carrier_has("reduce_scatter"):
                    total = self._carry(packed, axis, self.tensors.reduce_scatter, axis)[:length]
                else:
                    rows = self._exchange(packed.view(-1), [packed.shape[1]] * len(packed), axis)
                    total = rows.view_as(packed).sum(0)[:length]
            for (number, spans), part in zip(bucket, total.split([len(s[index]) for _, s in bucket])):
                flats[number][spans[index].start : spans[index].stop] = part
        return [flat[s[index].start : s[index].stop] for flat, s in zip(flats, shares)]

    def gather_shares_(self, tensors: Sequence[torch.Tensor], axis: Axis, *, compressed: bool = False) -> None:
        """Overwrite the shares of the other ranks of an axis with what they have there (see `reduce_scatter_`).

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``. With ``compressed`` the own share is
        rounded as the others see it.
        """
        flats, shares, index = self._shares_of(tensors, axis)
        is_compressed = compressed and self.compression != "none"
        for bucket in share_buckets(shares, flats[0].element_size()):
            part = torch.cat([flats[number][s[index].start : s[index].stop] for number, s in bucket])
            part = encode(part, self.compression) if is_compressed else part
            lengths = [[len(spans[rank]) for _, spans in bucket] for rank in range(len(shares[0]))]
            sent = [encoded_bytes(sum(n)) if is_compressed else sum(n) for n in lengths]
            gathered = self._carry(part, axis, self.tensors.gather, axis, sent)
            for rank, content in enumerate(gathered.split(sent)):
                content = decode(content, self.compression, flats[0].dtype) if is_compressed else content
                for (number, spans), piece in zip(bucket, content.split(lengths[rank])):
                    flats[number][spans[rank].start : spans[rank].stop] = piece

    def max_(self, tensors: torch.Tensor | Sequence[torch.Tensor], axis: Axis = "world") -> None:
        """Replace each tensor, in place, by its elementwise maximum over an axis (see `sum_`)."""
        self._reduce_all_(tensors, axis, "max")

    def gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return the tensors [n, ...] of all ranks of an axis, one after another along dim 0, on each of them.

        They are of a floating-point dtype; n may differ between ranks, the rest may not. Where an extent of the rest is
        0, nothing is exchanged.

        Collective over ``sample_comm`` or ``data_comm``, by ``axis``; it costs nothing over one rank.
        """
        if not self._routes[axis] or 0 in tensor.shape[1:]:
            return tensor
        is_half = tensor.dtype in (torch.bfloat16, torch.float16)
        wide = tensor.detach().float() if is_half else tensor.detach()
        return self._carry(wide.contiguous(), axis, self.tensors.gather, axis).to(tensor.dtype)

    def all_to_all(
        self, flat: torch.Tensor, counts: Sequence[int], axis: Axis, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Send each rank of an axis its piece of a tensor [n], and return the pieces that came here, by rank, as one.

        Rank j gets ``counts[j]`` numbers of each row that any rank has: rank i has ``rows[i]`` of them, and sends
        ``rows[i] * counts[j]`` numbers to rank j. With ``rows`` and ``counts`` in each other's place a second call takes back
        what a first one has brought.

        Collective over ``sample_comm`` or ``data_comm``, by ``axis``; it costs nothing over one rank. Where a user's
        `TensorTransport` has none, each rank gathers the tensors of all and keeps its pieces.

        Parameters
        ----------
        flat : Tensor
            [n], without numbers on a rank that has none to send.
        counts, rows : sequence of int
            Of each rank, the same on all of them; 0 is allowed. ``rows`` are 1 each by default.
        """
        if not self._routes[axis] or sum(counts) * (len(counts) if rows is None else sum(rows)) == 0:
            return flat
        is_half = flat.dtype in (torch.bfloat16, torch.float16)
        wide = flat.detach().float() if is_half else flat.detach()
        return self._exchange(wide.contiguous(), counts, axis, rows).to(flat.dtype)

    def broadcast_(self, tensors: torch.Tensor | Sequence[torch.Tensor], root: int = 0, axis: Axis = "world") -> None:
        """Overwrite tensors with those of the rank with index ``root`` along an axis. Collective over the axis."""
        if self._extents[axis] == 1:
            return
        with packed_buckets(tensors) as buckets:
            for flat in buckets:
                if flat.numel():
                    self._carry_(flat, axis, self.tensors.broadcast_, root, axis)

    def broadcast_tree(self, tree: Any, root: int = 0) -> Any:
        """Return the nested dicts and lists of world rank ``root`` on all ranks. Collective over the world.

        Tensors travel as such; they come out on this rank's device, those from the CPU on the CPU.
        """
        if self.grid.world_size == 1:
            return tree
        outline = self.broadcast_object(map_leaves(tree, torch.Tensor, TensorSpec.of), root)
        if self.grid.rank != root:
            tree = map_leaves(outline, TensorSpec, lambda o: o.empty(self.device))
        tensors: list[torch.Tensor] = []
        map_leaves(tree, torch.Tensor, tensors.append)
        self.broadcast_(tensors, root)
        return tree

    def gather_trees(self, tree: Any, axis: Axis) -> list[Any]:
        """Return the nested dicts and lists of all ranks of an axis on its first rank, in order; elsewhere nothing.

        Tensors come out on the CPU, as copies. They travel in pieces: the other ranks need little memory besides.

        Collective over ``sample_comm`` or ``data_comm``, by ``axis``; it costs nothing over one rank.
        """
        size = self._extents[axis]
        if size == 1:
            return [map_leaves(tree, torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))]
        self._count_objects()
        outlines = self.objects.gather_first(map_leaves(tree, torch.Tensor, TensorSpec.of), axis)
        trees = [map_leaves(outline, TensorSpec, lambda o: torch.empty(o.shape, dtype=o.dtype)) for outline in outlines]
        theirs, mine = [tensors_of(t) for t in trees], [tensor.detach().contiguous() for tensor in tensors_of(tree)]
        longest = torch.tensor([sum(tensor.nbytes for tensor in mine)], device=self.device)
        self.max_(longest, axis)
        num_bytes, room = int(longest), max(packing.LEAST_PIECE_BYTES, packing.PIECE_BYTES // size)
        for start in range(0, num_bytes, room):
            stop = min(start + room, num_bytes)
            sent = torch.zeros(stop - start, dtype=torch.uint8, device=self.device)
            for place, span in byte_spans(mine, start, stop):
                sent[place] = span.to(self.device)
            counts = [len(sent), *[0] * (size - 1)]
            received = self.all_to_all(sent, counts, axis)
            for tensors, content in zip(theirs, received.cpu().split(len(sent))):
                for place, span in byte_spans(tensors, start, stop):
                    span.copy_(content[place])
        return trees

    def broadcast_pieces(
        self, tensors: Sequence[torch.Tensor], specs: Sequence[TensorSpec], root: int = 0
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield the numbers of tensors of world rank ``root``, a piece at a time: (which tensor, from where on, [n]).

        The other ranks give no tensors, and need little memory besides what they keep of it; on which device it comes out
        says `broadcast_tree`. Collective over the world: take all pieces. ``specs`` are those of the tensors, on all ranks.
        """
        for bucket in pieces(specs):
            first = specs[bucket[0][0]]
            if self.grid.rank == root:
                flat = torch.cat([tensors[number].detach().reshape(-1)[start:stop] for number, start, stop in bucket])
            else:
                shape = torch.Size([sum(stop - start for _, start, stop in bucket)])
                flat = TensorSpec(shape, first.dtype, first.is_cpu).empty(self.device)
            self.broadcast_(flat, root)
            contents = flat.split([stop - start for _, start, stop in bucket])
            yield from ((number, start, content) for (number, start, _), content in zip(bucket, contents))

    # --- Python objects ---------------------------------------------------------------------------

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the object of world rank ``root`` on all ranks. Collective over the world."""
        self._count_objects()
        return self.objects.broadcast(value, root)

    def gather_objects(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        """Return the objects of all ranks of an axis or node, in rank order, on each of them. Collective."""
        self._count_objects()
        return self.objects.gather(value, axis)

    def barrier(self) -> None:
        """Wait for all ranks. Collective over the world."""
        self._count_objects()
        self.objects.barrier()

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype | str) -> NodeArray:
        """Return a new array in memory that the ranks of a node share; alone, in ordinary memory.

        Collective over the ranks of the node, with the same shape. `CommunicationError` where the memory is not there.
        """
        objects = self.objects if self.local_size > 1 else ObjectTransport()
        return objects.node_array(shape, np.dtype(dtype))

    @contextlib.contextmanager
    def agree(self, doing: str) -> Iterator[None]:
        """Run a block; if it raises on any rank, raise the same error on all. Collective over the world.

        For what can fail on one rank only: files, memory, hardware. The block itself must contain no collective, or the
        ranks that succeed wait inside it for the one that failed. The error is of the class of the first failing rank's
        (`RankError` for a foreign class); its message names rank, host, and what the block was ``doing``.
        """
        self._count_objects()
        with agreed(self.objects, doing):
            yield

    def check_replicas(self, tensors: torch.Tensor | Sequence[torch.Tensor], what: str, axis: Axis = "world") -> None:
        """Verify that tensors are bit for bit the same on all ranks of each group of an axis (see `check_equal`)."""
        digest = hashlib.sha256()
        for tensor in as_list(tensors) if self.grid.world_size > 1 else ():
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        remedy = "What should be replicated has drifted apart: please report it"
        self.check_equal({"the digest": digest.hexdigest()[:16]}, f"{what}: ", remedy, axis)

    def check_equal(self, values: Mapping[str, object], where: str, remedy: str, axis: Axis = "world") -> None:
        """Verify that named values are equal on all ranks of each group of an axis. Collective over the world.

        `RankError`, on all ranks, names the values that are not, and the ranks that have them.
        """
        self._count_objects()
        group = {"sample": self.grid.data_index, "data": self.grid.sample_index, "world": 0}[axis]
        check_equal(self.objects, values, where, remedy, group)

    def close(self) -> None:
        """Wait for all ranks and leave the groups. Collective over the world; afterwards it is of no use."""
        self.barrier()
        self.tensors.close()
        self.objects.close()

    def __enter__(self) -> GridComm:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:  # with an error the other ranks may never come here: it ends the job by itself
            self.close()

    def group_ranks(self, axis: Axis) -> list[int]:
        """Return the world ranks of this rank's group along an axis, as the library has them. Local."""
        return [self.grid.rank] if self._extents[axis] == 1 else self.tensors.group_ranks(axis)

    # --- shared -------------------------------------------------------------------------------------

    def _near(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor, or a copy of it, where the library can read it."""
        return tensor.cpu() if self.tensors.is_through_host else tensor

    def _carry(
        self, tensor: torch.Tensor, axis: Axis, collective: Callable[..., torch.Tensor], *arguments
    ) -> torch.Tensor:
        """Return what a collective over an axis makes of a tensor, on the tensor's device."""
        with self._counted(tensor, axis, collective):
            return collective(self._near(tensor), *arguments).to(tensor.device)

    def _carry_(self, flat: torch.Tensor, axis: Axis, collective: Callable[..., None], *arguments) -> None:
        """Let a collective over an axis work on a tensor in place."""
        with self._counted(flat, axis, collective):
            near = self._near(flat)
            collective(near, *arguments)
            if near is not flat:
                flat.copy_(near)

    def _count_objects(self) -> None:
        self.traffic.num_object_collectives += self.grid.world_size > 1

    def _reduce_all_(self, tensors, axis: Axis, operation: Operation) -> None:
        route = self._routes[axis]
        if not route:
            return
        with packed_buckets(tensors) as buckets:
            for flat in buckets:
                if flat.numel() == 0:
                    continue  # on all ranks of the group alike
                for step in route:
                    self._carry_(flat, step, self.tensors.reduce_, step, operation)

    def _sum_along_(self, tensors, axis: Axis, compressed: bool) -> None:
        if compressed and self.compression != "none":
            self._sum_compressed_(tensors, axis)
        else:
            self._reduce_all_(tensors, axis, "sum")

    def _carrier_has(self, collective: str) -> bool:
        """Whether the `TensorTransport` defines a collective that it may leave to others. Local."""
        return getattr(type(self.tensors), collective) is not getattr(TensorTransport, collective)

    def _exchange(
        self, flat: torch.Tensor, counts: Sequence[int], axis: Axis, rows: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Do what `all_to_all` does, with a tensor in one piece that a library can carry. Collective over the axis."""
        counts, rows = list(counts), [1] * len(counts) if rows is None else list(rows)
        if self._carrier_has("all_to_all"):
            return self._carry(flat, axis, self.tensors.all_to_all, counts, axis, rows)
        lengths, index = [num_rows * sum(counts) for num_rows in rows], self.grid.indices[axis]
        of_ranks = self._carry(flat, axis, self.tensors.gather, axis, lengths).split(lengths)
        start, stop = sum(counts[:index]), sum(counts[: index + 1])
        return torch.cat([part[n * start : n * stop] for n, part in zip(rows, of_ranks)])

    def _goes_by_shares(self, flat: torch.Tensor) -> bool:
        """Whether a sum over the world goes by shares: the same on all ranks. Local."""
        if flat.dtype not in (torch.float32, torch.float64) or flat.numel() == 0:
            return False
        is_far = self.local_size < self.grid.world_size and flat.nbytes >= LEAST_SHARED_BYTES
        # By gathers instead of exchanges the shares would be more bytes, not fewer
        return self._reduction == "shares" or (is_far and self._carrier_has("all_to_all"))

    def _sum_compressed_(self, tensors, axis: Axis) -> None:
        for step in self._routes[axis]:
            with packed_buckets(tensors) as buckets:
                self.reduce_scatter_(buckets, step, compressed=True)
                self.gather_shares_(buckets, step, compressed=True)

    def _shares_of(
        self, tensors: Sequence[torch.Tensor], axis: Axis
    ) -> tuple[list[torch.Tensor], list[list[range]], int]:
        """Return tensors without graph, the shares of all ranks of each of them, and this rank's index."""
        flats, size = [tensor.detach() for tensor in tensors], self._extents[axis]
        shares = [[share(len(flat), size, index) for index in range(size)] for flat in flats]
        return flats, shares, self.grid.indices[axis]

    @contextlib.contextmanager
    def _counted(self, tensor: torch.Tensor, axis: Axis, collective: Callable) -> Iterator[None]:
        """Count a collective of this tensor, and end the job where it comes to no end."""
        self.traffic.num_collectives += 1
        self.traffic.num_bytes += tensor.numel() * tensor.element_size()
        what = Waiting(f"{collective.__name__.strip('_')} over {axis}")
        if tensor.is_cuda and not self.tensors.is_through_host:
            while self._running and self._running[0][1].query():
                begin, end = self._running.popleft()
                self.traffic.seconds += begin.elapsed_time(end) / 1e3
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            with what:
                yield
            end.record()
            self._running.append((begin, end))
            return
        start = time.perf_counter()
        with what:
            yield
        self.traffic.seconds += time.perf_counter() - start
