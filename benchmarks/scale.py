#!/usr/bin/env python3
"""What a job costs per rank as the ranks become many: counted on real ranks, and computed for more.

    python benchmarks/scale.py --output OUT [--ranks 8 16 32 64] [--libraries mpi torch] [--seconds 60]

It starts ``mpirun`` itself, with many more ranks than cores: times mean nothing then, and it gives none. Four parts:

- *counts*: of each rank, for a start, the first step, a step, an evaluation and the gathering of a checkpoint: collectives of tensors
  and their bytes, collectives of objects and the bytes of what comes back, files that Python opens (its audit hook: not those that
  libraries open), open descriptors and peak memory; and the exponent of each in the number of ranks (least squares of the logarithms).
- *between nodes*: bytes of one sum of a gradient that cross from one group of four ranks to another, from the sizes and groups of the
  collectives that the ranks have made, each as a ring in the order of ranks; and the same computed, up to 16,384 ranks.
- *grids*: for random numbers of ranks up to 16,384, samples, examples and extents: each sample meets each example once, an epoch has
  each example once, shares tile.
- *efficiency*: computed by the model of `hpc-bnn plan` (`Costs`, `Machine`) from `INPUTS`.

Writes OUT/scale.json and OUT/scale.md.
"""

# ruff: noqa: E402

from __future__ import annotations

import sys

OPENED: list[str] = []
if "--child" in sys.argv:  # before anything is imported
    sys.addaudithook(lambda event, given: OPENED.append(str(given[0])) if event == "open" else None)

import argparse
import itertools
import json
import math
import os
import pickle
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hpc_bnn
from hpc_bnn.comm import MpiObjects, MpiTensors
from hpc_bnn.comm.packing import share_buckets
from hpc_bnn.comm.simulated import Collective, SimulatedTensors
from hpc_bnn.comm.timing import Network
from hpc_bnn.config import Config
from hpc_bnn.data.order import EpochOrder, batches_in_part, global_batches, local_places
from hpc_bnn.grid import Grid, sample_sizes, share
from hpc_bnn.plan.costs import Cost, Costs
from hpc_bnn.plan.plan import Machine
from hpc_bnn.run.train import Run

NODE = 4
"""Ranks of what counts as a node in the counts."""
REDUCTIONS = ("axes", "auto", "world")
LARGEST = 16384
BATCH, FEATURES, HIDDEN = 128, 16, 512


@dataclass(frozen=True)
class Workload:
    """What the model of scaling knows of a network: what a step of it costs on a device, and what it sums."""

    name: str
    costs: tuple[Cost, ...]
    sum_bytes: float


GPU_NODE = 8
BETWEEN, WITHIN = Network(bandwidth=45e9, latency=20e-6), Network(bandwidth=370e9, latency=12e-6)
"""Assumed: one adapter of 400 Gbit/s per GPU between nodes, NVLink within."""
INPUTS = (
    # Measured once on one H100, before captured steps: 3 ms of each step, and of each sample 12 ms of launches, or 22 ms for 512
    # examples where those take longer
    Workload("ViT", (Cost(1, 3e-3, 12e-3), Cost(279, 3e-3, 12e-3), Cost(512, 3e-3, 22e-3)), 99.5e6),
    Workload("MLP", (Cost(1, 1.6e-3, 0.094e-3), Cost(128, 1.6e-3, 0.094e-3)), 4.86e6),
)
"""All inputs of the computed efficiencies, with `BETWEEN`, `WITHIN` and `GPU_NODE`."""


# --- counts, on real ranks -----------------------------------------------------------------------------


class CountingTensors(MpiTensors):
    """The collectives of this rank, as `SimulatedTensors` notes them."""

    def __init__(self, grid, device, objects):
        super().__init__(grid, device, objects)
        self.collectives: list[Collective] = []

    def reduce_(self, flat, axis, operation):
        self.collectives.append(Collective("all-reduce", axis, flat.nbytes))
        super().reduce_(flat, axis, operation)

    def gather(self, tensor, axis, lengths=None):
        gathered = super().gather(tensor, axis, lengths)
        self.collectives.append(Collective("all-gather", axis, gathered.nbytes))
        return gathered

    def all_to_all(self, flat, counts, axis, rows):
        self.collectives.append(Collective("reduce-scatter", axis, flat.nbytes))
        return super().all_to_all(flat, counts, axis, rows)


