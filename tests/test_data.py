"""Shard directories and the order of examples."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import torch
from conftest import REPOSITORY, SHARED_DATA, python
from preparation import start as prepare
from scipy import stats

from hpc_bnn import Grid
from hpc_bnn.comm import connect_for_files
from hpc_bnn.data import (
    BatchLoader,
    EpochOrder,
    Manifest,
    ShardDataset,
    global_batches,
    stage_shards,
    unstage_shards,
    verify_shards,
    write_shards,
    writer,
)
from hpc_bnn.data.manifest import ShardFile, sha256_of_json
from hpc_bnn.data.stage import in_turn
from hpc_bnn.errors import ConfigError, DataError, HpcBnnError, RankError
from hpc_bnn.safe_files.locks import LOCK, Lock

FACTS = {"name": "toy", "source": "made by the test", "licence": "none"}


def toy(n=23):
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (n, 2, 5)).astype(np.float32), np.arange(n)


@pytest.fixture
def shards(tmp_path):
    splits = {"train": toy(), "test": toy(7)}
    write_shards(tmp_path / "toy", splits, **FACTS, num_classes=23, examples_per_shard=10)
    return tmp_path / "toy"


def test_arrays_come_back_normalised_by_the_training_split(shards):
    x, _ = toy()
    assert sorted(p.name for p in shards.iterdir()) == [
        "manifest.json", "test-00000.h5", "train-00000.h5", "train-00001.h5", "train-00002.h5"
    ]  # fmt: skip
    dataset = ShardDataset(shards, "train", dtype=torch.float64)
    assert len(dataset) == 23 and dataset.in_shape == (2, 5)
    got, target = dataset.fetch(torch.tensor([22, 0, 11]))
    mean, std = x.mean(axis=(0, 2), dtype=np.float64), x.std(axis=(0, 2), dtype=np.float64)
    expected = (x[[22, 0, 11]].astype(np.float64) - mean[:, None]) / std[:, None]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-12)
    assert target.tolist() == [22, 0, 11]
    test = ShardDataset(shards, "test", dtype=torch.float64)
    assert test.manifest.statistics == dataset.manifest.statistics  # no statistics of the test split
    assert torch.equal(test.fetch(slice(0, 3))[0], dataset.fetch(slice(0, 3))[0])


def test_files_are_chunked_by_whole_examples_with_checksums(shards):
    with h5py.File(shards / "train-00000.h5") as file:
        assert file["x"].fletcher32 and file["y"].fletcher32
        assert file["x"].chunks[1:] == (2, 5)
    manifest = Manifest.read(shards)
    assert manifest.num_examples("train") == 23 and manifest.licence == "none"
    assert [shard.num_examples for shard in manifest.splits["train"]] == [10, 10, 3]


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("length", [5, 3000], ids=["whole_chunks", "chunks_of_one"])
def test_examples_read_one_by_one_equal_those_in_memory(tmp_path, compression, length):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(23, 2, length)).astype(np.float32), rng.normal(size=(23, 70)).astype(np.float32)
    write_shards(tmp_path, {"train": (x, y)}, **FACTS, examples_per_shard=10, compression=compression)
    memory, files = (ShardDataset(tmp_path, "train", reading=reading) for reading in ("node", "rank"))
    for indices in (torch.tensor([22, 0, 11, 3, 3]), torch.arange(23), torch.tensor([], dtype=torch.int64)):
        for a, b in zip(memory.fetch(indices), files.fetch(indices)):
            assert torch.equal(a, b) and len(a) == len(indices)
    assert memory.num_bytes_read == sum(path.stat().st_size for path in tmp_path.glob("*.h5"))
    if length == 3000 and compression is None:
        before = files.num_bytes_read
        files.fetch(torch.tensor([7, 8]))  # two chunks of one x, one chunk of the ten y; each ends in fletcher32
        assert files.num_bytes_read - before == 2 * (2 * length * 4 + 4) + (10 * 70 * 4 + 4)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64", "float16"])
def test_inputs_of_any_dtype(tmp_path, dtype):
    x = np.random.default_rng(0).integers(0, 200, (9, 3, 5)).astype(dtype)  # 45 bytes of uint8: y is not aligned
    write_shards(tmp_path, {"train": (x, np.arange(9))}, **FACTS, normalise_targets=False)
    for reading in ("node", "rank"):
        got, y = ShardDataset(tmp_path, "train", reading=reading, dtype=torch.float64).fetch(slice(1, 4))
        wide = x.astype(np.float64)
        expected = (wide - wide.mean((0, 2))[:, None]) / wide.std((0, 2))[:, None]
        np.testing.assert_allclose(got.numpy(), expected[1:4], rtol=1e-9)
        assert y.tolist() == [1, 2, 3]


@pytest.mark.parametrize("where", ["x", "y", "crc32", "index"])
def test_every_flipped_byte_is_found_when_examples_are_read_one_by_one(tmp_path, where):
    """Not by a checksum of the whole file, which is not read: by those of the examples, HDF5's, and the manifest's."""
    x, y = np.random.default_rng(0).normal(size=(6, 1, 700)).astype(np.float32), np.arange(6)
    write_shards(tmp_path, {"train": (x, y)}, **FACTS)
    path = tmp_path / "train-00000.h5"
    truth = ShardDataset(tmp_path, "train").fetch(slice(None))
    with h5py.File(path) as file:
        if where == "index":  # object headers, B-trees: whatever is no chunk
            taken = [file[name].id.get_chunk_info(i) for name in file for i in range(file[name].id.get_num_chunks())]
            inside = {b for c in taken for b in range(c.byte_offset, c.byte_offset + c.size)}
            places = [b for b in range(path.stat().st_size) if b not in inside][::7]
        else:
            chunk = file[where].id.get_chunk_info(0)
            places = range(chunk.byte_offset, chunk.byte_offset + chunk.size - 4)  # without fletcher32
            places = places[:: max(1, chunk.size // 40)]
    whole, found = path.read_bytes(), 0
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            got = ShardDataset(tmp_path, "train", reading="rank").fetch(slice(None))
        except DataError:
            found += 1
            continue
        assert all(torch.equal(a, b) for a, b in zip(got, truth)), place
    assert found == len(places) or (where == "index" and found > 10)


def test_an_error_of_the_reading_thread_arrives(shards):
    dataset = ShardDataset(shards, "train", reading="rank")
    loader = BatchLoader(dataset, Grid(), 10, seed=0)
    batches = loader.epoch(0)
    next(batches)
    os.truncate(shards / "train-00002.h5", 100)
    dataset._files._open.clear()
    with pytest.raises(DataError, match=r"train-00002\.h5"):
        list(loader.epoch(1))
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_batch_that_drop_last_leaves_nothing_of(shards):
    with pytest.raises(ConfigError, match=r"^global_batch_size 24: the split has 23 examples, and drop_last"):
        BatchLoader(ShardDataset(shards, "train"), Grid(), 24, seed=0, drop_last=True)


@pytest.mark.parametrize("label", [-1, 23])
def test_labels_outside_the_classes_are_refused(tmp_path, label):
    x, y = toy()
    y[13] = label
    with pytest.raises(DataError, match=rf"train, example 13: class {label} is not in 0\.\.22"):
        write_shards(tmp_path, {"train": (x, y)}, **FACTS, num_classes=23, examples_per_shard=5)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [[-1.0], [2.0], [1.0]], [[0.0], [0.0], [0.0]]])
def test_weights_that_do_not_fit_the_targets_are_refused(tmp_path, weights):
    y = np.ones((23, 1, 3, 4), np.float32)
    with pytest.raises(DataError, match="target_weights"):
        write_shards(tmp_path, {"train": (toy()[0], y)}, **FACTS, target_weights=weights)


def test_tensors_and_lists_are_written_too(tmp_path):
    x, y = toy()
    write_shards(tmp_path, {"train": (torch.from_numpy(x), y.tolist())}, **FACTS)
    assert ShardDataset(tmp_path, "train", normalises_targets=False).fetch([3, 1])[1].tolist() == [3, 1]


@pytest.mark.parametrize("reading", ["node", "rank"])
@pytest.mark.parametrize("indices", [[-1], [23], [True] * 23, [0.5]])
def test_examples_that_are_not_there_are_not_fetched(shards, reading, indices):
    with pytest.raises(IndexError, match="whole numbers from 0 to 22"):
        ShardDataset(shards, "train", reading=reading).fetch(torch.tensor(indices))


def test_a_loader_refuses_what_it_cannot_do(shards):
    dataset = ShardDataset(shards, "train")
    for options, words in (
        ({"global_batch_size": 0}, "^global_batch_size 0"),
        ({"global_batch_size": 4, "prefetch": -1}, "^prefetch -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            BatchLoader(dataset, Grid(), seed=0, **options)
    for first in (-1, 7):
        with pytest.raises(ConfigError, match="an epoch has 6 batches"):
            next(BatchLoader(dataset, Grid(), 4, seed=0).epoch(0, first))


def test_constant_channel_is_not_divided_by_zero(tmp_path):
    x, y = toy()
    x[:, 1] = 4
    write_shards(tmp_path, {"train": (x, y)}, **FACTS)
    got, _ = ShardDataset(tmp_path, "train").fetch(slice(None))
    assert got.isfinite().all() and (got[:, 1] == 0).all()


OFFSETS = {
    "temperature": 300.0,
    "pressure": 101325.0,
    "Julian days": 2.4e6,
    "seconds since 1970": 1.7e9,
    "account numbers": 1e9,
}


@pytest.mark.parametrize("dtype", ["float64", "int64"])
@pytest.mark.parametrize("spread", [1.0, 1e3])
@pytest.mark.parametrize("what", OFFSETS)
def test_numbers_are_subtracted_before_they_are_rounded(tmp_path, what, spread, dtype):
    """What is delivered in float32 is what float64 gives, rounded once, and the way back to units is exact."""
    rng = np.random.default_rng(0)
    x = (OFFSETS[what] + spread * rng.normal(size=(100, 2, 3)) * (1 if dtype == "float64" else 10)).astype(dtype)
    y = OFFSETS[what] + spread * rng.normal(size=(100, 2))
    write_shards(tmp_path, {"train": (x, y)}, **FACTS, examples_per_shard=30)
    for reading in ("node", "rank"):
        dataset = ShardDataset(tmp_path, "train", reading=reading)
        got, target = dataset.fetch(slice(None))
        for found, stored, dims in ((got, x, (0, 2)), (target, y, (0,))):
            wide = stored.astype(np.longdouble)
            mean, std = (statistic(wide, axis=dims, keepdims=True) for statistic in (np.mean, np.std))
            np.testing.assert_allclose(found.numpy(), (wide - mean) / std, rtol=1e-6, atol=1e-6)
            assert found.dtype == torch.float32
        np.testing.assert_allclose(dataset.in_units(target).numpy(), y, rtol=1e-14, atol=1e-6 * spread)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [0.1, 1e-8, 101325.7, -3e9, 0.0, 2**53 + 1.0])
@pytest.mark.parametrize("num_examples", [3, 1001])
def test_a_constant_channel_is_constant_in_any_precision(tmp_path, value, dtype, num_examples):
    x = np.full((num_examples, 2), value, dtype)
    if dtype == "float64":  # computed in two ways
        x[::2, 0] = np.nextafter(value, np.inf)
    x[:, 1] = np.arange(num_examples)
    other = x.copy()
    other[:, 0] += value * 1e-6 + 1e-9
    splits = {split: (a, np.arange(num_examples)) for split, a in (("train", x), ("test", other))}
    write_shards(tmp_path, splits, **FACTS, examples_per_shard=100)
    assert Manifest.read(tmp_path).statistics["x"].std[0] == 0
    train, test = (ShardDataset(tmp_path, split).fetch(slice(None))[0][:, 0] for split in ("train", "test"))
    assert (train.abs() <= 1e-14 * abs(value) + 1e-300).all()
    assert (test.abs() <= 2e-6 * abs(value) + 2e-9).all()


def test_a_large_mean_of_float32_is_subtracted_exactly(tmp_path):
    x = np.float32(1e6) + np.array([[0], [1], [1]], dtype=np.float32) / 8  # float32 has no such mean
    write_shards(tmp_path, {"train": (x, np.arange(3))}, **FACTS)
    got, _ = ShardDataset(tmp_path, "train").fetch(slice(None))
    assert got.double().mean().abs() < 1e-6 and got.double().std(correction=0) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i4", ">i8", ">u2"])
def test_the_order_of_bytes_does_not_matter(tmp_path, dtype):
    x = np.arange(30).reshape(10, 3).astype(dtype)
    write_shards(tmp_path / "a", {"train": (x, x[:, :1])}, **FACTS)
    native = x.astype(x.dtype.newbyteorder("="))
    write_shards(tmp_path / "b", {"train": (native, native[:, :1])}, **FACTS)
    a, b = (ShardDataset(tmp_path / name, "train").fetch(slice(None)) for name in "ab")
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    "x, y, words",
    [
        (np.ones((9, 2)), np.ones((9, 1)) * 1j, "y has dtype complex128"),
        (np.ones((9, 2)) * 1j, np.ones((9, 1)), "x has dtype complex128"),
        (np.arange(18).reshape(9, 2) * 1e200, np.ones((9, 1)), "x: its numbers are so large"),
        (np.ones((9, 2)), np.arange(9.0)[:, None] * -1e199, "y: its numbers are so large"),
        (np.arange(9)[:, None].astype("datetime64[s]"), np.ones(9), "x has dtype datetime64|cannot become a tensor"),
        (np.arange(9)[:, None].astype("timedelta64[s]"), np.ones(9), "x has dtype timedelta64|cannot become a tensor"),
    ],
    ids=["complex y", "complex x", "large x", "large y", "dates", "durations"],
)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_numbers_that_no_network_takes_are_refused(tmp_path, x, y, words):
    with pytest.raises(DataError, match=words):
        write_shards(tmp_path, {"train": (x, y)}, **FACTS, examples_per_shard=4)
    assert not (tmp_path / "manifest.json").exists()


def test_relative_shards_are_looked_for_from_here(tmp_path, monkeypatch):
    """Such as those of a run that was started in another directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no shard directory.*name it as it is seen from {tmp_path}"):
        ShardDataset("data/away", "train")


