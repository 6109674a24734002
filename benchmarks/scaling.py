#!/usr/bin/env python3
"""Strong and weak scaling of sampling, data and hybrid parallelism: measured, and simulated to 1,024 ranks.

On one machine, which starts ``mpirun`` itself and then writes the report:

    python benchmarks/scaling.py local --output OUT --ranks 1 2 4

On a cluster, once for each number of ranks (one of them 1), then the report:

    srun --ntasks 8 python -m mpi4py benchmarks/scaling.py measure --output OUT
    python benchmarks/scaling.py report --output OUT --bandwidth 20e9 --latency 20e-6

Studies: *strong*: the samples and the batch of the job are fixed; *weak*: the samples grow with the ranks; *weak in data*: the
batch does. Schemes: sampling parallel (P x 1), data parallel (1 x P), hybrid (as square as P allows), and the plain network, data parallel,
under hpc_bnn and under torch's DistributedDataParallel; and, where torch_blue is installed, the published scheme (P x 1). Times are medians over steps of the slowest rank, split
into draw, forward, backward, reduce (waiting included) and update. Writes OUT/ranks-P.json; scaling.csv, scaling.png and
scaling.md.

The simulation takes the parts of one rank as they were measured, draw, forward and backward in proportion to the samples and examples
of the busiest rank, and adds an all-reduce over each axis (`hpc_bnn.comm.timing`). It knows no jitter, no contention between groups, and no
overlap. Memory is the peak of the resident memory above what it was before, in a job of its own for each case
(``local``; ``measure`` alone gives that of its first case only).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

import hpc_bnn
from hpc_bnn.comm.timing import Network, measure_network
from hpc_bnn.models import MLP, ViT
from hpc_bnn.plan.plan import resident_bytes

PARTS = ("draw", "forward", "backward", "reduce", "update")
MODELS = {  # shape of an input, outputs, batch, network
    "mlp": ((504,), 168, 128, lambda: MLP((504,), 168, (512, 512))),
    "vit": ((3, 32, 32), 10, 32, lambda: ViT((3, 32, 32), 10)),
    "tiny_vit": ((3, 32, 32), 10, 32, lambda: ViT((3, 32, 32), 10, dim=96, depth=3, heads=3, mlp_dim=192)),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure on a number of ranks."""

    study: str
    scheme: str
    sample_size: int
    num_samples: int
    global_batch_size: int


def cases(num_ranks: int, num_samples: int, batch: int) -> Iterator[Case]:
    """Yield the cases of a number of ranks."""
    square = max(s for s in range(1, num_ranks + 1) if num_ranks % s == 0 and s * s <= num_ranks)
    grids = {"sampling": num_ranks, "data": 1}
    if 1 < square < num_ranks:
        grids["hybrid"] = square
    for scheme, sample_size in grids.items():
        if num_samples >= sample_size:
            yield Case("strong", scheme, sample_size, num_samples, batch)
        data_size = num_ranks // sample_size
        if scheme != "data":
            yield Case("weak", scheme, sample_size, num_samples * sample_size, batch * data_size)
        if scheme != "sampling":
            yield Case("weak in data", scheme, sample_size, num_samples * sample_size, batch * data_size)
    if importlib.util.find_spec("torch_blue") and num_samples >= num_ranks:
        yield Case("strong", "torch_blue", num_ranks, num_samples, batch)
        yield Case("weak", "torch_blue", num_ranks, num_samples * num_ranks, batch)
    for scheme in ("plain", "plain, DDP"):
        yield Case("strong", scheme, 1, 1, batch)
        yield Case("weak in data", scheme, 1, 1, batch * num_ranks)


# --- measuring -----------------------------------------------------------------------------------------


