#!/usr/bin/env python3
"""Write weather fields as HDF5 shards: from the fields of some time steps, forecast those some steps later.

Source: NetCDF files with time, latitude and longitude, and GRIB files where cfgrib is installed. Several files may hold
further times or further variables. Nothing is held in memory but what a shard needs.

x is [n, channels, latitudes, longitudes], oldest step first, with channels such as "z@500 t-1" and "z@500"; y is
[n, target channels, latitudes, longitudes], --lead steps after the newest input. Both are float32, or float64 where float32
would round differences away. Latitudes run from north to
south; the targets are weighted by cos(latitude). The splits follow each other in time (--seed is not used), all steps
of an example lie in one split, and no example reaches over a gap in time. Ensemble members are further examples.

Known by their SHA-256: ERA5 2 m temperature over the British Isles, March 2019 (744 times), and ten ERA5 members on
1 and 2 January 2017 (4 times), both of the Copernicus Climate Change Service, free to use with attribution; ERA-Interim
monthly means (2 times) of ECMWF. Of other data state the --licence.

    python data_prep/weather.py --source era5_t2m_uk_2019-03.nc --history 2 --lead 6 --output data/t2m
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np

from hpc_bnn.comm import GridComm
from hpc_bnn.data import Examples
from hpc_bnn.errors import DataError

logger = logging.getLogger(__name__)  # on the first rank alone

if TYPE_CHECKING:
    import xarray

ROLES = {  # usual names of the dims
    "time": ("time", "valid_time", "month"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
    "level": ("level", "isobaricInhPa", "pressure_level", "plev"),
    "member": ("member", "number", "realization"),
}
VERSION = "expver"
"""Dim of ERA5 and its preliminary values (ERA5T): where one has a value, the other has none."""
MARKS = {-999.0, -9999.0, -99999.0, 9999.0, 99999.0, -32767.0, -32768.0}
"""Values that often stand for missing ones."""
LARGEST = 1e18
"""Largest value of a field; files fill up with 1e20 or 9.96921e36."""
NUM_LOOKED_AT = 8
"""Times by which a dtype is chosen."""
NEEDED = ("time", "latitude", "longitude")
OF_TIME = (VERSION, "year", "month", "season", "day", "hour")
"""Numbers beside the fields of a file that may be others in a file of later times; so may what is in units of time."""
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

    def read(self, channels: list[Channel], times: range, members: range, dtype: Any = np.float64) -> np.ndarray:
        """Return fields [times, members, channels, latitudes, longitudes]."""
        grid = len(self.coordinate("latitude")), len(self.coordinate("longitude"))
        fields = np.empty((len(times), len(members), len(channels), *grid), dtype)
        for variable in {channel.variable for channel in channels}:
            rows = [row for row, channel in enumerate(channels) if channel.variable == variable]
            levels = [channels[row].position for row in rows]
            stop = 0
            for array in self.arrays[variable]:
                start, stop = stop, stop + array.sizes[self.dims["time"]]
                a, b = max(times.start, start), min(times.stop, stop)
                if a < b:
                    values = self._load(array, range(a - start, b - start), members, levels)
                    fields[a - times.start : b - times.start, :, rows] = values
        return fields

    def float_type(self, what: str, channels: list[Channel]) -> type[np.floating]:
        """Return the dtype that keeps the differences of some channels, by a few times of them."""
        variables = {channel.variable for channel in channels}
        if all(np.can_cast(array.dtype, np.float32) for name in variables for array in self.arrays[name]):
            return np.float32
        places = np.unique(np.linspace(0, len(self.coordinate("time")) - 1, NUM_LOOKED_AT).astype(int))
        looks = [self.read(channels, range(time, time + 1), range(1))[:, 0] for time in places]
        return common.float_type(what, np.concatenate(looks))

    def _load(self, array: xarray.DataArray, times: range, members: range, levels: list[int]) -> np.ndarray:
        """Return values [times, members, levels, latitudes, longitudes] of one file."""
        part = {
            self.dims["time"]: slice(times.start, times.stop),
            self.dims["member"]: slice(members.start, members.stop),
            self.dims["level"]: levels,
        }
        order = [*part, self.dims["latitude"], self.dims["longitude"]]
        variable = array.variable.isel(part, missing_dims="ignore")
        versions = [variable]
        if VERSION in variable.dims and VERSION not in order:
            versions = [variable.isel({VERSION: number}) for number in range(variable.sizes[VERSION])]
        values, *others = (version.set_dims(order).values for version in versions)
        for other in others:
            values = np.where(np.isnan(values), other, values)
        least, largest = valid_bounds(array)
        is_valid = (values >= least) & (values <= largest)
        values = values if (is_valid | np.isnan(values)).all() else np.where(is_valid, values, np.nan)
        low, high = np.nanmin(values, initial=0), np.nanmax(values, initial=0)
        if max(-low, high) > LARGEST:
            raise DataError(
                f"--source: {array.name} holds {high if high > -low else low:g}, which no weather has: a value that stands "
                "for a missing one? Declare it in the file, as its attribute _FillValue"
            )
        for value in {float(low), float(high)} & MARKS:
            say_mark(str(array.name), value)
        return values


def valid_bounds(array: xarray.DataArray) -> tuple[float, float]:
    """Return the least and the largest value that are none of the missing ones, by the attributes of a file (CF, 2.5.1)."""
    attributes, packing = array.attrs, array.encoding
    given = np.ravel(
        attributes.get("valid_range", (attributes.get("valid_min", -np.inf), attributes.get("valid_max", np.inf)))
    )
    if given.dtype.kind not in "iuf" or len(given) != 2:
        raise DataError(f"--source: {array.name} has the valid_range {given.tolist()}: two numbers are needed. Mend it")
    scale, offset = packing.get("scale_factor", 1.0), packing.get("add_offset", 0.0)
    stored = np.dtype(packing.get("dtype", "f8"))
    if stored.kind in "iu" and (kind := {"true": "u", "false": "i"}.get(packing.get("_Unsigned"))):
        given = given.astype(stored).astype(f"{kind}{stored.itemsize}")
    if (scale, offset) == (1.0, 0.0) or stored.kind == "f":
        return tuple(given.astype(array.dtype if array.dtype.kind == "f" else np.float64).tolist())
    a, b = sorted(given.astype(np.float64) * scale + offset)  # of packed numbers
    return a - abs(scale) / 2, b + abs(scale) / 2


@functools.cache
def say_mark(name: str, value: float) -> None:
    """Warn, once, of an extreme value that may stand for a missing one."""
    rule = "if that stands for a missing value, declare it in the file, as its attribute _FillValue"
    logger.warning("%s has the extreme value %g: %s", name, value, rule)


# --- opening the source --------------------------------------------------------------------------------


def open_file(path: Path) -> xarray.Dataset:
    """Open a file without reading its fields."""
    try:
        import xarray
    except ImportError as error:
        raise DataError("data_prep/weather.py needs xarray: pip install 'hpc_bnn[data]'") from error
    with open(path, "rb") as file:
        begin = file.read(4)
    try:
        raw = xarray.open_dataset(path, cache=False, decode_times=False)
    except (OSError, ValueError, RuntimeError) as error:
        remedy = (
            "For GRIB install cfgrib (pip install cfgrib), or convert the file to NetCDF with grib_to_netcdf"
            if begin == b"GRIB"
            else "Is it a NetCDF file, and whole? NetCDF-4 needs netcdf4: pip install 'hpc_bnn[data]'"
        )
        raise DataError(f"--source: {path} cannot be opened ({str(error).splitlines()[0]}). {remedy}") from error
    if begin in (b"CDF\x01", b"CDF\x02"):
        check_whole(path)
    months = {name: axis for name in raw.coords if (axis := months_since(raw[name])) is not None}
    try:
        # Units such as seconds are those of numbers: a wave period is no time
        dataset = xarray.decode_cf(raw.drop_vars(months), mask_and_scale=False, decode_timedelta=False)
    except (OSError, ValueError, OverflowError) as error:
        rule = f"its times cannot be decoded ({str(error).splitlines()[0].split('. Try')[0]})"
        raise DataError(
            f"--source: {path}: {rule}. Write them as 'hours since 1900-01-01', or install cftime"
        ) from error
    return dataset.assign_coords(months)


def check_whole(path: Path) -> None:
    """Raise `DataError` where a file of NetCDF-3 ends early: NetCDF's library reads zeros there."""
    import scipy.io

    is_whole = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what cannot be closed, as it ends early
        try:
            scipy.io.netcdf_file(path, mmap=True).close()  # places all variables, and reads none
        except ValueError:
            is_whole = False
    if not is_whole:
        raise DataError(f"--source: {path} is shorter than its header says. Copy or fetch it again")


