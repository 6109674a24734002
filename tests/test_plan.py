"""hpc-bnn plan, and --grid.sample_size auto: what is rehearsed is what happens."""

import dataclasses
import json
import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hpc_bnn.cli import commands
from hpc_bnn.cli.commands import main
from hpc_bnn.comm.timing import Network
from hpc_bnn.config import Config, ModelConfig
from hpc_bnn.data import Manifest
from hpc_bnn.data.manifest import ArraySpec, ShardFile, Statistics
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.grid import Grid, grids
from hpc_bnn.likelihoods import mixtures
from hpc_bnn.plan import plan
from hpc_bnn.plan.costs import Cost, Costs
from hpc_bnn.plan.plan import ALIKE, Machine, Row, choose, describe, make_plan
from hpc_bnn.plan.simulate import ImaginedDataset, LiveMemory, Rehearsal, imagined_comm, rehearse, share_of
from hpc_bnn.predictive.evaluation import score_dataset
from hpc_bnn.run.experiment import Experiment
from hpc_bnn.run.plotted_examples import shown_examples

GB = 1e9


@pytest.fixture
def manifest(digits):
    return Manifest.read(digits)


def make_config(**changes):
    config = Config(num_samples=8, global_batch_size=64, chunk_size=1)
    config.model = ModelConfig("hpc_bnn.models.MLP", {"hidden": [96, 32]})
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(config, part) if part else config, field, value)
    return config


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"chunk_size": 4},
        {"micro_batch_size": 16},
        {"dtype": "float64"},
        {"posterior__family": "deterministic", "num_samples": 1},
        {"posterior__family": "mc_dropout", "model__arguments": {"hidden": [64], "dropout": 0.2}},
        {"posterior__family": "low_rank"},
        {"posterior__family": "ensemble", "num_samples": 2, "num_test_samples": 2},
        {"objective__name": "log_predictive", "chunk_size": 3},
        {"optimizer__name": "SGD", "optimizer__arguments": {"momentum": 0.9}},
    ],
    ids=str,
)
def test_rehearsed_memory_is_that_of_the_real_step(manifest, changes):
    config = make_config(**changes)
    grid = Grid(1, 1, 0)
    rehearsed = rehearse(config, manifest, grid)
    comm = imagined_comm(grid, config)  # of one rank: nothing is imagined
    with LiveMemory() as memory:
        step, arguments = share_of(config, manifest, comm)
        step(*arguments)  # makes the state of the optimizer
        memory.peak_bytes = 0
        step(*arguments)
    assert rehearsed.peak_bytes == pytest.approx(memory.peak_bytes, rel=0.03)
    assert rehearsed.parameter_bytes == step.posterior.buffer.flat.nbytes


@pytest.mark.parametrize("changes", [{}, {"grid__reduction": "axes"}, {"model__arguments": {"hidden": [8]}}], ids=str)
def test_a_gradient_goes_by_shares_where_the_grid_is_on_several_nodes(manifest, changes):
    """By default, and where it is large."""
    config = make_config(**{"model__arguments": {"hidden": [1000, 100]}} | changes)
    operations = {
        per_node: [c.operation for c in rehearse(config, manifest, Grid(4, 2, 0), ranks_per_node=per_node).collectives]
        for per_node in (None, 4, 2)
    }
    assert operations[None] == operations[4] == ["all-reduce"] * 2
    by_shares = ["reduce-scatter", "all-reduce", "all-gather"]
    assert operations[2] == (by_shares if not changes else ["all-reduce"] * 2)


def make_evaluated(likelihood, num_samples, shape=(3, 4, 8), num_examples=120, objective="elbo"):
    """Return config and manifest of targets of a shape, an int for so many classes."""
    is_class = isinstance(shape, int)
    arrays = {"x": ArraySpec((6,), "float32"), "y": ArraySpec(() if is_class else shape, "float32")}
    scales = {name: Statistics([0.0] * n, [1.0] * n) for name, n in (("x", 6), ("y", is_class or shape[0]))}
    files = {split: (ShardFile("a", num_examples, 1, "", ""),) for split in ("train", "test")}
    about = {"num_classes": shape} if is_class else {}
    if not is_class and shape[1:]:
        about = {"target_weights": [[0.5]] * shape[1]}
    manifest = Manifest("made", "here", "none", arrays, files, {} if is_class else scales, **about)
    config = make_config(num_test_samples=num_samples, likelihood__name=likelihood, objective__name=objective)
    config.model = ModelConfig("test_plan.Onto", {"hidden": 512 if is_class else 16})
    return config, manifest