class Stopwatch:
    """Times of the parts of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def begin_peak(device: torch.device) -> int:
    """Begin a new peak and return what is taken now, when what a first step loads is loaded."""
    resident_bytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def make_ours(case: Case, comm: hpc_bnn.GridComm, model: str) -> tuple[Callable[[], None], Stopwatch]:
    """Return what makes a step of a Bayesian or a plain network, and its times."""
    shape, num_outputs, _, make_net = MODELS[model]
    torch.manual_seed(0)
    net = make_net().to(comm.device)
    if case.scheme == "plain":
        posterior = hpc_bnn.DeterministicNetwork(net)
    else:
        posterior = hpc_bnn.MeanFieldGaussian(net, init_std=0.01)
    x, y = batch_of(case, comm, shape, num_outputs)
    step = hpc_bnn.VariationalStep(
        posterior, hpc_bnn.Categorical(num_outputs), torch.optim.Adam(posterior.parameters(), lr=1e-4), comm,
        num_samples=case.num_samples, num_train_examples=50_000, chunk_size="auto" if x.is_cuda else 1,
    )  # fmt: skip
    watch = Stopwatch()
    posterior.draw_ = watch.around("draw", posterior.draw_)
    posterior.module.forward = watch.around("forward", posterior.module.forward)
    step.accumulate_ = watch.around("accumulate", step.accumulate_)

    def run() -> None:
        before, start = comm.traffic.seconds, time.perf_counter()
        step(x, y, case.global_batch_size)
        total, seconds = time.perf_counter() - start, watch.seconds
        seconds["reduce"] += comm.traffic.seconds - before
        seconds["backward"] += seconds.pop("accumulate") - seconds["draw"] - seconds["forward"]
        seconds["update"] += total - sum(seconds[p] for p in PARTS if p != "update")

    return run, watch


def make_ddp(case: Case, comm: hpc_bnn.GridComm, model: str) -> tuple[Callable[[], None], Stopwatch]:
    """Return what makes a step of the plain network under torch's DistributedDataParallel."""
    shape, num_outputs, _, make_net = MODELS[model]
    torch.manual_seed(0)
    net = make_net().to(comm.device)
    if comm.grid.world_size > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    x, y = batch_of(case, comm, shape, num_outputs)

    def run() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return run, Stopwatch()


def make_torch_blue(case: Case, comm: hpc_bnn.GridComm, model: str) -> tuple[Callable[[], None], Stopwatch]:
    """Return what makes a step of the published scheme: each rank its samples, gradients averaged over the ranks.

    Its loss sees the samples of the rank alone, so that it is another objective on each number of ranks.
    """
    from torch_blue.vi import KullbackLeiblerLoss, convert_to_vimodule
    from torch_blue.vi.distributions import Categorical

    shape, num_outputs, _, make_net = MODELS[model]
    torch.manual_seed(0)
    net = make_net()
    convert_to_vimodule(net)
    net = net.to(comm.device)
    torch.manual_seed(1 + comm.grid.rank)
    loss = KullbackLeiblerLoss(Categorical(), dataset_size=50_000)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    x, y = batch_of(case, comm, shape, num_outputs)
    local_samples = len(comm.grid.local_samples(case.num_samples))

    def run() -> None:
        optimizer.zero_grad()
        loss(net(x, samples=local_samples), y).backward()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        comm.sum_(gradients)
        torch._foreach_div_(gradients, comm.grid.world_size)
        optimizer.step()

    return run, Stopwatch()


PEERS = {"plain, DDP": make_ddp, "torch_blue": make_torch_blue}


def batch_of(case: Case, comm: hpc_bnn.GridComm, shape, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    part = comm.grid.local_examples(case.global_batch_size)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.global_batch_size, *shape, generator=generator)[part].to(comm.device)
    y = torch.randint(0, num_outputs, (case.global_batch_size,), generator=generator)[part].to(comm.device)
    return x, y


@contextlib.contextmanager
def process_group(comm: hpc_bnn.GridComm) -> Iterator[None]:
    """Start torch.distributed beside MPI, for the peer."""
    if comm.grid.world_size == 1 or torch.distributed.is_initialized():
        yield
        return
    with socket.socket() as free:
        free.bind(("", 0))
        place = comm.broadcast_object((socket.gethostname(), free.getsockname()[1]))
    torch.distributed.init_process_group(
        "nccl" if comm.device.type == "cuda" else "gloo",
        init_method=f"tcp://{place[0]}:{place[1]}",
        rank=comm.grid.rank,
        world_size=comm.grid.world_size,
    )
    yield
    torch.distributed.destroy_process_group()