def sent_between_nodes(collectives: list[Collective], grid: Grid) -> float:
    """Return the bytes that a rank sends to another node: each collective is a ring over its group, in the order of ranks. Local."""
    total = 0.0
    for c in collectives:
        group = grid.groups[c.axis]
        following = group[(grid.indices[c.axis] + 1) % len(group)]
        if following // NODE != grid.rank // NODE:
            part = (len(group) - 1) / len(group) * c.num_bytes
            total += 2 * part if c.operation == "all-reduce" else part
    return total


def status(field: str) -> float:
    """Return a field of /proc/self/status (MB)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1e3


def child(options: argparse.Namespace) -> None:
    """Count on the ranks of a job, and let rank 0 write the largest and rank 0's numbers. Collective over the world."""
    received = [0]

    def counted(original: Callable) -> Callable:
        def call(self, *given):
            found = original(self, *given)
            received[0] += len(pickle.dumps(found))
            return found

        return call

    for name in ("gather", "gather_first", "broadcast"):
        setattr(MpiObjects, name, counted(getattr(MpiObjects, name)))
    comm: Any = None
    marks: list[list[float]] = []

    def mark() -> None:
        traffic = (0, 0, 0)
        if comm is not None:
            traffic = comm.traffic.num_collectives, comm.traffic.num_bytes, comm.traffic.num_object_collectives
        marks.append([*traffic, received[0], len(OPENED)])

    marks.append([0] * 5)
    comm = hpc_bnn.connect(NODE, "cpu", backend=options.library, node_size=NODE)
    run = Run(config_of(options), comm)
    mark()
    batches = list(run.loader.epoch(0))
    for number, batch in enumerate(batches):
        run.step(batch.x, batch.y, batch.num_examples)
        if number == 0:
            mark()
    mark()
    run.evaluate(run.test_set)
    mark()
    run.step.gather_state(to_first=True)
    mark()
    repeats = [1, 1, len(batches) - 1, 1, 1]
    rows = [[(b - a) / n for a, b in zip(*pair)] for pair, n in zip(itertools.pairwise(marks), repeats)]
    mine = {"phases": dict(zip(PHASES, rows)), "descriptors": len(os.listdir("/proc/self/fd")), "peak": status("VmHWM")}
    everyones = comm.gather_objects(mine)
    comm.close()
    between = {}
    for reduction in REDUCTIONS if options.library == "mpi" else ():
        # All of it again on this grid: only the sum of the gradient is counted
        other = hpc_bnn.connect(NODE, "cpu", reduction, backend=CountingTensors, node_size=NODE)
        tensors: Any = other.tensors
        tensors.collectives.clear()
        other.sum_(torch.zeros(options.sum_bytes // 4))
        between[reduction] = sum(other.gather_objects(sent_between_nodes(tensors.collectives, other.grid)))
        other.close()
    if comm.grid.rank == 0:
        options.result.write_text(json.dumps({"ranks": everyones, "between": between}))


PHASES = ("start", "first step", "step", "evaluation", "checkpoint")
COUNTS = ("tensor collectives", "bytes given", "object collectives", "bytes of objects", "files opened by Python")


def config_of(options: argparse.Namespace) -> Config:
    config = Config(
        run_dir=str(options.output / "run"),
        num_samples=2 * NODE,
        num_test_samples=2 * NODE,
        global_batch_size=BATCH,
        device="cpu",
    )
    config.data.shards, config.data.prepare = str(options.output / "shards"), None
    config.model.arguments = {"hidden": [HIDDEN, HIDDEN]}
    config.optimizer.sharded = True
    return config


def count(options: argparse.Namespace, num_ranks: int, library: str) -> dict[str, Any]:
    """Return what the ranks of a job count."""
    result = options.output / "result.json"
    command = [
        "mpirun",
        "-np",
        str(num_ranks),
        sys.executable,
        "-m",
        "mpi4py",
        __file__,
        "--child",
        "--library",
        library,
    ]
    command += ["--output", str(options.output), "--result", str(result), "--sum-bytes", str(options.sum_bytes)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(result.read_text())


def exponent(ranks: list[int], values: list[float]) -> float | None:
    """Return b of the least squares of log(value) = a + b log(ranks); None where a value is 0. Local."""
    if len(ranks) < 2 or min(values) <= 0:
        return None
    return round(float(np.polyfit(np.log(ranks), np.log(values), 1)[0]), 2) + 0.0  # and no -0.00


def table_of_counts(found: dict[int, dict[str, Any]], library: str) -> Iterator[str]:
    ranks = sorted(found)
    yield f"| {library}, {NODE} x P/{NODE} | {' | '.join(map(str, ranks))} | exponent |"
    yield "|---|" + "---|" * (len(ranks) + 1)

    def row(name: str, values: list[float]) -> str:
        power = exponent(ranks, values)
        shown = [f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}" for value in values]
        return f"| {name} | {' | '.join(shown)} | {'–' if power is None else f'{power:.2f}'} |"

    for phase in PHASES:
        for number, name in enumerate(COUNTS):
            values = [max(rank["phases"][phase][number] for rank in found[p]["ranks"]) for p in ranks]
            if any(values):
                yield row(f"{phase}: {name}", values)
    for name, unit in (("descriptors", "open descriptors"), ("peak", "peak memory (MB)")):
        yield row(f"{unit}, rank 0", [found[p]["ranks"][0][name] for p in ranks])
        yield row(f"{unit}, largest of the others", [max(r[name] for r in found[p]["ranks"][1:]) for p in ranks])


# --- bytes between nodes, computed ---------------------------------------------------------------------


def collectives_of_sum(grid: Grid, reduction: Any, num_bytes: float) -> list[Collective]:
    """Return the collectives that `GridComm.sum_` makes of a gradient, without numbers. Local."""
    collectives: list[Collective] = []
    comm = hpc_bnn.GridComm(grid, "meta", reduction, tensors=SimulatedTensors(grid, collectives))
    comm.sum_(torch.empty(int(num_bytes) // 4, device="meta"))
    return collectives


def computed_between(num_ranks: int, reduction: str, num_bytes: float) -> float:
    """Return the bytes of the sum of a gradient that cross between nodes, of all ranks. Local."""
    # The nodes of ranks of one sample group are alike: those of the first group stand for all
    ranks = [Grid(num_ranks, NODE, rank) for rank in range(NODE)]
    first = sum(sent_between_nodes(collectives_of_sum(grid, reduction, num_bytes), grid) for grid in ranks)
    return first * num_ranks / NODE


# --- grids ---------------------------------------------------------------------------------------------


def check_grids(seconds: float, seed: int = 0) -> dict[str, int]:
    """Try random grids for some time; raise `AssertionError` where one does not hold, and return how many there were."""
    rng, end, num_grids, largest, num_pairs = random.Random(seed), time.monotonic() + seconds, 0, 0, 0
    while time.monotonic() < end:
        size = rng.choice([rng.randint(1, LARGEST), 2 ** rng.randint(0, 14), 3 * 2 ** rng.randint(0, 12)])
        sample_size = rng.choice(sample_sizes(size))
        grids = [Grid(size, sample_size, rank) for rank in range(size)]
        data_size = size // sample_size
        samples = rng.randint(sample_size, 4 * sample_size + 3)
        batch = rng.randint(data_size, 4 * data_size + 7)
        where = f"{grids[0]}, {samples} samples, {batch} examples"
        met = np.zeros((samples, batch), np.uint8) if samples * batch <= 2**24 else None
        places = np.zeros((sample_size, data_size), np.uint8)
        tiles = np.zeros(samples, int), np.zeros(batch, int)
        for grid in grids:
            places[grid.sample_index, grid.data_index] += 1
            mine, examples = grid.local_samples(samples), grid.local_examples(batch)
            assert len(mine) and examples.stop > examples.start, f"a rank without work: {where}"
            if met is not None:
                met[mine.start : mine.stop, examples] += 1
            tiles[0][mine.start : mine.stop] += grid.is_first("data")
            tiles[1][examples] += grid.is_first("sample")
        assert (places == 1).all() and all((tile == 1).all() for tile in tiles), where
        assert met is None or (met == 1).all(), f"a pair of sample and example: {where}"
        check_order(rng, grids[::sample_size], batch)
        check_shares(rng, rng.choice([sample_size, data_size, size]))
        num_grids, largest, num_pairs = num_grids + 1, max(largest, size), num_pairs + (met is not None)
    return {"number": num_grids, "largest": largest, "with each pair counted": num_pairs}


def check_order(rng: random.Random, first_ranks: list[Grid], batch: int) -> None:
    """Raise `AssertionError` unless the data groups have the whole order of an epoch, each example once. Local."""
    num_examples = rng.randint(batch, max(batch, 20000))
    window = rng.choice([None, rng.randint(1, num_examples)])
    epoch, drop = rng.randint(0, 50), rng.random() < 0.3
    whole = list(global_batches(num_examples, batch, 7, epoch, drop_last=drop, window=window))
    some = sorted(rng.sample(range(len(first_ranks)), min(len(first_ranks), 8)))
    for grid in (first_ranks[number] for number in some):
        order = EpochOrder(num_examples, 7, epoch, window)
        parts = batches_in_part(num_examples, batch, order, lambda size, grid=grid: local_places(grid, size), drop)
        for (size, part), examples in zip(parts, whole, strict=True):
            assert size == len(examples) and torch.equal(part, examples[grid.local_examples(size)]), grid
    seen = torch.cat(whole).bincount(minlength=num_examples) if whole else torch.zeros(num_examples, dtype=torch.int64)
    assert seen.max() <= 1 and seen.sum() == (num_examples // batch * batch if drop else num_examples)


def check_shares(rng: random.Random, extent: int) -> None:
    """Raise `AssertionError` unless the buckets of shares tile a flat tensor. Local."""
    length = rng.choice([rng.randint(1, 50), rng.randint(1, 10**6), rng.randint(10**8, 6 * 10**8)])
    shares = [share(length, extent, index) for index in range(extent)]
    at = [span.start for span in shares]
    for bucket in share_buckets([shares], 4):
        for _, spans in bucket:
            for index, span in enumerate(spans):
                assert not len(span) or span.start == at[index]
                at[index] = span.stop if len(span) else at[index]
    assert extent == 1 or at == [span.stop for span in shares]


# --- efficiency, computed ------------------------------------------------------------------------------


def efficiency(network: Workload, num_samples: int, batch: int, grid: Grid, reduction: str) -> float | None:
    """Return the share of the time of all ranks that one rank alone would need; None where a rank has no work. Local."""
    if grid.sample_size > num_samples or grid.data_size > batch:
        return None
    costs, machine = Costs("", {}, network.costs), Machine(grid.world_size, GPU_NODE, BETWEEN, WITHIN)
    compute = costs.seconds(
        len(grid.local_samples(num_samples)), len(range(*grid.local_examples(batch).indices(batch)))
    )
    reduce = sum(
        machine.network(c.axis, grid).seconds(c.operation, c.num_bytes, grid.extents[c.axis])
        for c in collectives_of_sum(grid, reduction, network.sum_bytes)
    )
    return costs.seconds(num_samples, batch) / grid.world_size / (compute + reduce)


def table_of_efficiency() -> Iterator[str]:
    ranks = (4, 16, 64, 256, 1024, 4096)
    yield f"| % | {' | '.join(map(str, ranks))} |"
    yield "|---|" + "---|" * len(ranks)
    vit, mlp = INPUTS
    cases: list[tuple[str, Workload, Callable, Callable, Callable]] = [
        ("ViT, 64 samples, 4,096 examples, 1 x P", vit, lambda p: 64, lambda p: 4096, lambda p: 1),
        ("the same, 8 x P/8", vit, lambda p: 64, lambda p: 4096, lambda p: min(p, 8)),
        ("the same, 64 x P/64 (max)", vit, lambda p: 64, lambda p: 4096, lambda p: min(p, 64)),
        ("ViT, P samples, 512 examples, P x 1", vit, lambda p: p, lambda p: 512, lambda p: p),
        ("ViT, 8 samples, 64 P examples, 8 x P/8", vit, lambda p: 8, lambda p: 64 * p, lambda p: min(p, 8)),
        ("MLP, 4,096 samples, 128 examples, P x 1", mlp, lambda p: 4096, lambda p: 128, lambda p: p),
    ]
    for name, network, samples, batch, size in cases:
        for reduction in REDUCTIONS:
            grids = [Grid(p, size(p)) for p in ranks]
            if reduction != "world" and all(1 in (g.sample_size, g.data_size) for g in grids):
                continue  # one axis: no choice
            found = [efficiency(network, samples(p), batch(p), grid, reduction) for p, grid in zip(ranks, grids)]
            shown = " | ".join("–" if e is None else f"{100 * e:.0f}" for e in found)
            yield f"| {name}, {reduction} | {shown} |"


# --- all of it -----------------------------------------------------------------------------------------


def report(options: argparse.Namespace, counts: dict[str, dict[int, Any]], grids: dict[str, int]) -> str:
    lines = ["Counted:", ""]
    for library, found in counts.items():
        lines += [*table_of_counts(found, library), ""]
    measured = counts.get("mpi", {})
    n = options.sum_bytes
    lines += [f"MB between nodes of {NODE} ranks, for one sum of {n / 1e6:.1f} MB:", ""]
    computed_for = [*sorted(measured), *(p for p in (1024, 4096, LARGEST) if p not in measured)]
    lines += [
        f"| reduction | {' | '.join(f'{p:,}' + (' computed' if p not in measured else '') for p in computed_for)} |"
    ]
    lines += ["|---|" + "---|" * len(computed_for)]
    for reduction in REDUCTIONS:
        row = [computed_between(p, reduction, n) for p in computed_for]
        for p, value in zip(computed_for, row):
            if p in measured:
                assert math.isclose(measured[p]["between"][reduction], value), (
                    "what was counted is not what was computed"
                )
        lines.append(f"| {reduction} | {' | '.join(f'{value / 1e6:,.0f}' for value in row)} |")
    lines += ["", f"Grids: {', '.join(f'{name} {value:,}' for name, value in grids.items())}; all held.", ""]
    lines += ["Efficiency, computed:", "", *table_of_efficiency()]
    return "\n".join(lines) + "\n"


def write_problem(directory: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1024, FEATURES)).astype("float32"), np.arange(1024) % 4
    facts = {"name": "scale", "source": "random numbers", "licence": "none", "num_classes": 4}
    hpc_bnn.write_shards(directory, {"train": (x[:768], y[:768]), "test": (x[768:], y[768:])}, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help=f"multiples of {NODE}")
    parser.add_argument("--libraries", nargs="+", default=["mpi", "torch"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for the grids")
    parser.add_argument(
        "--sum-bytes", type=int, default=4 * 2**20, help="of the sum whose bytes between nodes are counted"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.output / "shards").exists():
        write_problem(options.output / "shards")
    grids = check_grids(options.seconds)
    counts = {library: {p: count(options, p, library) for p in options.ranks} for library in options.libraries}
    (options.output / "scale.json").write_text(json.dumps({"counts": counts, "grids": grids}, indent=1))
    text = report(options, counts, grids)
    (options.output / "scale.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
