"""Kinds of problems of a job: severity, reason, remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

Severity = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")


@dataclass(frozen=True)
class Kind:
    """A kind of problem: severity, reason, remedy. Its title stands in docs/doctor.md."""

    severity: Severity
    why: str
    remedy: str
    """``{name}`` is filled in from the `Problem`."""


error, warning, hint = (partial(Kind, severity) for severity in SEVERITIES)

KINDS = {
    "mixed_mpi": error(
        "mpi4py and Horovod talk to different MPIs: wrong ranks, crashes, or hangs.",
        "Build both for the MPI of one module (tools/install_horovod.sh), and load no other MPI beside it; "
        "or use --backend torch, which leaves Horovod out",
    ),
    "foreign_launcher": error(
        "Every rank believes that it is alone: the same work is done several times, into the same files.",
        "Start with the mpirun of {library}, or under Slurm with srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH)",
    ),
    "mpi_missing": error(
        "Ranks of mpirun and srun need it; those of torchrun do not.",
        "Load the module of an MPI and install mpi4py for it (tools/setup.sh brings both without root), "
        "or start with torchrun",
    ),
    "horovod_missing": error(
        "Sums of tensors over several ranks go through it; one process needs none.",
        "Build it for this torch and MPI with tools/install_horovod.sh, or use --backend mpi or torch",
    ),
    "horovod_broken": error(
        "It was built for another torch or MPI, or its libraries are not found.",
        "Build it again with tools/install_horovod.sh, with the modules loaded that are loaded in the job, "
        "or use --backend mpi or torch",
    ),
    "horovod_without_mpi": error(
        "hpc_bnn starts Horovod on the communicators of MPI.",
        "Build it with HOROVOD_WITH_MPI=1 (tools/install_horovod.sh), or use --backend mpi or torch",
    ),
    "horovod_without_process_sets": error(
        "Sums over one axis of the process grid need them; they came with Horovod 0.23.",
        "Install Horovod 0.28.1 with tools/install_horovod.sh, or use --backend mpi or torch",
    ),
    "mpi_under_torchrun": error(
        "torchrun starts ranks without MPI, which both need.", "Start with mpirun or srun, or use --backend torch"
    ),
    "distributed_missing": error(
        "Sums of tensors over several ranks go through them; one process needs none.",
        "Install a torch that has them, as the wheels of PyTorch have, or use --backend horovod with mpirun or srun",
    ),
    "mpi_threads": error(
        "Horovod calls MPI from a thread of its own while mpi4py calls it from another: crashes or hangs.",
        "Use an MPI that gives MPI_THREAD_MULTIPLE, and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL; "
        "or use --backend mpi or torch",
    ),
    "shared_gpu_nccl": error(
        "NCCL refuses it.",
        "Start {gpus} ranks on each node, one for each GPU, or check CUDA_VISIBLE_DEVICES; for a trial, --backend torch",
    ),
    "mixed_devices": error(
        "All ranks must compute on one kind of device.",
        "Ask for as many GPUs on each node as there are ranks, or use --device cpu",
    ),
    "versions_differ": error(
        "Their numbers differ, and objects that they exchange may not be understood.",
        "Use one environment on a file system that all nodes see, and load the same modules everywhere",
    ),
    "hdf5_missing": error(
        "Shards are HDF5 files.", "pip install h5py, without a HDF5 module of another version in LD_LIBRARY_PATH"
    ),
    "grid_failed": error(
        "Training would end the same way.",
        "Read the message; where it is of the network, try on one node first, then {debug}",
    ),
    "self_test_failed": error(
        "Training would give wrong numbers.",
        "Try {another}, and with several nodes one of them first; a Horovod that sums wrongly is to be built again "
        "for this MPI (tools/install_horovod.sh)",
    ),
    "hung": error(
        "A rank is stuck, or the nodes do not reach each other.",
        "Try on one node; name the network (OMPI_MCA_btl_tcp_if_include, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
        "or give more --seconds",
    ),
    "check_failed": error(
        "What it looks at may be broken.", "Read the message; where it is no fault of the installation, report it"
    ),
    "shared_gpu": warning(
        "Right for a trial, slow for work; tensors go through host memory.",
        "Start {gpus} ranks on each node, one for each GPU, or check CUDA_VISIBLE_DEVICES",
    ),
    "mig_slices": warning(
        "NCCL tells GPUs by their place on the bus, which slices share, and may refuse them.",
        "Use whole GPUs for several ranks, or --backend horovod with one that was built without NCCL",
    ),
    "idle_gpus": warning("They are paid for.", "Start {gpus} ranks on each node, or ask for fewer GPUs"),
    "hidden_gpus": warning(
        "Ranks compute on the CPU.",
        "Ask the batch system for GPUs, check CUDA_VISIBLE_DEVICES, and install a torch for this GPU and driver",
    ),
    "gpu_without_nccl": warning(
        "Tensors go through host memory, except with an MPI that reads the memory of GPUs.",
        "Use --backend torch and a torch that has NCCL, or HOROVOD_GPU_OPERATIONS=NCCL tools/install_horovod.sh",
    ),
    "horovod_unusable": warning(
        "Another library carries the tensors instead, with the same results to rounding; but someone installed this Horovod to be used.",
        "Build it again with tools/install_horovod.sh (on GPUs with HOROVOD_GPU_OPERATIONS=NCCL) and the modules of "
        "the job, or use --backend mpi or torch, which do not look for it",
    ),
    "second_mpi": warning(
        "Nothing here should call it, but symbols of the two can be mixed up: crashes or hangs.",
        "Load the module of one MPI only, check LD_PRELOAD, and what torch was built with",
    ),
    "more_ranks_than_cpus": warning(
        "Ranks wait for each other while they wait for a CPU.",
        "Start at most {cpus} ranks on such a node, or ask for more CPUs (--cpus-per-task)",
    ),
    "shared_cpus": warning(
        "They take turns, while other CPUs stand idle.",
        "Give each rank its own: mpirun --map-by slot:PE=N --bind-to core, srun --cpus-per-task=N, or bind to none",
    ),
    "oversubscribed_threads": warning(
        "Threads push each other off the CPUs, and steps are slow.",
        "export OMP_NUM_THREADS={threads}, or give each rank more CPUs",
    ),
    "uneven_nodes": warning(
        "Sample groups cross nodes, and the fullest node sets the pace.",
        "Start the same number on each (--ntasks-per-node, --map-by ppr:N:node)",
    ),
    "spinning": hint(
        "Ranks fill the CPUs, Horovod adds a thread to each, and Open MPI spins while it waits.",
        "export OMPI_MCA_mpi_yield_when_idle=1 before mpirun",
    ),
    "cycle_time": hint(
        "Ranks fill the CPUs of several nodes: a small sum costs a cycle at least.",
        "Measure with HOROVOD_CYCLE_TIME=0.1 and with 1",
    ),
    "no_mpi": hint(
        "One process needs none, nor do ranks of torchrun; those of mpirun and srun do.",
        "For these, load the module of an MPI and install mpi4py for it; tools/setup.sh brings both without root",
    ),
    "no_horovod": hint(
        "The MPI itself carries the tensors (on GPUs torch.distributed), with the same results to rounding.",
        "Nothing need be done, and --backend mpi or torch says that none is wanted; tools/install_horovod.sh builds one to compare",
    ),
    "batch_step": hint(
        "In a batch script a command without a launcher runs once.", "Put srun, mpirun or torchrun in front of it"
    ),
    "plain_python": hint(
        "An exception of one rank can leave the others waiting.", "Start with hpc-bnn, or python -m mpi4py -m hpc_bnn"
    ),
    "file_locking": hint(
        "Some parallel file systems refuse locks, and opening a shard fails.",
        "export HDF5_USE_FILE_LOCKING=FALSE where that happens",
    ),
}


@dataclass(frozen=True)
class Problem:
    """A problem of a job."""

    code: str
    """A key of `KINDS`."""
    seen: str
    """The observation, and where."""
    values: dict[str, Any] = field(default_factory=dict)
    """Values for the remedy."""

    @property
    def severity(self) -> Severity:
        """Return how bad the problem is."""
        return KINDS[self.code].severity

    @property
    def why(self) -> str:
        """Return why the problem matters."""
        return KINDS[self.code].why

    @property
    def remedy(self) -> str:
        """Return what the user should do."""
        return KINDS[self.code].remedy.format(**self.values)


def has_errors(problems: Iterable[Problem]) -> bool:
    """Whether training would fail."""
    return any(problem.severity == "error" for problem in problems)
