#!/usr/bin/env python3
"""Kill training runs at random, resume them, and compare with the run that was left alone.

    python benchmarks/faults.py --output OUT [--num-kills 100] [--num-ranks 2]

A run is started, one of its ranks is killed (SIGKILL) at a random time, and it is started again with ``--resume true``
until it ends; then the next run begins, until so many kills are done. Every final state must equal that of the run
that was never killed, bit for bit. Counts lost and corrupt checkpoints, and measures the time from each kill to the
end of all processes of the job. Writes OUT/faults.json and OUT/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import psutil
import torch

from hpc_bnn.errors import DataError
from hpc_bnn.run.checkpoint import CheckpointStore


def command(options: argparse.Namespace, run_dir: Path) -> list[str]:
    """Return a job of a few hundred steps that writes a checkpoint every few steps."""
    return [
        "mpirun", "-np", str(options.num_ranks), sys.executable, "-m", "mpi4py", "-m", "hpc_bnn", "train",
        "--config", "configs/digits.yaml", "--data.shards", str(options.shards), "--run_dir", str(run_dir),
        "--grid.sample_size", str(options.sample_size), "--num_epochs", str(options.num_epochs), "--checkpoint.every_steps", "5",
        "--test_every_epochs", "20", "--num_test_samples", "4", "--resume", "true",
    ]  # fmt: skip


def ranks_of(job: subprocess.Popen) -> list[psutil.Process]:
    """Return the processes of the ranks of a running job."""
    try:
        children = psutil.Process(job.pid).children(recursive=True)
        return [child for child in children if "hpc_bnn" in child.cmdline()]
    except psutil.NoSuchProcess:
        return []


def run_and_kill(options: argparse.Namespace, run_dir: Path, rng: random.Random, kills: list[dict]) -> bool:
    """Start the job and perhaps kill a rank; return whether it came to its end."""
    job = subprocess.Popen(command(options, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait = rng.uniform(0, options.max_wait)
    end = time.monotonic() + wait
    while job.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    ranks = ranks_of(job)
    if job.poll() is not None or not ranks:
        job.communicate(timeout=300)
        return job.returncode == 0
    victim = rng.choice(ranks)
    killed_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    try:
        error = job.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        job.kill()
        error = job.communicate()[1]
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        time.sleep(0.02)
    kills.append({"after": wait, "seconds_to_end": time.monotonic() - killed_at, "returncode": job.returncode})
    kills[-1] |= inspect(run_dir, "damaged" in error)
    return False


def inspect(run_dir: Path, was_damaged: bool) -> dict:
    """Return how many checkpoints stand there, and how many of them are damaged."""
    store, damaged = CheckpointStore(run_dir / "checkpoints"), int(was_damaged)
    notes = store.notes()
    for note in notes:
        try:
            store.load(note)
        except DataError:
            damaged += 1
    return {"num_checkpoints": len(notes), "num_damaged": damaged, "newest_step": notes[0].step if notes else 0}


def final_state(run_dir: Path) -> dict:
    return CheckpointStore(run_dir / "checkpoints").load_newest()


def is_same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    return a == b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-kills", type=int, default=100)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--sample-size", type=int, default=2)
    parser.add_argument("--num-epochs", type=int, default=40)
    parser.add_argument("--max-wait", type=float, default=10.0, help="latest kill after the start (s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.shards = options.output / "digits"
    subprocess.run([sys.executable, "data_prep/digits.py", "--output", options.shards], check=True)
    rng, kills, runs = random.Random(options.seed), [], []
    whole = options.output / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    subprocess.run(command(options, whole), check=True, capture_output=True)
    expected = final_state(whole)
    while len(kills) < options.num_kills:
        run_dir, before = options.output / f"run-{len(runs)}", len(kills)
        shutil.rmtree(run_dir, ignore_errors=True)
        newest = 0
        lost = 0
        while not run_and_kill(options, run_dir, rng, kills):
            lost += kills[-1]["newest_step"] < newest
            newest = kills[-1]["newest_step"]
        found = final_state(run_dir)
        same = all(is_same(found[key], expected[key]) for key in ("model", "optimizer"))
        same = same and found["place"]["num_steps"] == expected["place"]["num_steps"]
        runs.append({"num_kills": len(kills) - before, "is_same": same, "num_lost": lost})
        print(f"{len(kills)} kills, run {len(runs)}: {runs[-1]}", file=sys.stderr, flush=True)
        shutil.rmtree(run_dir)
        (options.output / "faults.json").write_text(json.dumps({"runs": runs, "kills": kills}, indent=1))
    seconds = [kill["seconds_to_end"] for kill in kills]
    text = (
        f"{len(kills)} kills in {len(runs)} runs of {expected['place']['num_steps']} steps on {options.num_ranks} ranks: "
        f"{sum(run['is_same'] for run in runs)} of {len(runs)} final states equal the uninterrupted run's bit for bit; "
        f"{sum(kill['num_damaged'] for kill in kills)} damaged and {sum(run['num_lost'] for run in runs)} lost checkpoints; "
        f"from kill to end of all processes {median(seconds):.2f} s (median), {max(seconds):.2f} s (longest); "
        f"{sum(kill['newest_step'] == 0 for kill in kills)} kills came before the first checkpoint.\n"
    )
    (options.output / "faults.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
