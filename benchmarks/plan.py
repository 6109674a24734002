#!/usr/bin/env python3
"""What `hpc-bnn plan` predicts, beside what is measured: memory and time of a step on every grid of some ranks.

    python benchmarks/plan.py --output OUT [--ranks 1 2 4] [--configs configs/digits.yaml ...] [-- FLAGS OF TRAIN]

The shards of the configs have to be there. For each number of ranks one job predicts, with all its ranks, and then makes real
steps on each grid; a job of its own for each grid measures the peak of the resident memory of its busiest rank. Writes
OUT/plan.json and OUT/plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import hpc_bnn
from hpc_bnn.cli.commands import config_of_words
from hpc_bnn.data import Manifest
from hpc_bnn.plan import plan
from hpc_bnn.plan.simulate import share_of

CONFIGS = ("configs/digits.yaml", "configs/cifar10_vit_small.yaml", "configs/era5_swin_small.yaml")


def predict(config: str, flags: list[str], path: str) -> None:
    """Predict, then measure seconds of real steps on each grid. Collective over the world."""
    run = config_of_words(["train", "--config", config, *flags])
    made = plan.plan_here(run)
    content = json.loads(made.to_json())
    for row in content["rows"]:
        comm = hpc_bnn.connect(row["sample_size"], "cpu")
        step, arguments = share_of(run, Manifest.read(run.data.shards), comm)
        seconds = []
        for _ in range(3 + max(5, min(30, int(3 / row["step_seconds"])))):
            comm.barrier()
            start = time.perf_counter()
            step(*arguments)
            seconds.append(time.perf_counter() - start)
        row["measured_seconds"] = median(max(times) for times in zip(*comm.gather_objects(seconds[3:])))
        first = comm.grid.rank == 0
        comm.close()
    if first:
        Path(path).write_text(json.dumps(content))


def remember(config: str, flags: list[str], path: str) -> None:
    """Measure the peak of the resident memory of real steps. Collective over the world."""
    run = config_of_words(["train", "--config", config, *flags])
    comm = hpc_bnn.connect(run.grid.sample_size, "cpu")
    manifest = Manifest.read(run.data.shards)
    before = plan.resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    step, arguments = share_of(run, manifest, comm)
    for _ in range(4):
        step(*arguments)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    found = max(comm.gather_objects((peak, before)))
    if comm.grid.rank == 0:
        Path(path).write_text(json.dumps(found))
    comm.close()


def start(mode: str, ranks: int, config: str, flags: list[str], output: Path):
    path = output / "part.json"
    command = ["mpirun", "-np", str(ranks), sys.executable, "-m", "mpi4py", __file__, "--mode", mode]
    command += ["--configs", config, "--output", str(path), "--", *flags]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=2, stderr=subprocess.DEVNULL)
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--mode", choices=["all", "predict", "remember"], default="all", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of hpc-bnn train, behind --")
    options = parser.parse_args()
    if options.mode != "all":
        work = predict if options.mode == "predict" else remember
        work(options.configs[0], options.flags, str(options.output))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    found = []
    lines = [
        "| config | ranks | grid | memory predicted (MB) | measured | ratio | of the tensors alone | s/step predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for config in options.configs:
        for ranks in options.ranks:
            content = start("predict", ranks, config, options.flags, options.output)
            for row in content["rows"]:
                flags = [*options.flags, "--grid.sample_size", str(row["sample_size"])]
                peak, before = start("remember", ranks, config, flags, options.output)
                tensors = row["rehearsal"]["peak_bytes"]
                row |= {"config": config, "ranks": ranks, "measured_bytes": peak, "bytes_before": before}
                found.append(row)
                lines.append(
                    f"| {Path(config).stem} | {ranks} | {row['sample_size']} x {row['data_size']} | {(before + tensors) / 1e6:.0f} | "
                    f"{peak / 1e6:.0f} | {(before + tensors) / peak:.2f} | {tensors / 1e6:.1f} / {(peak - before) / 1e6:.1f} | "
                    f"{row['step_seconds']:.4f} | {row['measured_seconds']:.4f} | {row['step_seconds'] / row['measured_seconds']:.2f} |"
                )
                print(lines[-1], flush=True)
    (options.output / "plan.json").write_text(json.dumps(found, indent=1))
    (options.output / "plan.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
