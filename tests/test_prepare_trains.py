"""Real data, from the script to a trained network: one epoch on the shards of every script."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, SHARED_DATA, python
from preparation import prepare
from torch import nn

from hpc_bnn import Grid, GridComm
from hpc_bnn.cli.commands import main
from hpc_bnn.data import verify_shards


class FieldNet(nn.Sequential):
    """A network for fields, periodic in nothing: [B, channels, H, W] -> [B, num_outputs, H, W]."""

    def __init__(self, in_shape, num_outputs):
        super().__init__(nn.Conv2d(in_shape[0], 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_outputs, 3, padding=1))


FORECAST = ("--model.arguments", "{hidden: [32]}")
FIELDS = ("--model.name", f"{__name__}.FieldNet", "--likelihood.name", "implicit", "--objective.name", "crps")
CASES = {
    "mnist": ("mnist", ["--source", "mnist", "--num-validation", 5000], ["--global_batch_size", 500]),
    "cifar10": (
        "arrays",
        ["--train", "cifar10/cifar10_train_first4000_lossless.npz", "--x", "images", "--y", "labels",
         "--channels-last", "--classes", 10, "--test-fraction", 0.2],
        ["--augmentation.transforms", "[{name: crop}, {name: flip}]"],
    ),
    "cifar10_jpeg": (
        "arrays",
        ["--train", "cifar10/cifar10_jpeg.npz", "--test", "cifar10/cifar10_jpeg.npz", "--x", "{split}_jpeg",
         "--y", "{split}_labels", "--encoded", "{split}_offsets", "--classes", 10],
        ["--global_batch_size", 1000],
    ),
    "ETTh1": (
        "timeseries",
        ["--source", "ett/ETTh1.csv", "--targets", "OT", "--features", "all", "--window", 96, "--horizon", 24,
         "--split-rows", 8640, 2880, 2880, "--stride", 4],
        FORECAST,
    ),
    "ETTh2_table": (
        "tabular",
        ["--source", "ett/ETTh2.csv", "--target", "OT", "--features", "HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL"],
        FORECAST,
    ),
    "electricity_load": (
        "timeseries",
        ["--source", "electricity_load/opsd_de_2019_60min.csv", "--time", "utc_timestamp",
         "--targets", "DE_load_actual_entsoe_transparency", "--window", 504, "--horizon", 168,
         "--calendar", "hour", "weekday", "--stride", 4],
        FORECAST,
    ),
    "era5_t2m": ("weather", ["--source", "weather/era5_t2m_uk_2019-03.nc", "--history", 2, "--lead", 6], FIELDS),
    "era5_members": (
        "weather",
        ["--source", "weather/era5_levels_members_2017-01.nc", "--validation-fraction", 0, "--test-fraction", 0.5],
        FIELDS,
    ),
    "era_interim": (
        "weather",
        ["--source", "weather/eraint_uvz.nc", "--validation-fraction", 0, "--test-fraction", 0],
        (*FIELDS, "--data.test_split", "train"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_on_the_shards_of_a_real_source(case, tmp_path):
    if not SHARED_DATA.exists():
        pytest.skip("the shared data sets are not beside this clone")
    script, flags, training = CASES[case]
    flags = [str(SHARED_DATA / f) if (SHARED_DATA / str(f)).exists() else str(f) for f in flags]
    command = [*python(), f"data_prep/{script}.py", *flags, "--output", str(tmp_path / "shards")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main(["verify", str(tmp_path / "shards")]) == 0
    common = ["--data.shards", tmp_path / "shards", "--run_dir", tmp_path / "run", "--num_samples", 2]
    common += ["--num_epochs", 1, "--num_test_samples", 4, "--posterior.init_std", 0.01, "--kl_weight", 0.1]
    common += ["--optimizer.learning_rate", 3e-3]
    assert main(["train", *map(str, common), *map(str, training)]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    num_train = sum(shard["num_examples"] for shard in manifest["splits"]["train"])
    batch = int(training[training.index("--global_batch_size") + 1]) if "--global_batch_size" in training else 128
    assert summary["num_steps"] == -(-num_train // batch)
    if manifest["num_classes"]:
        assert summary["test/accuracy"] > 0.153  # chance, and five standard errors of 800 images
    else:
        spread = max(manifest["statistics"]["y"]["std"])
        assert 0 < summary["test/rmse"] < 3 * spread
        if case == "era_interim":
            assert len(manifest["target_weights"]) == 241


def test_the_example_of_ids_and_the_command_line(tmp_path, monkeypatch):
    """The words of a text, from a file of whole numbers to the predictive of an embedding."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import arrays
    import token_ids

    assert token_ids.main(GridComm(Grid()), str(tmp_path / "forecasts")) > 0.95
    x, y = token_ids.sentences(300, seed=3)
    np.savez(tmp_path / "tokens.npz", x=x.astype(np.uint16), y=y)
    flags = ("--train", tmp_path / "tokens.npz", "--ids", "--classes", 2, "--test-fraction", 0.2)
    prepare(arrays, tmp_path / "shards", *flags)
    words = [
        "--data.shards",
        tmp_path / "shards",
        "--run_dir",
        tmp_path / "run",
        "--model.name",
        "token_ids.BagOfWords",
    ]
    words += ["--num_samples", 2, "--num_test_samples", 4, "--num_epochs", 30, "--optimizer.learning_rate", 0.02]
    words += ["--kl_weight", 0.1, "--posterior.init_std", 0.02, "--global_batch_size", 50]
    assert main(["train", *map(str, words)]) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["test/accuracy"] > 0.9
    assert main(["predict", str(tmp_path / "run"), "--output", str(tmp_path / "p.h5")]) == 0
    assert main(["plan", *map(str, words), "--ranks", "2"]) == 0


def test_a_full_disk_ends_a_preparation_with_a_message(tmp_path):
    """In a process of its own: HDF5 used to end it with a segmentation fault, at its exit."""
    command = f"ulimit -f 20; exec {sys.executable} {REPOSITORY}/data_prep/digits.py --output shards"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "writing shards" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "shards/manifest.json").exists()


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&- 2>&- <&-", 0), ("> /dev/full", 1), ("| true", 0)], ids=["closed", "full", "gone"]
)
def test_an_output_that_takes_nothing_ends_no_preparation(tmp_path, redirection, code):
    command = f"set -o pipefail; {sys.executable} {REPOSITORY}/data_prep/digits.py --output shards {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert verify_shards(tmp_path / "shards") == []
