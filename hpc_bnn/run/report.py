"""One self-contained HTML page about one run, or several side by side. Local: no MPI, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from .. import __version__
from ..config import config_of_run, flatten
from ..errors import DataError
from ..safe_files import write_atomically
from . import plots

logger = logging.getLogger(__name__)

IDEALS = {"accuracy": 1.0, "spread_skill": 1.0, "coverage_50": 0.5, "coverage_90": 0.9, "coverage_95": 0.95}
"""The best value of a metric, if it is not the lowest."""

NO_BEST = ("width_50", "width_90", "width_95")
"""Metrics that are neither good nor bad by themselves."""

MAX_CHANNELS = 24
"""Channels that are listed; more are drawn only."""


@dataclass(frozen=True)
class RunRecord:
    """Content of a run directory."""

    label: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, one per epoch."""
    summary: dict[str, Any]
    """Empty where the run has not ended."""
    evaluation: dict[str, Any]
    """Of evaluation.json; empty where there was none."""
    pictures: dict[str, bytes]
    """PNG files of plots/, by name."""

    @classmethod
    def read(cls, directory: str | Path, label: str) -> RunRecord:
        """Read a run directory, also one of a run that goes on or was interrupted.

        Raises
        ------
        ConfigError
            It holds no run.
        DataError
            A file cannot be read.
        """
        directory = Path(directory)
        config_path = config_of_run(directory)
        try:
            config = yaml.safe_load(config_path.read_text())
            summary, evaluation = (
                json.loads(path.read_text()) if (path := directory / name).exists() else {}
                for name in ("summary.json", "evaluation.json")
            )
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"{directory} cannot be read ({error})") from error
        pictures = {path.stem: path.read_bytes() for path in sorted(directory.glob("plots/*.png"))}
        return cls(label, config, plots.read_rows(directory), summary, evaluation, pictures)

    @property
    def metrics(self) -> dict[str, float]:
        """The newest metrics of the test split."""
        if self.evaluation:
            return self.evaluation["metrics"]
        tested = [row for row in self.rows if any(name.startswith("test/") for name in row)]
        last = tested[-1] if tested else {}
        return {name[5:]: value for name, value in last.items() if name.startswith("test/")}


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page.

    Parameters
    ----------
    run_dirs : sequence of path
        One run, or several to compare.
    output : path, optional
        By default report.html in the run directory; for several runs in the directory that they share.

    Returns
    -------
    path : Path
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    names = [path.resolve().name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    records = [RunRecord.read(path, label) for path, label in zip(paths, labels)]
    if output is None:
        output = (paths[0] if len(paths) == 1 else _shared_parent(paths)) / "report.html"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_bnn.run", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        title=", ".join(labels),
        records=records,
        version=__version__,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        metrics=_metric_table(records),
        facts=_fact_table(records),
        differences=_differences(records),
        channels=[(record.label, _channel_table(record)) for record in records if _channel_table(record)],
        figures=_figures(records),
        examples=[(r.label, _png(r.pictures["uncertainty"])) for r in records if "uncertainty" in r.pictures],
        configs=[(record.label, yaml.safe_dump(record.config, sort_keys=False)) for record in records],
    )
    output = Path(output)
    write_atomically(output, page)
    return output


def _shared_parent(paths: list[Path]) -> Path:
    parents = {path.resolve().parent for path in paths}
    return parents.pop() if len(parents) == 1 else Path()


# --- tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a table: what it says of each run."""

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """Runs with the best value."""
    hint: str = ""


def _metric_table(records: list[RunRecord]) -> list[Line]:
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    lines = []
    for name in names:
        values = [record.metrics.get(name) for record in records]
        lines.append(Line(name, [_number(value) for value in values], _best(name, values), plots.LABELS.get(name, "")))
    return lines


def _best(name: str, values: list[float | None]) -> frozenset[int]:
    """Return the runs whose value is best, where there are several to choose from."""
    found = {i: v for i, v in enumerate(values) if v is not None and math.isfinite(v)}
    if len(set(found.values())) < 2 or name in NO_BEST:
        return frozenset()
    ideal = 1.0 if name.startswith("ood_auroc/") else IDEALS.get(name, -math.inf)
    distance = {i: v if ideal == -math.inf else abs(v - ideal) for i, v in found.items()}
    least = min(distance.values())
    return frozenset(i for i, value in distance.items() if value == least)


def _fact_table(records: list[RunRecord]) -> list[Line]:
    columns = [_facts(record) for record in records]
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [Line(name, [column.get(name, "–") for column in columns]) for name in names]


