"""Writing shard directories: atomic, resumable, in parallel over the ranks of a job.

A file is written to ``.preparation/`` under a temporary name, synced and renamed, and only then recorded there. When all
are complete, they take the place of former shards, and the manifest comes last. So a directory with a manifest is
complete, a half-written file is never taken for a whole one, and a preparation that fails loses nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import operator
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from ..comm import GridComm
from ..errors import ConfigError, DataError, Fault, at_least
from ..grid import Grid
from ..safe_files import (
    Disk,
    read_bytes,
    refuse_world_writable,
    remove_leftovers,
    replacing,
    sync_directory,
    write_atomically,
)
from ..safe_files.locks import Lock
from .manifest import (
    COORDINATE,
    MANIFEST,
    OURS,
    PREPARATION,
    STAGED,
    Arrays,
    ArraySpec,
    Manifest,
    ShardFile,
    Statistics,
    crc32_of_examples,
    inputs_of,
    is_coordinate,
    named_arrays,
    sha256_of_coordinates,
    sha256_of_file,
    sha256_of_json,
    torch_dtype,
    without_mask,
)

CHUNK_BYTES = 4 * 2**10
"""Aim for the size of an HDF5 chunk of whole examples (bytes), a page: they are read at random, without neighbours."""
ROUNDING = 64 * np.finfo(np.float64).eps
"""Standard deviation, as a multiple of the mean, up to which a channel is constant: sums of equal numbers are rounded."""
SHARD_BYTES = 256 * 2**20
"""Aim for the size of a file (bytes) where the number of examples per file is not given."""


@dataclass(frozen=True)
class Examples:
    """Examples that are made when they are written, for sets larger than memory."""

    num_examples: int
    read: Callable[[int, int], tuple[Any, ...]]
    """``read(start, stop)`` returns x [n, channels, ...], or a dict of inputs by name, y [n, ...], and weights [n] where
    the examples have some; any rank may ask for any range."""


def write_shards(
    directory: str | os.PathLike,
    splits: dict[str, tuple[Any, ...] | Examples],
    *,
    name: str,
    source: str,
    licence: str,
    num_classes: int | None = None,
    missing_targets: bool = False,
    ignore_index: int | None = None,
    examples_per_shard: int | None = None,
    train_split: str = "train",
    normalise_targets: bool | None = None,
    ids: Iterable[str] = (),
    target_weights: np.ndarray | None = None,
    channels: dict[str, Iterable[str]] | None = None,
    coordinates: dict[str, dict[str, Any]] | None = None,
    details: dict[str, Any] | None = None,
    compression: str | None = None,
    key: Any = None,
    comm: GridComm | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Manifest:
    """Write a shard directory; return its manifest. Collective over the world of ``comm``: each rank writes own files.

    `DataError` on all ranks where the examples have a wrong form or a value that is not finite.

    Parameters
    ----------
    directory : path
        Created if it is missing; on a file system that all ranks can read. Former shards in it are replaced when all new
        ones are complete. An interrupted preparation in it is removed, or continued if it has the same ``key``.
    splits : dict of str to (x, y), (x, y, weights) or Examples
        Inputs [n, channels, ...], or a dict of several by name, and targets [n, ...] of each split, the same on each
        rank. One input is normalised; of several, those with a floating-point dtype are, and whole numbers stay whole.
        float64 is subtracted from the mean before it is rounded. Weights [n] of the examples, finite and 0 or more, multiply
        their loss, and metrics are weighted means; all splits have them, or none.
    name, source, licence, num_classes, target_weights, channels, details
        As in `Manifest`; the weights as an array, such as cos(latitude) as [latitudes, 1], the channels for x and y.
    coordinates : dict of str to dict, optional
        What names or places the examples of each split: arrays [n] by name, such as ``{"train": {"time": times}}``. Times as
        datetime64 or datetime (rounded down to microseconds; those with a time zone become UTC), whole numbers, floats, or
        texts. They go into predictions, and evaluations are grouped by them.
    missing_targets : bool
        Whether NaN in y stands for a target that is missing: it adds nothing to statistics, loss and metrics. Without it NaN
        is an error.
    ignore_index : int, optional
        The same of classes: what stands in y for a class that is missing, no class itself, such as -1 or 255.
    examples_per_shard, compression : int, str, optional
        Examples per file, by default about 256 MiB; HDF5 filter such as "gzip": smaller and slower to read.
    train_split : str
        The split that the statistics come from, and no other.
    normalise_targets : bool, optional
        Whether the network gets targets of mean 0 and standard deviation 1 per channel; metrics stay in units of y.
        Default: True if y has a floating-point dtype.
    ids : iterable of str
        Names of inputs whose whole numbers name things, such as the tokens of a text: they stay as they are, also where
        they are the one input ``x``.
    key : optional
        Any ``json`` value that determines the content (checksums of the source, flags). A preparation with the same
        key continues an interrupted one; without a key it starts again.
    comm, progress : GridComm, callable, optional
        The ranks that write (`hpc_bnn.comm.connect_for_files`); what wraps this rank's files, for a progress bar.
    """
    comm = comm or GridComm(Grid(1, 1, 0))
    directory = Path(directory)
    sources = {split: _as_examples(examples) for split, examples in splits.items()}
    with comm.agree("looking at the first example"):
        ids = tuple(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else (ids,)
        num_classes, ignore_index = _whole("num_classes", num_classes), _whole("ignore_index", ignore_index)
        examples_per_shard = _whole("examples_per_shard", examples_per_shard)
        details = _as_json("details", details or {})
        key = _as_json("key", key)
        missing_targets = bool(missing_targets)
        if isinstance(compression, str) and compression not in h5py.filters.encode:
            raise ConfigError(Fault("compression", compression, "h5py has no such filter", "Try gzip"))
        arrays = _look(sources, train_split, channels or {}, num_classes, ids)
        if examples_per_shard is None:
            examples_per_shard = max(1, SHARD_BYTES // sum(spec.num_bytes for spec in arrays.values()))
        _check_weights(target_weights, arrays["y"])
        named = _as_coordinates(coordinates or {}, sources, arrays)
        stored = {name: str(values.dtype) for name, values in named[train_split].items()}
        _check_missing(missing_targets, ignore_index, num_classes, arrays["y"])
        at_least(1, "Try 1000").check("examples_per_shard", examples_per_shard)
    if normalise_targets is None:
        normalise_targets = np.issubdtype(np.dtype(arrays["y"].dtype), np.floating)
    normalise_targets = bool(normalise_targets)
    plan = {
        "key": key,
        "name": name,
        "arrays": {array: asdict(spec) for array, spec in arrays.items()},
        "splits": {split: examples.num_examples for split, examples in sources.items()},
        "options": [num_classes, examples_per_shard, train_split, normalise_targets, compression, *ids],
        **({"missing": [missing_targets, ignore_index]} if missing_targets or ignore_index is not None else {}),
    }
    missing = np.nan if missing_targets else ignore_index
    if stored:
        plan["coordinates"] = {split: sha256_of_coordinates(of_split) for split, of_split in named.items()}
    with contextlib.ExitStack() as held:
        with comm.agree(f"opening {directory}"):
            if comm.grid.is_first("world"):
                directory.mkdir(parents=True, exist_ok=True)
                refuse_world_writable(directory, "the directory")
                held.enter_context(Lock(directory, "--output"))
                _open(directory, plan)
        wanted = (*(n for n in _inputs(arrays) if _is_normalised(n, arrays[n], ids)), *(["y"] * normalise_targets))
        tasks = []
        for split, examples in sources.items():
            for number, start in enumerate(range(0, examples.num_examples, examples_per_shard)):
                rows = range(examples.num_examples)[start : start + examples_per_shard]
                of_train = wanted if split == train_split else ()
                tasks.append(_Task(split, f"{split}-{number:05d}.h5", examples, rows, named[split], of_train))
        with comm.agree(f"writing {directory}"):
            options = directory, arrays, num_classes, compression, missing
            mine = [_finish(task, *options) for task in progress(tasks[comm.grid.rank :: comm.grid.world_size])]
        records = {r["file"]["file"]: r for of_rank in comm.gather_objects(mine) for r in of_rank}
        files = {split: [records[task.file] for task in tasks if task.split == split] for split in sources}
        manifest = Manifest(
            name=name,
            source=source,
            licence=licence,
            arrays=arrays,
            splits={split: tuple(ShardFile(**r["file"]) for r in of_split) for split, of_split in files.items()},
            statistics={a: _statistics(a, [r["moments"][a] for r in files[train_split]]) for a in wanted},
            num_classes=num_classes,
            target_weights=None if target_weights is None else np.asarray(target_weights).tolist(),
            details=details,
            key_sha256=sha256_of_key(key),
            coordinates=stored,
            missing_targets=missing_targets,
            ignore_index=ignore_index,
        )
        with comm.agree(f"replacing what is in {directory}"):
            if comm.grid.is_first("world"):
                manifest.check()
                _remove_former(directory)
        with comm.agree(f"naming the files of {directory}"):
            # Each rank its own, which NFS shows to it at once
            for task in tasks[comm.grid.rank :: comm.grid.world_size]:
                with contextlib.suppress(FileNotFoundError):  # an interrupted preparation has done this
                    os.replace(directory / PREPARATION / task.file, directory / task.file)
            sync_directory(directory)
        with comm.agree(f"writing {directory / MANIFEST}"):
            if comm.grid.is_first("world"):
                write_atomically(directory / MANIFEST, manifest.to_json())
                shutil.rmtree(directory / PREPARATION)
        return manifest


def sha256_of_key(key: Any) -> str | None:
    """Return the form in which a manifest holds the key of its preparation."""
    return None if key is None else sha256_of_json({"key": key})


# --- the plan ------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """A file to write."""

    split: str
    file: str
    examples: Examples
    rows: range
    coordinates: Arrays
    """Of all examples of the split."""
    wanted: Collection[str]
    """Arrays whose moments are wanted."""


def _as_examples(examples: tuple[Any, ...] | Examples) -> Examples:
    if isinstance(examples, Examples):
        return examples
    if not (isinstance(examples, (tuple, list)) and len(examples) in (2, 3)):
        rule = f"a split is {type(examples).__name__}, and (x, y), (x, y, weights) or Examples is needed"
        raise DataError(f"{rule}. data_prep/arrays.py and --data.dataset read a Dataset of torch")
    named = {name: _as_array(name, array) for name, array in named_arrays(*examples).items()}
    rest = list(named)[list(named).index("y") :]
    if len({len(array) for array in named.values()}) > 1:
        counts = " and ".join(f"{len(array)} {name}" for name, array in named.items())
        raise DataError(f"there are {counts}: as many as examples are needed")

    def read(start: int, stop: int) -> tuple[Any, ...]:
        rows = {name: array[start:stop] for name, array in named.items()}
        return inputs_of(rows), *(rows[name] for name in rest)

    return Examples(len(named["y"]), read)


def _whole(name: str, value: Any) -> int | None:
    """Return a whole number of any library as one of Python."""
    try:
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ConfigError(Fault(name, value, "must be a whole number", "Write int(...) around it")) from error


def _as_json(name: str, value: Any) -> Any:
    """Return what JSON makes of a value; numbers of NumPy and torch are those of Python."""
    try:
        return json.loads(json.dumps(value, default=operator.methodcaller("tolist")))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        remedy = "Use dicts, lists, numbers and texts"
        raise DataError(f"{name} cannot be written as JSON ({error}). {remedy}") from error


def _as_array(name: str, given: Any) -> np.ndarray:
    """Return what a user gives for an array of numbers; `DataError` with the way where it is none."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = "Of a tensor give x.detach().float().numpy(), dense; fill up rows of unlike lengths"
        raise DataError(f"{name} cannot become an array of NumPy ({error}). {remedy}") from error
    if array.ndim == 0 or array.dtype.kind in "OUS":
        what = f"an array of dtype {array.dtype}" if array.ndim else type(given).__name__
        raise DataError(
            f"{name} is {what}: numbers [n, ...] of one dtype are needed. Of a table of pandas fill in what is missing, make "
            "numbers of words, as pandas.factorize does, and give table.to_numpy(float)"
        )
    return array


