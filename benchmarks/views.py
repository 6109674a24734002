"""Epochs to a fixed validation accuracy when samples see one view of a batch, one per group of samples, or each its own.

    python data_prep/mnist.py --source DIR --output data/mnist --num-validation 5000
    python -m benchmarks.views --shards data/mnist --num-train 1000 --output OUT

Trains the same network from the same seeds with the views ``none`` (no augmentation), ``shared``, ``per_group`` and
``per_sample``; everything else is alike. Writes OUT/views.csv, views.md and views.png. Every run is an ordinary
``hpc-bnn train``; ``--jobs`` of them run at a time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import torch
from torch import nn

from hpc_bnn.data import Manifest, ShardDataset, write_shards

VIEWS = ("none", "shared", "per_group", "per_sample")


class ConvNet(nn.Sequential):
    """Three strided convolutions and a linear layer: small enough for a CPU."""

    def __init__(self, in_shape: tuple[int, ...], num_outputs: int, width: int = 16):
        channels = [in_shape[0], width, 2 * width, 4 * width]
        layers = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, num_outputs))


def take_subset(shards: Path, num_train: int, num_validation: int, directory: Path) -> None:
    """Write a subset of the training split and of the validation or test split."""
    manifest = Manifest.read(shards)
    held_out = "validation" if "validation" in manifest.splits else "test"
    splits = {}
    for name, split, number in (("train", "train", num_train), ("validation", held_out, num_validation)):
        dataset = ShardDataset(shards, split, reading="rank")
        order = np.random.default_rng(0).permutation(len(dataset))[:number]
        x, y = dataset._split(dataset.read(torch.from_numpy(order)))
        splits[name] = (x.numpy(), y.numpy())
    write_shards(
        directory,
        splits,
        name=f"{manifest.name}, subset",
        source=manifest.source,
        licence=manifest.licence,
        num_classes=manifest.num_classes,
    )


def train(options: argparse.Namespace, views: str, seed: int) -> list[dict[str, float]]:
    """Train one network and return its row of every epoch."""
    run_dir = options.output / "runs" / f"{views}-{seed}"
    if not (run_dir / "summary.json").exists():
        transforms = [] if views == "none" else options.transforms
        kind = "shared" if views == "none" else views
        flags = {
            "run_dir": run_dir,
            "seed": seed,
            "num_epochs": options.num_epochs,
            "num_samples": options.num_samples,
            "num_test_samples": 16,
            "test_every_epochs": 1,
            "global_batch_size": options.global_batch_size,
            "kl_weight": options.kl_weight,
            "data.shards": options.output / "shards",
            "data.test_split": "validation",
            "augmentation.views": kind,
            "augmentation.num_groups": options.num_groups,
            "augmentation.transforms": json.dumps(transforms),
            "model.name": "benchmarks.views.ConvNet",
            "posterior.init_std": 0.02,
            "posterior.prior_std": 0.3,
            "optimizer.learning_rate": options.learning_rate,
            "optimizer.schedule": "constant",
        }
        command = [sys.executable, "-m", "hpc_bnn", "train", *(f"--{k}={v}" for k, v in flags.items())]
        subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def epochs_to(rows: list[dict[str, float]], accuracy: float) -> float:
    """Return the first epoch with the accuracy; infinite where it is never reached."""
    return next((row["epoch"] for row in rows if row["test/accuracy"] >= accuracy), float("inf"))


def spread(values: list[float], form: str) -> str:
    if len(values) < 2 or not np.isfinite(values).all():
        return "–" if not values else format(median(values), form)
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def report(options: argparse.Namespace, runs: dict[str, list[list[dict[str, float]]]]) -> str:
    """Return the table as Markdown."""
    lines = [
        f"{options.name}: {options.num_train} training images, {options.num_samples} samples per step, "
        f"{options.num_epochs} epochs, {len(options.seeds)} seeds (mean ± standard deviation); transforms {options.transforms}; "
        f"per_group: {options.num_groups} groups.",
        "",
        "| views | "
        + " | ".join(f"epochs to {a:.3g}" for a in options.accuracy)
        + " | accuracy at the end | NLL at the end (nats) | seconds per epoch |",
        "|---|" + "---:|" * (len(options.accuracy) + 3),
    ]
    for views, histories in runs.items():
        cells = []
        for accuracy in options.accuracy:
            epochs = [epochs_to(rows, accuracy) for rows in histories]
            reached = [e for e in epochs if np.isfinite(e)]
            missing = len(epochs) - len(reached)
            cells.append(spread(reached, ".1f") + (f" ({missing} never)" if missing else ""))
        last = [rows[-1] for rows in histories]
        cells.append(spread([row["test/accuracy"] for row in last], ".4f"))
        cells.append(spread([row["test/nll"] for row in last], ".4f"))
        cells.append(f"{median(row['seconds'] for rows in histories for row in rows):.2f}")
        lines.append(f"| {views} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(options: argparse.Namespace, runs: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, (views, histories) in enumerate(runs.items()):
        for axes, name in zip(panels, ("test/accuracy", "test/nll")):
            curves = np.array([[row[name] for row in rows] for rows in histories])
            epochs = np.arange(1, curves.shape[1] + 1)
            axes.plot(epochs, curves.mean(0), color=f"C{color}", label=views)
            axes.fill_between(epochs, curves.min(0), curves.max(0), color=f"C{color}", alpha=0.2, lw=0)
    for accuracy in options.accuracy:
        panels[0].axhline(accuracy, color="gray", lw=0.8, ls="--")
    panels[0].set(xlabel="epoch", ylabel="validation accuracy", title=f"{options.name}: mean and range over seeds")
    panels[1].set(xlabel="epoch", ylabel="validation NLL (nats)", yscale="log")
    panels[0].legend(title="views")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default="MNIST")
    parser.add_argument("--num-train", type=int, default=1000)
    parser.add_argument("--num-validation", type=int, default=2000)
    parser.add_argument("--num-epochs", type=int, default=40)
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--num-groups", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--kl-weight", type=float, default=0.1)
    parser.add_argument("--accuracy", type=float, nargs="+", default=[0.95, 0.97])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--transforms", type=json.loads, default=[{"name": "crop", "padding": 2}])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if not (options.output / "shards/manifest.json").exists():
        take_subset(options.shards, options.num_train, options.num_validation, options.output / "shards")
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {views: [pool.submit(train, options, views, seed) for seed in options.seeds] for views in VIEWS}
        runs = {views: [future.result() for future in found] for views, found in futures.items()}
    with open(options.output / "views.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["views", "seed", "epoch", "accuracy", "nll", "seconds"])
        for views, histories in runs.items():
            for seed, rows in zip(options.seeds, histories):
                for row in rows:
                    writer.writerow([views, seed, row["epoch"], row["test/accuracy"], row["test/nll"], row["seconds"]])
    table = report(options, runs)
    (options.output / "views.md").write_text(table)
    plot(options, runs, options.output / "views.png")
    print(table)


if __name__ == "__main__":
    main()
