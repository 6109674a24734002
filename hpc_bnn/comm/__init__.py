"""Communication over the process grid.

The only package that imports mpi4py, horovod and torch.distributed. `connect` splits ``MPI.COMM_WORLD`` into sample
and data sub-communicators, makes the process sets of Horovod or the process groups of torch.distributed of the same
ranks, and returns a `GridComm`.

`GridComm` has two transports below it: a `TensorTransport` (`HorovodTensors`, `TorchTensors`, `MpiTensors`, or one of the
user's) for sums, maxima and gathers of tensors, and an `ObjectTransport` (`MpiObjects`, `TorchObjects`) for Python objects
(errors, file names, metadata) and the shared memory of a node. `start` chooses both.

Neither mpi4py.MPI nor horovod is imported before `world_size` or `connect` is called: importing the first
starts MPI; a worker process that imports this package stays an ordinary process. Names of `launcher` and `world` need no torch.
"""

from typing import TYPE_CHECKING

from .. import door

if TYPE_CHECKING:
    from .devices import choose_device, set_num_threads
    from .grid_comm import GridComm, Traffic
    from .horovod import HorovodTensors
    from .launcher import launched_rank
    from .mpi import MpiObjects
    from .mpi_tensors import MpiTensors
    from .stall import StallWatch
    from .start import LIBRARY_NAMES, connect, connect_for_files
    from .torch_dist import DistributedFacts, TorchTensors, distributed_facts
    from .torchrun import TorchObjects
    from .transports import Axis, NodeArray, ObjectAxis, ObjectTransport, Operation, TensorTransport
    from .world import abort, finalize, wait_for_others, world_size
else:
    __getattr__, __dir__, __all__ = door(
        __name__,
        {
            "devices": "choose_device set_num_threads",
            "grid_comm": "GridComm Traffic",
            "horovod": "HorovodTensors",
            "launcher": "launched_rank",
            "mpi": "MpiObjects",
            "mpi_tensors": "MpiTensors",
            "stall": "StallWatch",
            "start": "LIBRARY_NAMES connect connect_for_files",
            "torch_dist": "DistributedFacts TorchTensors distributed_facts",
            "torchrun": "TorchObjects",
            "transports": "Axis NodeArray ObjectAxis ObjectTransport Operation TensorTransport",
            "world": "abort finalize wait_for_others world_size",
        },
    )
