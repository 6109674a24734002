#!/usr/bin/env python3
"""What the comparisons of ranks cost: seconds of a start, microseconds of a step, collectives.

    mpirun -np 4 python -m mpi4py benchmarks/checks.py --output OUT [--sample-size 2] [--backend auto] [--blocks 40]

- A start: the seconds that a rank spends in comparisons until the first update of a run of configs/digits.yaml (settings, config,
  shards, code and replicas), beside the seconds from the connected grid to that update. Ranks wait for each other there, so this is
  an upper bound.
- A step of an MLP and of a ViT: as it is; without comparisons of ranks; and without the look at module and optimizer as well. The
  three take turns in blocks of steps; the numbers are medians over the blocks of the differences within a turn.
- Collectives of a step with and without comparisons.

Rank 0 writes OUT/checks.json and prints the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

import hpc_bnn
from hpc_bnn import comm as comm_module
from hpc_bnn.cli.commands import config_of_words
from hpc_bnn.comm import transports
from hpc_bnn.models import MLP, ViT
from hpc_bnn.run import Run
from hpc_bnn.training.equality import Comparison

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
"""Of a block."""
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP 504-512-512-10, batch 128": (lambda: MLP((504,), 10, (512, 512)), (504,), 128),
    "ViT dim 64, depth 4, batch 16": (
        lambda: ViT((3, 32, 32), 10, patch=4, dim=64, depth=4, heads=4, mlp_dim=128),
        (3, 32, 32),
        16,
    ),
}


@contextlib.contextmanager
def timed(*places: tuple[object, str]) -> Iterator[list[float]]:
    """Collect the seconds of each call of some functions; of one within another, once."""
    seconds: list[float] = []
    inside = False

    def of(function: Callable) -> Callable:
        def call(*arguments, **options):
            nonlocal inside
            if inside:
                return function(*arguments, **options)
            inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                inside = False
                seconds.append(time.perf_counter() - start)

        return call

    originals = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, function in originals:
        setattr(place, name, of(function))
    try:
        yield seconds
    finally:
        for place, name, function in originals:
            setattr(place, name, function)


def measure_start(comm: hpc_bnn.GridComm, options: argparse.Namespace) -> dict[str, float]:
    """Return seconds of a start, and of the comparisons in it: the slowest rank's. Collective over the world."""
    words = ["train", "--config", str(ROOT / "configs/digits.yaml"), "--data.shards", str(options.shards)]
    words += ["--run_dir", str(options.output / "run"), "--max_steps", "1", "--num_test_samples", "4"]
    words += ["--grid.sample_size", str(comm.grid.sample_size)]
    config = config_of_words(words)
    places = ((hpc_bnn.GridComm, "check_equal"), (transports, "check_equal"), (Comparison, "make_replicas_equal_"))
    first_update: list[float] = []
    update = hpc_bnn.VariationalStep.update_

    def update_(step):
        first_update.append(time.perf_counter())
        return update(step)

    hpc_bnn.VariationalStep.update_ = update_  # type: ignore[method-assign]
    comm.barrier()
    start = time.perf_counter()
    try:
        with timed(*places) as seconds:
            Run(config, comm).train()
    finally:
        hpc_bnn.VariationalStep.update_ = update  # type: ignore[method-assign]
    found = comm.gather_objects((first_update[0] - start, sum(seconds)))
    return {"until the first update": max(s for s, _ in found), "in comparisons": max(s for _, s in found)}


def measure_steps(comm: hpc_bnn.GridComm, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return microseconds and collectives of a step. Collective over the world."""
    make, shape, batch = NETWORKS[name]
    torch.manual_seed(0)
    posterior = hpc_bnn.MeanFieldGaussian(make(), init_std=0.01)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-4)
    step = hpc_bnn.VariationalStep(
        posterior, hpc_bnn.Categorical(10), optimizer, comm, num_samples=8, num_train_examples=1000
    )
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(batch, *shape, generator=generator), torch.randint(0, 10, (batch,), generator=generator)
    mine = comm.grid.local_examples(batch)
    look = step._check

    def block(compares: bool, looks: bool) -> tuple[float, float]:
        step.comparison.looks, step._check = compares, look if looks else lambda: None  # type: ignore[method-assign]
        comm.barrier()
        before, start = comm.traffic.num_collectives, time.perf_counter()
        for _ in range(STEPS):
            step(x[mine], y[mine], batch)
        return (time.perf_counter() - start) / STEPS, (comm.traffic.num_collectives - before) / STEPS

    def turn() -> list[tuple[float, float]]:
        return [block(True, True), block(False, True), block(False, False)]

    turn()
    turns = [turn() for _ in range(options.blocks)]
    return {
        "a step": median(t[0][0] for t in turns) * 1e6,
        "comparisons": median(t[0][0] - t[1][0] for t in turns) * 1e6,
        "look at module and optimizer": median(t[1][0] - t[2][0] for t in turns) * 1e6,
        "collectives": turns[0][0][1],
        "collectives without comparisons": turns[0][1][1],
    }


def main(options: argparse.Namespace) -> None:
    """Measure and write. Collective over the world."""
    comm = comm_module.connect(options.sample_size, "cpu", backend=options.backend)
    found = {"grid": str(comm.grid), "library": comm.library, "start (s)": measure_start(comm, options)}
    found |= {f"{name} (µs)": measure_steps(comm, name, options) for name in NETWORKS}
    if comm.grid.is_first("world"):
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "checks.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shards", type=Path, default=ROOT / "data/digits", help="of data_prep/digits.py")
    parser.add_argument("--sample-size", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--blocks", type=int, default=40)
    main(parser.parse_args())
