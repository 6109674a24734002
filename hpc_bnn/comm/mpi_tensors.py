"""Tensors by MPI itself, on the memory of the tensors: nothing has to be built."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..grid import Axis, Grid
from . import mpi
from .transports import ObjectTransport, Operation, TensorTransport

logger = logging.getLogger(__name__)

MAX_COUNT = 2**30
"""Most numbers in a message: counts and displacements of MPI before its version 4 are below 2^31."""
PROBE_SECONDS = 120.0
"""Longest trial of `reads_gpus`: a process that imports torch and starts CUDA."""


class MpiTensors(TensorTransport):
    """Tensors by the MPI of the launcher (mpi4py); sums do not go on while this rank computes."""

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
        for piece in flat.split(MAX_COUNT):
            with _watched(f"a reduction over {axis}"):
                self._comms[axis].Allreduce(self._mpi.IN_PLACE, _memory(piece), self._operations[operation])

    def start_sum_(self, flat: torch.Tensor, axis: Axis) -> Callable[[], object]:
        self.reduce_(flat, axis, "sum")  # MPI makes no progress by itself
        return lambda: None

    def broadcast_(self, flat: torch.Tensor, root: int, axis: Axis) -> None:
        for piece in flat.view(torch.uint8).split(MAX_COUNT):
            with _watched(f"a broadcast over {axis}"):
                self._comms[axis].Bcast(_memory(piece), root)

    def gather(self, tensor: torch.Tensor, axis: Axis, lengths: Sequence[int] | None = None) -> torch.Tensor:
        comm, width = self._comms[axis], tensor.shape[1:].numel()
        if lengths is None:
            with _watched(f"a gather over {axis}"):
                lengths = list(comm.allgather(len(tensor)))
        gathered = tensor.new_empty(sum(lengths), *tensor.shape[1:])
        parts = gathered.split(list(lengths))
        rows = max(1, MAX_COUNT // (len(lengths) * width))
        for start in range(0, max(lengths), rows):
            now = [part[start : start + rows] for part in parts]
            counts = [piece.numel() for piece in now]
            is_whole = counts == [part.numel() for part in parts]
            received = gathered if is_whole else tensor.new_empty(sum(counts))
            with _watched(f"a gather over {axis}"):
                comm.Allgatherv(_memory(tensor[start : start + rows]), [_memory(received), counts])
            if not is_whole:
                for piece, content in zip(now, received.split(counts)):
                    piece.copy_(content.view_as(piece))
        return gathered

    def reduce_scatter(self, rows: torch.Tensor, axis: Axis) -> torch.Tensor:
        """Each rank sums its row from all others: MPI's own took Open MPI 5 three times as long (docs/collectives.md)."""
        return self.all_to_all(rows.view(-1), [rows.shape[1]] * len(rows), axis).view_as(rows).sum(0)

    def all_to_all(self, flat: torch.Tensor, counts: list[int], axis: Axis) -> torch.Tensor:
        size, mine = len(counts), counts[self._grid.indices[axis]]
        received, pieces = flat.new_empty(size, mine), flat.split(counts)
        most = max(1, MAX_COUNT // size)
        for start in range(0, max(counts), most):
            lengths = [len(piece[start : start + most]) for piece in pieces]
            is_whole = lengths == counts
            sent = flat if is_whole else torch.cat([piece[start : start + most] for piece in pieces])
            here = received if is_whole else received[:, start : start + most].contiguous()
            with _watched(f"an exchange over {axis}"):
                self._comms[axis].Alltoallv([_memory(sent), lengths], [_memory(here), [here.shape[1]] * size])
            if not is_whole:
                received[:, start : start + most] = here
        return received.view(-1)

    def group(self, axis: Axis) -> Any:
        return self._comms[axis] if self._grid.extents[axis] > 1 else None

    def group_ranks(self, axis: Axis) -> list[int]:
        group = self._comms[axis].Get_group()
        return list(group.Translate_ranks(None, self._comms["world"].Get_group()))


def _memory(tensor: torch.Tensor) -> Any:
    """Return the memory of a tensor in one piece, as mpi4py reads it."""
    if tensor.is_cuda:
        torch.cuda.current_stream().synchronize()  # MPI knows no streams
        return tensor
    return tensor.numpy()


# --- a rank that never comes ----------------------------------------------------------------------------


class _Watch:
    """Since when this rank has been in which collective; a thread looks at it."""

    since: float | None = None
    what = ""
    thread: threading.Thread | None = None


@contextlib.contextmanager
def _watched(what: str) -> Iterator[None]:
    """End the job if the block takes longer than `mpi.STALL_SECONDS`: MPI itself waits for ever. Local."""
    if _Watch.thread is None:
        _Watch.thread = threading.Thread(target=_look, daemon=True)
        _Watch.thread.start()
    _Watch.what, _Watch.since = what, time.monotonic()
    try:
        yield
    finally:
        _Watch.since = None


def _look() -> None:
    while True:
        time.sleep(min(1.0, mpi.STALL_SECONDS / 10))
        since = _Watch.since
        if since is not None and time.monotonic() - since > mpi.STALL_SECONDS:
            print(
                f"hpc-bnn: error: rank {mpi.running_mpi().COMM_WORLD.rank} on {socket.gethostname()} has waited "
                f"{mpi.STALL_SECONDS:.0f} s in {_Watch.what}. A rank that does not say this has failed or hangs: look there",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(min(2.0, mpi.STALL_SECONDS / 10))  # the other ranks that wait say it, too
            if mpi.running_mpi().Query_thread() == mpi.running_mpi().THREAD_MULTIPLE:
                mpi.abort(1)
            os._exit(1)  # the launcher ends the job


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
_OF_LAUNCHERS = ("OMPI_COMM_", "PMI", "PRTE_", "SLURM_", "HYDRA", "MPI_LOCAL", "PALS_", "JSM_")


def reads_gpus(device: torch.device) -> bool:
    """Whether the MPI reads and writes the memory of a GPU. Local.

    A child process tries it, because a wrong guess ends a process with a segmentation fault. It is no rank of this job.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    command = [sys.executable, "-c", PROBE, str(device)]
    try:
        return subprocess.run(command, env=environment, capture_output=True, timeout=PROBE_SECONDS).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
