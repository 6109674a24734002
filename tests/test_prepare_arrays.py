"""data_prep/weather.py, data_prep/arrays.py and data_prep/cifar10.py."""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tracemalloc
import zlib

import arrays
import cifar10
import h5py
import netCDF4
import numpy as np
import pytest
import tabular
import timeseries
import weather
import xarray
from conftest import SHARED_DATA
from PIL import Image
from preparation import check_statistics, prepare, shared, stored

from hpc_bnn.data import ShardDataset, verify_shards
from hpc_bnn.errors import ConfigError, DataError, HpcBnnError

# --- weather -------------------------------------------------------------------------------------------


def test_two_ranks_write_the_temperature_of_the_file(mpirun, tmp_path):
    source, output = shared("weather", "era5_t2m_uk_2019-03.nc"), tmp_path / "t2m"
    flags = ("--history", 2, "--lead", 6, "--examples-per-shard", 100, "--missing", "drop")  # nothing is missing
    done = mpirun(2, "data_prep/weather.py", "--source", source, *flags, "--output", output)
    assert done.returncode == 0, done.stderr
    assert verify_shards(output) == []
    manifest, splits = stored(output)
    with h5py.File(source) as file:
        raw, latitudes = file["t2m"][()], file["latitude"][()]
    begin = 0
    for split, num_times in (("train", 595), ("validation", 75), ("test", 74)):
        x, y = splits[split]
        part = raw[begin : begin + num_times]  # an example of 2 steps and 6 ahead lies wholly inside
        assert np.array_equal(x, np.stack([part[:-7], part[1:-6]], axis=1))
        assert np.array_equal(y, part[7:, None])
        begin += num_times
    assert begin == len(raw) and len(manifest.splits["train"]) == 6
    check_statistics(manifest, splits["train"][0])
    check_statistics(manifest, y=splits["train"][1])
    assert manifest.arrays["x"].channels == ("t2m t-1", "t2m")
    weights = np.array(manifest.target_weights)
    assert weights.shape == (33, 1) and np.isclose(weights.mean(), 1)
    np.testing.assert_allclose(weights[:, 0] / weights[0], np.cos(latitudes / 180 * np.pi) / np.cos(58 / 180 * np.pi))
    details = manifest.details
    assert details["lead_seconds"] == 6 * 3600 and details["units"] == {"t2m": "K"} and details["gaps"] == 0
    assert details["latitudes"] == latitudes.tolist() and details["longitudes"][0] == -10
    assert details["times"]["validation"] == ["2019-03-25T19:00:00", "2019-03-28T21:00:00"]
    assert manifest.name == "era5-t2m-uk" and "Copernicus" in manifest.licence


def test_members_are_examples_of_one_split(tmp_path):
    source = shared("weather", "era5_levels_members_2017-01.nc")
    flags = ("--validation-fraction", 0, "--test-fraction", 0.5, "--examples-per-shard", 3)
    manifest, splits = prepare(
        weather, tmp_path / "a", "--source", source, *flags, "--variables", "t", "z@500", "--targets", "z@850"
    )
    with h5py.File(source) as file:  # [members, times, levels, latitudes, longitudes]
        t, z = file["t"][()], file["z"][()]
    for split, time in (("train", 0), ("test", 2)):
        x, y = splits[split]
        assert np.array_equal(x, np.stack([t[:, time, 0], t[:, time, 1], z[:, time, 1]], axis=1))
        assert np.array_equal(y, z[:, time + 1, :1])
    assert manifest.arrays["x"].channels == ("t@850", "t@500", "z@500")
    assert manifest.arrays["y"].channels == ("z@850",) and manifest.details["members"] == 10
    flags = ("--validation-fraction", 0, "--test-fraction", 0, "--history", 2, "--levels", 500, "--targets", "t")
    manifest, splits = prepare(weather, tmp_path / "b", "--source", source, *flags)
    assert manifest.arrays["x"].channels == ("z@500 t-1", "t@500 t-1", "z@500", "t@500")
    x, y = splits["train"]
    assert len(x) == 20  # two times of ten members
    assert np.array_equal(x[13], np.stack([z[3, 1, 1], t[3, 1, 1], z[3, 2, 1], t[3, 2, 1]]))
    assert np.array_equal(y[13], t[3, 3, 1:])


@pytest.mark.filterwarnings("ignore::xarray.SerializationWarning")
def test_packed_fields_of_two_months(tmp_path):
    source = shared("weather", "eraint_uvz.nc")
    flags = ("--validation-fraction", 0, "--test-fraction", 0, "--source", source)
    manifest, splits = prepare(weather, tmp_path / "a", *flags)
    x, y = splits["train"]
    assert x.shape == y.shape == (1, 9, 241, 480) and "lead_seconds" not in manifest.details
    assert manifest.arrays["y"].channels[:4] == ("z@200", "z@500", "z@850", "u@200")
    with netCDF4.Dataset(source) as file:
        file.set_auto_maskandscale(False)
        for number, name in enumerate("zuv"):
            packed = file[name]
            raw = packed[:].astype(np.float64) * packed.scale_factor + packed.add_offset
            channels = slice(3 * number, 3 * number + 3)
            np.testing.assert_allclose(x[0, channels], raw[0], rtol=1e-6, atol=1e-4)
            np.testing.assert_allclose(y[0, channels], raw[1], rtol=1e-6, atol=1e-4)
    with pytest.raises(ConfigError, match="of 2 nothing is left"):
        prepare(weather, tmp_path / "b", "--source", source)
    with pytest.raises(ConfigError, match=r"the 1 times of 'train' hold no example of --history 1 and --lead 1"):
        prepare(weather, tmp_path / "b", *flags, "--test-fraction", 0.5)


TIMES = np.datetime64("2020-02-27T00") + np.arange(40) * np.timedelta64(6, "h")
LATITUDES = np.array([40.0, 45.0, 60.0])


def fields(times=TIMES, levels=(500, 850), **changes):
    """Fields t [times, levels, 3, 2], latitudes from south to north, whose values tell where they stand."""
    number = ((times - TIMES[0]) / np.timedelta64(6, "h")).reshape(-1, 1, 1, 1)
    values = number + np.reshape(levels, (-1, 1, 1)) + LATITUDES[:, None] / 100 + np.array([0, 0.001])
    coordinates = {"valid_time": times, "level": list(levels), "lat": LATITUDES, "lon": [1.0, 2.0]}
    dims = ("valid_time", "level", "lat", "lon")
    return xarray.Dataset({"t": (dims, values.astype(np.float32), {"units": "K"})}, coordinates | changes)


def write_fields(path, dataset):
    dataset.to_netcdf(path)
    return path


def expected(number, level):
    """The field t of a time and level, from north to south."""
    return (number + level + LATITUDES[::-1, None] / 100 + np.array([0, 0.001])).astype(np.float32)


