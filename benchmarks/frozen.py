#!/usr/bin/env python3
"""Frozen numbers: the working tree against a former commit, and the numbers that the tests compare with.

    python benchmarks/frozen.py --against COMMIT [--grids 1x1 2x2] [--backend horovod torch] [--only PATTERN]
    python benchmarks/frozen.py --store

The first runs the cases of tests/frozen_cases.py (20 steps in float64 each) with both versions, on this machine, in
processes of their own, and compares parameters, buffers, the course of the loss and the predictive on every rank: on one
rank bit for bit, on larger grids (sample axis x data axis, under mpirun) to 1e-14. The difference of two tensors is the
largest one of a number, as a share of the largest number; 0 means the same bits (the sign of a zero is a bit, too).
The exit code is 1 when a case differs by more, or no longer runs. Cases that the former commit does not know are named.

Sources of both versions are taken as they stand (git worktree for the commit); the environment is the same. Source
tools/activate.sh before, for mpirun.

--store writes tests/frozen.json anew, from the working tree. Do it only when a change of the numbers is meant, and say
in the commit which change that is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
STORED = REPOSITORY / "tests/frozen.json"
BOUND = 1e-14  # on more than one rank


def check_source(root: str) -> None:
    """Raise `SystemExit` unless this process has the hpc_bnn of ROOT."""
    import hpc_bnn

    found = Path(hpc_bnn.__file__).resolve().parents[1]
    if found != Path(root).resolve():
        raise SystemExit(f"hpc_bnn comes from {found}, not from {root}")


# --- in the processes that run the cases ----------------------------------------------------------------


def child(root: str, result: str, grid: str, backend: str, only: str) -> None:
    """Run the cases on the ranks of a job with the hpc_bnn of ROOT, and write RESULT.RANK."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    import frozen_cases

    import hpc_bnn
    from hpc_bnn.errors import HpcBnnError

    check_source(root)
    if Path(root).resolve() == REPOSITORY:  # the numbers of both by one generator
        from former_noise import use_former_noise

        use_former_noise()
    logging.disable(logging.WARNING)
    sample_size, data_size = map(int, grid.split("x"))
    with hpc_bnn.connect(sample_size, device="cpu", backend=backend) as comm:
        if comm.grid.world_size != sample_size * data_size:
            raise SystemExit(f"grid {grid} in a job of {comm.grid.world_size} ranks")
        is_alone = comm.grid.world_size == 1
        # Of several ranks, all refuse a case alike; any other error of one rank has to end the job.
        caught = Exception if is_alone else (HpcBnnError, AttributeError, ImportError, TypeError)
        ends = {}
        for number, (name, case) in enumerate(frozen_cases.matching(only).items()):
            try:
                ends[name] = frozen_cases.run(case, comm, Path(f"{result}-shards-{number}"))
            except caught as error:
                ends[name] = f"{type(error).__name__}: {error}"
            except BaseException:
                print(f"in the case {name}:", file=sys.stderr)
                raise
        torch.save(ends, f"{result}.{comm.grid.rank}")


