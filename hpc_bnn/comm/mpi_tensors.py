"""Tensors by MPI itself, on the memory of the tensors: nothing has to be built."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..grid import Axis, Grid
from . import mpi
from .launcher import without_launcher
from .transports import ObjectTransport, Operation, TensorTransport

logger = logging.getLogger(__name__)

PROBE_SECONDS = 120.0
"""Longest trial of `reads_gpus`: a process that imports torch and starts CUDA."""


class MpiTensors(TensorTransport):
    """Tensors by the MPI of the launcher (mpi4py); sums do not go on while this rank computes.

    It has no `reduce_scatter`: Open MPI 5's own took three times as long as Horovod's (docs/collectives.md).
    """

    name = "mpi"
    can_overlap = False

    def __init__(self, grid: Grid, device: torch.device, objects: ObjectTransport):
        self._grid, self._comms = grid, objects.comms
        self._mpi = mpi.running_mpi()
        self._operations = {"sum": self._mpi.SUM, "max": self._mpi.MAX}
        if device.type == "cuda":
            # One trial on each node
            mine = reads_gpus(device) if objects.local_rank == 0 else True
            self.is_through_host = not all(objects.gather(mine))
            if self.is_through_host and grid.is_first("world"):
                logger.warning("this MPI cannot read the memory of GPUs: tensors go through host memory")

    def reduce_(self, flat: torch.Tensor, axis: Axis, operation: Operation) -> None:
        for piece in flat.split(mpi.MAX_COUNT):
            self._comms[axis].Allreduce(self._mpi.IN_PLACE, mpi.memory_of(piece), self._operations[operation])

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], object]:
        self.reduce_(flat, axis, "sum")  # MPI makes no progress by itself
        return lambda: None

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        mpi.broadcast_(self._comms[axis], flat, root)

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        comm, width = self._comms[axis], tensor.shape[1:].numel()
        if lengths is None:
            lengths = list(comm.allgather(len(tensor)))
        gathered = tensor.new_empty(sum(lengths), *tensor.shape[1:])
        parts = gathered.split(list(lengths))
        rows = max(1, mpi.MAX_COUNT // (len(lengths) * width))
        for start in range(0, max(lengths), rows):
            now = [part[start : start + rows] for part in parts]
            counts = [piece.numel() for piece in now]
            is_whole = counts == [part.numel() for part in parts]
            received = gathered if is_whole else tensor.new_empty(sum(counts))
            comm.Allgatherv(mpi.memory_of(tensor[start : start + rows]), [mpi.memory_of(received), counts])
            if not is_whole:
                for piece, content in zip(now, received.split(counts)):
                    piece.copy_(content.view_as(piece))
        return gathered

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis, rows: list[int]) -> torch.Tensor:
        size, index = len(counts), self._grid.indices[axis]
        pieces = flat.split([rows[index] * count for count in counts])
        received = flat.new_empty(sum(rows) * counts[index])
        parts = received.split([num_rows * counts[index] for num_rows in rows])
        longest, most = max(rows) * max(counts), max(1, mpi.MAX_COUNT // size)
        for start in range(0, longest, most):  # as often on all ranks
            of_mine, of_others = ([piece[start : start + most] for piece in some] for some in (pieces, parts))
            sent, here = (flat, received) if longest <= most else (torch.cat(of_mine), torch.cat(of_others))
            lengths, lengths_here = ([len(piece) for piece in some] for some in (of_mine, of_others))
            self._comms[axis].Alltoallv([mpi.memory_of(sent), lengths], [mpi.memory_of(here), lengths_here])
            if here is not received:
                for part, content in zip(of_others, here.split(lengths_here)):
                    part.copy_(content)
        return received

    def group(self, axis: Axis) -> Any:
        return self._comms[axis] if self._grid.extents[axis] > 1 else None

    def group_ranks(self, axis: Axis) -> list[int]:
        group = self._comms[axis].Get_group()
        return list(group.Translate_ranks(None, self._comms["world"].Get_group()))


# --- GPUs -----------------------------------------------------------------------------------------------

PROBE = """
import sys, torch
from mpi4py import MPI
sent = torch.arange(100_000.0, device=sys.argv[1])
received = torch.zeros_like(sent)
if sent.is_cuda:
    torch.cuda.synchronize()
MPI.COMM_SELF.Sendrecv(sent, 0, recvbuf=received, source=0)
MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, received)
sys.exit(not torch.equal(sent, received))
"""


@functools.cache
def reads_gpus(device: torch.device) -> bool:
    """Whether the MPI reads and writes the memory of a GPU. Local.

    A child process tries it, because a wrong guess ends a process with a segmentation fault. It is no rank of this job.
    """
    command, environment = [sys.executable, "-c", PROBE, str(device)], without_launcher(os.environ)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=PROBE_SECONDS)
        return done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
