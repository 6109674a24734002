"""Shard directories: HDF5 files and a manifest.json that describes them.

::

    DIR/manifest.json        format, arrays, splits, statistics, source, licence, SHA-256 of each file
    DIR/train-00000.h5       datasets x [n, ...], y [n, ...]; chunks of whole examples, fletcher32
    DIR/test-00000.h5

A file is written under a temporary name, synced and renamed; the manifest comes last, so a directory
with a manifest is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from ..errors import DataError

FORMAT = "hpc_bnn shards"
VERSION = 2
MANIFEST = "manifest.json"
CHUNK_BYTES = 64 * 2**10
"""Aim for the size of an HDF5 chunk (bytes); a chunk holds whole examples, at least one."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a data set."""

    shape: tuple[int, ...]
    """Shape of one example."""
    dtype: str
    """Name of the NumPy dtype as stored."""


@dataclass(frozen=True)
class ShardFile:
    """One file of a split."""

    file: str
    num_examples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Description of a shard directory."""

    name: str
    """Name of the data set."""
    source: str
    """Where the data come from."""
    licence: str
    """Under which terms."""
    arrays: dict[str, ArraySpec]
    """x (inputs) and y (targets)."""
    splits: dict[str, tuple[ShardFile, ...]]
    """Files of each split, in order."""
    mean: tuple[float, ...]
    """Mean of x over the training split, per channel (first dim of an example), in units of x."""
    std: tuple[float, ...]
    """Standard deviation of the same."""
    num_classes: int | None = None
    """Number of classes where y is a class."""

    def num_examples(self, split: str) -> int:
        return sum(shard.num_examples for shard in self.splits[split])

    def to_json(self) -> str:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content | {"sha256": _sha256_of_json(content)}, indent=1)

    @classmethod
    def read(cls, directory: str | os.PathLike) -> Manifest:
        """Read DIR/manifest.json. Local.

        Raises
        ------
        DataError
            The file is missing, unreadable, changed, or of another format or version.
        """
        path = Path(directory, MANIFEST)
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(
                f"{path} is not there: no shard directory, or its preparation was interrupted. "
                "Write it with a script of data_prep/, for example python data_prep/digits.py --output DIR"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}). Prepare the shards again") from error
        if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
            raise DataError(
                f"{path} is not of format '{FORMAT}', version {VERSION}. Prepare the shards again"
            )
        if raw.pop("sha256", None) != _sha256_of_json(raw):
            raise DataError(f"{path} was changed after it was written (SHA-256). Prepare the shards again")
        del raw["format"], raw["version"]
        try:
            raw["arrays"] = {
                name: ArraySpec(tuple(spec["shape"]), spec["dtype"]) for name, spec in raw["arrays"].items()
            }
            raw["splits"] = {
                split: tuple(ShardFile(**shard) for shard in shards)
                for split, shards in raw["splits"].items()
            }
            raw["mean"], raw["std"] = tuple(raw["mean"]), tuple(raw["std"])
            return cls(**raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} lacks or misstates a field ({error}). Prepare the shards again"
            ) from error


# --- writing -------------------------------------------------------------------------------------------


def write_shards(
    directory: str | os.PathLike,
    splits: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    name: str,
    source: str,
    licence: str,
    num_classes: int | None = None,
    examples_per_shard: int = 4096,
    train_split: str = "train",
) -> Manifest:
    """Write arrays as a shard directory. Local: one process writes.

    Parameters
    ----------
    directory : path
        Created where it is missing. A manifest that stands there is removed first, with the files that it names.
    splits : dict of str to (x, y)
        Inputs [n, channels, ...] and targets [n, ...] of each split.
    name, source, licence : str
        See `Manifest`.
    num_classes : int, optional
        Number of classes where y is a class.
    examples_per_shard : int
        Examples per file.
    train_split : str
        The split that the statistics come from, and no other.

    Returns
    -------
    Manifest
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    former = {}
    with contextlib.suppress(DataError):
        former = Manifest.read(directory).splits
    for name in (MANIFEST, *(shard.file for shards in former.values() for shard in shards)):
        (directory / name).unlink(missing_ok=True)
    x, y = splits[train_split]
    over = (0, *range(2, x.ndim))
    files = {}
    for split, (x_split, y_split) in splits.items():
        files[split] = tuple(
            _write_shard(
                directory / f"{split}-{number:05d}.h5",
                x_split[start : start + examples_per_shard],
                y_split[start : start + examples_per_shard],
            )
            for number, start in enumerate(range(0, len(x_split), examples_per_shard))
        )
    manifest = Manifest(
        name=name,
        source=source,
        licence=licence,
        arrays={"x": ArraySpec(x.shape[1:], str(x.dtype)), "y": ArraySpec(y.shape[1:], str(y.dtype))},
        splits=files,
        mean=tuple(np.atleast_1d(x.mean(axis=over, dtype=np.float64)).tolist()),
        std=tuple(np.atleast_1d(x.std(axis=over, dtype=np.float64)).tolist()),
        num_classes=num_classes,
    )
    with _replacing(directory / MANIFEST) as temporary:
        temporary.write_text(manifest.to_json())
    return manifest


