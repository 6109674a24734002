#!/usr/bin/env python3
"""Write scikit-learn's bundled digits as HDF5 shards: 1,797 images of 8 x 8 pixels, 10 classes.

Source: the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998), UCI
Machine Learning Repository, as scikit-learn bundles it. Licence: CC BY 4.0 (UCI).
"""

import argparse
import hashlib

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.errors import DataError

NUM_EXAMPLES = 1797
SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of the pixels as uint8, then the labels as uint8


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return images [1797, 1, 8, 8] uint8 in 0..16 and labels [1797] int64, verified."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("data_prep/digits.py needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    x = digits.images.astype(np.uint8)[:, None]
    y = digits.target.astype(np.int64)
    found = hashlib.sha256(x.tobytes() + y.astype(np.uint8).tobytes()).hexdigest()
    if len(x) != NUM_EXAMPLES or found != SHA256:
        raise DataError(f"scikit-learn's digits are not the expected ones: {len(x)} examples, SHA-256 {found}")
    return x, y


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    with comm.agree("reading the digits of scikit-learn"):
        x, y = load()
    parts = common.draw_split(len(x), {"test": 0.2, "train": 0.8}, options.seed)
    common.write(
        comm,
        options,
        {name: (x[parts[name]], y[parts[name]]) for name in ("train", "test")},
        key=SHA256,
        coordinates={name: {"row": parts[name]} for name in ("train", "test")},
        name="digits",
        source="scikit-learn load_digits; Alpaydin and Kaynak, UCI Machine Learning Repository, 1998",
        licence="CC BY 4.0",
        num_classes=10,
    )


if __name__ == "__main__":
    common.run(common.make_parser(__doc__), prepare)
