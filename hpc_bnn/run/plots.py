"""Pictures of runs. Local."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..safe_files import read_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from .report import RunRecord

logger = logging.getLogger(__name__)

ROWS_FILE = "metrics.jsonl"

LABELS = {
    "accuracy": "accuracy",
    "nll": "NLL (nats per example)",
    "brier": "Brier score",
    "ece": "expected calibration error, 15 bins of equal width",
    "adaptive_ece": "expected calibration error, 15 bins of equal count",
    "classwise_ece": "calibration error of each class, 15 bins of equal width, mean over classes",
    "aurc": "area under the risk-coverage curve: error or absolute error (units of y), by the total uncertainty",
    "mean_iou": "mean over classes of intersection over union",
    "rmse": "RMSE (units of y)",
    "mae": "MAE (units of y)",
    "crps": "CRPS (units of y)",
    "fair_crps": "fair CRPS (units of y)",
    "set_coverage": "fraction of the examples whose class is in the set of the calibration",
    "set_size": "classes in the set of the calibration, mean",
    "interval_coverage": "fraction of the targets inside the interval of the calibration",
    "interval_width": "width of the interval of the calibration (units of y)",
    "spread_skill": "spread / RMSE of the mean; 1 is right",
    "calibration_error": "mean absolute calibration error of quantiles",
    **{f"coverage_{level}": f"share inside the central {level} % interval" for level in (50, 90, 95)},
    **{f"width_{level}": f"width of the central {level} % interval (units of y)" for level in (50, 90, 95)},
    **{
        f"ood_{metric}/{name}": f"{title} of the {uncertainty} for foreign data"
        for metric, title in (("auroc", "AUROC"), ("aupr", "average precision"), ("fpr95", "FPR at 95 % TPR"))
        for name, uncertainty in (
            ("entropy", "entropy"),
            ("mutual_information", "mutual information"),
            ("std", "total standard deviation"),
            ("epistemic_std", "epistemic standard deviation"),
        )
    },
}
"""Descriptions of the metrics."""


ROWS = {
    "Training": {
        "train/nelbo": "objective per example",
        "train/data_term": "data term per example",
        "train/kl": "KL (nats)",
    },
    **{
        split.capitalize(): {
            f"{split}/{name}": LABELS[name]
            for name in ("accuracy", "nll", "brier", "mean_iou", "rmse", "crps", "spread_skill", "ece", "coverage_90")
        }
        for split in ("validation", "test")
    },
    "Time and communication": {
        "examples_per_second": "examples per second",
        "samples_per_second": "weight samples per second",
        "communication_share": "share of time in collectives",
    },
}
"""Figures by epoch: the columns of metrics.jsonl that each draws, and their titles."""


def has_matplotlib() -> bool:
    """Whether anything can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file, none without it, and how many lines are none; `DataError` if unreadable. Local."""
    rows, num_lost = [], 0
    for line in (read_bytes(path, "the rows") or b"").splitlines():
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_lost += bool(line.strip(b"\0 "))
    return rows, num_lost


def write_plots(run_dir: str | Path, examples: dict[str, Any]) -> list[Path]:
    """Draw RUN_DIR/plots/curves.png and uncertainty.png and return their paths. Local: rank 0 calls it.

    From metrics.jsonl, and from the examples that `hpc_bnn.run.train.Run.train` returns. Without matplotlib it logs a
    message and draws nothing.
    """
    if not has_matplotlib():
        logger.warning("no plots: matplotlib is not installed (pip install 'hpc_bnn[plots]')")
        return []
    directory = Path(run_dir, "plots")
    directory.mkdir(exist_ok=True)
    if "surest" in examples:
        draw = _plot_uncertainty
    elif "class" in examples:
        draw = _plot_class_fields
    elif examples["y"].ndim == 3:
        draw = _plot_fields
    else:
        draw = _plot_values
    curves, uncertainty = directory / "curves.png", directory / "uncertainty.png"
    _plot_curves(read_rows(Path(run_dir, ROWS_FILE))[0]).savefig(curves, dpi="figure")
    draw(examples).savefig(uncertainty, dpi="figure")
    return [curves, uncertainty]


def _figure(width: float, height: float, dpi: int = 120) -> Figure:
    """Return an empty figure (inches) that pyplot and its window system do not know."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi, layout="constrained")