def months_since(axis: xarray.DataArray) -> tuple[Any, np.ndarray] | None:
    """Return the dims and times of a coordinate in months or years since a date; None where it is in other units.

    xarray does not decode these. The part behind the point is that of the month.
    """
    match = re.match(r"\s*(month|year)s?\s+since\s+(\d{1,4}-\d{1,2}-\d{1,2})", str(axis.attrs.get("units", "")))
    if match is None:
        return None
    begin = np.datetime64(
        "-".join(f"{int(part):0{width}d}" for part, width in zip(match[2].split("-"), (4, 2, 2))), "D"
    )
    count = axis.values.astype(np.float64) * (12 if match[1] == "year" else 1)
    whole = np.floor(count + 1e-6)
    month = begin.astype("datetime64[M]") + whole.astype(int)
    first, stop = (number.astype("datetime64[s]") for number in (month, month + 1))
    part = np.round(np.maximum(count - whole, 0) * (stop - first).astype(np.float64)).astype("timedelta64[s]")
    return axis.dims, first + (begin - begin.astype("datetime64[M]")).astype("timedelta64[s]") + part


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
        if not needed <= set(dataset.sizes):
            raise DataError(
                f"--source: a file has the dims {', '.join(map(str, dataset.sizes))} only. "
                f"All files must have {', '.join(sorted(needed))}"
            )
        for dim in (dims["latitude"], dims["longitude"]):
            if dim not in dataset.coords:  # xarray would count
                raise DataError(f"--source: a file has no variable {dim}, which says the degrees of its dim. Add it")
        latitudes = dataset[dims["latitude"]].values
        if latitudes[0] < latitudes[-1]:
            dataset = dataset.isel({dims["latitude"]: slice(None, None, -1)})
            flipped = True
        for name, array in dataset.data_vars.items():
            if needed <= set(array.dims) and array.size > 0:
                single = [dim for dim, n in array.sizes.items() if n == 1 and dim not in dims.values()]
                arrays.setdefault(str(name), []).append(array.squeeze(single))
                if VERSION in arrays[str(name)][-1].dims and VERSION not in dims.values():
                    logger.info("%s: where %s has several entries, the first that has a value is taken", name, VERSION)
    if not arrays:
        raise DataError(f"--source: no variable has the dims {', '.join(sorted(needed))}")
    for of_variable in arrays.values():
        of_variable.sort(key=lambda array: array[dims["time"]].values[0])
    return Fields(arrays, dims, flipped)


