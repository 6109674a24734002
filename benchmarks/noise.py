#!/usr/bin/env python3
"""What drawing keyed noise on a CPU costs: each implementation beside torch, on one thread and on more.

    python benchmarks/noise.py [--numbers 607424] [--threads 1 2] [--rounds 15] [--json FILE]
    python benchmarks/noise.py --full [--threads 8]

Nanoseconds per number, of CPU time on one thread and of wall time on more: all that stand in a line take turns, and the
median over the rounds counts. torch folds with ``_foreach_add_`` and ``_foreach_addcmul_``. ``--full``
passes all 2^32 words of the radius and all 2^32 of the angle through the Box-Muller of each variant, and compares hashes of the
results with each other and with a pinned one; of 2^22 words with NumPy. It takes minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np
import torch

from hpc_bnn.noise import philox
from hpc_bnn.noise.implementations import Implementation, available

WORDS = torch.tensor([12345, 6])
NUM_TENSORS = 16
MIDDLE_RADIUS = 2605029376
"""A radius word whose radius is 1: the words of the angle then give sines and cosines."""
PINNED = {"radius": 0xC807AF173419B6E5, "angle": 0xFFC472D5840610A0}
"""Hashes over all words."""


# --- time ----------------------------------------------------------------------------------------------


def calls(implementation: Implementation, size: int) -> dict[str, Callable[[], object]]:
    """Return what is timed of an implementation."""
    loc, scale, total, product, gradient = torch.rand(5, size)
    out, noise = torch.zeros(2, 1, size)
    gradients = [part.clone() for part in gradient.chunk(NUM_TENSORS)]
    lengths = [len(g) for g in gradients]
    starts = [*itertools.accumulate(lengths[:-1], initial=0)]
    table = torch.tensor([[*range(len(lengths))], [0] * len(lengths), starts, lengths])
    draw, affine, fold = implementation.draw, implementation.affine, implementation.fold
    return {
        "draw": lambda: draw(table, WORDS, 0, False, out),
        "affine": lambda: affine(table, WORDS, 0, False, loc, scale, out, None),
        "affine, noise kept": lambda: affine(table, WORDS, 0, False, loc, scale, out, noise),
        "fold, noise kept": lambda: fold(gradients, table, WORDS, 0, False, total, product, noise[0]),
        "fold, drawn again": lambda: fold(gradients, table, WORDS, 0, False, total, product, None),
    }


def calls_of_torch(size: int) -> dict[str, Callable[[], object]]:
    """Return what torch does instead; it has to keep the noise."""
    generator = torch.Generator()
    loc, scale, total, product, gradient, out, noise = torch.rand(7, size)
    gradients = [part.clone() for part in gradient.chunk(NUM_TENSORS)]
    totals, products, noises = (x.chunk(NUM_TENSORS) for x in (total, product, noise))

    def draw():
        noise.normal_(generator=generator.manual_seed(1))

    def affine():
        draw()
        torch.addcmul(loc, scale, noise, out=out)

    def fold():
        torch._foreach_add_(totals, gradients)
        torch._foreach_addcmul_(products, gradients, noises)

    return {"draw": draw, "affine, noise kept": affine, "fold, noise kept": fold}


def time_each(functions: dict[str, Callable[[], object]], size: int, rounds: int) -> dict[str, float]:
    """Return nanoseconds per number, the functions interleaved."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    repetitions = {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        repetitions[name] = max(1, min(50, int(0.005 / max(clock() - start, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            for _ in range(repetitions[name]):
                function()
            seconds[name].append((clock() - start) / repetitions[name])
    return {name: 1e9 * median(values) / size for name, values in seconds.items()}


def measure(size: int, threads: int, rounds: int) -> Iterator[dict]:
    """Time each call of all implementations and print a line for it."""
    torch.set_num_threads(threads)
    columns = {name: calls(implementation, size) for name, implementation in available().items()}
    columns["torch"] = calls_of_torch(size)
    width = max(map(len, columns["numpy"]))
    print(f"\n{size} numbers, {threads} threads, ns per number")
    print(" " * width, *(f"{name:>8}" for name in columns))
    for what in columns["numpy"]:
        found = time_each({name: made[what] for name, made in columns.items() if what in made}, size, rounds)
        print(f"{what:{width}}", *(f"{found[name]:8.2f}" if name in found else " " * 8 for name in columns), flush=True)
        for name, nanoseconds in found.items():
            yield {"what": what, "name": name, "threads": threads, "numbers": size, "nanoseconds": nanoseconds}


# --- all words -----------------------------------------------------------------------------------------


def hash_in_numpy(varied: int, other: int, first: int, count: int) -> int:
    """Return what `hash_words` of the extension returns."""
    words = np.arange(first, first + count, dtype=np.uint64)
    x = [np.full(count, other, np.uint32), words.astype(np.uint32)]
    z0, z1 = (z.view(np.uint32).astype(np.uint64) for z in philox.pairs(*(x if varied else x[::-1])))
    w = words * np.uint64(0x9E3779B97F4A7C15)
    terms = (w ^ z0) * np.uint64(0xBF58476D1CE4E5B9) ^ (w + z1) * np.uint64(0x94D049BB133111EB)
    return int(terms.sum(dtype=np.uint64))


def check_all_words(threads: int) -> bool:
    """Compare hashes over all words of all variants; return whether they agree."""
    part, parts, agree = 1 << 22, range(0, 1 << 32, 1 << 22), True
    native = importlib.import_module("hpc_bnn.noise._native")
    for varied, (what, pinned) in enumerate(PINNED.items()):
        other = MIDDLE_RADIUS if varied else 0
        of_part = [hash_in_numpy(varied, other, 5 * part + first, 1 << 18) for first in range(0, part, 1 << 18)]
        for variant in native.variants():
            native.set_variant(variant)
            start = time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                hash_part = functools.partial(native.hash_words, varied, other)
                found = sum(pool.map(hash_part, parts, itertools.repeat(part)))
            found, seconds = found % (1 << 64), time.perf_counter() - start
            same = native.hash_words(varied, other, 5 * part, part) == sum(of_part) % (1 << 64)
            agree = agree and same and found == pinned
            verdict = "as pinned" if found == pinned else f"NOT the pinned {pinned:#018x}"
            numpy = "as NumPy" if same else "NOT as NumPy"
            print(f"{what:6} {variant:6} {found:#018x} {verdict}, {numpy} on 2^22 words, {seconds:.1f} s", flush=True)
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[1000, 607_424, 8_000_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--full", action="store_true", help="check all words instead")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}: {', '.join(available())}")
    if options.full:
        sys.exit(not check_all_words(max(options.threads)))
    rows = []
    for size in options.numbers:
        for threads in options.threads:
            if threads == min(options.threads) or size > 1 << 18:
                rows += measure(size, threads, options.rounds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
