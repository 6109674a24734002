"""Examine a job: facts of all ranks, sums over the grid, bandwidth, and problems with remedies."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import comm
from ..comm.installed import first_line
from ..comm.launcher import launcher_of
from ..comm.timing import LARGE_BYTES, SMALL_BYTES, seconds_of_sum
from ..config import Backend
from ..errors import CommunicationError, ConfigError, HpcBnnError, positive
from ..grid import Grid, sample_sizes
from ..safe_files import write_atomically
from .backend_choice import LIBRARY_NAMES, Carrier, carrier_of
from .facts import RankFacts, collect
from .problems import Problem, has_errors
from .report import Report, Times, as_dict, bandwidth_rows, process_rows, sections
from .rules import diagnose
from .summarise import by_host, ranges

AXES: tuple[comm.Axis, ...] = ("sample", "data", "world")

GRACE_SECONDS = 5.0
"""Time that a failing rank waits for the others."""


def examine(
    sample_size: int | None = None,
    device: str = "auto",
    json_path: str | None = None,
    seconds: float = 120.0,
    backend: Backend = "auto",
) -> int:
    """Print a report about this job and return 1 if training would fail, otherwise 0.

    Collective over the world. The sample axis is by default that of `default_sample_size`. Facts and measurements go into
    the file ``json_path``. The job ends where a step takes longer than ``seconds``. `ConfigError` where the sample axis
    does not fit the number of ranks, or the device does not exist.
    """
    positive("Try 120").check("--seconds", seconds, "seconds")
    launcher = launcher_of(os.environ)
    # Ranks that cannot reach each other do not know of each other: the first speaks, or the second where its
    # number alone tells that there are several.
    report = Report(launcher.rank == 0 or (launcher.size is None and launcher.rank == 1))
    report.section("this process", process_rows(launcher))
    with Watch(seconds, report) as watch:
        watch.step("starting torch.distributed" if launcher.needs_no_mpi else "starting MPI")
        start_error = None
        try:
            ranks = comm.connect_for_files()
        except CommunicationError as error:  # what it means, the facts will tell
            ranks, start_error = comm.GridComm(Grid()), error.on_command_line()
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
        watch.problems = problems = diagnose(everyone, carrier)
        if start_error is not None and not has_errors(problems):
            problems.insert(0, _grid_failed(start_error, carrier))
        grid = Grid(world_size, sample_size or default_sample_size(everyone), ranks.grid.rank)
        for title, rows in sections(everyone, grid, carrier):
            report.section(title, rows)
        times: dict[comm.Axis, Times] = {}
        if has_errors(problems):
            report.section("self-test and bandwidth", [("", "not run: the errors below come first")])
        elif world_size == 1:
            comm.choose_device(device, 0, len(everyone[0].gpus))
            alone = "one process: nothing to sum; start it under mpirun, srun or torchrun"
            report.section("self-test and bandwidth", [("", alone)])
        else:
            errors, times = _try_the_grid(ranks, grid, device, carrier, report, watch)
            problems[:0] = errors  # the worst first
        report.problems(problems)
        if json_path is not None:
            watch.step(f"writing {json_path}")
            with ranks.agree(f"writing {json_path}"):
                if report.is_speaker:
                    content = as_dict(everyone, grid, carrier, times, problems)
                    write_atomically(Path(json_path), json.dumps(content, indent=1) + "\n")
    return int(has_errors(problems))


def default_sample_size(ranks: Sequence[RankFacts]) -> int:
    """Return the ranks of a node if there are several equal nodes, otherwise the extent of the most square grid."""
    sizes = {len(node) for node in by_host(ranks).values()}
    num_ranks = len(ranks)
    if len(sizes) == 1 and num_ranks not in sizes:
        return sizes.pop()
    return max(size for size in sample_sizes(num_ranks) if size * size <= num_ranks)


# --- the grid ------------------------------------------------------------------------------------------


def _try_the_grid(
    ranks: comm.GridComm, grid: Grid, device: str, carrier: Carrier, report: Report, watch: Watch
) -> tuple[list[Problem], dict[comm.Axis, Times]]:
    """Start the grid as training does, verify its sums and measure them. Collective over the world."""
    watch.step(f"starting {LIBRARY_NAMES[carrier.library]}")
    grid_comm, error = None, None
    try:
        # The world by one set of its own: with the sets of the axes that is each set that training can use.
        grid_comm = comm.connect(grid.sample_size, device, reduction="world", backend=carrier.backend)
    except ConfigError:
        raise
    except Exception as caught:  # of the libraries many kinds
        error = caught.on_command_line() if isinstance(caught, HpcBnnError) else first_line(caught)
    errors = [e for e in _gather_from_all(ranks, error, watch) if e is not None]
    if grid_comm is None or errors:
        report.section("self-test", [("", "the grid does not start")])
        return [_grid_failed(errors[0], carrier)], {}
    watch.step("self-test of the sums")
    wrong: dict[str, str] = {}
    for theirs in _gather_from_all(ranks, self_test(grid_comm), watch):
        wrong = theirs | wrong  # the first rank that saw it
    verdicts = {axis: "wrong" if axis in wrong else "right on all ranks" for axis in AXES}
    report.section("self-test: sums over each axis", list(verdicts.items()))
    if wrong:
        values = {"another": "--backend torch"}
        if grid_comm.library == "torch":
            values = {"another": "--backend mpi, with mpirun or srun"}
        return [Problem("self_test_failed", f"{axis}: {seen}", values) for axis, seen in wrong.items()], {}
    times = {}
    for axis in AXES:
        watch.step(f"measuring the {axis} axis")
        times[axis] = measure(grid_comm, axis)
    title = f"bandwidth of sums ({LIBRARY_NAMES[grid_comm.library]}, {grid_comm.device.type})"
    report.table(title, bandwidth_rows(times, grid))
    watch.step("leaving the grid")
    grid_comm.close()
    return [], times


def _grid_failed(error: str, carrier: Carrier) -> Problem:
    debug = {
        "horovod": "HOROVOD_LOG_LEVEL=debug",
        "torch": "TORCH_CPP_LOG_LEVEL=INFO and NCCL_DEBUG=INFO",
        "mpi": "the settings of the MPI for debugging (OMPI_MCA_btl_base_verbose=30)",
    }
    return Problem("grid_failed", error, {"debug": debug[carrier.library]})


def self_test(grid_comm: comm.GridComm) -> dict[str, str]:
    """Return the axes whose sums are wrong on this rank, and the sums. Collective over the world."""
    # Each rank adds its number, the square of it, and 1: the sums tell which ranks took part
    grid, place = grid_comm.grid, f"rank {grid_comm.grid.rank} on {socket.gethostname()}"
    wrong = {}
    for axis, group in grid.groups.items():
        expected = [sum(group), sum(rank**2 for rank in group), len(group)]
        numbers = torch.tensor([grid.rank, grid.rank**2, 1], dtype=torch.float64, device=grid_comm.device)
        summed, counted = numbers.repeat(1000), torch.ones(3, device=grid_comm.device)
        try:
            grid_comm.sum_([summed, counted], axis)
        except Exception as error:
            return wrong | {axis: f"{place}: {first_line(error)}"}  # no further collective: others may have failed
        right = torch.tensor(expected, dtype=torch.float64).repeat(1000)
        if not (summed.cpu().equal(right) and counted.cpu().eq(len(group)).all()):
            seen, should = [*summed[:3].tolist(), *counted[:1].tolist()], [*expected, len(group)]
            wrong[axis] = f"{place} got {seen} for rank, rank², 1 and 1 over ranks {ranges(group)}, which is {should}"
    return wrong


def _gather_from_all(ranks: comm.GridComm, mine: Any, watch: Watch) -> list[Any]:
    """Return the results of all ranks; one that fails alone says why and aborts the job. Collective over the world."""
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


def measure(grid_comm: comm.GridComm, axis: comm.Axis) -> Times:
    """Measure the times of sums over an axis. Collective over the world."""
    if grid_comm.grid.extents[axis] == 1:
        return None
    small, large = (seconds_of_sum(grid_comm, axis, num_bytes) for num_bytes in (SMALL_BYTES, LARGE_BYTES))
    return small, large


# --- what does not end ---------------------------------------------------------------------------------


class Watch:
    """Ends the job when a step takes too long: a rank that hangs must not block the others for ever.

    Every rank has its own watchdog and prints its step, so the output shows which rank is behind.
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
