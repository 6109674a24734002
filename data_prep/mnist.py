#!/usr/bin/env python3
"""Write MNIST as HDF5 shards: 60,000 training and 10,000 test images of 28 x 28 pixels, 10 classes.

Source: the four IDX files of Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", 1998, packed
(.gz) or not, in --source. Their unpacked MD5 is verified. Licence: none is stated with the original files.
"""

import argparse
import gzip
import math
from pathlib import Path

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.errors import DataError

FILES = {  # name: (MD5 of the unpacked file, shape)
    "train-images-idx3-ubyte": ("6bbc9ace898e44ae57da46a324031adb", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": ("a25bea736e30d166cdddb491f175f624", (60_000,)),
    "t10k-images-idx3-ubyte": ("2646ac647ad5339dbf082846283269ea", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": ("27ae3e4e09519cfbb04c329615203637", (10_000,)),
}


def read_idx(directory: Path, name: str) -> np.ndarray:
    """Return the array of an IDX file, verified by its MD5."""
    packed, unpacked = directory / f"{name}.gz", directory / name
    try:
        content = unpacked.read_bytes() if unpacked.exists() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"--source {directory}: neither {name} nor {name}.gz can be read ({error})") from error
    md5, shape = FILES[name]
    common.check_digest(directory / name, content, md5)
    return np.frombuffer(content, dtype=np.uint8, offset=len(content) - math.prod(shape)).reshape(shape)


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    parts = common.hold_out(options, 60_000)
    with comm.agree("reading MNIST"):
        arrays = [read_idx(options.source, name) for name in FILES]
    x, y, x_test, y_test = (a[:, None] if a.ndim == 3 else a.astype(np.int64) for a in arrays)
    splits = {name: (x[part], y[part]) for name, part in sorted(parts.items())}
    common.write(
        comm,
        options,
        splits | {"test": (x_test, y_test)},
        coordinates={name: {"row": part} for name, part in (parts | {"test": np.arange(len(x_test))}).items()},
        key=[md5 for md5, _ in FILES.values()],
        name="mnist",
        source="LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998 (IDX files)",
        licence="none stated",
        num_classes=10,
    )


if __name__ == "__main__":
    parser = common.make_parser(__doc__)
    common.add_source(parser, "directory of the four IDX files", metavar="DIR")
    common.add_num_validation(parser)
    common.run(parser, prepare)
