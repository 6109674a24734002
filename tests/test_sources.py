"""Examples from tensors, Datasets and streams in one process: what is refused, and how it resumes."""

import json
import sys

import pytest
import torch
from conftest import REPOSITORY, SHARED_DATA
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hpc_bnn import BatchLoader, DatasetSource, Grid, GridComm, StreamSource, TensorSource
from hpc_bnn.cli.commands import main
from hpc_bnn.config import Config
from hpc_bnn.data import as_source
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.run.train import Run

X, CLASSES = torch.arange(24.0).view(12, 2), torch.arange(12) % 3


class Pairs(Dataset):
    num_classes = 3

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"no file of example {index}")
        return X[index].numpy(), int(CLASSES[index])


class Counted(IterableDataset):
    num_classes = 3

    def __init__(self, split="train"):
        self.passes = []

    def set_epoch(self, epoch):
        self.passes.append(epoch)

    def __len__(self):
        return len(X)

    def __iter__(self):
        yield from zip(X, CLASSES)


def dataset(split, broken=()):
    return Pairs(broken)


SOURCES = {
    "tensors": lambda: TensorSource(X, CLASSES, 3),
    "dataset": lambda: DatasetSource(Pairs()),
    "batched": lambda: DatasetSource(TensorDataset(X, CLASSES), num_classes=3),
    "stream": lambda: StreamSource(Counted()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_examples_come_by_number_on_the_device_and_in_the_dtype(name):
    source = SOURCES[name]().on("cpu", torch.float64)
    assert len(source) == 12 and source.in_shape == (2,) and source.manifest.num_classes == 3
    for indices in ([3, 7], [0], slice(9, 12), []):
        x, y = source.fetch(indices)
        assert x.dtype == torch.float64 and y.dtype == torch.int64
        assert torch.equal(x, X[indices].double()) and torch.equal(y, CLASSES[indices])
    for wrong in ([12], [-1], [0.5], [True]):
        with pytest.raises(IndexError, match="whole numbers from 0 to 11"):
            source.fetch(wrong)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("name", SOURCES)
def test_an_epoch_that_was_interrupted_goes_on(name, prefetch):
    loader = BatchLoader(SOURCES[name](), Grid(), 5, seed=4, prefetch=prefetch)
    whole = list(loader.epoch(2))
    rest = list(loader.epoch(2, first_batch=1))
    assert [len(batch.y) for batch in whole] == [5, 5, 2]
    for one, other in zip(rest, whole[1:], strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y) and torch.equal(one.examples, other.examples)
    in_order = torch.cat([batch.examples for batch in whole]).tolist()
    assert sorted(in_order) == list(range(12)) and (in_order == list(range(12))) == (name == "stream")


def test_a_stream_begins_each_epoch_and_is_read_once():
    stream = Counted()
    loader = BatchLoader(StreamSource(stream), Grid(), 5, seed=4, prefetch=0)
    for epoch in range(3):
        list(loader.epoch(epoch))
    assert stream.passes == [0, 1, 2]


REFUSED = {
    "no number of classes": (lambda: as_source((X, CLASSES)), "num_classes"),
    "neither": (lambda: as_source(7), "neither tensors"),
    "no length": (lambda: as_source(iter([(X[0], CLASSES[0])]), num_classes=3), "__len__"),
    "different lengths": (lambda: as_source((X, CLASSES[1:]), num_classes=3), "same extent of dim 0"),
    "a nested input": (lambda: TensorSource({"a": {"b": X}}, CLASSES, 3), "Flatten"),
    "mirrored positions of a stream": (
        lambda: BatchLoader(StreamSource(Counted()), Grid(), 5, seed=0, with_partners=True), "stream gives each",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused(what):
    make, words = REFUSED[what]
    with pytest.raises(ConfigError, match=words):
        make()


def test_an_example_that_cannot_be_read_is_named():
    source = DatasetSource(Pairs(broken=[4]))
    with pytest.raises(DataError, match=r"Pairs: examples 3, 4 cannot be read: OSError: no file of example 4"):
        source.fetch([3, 4])
    with pytest.raises(DataError, match="no examples"):
        DatasetSource(TensorDataset(X[:0], CLASSES[:0]))
    with pytest.raises(DataError, match="pair"):
        DatasetSource(TensorDataset(X), num_classes=3)


def test_dtypes_that_numpy_lacks_and_masks_are_described():
    mask = torch.tensor([[True, False]]).expand(12, 2)
    source = TensorSource({"x": X.bfloat16(), "mask": mask, "words": CLASSES[:, None]}, CLASSES, 3)
    dtypes = {name: spec.dtype for name, spec in source.manifest.arrays.items()}
    assert dtypes == {"x": "float32", "mask": "bool", "words": "int64", "y": "int64"}
    whole = [name for name in source.manifest.arrays if source.manifest.is_whole(name)]
    assert whole == ["mask", "words", "y"]
    x, _ = source.fetch([0, 1])
    assert [x[name].dtype for name in dtypes if name != "y"] == [torch.float32, torch.bool, torch.int64]


def test_a_number_of_classes_counts_more_than_their_names():
    data = Pairs()
    data.classes = None
    assert DatasetSource(data).manifest.num_classes == 3
    data.classes = ["a", "b"]
    assert DatasetSource(data).manifest.num_classes == 3


class Net(nn.Module):
    def __init__(self, in_shape, num_outputs):
        super().__init__()
        self.layer = nn.Linear(*in_shape, num_outputs)

    def forward(self, x):
        return self.layer(x)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command line on the dataset of this file."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests"))
    flags = {"run_dir": tmp_path / "run", "model.name": "test_sources.Net", "device": "cpu", "num_epochs": 2}
    flags |= {"data.dataset": "test_sources.dataset", "global_batch_size": 5, "num_samples": 2, "num_test_samples": 2}

    def make(command, **changes):
        given = {**flags, **{name.replace("__", "."): value for name, value in changes.items()}}
        return [command, *(f"--{name}={value}" for name, value in given.items())]

    return make


def test_the_command_line_trains_evaluates_predicts_and_plans_with_a_dataset(words, tmp_path, capsys):
    assert main(words("train")) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["predict", str(tmp_path / "run"), "--output", str(tmp_path / "out.h5")]) == 0
    assert main(words("plan", run_dir=tmp_path / "other")) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and (tmp_path / "out.h5").exists()


class Spectral(Net):
    """With complex weights."""

    def __init__(self, in_shape, num_outputs):
        super().__init__(in_shape, num_outputs)
        self.weight = nn.Parameter(torch.full(in_shape, 1 + 2j))

    def forward(self, x):
        return super().forward((x * self.weight).abs())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complex_weights_keep_their_imaginary_parts(words, tmp_path, dtype):
    flags = {"model__name": "test_sources.Spectral", "dtype": dtype, "posterior__init_std": 0.001}
    assert main(words("train", max_steps=2, **flags)) == 0
    (path,) = (tmp_path / "run/checkpoints").glob("*.pt")
    weight = torch.load(path, weights_only=True)["model"]["weight.loc"]
    assert weight.shape == (2, 2) and (weight - torch.tensor([1.0, 2.0])).abs().max() < 0.1


def test_a_network_of_shards_refuses_a_dataset(words, digits, tmp_path, capsys):
    flags = {"data__shards": digits, "max_steps": 1, "model__name": "hpc_bnn.models.MLP"}
    given = [word for word in words("train", **flags) if not word.startswith("--data.dataset")]
    assert main(given) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--data.dataset", "test_sources.dataset"]) != 0
    assert "--data.dataset test_sources.dataset" in capsys.readouterr().err


def test_a_resumed_run_notices_another_dataset(words, capsys):
    assert main(words("train", num_epochs=1)) == 0
    assert main(words("train", resume="true")) == 0
    assert main(words("train", resume="true", num_epochs=3, data__dataset="test_sources.Counted")) == 1
    assert "not what the run began with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__dataset": "test_sources.missing"}, "--data.dataset test_sources.missing"),
        ({"data__arguments": "{nonsense: 1}"}, "--data.arguments"),
        ({"data__arguments": "{broken: [0]}"}, "no file of example 0"),
    ],
)
def test_a_dataset_that_cannot_be_made_is_a_clear_error(words, capsys, changes, said):
    assert main(words("train", **changes)) != 0
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@pytest.mark.skipif(not SHARED_DATA.exists(), reason="shared/data is not here")
def test_the_example_reads_a_netcdf_store_through_xarray(words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    arguments = f"{{path: {SHARED_DATA / 'weather/era5_t2m_uk_2019-03.nc'}, variable: t2m, lead: 6, every: 4}}"
    changes = {"data__dataset": "xarray_fields.Forecast", "data__arguments": arguments, "global_batch_size": 32}
    changes |= {"model__name": "hpc_bnn.models.MLP", "model__arguments": "{hidden: [32]}", "num_epochs": 6}
    changes |= {"posterior__init_std": 0.05, "likelihood__scale": 0.3, "optimizer__learning_rate": 0.01}
    assert main(words("train", **changes)) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["test/rmse"] < 0.6  # the mean of the training times has 0.64, persistence 0.77


@pytest.mark.parametrize(
    "offset, spread, dtype, is_said",
    [(1.7e9, 1.0, torch.float32, True), (2.4e6, 0.01, torch.float32, True), (1.7e9, 1.0, torch.float64, False),
     (280.0, 10.0, torch.float32, False), (0.1, 0.0, torch.float32, False)],
)  # fmt: skip
def test_numbers_of_the_user_that_float32_makes_equal_are_said_once(offset, spread, dtype, is_said, caplog):
    x = offset + spread * torch.randn(40, 2, dtype=torch.float64)
    source = TensorSource(x, torch.randn(40, 1)).on("cpu", dtype)
    for _ in range(2):
        source.fetch(slice(0, 20))
    assert caplog.text.count("are equal in float32") == is_said


def test_a_source_of_the_user_is_taken_as_it_is(tmp_path):
    class Mine(TensorSource):
        pass

    source = Mine(X, CLASSES, 3)
    assert as_source(source) is source
    assert sys.modules[__name__].dataset("test").num_classes == 3
    config = Config(run_dir=str(tmp_path), device="cpu")
    config.data.dataset, config.model.name = "hpc_bnn.TensorSource", "torch.nn.Linear"
    with pytest.raises(ConfigError, match="arguments"):
        Run(config, GridComm(Grid()))