def test_several_files_are_joined_and_turned(tmp_path):
    late = write_fields(tmp_path / "late.nc", fields(TIMES[15:]))
    early = write_fields(tmp_path / "early.nc", fields(TIMES[:15]))
    wind = fields().isel(level=[0]).squeeze("level", drop=True).rename(t="wind")
    other = write_fields(tmp_path / "wind.nc", wind.expand_dims(height=[10.0], axis=1) * -1)
    flags = ("--variables", "wind", "t@850", "--targets", "t@500", "--lead", 2, "--history", 2)
    manifest, splits = prepare(weather, tmp_path / "a", "--source", late, early, other, *flags)
    begin = 0
    for split, num_times in (("train", 32), ("validation", 4), ("test", 4)):
        x, y = splits[split]
        assert len(x) == num_times - 3
        for row, time in enumerate(range(begin + 1, begin + num_times - 2)):
            past = [f for age in (1, 0) for f in (-expected(time - age, 500), expected(time - age, 850))]
            assert np.array_equal(x[row], past) and np.array_equal(y[row, 0], expected(time + 2, 500))
        begin += num_times
    assert manifest.arrays["x"].channels == ("wind t-1", "t@850 t-1", "wind", "t@850")
    assert manifest.details["latitudes"] == [60, 45, 40] and manifest.details["latitudes_flipped"]
    assert manifest.details["lead_seconds"] == 12 * 3600
    assert (manifest.name, manifest.licence) == ("late", "not stated")
    assert manifest.source == "late.nc, early.nc, wind.nc"


@pytest.mark.parametrize("steps", [[6] * 20 + [1] * 8, [1] * 20 + [6] * 8, [6] * 9 + [3] * 2 + [6] * 9])
def test_steps_of_another_length_are_gaps(steps):
    """Files of six hours and of one, as an archive has them: an hour is no lead of six."""
    segments, step = weather.find_segments(np.cumsum([0, *steps]).astype("datetime64[h]"))
    usual = max(set(steps), key=steps.count)
    assert step == np.timedelta64(usual, "h")
    assert np.diff(segments).tolist() == [int(length != usual) for length in steps]


def test_no_example_reaches_over_a_gap(tmp_path):
    source = write_fields(tmp_path / "gap.nc", fields(np.delete(TIMES, [10, 11])))
    flags = ("--validation-fraction", 0, "--test-fraction", 0, "--targets", "t@500", "--lead", 3)
    manifest, splits = prepare(weather, tmp_path / "a", "--source", source, *flags)
    x, y = splits["train"]
    assert manifest.details["gaps"] == 1 and len(x) == 38 - 2 * 3
    np.testing.assert_allclose(y[:, 0] - x[:, 0], 3, atol=1e-4)


def test_a_calendar_without_leap_days(tmp_path):
    times = xarray.date_range("2020-02-20", periods=20, calendar="noleap", use_cftime=True)
    source = write_fields(tmp_path / "a.nc", fields(TIMES[:20]).assign_coords(valid_time=times))
    manifest, _ = prepare(weather, tmp_path / "a", "--source", source, "--lead", 1)
    assert manifest.details["lead_seconds"] == 24 * 3600 and manifest.details["gaps"] == 0
    assert manifest.details["times"]["train"] == ["2020-02-20 00:00:00", "2020-03-07 00:00:00"]


def test_missing_values_stop_or_leave_out_examples(tmp_path):
    two = xarray.concat([fields(), fields() + 1000], "member").assign_coords(member=[0, 1])
    two["t"][1, 5, 1, 0, 0] = np.nan  # second member, time 5, 850
    source = write_fields(tmp_path / "nan.nc", two)
    with pytest.raises(DataError, match=r"t@850 lacks values at 2020-02-28T06:00:00\. --missing drop"):
        prepare(weather, tmp_path / "a", "--source", source)
    flags = ("--history", 2, "--targets", "t@500", "--missing", "drop")
    x, y = prepare(weather, tmp_path / "b", "--source", source, *flags)[1]["train"]
    assert len(x) == 2 * (32 - 2) - 2  # the target has no hole: only as an input, new or old
    found = {tuple(pair) for pair in np.round(x[:, 2, 0, 0] - 500.6).astype(int)[:, None] // (1000, 1)}
    assert {(1, 1005), (1, 1006)}.isdisjoint(found) and {(0, 5), (0, 6), (1, 1004), (1, 1007)} <= found
    np.testing.assert_allclose(y[:, 0], x[:, 2] + 1, atol=1e-3)


def test_statistics_of_weather_come_from_training_times(tmp_path):
    first = write_fields(tmp_path / "a.nc", fields())
    wild = fields()
    wild["t"][32:] = 1e6
    second = write_fields(tmp_path / "b.nc", wild)
    calm, _ = prepare(weather, tmp_path / "a", "--source", first)
    stormy, splits = prepare(weather, tmp_path / "b", "--source", second)
    assert calm.statistics == stormy.statistics and (splits["test"][0] == 1e6).all()


def test_only_what_a_part_needs_is_read(tmp_path):
    """200 MB of zeros, packed: an example of 0.4 MB is read without the rest."""
    coordinates = {"time": np.arange(500), "lat": np.linspace(90, -90, 250), "lon": np.arange(200)}
    zeros = xarray.Dataset({"t": (tuple(coordinates), np.zeros((500, 250, 200)))}, coordinates)
    encoding = {"t": {"zlib": True, "chunksizes": (1, 250, 200)}}
    zeros.to_netcdf(tmp_path / "big.nc", encoding=encoding)
    options = weather.make_parser().parse_args(["--source", str(tmp_path / "big.nc"), "--output", "none"])
    tracemalloc.start()
    source, inputs, targets = weather.open_source(options)
    pairs = weather.find_pairs(range(500), np.zeros(500, int), *[np.ones((500, 1), bool)] * 2, history=1, leads=[1])
    x, _ = weather.make_examples(source, pairs, inputs, targets, 1, [1]).read(200, 202)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (2, 1, 250, 200) and peak < 10 * 2**20


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--variables", "q"), r"--variables q: the source has no such field\. It has t"),
        (("--targets", "t@700"), r"--targets t@700: t has no such level\. It has 500, 850"),
        (("--levels", "700"), r"--levels 700: t has no such level\. It has 500, 850"),
        (("--time-dim", "month"), r"--time-dim month: the source has no such dim\. Its dims are valid_time"),
        (("--history", "0"), r"--history 0: must be at least 1"),
        (("--lead", "-1"), r"--lead -1: must not be negative"),
        (("--lead", "5"), r"the 4 times of 'validation' hold no example of --history 1 and --lead 5"),
        (("--test-fraction", "1"), r"--test-fraction 1\.0: must be at least 0 and below 1"),
        (("--missing", "fill"), r"--missing: invalid choice: 'fill'"),
    ],
)
def test_wrong_flags_of_weather(flags, message, tmp_path):
    source = write_fields(tmp_path / "a.nc", fields())
    with pytest.raises(ConfigError, match=message):
        prepare(weather, tmp_path / "out", "--source", source, *flags)
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_used(tmp_path, monkeypatch):
    number = itertools.count()

    def refuse(message, *datasets, flags=(), kind=DataError):
        paths = [
            data if isinstance(data, os.PathLike) else write_fields(tmp_path / f"{next(number)}.nc", data)
            for data in datasets
        ]
        with pytest.raises(kind, match=message):
            prepare(weather, tmp_path / "out", "--source", *paths, *flags)

    (tmp_path / "a.grib").write_bytes(b"GRIB" + bytes(100))
    (tmp_path / "junk.nc").write_bytes(b"junk" * 100)
    refuse("a.grib cannot be opened.*For GRIB install cfgrib", tmp_path / "a.grib")
    refuse("junk.nc cannot be opened.*Is it a NetCDF file, and whole", tmp_path / "junk.nc")
    refuse("nowhere.nc cannot be read", tmp_path / "nowhere.nc")
    refuse("the times must increase, and .* comes after .*: a file is given twice", fields(TIMES[[0, 1, 1, 2]]))
    refuse("the times must increase, and", fields(TIMES[:10]), fields(TIMES[5:]))
    refuse(r"t has the dims .*step.*Select one entry of step", fields().expand_dims(step=[1, 2]))
    refuse("t has lat unlike other fields", fields(TIMES[:9]), fields(TIMES[9:], lat=LATITUDES + 1))
    refuse("t has level unlike other fields", fields(TIMES[:9]), fields(TIMES[9:], (500, 925)))
    rule = "u has times unlike other fields, such as 2020-02-27T00:00:00, which one of them lacks"
    refuse(rule, fields(), fields(TIMES[1:]).rename(t="u"))
    refuse("t: entry 3 of its times is missing", fields(np.array([*TIMES[:2], np.datetime64("NaT"), *TIMES[3:]])))
    refuse("lat is not sorted, or not in degrees", fields(lat=LATITUDES * 10))
    refuse("no variable has the dims", fields().assign(t=fields()["t"][0, 0]))
    refuse("--longitude-dim .not given.: .*valid_time, level, lat, x", fields().rename(lon="x"), kind=ConfigError)
    flat = fields().isel(level=0, drop=True)
    refuse("--levels .500.0.: no chosen field has levels", flat, flags=("--levels", 500), kind=ConfigError)
    monkeypatch.setitem(sys.modules, "xarray", None)
    refuse("needs xarray: pip install", tmp_path / "0.nc")


