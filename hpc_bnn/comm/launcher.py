"""Read what a launcher reports about its job in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

_SIGNS = (
    # name, number of ranks, rank, ranks of the node
    ("mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpiexec of MPICH or its kin", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", None),
    ("PALS", None, "PALS_RANKID", None),
    ("PMIx", None, "PMIX_RANK", None),
)
"""In the order in which they count: the daemons of mpirun are themselves tasks of srun, and not the ranks."""


_OF_JOBS = ("OMPI_", "PMI", "PRTE_", "HYD", "MPI_LOCAL", "PALS_", "JSM_", "SLURM_", "TORCHELASTIC_")
_OF_USERS = ("OMPI_MCA_", "OMPI_ALLOW_")
_OF_RANKS = ("OMPI_MCA_ess", "OMPI_MCA_orte", "OMPI_MCA_pmix", "OMPI_MCA_prte")
"""Beginnings of variables that tell a process of which job it is a rank; with some settings of users among them."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that is no rank of this job. Local."""

    def is_kept(name: str) -> bool:
        is_setting = name.startswith(_OF_USERS) and not name.startswith(_OF_RANKS)
        return is_setting or not name.startswith(_OF_JOBS)

    return {name: value for name, value in environment.items() if is_kept(name)}


@dataclass(frozen=True)
class Launcher:
    """The launcher of this process by its environment variables; the name is empty if there is none."""

    name: str | None = None
    size: int | None = None
    """Number of ranks that it reports to have started; not every launcher reports it."""
    rank: int = 0
    local_size: int | None = None
    """Ranks on this node."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of this information."""

    @property
    def signs(self) -> str:
        """Environment variables of this information, in words: "WORLD_SIZE=4, RANK=0"."""
        return ", ".join(f"{name}={value}" for name, value in self.variables.items())

    @property
    def least_size(self) -> int:
        """Smallest possible number of ranks."""
        return max(self.size or 1, self.rank + 1)

    @property
    def needs_no_mpi(self) -> bool:
        """Whether torchrun has started several ranks: torch.distributed is all they need."""
        return self.name == "torchrun" and self.least_size > 1


def launcher_of(environment: Mapping[str, str]) -> Launcher:
    """Return what started a process with this environment. Local, no MPI."""
    if environment.get("TORCHELASTIC_RUN_ID"):  # torchrun may itself be a task of srun: it counts first
        names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE")
        found = {name: environment[name] for name in names if environment.get(name, "").isdigit()}
        if len(found) == len(names):
            size, rank, local_size = (int(found[name]) for name in names)
            return Launcher("torchrun", size, rank, local_size, found)
    is_step = environment.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environment
    without_size = None
    for name, *variables in _SIGNS:
        if name == "srun" and not is_step:  # the shell of a batch script has a SLURM_PROCID as well
            continue
        found = {v: environment[v] for v in variables if v and environment.get(v, "").isdigit()}
        size, rank, local_size = (int(found[v]) if v in found else None for v in variables)
        by_slurm = tuple(environment.get(v) for v in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"))
        if is_step and by_slurm == (str(size), str(rank)):
            name = "srun"  # it speaks PMI to the ranks
        if size is not None:
            return Launcher(name, size, rank or 0, local_size, found)
        if rank is not None and without_size is None:
            without_size = Launcher(name, None, rank, local_size, found)
    return without_size or Launcher()


def torchrun_of_job() -> Launcher | None:
    """Return torchrun if it has started several ranks. Local."""
    found = launcher_of(os.environ)
    return found if found.needs_no_mpi else None


def launched_rank() -> int:
    """World rank of this process by the launcher's environment; 0 without a launcher. Local, no MPI."""
    return launcher_of(os.environ).rank
