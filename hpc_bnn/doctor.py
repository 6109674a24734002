"""Is this job in order? Facts of all ranks, sums over the grid, bandwidth, and problems with remedies (floor 7)."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import platform
import shutil
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, comm
from .atomic import write_atomically
from .diagnosis import (
    LIBRARY_NAMES,
    SEVERITIES,
    Carrier,
    Problem,
    by_host,
    carrier_of,
    diagnose,
    has_errors,
    plural,
    ranges,
)
from .errors import CommunicationError, ConfigError, HpcBnnError, check_positive
from .facts import PREFIXES, RankFacts, collect, versions
from .grid import Grid, sample_sizes
from .launcher import Launcher, launcher_of
from .network import LARGE_BYTES, SMALL_BYTES, network_of_sums, seconds_of_sum
from .stack import first_line

AXES: tuple[comm.Axis, ...] = ("sample", "data", "world")

GRACE_SECONDS = 5.0
"""How long a rank with a fault waits for the others."""

NUM_SHOWN_NODES = 8


@dataclasses.dataclass(frozen=True)
class Bandwidth:
    """What sums over an axis cost while all groups of the axis sum at the same time."""

    ranks: int
    """Extent of the axis."""
    latency_seconds: float | None
    """Median time of a sum of `SMALL_BYTES` on the slowest rank; None over one rank."""
    large_seconds: float | None
    """Of a sum of `LARGE_BYTES`."""

    @property
    def bytes_per_second(self) -> float | None:
        """Algorithm bandwidth: bytes of the buffer by time."""
        return LARGE_BYTES / self.large_seconds if self.large_seconds else None


def examine(
    sample_size: int | None = None,
    device: str = "auto",
    json_path: str | None = None,
    seconds: float = 120.0,
    backend: comm.Backend = "auto",
) -> int:
    """Print a report about this job and return 1 where training would fail, otherwise 0.

    Collective over the world.

    Parameters
    ----------
    sample_size : int, optional
        Extent of the sample axis (default: `default_sample_size`).
    device : str
        As for `hpc_bnn.connect`.
    json_path : str, optional
        File for all facts and measurements.
    seconds : float
        Longest time that one step may take, before the job is ended.
    backend : {"auto", "horovod", "torch"}
        As for `hpc_bnn.connect`.

    Raises
    ------
    ConfigError
        The sample axis does not fit the number of ranks, or the device is not there.
    """
    check_positive("--seconds", seconds, 120)
    launcher = launcher_of(os.environ)
    # Ranks that cannot reach each other do not know of each other: the first speaks, or the second where its
    # number alone tells that there are several.
    report = Report(launcher.rank == 0 or (launcher.size is None and launcher.rank == 1))
    report.section("this process", _process_rows(launcher))
    with Watch(seconds, report) as watch:
        return _examine(sample_size, device, json_path, backend, report, watch)


def _examine(
    sample_size: int | None,
    device: str,
    json_path: str | None,
    backend: comm.Backend,
    report: Report,
    watch: Watch,
) -> int:
    launcher = launcher_of(os.environ)
    watch.step("starting torch.distributed" if launcher.needs_no_mpi else "starting MPI")
    start_error = None
    try:
        ranks = comm.connect_for_files()
    except CommunicationError as error:  # what it means, the facts will tell
        ranks, start_error = comm.GridComm(Grid()), str(error)
        sample_size = None  # it is for the ranks that should be there
    world_size = ranks.grid.world_size
    if sample_size is not None:
        Grid(world_size, sample_size)  # the same verdict on each rank
    comm.set_num_threads(ranks.local_size)  # as training does
    is_imported = backend != "torch" and not launcher.needs_no_mpi
    watch.step(f"looking at the ranks{', importing Horovod' if is_imported else ''}")
    rank = ranks.grid.rank if world_size > 1 else launcher.rank
    everyone = ranks.gather_objects(collect(rank, device, ranks.local_rank, backend))
    carrier = carrier_of(everyone, backend)
    problems = diagnose(everyone, carrier)
    if start_error is not None and not has_errors(problems):
        problems.insert(0, _grid_failed(start_error, carrier))
    watch.problems = problems
    grid = Grid(world_size, sample_size or default_sample_size(everyone), ranks.grid.rank)
    for title, rows in _sections(everyone, grid, carrier):
        report.section(title, rows)
    bandwidths: dict[str, Bandwidth] = {}
    if has_errors(problems):
        report.section("self-test and bandwidth", [("", "not run: the errors below come first")])
    elif world_size == 1:
        comm.choose_device(device, 0, len(everyone[0].gpus))
        alone = "one process: nothing to sum; start it under mpirun, srun or torchrun"
        report.section("self-test and bandwidth", [("", alone)])
    else:
        found, bandwidths = _try_the_grid(ranks, grid, device, carrier, report, watch)
        problems += found
    problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
    report.problems(problems)
    if json_path is not None:
        watch.step(f"writing {json_path}")
        with ranks.agree(f"writing {json_path}"):
            if report.is_speaker:
                content = as_dict(everyone, grid, carrier, bandwidths, problems)
                write_atomically(Path(json_path), json.dumps(content, indent=1) + "\n")
    return int(has_errors(problems))


def default_sample_size(ranks: Sequence[RankFacts]) -> int:
    """Return the ranks of a node, where there are several nodes alike, or else what makes the grid most square."""
    sizes = {len(node) for node in by_host(ranks).values()}
    num_ranks = len(ranks)
    if len(sizes) == 1 and num_ranks not in sizes:
        return sizes.pop()
    return max(size for size in sample_sizes(num_ranks) if size * size <= num_ranks)


def as_dict(
    ranks: Sequence[RankFacts],
    grid: Grid,
    carrier: Carrier,
    bandwidths: dict[str, Bandwidth],
    problems: Sequence[Problem],
) -> dict[str, Any]:
    """Return what ``--json`` writes; docs/doctor.md describes it."""
    world = bandwidths.get("world")
    network = world and network_of_sums(world.latency_seconds, world.large_seconds, world.ranks)
    return {
        "format": 1,
        "hpc_bnn": __version__,
        "grid": {name: getattr(grid, name) for name in ("world_size", "sample_size", "data_size")},
        "tensors": dataclasses.asdict(carrier),
        "nodes": {host: [r.rank for r in node] for host, node in by_host(ranks).items()},
        "axes": {
            axis: {
                "ranks": measured.ranks,
                "latency_seconds": measured.latency_seconds,
                "latency_bytes": SMALL_BYTES,
                "bandwidth_bytes_per_second": measured.bytes_per_second,
                "bandwidth_bytes": LARGE_BYTES,
            }
            for axis, measured in bandwidths.items()
        },
        "network": network and dataclasses.asdict(network),
        "problems": [
            {name: getattr(p, name) for name in ("code", "severity", "seen", "why", "remedy")}
            for p in problems
        ],
        "ranks": [dataclasses.asdict(r) for r in ranks],
    }


# --- the grid ------------------------------------------------------------------------------------------


def _try_the_grid(
    ranks: comm.GridComm, grid: Grid, device: str, carrier: Carrier, report: Report, watch: Watch
) -> tuple[list[Problem], dict[str, Bandwidth]]:
    """Start the grid as training does, verify its sums and measure them. Collective over the world."""
    watch.step(f"starting {carrier.name}")
    grid_comm, error = None, None
    try:
        # The world by one set of its own: with the sets of the axes that is each set that training can use.
        grid_comm = comm.connect(grid.sample_size, device, reduction="world", backend=carrier.backend)
    except ConfigError:
        raise
    except Exception as caught:  # of the libraries many kinds
        error = str(caught) if isinstance(caught, HpcBnnError) else first_line(caught)
    errors = [e for e in _gather_from_all(ranks, error, watch) if e is not None]
    if errors:
        report.section("self-test", [("", "the grid does not start")])
        return [_grid_failed(errors[0], carrier)], {}
    watch.step("self-test of the sums")
    mine = self_test(grid_comm)
    wrong: dict[str, str] = {}
    for theirs in _gather_from_all(ranks, mine, watch):
        wrong = theirs | wrong  # the first rank that saw it
    verdicts = {axis: "wrong" if axis in wrong else "right on all ranks" for axis in AXES}
    report.section("self-test: sums over each axis", list(verdicts.items()))
    if wrong:
        another = (
            "--backend torch" if grid_comm.library == "horovod" else "--backend horovod, with mpirun or srun"
        )
        values = {"another": another}
        return [Problem("self_test_failed", f"{axis}: {seen}", values) for axis, seen in wrong.items()], {}
    bandwidths = {}
    for axis in AXES:
        watch.step(f"measuring the {axis} axis")
        bandwidths[axis] = measure(grid_comm, axis)
    report.table(
        f"bandwidth of sums ({LIBRARY_NAMES[grid_comm.library]}, {grid_comm.device.type})",
        _bandwidth_rows(bandwidths),
    )
    watch.step("leaving the grid")
    grid_comm.close()
    return [], bandwidths


def _grid_failed(error: str, carrier: Carrier) -> Problem:
    debug = {"horovod": "HOROVOD_LOG_LEVEL=debug", "torch": "TORCH_CPP_LOG_LEVEL=INFO and NCCL_DEBUG=INFO"}
    return Problem("grid_failed", error, {"debug": debug[carrier.library]})


def self_test(grid_comm: comm.GridComm) -> dict[str, str]:
    """Return the axes whose sums are wrong on this rank, and what was seen. Collective over the world.

    Each rank adds its number, the square of it, and 1: the sums tell which ranks took part.
    """
    grid, place = grid_comm.grid, f"rank {grid_comm.grid.rank} on {socket.gethostname()}"
    groups = {"sample": grid.sample_group(), "data": grid.data_group(), "world": range(grid.world_size)}
    wrong = {}
    for axis, group in groups.items():
        expected = [sum(group), sum(rank**2 for rank in group), len(group)]
        numbers = torch.tensor([grid.rank, grid.rank**2, 1], dtype=torch.float64, device=grid_comm.device)
        summed, counted = numbers.repeat(1000), torch.ones(3, device=grid_comm.device)
        try:
            grid_comm.sum_([summed, counted], axis)
        except Exception as error:
            return wrong | {
                axis: f"{place}: {first_line(error)}"
            }  # no further collective: others may have failed
        right = torch.tensor(expected, dtype=torch.float64).repeat(1000)
        if not (summed.cpu().equal(right) and counted.cpu().eq(len(group)).all()):
            seen = [*summed[:3].tolist(), *counted[:1].tolist()]
            wrong[axis] = (
                f"{place} got {seen} for rank, rank², 1 and 1 over ranks {ranges(group)}, "
                f"which is {[*expected, len(group)]}"
            )
    return wrong


def _gather_from_all(ranks: comm.GridComm, mine: Any, watch: Watch) -> list[Any]:
    """Return what the ranks have after a step that can fail on one of them. Collective over the world.

    A rank with a fault does not wait long for those that it left waiting: it says so and ends the job.
    """
    if not comm.wait_for_others(GRACE_SECONDS if mine else watch.seconds):
        if mine:
            print(f"hpc-bnn doctor: error: on one rank only: {mine}", file=sys.stderr, flush=True)
        comm.abort(1)
    try:
        return ranks.gather_objects(mine)
    except Exception as error:  # a rank that has ended itself counted as one that came, under torchrun
        print(f"hpc-bnn doctor: error: {first_line(error)}", file=sys.stderr, flush=True)
        comm.abort(1)
        raise


def measure(grid_comm: comm.GridComm, axis: comm.Axis) -> Bandwidth:
    """Return what sums over an axis cost. Collective over the world."""
    extent = grid_comm.grid.extents[axis]
    if extent == 1:
        return Bandwidth(1, None, None)
    times = [seconds_of_sum(grid_comm, axis, num_bytes) for num_bytes in (SMALL_BYTES, LARGE_BYTES)]
    return Bandwidth(extent, *times)


# --- what does not end ---------------------------------------------------------------------------------


class Watch:
    """Ends the job when a step takes too long: a rank that is stuck must not hang the others for ever.

    Every rank has its own; each says on which step it was, and the one that is behind tells itself apart.
    """

    def __init__(self, seconds: float, report: Report):
        self.problems: list[Problem] = []
        self.seconds, self._report = seconds, report
        self._timer: threading.Timer | None = None

    def step(self, doing: str) -> None:
        """Begin a step. Local."""
        self._stop()
        self._timer = threading.Timer(self.seconds, self._end, (doing,))
        self._timer.daemon = True
        self._timer.start()
        # A start of MPI that hangs lets no other thread of Python run.
        faulthandler.dump_traceback_later(self.seconds + GRACE_SECONDS, exit=True)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, doing: str) -> None:
        place = f"rank {launcher_of(os.environ).rank} on {socket.gethostname()}"
        hung = Problem("hung", f"{place}: {doing} for more than {self.seconds:g} s")
        print(f"hpc-bnn doctor: error: {hung.seen}. {hung.remedy}", file=sys.stderr, flush=True)
        self._report.problems([hung, *self.problems])
        time.sleep(1.0)  # the other ranks say where they are
        comm.abort(1)
        os._exit(1)  # where MPI is not running yet


# --- words ---------------------------------------------------------------------------------------------


class Report:
    """Aligned text, printed as it becomes known: what hangs or crashes later leaves it on the screen."""

    def __init__(self, is_speaker: bool):
        self.is_speaker = is_speaker

    def section(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print names and what they are."""
        width = max((len(name) for name, _ in rows), default=0)
        self._print(title, [f"{name:{width}}  {value}" if name else value for name, value in rows])

    def table(self, title: str, rows: Sequence[Sequence[str]]) -> None:
        """Print columns, the first row as their heads."""
        widths = [max(map(len, column)) for column in zip(*rows)]
        self._print(
            title, ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows]
        )

    def problems(self, problems: Sequence[Problem]) -> None:
        """Print what was seen, why it matters, and the remedy."""
        lines = []
        for problem in problems:
            heads = (f"{problem.severity:8}{problem.code}: ", f"{'':8}why: ", f"{'':8}remedy: ")
            for head, text in zip(heads, (problem.seen, problem.why, problem.remedy)):
                lines += textwrap.wrap(head + text, 108, subsequent_indent=" " * 10, break_on_hyphens=False)
        self._print("problems", lines or ["none"])

    def _print(self, title: str, lines: Sequence[str]) -> None:
        if self.is_speaker:
            print("\n".join([title, *(f"  {line}" for line in lines)]), flush=True)