# What users' files are like: units that are no numbers to a decoder, calendars, grids, precision


def one_field(values, units, time=TIMES, latitudes=LATITUDES, **encoding):
    """A field [times, 3, 2] of float64, unless an encoding says otherwise."""
    coordinates = {"time": time, "lat": latitudes, "lon": [1.0, 2.0]}
    field = (tuple(coordinates), values, {"units": units})
    dataset = xarray.Dataset({"t": field}, coordinates)
    dataset["t"].encoding |= encoding
    return dataset


RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(40, 3, 2))
ALL = ("--validation-fraction", 0, "--test-fraction", 0)


@pytest.mark.parametrize("units", ["seconds", "s", "days", "hours", "minutes", "K", "1", ""])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "i4"])
def test_units_of_time_are_those_of_numbers(tmp_path, units, dtype):
    values = (5 + 10 * NOISE).astype(dtype)
    source = write_fields(tmp_path / "a.nc", one_field(values, units))
    _, splits = prepare(weather, tmp_path / "o", "--source", source, *ALL)
    np.testing.assert_allclose(splits["train"][0][:, 0], values[:-1, ::-1], rtol=1e-6)
    if dtype[0] == "f":
        values[3, 1, 1] = np.nan
        source = write_fields(tmp_path / "b.nc", one_field(values, units))
        with pytest.raises(DataError, match="t lacks values at 2020-02-27T18:00:00"):
            prepare(weather, tmp_path / "p", "--source", source, *ALL)


@pytest.mark.parametrize("fill", [1e20, 9.96921e36, -1e30, np.inf])
def test_a_fill_value_that_is_not_declared_is_no_weather(tmp_path, fill):
    values = np.where(NOISE > 2, fill, NOISE).astype("f4")
    with pytest.raises(DataError, match=r"which no weather has.*_FillValue"):
        prepare(weather, tmp_path / "o", "--source", write_fields(tmp_path / "a.nc", one_field(values, "K")), *ALL)
    declared = one_field(values, "K")
    declared["t"].attrs["missing_value"] = np.float32(fill)
    with pytest.raises(DataError, match="lacks values"):
        prepare(weather, tmp_path / "p", "--source", write_fields(tmp_path / "b.nc", declared), *ALL)


@pytest.mark.parametrize("packing", [{}, {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0}, {"dtype": "i2"}])
@pytest.mark.parametrize("names", [["valid_range"], ["valid_min", "valid_max"], ["valid_max"]])
def test_what_a_file_calls_not_valid_is_missing(tmp_path, names, packing):
    """The ends are valid, also where rounding moves them; the attributes are packed as the values are (CF)."""
    raw, wrong = np.clip(np.round(100 * NOISE), -150, 150), np.full(1, 151)
    bounds = {"valid_range": [-150, 150], "valid_min": -150, "valid_max": 150}
    stored_as = np.int16 if packing else np.float32
    for number, values in enumerate((raw, np.where(NOISE > 2, wrong, raw))):
        source = tmp_path / f"{number}.nc"
        dataset = one_field(values.astype(stored_as), "K")
        dataset["t"].attrs |= {name: np.array(bounds[name], stored_as) for name in names}
        dataset["t"].attrs |= {name: packing[name] for name in packing.keys() - {"dtype"}}
        source = write_fields(source, dataset)
        with pytest.raises(DataError, match="lacks values") if number else contextlib.nullcontext():
            prepare(weather, tmp_path / f"o{number}", "--source", source, *ALL)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("valid", [[0, 254], [100, 200]])
def test_what_is_valid_of_unsigned_bytes_is_unsigned(tmp_path, scale, valid):
    """Files of satellites: bytes, and valid_range, are signed, and _Unsigned says that they are not."""
    raw = np.clip(np.round(150 + 100 * NOISE), *valid).astype(np.uint8)
    dataset = one_field(raw.view(np.int8), "1")
    bounds = np.array(valid, np.uint8).view(np.int8)
    dataset["t"].attrs |= {"_Unsigned": "true", "valid_range": bounds, "scale_factor": np.float32(scale)}
    source = write_fields(tmp_path / "a.nc", dataset)
    _, splits = prepare(weather, tmp_path / "o", "--source", source, *ALL)
    np.testing.assert_array_equal(splits["train"][0][:, 0], scale * raw[:-1, ::-1])


@pytest.mark.parametrize("axis", ["lat", "lon"])
def test_a_grid_without_degrees_is_refused(tmp_path, axis):
    source = write_fields(tmp_path / "a.nc", one_field(NOISE, "K").drop_vars(axis))
    with pytest.raises(DataError, match=f"no variable {axis}"):
        prepare(weather, tmp_path / "o", "--source", source, *ALL)


@pytest.mark.parametrize(
    "units", ["radians", "km", "m", "1", "pixel", "degrees", "degrees_north", "Degree_N", "°N", ""]
)
def test_latitudes_are_in_degrees(tmp_path, units):
    """What they are weighted by is their cosine."""
    grid = one_field(NOISE, "K")
    grid["lat"].attrs["units"] = units
    is_wrong = units.lower()[:3] not in ("deg", "°n", "")
    with pytest.raises(DataError, match="not in degrees") if is_wrong else contextlib.nullcontext():
        prepare(weather, tmp_path / "o", "--source", write_fields(tmp_path / "a.nc", grid), *ALL)


