"""Shards on the ranks of a job: written together, read once, and the same examples whoever reads them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import by_one, make_step, relative_difference

import hpc_bnn.data.dataset
from hpc_bnn import Grid, GridComm, ShardDataset, connect, write_shards
from hpc_bnn.comm import connect_for_files
from hpc_bnn.data import Augmentation, BatchLoader, Examples, Manifest, stage_shards, unstage_shards, verify_shards
from hpc_bnn.data.augment import Mixup, Noise
from hpc_bnn.errors import ConfigError, DataError, RankError
from hpc_bnn.objectives import OBJECTIVES

FACTS = {"name": "toy", "source": "made by the test", "licence": "none", "num_classes": 3}
NUM_EXAMPLES, GLOBAL_BATCH_SIZE = 31, 13


def examples(n=NUM_EXAMPLES):
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (n, 2, 20)).astype(np.float32), rng.integers(0, 3, n)


@pytest.fixture(scope="session")
def job_dir(world, tmp_path_factory):
    """A directory that all ranks see."""
    return Path(world.bcast(str(tmp_path_factory.mktemp("job")) if world.rank == 0 else None))


@pytest.fixture(scope="session")
def shards(world, job_dir):
    if world.rank == 0:
        write_shards(job_dir / "toy", {"train": examples()}, examples_per_shard=4, **FACTS)
    world.barrier()
    return job_dir / "toy"


@pytest.mark.parametrize("reading", ["rank", "group", "node"])
def test_a_stale_copy_of_the_shards_on_one_rank_is_an_error_on_all(comm, shards, tmp_path, reading):
    """As many examples of the same shape, other numbers: whoever opens them, `evaluate` and a loop of one's own as well."""
    if comm.grid.world_size == 1:
        pytest.skip("one rank")
    x, y = examples()
    write_shards(tmp_path / "stale", {"train": (x + 1, y)}, examples_per_shard=4, **FACTS)
    is_odd = comm.grid.rank == comm.grid.world_size - 1
    with pytest.raises(RankError, match=r"the content of manifest.json is .* on rank"):
        ShardDataset(tmp_path / "stale" if is_odd else shards, "train", comm=comm, reading=reading)


@pytest.mark.parametrize("axis", ["sample", "data", "world"])
def test_broadcast_along_an_axis(comm, axis):
    extent = {"sample": comm.grid.sample_size, "data": comm.grid.data_size, "world": comm.grid.world_size}[axis]
    root = extent - 1
    tensors = [torch.full((3,), comm.grid.rank, dtype=torch.uint8), torch.full((2,), float(comm.grid.rank))]
    comm.broadcast_(tensors, root, axis)
    groups = {"sample": comm.grid.sample_group(), "data": comm.grid.data_group(), "world": range(comm.grid.world_size)}
    for tensor in tensors:
        assert tensor.tolist() == [groups[axis][root]] * len(tensor)


def test_ranks_of_a_node_share_an_array(comm):
    shared = comm.node_array((comm.local_size, 3), "int32")
    shared.array[comm.local_rank] = comm.grid.rank
    shared.publish()
    assert (shared.array == np.arange(comm.local_size)[:, None]).all()  # one node: its ranks are the world's
    assert comm.node_array((0, 3), "int64").array.shape == (0, 3)


