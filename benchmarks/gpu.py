"""Measure a step on one GPU: captured, launched anew, in a chunk; beside the deterministic network, torch_blue, bayesian-torch.

    python benchmarks/gpu.py --output gpu.md --seconds 120

It writes tables in Markdown, with card, driver and versions: milliseconds per step (median of interleaved rounds), the ratio
to *det* (the deterministic network with S times the batch, in a graph, of the same dtype), peak memory, and what the host does
in a step: launches of kernels and of graphs, copies, and waits. Without a GPU it says so and measures nothing; ``--device cpu
--small`` runs the same code on a CPU at a small size.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import samples
import torch
import yaml
from torch.nn import functional as F

import hpc_bnn
from hpc_bnn.config import Config
from hpc_bnn.data import ArraySpec, Manifest
from hpc_bnn.data.manifest import ShardFile, Statistics
from hpc_bnn.models import MLP, ViT
from hpc_bnn.plan.simulate import share_of
from hpc_bnn.training.capture import Recorder

samples.MODELS |= {
    "vit": (lambda: ViT((3, 32, 32), 10, dim=192, depth=6, heads=3, mlp_dim=768), (32, 3, 32, 32), 10),
    "digits": (lambda: MLP((64,), 10, hidden=(128, 128)), (64, 64), 10),
    "small": (lambda: MLP((20,), 5, hidden=(16,)), (8, 20), 5),
    "cifar10_vit": (
        lambda: ViT((3, 32, 32), 10, patch=4, dim=384, depth=7, heads=6, mlp_dim=1536), (512, 3, 32, 32), 10
    ),
}  # fmt: skip
CONFIGS = {
    "cifar10_vit": ((3, 32, 32), 10, {}),
    # Four ranks have four of its samples each; here one has two
    "era5_swin": ((69, 721, 1440), None, {"num_samples": 2, "global_batch_size": 1, "grid": {}}),
}
"""Configs at their full size: shape of an input, classes, and what is not as it stands in the file."""
CALLS = {
    "launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperative"),
    "graphs": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpy", "cudaMemset"),
    "waits": ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"),
}
"""What the host does, by the names that torch's profiler gives it."""


