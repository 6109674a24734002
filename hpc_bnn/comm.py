"""Communication over the process grid (floor 2).

The only module that imports mpi4py and horovod. `connect` splits ``MPI.COMM_WORLD`` into sample and
data sub-communicators, makes the Horovod process sets of the same ranks, and returns a `GridComm`.
Sums, maxima and gathers of tensors travel through Horovod; Python objects (errors, file names, metadata) and broadcasts
of host memory through mpi4py.

`GridComm` itself is the one-process case: every collective over one rank is the identity. A library
plugs in underneath by the few methods of a subclass whose names begin with an underscore.

Neither mpi4py.MPI nor horovod is imported before `world_size` or `connect` is called: importing the first
starts MPI; a worker process that imports this module stays an ordinary process.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from .compression import Compression, decode, encode, encoded_bytes
from .errors import CommunicationError, ConfigError, Fault, HpcBnnError, RankError
from .grid import Grid, share
from .launcher import launcher_of

logger = logging.getLogger(__name__)

Axis = Literal["sample", "data", "world"]
ObjectAxis = Literal["sample", "data", "world", "node"]
Operation = Literal["sum", "max"]

BUCKET_BYTES = 256 * 2**20
"""Largest buffer that one reduction of a list of tensors packs (bytes)."""


SHARE_BUCKET_BYTES = 4 * 2**20
"""Smallest buffer of a sum or gather by shares (bytes): memory that it needs besides. At most `SHARE_BUCKETS` are used."""

SHARE_BUCKETS = 32


@dataclass(frozen=True)
class NodeArray:
    """An array that the ranks of a node share (`GridComm.node_array`)."""

    array: np.ndarray
    """The same memory on each rank of the node."""
    publish: Callable[[], None]
    """Let all ranks of the node see what any of them has written. Collective over ``node_comm``."""


@dataclass
class Traffic:
    """What this rank has sent into collectives since the start."""

    num_collectives: int = 0
    """Tensor collectives that this rank took part in."""
    num_bytes: int = 0
    """Bytes of the tensors that it gave to them."""
    seconds: float = 0.0
    """Time in them, waiting for the other ranks included (seconds)."""
    num_object_collectives: int = 0
    """Collectives of Python objects (start, checks, errors; never in a training step)."""


class GridComm:
    """Collectives over the axes of the process grid; this class: one process, nothing to do.

    Parameters
    ----------
    grid : Grid
        Place of this rank.
    device : torch.device
        Device of this rank.
    reduction : {"axes", "world"}
        How `sum_` over the world goes: over the sample group and then over the data group, or at once.
    compression : {"none", "fp16", "bf16"}
        What `sum_` and `reduce_scatter_` send where they are asked to compress.

    Attributes
    ----------
    sample_comm, data_comm, world_comm : mpi4py.MPI.Intracomm or None
        The communicators of the groups (None in a single process without MPI).
    sample_set, data_set : horovod.torch.ProcessSet or None
        The Horovod process sets of the same ranks (None for an axis of extent 1).
    node_comm : mpi4py.MPI.Intracomm or None
        The communicator of the ranks that share memory with this one.
    local_rank, local_size : int
        This rank among the ranks of its node, and their number.
    traffic : Traffic
        Count of the collectives so far.
    """

    library = "none"
    sample_comm = data_comm = world_comm = node_comm = None
    sample_set = data_set = None
    local_rank, local_size = 0, 1

    def __init__(
        self,
        grid: Grid,
        device: torch.device | str = "cpu",
        reduction: Literal["axes", "world"] = "axes",
        compression: Compression = "none",
    ):
        self.grid = grid
        self.compression = compression
        self.device = torch.device(device)
        self.traffic = Traffic()
        self._extents = grid.extents
        axes = ("world",) if reduction == "world" else ("sample", "data")
        self._routes: dict[str, list[Axis]] = {
            "sample": [axis for axis in ("sample",) if self._extents[axis] > 1],
            "data": [axis for axis in ("data",) if self._extents[axis] > 1],
            "world": [axis for axis in axes if self._extents[axis] > 1],
        }

    # --- tensors --------------------------------------------------------------------------------

    def sum_(
        self,
        tensors: torch.Tensor | Sequence[torch.Tensor],
        axis: Axis = "world",
        *,
        compressed: bool = False,
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
        axis : {"sample", "data", "world"}
            Over which ranks.
        compressed : bool
            Send the numbers as ``compression`` says, half the bytes for rounding to 11 or 8 bits: each rank
            sums its part of the numbers of all others, not in halves, and sends the sums around. All ranks get the same.
        """
        if compressed and self.compression != "none":
            self._sum_compressed_(tensors, axis)
        else:
            self._reduce_all_(tensors, axis, "sum")

    def reduce_scatter_(self, flat: torch.Tensor, axis: Axis, *, compressed: bool = False) -> torch.Tensor:
        """Sum flat tensors [n] over an axis, each rank its share (`hpc_bnn.grid.share`), and return a view of it.

        In place; what is not this rank's share is left as it was. In buckets, so that little memory is needed besides.

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``; it costs nothing over one rank.

        Parameters
        ----------
        flat : Tensor
            [n], contiguous, of float32 or float64, alike on each rank.
        axis : {"sample", "data", "world"}
            Over which ranks.
        compressed : bool
            As for `sum_`.
        """
        flat = flat.detach()
        shares, index = self._shares(len(flat), axis)
        for spans in _bucket_spans(shares, flat.element_size()):
            parts, mine = [flat[span.start : span.stop] for span in spans], spans[index]
            if compressed and self.compression != "none":
                encoded = [encode(part, self.compression) for part in parts]
                packed = torch.cat(encoded)
                with self._counted(packed):
                    received = self._all_to_all(packed, [len(part) for part in encoded], axis)
                contents = received.view(len(spans), -1)
                result = sum(decode(content, self.compression, flat.dtype) for content in contents)
            else:
                packed = torch.cat(parts)
                with self._counted(packed):
                    result = self._reduce_scatter(packed, axis)
            flat[mine.start : mine.stop] = result
        return flat[shares[index].start : shares[index].stop]

    def gather_shares_(self, flat: torch.Tensor, axis: Axis, *, compressed: bool = False) -> None:
        """Overwrite the shares of the other ranks of an axis with what they have there (see `reduce_scatter_`).

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``. With ``compressed`` the own share is
        rounded as the others see it.
        """
        flat = flat.detach()
        shares, index = self._shares(len(flat), axis)
        is_compressed = compressed and self.compression != "none"
        for spans in _bucket_spans(shares, flat.element_size()):
            part = flat[spans[index].start : spans[index].stop]
            part = encode(part, self.compression) if is_compressed else part
            with self._counted(part):
                gathered = self._gather(part, axis)
            lengths = [encoded_bytes(len(span)) if is_compressed else len(span) for span in spans]
            for span, content in zip(spans, gathered.split(lengths)):
                content = decode(content, self.compression, flat.dtype) if is_compressed else content
                flat[span.start : span.stop] = content

    def max_(self, tensors: torch.Tensor | Sequence[torch.Tensor], axis: Axis = "world") -> None:
        """Replace each tensor, in place, by its elementwise maximum over an axis (see `sum_`)."""
        self._reduce_all_(tensors, axis, "max")

    def gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return the tensors of all ranks of an axis, one after another along dim 0, on each of them.

        Collective over ``sample_comm`` or ``data_comm``, by ``axis``; it costs nothing over one rank.

        Parameters
        ----------
        tensor : Tensor
            [n, ...], of a floating-point dtype; n may differ between ranks, the rest may not. Where an extent of the rest
            is 0, nothing is exchanged.
        axis : {"sample", "data"}
            Over which ranks.
        """
        if not self._routes[axis] or 0 in tensor.shape[1:]:
            return tensor
        is_half = tensor.dtype in (torch.bfloat16, torch.float16)
        wide = tensor.detach().float() if is_half else tensor.detach()
        with self._counted(wide):
            return self._gather(wide.contiguous(), axis).to(tensor.dtype)

    def broadcast_(
        self, tensors: torch.Tensor | Sequence[torch.Tensor], root: int = 0, axis: Axis = "world"
    ) -> None:
        """Overwrite tensors with those of the rank with index ``root`` along an axis.

        Collective over ``sample_comm``, ``data_comm`` or the world, by ``axis``.
        """
        if self._extents[axis] == 1:
            return
        with _packed_buckets(tensors) as buckets:
            for flat in buckets:
                with self._counted(flat):
                    self._broadcast_(flat, root, axis)

    def broadcast_optimizer_state(self, optimizer: torch.optim.Optimizer, root: int = 0) -> None:
        """Overwrite the state of an optimizer with that of world rank ``root``. Collective over the world.

        The other ranks need no state of their own: a new optimizer is filled.
        """
        is_root = self.grid.rank == root
        state = self.broadcast_tree(optimizer.state_dict() if is_root else None, root)
        if not is_root:
            optimizer.load_state_dict(state)

    def broadcast_tree(self, tree: Any, root: int = 0) -> Any:
        """Return the nested dicts and lists of world rank ``root`` on all ranks. Collective over the world.

        Tensors travel as such; they come out on this rank's device, those from the CPU on the CPU.
        """
        if self.grid.world_size == 1:
            return tree
        outline = self.broadcast_object(map_leaves(tree, torch.Tensor, _Outline.of), root)
        if self.grid.rank != root:
            tree = map_leaves(outline, _Outline, lambda o: o.empty(self.device))
        tensors: list[torch.Tensor] = []
        map_leaves(tree, torch.Tensor, tensors.append)
        self.broadcast_(tensors, root)
        return tree

    # --- Python objects ---------------------------------------------------------------------------

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return the object of world rank ``root`` on all ranks. Collective over the world."""
        return value

    def gather_objects(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        """Return the objects of all ranks of an axis or node, in rank order, on each of them. Collective."""
        return [value]

    def barrier(self) -> None:
        """Wait for all ranks. Collective over the world."""

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype | str) -> NodeArray:
        """Return a new array in memory that the ranks of a node share; alone, in ordinary memory.

        Collective over ``node_comm``.

        Parameters
        ----------
        shape : tuple of int
            The same on each rank.
        dtype : dtype
            Of NumPy.

        Raises
        ------
        CommunicationError
            There is not that much shared memory.
        """
        return NodeArray(np.empty(shape, dtype), lambda: None)

    @contextlib.contextmanager
    def agree(self, doing: str) -> Iterator[None]:
        """Run a block; if it raises on any rank, raise the same error on all. Collective over the world.

        For what can fail on one rank only: files, memory, hardware. The block itself must contain no
        collective, or the ranks that succeed wait inside it for the one that failed.

        Parameters
        ----------
        doing : str
            What the block does, for the message: "reading data/digits".

        Raises
        ------
        HpcBnnError
            Of the class of the first failing rank's error (`RankError` for a foreign class), with rank
            and host in its message.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        report = None
        if error is not None:
            kind = type(error) if isinstance(error, HpcBnnError) else RankError
            text = str(error) if isinstance(error, HpcBnnError) else f"{type(error).__name__}: {error}"
            report = (kind, self.grid.rank, socket.gethostname(), text)
        reports = [r for r in self.gather_objects(report) if r is not None]
        if reports:
            kind, rank, host, text = reports[0]
            if self.grid.world_size == 1:
                raise kind(f"{doing}: {text}") from error
            others = f" (and {len(reports) - 1} other ranks)" if len(reports) > 1 else ""
            raise kind(f"rank {rank} on {host}{others}, {doing}: {text}") from error

    def check_replicas(
        self, tensors: torch.Tensor | Sequence[torch.Tensor], what: str, axis: Axis = "world"
    ) -> None:
        """Verify that tensors are bit for bit the same on all ranks of an axis. Collective.

        Raises
        ------
        CommunicationError
            Some rank has other bits: parameters that should be replicated have drifted apart.
        """
        if self.grid.world_size == 1:
            return
        digest = hashlib.sha256()
        for tensor in _as_list(tensors):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        digests = self.gather_objects((self.grid.rank, digest.digest()), axis)
        odd = [rank for rank, other in digests if other != digests[0][1]]
        # All ranks raise, also those of the groups that agree with themselves.
        odd = sorted({rank for ranks in self.gather_objects(odd) for rank in ranks})
        if odd:
            raise CommunicationError(
                f"{what}: the parameters of ranks {odd} have drifted from their replicas"
            )

    def close(self) -> None:
        """Wait for all ranks and leave the groups. Collective over the world; afterwards it is of no use."""

    def __enter__(self) -> GridComm:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:  # with an error the other ranks may never come here: it ends the job by itself
            self.close()

    # --- what a library provides ------------------------------------------------------------------

    def _reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        raise NotImplementedError

    def _broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        raise NotImplementedError

    def _gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        raise NotImplementedError

    def _reduce_scatter(self, flat: torch.Tensor, axis: Axis) -> torch.Tensor:
        raise NotImplementedError

    def _all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis) -> torch.Tensor:
        """Return what the ranks of the axis sent here, one after another, of parts with these lengths."""
        raise NotImplementedError

    # --- shared -------------------------------------------------------------------------------------

    def _reduce_all_(self, tensors, axis: Axis, operation: Operation) -> None:
        route = self._routes[axis]
        if not route:
            return
        with _packed_buckets(tensors) as buckets:
            for flat in buckets:
                if flat.numel() == 0:
                    continue  # on all ranks of the group alike
                for step in route:
                    with self._counted(flat):
                        self._reduce_(flat, step, operation)

    def _sum_compressed_(self, tensors, axis: Axis) -> None:
        for step in self._routes[axis]:
            with _packed_buckets(tensors) as buckets:
                for flat in buckets:
                    self.reduce_scatter_(flat, step, compressed=True)
                    self.gather_shares_(flat, step, compressed=True)

    def _shares(self, count: int, axis: Axis) -> tuple[list[range], int]:
        """Return the shares of all ranks of an axis, and this rank's place among them."""
        grid = self.grid
        index = {"sample": grid.sample_index, "data": grid.data_index, "world": grid.rank}[axis]
        return [share(count, self._extents[axis], rank) for rank in range(self._extents[axis])], index

    @contextlib.contextmanager
    def _counted(self, tensor: torch.Tensor) -> Iterator[None]:
        """Count a collective of this tensor."""
        start = time.perf_counter()
        yield
        self.traffic.num_collectives += 1
        self.traffic.num_bytes += tensor.numel() * tensor.element_size()
        self.traffic.seconds += time.perf_counter() - start


