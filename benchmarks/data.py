#!/usr/bin/env python3
"""How fast examples reach the ranks, and how many bytes are read for it, by reading and grid.

    python benchmarks/data.py --output OUT [--sets cifar era5] [--quick]

Writes two synthetic shard directories: images as large as CIFAR-10's (50,000 x 3 x 32 x 32 uint8), and fields as large as
ERA5's at 135 channels x 128 x 256 (float32, 17.7 MB per example). Then, for each grid and reading, a job of its own:

- seconds until the first batch, with files that are not in the page cache,
- examples per second of the second epoch, reading alone,
- bytes read in two epochs as the readers count them, summed over the ranks, and as the operating system does
  (``rchar`` of /proc/self/io: what the process asked of ``read``),
- the time of an epoch with a computation as long as the reading, in multiples of both times together, read ahead or not
  (0.5 is a perfect overlap); where a core is free to read on.

The peer is torch's DataLoader with one worker process over the same files, each example by h5py's ordinary indexing, as
each rank of an ordinary data-parallel program would read. Writes OUT/data.json and OUT/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import torch

import hpc_bnn
from hpc_bnn.data import BatchLoader, Examples, Manifest

SETS = {  # shape, dtype, examples, examples per file, batch
    "cifar": ((3, 32, 32), "uint8", 50_000, 10_000, 128),
    "era5": ((135, 128, 256), "float32", 48, 4, 8),
}
GRIDS = ((1, 1), (2, 2), (2, 1), (4, 4), (4, 2))
"""(ranks, sample_size)"""


def prepare(directory: Path, name: str, quick: bool) -> None:
    """Write a synthetic set, unless it is there."""
    shape, dtype, num_examples, per_file, _ = SETS[name]
    num_examples = num_examples // 8 if quick else num_examples

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(start)
        if dtype == "uint8":
            x = rng.integers(0, 256, (stop - start, *shape), dtype=np.uint8)
        else:
            x = rng.standard_normal((stop - start, *shape), dtype=np.float32)
        return x, np.arange(start, stop) % 10

    if not (directory / "manifest.json").exists():
        hpc_bnn.write_shards(
            directory,
            {"train": Examples(num_examples, read)},
            name=name,
            source="synthetic",
            licence="none",
            num_classes=10,
            examples_per_shard=per_file,
        )


def forget(directory: Path) -> None:
    """Put the files out of the page cache."""
    for path in directory.glob("*.h5"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def os_bytes() -> int:
    """Bytes that this process has asked of read() so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


# --- the peer ------------------------------------------------------------------------------------------


class PeerDataset(torch.utils.data.Dataset):
    """Examples by h5py's ordinary indexing."""

    def __init__(self, directory: Path):
        self.directory, self.shards = directory, Manifest.read(directory).splits["train"]
        self.starts = np.cumsum([0, *(shard.num_examples for shard in self.shards)])
        self.files = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int):
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        if number not in self.files:
            self.files[number] = h5py.File(self.directory / self.shards[number].file)
        file, row = self.files[number], index - self.starts[number]
        return torch.from_numpy(file["x"][row]), int(file["y"][row])


def peer_epoch(directory: Path, batch_size: int, comm: hpc_bnn.GridComm) -> float:
    """Return the seconds of an epoch of torch's DataLoader on this rank's part of the data axis."""
    dataset = PeerDataset(directory)
    mine = range(len(dataset))[comm.grid.local_examples(len(dataset))]
    order = torch.tensor(mine)[torch.randperm(len(mine))].tolist()
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size // comm.grid.data_size,
        sampler=order,
        num_workers=1,
        multiprocessing_context="forkserver",
        persistent_workers=True,
    )
    list(loader)  # the worker starts, the files are opened
    comm.barrier()
    start = time.perf_counter()
    for x, _ in loader:
        x.float().sub_(1).div_(2)
    comm.barrier()
    return time.perf_counter() - start


# --- one job -------------------------------------------------------------------------------------------