@pytest.mark.parametrize("form", ["NETCDF3_CLASSIC", "NETCDF3_64BIT"])
@pytest.mark.parametrize("unlimited", [[], ["time"]])
@pytest.mark.parametrize("lacking", [0, 2, 100])
def test_a_file_that_ends_early_is_not_filled_up(tmp_path, form, unlimited, lacking):
    """NetCDF's library reads zeros beyond the end of a file of NetCDF-3, such as half a download."""
    grid = one_field(np.round(100 * NOISE).astype("i2"), "K")
    grid["t"].attrs["add_offset"] = 280.0
    whole = tmp_path / "whole.nc"
    grid[["time", "lat", "lon", "t"]].to_netcdf(whole, format=form, unlimited_dims=unlimited, engine="netcdf4")
    source = tmp_path / "a.nc"
    source.write_bytes(whole.read_bytes()[: -lacking or None])
    with pytest.raises(DataError, match="is shorter than its header says") if lacking else contextlib.nullcontext():
        prepare(weather, tmp_path / "o", "--source", source, *ALL)


@pytest.mark.parametrize("mark", [-9999.0, -999.0, 9999.0])
def test_a_mark_of_missing_values_is_said_once(tmp_path, mark, caplog):
    weather.say_mark.cache_clear()
    source = write_fields(tmp_path / "a.nc", one_field(np.where(NOISE > 2, mark, NOISE).astype("f4"), "K"))
    prepare(weather, tmp_path / "o", "--source", source, *ALL, "--examples-per-shard", 4)
    assert caplog.text.count(f"t has the extreme value {mark:g}") == 1


@pytest.mark.parametrize("packing", [{}, {"dtype": "i2", "scale_factor": 0.01, "add_offset": 280.0}, {"dtype": "f4"}])
@pytest.mark.parametrize("mean, spread", [(280.0, 10.0), (101325.0, 1e-3), (0.0, 1e-9), (1e5, 1.0)])
def test_fields_keep_their_differences(tmp_path, mean, spread, packing):
    """Of what is in the file: a packed or float32 file has lost the smallest already."""
    encoding = packing | ({"_FillValue": -32767} if packing.get("dtype") == "i2" else {})
    if packing.get("dtype") == "i2":
        encoding |= {"scale_factor": spread / 100, "add_offset": mean}
    source = write_fields(tmp_path / "a.nc", one_field(mean + spread * NOISE, "Pa", **encoding))
    with xarray.open_dataset(source) as dataset:
        truth = dataset["t"].values.astype(np.float64)[:-1, ::-1]
    manifest, splits = prepare(weather, tmp_path / "o", "--source", source, *ALL)
    x, deviation = splits["train"][0][:, 0], max(truth.std(), 1e-30)
    assert np.abs((x.astype(np.float64) - truth) / deviation).max() < 1e-4
    is_wide = mean >= 1e5 * spread and packing.get("dtype") != "f4"
    assert manifest.arrays["x"].dtype == ("float64" if is_wide else "float32")
    got = ShardDataset(tmp_path / "o", "train").fetch(slice(None))[0][:, 0].numpy()
    if truth.std():
        np.testing.assert_allclose(got, (truth - truth.mean()) / truth.std(), atol=2e-4)


@pytest.mark.parametrize(
    "units, months", [("months since 1955-01-01", 1), ("years since 1900-07-01 00:00", 12), ("month since 850-3-1", 1)]
)
@pytest.mark.parametrize("part", [0.0, 0.5])
def test_months_and_years_since_a_date(tmp_path, units, months, part):
    time = ("time", np.arange(40) + part, {"units": units})
    source = write_fields(tmp_path / "a.nc", one_field(NOISE, "K", time))
    manifest, splits = prepare(weather, tmp_path / "o", "--source", source, *ALL)
    assert len(splits["train"][0]) == 39 and manifest.details["gaps"] == 0
    first, last = (np.datetime64(text) for text in manifest.details["times"]["train"])
    begin = units.split()[2].split("-")
    assert (first.astype("datetime64[M]") - np.datetime64(f"{int(begin[0]):04d}-{int(begin[1]):02d}")) == int(
        part * months
    )
    assert (last.astype("datetime64[M]") - first.astype("datetime64[M]")).astype(int) == 39 * months


def test_times_that_cannot_be_decoded_are_named(tmp_path):
    time = ("time", np.arange(40), {"units": "fortnights since 1955-01-01"})
    with pytest.raises(DataError, match=r"its times cannot be decoded.*'hours since"):
        prepare(weather, tmp_path / "o", "--source", write_fields(tmp_path / "a.nc", one_field(NOISE, "K", time)), *ALL)


ROUNDED = {
    "float32": lambda a: a.astype("f4"),
    "3 decimals": lambda a: np.round(a, 3),
    "1e-6": lambda a: a + 1e-6,
    "relative": lambda a: a * (1 + 1e-7),
}


@pytest.mark.parametrize("how", ROUNDED)
def test_grids_that_differ_by_rounding_are_one(tmp_path, how):
    latitudes = LATITUDES + 1 / 3
    a = write_fields(tmp_path / "a.nc", one_field(NOISE[:20], "K", TIMES[:20], latitudes))
    b = write_fields(tmp_path / "b.nc", one_field(NOISE[20:], "K", TIMES[20:], ROUNDED[how](latitudes)))
    _, splits = prepare(weather, tmp_path / "o", "--source", a, b, *ALL)
    assert len(splits["train"][0]) == 39
    c = write_fields(tmp_path / "c.nc", one_field(NOISE[20:], "K", TIMES[20:], latitudes + 0.25))
    with pytest.raises(DataError, match="t has lat unlike other fields"):
        prepare(weather, tmp_path / "p", "--source", a, c, *ALL)


@pytest.mark.parametrize("is_dim", [False, True], ids=["number", "dim"])
@pytest.mark.parametrize("name", ["height", "level", "number", "depth"])
@pytest.mark.parametrize("times", [slice(20, 40), slice(0, 20)], ids=["later", "the same"])
def test_files_of_several_heights_or_members_are_not_one_field(tmp_path, name, is_dim, times):
    """They were joined along time without a word where the times did not overlap."""
    paths = []
    for number, part in enumerate((slice(0, 20), times)):
        dataset = one_field(NOISE[part], "K", TIMES[part]).assign_coords({name: 10.0 * number})
        dataset = dataset.expand_dims(name, axis=1) if is_dim else dataset
        paths.append(write_fields(tmp_path / f"{number}.nc", dataset))
    with pytest.raises(DataError, match=f"t has {name} 0 in one file and 10 in another: these are different fields"):
        prepare(weather, tmp_path / "o", "--source", *paths, *ALL)
    joined = xarray.concat([xarray.load_dataset(path).assign(time=TIMES[:20]) for path in paths], name, data_vars="all")
    flags = ["--member-dim" if name == "number" else "--level-dim", name]
    manifest, splits = prepare(
        weather, tmp_path / "p", "--source", write_fields(tmp_path / "j.nc", joined), *flags, *ALL
    )
    assert len(splits["train"][0]) * len(manifest.arrays["x"].channels) == 19 * 2


@pytest.mark.parametrize(
    ("name", "units"), [("step", "hours"), ("forecast_period", "days"), ("year", ""), ("expver", "1")]
)
def test_what_is_of_a_time_may_differ_between_files_of_later_times(tmp_path, name, units):
    paths = []
    for number, part in enumerate((slice(0, 20), slice(20, 40))):
        dataset = one_field(NOISE[part], "K", TIMES[part]).assign_coords({name: ((), float(number), {"units": units})})
        paths.append(write_fields(tmp_path / f"{number}.nc", dataset))
    _, splits = prepare(weather, tmp_path / "o", "--source", *paths, *ALL)
    assert len(splits["train"][0]) == 39