ONES = np.ones((9, 1))


@pytest.mark.parametrize(
    "split, words",
    [
        ((torch.ones(9, 1, requires_grad=True), ONES), r"x cannot become an array .*detach\(\)"),
        ((torch.ones(9, 1, dtype=torch.bfloat16), ONES), r"x cannot become an array .*float\(\)"),
        ((ONES, torch.ones(9, 1).to_sparse()), "y cannot become an array .*dense"),
        (([[1.0], [2.0, 3.0]], ONES[:2]), "x cannot become an array .*unlike lengths"),
        ((iter(ONES), ONES), "x is .*iterator: numbers"),
        ((pandas.DataFrame({"a": [True] * 9, "b": 1.5}), ONES), "x is an array of dtype object: .*to_numpy"),
        ((ONES, pandas.Series(list("abcabcabc"))), "y is an array of dtype .*factorize"),
        (torch.utils.data.TensorDataset(torch.ones(9, 1)), r"a split is TensorDataset, and \(x, y\)"),
        ((ONES, ONES, ONES[:, 0], ONES), r"a split is tuple, and \(x, y\)"),
    ],
)
def test_what_is_no_array_is_refused_with_the_way(tmp_path, split, words):
    with pytest.raises(DataError, match=words):
        write_shards(tmp_path / "a", {"train": split}, **FACTS)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"num_classes": 3.0}, "num_classes 3.0: must be a whole number"),
        ({"num_classes": 3, "examples_per_shard": 2.5}, "examples_per_shard 2.5: must be a whole number"),
        ({"num_classes": 3, "compression": "zip"}, "compression zip: h5py has no such filter"),
        ({"num_classes": 3, "details": {"a": {1}}}, "details cannot be written as JSON"),
        ({"num_classes": 3, "key": print}, "key cannot be written as JSON"),
    ],
)
def test_facts_are_checked_before_a_file_is_written(tmp_path, given, words):
    x, y = np.arange(9.0)[:, None], np.arange(9) % 3
    with pytest.raises(HpcBnnError, match=words):
        write_shards(tmp_path / "a", {"train": (x, y)}, **FACTS, **given)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("whole", [np.int64, torch.tensor])
