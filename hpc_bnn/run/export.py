"""Predictions of a trained network for a data set, streamed to HDF5."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..comm import GridComm
from ..data import Source
from ..data.manifest import Manifest, sha256_of_file
from ..errors import ConfigError, DataError, Fault, above_and_below
from ..grid import share
from ..likelihoods import Likelihood
from ..predictive import Calibration, ClassPredictive, Predictive, ValuePredictive, predict_dataset
from ..safe_files import Disk, is_plain, publish
from .calibrate import read_calibration
from .csv_table import write_csv
from .experiment import Experiment, logger

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
OTHERS = (
    ".tsv", ".txt", ".json", ".parquet", ".feather", ".xlsx", ".xls", ".npy", ".npz", ".pkl", ".zarr", ".gz", ".zip",
)  # fmt: skip
"""Suffixes of what predictions are not."""


def predict_run(
    experiment: Experiment,
    split: str,
    output: str | os.PathLike,
    *,
    quantiles: Sequence[float] = QUANTILES,
    with_members: bool = False,
    with_truth: bool = True,
    calibrated: bool = False,
) -> Path:
    """Write the predictive of a split of ``config.data.shards`` to an HDF5 file, block by block, or to a table as CSV.

    Collective over the world. The first rank of each sample group writes. Where h5py has parallel HDF5 all write into
    one file; otherwise each data group has a file of its own, and OUTPUT shows them as one (virtual datasets). The name of
    a part holds a number of this prediction alone, OUTPUT its size and SHA-256 (`verify_predictions`); a part that is
    missing reads as NaN, and -1 for a class.

    Rows are in the order of the split; numbers are in units of y. Dimensions have names and coordinates, as netCDF-4 has
    them: ``example``, ``category``, ``channel`` or ``target``, ``latitude``, ``longitude``, ``horizon``, ``quantile``,
    ``member``.

    ===========================================  =====================================================================
    classes (C), numbers ([targets, ...])        over the samples
    ===========================================  =====================================================================
    ``probabilities`` [N, C, ...]                mean of the class probabilities; ``class`` [N, ...] its largest
    ``mean``, ``std`` [N, targets, ...]          of the predictive
    ``std`` [N, C, ...]                          standard deviation of the class probabilities
    ``entropy``, ``mutual_information`` [N, ...] total and epistemic uncertainty (nats)
    ``aleatoric_std``, ``epistemic_std``         the parts of ``std`` of numbers
    ``quantiles`` [N, Q, ...]                    of the class probabilities, or of the predictive of each target
    ``members`` [N, K, ...]                      class probabilities, or means, of each sample, on request
    ``y`` [N, ...]                               the targets
    ``time`` [N] and other coordinates           of the examples, where the shards have them; ``lead_time`` (seconds)
    ``calibrated_probabilities`` [N, C]          on request: at the temperature of the calibration
    ``in_set`` [N, C]                            1 where a class is in the set of the calibration, else 0
    ``lower``, ``upper`` [N, targets, ...]       ends of the interval of the calibration
    ``calibrated_std``, ``calibrated_quantiles`` as ``std`` and ``quantiles``, with the noise scale of the calibration
    ===========================================  =====================================================================

    Parameters
    ----------
    output : path
        File to write; it must not be there. The suffix ``.csv`` writes a table with a row per example (`write_csv`), for targets
        that are no fields; its HDF5 file lies beside it, hidden, until the table is complete.
    quantiles : sequence of float
        Levels between 0 and 1; without any none are written.
    with_members, with_truth, calibrated : bool
        Whether every sample is written, the targets, and what RUN_DIR/calibration.json says (`read_calibration`).
    """
    comm, path = experiment.comm, Path(output)
    if path.suffix.lower() in OTHERS:
        rule = "predictions are written as HDF5, which netCDF-4 is, or as a table of text"
        raise ConfigError(Fault("--output", path, rule, "Name it .h5, .nc or .csv", "output"))
    if path.suffix.lower() == ".csv":
        options = {"with_members": with_members, "with_truth": with_truth, "calibrated": calibrated}
        return _predict_table(experiment, split, path, quantiles=quantiles, **options)
    quantiles = check_levels(quantiles, experiment.likelihood, "--quantiles")
    with comm.agree(f"opening {path}"), _as_data_error(path):
        if comm.grid.is_first("world"):
            check_is_free(path)
            path.parent.mkdir(parents=True, exist_ok=True)
    calibration = read_calibration(experiment, experiment.config.num_test_samples) if calibrated else None
    dataset = experiment.open(split)
    blocks = predict_dataset(
        experiment.posterior,
        experiment.likelihood,
        comm,
        dataset,
        **experiment.test_samples,
        **what_is_kept(experiment.likelihood, quantiles, with_members, calibration),
        with_targets=False,
    )
    dtype = np.float64 if experiment.is_wide else np.float32
    attributes = {
        "run_dir": str(experiment.run_dir),
        "run": experiment.checkpoints.identity or "",
        "num_steps": experiment.num_steps,
        "shards": experiment.config.data.dataset or experiment.config.data.shards,
        "split": split,
        "num_samples": experiment.config.num_test_samples,
        "seed": experiment.config.seed,
        "quantile_levels": np.array(quantiles, dtype=np.float64),
        "channels": [str(name) for name in experiment.manifest.arrays["y"].channels],
        "hpc_bnn": __version__,
    }
    if units := experiment.manifest.details.get("units"):  # by variable: t of t@850 and of t@850 t+6
        attributes["channel_units"] = [str(units.get(re.split("@| t[+]", n)[0], "")) for n in attributes["channels"]]
    if calibration is not None:
        of_file = ("method", "level", "num_examples")
        attributes |= {f"calibration_{name}": getattr(calibration, name) for name in of_file}
        if calibration.temperature is not None:
            attributes |= {"temperature": calibration.temperature, "calibration_sets": calibration.score}
        if calibration.noise_factors is not None:
            attributes["noise_factors"] = calibration.noise_factors.numpy()
    with_truth = with_truth and has_truth(experiment, dataset)
    rows = dims_of_rows(experiment, dataset.manifest, quantiles, with_members, with_truth, calibration)
    with comm.agree(f"reading the coordinates of {split}"):
        beside = dataset.coordinates(range(len(dataset))) if comm.grid.is_first("world") else {}
    beside = {name: ((_EXAMPLE,), values) for name, values in beside.items()} | _lead_times(experiment, rows)
    ignored = getattr(experiment.likelihood, "ignore_index", None)
    with experiment.watch, _Output(path, comm, len(dataset), rows, beside, dtype, attributes, ignored) as file:
        for block in blocks:
            experiment.watch.mark()
            columns = columns_of(block.predictive, quantiles, with_members, calibration)
            if "y" in rows:
                columns["y"] = block.y
                if isinstance(block.predictive, ValuePredictive):
                    columns["y"] = experiment.likelihood.targets(dataset.in_units(block.y), block.predictive.mean)
            file.write(int(block.examples[0]), columns)
    return path


def _predict_table(experiment: Experiment, split: str, path: Path, **options: Any) -> Path:
    """Write predictions as CSV. Collective over the world."""
    comm = experiment.comm
    with comm.agree(f"opening {path}"):
        if places := _dims_of_places(experiment, experiment.manifest):
            rule = f"the targets have the dims {', '.join(dim.name for dim in places)}, and a table has one row per example"
            raise ConfigError(Fault("--output", path, rule, "Name a file that ends in .h5"))
        if comm.grid.is_first("world"):
            check_is_free(path)
    hidden = path.with_name(f".{path.stem}-{comm.broadcast_object(secrets.token_hex(8))}.h5")
    predict_run(experiment, split, hidden, **options)
    with comm.agree(f"writing {path}"), _as_data_error(path):
        if comm.grid.is_first("world"):
            with contextlib.ExitStack() as parts:
                parts.callback(hidden.unlink)
                with h5py.File(hidden) as file:
                    for name, _, _ in json.loads(str(file.attrs["parts"])):
                        parts.callback(hidden.with_name(name).unlink)
                try:
                    write_csv(hidden, path)
                except FileExistsError:
                    raise is_there(path) from None
    return path


def verify_predictions(path: str | os.PathLike) -> list[str]:
    """Return a sentence for each part that is not as a file of predictions says; `DataError` if unreadable. Local."""
    path = Path(path)
    try:
        with h5py.File(path) as file:
            parts = json.loads(str(file.attrs["parts"]))
            problems = []
            for name, num_bytes, sha256 in parts:
                part = path.with_name(name) if is_plain(name) else None
                if part is None or not part.exists():
                    rule = "which is missing: its rows read as NaN. Copy it, too"
                    problems.append(f"{path} needs {name} beside it, {rule}")
                elif part.stat().st_size != num_bytes or sha256_of_file(part) != sha256:
                    problems.append(f"{part} is not the part that {path} was written with (SHA-256). Predict again")
            for dataset in () if parts else file.values():
                dataset[()]  # each chunk has a checksum
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} holds no predictions, or cannot be read ({error})") from error
    return problems


def check_is_free(path: Path) -> None:
    """Raise `ConfigError` where an output would be overwritten. Local."""
    if os.path.lexists(path):
        raise is_there(path)


def is_there(path: Path) -> ConfigError:
    """Return the error that an output would be overwritten. Local."""
    return ConfigError(Fault("--output", path, "it is there already", "Remove it, or name another"))


class Dim(NamedTuple):
    """A dimension of the datasets: its name, and what stands for its places, in some units."""

    name: str
    values: Sequence[Any]
    units: str = ""


_EXAMPLE = "example"
_SINCE_1970 = {"units": "microseconds since 1970-01-01", "calendar": "proleptic_gregorian"}
Beside = dict[str, tuple[tuple[str, ...], np.ndarray]]
"""Coordinates that are no dims, by name: their dims, and their values."""


def _lead_times(experiment: Experiment, rows: dict[str, tuple[Dim, ...]]) -> Beside:
    """Return from which time to which the predictions reach (seconds): of all, or of each channel."""
    seconds = np.array(experiment.manifest.details.get("lead_seconds", ()), np.float64)
    dims = {dim.name: len(dim.values) for of_row in rows.values() for dim in of_row}
    if seconds.ndim and seconds.shape != (dims.get("channel"),):
        return {}
    return {"lead_time": (("channel",) * seconds.ndim, seconds)}


def has_truth(experiment: Experiment, dataset: Source) -> bool:
    """Whether the targets of a data set are what the network predicts; if not, rank 0 says it. Local."""
    try:
        experiment.check_targets(dataset, f"the truth of {dataset.manifest.name} is left out")
    except DataError as error:
        if experiment.is_writer:
            logger.warning("%s", error)
        return False
    return True


def dims_of_rows(
    experiment: Experiment,
    manifest: Manifest,
    quantiles: Sequence[float],
    with_members: bool,
    with_truth: bool,
    calibration: Calibration | None = None,
) -> dict[str, tuple[Dim, ...]]:
    """Return the dimensions of a row of each dataset of `predict_run`; the manifest is of the data that are predicted. Local."""
    likelihood, rows = experiment.likelihood, {}
    if likelihood.num_classes is not None:
        classes = experiment.manifest.details.get("classes", [])
        named = classes if len(classes) == likelihood.num_classes else range(likelihood.num_classes)
        truth = _dims_of_places(experiment, manifest)
        one = (Dim("category", named), *truth)
        rows |= {"probabilities": one, "std": one} | dict.fromkeys(("class", "entropy", "mutual_information"), truth)
    else:
        channels, first = experiment.manifest.arrays["y"].channels, likelihood.num_targets
        targets = Dim("channel", channels) if len(channels) == first else Dim("target", range(first))
        one = truth = (targets, *_dims_of_places(experiment, manifest))
        rows |= dict.fromkeys(("mean", "std", "aleatoric_std", "epistemic_std"), one)
    if calibration is not None:
        rows |= dict.fromkeys(("lower", "upper") if "mean" in rows else ("calibrated_probabilities", "in_set"), one)
        rows |= {} if calibration.noise_factors is None else {"calibrated_std": one}
    if quantiles:
        rows["quantiles"] = (Dim("quantile", quantiles), *one)
        rows |= {"calibrated_quantiles": rows["quantiles"]} if "calibrated_std" in rows else {}
    if with_members:
        rows["members"] = (Dim("member", range(experiment.config.num_test_samples)), *one)
    return rows | ({"y": truth} if with_truth else {})


def _dims_of_places(experiment: Experiment, manifest: Manifest) -> tuple[Dim, ...]:
    """Return the dimensions of the points of a target, with the coordinates that the preparation of the data has noted."""
    others, details = list(experiment.manifest.places), manifest.details
    latitudes, longitudes = details.get("latitudes", ()), details.get("longitudes", ())
    if others and others == [len(latitudes), len(longitudes)]:
        return Dim("latitude", latitudes, "degrees_north"), Dim("longitude", longitudes, "degrees_east")
    if others and others == [details.get("horizon")]:
        seconds = details.get("step_seconds")
        steps = [step * (seconds or 1) for step in range(1, others[0] + 1)]
        return (Dim("horizon", steps, "seconds" if seconds else "steps"),)
    return tuple(Dim(f"dim_{place}", range(extent)) for place, extent in enumerate(others, 1))


def check_levels(quantiles: Any, likelihood: Likelihood, flag: str) -> Sequence[float]:
    """Return the levels of the quantiles that a predictive has; `ConfigError` where one is none. Local."""
    try:
        quantiles = np.ravel(np.asarray(quantiles, np.float64)).tolist()
    except (TypeError, ValueError) as error:
        raise ConfigError(Fault(flag, quantiles, f"must be numbers ({error})", "Try [0.05, 0.95]")) from error
    for level in quantiles:
        above_and_below(0, 1, "Try 0.05").check(flag, level)
    return quantiles if likelihood.num_classes or likelihood.has_mixture else ()


def what_is_kept(
    likelihood: Likelihood, quantiles: Sequence[float], with_members: bool, calibration: Calibration | None
) -> dict[str, Any]:
    """Return the options of `predict_dataset` for what `columns_of` needs of each sample. Local."""
    needs_all = len(quantiles) > 0 or (calibration is not None and calibration.temperature is None)
    if likelihood.num_classes is not None:
        return {"keep_members": with_members or needs_all}
    return {"keep_members": with_members, "keep_share": needs_all}


def columns_of(
    predictive: Predictive, quantiles: Sequence[float], with_members: bool, calibration: Calibration | None = None
) -> dict[str, Tensor]:
    """Return the rows [B, ...] of each dataset, of those that need all members where they are.

    Local; quantiles of numbers as `ValuePredictive.quantile`.
    """
    if isinstance(predictive, ClassPredictive):
        columns = {
            "probabilities": predictive.probabilities,
            "std": predictive.std,
            "class": predictive.probabilities.argmax(1),
            "entropy": predictive.entropy,
            "mutual_information": predictive.mutual_information,
        }
    else:
        columns = {
            "mean": predictive.mean,
            "std": predictive.variance.sqrt(),
            "aleatoric_std": predictive.aleatoric_variance.sqrt(),
            "epistemic_std": predictive.epistemic_variance.sqrt(),
        }
    if calibration is not None:
        columns |= calibration.columns_of(predictive, quantiles)
    if with_members and predictive.members is not None:
        columns["members"] = predictive.members
    if quantiles and isinstance(predictive, ValuePredictive):
        columns["quantiles"] = torch.stack([predictive.quantile(level) for level in quantiles], 1)
    elif quantiles and predictive.members is not None:
        levels = torch.tensor(quantiles, dtype=torch.float64, device=predictive.members.device)
        columns["quantiles"] = predictive.members.quantile(levels, dim=1).movedim(0, 1)
    return columns


class _Output:
    """The file, as the ranks of a job write it; nothing stands under its name before it is complete.

    Collective over the world in construction and at the end of the context; `write` is Local.
    """

    def __init__(
        self,
        path: Path,
        comm: GridComm,
        num_rows: int,
        rows: dict[str, tuple[Dim, ...]],
        beside: Beside,
        dtype: type,
        attributes: dict[str, object],
        ignored: int | None = None,
    ):
        self.path, self.comm, self.num_rows, self.attributes, self._beside = path, comm, num_rows, attributes, beside
        self._ignored = ignored
        dtypes, self._dims = {"class": np.int64, "y": np.int64, "in_set": np.int8} if "class" in rows else {}, rows
        self._rows = {
            name: (tuple(len(dim.values) for dim in dims), np.dtype(dtypes.get(name, dtype)))
            for name, dims in rows.items()
        }
        grid = comm.grid
        self._is_shared = comm.world_comm is not None and grid.world_size > 1 and h5py.get_config().mpi
        num_files = 1 if self._is_shared else grid.data_size
        self._spans = [share(num_rows, num_files, number) for number in range(num_files)]
        self._token = comm.broadcast_object(secrets.token_hex(8))
        self._files = [path]
        if num_files > 1:  # of this prediction alone: another one of the same name has other parts
            stem = f"{path.stem}-{self._token}"
            self._files = [path.with_name(f"{stem}-{number:05d}{path.suffix}") for number in range(num_files)]
        mine = 0 if self._is_shared else grid.data_index
        self._span, self._mine = self._spans[mine], self._temporary(self._files[mine])
        self._writes, self._has_name = grid.is_first("sample"), False
        self._opened = contextlib.ExitStack()
        self._disk: Disk | None = None
        self._datasets: dict[str, h5py.Dataset] = {}

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f".{path.name}.{self._token}")

    def __enter__(self) -> _Output:
        with self.comm.agree(f"opening {self.path}"), _as_data_error(self.path):
            if self._is_shared:
                self._create(h5py.File(self._mine, "w", driver="mpio", comm=self.comm.world_comm))
            elif self._writes:
                self._disk = self._opened.enter_context(Disk(self._mine))
                self._create(h5py.File(self._disk, "w"))
        return self

    def _create(self, file: h5py.File) -> None:
        self._opened.enter_context(file)
        num_rows = len(self._span)
        for name, (shape, dtype) in self._rows.items():
            # Chunks of about 1 MiB of whole rows; no checksums where several write: filters need them all at once
            rows = min(max(1, 2**20 // (math.prod(shape) * dtype.itemsize)), num_rows)
            options = {} if self._is_shared or not num_rows else {"chunks": (rows, *shape), "fletcher32": True}
            self._datasets[name] = file.create_dataset(
                name, (num_rows, *shape), dtype, fillvalue=_missing(dtype), **options
            )
        if self._mine == self._temporary(self.path) and not self._is_shared:
            self._describe(file)

    def _describe(self, file: h5py.File, parts: Sequence[tuple[str, int, str]] = ()) -> None:
        """Give the whole file its attributes, and its dimensions names and coordinates, as netCDF-4 has them. Local."""
        file.attrs.update(self.attributes | {"parts": json.dumps(parts)})
        scales: dict[str, h5py.Dataset] = {}
        datasets: Any = file
        for name, row in self._dims.items():
            for place, dim in enumerate((Dim(_EXAMPLE, range(self.num_rows)), *row)):
                if dim.name not in scales:
                    is_text = any(isinstance(value, str) for value in dim.values)
                    values = [str(value) if is_text else value for value in dim.values]
                    dtype = h5py.string_dtype() if is_text else None
                    scales[dim.name] = file.create_dataset(dim.name, data=np.array(values, dtype or None), dtype=dtype)
                    scales[dim.name].make_scale(dim.name)
                    if dim.units:
                        scales[dim.name].attrs["units"] = dim.units
                datasets[name].dims[place].attach_scale(scales[dim.name])
            if name == "y" and self._ignored is not None:
                datasets[name].attrs["_FillValue"] = datasets[name].dtype.type(self._ignored)
            if self._beside:
                datasets[name].attrs["coordinates"] = " ".join(self._beside)
        for name, (dims, values) in self._beside.items():
            is_time, is_text = values.dtype.kind == "M", values.dtype.kind == "U"
            stored = values.view(np.int64) if is_time else values.astype(h5py.string_dtype()) if is_text else values
            datasets[name] = stored
            datasets[name].attrs.update(_SINCE_1970 if is_time else {"units": "seconds"} if name == "lead_time" else {})
            for place, dim in enumerate(dims):
                datasets[name].dims[place].attach_scale(scales[dim])

    def write(self, first_row: int, columns: dict[str, Tensor]) -> None:
        """Write some rows of this rank's data group."""
        if not self._writes:
            return
        start = first_row - self._span.start
        with _as_data_error(self.path):
            for name, column in columns.items():
                self._datasets[name][start : start + len(column)] = column.cpu().numpy()
            if self._disk is not None:
                self._disk.check()

    def __exit__(self, kind, error, traceback) -> None:
        with contextlib.ExitStack() as failed:
            failed.callback(self._discard)
            if error is None:
                with self.comm.agree(f"writing {self.path}"), _as_data_error(self.path):
                    self._opened.close()
                    digest = sha256_of_file(self._mine) if self._writes and len(self._files) > 1 else ""
                digests = self.comm.gather_objects(digest)
                with self.comm.agree(f"writing {self.path}"), _as_data_error(self.path):
                    if self.comm.grid.is_first("world"):
                        self._complete(list(filter(None, digests)))
                failed.pop_all()

    def _discard(self) -> None:
        """Remove what this prediction has written; its names are its own."""
        with contextlib.suppress(Exception):
            self._opened.close()
        if self._writes:
            self._mine.unlink(missing_ok=True)
        if self.comm.grid.is_first("world"):
            self._temporary(self.path).unlink(missing_ok=True)
            for part in self._files if len(self._files) > 1 and not self._has_name else ():
                part.unlink(missing_ok=True)

    def _complete(self, digests: list[str]) -> None:
        """Give all their names, the file with everything last. Local: rank 0 calls it when all have closed theirs."""
        several, whole, parts = len(self._files) > 1, self._temporary(self.path), []
        if several:
            for part, digest in zip(self._files, digests, strict=True):
                parts.append((part.name, self._temporary(part).stat().st_size, digest))
                publish(self._temporary(part), part, overwrites=False)
        if self._is_shared:
            with h5py.File(whole, "a") as file:
                self._describe(file)
        if several:
            with Disk(whole) as disk, h5py.File(disk, "w") as file:
                for name, (shape, dtype) in self._rows.items():
                    layout = h5py.VirtualLayout((self.num_rows, *shape), dtype)
                    for source, span in zip(self._files, self._spans):
                        if len(span):
                            layout[span.start : span.stop] = h5py.VirtualSource(source.name, name, (len(span), *shape))
                    file.create_virtual_dataset(name, layout, fillvalue=_missing(dtype))
                self._describe(file, parts)
        self._has_name = True
        try:
            publish(whole, self.path, overwrites=False)
        except FileExistsError as error:
            self._has_name = False
            raise is_there(self.path) from error


def _missing(dtype: np.dtype) -> float | int:
    """Return what stands for a row that nobody has written."""
    return -1 if dtype.kind == "i" else math.nan


@contextlib.contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
        raise DataError(f"{path} cannot be written ({error}). Look at the disk and the rights") from error