def test_units_that_differ_between_files_are_no_units(tmp_path):
    a = write_fields(tmp_path / "a.nc", one_field(NOISE[:20] + 280, "K", TIMES[:20]))
    b = write_fields(tmp_path / "b.nc", one_field(NOISE[20:] + 7, "degC", TIMES[20:]))
    with pytest.raises(DataError, match="t has the units K and degC in different files"):
        prepare(weather, tmp_path / "o", "--source", a, b, *ALL)
    radians = one_field(NOISE, "K", latitudes=np.deg2rad(LATITUDES))
    radians["lat"].attrs["units"] = "radians"
    with pytest.raises(DataError, match="lat is not sorted, or not in degrees"):
        prepare(weather, tmp_path / "o", "--source", write_fields(tmp_path / "c.nc", radians), *ALL)


@pytest.mark.parametrize("first", [1, 5])
def test_preliminary_values_fill_what_is_not_final(tmp_path, first, caplog):
    final = one_field(np.where(np.arange(40)[:, None, None] < 25, NOISE, np.nan), "K")
    preliminary = one_field(np.where(np.arange(40)[:, None, None] >= 25, NOISE, np.nan), "K")
    both = xarray.concat([final, preliminary], "expver").assign_coords(expver=[1, 5]).sel(expver=[first, 6 - first])
    with caplog.at_level("INFO"):
        _, splits = prepare(weather, tmp_path / "o", "--source", write_fields(tmp_path / "a.nc", both), *ALL)
    assert "expver" in caplog.text
    np.testing.assert_allclose(splits["train"][0][:, 0], NOISE[:-1, ::-1], rtol=1e-6)


# --- arrays --------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepare_images(tmp_path, images):
    """Write encoded images; return x as it is stored."""
    np.savez(
        tmp_path / "images.npz", x=np.frombuffer(b"".join(images), np.uint8), y=np.arange(len(images)) % 2,
        offsets=np.cumsum([0, *map(len, images)]),
    )  # fmt: skip
    flags = ("--train", tmp_path / "images.npz", "--encoded", "offsets", "--classes", 2)
    return prepare(arrays, tmp_path / "out", *flags)[1]["train"][0]


LEVELS = {  # grey levels of 8 x 6 pixels, and how they are stored
    "8 bits": ((RNG.integers(0, 256, (8, 6))).astype(np.uint8), "PNG"),
    "16 bits": ((RNG.integers(0, 65536, (8, 6))).astype(np.uint16), "PNG"),
    "16 bits, TIFF": ((RNG.integers(0, 65536, (8, 6))).astype(np.uint16), "TIFF"),
    "32 bits": (RNG.integers(0, 2**31, (8, 6)).astype(np.int32), "TIFF"),
    "floating point": (RNG.normal(size=(8, 6)).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("depth", LEVELS)
def test_no_grey_level_is_lost(tmp_path, depth):
    pixels, kind = LEVELS[depth]
    x = prepare_images(tmp_path, [encoded(Image.fromarray(pixels), kind)] * 3)
    assert x.shape == (3, 3, 8, 6) and np.array_equal(x[1, 2], pixels)
    got, _ = ShardDataset(tmp_path / "out", "train").fetch([0])
    assert len(np.unique(got)) == len(np.unique(pixels))


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_a_viewer_turns_them(tmp_path, orientation, mode):
    upright = RNG.integers(0, 256, (8, 6)).astype(np.uint16 if mode == "I;16" else np.uint8)
    stored = {  # by the definition of the EXIF tag: which sides of the scene row 0 and column 0 of the file are
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
        6: np.rot90(upright), 7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    image = image.convert("RGB") if mode == "RGB" else image
    exif = image.getexif()
    exif[0x0112] = orientation
    x = prepare_images(tmp_path, [encoded(image, exif=exif)] * 2)
    assert np.array_equal(x[0, 1], upright)


def rgb_of_16_bits(width=6):
    """A PNG of three colours of 16 bits, which Pillow cannot write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + RNG.integers(0, 65536, 18).astype(">u2").tobytes() for _ in range(8))
    header = struct.pack(">IIBBBBB", width, 8, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_what_an_image_would_lose_is_refused(tmp_path):
    grey, deep = (Image.fromarray(LEVELS[depth][0]) for depth in ("8 bits", "16 bits"))
    frames = encoded(grey, "GIF", save_all=True, append_images=[grey.rotate(180)])
    for images, words in (
        ([rgb_of_16_bits()] * 2, "16 bits per colour, which Pillow reads as 8"),
        ([frames] * 2, "the image has frames"),
        ([encoded(grey), encoded(deep)], "different dtypes, uint16 and uint8"),
        ([rgb_of_16_bits(10**9)] * 2, "example [01]: the image cannot be decoded .*exceeds limit"),
    ):
        with pytest.raises(DataError, match=words):
            prepare_images(tmp_path, images)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "GIF"])
@pytest.mark.parametrize("is_opaque", [False, True])
def test_colours_beneath_what_is_transparent_are_no_colours(tmp_path, mode, is_opaque):
    """A viewer does not show them; Pillow's conversion to RGB does."""
    grey = Image.fromarray(LEVELS["8 bits"][0])
    if mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        image.putalpha(Image.new("L", grey.size, 255 if is_opaque else 254))
        content = encoded(image)
    else:
        image = grey.quantize(8)
        first = 255 if is_opaque else int(np.asarray(image)[0, 0])
        content = encoded(image, "PNG" if mode == "P" else mode, transparency=first)
    with pytest.raises(DataError, match="transparency, of which") if not is_opaque else contextlib.nullcontext():
        x = prepare_images(tmp_path, [content] * 2)
        assert np.array_equal(x[0].transpose(1, 2, 0), image.convert("RGB"))


@pytest.mark.parametrize("script", ["arrays", "tabular", "timeseries"])
@pytest.mark.parametrize("offset, spread, dtype", [(1e5, 0.02, "float64"), (2458849.5, 1.0, "float64"), (1.7e9, 1e3, "float64"),
                                                    (280.0, 10.0, "float32"), (0.0, 1e-9, "float32")])  # fmt: skip
def test_no_difference_is_rounded_away(tmp_path, script, offset, spread, dtype):
    """From the file to what a network gets; of a series the levels, and what they change by."""
    values = offset + spread * (np.arange(300) + RNG.normal(size=300)) / 100
    if script == "arrays":
        np.savez(tmp_path / "a.npz", x=values[:, None], y=values)
        made = prepare(arrays, tmp_path / "o", "--train", tmp_path / "a.npz")
    else:
        times = np.datetime64("2024-01-01T00:00") + np.arange(300) * np.timedelta64(1, "h")
        rows = [f"{time},{value!r},{value!r}" for time, value in zip(times, values.tolist())]
        (tmp_path / "a.csv").write_text("\n".join(["time,a,b", *rows]))
        flags = ("--source", tmp_path / "a.csv", *ALL)
        if script == "tabular":
            made = prepare(tabular, tmp_path / "o", *flags, "--target", "b", "--features", "a")
        else:
            flags = (*flags, "--targets", "a", "--window", 1, "--horizon", 1)
            made = prepare(timeseries, tmp_path / "o", *flags)
            changes = prepare(timeseries, tmp_path / "p", *flags, "--changes")[1]["train"][1].ravel()
            np.testing.assert_allclose(changes, np.diff(values), rtol=1e-6, atol=1e-10 * offset)
    manifest, _ = made
    assert manifest.arrays["x"].dtype == manifest.arrays["y"].dtype == dtype
    x, y = ShardDataset(tmp_path / "o", "train").fetch(slice(None))
    kept = values[:-1] if script == "timeseries" else values
    for got in (x,) if script == "timeseries" else (x, y):
        expected = (kept - kept.mean()) / kept.std()
        np.testing.assert_allclose(np.sort(got.numpy().ravel()), np.sort(expected), atol=3e-5)
        assert len(np.unique(got)) > 0.99 * len(kept)


def test_ids_of_a_text_are_asked_for(tmp_path, caplog):
    np.savez(tmp_path / "t.npz", x=RNG.integers(0, 1000, (60, 12)), y=np.arange(60) % 2)
    flags = ("--train", tmp_path / "t.npz", "--classes", 2)
    with caplog.at_level("INFO"):
        prepare(arrays, tmp_path / "a", *flags)
    assert "give --ids if they name things" in caplog.text
    manifest, _ = prepare(arrays, tmp_path / "b", *flags, "--ids")
    assert "x" not in manifest.statistics and manifest.is_whole("x")
    np.savez(tmp_path / "f.npz", x=RNG.normal(size=(60, 12)), y=np.arange(60) % 2)
    with pytest.raises(ConfigError, match="--ids float64: ids are whole numbers"):
        prepare(arrays, tmp_path / "c", "--train", tmp_path / "f.npz", "--ids")


def test_two_ranks_decode_the_images_of_the_file(mpirun, tmp_path):
    whole = np.load(shared("cifar10", "cifar10_jpeg.npz"))
    raw = {}
    for split, number in (("train", 3000), ("test", 1000)):  # the first images, to be quick
        offsets = raw[f"{split}_offsets"] = whole[f"{split}_offsets"][: number + 1]
        raw[f"{split}_jpeg"] = whole[f"{split}_jpeg"][: offsets[-1]]
        raw[f"{split}_labels"] = whole[f"{split}_labels"][:number]
    source, output = tmp_path / "some.npz", tmp_path / "out"
    np.savez(source, **raw)
    flags = ("--x", "{split}_jpeg", "--y", "{split}_labels", "--encoded", "{split}_offsets", "--classes", 10)
    flags = (*flags, "--validation-fraction", 0.1, "--licence", "none stated")  # as --help has it
    ranks = ("--output", output, "--examples-per-shard", 600)
    done = mpirun(2, "data_prep/arrays.py", "--train", source, "--test", source, *flags, *ranks)
    assert done.returncode == 0, done.stderr
    assert verify_shards(output) == []
    manifest, splits = stored(output)
    counts = {split: len(y) for split, (_, y) in splits.items()}
    assert counts == {"train": 2700, "validation": 300, "test": 1000} and len(manifest.splits["train"]) == 5
    assert (manifest.name, manifest.source, manifest.licence) == ("some", "some.npz", "none stated")
    x, y = splits["test"]
    offsets, content = raw["test_offsets"], raw["test_jpeg"].tobytes()
    for row in range(1000):
        image = Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]]))
        assert np.array_equal(x[row].transpose(1, 2, 0), np.asarray(image))
    assert y.dtype == np.int64 and np.array_equal(y, raw["test_labels"]) and manifest.num_classes == 10
    labels = np.concatenate([splits["train"][1], splits["validation"][1]])
    assert np.bincount(labels).tolist() == [300] * 10  # each run of ten is balanced
    check_statistics(manifest, splits["train"][0])