# --- in the process that compares -----------------------------------------------------------------------


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Give the sources of a commit, in a temporary worktree."""
    with tempfile.TemporaryDirectory(prefix="hpc_bnn-") as directory:
        tree = Path(directory, "former")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree goes then, too
        git("worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True)


def environment(root: Path) -> dict[str, str]:
    """Return the environment of a process that imports hpc_bnn from ROOT."""
    return os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def run_cases(root: Path, grid: str, backend: str, only: str) -> list[dict]:
    """Return what each rank ended with: case -> tensors, or the words of an error."""
    num_ranks = math.prod(map(int, grid.split("x")))
    launcher = [] if num_ranks == 1 else ["mpirun", "-np", str(num_ranks)]
    runner = [] if num_ranks == 1 else ["-m", "mpi4py"]
    with tempfile.TemporaryDirectory(prefix="hpc_bnn-") as directory:
        result = Path(directory, "result")
        arguments = ["--child", str(root), str(result), grid, backend, only]
        command = [*launcher, sys.executable, *runner, __file__, *arguments]
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=root, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                process.terminate()  # not killed: mpirun ends its ranks
                raise
        if process.returncode:
            raise SystemExit(f"{root} on {grid} failed:\n{output[-6000:]}")
        ranks = [torch.load(f"{result}.{rank}", weights_only=True) for rank in range(num_ranks)]
    print(f"{grid}: {root} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return ranks


def difference(now: torch.Tensor, former: torch.Tensor) -> float:
    """Return the largest difference of a number as a share of the largest number, 0 only for the same bits."""
    if (now.shape, now.dtype) != (former.shape, former.dtype):
        return math.inf
    if now.numpy().tobytes() == former.numpy().tobytes():
        return 0.0
    now, former = now.double(), former.double()
    largest = (now - former).abs().max().item()
    return max(largest / former.abs().max().clamp_min(math.ulp(0.0)).item(), math.ulp(0.0))


def compare(now: list[dict], former: list[dict], bound: float) -> Iterator[tuple[str, str, str, bool]]:
    """Yield case, difference, verdict, and whether it is within its bound."""
    for name in now[0]:
        pairs = [(mine[name], theirs[name]) for mine, theirs in zip(now, former)]
        errors = [next((end for end in ends if isinstance(end, str)), None) for ends in zip(*pairs)]
        if errors[0] or errors[1]:
            if not errors[0]:
                yield name, "-", f"new: the commit does not run it ({errors[1]})", True
            else:
                where = "neither version runs it" if errors[1] else "it no longer runs"
                yield name, "-", f"FAILS: {where} ({errors[0]})", False
            continue
        worst, tensor = max(
            ((difference(a[key], b[key]) if key in a and key in b else math.inf), key)
            for a, b in pairs
            for key in a.keys() | b.keys()
        )
        if worst == 0:
            yield name, "0", "same bits", True
        elif worst <= bound:
            yield name, f"{worst:.1e}", f"within {bound:.0e}, most in {tensor}", True
        else:
            yield name, f"{worst:.1e}", f"DIFFERS, most in {tensor}", False


def against(options: argparse.Namespace) -> int:
    """Print the tables and return the exit code."""
    failed = False
    with checked_out(options.against) as tree:
        for grid in options.grids:
            is_alone = grid == "1x1"
            for backend in ["auto"] if is_alone else options.backend:
                former, now = (run_cases(root, grid, backend, options.only) for root in (tree, REPOSITORY))
                rows = list(compare(now, former, 0.0 if is_alone else BOUND))
                title = f"grid {grid}" + ("" if is_alone else f", {backend}")
                width = max(len(row[0]) for row in rows)
                print(f"\n{title}: working tree against {options.against}\n")
                for name, worst, verdict, _ in rows:
                    print(f"{name:{width}}  {worst:>8}  {verdict}")
                same, wrong = (sum(test(row) for row in rows) for test in (lambda r: r[1] == "0", lambda r: not r[3]))
                print(f"\n{title}: {len(rows)} cases, {same} with the same bits, {wrong} fail", flush=True)
                failed |= wrong > 0
    return int(failed)


def store() -> None:
    """Write tests/frozen.json."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    (ends,) = run_cases(REPOSITORY, "1x1", "auto", "core")
    from frozen_cases import digests

    lines = []
    for name, tensors in ends.items():
        if isinstance(tensors, str):
            raise SystemExit(f"{name}: {tensors}")
        numbers = {key: [float(f"{x:.12g}") for x in pair] for key, pair in digests(tensors).items()}
        lines.append(f"{json.dumps(name)}: {json.dumps(numbers, separators=(',', ':'))}")
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{STORED}: {len(lines)} cases, {STORED.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="former commit")
    parser.add_argument("--grids", nargs="+", default=["1x1"], metavar="SxD", help="default: 1x1")
    parser.add_argument("--backend", nargs="+", choices=["horovod", "torch"], default=["horovod"])
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="cases with this in their name; core: those of the tests"
    )
    parser.add_argument("--store", action="store_true", help="write tests/frozen.json")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
    elif options.store:
        store()
    elif options.against:
        sys.exit(against(options))
    else:
        parser.error("give --against COMMIT or --store")


if __name__ == "__main__":
    main()
