"""What the scripts of data_prep share: their flags, when there is nothing to do, and what they say at the end."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpc_bnn.data import Manifest
from hpc_bnn.errors import DataError


def make_parser(doc: str, examples_per_shard: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="shard directory to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument(
        "--examples-per-shard",
        type=int,
        default=examples_per_shard,
        metavar="N",
        help="per file (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="write again what is already there")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the flags; exit where they cannot be, and where the shards are there already."""
    options = parser.parse_args()
    if options.examples_per_shard < 1:
        parser.error(f"--examples-per-shard {options.examples_per_shard}: must be at least 1")
    if not options.force:
        try:
            Manifest.read(options.output)
        except DataError:
            return options
        print(f"{options.output} is already there (--force writes it again)")
        parser.exit()
    return options


def report(directory: Path, manifest: Manifest) -> None:
    """Say what was written."""
    for split, shards in manifest.splits.items():
        print(f"{directory}: {split}, {manifest.num_examples(split)} examples in {len(shards)} shards")