def _as_coordinates(given: dict[str, dict[str, Any]], sources: dict[str, Examples], arrays: dict[str, ArraySpec]):
    """Return the coordinates of every split in the form of the manifest: texts are as wide as the longest of all splits."""
    found = {
        split: {name: np.asarray(without_mask(name, values)) for name, values in given.get(split, {}).items()}
        for split in sources
    }
    names = [list(of_split) for of_split in found.values()]
    if given.keys() - sources.keys() or any(of_split != names[0] for of_split in names):
        raise DataError(f"coordinates are {given.keys()} with {names}: give all splits the same, in one order")
    for name in names[0]:
        parts = {split: of_split[name] for split, of_split in found.items()}
        kinds = {part.dtype.kind for part in parts.values()}
        if kinds == {"O"} and all(isinstance(v, datetime) for part in parts.values() for v in part):
            parts = {split: np.array([_in_utc(v) for v in part], "datetime64[us]") for split, part in parts.items()}
        elif kinds <= set("OU"):  # what is neither time nor number, such as dates of other calendars
            for split, part in parts.items():
                lacks = [not isinstance(v, str) and str(v) in ("None", "nan", "<NA>", "NaT") for v in part.tolist()]
                if any(lacks):
                    raise DataError(f"{split}, example {lacks.index(True)}: the coordinate {name} has no text")
            parts = {split: np.char.encode(part.astype(str), "utf-8") for split, part in parts.items()}
        elif kinds == {"M"}:
            parts = {split: part.astype("datetime64[us]") for split, part in parts.items()}
        dtype = np.dtype(np.result_type(*parts.values())).newbyteorder("=")
        dtype = np.dtype("S1") if dtype == np.dtype("S") else dtype
        for split, part in parts.items():
            rule = "a coordinate needs a name of its own, and a time, number or text for each example"
            is_right = part.shape == (sources[split].num_examples,) and (part.dtype.kind == dtype.kind)
            if not (is_right and is_coordinate(name) and name not in arrays and COORDINATE.fullmatch(str(dtype))):
                raise DataError(f"{split}: the coordinate {name} is {part.dtype} {part.shape}: {rule}")
            if part.dtype.kind == "M" and np.isnat(part).any():
                raise DataError(f"{split}, example {int(np.isnat(part).argmax())}: the coordinate {name} has no time")
            found[split][name] = part.astype(dtype)
    return found