def make_det(model: str, num_samples: int, device: str, autocast_dtype: torch.dtype | None = None) -> Callable:
    """Return a step of the deterministic network with S times the batch, in a graph where there are graphs."""
    make, shape, num_classes = samples.MODELS[model]
    net = make().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True, capturable=device == "cuda")
    x = torch.randn(num_samples * shape[0], *shape[1:], device=device)
    y = torch.randint(0, num_classes, (len(x),), device=device)
    recorder, numbers = (
        Recorder(torch.device(device, 0) if device == "cuda" else torch.device(device)),
        iter(range(10**9)),
    )

    def body() -> None:
        with torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None):
            loss = F.cross_entropy(net(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return lambda: recorder.run("step", (), next(numbers), body)


def make_config(model: str, num_samples: int, device: str) -> Callable:
    """Return a step of a config, on numbers without meaning."""
    shape, num_classes, changes = CONFIGS[model]
    text = Path(__file__).parents[1].joinpath("configs", f"{model}.yaml").read_text()
    tree = yaml.safe_load(text) | changes
    tree["optimizer"].pop("sharded", None)
    channels = tuple(map(str, range(shape[0]))) if num_classes is None else ()
    arrays = {
        "x": ArraySpec(shape, "float32", channels),
        "y": ArraySpec(() if num_classes else shape, "int64" if num_classes else "float32", channels),
    }
    splits = {split: (ShardFile("", 50_000, 0, "", ""),) for split in ("train", "validation", "test")}
    scales = {name: Statistics((0.0,) * shape[0], (1.0,) * shape[0]) for name in ("x", "y")}
    manifest = Manifest("made", "here", "none", arrays, splits, {} if num_classes else scales, num_classes)
    comm = hpc_bnn.GridComm(hpc_bnn.Grid(), torch.device(device, 0) if device == "cuda" else device)
    step, batch = share_of(Config.from_dict(tree), manifest, comm)
    return lambda: step(*batch)


def variants(model: str, num_samples: int, dtype: torch.dtype | None) -> dict[str, Callable]:
    """Return what is measured, by name."""
    if model in CONFIGS:
        dets = {"det": partial(make_det, autocast_dtype=torch.bfloat16)} if model in samples.MODELS else {}
        return {**dets, "hpc_bnn": make_config}
    ours = partial(samples.make_ours, autocast_dtype=dtype)
    found: dict[str, Callable] = {
        "det": partial(make_det, autocast_dtype=dtype),
        "hpc_bnn": ours,
        "hpc_bnn, launched anew": partial(ours, capture="off"),
        "hpc_bnn, one chunk": partial(ours, chunk_size=num_samples),
    }
    if dtype is None:
        found |= {name: samples.VARIANTS[name] for name in ("torch_blue", "torch_blue analytic", "bayesian-torch")}
    return found


def milliseconds(step: Callable, device: str, repetitions: int) -> float:
    """Return the time of a step."""
    samples.synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        step()
    samples.synchronize(device)
    return 1e3 * (time.perf_counter() - start) / repetitions


def measure(model: str, num_samples: int, dtype: torch.dtype | None, device: str, seconds: float) -> list[list[str]]:
    """Return a row for each variant: name, milliseconds, ratio to det, peak MiB, calls of the host in a step."""
    steps, peaks, rows = {}, {}, []
    for variant, make in variants(model, num_samples, dtype).items():
        try:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            step = make(model, num_samples, device)
            for _ in range(6):  # then all captures are made
                step()
            samples.synchronize(device)
            peaks[variant] = torch.cuda.max_memory_allocated() - before if device == "cuda" else 0
            steps[variant] = step
        except Exception as error:  # of a peer that is not there, or memory: the others are measured
            reason = (str(error).splitlines() or [""])[0][:80]
            rows.append([variant, f"{type(error).__name__}: {reason}", "", "", ""])
    repetitions = {v: max(1, min(100, int(5 / milliseconds(step, device, 1)))) for v, step in steps.items()}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    end, num_rounds = time.perf_counter() + seconds, 0
    while num_rounds < 3 or time.perf_counter() < end:
        num_rounds += 1
        for variant, step in steps.items():
            times[variant].append(milliseconds(step, device, repetitions[variant]))
    base = statistics.median(times["det"]) if "det" in times else float("nan")
    for variant, found in times.items():
        middle = statistics.median(found)
        calls = ", ".join(f"{n} {what}" for what, n in count_calls(steps[variant], device).items())
        rows.append([variant, f"{middle:.3g}", f"{middle / base:.2f}", f"{peaks[variant] / 2**20:.0f}", calls])
    return rows


def count_calls(step: Callable, device: str) -> dict[str, int]:
    """Return how often the host launches, copies and waits in one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    samples.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    names = [event.name for event in profile.events() or ()]
    return {what: sum(name.startswith(starts) for name in names) for what, starts in CALLS.items()}


def describe(device: str) -> str:
    """Return card, driver and versions."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, hpc_bnn {hpc_bnn.__version__}"
    if device != "cuda":
        return f"{platform.machine()}, {versions}"
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split("\n")[0] or "unknown"
    return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}, {versions}"


def main(words: list[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the tables, which are also printed")
    parser.add_argument("--seconds", type=float, default=120, help="of all measurements, about")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="one small network only")
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU is visible: nothing is measured", file=sys.stderr)
        return 0
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    cases: list[tuple[str, int, torch.dtype | None]] = [("small", 4, None), ("small", 1, torch.bfloat16)]
    if not options.small:
        cases = [("digits", 8, None), ("mlp", 16, None), ("vit", 16, torch.bfloat16), ("vit", 16, None),
                 ("mlp", 64, None), ("mlp", 1, None)]  # fmt: skip
        cases += [("cifar10_vit", 8, torch.bfloat16), ("era5_swin", 2, torch.bfloat16)]
    written: list[str] = []

    def write(*lines: str) -> None:
        """Print, and write what there is so far: whoever runs this may have to stop it."""
        written.extend(lines)
        print(*lines, sep="\n", flush=True)
        if options.output:
            options.output.write_text("\n".join(written) + "\n")

    write(describe(options.device), "")
    for model, num_samples, dtype in cases:
        write(f"{model}, S = {num_samples}, {'float32' if dtype is None else 'bfloat16'}", "")
        write("| variant | ms | / det | MiB | host |", "|---|---|---|---|---|")
        rows = measure(model, num_samples, dtype, options.device, options.seconds / len(cases))
        write(*(f"| {' | '.join(row)} |" for row in rows), "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