class Onto(torch.nn.Module):
    """A network onto classes or fields."""

    def __init__(self, in_shape, num_outputs, places=(), hidden=16):
        super().__init__()
        self.form = (num_outputs, *places)
        self.inner = torch.nn.Linear(in_shape[0], hidden)
        self.outer = torch.nn.Linear(hidden, math.prod(self.form))

    def forward(self, x):
        return self.outer(self.inner(x).relu()).unflatten(1, self.form)


@pytest.mark.parametrize("sample_size", [1, 4])
@pytest.mark.parametrize(
    "arguments",
    [
        ("categorical", 16, 10, 3000),
        ("gaussian", 8),
        ("gaussian", 4, (2,)),
        ("student_t", 4, (3, 2, 4), 40),
        ("implicit", 6, (3, 4, 8), 120, "crps"),
        ("implicit", 64, (3, 12, 24), 3, "crps"),
    ],
    ids=str,
)
def test_rehearsed_memory_is_that_of_the_real_evaluation(arguments, sample_size, monkeypatch):
    """The whole evaluation in full size, on real numbers: predictive, members of all ranks, scores, pictures."""
    monkeypatch.setitem(mixtures.CHUNK_ELEMENTS, "cpu", 2**12)  # as many chunks in a small evaluation as in a large one
    config, manifest = make_evaluated(*arguments)
    grid = Grid(sample_size, sample_size, 0)
    rehearsed = rehearse(config, manifest, grid)
    comm = imagined_comm(grid, config)
    with LiveMemory() as memory:
        experiment = Experiment(config, comm, manifest)
        experiment.posterior.begin_()  # makes what stays
        likelihood, begun = experiment.likelihood, memory.live_bytes
        dataset = ImaginedDataset(manifest, torch.float32, manifest.num_examples("test"), likelihood)
        shown = shown_examples(likelihood, comm, dataset)
        score_dataset(
            experiment.posterior, likelihood, comm, dataset, num_samples=config.num_test_samples, see=shown.add
        )
    above = rehearsed.evaluation_bytes - rehearsed.resident_bytes
    assert above == pytest.approx(memory.peak_bytes - begun, rel=0.05)


def test_a_grid_fits_only_with_its_evaluation(monkeypatch):
    config, manifest = make_evaluated("implicit", 64, (3, 12, 24), 3, "crps")
    rehearsed = rehearse(config, manifest, Grid(1, 1, 0))
    assert rehearsed.evaluation_bytes > rehearsed.peak_bytes
    memory = (rehearsed.evaluation_bytes + rehearsed.peak_bytes) / 2
    plan = make_plan(config, manifest, Machine(1, 1, flops=1e12, memory_bytes=memory))
    (row,) = plan.rows
    assert not row.fits and 1 < row.fitting_test_samples < 64
    fewer = f"--num_test_samples {row.fitting_test_samples} fits"
    assert "the evaluation takes" in plan.why and fewer in plan.why and "a step" not in plan.why
    assert f"{rehearsed.evaluation_bytes / 1e6:.1f} MB" in describe(config, plan)
    for count, fits in ((row.fitting_test_samples, True), (row.fitting_test_samples + 1, False)):
        config.num_test_samples = count
        machine = Machine(1, 1, flops=1e12, memory_bytes=memory)
        assert make_plan(config, manifest, machine).best.fits == fits


def test_memory_grows_with_the_chunk_and_not_with_the_samples(manifest):
    peaks = {
        (num_samples, chunk): rehearse(
            make_config(num_samples=num_samples, chunk_size=chunk), manifest, Grid(1, 1, 0)
        ).activation_bytes
        for num_samples, chunk in ((4, 1), (64, 1), (64, 16))
    }
    assert peaks[64, 1] <= 1.05 * peaks[4, 1] < 0.5 * peaks[64, 16]


def test_a_network_whose_way_depends_on_numbers_is_refused(manifest):
    config = make_config(model__name="test_plan.Looking", model__arguments={})
    with pytest.raises(DataError, match=r"test_plan\.Looking cannot be rehearsed"):
        rehearse(config, manifest, Grid(1, 1, 0))


class Looking(torch.nn.Linear):
    def __init__(self, in_shape, num_outputs):
        super().__init__(in_shape[0], num_outputs)

    def forward(self, x):
        return super().forward(x) if x.sum().item() > 0 else super().forward(-x)


# --- time ----------------------------------------------------------------------------------------------


def test_collectives_cost_what_the_formula_says():
    network = Network(bandwidth=10e9, latency=5e-6)
    assert network.seconds("all-reduce", 1e9, 4) == pytest.approx(2 * 0.75 * 0.1 + 2 * 2 * 5e-6)
    assert network.seconds("all-gather", 1e9, 8) == pytest.approx(0.875 * 0.1 + 3 * 5e-6)
    assert network.seconds("all-reduce", 1e9, 1) == 0


