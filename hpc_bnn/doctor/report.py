"""Write the output of `hpc-bnn doctor`: its text, and its JSON. Every function is Local."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import socket
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from .. import __version__
from ..comm.launcher import Launcher
from ..comm.timing import LARGE_BYTES, SMALL_BYTES, network_of_sums
from ..grid import Axis, Grid
from .backend_choice import Carrier
from .facts import PREFIXES, RankFacts, versions
from .problems import Problem
from .summarise import by_host, plural, ranges

NUM_SHOWN_NODES = 8

Rows = list[tuple[str, str]]
"""Names and values of a section."""


Times = tuple[float, float] | None
"""Median times of sums of `SMALL_BYTES` and of `LARGE_BYTES` over an axis on the slowest rank, while all groups of the
axis sum at the same time; None for an axis of one rank."""


def as_dict(
    ranks: Sequence[RankFacts], grid: Grid, carrier: Carrier, times: dict[Axis, Times], problems: Sequence[Problem]
) -> dict[str, Any]:
    """Return the content of the ``--json`` file; docs/doctor.md describes it."""
    world, fields = times.get("world"), ("code", "severity", "seen", "why", "remedy")
    network = world and network_of_sums(*world, grid.world_size)
    return {
        "format": 1,
        "hpc_bnn": __version__,
        "grid": {name: getattr(grid, name) for name in ("world_size", "sample_size", "data_size")},
        "tensors": dataclasses.asdict(carrier),
        "nodes": {host: [r.rank for r in node] for host, node in by_host(ranks).items()},
        "axes": {
            axis: {
                "ranks": grid.extents[axis],
                "latency_seconds": seconds and seconds[0],
                "latency_bytes": SMALL_BYTES,
                "bandwidth_bytes_per_second": seconds and LARGE_BYTES / seconds[1],
                "bandwidth_bytes": LARGE_BYTES,
            }
            for axis, seconds in times.items()
        },
        "network": network and dataclasses.asdict(network),
        "problems": [{name: getattr(p, name) for name in fields} for p in problems],
        "ranks": [dataclasses.asdict(r) for r in ranks],
    }


# --- words ---------------------------------------------------------------------------------------------


class Report:
    """Aligned text, printed as soon as it is known: a later crash leaves it on the screen."""

    def __init__(self, is_speaker: bool):
        self.is_speaker = is_speaker

    def section(self, title: str, rows: Rows) -> None:
        """Print names and values."""
        width = max((len(name) for name, _ in rows), default=0)
        self._print(title, [f"{name:{width}}  {value}" if name else value for name, value in rows])

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print columns, the first row as their heads."""
        widths = [max(map(len, column)) for column in zip(*rows)]
        self._print(title, ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows])

    def problems(self, problems: Sequence[Problem]) -> None:
        """Print the observation, the reason, and the remedy."""
        lines = []
        for problem in problems:
            heads = (f"{problem.severity:8}{problem.code}: ", f"{'':8}why: ", f"{'':8}remedy: ")
            for head, text in zip(heads, (problem.seen, problem.why, problem.remedy)):
                lines += textwrap.wrap(head + text, 108, subsequent_indent=" " * 10, break_on_hyphens=False)
        self._print("problems", lines or ["none"])

    def _print(self, title: str, lines: Sequence[str]) -> None:
        if self.is_speaker:
            print("\n".join([title, *(f"  {line}" for line in lines)]), flush=True)


