#!/usr/bin/env python3
"""The experiments of docs/experiments.md: prepare the data, train with several seeds, and tabulate.

    python benchmarks/experiments.py --output OUT --data ../shared/data [--only load ett] [--seeds 0 1 2] [--launcher "mpirun -np 2"]

Each experiment is a config of configs/, as it is, and the same network otherwise: deterministic, with MC dropout, ... Runs
that are complete in OUT are kept. Writes OUT/EXPERIMENT-VARIANT-SEED/ (run directories), OUT/EXPERIMENT.html (the report of its first
seeds side by side), OUT/experiments.json and OUT/experiments.md: mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev


@dataclass(frozen=True)
class Experiment:
    """A config, how its shards are made, and variants of it."""

    config: str
    prepare: str
    """Arguments of a script of data_prep; {data} stands for --data."""
    variants: dict[str, str]
    """Flags of each variant."""
    metrics: tuple[str, ...]


CLASSES = ("accuracy", "nll", "brier", "ece")
NUMBERS = ("rmse", "crps", "nll", "coverage_90", "width_90", "calibration_error", "spread_skill")
DETERMINISTIC = "--posterior.family deterministic --num_samples 1 --num_test_samples 1"

EXPERIMENTS = {
    "digits": Experiment(
        "configs/digits.yaml",
        "digits.py --output data/digits",
        {
            "mean field": "",
            "deterministic": DETERMINISTIC,
            "MC dropout": "--posterior.family mc_dropout --model.arguments.dropout 0.2",
        },
        CLASSES,
    ),
    "load": Experiment(
        "configs/load_mlp_dropout.yaml",
        "timeseries.py --source {data}/electricity_load/opsd_de_2019_60min.csv --targets DE_load_actual_entsoe_transparency "
        "--window 504 --horizon 168 --calendar hour weekday yearday --changes 168 --output data/opsd_de",
        {"MC dropout": "", "deterministic": f"{DETERMINISTIC} --model.arguments.dropout 0"},
        NUMBERS,
    ),
    "ett": Experiment(
        "configs/ett_mlp.yaml",
        "timeseries.py --source {data}/ett/ETTh1.csv --targets OT --features all --window 96 --horizon 24 "
        "--changes --split-rows 8640 2880 2880 --output data/ETTh1",
        {
            "mean field": "",
            "deterministic": DETERMINISTIC,
            "MC dropout": "--posterior.family mc_dropout --model.arguments.dropout 0.2",
        },
        NUMBERS,
    ),
    "cifar10": Experiment(
        "configs/cifar10_vit_small.yaml",
        "arrays.py --train {data}/cifar10/cifar10_jpeg.npz --test {data}/cifar10/cifar10_jpeg.npz --x {{split}}_jpeg "
        "--y {{split}}_labels --encoded {{split}}_offsets --classes 10 --validation-fraction 0.84 --output data/cifar10_small",
        {
            "mean field": "",
            "deterministic": DETERMINISTIC,
            "MC dropout": "--posterior.family mc_dropout --model.arguments.dropout 0.1",
        },
        CLASSES,
    ),
    "era5": Experiment(
        "configs/era5_swin_small.yaml",
        "weather.py --source {data}/weather/era5_t2m_uk_2019-03.nc --history 2 --lead 6 --output data/t2m",
        {
            "mean field, CRPS": "",
            "deterministic": f"{DETERMINISTIC} --objective.name elbo",
            "MC dropout, CRPS": "--posterior.family mc_dropout --model.arguments.dropout 0.1",
        },
        NUMBERS,
    ),
}


def prepare(experiment: Experiment, data: Path) -> None:
    """Write the shards, unless they are there."""
    script, *arguments = shlex.split(experiment.prepare.format(data=data))
    output = Path(arguments[arguments.index("--output") + 1])
    if not (output / "manifest.json").exists():
        subprocess.run([sys.executable, f"data_prep/{script}", *arguments], check=True)


def train(experiment: Experiment, flags: str, run_dir: Path, seed: int, launcher: str) -> dict:
    """Return the summary of a run, trained unless it is there."""
    if not (run_dir / "summary.json").exists():
        command = [*shlex.split(launcher), sys.executable, "-m", "mpi4py", "-m", "hpc_bnn", "train"]
        command += ["--config", experiment.config, "--run_dir", str(run_dir), "--seed", str(seed)]
        subprocess.run([*command, *shlex.split(flags)], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "summary.json").read_text())


def table(name: str, experiment: Experiment, results: dict[str, list[dict]]) -> str:
    """Return a Markdown table of mean and standard deviation over the seeds."""
    num_seeds = len(next(iter(results.values())))
    lines = [
        f"**{name}** (`{experiment.config}`), {num_seeds} seeds",
        "",
        "| variant | " + " | ".join(experiment.metrics) + " | seconds |",
        "|---|" + "---|" * (len(experiment.metrics) + 1),
    ]
    for variant, summaries in results.items():
        cells = []
        for metric in (*(f"test/{metric}" for metric in experiment.metrics), "seconds"):
            values = [summary[metric] for summary in summaries if metric in summary]
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 and metric != "seconds" else ""
            cells.append(f"{mean(values):.4g}{spread}" if values else "–")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="where the sources lie")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--launcher", default="", help='such as "mpirun -np 4" or "srun --mpi=pmix"')
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    everything, text = {}, []
    for name in options.only:
        experiment = EXPERIMENTS[name]
        prepare(experiment, options.data)
        results: dict[str, list[dict]] = {}
        first = []
        for variant, flags in experiment.variants.items():
            label = f"{name}-{variant.replace(', ', '-').replace(' ', '-')}"
            run_dirs = [options.output / f"{label}-{seed}" for seed in options.seeds]
            first.append(str(run_dirs[0]))
            results[variant] = [
                train(experiment, flags, run_dir, seed, options.launcher)
                for run_dir, seed in zip(run_dirs, options.seeds)
            ]
        command = [sys.executable, "-m", "hpc_bnn", "report", *first, "--output", str(options.output / f"{name}.html")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        everything[name] = results
        text.append(table(name, experiment, results))
        print(text[-1], flush=True)
        (options.output / "experiments.json").write_text(json.dumps(everything, indent=1))
        (options.output / "experiments.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
