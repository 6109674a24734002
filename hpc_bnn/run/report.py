"""One self-contained HTML page about one run, or several side by side. Local: no MPI, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from .. import __version__
from ..comm import GridComm
from ..config import config_of_run, flatten
from ..errors import DataError
from ..grid import Grid
from ..safe_files import read_bytes, write_atomically
from . import plots

logger = logging.getLogger(__name__)

IDEALS: dict[str, float] = dict.fromkeys(("accuracy", "mean_iou", "spread_skill"), 1.0)
IDEALS |= {"coverage_50": 0.5, "coverage_90": 0.9, "coverage_95": 0.95}
"""The best value of a metric, if it is not the lowest."""

NO_BEST = ("width_50", "width_90", "width_95", "set_coverage", "interval_coverage", "interval_width")
"""Metrics that are neither good nor bad by themselves."""

CAPTIONS = {
    "Training": "Objective, data term and KL of every epoch.",
    "Test": "Metrics of the predictive over all samples, on the held-out split.",
    "Calibration": "Classes: accuracy against confidence, a bin's size by its examples; on the diagonal confidence is "
    "right. Numbers: histogram of the probability integral transform; flat is right, a hump says that intervals are too "
    "wide, a bowl too narrow, a slope that the mean is biased. Risk by coverage: the mean error of the surest examples (classes: "
    "share of wrong ones; numbers: absolute error); it rises if the uncertainty knows where the errors are.",
    "Signal to noise": "Share of the random weights by log10(|mu| / sigma); far to the left sigma says that the weight is not needed.",
    "Channels": "Metrics of numbers by channel, such as lead time.",
    "Time and communication": "Throughput of the job, and the share of an epoch that rank 0 spends in collectives, "
    "waiting included.",
}
"""The figures by their titles, in the order of the page."""

MAX_ROWS = 24
"""Channels and groups that are listed; more channels are drawn only."""

MAX_TENSORS = 100
"""Weight tensors that are listed; evaluation.json has all."""

COLUMNS = {
    "name": ("tensor", ""),
    "num_weights": ("weights", ","),
    "rms": ("RMS of mu", ".4g"),
    "kl": ("KL (nats)", ".4g"),
    "kl_per_weight": ("per weight", ".4g"),
    "at_prior": ("at the prior", ".1%"),
    "snr_05": ("|mu|/sigma 5 %", ".4g"),
    "snr_median": ("median", ".4g"),
    "snr_95": ("95 %", ".4g"),
}
"""Of the table of weight tensors: titles and forms of the columns of evaluation.json."""


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
        """Read a run directory, also of a run that goes on; `ConfigError` without a run, `DataError` if unreadable."""
        directory = Path(directory)
        config_path = config_of_run(directory)
        config = _mapping(config_path, yaml.safe_load)
        summary, evaluation = (_mapping(directory / name, json.loads) for name in ("summary.json", "evaluation.json"))
        pictures = {path.stem: read_bytes(path, "the picture") or b"" for path in sorted(directory.glob("plots/*.png"))}
        rows = [row for row in plots.read_rows(directory / plots.ROWS_FILE)[0] if {"epoch", "step"} <= row.keys()]
        return cls(label, config, rows, summary, evaluation, pictures)

    @property
    def posterior(self) -> dict[str, Any]:
        """The check-up of the evaluated state; empty where there was none."""
        return self.evaluation.get("posterior", {})

    @property
    def metrics(self) -> dict[str, float]:
        """The newest metrics of the test split."""
        if self.evaluation:
            return self.evaluation["metrics"]
        tested = [row for row in self.rows if any(name.startswith("test/") for name in row)]
        last = tested[-1] if tested else {}
        return {name[5:]: value for name, value in last.items() if name.startswith("test/")}


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the content of a file of a run, which is a mapping; empty where it is missing."""
    content = read_bytes(path, "the file")
    if content is None:
        return {}
    try:
        found = parse(content.decode())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read ({error}). Put back a copy, or move it elsewhere") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no mapping, but a {type(found).__name__}. Put back a copy, or move it elsewhere")
    return found