def choose(flag: str, names: list[str], levels: list[float] | None, fields: Fields) -> list[Channel]:
    """Return the channels that names such as "t" (the chosen levels) or "t@850" stand for."""
    channels = []
    for name in names:
        variable, _, level = name.partition("@")
        known = variable in fields.arrays
        common.check(flag, name, known, "the source has no such field", f"It has {', '.join(fields.arrays)}")
        there = [f"{value:g}" for value in fields.coordinate("level", variable)]
        if level:
            wanted = [level]
        elif there:
            wanted = [f"{value:g}" for value in levels] if levels else there
        else:
            wanted = [""]
        for chosen in wanted:
            common.check(
                flag if level else "--levels",
                name if level else chosen,
                chosen in (there or [""]),
                f"{variable} has no such level",
                f"It has {', '.join(there) or 'none'}",
            )
            channels.append(Channel(variable, chosen, there.index(chosen) if there else 0))
    return channels


def places(array: xarray.DataArray, dims: dict[str, str]) -> dict[str, float]:
    """Return what says by one number which field this is, such as its height, level or member."""
    return {
        str(name): float(axis.values.item())
        for name, axis in array.coords.items()
        if axis.size == 1
        and axis.dtype.kind in "iuf"
        and name not in {*OF_TIME, *(dims[role] for role in NEEDED)}
        and not re.match(
            r"(s|sec|min|h|hr|d|(second|minute|hour|day|month|year)s?)\b", str(axis.attrs.get("units", ""))
        )
    }