def _write_shard(path: Path, x: np.ndarray, y: np.ndarray) -> ShardFile:
    with _replacing(path) as temporary:
        with h5py.File(temporary, "w", libver="earliest") as file:
            for name, array in (("x", x), ("y", y)):
                example_bytes = max(array.nbytes // len(array), 1)
                length = min(len(array), max(1, CHUNK_BYTES // example_bytes))
                file.create_dataset(name, data=array, chunks=(length, *array.shape[1:]), fletcher32=True)
        num_bytes = temporary.stat().st_size
        sha256 = _sha256(temporary)
    return ShardFile(path.name, len(x), num_bytes, sha256)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name; sync and rename it when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256_of_json(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- verifying -----------------------------------------------------------------------------------------


def verify_shards(directory: str | os.PathLike, progress: Callable[[Iterable], Iterable] = iter) -> list[str]:
    """Compare every file of a shard directory with its manifest; return what is wrong. Local.

    Parameters
    ----------
    directory : path
        Shard directory.
    progress : callable
        Wraps the files while they are read, for a progress bar.

    Returns
    -------
    list of str
        One sentence per problem: missing, truncated, changed and foreign files, files in each other's place, or
        a manifest that cannot be used. Empty where all is well.
    """
    directory = Path(directory)
    try:
        manifest = Manifest.read(directory)
    except DataError as error:
        return [str(error)]
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    owners = {shard.sha256: shard.file for shard in shards}
    problems = []
    for shard in progress(shards):
        path = directory / shard.file
        try:
            num_bytes, found = path.stat().st_size, _sha256(path)
        except OSError as error:
            problems.append(f"{path} is missing or cannot be read ({error.strerror})")
            continue
        if found == shard.sha256:
            continue
        if found in owners:
            problems.append(f"{path} holds what belongs to {owners[found]}")
        elif num_bytes != shard.num_bytes:
            what = "truncated" if num_bytes < shard.num_bytes else "too long"
            problems.append(f"{path} is {what}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
        else:
            problems.append(f"{path} was changed: its SHA-256 is not that of the manifest")
    known = {MANIFEST, *(shard.file for shard in shards)}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return problems + [f"{directory / name} is foreign: the manifest does not name it" for name in foreign]


# --- reading -------------------------------------------------------------------------------------------


class ShardDataset:
    """One split of a shard directory, held in memory as it is stored and normalised when fetched. Local.

    Parameters
    ----------
    directory : path
        Shard directory.
    split : str
        Name of the split.
    device : torch.device
        Where the examples are kept and delivered.
    dtype : torch.dtype
        Floating-point dtype of the inputs.

    Raises
    ------
    DataError
        The split or a file is missing, truncated, corrupt, or not what the manifest says.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.manifest = Manifest.read(directory)
        if split not in self.manifest.splits:
            raise DataError(f"{directory} has the splits {', '.join(self.manifest.splits)}, not '{split}'")
        self.dtype = dtype
        parts = [self._read(Path(directory), shard) for shard in self.manifest.splits[split]]
        self._x, self._y = (torch.from_numpy(np.concatenate(arrays)).to(device) for arrays in zip(*parts))
        # [1, channels, 1, ...]: broadcasts over a batch [B, channels, ...]
        form = (1, -1) + (1,) * (self._x.ndim - 2)
        std = torch.tensor(self.manifest.std, dtype=dtype, device=device)
        self._mean = torch.tensor(self.manifest.mean, dtype=dtype, device=device).view(form)
        self._std = torch.where(std > 0, std, 1).view(form)

    def _read(self, directory: Path, shard: ShardFile) -> tuple[np.ndarray, np.ndarray]:
        path = directory / shard.file
        try:
            num_bytes = path.stat().st_size
            if num_bytes != shard.num_bytes:
                raise DataError(
                    f"{path} has {num_bytes} bytes, the manifest says {shard.num_bytes}. Prepare the shards again"
                )
            if _sha256(path) != shard.sha256:
                raise DataError(
                    f"{path} is not the file that the manifest describes (SHA-256). Prepare the shards again"
                )
            with h5py.File(path, "r") as file:
                arrays = {name: file[name][()] for name in self.manifest.arrays}
        except (OSError, KeyError) as error:
            raise DataError(f"{path} is missing or corrupt ({error}). Prepare the shards again") from error
        for name, spec in self.manifest.arrays.items():
            array = arrays[name]
            if (array.shape, str(array.dtype)) != ((shard.num_examples, *spec.shape), spec.dtype):
                raise DataError(f"{path}: {name} is {array.dtype} {array.shape}, not what the manifest says")
        return arrays["x"], arrays["y"]

    def __len__(self) -> int:
        return len(self._x)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.manifest.arrays["x"].shape

    def fetch(self, indices: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return normalised inputs [B, ...] and targets [B, ...] of some examples."""
        if isinstance(indices, torch.Tensor):
            indices = indices.to(self._x.device)
        return (self._x[indices].to(self.dtype) - self._mean) / self._std, self._y[indices]
