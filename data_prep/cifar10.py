#!/usr/bin/env python3
"""Write CIFAR-10 as HDF5 shards: 50,000 training and 10,000 test images of 3 x 32 x 32 pixels, 10 classes.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, as one of

    cifar-10-python.tar.gz, or the directory cifar-10-batches-py in it: verified by the published MD5
    cifar-10-binary.tar.gz: verified by the published MD5
    cifar-10-batches-bin, the directory in it: no MD5 of its files is published; only their sizes are checked, and
        that each class has 5,000 training and 1,000 test images

Licence: none is stated; the author asks for citation.

    python data_prep/cifar10.py --source cifar-10-python.tar.gz --num-validation 5000 --output data/cifar10
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.errors import DataError

PYTHON, BINARY = "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"
MD5 = {
    PYTHON: "c58f30108f718f92721af3b95e74349a",
    BINARY: "c32a1d4ab5d03f1284b67883e8d87530",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BATCHES = tuple(name for name in MD5 if "batch" in name)
BATCH_SIZE = 10_000
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# --- files ---------------------------------------------------------------------------------------------


def find_files(source: Path) -> tuple[Path, ...]:
    """Return the archive, or the batches in a directory."""
    if not source.is_dir():
        return (source,)
    for suffix in ("", ".bin"):
        if (source / f"data_batch_1{suffix}").exists():
            return tuple(source / f"{name}{suffix}" for name in BATCHES)
    raise DataError(
        f"--source {source}: it holds neither data_batch_1 nor data_batch_1.bin. "
        f"Give cifar-10-batches-py, cifar-10-batches-bin, {PYTHON} or {BINARY}"
    )


def read_files(source: Path, md5: Mapping[str, str]) -> dict[str, bytes]:
    """Return the content of the six batches by file name, of an archive with a published MD5 or of a directory."""
    files = find_files(source)
    try:
        contents = {path.name: path.read_bytes() for path in files}
    except OSError as error:
        raise DataError(f"--source {source}: {error.filename} cannot be read ({error.strerror})") from error
    if source.is_dir():
        return contents
    found = hashlib.md5(contents[source.name], usedforsecurity=False).hexdigest()
    for name, folder, suffix in ((PYTHON, "cifar-10-batches-py", ""), (BINARY, "cifar-10-batches-bin", ".bin")):
        if found == md5[name]:
            with tarfile.open(fileobj=io.BytesIO(contents[source.name])) as archive:
                names = [f"{batch}{suffix}" for batch in BATCHES]
                return {name: archive.extractfile(f"{folder}/{name}").read() for name in names}
    raise DataError(
        f"--source: {source} is not the published file: MD5 {found}, "
        f"expected {md5[PYTHON]} ({PYTHON}) or {md5[BINARY]} ({BINARY}). Fetch it again"
    )


# --- batches -------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Rebuilds NumPy's arrays, and refuses anything else that a pickle could call."""

    def find_class(self, module: str, name: str) -> Any:
        if (name, module.replace("._core", ".core")) == ("_reconstruct", "numpy.core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise DataError(f"--source: a batch asks for {module}.{name}, which no batch of CIFAR-10 needs")


def unpickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [n, 3072] uint8 and labels [n] of a batch of the Python version."""
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return batch[b"data"], np.array(batch[b"labels"])


def unpack(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels [n, 3072] uint8 and labels [n] of a batch of the binary version."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
    return records[:, 1:], records[:, 0]


def load(source: Path, md5: Mapping[str, str] = MD5, batch_size: int = BATCH_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Return images [60000, 3, 32, 32] uint8 and labels [60000] int64, the test batch last, verified."""
    pixels, labels = [], []
    for name, content in read_files(source, md5).items():
        if name.endswith(".bin"):
            size = batch_size * (1 + 3072)
            if len(content) != size:
                raise DataError(f"--source: {name} has {len(content)} bytes, expected {size}. Fetch it again")
            x, y = unpack(content)
        else:
            common.check_digest(source / name, content, md5[name])
            x, y = unpickle(content)
        pixels.append(x)
        labels.append(y.astype(np.int64))
    for part, batches in (("training", labels[:5]), ("test", labels[5:])):
        counts = np.bincount(np.concatenate(batches))
        expected = [len(batches) * batch_size // 10] * 10
        if counts.tolist() != expected:
            raise DataError(
                f"--source: the {part} images per class are {counts.tolist()}, expected {expected}. Fetch it again"
            )
    return np.concatenate(pixels).reshape(-1, 3, 32, 32), np.concatenate(labels)


# --- the script ----------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    parts = common.hold_out(options, 50_000)
    with comm.agree("reading CIFAR-10"):
        x, y = load(options.source)
        key = common.checksums(*find_files(options.source))
    parts["test"] = np.arange(50_000, 60_000)
    common.write(
        comm,
        options,
        {name: (x[part], y[part]) for name, part in sorted(parts.items())},
        key=key,
        name="cifar10",
        source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        licence="none stated; the author asks for citation",
        num_classes=10,
        channels={"x": ("red", "green", "blue")},
        details={"classes": CLASSES},
    )


def make_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    common.add_source(parser, "archive or directory as above", metavar="PATH")
    common.add_num_validation(parser)
    return parser


if __name__ == "__main__":
    common.run(make_parser(), prepare)