def check_alike(fields: Fields) -> None:
    """Raise `DataError` unless all variables have one grid, one time axis, the same members and no other dims."""
    for variable, arrays in fields.arrays.items():
        first: dict[str, float] = {}
        for array in arrays:
            for name, value in places(array, fields.dims).items():
                if not np.isclose(value, first.setdefault(name, value), rtol=1e-6):
                    raise DataError(
                        f"--source: {variable} has {name} {first[name]:g} in one file and {value:g} in another: these are "
                        f"different fields. Give the files of one, or join them along {name} first (xarray.concat), and say "
                        "what it is by --level-dim or --member-dim"
                    )
            if array.dtype.kind not in "iuf":
                raise DataError(
                    f"--source: {variable} has dtype {array.dtype}, no numbers. Choose --variables without it"
                )
            other = [str(dim) for dim in array.dims if dim not in (*fields.dims.values(), VERSION)]
            if other:
                raise DataError(
                    f"--source: {variable} has the dims {', '.join(map(str, array.dims))}. Select one entry of "
                    f"{', '.join(other)} first, or say what they are with --member-dim or --level-dim"
                )
            for role in ("latitude", "longitude", "member", "level"):
                dim, alike = fields.dims[role], variable if role == "level" else None
                values = array[dim].values if dim in array.dims else np.empty(0)
                if not alike_but_for_rounding(values, fields.coordinate(role, alike)):
                    raise DataError(
                        f"--source: {variable} has {dim} unlike other fields. Choose --variables and files alike"
                    )
        units = sorted({str(array.attrs.get("units", "")) for array in arrays})
        if len(units) > 1:
            raise DataError(f"--source: {variable} has the units {' and '.join(units)} in different files. Convert one")
        times, others = fields.coordinate("time", variable), fields.coordinate("time")
        if (times != times).any():
            rule = f"entry {int((times != times).argmax()) + 1} of its times is missing"
            raise DataError(f"--source: {variable}: {rule}. Write the time into the file, or leave out this field")
        if not np.array_equal(times, others):
            lacks = [text(time) for time in np.setxor1d(times, others)[:1]]
            where = f", such as {lacks[0]}, which one of them lacks" if lacks else ""
            raise DataError(
                f"--source: {variable} has times unlike other fields{where}. Give files of the same times, or choose "
                "--variables"
            )
    axis = next(iter(fields.arrays.values()))[0][fields.dims["latitude"]]
    latitudes = fields.coordinate("latitude")
    if (
        not str(axis.attrs.get("units") or "deg").lower().startswith(("deg", "°"))
        or not (np.diff(latitudes) < 0).all()
        or np.abs(latitudes).max() > 90
    ):
        raise DataError(f"--source: {fields.dims['latitude']} is not sorted, or not in degrees. Mend it first")


