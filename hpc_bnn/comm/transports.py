"""The two interfaces below `GridComm`: what carries tensors, and what carries Python objects."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import CommunicationError, HpcBnnError, RankError
from ..grid import Axis, Grid, ranges

if TYPE_CHECKING:
    import torch

ObjectAxis = Literal[Axis, "node"]
Operation = Literal["sum", "max"]


class TensorTransport:
    """The collectives of tensors that a communication library provides, over the axes of a grid.

    Inherit from it, and give the class to ``connect(backend=...)`` or its import path to ``--backend``. `GridComm` makes
    the object once the grid is known, on all ranks together, and calls it with tensors that have no graph, lie in
    one piece, are not empty, and are alike on all ranks where nothing else is said; never for an axis of extent 1.

    It is made with the place and the device of this rank, and with what carries what the ranks have to tell each other
    at the start; with MPI that has the communicators of the axes.
    """

    name: str = "none"
    """As in ``--backend``; it stands in the files of a run."""
    needs_own_gpu: bool = False
    """Whether two ranks on one GPU are refused (NCCL)."""
    is_through_host: bool = False
    """Whether tensors of GPUs have to be copied into host memory before, which `GridComm` does."""
    can_overlap: bool = True
    """Whether a sum that was begun makes progress while this rank computes."""

    def __init__(self, grid: Grid, device: torch.device, objects: ObjectTransport):
        """Start the library for a grid. Collective over the world."""

    def reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        """Replace numbers [n] of float32, float64 or integers by their sum or maximum over an axis. Collective over it."""
        raise NotImplementedError

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], object]:
        """Begin a sum over an axis, and return what waits for it. Collective over the axis, in one order on all ranks."""
        raise NotImplementedError

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        """Overwrite [n] of any dtype with that of the rank with index ``root`` along an axis. Collective over it."""
        raise NotImplementedError

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        """Return [n, ...] of all ranks of an axis along dim 0; n may differ, and be 0. Collective over the axis.

        ``lengths`` are the n of all ranks, where they are known.
        """
        raise NotImplementedError

    def reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Return the sum [n] over an axis of the row of [ranks, n] that is this rank's. Collective over the axis.

        Where a class does not define this, `GridComm` exchanges the rows, and each rank sums its own in their order.
        """
        raise NotImplementedError

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis, rows: list[int]) -> torch.Tensor:
        """Send to each rank of an axis its piece of [n], and return the pieces that came here. Collective over the axis.

        They come one after another, by rank. Rank j gets ``counts[j]`` numbers of each row that another rank has, and rank i has
        ``rows[i]`` of them: the piece of rank i for rank j has ``rows[i] * counts[j]`` numbers. Some of them may be 0, and n
        then, too. `GridComm` gathers instead where a class does not define this.
        """
        raise NotImplementedError

    def group(self, axis: Axis) -> Any:
        """Return what the library has for the ranks of an axis (None for an axis of extent 1). Local."""
        return None

    def group_ranks(self, axis: Axis) -> list[int]:
        """Return the world ranks of this rank's group along an axis, as the library has them. Local."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the groups. Collective over the world."""


class ObjectTransport:
    """The collectives of Python objects, and the memory that the ranks of a node share.

    Those of one process: it gets back what it gives.
    """

    rank, size = 0, 1
    """This rank in the world, and the number of ranks."""
    local_rank, local_size = 0, 1
    """This rank among those with which it shares memory, and their number."""
    rank_on_node, ranks_on_node = 0, 1
    """This rank among all of its node, which share its GPUs and cores, and their number."""
    comms: dict[ObjectAxis, Any] = {}  # noqa: RUF012
    """The communicators of the axes and of the node, with MPI."""

    def enter(self, grid: Grid) -> None:
        """Make the groups of a grid of these ranks. Collective over the world."""

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """Return the object of world rank ``root``. Collective over the world."""
        return value

    def gather(self, value: Any, axis: ObjectAxis = "world") -> list[Any]:
        """Return the objects of all ranks of an axis or of the node, in rank order. Collective over them."""
        return [value]

    def gather_first(self, value: Any, axis: Axis) -> list[Any]:
        """Return the objects of all ranks of an axis on its first rank, in order, elsewhere nothing. Collective over it."""
        return [value]

    def barrier(self) -> None:
        """Wait for all ranks. Collective over the world."""

    def node_array(self, shape: tuple[int, ...], dtype: np.dtype) -> NodeArray:
        """Return a new array in memory that the ranks of the node share. Collective over the node."""
        return NodeArray(np.empty(shape, dtype), lambda: None)

    def close(self) -> None:
        """Leave the groups. Collective over the world."""


@dataclass(frozen=True)
class NodeArray:
    """An array that the ranks of a node share (`GridComm.node_array`)."""

    array: np.ndarray
    """The same memory on each rank of the node."""
    publish: Callable[[], None]
    """Let all ranks of the node see what any of them has written. Collective over the node."""


@contextlib.contextmanager
def agreed(objects: ObjectTransport, doing: str) -> Iterator[None]:
    """Do the same as `GridComm.agree`, below a grid. Collective over the world."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    report = None
    if error is not None:
        ours = error if isinstance(error, HpcBnnError) else RankError(f"{type(error).__name__}: {error}")
        report = (type(ours), ours.args, f"{doing}: {ours.where}", objects.rank, socket.gethostname())
    reports = [r for r in objects.gather(report) if r is not None]
    if reports:
        kind, parts, where, rank, host = reports[0]
        if objects.size > 1:
            others = f" (and {len(reports) - 1} other ranks)" if len(reports) > 1 else ""
            where = f"rank {rank} on {host}{others}, {where}"
        raise kind(*parts, where=where) from error


def check_equal(
    objects: ObjectTransport, values: Mapping[str, object], where: str, remedy: str, group: int = 0
) -> None:
    """Do the same as `GridComm.check_equal`, below a grid, for ranks that name the same group. Collective over the world.

    One gather of a digest, and where digests differ one of the texts of all values.
    """
    texts = {name: str(value) for name, value in values.items()}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).digest()
    digests = objects.gather((group, digest))
    if len(set(digests)) == len({group for group, _ in digests}):
        return
    gathered, faults = objects.gather((group, texts)), []
    for name in dict.fromkeys(name for _, others in gathered for name in others):
        found: dict[str, list[int]] = {}
        for rank, (_, others) in enumerate(gathered):
            found.setdefault(others.get(name, "absent"), []).append(rank)
        if len({(group, others.get(name)) for group, others in gathered}) > len({group for group, _ in gathered}):
            shown = (text if len(text) < 80 else f"{text[:77]}..." for text in found)
            places = (f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)}" for ranks in found.values())
            faults.append(f"{name} is {', '.join(map(' on '.join, zip(shown, places)))}")
    raise RankError(f"{where}the ranks differ, and must not: {'; '.join(faults)}. {remedy}")


def no_shared_memory(num_bytes: int, error: object) -> CommunicationError:
    """Return the error of a `GridComm.node_array` that does not fit."""
    return CommunicationError(
        f"{num_bytes / 1e9:.2f} GB of shared memory cannot be had on {socket.gethostname()} ({error}). "
        "Make /dev/shm larger, or use <data.reading> group or rank"
    )
