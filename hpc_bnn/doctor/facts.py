"""Facts of a rank and its node: CPUs, memory, GPUs, versions, MPI, Horovod, HDF5.

Nothing here communicates; every function is Local. `collect` starts MPI if it does not run yet.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..comm import DistributedFacts, choose_device, distributed_facts
from ..comm.devices import memory_limits
from ..comm.installed import HorovodFacts, MpiFacts, first_line, has_runner, horovod_facts, mpi_facts, mpi_libraries
from ..comm.launcher import Launcher, launcher_of
from ..config import Backend
from ..errors import ConfigError

PACKAGES = ("torch", "numpy", "mpi4py", "horovod", "h5py")

VARIABLES = (
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HDF5_USE_FILE_LOCKING", "HOROVOD_CYCLE_TIME",
    "OMPI_MCA_mpi_yield_when_idle", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_GPUS_ON_NODE", "PBS_NP",
    "LSB_DJOB_NUMPROC",
)  # fmt: skip
"""Environment variables that the rules use."""

PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
"""Prefixes of the variables that choose and tune the network for tensors."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or a slice of one, that a process sees."""

    uuid: str
    name: str = ""
    memory_bytes: int = 0
    bus: str | None = None
    """Address on the PCI bus; slices of one GPU have the same."""


@dataclass(frozen=True)
class Hdf5Facts:
    """How h5py was built, or why it cannot be imported."""

    error: str | None = None
    h5py: str = ""
    hdf5: str = ""
    mpi: bool = False


@dataclass(frozen=True)
class RankFacts:
    """The facts of one rank and its node."""

    rank: int = 0
    host: str = "localhost"
    pid: int = 0
    executable: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and of packages, by name."""
    launcher: Launcher = field(default_factory=Launcher)
    mpi: MpiFacts | None = field(default_factory=MpiFacts)
    """None if training starts no MPI."""
    mpi_libraries: tuple[str, ...] = ()
    """Files of the MPI libraries in this process."""
    mpirun: str | None = None
    """The one on the PATH."""
    has_runner: bool = True
    """Started as ``python -m mpi4py``."""
    horovod: HorovodFacts | None = field(default_factory=HorovodFacts)
    """None if training does not look for Horovod."""
    distributed: DistributedFacts = field(default_factory=DistributedFacts)
    hdf5: Hdf5Facts = field(default_factory=Hdf5Facts)
    cpus: tuple[int, ...] = (0,)
    """Hardware threads on which this rank may run."""
    node_cpus: int = 1
    """Hardware threads of the node."""
    torch_threads: int = 1
    gpus: tuple[Gpu, ...] = ()
    """That this process sees."""
    gpu: int | None = None
    """Index of the GPU of this rank."""
    node_gpus: int = 0
    """NVIDIA GPUs of the node, other jobs' included."""
    accelerator: str | None = None
    """Accelerators that torch was built for: "CUDA 12.8"."""
    memory_bytes: int = 0
    """Of the node."""
    memory_limit_bytes: int | None = None
    """Of the control group of this process."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that matter here."""
    failures: dict[str, str] = field(default_factory=dict)
    """Errors of the checks, by name of the check."""


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of its dependencies, without importing them."""
    found = {"python": platform.python_version(), "hpc_bnn": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def collect(rank: int, device: str, local_rank: int, backend: Backend) -> RankFacts:
    """Return the facts of this rank of the world; ``failures`` has the checks that failed.

    The device is that of `hpc_bnn.comm.choose_device`. Of the libraries only those are imported that training imports.
    """
    launcher = launcher_of(os.environ)
    values: dict[str, Any] = {"mpi": None, "horovod": None}
    failures: dict[str, str] = {}

    def look(name: str, function: Callable[[], Any]) -> None:
        try:
            values[name] = function()
        except ConfigError:
            pass  # of the device: `connect` says it, for all ranks
        except Exception as error:  # a rank that cannot look says so; it must not leave the others waiting
            failures[name] = first_line(error)

    look("versions", versions)
    if not launcher.needs_no_mpi:
        look("mpi", mpi_facts)
        if backend != "torch":
            look("horovod", horovod_facts)  # maps the MPI that it was linked with
    look("distributed", distributed_facts)
    look("mpi_libraries", mpi_libraries)
    look("hdf5", hdf5_facts)
    look("cpus", lambda: tuple(sorted(os.sched_getaffinity(0))))
    look("torch_threads", torch.get_num_threads)
    look("gpus", visible_gpus)
    look("gpu", lambda: choose_device(device, local_rank, len(values.get("gpus", ()))).index)
    look("node_gpus", lambda: len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
    look("accelerator", accelerator)
    look("memory_bytes", lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    look("memory_limit_bytes", lambda: min((limit for limit, _ in memory_limits()), default=None))
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        executable=sys.executable,
        launcher=launcher,
        mpirun=shutil.which("mpirun"),
        has_runner=has_runner(),
        node_cpus=os.cpu_count() or 1,
        environment={n: v for n, v in sorted(os.environ.items()) if n in VARIABLES or n.startswith(PREFIXES)},
        failures=failures,
        **values,
    )


def hdf5_facts() -> Hdf5Facts:
    """Return how h5py was built."""
    try:
        import h5py
    except Exception as error:  # a foreign HDF5 in LD_LIBRARY_PATH raises many kinds of error
        return Hdf5Facts(first_line(error))
    return Hdf5Facts(None, h5py.__version__, h5py.version.hdf5_version, bool(h5py.get_config().mpi))


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that torch sees. A slice of one (MIG) has its own name, if the launcher gave it."""
    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = named[index].strip() if index < len(named) else ""
        uuid = name if name.startswith("MIG-") else str(properties.uuid)
        places = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        bus = None if None in places else "{:04x}:{:02x}:{:02x}".format(*places)
        gpus.append(Gpu(uuid, properties.name, properties.total_memory, bus))
    return tuple(gpus)


def accelerator() -> str | None:
    """Return the accelerators that torch was built for."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None