def test_parts_of_a_node_have_copies_of_their_own(world):
    comm = connect_for_files(node_size=2)
    assert comm.local_size == (2 if world.rank < world.size // 2 * 2 else 1)
    shared = comm.node_array((1,), "int64")
    if comm.local_rank == 0:
        shared.array[0] = world.rank
    shared.publish()
    assert shared.array[0] == world.rank // 2 * 2
    comm.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("reading", ["auto", "node", "group", "rank"])
def test_every_reading_gives_the_batches_of_one_process(comm, shards, reading, prefetch):
    expected = BatchLoader(ShardDataset(shards, "train"), Grid(), GLOBAL_BATCH_SIZE, seed=4)
    dataset = ShardDataset(shards, "train", comm=comm, reading=reading)
    if reading != "group" or comm.grid.sample_size > 1:
        assert dataset.reading == ("node" if reading == "auto" else reading)
    loader = BatchLoader(dataset, comm.grid, GLOBAL_BATCH_SIZE, seed=4, prefetch=prefetch, with_partners=True)
    for epoch in (0, 1):
        batches = list(loader.epoch(epoch))
        assert [batch.num_examples for batch in batches] == [13, 13, 5]
        for batch, whole in zip(batches, expected.epoch(epoch)):
            part = comm.grid.local_examples(batch.num_examples)
            assert torch.equal(batch.examples, whole.examples[part])
            assert torch.equal(batch.x, whole.x[part]) and torch.equal(batch.y, whole.y[part])
            assert torch.equal(batch.partners[0], whole.x.flip(0)[part])
            assert torch.equal(batch.partners[1], whole.y.flip(0)[part])


def test_each_byte_is_read_once_per_node_or_group(comm, shards):
    stored = sum(path.stat().st_size for path in shards.glob("*.h5"))
    by_reading = {}
    for reading in ("node", "group", "rank"):
        dataset = ShardDataset(shards, "train", comm=comm, reading=reading)
        list(BatchLoader(dataset, comm.grid, GLOBAL_BATCH_SIZE, seed=4).epoch(0))
        by_reading[reading] = comm.gather_objects(dataset.num_bytes_read)
    assert sum(by_reading["node"]) == stored
    # chunks of x hold single examples and four bytes of fletcher32; y and the checksums are read whole at opening
    grid = comm.grid
    x_bytes = NUM_EXAMPLES * (2 * 20 * 4 + 4)
    assert sum(by_reading["group"]) >= x_bytes
    for rank, read in enumerate(by_reading["group"]):
        if Grid(grid.world_size, grid.sample_size, rank).sample_index > 0 and grid.sample_size > 1:
            assert read == 0
    assert sum(by_reading["rank"]) == pytest.approx(sum(by_reading["group"]) * grid.sample_size)


def test_a_missing_file_is_said_on_all_ranks(comm, shards, job_dir):
    broken = job_dir / f"broken-{comm.grid.sample_size}"
    if comm.grid.rank == 0:
        broken.mkdir()
        for path in shards.iterdir():
            if path.name != "train-00003.h5":
                (broken / path.name).write_bytes(path.read_bytes())
    comm.barrier()
    with pytest.raises(DataError, match=r"train-00003\.h5 is missing"):
        ShardDataset(broken, "train", comm=comm, reading="node")


def test_an_epoch_goes_on_with_the_next_unseen_batch(comm, shards):
    loader = BatchLoader(ShardDataset(shards, "train", comm=comm), comm.grid, GLOBAL_BATCH_SIZE, seed=4)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, first_batch=2))
    assert len(rest) == 1 and torch.equal(rest[0].x, whole[2].x)
    dropping = BatchLoader(loader.dataset, comm.grid, GLOBAL_BATCH_SIZE, seed=4, drop_last=True)
    assert [batch.num_examples for batch in dropping.epoch(3)] == [13, 13] and dropping.num_examples == 26


# --- writing -------------------------------------------------------------------------------------------


def test_ranks_write_the_same_directory_as_one_process(world, shards, job_dir):
    comm = connect_for_files()
    together = write_shards(job_dir / "together", {"train": examples()}, examples_per_shard=4, comm=comm, **FACTS)
    assert together == Manifest.read(shards)  # also the SHA-256 of every file
    assert verify_shards(job_dir / "together") == []
    comm.close()