def _in_utc(time: datetime) -> datetime:
    return time if time.tzinfo is None else time.astimezone(timezone.utc).replace(tzinfo=None)


def _inputs(arrays: Iterable[str]) -> list[str]:
    """Return the names before y."""
    return list(itertools.takewhile(lambda name: name != "y", arrays))


def _has_weights(arrays: dict[str, ArraySpec]) -> bool:
    return next(reversed(arrays)) == "weights"


def _is_normalised(name: str, spec: ArraySpec, ids: Collection[str]) -> bool:
    """Whether an input gets mean 0 and standard deviation 1."""
    return name not in ids and (name == "x" or np.issubdtype(np.dtype(spec.dtype), np.floating))


def _native(array: Any) -> np.ndarray:
    """Return an array in the order of bytes of this machine, without gaps."""
    return np.ascontiguousarray(array, np.asarray(array).dtype.newbyteorder("="))


def _look(
    sources: dict[str, Examples],
    train_split: str,
    channels: dict[str, Iterable[str]],
    num_classes: int | None,
    ids: Collection[str],
) -> dict[str, ArraySpec]:
    if train_split not in sources or sources[train_split].num_examples == 0:
        raise DataError(f"the split '{train_split}' has no examples: statistics come from it")
    for split in sources:
        if not split.replace("_", "").replace("-", "").isalnum():
            raise DataError(f"a split is named '{split}': use letters, digits, - and _")
    arrays = {}
    for name, array in named_arrays(*sources[train_split].read(0, 1)).items():
        array = _native(_as_array(name, array))
        names = tuple(channels.get(name, ()))
        if names and len(names) != array.shape[1]:
            raise DataError(f"{name} has {array.shape[1]} channels and {len(names)} names")
        arrays[name] = ArraySpec(array.shape[1:], str(array.dtype), names)
        torch_dtype(arrays[name].dtype)
        if array.dtype.kind not in ("iu" if name in ids else "biuf"):
            kind = "ids are whole" if name in ids else "real"
            raise DataError(f"{name} has dtype {array.dtype}: {kind} numbers are needed")
    for name in _inputs(arrays):
        if _is_normalised(name, arrays[name], ids) and arrays[name].shape == ():
            raise DataError(f"an input {name} is a single number: give it a channel, {name} of shape [n, 1]")
    if unknown := [str(name) for name in ids if name not in _inputs(arrays)]:
        raise DataError(f"ids are {', '.join(unknown)}, and the inputs {', '.join(_inputs(arrays))}: name some of them")
    if num_classes is not None and np.dtype(arrays["y"].dtype).kind not in "iu":
        raise DataError(f"classes y have dtype {arrays['y'].dtype}: they must be whole numbers")
    if _has_weights(arrays) and (arrays["weights"].shape, np.dtype(arrays["weights"].dtype).kind) != ((), "f"):
        raise DataError("weights of examples must be one floating-point number for each, [n]")
    return arrays