@given(st.integers(1, 512), st.integers(1, 64), st.integers(1, 64))
def test_every_rank_of_a_grid_has_work(num_ranks, num_samples, batch):
    fitting = [
        s for s in range(1, num_ranks + 1) if num_ranks % s == 0 and s <= num_samples and num_ranks // s <= batch
    ]
    if not fitting:
        with pytest.raises(ConfigError, match="number of ranks"):
            grids(num_ranks, num_samples, batch)
        return
    assert grids(num_ranks, num_samples, batch) == fitting
    for size in fitting:
        for rank in range(num_ranks):
            grid = Grid(num_ranks, size, rank)
            part = grid.local_examples(batch)
            assert len(grid.local_samples(num_samples)) and part.stop > part.start


def make_row(sample_size, compute, reduce=0.0, peak=1, fits=True):
    zeros = {field.name: 0 for field in dataclasses.fields(Rehearsal)}
    rehearsal = Rehearsal(**zeros | {"peak_bytes": peak, "collectives": ()})
    return Row(sample_size, 8 // sample_size, rehearsal, compute, reduce, 1.0, fits)


def test_the_fastest_grid_that_fits_is_taken():
    machine = Machine(8, 4)
    rows = [make_row(1, 1.0), make_row(2, 0.4, fits=False), make_row(4, 0.5, 0.1), make_row(8, 0.9)]
    best, why = choose(rows, machine)
    assert best is rows[2] and "2 x 4 does not fit" in why and "83 % of its step is computing" in why
    rows.append(make_row(8, 0.6 * (1 + ALIKE / 2)))
    assert choose(rows, machine)[0] is rows[-1]  # as fast, and reads less
    rows = [make_row(1, 1.0, peak=9, fits=False), make_row(8, 2.0, peak=3, fits=False)]
    best, why = choose(rows, Machine(8, 4, memory_bytes=2))
    assert best is rows[1] and "no grid fits" in why and "--optimizer.sharded" in why


def test_an_axis_inside_a_node_has_the_network_of_the_node():
    within, between = Network(100 * GB, 1e-6), Network(10 * GB, 1e-5)
    machine = Machine(16, 4, between, within)
    assert machine.network("sample", Grid(16, 4, 0)) is within
    assert machine.network("sample", Grid(16, 8, 0)) is between
    assert machine.network("data", Grid(16, 4, 0)) is between
    assert Machine(4, 4, between, within).network("data", Grid(4, 2, 0)) is within


def test_a_slower_network_wants_fewer_bytes(manifest):
    config = make_config(optimizer__sharded=False)
    plans = [
        make_plan(config, manifest, Machine(4, 1, Network(bandwidth, 0.0), flops=1e12))
        for bandwidth in (1 * GB, 2 * GB)
    ]
    for slow, fast in zip(*(made.rows for made in plans)):
        assert slow.reduce_seconds == pytest.approx(2 * fast.reduce_seconds)
        assert slow.reduce_seconds > 0
        assert slow.compute_seconds == fast.compute_seconds == slow.rehearsal.flops / 1e12
    assert math.isinf(plans[0].machine.memory_bytes) and json.loads(plans[0].to_json())["best"]


# --- the commands --------------------------------------------------------------------------------------


def test_plan_prints_every_grid_and_writes_json(digits, capsys, tmp_path):
    output = tmp_path / "new" / "plan.json"
    flags = ["plan", "--config", "configs/digits.yaml", "--data.shards", str(digits)]
    assert main([*flags, "--ranks", "4", "--output", str(output)]) == 0
    (tmp_path / "file").touch()
    assert main([*flags, "--ranks", "4", "--output", str(tmp_path / "file/plan.json")]) == 1
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["sample_size"] for row in written["rows"]] == [1, 2, 4]
    assert f"Take --grid.sample_size {written['best']['sample_size']}" in printed and "<-- best" in printed
    for row in written["rows"]:
        assert row["compute_seconds"] > 0 and row["reduce_seconds"] > 0
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"network": {"bandwidth": 3e9, "latency": 7e-6}}))
    assert main([*flags, "--ranks", "2", "--flops", "1e9", "--network", str(facts)]) == 0
    assert capsys.readouterr().out.count("3 GB/s and 7 µs") == 2
    assert main([*flags, "--ranks", "2", "--network", str(output)]) == 2
    assert "hpc-bnn doctor --json" in capsys.readouterr().err
    assert main([*flags, "--bandwidth", "0", "--node_latency", "-1", "--output", str(tmp_path)]) == 2
    refused = capsys.readouterr().err
    assert "--bandwidth 0" in refused and "--node_latency -1" in refused and "it is a directory" in refused
    assert main([*flags, "--ranks", "0", "--memory", "-1"]) == 2
    refused = capsys.readouterr().err
    assert "--ranks 0" in refused and "--memory -1" in refused


