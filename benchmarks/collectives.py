#!/usr/bin/env python3
"""Horovod, torch.distributed and MPI side by side: what sums over each axis cost, and steps of training on top of them.

    python benchmarks/collectives.py --output OUT [--ranks 2 4] [--configs configs/digits.yaml ...] [--rounds 2] [-- FLAGS OF TRAIN]

--configs without a name leaves the steps out, --settings NAME ... takes some of the settings (they stand below), --launcher "srun -N2
--mpi=pmix" measures between nodes. Each library runs in jobs of its own, because Horovod's thread would take time from the others; the jobs of a table alternate, and the
median over the rounds counts. The shards of the configs have to be there. Writes OUT/collectives.json and OUT/collectives.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

import hpc_bnn
from hpc_bnn.cli.commands import config_of_words
from hpc_bnn.comm import timing as network
from hpc_bnn.comm.timing import LARGE_BYTES, SMALL_BYTES
from hpc_bnn.data import Manifest
from hpc_bnn.grid import sample_sizes
from hpc_bnn.plan.simulate import share_of
from hpc_bnn.run.experiment import connect_grid

CONFIGS = ("configs/digits.yaml", "configs/cifar10_vit_small.yaml")
MIDDLE_BYTES = 2**20


@dataclass(frozen=True)
class Setting:
    """A library and how it is set."""

    name: str
    library: str
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


LIBRARIES = [Setting(name, name) for name in ("horovod", "torch", "mpi")]
SETTINGS = [
    *LIBRARIES,
    *(
        Setting(f"{name}, {what}", name, flags)
        for name in ("horovod", "torch", "mpi")
        for what, flags in (
            ("reduction world", ("--grid.reduction", "world")),
            ("overlap", ("--grid.overlap", "true")),
            ("compression bf16", ("--grid.compression", "bf16")),
        )
        if (name, what) != ("mpi", "overlap")
    ),
    Setting("horovod, cycle of 1 ms", "horovod", (), {"HOROVOD_CYCLE_TIME": "1"}),
    Setting("horovod, waiting ranks spin", "horovod", (), {"OMPI_MCA_mpi_yield_when_idle": "0"}),
]
"""The first three are as training sets them; each of the others changes one thing."""


# --- in the jobs ---------------------------------------------------------------------------------------


seconds_of = functools.partial(network.seconds_of, repetitions=(5, 200))


def measure_collectives(library: str) -> list[dict]:
    """Time the collectives over each axis of each grid. Collective over the world."""
    rows = []
    for sample_size in sample_sizes(hpc_bnn.comm.world_size()):
        comm = hpc_bnn.connect(sample_size, "cpu", backend=library)
        for axis, extent in comm.grid.extents.items():
            if extent == 1 or (axis == "world" and (sample_size, comm.grid.data_size) != (2, 2)):
                continue  # elsewhere one of the axes is the world
            small, middle, large = (torch.zeros(n // 4) for n in (SMALL_BYTES, MIDDLE_BYTES, LARGE_BYTES))
            share = torch.zeros(len(large) // extent)
            large = large[: len(share) * extent]
            calls = (
                ("sum of 8 B", comm.sum_, small),
                ("sum of 1 MiB", comm.sum_, middle),
                ("sum of 16 MiB", comm.sum_, large),
                ("reduce-scatter of 16 MiB", comm.tensors.reduce_scatter, large.view(extent, -1)),
                ("all-gather of 16 MiB", comm.tensors.gather, share),
            )
            groups = {"grid": f"{sample_size} x {comm.grid.data_size}", "axis": axis}
            rows += [
                groups | {"what": what, "seconds": seconds_of(comm, call, buffer, axis)} for what, call, buffer in calls
            ]
        comm.close()
        rows += measure_half(library, sample_size)
    return rows


def measure_half(library: str, sample_size: int) -> list[dict]:
    """Time the sum of 16 MiB of float32 in half the bytes, and its error. Collective over the world."""
    comm = hpc_bnn.connect(sample_size, "cpu", compression="bf16", backend=library)
    axis = "sample" if sample_size > 1 else "data"
    numbers = torch.randn(LARGE_BYTES // 4, generator=torch.Generator().manual_seed(comm.grid.rank))
    exact = numbers.double()
    comm.sum_(exact, axis)
    found = []

    def record(what: str, sum_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        error = ((sum_of(numbers.clone()).double() - exact).norm() / exact.norm()).item()
        seconds = seconds_of(comm, sum_of, numbers.clone())
        groups = {"grid": f"{sample_size} x {comm.grid.data_size}", "axis": axis}
        found.append(groups | {"what": what, "seconds": seconds, "error": error})

    def compressed(x: torch.Tensor) -> torch.Tensor:
        comm.sum_(x, axis, compressed=True)
        return x

    def native(x: torch.Tensor) -> torch.Tensor:
        half = x.bfloat16()
        comm.tensors.reduce_(half, axis, "sum")
        return half.float()

    record("sum of 16 MiB, --grid.compression bf16", compressed)
    if library == "torch":
        record("sum of 16 MiB, bfloat16 by the library", native)
    comm.close()
    return found


def measure_steps(config: str, flags: list[str]) -> list[dict]:
    """Time steps on each grid. Collective over the world."""
    run = config_of_words(["train", "--config", config, *flags])
    rows = []
    for sample_size in sample_sizes(hpc_bnn.comm.world_size()):
        comm = connect_grid(run, sample_size)
        if sample_size <= run.num_samples:
            step, arguments = share_of(run, Manifest.read(run.data.shards), comm)
            seconds = seconds_of(comm, step, *arguments, limit=1.5)
            rows.append(
                {"grid": f"{sample_size} x {comm.grid.data_size}", "what": Path(config).stem, "seconds": seconds}
            )
        comm.close()
    return rows


# --- the jobs --------------------------------------------------------------------------------------------


def start(
    launcher: list[str], ranks: int, setting: Setting, config: str | None, flags: list[str], output: Path
) -> list[dict]:
    path = output / "part.json"
    command = [*launcher, "-np" if "mpirun" in launcher[0] else "-n", str(ranks), sys.executable, "-m", "mpi4py"]
    command += [__file__, "--output", str(path), "--library", setting.library]
    command += ["--only", config] if config else []
    command += ["--", *flags, *setting.flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | setting.environment
    done = subprocess.run(command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    return [row | {"ranks": ranks, "setting": setting.name} for row in json.loads(path.read_text())]


def medians(rows: list[dict]) -> dict[tuple, dict]:
    """Return one row for each thing measured, with the median over the rounds."""
    same: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("what", "ranks", "grid", "axis", "setting"))
        same.setdefault(key, []).append(row)
    return {key: group[0] | {"seconds": median(r["seconds"] for r in group)} for key, group in same.items()}


def table(rows: list[dict], settings: list[Setting]) -> list[str]:
    """Return a table of Markdown in milliseconds, a column for each setting, and ratios to the first."""
    found = medians(rows)
    places = list(dict.fromkeys(key[:4] for key in found))
    names = [s.name for s in settings if any(key[4] == s.name for key in found)]
    lines = [f"| ms | ranks | grid | axis | {' | '.join(names)} |", "|" + "---|" * (4 + len(names))]
    for what, ranks, grid, axis in places:
        cells = []
        for name in names:
            row = found.get((what, ranks, grid, axis, name))
            error = f" (error {row['error']:.1e})" if row and "error" in row else ""
            cells.append(f"{1e3 * row['seconds']:.3g}{error}" if row else "")
        lines.append(f"| {what} | {ranks} | {grid} | {axis or ''} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--configs", nargs="*", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", nargs="+", default=[s.name for s in SETTINGS], metavar="NAME")
    parser.add_argument("--launcher", default="mpirun", help='such as "srun --mpi=pmix" (default: mpirun)')
    parser.add_argument("--library", help=argparse.SUPPRESS)  # inside a job, as the next
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of hpc-bnn train, behind --")
    options = parser.parse_args()
    if options.library:
        flags = [*options.flags, "--backend", options.library, "--device", "cpu"]
        rows = measure_steps(options.only, flags) if options.only else measure_collectives(options.library)
        if hpc_bnn.comm.launched_rank() == 0:
            options.output.write_text(json.dumps(rows))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    launcher, content, pages = shlex.split(options.launcher), [], []
    some = [setting for setting in SETTINGS if setting.name in options.settings]
    for config, settings in [(None, LIBRARIES), *((config, some) for config in options.configs)]:
        rows = [
            row
            for _ in range(options.rounds)
            for ranks in options.ranks
            for setting in settings
            for row in start(launcher, ranks, setting, config, options.flags if config else [], options.output)
        ]
        content += rows
        pages += [*table(rows, settings), ""]
        print("\n".join(pages[-1 - len(table(rows, settings)) :]), flush=True)
        (options.output / "collectives.json").write_text(json.dumps(content, indent=1))
        (options.output / "collectives.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
