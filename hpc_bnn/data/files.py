"""Reading the files of one split, with every example checked against the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from ..errors import DataError
from .manifest import Arrays, ArraySpec, Manifest, ShardFile, broken, crc32_of_examples, sha256_of_coordinates

CRC32 = ArraySpec((), str(np.dtype("<u4")))
"""The checksums in a file."""
MAX_OPEN_FILES = 64
MAX_RATIO = 1100
"""No filter makes less of a dataset: deflate reaches 1032."""
SMALL_BYTES = 256
"""An array whose examples are not larger is read whole when a file is opened: with targets that are classes, one
example would otherwise cost a second chunk."""


class SplitFiles:
    """The files of one split. Local; for one thread at a time.

    HDF5 files are opened when they are first needed, by the process that reads: nothing is inherited by a fork. Every
    method raises `DataError` where a file is missing, truncated, corrupt, or not what the manifest says.
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
        """Bytes that this process has read from the file system so far."""
        self._open: dict[int, _OpenShard] = {}  # the one that was used last at the end

    def __len__(self) -> int:
        return int(self.starts[-1])

    def check_sizes(self) -> None:
        """Raise `DataError` if a file is missing or has another size than the manifest says; nothing is read."""
        for shard in self.shards:
            path = self.directory / shard.file
            with _naming(path):
                _check_size(path, path.stat().st_size, shard)

    def read(self, indices: np.ndarray, arrays: Arrays) -> None:
        """Read examples [n] of the split, in any order, into arrays [n, ...]; each chunk once."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            with _naming(self.directory / self.shards[number].file):
                shard = self._shard(number)
                self.num_bytes_read += shard.read(indices[rows] - self.starts[number], rows, arrays)

    def read_shard(self, number: int, arrays: Arrays) -> None:
        """Read a whole file at once, checked by its SHA-256, into arrays [num_examples of the split, ...]."""
        shard = self.shards[number]
        path = self.directory / shard.file
        with _naming(path):
            image = path.read_bytes()
            self.num_bytes_read += len(image)
            _check_size(path, len(image), shard)
            if hashlib.sha256(image).hexdigest() != shard.sha256:
                raise broken(f"{path} is not the file that the manifest describes (SHA-256)")
            with h5py.File(h5py.h5f.open_file_image(image)) as file:
                span = slice(self.starts[number], self.starts[number + 1])
                for name, array in arrays.items():
                    _dataset(file, name, path, shard, self.manifest).read_direct(array[span])
                read = {name: array[span] for name, array in arrays.items()}
                checksums, rows = _dataset(file, "crc32", path, shard, self.manifest)[()], np.arange(shard.num_examples)
                _check_checksums(path, checksums, shard)
                _check_examples(path, checksums, read, rows, rows)

    def coordinates(self, span: range) -> Arrays:
        """Return the coordinates [n] of a range of examples by name: times as datetime64, numbers, texts as str."""
        parts: list[Arrays] = []
        for number, shard in enumerate(self.shards):
            start, stop = int(self.starts[number]), int(self.starts[number + 1])
            if max(start, span.start) >= min(stop, span.stop) and parts:
                continue
            path = self.directory / shard.file
            with _naming(path):
                file = self._shard(number).file
                found = {
                    name: _dataset(file, name, path, shard, self.manifest)[()].view(dtype)
                    for name, dtype in self.manifest.coordinates.items()
                }
            if found and sha256_of_coordinates(found) != shard.coordinates_sha256:
                raise broken(f"{path}: its coordinates were changed after it was written (SHA-256)")
            parts.append({name: c[max(span.start - start, 0) : span.stop - start] for name, c in found.items()})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in self.manifest.coordinates}
        return {name: np.char.decode(c, "utf-8") if c.dtype.kind == "S" else c for name, c in joined.items()}

    def _shard(self, number: int) -> _OpenShard:
        opened = self._open.pop(number, None)
        if opened is None:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open))).file.close()
            shard = self.shards[number]
            opened = _OpenShard(self.directory / shard.file, shard, self.manifest)
            self.num_bytes_read += opened.num_bytes_at_opening
        self._open[number] = opened
        return opened


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Convert errors of the file system, HDF5 or h5py to a `DataError` that names the file."""
    try:
        yield
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise broken(f"{path} is missing or corrupt ({error})") from error


