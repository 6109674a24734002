"""Examples from a Dataset of the user, named by its import path: the same run on every grid."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from reference import by_one, computed_once, relative_difference
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hpc_bnn import GlobalBatchSampler, Grid, GridComm, ShardDataset, global_batches, write_shards
from hpc_bnn.config import Config
from hpc_bnn.errors import ConfigError, DataError, RankError
from hpc_bnn.run.train import Run

NUM_EXAMPLES, GLOBAL_BATCH_SIZE = 31, 13


@functools.cache
def examples():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_EXAMPLES, 6, generator=generator, dtype=torch.float64)
    words = torch.randint(0, 5, (NUM_EXAMPLES, 2), generator=generator)
    return x, words, torch.randint(0, 3, (NUM_EXAMPLES,), generator=generator)


class MapStyle(Dataset):
    """Two inputs by name, one of them whole numbers; the classes are known as torchvision says them."""

    classes = ("a", "b", "c")

    def __init__(self, split, shift=0.0):
        self.split, self.shift = split, shift

    def __len__(self):
        return NUM_EXAMPLES if self.split == "train" else 11

    def __getitem__(self, index):
        x, words, y = examples()
        return {"words": words[index], "x": x[index] + self.shift}, y[index]


class Stream(IterableDataset):
    """Never ends; its order changes with the epoch."""

    num_classes = 3

    def __init__(self, split):
        self.split, self.epoch = split, 0

    def __len__(self):
        return NUM_EXAMPLES if self.split == "train" else 11

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        index = 5 * self.epoch
        while True:
            x, _, y = examples()
            yield x[index % NUM_EXAMPLES], y[index % NUM_EXAMPLES]
            index += 1


class Short(Stream):
    """One example less than it says."""

    def __iter__(self):
        x, _, y = examples()
        yield from zip(x[: len(self) - 1], y)


def tensors(split):
    """Numbers as targets, and tensors in memory."""
    x = examples()[0][: NUM_EXAMPLES if split == "train" else 11]
    return x[:, 1:], x[:, :1]


def write_named(comm, directory, **changes):
    """Write the examples of MapStyle as shards with two inputs by name."""
    x, words, y = (tensor.numpy() for tensor in examples())
    splits = {}
    for split, count in (("train", NUM_EXAMPLES), ("test", 11)):
        splits[split] = ({"words": words[:count], "x": 5 * x[:count] + 2, **changes}, y[:count])
    facts = {"name": "toy", "source": "made by the test", "licence": "none", "num_classes": 3}
    return write_shards(directory, splits, examples_per_shard=7, comm=comm, **facts)


class Net(nn.Module):
    """Takes one input, or two by name."""

    def __init__(self, in_shape, num_outputs):
        super().__init__()
        self.has_words = isinstance(in_shape, dict)
        assert in_shape == {"words": (2,), "x": (6,)} if self.has_words else len(in_shape) == 1
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.Sequential(nn.Linear(10 if self.has_words else in_shape[0], 8), nn.Tanh())
        self.head = nn.Linear(8, num_outputs)

    def forward(self, x, words=None):
        assert (words is not None) == self.has_words
        x = torch.cat([x, self.embedding(words).mean(1)], 1) if self.has_words else x
        return self.head(self.layers(x))


def config_of(dataset, **changes):
    config = Config(
        num_epochs=2,
        global_batch_size=GLOBAL_BATCH_SIZE,
        num_test_samples=5,
        device="cpu",
        dtype="float64",
        num_samples=5,
    )
    config.data.dataset = None if dataset.startswith("/") else f"test_sources.{dataset}"
    config.data.shards = dataset
    config.model.name = "test_sources.Net"
    config.data.arguments = {"shift": 0.5} if dataset == "MapStyle" else {}
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def train(comm, run_dir, dataset):
    run = Run(config_of(dataset, run_dir=str(run_dir)), comm)
    summary, _ = run.train()
    return summary, {name: value.clone() for name, value in run.posterior.state_dict().items()}


@computed_once
def train_alone(dataset):
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        return train(GridComm(Grid()), directory, dataset)


@pytest.mark.parametrize("dataset", ["MapStyle", "Stream", "tensors"])
def test_a_run_on_a_dataset_of_the_user_is_the_same_on_every_grid(comm, world, tmp_path, dataset):
    run_dir = world.bcast(str(tmp_path / "run"))
    expected, state = train_alone(dataset)
    summary, got = train(comm, run_dir, dataset)
    assert summary["reading"]["mode"] == {"MapStyle": "rank", "Stream": "stream", "tensors": "memory"}[dataset]
    assert summary["num_steps"] == 6
    metrics = [name for name in summary if name.startswith("test/")]
    assert len(metrics) > 2
    for name in metrics:
        assert summary[name] == pytest.approx(expected[name], rel=1e-10), name
    for name, value in state.items():
        assert relative_difference(got[name], value) < 1e-12, name


def test_the_clock_of_rank_0_decides_when_a_checkpoint_is_written(comm, world, tmp_path):
    config = config_of("MapStyle", run_dir=world.bcast(str(tmp_path / "run")), test_every_epochs=9, check_up=False)
    config.checkpoint.every_minutes, config.checkpoint.every_epochs = 1e6, 9
    for late in {0, world.size - 1}:
        run = Run(config, comm)
        run._written -= 1e9 * (comm.grid.rank == late)  # seconds
        run.train()
        steps = [note.step for note in run.checkpoints.notes()]
        assert steps == ([6, 1] if late == 0 else [6])


@pytest.mark.parametrize("family", ["mean_field", "ensemble"])
def test_pretrained_weights_are_read_by_rank_0_and_begin_on_all(comm, world, tmp_path, monkeypatch, family):
    config = config_of("MapStyle", run_dir=world.bcast(str(tmp_path / "run")))
    config.posterior.family, config.model.pretrained = family, f"{config.run_dir}.pt"
    net = Net({"words": (2,), "x": (6,)}, 3).double()
    if world.rank == 0:
        torch.save(net.state_dict(), config.model.pretrained)
    world.Barrier()
    expected, loads, load = world.bcast(net.state_dict()), [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: loads.append(given) or load(*given, **options))
    posterior = Run(config, comm).posterior
    assert len(loads) == (world.rank == 0)
    found = posterior.state_dict() if family == "ensemble" else posterior.module.state_dict()
    starts = [f"members.{sample}." for sample in posterior.samples] if family == "ensemble" else [""]
    for name, value in expected.items():
        assert all(torch.equal(found[start + name], value) for start in starts), name
    if world.rank == 0:
        torch.save([1], config.model.pretrained)
    world.Barrier()
    with pytest.raises(ConfigError, match=r"pretrained .*not a state_dict"):
        Run(config, comm)
    if world.rank == 0:
        Path(config.model.pretrained).write_bytes(b"none")
    world.Barrier()
    with pytest.raises(ConfigError, match=r"rank 0 on .*not a state_dict" if world.size > 1 else "not a state_dict"):
        Run(config, comm)


@pytest.mark.parametrize("reading", ["node", "group", "rank"])
def test_shards_with_inputs_by_name_are_read_and_trained_on(comm, world, tmp_path, reading):
    directory = world.bcast(str(tmp_path))
    manifest = write_named(comm, f"{directory}/shards")
    assert list(manifest.arrays) == ["words", "x", "y"] and list(manifest.statistics) == ["x"]
    dataset = ShardDataset(f"{directory}/shards", "train", "cpu", torch.float64, comm=comm, reading=reading)
    x, words, y = examples()
    found, targets = dataset.fetch(torch.tensor([30, 0, 13]))
    assert torch.equal(found["words"], words[[30, 0, 13]]) and torch.equal(targets, y[[30, 0, 13]])
    torch.testing.assert_close(found["x"], ((x - x.mean(0)) / x.std(0, correction=0))[[30, 0, 13]])
    config = config_of(f"{directory}/shards", run_dir=f"{directory}/run")
    config.data.prepare, config.data.reading = None, reading
    run = Run(config, comm)
    summary, _ = run.train()

    def run_alone():
        alone = Run(replace(config, run_dir=f"{directory}/alone"), GridComm(Grid()))
        return alone.train()[0], alone.posterior.state_dict()

    expected, state = by_one(run_alone)
    assert summary["test/nll"] == pytest.approx(expected["test/nll"], rel=1e-10)
    for name, value in state.items():
        assert relative_difference(run.posterior.state_dict()[name], value) < 1e-12, name
    with comm.agree("flipping a bit"):
        if comm.grid.rank == 0:  # in a copy: HDF5 keeps what this process has open
            shutil.copytree(f"{directory}/shards", f"{directory}/flipped")
            flip(f"{directory}/flipped/train-00000.h5", "words")
    with pytest.raises((DataError, RankError), match=r"train-00000\.h5"):
        reread = ShardDataset(f"{directory}/flipped", "train", comm=comm, reading="rank")
        with comm.agree("reading"):
            reread.fetch([0, 1, 2])


def flip(path, name):
    with h5py.File(path) as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "changes", [{"y": 1}, {"crc32": 1}, {"a b": 1}, {"x": np.ones(5)}], ids=["y", "crc32", "space", "short"]
)
def test_inputs_with_other_names_or_lengths_are_refused(comm, world, tmp_path, changes):
    with pytest.raises((DataError, RankError), match=r"identifiers|as many as"):
        write_named(comm, world.bcast(str(tmp_path / "shards")), **changes)


def test_a_stream_that_ends_early_is_an_error(comm, world, tmp_path):
    """The rank of the last example meets it first; here all are asked, so that none of them waits."""
    run = Run(config_of("Short", run_dir=world.bcast(str(tmp_path / "run"))), comm)
    run.loader.prefetch = 0
    with pytest.raises(DataError, match=r"Short ended before its example 30, and an epoch has 31"):
        run.train_set.fetch(torch.tensor([30]))


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_of_torch_gets_the_batches_of_the_job(comm, drop_last):
    sampler = GlobalBatchSampler(NUM_EXAMPLES, comm.grid, GLOBAL_BATCH_SIZE, 7, drop_last=drop_last)
    loader = DataLoader(MapStyle("train"), batch_sampler=sampler)
    assert len(loader) == len(sampler.sizes)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 7, epoch, drop_last=drop_last))
        assert sampler.sizes == [len(batch) for batch in batches]
        for (x, y), batch in zip(loader, batches, strict=True):
            mine = batch[comm.grid.local_examples(len(batch))]
            assert torch.equal(y, examples()[2][mine]) and torch.equal(x["words"], examples()[1][mine])


def test_a_batch_that_leaves_a_rank_nothing_is_refused_by_the_sampler(comm):
    if comm.grid.data_size > 1:
        with pytest.raises(ConfigError, match="drop_last"):
            GlobalBatchSampler(GLOBAL_BATCH_SIZE + 1, comm.grid, GLOBAL_BATCH_SIZE, 7)
