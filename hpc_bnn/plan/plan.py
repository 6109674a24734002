"""Choose a grid before the job: memory, time and communication of every grid for a number of ranks."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from .. import comm as communication
from ..comm import GridComm
from ..comm.devices import free_memory_bytes
from ..comm.timing import Network, measure_network
from ..config import Config
from ..data import Manifest
from ..errors import ConfigError, Fault
from ..grid import Axis, Grid, grids
from ..likelihoods import Categorical
from ..models import MLP
from ..posteriors import MeanFieldGaussian
from ..run import check_same_start, connect_grid, read_or_prepare
from ..training.step import VariationalStep
from .costs import Costs, measure_costs, read_costs
from .simulate import Rehearsal, fitting_test_samples, imagined_comm, rehearse, share_of

logger = logging.getLogger(__name__)

ASSUMED_BETWEEN = Network(bandwidth=20e9, latency=20e-6)
"""Network between nodes if nothing was measured: one 200 Gbit/s adapter per rank."""
ASSUMED_WITHIN = Network(bandwidth=100e9, latency=10e-6)
"""Network within a node if nothing was measured."""
POOR = 0.5
"""Efficiency below which a plan warns."""
ALIKE = 0.03
"""Grids with a smaller difference of their times count as equally fast."""


@dataclass(frozen=True)
class Machine:
    """The machine of a plan."""

    num_ranks: int
    ranks_per_node: int
    between: Network = ASSUMED_BETWEEN
    """Network between ranks of different nodes."""
    within: Network = ASSUMED_WITHIN
    """Network between ranks of a node."""
    memory_bytes: float = math.inf
    """Memory of a rank for its tensors (bytes)."""
    flops: float | None = None
    """Floating-point operations per second of a rank; None to measure a rank's step here."""

    def network(self, axis: Axis, grid: Grid) -> Network:
        """Return the network that an axis runs over: ranks of a sample group are neighbours."""
        span = grid.sample_size if axis == "sample" else grid.world_size
        is_within = span <= self.ranks_per_node and self.ranks_per_node % span == 0
        return self.within if is_within or self.num_ranks <= self.ranks_per_node else self.between


@dataclass(frozen=True)
class Row:
    """A grid, and its predicted memory and time."""

    sample_size: int
    data_size: int
    rehearsal: Rehearsal
    compute_seconds: float
    """Draw, forward, backward, update of the busiest rank."""
    reduce_seconds: float
    """Time of the collectives; if all ranks ran the grid, the step time minus the computing time."""
    epochs_per_hour: float
    fits: bool
    """Whether a step and an evaluation fit."""
    fitting_test_samples: int | None = None
    """The largest ``num_test_samples`` that fits, if only the evaluation does not fit."""
    efficiency: float = math.nan
    """Share of the time of all ranks that one rank, which does all of it without a collective, would need for a step. Where a
    sample of few examples costs more than its share of a large batch, that is lost, too."""

    @property
    def rank_hours_per_epoch(self) -> float:
        """Return the time of all ranks in an epoch (hours): GPU hours."""
        return self.sample_size * self.data_size / self.epochs_per_hour

    @property
    def step_seconds(self) -> float:
        """Return the predicted time of a step (seconds)."""
        return self.compute_seconds + self.reduce_seconds

    def __str__(self) -> str:
        return f"{self.sample_size} x {self.data_size}"


@dataclass(frozen=True)
class Plan:
    """All grids, the best one, and why."""

    machine: Machine
    rows: tuple[Row, ...]
    best: Row
    why: str
    process_bytes: int
    """Additional memory of each rank for Python and the libraries (bytes)."""
    data_bytes: int
    """Additional memory of each node for the training examples (bytes)."""
    costs: Costs | None = None
    """What the times of computing come from, if a file says it."""

    def to_json(self) -> str:
        """Return all of it, as one JSON object."""
        content = asdict(self)
        for row, kept in zip(content["rows"], self.rows):
            row |= {"step_seconds": kept.step_seconds, "rank_hours_per_epoch": kept.rank_hours_per_epoch}
        if math.isinf(self.machine.memory_bytes):
            content["machine"]["memory_bytes"] = None
        return json.dumps(content, indent=1) + "\n"