def test_held_out_images_are_dealt_by_the_seed_and_no_statistics_come_from_them(tmp_path):
    source = shared("cifar10", "cifar10_train_first4000_lossless.npz")
    raw = np.load(source)
    images, labels = raw["images"], raw["labels"]
    flags = ("--x", "images", "--y", "labels", "--channels-last", "--classes", 10, "--validation-fraction", 0.1)
    flags = (*flags, "--test-fraction", 0.25, "--seed", 3)
    manifest, splits = prepare(arrays, tmp_path / "a", "--train", source, *flags)
    assert {split: len(y) for split, (_, y) in splits.items()} == {"train": 2600, "validation": 400, "test": 1000}
    number = {image.tobytes(): row for row, image in enumerate(images)}
    assert len(number) == 4000  # no image twice
    rows = {split: [number[image.transpose(1, 2, 0).tobytes()] for image in x] for split, (x, _) in splits.items()}
    assert sorted(row for part in rows.values() for row in part) == list(range(4000))
    assert all(np.array_equal(y, labels[rows[split]]) for split, (_, y) in splits.items())
    check_statistics(manifest, images[rows["train"]].transpose(0, 3, 1, 2))
    wild = images.copy()
    wild[rows["test"] + rows["validation"]] = 255
    np.savez(tmp_path / "wild.npz", images=wild, labels=labels)
    again, splits = prepare(arrays, tmp_path / "b", "--train", tmp_path / "wild.npz", *flags)
    assert again.statistics == manifest.statistics and (splits["test"][0] == 255).all()


def save(directory, **named):
    for name, array in named.items():
        np.save(directory / f"{name}.npy", array)
    return ",".join(str(directory / f"{name}.npy") for name in named)


