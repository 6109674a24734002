"""Join the ranks of a job, and leave them."""

from __future__ import annotations

import functools
import logging
import os

import torch

from ..config import Backend, Compression, Reduction
from ..errors import CommunicationError
from ..grid import Grid
from . import horovod, mpi, torch_distributed, torchrun
from .base import GridComm
from .devices import agree_on_device, check_one_rank_per_gpu, choose_device, num_visible_gpus, set_num_threads
from .horovod import HorovodComm
from .launcher import launcher_of
from .mpi import MpiComm, install_abort_hook, running_mpi, split_by_node, start_mpi
from .torch_distributed import TorchComm
from .torchrun import TorchrunComm

logger = logging.getLogger(__name__)


def connect(
    sample_size: int = 1,
    device: str = "auto",
    reduction: Reduction = "axes",
    compression: Compression = "none",
    *,
    backend: Backend = "auto",
    node_size: int | None = None,
) -> GridComm:
    """Join the process grid of this job. Collective over the world.

    Under ``mpirun``, ``srun`` or ``torchrun`` the ranks of the job form the grid; without a launcher, one process is
    a grid of 1 x 1 and needs neither MPI nor a library for tensors. A second call makes a new grid of the same ranks;
    do not use the former object afterwards.

    Use it as a context (``with connect(2) as comm:``): at its end all ranks wait for each other, because
    Horovod stops on all of them when one process ends.

    Parameters
    ----------
    sample_size : int
        Extent of the sample axis; must divide the number of ranks.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        ``auto`` and ``cuda`` give each rank of a node its own GPU, by its rank on the node; ``auto`` uses the CPU if
        there is no GPU.
    reduction : {"axes", "world"}
        See `GridComm`.
    compression : {"none", "fp16", "bf16"}
        Number format for the sum of the gradient; other sums are never compressed.
    backend : {"auto", "horovod", "torch"}
        Communication library for tensors: Horovod or torch.distributed. ``auto``: Horovod if all ranks can use it.
    node_size : int, optional
        See `MpiComm`.

    Returns
    -------
    GridComm

    Raises
    ------
    ConfigError
        The sample axis does not fit the number of ranks, or the device does not exist.
    CommunicationError
        The job has several ranks and the library does not start, or the launcher belongs to another MPI.
    """
    if torchrun.launcher():
        return _connect_torchrun(sample_size, device, reduction, compression, backend, node_size)
    started = start_mpi()
    if started is None or started.COMM_WORLD.size == 1:
        logger.info("one process: no communication, all samples and examples are computed here")
        return GridComm(Grid(1, sample_size, 0), choose_device(device, 0, num_visible_gpus()))
    world = started.COMM_WORLD
    install_abort_hook()
    grid = Grid(world.size, sample_size, world.rank)
    node = split_by_node(started)
    local_rank, local_size = node.rank, node.size
    node.Free()
    set_num_threads(local_size)
    device = agree_on_device(world.allgather, device, local_rank)
    library = _choose_library(world, backend, device)
    comm = library(grid, device, reduction, compression, mpi=started, node_size=node_size)
    check_one_rank_per_gpu(comm)
    return comm


def _connect_torchrun(sample_size, device, reduction, compression, backend, node_size) -> TorchrunComm:
    """Do the same as `connect`, for ranks without MPI."""
    if backend == "horovod":
        raise CommunicationError(
            "torchrun starts ranks without MPI, and Horovod needs it. Use mpirun or srun, or <backend> torch"
        )
    job = torchrun.launcher()
    install_abort_hook(abort)
    grid = Grid(job.size, sample_size, job.rank)
    torchrun.join()
    local_rank, local_size = torchrun.local_place()
    set_num_threads(local_size)
    device = agree_on_device(torchrun.allgather, device, local_rank)
    comm = TorchrunComm(grid, device, reduction, compression, node_size=node_size)
    check_one_rank_per_gpu(comm)
    return comm


def _choose_library(world, backend: Backend, device: torch.device) -> type[HorovodComm] | type[TorchComm]:
    """Return the `GridComm` class of the communication library, the same on all ranks. Collective over the world."""
    if backend == "torch":
        return TorchComm
    is_free = backend == "auto"
    problem = horovod.why_not(world, needs_nccl=is_free and torch_distributed.has_nccl_for(device))
    if problem is None:
        return HorovodComm
    if not is_free:
        raise CommunicationError(
            f"{world.size} ranks need Horovod, and {problem}. "
            "Build it for this PyTorch and MPI with tools/install_horovod.sh, or use <backend> torch"
        )
    if world.rank == 0:
        _say_once(f"torch.distributed carries the tensors; of Horovod: {problem}")
    return TorchComm


@functools.cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def connect_for_files(node_size: int | None = None) -> GridComm:
    """Join the ranks of this job for work on files: objects and shared memory, no tensors, no Horovod.

    Collective over the world. All ranks lie along the data axis.

    Parameters
    ----------
    node_size : int, optional
        See `MpiComm`.
    """
    if job := torchrun.launcher():
        install_abort_hook(abort)
        torchrun.join()
        return TorchrunComm(Grid(job.size, 1, job.rank), node_size=node_size)
    started = start_mpi()
    if started is None or started.COMM_WORLD.size == 1:
        return GridComm(Grid(1, 1, 0))
    install_abort_hook()
    return MpiComm(Grid(started.COMM_WORLD.size, 1, started.COMM_WORLD.rank), mpi=started, node_size=node_size)


def world_size() -> int:
    """Return the number of ranks of this job. Local, but starts MPI, except under torchrun.

    Raises
    ------
    CommunicationError
        The launcher started several ranks that cannot work together: no mpi4py, or another MPI.
    """
    if job := torchrun.launcher():
        return job.size
    started = start_mpi()
    return started.COMM_WORLD.size if started else 1


def wait_for_others(seconds: float) -> bool:
    """Wait for all ranks to call this, at most some seconds; return whether they did. Collective."""
    return torchrun.wait_for_others(seconds) if torchrun.launcher() else mpi.wait_for_others(seconds)


def abort(code: int) -> None:
    """End the whole job with an exit code, from this rank alone. Local."""
    mpi.abort(code)
    if torchrun.launcher():
        os._exit(code)  # torchrun ends the others


def finalize() -> None:
    """End the library for tensors and MPI, so that this rank can exit with any code. Collective over the world.

    Without it ``python -m mpi4py`` answers an exit code other than 0 by aborting the job, which is right
    for an error of one rank and noise for one on which all ranks agreed.
    """
    if torchrun.launcher():
        wait_for_others(5.0)  # torchrun ends those that are still there when one has failed
    running = running_mpi()
    if running is not None:
        running.COMM_WORLD.Barrier()
    horovod.shutdown()
    torch_distributed.shutdown()
    if running is not None:
        running.Finalize()


def launched_rank() -> int:
    """World rank of this process by the launcher's environment; 0 without a launcher. Local, no MPI."""
    return launcher_of(os.environ).rank