class _OpenShard:
    """An open file: reads chunks as they lie in it, and checks each example by its CRC-32."""

    def __init__(self, path: Path, shard: ShardFile, manifest: Manifest):
        self.path = path
        _check_size(path, path.stat().st_size, shard)
        self.file = h5py.File(path, "r", rdcc_nbytes=2**20)
        self.datasets = {name: _dataset(self.file, name, path, shard, manifest) for name in manifest.arrays}
        checks = _dataset(self.file, "crc32", path, shard, manifest)
        self.crc32 = checks[()]
        _check_checksums(path, self.crc32, shard)
        small = [name for name, spec in manifest.arrays.items() if spec.num_bytes <= SMALL_BYTES]
        self.whole = {name: self.datasets[name][()] for name in small}
        read = [checks, *(self.datasets[name] for name in small)]
        self.num_bytes_at_opening = sum(dataset.id.get_storage_size() for dataset in read)

    def read(self, indices: np.ndarray, rows: np.ndarray, arrays: Arrays) -> int:
        """Read examples of this file into rows of arrays; return the number of bytes read."""
        num_bytes = 0
        for name, array in arrays.items():
            if name in self.whole:
                array[rows] = self.whole[name][indices]
            else:
                num_bytes += _read_chunks(self.datasets[name], indices, rows, array)
        _check_examples(self.path, self.crc32[indices], arrays, rows, indices)
        return num_bytes


def _read_chunks(dataset: h5py.Dataset, indices: np.ndarray, rows: np.ndarray, array: np.ndarray) -> int:
    """Read examples into rows of an array, each chunk once; return the number of bytes read."""
    length, form, num_bytes = (dataset.chunks or dataset.shape)[0], dataset.shape[1:], 0
    chunks = indices // length
    for chunk in np.unique(chunks).tolist():
        here, start = chunks == chunk, chunk * length
        origin = (start, *(0 for _ in form))
        if dataset.compression:
            content = dataset[start : start + length]
            num_bytes += dataset.id.get_chunk_info_by_coord(origin).size
        else:
            # Past HDF5's cache, into our memory once; the last four bytes are fletcher32's.
            _, raw = dataset.id.read_direct_chunk(origin)
            content = np.frombuffer(raw, dataset.dtype, length * math.prod(form)).reshape(length, *form)
            num_bytes += len(raw)
        array[rows[here]] = content[indices[here] - start]
    return num_bytes


def _check_size(path: Path, num_bytes: int, shard: ShardFile) -> None:
    if num_bytes != shard.num_bytes:
        raise broken(f"{path} has {num_bytes} bytes, the manifest says {shard.num_bytes}")


def _check_checksums(path: Path, crc32: np.ndarray, shard: ShardFile) -> None:
    if hashlib.sha256(crc32.tobytes()).hexdigest() != shard.crc_sha256:
        raise broken(f"{path} is not the file that the manifest describes (checksums)")


def _check_examples(path: Path, crc32: np.ndarray, arrays: Arrays, rows: np.ndarray, examples: np.ndarray) -> None:
    """Raise `DataError` unless rows of arrays are the examples of a file whose checksums [n] are given."""
    is_changed = crc32_of_examples(arrays, rows) != crc32
    if is_changed.any():
        example = examples[np.argmax(is_changed)]
        raise broken(f"{path}: example {example} was changed after it was written (CRC-32)")


def _dataset(file: h5py.File, name: str, path: Path, shard: ShardFile, manifest: Manifest) -> h5py.Dataset:
    """Return a dataset of a file that has the shape of the manifest, and all its numbers in this file."""
    # A damaged header may speak of exabytes; another file has no checksum; HDF5 reads what is not there as zeros
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise broken(f"{path}: {name} is a link to another dataset, which shards may not have")
    spec, dataset = manifest.arrays.get(name, CRC32), file[name]
    if (dtype := manifest.coordinates.get(name)) is not None:
        spec = ArraySpec((), "int64" if dtype.startswith("datetime64") else dtype)
    expected = (shard.num_examples, *spec.shape), spec.dtype
    if not isinstance(dataset, h5py.Dataset) or (dataset.shape, str(dataset.dtype)) != expected:
        raise broken(f"{path}: {dataset} is not what the manifest says")
    if dataset.external or dataset.is_virtual:
        raise broken(f"{path}: {name} lies in other files (external or virtual storage), which shards may not have")
    properties = dataset.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, title = properties.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            raise DataError(
                f"{path}: {name} needs the HDF5 filter {code} ({title.decode(errors='replace')}), which is not here. Install it, or "
                "prepare the shards with another compression"
            )
    if dataset.id.get_storage_size() * (MAX_RATIO if properties.get_nfilters() else 1) < dataset.nbytes:
        raise broken(f"{path}: {name} is not there as a whole")
    return dataset