def _facts(record: RunRecord) -> dict[str, str]:
    """Return facts of a run other than its metrics."""
    config, summary, rows = record.config, record.summary, record.rows
    last = rows[-1] if rows else {}
    facts = {"state": "complete" if summary else "not complete: it goes on, or was interrupted"}
    if rows:
        facts["epochs, steps"] = f"{last['epoch']}, {last['step']}"
    facts["posterior, prior"] = f"{config['posterior']['family']}, {config['posterior']['prior']}"
    facts["objective"] = config["objective"]["name"]
    facts["samples per step"] = f"{config['num_samples']}"
    if record.evaluation:
        tested = record.evaluation
        facts["tested with"] = (
            f"{tested['num_samples']} samples, {tested['data']['shards']}, {tested['data']['split']}, "
            f"the {tested['checkpoint']} checkpoint (step {tested['num_steps']})"
        )
        if tested["data"]["foreign"]:
            facts["foreign data"] = tested["data"]["foreign"]
    facts["global batch"] = f"{config['global_batch_size']} examples"
    facts["network"] = config["model"]["name"]
    facts["shards"] = config["data"]["shards"]
    if summary:
        grid, posterior, sent = summary["grid"], summary["posterior"], summary["communication"]
        facts["random weights"] = f"{posterior['num_random_weights']:,}"
        facts["grid (samples x data)"] = f"{grid['sample_size']} x {grid['data_size']} ranks"
        facts["device"] = summary["device"]
        facts["time of training"] = f"{summary['seconds']:.1f} s"
        facts["collectives of rank 0"] = f"{sent['num_collectives']:,}, {sent['num_bytes'] / 1e6:,.1f} MB"
    trained = rows[1:] or rows  # the first epoch warms up
    for name, label, form in (
        ("examples_per_second", "examples per second", "{:,.0f}"),
        ("samples_per_second", "weight samples per second", "{:,.1f}"),
        ("collectives_per_step", "collectives per step", "{:.3g}"),
        ("bytes_per_step", "bytes per step of a rank", "{:,.0f}"),
        ("communication_share", "share of time in collectives", "{:.1%}"),
    ):
        values = sorted(row[name] for row in trained if name in row)
        if values:
            facts[f"{label} (median)"] = form.format(values[len(values) // 2])
    if summary:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return facts


def _differences(records: list[RunRecord]) -> list[Line]:
    """Return the fields of the configs that are not the same in all runs."""
    flat = [flatten(record.config) for record in records]
    names = [name for name in dict.fromkeys(n for one in flat for n in one) if name not in ("run_dir", "resume")]
    lines = [Line(f"--{name}", [_value(one.get(name, "–")) for one in flat]) for name in names]
    return [line for line in lines if len(set(line.cells)) > 1]


def _value(value: Any) -> str:
    """Return a value as a config file has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _channel_table(record: RunRecord) -> list[list[str]]:
    """Return the metrics of each channel, with a line of titles; nothing for one channel or many."""
    channels = record.evaluation.get("curves", {}).get("channels", {})
    if not 2 <= len(channels.get("name", ())) <= MAX_CHANNELS:
        return []
    lines = [list(channels)]
    for number in range(len(channels["name"])):
        values = [column[number] for column in channels.values()]
        lines.append([value if isinstance(value, str) else _number(value) for value in values])
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# --- figures -------------------------------------------------------------------------------------------


def _figures(records: list[RunRecord]) -> list[tuple[str, str, str]]:
    """Return title, picture as a data URL, and caption of each figure that the runs have something for."""
    if not plots.has_matplotlib():
        logger.warning("a page without figures: matplotlib is not installed (pip install 'hpc_bnn[plots]')")
        return []
    found = []
    for title, draw, caption in (
        ("Training", plots.training_figure, "Objective, data term and KL of every epoch."),
        ("Test", plots.test_figure, "Metrics of the predictive over all samples, on the held-out split."),
        (
            "Calibration",
            plots.calibration_figure,
            "Classes: accuracy against confidence, a bin's size by its examples; on the diagonal confidence is right. "
            "Numbers: histogram of the probability integral transform; flat is right, a hump says that intervals are "
            "too wide, a bowl too narrow, a slope that the mean is biased.",
        ),
        ("Channels", plots.channels_figure, "Metrics of numbers by channel, such as lead time."),
        (
            "Time and communication",
            plots.time_figure,
            "Throughput of the job, and the share of an epoch that rank 0 spends in collectives, waiting included.",
        ),
    ):
        figure = draw(records)
        if figure is not None:
            found.append((title, _svg(figure, title), caption))
    return found


def _svg(figure: Any, name: str) -> str:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": html.escape(name)})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
