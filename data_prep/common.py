"""What the scripts of data_prep share: their flags, splits, checksums, and how they run on one rank or many."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hpc_bnn.__main__ import code_of_output, guard_output
from hpc_bnn.cli.commands import run_and_report
from hpc_bnn.comm import GridComm, connect_for_files, finalize
from hpc_bnn.data import Examples, Manifest, write_shards
from hpc_bnn.data.manifest import MANIFEST, sha256_of_file
from hpc_bnn.data.writer import sha256_of_key
from hpc_bnn.errors import ConfigError, DataError, Fault
from hpc_bnn.safe_files import read_bytes

logger = logging.getLogger(__name__)  # on the first rank alone


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}\nSee {self.prog} --help")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all scripts have."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="shard directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument(
        "--examples-per-shard", type=int, metavar="N", help="per file (default: files of about 256 MiB)"
    )
    parser.add_argument("--compression", choices=["gzip", "lzf"], help="of the files (default: none)")
    parser.add_argument("--force", action="store_true", help="write again what is already there")
    return parser


def add_source(parser: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """Add the flag ``--source``."""
    parser.add_argument("--source", type=Path, required=True, help=help, **options)


def add_fractions(parser: argparse.ArgumentParser, validation: float, test: float) -> None:
    """Add the flags ``--validation-fraction`` and ``--test-fraction``."""
    for name, default in (("validation", validation), ("test", test)):
        parser.add_argument(
            f"--{name}-fraction",
            type=float,
            default=default,
            metavar="F",
            help=f"share of the split '{name}' (default: %(default)s)",
        )


def add_facts(parser: argparse.ArgumentParser) -> None:
    """Add the flags ``--name``, ``--source-text`` and ``--licence``."""
    parser.add_argument("--name", help="of the data set (default: as known, or the file's)")
    parser.add_argument(
        "--source-text", metavar="TEXT", help="where the data come from (default: as known, or the file's name)"
    )
    parser.add_argument("--licence", metavar="TEXT", help="of the data (default: as known, or 'not stated')")


def state_facts(options: argparse.Namespace, name: str, source: str, licence: str = "not stated") -> dict[str, str]:
    """Return name, source and licence for the manifest: as the flags say, or as given."""
    return {
        "name": options.name or name,
        "source": options.source_text or source,
        "licence": options.licence or licence,
    }


def check(flag: str, value: object, fits: bool, rule: str, remedy: str) -> None:
    """Raise `ConfigError` that names flag, value, rule and remedy unless ``fits``."""
    if not fits:
        raise ConfigError(Fault(flag, value, rule, remedy))


def check_fractions(options: argparse.Namespace) -> dict[str, float]:
    """Return the shares of train, validation and test; they are 1 together."""
    shares = {"validation": options.validation_fraction, "test": options.test_fraction}
    for name, value in shares.items():
        check(f"--{name}-fraction", value, 0 <= value < 1, "must be at least 0 and below 1", "Try 0.2")
    total = sum(shares.values())
    check("--validation-fraction, --test-fraction", total, total < 1, "nothing is left to train on", "Try 0.2")
    return {"train": 1 - total, **shares}


def cut(num_items: int, shares: dict[str, float]) -> dict[str, range]:
    """Cut ``range(num_items)`` into parts, in order, by their shares; parts of share 0 are left out."""
    names, bounds = list(shares), np.round(np.cumsum([0, *shares.values()]) * num_items).astype(int)
    parts = {name: range(a, b) for name, a, b in zip(names, bounds, bounds[1:]) if shares[name] > 0}
    for name, part in parts.items():
        check(f"--{name}-fraction", shares[name], len(part) > 0, f"of {num_items} nothing is left", "Make it larger")
    return parts


def draw_split(num_items: int, shares: dict[str, float], seed: int) -> dict[str, np.ndarray]:
    """Deal items at random to splits by their shares; the indices [n] of each, sorted."""
    order = np.random.default_rng(seed).permutation(num_items)
    return {name: np.sort(order[list(part)]) for name, part in cut(num_items, shares).items()}


def add_num_validation(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--num-validation``."""
    parser.add_argument(
        "--num-validation",
        type=int,
        default=0,
        metavar="N",
        help="training images held out as the split 'validation', chosen by --seed (default: %(default)s)",
    )