def test_auto_of_one_process_needs_no_plan(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "plan_here", None)
    flags = ["--data.shards", str(digits), "--max_steps", "2", "--run_dir", str(tmp_path), "--num_samples", "4"]
    assert main(["train", "--config", "configs/digits.yaml", "--grid.sample_size", "auto", *flags]) == 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["grid"]["sample_size"] == 1


@pytest.mark.parametrize(
    ("num_ranks", "num_samples", "batch", "size"), [(12, 8, 64, 6), (1024, 64, 128, 64), (8, 4, 8, 4), (7, 4, 8, 1)]
)
def test_max_is_the_longest_axis_with_a_sample_for_each_rank(num_ranks, num_samples, batch, size, monkeypatch):
    monkeypatch.setattr(commands.comm, "world_size", lambda: num_ranks)
    config = make_config(num_samples=num_samples, global_batch_size=batch, grid__sample_size="max")
    commands._choose_grid(config)
    assert config.grid.sample_size == size


def test_auto_takes_a_grid_of_the_plan(digits, mpirun, tmp_path):
    flags = ["--data.shards", digits, "--max_steps", 3, "--run_dir", tmp_path / "run", "--num_samples", 4]
    done = mpirun(2, "-m", "hpc_bnn", "train", "--config", "configs/digits.yaml", "--grid.sample_size", "auto", *flags)
    assert done.returncode == 0, done.stderr
    grid = json.loads((tmp_path / "run" / "summary.json").read_text())["grid"]
    assert grid["sample_size"] * grid["data_size"] == 2
    assert f"auto: the grid {grid['sample_size']} x {grid['data_size']}:" in done.stderr


def test_costs_of_a_device_are_taken_along(digits, capsys, tmp_path):
    """Measured once on one device, for any number of ranks: no step runs there."""
    path = tmp_path / "costs.json"
    flags = ["plan", "--config", "configs/digits.yaml", "--data.shards", str(digits)]
    assert main([*flags, "--measure", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [cost["examples"] for cost in content["costs"]] == [
        1,
        4,
        16,
        64,
    ] and "ms per sample" in capsys.readouterr().out
    output = tmp_path / "plan.json"
    large = [*flags, "--ranks", "64", "--num_samples", "16", "--measured", str(path), "--output", str(output)]
    assert main(large) == 0
    plan_there = json.loads(output.read_text())
    by_count = {cost["examples"]: cost for cost in content["costs"]}
    for row in plan_there["rows"]:
        samples, examples = row["rehearsal"]["local_samples"], row["rehearsal"]["local_batch_size"]
        if cost := by_count.get(examples):
            assert row["compute_seconds"] == pytest.approx(cost["step_seconds"] + samples * cost["sample_seconds"])
        ranks = row["sample_size"] * row["data_size"]
        assert (
            row["rank_hours_per_epoch"] == pytest.approx(ranks / row["epochs_per_hour"])
            and 0 < row["efficiency"] <= 1.01
        )
    printed = capsys.readouterr().out
    assert "costs of a sample measured on cpu" in printed
    assert ("WARNING: an efficiency of" in printed) == (plan_there["best"]["efficiency"] < 0.5)
    assert main([*large, "--model.arguments", "{hidden: [7]}"]) == 2
    assert "it was measured with another model.arguments" in capsys.readouterr().err
    path.write_text("{}")
    assert main(large) == 2 and "--measured" in capsys.readouterr().err


def test_costs_are_linear_between_what_was_measured():
    costs = Costs("cpu", {}, (Cost(1, 1.0, 2.0), Cost(4, 1.0, 2.0), Cost(16, 2.0, 8.0)))
    assert costs.seconds(3, 1) == costs.seconds(3, 2) == 1 + 3 * 2  # the floor
    assert costs.seconds(3, 10) == pytest.approx(1.5 + 3 * 5.0)
    assert costs.seconds(3, 32) == pytest.approx(2 + 3 * 16)  # proportional beyond


def test_efficiency_counts_the_floor(manifest):
    """Of a network whose sample of one example costs as much as of many, no rank gains by fewer examples."""
    floor = Costs("gpu", {}, (Cost(1, 0.0, 1.0), Cost(64, 0.0, 1.0)))
    made = make_plan(make_config(), manifest, Machine(8, 8, flops=1.0), costs=floor)
    assert made.best.sample_size == 8 and made.best.efficiency == pytest.approx(1, abs=0.01)
    least = min(made.rows, key=lambda row: row.sample_size)
    assert least.efficiency < 0.5