def _plot_curves(rows: list[dict[str, Any]]) -> Figure:
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    epochs, marker = [row["epoch"] for row in rows], "o" if len(rows) == 1 else None
    for name, label in (("train/nelbo", "objective"), ("train/data_term", "data term")):
        left.plot(epochs, [row[name] for row in rows], marker=marker, label=label)
    left.set(xlabel="epoch", ylabel="per example", title="training")
    if rows and min(min(row["train/nelbo"], row["train/data_term"]) for row in rows) > 0:
        left.set_yscale("log")
    left.legend()
    split = "validation" if any("validation/" in name for row in rows for name in row) else "test"
    tested = [row for row in rows if any(name.startswith(f"{split}/") for name in row)]
    if not tested:
        right.set_axis_off()
        return figure
    right.set(xlabel="epoch", title=f"{split}, predictive over all samples")
    shown = [name for metric in ("nll", "accuracy", "rmse") if (name := f"{split}/{metric}") in tested[-1]]
    twin = right.twinx()
    if len(shown) == 1:
        twin.set_axis_off()
    lines, epochs = [], [row["epoch"] for row in tested]
    for axes, name, style, color in zip((right, twin), shown, ("o-", "s--"), ("C2", "C3")):
        label = LABELS[name.removeprefix(f"{split}/")]
        lines += axes.plot(epochs, [row[name] for row in tested], style, color=color, label=label)
        axes.set_ylabel(label)
    right.legend(lines, [line.get_label() for line in lines], loc="center right")
    return figure


# --- figures of several runs ---------------------------------------------------------------------------


