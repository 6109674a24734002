"""Checkpoints of hpc_bnn 0.1 go on on any grid, and so do today's, whatever updates the parameters."""

import json
import sys
from pathlib import Path

import pytest
import torch
from reference import by_one, computed_once

from hpc_bnn import Grid, GridComm
from hpc_bnn.errors import ConfigError
from hpc_bnn.run.checkpoint import CheckpointStore
from hpc_bnn.training.optim import JobOptimizer

FORMER = Path(__file__).parents[1] / "former_checkpoints"
sys.path.insert(0, str(FORMER))
import problem  # noqa: E402

EXPECTED = json.loads((FORMER / "expected.json").read_text())


@pytest.mark.parametrize("case", [case for case in problem.CASES if case != "low_rank"])
def test_a_checkpoint_of_format_2_goes_on_on_this_grid(comm, case, former_noise):
    state = CheckpointStore(FORMER / case).load_newest()
    model = problem.end_of(*problem.resume(state, *problem.CASES[case], comm))
    assert model.keys() == EXPECTED[case].keys()
    for name, value in model.items():
        assert value.flatten().tolist() == pytest.approx(EXPECTED[case][name], rel=1e-10, abs=1e-12), name


# --- what updates the parameters, on which grid, does not enter a checkpoint ------------------------------

KINDS = ("flat", "divided", "per weight")


def make_step(kind, comm, family):
    options = {"sharded": True} if kind == "divided" else {}
    step, schedule = problem.make_step(family, options, comm)
    if kind == "per weight":
        groups = [{**g, "params": list(step.posterior.weight_parameters())} for g in groups_of(step)]
        optimizer = torch.optim.Adam(groups)
        step.optimizer = JobOptimizer.of(optimizer, step.posterior, comm)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas)
    return step, schedule


def groups_of(step):
    return step.optimizer.optimizer.param_groups


def state_after_training(kind, comm, family):
    step, schedule = make_step(kind, comm, family)
    problem.train(step, schedule)
    state = step.gather_state()
    return {**state, "schedule": schedule.state_dict(), "place": {"num_steps": step.num_steps}}


@computed_once
def alone(family):
    """Return the state in the middle and the parameters at the end of a training in one process."""
    state = json_of(state_after_training("flat", GridComm(Grid()), family))
    step, schedule = make_step("flat", GridComm(Grid()), family)
    problem.train(step, schedule)
    return state, problem.end_of(step, schedule)


def json_of(tree):
    """Return a copy of nested dicts with lists of numbers for tensors."""
    if isinstance(tree, dict):
        return {key: json_of(value) for key, value in tree.items()}
    return tree.tolist() if isinstance(tree, torch.Tensor) else tree


def assert_near(found, expected, name):
    found, expected = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found, expected))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-13), name


def families_and_kinds():
    both = [(family, kind) for family in ("mean_field", "low_rank", "ensemble") for kind in KINDS]
    return [pair for pair in both if pair != ("ensemble", "divided")]  # it is spread already


@pytest.mark.parametrize(("family", "kind"), families_and_kinds())
def test_the_state_of_this_grid_is_that_of_one_process_and_goes_on_anywhere(comm, family, kind):
    state, (middle, end) = state_after_training(kind, comm, family), alone(family)
    found, expected = json_of(state["optimizer"]["state"]), middle["optimizer"]["state"]
    assert state["model"].keys() == middle["model"].keys()
    assert found.keys() == expected.keys() and len(found) > 2
    for name, values in expected.items():
        assert found[name].keys() == values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in values.items():
            assert_near(found[name][key], value, (name, key))
    state = comm.gather_objects(state)[0]  # a copy, as from a file
    kinds = [kind for of, kind in families_and_kinds() if of == family]

    def go_on(grid):
        return {other: problem.end_of(*resumed(state, other, grid, family)) for other in kinds}

    for models in (by_one(lambda: go_on(GridComm(Grid()))), go_on(comm)):
        for other, model in models.items():
            for name, value in model.items():
                assert_near(value.tolist(), end[name].tolist(), (other, name))


@pytest.mark.parametrize(
    ("family", "kind"), [("low_rank", "divided"), ("ensemble", "flat"), ("ensemble", "per weight")]
)
def test_the_whole_state_is_on_the_first_rank_only(comm, monkeypatch, family, kind):
    """Other ranks receive nothing where it is gathered, and small pieces, across weights and shares, where it comes back."""
    step, schedule = make_step(kind, comm, family)
    problem.train(step, schedule)
    whole, is_first, seen = step.gather_state(), comm.grid.rank == 0, []
    for name in ("PIECE_BYTES", "LEAST_PIECE_BYTES"):
        monkeypatch.setattr(f"hpc_bnn.comm.packing.{name}", 200)

    def noted(collective):
        def call(tensor, *arguments):
            result = collective(tensor, *arguments)
            seen.append((tensor if result is None else result).nbytes)
            return result

        call.__name__ = collective.__name__
        return call

    for name in ("gather", "all_to_all", "broadcast_"):
        monkeypatch.setattr(comm.tensors, name, noted(getattr(comm.tensors, name)))
    state = step.gather_state(to_first=True)
    if is_first:
        assert json_of(state) == json_of(whole)
    else:
        assert state == {} and sum(seen) == 0
    assert (max(seen, default=0) > 0) == (is_first and comm.grid.sample_size > 1)
    seen.clear()
    other, _ = make_step(kind, comm, family)
    other.scatter_state(state if is_first else None)
    assert all(num_bytes <= 200 for num_bytes in seen) and (len(seen) > 9 or comm.grid.world_size == 1)
    assert json_of(other.gather_state()) == json_of(whole)


def test_a_state_of_another_network_is_refused_by_all_and_changes_nothing(comm):
    state = make_step("flat", comm, "low_rank")[0].gather_state(to_first=True)
    step, _ = make_step("flat", comm, "mean_field")
    before = [p.detach().clone() for p in step.posterior.parameters()]
    with pytest.raises(ConfigError, match="only in the checkpoint or only in the model"):
        step.scatter_state(state or None)
    assert all(map(torch.equal, before, step.posterior.parameters()))


def resumed(state, kind, comm, family):
    step, schedule = make_step(kind, comm, family)
    state = {**state, "num_steps": state["place"]["num_steps"]}
    if comm.grid.world_size == 1:
        step.load_state_dict(state)
    else:
        step.scatter_state(state if comm.grid.rank == 0 else None)
    schedule.load_state_dict(state["schedule"])
    return step, schedule
