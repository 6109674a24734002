"""Pictures of a run (floor 7)."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LABELS = {"test/nll": "NLL (nats per example)", "test/accuracy": "accuracy", "test/rmse": "RMSE (units of y)"}


def write_plots(run_dir: str | Path, examples: dict[str, Any]) -> list[Path]:
    """Draw RUN_DIR/plots/curves.png and uncertainty.png. Local: rank 0 calls it.

    Parameters
    ----------
    run_dir : path
        Run directory with a metrics.jsonl.
    examples : dict
        Test examples with their predictive, as `hpc_bnn.train.Run.train` returns them.

    Returns
    -------
    list of Path
        The files; empty where matplotlib is not installed, which is said.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        logger.warning("no plots: matplotlib is not installed (pip install 'hpc_bnn[plots]')")
        return []
    directory = Path(run_dir, "plots")
    directory.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [
        _plot_curves(rows, directory / "curves.png"),
        (_plot_uncertainty if "surest" in examples else _plot_values)(
            examples, directory / "uncertainty.png"
        ),
    ]


def _plot_curves(rows: list[dict[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) == 1 else None
    left.plot(epochs, [row["train/nelbo"] for row in rows], marker=marker, label="objective")
    left.plot(epochs, [row["train/data_term"] for row in rows], marker=marker, label="data term")
    left.set(xlabel="epoch", ylabel="per example", title="training")
    if min(min(row["train/nelbo"], row["train/data_term"]) for row in rows) > 0:
        left.set_yscale("log")
    left.legend()
    tested = [row for row in rows if any(name.startswith("test/") for name in row)]
    epochs = [row["epoch"] for row in tested]
    right.set(xlabel="epoch", title="test, predictive over all samples")
    shown = [name for name in ("test/nll", "test/accuracy", "test/rmse") if name in tested[-1]]
    twin = right.twinx()
    twin.set_axis_off() if len(shown) == 1 else None
    for axes, name, style in zip((right, twin), shown, ("o-", "s--")):
        axes.plot(
            epochs, [row[name] for row in tested], style, color=f"C{2 + (axes is twin)}", label=LABELS[name]
        )
        axes.set_ylabel(LABELS[name])
    lines = right.get_lines() + twin.get_lines()
    right.legend(lines, [line.get_label() for line in lines], loc="center right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _plot_uncertainty(examples: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot as plt

    columns = examples["surest"] + examples["least_sure"]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(1.45 * len(columns), 3.6), layout="constrained", squeeze=False
    )
    for number, (example, (top, bottom)) in enumerate(zip(columns, axes.T)):
        p, std = example["probabilities"].float().numpy(), example["std"].float().numpy()
        _show_image(top, example["x"].float())
        top.set_title(
            f"true {example['y']}, says {int(p.argmax())}\nH {example['entropy']:.2f} nats", fontsize=8
        )
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
        axes.errorbar(
            y[:, 0], mean[:, 0], 2 * epistemic[:, 0], fmt="none", lw=1.8, color="C3", label="epistemic part"
        )
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