def test_facts_of_numpy_and_torch_are_those_of_python(tmp_path, whole):
    x, y = np.arange(9.0)[:, None], np.arange(9) % 3
    facts = {"details": {"a": np.float32(0.5), "b": np.arange(2)}, "key": [np.int64(1)], "normalise_targets": np.False_}
    counts = {"num_classes": whole(3), "ignore_index": whole(-1), "examples_per_shard": whole(4)}
    manifest = write_shards(tmp_path, {"train": (x, y)}, **FACTS, **facts, **counts)
    assert manifest == Manifest.read(tmp_path) and manifest.details == {"a": 0.5, "b": [0, 1]}
    assert (manifest.num_classes, manifest.ignore_index, len(manifest.splits["train"])) == (3, -1, 3)


@pytest.mark.parametrize("missing", [None, np.nan, pandas.NA, pandas.NaT])
def test_a_text_that_is_missing_is_no_name(tmp_path, missing):
    names = np.array(["a"] * 4 + [missing] + ["None"] * 4, dtype=object)
    with pytest.raises(DataError, match="train, example 4: the coordinate station has no text"):
        write_shards(tmp_path, {"train": (ONES, ONES)}, coordinates={"train": {"station": names}}, **FACTS)


@pytest.mark.parametrize("zone", [None, "Europe/Berlin", "UTC"])
def test_times_of_any_zone_are_times(tmp_path, zone):
    times = pandas.date_range("2024-03-30 20:00", periods=9, freq="h", tz=zone)
    expected = times if zone is None else times.tz_convert("UTC").tz_localize(None)
    for number, given in enumerate((times, times.to_pydatetime(), pandas.Series(times, index=range(9, 18)))):
        coordinates = {"train": {"time": given}}
        write_shards(tmp_path / f"{number}", {"train": (ONES, ONES)}, coordinates=coordinates, **FACTS)
        found = ShardDataset(tmp_path / f"{number}", "train").coordinates(range(9))["time"]
        np.testing.assert_array_equal(found, expected.to_numpy("datetime64[us]"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64"])
@pytest.mark.parametrize("reading", ["node", "rank"])
def test_ids_stay_whole_numbers(tmp_path, dtype, reading):
    x = np.random.default_rng(0).integers(0, 100, (20, 7)).astype(dtype)
    write_shards(tmp_path, {"train": (x, np.arange(20) % 2)}, **FACTS, num_classes=2, ids=("x",))
    dataset = ShardDataset(tmp_path, "train", reading=reading, dtype=torch.float64)
    got, _ = dataset.fetch(slice(3, 9))
    assert np.array_equal(got, x[3:9]) and dataset.manifest.is_whole("x")
    torch.nn.Embedding(100, 4)(got)
    named = {"words": x, "numbers": x}
    write_shards(tmp_path / "b", {"train": (named, np.arange(20) % 2)}, **FACTS, num_classes=2, ids=("words",))
    torch.nn.Embedding(100, 4)(ShardDataset(tmp_path / "b", "train").fetch(slice(3, 9))[0]["words"])
    with pytest.raises(DataError, match="x has dtype float32: ids are whole"):
        write_shards(tmp_path / "c", {"train": (x.astype(np.float32), np.arange(20))}, **FACTS, ids=("x",))


def test_truncated_missing_flipped_and_foreign(shards):
    path = shards / "train-00001.h5"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"train-00001.h5 has \d+ bytes, the manifest says"):
        ShardDataset(shards, "train")
    with h5py.File(shards / "train-00000.h5") as file:
        place = file["x"].id.get_chunk_info(0).byte_offset
    first = (shards / "train-00000.h5").read_bytes()
    flipped = bytearray((shards / "train-00000.h5").read_bytes())
    flipped[place + 20] ^= 4
    path.write_bytes(whole)
    (shards / "train-00000.h5").write_bytes(flipped)
    with pytest.raises(DataError, match=r"train-00000\.h5 is not the file that the manifest describes"):
        ShardDataset(shards, "train")
    with h5py.File(shards / "train-00000.h5") as file, pytest.raises(OSError):
        file["x"][()]  # HDF5's own checksum sees it too
    with h5py.File(path, "r+") as file:
        file["y"][0] = 5  # wrong data in a sound file of the same size
    (shards / "train-00000.h5").write_bytes(first)
    with pytest.raises(DataError, match=r"train-00001\.h5"):
        ShardDataset(shards, "train")
    (shards / "train-00000.h5").unlink()
    with pytest.raises(DataError, match=r"train-00000\.h5 is missing"):
        ShardDataset(shards, "train")
    with pytest.raises(DataError, match="splits train, test, not 'validation'"):
        ShardDataset(shards, "validation")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "cannot be read"),
        ("[]", "not of format"),
        ('{"format": "hpc_bnn shards", "version": 99}', "not of format"),
        ('{"format": "hpc_bnn shards", "version": 2}', "not of format"),
        ('{"format": "hpc_bnn shards", "version": 3}', "changed after it was written"),
    ],
)
def test_bad_manifest(shards, text, message):
    (shards / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Manifest.read(shards)


def resign(directory, change):
    """Change the manifest of a directory and sign it anew, as somebody who knows the format."""
    path = directory / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content | {"sha256": sha256_of_json(content)}))