def write_report(run_dirs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page about one run, or several to compare, and return its path.

    By default it is report.html in the run directory; for several runs in the directory that they share.
    """
    paths = [Path(run_dir) for run_dir in run_dirs]
    names = [path.resolve().name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    records = [RunRecord.read(path, label) for path, label in zip(paths, labels)]
    if output is None:
        parents = {path.resolve().parent for path in paths}
        directory = paths[0] if len(paths) == 1 else parents.pop() if len(parents) == 1 else Path()
        output = directory / "report.html"
    try:
        page = _page(records)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        listed = ", ".join(map(str, paths))
        raise DataError(
            f"the files of {listed} are not as hpc_bnn writes them ({type(error).__name__}: {error}): config.yaml, "
            "metrics.jsonl, summary.json, evaluation.json. Put back copies, or move the changed file elsewhere"
        ) from error
    with GridComm(Grid()).agree(f"writing {output}"):  # this rank alone
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output), page)
    return Path(output)


def _page(records: list[RunRecord]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hpc_bnn.run", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        title=", ".join(record.label for record in records),
        records=records,
        version=__version__,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        metrics=_metric_table(records),
        facts=_fact_table(records),
        differences=_differences(records),
        tables=_tables(records),
        posteriors=[_posterior(record) for record in records if record.posterior],
        figures=_figures(records),
        examples=[
            (r.label, _data_url("png", r.pictures["uncertainty"])) for r in records if "uncertainty" in r.pictures
        ],
        configs=[(record.label, yaml.safe_dump(record.config, sort_keys=False)) for record in records],
    )


# --- tables --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a table: what it says of each run."""

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()
    """Runs with the best value."""
    hint: str = ""


def _names(columns: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the keys of all columns, each once, in their order."""
    return list(dict.fromkeys(name for column in columns for name in column))


def _metric_table(records: list[RunRecord]) -> list[Line]:
    columns, lines = [record.metrics for record in records], []
    for name in _names(columns):
        values = [column.get(name) for column in columns]
        lines.append(Line(name, [_number(value) for value in values], _best(name, values), plots.LABELS.get(name, "")))
    return lines


def _best(name: str, values: list[float | None]) -> frozenset[int]:
    """Return the runs whose value is best, where there are several to choose from."""
    found = {i: v for i, v in enumerate(values) if v is not None and math.isfinite(v)}
    if len(set(found.values())) < 2 or name in NO_BEST or name.startswith(("persistence/", "climatology/")):
        return frozenset()
    ideal = 1.0 if name.startswith(("ood_auroc/", "ood_aupr/")) or "_skill/" in name else IDEALS.get(name)
    distance = {i: v if ideal is None else abs(v - ideal) for i, v in found.items()}
    return frozenset(i for i, value in distance.items() if value == min(distance.values()))


def _fact_table(records: list[RunRecord]) -> list[Line]:
    columns = [_facts(record) for record in records]
    return [Line(name, [column.get(name, "–") for column in columns]) for name in _names(columns)]


def _facts(record: RunRecord) -> dict[str, str]:
    """Return facts of a run other than its metrics."""
    config, summary, rows, tested = record.config, record.summary, record.rows, record.evaluation
    facts = {"state": "complete" if summary else "not complete: it goes on, or was interrupted"}
    if rows:
        facts["epochs, steps"] = f"{rows[-1]['epoch']}, {rows[-1]['step']}"
    facts["posterior, prior"] = f"{config['posterior']['family']}, {config['posterior']['prior']}"
    facts["objective"] = config["objective"]["name"]
    facts["samples per step"] = f"{config['num_samples']}"
    if tested:
        facts["tested with"] = (
            f"{tested['num_samples']} samples, {tested['data']['shards']}, {tested['data']['split']}, "
            f"the {tested['checkpoint']} checkpoint (step {tested['num_steps']})"
        )
        if tested.get("calibrated"):
            facts["tested with"] += ", calibrated"
        if tested["data"]["foreign"]:
            facts["foreign data"] = tested["data"]["foreign"]
    facts["global batch"] = f"{config['global_batch_size']} examples"
    facts["network"] = config["model"]["name"]
    facts["shards"] = config["data"].get("dataset") or config["data"]["shards"]
    if summary:
        grid, sent = summary["grid"], summary["communication"]
        facts["random weights"] = f"{summary['posterior']['num_random_weights']:,}"
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
        values = [row[name] for row in trained if name in row]
        if values:
            facts[f"{label} (median)"] = form.format(statistics.median_high(values))
    if summary:
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return facts


def _differences(records: list[RunRecord]) -> list[Line]:
    """Return the fields of the configs that are not the same in all runs."""
    flat = [flatten(record.config) for record in records]
    names = [name for name in _names(flat) if name not in ("run_dir", "resume")]
    lines = [Line(f"--{name}", [_value(one.get(name, "–")) for one in flat]) for name in names]
    return [line for line in lines if len(set(line.cells)) > 1]


def _value(value: Any) -> str:
    """Return a value as a config file has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _tables(records: list[RunRecord]) -> dict[str, list[tuple[str, list[list[str]]]]]:
    """Return the metrics of each channel and group by title, with the label of the run; nothing for one or many."""
    found: dict[str, list[tuple[str, list[list[str]]]]] = {}
    for record in records:
        tables = {"channel": record.evaluation.get("curves", {}).get("channels", {})}
        for grouping, group in record.evaluation.get("groups", {}).items():
            tables[grouping] = {"name": group["name"], **group["metrics"]}
        for title, columns in tables.items():
            if 2 <= len(columns.get("name", ())) <= MAX_ROWS:
                lines = zip(*columns.values())
                cells = [[v if isinstance(v, str) else _number(v) for v in values] for values in lines]
                found.setdefault(f"By {title}", []).append((record.label, [list(columns), *cells]))
    return found


def _posterior(record: RunRecord) -> tuple[str, list[list[list[str]]], list[str]]:
    """Return label, tables with a line of titles each, and sentences about the posterior of a run."""
    found, tested = record.posterior, record.evaluation
    mean = [[n, _number(record.metrics.get(n)), _number(value)] for n, value in found["mean_network"].items()]
    columns = {name: values for name, values in found["tensors"].items() if any(value is not None for value in values)}
    lines = list(zip(*(columns[name] for name in COLUMNS if name in columns), strict=True))
    tensors = [[COLUMNS[name][0] for name in COLUMNS if name in columns]]
    for line in lines[:MAX_TENSORS]:
        forms = [form for name, (_, form) in COLUMNS.items() if name in columns]
        tensors.append(["–" if value is None else format(value, form) for value, form in zip(line, forms)])
    state = f"{found['family']}, the {tested['checkpoint']} checkpoint (step {tested['num_steps']})."
    more = [f"evaluation.json has {len(lines) - MAX_TENSORS} tensors more."] if len(lines) > MAX_TENSORS else []
    tables = [[["", "predictive", "mean network"], *mean]] if mean else []
    return record.label, [*tables, tensors], [state, *found["notes"], *more]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# --- figures -------------------------------------------------------------------------------------------


def _figures(records: list[RunRecord]) -> list[tuple[str, str, str]]:
    """Return title, picture as a data URL, and caption of each figure that the runs have something for."""
    if not plots.has_matplotlib():
        logger.warning("a page without figures: matplotlib is not installed (pip install 'hpc_bnn[plots]')")
        return []
    found = []
    for title, caption in CAPTIONS.items():
        if title in plots.ROWS:
            figure = plots.rows_figure(records, plots.ROWS[title])
        else:
            figure = getattr(plots, f"{title.lower().replace(' ', '_')}_figure")(records)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": html.escape(title)})
            found.append((title, _data_url("svg+xml", buffer.getvalue()), caption))
    return found


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
