#!/usr/bin/env python3
"""Write MNIST as HDF5 shards: 60,000 training and 10,000 test images of 28 x 28 pixels, 10 classes.

Source: the four IDX files of Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998, packed
(.gz) or not, in --source. Their unpacked MD5 is verified. Licence: none is stated with the original files.
"""

import gzip
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
from common import make_parser, parse, report
from tqdm import tqdm

from hpc_bnn.data import write_shards

FILES = {  # name: (MD5 of the unpacked file, shape)
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}


def read_idx(directory: Path, name: str) -> np.ndarray:
    """Return the array of an IDX file, verified: magic number, extents, MD5."""
    packed, unpacked = directory / f"{name}.gz", directory / name
    try:
        content = unpacked.read_bytes() if unpacked.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        sys.exit(f"--source {directory}: neither {name} nor {name}.gz can be read ({error})")
    md5, shape = FILES[name]
    header = bytes([0, 0, 8, len(shape)]) + b"".join(extent.to_bytes(4, "big") for extent in shape)
    found = hashlib.md5(content).hexdigest()
    if not content.startswith(header) or len(content) != len(header) + math.prod(shape) or found != md5:
        sys.exit(f"--source {directory}: {name} is not MNIST's: MD5 {found}, expected {md5}. Fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(shape)


def main() -> None:
    parser = make_parser(__doc__, examples_per_shard=10_000)
    parser.add_argument(
        "--source", type=Path, required=True, metavar="DIR", help="directory of the four IDX files"
    )
    parser.add_argument(
        "--num-validation",
        type=int,
        default=0,
        metavar="N",
        help="training images held out as the split 'validation', chosen by --seed (default: %(default)s)",
    )
    options = parse(parser)
    if not 0 <= options.num_validation < 60_000:
        parser.error(f"--num-validation {options.num_validation}: must be at least 0 and below 60000")
    arrays = [read_idx(options.source, name) for name in tqdm(FILES, desc="reading", disable=None)]
    x, y, x_test, y_test = (a[:, None] if a.ndim == 3 else a.astype(np.int64) for a in arrays)
    order = (
        np.random.default_rng(options.seed).permutation(len(x))
        if options.num_validation
        else np.arange(len(x))
    )
    held_out, train = np.sort(order[: options.num_validation]), np.sort(order[options.num_validation :])
    splits = {"train": (x[train], y[train]), "test": (x_test, y_test)}
    if options.num_validation:
        splits["validation"] = (x[held_out], y[held_out])
    manifest = write_shards(
        options.output,
        splits,
        name="mnist",
        source="LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998 (IDX files)",
        licence="none stated",
        num_classes=10,
        examples_per_shard=options.examples_per_shard,
    )
    report(options.output, manifest)


if __name__ == "__main__":
    main()
