"""Which library carries the tensors of a job, by the facts of its ranks. Every function is Local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..comm import LIBRARY_NAMES
from ..config import Backend, Library
from .facts import RankFacts
from .summarise import same


@dataclass(frozen=True)
class Carrier:
    """The communication library for tensors."""

    backend: Backend
    """The requested backend."""
    library: Library
    transport: Literal["NCCL", "Gloo", "MPI"]
    why: str
    """Why this library."""

    def __str__(self) -> str:
        return f"{LIBRARY_NAMES[self.library]} ({self.transport})"


def carrier_of(ranks: Sequence[RankFacts], backend: Backend) -> Carrier:
    """Return what `hpc_bnn.connect` takes for the tensors of these ranks, or would take if there were several."""
    unusable = list(same(ranks, why_no_horovod))
    if backend != "auto":
        library, why = backend, f"--backend {backend}"
    elif ranks[0].launcher.needs_no_mpi:
        library, why = "torch", "torchrun starts ranks without MPI, which the others need"
    elif unusable:
        problem, where = unusable[0]
        library = "torch" if all(_has_nccl_of_torch(r) for r in ranks) else "mpi"
        why = f"Horovod cannot be used on {where} ({problem})"
    else:
        library, why = "horovod", "all ranks can use it"
    gpus = [(r.host, r.gpus[r.gpu].uuid) for r in ranks if r.gpu is not None]
    if library == "torch":
        has_nccl = len(set(gpus)) == len(ranks) and all(r.distributed.nccl for r in ranks)
        return Carrier(backend, library, "NCCL" if has_nccl else "Gloo", why)
    has_nccl = library == "horovod" and bool(gpus) and all(r.horovod and r.horovod.nccl for r in ranks)
    return Carrier(backend, library, "NCCL" if has_nccl else "MPI", why)


def why_no_horovod(r: RankFacts) -> str | None:
    """Return why --backend auto does not take Horovod for this rank."""
    if r.horovod is None:
        return "it was not looked at"
    return r.horovod.why_not(_has_nccl_of_torch(r))


def _has_nccl_of_torch(r: RankFacts) -> bool:
    return r.gpu is not None and r.distributed.nccl is not None
