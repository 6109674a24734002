#!/usr/bin/env python3
"""Write weather fields as HDF5 shards: from the fields of some time steps, forecast those some steps later.

Source: NetCDF files with time, latitude and longitude, and GRIB files where cfgrib is installed. Several files may hold
further times or further variables. Nothing is held in memory but what a shard needs.

x is [n, channels, latitudes, longitudes] float32, oldest step first, with channels such as "z@500 t-1" and "z@500"; y is
[n, target channels, latitudes, longitudes] float32, --lead steps after the newest input. Latitudes run from north to
south; the targets are weighted by cos(latitude). The splits follow each other in time (--seed is not used), all steps
of an example lie in one split, and no example reaches over a gap in time. Ensemble members are further examples.

Known by their SHA-256: ERA5 2 m temperature over the British Isles, March 2019 (744 times), and ten ERA5 members on
1 and 2 January 2017 (4 times), both of the Copernicus Climate Change Service, free to use with attribution; ERA-Interim
monthly means (2 times) of ECMWF. Of other data state the --licence.

    python data_prep/weather.py --source era5_t2m_uk_2019-03.nc --history 2 --lead 6 --output data/t2m
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.data import Examples
from hpc_bnn.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    import xarray

ROLES = {  # usual names of the dims
    "time": ("time", "valid_time", "month"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
    "level": ("level", "isobaricInhPa", "pressure_level", "plev"),
    "member": ("member", "number", "realization"),
}
NEEDED = ("time", "latitude", "longitude")
COPERNICUS = "free to use with attribution: contains modified Copernicus Climate Change Service information"
KNOWN = {  # SHA-256: (name, source, licence)
    "fbb09d889699b29f99a3ff29972c32db9e95b9bc780e59a90ea012a6ec3d4cd7": (
        "era5-t2m-uk",
        "ERA5 hourly 2 m temperature, British Isles, March 2019 (github.com/pydata/xarray-data)",
        f"{COPERNICUS} 2019",
    ),
    "173977ef3b6a7cac140eba20ac72c2e32117bfd910852afd2795b398eafb73d0": (
        "era5-members",
        "ERA5 ensemble, geopotential and temperature, 1 and 2 January 2017 (github.com/ecmwf/cfgrib)",
        f"{COPERNICUS} 2017",
    ),
    "8f4cd0f75418a8e8f8f957c3b007f49e68a58d1bdd0e028adeeb057889f635d2": (
        "era-interim-uvz",
        "ECMWF, ERA-Interim monthly means, edited by F. Maussion (github.com/pydata/xarray-data)",
        "none stated; name ECMWF",
    ),
}


@dataclass(frozen=True)
class Channel:
    """A variable, at a level where it has levels."""

    variable: str
    level: str = ""
    position: int = 0
    """Of the level among those of the variable."""

    def __str__(self) -> str:
        return f"{self.variable}@{self.level}" if self.level else self.variable


@dataclass(frozen=True)
class Fields:
    """Variables of several files joined along time; nothing is read before it is asked for."""

    arrays: dict[str, list[xarray.DataArray]]
    """Of each variable, in order of time, from north to south."""
    dims: dict[str, str]
    """Names of the dims by role."""
    flipped: bool
    """Whether the source has its latitudes from south to north."""

    def coordinate(self, role: str, variable: str | None = None) -> np.ndarray:
        """Return the coordinate of a variable (of any one by default), joined where it is time."""
        arrays = self.arrays[variable or next(iter(self.arrays))]
        if self.dims[role] not in arrays[0].dims:
            return np.empty(0)
        arrays = arrays if role == "time" else arrays[:1]
        return np.concatenate([array[self.dims[role]].values for array in arrays])

    @property
    def num_members(self) -> int:
        return len(self.coordinate("member")) or 1

    def read(self, channels: list[Channel], first: int, stop: int) -> np.ndarray:
        """Return fields [times, members, channels, latitudes, longitudes] float32 of the times first..stop-1."""
        grid = len(self.coordinate("latitude")), len(self.coordinate("longitude"))
        fields = np.empty((stop - first, self.num_members, len(channels), *grid), np.float32)
        for variable in {channel.variable for channel in channels}:
            rows = [row for row, channel in enumerate(channels) if channel.variable == variable]
            positions = [channels[row].position for row in rows]
            end = 0
            for array in self.arrays[variable]:
                begin, end = end, end + array.sizes[self.dims["time"]]
                a, b = max(first, begin), min(stop, end)
                if a < b:
                    values = self._load(array, slice(a - begin, b - begin), positions)
                    fields[a - first : b - first, :, rows] = values
        return fields

    def _load(self, array: xarray.DataArray, times: slice, positions: list[int]) -> np.ndarray:
        """Return values [times, members, levels, latitudes, longitudes] of one file."""
        order = [self.dims[role] for role in ("time", "member", "level", "latitude", "longitude")]
        array = array.isel({self.dims["time"]: times})
        if self.dims["level"] in array.dims:
            array = array.isel({self.dims["level"]: positions})
        return array.expand_dims([dim for dim in order if dim not in array.dims]).transpose(*order).values


# --- opening the source --------------------------------------------------------------------------------


def open_file(path: Path) -> xarray.Dataset:
    """Open a file without reading its fields."""
    try:
        import xarray
    except ImportError as error:
        raise DataError("data_prep/weather.py needs xarray: pip install 'hpc_bnn[data_prep]'") from error
    with open(path, "rb") as file:
        is_grib = file.read(4) == b"GRIB"
    try:
        return xarray.open_dataset(path, cache=False)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = (
            "For GRIB install cfgrib (pip install cfgrib), or convert the file to NetCDF with grib_to_netcdf"
            if is_grib
            else "Is it a NetCDF file, and whole? NetCDF-4 needs netcdf4: pip install 'hpc_bnn[data_prep]'"
        )
        raise DataError(f"--source: {path} cannot be opened ({str(error).splitlines()[0]}). {remedy}") from error


def find_dims(datasets: list[xarray.Dataset], options: argparse.Namespace) -> dict[str, str]:
    """Return the names of the dims by role, as given or as usual."""
    there = dict.fromkeys(dim for dataset in datasets for dim in dataset.sizes)
    dims = {}
    for role, usual in ROLES.items():
        given = getattr(options, f"{role}_dim")
        found = [name for name in ((given,) if given else usual) if name in there]
        common.check(
            f"--{role}-dim",
            given or "(not given)",
            bool(found) or not (given or role in NEEDED),
            "the source has no such dim",
            f"Its dims are {', '.join(there)}",
        )
        dims[role] = found[0] if found else role
    return dims


def join(datasets: list[xarray.Dataset], dims: dict[str, str]) -> Fields:
    """Sort the variables that have time, latitude and longitude by name and time."""
    needed = {dims[role] for role in NEEDED}
    arrays: dict[str, list[xarray.DataArray]] = {}
    flipped = False
    for dataset in datasets:
        latitudes = dataset[dims["latitude"]].values
        if latitudes[0] < latitudes[-1]:
            dataset = dataset.isel({dims["latitude"]: slice(None, None, -1)})
            flipped = True
        for name, array in dataset.data_vars.items():
            if needed <= set(array.dims) and array.size > 0:
                single = [dim for dim, n in array.sizes.items() if n == 1 and dim not in dims.values()]
                arrays.setdefault(str(name), []).append(array.squeeze(single, drop=True))
    if not arrays:
        raise DataError(f"--source: no variable has the dims {', '.join(sorted(needed))}")
    for of_variable in arrays.values():
        of_variable.sort(key=lambda array: array[dims["time"]].values[0])
    return Fields(arrays, dims, flipped)


def check_alike(fields: Fields, variables: Iterable[str]) -> None:
    """Raise `DataError` unless the variables have no other dims, and one grid, one time axis and the same members."""
    first = next(iter(variables := list(variables)))
    for variable in variables:
        for array in fields.arrays[variable]:
            other = [str(dim) for dim in array.dims if dim not in fields.dims.values()]
            if other:
                raise DataError(
                    f"--source: {variable} has the dims {', '.join(map(str, array.dims))}. "
                    f"Select one entry of {', '.join(other)} first, or name them with --member-dim or --level-dim"
                )
            for role in ("latitude", "longitude", "member", "level"):
                name, reference = fields.dims[role], variable if role == "level" else first
                found = array[name].values if name in array.dims else np.empty(0)
                if not np.array_equal(found, fields.coordinate(role, reference)):
                    raise DataError(f"--source: {name} of {variable} differs from that of {reference}, or between files")
        if not np.array_equal(fields.coordinate("time", variable), fields.coordinate("time", first)):
            raise DataError(f"--source: {variable} and {first} have different times. Give files of the same times")
    latitudes = fields.coordinate("latitude", first)
    if not (np.diff(latitudes) < 0).all() or np.abs(latitudes).max() > 90:
        raise DataError(f"--source: {fields.dims['latitude']} does not run from pole to pole in degrees. Sort it first")


def choose(flag: str, names: list[str], levels: list[float] | None, fields: Fields) -> list[Channel]:
    """Return the channels that names such as "t" (the chosen levels) or "t@850" stand for."""
    channels = []
    for name in names:
        variable, _, level = name.partition("@")
        there = ", ".join(fields.arrays)
        common.check(flag, name, variable in fields.arrays, "the source has no such field", f"It has {there}")
        positions = {f"{value:g}": i for i, value in enumerate(fields.coordinate("level", variable))}
        wanted = [level] if level else [f"{value:g}" for value in levels or ()] if positions else [""]
        for chosen in wanted or positions:
            common.check(
                flag if level else "--levels",
                name if level else chosen,
                chosen in (positions or [""]),
                f"{variable} has no such level",
                f"It has {', '.join(positions) or 'none'}",
            )
            channels.append(Channel(variable, chosen, positions.get(chosen, 0)))
    return channels


# --- pairs of inputs and targets -----------------------------------------------------------------------


def find_segments(times: np.ndarray) -> tuple[np.ndarray, Any]:
    """Number the stretches of time [times] between gaps, steps over 1.5 times the median; return them and the median."""
    steps = np.diff(times)
    if steps.dtype == object:  # of a calendar that is not the usual one
        steps = steps.astype("timedelta64[us]")
    if not (steps > 0 * steps[:1]).all():
        raise DataError("--source: the times do not increase. Sort the files by time, and remove what is there twice")
    median = np.sort(steps)[len(steps) // 2]
    return np.cumsum(np.concatenate([[0], steps > 1.5 * median])), median


def find_complete(fields: Fields, channels: list[Channel], comm: GridComm) -> np.ndarray:
    """Return whether no value is missing, as [times, members]. Collective over the world."""
    num_times = len(fields.coordinate("time"))
    with comm.agree("looking for missing values"):
        mine = {
            time: ~np.isnan(fields.read(channels, time, time + 1)[0]).any(axis=(1, 2, 3))
            for time in range(comm.grid.rank, num_times, comm.grid.world_size)
        }
    complete = {time: row for part in comm.gather_objects(mine) for time, row in part.items()}
    return np.stack([complete[time] for time in range(num_times)])


def find_pairs(
    part: range, segments: np.ndarray, inputs: np.ndarray, targets: np.ndarray, history: int, lead: int
) -> np.ndarray:
    """Return [n, 2], the newest input time and the member of each pair inside a part.

    ``inputs`` and ``targets`` [times, members] say which fields are complete.
    """
    times = np.arange(part.start + history - 1, part.stop - lead)
    times = times[segments[times - history + 1] == segments[times + lead]]
    usable = targets[times + lead].copy()
    for age in range(history):
        usable &= inputs[times - age]
    rows, members = np.nonzero(usable)
    return np.stack([times[rows], members], axis=1)


def make_examples(
    fields: Fields, pairs: np.ndarray, inputs: list[Channel], targets: list[Channel], history: int, lead: int
) -> Examples:
    """Return examples that are read when they are written: x [n, channels, latitudes, longitudes] and y likewise."""

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        times, members = pairs[start:stop].T
        first, last = times[0], times[-1]
        past = load(inputs, first - history + 1, last + 1)
        x = [past[times - first + step, members] for step in range(history)]
        y = load(targets, first + lead, last + lead + 1)[times - first, members]
        for name, array in (("inputs", x), ("targets", [y])):
            for step, values in enumerate(array): ...
        return np.concatenate(x, axis=1), y

    return Examples(len(pairs), read)
