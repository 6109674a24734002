"""Every config of configs/: it is sound, its network is as large as it says, and so is the command that makes its shards."""

import importlib
import math
import os
import shlex

import common
import pytest
import torch
from conftest import REPOSITORY
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_bnn.cli.commands import config_of_words
from hpc_bnn.data import Manifest
from hpc_bnn.data.manifest import ArraySpec, ShardFile, Statistics
from hpc_bnn.errors import import_object
from hpc_bnn.grid import Grid
from hpc_bnn.plan.simulate import evaluation_bytes
from hpc_bnn.run.experiment import set_precision
from hpc_bnn.run.train import check

CONFIGS = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))


def read(name):
    return config_of_words(["train", "--config", str(REPOSITORY / "configs" / name)])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_sound_and_its_shards_can_be_made(name):
    config = read(name)
    check(config, config.grid.sample_size)
    head = (REPOSITORY / "configs" / name).read_text()
    (line,) = [line for line in head.splitlines() if line.startswith("#   ") and "data_prep/" in line]
    script, *flags = shlex.split(line.partition("data_prep/")[2])
    module = importlib.import_module(script.removesuffix(".py"))
    parser = module.make_parser() if hasattr(module, "make_parser") else common.make_parser(module.__doc__)
    options = parser.parse_args(flags)
    assert str(options.output) == config.data.shards


def test_the_swin_of_full_size_has_200_million_weights():
    model = read("era5_swin.yaml").model
    with FakeTensorMode():
        net = import_object("model.name", model.name)((69, 721, 1440), 69, **model.arguments)
        assert 200e6 < sum(math.prod(p.shape) for p in net.parameters()) < 260e6
        assert net(torch.empty(1, 69, 721, 1440)).shape == (1, 69, 721, 1440)


@pytest.mark.parametrize("is_on_gpu", [True, False])
def test_the_evaluation_of_the_swin_of_full_size_fits_into_80_gb(is_on_gpu):
    config, field = read("era5_swin.yaml"), ArraySpec((69, 721, 1440), "float32")
    statistics = dict.fromkeys(("x", "y"), Statistics([0.0] * 69, [1.0] * 69))
    files = {split: (ShardFile(split, 9000, 1, "", ""),) for split in ("train", "validation")}
    arrays, weights = {"x": field, "y": field}, [[0.5]] * 721
    manifest = Manifest("ERA5", "here", "none", arrays, files, statistics, target_weights=weights)
    # By `hpc-bnn plan`, which rehearses the network for minutes
    resident, forward = 8.00e9, 1.15e9

    def above(sample_size):
        grid = Grid(64, sample_size, 0)
        return evaluation_bytes(config, manifest, grid, resident, forward, is_on_gpu=is_on_gpu) - resident

    assert config.num_test_samples == 64 and resident + above(config.grid.sample_size) <= 32e9
    one_member = 8 * math.prod(field.shape)
    for sample_size in (1, 2, 4):
        assert above(sample_size) <= 2.5 * 64 * one_member / sample_size + one_member + forward
    assert above(4) < 0.5 * above(1)


@pytest.mark.parametrize(("precision", "deterministic"), [("ieee", False), ("tf32", True)])
def test_precision_and_algorithms_are_those_of_the_config(precision, deterministic, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flags = ["--float32_precision", precision, "--deterministic", str(deterministic).lower()]
    try:
        set_precision(config_of_words(["train", *flags]))
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert allowed == (precision == "tf32",) * 2
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    finally:
        set_precision(config_of_words(["train"]))
    assert not torch.backends.cudnn.allow_tf32 and not torch.are_deterministic_algorithms_enabled()
