"""Reading the files of one split, with every example checked against the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from ..errors import DataError
from .manifest import Manifest, ShardFile, crc32_of_examples

MAX_OPEN_FILES = 64
SMALL_BYTES = 256
"""An array whose examples are not larger is read whole when a file is opened: with targets that are classes, one
example would otherwise cost a second chunk."""


class SplitFiles:
    """The files of one split. Local; for one thread at a time.

    HDF5 files are opened when they are first needed, by the process that reads: nothing is inherited by a fork.

    Parameters
    ----------
    directory : path
        Shard directory.
    split : str
        Name of the split.

    Attributes
    ----------
    num_bytes_read : int
        Bytes that this process has read from the file system so far.

    Raises
    ------
    DataError
        The split does not exist; while reading: a file is missing, truncated, corrupt, or not what the manifest says.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        self.directory = Path(directory)
        self.manifest = Manifest.read(directory)
        if split not in self.manifest.splits:
            raise DataError(
                f"{directory} has the splits {', '.join(self.manifest.splits)}, not '{split}'. Name one of "
                "them (<data.train_split>, <data.test_split>, --split), or prepare it (--test-fraction)"
            )
        self.shards = self.manifest.splits[split]
        self.starts = np.cumsum([0, *(shard.num_examples for shard in self.shards)])
        self.num_bytes_read = 0
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def check_sizes(self) -> None:
        """Raise `DataError` if a file is missing or has another size than the manifest says; nothing is read."""
        for shard in self.shards:
            path = self.directory / shard.file
            with _naming(path):
                _check_size(path, path.stat().st_size, shard)

    def read(self, indices: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Read examples [n] of the split, in any order, into x and y [n, ...]; each chunk once."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(numbers):
            rows = np.flatnonzero(numbers == number)
            shard = self._shard(int(number))
            with _naming(shard.path):
                self.num_bytes_read += shard.read(indices[rows] - self.starts[number], rows, x, y)

    def read_shard(self, number: int, x: np.ndarray, y: np.ndarray) -> None:
        """Read a whole file at once, checked by its SHA-256, into x and y [num_examples of the split, ...]."""
        shard = self.shards[number]
        path = self.directory / shard.file
        with _naming(path):
            image = path.read_bytes()
            self.num_bytes_read += len(image)
            _check_size(path, len(image), shard)
            if hashlib.sha256(image).hexdigest() != shard.sha256:
                raise DataError(
                    f"{path} is not the file that the manifest describes (SHA-256). Stage or prepare the shards again"
                )
            with h5py.File(h5py.h5f.open_file_image(image)) as file:
                part = slice(self.starts[number], self.starts[number + 1])
                for name, array in (("x", x), ("y", y)):
                    _check_dataset(path, file[name], shard, self.manifest)
                    file[name].read_direct(array[part])

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].file.close()
            path = self.directory / self.shards[number].file
            with _naming(path):
                self._open[number] = opened = _OpenShard(path, self.shards[number], self.manifest)
                self.num_bytes_read += opened.num_bytes_at_opening
        self._open.move_to_end(number)
        return self._open[number]

    def close(self) -> None:
        """Close the files."""
        while self._open:
            self._open.popitem()[1].file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert errors of the file system, HDF5 or h5py to a `DataError` that names the file."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"{path} is missing or corrupt ({error}). Stage or prepare the shards again") from error


class _OpenShard:
    """An open file: reads chunks as they lie in it, and checks each example by its CRC-32."""

    def __init__(self, path: Path, shard: ShardFile, manifest: Manifest):
        self.path = path
        _check_size(path, path.stat().st_size, shard)
        self.file = h5py.File(path, "r", rdcc_nbytes=2**20)
        self.datasets = {name: self.file[name] for name in manifest.arrays}
        for dataset in self.datasets.values():
            _check_dataset(path, dataset, shard, manifest)
        checks = self.file["crc32"]
        # The shape first: a damaged header may speak of exabytes
        self.crc32 = checks[()] if checks.shape == (shard.num_examples,) else np.empty(0)
        if hashlib.sha256(self.crc32.tobytes()).hexdigest() != shard.crc_sha256:
            raise DataError(
                f"{path} is not the file that the manifest describes (checksums). Stage or prepare the shards again"
            )
        self.whole = {
            name: dataset[()]
            for name, dataset in self.datasets.items()
            if manifest.arrays[name].num_bytes <= SMALL_BYTES
        }
        read = [checks, *(self.datasets[name] for name in self.whole)]
        self.num_bytes_at_opening = sum(dataset.id.get_storage_size() for dataset in read)

    def read(self, indices: np.ndarray, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> int:
        """Read examples of this file into rows of x and y; return the number of bytes read."""
        num_bytes = 0
        for name, array in (("x", x), ("y", y)):
            if name in self.whole:
                array[rows] = self.whole[name][indices]
            else:
                num_bytes += self._read_chunks(self.datasets[name], indices, rows, array)
        found = crc32_of_examples(x, y, rows)
        if (found != self.crc32[indices]).any():
            example = indices[np.argmax(found != self.crc32[indices])]
            raise DataError(
                f"{self.path}: example {example} was changed after it was written (CRC-32). Stage or prepare the "
                "shards again"
            )
        return num_bytes

    def _read_chunks(self, dataset: h5py.Dataset, indices: np.ndarray, rows: np.ndarray, array: np.ndarray) -> int:
        length, num_bytes = dataset.chunks[0], 0
        chunks = indices // length
        for chunk in np.unique(chunks):
            here = chunks == chunk
            if dataset.compression:
                content = dataset[chunk * length : (chunk + 1) * length]
                num_bytes += dataset.id.get_chunk_info_by_coord(_origin(dataset, chunk)).size
            else:
                # Past HDF5's cache, into our memory once; the last four bytes are fletcher32's.
                _, raw = dataset.id.read_direct_chunk(_origin(dataset, chunk))
                content = np.frombuffer(raw, dataset.dtype, length * int(np.prod(dataset.shape[1:])))
                content = content.reshape(length, *dataset.shape[1:])
                num_bytes += len(raw)
            array[rows[here]] = content[indices[here] - chunk * length]
        return num_bytes


def _origin(dataset: h5py.Dataset, chunk: int) -> tuple[int, ...]:
    return (int(chunk) * dataset.chunks[0], *(0 for _ in dataset.shape[1:]))


def _check_size(path: Path, num_bytes: int, shard: ShardFile) -> None:
    if num_bytes != shard.num_bytes:
        raise DataError(
            f"{path} has {num_bytes} bytes, the manifest says {shard.num_bytes}. Stage or prepare the shards again"
        )


def _check_dataset(path: Path, dataset: h5py.Dataset, shard: ShardFile, manifest: Manifest) -> None:
    spec = manifest.arrays[dataset.name.strip("/")]
    if (dataset.shape, str(dataset.dtype)) != ((shard.num_examples, *spec.shape), spec.dtype):
        raise DataError(f"{path}: {dataset.name} is {dataset.dtype} {dataset.shape}, not what the manifest says")
