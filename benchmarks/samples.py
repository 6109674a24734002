#!/usr/bin/env python3
"""Time per training step and peak memory of one process against the number of samples.

    python benchmarks/samples.py [--quick] [--json rows.json] [--device cuda] [--models mlp vit]

Variants, each one ELBO step with Adam on the same network and data: hpc_bnn (walking over the samples; with
antithetic pairs; in chunks), torch_blue (default and analytic KL), bayesian-torch (reparameterisation, loop),
and the yardstick `det`, the deterministic network with S times the batch. All variants of one model and S run
interleaved in one process, so that noise of the machine hits all alike: medians over rounds, and ratios to det.
On a CPU the time is CPU time of the one thread, so that the work of others on the machine is not measured. Peak
memory is taken in a process of its own per variant: resident set above what imports need, or on a GPU what the
allocator gave out. Peers that are not installed are left out (benchmarks/requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import hpc_bnn
from hpc_bnn.models import MLP, ViT

NUM_TRAIN_EXAMPLES = 50_000
MODELS = {
    "mlp": (lambda: MLP((504,), 168, hidden=(512, 512)), (128, 504), 168),
    "vit": (lambda: ViT((3, 32, 32), 10), (32, 3, 32, 32), 10),
}


def make_det(model, num_samples, device):
    make, shape, num_classes = MODELS[model]
    net = make().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x = torch.randn(num_samples * shape[0], *shape[1:], device=device)
    y = torch.randint(0, num_classes, (len(x),), device=device)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def make_ours(model, num_samples, device, chunk_size=1, autocast_dtype=None, objective=None, capture=None, **options):
    make, shape, num_classes = MODELS[model]
    posterior = hpc_bnn.MeanFieldGaussian(make().to(device), **options)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-3)
    step = hpc_bnn.VariationalStep(
        posterior, hpc_bnn.Categorical(num_classes), optimizer, hpc_bnn.GridComm(hpc_bnn.Grid(), device),
        num_samples=num_samples, num_train_examples=NUM_TRAIN_EXAMPLES, chunk_size=chunk_size,
        autocast_dtype=autocast_dtype, objective=objective,
        **({} if capture is None else {"capture": capture}),  # benchmarks/speed.py also builds the steps of former commits
    )  # fmt: skip
    x, y = torch.randn(*shape, device=device), torch.randint(0, num_classes, (shape[0],), device=device)
    return lambda: step(x, y, len(x))


def make_torch_blue(model, num_samples, device, analytic=False):
    from torch_blue.vi import AnalyticalKullbackLeiblerLoss, KullbackLeiblerLoss, convert_to_vimodule
    from torch_blue.vi.distributions import Categorical

    make, shape, num_classes = MODELS[model]
    net = make()
    convert_to_vimodule(net)
    net = net.to(device)
    if analytic:
        net.return_log_probs = False
        loss = AnalyticalKullbackLeiblerLoss(net, Categorical(), dataset_size=NUM_TRAIN_EXAMPLES)
    else:
        loss = KullbackLeiblerLoss(Categorical(), dataset_size=NUM_TRAIN_EXAMPLES)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.randn(*shape, device=device), torch.randint(0, num_classes, (shape[0],), device=device)

    def step():
        optimizer.zero_grad()
        loss(net(x, samples=num_samples), y).backward()
        optimizer.step()

    return step


def make_bayesian_torch(model, num_samples, device):
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    make, shape, num_classes = MODELS[model]
    net = make()
    dnn_to_bnn(net, {
        "prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -4.6,
        "type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5,
    })  # fmt: skip
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.randn(*shape, device=device), torch.randint(0, num_classes, (shape[0],), device=device)

    def step():
        optimizer.zero_grad()
        for _ in range(num_samples):  # one backward per sample: several forwards share a buffer and go wrong
            (F.cross_entropy(net(x), y) / num_samples).backward()
        (get_kl_loss(net) / NUM_TRAIN_EXAMPLES).backward()
        optimizer.step()

    return step


VARIANTS = {
    "det": make_det,
    "hpc_bnn": make_ours,
    "hpc_bnn antithetic": lambda m, s, d: make_ours(m, s, d, antithetic=True),
    "hpc_bnn chunk 8": lambda m, s, d: make_ours(m, s, d, chunk_size=8),
    "hpc_bnn log_predictive": lambda m, s, d: make_ours(m, s, d, objective=hpc_bnn.LogPredictive()),
    "hpc_bnn log_predictive chunk 8": lambda m, s, d: make_ours(
        m, s, d, chunk_size=8, objective=hpc_bnn.LogPredictive()
    ),
    "torch_blue": make_torch_blue,
    "torch_blue analytic": lambda m, s, d: make_torch_blue(m, s, d, analytic=True),
    "bayesian-torch": make_bayesian_torch,
}


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def measure_time(model, num_samples, device, num_rounds, names):
    """Return {variant: median seconds per step}, the variants interleaved."""
    steps, seconds = {}, {}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for name in names:
        try:
            steps[name] = VARIANTS[name](model, num_samples, device)
            steps[name]()
            steps[name]()  # warm-up
        except (ImportError, ModuleNotFoundError) as error:
            tqdm.write(f"{name} is left out: {error}")
            steps.pop(name, None)
    for _ in range(num_rounds):
        for name, step in steps.items():
            synchronize(device)
            start = clock()
            step()
            synchronize(device)
            seconds.setdefault(name, []).append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(model, name, num_samples, device):
    """Return the peak memory (bytes) of three steps above the base of the process."""
    if device.startswith("cuda"):
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    else:
        make_det("mlp", 1, device)()  # what torch itself allocates at the first step
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
        base = high_water_mark()
    step = VARIANTS[name](model, num_samples, device)
    for _ in range(3):
        step()
    synchronize(device)
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() - base
    return high_water_mark() - base


def high_water_mark():
    """Return the peak resident set of this process (bytes, Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_memory_in_child(model, name, num_samples, device):
    command = [sys.executable, __file__, "--child", model, name, str(num_samples), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", nargs="+", type=int, help="numbers of samples (default: 1 4 8 16)")
    parser.add_argument("--rounds", type=int, help="timed steps per variant (default: 21 for the MLP, 7 for the ViT)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.child:
        model, name, num_samples = options.child
        print(peak_memory(model, name, int(num_samples), options.device))
        return
    rows = []
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {options.device}, 1 thread")
    print(f"{'model':5} {'S':>3}  {'variant':22} {'ms/step':>9} {'/ det':>6} {'peak MiB':>9}")
    for model in options.models:
        sizes = options.samples or ([1, 4] if options.quick else [1, 4, 8, 16] if model == "mlp" else [1, 4, 8])
        num_rounds = options.rounds or (3 if options.quick else 21 if model == "mlp" else 7)
        for num_samples in sizes:
            times = measure_time(model, num_samples, options.device, num_rounds, options.variants)
            for name, seconds in times.items():
                memory = None if options.no_memory else peak_memory_in_child(model, name, num_samples, options.device)
                ratio = seconds / times["det"] if "det" in times else float("nan")
                rows.append({
                    "model": model, "num_samples": num_samples, "variant": name, "seconds": seconds,
                    "ratio_to_det": ratio, "peak_bytes": memory, "num_rounds": num_rounds,
                    "device": options.device, "torch": torch.__version__,
                })  # fmt: skip
                shown = "-" if memory is None else f"{memory / 2**20:.0f}"
                print(f"{model:5} {num_samples:3d}  {name:22} {1e3 * seconds:9.2f} {ratio:6.2f} {shown:>9}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
