#!/usr/bin/env python3
"""Memory and time of what needs the members of all samples, on the ranks of a sample group.

    mpirun -np 4 python -m mpi4py benchmarks/members.py [--samples 64] [--examples 2] [--targets 8 32 32] [--chunk 4096] [--json rows.json]

The job is one sample group of S ranks. Each case runs by itself, without a network behind it: the exchange, scores and
derivatives of an objective, in float32 (`Crps`, `Energy`), and the whole evaluation of members, in float64. The peak is that
of the rank that needs most: bytes of the tensors that are alive (`hpc_bnn.plan.simulate.LiveMemory`) above what was there
before. It is told in members of all samples, K B T numbers, and in 1/S of them, which is the least that a rank needs. What a
rank has of its own samples counts. Chunks (`CHUNK_ELEMENTS`) are as small a part of the targets as in a large field; for times
give ``--chunk 65536``, that of a CPU. They are of the slowest rank, of one call.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import hpc_bnn
from hpc_bnn.comm import world_size
from hpc_bnn.likelihoods.mixtures import CHUNK_ELEMENTS
from hpc_bnn.noise import Key, Stream
from hpc_bnn.plan.simulate import LiveMemory
from hpc_bnn.predictive.evaluation import score_dataset


class Field(nn.Module):
    """A network of one weight onto fields: its memory is that of its outputs."""

    def __init__(self, form: tuple[int, ...]):
        super().__init__()
        self.scale, self.form = nn.Parameter(torch.ones(1)), form

    def forward(self, x: Tensor) -> Tensor:
        pattern = torch.linspace(-1, 1, math.prod(self.form), dtype=x.dtype).view(self.form)
        return (self.scale * pattern).expand(len(x), *self.form).contiguous()


def measure(comm: hpc_bnn.GridComm, run: Callable[[], object]) -> tuple[float, float]:
    """Return peak bytes and seconds of a call, on the rank that needs most. Collective over the world."""
    comm.barrier()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    with LiveMemory() as memory:
        run()
    found = comm.gather_objects((memory.peak_bytes, seconds))
    return max(peak for peak, _ in found), max(taken for _, taken in found)


def objective_case(
    comm: hpc_bnn.GridComm, objective: hpc_bnn.Gathered, args: argparse.Namespace
) -> Callable[[], object]:
    """Return a step of an objective without its network: see, combine, gradients sample by sample."""
    mine = comm.grid.local_samples(args.samples)
    y = torch.zeros(args.examples, *args.targets)

    def run() -> None:
        coupling = objective.begin(y, mine, args.samples)
        for sample in mine:
            generator = Key(0, Stream.NOISE, sample=sample).generator()
            coupling.see([sample], torch.randn(1, *y.shape, generator=generator))
        coupling.combine(comm)
        like = torch.empty(1).expand(1, *y.shape)
        for sample in mine:
            coupling.gradient([sample], like)
        coupling.data_term()

    return run


def evaluation_case(comm: hpc_bnn.GridComm, args: argparse.Namespace) -> Callable[[], object]:
    """Return the evaluation of one block of examples."""
    likelihood = hpc_bnn.Implicit(args.targets[0])
    posterior = hpc_bnn.MeanFieldGaussian(Field(tuple(args.targets)), init_std=0.1)
    x, y = torch.zeros(args.examples, 1), torch.zeros(args.examples, *args.targets)
    source = hpc_bnn.TensorSource(x, y).on("cpu", torch.float32)
    return lambda: score_dataset(posterior, likelihood, comm, source, num_samples=args.samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--examples", type=int, default=2)
    parser.add_argument("--targets", type=int, nargs="+", default=[8, 32, 32])
    parser.add_argument("--chunk", type=int, default=2**12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    CHUNK_ELEMENTS["cpu"] = args.chunk
    size = world_size()
    comm = hpc_bnn.connect(size, "cpu", backend="mpi") if size > 1 else hpc_bnn.GridComm(hpc_bnn.Grid())
    numbers = args.samples * args.examples * math.prod(args.targets)
    cases = {
        "CRPS, step": (objective_case(comm, hpc_bnn.Crps(), args), 4 * numbers),
        "energy, step": (objective_case(comm, hpc_bnn.Energy(), args), 4 * numbers),
        "evaluation": (evaluation_case(comm, args), 8 * numbers),
    }
    rows = []
    for name, (run, whole) in cases.items():
        peak, seconds = measure(comm, run)
        rows.append(
            {"case": name, "S": size, "of_all": peak / whole, "of_share": peak * size / whole, "seconds": seconds}
        )
        if comm.grid.is_first("world"):
            print("| {case} | {S} | {of_all:.2f} | {of_share:.2f} | {seconds:.3f} |".format(**rows[-1]), flush=True)
    if args.json and comm.grid.is_first("world"):
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
