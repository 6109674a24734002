#!/usr/bin/env python3
"""What averaging the ranks' local losses does to an objective, against the number of samples per rank.

    python benchmarks/objective_bias.py [--quick] [--json rows.json] [--plot bias.png]

The published method gives each rank its share of the samples, lets it take its loss of them, and averages the
losses. That is exact for the ELBO. The log predictive, the moment-matched Gaussian and the ordinary CRPS become other
objectives, which depend on the samples per rank m. Here the averaged loss of K samples is computed by hpc_bnn
itself, as an objective of one's own (`hpc_bnn.Gathered`), in one process: the ranks are groups of m samples.

1. Loss and direction of the gradient (angle to the exact gradient) with K = 64, at the start and after training.
   scikit-learn's digits for the log predictive, its diabetes data for the other two.
2. Accuracy, NLL and ECE on held-out digits after training with K = 16, over seeds. The predictive is the same
   for all: 64 samples.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError
from tqdm import tqdm

import hpc_bnn
from hpc_bnn.noise import Key, Stream

GLOBAL_BATCH_SIZE = 64


# --- objectives: exact, and averaged over groups of m samples -------------------------------------------


def averaged_log_predictive(m: int) -> hpc_bnn.Gathered:
    def loss(log_prob: Tensor, y: Tensor) -> Tensor:  # [K, B] -> [B]
        return -(log_prob.unflatten(0, (-1, m)).logsumexp(1) - math.log(m)).mean(0)

    return hpc_bnn.Gathered(loss, of="log_prob")


def averaged_moment_matched(m: int) -> hpc_bnn.Gathered:
    """As torch_blue has it: the variance over the samples of the rank (divided by m - 1) is all there is."""

    def loss(f: Tensor, y: Tensor) -> Tensor:  # [K, B, 1] -> [B]
        groups = f.unflatten(0, (-1, m))
        variance = groups.var(1, correction=1)  # NaN for m = 1
        error = groups.mean(1) - y.view(-1, 1)
        return 0.5 * (torch.log(2 * math.pi * variance) + error.square() / variance).mean(0).sum(-1)

    return hpc_bnn.Gathered(loss)


def averaged_crps(m: int) -> hpc_bnn.Gathered:
    score = hpc_bnn.Crps(fairness=0.0)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return torch.stack([score.score(group, y) for group in f.split(m)]).mean(0)

    return hpc_bnn.Gathered(loss)


PARTS = {
    "log_predictive": ("digits", averaged_log_predictive),
    "moment_matched": ("diabetes", averaged_moment_matched),
    "crps": ("diabetes", averaged_crps),
}


# --- problems ------------------------------------------------------------------------------------------


def load(name: str) -> tuple[Tensor, Tensor, int]:
    """Return inputs, targets and the number of training examples, which come first."""
    x, y = (torch.from_numpy(a) for a in (load_digits if name == "digits" else load_diabetes)(return_X_y=True))
    if name == "digits":
        return (x / 16).float(), y, 1437
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y, n = x[order].float(), y[order].float(), 353
    return (x - x[:n].mean(0)) / x[:n].std(0), (y - y[:n].mean()) / y[:n].std(), n


def make_step(name: str, objective: hpc_bnn.objectives.Objective, num_samples: int, seed: int = 0):
    x = load(name)[0]
    likelihood = hpc_bnn.Categorical(10) if name == "digits" else hpc_bnn.Implicit()
    with Key(seed, Stream.INIT).global_generator():
        net = nn.Sequential(
            nn.Linear(x.shape[1], 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, likelihood.num_outputs),
        )
    posterior = hpc_bnn.MeanFieldGaussian(net, prior=hpc_bnn.GaussianPrior(0.7), init_std=0.1)
    return step_of(posterior, name, objective, num_samples, seed)


def step_of(posterior, name: str, objective, num_samples: int, seed: int = 0) -> hpc_bnn.VariationalStep:
    n, likelihood = load(name)[2], hpc_bnn.Categorical(10) if name == "digits" else hpc_bnn.Implicit()
    return hpc_bnn.VariationalStep(
        posterior, likelihood, torch.optim.Adam(posterior.parameters(), lr=3e-3), hpc_bnn.GridComm(hpc_bnn.Grid()),
        num_samples=num_samples, num_train_examples=n, seed=seed, kl_weight=0.5, objective=objective,
        chunk_size=num_samples,
    )  # fmt: skip


def train(step, name: str, num_epochs: int, seed: int = 0) -> None:
    x, y, n = load(name)
    for epoch in range(num_epochs):
        for batch in hpc_bnn.global_batches(n, GLOBAL_BATCH_SIZE, seed, epoch):
            step(x[batch], y[batch], len(batch))


# --- measurements --------------------------------------------------------------------------------------


def measure_gradients(num_samples: int, num_epochs: int) -> list[dict]:
    """Return rows of loss and angle, by objective, state of training and samples per rank."""
    rows = []
    for objective, (name, averaged) in PARTS.items():
        x, y, n = load(name)
        step = make_step(name, hpc_bnn.NegativeElbo() if name == "digits" else hpc_bnn.Crps(), num_samples)
        for state, epochs in (("start", 0), ("trained", num_epochs)):
            train(step, name, epochs)
            losses, gradients = {}, {}
            sizes = [2**i for i in range(int(math.log2(num_samples)) + 1)]
            for m in sizes:
                other = step_of(step.posterior, name, averaged(m), num_samples)
                other.num_steps = step.num_steps
                other.accumulate_(x[:n][:256], y[:n][:256], 256)
                other.reduce_()
                step.posterior.finish_(other.scalars)
                buffer = step.posterior.buffer
                losses[m], gradients[m] = buffer.tally[0].item(), buffer.gradient.clone()
            exact = gradients[num_samples]
            for m in sizes:
                cosine = torch.nn.functional.cosine_similarity(gradients[m], exact, dim=0).clamp(-1, 1)
                is_finite = math.isfinite(losses[m])
                rows.append({
                    "objective": objective, "state": state, "samples_per_rank": m,
                    "loss": losses[m] if is_finite else None,
                    "angle_degrees": math.degrees(math.acos(1.0 if m == num_samples else cosine)) if is_finite else None,
                })  # fmt: skip
    return rows


def measure_training(num_samples: int, num_epochs: int, seeds: range) -> list[dict]:
    """Return rows of held-out metrics after training with averaged losses, by samples per rank and seed."""
    x, y, n = load("digits")
    rows = []
    sizes = [2**i for i in range(int(math.log2(num_samples)) + 1)]
    for m, seed in tqdm([(m, seed) for m in sizes for seed in seeds], desc="training"):
        step = make_step("digits", averaged_log_predictive(m), num_samples, seed)
        train(step, "digits", num_epochs, seed)
        predictive = hpc_bnn.predict_classes(
            step.posterior, step.likelihood, step.comm, x[n:], num_samples=64, seed=seed
        )
        p, truth = predictive.probabilities, y[n:]
        rows.append({
            "samples_per_rank": m, "seed": seed,
            "accuracy": MulticlassAccuracy(10, average="micro")(p, truth).item(),
            "nll": -p.gather(1, truth[:, None]).log().mean().item(),
            "ece": MulticlassCalibrationError(10, n_bins=15)(p, truth).item(),
            "mutual_information": predictive.mutual_information.mean().item(),
        })  # fmt: skip
    return rows


# --- reporting -----------------------------------------------------------------------------------------


def tables(gradients: list[dict], training: list[dict]) -> str:
    lines = []
    for state in ("start", "trained"):
        lines += ["", f"Loss and angle of the gradient to the exact one, {state}:", ""]
        sizes = sorted({row["samples_per_rank"] for row in gradients})
        lines += ["| samples per rank | " + " | ".join(PARTS) + " |", "|---" * (len(PARTS) + 1) + "|"]
        found = {(row["objective"], row["state"], row["samples_per_rank"]): row for row in gradients}
        for m in sizes:
            cells = [found[objective, state, m] for objective in PARTS]
            texts = [f"{c['loss']:.4f}, {c['angle_degrees']:.1f}°" if c["loss"] is not None else "NaN" for c in cells]
            lines.append(f"| {m} | " + " | ".join(texts) + " |")
    names = ("accuracy", "nll", "ece", "mutual_information")
    lines += ["", "After training on digits, median (least to most) over the seeds:", ""]
    lines += ["| samples per rank | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for m in sorted({row["samples_per_rank"] for row in training}):
        cells = []
        for name in names:
            values = [row[name] for row in training if row["samples_per_rank"] == m]
            cells.append(f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(gradients: list[dict], training: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for number, objective in enumerate(PARTS):
        for state, style in (("start", "o--"), ("trained", "s-")):
            rows = [row for row in gradients if (row["objective"], row["state"]) == (objective, state)]
            exact = rows[-1]["loss"]
            rows = [row for row in rows if row["loss"] is not None]  # one sample has no variance
            sizes = [row["samples_per_rank"] for row in rows]
            label, colour = f"{objective}, {state}", f"C{number}"
            biases = [abs(row["loss"] - exact) for row in rows[:-1]]  # 0 with all samples on one rank
            left.plot(sizes[:-1], biases, style, color=colour, label=label, ms=4)
            middle.plot(sizes, [row["angle_degrees"] for row in rows], style, color=colour, ms=4)
    left.set(xlabel="samples per rank", ylabel="|averaged - exact|", title="bias of the loss", yscale="log")
    middle.set(xlabel="samples per rank", ylabel="degrees", title="angle to the exact gradient")
    left.legend(fontsize=7)
    twin = right.twinx()
    for axes, name, colour in ((right, "nll", "C2"), (twin, "ece", "C3")):
        sizes = sorted({row["samples_per_rank"] for row in training})
        by_size = [[row[name] for row in training if row["samples_per_rank"] == m] for m in sizes]
        middles = [statistics.median(values) for values in by_size]
        axes.plot(sizes, middles, "o-", color=colour, label=name.upper())
        axes.fill_between(sizes, [min(v) for v in by_size], [max(v) for v in by_size], color=colour, alpha=0.2, lw=0)
        axes.set_ylabel(name.upper(), color=colour)
    right.set(xlabel="samples per rank", title="held-out digits after training, log_predictive")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, epochs and seeds: seconds")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--plot", type=Path, help="write the picture there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    gradients = measure_gradients(num_samples=8 if quick else 64, num_epochs=1 if quick else 15)
    training = measure_training(4 if quick else 16, 1 if quick else 30, range(1 if quick else 5))
    if options.json:
        options.json.write_text(json.dumps({"gradients": gradients, "training": training}, indent=1) + "\n")
    print(tables(gradients, training))
    if options.plot:
        plot(gradients, training, options.plot)


if __name__ == "__main__":
    main()