def measure_case(case: Case, comm: hpc_bnn.GridComm, options: argparse.Namespace) -> dict:
    """Return the medians of a case. Collective over the world."""
    before = begin_peak(comm.device)
    run, watch = PEERS.get(case.scheme, make_ours)(case, comm, options.model)
    rows = []
    for number in range(options.warmup + options.repetitions):
        traffic = comm.traffic.num_bytes
        comm.barrier()
        watch.seconds.clear()
        start = time.perf_counter()
        run()
        if comm.device.type == "cuda":
            torch.cuda.synchronize()
        if number >= options.warmup:
            rows.append({"total": time.perf_counter() - start, **watch.seconds})
    everyones = comm.gather_objects(rows)
    result = {"seconds": median(max(rank[i]["total"] for rank in everyones) for i in range(len(rows)))}
    for part in PARTS:
        values = [row.get(part, math.nan) for rank in everyones for row in rank]
        result[part] = median(values)
    result["memory_bytes"] = max(comm.gather_objects(peak_bytes(comm.device) - before))
    result["bytes_per_step"] = comm.traffic.num_bytes - traffic
    return asdict(case) | result


def measure(options: argparse.Namespace) -> None:
    """Measure all cases of this job. Collective over the world."""
    from mpi4py import MPI

    num_ranks, batch = MPI.COMM_WORLD.size, options.batch or MODELS[options.model][2]
    wanted = list(cases(num_ranks, options.num_samples, batch))
    if options.case is not None:
        wanted = [wanted[options.case]]
    rows = []
    for sample_size in sorted({case.sample_size for case in wanted}):
        comm = hpc_bnn.connect(sample_size, options.device)
        with process_group(comm):
            for case in wanted:
                if case.sample_size == sample_size:
                    rows.append(measure_case(case, comm, options))
    network = asdict(measure_network(comm)) if num_ranks > 1 and options.case is None else {}
    hosts = len(set(comm.gather_objects(socket.gethostname())))
    make_net = MODELS[options.model][3]
    content = {
        "num_ranks": num_ranks,
        "num_hosts": hosts,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if comm.device.type == "cuda" else None,
        "library": comm.library,
        "model": options.model,
        "num_weights": sum(p.numel() for p in make_net().parameters()),
        "versions": {"hpc_bnn": hpc_bnn.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "network": network,
        "rows": rows,
    }
    if comm.grid.rank == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        name = f"ranks-{num_ranks}" if options.case is None else f"memory-{num_ranks}-{options.case}"
        (options.output / f"{name}.json").write_text(json.dumps(content, indent=1))
    comm.close()


def cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or "unknown"


# --- simulating ----------------------------------------------------------------------------------------


def simulate(one: dict, num_weights: int, case: Case, num_ranks: int, network: Network) -> float:
    """Return the seconds of a step on a grid, from the parts of a step on one rank (see the top)."""
    data_size = num_ranks // case.sample_size
    samples = math.ceil(case.num_samples / case.sample_size) / one["num_samples"]
    examples = math.ceil(case.global_batch_size / data_size) / one["global_batch_size"]
    compute = one["draw"] * samples + (one["forward"] + one["backward"]) * samples * examples + one["update"]
    num_bytes = 4 * num_weights * (1 if case.scheme.startswith("plain") else 2)
    return compute + sum(network.seconds("all-reduce", num_bytes, extent) for extent in (case.sample_size, data_size))


# --- the report ----------------------------------------------------------------------------------------


def read(output: Path) -> list[dict]:
    """Return what was measured, by number of ranks."""
    found = [json.loads(path.read_text()) for path in output.glob("ranks-*.json")]
    found.sort(key=lambda content: content["num_ranks"])
    if not found or found[0]["num_ranks"] != 1:
        sys.exit(f"{output}: measure on 1 rank first, to which everything is compared")
    return found


def report(options: argparse.Namespace) -> None:
    """Write CSV, plot and Markdown."""
    found = read(options.output)
    table = []
    first = {(row["study"], row["scheme"]): row for row in found[0]["rows"]}
    num_weights = found[0]["num_weights"]
    for content in found:
        num_ranks = content["num_ranks"]
        network = Network(**content["network"] or {"latency": 0.0, "bandwidth": math.inf})
        for row in content["rows"]:
            scheme = "sampling" if row["scheme"] == "hybrid" and row["study"] != "weak in data" else row["scheme"]
            scheme = "data" if row["scheme"] == "hybrid" and row["study"] == "weak in data" else scheme
            one = first[row["study"], scheme]
            case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
            work = row["num_samples"] * row["global_batch_size"] / (one["num_samples"] * one["global_batch_size"])
            speedup = work * one["seconds"] / row["seconds"]
            line = {"num_ranks": num_ranks, **row, "speedup": speedup, "efficiency": speedup / num_ranks}
            line["efficiency_of_cores"] = speedup / min(num_ranks, content["cores"] * content["num_hosts"])
            if row["scheme"] not in PEERS:
                # ranks beyond the cores take turns
                turns = (
                    max(1.0, num_ranks / (content["cores"] * content["num_hosts"])) if content["gpu"] is None else 1.0
                )
                line["simulated"] = turns * simulate(one, num_weights, case, num_ranks, network)
            table.append(line)
    with open(options.output / "scaling.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in table for name in line)))
        writer.writeheader()
        writer.writerows(table)
    far = extrapolate(first, num_weights, options)
    plot(table, far, options)
    (options.output / "scaling.md").write_text(markdown(found, table, far, options))
    print((options.output / "scaling.md").read_text())


def extrapolate(first: dict, num_weights: int, options: argparse.Namespace) -> list[dict]:
    """Return simulated rows on powers of two up to ``--max-ranks``, of the network that the options assume."""
    rows = []
    base = first["strong", "sampling"]
    for study in ("strong", "weak"):
        for power in range(int(math.log2(options.max_ranks)) + 1):
            ranks = 2**power
            num_samples = options.strong_samples if study == "strong" else base["num_samples"] * ranks
            sample_size = min(ranks, num_samples)
            batch = base["global_batch_size"] * (1 if study == "strong" else ranks // sample_size)
            case = Case(study, "sampling", sample_size, num_samples, batch)
            seconds = simulate(base, num_weights, case, ranks, Network(options.bandwidth, options.latency))
            rows.append({"study": study, "num_ranks": ranks, "sample_size": sample_size, "seconds": seconds})
        for row in rows:
            if row["study"] == study:
                one = next(r for r in rows if r["study"] == study)["seconds"]
                row["efficiency"] = one / row["seconds"] / (row["num_ranks"] if study == "strong" else 1)
    return rows


def plot(table: list[dict], far: list[dict], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    ticks = sorted({line["num_ranks"] for line in table})
    for axes, study in zip(panels, ("strong", "weak", "weak in data")):
        for number, scheme in enumerate(dict.fromkeys(line["scheme"] for line in table)):
            lines = [line for line in table if (line["study"], line["scheme"]) == (study, scheme)]
            ranks = [line["num_ranks"] for line in lines]
            axes.plot(ranks, [line["seconds"] for line in lines], "o-", color=f"C{number}", label=scheme)
            simulated = [(line["num_ranks"], line["simulated"]) for line in lines if "simulated" in line]
            if simulated:
                axes.plot(*zip(*simulated), ":", color=f"C{number}")
        axes.set(xlabel="ranks", ylabel="seconds per step", title=f"{study} (dotted: simulated)", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
        axes.legend(fontsize=7)
    for study in ("strong", "weak"):
        rows = [row for row in far if row["study"] == study]
        panels[3].plot([r["num_ranks"] for r in rows], [r["efficiency"] for r in rows], label=study)
    panels[3].set(xlabel="ranks", ylabel="efficiency", title="simulated", xscale="log", ylim=(0, 1.05))
    panels[3].legend()
    figure.savefig(options.output / "scaling.png", dpi=110)


def markdown(found: list[dict], table: list[dict], far: list[dict], options: argparse.Namespace) -> str:
    one = found[-1]
    hardware = one["gpu"] or f"{one['cpu']}, {one['cores']} cores"
    lines = [
        f"{one['model']}, {one['num_weights'] / 1e6:.2f} million weights; {hardware}, {one['num_hosts']} host(s); "
        f"{', '.join(f'{name} {version}' for name, version in one['versions'].items())}; {one['library']}.",
        "",
        "| study | scheme | ranks | grid | samples | batch | s/step | draw | forward | backward | reduce | update | memory (MB) | "
        "efficiency | of the cores | simulated / measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(table, key=lambda row: (row["study"], row["scheme"], row["num_ranks"])):
        parts = " | ".join("–" if math.isnan(row[p]) else f"{100 * row[p] / row['seconds']:.0f} %" for p in PARTS)
        ratio = f"{row['simulated'] / row['seconds']:.2f}" if "simulated" in row else "–"
        grid = f"{row['sample_size']} x {row['num_ranks'] // row['sample_size']}"
        lines.append(
            f"| {row['study']} | {row['scheme']} | {row['num_ranks']} | {grid} | {row['num_samples']} | {row['global_batch_size']} | "
            f"{row['seconds']:.4f} | {parts} | {row['memory_bytes'] / 1e6:.0f} | {row['efficiency']:.2f} | "
            f"{row['efficiency_of_cores']:.2f} | {ratio} |"
        )
    networks = [f"{c['num_ranks']} ranks {c['network']['bandwidth'] / 1e9:.2f} GB/s, {1e6 * c['network']['latency']:.0f} µs"
                for c in found if c["network"]]  # fmt: skip
    lines += [
        "",
        f"Measured all-reduce: {'; '.join(networks) or 'none'}.",
        "",
        f"Simulated with {options.bandwidth / 1e9:g} GB/s and {1e6 * options.latency:g} µs; strong with {options.strong_samples} "
        "samples, beyond which the data are split; weak with the samples of one rank on each.",
        "",
        "| ranks | strong, grid | s/step | efficiency | weak s/step | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    weak = {row["num_ranks"]: row for row in far if row["study"] == "weak"}
    for row in far:
        if row["study"] == "strong":
            other, ranks = weak[row["num_ranks"]], row["num_ranks"]
            lines.append(
                f"| {ranks} | {row['sample_size']} x {ranks // row['sample_size']} | {row['seconds']:.4f} | {row['efficiency']:.2f} | "
                f"{other['seconds']:.4f} | {other['efficiency']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def measure_locally(num_ranks: int, options: argparse.Namespace) -> None:
    """Measure in a job of some ranks, and the memory of each case in one of its own."""
    command = ["mpirun", "-np", str(num_ranks), sys.executable, "-m", "mpi4py", __file__, "measure"]
    command += ["--output", str(options.output), "--model", options.model, "--device", options.device]
    command += ["--num-samples", str(options.num_samples)]
    command += ["--batch", str(options.batch)] if options.batch else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rounds = ["--warmup", str(options.warmup), "--repetitions", str(options.repetitions)]
    subprocess.run([*command, *rounds], check=True, env=environment)
    path = options.output / f"ranks-{num_ranks}.json"
    content = json.loads(path.read_text())
    batch = options.batch or MODELS[options.model][2]
    measured: dict[tuple, int] = {}
    for number, case in enumerate(cases(num_ranks, options.num_samples, batch)):
        kind = case.scheme if case.scheme.startswith("plain") or case.scheme in PEERS else "ours"
        key = kind, case.sample_size, case.num_samples, case.global_batch_size
        if key not in measured:
            rounds = ["--warmup", "1", "--repetitions", "2", "--case", str(number)]
            subprocess.run([*command, *rounds], check=True, env=environment)
            one = options.output / f"memory-{num_ranks}-{number}.json"
            measured[key] = json.loads(one.read_text())["rows"][0]["memory_bytes"]
            one.unlink()
        for row in content["rows"]:
            if (row["study"], row["scheme"]) == (case.study, case.scheme):
                row["memory_bytes"] = measured[key]
    path.write_text(json.dumps(content, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["local", "measure", "report"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", choices=MODELS, default="mlp")
    parser.add_argument(
        "--num-samples", type=int, default=8, help="of the strong study, and of a rank of the weak ones"
    )
    parser.add_argument("--batch", type=int, help="examples per step (default: of the model)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--bandwidth", type=float, default=20e9, help="assumed for the simulation (bytes/s)")
    parser.add_argument("--latency", type=float, default=20e-6, help="assumed for the simulation (s)")
    parser.add_argument("--max-ranks", type=int, default=1024)
    parser.add_argument("--strong-samples", type=int, default=256, help="samples of the simulated strong study")
    parser.add_argument("--case", type=int, help="measure the case of this number alone")
    options = parser.parse_args()
    if options.command == "measure":
        measure(options)
        return
    if options.command == "local":
        for num_ranks in options.ranks:
            measure_locally(num_ranks, options)
    report(options)


if __name__ == "__main__":
    main()
