"""Checkpoints: atomic, checked, pruned; and runs that go on from them, in one process."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import JOB_SECONDS, REPOSITORY, patience, python, with_plots

from hpc_bnn import __version__, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.config import OptimizerConfig
from hpc_bnn.errors import DataError
from hpc_bnn.models import MLP
from hpc_bnn.noise import GENERATOR
from hpc_bnn.run.checkpoint import SECTIONS, CheckpointStore, read_identity
from hpc_bnn.run.train import _Progress
from hpc_bnn.training.schedules import learning_rate_factor


def state(step):
    return {
        "model": {"w": torch.full((1000,), float(step))},
        "optimizer": {"state": {}, "groups": [{"lr": 1.0}]},
        "schedule": {},
        "place": {"num_steps": step, "epoch": step, "row": {}},
        "generator": "torch",
        "config": {},
    }


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_the_best_are_kept(tmp_path, asynchronous):
    store = CheckpointStore(tmp_path, keep_last=2, asynchronous=asynchronous)
    for step, metric in enumerate([3.0, 1.0, None, float("nan"), 2.0, None]):
        store.save(state(step), step, metric)
    store.close()
    assert [(note.step, note.metric) for note in store.notes()] == [(5, None), (4, 2.0), (1, 1.0)]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3 + [".pt"] * 3
    newest = store.load_newest()
    assert newest["place"]["epoch"] == 5 and torch.equal(newest["model"]["w"], torch.full((1000,), 5.0))


def test_an_asynchronous_write_keeps_what_the_state_was(tmp_path):
    store, tensor = CheckpointStore(tmp_path, asynchronous=True), torch.zeros(1_000_000)
    store.save(state(0) | {"model": {"w": tensor}}, 0)
    tensor.add_(1)
    store.close()
    assert store.load_newest()["model"]["w"].sum() == 0


def test_an_error_of_an_asynchronous_write_arrives(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file/checkpoints", asynchronous=True)
    store.save(state(0), 0)
    with pytest.raises(OSError):
        store.close()


def flip(path, bit=16000):
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def signed(content):
    """Return the text of a note with its own checksum."""
    content = {name: value for name, value in content.items() if name != "note_sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"note_sha256": digest})


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "note"])
def test_the_one_before_a_damaged_checkpoint_is_used_and_said(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        store.save(state(step), step)
    path = tmp_path / "step-00000020.pt"
    whole = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(whole[:-100])
    elif damage == "flip":
        flip(path)
    elif damage == "delete":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{")
    assert store.load_newest()["place"]["epoch"] == 10
    said = "step-00000020.json cannot be read" if damage == "note" else "the one before it is used"
    assert "step-00000020" in caplog.text and said in caplog.text
    before = contents(tmp_path)
    with pytest.raises(
        DataError, match=r"step-00000020.* Put back a copy"
    ):  # where nobody computes the lost steps again
        CheckpointStore(tmp_path).load_newest(falls_back=False)
    assert contents(tmp_path) == before  # whoever reads moves nothing
    store.keep_last = 1
    for step in (15, 16, 17):  # the damaged one is moved aside; it counts for nothing, and nobody removes it
        store.save(state(step), step)
        assert store.load_newest()["place"]["epoch"] == step
    aside = {f"step-00000020.{kind}.damaged1" for kind in ("json", "pt")[: 1 + (damage != "delete")]}
    assert set(os.listdir(tmp_path)) == {"step-00000017.pt", "step-00000017.json", *aside}
    assert "moved to step-00000020.json.damaged1" in caplog.text


def test_an_older_one_that_is_damaged_is_none_of_those_that_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(state(step), step)
    flip(tmp_path / "step-00000003.pt")
    store = CheckpointStore(tmp_path, keep_last=2)  # which has never looked at them
    store.save(state(4), 4)
    assert {note.step for note in store.notes()} == {4, 3, 2}
    store.save(state(5), 5)
    assert {note.step for note in store.notes()} == {5, 4} and (tmp_path / "step-00000003.pt.damaged1").exists()


def test_nothing_is_removed_as_long_as_too_few_are_sound(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=4)
    for step in (1, 2, 3, 4):
        store.save(state(step), step)
    for step in (3, 4):
        flip(tmp_path / f"step-{step:08d}.pt")
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(state(5), 5)
    assert {5, 2} <= {note.step for note in store.notes()}


def test_a_checkpoint_of_the_same_step_takes_its_place_in_one_moment(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    for number in range(4):
        store.save(state(1) | {"config": {"number": number}}, 1)
        assert store.load_newest()["config"] == {"number": number}
        assert len(os.listdir(tmp_path)) == 2


def test_every_bit_of_a_note_is_checked(tmp_path, caplog):
    """No flip of a bit makes another checkpoint the newest or the best without a word."""
    store = CheckpointStore(tmp_path, keep_last=9, metric_name="test/nll")
    for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0)):
        store.save(state(step), step, metric)
    loads = {"newest": lambda s: s.load_newest(falls_back=False), "best": CheckpointStore.load_best}
    expected = {"newest": 3, "best": 2}
    for path in sorted(tmp_path.glob("*.json")):
        whole = path.read_bytes()
        for bit in range(0, 8 * len(whole), 23):
            flip(path, bit)
            for which, load in loads.items():
                caplog.clear()
                try:
                    assert load(CheckpointStore(tmp_path))["place"]["epoch"] == expected[which]
                except DataError as error:
                    assert path.name in str(error)
            path.write_bytes(whole)


def test_checkpoints_of_another_metric_are_never_the_best(tmp_path):
    for name, step, metric in (("test/rmse", 1, 0.1), ("test/nll", 2, 5.0), ("test/nll", 3, 6.0)):
        CheckpointStore(tmp_path, keep_last=9, metric_name=name).save(state(step), step, metric)
    assert CheckpointStore(tmp_path).load_best()["place"]["epoch"] == 2


def test_a_run_does_not_begin_anew_where_all_checkpoints_are_damaged(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.load_newest() is None
    for step in (10, 20):
        store.save(state(step), step)
    (tmp_path / "step-00000020.json").write_text("[]")
    (tmp_path / "step-00000010.pt").write_bytes(b"")
    with pytest.raises(DataError, match="holds no sound checkpoint, but files of 2"):
        store.load_newest()


def test_a_note_can_name_no_other_file(tmp_path, caplog):
    store, other = CheckpointStore(tmp_path / "checkpoints", keep_last=1), tmp_path / "step-00000001.pt"
    for step in (1, 2):
        store.save(state(step), step)
    other.write_text("mine")
    path = tmp_path / "checkpoints/step-00000002.json"
    path.write_text(signed(json.loads(path.read_text()) | {"file": "../step-00000001.pt", "step": 0}))
    with pytest.raises(DataError):
        store.load_newest()
    store.save(state(3), 3)
    assert "it names ../step-00000001.pt" in caplog.text and other.exists()


# --- the format -----------------------------------------------------------------------------------------


def rewrite(directory, change, step=1):
    """Change a checkpoint as another version of hpc_bnn would have written it, with its note."""
    path = directory / f"step-{step:08d}.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    note = json.loads(path.with_suffix(".json").read_text())
    note |= {"num_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(signed(note | {"run": content["run"]["identity"]}))


def test_a_checkpoint_names_its_format_sections_generator_and_run(tmp_path):
    store = CheckpointStore(tmp_path)
    store.identity = "f" * 32
    store.save(state(1), 1)
    found = torch.load(tmp_path / "step-00000001.pt", weights_only=True)
    assert found["format_version"] == 3 and found["sections"] == SECTIONS
    assert found.keys() == {"format_version", "sections", *SECTIONS}
    assert found["run"] == {"identity": "f" * 32, "hpc_bnn": __version__}
    assert json.loads((tmp_path / "step-00000001.json").read_text())["run"] == "f" * 32


UNKNOWN = {
    "a newer format": (lambda c: c.update(format_version=4), "format 4: .* reads formats 2 and 3"),
    "a new section": (
        lambda c: c.update(chains=1, sections=c["sections"] | {"chains": 1}),
        "section chains of version 1.*hpc_bnn 9.9 wrote it: use that version",
    ),
    "a section without version": (lambda c: c.update(chains=1), "section chains of version None"),
    "a newer version of one": (
        lambda c: c.update(sections=c["sections"] | {"optimizer": 2}),
        "section optimizer of version 2",
    ),
    "none of one": (lambda c: [c.pop("place"), c["sections"].pop("place")], "no section place"),
    "the name of one only": (lambda c: c.pop("place"), "no section place"),
}


@pytest.mark.parametrize("change", UNKNOWN)
def test_what_this_version_does_not_know_is_refused(tmp_path, change):
    store, (changed, message) = CheckpointStore(tmp_path), UNKNOWN[change]
    for step in (1, 2):
        store.save(state(step), step)
    rewrite(tmp_path, lambda c: [c["run"].update(hpc_bnn="9.9"), changed(c)], 2)
    note = tmp_path / "step-00000002.json"
    note.write_text(signed(json.loads(note.read_text()) | {"new": 1}))  # a newer note says that it is there
    before = sorted(tmp_path.iterdir())
    for load in (store.load_newest, lambda: store.load(store.notes()[0])):
        with pytest.raises(DataError, match=f"step-00000002.pt has .*{message}"):  # no older one takes its place
            load()
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_of_another_run_is_named_and_neither_used_nor_removed(tmp_path, caplog):
    other, store = CheckpointStore(tmp_path / "other"), CheckpointStore(tmp_path / "mine", keep_last=1)
    other.identity, store.identity = "a" * 32, "b" * 32
    other.save(state(9), 9, metric=0.0)
    store.save(state(1), 1, metric=1.0)
    shutil.copytree(tmp_path / "other", tmp_path / "mine", dirs_exist_ok=True)
    assert store.load_newest()["place"]["epoch"] == store.load_best()["place"]["epoch"] == 1
    assert "step-00000009.pt is one of run " + "a" * 32 in caplog.text and "it is not used" in caplog.text
    store.save(state(2), 2, metric=0.5)
    assert [note.step for note in store.notes()] == [2]
    assert (tmp_path / "mine/step-00000009.pt").exists() and (tmp_path / "mine/step-00000009.json").exists()
    note = json.loads((tmp_path / "mine/step-00000009.json").read_text())  # and no note makes it ours
    (tmp_path / "mine/step-00000009.json").write_text(signed(note | {"run": "b" * 32}))
    assert store.load_newest()["place"]["epoch"] == 2
    assert "is not of run " + "b" * 32 in caplog.text


def test_a_full_disk_leaves_the_last_checkpoint_and_no_litter(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(state(1), 1)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.save(state(2), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001.json", "step-00000001.pt"]
    assert store.load_newest()["place"]["epoch"] == 1


def test_foreign_objects_are_not_unpickled(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(state(1) | {"config": REPOSITORY}, 1)  # a pathlib.Path: code of another module would be called
    (note,) = store.notes()
    with pytest.raises(DataError, match="cannot be loaded"):
        store.load(note)


# --- runs ----------------------------------------------------------------------------------------------

FLAGS = ("--num_epochs", "4", "--num_test_samples", "4", "--num_samples", "2", "--dtype", "float64")


def train(digits, run_dir, *flags):
    config = str(REPOSITORY / "configs/digits.yaml")
    common = ["--config", config, "--data.shards", str(digits), "--run_dir", str(run_dir), *FLAGS]
    return main(["train", *common, *map(str, flags)])


def result(run_dir):
    """Return the newest checkpoint's tensors, and the rows without times."""
    state = CheckpointStore(run_dir / "checkpoints").load_newest()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "examples_per_second", "samples_per_second", "communication_share", "run")
    timeless = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return state["model"], state["optimizer"], timeless


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b)
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize(
    "flags",
    [
        ["--augmentation.transforms", "[{name: noise}]", "--kl_annealing.schedule", "linear"],
        ["--posterior.family", "ensemble", "--num_test_samples", "2", "--optimizer.name", "AdamW"],
        ["--posterior.family", "deterministic", "--optimizer.name", "SGD", "--optimizer.arguments", "{momentum: 0.9}"],
        ["--optimizer.warmup_epochs", "1.5", "--optimizer.max_gradient_norm", "5", "--checkpoint.asynchronous", "true"],
        ["--optimizer.name", "pytorch_optimizer.Lamb", "--optimizer.sharded", "false"],
        ["--optimizer.sharded", "true", "--grid.compression", "bf16"],
        ["--objective.name", "log_predictive", "--optimizer.schedule", "step", "--optimizer.decay_every_epochs", "1"],
    ],
    ids=lambda flags: flags[1].split(".")[-1][:20],
)
def test_a_run_that_is_interrupted_anywhere_equals_the_uninterrupted_one_bit_for_bit(digits, tmp_path, flags):
    flags = [*flags, "--test_every_epochs", "2"]
    assert train(digits, tmp_path / "whole", *flags) == 0
    for steps in (7, 23, 31, 70):  # in an epoch of 23 steps, at its end, twice in the middle of others
        assert train(digits, tmp_path / "parts", *flags, "--max_steps", steps, "--resume", "true") == 0
    assert train(digits, tmp_path / "parts", *flags, "--resume", "true") == 0
    (*whole, rows), (*parts, other_rows) = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert_same(whole, parts)
    for row, other in zip(rows, other_rows, strict=True):  # a stop evaluates besides
        assert_same(row, {name: other[name] for name in row})


