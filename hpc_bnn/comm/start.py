"""Join the ranks of a job, and leave them."""

from __future__ import annotations

import functools
import logging
from typing import Any, get_args

import torch

from .. import __version__
from ..config import Backend, Compression, Reduction
from ..errors import CommunicationError, ConfigError, Fault, import_object
from ..grid import Grid
from . import horovod, stall, torch_dist, torchrun
from .devices import agree_on_device, check_one_rank_per_gpu, choose_device, num_visible_gpus, set_num_threads
from .grid_comm import GridComm
from .horovod import HorovodTensors
from .launcher import torchrun_of_job
from .mpi import MpiObjects, install_abort_hook, start_mpi
from .mpi_tensors import MpiTensors
from .torch_dist import TorchTensors
from .torchrun import TorchObjects
from .transports import ObjectTransport, TensorTransport, check_equal
from .world import abort

logger = logging.getLogger(__name__)


def connect(
    sample_size: int = 1,
    device: str = "auto",
    reduction: Reduction = "auto",
    compression: Compression = "none",
    *,
    backend: str | type[TensorTransport] = "auto",
    node_size: int | None = None,
    process_group: Any = None,
    overlaps: bool = False,
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
    reduction : {"auto", "axes", "shares", "world"}
        See `GridComm`.
    compression : {"none", "fp16", "bf16"}
        Number format for the sum of the gradient; other sums are never compressed.
    backend : {"auto", "horovod", "torch", "mpi"}, import path or class
        Communication library for tensors: Horovod, torch.distributed, the MPI itself, or a `TensorTransport` of
        yours. ``auto``: on GPUs Horovod or torch.distributed, whichever has NCCL; on CPUs Horovod if all ranks can use
        it, otherwise MPI; without MPI torch.distributed.
    node_size : int, optional
        See `MpiObjects`.
    process_group : torch.distributed.ProcessGroup, optional
        The ranks of the grid, where a framework (Lightning, Accelerate) has started torch.distributed. Tensors and
        objects then travel by groups that are made of its ranks, and MPI is not started.
    overlaps : bool
        Whether sums will have to make progress while the ranks compute (`hpc_bnn.OverlappingOptimizer`): ``auto`` then
        leaves the MPI out.

    Raises
    ------
    ConfigError
        The sample axis does not fit the number of ranks, or the device does not exist.
    CommunicationError
        The job has several ranks and the library does not start, or the launcher belongs to another MPI.
    """
    objects = _join(node_size, process_group)
    given = {
        "sample_size": sample_size, "reduction": reduction, "compression": compression, "backend": backend,
        "overlaps": overlaps, "the version of hpc_bnn": __version__,
        "the version of torch": torch.__version__.partition("+")[0],
    }  # fmt: skip
    check_equal(objects, given, "joining the grid: ", "Start all ranks with the same command and environment")
    grid = Grid(objects.size, sample_size, objects.rank)
    if objects.size == 1:
        logger.info("one process: no communication, all samples and examples are computed here")
        return GridComm(grid, choose_device(device, 0, num_visible_gpus()))
    if process_group is None:
        set_num_threads(objects.ranks_on_node)
    chosen = agree_on_device(objects, device)
    objects.enter(grid)
    transport = _choose_transport(objects, grid, backend, chosen, overlaps)
    tensors = transport(grid, chosen, objects)
    comm = GridComm(grid, chosen, reduction, compression, tensors=tensors, objects=objects)
    check_one_rank_per_gpu(comm)
    return comm


def _join(node_size: int | None, process_group: Any = None) -> ObjectTransport:
    """Return what carries objects between the ranks of this job. Collective over the world."""
    stall.end_job = abort
    if process_group is not None:
        torch_dist.adopt(process_group)
        return TorchObjects(node_size)
    if torchrun_of_job():
        install_abort_hook(abort)
        torchrun.join()
        return TorchObjects(node_size)
    started = start_mpi()
    if started is None or started.COMM_WORLD.size == 1:
        return ObjectTransport()
    install_abort_hook()
    return MpiObjects(started, node_size)


TRANSPORTS: dict[str, type[TensorTransport]] = {"horovod": HorovodTensors, "torch": TorchTensors, "mpi": MpiTensors}


def _choose_transport(
    objects: ObjectTransport, grid: Grid, backend: str | type[TensorTransport], device: torch.device, overlaps: bool
) -> type[TensorTransport]:
    """Return the class that carries the tensors, the same on all ranks. Collective over the world."""
    if isinstance(backend, type):
        return backend
    if backend not in get_args(Backend):
        found = import_object("backend", backend)
        if not (isinstance(found, type) and issubclass(found, TensorTransport)):
            rule, remedy = "it is no class of a transport", "Let it inherit from hpc_bnn.TensorTransport"
            raise ConfigError(Fault("backend", backend, rule, remedy))
        return found
    if not objects.comms:
        if backend in ("horovod", "mpi"):
            rule = f"these ranks were started without MPI, and {LIBRARY_NAMES[backend]} needs it"
            raise CommunicationError(f"{rule}. Use mpirun or srun, or <backend> torch")
        return TorchTensors
    needs_nccl = backend == "auto" and torch_dist.has_nccl_for(device)
    if backend not in ("auto", "horovod"):
        return TRANSPORTS[backend]
    missing = horovod.why_not(objects, needs_nccl)
    problem = missing or horovod.why_not_grid(grid)
    if problem is None:
        return HorovodTensors
    if backend == "horovod":
        build = "Build it for this PyTorch and MPI with tools/install_horovod.sh, or use"
        remedy = f"{build if missing else 'Use'} <backend> mpi or torch"
        raise CommunicationError(f"{objects.size} ranks need Horovod, and {problem}. {remedy}")
    other = "torch" if needs_nccl or overlaps else "mpi"
    if objects.rank == 0:
        _say_once(f"{LIBRARY_NAMES[other]} carries the tensors; of Horovod: {problem}")
    return TRANSPORTS[other]


LIBRARY_NAMES = {"horovod": "Horovod", "torch": "torch.distributed", "mpi": "MPI"}


@functools.cache
def _say_once(text: str) -> None:
    logger.info("%s", text)


def connect_for_files(node_size: int | None = None) -> GridComm:
    """Join the ranks of this job for work on files: objects and shared memory, no tensors, no Horovod.

    Collective over the world. All ranks lie along the data axis. ``node_size`` is that of `MpiObjects`.
    """
    objects = _join(node_size)
    grid = Grid(objects.size, 1, objects.rank)
    objects.enter(grid)
    return GridComm(grid, objects=objects)