FILES = (
    "../../victim.h5", "/etc/passwd", "..", ".hidden-00000.h5", "a/b-00000.h5", "a\\b-00000.h5", "x-00000.h5\0", "train-0.h5",
    "train-00000.txt", "train-00000.h5/", "", None, 3, [], "a" * 300,
)  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=repr)
def test_a_file_of_a_manifest_is_a_plain_name_in_its_directory(tmp_path, shards, file):
    victim = tmp_path / "victim.h5"
    victim.write_text("precious")
    resign(shards, lambda m: m["splits"]["train"][0].update(file=file))
    reads = (
        lambda: Manifest.read(shards),
        lambda: ShardDataset(shards, "train"),
        lambda: stage_shards(shards, tmp_path / "deep/er", connect_for_files()),
    )
    for read in reads:
        with pytest.raises(DataError, match="lacks or misstates a field"):
            read()
    assert "misstates" in verify_shards(shards)[0]
    write_shards(shards, {"train": toy()}, **FACTS)  # a new preparation removes nothing that the former manifest names
    assert victim.read_text() == "precious" and os.path.exists("/etc/passwd")


WRONG = {
    "a shape": lambda m: m["arrays"]["x"].update(shape=[-1, 5]),
    "a huge shape": lambda m: m["arrays"]["x"].update(shape=[2**70]),
    "a dtype": lambda m: m["arrays"]["x"].update(dtype="O"),
    "no such dtype": lambda m: m["arrays"]["x"].update(dtype="float37"),
    "complex numbers": lambda m: m["arrays"]["x"].update(dtype="complex64"),
    "an array that leads into a group": lambda m: m["arrays"].update({"a/b": m["arrays"].pop("x")}),
    "no targets": lambda m: m["arrays"].pop("y"),
    "no arrays": lambda m: m.update(arrays={}),
    "a list for arrays": lambda m: m.update(arrays=[]),
    "a negative count": lambda m: m["splits"]["train"][0].update(num_examples=-10),
    "a count that is no number": lambda m: m["splits"]["train"][0].update(num_examples="10"),
    "a fraction": lambda m: m["splits"]["train"][0].update(num_bytes=1.5),
    "a digest": lambda m: m["splits"]["train"][0].update(sha256="0"),
    "no digest": lambda m: m["splits"]["train"][0].pop("crc_sha256"),
    "a file twice": lambda m: m["splits"]["train"].append(m["splits"]["train"][0]),
    "training files as test split": lambda m: m["splits"].update(test=m["splits"]["train"]),
    "an unknown field of a file": lambda m: m["splits"]["train"][0].update(new=1),
    "statistics of nothing": lambda m: m["statistics"].update(z=m["statistics"]["x"]),
    "too few statistics": lambda m: m["statistics"]["x"].update(mean=[1.0]),
    "statistics that are not finite": lambda m: m["statistics"]["x"].update(std=[float("nan"), 1.0]),
    "a negative deviation": lambda m: m["statistics"]["x"].update(std=[-1.0, 1.0]),
    "classes": lambda m: m.update(num_classes=0),
    "classes in words": lambda m: m.update(num_classes="3"),
    "weights": lambda m: m.update(target_weights=[[1.0, 2.0], [3.0]]),
    "negative weights": lambda m: m.update(target_weights=-1.0),
    "channels": lambda m: m["arrays"]["x"].update(channels=["a", "b", "c"]),
    "a name": lambda m: m.update(name=["toy"]),
    "an unknown field": lambda m: m.update(new=1),
    "no splits": lambda m: m.pop("splits"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_misstates_a_field_is_refused(shards, what):
    resign(shards, WRONG[what])
    with pytest.raises(DataError, match=r"manifest\.json lacks or misstates a field"):
        Manifest.read(shards)


def test_a_manifest_of_nested_lists_ends_in_a_message(shards):
    (shards / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.read(shards)


def elsewhere(file, directory, name, kind):
    """Let a dataset of a file of shards lead to numbers that are not in it."""
    values = file[name][()]
    del file[name]
    if kind == "external storage":
        path = directory.parent / "secret.bin"
        path.write_bytes(values.tobytes())
        file.create_dataset(name, values.shape, values.dtype, external=[(str(path), 0, values.nbytes)])
        return
    with h5py.File(directory.parent / "secret.h5", "w") as other:
        other[name] = values
    if kind == "virtual":
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource(str(directory.parent / "secret.h5"), name, values.shape)
        file.create_virtual_dataset(name, layout)
    elif kind == "external link":
        file[name] = h5py.ExternalLink(str(directory.parent / "secret.h5"), name)
    elif kind == "soft link":
        file["there"] = values
        file[name] = h5py.SoftLink("/there")
    elif kind == "nothing stored":
        file.create_dataset(name, values.shape, values.dtype, chunks=(1, *values.shape[1:]), fletcher32=True)
    else:
        file.create_group(name)


@pytest.mark.parametrize("reading", ["node", "rank"])
@pytest.mark.parametrize("name", ["x", "y", "crc32"])
@pytest.mark.parametrize(
    "kind", ["external storage", "virtual", "external link", "soft link", "nothing stored", "group"]
)
def test_numbers_that_lie_elsewhere_are_refused(shards, kind, name, reading):
    """With size, SHA-256 and checksums as they should be: they are those of the file, not of what it leads to."""
    path = shards / "train-00000.h5"
    with h5py.File(path, "a") as file:
        elsewhere(file, shards, name, kind)
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    resign(shards, lambda m: m["splits"]["train"][0].update(num_bytes=size, sha256=digest))
    with pytest.raises(DataError, match=r"train-00000\.h5"):
        ShardDataset(shards, "train", reading=reading).fetch(slice(None))


@pytest.mark.parametrize("reading", ["node", "rank"])
def test_a_filter_that_is_not_here_is_named(shards, reading):
    path = shards / "train-00000.h5"
    with h5py.File(path, "a") as file:
        x = file["x"]
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk(x.shape)
        layout.set_filter(511, h5py.h5z.FLAG_OPTIONAL, ())  # HDF5 keeps this number for tests
        content = x[()]
        del file["x"]
        made = h5py.h5d.create(
            file.id, b"x", h5py.h5t.py_create(content.dtype), h5py.h5s.create_simple(content.shape), layout
        )
        h5py.Dataset(made)[()] = content
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    resign(shards, lambda m: m["splits"]["train"][0].update(num_bytes=size, sha256=digest))
    with pytest.raises(DataError, match=r"train-00000\.h5: x needs the HDF5 filter 511 .*Install it, or prepare"):
        ShardDataset(shards, "train", reading=reading).fetch(slice(None))


@pytest.mark.parametrize("reading", ["node", "rank"])
def test_every_reading_checks_every_example(shards, reading):
    path = shards / "train-00000.h5"
    with h5py.File(path, "a") as file:
        file["x"][3] = 0  # a sound file, and not the examples that were prepared
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    resign(shards, lambda m: m["splits"]["train"][0].update(num_bytes=size, sha256=digest))
    with pytest.raises(DataError, match=r"example 3 was changed after it was written \(CRC-32\)"):
        ShardDataset(shards, "train", reading=reading).fetch(slice(None))


# --- preparing and staging ------------------------------------------------------------------------------


def test_a_preparation_where_shards_were_staged_belongs_to_the_user(shards, tmp_path):
    comm, node = connect_for_files(), tmp_path / "node"
    stage_shards(shards, node, comm)
    write_shards(node, {"train": toy(5)}, **FACTS)
    for work in (lambda: stage_shards(shards, node, comm), lambda: unstage_shards(node, comm)):
        with pytest.raises(ConfigError, match="hpc-bnn stage has not put there"):
            work()
    assert Manifest.read(node).num_examples("train") == 5 and verify_shards(node) == []


@pytest.mark.parametrize("how", [shutil.copytree, os.rename])
def test_a_copy_of_a_staged_directory_belongs_to_the_user(shards, tmp_path, how):
    comm = connect_for_files()
    stage_shards(shards, tmp_path / "node", comm)
    how(tmp_path / "node", tmp_path / "mine")
    with pytest.raises(ConfigError, match="hpc-bnn stage has not put there"):
        unstage_shards(tmp_path / "mine", comm)
    assert verify_shards(tmp_path / "mine") == []


@pytest.mark.parametrize(
    "mark", ['["../precious.txt", "/abs/precious"]', '{"directory": 1, "files": ["../precious.txt"]}', "[", "", "[[1]]"]
)
def test_a_mark_removes_nothing_that_it_names(shards, tmp_path, mark):
    node, precious = tmp_path / "node", tmp_path / "precious.txt"
    node.mkdir()
    precious.write_text("mine")
    (node / ".staged").write_text(mark)
    stage_shards(shards, node, connect_for_files())
    content = json.loads((node / ".staged").read_text())
    (node / ".staged").write_text(json.dumps(content | {"files": ["../precious.txt"]}))
    (node / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="hpc-bnn stage has not put there"):
        unstage_shards(node, connect_for_files())
    assert precious.read_text() == "mine"


def test_two_preparations_in_one_directory_do_not_mix(tmp_path):
    with Lock(tmp_path, "--output"), pytest.raises(ConfigError, match="in use by process"):
        write_shards(tmp_path, {"train": toy()}, **FACTS)
    assert not os.listdir(tmp_path)


def test_the_record_of_a_finished_file_is_checked(tmp_path, monkeypatch):
    """A flipped bit in the moments would be a wrong normalisation."""
    splits, options = {"train": toy()}, FACTS | {"examples_per_shard": 10, "key": 1}
    write_shards(tmp_path / "sound", splits, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "check", lambda _: 1 / 0)
        with pytest.raises(RankError, match="ZeroDivisionError"):
            write_shards(tmp_path / "toy", splits, **options)
    record = tmp_path / "toy/.preparation/train-00001.h5.json"
    record.write_text(record.read_text().replace('"count": 50', '"count": 51'))
    assert write_shards(tmp_path / "toy", splits, **options) == Manifest.read(tmp_path / "sound")


@pytest.mark.parametrize("what", ["shards", "node"])
def test_directories_that_every_user_may_write_are_refused(shards, tmp_path, what):
    (tmp_path / "node").mkdir()
    {"shards": shards, "node": tmp_path / "node"}[what].chmod(0o777)
    with pytest.raises(DataError, match="may be written by every user"):
        stage_shards(shards, tmp_path / "node", connect_for_files())


def test_missing_directory_names_the_remedy(tmp_path):
    with pytest.raises(DataError, match="data_prep"):
        Manifest.read(tmp_path / "nowhere")


def test_interrupted_writing_leaves_no_manifest(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(h5py.Group, "create_dataset", fail)
    with pytest.raises(RankError, match="disk full"):
        write_shards(tmp_path, {"train": toy()}, **FACTS)
    assert [path.name for path in tmp_path.iterdir()] == [".preparation"]
    with pytest.raises(DataError, match="interrupted"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("key", [None, 1])
def test_former_shards_stay_until_the_new_ones_are_complete(shards, key):
    former = {path.name: path.read_bytes() for path in shards.iterdir()}
    x, y = toy()
    damaged = np.concatenate([x[:-1], np.full_like(x[-1:], np.nan)])
    options = FACTS | {"examples_per_shard": 12, "key": key}
    with pytest.raises(DataError, match="not finite"):
        write_shards(shards, {"train": (damaged, y)}, **options)
    assert {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()} == former
    assert verify_shards(shards) == []
    manifest = write_shards(shards, {"train": (x, y)}, **options)
    assert verify_shards(shards) == [] and len(os.listdir(shards)) == 1 + len(manifest.shards)


@pytest.mark.parametrize("key", [1, 2], ids=["the same", "another"])
@pytest.mark.parametrize("after", range(6))
def test_shards_that_are_replaced_are_so_after_a_kill_at_any_moment(shards, monkeypatch, after, key):
    """The process ends before a file is renamed or removed; then a preparation runs again."""
    x, y = toy()
    options, calls = FACTS | {"examples_per_shard": 20}, itertools.count()

    def stop(do):
        def work(path, *arguments, **named):
            return do(path, *arguments, **named) if Path(path).name == LOCK or next(calls) < after else 1 / 0

        return work

    def remove(directory, do=writer._remove_former):
        patch.setattr(os, "replace", stop(os.replace))
        patch.setattr(Path, "unlink", stop(Path.unlink))
        return do(directory)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_remove_former", remove)
        with pytest.raises(RankError, match="ZeroDivisionError"):
            write_shards(shards, {"train": (x, y)}, **options, key=1)
    write_shards(shards, {"train": (x, y)}, **options, key=key)
    expected = write_shards(shards.parent / "sound", {"train": (x, y)}, **options, key=key)
    assert Manifest.read(shards) == expected
    assert set(os.listdir(shards.parent / "sound")) <= set(os.listdir(shards))


@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("num_examples", [1, 2, 3, 64, 65, 100, 1000])
def test_the_order_of_an_epoch_is_a_keyed_permutation(num_examples, window):
    places = torch.arange(num_examples)
    order = EpochOrder(num_examples, 3, 2, window)[places]
    assert torch.equal(order.sort().values, places)
    few = torch.randint(0, num_examples, (20,))  # nobody has to hold all of it
    assert torch.equal(EpochOrder(num_examples, 3, 2, window)[few], order[few])
    if num_examples >= 64:
        others = [EpochOrder(num_examples, seed, epoch, window)[places] for seed, epoch in ((3, 3), (4, 2))]
        assert not any(torch.equal(order, other) for other in others)


def test_the_orders_of_epochs_are_uniform():
    """Each example is equally likely at each place, and each pair of neighbours too: chi-square over 4,000 epochs."""
    n, epochs = 6, 4000
    orders = torch.stack([EpochOrder(n, 0, epoch)[torch.arange(n)] for epoch in range(epochs)])
    counts = torch.stack([torch.bincount(column, minlength=n) for column in orders.T])
    assert stats.chisquare(counts.flatten()).pvalue > 1e-4
    pairs = torch.bincount((orders[:, 0] * n + orders[:, 1]), minlength=n * n).view(n, n)
    assert stats.chisquare(pairs[~torch.eye(n, dtype=torch.bool)]).pvalue > 1e-4


def test_a_window_reads_a_few_files_at_a_time():
    num_examples, window = 10_000, 500
    order = EpochOrder(num_examples, 0, 1, window)[torch.arange(num_examples)]
    spans = [(part.max() - part.min()).item() for part in order.split(window)]
    assert sorted(spans)[-2] < window  # the order wraps around once
    starts = [part.min().item() for part in order.split(window)]
    assert starts != sorted(starts) and not torch.equal(order[:window], order[:window].sort().values)


def test_the_order_of_a_billion_examples_costs_no_memory():
    order = EpochOrder(10**9, 0, 0)
    first = order[torch.arange(100_000)]
    assert first.unique().numel() == 100_000 and first.max() > 9.9e8 and first.min() < 1e7


def test_global_batches_keep_the_last_partial_batch():
    batches = list(global_batches(23, 10, seed=0, epoch=0))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert sorted(torch.cat(batches).tolist()) == list(range(23))


def test_digits_script_writes_once_and_verifiably(digits):
    manifest = Manifest.read(digits)
    assert (manifest.num_examples("train"), manifest.num_examples("test")) == (1438, 359)
    assert manifest.num_classes == 10 and manifest.arrays["x"].shape == (1, 8, 8)
    again = subprocess.run(
        [*python(), "data_prep/digits.py", "--output", str(digits)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "already there" in again.stdout
    other = prepare("digits", "--output", digits, "--seed", 1)
    assert other.returncode == 2 and "prepared from another source or with other flags" in other.stderr
    assert Manifest.read(digits) == manifest
    assert json.loads((digits / "manifest.json").read_text())["source"].startswith("scikit-learn")
    train, test = (ShardDataset(digits, split) for split in ("train", "test"))
    images = {bytes(x.numpy()) for x in train.fetch(slice(None))[0]}
    overlap = sum(bytes(x.numpy()) in images for x in test.fetch(slice(None))[0])
    assert overlap == 0  # the digits hold no image twice, so a shared image would be leakage


CORRUPTIONS = ("truncate", "flip", "delete", "swap", "stale manifest", "foreign", "empty", "flip the manifest")


def corrupt(directory, kind, rng, stale):
    """Damage a shard directory at random; return the name of a file that verify must speak of."""
    files = sorted(path for path in directory.iterdir() if path.suffix == ".h5")
    path = files[rng.integers(len(files))]
    if kind == "flip the manifest":
        path, kind = directory / "manifest.json", "flip"
    if kind == "truncate":
        os.truncate(path, rng.integers(path.stat().st_size))
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "flip":
        whole = bytearray(path.read_bytes())
        whole[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(whole)
    elif kind == "delete":
        path.unlink()
    elif kind == "swap":
        other = files[(files.index(path) + 1 + rng.integers(len(files) - 1)) % len(files)]
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second), other.write_bytes(first)
    elif kind == "stale manifest":
        path = directory / "manifest.json"
        shutil.copy(stale / "manifest.json", path)
    else:
        path = directory / f"train-{rng.integers(90000, 99999)}.h5"
        shutil.copy(files[0], path)
    return path.name


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_is_found_and_no_wrong_data_are_read(kind, tmp_path):
    """200 in all: found by verify, and reading gives the true data or an error."""
    rng = np.random.default_rng([CORRUPTIONS.index(kind), 5])
    sound, stale = tmp_path / "sound", tmp_path / "stale"
    for directory, seed in ((sound, 0), (stale, 1)):  # of the same shapes, from other data
        source = np.random.default_rng(seed)
        splits = {
            name: (source.normal(size=(n, 2, 6)).astype(np.float32), source.integers(0, 3, n))
            for name, n in (("train", 50), ("test", 30))
        }
        write_shards(directory, splits, **FACTS, examples_per_shard=16)
    assert verify_shards(sound) == []
    truth = {split: ShardDataset(sound, split).fetch(slice(None)) for split in ("train", "test")}
    for number in range(200 // len(CORRUPTIONS)):
        directory = tmp_path / str(number)
        shutil.copytree(sound, directory)
        name = corrupt(directory, kind, rng, stale)
        problems = verify_shards(directory)
        assert problems, (kind, name)
        assert kind == "stale manifest" or any(name in problem for problem in problems), (name, problems)
        for split, expected in truth.items():
            for reading in ("node", "rank"):
                try:
                    got = ShardDataset(directory, split, reading=reading).fetch(slice(None))
                except DataError:
                    continue
                assert all(torch.equal(a, b) for a, b in zip(got, expected)), (kind, name, split, reading)
        shutil.rmtree(directory)


def test_writing_again_leaves_no_file_of_the_former_preparation(tmp_path):
    x, y = toy()
    write_shards(tmp_path, {"train": (x, y)}, **FACTS, examples_per_shard=5)
    write_shards(tmp_path, {"train": (x, y)}, **FACTS, examples_per_shard=12)
    assert verify_shards(tmp_path) == [] and len(list(tmp_path.iterdir())) == 3


def test_mnist_from_its_files(tmp_path):
    source = SHARED_DATA / "mnist"
    if not source.exists():
        pytest.skip("the shared data sets are not beside this clone")
    done = prepare("mnist", "--source", source, "--output", tmp_path / "mnist", "--num-validation", 5000)
    assert done.returncode == 0, done.stderr
    assert verify_shards(tmp_path / "mnist") == []
    manifest = Manifest.read(tmp_path / "mnist")
    counts = {split: manifest.num_examples(split) for split in manifest.splits}
    assert counts == {"train": 55_000, "test": 10_000, "validation": 5000}
    labels = {split: ShardDataset(tmp_path / "mnist", split).fetch(slice(None))[1] for split in counts}
    # counts of the digits as published
    train = torch.cat([labels["train"], labels["validation"]]).bincount().tolist()
    assert train == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert labels["test"].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.isclose(manifest.statistics["x"].mean[0] / 255, 0.1307, atol=5e-4)
    assert np.isclose(manifest.statistics["x"].std[0] / 255, 0.3081, atol=5e-4)
    flags = ("--source", source, "--output", tmp_path / "mnist")
    assert "already there" in prepare("mnist", *flags, "--num-validation", 5000).stdout
    assert "with other flags" in prepare("mnist", *flags).stderr


def test_wrong_files_are_not_taken_for_mnist(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(16 + 60_000 * 784))
    done = prepare("mnist", "--source", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 1 and "is not the published file" in done.stderr
    done = prepare("mnist", "--source", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert done.returncode == 1 and "can be read" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nodes_copy_the_files_in_turn():
    """No two of 4 nodes begin with the same file, each copies all of them, and one node copies the largest first."""
    files = [ShardFile(f"train-{n:05d}.h5", 1, 100 - n, "", "") for n in range(10)]
    orders = [in_turn(files, node, 4) for node in range(4)]
    assert len({order[0].file for order in orders}) == 4
    assert all(sorted(order, key=lambda shard: shard.file) == files for order in orders)
    assert in_turn(files[::-1], 0, 1) == files and in_turn([], 3, 4) == []
