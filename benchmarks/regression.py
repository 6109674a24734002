#!/usr/bin/env python3
"""Mean field, low rank, MC dropout and the plain network on tables of numbers, with the recipe of configs/tabular.yaml.

    python benchmarks/regression.py --data ../shared/data --output OUT [--num-splits 20] [--only diabetes] [--tune]

Tables: scikit-learn's diabetes (442 rows), the oil temperature of a transformer by its loads (ETTh2), Germany's electricity load by
its wind and sun (OPSD), each dealt to 70 / 10 / 20 % by 20 seeds. All methods see the same splits, so that their differences
are paired. --tune tries settings on the validation split of other seeds, three at most; those of the best NLL stand in CHOSEN.

Writes OUT/regression.jsonl, a row per run (an interrupted benchmark goes on), and OUT/regression.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from sklearn.datasets import load_diabetes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data_prep"))

import tabular  # noqa: E402

from hpc_bnn import Grid, GridComm  # noqa: E402
from hpc_bnn.cli.commands import config_of_words  # noqa: E402
from hpc_bnn.run import Run  # noqa: E402

NUM_STEPS = 4000
OPSD = [f"DE_{kind}_generation_actual" for kind in ("solar", "wind_offshore", "wind_onshore")]
TABLES = {  # file, target, features
    "diabetes": ("diabetes.csv", "progression", []),
    "ETTh2": ("ett/ETTh2.csv", "OT", ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL"]),
    "OPSD": ("electricity_load/opsd_de_2019_60min.csv", "DE_load_actual_entsoe_transparency", OPSD),
}
METHODS: dict[str, dict[str, Any]] = {
    "mean field": {},
    "low rank": {"posterior.family": "low_rank"},
    "MC dropout": {"posterior.family": "mc_dropout"},
    "plain": {"posterior.family": "deterministic", "num_samples": 1, "num_test_samples": 1},
}
TUNED: dict[str, dict[str, list[Any]]] = {
    "mean field": {"posterior.prior_std": [0.3, 1.0]},
    "low rank": {"posterior.prior_std": [0.3, 1.0]},
    "MC dropout": {"model.arguments": [{"hidden": [50], "dropout": p} for p in (0.02, 0.05, 0.2)]},
    "plain": {},
}
CHOSEN = {"diabetes": (0.3, 0.2), "ETTh2": (1.0, 0.02), "OPSD": (1.0, 0.02)}
"""Of the tuned: prior_std, the same for both Gaussian families, and the rate of dropout."""
METRICS = ("test/nll", "test/rmse", "test/crps", "train/nelbo")


def write_shards(name: str, data: Path, seed: int, directory: Path) -> int:
    """Write a split of a table; return the number of training examples."""
    file, target, features = TABLES[name]
    source = data / file
    if name == "diabetes":
        source, found = directory / "diabetes.csv", load_diabetes(scaled=False, as_frame=True)
        found.frame.rename(columns={"target": target}).to_csv(source, index=False)
    words = ["--source", source, "--target", target, "--seed", seed, "--output", directory / "shards"]
    words += ["--features", *features] if features else []
    options = tabular.make_parser().parse_args(list(map(str, words)))
    with contextlib.redirect_stdout(io.StringIO()):
        tabular.prepare(options, GridComm(Grid()))
    manifest = json.loads((directory / "shards/manifest.json").read_text())
    return sum(file["num_examples"] for file in manifest["splits"]["train"])


def train(directory: Path, num_examples: int, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Return the summary of a run of the recipe with other settings."""
    epochs = max(1, round(NUM_STEPS / math.ceil(num_examples / 32)))
    flags = {
        "data.shards": directory / "shards",
        "seed": seed,
        "num_epochs": epochs,
        "test_every_epochs": epochs,
        "checkpoint.every_epochs": epochs,
        "batching": "vmap",  # all samples of a step at once: the same numbers, in half of the time
        "chunk_size": settings.get("num_samples", 8),
        **settings,
    }
    flags["run_dir"] = directory / f"run{len(list(directory.glob('run*')))}"
    words = [f"--{name}={json.dumps(v) if isinstance(v, dict) else v}" for name, v in flags.items()]
    config = config_of_words(["train", "--config", str(ROOT / "configs/tabular.yaml"), *words])
    with contextlib.redirect_stderr(io.StringIO()):
        return Run(config, GridComm(Grid())).train()[0]


def settings_to_try(method: str, table: str, tune: bool) -> list[dict[str, Any]]:
    """Return the settings of a method for a table, or all combinations of what is tuned."""
    if tune:
        of_names = [[(name, value) for value in values] for name, values in TUNED[method].items()]
        return [METHODS[method] | dict(chosen) for chosen in itertools.product(*of_names)]
    prior_std, rate = CHOSEN[table]
    chosen = {"posterior.prior_std": prior_std, "model.arguments": {"hidden": [50], "dropout": rate}}
    return [METHODS[method] | {name: chosen[name] for name in TUNED[method]}]


def main(options: argparse.Namespace) -> None:
    """Train what is missing, and write the table."""
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("tuning.jsonl" if options.tune else "regression.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["table"], row["seed"], row["method"], str(row["settings"])) for row in rows}
    seeds = range(100, 100 + min(options.num_splits, 3)) if options.tune else range(options.num_splits)
    for seed, table in itertools.product(seeds, options.only or TABLES):
        wanted = [(method, s) for method in METHODS for s in settings_to_try(method, table, options.tune)]
        wanted = [one for one in wanted if (table, seed, one[0], str(one[1])) not in done]
        with tempfile.TemporaryDirectory() as directory:
            number = write_shards(table, options.data, seed, Path(directory)) if wanted else 0
            for method, settings in wanted:
                summary = train(Path(directory), number, seed, settings)
                row = {"table": table, "seed": seed, "method": method, "settings": settings}
                rows.append(
                    row | {name: v for name, v in summary.items() if "/" in name} | {"seconds": summary["seconds"]}
                )
                with open(path, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    if not options.tune:
        (options.output / "regression.md").write_text(tabulate(rows))


def tabulate(rows: list[dict[str, Any]]) -> str:
    """Return the means over splits, and differences to mean field with their standard errors."""
    lines = ["| table | method | " + " | ".join(METRICS) + " |", "|---|---|" + "---:|" * len(METRICS)]
    for table in dict.fromkeys(row["table"] for row in rows):
        of_seed = {m: {r["seed"]: r for r in rows if (r["table"], r["method"]) == (table, m)} for m in METHODS}
        for method, found in of_seed.items():
            cells = []
            for metric in METRICS:
                values = [row[metric] for row in found.values()]
                cell = f"{statistics.mean(values):.4g}"
                base = [of_seed["mean field"][seed][metric] for seed in found]
                if method != "mean field" and (metric != "train/nelbo" or method == "low rank"):
                    changes = [a - b for a, b in zip(values, base)]
                    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
                    cell += f" ({statistics.mean(changes):+.2g} ± {error:.1g})"
                cells.append("–" if metric == "train/nelbo" and method in ("MC dropout", "plain") else cell)
            lines.append(f"| {table} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the shared data sets")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-splits", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=TABLES)
    parser.add_argument("--tune", action="store_true", help="try settings on the validation split of other seeds")
    main(parser.parse_args())