def _check_weights(weights: np.ndarray | None, y: ArraySpec) -> None:
    if weights is None:
        return
    weights = np.asarray(without_mask("target_weights", weights))
    try:
        np.broadcast_to(weights, y.shape)
    except ValueError:
        raise DataError(
            f"target_weights have shape {weights.shape} and do not broadcast to targets {y.shape}: "
            "give [latitudes, 1] for [channels, latitudes, longitudes]"
        ) from None
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise DataError("target_weights must be finite, 0 or more, and not all 0")


def _check_missing(missing_targets: bool, ignore_index: int | None, num_classes: int | None, y: ArraySpec) -> None:
    if missing_targets and (num_classes is not None or np.dtype(y.dtype).kind != "f"):
        remedy = "give numbers, or ignore_index for classes"
        raise DataError(f"missing_targets are NaN, and targets are {y.dtype}: {remedy}")
    if ignore_index is not None and (num_classes is None or 0 <= ignore_index < num_classes):
        rule = "must be none of the classes 0..num_classes - 1, such as -1 or 255"
        raise DataError(f"ignore_index {ignore_index} {rule}")


def _open(directory: Path, plan: dict) -> None:
    """Make the directory ready: keep an interrupted preparation of the same plan, remove any other."""
    notes = directory / PREPARATION / "plan.json"
    for place in (directory, notes.parent):
        remove_leftovers(place, OURS)
    # The plan alone says what the files hold, in this format
    plan = json.loads(json.dumps(plan | {"digest": sha256_of_json(plan)}))
    former = None
    with contextlib.suppress(ValueError):
        former = json.loads(read_bytes(notes, "the plan") or b"")
    if plan["key"] is not None and former == plan:
        return
    if read_bytes(directory / MANIFEST, "the manifest") is None:  # some of its files may have their names already
        for path in notes.parent.glob("*.h5.json"):
            (directory / path.name.removesuffix(".json")).unlink(missing_ok=True)
    shutil.rmtree(notes.parent, ignore_errors=True)
    notes.parent.mkdir()
    write_atomically(notes, json.dumps(plan))