class MpiComm(GridComm):
    """Objects and shared memory by mpi4py; tensors are left to a subclass.

    Parameters
    ----------
    mpi : module
        mpi4py.MPI.
    node_size : int, optional
        Largest number of ranks that share memory, to give each part of a node (a socket) its own copy.
    """

    library = "mpi4py"

    def __init__(
        self,
        grid: Grid,
        device: torch.device | str = "cpu",
        reduction: Literal["axes", "world"] = "axes",
        compression: Compression = "none",
        *,
        mpi,
        node_size: int | None = None,
    ):
        super().__init__(grid, device, reduction, compression)
        self._mpi = mpi
        self.world_comm = mpi.COMM_WORLD
        self.sample_comm = self.world_comm.Split(color=grid.data_index, key=grid.sample_index)
        self.data_comm = self.world_comm.Split(color=grid.sample_index, key=grid.data_index)
        self.node_comm = _split_by_node(mpi, node_size)
        self.local_rank, self.local_size = self.node_comm.rank, self.node_comm.size
        self._object_comms = {
            "sample": self.sample_comm,
            "data": self.data_comm,
            "world": self.world_comm,
            "node": self.node_comm,
        }
        self._windows = []

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        self.traffic.num_object_collectives += 1
        return self.world_comm.bcast(value, root)

    def gather_objects(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        self.traffic.num_object_collectives += 1
        return self._object_comms[axis].allgather(value)

    def barrier(self) -> None:
        self.traffic.num_object_collectives += 1
        self.world_comm.Barrier()

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype | str) -> NodeArray:
        if self.local_size == 1:
            return super().node_array(shape, dtype)
        dtype = np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            # The first rank of the node gives all of it.
            mine = max(num_bytes, 1) if self.local_rank == 0 else 0
            window = self._mpi.Win.Allocate_shared(mine, 1, comm=self.node_comm)
        except self._mpi.Exception as error:
            raise CommunicationError(
                f"{num_bytes / 1e9:.2f} GB of shared memory cannot be had on {socket.gethostname()} ({error}). "
                "Make /dev/shm larger, or use --data.reading group or rank"
            ) from error
        self._windows.append(window)
        buffer, _ = window.Shared_query(0)
        window.Lock_all()

        def publish() -> None:
            window.Sync()
            self.node_comm.Barrier()
            window.Sync()

        return NodeArray(np.frombuffer(buffer, np.uint8, num_bytes).view(dtype).reshape(shape), publish)

    def close(self) -> None:
        self.barrier()
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._windows.clear()
        for comm in (self.sample_comm, self.data_comm, self.node_comm):
            comm.Free()