@pytest.mark.parametrize(("capture", "steps"), [("off", [5, 4, 3, 2, 1]), ("on", [5, 3])])
def test_checkpoints_by_time_go_on_to_the_same(digits, tmp_path, capture, steps):
    """Each step is late; one that waits for no step hears of it two steps later."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    by_time = ("--checkpoint.every_minutes", 1e-9, "--checkpoint.keep_last", 99, "--capture", capture)
    assert train(digits, whole, "--num_epochs", 1, "--capture", capture, "--checkpoint.every_minutes", 1e9) == 0
    assert [note.step for note in CheckpointStore(whole / "checkpoints").notes()] == [23]
    assert train(digits, parts, "--num_epochs", 1, *by_time, "--max_steps", 5) == 0
    assert [note.step for note in CheckpointStore(parts / "checkpoints").notes()] == steps
    for path in (parts / "checkpoints").glob("step-0000000[45].json"):
        path.unlink()
    assert train(digits, parts, "--num_epochs", 1, *by_time, "--resume", "true") == 0
    assert_same(list(result(whole)), list(result(parts)))


def test_an_epoch_of_one_step_has_checkpoints_by_time(digits, tmp_path):
    flags = ("--global_batch_size", 2000, "--checkpoint.every_epochs", 9, "--checkpoint.every_minutes", 1e-9)
    assert train(digits, tmp_path, *flags, "--checkpoint.keep_last", 9) == 0
    assert [note.step for note in CheckpointStore(tmp_path / "checkpoints").notes()] == [4, 3, 2, 1]


def test_a_complete_run_is_evaluated_again_and_not_trained(digits, tmp_path):
    assert train(digits, tmp_path) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    assert train(digits, tmp_path, "--resume", "true") == 0
    second = json.loads((tmp_path / "summary.json").read_text())
    assert second["num_steps"] == first["num_steps"] and second["test/nll"] == first["test/nll"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_run_that_is_past_its_end_keeps_its_last_row(digits, tmp_path):
    assert train(digits, tmp_path, "--max_steps", 7) == 0
    rows = (tmp_path / "metrics.jsonl").read_text()
    with with_plots():
        assert train(digits, tmp_path, "--max_steps", 5, "--resume", "true") == 0
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == json.loads(rows)
    assert (tmp_path / "plots/curves.png").exists()


def test_a_longer_run_goes_on_and_says_what_differs(digits, tmp_path, caplog):
    assert train(digits, tmp_path, "--num_epochs", 2) == 0
    assert train(digits, tmp_path, "--num_epochs", 3, "--resume", "true") == 0
    assert "--num_epochs is 3; the checkpoint was written with 2" in caplog.text
    assert json.loads((tmp_path / "summary.json").read_text())["num_epochs"] == 3


@pytest.mark.parametrize(
    "flags",
    [
        ("--model.arguments", "{hidden: [7]}"),
        ("--model.arguments", "{activation: Tanh}"),
        ("--optimizer.name", "SGD"),
        ("--posterior.prior_std", "0.5"),
        ("--objective.name", "log_predictive"),
        ("--global_batch_size", "128"),  # a place in the run, and the courses of learning rate and KL, count steps
        ("--data.drop_last", "true"),
        ("--data.train_split", "test"),
        ("--seed", "3"),  # the order of the epoch
    ],
    ids=" ".join,
)
def test_another_network_or_optimizer_is_refused_and_changes_nothing(digits, tmp_path, capsys, flags):
    assert train(digits, tmp_path, "--max_steps", 2) == 0
    before = contents(tmp_path)
    assert train(digits, tmp_path, "--resume", "true", *flags) == 2
    said = capsys.readouterr().err
    assert f"{flags[0]} {'{' if '{' in flags[1] else flags[1]}" in said and "are of a run with" in said
    assert contents(tmp_path) == before


def test_a_prior_at_the_initial_weights_needs_the_same_ones(digits, tmp_path, capsys):
    """No checkpoint holds them; between epochs another seed is welcome else."""
    for mean, code in (("initial", 2), ("0", 0)):
        flags = ("--posterior.prior_mean", mean, "--num_epochs")
        assert train(digits, tmp_path / mean, *flags, 1) == 0
        assert train(digits, tmp_path / mean, *flags, 2, "--resume", "true", "--seed", 3) == code
    assert "--seed 3: the checkpoints in" in capsys.readouterr().err
    torch.save(MLP((1, 8, 8), 10).state_dict(), tmp_path / "net.pt")
    flags = ("--posterior.prior_mean", "initial", "--num_epochs", 2, "--resume", "true")
    assert train(digits, tmp_path / "initial", *flags, "--model.pretrained", tmp_path / "net.pt") == 2
    assert "are of a run with None" in capsys.readouterr().err


def test_a_resumed_run_takes_the_learning_rate_and_arguments_of_its_flags(digits, tmp_path):
    """Those of a checkpoint are not used in the place of those that the log and config.yaml name."""
    flags = ("--num_epochs", 2, "--optimizer.schedule", "constant", "--optimizer.name", "SGD")
    assert train(digits, tmp_path / "begun", *flags, "--max_steps", 25, "--optimizer.arguments", "{momentum: 0.5}") == 0
    found = {}
    for name, others in {"same": ["{momentum: 0.5}"], "rate": ["{momentum: 0.5}", 1e-9], "none": ["{}"]}.items():
        shutil.copytree(tmp_path / "begun", tmp_path / name)
        given = [f for pair in zip(("--optimizer.arguments", "--optimizer.learning_rate"), others) for f in pair]
        assert train(digits, tmp_path / name, *flags, "--resume", "true", *given) == 0
        model, optimizer, rows = result(tmp_path / name)
        found[name] = model, optimizer["groups"][0], rows[-1]["learning_rate"]
    before, options = (
        result(tmp_path / "begun")[0],
        {name: (g["lr"], g["momentum"], r) for name, (_, g, r) in found.items()},
    )
    rate = options["same"][0]
    assert options == {"same": (rate, 0.5, rate), "rate": (1e-9, 0.5, 1e-9), "none": (rate, 0.0, rate)}
    for name, moves in (("same", True), ("rate", False)):
        change = max((found[name][0][key] - value).abs().max().item() for key, value in before.items())
        assert (change > 1e-4) == moves


def test_a_run_has_an_identity_that_it_keeps(digits, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    assert train(digits, run, "--max_steps", 2) == 0
    identity = read_identity(run)
    assert len(identity) == 32
    shutil.copytree(run, copy)
    for directory in (run, copy):  # a whole copy is the same run
        assert train(digits, directory, "--max_steps", 3, "--resume", "true") == 0
        newest = CheckpointStore(directory / "checkpoints").load_newest()
        assert newest["run"]["identity"] == read_identity(directory) == identity
        assert newest["place"]["num_steps"] == 3
        assert json.loads((directory / "summary.json").read_text())["run"] == identity
    (copy / "run.json").unlink()  # a copy of some files: the checkpoints say what run it is
    assert train(digits, copy, "--max_steps", 4, "--resume", "true") == 0
    assert read_identity(copy) == identity
    assert train(digits, run, "--max_steps", 1) == 0
    assert read_identity(run) != identity == read_identity(tmp_path / "run.1")


def test_checkpoints_of_another_run_do_not_go_on(digits, tmp_path, capsys):
    runs = tmp_path / "a", tmp_path / "b"
    for seed, run in enumerate(runs):
        assert train(digits, run, "--max_steps", 2 + seed, "--seed", seed) == 0
    shutil.rmtree(runs[0] / "checkpoints")
    shutil.copytree(runs[1] / "checkpoints", runs[0] / "checkpoints")
    before = contents(runs[0])
    assert train(digits, runs[0], "--max_steps", 4, "--resume", "true") == 1
    assert "holds no sound checkpoint" in capsys.readouterr().err
    assert main(["evaluate", str(runs[0])]) == 1
    assert contents(runs[0]) == before


def test_an_identity_that_cannot_be_read_is_an_error(digits, tmp_path, capsys):
    assert train(digits, tmp_path, "--max_steps", 2) == 0
    (tmp_path / "run.json").write_text("{")
    assert train(digits, tmp_path, "--max_steps", 3, "--resume", "true") == 1
    assert "run.json cannot be read" in capsys.readouterr().err


def test_a_run_with_another_generator_can_be_evaluated_and_not_resumed(digits, tmp_path, capsys):
    assert train(digits, tmp_path, "--max_steps", 2) == 0
    rewrite(tmp_path / "checkpoints", lambda c: c.update(generator="torch"), 2)
    before = contents(tmp_path)
    assert train(digits, tmp_path, "--max_steps", 3, "--resume", "true") == 1
    message = capsys.readouterr().err
    assert "generator torch" in message and f"draws with {GENERATOR}" in message and "begin another" in message
    assert contents(tmp_path) == before
    assert main(["evaluate", str(tmp_path)]) == 0


def test_early_stopping(digits, tmp_path):
    flags = ("--test_every_epochs", 1, "--early_stopping.patience", 2, "--early_stopping.min_change", 9)
    assert train(digits, tmp_path, "--num_epochs", 50, *flags) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["num_epochs"] == 3


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """Shards of noise with a validation split; the best network for the validation split is an early one."""
    rng, directory = np.random.default_rng(0), tmp_path_factory.mktemp("splits")
    splits = {name: (rng.normal(size=(n, 4)).astype(np.float32), rng.integers(0, 2, n)) for name, n in
              (("train", 40), ("validation", 60), ("test", 60))}  # fmt: skip
    facts = {"name": "noise", "source": "made by the test", "licence": "none", "num_classes": 2}
    write_shards(directory / "noise", splits, **facts)
    x, y = splits["test"]
    write_shards(directory / "other", splits | {"test": (x[:20], 1 - y[:20])}, **facts)
    return directory


def train_on(shards, run_dir, *flags):
    """Train a small network on shards; return the rows, and the steps of the best checkpoint."""
    words = ["train", "--data.shards", shards, "--run_dir", run_dir, "--model.arguments", "{hidden: [16]}",
             "--num_samples", 2, "--num_test_samples", 4, "--global_batch_size", 10, "--posterior.init_std", 0.001,
             "--kl_weight", 0.001, "--optimizer.learning_rate", 0.03, "--test_every_epochs", 2, *flags]  # fmt: skip
    assert main(list(map(str, words))) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, CheckpointStore(run_dir / "checkpoints").load_best()["place"]["num_steps"]


def test_the_validation_split_judges_and_the_test_split_stays_unseen(three_splits, tmp_path):
    flags = ("--num_epochs", 30, "--early_stopping.patience", 3)
    rows, best = train_on(three_splits / "noise", tmp_path / "a", *flags)
    judged = {row["step"]: row["validation/nll"] for row in rows if "validation/nll" in row}
    assert list(judged) == [row["step"] for row in rows if row["epoch"] % 2 == 0] and len(rows) < 30
    assert [row["epoch"] for row in rows if "test/nll" in row] == [rows[-1]["epoch"]]
    assert best == min(judged, key=judged.get) == list(judged)[-4] and rows[-1]["test/nll"] > 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["test/nll"] == rows[-1]["test/nll"] and summary["validation/nll"] == rows[-1]["validation/nll"]
    others, other_best = train_on(three_splits / "other", tmp_path / "b", *flags)  # another test split decides nothing
    assert other_best == best and [row["train/nelbo"] for row in others] == [row["train/nelbo"] for row in rows]


def test_a_run_that_goes_on_by_another_metric_counts_anew(three_splits, tmp_path):
    """The best NLL is no number to compare an error with; the same metric goes on as if nothing had been."""
    flags = ("--early_stopping.patience", 3, "--checkpoint.metric")
    train_on(three_splits / "noise", tmp_path / "a", "--max_steps", 32, *flags, "validation/nll")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    places = {}
    for name, metric in (("a", "validation/nll"), ("b", "validation/brier")):
        again = ("--num_epochs", 30, "--resume", "true", *flags, metric)
        rows, _ = train_on(three_splits / "noise", tmp_path / name, *again)
        judged = [row[metric] for row in rows if metric in row][0 if name == "a" else 4 :]
        places[name] = CheckpointStore(tmp_path / name / "checkpoints").load_newest()["place"]
        assert places[name]["metric_name"] == metric
        assert places[name]["best_metric"] == min(judged) and judged[-4] == min(judged)
    assert places["a"]["epoch"] != places["b"]["epoch"]


@pytest.mark.parametrize(
    "flags, judge",
    [
        (("--data.validation_split", "null"), "test/nll"),
        (("--data.validation_split", "test"), "test/nll"),
        (("--checkpoint.metric", "test/brier"), "test/brier"),
        (("--checkpoint.metric", "validation/ece"), "validation/ece"),
        (("--data.test_split", "validation"), "test/nll"),
    ],
)
def test_what_judges_can_be_chosen(three_splits, tmp_path, flags, judge):
    rows, best = train_on(three_splits / "noise", tmp_path / "a", "--num_epochs", 6, *flags)
    judged = {row["step"]: row[judge] for row in rows if judge in row}
    assert len(judged) == 3 and best == min(judged, key=judged.get) and "test/nll" in rows[-1]


def test_a_split_that_cannot_judge_is_refused(three_splits, tmp_path, capsys):
    words = ["train", "--data.shards", str(three_splits / "noise"), "--run_dir", str(tmp_path / "a")]
    assert main([*words, "--data.validation_split", "train"]) == 2
    assert "--data.validation_split train: must be another split than that of the training" in capsys.readouterr().err
    assert main([*words, "--data.validation_split", "holdout"]) == 1
    assert "holdout" in capsys.readouterr().err
    assert main([*words, "--data.validation_split", "null", "--checkpoint.metric", "validation/nll"]) == 2
    assert "must be one of test/nll" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.parametrize("num_epochs", [4, 8])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_annealing_can_be_a_fraction_of_the_run(three_splits, tmp_path, num_epochs, fraction):
    flags = (
        "--kl_annealing.schedule",
        "linear",
        "--kl_annealing.fraction_of_run",
        fraction,
        "--num_epochs",
        num_epochs,
    )
    rows, _ = train_on(three_splits / "noise", tmp_path / "a", *flags)
    expected = [0.001 * min(1, (row["step"] - 1) / (fraction * num_epochs * 4)) for row in rows]
    assert [row["train/kl_weight"] for row in rows] == pytest.approx(expected)


def test_max_seconds_stops_with_a_checkpoint(digits, tmp_path, capsys):
    assert train(digits, tmp_path, "--max_seconds", 1e-9) == 75
    assert "stopped: after step 1: --max_seconds is over" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()
    assert train(digits, tmp_path, "--resume", "true") == 0


def begin(run_dir, *flags, command=None):
    """Start a run that does not end by itself."""
    command = [*(command or python()), "-m", "mpi4py", "-m", "hpc_bnn", "train", "--config", "configs/digits.yaml"]
    command += ["--run_dir", str(run_dir), "--num_epochs", "100000", *map(str, flags)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def wait_for(is_there, job):
    while not is_there():
        time.sleep(0.02)
        assert job.poll() is None


def watches_signals(job):
    """Whether a process handles SIGUSR1, which it does from the first instruction of hpc_bnn on."""
    with open(f"/proc/{job.pid}/status") as file:
        caught = next(int(line.split()[1], 16) for line in file if line.startswith("SigCgt"))
    return bool(caught & 1 << signal.SIGUSR1 - 1)


CODES = {signal.SIGUSR1: 75, signal.SIGTERM: 75, signal.SIGINT: 130}


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_stops_with_a_checkpoint_and_its_code(digits, tmp_path, number):
    job = begin(tmp_path, "--data.shards", digits)
    wait_for((tmp_path / "metrics.jsonl").exists, job)
    os.kill(job.pid, number)
    error = job.communicate(timeout=patience(JOB_SECONDS))[1]
    assert job.returncode == CODES[number] and "Traceback" not in error
    assert error.count("hpc-bnn: stopped") == 1 and number.name in error and "--resume true" in error
    assert CheckpointStore(tmp_path / "checkpoints").load_newest()["place"]["num_steps"] > 0


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_signal_while_libraries_are_imported_stops_after_the_first_step(digits, tmp_path, number):
    job = begin(tmp_path / "run", "--data.shards", digits, command=[sys.executable])
    wait_for(lambda: watches_signals(job), job)
    assert "torch" not in Path(f"/proc/{job.pid}/maps").read_text()
    os.kill(job.pid, number)
    error = job.communicate(timeout=patience(JOB_SECONDS))[1]
    assert job.returncode == CODES[number] and f"after step 1: {number.name}" in error
    assert CheckpointStore(tmp_path / "run/checkpoints").load_newest()["place"]["num_steps"] == 1


def test_a_second_interrupt_ends_at_once_whatever_the_run_does(tmp_path):
    (tmp_path / "prepare.py").write_text(
        f"import pathlib, time; pathlib.Path('{tmp_path}/begun').touch(); time.sleep(9)"
    )
    job = begin(tmp_path / "run", "--data.shards", tmp_path / "shards", "--data.prepare", tmp_path / "prepare.py")
    wait_for((tmp_path / "begun").exists, job)
    os.kill(job.pid, signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(patience(5)) == 130
    assert "ended at the second Ctrl-C" in job.communicate()[1]


def test_an_interrupt_of_another_command_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "hpc_bnn", "report", str(tmp_path)]
    job = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "config.yaml", "w"):  # it reads, and waits
        os.kill(job.pid, signal.SIGINT)
        assert job.communicate(timeout=patience(JOB_SECONDS))[1] == "hpc-bnn: interrupted\n" and job.returncode == 130


def test_a_run_does_not_go_on_with_other_data(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "shards")
    assert train(tmp_path / "shards", tmp_path / "run", "--max_steps", 2) == 0
    assert train(digits, tmp_path / "run", "--max_steps", 3, "--resume", "true") == 0  # a copy is the same
    shutil.rmtree(tmp_path / "shards")
    x = np.zeros((50, 1, 8, 8), np.uint8)
    facts = {"name": "other", "source": "test", "licence": "none", "num_classes": 10}
    splits = {"train": (x, np.arange(50) % 10), "test": (x, np.arange(50) % 10)}
    write_shards(tmp_path / "shards", splits, **facts)
    assert train(tmp_path / "shards", tmp_path / "run", "--resume", "true") == 1
    assert "is not what the run began with: splits" in capsys.readouterr().err


def test_tensorboard_reads_the_metrics(digits, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert train(digits, tmp_path, "--tensorboard", "true", "--test_every_epochs", 2) == 0
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("train/nelbo", "examples_per_second"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert [event.step for event in events.Scalars("test/nll")] == [46, 92]


def test_learning_rates():
    def course(**options):
        config = OptimizerConfig(**options)
        return [round(learning_rate_factor(config, epochs, 10), 6) for epochs in (0, 1, 2, 6, 10)]

    assert course(schedule="constant") == [1, 1, 1, 1, 1]
    assert course(schedule="cosine") == [1, 0.975528, 0.904508, 0.345492, 0]
    assert course(schedule="cosine", warmup_epochs=2) == [0, 0.5, 1, 0.5, 0]
    assert course(schedule="step", decay=0.5, decay_every_epochs=2) == [1, 1, 0.5, 0.125, 0.03125]


def test_evaluation_of_the_newest_and_the_best_checkpoint(digits, tmp_path, capsys):
    assert train(digits, tmp_path, "--test_every_epochs", 1, "--checkpoint.keep_last", 1) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    best = min(rows, key=lambda row: row["test/nll"])
    for which, row in (("newest", rows[-1]), ("best", best)):
        assert main(["evaluate", str(tmp_path), "--which", which]) == 0
        found = json.loads((tmp_path / "evaluation.json").read_text())
        assert found["num_steps"] == row["step"]
        assert {f"test/{name}": value for name, value in found["metrics"].items()} == {
            name: value for name, value in row.items() if name.startswith("test/")
        }
    assert main(["evaluate", str(tmp_path), "--num_test_samples", "9", "--data.test_split", "train"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["num_samples"] == 9
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "holds no sound checkpoint" in capsys.readouterr().err


def test_a_run_that_waits_for_no_step_gives_the_same_and_goes_on_to_the_same(digits, tmp_path, capsys):
    plain, late, stopped = (tmp_path / name for name in ("plain", "late", "stopped"))
    assert train(digits, plain, "--capture", "off") == 0
    assert train(digits, late, "--capture", "on") == 0
    flags = ("--capture", "on", "--checkpoint.every_steps", 4)
    assert train(digits, stopped, *flags, "--max_seconds", 1e-9) == 75
    assert "stopped: after step 3: --max_seconds is over" in capsys.readouterr().err  # seen two steps later
    assert train(digits, stopped, *flags, "--resume", "true") == 0
    for run_dir in (late, stopped):
        assert_same(list(result(run_dir)), list(result(plain)))


def test_a_chunk_size_that_was_found_is_kept(digits, tmp_path, monkeypatch, caplog):
    """Interrupted before the end of the search and after it; the numbers are those of a walk."""
    monkeypatch.setattr("hpc_bnn.run.train.SEARCHED", ("cpu",))
    found, walking = tmp_path / "found", tmp_path / "walking"
    flags = ("--num_samples", 4, "--max_steps")
    config = lambda: yaml.safe_load((found / "config.yaml").read_text())["chunk_size"]  # noqa: E731
    assert train(digits, found, *flags, 7) == 0 and config() == "auto"
    assert train(digits, found, *flags, 42, "--resume", "true", "--profile", 2) == 0
    size = config()
    assert size in (1, 4) and (found / "profile.json").exists()
    caplog.clear()
    assert train(digits, found, *flags, 45, "--resume", "true") == 0
    assert config() == size and "chunk_size" not in caplog.text  # neither searched for again nor another one
    assert train(digits, walking, *flags, 45, "--chunk_size", 1) == 0
    for (name, a), b in zip(result(found)[0].items(), result(walking)[0].values()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_a_metric_that_is_not_a_number_is_neither_the_best_nor_a_failure():
    progress, seen = _Progress(), []
    for metric in (math.nan, 1.0, 0.5, math.nan, 0.6, math.inf, None, 0.2):
        progress.judge("test/nll", metric, min_change=0.0)
        seen.append((progress.best_metric, progress.num_without_improvement))
    assert seen == [(None, 0), (1.0, 0), (0.5, 0), (0.5, 0), (0.5, 1), (0.5, 1), (0.5, 1), (0.2, 0)]