def test_an_interrupted_preparation_goes_on_where_it_stopped(world, job_dir):
    comm, asked = connect_for_files(), []
    x, y = examples()

    def read(start, stop, fails_at=None):
        asked.append(start)
        if fails_at is not None and start >= fails_at:
            raise OSError("the file system went away")
        return x[start:stop], y[start:stop]

    def write(fails_at=None, key="first"):
        asked.clear()
        comm.barrier()
        source = Examples(len(x), lambda start, stop: read(start, stop, fails_at))
        write_shards(job_dir / "resumed", {"train": source}, examples_per_shard=4, key=key, comm=comm, **FACTS)
        return sorted(start for starts in comm.gather_objects(asked[1:]) for start in starts)  # first: a look

    with pytest.raises(RankError, match="the file system went away"):
        write(fails_at=20)
    comm.barrier()
    if world.rank == 0:  # a note without its file, and half a file of a killed process
        (job_dir / "resumed/.preparation/train-00001.h5").unlink()
        (job_dir / "resumed/.preparation/.train-00006.h5.99").write_bytes(b"half")
        assert not (job_dir / "resumed/manifest.json").exists()
    assert write() == [4, 20, 24, 28]
    assert verify_shards(job_dir / "resumed") == []
    assert write() == list(range(0, 31, 4))  # complete: the same key means to write it again
    with pytest.raises(RankError):
        write(fails_at=20)
    assert write(key="second") == list(range(0, 31, 4))  # another content
    comm.close()


def test_a_value_that_is_not_finite_is_refused_on_all_ranks(world, job_dir):
    comm = connect_for_files()
    x, y = examples()
    x[29, 1, 3] = np.nan
    with pytest.raises(DataError, match="train, example 29: x holds a value that is not finite"):
        write_shards(job_dir / "nan", {"train": (x, y)}, examples_per_shard=4, comm=comm, **FACTS)
    comm.close()


# --- the layout law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["elbo", "log_predictive"])
@pytest.mark.parametrize("views", ["shared", "per_group", "per_sample"])
def test_augmented_training_does_not_depend_on_the_grid(comm, job_dir, views, objective):
    x = np.random.default_rng(1).normal(size=(NUM_EXAMPLES, 6, 1, 1))
    directory = job_dir / "images"
    if comm.grid.rank == 0 and not (directory / "manifest.json").exists():
        write_shards(directory, {"train": (x, examples()[1])}, **FACTS)
    comm.barrier()

    def train(comm, **options):
        step = make_step(comm, num_samples=6, objective=OBJECTIVES[objective]())
        step.posterior.module.insert(0, torch.nn.Flatten())
        augmentation = Augmentation([Mixup(0.4), Noise(0.3)], views, num_samples=6, num_groups=3, seed=8, num_classes=3)
        dataset = ShardDataset(directory, "train", dtype=torch.float64, comm=comm, **options)
        loader = BatchLoader(dataset, comm.grid, GLOBAL_BATCH_SIZE, 8, with_partners=True)
        for epoch in range(2):
            for batch in loader.epoch(epoch):
                inputs, y = augmentation(batch, epoch)
                step(inputs, y, batch.num_examples)
        return torch.cat([p.detach().flatten() for p in step.posterior.parameters()])

    expected = by_one(lambda: train(GridComm(Grid())))
    assert relative_difference(train(comm, reading="group"), expected) < 1e-12


def test_views_differ_between_samples_as_they_should(comm):
    """The mirror of the layout law."""
    grid = comm.grid
    x = torch.zeros(4, 3, 8, 8)

    class Whole:
        examples, partners = torch.arange(4), None

    batch = Whole()
    batch.x, batch.y = x, torch.zeros(4)
    seen = {}
    for kind in ("shared", "per_group", "per_sample"):
        views, _ = Augmentation([Noise(1.0)], kind, num_samples=8, num_groups=2, seed=1)(batch, epoch=0)
        mine = {s: views.of(s).sum().item() for s in grid.local_samples(8)}
        everyones = {s: v for part in comm.gather_objects(mine) for s, v in part.items()}
        seen[kind] = len(set(everyones.values()))
    assert seen == {"shared": 1, "per_group": 2, "per_sample": 8}