def test_pairs_of_npy_files_become_numbers(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(3, 2, (50, 4, 6)), rng.normal(size=50)
    train, test = save(tmp_path, x=x, y=y), save(tmp_path, u=x[:9] * 100, v=y[:9])
    flags = ("--train", train, "--test", test, "--validation-fraction", 0.2, "--add-channel", "--name", "toy")
    manifest, splits = prepare(arrays, tmp_path / "a", *flags, "--source-text", "made by the test")
    assert manifest.arrays["x"].shape == (1, 4, 6) and manifest.arrays["y"].shape == (1,)
    assert manifest.arrays["x"].dtype == manifest.arrays["y"].dtype == "float32"
    assert (manifest.name, manifest.source, manifest.licence) == ("toy", "made by the test", "not stated")
    held = splits["validation"]
    assert len(held[0]) == 10 and set(held[1][:, 0]).isdisjoint(splits["train"][1][:, 0])
    order = np.argsort(np.concatenate([splits["train"][1], held[1]])[:, 0])
    found = np.concatenate([splits["train"][0], held[0]])[order, 0]
    assert np.array_equal(found, x[np.argsort(y)].astype(np.float32))
    assert np.array_equal(splits["test"][0][:, 0], (x[:9] * 100).astype(np.float32))
    check_statistics(manifest, splits["train"][0])
    check_statistics(manifest, y=splits["train"][1])


def test_images_with_their_channels_last_are_said(tmp_path, caplog):
    caplog.set_level("WARNING")
    for shape, flags in (((8, 8, 3), ("--channels-last",)), ((3, 8, 8), ()), ((8, 8, 6), ()), ((8, 8, 3), ())):
        arrays.say_channels.cache_clear()
        assert "channels" not in caplog.text
        prepare(
            arrays, tmp_path / "o", "--train", save(tmp_path, x=np.zeros((5, *shape)), y=np.zeros(5)), *flags, "--force"
        )
    assert caplog.text.count("taken as 8 channels of 8 x 3: if the channels are last, give --channels-last") == 1


def test_npy_files_stay_on_disk(tmp_path):
    """An array of 1 GB with no blocks on disk: two examples are read without the rest."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (1000, 512, 512))
    spec = f"{tmp_path / 'x.npy'},{save(tmp_path, y=np.zeros(1000))}"
    options = arrays.make_parser().parse_args(["--train", spec, "--output", "none"])
    tracemalloc.start()
    source = arrays.open_source("train", spec, options)
    x, _ = arrays.make_examples(source, np.arange(0, 1000, 2), options).read(100, 102)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert x.shape == (2, 512, 512) and peak < 20 * 2**20


MODULE = """
import torch

class Squares(torch.utils.data.Dataset):
    num_wrong = 0
    def __len__(self):
        return 20
    def __getitem__(self, row):
        if row == 15 and self.num_wrong:
            raise OSError("the disk is gone")
        return torch.full((1, 3), float(row + self.num_wrong)), row % 4

squares, make, text = Squares(), lambda: Squares(), "text"
stream = lambda: iter([])
ragged = [(torch.zeros(n), 0) for n in (1, 2)]
triples = [(1, 2, 3)]
empty = []
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that only the working directory holds."""
    (tmp_path / "my_squares.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_squares"
    sys.modules.pop("my_squares", None)


def test_datasets_of_pytorch(module, tmp_path):
    for name in ("squares", "make", "Squares"):
        flags = ("--train", f"{module}.{name}", "--classes", 4, "--test-fraction", 0.25)
        manifest, splits = prepare(arrays, tmp_path / name, *flags)
        x = np.concatenate([splits["train"][0], splits["test"][0]])
        assert sorted(x[:, 0, 2]) == list(range(20)) and (len(splits["train"][0]), len(splits["test"][0])) == (15, 5)
        for part_x, part_y in splits.values():
            assert np.array_equal(part_x[:, 0, 0] % 4, part_y)
        assert manifest.name == manifest.source == f"my_squares.{name}"


def test_a_preparation_of_a_dataset_is_never_continued(module, tmp_path):
    flags = ("--train", f"{module}.squares", "--classes", 4, "--examples-per-shard", 5)
    sys.path.append(str(tmp_path))
    import my_squares

    my_squares.Squares.num_wrong = 1  # its content is wrong, and it fails in the last file
    with pytest.raises(HpcBnnError, match="the disk is gone"):
        prepare(arrays, tmp_path / "a", *flags)
    assert (tmp_path / "a/.preparation/train-00000.h5").exists()
    my_squares.Squares.num_wrong = 0
    _, splits = prepare(arrays, tmp_path / "a", *flags)
    assert splits["train"][0][:, 0, 0].tolist() == list(range(20))


def test_a_preparation_of_files_is_continued(tmp_path):
    spec = save(tmp_path, x=np.arange(20.0)[:, None], y=np.array([0.0] * 19 + [np.nan]))
    flags = ("--train", spec, "--examples-per-shard", 5)
    with pytest.raises(DataError, match="train, example 19: y holds a value that is not finite"):
        prepare(arrays, tmp_path / "a", *flags)
    written = tmp_path / "a/.preparation/train-00000.h5"
    first = written.stat()
    with pytest.raises(DataError, match="not finite"):
        prepare(arrays, tmp_path / "a", *flags)
    assert written.stat().st_mtime_ns == first.st_mtime_ns
    save(tmp_path, y=np.zeros(20))
    prepare(arrays, tmp_path / "a", *flags)
    assert (tmp_path / "a" / "train-00000.h5").stat().st_mtime_ns != first.st_mtime_ns  # another source


def test_arrays_that_cannot_be_used(module, tmp_path):
    def refuse(kind, message, *flags):
        with pytest.raises(kind, match=message):
            prepare(arrays, tmp_path / "out", *flags)

    x, y = np.zeros((6, 2)), np.array([0, 1, 2, 3, 9, 0])
    pair, short = save(tmp_path, x=x, y=y), save(tmp_path, u=x, v=y[:5])
    refuse(DataError, r"--train .*, example 4: y is 9, and --classes 4 allows 0 to 3", "--train", pair, "--classes", 4)
    refuse(DataError, r"x is \(6, 2\) and y \(5,\)", "--train", short)
    refuse(ConfigError, r"--classes 1: must be at least 2", "--train", pair, "--classes", 1)
    refuse(ConfigError, r"--train .*x\.npy: two files are needed", "--train", tmp_path / "x.npy")
    refuse(DataError, r"nowhere\.npy cannot be read", "--train", f"{tmp_path}/nowhere.npy,{tmp_path}/y.npy")
    refuse(DataError, r"cannot be read as NumPy's", "--train", save(tmp_path, o=np.array([{}] * 6), y=y))
    refuse(DataError, r"--classes needs one number", "--train", save(tmp_path, w=x, z=np.eye(6)), "--classes", 6)
    refuse(DataError, r"y is 0\.5", "--train", save(tmp_path, w=x, z=np.full(6, 0.5)), "--classes", 6)
    refuse(DataError, r"x has dtype <U1", "--train", save(tmp_path, w=np.array(["a"] * 6), y=y))
    refuse(ConfigError, r"--channels-last \(1, 2\)", "--train", pair, "--channels-last")
    refuse(
        ConfigError,
        r"--add-channel: not allowed with argument --channels-last",
        "--train",
        pair,
        "--channels-last",
        "--add-channel",
    )
    refuse(
        ConfigError, r"--test-fraction 0\.5: --test .* is given, too",
        "--train", pair, "--test", pair, "--test-fraction", 0.5,
    )  # fmt: skip
    trained = "these are the examples of --train: a network would be judged by what it was trained on"
    refuse(ConfigError, f"--test .*: {trained}", "--train", pair, "--test", pair)
    refuse(
        ConfigError, f"--validation .*: {trained}", "--train", tmp_path / "a.npz", "--validation", tmp_path / "a.npz"
    )
    refuse(ConfigError, r"--encoded o: --train .* is no \.npz file", "--train", pair, "--encoded", "o")
    np.savez(tmp_path / "a.npz", x=x, y=y, offsets=np.arange(7) * 9, bytes=np.zeros(54, np.uint8))
    npz = ("--train", tmp_path / "a.npz")
    refuse(ConfigError, r"--x train_x: .* has no such key\. It has x, y, offsets, bytes", *npz, "--x", "{split}_x")
    refuse(DataError, r"example 0: the image cannot be decoded", *npz, "--x", "bytes", "--encoded", "offsets")
    refuse(DataError, r"the offsets do not increase within the 6 bytes", *npz, "--encoded", "offsets")
    (tmp_path / "b.npz").write_bytes((tmp_path / "x.npy").read_bytes())
    refuse(DataError, r"b\.npz is one array where its name says \.npz", "--train", tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    refuse(DataError, r"c\.npz cannot be read", "--train", tmp_path / "c.npz")
    refuse(ConfigError, r"--train my_squares\.nothing: it cannot be imported", "--train", f"{module}.nothing")
    refuse(DataError, r"is no map-style dataset", "--train", f"{module}.stream")
    refuse(DataError, r"different shapes, such as \(1,\) and \(2,\)", "--train", f"{module}.ragged")
    refuse(DataError, r"example 0: an item must be a pair", "--train", f"{module}.triples")
    refuse(DataError, r"it holds no example", "--train", f"{module}.empty")


# --- CIFAR-10 ------------------------------------------------------------------------------------------

SIZE = 600  # images of a batch here


@pytest.fixture(scope="module")
def batches():
    """Pixels [600, 3072] and labels [600] of six batches, balanced; real images where they are at hand."""
    rng = np.random.default_rng(0)
    source = SHARED_DATA / "cifar10" / "cifar10_train_first4000_lossless.npz"
    if source.exists():
        raw = np.load(source)
        images, labels = raw["images"].transpose(0, 3, 1, 2).reshape(-1, 3072), raw["labels"].astype(int)
    else:
        images, labels = rng.integers(0, 256, (4000, 3072), np.uint8), np.arange(4000) % 10
    rows = np.stack([np.flatnonzero(labels == c)[:360] for c in range(10)])
    rows = np.concatenate([rng.permutation(rows[:, :300].ravel()), rng.permutation(rows[:, 300:].ravel())])
    return [(images[part], labels[part]) for part in np.split(rows, 6)]


def python2_pickle(pixels, labels):
    """A batch as Python 2 and its NumPy have pickled it (protocol 2, strings of bytes)."""

    def text(content):
        return b"T" + struct.pack("<i", len(content)) + content

    def number(value):
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = number(len(pixels)) + number(3072) + b"\x86"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    items = text(b"data") + array + text(b"labels") + b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + items + text(b"batch_label") + text(b"training batch") + b"u."


def records(pixels, labels):
    return np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


def write_batches(directory, contents, suffix=""):
    directory.mkdir()
    for name, content in zip(cifar10.BATCHES, contents):
        (directory / f"{name}{suffix}").write_bytes(content)
    return directory


def pack(directory):
    path = directory.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(directory, directory.name)
    return path


def md5(content):
    return hashlib.md5(content).hexdigest()


def test_all_versions_of_cifar10_hold_the_same_images(batches, tmp_path):
    python = write_batches(tmp_path / "cifar-10-batches-py", [python2_pickle(*batch) for batch in batches])
    binary = write_batches(tmp_path / "cifar-10-batches-bin", [records(*batch) for batch in batches], ".bin")
    archives = {cifar10.PYTHON: pack(python), cifar10.BINARY: pack(binary)}
    sums = {path.name: md5(path.read_bytes()) for path in python.iterdir()}
    sums |= {name: md5(path.read_bytes()) for name, path in archives.items()}
    pixels, labels = (np.concatenate(part) for part in zip(*batches))
    for source in (python, binary, *archives.values()):
        x, y = cifar10.load(source, sums, SIZE)
        assert x.shape == (3600, 3, 32, 32) and x.dtype == np.uint8 and y.dtype == np.int64
        assert np.array_equal(x.reshape(-1, 3072), pixels) and np.array_equal(y, labels)
        with pytest.raises(DataError, match=r"is not the published file|has 1843800 bytes, expected 30730000"):
            cifar10.load(source)
    for source in (python / "data_batch_3", *archives.values()):
        content = bytearray(source.read_bytes())
        content[len(content) // 2] ^= 1
        source.write_bytes(content)
        with pytest.raises(DataError, match="is not the published file: MD5"):
            cifar10.load(python if source.parent == python else source, sums, SIZE)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("broken_in",)


def test_no_pickle_is_executed(batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil(), protocol=2)
    contents = [evil, *(python2_pickle(*batch) for batch in batches[1:])]
    source = write_batches(tmp_path / "py", contents)
    with pytest.raises(DataError, match="is not the published file"):
        cifar10.load(source)
    with pytest.raises(DataError, match=r"a batch asks for posix\.mkdir"):
        cifar10.load(source, {path.name: md5(path.read_bytes()) for path in source.iterdir()}, SIZE)
    for allowed in ("numpy\nload", "builtins\neval", "__builtin__\neval"):
        with pytest.raises(DataError, match="which no batch of CIFAR-10 needs"):
            cifar10.unpickle(b"c" + allowed.encode() + b"\n.")
    assert not (tmp_path / "broken_in").exists()


def test_wrong_directories_are_not_taken_for_cifar10(batches, tmp_path):
    contents = [records(*batch) for batch in batches]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds neither data_batch_1 nor data_batch_1\.bin"):
        cifar10.load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"nowhere cannot be read"):
        cifar10.load(tmp_path / "nowhere")
    source = write_batches(tmp_path / "bin", contents, ".bin")
    for label in (10, 1 + contents[0][0] % 9):  # not a class; one image in another class
        (source / "data_batch_1.bin").write_bytes(bytes([label]) + contents[0][1:])
        with pytest.raises(DataError, match=r"the training images per class are .*, expected \[300, 300"):
            cifar10.load(source, batch_size=SIZE)
    (source / "data_batch_1.bin").write_bytes(contents[0][:-1])
    with pytest.raises(DataError, match=r"data_batch_1\.bin has 1843799 bytes, expected 1843800"):
        cifar10.load(source, batch_size=SIZE)
    (source / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin cannot be read"):
        cifar10.load(source, batch_size=SIZE)


def test_the_script_writes_60000_images_with_two_ranks(mpirun, tmp_path):
    """Random pixels, balanced labels: the official files are too large to be beside the tests."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.permutation(np.arange(n) % 10) for n in (50_000, 10_000)])
    pixels = rng.integers(0, 256, (60_000, 3072), np.uint8)
    pixels[:50_000] //= 2  # the test images are brighter: no statistics may come from them
    contents = [records(*batch) for batch in zip(np.split(pixels, 6), np.split(labels, 6))]
    source = write_batches(tmp_path / "cifar-10-batches-bin", contents, ".bin")
    flags = ("--num-validation", 5000, "--seed", 7)
    done = mpirun(2, "data_prep/cifar10.py", "--source", source, "--output", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    manifest, splits = stored(tmp_path / "out")
    assert {split: len(y) for split, (_, y) in splits.items()} == {"test": 10_000, "train": 45_000, "validation": 5000}
    assert np.array_equal(splits["test"][0].reshape(-1, 3072), pixels[50_000:])
    assert np.array_equal(splits["test"][1], labels[50_000:])
    first = {image[:16].tobytes(): row for row, image in enumerate(pixels[:50_000])}
    rows = {
        split: [first[image[0, 0, :16].tobytes()] for image in splits[split][0]] for split in ("train", "validation")
    }
    assert sorted(rows["train"] + rows["validation"]) == list(range(50_000))
    assert all(np.array_equal(splits[split][1], labels[rows[split]]) for split in rows)
    check_statistics(manifest, splits["train"][0])
    assert manifest.num_classes == 10 and manifest.details["classes"][6] == "frog"
    assert set(manifest.statistics) == {"x"} and manifest.arrays["x"].channels == ("red", "green", "blue")
    shutil.rmtree(source)
    shutil.rmtree(tmp_path / "out")
