"""Predictions as a table of text: a row per example. Local."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from ..safe_files import replacing

ROWS = 4096
"""Rows that are read at once."""

ORDER = (
    "y", "class", "mean", "std", "aleatoric_std", "epistemic_std", "probabilities", "entropy", "mutual_information",
    "calibrated_probabilities", "in_set", "calibrated_std", "lower", "upper", "quantiles", "calibrated_quantiles",
    "members",
)  # fmt: skip
"""Datasets of predictions, as the columns follow each other."""

IN_NATS = ("entropy", "mutual_information")


def write_csv(predictions: Path, path: Path) -> None:
    """Write predictions of ``hpc-bnn predict``, without dims of fields, as CSV. Local; it raises `FileExistsError`, `OSError`.

    The first line has the names: ``example``, the coordinates of the examples, and of each dataset a column for each place,
    ``quantiles/0.05/t2m [K]``, with units where the shards have them. Numbers have the digits of their dtype; a missing one is
    an empty cell. Times are ISO 8601.
    """
    with h5py.File(predictions) as file, replacing(path, overwrites=False) as temporary:
        datasets: Any = file
        names = [name for name in ORDER if name in file]
        beside = str(datasets[names[0]].attrs.get("coordinates", "")).split()
        beside = [name for name in beside if [scale[0].name for scale in datasets[name].dims] == ["/example"]]
        units = dict(zip(file.attrs.get("channels", ()), file.attrs.get("channel_units", ())))
        header = ["example", *beside, *(title for name in names for title in _titles(datasets[name], units))]
        with open(temporary, "w", encoding="utf-8", newline="") as text:
            table = csv.writer(text, lineterminator="\n")
            table.writerow(header)
            for start in range(0, len(datasets[names[0]]), ROWS):
                parts = [datasets[name] for name in ("example", *beside, *names)]
                columns = [column for part in parts for column in _columns(part, start)]
                table.writerows(zip(*columns, strict=True))


def _titles(dataset: Any, units: dict[str, str]) -> Iterator[str]:
    """Yield the names of the columns of a dataset."""
    name = dataset.name.lstrip("/")
    scales = [scale[0] for scale in list(dataset.dims)[1:]]
    labels = [[str(v) for v in (s.asstr()[()] if h5py.check_string_dtype(s.dtype) else s[()])] for s in scales]
    last = scales[-1].name if scales else ""
    if last == "/target" and len(labels[-1]) == 1:
        labels.pop()
    for place in itertools.product(*labels):
        unit = units.get(place[-1], "") if last == "/channel" else "nats" if name in IN_NATS else ""
        yield "/".join((name, *place)) + (f" [{unit}]" if unit else "")


def _columns(dataset: Any, start: int) -> list[list[str]]:
    """Return the cells of some rows of a dataset, by column."""
    if h5py.check_string_dtype(dataset.dtype):
        return [list(dataset.asstr()[start : start + ROWS])]
    values = dataset[start : start + ROWS]
    if str(dataset.attrs.get("units", "")).startswith("microseconds since 1970"):
        values = values.view("datetime64[us]")
        whole = values.astype("datetime64[s]")
        values = whole if (whole == values).all() else values
    flat, missing = values.reshape(len(values), -1).T, dataset.attrs.get("_FillValue")
    return [["" if value != value or value == missing else str(value) for value in column] for column in flat]