def _process_rows(launcher: Launcher) -> list[tuple[str, str]]:
    """Rows about what needs no MPI."""
    found = versions()
    started = "none: this process is alone"
    if launcher.name is not None:
        signs = ", ".join(f"{name}={value}" for name, value in launcher.variables.items())
        started = f"{launcher.name} ({signs})"
    return [
        ("host", f"{socket.gethostname()}, {platform.system()} {platform.release()}, {platform.machine()}"),
        ("python", f"{found.pop('python')}, {sys.executable}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in found.items())),
        ("launcher", started),
        ("mpirun", shutil.which("mpirun") or "none on the PATH"),
    ]


def _sections(
    ranks: Sequence[RankFacts], grid: Grid, carrier: Carrier
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    first, nodes = ranks[0], by_host(ranks)
    hdf5 = first.hdf5
    per_node = "/".join(map(str, sorted({len(node) for node in nodes.values()})))
    yield (
        "job",
        [
            ("ranks", f"{len(ranks)} on {plural(len(nodes), 'node')}, {per_node} on each"),
            ("grid", str(grid)),
            ("runner", _runner(first)),
            ("tensors", f"{carrier}: {carrier.why}"),
        ],
    )
    yield "MPI", _mpi_rows(first)
    yield "Horovod", _horovod_rows(first)
    yield "torch.distributed", _distributed_rows(first)
    if hdf5.error:
        yield "HDF5", [("error", hdf5.error)]
    else:
        locking = first.environment.get("HDF5_USE_FILE_LOCKING", "not set")
        yield (
            "HDF5",
            [
                ("library", f"{hdf5.hdf5}, h5py {hdf5.h5py}"),
                ("parallel", f"{_yes(hdf5.mpi)} (not needed)"),
                ("HDF5_USE_FILE_LOCKING", locking),
            ],
        )
    yield "threads and binding", list(_per_node(nodes, _cpu_row))
    yield "memory", list(_per_node(nodes, _memory_row))
    yield "GPUs", list(_per_node(nodes, _gpu_row))


def _runner(r: RankFacts) -> str:
    if r.launcher.needs_no_mpi:
        return "torchrun"
    return "python -m mpi4py" if r.has_runner else "plain python"


def _mpi_rows(r: RankFacts) -> list[tuple[str, str]]:
    if r.mpi is None:
        return [("", "not started: ranks of torchrun need none")]
    rows = [("library", f"{r.mpi.library}, MPI {r.mpi.standard}"), ("threads", r.mpi.thread_level)]
    files = ", ".join(r.mpi_libraries) or "none is mapped"
    return [*([("error", r.mpi.error)] if r.mpi.error else rows), ("files", files)]


def _horovod_rows(r: RankFacts) -> list[tuple[str, str]]:
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


def _distributed_rows(r: RankFacts) -> list[tuple[str, str]]:
    found, named = r.distributed, ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    if not found.is_available:
        return [("error", found.why_not())]
    tuned = [f"{n}={v}" for n, v in r.environment.items() if n.startswith(PREFIXES) and n not in named]
    return [
        ("built with", f"Gloo {_yes(found.gloo)}, NCCL {found.nccl or 'no'}"),
        ("networks", ", ".join(f"{name} {r.environment.get(name, 'not set')}" for name in named)),
        *([("variables", ", ".join(tuned))] if tuned else []),
    ]


def _per_node(nodes: dict[str, list[RankFacts]], row: Any) -> Iterator[tuple[str, str]]:
    for host, node in list(nodes.items())[:NUM_SHOWN_NODES]:
        yield host, row(node)
    if len(nodes) > NUM_SHOWN_NODES:
        yield "", f"and {len(nodes) - NUM_SHOWN_NODES} nodes more (all of them with --json)"


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


def _bandwidth_rows(bandwidths: dict[str, Bandwidth]) -> list[list[str]]:
    large = f"{LARGE_BYTES / 2**20:.0f} MiB"
    rows = [["axis", "ranks", f"{SMALL_BYTES} B", large, "bandwidth"]]
    for axis, measured in bandwidths.items():
        cells = ["-", "-", "no communication"]
        if measured.latency_seconds is not None:
            times = (f"{t * 1e3:.3f} ms" for t in (measured.latency_seconds, measured.large_seconds))
            cells = [*times, f"{measured.bytes_per_second / 1e9:.3f} GB/s"]
        rows.append([axis, str(measured.ranks), *cells])
    return rows


def _yes(value: bool) -> str:
    return "yes" if value else "no"
