"""What a rehearsal says of the collectives is what the ranks send."""

import pytest
import torch

from hpc_bnn import Grid, connect
from hpc_bnn.comm.timing import measure_network
from hpc_bnn.config import Config, ModelConfig
from hpc_bnn.data import Manifest
from hpc_bnn.data.manifest import ArraySpec, ShardFile
from hpc_bnn.errors import ConfigError
from hpc_bnn.grid import grids
from hpc_bnn.plan.plan import plan_here
from hpc_bnn.plan.simulate import imagined_comm, rehearse, share_of

ARRAYS = {"x": ArraySpec((6,), "float32"), "y": ArraySpec((2,), "float32")}
CASES = {
    "elbo": {},
    "world": {"grid": {"reduction": "world"}},
    "shares": {"grid": {"reduction": "shares"}},
    "log_predictive": {"objective": {"name": "log_predictive"}},
    "crps": {"objective": {"name": "crps"}},
    "sharded": {"optimizer": {"sharded": True}},
    "sharded, clipped": {"optimizer": {"sharded": True, "max_gradient_norm": 1.0}},
    "ensemble": {"posterior": {"family": "ensemble"}},
}


def make_manifest():
    return Manifest(
        "made", "here", "none", ARRAYS, {"train": (ShardFile("train-00000.h5", 13, 1, "0" * 64, "0" * 64),)}, {}
    )


def make_config(**parts):
    config = Config(num_samples=8, num_test_samples=8, global_batch_size=13, device="cpu")
    config.model = ModelConfig("hpc_bnn.models.MLP", {"hidden": [8]})
    config.data.prepare = None
    for part, values in parts.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    return config


@pytest.mark.parametrize("case", CASES)
def test_a_step_sends_what_was_rehearsed(sample_size, world, case):
    config, manifest = make_config(**CASES[case]), make_manifest()
    grid = Grid(world.size, sample_size, 0)
    # Rank 0 rehearses for all: that takes longer than the steps
    rehearsed = world.bcast(rehearse(config, manifest, grid).collectives if world.rank == 0 else None)
    comm = connect(sample_size, "cpu", config.grid.reduction)
    step, arguments = share_of(config, manifest, comm)
    step(*arguments)
    sent = comm.traffic.num_bytes
    step(*arguments)
    sent = comm.traffic.num_bytes - sent
    extents = {"sample": grid.sample_size, "data": grid.data_size, "world": world.size}
    # Counted is what a rank gives: of an all-gather its part
    given = [c.num_bytes / (extents[c.axis] if c.operation == "all-gather" else 1) for c in rehearsed]
    largest = world.allreduce(sent, op=max_of)
    assert sum(given) == pytest.approx(largest, rel=0.02, abs=64)


def max_of(a, b):
    return max(a, b)


def test_an_imagined_rank_computes_a_share_as_large_as_a_real_one(sample_size, world):
    config, manifest = make_config(), make_manifest()
    comm = connect(sample_size, "cpu")
    real, (x, _, batch) = share_of(config, manifest, comm)
    grid = Grid(world.size, sample_size, comm.grid.rank)
    imagined, (other, _, other_batch) = share_of(config, manifest, imagined_comm(grid, config))
    assert (x.shape, batch) == (other.shape, other_batch)
    assert torch.equal(real.posterior.buffer.flat, imagined.posterior.buffer.flat)  # keyed, not broadcast


def test_the_network_is_alike_on_all_ranks(world):
    comm = connect(1, "cpu")
    if world.size == 1:
        return
    network = measure_network(comm)
    assert len(set(comm.gather_objects(network))) == 1
    assert 1e6 < network.bandwidth < 1e13 and 1e-8 < network.latency < 10


def test_a_plan_is_alike_on_all_ranks(world, tmp_path):
    config = make_config()
    config.data.shards = write(world, tmp_path)
    plan = plan_here(config)
    assert [row.sample_size for row in plan.rows] == grids(world.size, 8, 13)
    assert len(set(world.allgather((plan.best.sample_size, plan.why)))) == 1
    with pytest.raises(ConfigError, match="--ranks"):
        plan_here(config, num_ranks=1000)


def write(world, tmp_path):
    directory = world.bcast(str(tmp_path / "shards"))
    if world.rank == 0:
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards" / "manifest.json").write_text(make_manifest().to_json())
    world.barrier()
    return directory
