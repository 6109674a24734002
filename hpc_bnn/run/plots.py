"""Pictures of runs. Local."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

LABELS = {
    "accuracy": "accuracy",
    "nll": "NLL (nats per example)",
    "brier": "Brier score",
    "ece": "expected calibration error, 15 bins of equal width",
    "adaptive_ece": "expected calibration error, 15 bins of equal count",
    "rmse": "RMSE (units of y)",
    "mae": "MAE (units of y)",
    "crps": "CRPS (units of y)",
    "fair_crps": "fair CRPS (units of y)",
    "spread_skill": "spread / RMSE of the mean; 1 is right",
    "calibration_error": "mean absolute calibration error of quantiles",
    **{f"coverage_{level}": f"share inside the central {level} % interval" for level in (50, 90, 95)},
    **{f"width_{level}": f"width of the central {level} % interval (units of y)" for level in (50, 90, 95)},
    "ood_auroc/entropy": "AUROC of the entropy for foreign data",
    "ood_auroc/mutual_information": "AUROC of the mutual information for foreign data",
    "ood_auroc/std": "AUROC of the total standard deviation for foreign data",
    "ood_auroc/epistemic_std": "AUROC of the epistemic standard deviation for foreign data",
}
"""Descriptions of the metrics."""


class Runs(Protocol):
    """Data of a run for figures: `hpc_bnn.run.report.RunRecord`."""

    label: str
    rows: list[dict[str, Any]]
    evaluation: dict[str, Any]


def has_matplotlib() -> bool:
    """Whether anything can be drawn."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    return True


