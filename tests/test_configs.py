"""Every config of configs/: it is sound, its network is as large as it says, and so is the command that makes its shards."""

import importlib
import math
import shlex

import common
import pytest
import torch
from conftest import REPOSITORY
from torch._subclasses.fake_tensor import FakeTensorMode

from hpc_bnn.cli import config_of_words
from hpc_bnn.errors import import_object
from hpc_bnn.train import check

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
        net = import_object("--model.name", model.name)((69, 721, 1440), 69, **model.arguments)
        assert 200e6 < sum(math.prod(p.shape) for p in net.parameters()) < 260e6
        assert net(torch.empty(1, 69, 721, 1440)).shape == (1, 69, 721, 1440)