def _panels(titles: Sequence[str], height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, three in a row."""
    columns = min(len(titles), 3)
    lines = -(-len(titles) // columns)
    figure = _figure(3.6 * columns + 0.6, height * lines)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, title in zip(axes, titles):
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
    for panel in axes[len(titles) :]:
        panel.set_axis_off()
    return figure, axes[: len(titles)]


def _legend(axes: Axes, runs: Sequence[RunRecord]) -> None:
    if len(runs) > 1:
        axes.legend(fontsize=8)


def rows_figure(runs: Sequence[RunRecord], titles: dict[str, str]) -> Figure | None:
    """Draw columns of metrics.jsonl by epoch, such as ``ROWS["Test"]``; None where no run has one of them."""
    names = [name for name in titles if any(name in row for run in runs for row in run.rows)]
    if not names:
        return None
    figure, panels = _panels([titles[name] for name in names])
    for axes, name in zip(panels, names):
        for number, run in enumerate(runs):
            rows = [row for row in run.rows if name in row]
            epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
            marker = "o" if len(rows) < 30 else None
            axes.plot(epochs, values, marker=marker, ms=3, color=f"C{number}", label=run.label)
        axes.set_xlabel("epoch")
        if name == "communication_share":
            axes.set_ylim(0, 1)
    _legend(panels[0], runs)
    return figure


def calibration_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Draw reliability diagrams of classes, PIT histograms of numbers, risk by coverage; None where no run has any."""
    titles = {"reliability": "reliability", "pit": "PIT histogram", "risk_coverage": "risk by coverage"}
    curves = [run.evaluation.get("curves", {}) for run in runs]
    kinds = [kind for kind in titles if any(kind in curve for curve in curves)]
    if not kinds:
        return None
    figure, panels = _panels([titles[kind] for kind in kinds], height=3.8)
    for axes, kind in zip(panels, kinds):
        for number, (run, curve) in enumerate(zip(runs, curves)):
            color = f"C{number}"
            if kind not in curve:
                continue
            if kind == "reliability":
                confidence, accuracy, counts = (curve[kind][name] for name in ("confidence", "accuracy", "count"))
                axes.plot(confidence, accuracy, lw=1, color=color, label=run.label)
                sizes = [12 + 300 * count / sum(counts) for count in counts]
                axes.scatter(confidence, accuracy, sizes, color=color, alpha=0.5)
            elif kind == "risk_coverage":
                axes.plot(curve[kind]["coverage"], curve[kind]["risk"], color=color, label=run.label)
            else:
                num_bins = len(curve[kind])
                edges = [i / num_bins for i in range(num_bins + 1)]
                axes.stairs([value * num_bins for value in curve[kind]], edges, color=color, label=run.label)
        if kind == "reliability":
            axes.axline((0, 0), slope=1, color="gray", lw=0.8, ls="--")
            axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
        elif kind == "risk_coverage":
            axes.set(xlabel="fraction of the examples, the surest first", ylabel="mean error")
            axes.set(xlim=(0, 1.02), ylim=(0, None))
        else:
            axes.axhline(1, color="gray", lw=0.8, ls="--")
            axes.set(xlabel="PIT", ylabel="density", ylim=(0, None))
        _legend(axes, runs)
    return figure


def signal_to_noise_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Draw histograms of the signal-to-noise ratio of the weights; None where no run has one."""
    found = [run.posterior.get("snr", {}) for run in runs]
    if not any(found):
        return None
    figure, (axes,) = _panels(["signal-to-noise ratio of the weights"])
    for number, (run, snr) in enumerate(zip(runs, found)):
        if snr:
            shares = [count / sum(snr["counts"]) for count in snr["counts"]]
            axes.stairs(shares, snr["log10_edges"], color=f"C{number}", label=run.label)
    axes.set(xlabel="log10(|mu| / sigma)", ylabel="share of the weights", ylim=(0, None))
    _legend(axes, runs)
    return figure


def channels_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Draw metrics of numbers by channel; None where there is one channel."""
    found = [run.evaluation.get("curves", {}).get("channels", {}) for run in runs]
    if max((len(channels.get("name", ())) for channels in found), default=0) < 2:
        return None
    names = [name for name in ("rmse", "crps", "spread_skill") if any(name in channels for channels in found)]
    figure, panels = _panels([LABELS[name] for name in names])
    titles = found[0].get("name", ())
    for axes, name in zip(panels, names):
        columns = [channels.get(name, ()) for channels in found]
        for number, (run, values) in enumerate(zip(runs, columns)):
            style = "o" if len(values) <= 12 else "-"
            axes.plot(range(len(values)), values, style, ms=4, color=f"C{number}", label=run.label)
        if len(titles) <= 12:
            axes.set_xticks(range(len(titles)), titles, rotation=45, ha="right", fontsize=7)
        else:
            axes.set_xlabel("channel")
        values = [value for column in columns for value in column]
        if name != "spread_skill" and values and 0 < 30 * min(values) < max(values):
            axes.set_yscale("log")
    _legend(panels[0], runs)
    return figure


# --- figures of one run --------------------------------------------------------------------------------


def _plot_uncertainty(examples: dict[str, Any]) -> Figure:
    surest, least_sure = examples["surest"], examples["least_sure"]
    columns = surest + least_sure
    figure = _figure(1.45 * len(columns), 3.6)
    axes = figure.subplots(2, len(columns), squeeze=False)
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
    title = f"test examples: the {len(surest)} surest of different classes and the {len(least_sure)} least sure "
    figure.suptitle(title + "by entropy H of the predictive", fontsize=10)
    return figure


def _plot_values(examples: dict[str, Any]) -> Figure:
    """Draw predicted against true values, or for several targets each example's band of two standard deviations."""
    y, mean, aleatoric, epistemic = _arrays(examples, "y", "mean", "aleatoric_std", "epistemic_std")
    total = (aleatoric**2 + epistemic**2) ** 0.5
    if y.shape[1] == 1:
        figure = _figure(5, 4.2)
        axes = figure.subplots()
        axes.errorbar(y[:, 0], mean[:, 0], 2 * total[:, 0], fmt="o", ms=3, lw=0.6, label="± 2 std, total")
        axes.errorbar(y[:, 0], mean[:, 0], 2 * epistemic[:, 0], fmt="none", lw=1.8, color="C3", label="epistemic part")
        axes.axline((mean.mean(), mean.mean()), slope=1, color="gray", lw=0.8)  # y may have missing ones, NaN
        axes.set(xlabel="true", ylabel="predicted", title="test examples")
        axes.legend()
        return figure
    figure, places = _figure(11, 5), range(y.shape[1])
    panels = figure.subplots(2, 3, sharex=True)
    for axes, row in zip(panels.flat, range(0, len(y), -(-len(y) // 6))):
        for std, alpha, label in ((total, 0.25, "± 2 std, total"), (epistemic, 0.5, "epistemic part")):
            low, high = mean[row] - 2 * std[row], mean[row] + 2 * std[row]
            axes.fill_between(places, low, high, color="C0", alpha=alpha, lw=0, label=label)
        axes.plot(places, mean[row], color="C0", label="mean")
        axes.plot(places, y[row], color="black", lw=1, label="true")
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("target")
    figure.suptitle("test examples")
    return figure


def _plot_fields(examples: dict[str, Any]) -> Figure:
    """Draw maps of each example: true, predicted, the error, and the standard deviation of the predictive."""
    y, mean, aleatoric, epistemic = _arrays(examples, "y", "mean", "aleatoric_std", "epistemic_std")
    error, std = abs(mean - y), (aleatoric**2 + epistemic**2) ** 0.5
    import numpy as np  # targets may be missing: NaN

    values = {"vmin": np.nanmin([y, mean]), "vmax": np.nanmax([y, mean]), "cmap": "viridis"}
    spreads = {"vmin": 0.0, "vmax": np.nanmax([error, std]), "cmap": "magma"}
    columns = {"true": (y, values), "predicted": (mean, values)}
    columns |= {"|error|": (error, spreads), "predictive std": (std, spreads)}
    return _maps(columns, "test examples, first channel (units of y; both right columns on one scale)")


def _plot_class_fields(examples: dict[str, Any]) -> Figure:
    """Draw maps of each example: true and predicted classes, total and epistemic uncertainty."""
    y, said, entropy, information = _arrays(examples, "y", "class", "entropy", "mutual_information")
    import numpy as np

    classes = {"vmin": 0, "vmax": np.nanmax([y, said]), "cmap": "viridis"}
    nats = {"vmin": 0.0, "vmax": entropy.max(), "cmap": "magma"}
    columns = {"true class": (y, classes), "predicted": (said, classes)}
    columns |= {"entropy": (entropy, nats), "mutual information": (information, nats)}
    return _maps(columns, "test examples (uncertainties in nats, on one scale)")


def _arrays(examples: dict[str, Any], *names: str) -> list[Any]:
    return [examples[name].double().numpy() for name in names]


def _maps(columns: dict[str, tuple[Any, dict[str, Any]]], title: str) -> Figure:
    """Draw fields [n, rows, columns] with their scales, by name, side by side; the second of each pair has a bar."""
    num_rows = len(next(iter(columns.values()))[0])
    figure = _figure(13, 2.6 * num_rows, dpi=110)
    panels = figure.subplots(num_rows, len(columns), squeeze=False, sharex=True, sharey=True)
    for row, line in enumerate(panels):
        for place, (axes, (name, (fields, scale))) in enumerate(zip(line, columns.items())):
            image = axes.imshow(fields[row], **scale)
            if row == 0:
                axes.set_title(name)
            if place % 2:
                figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    return figure


def _show_image(axes: Axes, x: Tensor) -> None:
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