class HorovodComm(MpiComm):
    """The collectives of `GridComm` by Horovod (tensors) and mpi4py (objects)."""

    library = "horovod"

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        reduction: Literal["axes", "world"],
        compression: Compression = "none",
        *,
        mpi,
        hvd,
        node_size: int | None = None,
    ):
        super().__init__(grid, device, reduction, compression, mpi=mpi, node_size=node_size)
        self._hvd = hvd
        self._start_horovod()
        self._operations = {"sum": hvd.Sum, "max": hvd.Max}
        self._through_host = self.device.type == "cuda" and not hvd.nccl_built()
        if self._through_host and grid.rank == 0:
            logger.warning(
                "Horovod was built without NCCL: tensors go through host memory. "
                "Build it with HOROVOD_GPU_OPERATIONS=NCCL for direct reductions between GPUs"
            )

    def _start_horovod(self) -> None:
        """Initialise Horovod with one process set per sample group and per data group.

        Horovod refuses a set that equals the world (there the global set is used), wants all sets at
        init, and the same list in the same order on each rank.
        """
        grid, hvd = self.grid, self._hvd
        sets = {"sample": [], "data": []}
        if 1 < grid.sample_size < grid.world_size:
            sets["sample"] = [hvd.ProcessSet(list(grid.sample_group(d))) for d in range(grid.data_size)]
        if 1 < grid.data_size < grid.world_size:
            sets["data"] = [hvd.ProcessSet(list(grid.data_group(s))) for s in range(grid.sample_size)]
        if self.local_size == grid.world_size:
            # Within a node look for work more often: a step of the digits on two ranks took 3.0 instead of 3.5 ms.
            # Across nodes each look is a message to everyone: Horovod's default of 1 ms stays.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        if hvd.is_initialized():
            hvd.shutdown()
        hvd.init(comm=self.world_comm, process_sets=sets["sample"] + sets["data"])
        # Horovod's own exit handler stops it on all ranks: one that ends early would take it from the
        # others. Registered after Horovod's, this one runs before it.
        atexit.unregister(_wait_a_moment_for_the_others)
        atexit.register(_wait_a_moment_for_the_others)
        world = hvd.global_process_set
        if grid.sample_size > 1:
            self.sample_set = sets["sample"][grid.data_index] if sets["sample"] else world
        if grid.data_size > 1:
            self.data_set = sets["data"][grid.sample_index] if sets["data"] else world
        self._sets = {"sample": self.sample_set, "data": self.data_set, "world": world}
        self._ranks = {
            "sample": grid.sample_group(grid.data_index),
            "data": grid.data_group(grid.sample_index),
            "world": range(grid.world_size),
        }

    def _reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        # A stable name per buffer lets Horovod's response cache skip the negotiation.
        name = f"hpc_bnn.{operation}.{axis}.{flat.dtype}.{flat.numel()}"
        buffer = flat.cpu() if self._through_host and flat.is_cuda else flat
        self._hvd.allreduce_(buffer, op=self._operations[operation], process_set=self._sets[axis], name=name)
        if buffer is not flat:
            flat.copy_(buffer)

    def _broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        if self._through_host or not flat.is_cuda:
            # From host to host by MPI alone: 34,000 images per second reached a group of two ranks on two cores,
            # through Horovod's negotiation 8,000 to 28,000.
            buffer = flat.cpu()
            self._object_comms[axis].Bcast(buffer.view(torch.uint8).numpy(), root)
            flat.copy_(buffer) if flat.is_cuda else None
            return
        name = f"hpc_bnn.broadcast.{axis}.{flat.dtype}.{flat.numel()}"
        # Horovod counts the root by its world rank, in a process set too.
        self._hvd.broadcast_(flat, self._ranks[axis][root], process_set=self._sets[axis], name=name)

    def _gather(self, tensor: torch.Tensor, axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.gather.{axis}.{tensor.dtype}.{tuple(tensor.shape[1:])}"
        buffer = tensor.cpu() if self._through_host else tensor
        return self._hvd.allgather(buffer, name=name, process_set=self._sets[axis]).to(tensor.device)

    def _reduce_scatter(self, flat: torch.Tensor, axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.reduce_scatter.{axis}.{flat.dtype}.{flat.numel()}"
        buffer = flat.cpu() if self._through_host else flat
        return self._hvd.reducescatter(buffer, name=name, op=self._hvd.Sum, process_set=self._sets[axis]).to(
            flat.device
        )

    def _all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis) -> torch.Tensor:
        name = f"hpc_bnn.all_to_all.{axis}.{flat.dtype}.{flat.numel()}"
        buffer = flat.cpu() if self._through_host else flat
        splits = torch.tensor(counts, dtype=torch.int32)
        received, _ = self._hvd.alltoall(buffer, splits, name=name, process_set=self._sets[axis])
        return received.to(flat.device)

    def close(self) -> None:
        self.barrier()
        if self._hvd.is_initialized():
            self._hvd.shutdown()
        super().close()


# --- start and end -------------------------------------------------------------------------------------


def connect(
    sample_size: int = 1,
    device: str = "auto",
    reduction: Literal["axes", "world"] = "axes",
    compression: Compression = "none",
    *,
    node_size: int | None = None,
) -> GridComm:
    """Join the process grid of this job. Collective over the world.

    Under ``mpirun`` or ``srun`` the ranks of the job form the grid; without a launcher, one process is
    a grid of 1 x 1 and needs neither MPI nor Horovod. Calling it again makes a new grid of the same
    ranks; the former object is then of no use.

    Use it as a context (``with connect(2) as comm:``): at its end all ranks wait for each other, because
    Horovod stops on all of them when one process ends.

    Parameters
    ----------
    sample_size : int
        Extent of the sample axis; must divide the number of ranks.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` and ``cuda`` give each rank of a node its own GPU, by its rank on the node; ``auto``
        takes the CPU where there is no GPU.
    reduction : {"axes", "world"}
        See `GridComm`.
    compression : {"none", "fp16", "bf16"}
        What the sum of the gradient sends; other sums are never compressed.
    node_size : int, optional
        See `MpiComm`.

    Returns
    -------
    GridComm

    Raises
    ------
    ConfigError
        The sample axis does not fit the number of ranks, or the device is not there.
    CommunicationError
        Several ranks and no Horovod, a Horovod without MPI, or a launcher of another MPI.
    """
    mpi = _start_mpi()
    if mpi is None or mpi.COMM_WORLD.size == 1:
        logger.info("one process: no communication, all samples and examples are computed here")
        return GridComm(Grid(1, sample_size, 0), choose_device(device, 0, _num_visible_gpus()))
    world = mpi.COMM_WORLD
    _install_abort_hook()
    grid = Grid(world.size, sample_size, world.rank)
    hvd = _import_horovod(world)
    node = _split_by_node(mpi)
    local_rank, local_size = node.rank, node.size
    node.Free()
    set_num_threads(local_size)
    device = _agree_on_device(world, device, local_rank)
    comm = HorovodComm(grid, device, reduction, compression, mpi=mpi, hvd=hvd, node_size=node_size)
    _check_one_rank_per_gpu(comm)
    return comm


def connect_for_files(node_size: int | None = None) -> GridComm:
    """Join the ranks of this job for work on files: objects and shared memory, no tensors, no Horovod.

    Collective over the world. All ranks stand along the data axis.

    Parameters
    ----------
    node_size : int, optional
        See `MpiComm`.
    """
    mpi = _start_mpi()
    if mpi is None or mpi.COMM_WORLD.size == 1:
        return GridComm(Grid(1, 1, 0))
    _install_abort_hook()
    return MpiComm(Grid(mpi.COMM_WORLD.size, 1, mpi.COMM_WORLD.rank), mpi=mpi, node_size=node_size)


def world_size() -> int:
    """Number of ranks of this job. Local, but starts MPI.

    Raises
    ------
    CommunicationError
        The launcher started several ranks that cannot work together: no mpi4py, or another MPI.
    """
    mpi = _start_mpi()
    return mpi.COMM_WORLD.size if mpi else 1


def finalize() -> None:
    """End Horovod and MPI, so that this rank can exit with any code. Collective over the world.

    Without it ``python -m mpi4py`` answers an exit code other than 0 by aborting the job, which is right
    for an error of one rank and noise for one on which all ranks agreed.
    """
    mpi = _running_mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Barrier()
    hvd = sys.modules.get("horovod.torch")
    if hvd is not None and hvd.is_initialized():
        hvd.shutdown()
    if mpi is not None:
        mpi.Finalize()


def _running_mpi():
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _wait_a_moment_for_the_others() -> None:
    """At exit: let ranks that are a little behind finish. Bounded, because one of them may have failed."""
    if _running_mpi() is not None and sys.modules["horovod.torch"].is_initialized():
        wait_for_others(5.0)


def wait_for_others(seconds: float) -> bool:
    """Wait for all ranks to call this, at most some seconds; return whether they did. Collective."""
    mpi = _running_mpi()
    if mpi is None:
        return True
    request = mpi.COMM_WORLD.Ibarrier()
    end = time.monotonic() + seconds
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def abort(code: int) -> None:
    """End the whole job with an exit code, from this rank alone. Local."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = _running_mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Abort(code)


def launched_rank() -> int:
    """World rank of this process by the launcher's environment; 0 without a launcher. Local, no MPI."""
    return launcher_of(os.environ).rank


def choose_device(requested: str, local_rank: int, num_visible: int) -> torch.device:
    """Return the device of a rank. Local.

    One rank per GPU of the node; where the launcher shows each rank only its own GPU, that is number 0.

    Parameters
    ----------
    requested : str
        "auto", "cpu", "cuda" or "cuda:N".
    local_rank : int
        This rank among the ranks of its node.
    num_visible : int
        GPUs that this process sees.
    """
    kind, _, number = requested.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ConfigError(
            Fault("--device", requested, "the device is auto, cpu, cuda or cuda:N", "Leave it at auto")
        )
    if kind == "cpu" or (kind == "auto" and num_visible == 0):
        return torch.device("cpu")
    index = int(number) if number else local_rank % max(num_visible, 1)
    if index >= num_visible:
        raise ConfigError(
            Fault(
                "--device",
                requested,
                f"this process sees {num_visible} GPUs",
                "Ask the batch system for GPUs, check CUDA_VISIBLE_DEVICES, or use --device cpu",
            )
        )
    return torch.device("cuda", index)


# --- looking around ------------------------------------------------------------------------------------


def _start_mpi():
    """Import and thereby start mpi4py.MPI; None where there is none and one process needs none."""
    launched = launcher_of(os.environ).size or 1
    _be_gentle_when_oversubscribed()
    # Shared memory needs no network; Open MPI's UCX prints an error for each window where it has no device.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        if launched > 1:
            raise CommunicationError(
                f"{launched} ranks were launched, but mpi4py does not work here ({error}). "
                "Install mpi4py for the MPI of this launcher, or load its module"
            ) from error
        return None
    if launched > 1 and MPI.COMM_WORLD.size == 1:
        raise CommunicationError(
            f"the launcher started {launched} ranks, but {_mpi_name(MPI)} sees only one: the launcher belongs "
            f"to another MPI. Use the mpirun of this MPI (this is {sys.executable}), or srun --mpi=pmix"
        )
    return MPI


def _be_gentle_when_oversubscribed() -> None:
    """Let MPI yield the core while it waits, where ranks fill the node. Before MPI starts.

    Horovod adds a thread to each rank; with spinning waits the two fight for the core (measured on two
    ranks and two cores: a training step of 31 ms instead of 5 ms).
    """
    if (launcher_of(os.environ).local_size or 1) >= (os.cpu_count() or 1):
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")


def set_num_threads(local_size: int) -> None:
    """Share the cores among the ranks of a node, unless the user has set OMP_NUM_THREADS. Local."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        total = os.cpu_count() or 1
        bound = cores < total  # the launcher gave this rank cores of its own
        torch.set_num_threads(max(1, cores if bound else cores // local_size))


def _split_by_node(mpi, node_size: int | None = None):
    """Return the communicator of the ranks that share memory, in parts of at most ``node_size``. Collective."""
    node = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    if node_size is None:
        return node
    part = node.Split(color=node.rank // node_size, key=node.rank)
    node.Free()
    return part


def _num_visible_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _mpi_name(mpi) -> str:
    return mpi.Get_library_version().replace("\0", "").splitlines()[0].split(",")[0]


def _import_horovod(world):
    """Import Horovod on all ranks, or raise the same error on all. Collective over the world."""
    problem = None
    hvd = None
    try:
        import horovod.torch as hvd
    except Exception as error:  # a broken build raises many kinds of error
        problem = f"{type(error).__name__}: {error}"
    else:
        if not hvd.mpi_built():
            problem = "it was built without MPI"
    problems = [(rank, p) for rank, p in enumerate(world.allgather(problem)) if p]
    if problems:
        rank, problem = problems[0]
        raise CommunicationError(
            f"{world.size} ranks need Horovod, and it cannot be used on rank {rank} ({problem}). "
            "Build it for this PyTorch and MPI with tools/install_horovod.sh, or run one process without mpirun"
        )
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "600")
    return hvd


def _agree_on_device(world, requested: str, local_rank: int) -> torch.device:
    """Choose the device of this rank, or raise the same error on all. Collective over the world."""
    device, faults = None, ()
    try:
        device = choose_device(requested, local_rank, _num_visible_gpus())
    except ConfigError as error:
        faults = error.faults
    seen = world.allgather((faults, device and device.type, socket.gethostname()))
    for rank, (theirs, _, host) in enumerate(seen):
        if theirs:
            raise ConfigError(f"rank {rank} on {host}: {theirs[0]}")
    kinds = {kind: (rank, host) for rank, (_, kind, host) in reversed(list(enumerate(seen)))}
    if len(kinds) > 1:
        places = ", ".join(f"{kind} on rank {rank} ({host})" for kind, (rank, host) in sorted(kinds.items()))
        raise ConfigError(
            Fault(
                "--device",
                requested,
                f"the ranks must compute on one kind of device, and there is {places}",
                "Check the GPUs of that node, or use --device cpu",
            )
        )
    return device


def _check_one_rank_per_gpu(comm: HorovodComm) -> None:
    """Refuse two ranks on one GPU where NCCL would, warn elsewhere. Collective over the world."""
    uuid = None
    if comm.device.type == "cuda":
        torch.cuda.set_device(comm.device)
        uuid = str(torch.cuda.get_device_properties(comm.device).uuid)
    uuids = comm.gather_objects(uuid)
    shared = sorted({u for u in uuids if u is not None and uuids.count(u) > 1})
    if not shared:
        return
    ranks = [rank for rank, u in enumerate(uuids) if u == shared[0]]
    text = f"ranks {ranks} share one GPU ({shared[0]})"
    if comm._hvd.nccl_built():
        raise CommunicationError(f"{text}, which NCCL refuses. Start one rank per GPU of a node")
    if comm.grid.rank == 0:
        logger.warning("%s: right for a trial, slow for work. Start one rank per GPU of a node", text)


def _install_abort_hook() -> None:
    """Let an exception of one rank end the job, as ``python -m mpi4py`` does."""
    former = sys.excepthook

    def hook(kind, error, traceback):
        former(kind, error, traceback)
        abort(1)

    if getattr(former, "__module__", None) != __name__:
        sys.excepthook = hook


# --- packing -------------------------------------------------------------------------------------------


def _as_list(tensors: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


@dataclass(frozen=True)
class _Outline:
    """What a tensor looks like; one on the CPU (a counter of an optimizer) stays there."""

    shape: torch.Size
    dtype: torch.dtype
    is_cpu: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Outline:
        return cls(tensor.shape, tensor.dtype, tensor.device.type == "cpu")

    def empty(self, device: torch.device) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="cpu" if self.is_cpu else device)


def map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the leaves of a kind in nested dicts and lists."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_leaves(value, kind, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_leaves(value, kind, function) for value in tree]
    return tree


def _bucket_spans(shares: list[range], item_bytes: int) -> Iterator[list[range]]:
    """Yield parts of shares, one of each, that together fill a buffer; nothing for one share."""
    if len(shares) == 1:
        return
    num_bytes = sum(len(s) for s in shares) * item_bytes
    length = max(1, max(SHARE_BUCKET_BYTES, num_bytes // SHARE_BUCKETS) // item_bytes // len(shares))
    for offset in range(0, len(shares[0]), length):  # the first is the longest
        yield [s[offset : offset + length] for s in shares]


@contextlib.contextmanager
def _packed_buckets(tensors: torch.Tensor | Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Offer tensors as few flat buffers of one dtype; copy back what had to be copied.

    A contiguous tensor that fills a bucket alone is offered as a view, without a copy.
    """
    with torch.no_grad():
        originals = [t.detach() for t in _as_list(tensors)]
        # Horovod sums no bfloat16 and float16 loses too much; float32 is exact for both as operands.
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
        sources = [t.to(wide.get(t.dtype, t.dtype)).contiguous() for t in originals]
        pieces = [piece for t in sources for piece in t.view(-1).split(BUCKET_BYTES // t.element_size())]
        groups: list[list[torch.Tensor]] = []
        for piece in sorted(pieces, key=lambda p: (str(p.dtype), str(p.device))):  # sorted() is stable
            last = groups[-1] if groups else None
            if (
                last
                and (last[0].dtype, last[0].device) == (piece.dtype, piece.device)
                and sum(p.numel() for p in last) + piece.numel() <= BUCKET_BYTES // piece.element_size()
            ):
                last.append(piece)
            else:
                groups.append([piece])
        buckets = [group[0] if len(group) == 1 else torch.cat(group) for group in groups]
        yield buckets
        for group, bucket in zip(groups, buckets):
            if len(group) > 1:
                torch._foreach_copy_(group, list(bucket.split([p.numel() for p in group])))
        for original, source in zip(originals, sources):
            if original.data_ptr() != source.data_ptr():
                original.copy_(source)
