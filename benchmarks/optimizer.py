#!/usr/bin/env python3
"""What sharding the optimizer's state and compressing the gradient bring: memory, bytes, step time, and accuracy.

    python benchmarks/optimizer.py --output OUT [--num-ranks 4] [--hidden 2048] [--quick]

A mean-field MLP under Adam, all ranks along the sample axis, one sample each. For each variant:

- peak memory of a rank above that before the network was made (``VmHWM``), in a job of its own, largest over the ranks,
- bytes of the optimizer's state on a rank, collectives and bytes that it gives to them per step,
- median step time, all variants in turn in one job, as a multiple of the plain one,
- error of the summed gradient against the plain one (2-norm, relative),
- test accuracy and NLL of the digits after a whole run (configs/digits.yaml on 2 x 2 ranks, three seeds).

Writes OUT/optimizer.json and OUT/optimizer.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch

import hpc_bnn
from hpc_bnn.models import MLP

VARIANTS = {
    "plain": ({}, "none"),
    "sharded": ({"sharded": True}, "none"),
    "fp16": ({}, "fp16"),
    "bf16": ({}, "bf16"),
    "sharded, bf16": ({"sharded": True}, "bf16"),
}


def sum_gradient(step: hpc_bnn.VariationalStep, x, y) -> None:
    """Leave the gradient of the job's data term in the buffer. Collective over the world."""
    step.accumulate_(x, y, len(x))
    step.reduce_()
    step.posterior.finish_(step.scalars)


def megabytes(field: str) -> float:
    """Return a field of /proc/self/status (MB)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024 * 1.048576


def make_step(comm: hpc_bnn.GridComm, hidden: int, sharded: bool) -> hpc_bnn.VariationalStep:
    torch.manual_seed(0)
    posterior = hpc_bnn.MeanFieldGaussian(MLP((hidden,), 10, (hidden, hidden)), init_std=0.01)

    def make(parameters):
        return torch.optim.Adam(parameters, lr=1e-4)

    optimizer = hpc_bnn.ShardedOptimizer(make, posterior, comm) if sharded else make(posterior.parameters())
    return hpc_bnn.VariationalStep(
        posterior, hpc_bnn.Categorical(10), optimizer, comm, num_samples=comm.grid.sample_size, num_train_examples=1000
    )


def child(options: argparse.Namespace) -> None:
    """Measure on the ranks of a job: one variant's memory, or the time of all."""
    names = [options.child] if options.child != "time" else list(VARIANTS)
    num_ranks = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    comm = hpc_bnn.connect(num_ranks, "cpu")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, options.hidden, generator=generator)
    y = torch.randint(0, 10, (8,), generator=generator)
    results, steps = {}, {}
    for name in names:
        sharded, compression = VARIANTS[name][0].get("sharded", False), VARIANTS[name][1]
        comm.compression = compression
        gc.collect()
        before = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        steps[name] = step = make_step(comm, options.hidden, sharded)
        step(x, y, len(x))
        traffic = comm.traffic.num_collectives, comm.traffic.num_bytes
        step(x, y, len(x))
        state = step.optimizer.optimizer.state_dict()["state"].values()
        results[name] = {
            "peak_mb": max(comm.gather_objects(megabytes("VmHWM") - before)),
            "state_mb": sum(t.nbytes for s in state for t in s.values()) / 1e6,
            "collectives": comm.traffic.num_collectives - traffic[0],
            "sent_mb": (comm.traffic.num_bytes - traffic[1]) / 1e6,
            "num_weights": step.posterior.num_weights,
        }
        if options.child != "time":
            continue
        if name == "plain":
            sum_gradient(step, x, y)
            exact = step.posterior.buffer.gradient.clone()
        elif not sharded:
            sum_gradient(steps["plain"], x, y)
            error = (steps["plain"].posterior.buffer.gradient - exact).norm() / exact.norm()
            results[name]["gradient_error"] = error.item()
    if options.child == "time":
        seconds = {name: [] for name in names}
        for _ in range(options.repetitions):
            for name in names:
                comm.compression = VARIANTS[name][1]
                comm.barrier()
                start = time.perf_counter()
                steps[name](x, y, len(x))
                seconds[name].append(time.perf_counter() - start)
        for name in names:
            results[name]["seconds"] = median(max(row) for row in zip(*comm.gather_objects(seconds[name])))
    if comm.grid.rank == 0:
        options.result.write_text(json.dumps(results))
    comm.close()


def job(options: argparse.Namespace, name: str) -> dict:
    result = options.output / "result.json"
    command = ["mpirun", "-np", str(options.num_ranks), sys.executable, "-m", "mpi4py", __file__, "--child", name]
    command += ["--hidden", str(options.hidden), "--repetitions", str(options.repetitions)]
    command += ["--result", str(result), "--output", str(options.output)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(result.read_text())


def learn(options: argparse.Namespace, sharded: bool, compression: str, seed: int) -> tuple[float, float]:
    """Return test accuracy and NLL of a run of the digits on 2 x 2 ranks."""
    run_dir = options.output / f"{compression}-{sharded}-{seed}"
    command = ["mpirun", "-np", "4", sys.executable, "-m", "mpi4py", "-m", "hpc_bnn", "train", "--config"]
    command += ["configs/digits.yaml", "--run_dir", str(run_dir), "--grid.sample_size", "2", "--seed", str(seed)]
    command += ["--optimizer.sharded", str(sharded).lower(), "--grid.compression", compression]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    summary = json.loads((run_dir / "summary.json").read_text())
    return summary["test/accuracy"], summary["test/nll"]


def table(options: argparse.Namespace, times: dict, memory: dict, learnt: dict) -> str:
    plain = times["plain"]
    lines = [
        f"{plain['num_weights'] / 1e6:.1f} million random weights on {options.num_ranks} ranks along the sample axis; medians of "
        f"{options.repetitions} steps.",
        "",
        "| variant | peak memory of a rank (MB) | optimizer state (MB) | collectives | sent per step (MB) | step time | "
        "error of the gradient | digits: accuracy, NLL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in times.items():
        error = f"{row['gradient_error']:.1e}" if "gradient_error" in row else "–"
        lines.append(
            f"| {name} | {memory[name]['peak_mb']:.0f} | {row['state_mb']:.0f} | {row['collectives']} | {row['sent_mb']:.0f} | "
            f"{row['seconds'] / plain['seconds']:.2f} | {error} | "
            f"{mean(a for a, _ in learnt[name]):.4f}, {mean(n for _, n in learnt[name]):.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the network's layers")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a small network, few steps, one seed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.hidden, options.repetitions = 256, 5
    if options.child:
        child(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    times = job(options, "time")
    memory = {name: job(options, name)[name] for name in VARIANTS}
    seeds = (0,) if options.quick else (0, 1, 2)
    learnt = {
        name: [learn(options, extra.get("sharded", False), compression, seed) for seed in seeds]
        for name, (extra, compression) in VARIANTS.items()
    }
    content = {"times": times, "memory": memory, "learnt": learnt}
    (options.output / "optimizer.json").write_text(json.dumps(content, indent=1))
    text = table(options, times, memory, learnt)
    (options.output / "optimizer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
