"""The manifest of a shard directory: its content and its checksums. Local.

::

    DIR/manifest.json        format, arrays, splits, statistics, source, licence, SHA-256 of each file
    DIR/train-00000.h5       datasets x [n, ...] (or inputs by name), y [n, ...], crc32 [n]; chunks of whole examples, fletcher32;
                             coordinates of the examples, such as time [n]
    DIR/test-00000.h5

Every file has its SHA-256 in the manifest, every example its CRC-32 in its file; the manifest has the SHA-256 of
these, too, so that a reader can check each example without reading the whole file.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..safe_files import read_bytes, refuse_world_writable

Arrays = dict[str, np.ndarray]
"""Arrays [n, ...] of the same examples by name, in the order of `Manifest.arrays`."""
FORMAT = "hpc_bnn shards"
VERSION = 3
MANIFEST = "manifest.json"
OF_DATA = ("arrays", "splits", "statistics", "num_classes", "target_weights", "missing_targets", "ignore_index")
"""Fields of a manifest that say what the data are; the others say where they come from."""
OPTIONAL = {"missing_targets": False, "ignore_index": None}
"""Fields that stand in a manifest only where they have another value than this: former manifests have none of them."""
PREPARATION = ".preparation"
"""Directory of the records of finished files during a preparation."""
STAGED = ".staged"
"""Mark of a directory that was staged: which directory it is, and the names of its files."""
SHARD = re.compile(r"[\w-]+-\d{5,}\.h5")
"""Names of shards."""
OURS = re.compile(rf"{SHARD.pattern}|manifest\.json|\.staged|lock")
"""Names of which a killed process may leave temporary files."""
_MISSTATED = (KeyError, TypeError, AttributeError, ValueError, OverflowError, DataError)
COORDINATE = re.compile(r"datetime64\[us\]|u?int(8|16|32|64)|float(32|64)|\|S[1-9]\d{0,3}")
"""NumPy dtypes of coordinates: times (microseconds since 1970, UTC where that is known), numbers, texts in UTF-8."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a data set."""

    shape: tuple[int, ...]
    """Shape of one example."""
    dtype: str
    """Name of the NumPy dtype as stored."""
    channels: tuple[str, ...] = ()
    """Names of the channels (first dim of an example), if they have any."""

    @property
    def num_bytes(self) -> int:
        """Bytes of one example."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation over the training split per channel (first dim of an example)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ShardFile:
    """One file of a split."""

    file: str
    num_examples: int
    num_bytes: int
    sha256: str
    crc_sha256: str
    """SHA-256 of the file's dataset crc32 (bytes of little-endian uint32)."""
    coordinates_sha256: str = ""
    """SHA-256 of the file's coordinates, one after another (`sha256_of_coordinates`); empty where it has none."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard directory."""

    name: str
    source: str
    """Where the data come from."""
    licence: str
    arrays: dict[str, ArraySpec]
    """x (inputs), or the inputs by name; then y (targets); then the weights of the examples, where they have some."""
    splits: dict[str, tuple[ShardFile, ...]]
    """Files of each split, in order."""
    statistics: dict[str, Statistics]
    """Statistics of x, and of y if the targets are numbers that hpc_bnn normalises for the network."""
    num_classes: int | None = None
    """Number of classes if y is a class."""
    target_weights: list | None = None
    """Weights of the targets in a score or a mean error, as nested lists that broadcast to an example of y."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts from the preparation, such as the lead time."""
    key_sha256: str | None = None
    """SHA-256 of the key of the preparation, which determines the content."""
    coordinates: dict[str, str] = field(default_factory=dict)
    """What names or places each example, such as ``time``: datasets [n] of each file, by the NumPy dtype of their values."""
    missing_targets: bool = False
    """Whether NaN in y stands for a missing target."""
    ignore_index: int | None = None
    """What stands in y for a class that is missing."""

    def num_examples(self, split: str) -> int:
        """Return the number of examples of a split."""
        return sum(shard.num_examples for shard in self.splits[split])

    @property
    def in_shape(self) -> Any:
        """Shape of one input, or a dict of shapes by name where the inputs are not one array ``x``."""
        return inputs_of({name: spec.shape for name, spec in self.arrays.items()})

    @property
    def inputs(self) -> dict[str, ArraySpec]:
        """The inputs by name: the arrays before y."""
        return dict(itertools.takewhile(lambda item: item[0] != "y", self.arrays.items()))

    @property
    def has_weights(self) -> bool:
        """Whether the examples have weights."""
        return next(reversed(self.arrays)) == "weights"

    def is_whole(self, name: str) -> bool:
        """Whether an array of inputs is delivered as whole numbers: one of a source that normalises nothing."""
        return name not in self.statistics and np.dtype(self.arrays[name].dtype).kind in "iub"

    @property
    def num_inputs(self) -> int:
        """Numbers in the inputs of an example."""
        return sum(math.prod(spec.shape) for spec in self.inputs.values())

    @property
    def places(self) -> tuple[int, ...]:
        """Points of a target: those of a field of classes, or of each channel of numbers; () of one class or number."""
        return self.arrays["y"].shape[0 if self.num_classes is not None else 1 :]

    @property
    def num_bytes_per_example(self) -> int:
        """Bytes of an example, as it is stored."""
        return sum(spec.num_bytes for spec in self.arrays.values())

    @functools.cached_property
    def digest(self) -> str:
        """What depends on the data alone, in 16 digits: of two directories with the same one a run sees the same numbers."""
        content = self._content()
        return sha256_of_json({name: content[name] for name in OF_DATA if name in content})[:16]

    @property
    def shards(self) -> list[ShardFile]:
        """All files."""
        return [shard for shards in self.splits.values() for shard in shards]

    def _content(self) -> dict[str, Any]:
        """Return the fields; coordinates and `OPTIONAL` ones only where there are any: all else is as a former hpc_bnn has it."""
        content = {n: value for n, value in asdict(self).items() if n not in OPTIONAL or value != OPTIONAL[n]}
        if not self.coordinates:
            del content["coordinates"]
            for shard in itertools.chain(*content["splits"].values()):
                del shard["coordinates_sha256"]
        return content

    def to_json(self) -> str:
        """Return the text of the file, with its own SHA-256."""
        content = {"format": FORMAT, "version": VERSION, **self._content()}
        return json.dumps(content | {"sha256": sha256_of_json(content)}, indent=1)

    @classmethod
    def read(cls, directory: str | os.PathLike, has_files: bool = True) -> Manifest:
        """Read DIR/manifest.json; `DataError` if it is missing, unreadable, changed, or of another format.

        ``has_files``: the directory holds shards; otherwise it is that of a run, and no files are named.
        """
        path = Path(directory, MANIFEST)
        refuse_world_writable(directory, "the directory")
        text = read_bytes(path, "the manifest")
        if text is None:
            why = "no shard directory. Write it with a script, for example python data_prep/digits.py --output DIR"
            why += "" if Path(directory).is_absolute() else f", or name it as it is seen from {Path.cwd()}"
            if path.with_name(PREPARATION).exists():
                why = "the preparation was interrupted. Run it again: it goes on where it stopped"
            if path.with_name(STAGED).exists():
                why = "the staging was interrupted. Stage again"
            raise DataError(f"{path} is not there: {why}")
        return cls.parse(text, path, has_files)

    @classmethod
    def parse(cls, text: bytes, path: str | os.PathLike, has_files: bool = True) -> Manifest:
        """Return what `to_json` has written to a file; `DataError` as `read`. Local."""
        try:
            raw = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise broken(f"{path} cannot be read ({error})") from error
        if not isinstance(raw, dict) or (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
            raise broken(f"{path} is not of format '{FORMAT}', version {VERSION}")
        if raw.pop("sha256", None) != sha256_of_json(raw):
            raise broken(f"{path} was changed after it was written (SHA-256)")
        del raw["format"], raw["version"]
        try:
            for name, s in raw["arrays"].items():
                raw["arrays"][name] = ArraySpec(tuple(s["shape"]), s["dtype"], tuple(s["channels"]))
            for split, shards in raw["splits"].items():
                raw["splits"][split] = tuple(ShardFile(**shard) for shard in shards)
            for name, s in raw["statistics"].items():
                raw["statistics"][name] = Statistics(tuple(s["mean"]), tuple(s["std"]))
            manifest = cls(**raw)
            manifest.check(has_files)
        except _MISSTATED as error:
            raise broken(f"{path} lacks or misstates a field ({error})") from error
        return manifest

    def check(self, has_files: bool = True) -> None:
        """Raise `DataError` or what Python raises where a field is not as `write_shards` writes it (`read`). Local."""
        for fits, rule in itertools.chain(self._rules(), self._rules_of_names() if has_files else ()):
            if not fits:
                raise DataError(f"{rule}, which they are not")

    def _rules(self) -> Iterator[tuple[object, str]]:
        """Yield whether a rule is kept, and the rule."""
        texts = (self.name, self.source, self.licence)
        yield all(isinstance(text, str) for text in texts), "name, source and licence must be texts"
        is_ordered = list(self.arrays)[len(self.inputs) :] in (["y"], ["y", "weights"]) and self.inputs
        yield is_ordered, "arrays must be inputs and then y, and weights of examples last"
        yield not self.has_weights or self.arrays["weights"].shape == (), "weights must be one number per example"
        for name, spec in self.arrays.items():
            is_number = all(map(_is_count, spec.shape)) and np.dtype(spec.dtype).kind in "fiub"
            yield is_number and torch_dtype(spec.dtype), f"shape and dtype of {name} must be those of numbers"
            yield str(np.dtype(spec.dtype)) == spec.dtype, f"the dtype of {name} must have NumPy's name"
            is_one_each = not spec.channels or spec.shape[:1] == (len(spec.channels),)
            are_named = is_one_each and all(isinstance(c, str) for c in spec.channels)
            yield are_named, f"channels of {name} must have a name each"
        for name, found in self.statistics.items():
            num_channels, numbers = (*self.arrays[name].shape, 1)[0], (*found.mean, *found.std)
            yield len(found.mean) == len(found.std) == num_channels, f"statistics of {name} must be one per channel"
            are_finite = all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers)
            yield are_finite and min(found.std) >= 0, f"statistics of {name} must be finite, and std 0 or more"
        for name, dtype in self.coordinates.items():
            is_known = is_coordinate(name) and name not in self.arrays and COORDINATE.fullmatch(dtype)
            yield is_known, f"the coordinate {name} must have a name of its own and a dtype of times, numbers or texts"
        num_classes, weights = self.num_classes, np.asarray(self.target_weights or 1, np.float64)
        yield num_classes is None or (_is_count(num_classes) and num_classes), "num_classes must be above 0"
        yield np.isfinite(weights).all() and (weights >= 0).all(), "target_weights must be finite, and 0 or more"
        are_numbers, index = num_classes is None and np.dtype(self.arrays["y"].dtype).kind == "f", self.ignore_index
        yield self.missing_targets in ((False, True) if are_numbers else (False,)), "missing_targets are of numbers"
        is_no_class = num_classes is not None and isinstance(index, int) and not 0 <= index < num_classes
        yield index is None or is_no_class, "ignore_index must be a whole number that is no class"
        np.broadcast_to(weights, self.arrays["y"].shape)

    def _rules_of_names(self) -> Iterator[tuple[object, str]]:
        """Yield the rules of names, which may lead nowhere: a file is in the directory, an array at the root of a file."""
        inputs = dict.fromkeys(self.inputs)
        yield named_arrays(None if list(inputs) == ["x"] else inputs, None), "inputs must have names"
        files = [shard.file for shard in self.shards]
        are_plain = all(isinstance(file, str) and SHARD.fullmatch(file) for file in files)
        yield are_plain, f"files must have plain names such as train-00000.h5 ({', '.join(map(str, files[:3]))}, ...)"
        yield len(set(files)) == len(files), "files must be named once"
        for shard in self.shards:
            are_counts = _is_count(shard.num_bytes) and _is_count(shard.num_examples)
            yield are_counts and shard.num_examples, f"bytes and examples of {shard.file} must be above 0"
            digests = (shard.sha256, shard.crc_sha256, *[shard.coordinates_sha256] * bool(self.coordinates))
            are_digests = all(isinstance(d, str) and _SHA256.fullmatch(d) for d in digests)
            yield are_digests, f"{shard.file} must have the SHA-256 of what is in it"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def broken(what: str) -> DataError:
    """Return the error of shards that must be staged or prepared again."""
    return DataError(f"{what}. Stage or prepare the shards again")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of torch for a NumPy dtype's name; `DataError` where there is none."""
    try:
        return torch.from_numpy(np.empty(0, name)).dtype
    except (TypeError, ValueError) as error:
        raise DataError(f"an array of dtype {name} cannot become a tensor: {error}") from error


