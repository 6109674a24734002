#!/usr/bin/env python3
"""What the comparisons of ranks cost: seconds of a start, microseconds of a step, collectives.

    mpirun -np 4 python -m mpi4py benchmarks/checks.py --output OUT [--sample-size 2] [--backend auto] [--steps 50]

- A start: the seconds that a rank spends in comparisons until the first update of a run of configs/digits.yaml (settings, config,
  shards, code and replicas), beside the seconds from the connected grid to that update. Ranks wait for each other there, so this is
  an upper bound.
- A step of an MLP and of a ViT (median), and the time that rank 0 spends in it in comparisons of ranks, and in the look at module and
  optimizer: means over the steps. None of them waits for another rank: what they compare travels with the sum of the step.
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

    def run(count: int) -> float:
        """Return the collectives of a step."""
        before = comm.traffic.num_collectives
        for _ in range(count):
            step(x[mine], y[mine], batch)
        return (comm.traffic.num_collectives - before) / count

    run(3)
    with timed((hpc_bnn.VariationalStep, "__call__")) as steps:
        num_collectives = run(options.steps)
    compared = [(Comparison, name) for name in ("begin_", "add_", "numbers", "fill_", "check")]
    with timed(*compared) as comparing, timed((hpc_bnn.VariationalStep, "_check")) as looking:
        run(options.steps)
    step.comparison.looks = False
    return {
        "a step": median(steps) * 1e6,
        "comparisons": sum(comparing) / options.steps * 1e6,
        "look at module and optimizer": sum(looking) / options.steps * 1e6,
        "collectives": num_collectives,
        "collectives without comparisons": run(3),
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
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args())
