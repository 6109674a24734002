"""Groups of a data set that have metrics of their own, and forecasts without a network to compare with."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..comm import GridComm
from ..data import Source
from ..errors import ConfigError, DataError, Fault

SEASONS = ("DJF", "MAM", "JJA", "SON")
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])(-\d\d)?($|[T ])")
OF_TIME = {"season": _MONTH, "month": _MONTH, "hour": re.compile(r"\d{4}-\d\d-\d\d[T ]([01]\d|2[0-3])(\D|$)")}
"""Groups by the coordinate ``time`` of the examples, and the times that have one."""
MAX_GROUPS = 1000
REFERENCES = ("persistence", "climatology")
"""Forecasts that skill is measured against."""


@dataclass(frozen=True)
class Group:
    """Some examples of a data set, or some points of its targets."""

    grouping: str
    """What it belongs to, such as ``season``."""
    label: str
    examples: Tensor | None = None
    """[N] whether an example belongs to it; None: all."""
    places: Tensor | None = None
    """[n] int64: its points, in the flat order of those of a target; None: all."""


ALL = Group("", "")
"""The whole data set."""


def find_groups(
    comm: GridComm, dataset: Source, by: Sequence[str] = (), regions: Mapping[str, Any] | None = None
) -> list[Group]:
    """Return the groups of a data set that have metrics of their own, the same on all ranks. Collective over the world.

    Parameters
    ----------
    by : sequence of str
        ``season``, ``month`` or ``hour`` of the coordinate ``time`` (as it stands in the shards: of the newest input, UTC
        where that is known); ``horizon``, the steps of series; or a coordinate of the examples, such as a station.
    regions : dict of str to array or tuple, optional
        Of each region what belongs to it: a mask of the points of a target, 0 where not; or a box (south, north, west, east)
        in degrees, with its edges.

    It raises `ConfigError` where the data set has no such coordinate or points, or a region holds none of them.
    """
    groups = []
    for name in dict.fromkeys([by] if isinstance(by, str) else by):
        if name == "horizon":
            groups += _of_horizon(dataset)
            continue
        labels, codes = None, None
        with comm.agree(f"--by {name}"):
            if comm.grid.is_first("world"):
                labels, codes = _look_up(dataset, name)
        labels, codes = comm.broadcast_object((labels, codes))
        groups += [Group(name, label, torch.from_numpy(codes == n)) for n, label in enumerate(labels)]
    with comm.agree("--regions"):
        return groups + [_region(dataset, name, given) for name, given in (regions or {}).items()]


def _look_up(dataset: Source, name: str) -> tuple[list[str], np.ndarray]:
    """Return the labels of a grouping, and the number of the label of each example [N] int32. Local."""
    there, needed = dataset.coordinates(range(len(dataset))), "time" if name in OF_TIME else name
    if needed not in there:
        rule = f"the examples have {', '.join(there) or 'no coordinates'}"
        rule += ", and time is needed" if needed != name else ""
        remedy = "Choose another, or prepare them with it" if there else "Prepare the shards again with this hpc_bnn"
        raise ConfigError(Fault("--by", name, rule, remedy))
    values = there[needed]
    if name in OF_TIME:
        texts = values.astype(str)  # 2019-03-01T06:00:00: also of calendars that NumPy does not know
        other = next((text for text in texts if not OF_TIME[name].match(text)), None)
        if other is not None:
            rule = f"a time is '{other}', which has no {name}"
            raise ConfigError(Fault("--by", name, rule, "Write times as 2019-03-01T06:00:00"))
        values = np.array([int(text[11:13] if name == "hour" else text[5:7]) for text in texts], np.int32)
        if name == "season":
            values = values % 12 // 3
    found, codes = np.unique(values, return_inverse=True)
    if len(found) > MAX_GROUPS:
        rule = f"it has {len(found)} values, and at most {MAX_GROUPS} groups are compared"
        raise ConfigError(Fault("--by", name, rule, "Choose a coordinate that several examples share"))
    label = SEASONS.__getitem__ if name == "season" else "{:02d}".format if name in OF_TIME else str
    return [label(value) for value in found], codes.astype(np.int32)


def _of_horizon(dataset: Source) -> list[Group]:
    places, details = dataset.manifest.places, dataset.manifest.details
    if list(places) != [details.get("horizon")]:
        rule = "the targets have no dim of steps to come"
        raise ConfigError(Fault("--by", "horizon", rule, "Leave it out; lead times of fields are channels"))
    seconds = details.get("step_seconds")
    labels = [f"{n * seconds / 3600:g} h" if seconds else f"{n} steps" for n in range(1, places[0] + 1)]
    return [Group("horizon", label, places=torch.tensor([n])) for n, label in enumerate(labels)]


def _region(dataset: Source, name: str, given: Any) -> Group:
    details, places = dataset.manifest.details, dataset.manifest.places
    axes = [np.asarray(details.get(axis, ()), np.float64) for axis in ("latitudes", "longitudes")]
    if isinstance(given, (tuple, list)) and len(given) == 4:
        if [len(axis) for axis in axes] != list(places):
            rule = f"the targets have {list(places)} points, and no latitudes and longitudes"
            raise ConfigError(Fault("--regions", name, rule, "Give a mask of these points"))
        south, north, west, east = map(float, given)
        # Grids in float32 miss their decimals by 1e-5 degrees
        slack = [1e-2 * np.abs(np.diff(axis)).min(initial=1e-2) for axis in axes]
        width = (east - west) % 360 if abs(east - west) < 360 else 360
        in_longitude = (axes[1] - west + slack[1]) % 360 <= width + 2 * slack[1]
        mask = ((axes[0] >= south - slack[0]) & (axes[0] <= north + slack[0]))[:, None] & in_longitude
    else:
        given = np.ma.asarray(given)
        mask = (
            given.astype(np.float64).filled(math.nan) if given.dtype.kind in "biuf" else np.full(given.shape, math.nan)
        )
        if mask.shape != tuple(places):
            rule = f"its mask is {list(mask.shape)}, and a target has the points {list(places)}"
            raise ConfigError(Fault("--regions", name, rule, "Give a mask of these points, or SOUTH,NORTH,WEST,EAST"))
        if np.isnan(mask).any():
            rule = "its mask has places that are NaN, masked or words"
            raise ConfigError(Fault("--regions", name, rule, "Write 1 where a point belongs to it, and 0 where not"))
    inside = np.flatnonzero(mask)
    if not len(inside):
        remedy = "Look at its edges: degrees north, east"
        raise ConfigError(Fault("--regions", name, "it holds no point of the targets", remedy))
    return Group("region", name, places=torch.from_numpy(inside))


def parse_regions(texts: Sequence[str]) -> dict[str, Any]:
    """Return regions from ``NAME=SOUTH,NORTH,WEST,EAST`` or ``NAME=MASK.npy``; `DataError` without the mask. Local."""
    regions: dict[str, Any] = {}
    for text in texts:
        name, _, given = text.partition("=")
        if name in regions:
            raise ConfigError(Fault("--regions", text, f"{name} stands twice", "Give each region a name of its own"))
        if given.endswith(".npy"):
            try:
                regions[name] = np.load(Path(given), allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"--regions {name}: {given} cannot be read ({error})") from error
            continue
        try:
            south, north, west, east = map(float, given.split(","))
        except ValueError:
            south = north = west = east = math.nan
        if not (name and -90 <= south <= north <= 90 and -360 <= west <= 360 and -360 <= east <= 360):
            rule = "must be NAME=SOUTH,NORTH,WEST,EAST in degrees, or NAME=MASK.npy; several are separated by ;"
            raise ConfigError(Fault("--regions", text, rule, "Write it as 'alps=44,48,5,16'"))
        regions[name] = (south, north, west, east)
    return regions


# --- forecasts to compare with ---------------------------------------------------------------------------


def check_references(names: Sequence[str]) -> None:
    """Raise `ConfigError` where one of these is no forecast to compare with. Local."""
    for name in [names] if isinstance(names, str) else names:
        if name not in REFERENCES or name is names:
            rule = f"must be names among {', '.join(REFERENCES)}"
            raise ConfigError(Fault("--references", name, rule, "Give a list of them", "references"))


def persistence(dataset: Source, x: Any, like: Tensor) -> Tensor:
    """Return the newest input of each target as its forecast, [B, T, ...] float64 in units of y. Local.

    NaN for a channel that is no input; `ConfigError` where the preparation does not say which input it is.
    """
    said, scale = dataset.manifest.details.get("persistence"), dataset.input_scale
    if said == "zero":  # the targets are changes
        return torch.zeros_like(like)
    if not isinstance(said, list) or len(said) != like.shape[1] or not isinstance(x, Tensor):
        rule = "the shards do not say which inputs are the newest values of the targets"
        raise ConfigError(Fault("--references", "persistence", rule, "Prepare them again, or leave it out"))
    known = x.double() if scale is None else x.double() * scale[1] + scale[0]
    if dataset.manifest.details.get("horizon") is not None:  # [B, channels, window] of a series
        known = known[..., -1:]
    columns = [known[:, [n]] if n is not None else torch.full_like(known[:, :1], math.nan) for n in said]
    return torch.cat(columns, 1).expand_as(like)


@dataclass(frozen=True)
class Climatology:
    """The normal distribution of each target, [T, ...] float64 in units of y, over the examples of a data set with their weights."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, comm: GridComm, dataset: Source, block_size: int = 1024) -> Climatology:
        """Return that of a data set: one pass over its targets. Collective over the world."""
        shape = (dataset.manifest.arrays["y"].shape or (1,)) if dataset.manifest.num_classes is None else (1,)
        sums = torch.zeros(3, *shape, dtype=torch.float64, device=dataset.device)
        mine = comm.grid.local_examples(len(dataset))
        middle = dataset.target_scale[0][0] if dataset.target_scale else 0.0  # squares of what is left lose no digits
        for numbers in torch.arange(len(dataset))[mine].split(block_size):
            _, y, *weights = dataset.fetch(numbers)
            y = dataset.in_units(y).double().view(len(numbers), *shape) - middle
            count = weights[0].to(y).view(-1, *(1,) * len(shape)).expand(y.shape) if weights else torch.ones_like(y)
            if dataset.manifest.missing_targets:
                count, y = count * ~y.isnan(), y.nan_to_num(0.0)
            sums += torch.stack([count.sum(0), (count * y).sum(0), (count * y.square()).sum(0)])
        comm.sum_([sums], axis="data")
        count, total, squares = sums
        mean = total / count
        return cls(mean + middle, (squares / count - mean.square()).clamp_min(0).sqrt())

    def crps(self, y: Tensor) -> Tensor:
        """Return the CRPS [B, T, ...] of targets (units of y); of a normal distribution: Gneiting and Raftery (2007)."""
        difference = y - self.mean
        z = difference / self.std.clamp_min(torch.finfo(y.dtype).tiny)  # infinite where it says a point
        normal = torch.distributions.Normal(torch.zeros_like(z), 1.0, validate_args=False)  # NaN where nothing is known
        spread = 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi)
        return difference * (2 * normal.cdf(z) - 1) + self.std * spread