def sha256_of_json(content: dict) -> str:
    """Return the SHA-256 of nested dicts, lists, numbers and strings."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def crc32_of_examples(arrays: Arrays, rows: Iterable[int]) -> np.ndarray:
    """Return the CRC-32 of the bytes of some examples, one array after another, of C-contiguous arrays [n, ...]."""
    flat = [a.reshape(len(a), math.prod(a.shape[1:])).view(np.uint8) for a in arrays.values()]
    return np.array([functools.reduce(lambda crc, a: zlib.crc32(a[row], crc), flat, 0) for row in rows], dtype="<u4")


def is_coordinate(name: Any) -> bool:
    """Whether a coordinate of the examples may have this name: no dim or dataset of predictions has it. Local."""
    return isinstance(name, str) and name.isidentifier() and name not in _TAKEN


_TAKEN = {
    "x", "y", "crc32", "example", "category", "channel", "target", "latitude", "longitude", "horizon", "quantile",
    "member", "members", "lead_time", "probabilities", "class", "entropy", "mutual_information", "mean", "std",
    "aleatoric_std", "epistemic_std", "quantiles", "calibrated_probabilities", "in_set", "lower", "upper",
    "calibrated_std", "calibrated_quantiles",
}  # fmt: skip


def sha256_of_coordinates(coordinates: Arrays) -> str:
    """Return the SHA-256 of coordinates [n] as they are stored, with their names, in their order."""
    digest = hashlib.sha256()
    for name, values in coordinates.items():
        digest.update(f"{name} {values.dtype} ".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def named_arrays(x: Any, y: Any, weights: Any = None) -> dict[str, Any]:
    """Return the arrays of a data set by name: x, or the inputs by their names where x is a dict; y; weights of examples. Local."""
    named = dict(x) if isinstance(x, dict) else {"x": x}
    reserved = {"y", "crc32"} | (set() if weights is None else {"weights"})
    reserved |= {"x"} if list(named) == ["x"] and isinstance(x, dict) else set()
    if not named or reserved & named.keys() or not all(map(str.isidentifier, named)):
        raise DataError(f"inputs are named {', '.join(named)}: use identifiers other than y and crc32, and two or more")
    named = named | {"y": y} | ({} if weights is None else {"weights": weights})
    return {name: without_mask(name, array) for name, array in named.items()}


def without_mask(name: str, array: Any) -> Any:
    """Return an array without the mask of a NumPy one: NaN where it was masked; `DataError` where whole numbers are. Local."""
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):  # pandas has masks of its own
        return array
    if array.dtype.kind != "f":
        raise DataError(
            f"{name} is masked in {np.ma.count_masked(array)} places, and {array.dtype} has no NaN. Fill it, such as with "
            f"{name}.filled(-1) and ignore_index=-1 for classes"
        )
    return array.filled(np.nan)


def inputs_of(named: dict[str, Any]) -> Any:
    """Return what is there for x, or for the inputs by name, of things by the names of `named_arrays`. Local."""
    inputs = dict(itertools.takewhile(lambda item: item[0] != "y", named.items()))
    return inputs["x"] if list(inputs) == ["x"] else inputs