def hold_out(options: argparse.Namespace, num_train: int) -> dict[str, np.ndarray]:
    """Return the indices of the splits train and, with ``--num-validation``, validation."""
    number = options.num_validation
    check("--num-validation", number, 0 <= number < num_train, f"must be in 0..{num_train - 1}", "Try 5000")
    share = number / num_train
    return draw_split(num_train, {"validation": share, "train": 1 - share}, options.seed)


KEPT = 2.0**-16
"""Largest error of float32, in standard deviations of a channel, with which numbers are still narrowed to it."""


def float_type(what: str, *samples: np.ndarray) -> type[np.floating]:
    """Return float32 where it keeps the differences of some numbers, float64 where it does not; and say the latter.

    Time stamps and pressures are large, and what they tell is small: they are subtracted, and rounded afterwards, when
    they are read. Each of ``samples`` is [n, channels, ...]; NaN is left out.
    """
    for values in samples:
        values = np.asarray(values, np.float64)
        channels = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1) if values.ndim > 1 else values[None]
        with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # of channels without values
            error = np.nanmax(np.abs(channels - channels.astype(np.float32)), axis=1, initial=0)
            kept = np.isfinite(error) & (error <= KEPT * np.nanstd(channels, axis=1))
            lost = (error > 0) & ~kept
        if lost.any():
            logger.info("%s is written as float64: float32 would round its differences away", what)
            return np.float64
    return np.float32


def checksums(*paths: Path) -> list[str]:
    """Return the SHA-256 of source files, for the key of a preparation; `DataError` where one cannot be read."""
    try:
        return [sha256_of_file(path) for path in paths]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error


def check_digest(path: Path, content: bytes, expected: str, kind: str = "md5") -> None:
    """Raise `DataError` unless the content of a source file has the published checksum."""
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DataError(
            f"--source: {path} is not the published file: {kind.upper()} {found}, expected {expected}. Fetch it again"
        )


def write(
    comm: GridComm,
    options: argparse.Namespace,
    splits: dict[str, tuple[np.ndarray, np.ndarray] | Examples],
    *,
    key: Any,
    **facts: Any,
) -> None:
    """Write the shards with a progress bar, and say what was written. Collective over the world.

    ``key`` holds the checksums of the source, for an interrupted preparation to go on; the flags are added here. None
    where the content of the source is not known.
    """
    # Where files lie does not matter: their checksums are in the key
    flags = {k: str(v) for k, v in vars(options).items() if k not in ("output", "force", "source", "split_file")}
    key = None if key is None else [key, flags]
    with comm.agree(f"looking at {options.output}"):
        is_there = not options.force and _is_there(options.output, key)
    if any(comm.gather_objects(is_there)):
        if comm.grid.rank == 0:
            print(f"{options.output} is already there (--force writes it again)")
        return

    def progress(files: Iterable) -> Iterable:
        hidden = None if comm.grid.rank == 0 else True  # None: off where stderr is no terminal
        return tqdm(files, unit="file", desc="writing", disable=hidden)

    manifest = write_shards(
        options.output,
        splits,
        examples_per_shard=options.examples_per_shard,
        compression=options.compression,
        key=key,
        comm=comm,
        progress=progress,
        **facts,
    )
    if comm.grid.rank == 0:
        for split, shards in manifest.splits.items():
            print(f"{options.output}: {split}, {manifest.num_examples(split)} examples in {len(shards)} files")


def _is_there(directory: Path, key: Any) -> bool:
    """Whether the shards of a key stand in a directory; `ConfigError` where others do, `DataError` where damaged ones do."""
    if read_bytes(directory / MANIFEST, "the manifest") is None:
        return False
    try:
        former = Manifest.read(directory)
    except DataError as error:
        raise DataError(f"{error}, with --force") from error
    same = key is not None and former.key_sha256 == sha256_of_key(key)
    rule = f"it holds shards of {former.name} that were prepared from another source or with other flags"
    check("--output", directory, same, rule, "Name another directory, or write it anew with --force")
    return True


def run(parser: argparse.ArgumentParser, prepare: Callable[[argparse.Namespace, GridComm], None]) -> None:
    """Run a script on one rank or many; an error on which all agree is said once, and ends it with exit code 1 or 2."""

    def work() -> int:
        options = parser.parse_args()
        number = options.examples_per_shard
        check("--examples-per-shard", number, number is None or number >= 1, "must be at least 1", "Try 1000")
        prepare(options, connect_for_files())
        return 0

    guard_output()
    code = run_and_report(parser.prog, work)
    finalize()
    sys.exit(code_of_output(code))