def read_rows(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the rows of RUN_DIR/metrics.jsonl; none where there are none, and not one that is half written."""
    path, rows = Path(run_dir, "metrics.jsonl"), []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_plots(run_dir: str | Path, examples: dict[str, Any]) -> list[Path]:
    """Draw RUN_DIR/plots/curves.png and uncertainty.png. Local: rank 0 calls it.

    Parameters
    ----------
    run_dir : path
        Run directory with a metrics.jsonl.
    examples : dict
        Test examples with their predictive, as `hpc_bnn.run.train.Run.train` returns them.

    Returns
    -------
    list of Path
        The files; empty if matplotlib is not installed; a message is then logged.
    """
    if not has_matplotlib():
        logger.warning("no plots: matplotlib is not installed (pip install 'hpc_bnn[plots]')")
        return []
    directory = Path(run_dir, "plots")
    directory.mkdir(exist_ok=True)
    if "surest" in examples:
        draw = _plot_uncertainty
    elif examples["y"].ndim == 3:
        draw = _plot_fields
    else:
        draw = _plot_values
    return [_plot_curves(read_rows(run_dir), directory / "curves.png"), draw(examples, directory / "uncertainty.png")]


def _plot_curves(rows: list[dict[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) == 1 else None
    left.plot(epochs, [row["train/nelbo"] for row in rows], marker=marker, label="objective")
    left.plot(epochs, [row["train/data_term"] for row in rows], marker=marker, label="data term")
    left.set(xlabel="epoch", ylabel="per example", title="training")
    if rows and min(min(row["train/nelbo"], row["train/data_term"]) for row in rows) > 0:
        left.set_yscale("log")
    left.legend()
    tested = [row for row in rows if any(name.startswith("test/") for name in row)]
    if not tested:
        right.set_axis_off()
        figure.savefig(path, dpi=120)
        plt.close(figure)
        return path
    epochs = [row["epoch"] for row in tested]
    right.set(xlabel="epoch", title="test, predictive over all samples")
    shown = [name for name in ("test/nll", "test/accuracy", "test/rmse") if name in tested[-1]]
    twin = right.twinx()
    twin.set_axis_off() if len(shown) == 1 else None
    for axes, name, style in zip((right, twin), shown, ("o-", "s--")):
        axes.plot(epochs, [row[name] for row in tested], style, color=f"C{2 + (axes is twin)}", label=LABELS[name[5:]])
        axes.set_ylabel(LABELS[name[5:]])
    lines = right.get_lines() + twin.get_lines()
    right.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


# --- figures of several runs ---------------------------------------------------------------------------


def _panels(titles: Sequence[str], height: float = 3.2):
    """Return a figure and its axes, three in a row."""
    from matplotlib import pyplot as plt

    columns = min(len(titles), 3)
    lines = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.6 * columns + 0.6, height * lines), layout="constrained", squeeze=False
    )
    for panel, title in zip(axes.flat, titles):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
    for panel in axes.flat[len(titles) :]:
        panel.set_axis_off()
    return figure, list(axes.flat[: len(titles)])


def _draw_rows(axes, runs: Sequence[Runs], name: str) -> None:
    for number, run in enumerate(runs):
        points = [(row["epoch"], row[name]) for row in run.rows if name in row]
        marker = "o" if len(points) < 30 else None
        axes.plot(*zip(*points) if points else ((), ()), marker=marker, ms=3, color=f"C{number}", label=run.label)
    axes.set_xlabel("epoch")


def _legend(axes, runs: Sequence[Runs]) -> None:
    if len(runs) > 1:
        axes.legend(fontsize=8)


def training_figure(runs: Sequence[Runs]):
    """Draw objective, data term and KL by epoch; None where no epoch is complete."""
    titles = {
        "train/nelbo": "objective per example",
        "train/data_term": "data term per example",
        "train/kl": "KL (nats)",
    }
    return _rows_figure(runs, titles)


def test_figure(runs: Sequence[Runs]):
    """Draw the main metrics of the test split by epoch; None where there was no test."""
    names = ("accuracy", "nll", "brier", "rmse", "crps", "spread_skill", "ece", "coverage_90")
    return _rows_figure(runs, {f"test/{name}": LABELS[name] for name in names})


def time_figure(runs: Sequence[Runs]):
    """Draw throughput and the share of communication by epoch; None where no epoch is complete."""
    titles = {
        "examples_per_second": "examples per second",
        "samples_per_second": "weight samples per second",
        "communication_share": "share of time in collectives",
    }
    return _rows_figure(runs, titles)


def _rows_figure(runs: Sequence[Runs], titles: dict[str, str]):
    there = [name for name in titles if any(name in row for run in runs for row in run.rows)]
    if not there:
        return None
    figure, panels = _panels([titles[name] for name in there])
    for axes, name in zip(panels, there):
        _draw_rows(axes, runs, name)
        if name == "communication_share":
            axes.set_ylim(0, 1)
    _legend(panels[0], runs)
    return figure


def calibration_figure(runs: Sequence[Runs]):
    """Draw reliability diagrams of classes and PIT histograms of numbers; None where no run has either."""
    curves = [run.evaluation.get("curves", {}) for run in runs]
    kinds = [kind for kind in ("reliability", "pit") if any(kind in curve for curve in curves)]
    if not kinds:
        return None
    titles = {"reliability": "reliability", "pit": "PIT histogram"}
    figure, panels = _panels([titles[kind] for kind in kinds], height=3.8)
    for axes, kind in zip(panels, kinds):
        for number, (run, curve) in enumerate(zip(runs, curves)):
            if kind not in curve:
                continue
            if kind == "reliability":
                bins = curve[kind]
                total = sum(bins["count"])
                sizes = [12 + 300 * count / total for count in bins["count"]]
                axes.plot(bins["confidence"], bins["accuracy"], color=f"C{number}", lw=1, label=run.label)
                axes.scatter(bins["confidence"], bins["accuracy"], sizes, color=f"C{number}", alpha=0.5)
            else:
                edges = [i / len(curve[kind]) for i in range(len(curve[kind]) + 1)]
                axes.stairs([v * len(curve[kind]) for v in curve[kind]], edges, color=f"C{number}", label=run.label)
        if kind == "reliability":
            axes.axline((0, 0), slope=1, color="gray", lw=0.8, ls="--")
            axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        else:
            axes.axhline(1, color="gray", lw=0.8, ls="--")
            axes.set(xlabel="PIT", ylabel="density", ylim=(0, None))
        _legend(axes, runs)
    return figure


def channels_figure(runs: Sequence[Runs]):
    """Draw metrics of numbers by channel; None where there is one channel."""
    found = [run.evaluation.get("curves", {}).get("channels", {}) for run in runs]
    if max((len(channels.get("name", ())) for channels in found), default=0) < 2:
        return None
    names = [name for name in ("rmse", "crps", "spread_skill") if any(name in channels for channels in found)]
    figure, panels = _panels([LABELS[name] for name in names])
    for axes, name in zip(panels, names):
        for number, (run, channels) in enumerate(zip(runs, found)):
            values = channels.get(name, ())
            style = "o" if len(values) <= 12 else "-"
            axes.plot(range(len(values)), values, style, ms=4, color=f"C{number}", label=run.label)
        titles = found[0].get("name", ())
        if len(titles) <= 12:
            axes.set_xticks(range(len(titles)), titles, rotation=45, ha="right", fontsize=7)
        else:
            axes.set_xlabel("channel")
        if name != "spread_skill" and _spans_decades([v for channels in found for v in channels.get(name, ())]):
            axes.set_yscale("log")
    _legend(panels[0], runs)
    return figure


def _spans_decades(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


# --- figures of one run --------------------------------------------------------------------------------


def _plot_uncertainty(examples: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    columns = examples["surest"] + examples["least_sure"]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(1.45 * len(columns), 3.6), layout="constrained", squeeze=False
    )
    for number, (example, (top, bottom)) in enumerate(zip(columns, axes.T)):
        p, std = example["probabilities"].float().numpy(), example["std"].float().numpy()
        _show_image(top, example["x"].float())
        top.set_title(f"true {example['y']}, says {int(p.argmax())}\nH {example['entropy']:.2f} nats", fontsize=8)
        bottom.bar(range(len(p)), p, yerr=std, color="C0", error_kw={"elinewidth": 0.8})
        bottom.set_ylim(0, 1.05)
        bottom.set_xticks(range(0, len(p), max(1, len(p) // 5)))
        bottom.set_xlabel("class", fontsize=8)
        bottom.tick_params(labelsize=6)
        if number:
            bottom.set_yticklabels([])
    axes[1, 0].set_ylabel("probability ± std\nover samples", fontsize=8)
    figure.suptitle(
        f"test examples: the {len(examples['surest'])} surest of different classes and the {len(examples['least_sure'])} least sure "
        "by entropy H of the predictive",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_values(examples: dict[str, Any], path: Path) -> Path:
    """Draw predicted against true values, or for several targets each example's band of two standard deviations."""
    from matplotlib import pyplot as plt

    y, mean, aleatoric, epistemic = (
        examples[name].double().numpy() for name in ("y", "mean", "aleatoric_std", "epistemic_std")
    )
    total = (aleatoric**2 + epistemic**2) ** 0.5
    if y.shape[1] == 1:
        figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
        axes.errorbar(y[:, 0], mean[:, 0], 2 * total[:, 0], fmt="o", ms=3, lw=0.6, label="± 2 std, total")
        axes.errorbar(y[:, 0], mean[:, 0], 2 * epistemic[:, 0], fmt="none", lw=1.8, color="C3", label="epistemic part")
        axes.axline((y.mean(), y.mean()), slope=1, color="gray", lw=0.8)
        axes.set(xlabel="true", ylabel="predicted", title="test examples")
        axes.legend()
    else:
        rows = range(0, len(y), -(-len(y) // 6))
        figure, panels = plt.subplots(2, 3, figsize=(11, 5), layout="constrained", sharex=True)
        places = range(y.shape[1])
        for axes, row in zip(panels.flat, rows):
            for std, alpha, label in ((total, 0.25, "± 2 std, total"), (epistemic, 0.5, "epistemic part")):
                low, high = mean[row] - 2 * std[row], mean[row] + 2 * std[row]
                axes.fill_between(places, low, high, color="C0", alpha=alpha, lw=0, label=label)
            axes.plot(places, mean[row], color="C0", label="mean")
            axes.plot(places, y[row], color="black", lw=1, label="true")
        panels.flat[0].legend(fontsize=7)
        figure.supxlabel("target")
        figure.suptitle("test examples")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_fields(examples: dict[str, Any], path: Path) -> Path:
    """Draw maps of each example: true, predicted, the error, and the standard deviation of the predictive."""
    from matplotlib import pyplot as plt

    y, mean = (examples[name].double().numpy() for name in ("y", "mean"))
    variance = sum(examples[f"{part}_std"].double().numpy() ** 2 for part in ("aleatoric", "epistemic"))
    error, std = abs(mean - y), variance**0.5
    columns = (("true", y), ("predicted", mean), ("|error|", error), ("predictive std", std))
    figure, panels = plt.subplots(
        len(y), 4, figsize=(13, 2.6 * len(y)), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    values = {"vmin": min(y.min(), mean.min()), "vmax": max(y.max(), mean.max()), "cmap": "viridis"}
    spreads = {"vmin": 0.0, "vmax": max(error.max(), std.max()), "cmap": "magma"}
    for row, line in enumerate(panels):
        for axes, (name, fields) in zip(line, columns):
            scale = values if name in ("true", "predicted") else spreads
            image = axes.imshow(fields[row], **scale)
            if row == 0:
                axes.set_title(name)
            if axes is line[1] or axes is line[3]:
                figure.colorbar(image, ax=axes)
    figure.suptitle("test examples, first channel (units of y; both right columns on one scale)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _show_image(axes, x) -> None:
    """Show an example [C, H, W] as an image, anything else as a curve."""
    axes.set_xticks([])
    axes.set_yticks([])
    if x.ndim == 3 and min(x.shape[1:]) > 1:
        x = x[:3] if x.shape[0] >= 3 else x[:1]
        low, high = x.min(), x.max()
        image = ((x - low) / (high - low if high > low else math.inf)).permute(1, 2, 0)
        axes.imshow(image.numpy(), cmap="gray_r")
    else:
        axes.plot(x.reshape(-1).numpy())