def make_plan(
    config: Config,
    manifest: Manifest,
    machine: Machine,
    ranks: GridComm | None = None,
    device: str = "cpu",
    costs: Costs | None = None,
) -> Plan:
    """Return memory, time and communication of every grid. Collective over the world of ``ranks``.

    The ranks (default: one) run their steps at the same time, so the measurement includes how much they slow each other
    down. If they are as many as the plan is for, they run each grid. `Config.check` has approved the config, whose
    ``grid.sample_size`` is ignored. `ConfigError` where no grid has a sample and an example for every rank; `DataError`
    where the network cannot be simulated. With ``costs``, what a sample costs was measured before, and no step runs.
    """
    ranks = ranks or GridComm(Grid(1, 1, 0))
    can_try = 1 < machine.num_ranks == ranks.grid.world_size and machine.flops is None and costs is None
    process_bytes = resident_bytes()
    num_examples = manifest.num_examples(config.data.train_split)
    batch = min(config.global_batch_size, num_examples)
    steps_per_epoch = -(-num_examples // batch)
    rows = []
    for sample_size in grids(machine.num_ranks, config.num_samples, batch):
        grid = Grid(machine.num_ranks, sample_size, 0)
        is_on_gpu, fitting = device.startswith("cuda"), None
        with ranks.agree(f"rehearsing the grid {grid}"):
            rehearsal = rehearse(config, manifest, grid, is_on_gpu=is_on_gpu, ranks_per_node=machine.ranks_per_node)
            is_free = config.posterior.family != "ensemble"  # whose members are the test samples
            if rehearsal.peak_bytes <= machine.memory_bytes < rehearsal.evaluation_bytes and is_free:
                fitting = fitting_test_samples(config, manifest, grid, rehearsal, machine.memory_bytes, is_on_gpu)
        if costs is not None:
            compute = costs.seconds(rehearsal.local_samples, rehearsal.local_batch_size)
        elif machine.flops is not None:
            compute = rehearsal.flops / machine.flops
        else:
            compute = measure_share(config, manifest, grid, ranks, device)
        if can_try:
            with connect_grid(config, sample_size) as comm:
                tried = _measure(config, manifest, comm, ranks)  # collectives included
            compute = min(compute, tried)  # of two measurements that differ, a step is what was tried
            reduce = tried - compute
        else:
            reduce = 0.0
            for c in rehearsal.collectives:
                reduce += machine.network(c.axis, grid).seconds(c.operation, c.num_bytes, grid.extents[c.axis])
        per_hour = 3600 / (steps_per_epoch * (compute + reduce))
        fits = rehearsal.needed_bytes <= machine.memory_bytes
        rows.append(Row(sample_size, grid.data_size, rehearsal, compute, reduce, per_hour, fits, fitting))
    shares = [row.rehearsal.local_samples * row.rehearsal.local_batch_size for row in rows]
    of_one = min(row.compute_seconds / share for row, share in zip(rows, shares))  # seconds of a sample of an example
    whole: float = of_one * config.num_samples * batch / machine.num_ranks
    rows = [replace(row, efficiency=whole / row.step_seconds) for row in rows]
    best, why = choose(rows, machine)
    data_bytes = sum(spec.num_bytes for spec in manifest.arrays.values()) * num_examples
    return Plan(machine, tuple(rows), best, why, process_bytes, data_bytes, costs)


def choose(rows: Sequence[Row], machine: Machine) -> tuple[Row, str]:
    """Return the fastest row that fits, of equal ones that of the largest sample axis, and the reason. Local."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        best = min(rows, key=lambda row: row.rehearsal.needed_bytes)
        why = f"no grid fits into {_size(machine.memory_bytes)}; this one takes least{_misfit(best, machine)}"
        if best.rehearsal.peak_bytes > machine.memory_bytes:
            why += ". Try more ranks, a smaller --global_batch_size or --chunk_size, or --optimizer.sharded true"
        return best, why
    least = min(row.step_seconds for row in fitting)
    best = max((row for row in fitting if row.step_seconds <= (1 + ALIKE) * least), key=lambda row: row.sample_size)
    others = sorted((row for row in rows if row is not best), key=lambda row: row.step_seconds)
    reasons = [f"{100 * best.compute_seconds / best.step_seconds:.0f} % of its step is computing, the rest reduces"]
    for row in others[:2]:
        if not row.fits:
            reasons.append(f"{row} does not fit{_misfit(row, machine)}")
        else:
            change = 100 * (row.step_seconds / best.step_seconds - 1)
            parts = f"computing {_ms(row.compute_seconds)}, reducing {_ms(row.reduce_seconds)}"
            reasons.append(f"{row} takes {change:+.0f} % ({parts})")
    return best, "; ".join(reasons)


def _misfit(row: Row, machine: Machine) -> str:
    """Return what does not fit in a row, and the number of test samples that fits."""
    sizes = {"a step": row.rehearsal.peak_bytes, "the evaluation": row.rehearsal.evaluation_bytes}
    found = [f"{what} takes {_size(size)}" for what, size in sizes.items() if size > machine.memory_bytes]
    if row.fitting_test_samples is not None:
        fits = f"--num_test_samples {row.fitting_test_samples} fits"
        found.append(fits if row.fitting_test_samples else "no --num_test_samples fits")
    return f" ({', '.join(found)})" if found else ""


# --- measuring -----------------------------------------------------------------------------------------


def measure_share(config: Config, manifest: Manifest, grid: Grid, ranks: GridComm, device: str) -> float:
    """Return the seconds of a step of the busiest rank of a grid, without its collectives. Collective over ``ranks``.

    The step is the real one, with as many examples as that rank has, and up to three chunks of samples; more chunks
    are extrapolated linearly.
    """
    chunk = 1 if config.chunk_size == "auto" else config.chunk_size
    num_chunks = -(-len(grid.local_samples(config.num_samples)) // chunk)

    def measure(num_samples: int) -> float:
        fewer = replace(config, num_samples=num_samples)
        return _measure(fewer, manifest, imagined_comm(grid, fewer, device), ranks)

    if num_chunks <= 3:
        return measure(config.num_samples)
    two, three = (measure(n * chunk * grid.sample_size) for n in (2, 3))
    return three + (num_chunks - 3) * max(three - two, 0.0)


def _measure(config: Config, manifest: Manifest, comm: GridComm, ranks: GridComm) -> float:
    """Return the median seconds of a step with one rank's work, on the slowest rank. Collective over ``ranks``."""
    with ranks.agree(f"computing on the grid {comm.grid}"):
        step, arguments = share_of(config, manifest, comm)
        for _ in range(1 + step.lag):  # what is captured runs as it is before
            step(*arguments)
        first = _timed(step, arguments)
    num_rounds = min(15, max(3, int(1 / max(ranks.gather_objects(first)))))  # about a second
    seconds = []
    for _ in range(num_rounds):
        ranks.barrier()
        seconds.append(_timed(step, arguments))
    return median(max(times) for times in zip(*ranks.gather_objects(seconds)))


def _timed(step, arguments) -> float:
    start = time.perf_counter()
    step(*arguments)
    step.settle()
    return time.perf_counter() - start


def resident_bytes() -> int:
    """Return the memory of this process after it has loaded everything that a first step loads. Local."""
    posterior, comm = MeanFieldGaussian(MLP((4,), 2, (4,))), GridComm(Grid(1, 1, 0))
    optimizer = torch.optim.Adam(posterior.parameters())
    step = VariationalStep(posterior, Categorical(2), optimizer, comm, num_samples=1, num_train_examples=4)
    step(torch.zeros(4, 4), torch.zeros(4, dtype=torch.int64), 4)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")  # pages


# --- what a user calls ---------------------------------------------------------------------------------


def plan_here(
    config: Config,
    num_ranks: int | None = None,
    ranks_per_node: int | None = None,
    *,
    between: Network | None = None,
    within: Network | None = None,
    memory_bytes: float | None = None,
    flops: float | None = None,
    costs_path: str | None = None,
) -> Plan:
    """Return the plan for a number of ranks, measured with the ranks of this job. Collective over the world.

    By default it is for the ranks of this job, and a node has as many of them as here, or as many as it has GPUs or cores
    if this job is one rank. Without networks ``between`` nodes and ``within`` one, several ranks measure them; for one
    they are assumed. A rank has the free memory of its GPU, or its fraction of the free memory of this node, and its FLOP/s
    are measured, where nothing else is given. ``costs_path`` is a file of `measure_here`, in place of that.
    """
    config.check()
    world_size = communication.world_size()
    flag = "--ranks" if num_ranks else "number of ranks"
    num_ranks = num_ranks or world_size
    grids(num_ranks, config.num_samples, config.global_batch_size, flag)
    ranks = communication.connect_for_files()  # stays, while grids come and go
    check_same_start(config, ranks)
    manifest = read_or_prepare(config.data, ranks)
    with ranks.agree("reading --measured"):
        costs = None if costs_path is None else read_costs(costs_path, config, manifest)
    device, local_size = str(communication.choose_device(config.device, 0, torch.cuda.device_count())), 1
    if world_size > 1:
        with connect_grid(config, 1) as comm:
            device, local_size = str(comm.device), comm.local_size
            if between is None or within is None:
                measured = measure_network(comm)
                between, within = between or measured, within or measured
    alike = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    per_node = ranks_per_node or (local_size if world_size > 1 else min(num_ranks, alike))
    memory = memory_bytes
    if memory is None:
        is_on_gpu = device.startswith("cuda")
        mine = torch.cuda.mem_get_info(device)[0] if is_on_gpu else free_memory_bytes(is_shared=False) / per_node
        memory = float(min(ranks.gather_objects(mine)))
    machine = Machine(num_ranks, per_node, between or ASSUMED_BETWEEN, within or ASSUMED_WITHIN, memory, flops)
    plan = make_plan(config, manifest, machine, ranks, device, costs)
    ranks.close()
    return plan


def measure_here(config: Config) -> Costs:
    """Return what a sample costs on this process's device, for `plan_here`; `ConfigError` on several ranks. Local."""
    config.check()
    if (num_ranks := communication.world_size()) > 1:
        rule = "the device is to be measured alone, and this job has several ranks"
        raise ConfigError(Fault("--measure", f"on {num_ranks} ranks", rule, "Run it without mpirun or srun"))
    ranks = GridComm(Grid())
    manifest = read_or_prepare(config.data, ranks)
    device = str(communication.choose_device(config.device, 0, torch.cuda.device_count()))
    return measure_costs(config, manifest, device, lambda few, comm: _measure(few, manifest, comm, ranks))


def describe(config: Config, plan: Plan) -> str:
    """Return a plan as text."""
    machine, best = plan.machine, plan.best.rehearsal
    how = "measured here" if plan.costs is None else f"costs of a sample measured on {plan.costs.device}"
    if machine.flops is not None and plan.costs is None:
        how = f"computing at {machine.flops:.3g} FLOP/s as you say (a device reaches a part of its peak), noise and update left out"
    networks = [f"{n.bandwidth / 1e9:.3g} GB/s and {1e6 * n.latency:.3g} µs {where}"
                for n, where in ((machine.within, "within"), (machine.between, "between"))]  # fmt: skip
    lines = [
        f"{machine.num_ranks} ranks, {machine.ranks_per_node} per node; {config.num_samples} samples, "
        f"{config.global_batch_size} examples per step; {how}; network {', '.join(networks)} nodes",
        "",
        "                                   memory of a rank",
        "grid        samples x examples      step   evaluation   computing    reducing        step   epochs/hour   rank hours/epoch   efficiency",
    ]
    for row in plan.rows:
        share = f"{row.rehearsal.local_samples} x {row.rehearsal.local_batch_size}"
        mark = "" if row.fits else "  does not fit"
        mark += ("  <-- best" if row.fits else "  <-- takes least") if row is plan.best else ""
        step, evaluation = row.rehearsal.peak_bytes, row.rehearsal.evaluation_bytes
        lines.append(
            f"{row!s:<12}{share:>18} {_size(step):>9} {_size(evaluation):>12} {_ms(row.compute_seconds):>11} "
            f"{_ms(row.reduce_seconds):>11} {_ms(row.step_seconds):>11} {row.epochs_per_hour:>13.4g} "
            f"{row.rank_hours_per_epoch:>18.3g} {row.efficiency:>12.0%}{mark}"
        )
    parts = {"parameters": best.parameter_bytes, "gradients": best.gradient_bytes}
    parts |= {"weights and noise of a sample": best.sample_bytes, "optimizer": best.optimizer_bytes}
    parts |= {"activations": best.activation_bytes}
    lines += [
        "",
        f"Take --grid.sample_size {plan.best.sample_size}: {plan.why}.",
        *_poor(plan),
        "Memory of a rank: " + ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
        + f" (at different moments; the peak of a step is {_size(best.peak_bytes)}); of an "
        f"evaluation with {config.num_test_samples} samples, {_size(best.evaluation_bytes)}. Besides: "
        f"{_size(plan.process_bytes)} of Python and libraries per rank on the host, "
        f"{_size(plan.data_bytes)} of training examples per node.",
    ]  # fmt: skip
    return "\n".join(lines)


def _poor(plan: Plan) -> list[str]:
    """Return a warning where the ranks of the best grid do less than half of what they could."""
    if plan.best.efficiency >= POOR:
        return []
    return [
        f"WARNING: an efficiency of {plan.best.efficiency:.0%}: {plan.machine.num_ranks} ranks are too many for this step. Use fewer "
        "ranks, more samples (--num_samples, which cost no more time on more ranks), or a larger --global_batch_size."
    ]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