def alike_but_for_rounding(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two coordinates are the same grid: files hold them in float32 and float64, or with fewer digits."""
    if a.shape != b.shape or not {a.dtype.kind, b.dtype.kind} <= set("iuf") or len(a) == 0:
        return np.array_equal(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    step = np.abs(np.diff(a)).min(initial=np.inf)
    return bool(np.abs(a - b).max() <= (1e-2 * step if len(a) > 1 else 1e-6 * abs(a[0])))


def open_source(options: argparse.Namespace) -> tuple[Fields, list[Channel], list[Channel]]:
    """Return the fields that are asked for, and the channels of inputs and targets."""
    datasets = [open_file(path) for path in options.source]
    fields = join(datasets, find_dims(datasets, options))
    names = options.variables or list(fields.arrays)
    inputs = choose("--variables", names, options.levels, fields)
    targets = choose("--targets", options.targets or names, options.levels, fields)
    useful = not options.levels or any(channel.level for channel in inputs + targets)
    common.check("--levels", options.levels, useful, "no chosen field has levels", "Leave it out")
    used = dict.fromkeys(channel.variable for channel in inputs + targets)
    fields = replace(fields, arrays={variable: fields.arrays[variable] for variable in used})
    check_alike(fields)
    return fields, inputs, targets


# --- pairs of inputs and targets -----------------------------------------------------------------------


def find_segments(times: np.ndarray) -> tuple[np.ndarray, Any]:
    """Return the number of the stretch without a gap that each time lies in [times], and the median step.

    A gap is a step of more than 1.5 times the median, or less than that part of it, so that months of 28 to 31 days are none.
    """
    steps = np.diff(times)
    if steps.dtype == object:  # datetimes of a calendar that NumPy does not know
        steps = steps.astype("timedelta64[us]")
    if len(steps) == 0:
        raise DataError("--source: there is one time. Two or more are needed")
    if not (is_later := steps > 0 * steps).all():
        place = int(is_later.argmin())
        before, after = text(times[place]), text(times[place + 1])
        raise DataError(
            f"--source: the times must increase, and {after} comes after {before}: a file is given twice, two files hold the "
            "same times, or one is not sorted. Remove what is there twice, and sort the rest"
        )
    median = np.sort(steps)[len(steps) // 2]
    return np.cumsum(np.concatenate([[0], (steps > 1.5 * median) | (1.5 * steps < median)])).astype(int), median


def find_complete(fields: Fields, channels: list[Channel], comm: GridComm) -> np.ndarray:
    """Return whether no value is missing, as [times, members]. Collective over the world."""
    num_times, members = len(fields.coordinate("time")), range(fields.num_members)
    with comm.agree("looking for missing values"):
        mine = {
            time: ~np.isnan(fields.read(channels, range(time, time + 1), members)[0]).any(axis=(1, 2, 3))
            for time in range(comm.grid.rank, num_times, comm.grid.world_size)
        }
    complete = {time: row for part in comm.gather_objects(mine) for time, row in part.items()}
    return np.stack([complete[time] for time in range(num_times)])


def find_pairs(
    part: range, segments: np.ndarray, inputs: np.ndarray, targets: np.ndarray, history: int, leads: list[int]
) -> np.ndarray:
    """Return [n, 2]: newest input time and member of each pair that lies inside a part and crosses no gap.

    ``inputs`` and ``targets`` [times, members] say which fields may be used.
    """
    times = np.arange(part.start + history - 1, part.stop - max(leads))
    times = times[segments[times - history + 1] == segments[times + max(leads)]]
    usable = np.all([targets[times + lead] for lead in leads], axis=0)
    for age in range(history):
        usable = usable & inputs[times - age]
    rows, members = np.nonzero(usable)
    return np.stack([times[rows], members], axis=1)


def make_examples(
    fields: Fields,
    pairs: np.ndarray,
    inputs: list[Channel],
    targets: list[Channel],
    history: int,
    leads: list[int],
    types: tuple[type, type] = (np.float32, np.float32),
) -> Examples:
    """Return examples x [n, channels, latitudes, longitudes] and y likewise, read when they are written.

    Channels of x are those of the oldest time first, of y those of the first lead.
    """

    def select(
        channels: list[Channel], dtype: type, ages: list[int], times: np.ndarray, members: np.ndarray
    ) -> np.ndarray:
        block = range(times[0] - max(ages), times[-1] - min(ages) + 1)
        group = range(members.min(), members.max() + 1)
        values = fields.read(channels, block, group, dtype)
        chosen = [values[times - age - block.start, members - group.start] for age in ages]
        for age, array in zip(ages, chosen):
            missing = np.argwhere(np.isnan(array).any(axis=(2, 3)))
            if len(missing):
                row, channel = missing[0]
                moment = text(fields.coordinate("time")[times[row] - age])
                raise DataError(
                    f"--source: {channels[channel]} lacks values at {moment}. --missing drop leaves out such examples"
                )
        return np.concatenate(chosen, axis=1)

    def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        times, members = pairs[start:stop].T
        ages = list(reversed(range(history)))
        x_type, y_type = types
        return select(inputs, x_type, ages, times, members), select(
            targets, y_type, [-lead for lead in leads], times, members
        )

    return Examples(len(pairs), read)


def text(time: Any) -> str:
    """Return a time as text, to the second where it is a date."""
    return str(time.astype("datetime64[s]") if isinstance(time, np.datetime64) else time)


# --- the script ----------------------------------------------------------------------------------------


def split_pairs(
    options: argparse.Namespace, parts: dict[str, range], segments: np.ndarray, *complete: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the pairs of each split; `ConfigError` where there are none."""
    history, leads = options.history, options.lead
    pairs = {name: find_pairs(part, segments, *complete, history=history, leads=leads) for name, part in parts.items()}
    for name, part in parts.items():
        common.check(
            "--validation-fraction, --test-fraction",
            f"{options.validation_fraction:g}, {options.test_fraction:g}",
            len(pairs[name]) > 0,
            f"the {len(part)} times of '{name}' hold no example of --history {history} and --lead {max(leads)}",
            "Give this split more times, or a fraction of 0",
        )
    return pairs


def describe(
    fields: Fields, options: argparse.Namespace, parts: dict[str, range], inputs: list[Channel], targets: list[Channel]
) -> dict[str, Any]:
    """Return what the manifest tells of the fields."""
    times = fields.coordinate("time")
    segments, step = find_segments(times)
    newest = {channel: (options.history - 1) * len(inputs) + number for number, channel in enumerate(inputs)}
    one = len(options.lead) == 1
    details = {
        "history": options.history,
        "lead": options.lead[0] if one else options.lead,
        "persistence": [newest.get(channel) for channel in targets] * len(options.lead),
        "latitudes": fields.coordinate("latitude").tolist(),
        "longitudes": fields.coordinate("longitude").tolist(),
        "latitudes_flipped": fields.flipped,
        "members": fields.num_members,
        "units": {name: str(arrays[0].attrs.get("units", "")) for name, arrays in fields.arrays.items()},
        "times": {name: [text(times[part[0]]), text(times[part[-1]])] for name, part in parts.items()},
        "gaps": int(segments[-1]),
    }
    if isinstance(step, np.timedelta64):
        seconds = [float(lead * step / np.timedelta64(1, "s")) for lead in options.lead]
        details["lead_seconds"] = seconds[0] if one else np.repeat(seconds, len(targets)).tolist()
    return details


def identify(options: argparse.Namespace, sums: list[str]) -> dict[str, str]:
    """Return name, source and licence: as the flags say, or of a known file."""
    files = ", ".join(path.name for path in options.source)
    unknown = (options.source[0].stem, files, "not stated")
    return common.state_facts(options, *(KNOWN.get(sums[0], unknown) if len(sums) == 1 else unknown))


def prepare(options: argparse.Namespace, comm: GridComm) -> None:
    history, leads = options.history, options.lead
    common.check("--history", history, history >= 1, "must be at least 1", "Try 2")
    are_right = min(leads) >= 0 and len(set(leads)) == len(leads)
    common.check("--lead", " ".join(map(str, leads)), are_right, "must not be negative, and each once", "Try 1")
    shares = common.check_fractions(options)
    with comm.agree("opening the source"):
        sums = common.checksums(*options.source)
        fields, inputs, targets = open_source(options)
        segments, _ = find_segments(fields.coordinate("time"))
        types = fields.float_type("x", inputs), fields.float_type("y", targets)
    parts = common.cut(len(segments), shares)
    if options.missing == "drop":
        complete = [find_complete(fields, channels, comm) for channels in (inputs, targets)]
    else:
        complete = [np.ones((len(segments), fields.num_members), bool)] * 2
    pairs = split_pairs(options, parts, segments, *complete)
    weights = np.cos(np.deg2rad(fields.coordinate("latitude").astype(np.float64))).clip(0)
    ages = [f" t-{age}" if age else "" for age in reversed(range(history))]
    later = [f" t+{lead}" for lead in leads] if len(leads) > 1 else [""]
    times, members = (fields.coordinate(role) for role in ("time", "member"))
    if times.dtype.kind != "M":  # of a calendar that NumPy does not know
        times = np.array([text(time) for time in times])
    coordinates = {split: {"time": times[p[:, 0]]} for split, p in pairs.items()}
    if len(members):
        coordinates = {
            split: named | {"realization": members[pairs[split][:, 1]]} for split, named in coordinates.items()
        }
    common.write(
        comm,
        options,
        {split: make_examples(fields, p, inputs, targets, history, leads, types) for split, p in pairs.items()},
        key=sums,
        **identify(options, sums),
        target_weights=(weights / weights.mean())[:, None],
        channels={
            "x": [f"{channel}{age}" for age in ages for channel in inputs],
            "y": [f"{channel}{lead}" for lead in later for channel in targets],
        },
        coordinates=coordinates,
        details=describe(fields, options, parts, inputs, targets),
    )


def make_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    common.add_source(parser, "NetCDF or GRIB files", nargs="+", metavar="FILE")
    parser.add_argument(
        "--variables",
        nargs="+",
        metavar="NAME",
        help="inputs, as VAR or VAR@LEVEL (default: all with time, latitude and longitude)",
    )
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="as VAR or VAR@LEVEL (default: the inputs)")
    parser.add_argument(
        "--levels", nargs="+", type=float, metavar="VALUE", help="of each VAR without @LEVEL (default: all)"
    )
    parser.add_argument("--history", type=int, default=1, metavar="N", help="input time steps (default: %(default)s)")
    parser.add_argument(
        "--lead",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="time steps from the newest input to the target (default: 1); of several each target has a channel per lead",
    )
    for role, usual in ROLES.items():
        parser.add_argument(
            f"--{role}-dim", metavar="DIM", help=f"name of the dim (default: the first of {', '.join(usual)})"
        )
    common.add_fractions(parser, validation=0.1, test=0.1)
    parser.add_argument(
        "--missing",
        choices=["error", "drop"],
        default="error",
        help="what to do where values are missing: stop, or leave out the examples (default: %(default)s)",
    )
    common.add_facts(parser)
    return parser


if __name__ == "__main__":
    common.run(make_parser(), prepare)
