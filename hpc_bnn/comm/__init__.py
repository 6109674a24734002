"""Communication over the process grid.

The only package that imports mpi4py, horovod and torch.distributed. `connect` splits ``MPI.COMM_WORLD`` into sample
and data sub-communicators, makes the process sets of Horovod or the process groups of torch.distributed of the same
ranks, and returns a `GridComm`. Sums, maxima and gathers of tensors travel through that library; Python objects (errors,
file names, metadata), and with Horovod broadcasts of host memory, through mpi4py.

`GridComm` itself (`base`) is the one-process case: every collective over one rank is the identity. A library
plugs in underneath by the few methods of a subclass whose names begin with an underscore; `start` chooses it.

Neither mpi4py.MPI nor horovod is imported before `world_size` or `connect` is called: importing the first
starts MPI; a worker process that imports this package stays an ordinary process.
"""

from .base import Axis, GridComm, NodeArray, ObjectAxis, Operation, Traffic
from .devices import choose_device, set_num_threads
from .horovod import HorovodComm
from .mpi import MpiComm
from .start import abort, connect, connect_for_files, finalize, launched_rank, wait_for_others, world_size
from .torch_distributed import DistributedFacts, TorchComm, distributed_facts
from .torchrun import TorchrunComm

__all__ = [
    "Axis",
    "DistributedFacts",
    "GridComm",
    "HorovodComm",
    "MpiComm",
    "NodeArray",
    "ObjectAxis",
    "Operation",
    "TorchComm",
    "TorchrunComm",
    "Traffic",
    "abort",
    "choose_device",
    "connect",
    "connect_for_files",
    "distributed_facts",
    "finalize",
    "launched_rank",
    "set_num_threads",
    "wait_for_others",
    "world_size",
]
