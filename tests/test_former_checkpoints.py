"""Checkpoints that hpc_bnn 0.1 wrote (format 2) go on to the numbers of that version: see former_checkpoints/README.md."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from hpc_bnn import Grid, GridComm
from hpc_bnn.errors import DataError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import sampler
from hpc_bnn.run import former_checkpoint
from hpc_bnn.run.checkpoint import SECTIONS, CheckpointStore

FORMER = Path(__file__).parent / "former_checkpoints"
sys.path.insert(0, str(FORMER))
import problem  # noqa: E402

pytestmark = pytest.mark.usefixtures("former_noise")
EXPECTED = json.loads((FORMER / "expected.json").read_text())
SAME = [case for case in problem.CASES if case != "low_rank"]


def assert_expected(model, case):
    expected = EXPECTED[case]
    assert model.keys() == expected.keys()
    for name, value in model.items():
        assert value.flatten().tolist() == pytest.approx(expected[name], rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("case", SAME)
def test_a_checkpoint_of_format_2_goes_on_to_the_same_numbers(case, caplog):
    state = CheckpointStore(FORMER / case).load_newest()
    assert state["sections"] == SECTIONS and state["generator"] == "torch"
    step, schedule = problem.resume(state, *problem.CASES[case], GridComm(Grid()))
    assert_expected(problem.end_of(step, schedule), case)
    assert not caplog.records


def test_the_optimizer_of_a_checkpoint_of_format_2_is_needed_for_these_numbers():
    state = CheckpointStore(FORMER / "mean_field").load_newest()
    state["optimizer"]["state"] = {}
    with pytest.raises(AssertionError):
        assert_expected(problem.end_of(*problem.resume(state, "mean_field", {}, GridComm(Grid()))), "mean_field")


def test_a_low_rank_posterior_of_format_2_is_the_same_distribution_today(caplog):
    path = FORMER / "low_rank/step-00000003.pt"
    former = torch.load(path, weights_only=True)["model"]
    state = CheckpointStore(FORMER / "low_rank").load_newest()
    (record,) = caplog.records
    assert str(path) in record.message and "starts it anew" in record.message
    posterior = problem.make_posterior("low_rank", GridComm(Grid()))
    posterior.load_state_dict(state["model"])
    assert posterior.kl().item() == pytest.approx(EXPECTED["low_rank"]["kl"], rel=1e-12)
    key = Key(1, Stream.PREDICTION, sample=2)
    with posterior.evaluating():
        posterior.draw_(key)
        weights = {name: p.detach().clone() for name, p in posterior.module.named_parameters()}
        draw = sampler.RedrawnDraw(posterior.random, posterior.loc)
        draw.begin_(key, [2])
        noise, (z,) = posterior.random.views(draw.noise[0]), draw.normal((), 2)
    for name, eps in noise.items():
        factor = torch.stack([former[f"{name}.factor.{row}"] for row in range(2)])
        w = former[f"{name}.loc"] + former[f"{name}.log_scale"].exp() * eps + torch.tensordot(z, factor, 1)
        assert torch.allclose(weights[name], w, rtol=1e-13, atol=1e-14)
        assert not torch.allclose(state["model"][f"{name}.directions.0"], factor[0])


def test_a_low_rank_run_of_format_2_goes_on_with_a_new_optimizer():
    state = CheckpointStore(FORMER / "low_rank").load_newest()
    step, schedule = problem.resume(state, "low_rank", {}, GridComm(Grid()))
    assert step.optimizer.optimizer.state_dict()["state"] == {}
    assert schedule.get_last_lr() == [state["optimizer"]["groups"][0]["lr"]] != [0.02]
    before = {name: value.clone() for name, value in step.posterior.state_dict().items()}
    after = problem.end_of(step, schedule)
    assert step.num_steps == 2 * problem.NUM_STEPS
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("shape", [(12,), (4, 3)], ids=["flat", "by weight"])
def test_the_optimizer_of_a_network_of_one_weight(shape):
    former = torch.load(FORMER / "mean_field/step-00000003.pt", weights_only=True)
    former["model"] = {f"weight.{slot}": torch.zeros(4, 3) for slot in ("loc", "log_scale")}
    values = [torch.randn(shape), torch.randn(shape)]
    group = former["optimizer"]["param_groups"][0] | {"params": [0, 1]}
    former["optimizer"] = {"state": {n: {"exp_avg": v} for n, v in enumerate(values)}, "param_groups": [group]}
    state = former_checkpoint.convert(former, "step-00000003.pt")["optimizer"]["state"]
    for (name, of_weight), value in zip(state.items(), values, strict=True):
        assert torch.equal(of_weight["exp_avg"], value.view(4, 3)), name


@pytest.mark.parametrize("kept", ["2.", "2.weight.loc", ""], ids=["other", "fewer", "none"])
def test_an_optimizer_that_is_not_of_the_model_is_an_error(kept):
    former = torch.load(FORMER / "mean_field/step-00000003.pt", weights_only=True)
    former["model"] = {name: t for name, t in former["model"].items() if kept and name.startswith(kept)}
    with pytest.raises(DataError, match="does not fit its model"):
        former_checkpoint.convert(former, "step-00000003.pt")


def test_what_is_written_after_a_checkpoint_of_format_2_has_the_new_format(tmp_path):
    shutil.copytree(FORMER / "mean_field", tmp_path, dirs_exist_ok=True)
    store = CheckpointStore(tmp_path)
    state = store.load_newest()
    store.identity = "a" * 32
    caller = SECTIONS.keys() - {"run"}
    store.save({name: value for name, value in state.items() if name in caller}, 4)
    assert [(note.step, note.run) for note in store.notes()] == [(4, "a" * 32), (3, None)]
    again = store.load_newest()
    assert again["format_version"] == 3 and again["run"]["identity"] == "a" * 32
    assert again["optimizer"]["state"].keys() == state["optimizer"]["state"].keys()