def process_rows(launcher: Launcher) -> Rows:
    """Rows of facts that need no MPI."""
    found = versions()
    started = f"{launcher.name} ({launcher.signs})" if launcher.name else "none: this process is alone"
    return [
        ("host", f"{socket.gethostname()}, {platform.system()} {platform.release()}, {platform.machine()}"),
        ("python", f"{found.pop('python')}, {sys.executable}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found.items())),
        ("launcher", started),
        ("mpirun", shutil.which("mpirun") or "none on the PATH"),
    ]


def sections(ranks: Sequence[RankFacts], grid: Grid, carrier: Carrier) -> Iterator[tuple[str, Rows]]:
    """Yield the title of each section of the report, and its rows."""
    first, nodes = ranks[0], by_host(ranks)
    per_node = "/".join(map(str, sorted({len(node) for node in nodes.values()})))
    runner = "python -m mpi4py" if first.has_runner else "plain python"
    yield (
        "job",
        [
            ("ranks", f"{len(ranks)} on {plural(len(nodes), 'node')}, {per_node} on each"),
            ("grid", str(grid)),
            ("runner", "torchrun" if first.launcher.needs_no_mpi else runner),
            ("tensors", f"{carrier}: {carrier.why}"),
        ],
    )
    yield "MPI", _mpi_rows(first)
    yield "Horovod", _horovod_rows(first)
    yield "torch.distributed", _distributed_rows(first)
    yield "HDF5", _hdf5_rows(first)
    num_hidden = len(nodes) - NUM_SHOWN_NODES
    rest = [("", f"and {num_hidden} nodes more (all of them with --json)")] if num_hidden > 0 else []
    for title, row in (("threads and binding", _cpu_row), ("memory", _memory_row), ("GPUs", _gpu_row)):
        yield title, [(host, row(node)) for host, node in list(nodes.items())[:NUM_SHOWN_NODES]] + rest


def _mpi_rows(r: RankFacts) -> Rows:
    if r.mpi is None:
        return [("", "not started: ranks of torchrun need none" if r.launcher.needs_no_mpi else "not seen")]
    rows = [("library", f"{r.mpi.library}, MPI {r.mpi.standard}"), ("threads", r.mpi.thread_level)]
    files = ", ".join(r.mpi_libraries) or "none is mapped"
    return [*([("error", r.mpi.error)] if r.mpi.error else rows), ("files", files)]


def _horovod_rows(r: RankFacts) -> Rows:
    horovod = r.horovod
    if horovod is None:
        return [("", "not imported: training would not either")]
    if horovod.error:
        return [("error", horovod.error)]
    parts = [(n, getattr(horovod, n.lower())) for n in ("MPI", "NCCL", "Gloo", "CUDA", "ROCm")]
    return [
        ("version", horovod.version),
        ("built with", ", ".join(f"{name} {_yes(value)}" for name, value in parts)),
        ("process sets", _yes(horovod.process_sets)),
    ]


def _distributed_rows(r: RankFacts) -> Rows:
    found, named = r.distributed, ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    if not found.is_available:
        return [("error", str(found.why_not()))]
    tuned = [f"{n}={v}" for n, v in r.environment.items() if n.startswith(PREFIXES) and n not in named]
    return [
        ("built with", f"Gloo {_yes(found.gloo)}, NCCL {found.nccl or 'no'}"),
        ("networks", ", ".join(f"{name} {r.environment.get(name, 'not set')}" for name in named)),
        *([("variables", ", ".join(tuned))] if tuned else []),
    ]


def _hdf5_rows(r: RankFacts) -> Rows:
    if r.hdf5.error:
        return [("error", r.hdf5.error)]
    return [
        ("library", f"{r.hdf5.hdf5}, h5py {r.hdf5.h5py}"),
        ("parallel", f"{_yes(r.hdf5.mpi)} (not needed)"),
        ("HDF5_USE_FILE_LOCKING", r.environment.get("HDF5_USE_FILE_LOCKING", "not set")),
    ]


def _cpu_row(node: list[RankFacts]) -> str:
    bound = ", ".join(dict.fromkeys(f"CPUs {ranges(r.cpus)}" for r in node))
    threads = "/".join(sorted({str(r.torch_threads) for r in node}))
    omp = node[0].environment.get("OMP_NUM_THREADS", "not set")
    ranks = f"{'rank' if len(node) == 1 else 'ranks'} {ranges(r.rank for r in node)}"
    return f"{ranks} on {bound} of {node[0].node_cpus}; torch threads {threads} each (OMP_NUM_THREADS {omp})"


def _memory_row(node: list[RankFacts]) -> str:
    limits = [r.memory_limit_bytes for r in node if r.memory_limit_bytes is not None]
    limit = f"{min(limits) / 2**30:.1f} GiB" if limits else "none"
    return f"{node[0].memory_bytes / 2**30:.1f} GiB, limit of the job's control group: {limit}"


def _gpu_row(node: list[RankFacts]) -> str:
    visible = {gpu.uuid: gpu for r in node for gpu in r.gpus}
    if not visible:
        return f"none visible, {node[0].node_gpus} in the node; torch is built for {node[0].accelerator or 'CPUs only'}"
    models = ", ".join(sorted({f"{gpu.name} {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in visible.values()}))
    taken = ", ".join(f"rank {r.rank}: {r.gpus[r.gpu].uuid}" for r in node if r.gpu is not None)
    return f"{len(visible)} visible ({models}); {taken or 'none taken'}"


def bandwidth_rows(times: dict[Axis, Times], grid: Grid) -> list[list[str]]:
    """Return the table of latency and bandwidth by axis, heads first."""
    rows = [["axis", "ranks", f"{SMALL_BYTES} B", f"{LARGE_BYTES / 2**20:.0f} MiB", "bandwidth"]]
    for axis, seconds in times.items():
        cells = ["-", "-", "no communication"]
        if seconds is not None:
            small, large = seconds
            cells = [f"{small * 1e3:.3f} ms", f"{large * 1e3:.3f} ms", f"{LARGE_BYTES / large / 1e9:.3f} GB/s"]
        rows.append([axis, str(grid.extents[axis]), *cells])
    return rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"