def _remove_former(directory: Path) -> None:
    """Remove the shards that complete new ones are for."""
    doomed = [STAGED, MANIFEST]  # without its mark nothing takes the files for staged ones
    with contextlib.suppress(DataError):
        doomed += [shard.file for shard in Manifest.read(directory).shards]
    for file in doomed:
        (directory / file).unlink(missing_ok=True)


# --- one file ------------------------------------------------------------------------------------------


def _finish(
    task: _Task, directory: Path, arrays: dict[str, ArraySpec], num_classes: int | None, compression: str | None,
    missing: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Write a file unless a former preparation has finished it; return its record. ``missing`` stands for no target."""
    path, notes = directory / PREPARATION / task.file, directory / PREPARATION / f"{task.file}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        record, digest = json.loads(read_bytes(notes, "the record") or b"")
        is_sound = digest == sha256_of_json(record) and record["file"]["file"] == task.file
        if is_sound and sha256_of_file(path if path.exists() else directory / task.file) == record["file"]["sha256"]:
            return record
    rows = task.rows
    read = named_arrays(*task.examples.read(rows.start, rows.stop))
    if read.keys() != arrays.keys():
        raise DataError(f"{task.split}: the inputs are {', '.join(read)}, and {', '.join(arrays)} are expected")
    found = {name: _native(read[name]) for name in arrays}
    y = found["y"]
    for name, array in found.items():
        shape, dtype = (len(rows), *arrays[name].shape), arrays[name].dtype
        if (array.shape, str(array.dtype)) != (shape, dtype):
            raise DataError(
                f"{task.split}, examples {rows[0]} to {rows[-1]}: {name} is {array.dtype} {array.shape}, "
                f"and {dtype} {shape} is expected"
            )
        if array.dtype.kind == "f":
            is_wrong, may_lack = ~np.isfinite(array), name == "y" and missing is not None
            if may_lack:
                is_wrong &= ~np.isnan(array)
            if is_wrong.any():
                remedy = ". missing_targets=True takes NaN for a missing target" if name == "y" and not may_lack else ""
                row = rows[_first(is_wrong)]
                raise DataError(f"{task.split}, example {row}: {name} holds a value that is not finite{remedy}")
    if num_classes is not None and (is_wrong := ((y < 0) | (y >= num_classes)) & (y != missing)).any():
        row = rows[_first(is_wrong)]
        raise DataError(f"{task.split}, example {row}: class {y[is_wrong][0]} is not in 0..{num_classes - 1}")
    if _has_weights(arrays) and (is_wrong := found["weights"] < 0).any():
        raise DataError(f"{task.split}, example {rows[_first(is_wrong)]}: its weight is below 0")
    crc32 = crc32_of_examples(found, range(len(rows)))
    with replacing(path) as temporary:
        coordinates = {name: values[rows.start : rows.stop] for name, values in task.coordinates.items()}
        stored = {n: c.view(np.int64) if c.dtype.kind == "M" else c for n, c in coordinates.items()}
        with Disk(temporary) as disk, h5py.File(disk, "w", libver="earliest") as file:
            for name, array in {**found, "crc32": crc32, **stored}.items():
                length = min(len(array), max(1, CHUNK_BYTES // max(array[:1].nbytes, 1)))
                chunks = (length, *array.shape[1:])
                filters = {"fletcher32": True, "compression": compression, "shuffle": bool(compression)}
                file.create_dataset(name, data=array, chunks=chunks, **filters)
        num_bytes, sha256 = temporary.stat().st_size, sha256_of_file(temporary)
    digest = sha256_of_coordinates(coordinates) if coordinates else ""
    file = ShardFile(task.file, len(rows), num_bytes, sha256, hashlib.sha256(crc32.tobytes()).hexdigest(), digest)
    moments = {name: _moments(found[name], name == "y" and missing is not None) for name in task.wanted}
    record = {"file": asdict(file), "moments": moments}
    write_atomically(notes, json.dumps([record, sha256_of_json(record)]))
    return record


def _first(is_wrong: np.ndarray) -> int:
    """Return the number of the first of the examples [n, ...] with a wrong value."""
    return int(np.argmax(is_wrong.reshape(len(is_wrong), -1).any(1)))


# --- statistics ----------------------------------------------------------------------------------------


def _moments(array: np.ndarray, may_lack: bool = False) -> dict[str, Any]:
    """Return number, mean and sum of squared differences per channel of [n, channels, ...] or [n], but for NaN."""
    flat = array.reshape(len(array), array.shape[1] if array.ndim > 1 else 1, -1)
    count: Any = flat.shape[0] * flat.shape[2]
    if may_lack:
        count = (~np.isnan(flat)).sum(axis=(0, 2))
        mean = np.nansum(flat, axis=(0, 2), dtype=np.float64) / np.maximum(count, 1)
    else:
        mean = flat.mean(axis=(0, 2), dtype=np.float64)
    shift, squares = np.zeros_like(mean), np.zeros_like(mean)
    for example in flat:  # one after another: without a second array as large
        rest = example - mean[:, None]
        if may_lack:
            rest[np.isnan(rest)] = 0
        shift += rest.sum(axis=1)
        squares += np.square(rest).sum(axis=1)
    shift /= np.maximum(count, 1)  # what the rounding of a large sum has left
    number = count.tolist() if may_lack else count  # of each channel
    return {"count": number, "mean": (mean + shift).tolist(), "squares": (squares - count * shift**2).tolist()}


def _statistics(name: str, moments: list[dict[str, Any]]) -> Statistics:
    """Join the moments of an array in all files, in order (Chan, Golub, LeVeque, 1979); the same on all ranks."""
    count: Any = 0
    mean, squares = np.zeros(1), np.zeros(1)
    for added in moments:
        shift, number = np.array(added["mean"]) - mean, added["count"]
        number = np.array(number, np.float64) if isinstance(number, list) else number
        total = count + number
        of = total if isinstance(total, int) else np.maximum(total, 1)  # a channel may have nothing here
        squares = squares + np.array(added["squares"]) + shift**2 * (count * number / of)
        mean = mean + shift * (number / of)
        count = total
    if not np.all(count):
        lacking = ", ".join(map(str, np.flatnonzero(np.equal(count, 0))))
        raise DataError(f"{name}: channel {lacking} has no target in the training split. Leave it out")
    std = np.sqrt(np.maximum(squares, 0) / count)
    if not np.isfinite([mean, std]).all():
        rule = "its numbers are so large that their mean or standard deviation overflows"
        raise DataError(f"{name}: {rule}. Look for values that stand for missing ones, or use other units")
    std[std <= ROUNDING * np.abs(mean)] = 0.0
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()))
