"""Read what MPI and Horovod report about their build.

Nothing here communicates or starts Horovod; every function is Local.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

_PARTS = ("cxx", "mpifh", "java", "usempi", "gtl")
"""Names of libraries libmpi_* that belong to a libmpi but are not one; gtl is Cray's for GPUs."""


@dataclass(frozen=True)
class MpiFacts:
    """The MPI that this process runs, or why it runs none."""

    error: str | None = None
    library: str = ""
    """With its version: "Open MPI v5.0.11"."""
    standard: str = ""
    thread_level: str = ""
    """single, funneled, serialized or multiple."""
    world_size: int = 1


@dataclass(frozen=True)
class HorovodFacts:
    """How Horovod was built, or why it cannot be imported."""

    error: str | None = None
    is_installed: bool = True
    version: str = ""
    mpi: bool = False
    nccl: bool = False
    gloo: bool = False
    cuda: bool = False
    rocm: bool = False
    process_sets: bool = False

    def why_not(self, needs_nccl: bool = False) -> str | None:
        """Return why it cannot carry tensors, or None if it can."""
        if self.error is not None:
            return self.error
        if not self.mpi:
            return "it was built without MPI"
        if not self.process_sets:
            return "it is older than 0.23, which has no process sets"
        return "it was built without NCCL" if needs_nccl and not self.nccl else None


def mpi_facts() -> MpiFacts:
    """Return facts about the MPI of mpi4py. Starts MPI if it does not run yet."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py found no MPI library
        return MpiFacts(first_line(error))
    names = ("single", "funneled", "serialized", "multiple")
    levels = {getattr(MPI, f"THREAD_{name.upper()}"): name for name in names}
    return MpiFacts(
        library=library_name(MPI.Get_library_version()),
        standard=".".join(map(str, MPI.Get_version())),
        thread_level=levels[MPI.Query_thread()],
        world_size=MPI.COMM_WORLD.size,
    )


def horovod_facts() -> HorovodFacts:
    """Return how Horovod was built. Imports it, and thereby maps the MPI that it was linked with."""
    version = ""
    try:
        import horovod

        version = horovod.__version__
        import horovod.torch as hvd

        built = {name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "nccl", "gloo", "cuda", "rocm")}
        return HorovodFacts(None, version=version, process_sets=hasattr(hvd, "ProcessSet"), **built)
    except Exception as error:  # a broken build raises many kinds of error
        return HorovodFacts(first_line(error), is_installed=version != "", version=version)


def mpi_libraries(maps: str | None = None) -> tuple[str, ...]:
    """Return the files of the MPI libraries that ``maps`` (``/proc/self/maps``) names; there should be one."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8") if maps is None else maps
    files = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if line.count("/")}
    return tuple(sorted({os.path.realpath(file) for file in files if _is_mpi(Path(file).name)}))


def library_name(version: str) -> str:
    """Return name and version from the text of MPI_Get_library_version, which has several lines with some MPIs."""
    line = version.replace("\0", "").splitlines()[0].split(",")[0]
    return " ".join(line.replace(" Version:", "").split())


def has_runner() -> bool:
    """Whether this is ``python -m mpi4py``, where an exception of one rank ends the job."""
    return "mpi4py.run" in sys.modules


def first_line(error: BaseException) -> str:
    """Return kind and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _is_mpi(name: str) -> bool:
    found = re.match(r"libmpi(ch)?((_[a-z0-9_]+?)?)\.so(\.|$)", name)
    return found is not None and not found[2].lstrip("_").startswith(_PARTS)
