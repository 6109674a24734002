#!/usr/bin/env python3
"""Time of a training step of the working tree as a multiple of that of a former commit, on one pinned core.

    python benchmarks/speed.py --against COMMIT [--cases mlp:1 mlp:16 vit:4] [--core 0] [--at-most 1.03] [--width 0.04]

The steps are those of benchmarks/samples.py (hpc_bnn, walking; network:samples). Two processes, one of each version, are
pinned to the same core and make some steps in turn, one waiting while the other works; after some rounds a new pair of
processes takes over, because a process keeps its luck with memory for life. CPU time counts, so that the work of
others on the core is not measured. The number is the median ratio over all rounds, with a 95 % interval by bootstrap over the pairs;
pairs are added until the interval is narrow enough. The exit code is 1 where the median is above --at-most, or the
interval stays too wide.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from frozen import REPOSITORY, check_source, checked_out, environment

ROUNDS = 8  # of a pair of processes
SECONDS = 0.15  # of CPU time that a turn takes at least
LEAST_PAIRS = 6  # below it a bootstrap over pairs means little


def child(root: str, model: str, num_samples: str, core: str) -> None:
    """Make as many steps as each line of stdin says, and print their CPU time (seconds)."""
    os.sched_setaffinity(0, {int(core)})
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    check_source(root)
    from samples import make_ours

    step = make_ours(model, int(num_samples), "cpu")
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            step()
        print(time.process_time() - start, flush=True)


class Worker:
    """A process with one version."""

    def __init__(self, root: Path, model: str, num_samples: str, core: int):
        command = [sys.executable, __file__, "--child", str(root), model, num_samples, str(core)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=root, env=environment(root), stdin=pipe, stdout=pipe, text=True)

    def __call__(self, num_steps: int) -> float:
        """Return the CPU time of some steps (seconds)."""
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a process of the measurement ended: see above")
        return float(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ratios_of_pair(roots: tuple[Path, Path], model: str, num_samples: str, core: int) -> list[float]:
    """Return working tree / commit of each round of a new pair of processes; who begins alternates."""
    with contextlib.ExitStack() as stack:
        workers = []
        for root in roots:
            workers.append(Worker(root, model, num_samples, core))
            stack.callback(workers[-1].close)
            workers[-1](2)  # warm-up, before the other one starts
        num_steps = max(1, round(SECONDS / max(workers[0](1), 1e-6)))
        ratios = []
        for number in range(ROUNDS):
            order = (0, 1) if number % 2 else (1, 0)
            seconds = {which: workers[which](num_steps) for which in order}
            ratios.append(seconds[1] / seconds[0])
    return ratios


def interval(pairs: list[list[float]]) -> tuple[float, float]:
    """Return the 95 % interval of the median over all rounds, by bootstrap over the pairs of processes."""
    rng = np.random.default_rng(0)
    ratios = np.array(pairs)
    drawn = rng.integers(0, len(ratios), (4000, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn].reshape(4000, -1), axis=1), [0.025, 0.975])
    return float(low), float(high)


def measure(options: argparse.Namespace, roots: tuple[Path, Path]) -> Iterator[tuple[str, bool]]:
    """Yield a line for each case, and whether it is fast enough."""
    for case in options.cases:
        model, num_samples = case.split(":")
        pairs: list[list[float]] = []
        low, high = 0.0, float("inf")
        while high - low >= options.width and len(pairs) < options.max_pairs:
            # The order in which the two processes start alternates as well.
            if len(pairs) % 2:
                found = ratios_of_pair(roots[::-1], model, num_samples, options.core)
                pairs.append([1 / ratio for ratio in found])
            else:
                pairs.append(ratios_of_pair(roots, model, num_samples, options.core))
            print(f"{case}, pair {len(pairs)}: {median(pairs[-1]):.3f}", file=sys.stderr, flush=True)
            if len(pairs) >= LEAST_PAIRS:
                low, high = interval(pairs)
        ratio = median(ratio for pair in pairs for ratio in pair)
        verdict = "ok" if ratio <= options.at_most else "SLOWER"
        if high - low >= options.width:
            verdict = "NOT RESOLVED"
        line = f"{model} S={num_samples}: {ratio:.3f} [{low:.3f}, {high:.3f}], {len(pairs)} pairs of {ROUNDS} rounds: {verdict}"
        yield line, verdict == "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="former commit")
    parser.add_argument("--cases", nargs="+", default=["mlp:1", "mlp:16", "vit:4"], metavar="MODEL:SAMPLES")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="default: the first")
    parser.add_argument("--at-most", type=float, default=1.03, help="ratio that is accepted")
    parser.add_argument("--width", type=float, default=0.04, help="of the interval that is narrow enough")
    parser.add_argument("--max-pairs", type=int, default=60, help="pairs of processes per case")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if not options.against:
        parser.error("give --against COMMIT")
    with checked_out(options.against) as tree:
        fits = []
        for line, is_ok in measure(options, (tree, REPOSITORY)):
            print(line, flush=True)
            fits.append(is_ok)
    sys.exit(0 if all(fits) else 1)


if __name__ == "__main__":
    main()