def test_connect_with_parts_of_a_node(world, shards):
    """Two 'nodes' in one: each reads the files once for itself."""
    if world.size < 4:
        pytest.skip("needs 4 ranks")
    comm = connect(2, device="cpu", node_size=2)
    dataset = ShardDataset(shards, "train", comm=comm, reading="node")
    stored = sum(path.stat().st_size for path in shards.glob("*.h5"))
    assert sum(comm.gather_objects(dataset.num_bytes_read)) == 2 * stored
    assert sum(comm.gather_objects(dataset.num_bytes_read, "node")) == stored
    comm.close()


def test_json_of_the_manifest_holds_no_rank(shards):
    text = json.dumps(json.loads((shards / "manifest.json").read_text()))
    assert "rank" not in text and os.uname().nodename not in text


# --- staging -------------------------------------------------------------------------------------------


def test_staging_copies_once_per_node_and_goes_on_after_an_interruption(world, shards, job_dir):
    comm = connect_for_files(node_size=2)
    node = world.rank // 2
    local = job_dir / f"node-{node}"
    stored = sum(path.stat().st_size for path in shards.glob("*.h5"))
    staged = stage_shards(shards, local, comm)
    assert (staged.num_copied, staged.num_kept, staged.num_bytes_read) == (8, 0, stored)
    assert verify_shards(local) == []
    comm.barrier()
    if comm.local_rank == 0:  # interrupted: no manifest, one file missing, one damaged, half of one
        (local / "manifest.json").unlink()
        (local / "train-00002.h5").unlink()
        damaged = bytearray((local / "train-00005.h5").read_bytes())
        damaged[3000] ^= 1
        (local / "train-00005.h5").write_bytes(damaged)
        (local / ".train-00002.h5.123").write_bytes(b"half")
    comm.barrier()
    staged = stage_shards(shards, local, comm)
    assert (staged.num_copied, staged.num_kept) == (2, 6) and verify_shards(local) == []
    comm.barrier()
    assert stage_shards(shards, local, comm, verify=False).num_copied == 0
    if comm.local_rank == 0:
        (local / "mine.txt").write_text("keep")
    comm.barrier()
    assert unstage_shards(local, comm) == ["mine.txt"]
    comm.close()


def test_staging_a_damaged_source_is_refused_everywhere(world, shards, job_dir):
    comm = connect_for_files()
    source = job_dir / "damaged"
    if world.rank == 0:
        source.mkdir()
        for path in shards.iterdir():
            (source / path.name).write_bytes(path.read_bytes())
        whole = bytearray((source / "train-00007.h5").read_bytes())
        whole[-1] ^= 128
        (source / "train-00007.h5").write_bytes(whole)
    world.barrier()
    with pytest.raises(DataError, match=r"train-00007\.h5 is not the file that the manifest describes"):
        stage_shards(source, job_dir / "copy", comm)
    world.barrier()
    assert not (job_dir / "copy/manifest.json").exists()
    with pytest.raises(ConfigError, match="SRC itself"):
        stage_shards(shards, shards, comm)
    comm.close()


def test_too_little_space_is_said_before_anything_is_copied(world, shards, job_dir, monkeypatch):
    comm = connect_for_files()
    usage = shutil.disk_usage(job_dir)
    if world.rank == world.size - 1:  # the node of the last rank is full
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"0\.00 GB are free"):
        stage_shards(shards, job_dir / "full", comm)
    world.barrier()
    assert not (job_dir / "full/manifest.json").exists()
    comm.close()


@pytest.mark.parametrize("free", [10_000, 100_000])
def test_auto_chooses_from_size_and_the_least_free_memory_of_any_node(comm, shards, monkeypatch, free):
    """The set has 31 x 168 bytes; one rank alone sees little memory."""
    seen = free if comm.grid.rank == comm.grid.world_size - 1 else 10**9
    monkeypatch.setattr(hpc_bnn.data.dataset, "free_memory_bytes", lambda is_shared: seen)
    dataset = ShardDataset(shards, "train", comm=comm)
    assert dataset.num_bytes == 31 * (2 * 20 * 4 + 8)
    assert dataset.reading == ("node" if free == 100_000 else "group" if comm.grid.sample_size > 1 else "rank")
