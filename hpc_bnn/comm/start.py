"""Joining the ranks of a job, and leaving them."""

from __future__ import annotations

import logging
import os
from typing import Literal

from ..compression import Compression
from ..grid import Grid
from ..launcher import launcher_of
from . import horovod
from .base import GridComm
from .devices import agree_on_device, check_one_rank_per_gpu, choose_device, num_visible_gpus, set_num_threads
from .horovod import HorovodComm, import_horovod
from .mpi import MpiComm, install_abort_hook, running_mpi, split_by_node, start_mpi

logger = logging.getLogger(__name__)


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
    mpi = start_mpi()
    if mpi is None or mpi.COMM_WORLD.size == 1:
        logger.info("one process: no communication, all samples and examples are computed here")
        return GridComm(Grid(1, sample_size, 0), choose_device(device, 0, num_visible_gpus()))
    world = mpi.COMM_WORLD
    install_abort_hook()
    grid = Grid(world.size, sample_size, world.rank)
    hvd = import_horovod(world)
    node = split_by_node(mpi)
    local_rank, local_size = node.rank, node.size
    node.Free()
    set_num_threads(local_size)
    device = agree_on_device(world, device, local_rank)
    comm = HorovodComm(grid, device, reduction, compression, mpi=mpi, hvd=hvd, node_size=node_size)
    check_one_rank_per_gpu(comm)
    return comm


def connect_for_files(node_size: int | None = None) -> GridComm:
    """Join the ranks of this job for work on files: objects and shared memory, no tensors, no Horovod.

    Collective over the world. All ranks stand along the data axis.

    Parameters
    ----------
    node_size : int, optional
        See `MpiComm`.
    """
    mpi = start_mpi()
    if mpi is None or mpi.COMM_WORLD.size == 1:
        return GridComm(Grid(1, 1, 0))
    install_abort_hook()
    return MpiComm(Grid(mpi.COMM_WORLD.size, 1, mpi.COMM_WORLD.rank), mpi=mpi, node_size=node_size)


def finalize() -> None:
    """End Horovod and MPI, so that this rank can exit with any code. Collective over the world.

    Without it ``python -m mpi4py`` answers an exit code other than 0 by aborting the job, which is right
    for an error of one rank and noise for one on which all ranks agreed.
    """
    mpi = running_mpi()
    if mpi is not None:
        mpi.COMM_WORLD.Barrier()
    horovod.shutdown()
    if mpi is not None:
        mpi.Finalize()


def launched_rank() -> int:
    """World rank of this process by the launcher's environment; 0 without a launcher. Local, no MPI."""
    return launcher_of(os.environ).rank