def compute(seconds: float) -> None:
    """Keep a core busy for some seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.ones(20_000).cos_()


def timed_epoch(loader: BatchLoader, comm: hpc_bnn.GridComm, epoch: int, batch_seconds: float = 0.0) -> float:
    comm.barrier()
    start = time.perf_counter()
    for _ in loader.epoch(epoch):
        compute(batch_seconds)
    comm.barrier()
    return time.perf_counter() - start


def measure(directory: Path, batch_size: int, reading: str, comm: hpc_bnn.GridComm) -> dict[str, object]:
    """Return what one grid and reading gives."""
    if reading == "torch":
        seconds = peer_epoch(directory, batch_size, comm)
        return {"examples_per_second": Manifest.read(directory).num_examples("train") / seconds}
    before = os_bytes()
    comm.barrier()
    start = time.perf_counter()
    dataset = hpc_bnn.ShardDataset(directory, "train", comm=comm, reading=reading)
    ahead, each = (BatchLoader(dataset, comm.grid, batch_size, 0, prefetch=n) for n in (2, 0))
    next(iter(ahead.epoch(0)))
    comm.barrier()
    first = time.perf_counter() - start
    timed_epoch(ahead, comm, 0)
    alone = [timed_epoch(each, comm, 1)]
    counted, asked = dataset.num_bytes_read, os_bytes() - before
    alone += [timed_epoch(each, comm, epoch) for epoch in (2, 3)]
    row = {
        "seconds_to_first_batch": first,
        "examples_per_second": len(dataset) / median(alone),
        "bytes_counted": sum(comm.gather_objects(counted)),
        "bytes_of_os": sum(comm.gather_objects(asked)),
    }
    if comm.grid.world_size < (os.cpu_count() or 1):  # a core is free to read ahead on
        seconds = median(alone)
        for name, loader in (("not_ahead", each), ("ahead", ahead)):
            both = [timed_epoch(loader, comm, epoch, seconds / each.num_batches) for epoch in (4, 5, 6)]
            row[name] = median(both) / (2 * seconds)
    return row


def run_job(directory: Path, batch_size: int, reading: str, sample_size: int) -> None:
    with hpc_bnn.connect(sample_size, device="cpu") as comm:
        if comm.grid.rank == 0:
            forget(directory)
        comm.barrier()
        row = measure(directory, batch_size, reading, comm)
        if comm.grid.rank == 0:
            print("ROW", json.dumps(row), flush=True)


# --- all jobs ------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        stored = mine[0]["bytes_stored"]
        lines += [
            f"**{name}**: {mine[0]['num_examples']} examples, {stored / 1e6:.0f} MB in files; bytes of first batch and two "
            "epochs, in multiples of the files, all ranks together",
            "",
            "| grid (sample x data) | reading | first batch, cold (s) | examples/s | / torch | bytes, counted | bytes, OS | "
            "epoch with compute / sum, not ahead | ahead |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in mine:
            peer = next(
                other["examples_per_second"]
                for other in mine
                if other["reading"] == "torch" and other["grid"] == row["grid"]
            )
            speed = f"{row['examples_per_second']:.0f} | {row['examples_per_second'] / peer:.1f}"
            if row["reading"] == "torch":
                lines.append(f"| {row['grid']} | torch DataLoader | – | {speed} | – | – | – | – |")
                continue
            overlap = " | ".join(f"{row[name]:.2f}" if name in row else "–" for name in ("not_ahead", "ahead"))
            lines.append(
                f"| {row['grid']} | {row['reading']} | {row['seconds_to_first_batch']:.2f} | {speed} | "
                f"{row['bytes_counted'] / stored:.3f} | {row['bytes_of_os'] / stored:.3f} | {overlap} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--quick", action="store_true", help="an eighth of the examples, 1 and 2 ranks")
    parser.add_argument("--job", nargs=2, metavar=("READING", "SAMPLE_SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name = options.sets[0]
        run_job(options.output / name, SETS[name][-1], options.job[0], int(options.job[1]))
        return
    rows = []
    for name in options.sets:
        directory = options.output / name
        prepare(directory, name, options.quick)
        for num_ranks, sample_size in GRIDS[: 2 if options.quick else None]:
            for reading in ("node", "group", "rank", "torch"):
                if reading == "group" and sample_size == 1:
                    continue  # a group of one rank is "rank"
                command = ["mpirun", "-np", str(num_ranks), sys.executable, "-m", "mpi4py", __file__]
                command += ["--output", str(options.output), "--sets", name, "--job", reading, str(sample_size)]
                done = subprocess.run(command, capture_output=True, text=True, timeout=900)
                found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
                if not found:
                    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
                grid = f"{sample_size} x {num_ranks // sample_size}"
                row = {"set": name, "grid": grid, "reading": reading, **json.loads(found[0][4:])}
                row["bytes_stored"] = sum(path.stat().st_size for path in directory.glob("*.h5"))
                row["num_examples"] = Manifest.read(directory).num_examples("train")
                rows.append(row)
                print(row, file=sys.stderr)
    (options.output / "data.json").write_text(json.dumps(rows, indent=1))
    (options.output / "data.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
