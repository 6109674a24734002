"""The command line in one process."""

import contextlib
import functools
import json
import operator
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import xarray
import yaml
from conftest import JOB_SECONDS, REPOSITORY, launch_environment, patience, run_job, with_plots
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes
from torch import nn

import hpc_bnn.models
from hpc_bnn import write_shards
from hpc_bnn.cli.commands import QUANTITIES, build_parser, config_of, config_of_words, in_order, main
from hpc_bnn.config import FIELDS, NAMES, Config, words_of
from hpc_bnn.errors import ConfigError
from hpc_bnn.run.train import check

QUICK = ("--num_epochs", "2", "--num_test_samples", "4", "--num_samples", "2")


def train(digits, run_dir, *flags):
    """Run `hpc-bnn train` on the digits in this process; return its exit code."""
    command = ["train", "--config", str(REPOSITORY / "configs/digits.yaml"), "--data.shards", str(digits)]
    return main([*command, "--run_dir", str(run_dir), *QUICK, *flags])


def test_one_process_trains_without_horovod(digits, tmp_path):
    hide = "import sys; sys.modules['horovod'] = None; from hpc_bnn.__main__ import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", hide, "train", "--config", "configs/digits.yaml", "--data.shards", str(digits),
         "--run_dir", str(tmp_path / "run"), *QUICK],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=patience(JOB_SECONDS),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("one process: no communication") == 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["grid"] == {"world_size": 1, "sample_size": 1, "data_size": 1}
    assert summary["communication"]["num_collectives"] == 0
    assert 0.5 < summary["test/accuracy"] <= 1 and 0 < summary["test/nll"] < 3
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and rows[1]["train/nelbo"] < rows[0]["train/nelbo"]
    for name in ("curves.png", "uncertainty.png"):
        assert (tmp_path / "run/plots" / name).read_bytes().startswith(b"\x89PNG")


def test_resolved_config_reproduces_the_run(digits, tmp_path):
    assert train(digits, tmp_path / "a", "--seed", "3", "--dtype", "float64") == 0
    stored = tmp_path / "a/config.yaml"
    assert yaml.safe_load(stored.read_text())["seed"] == 3
    again = main(["train", "--config", str(stored), "--run_dir", str(tmp_path / "b")])
    assert again == 0
    a, b = (load_model(tmp_path / name) for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def load_model(run_dir):
    path = max((run_dir / "checkpoints").glob("*.pt"))
    return torch.load(path, weights_only=True)["model"]


def test_seed_and_max_steps(digits, tmp_path):
    flags = ("--max_steps", "3")
    assert train(digits, tmp_path / "a", *flags) == 0
    assert train(digits, tmp_path / "b", *flags, "--seed", "1") == 0
    a, b = (load_model(tmp_path / name) for name in "ab")
    assert json.loads((tmp_path / "a/summary.json").read_text())["num_steps"] == 3
    assert a["1.weight.loc"].shape == (128, 64)
    assert not torch.equal(a["1.weight.loc"], b["1.weight.loc"])


@pytest.mark.parametrize("dtype, stored", [("float64", torch.float64), ("bfloat16", torch.float32)])
def test_dtypes(digits, tmp_path, dtype, stored):
    assert train(digits, tmp_path / "run", "--dtype", dtype, "--max_steps", "2") == 0
    assert {t.dtype for t in load_model(tmp_path / "run").values()} == {stored}


@pytest.mark.parametrize(
    "flags",
    [
        ["--posterior.family", "low_rank", "--posterior.rank", "2", "--posterior.prior", "laplace"],
        ["--posterior.family", "ensemble", "--num_test_samples", "2"],
        ["--posterior.family", "deterministic"],
        ["--posterior.prior", "student_t", "--posterior.prior_std", "fan_in", "--chunk_size", "2"],
        ["--posterior.estimator", "local", "--posterior.deterministic", "[5.*]"],
        [
            "--augmentation.transforms",
            "[{name: crop, padding: 1}]",
            "--augmentation.views",
            "per_group",
            "--chunk_size",
            "2",
        ],
        ["--augmentation.transforms", "[{name: mixup}]", "--data.reading", "rank", "--data.drop_last", "true"],
    ],
    ids=lambda flags: "-".join(flags[1::2]),
)
def test_families_priors_and_estimators(digits, tmp_path, flags):
    shards = ["--data.shards", str(digits), "--run_dir", str(tmp_path / "run"), *QUICK, *flags]
    assert main(["train", "--config", str(REPOSITORY / "configs/digits.yaml"), *shards]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[1]["train/data_term"] < rows[0]["train/data_term"] and rows[1]["test/accuracy"] > 0.2  # chance is 0.1
    names = set(load_model(tmp_path / "run"))
    if "5.*" in str(flags):
        assert {"5.weight", "3.weight.loc"} <= names


def test_pretrained_network_is_the_start(digits, tmp_path):
    net = hpc_bnn.models.MLP((1, 8, 8), 10, hidden=(128, 128))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    flags = ["--model.pretrained", str(tmp_path / "net.pt"), "--posterior.prior_mean", "initial"]
    flags += ["--posterior.init_std_relative", "0.1", "--optimizer.learning_rate", "1e-9", "--max_steps", "1"]
    shards = ["--data.shards", str(digits), "--run_dir", str(tmp_path / "run"), *QUICK]
    config = str(REPOSITORY / "configs/digits.yaml")
    assert main(["train", "--config", config, *shards, *flags]) == 0
    model = load_model(tmp_path / "run")
    torch.testing.assert_close(model["1.weight.loc"], net[1].weight.detach(), rtol=0, atol=1e-6)
    torch.save({"foreign": torch.zeros(3)}, tmp_path / "net.pt")
    assert main(["train", "--config", config, *shards, *flags]) == 2


def test_former_run_is_moved_aside_not_overwritten(digits, tmp_path, capfd, caplog):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "precious").write_text("result")
    assert train(digits, run_dir, "--max_steps", "1") == 2
    error = capfd.readouterr().err
    assert "--run_dir" in error and "no run" in error
    (run_dir / "config.yaml").write_text("seed: 0")
    assert train(digits, run_dir, "--max_steps", "1") == 0
    assert "moved to" in caplog.text
    assert (tmp_path / "run.1/precious").read_text() == "result"
    assert not (run_dir / "precious").exists()


def test_missing_shards_are_prepared_or_their_remedy_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY)
    prepare = ("--data.prepare", "data_prep/digits.py")
    assert train(tmp_path / "made", tmp_path / "run", "--max_steps", "1", *prepare) == 0
    assert (tmp_path / "made/manifest.json").exists()
    capfd.readouterr()
    assert train(tmp_path / "nowhere", tmp_path / "run2") == 1  # not the shards that the config prepares
    error = capfd.readouterr().err
    assert "data_prep" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--grid.sample_sise", "2"], ["sample_sise"]),
        (["--num_samples", "many"], ["num_samples", "many"]),
        (["--dtype", "float8"], ["dtype", "float8"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--num_sample", "4"], ["--num_sample 4", "Did you mean --num_samples?"]),
        (["--checkpoint.metric", "foo"], ["--checkpoint.metric foo", "test/nll, test/brier"]),
        (["--objective.name", "crps"], ["--objective.name crps", "10 classes"]),
        (["--model.name", "hpc_bnn.models.Nothing"], ["--model.name", "Nothing", "package.module.Class"]),
        (["--model.arguments", "{hiden: [3]}"], ["--model.arguments", "hiden"]),
        (["--run_dir", ""], ["--run_dir", "runs/NAME"]),
        (
            ["--posterior.prior", "scale_mixture", "--posterior.prior_std", "fan_in", "--posterior.estimator", "local"],
            ["--posterior.prior_std fan_in", "--posterior.estimator local"],
        ),
        (
            ["--posterior.family", "ensemble", "--objective.name", "log_predictive"],
            ["--objective.name log_predictive", "--num_test_samples 64"],
        ),
        (["--grid.sample_size", "2"], ["--grid.sample_size 2", "has 1"]),
        (
            ["--augmentation.views", "per_group", "--augmentation.num_groups", "9", "--data.prefetch", "-1"],
            ["--augmentation.num_groups 9", "--data.prefetch -1"],
        ),
        (["--augmentation.transforms", "[{name: flop}]"], ["--augmentation.transforms flop", "flip"]),
        (["--objective.weights", "w.npy"], ["--objective.weights w.npy", "elbo"]),
        (
            ["--num_samples", "0", "--kl_weight", "-1", "--posterior.init_std", "0", "--optimizer.learning_rate", "-3"],
            ["--num_samples 0", "--kl_weight -1", "--posterior.init_std 0", "--optimizer.learning_rate -3"],
        ),
    ],
)
def test_wrong_requests_are_named_and_nothing_is_written(digits, tmp_path, flags, words, capsys):
    shards = ["--data.shards", str(digits), "--run_dir", str(tmp_path / "run")]
    assert main(["train", "--config", str(REPOSITORY / "configs/digits.yaml"), *shards, *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_needs_a_directory(digits, tmp_path, name, capsys):
    (tmp_path / "file").touch()
    assert train(digits, tmp_path / name) == 2
    assert f"{tmp_path / 'file'} is a file. Name a new directory" in capsys.readouterr().err


def test_unknown_keys_wrong_types_and_broken_rules_are_named_all_at_once(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(
        "num_samples: eight\ndata: {shards: x, nonsense: 3}\nkl_weight: -3\noptimizer: {learning_rate: 0.01}\n"
        "posterior: {family: mean_feld, deterministic: norm}\nmodel: {arguments: {deep: {er: 1}}}\n"
    )
    flags = ["--num_epochs", "many", "--optimizer.learning_rte=3", "--grid.sample_size", "3", "--dtype", "float64"]
    flags += ["--model.arguments.dropout", "0.3"]  # of a class: not ours to know
    assert main(["train", "--config", str(path), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    expected = [
        "--num_samples eight: must be a whole number. The default is 8",
        "--data.nonsense 3: there is no such field",
        "--posterior.deterministic norm: must be a list such as [a, b]",
        "--num_epochs many: must be a whole number",
        "--optimizer.learning_rte 3: there is no such field. Did you mean --optimizer.learning_rate?",
        "--kl_weight -3.0: must be 0 or more",
        "--posterior.family mean_feld: must be one of mean_field, low_rank",
        "--grid.sample_size 3: sample_size x data_size",
    ]
    assert len(lines) == len(expected)
    for line, text in zip(lines, expected):
        assert text in line


@pytest.mark.parametrize(
    "name", sorted(n for n in NAMES if n not in FIELDS or None not in words_of(FIELDS[n].type))[::5]
)
def test_what_may_not_be_null_is_named(tmp_path, name, capsys):
    tree = None
    for word in reversed(name.split(".")):
        tree = {word: tree}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert f"--{name} null: must be" in said or f"--{name} None: must be" in said, said


def test_faults_of_values_and_of_the_grid_come_together():
    config = Config(num_epochs=0)
    config.grid.sample_size = 3
    with pytest.raises(ConfigError) as caught:
        check(config, world_size=4)
    assert [fault.field for fault in caught.value.faults] == ["num_epochs", "grid.sample_size"]


def test_a_data_group_without_an_example_is_refused_with_the_other_faults():
    config = Config(num_epochs=0, num_samples=2, global_batch_size=3)

    def faults(*arguments):
        with pytest.raises(ConfigError) as caught:
            check(config, *arguments)
        return {fault.field: fault.on_command_line() for fault in caught.value.faults}

    config.grid.sample_size = 2
    assert list(faults(6)) == list(faults(6, 3)) == ["num_epochs"]
    found = faults(8, 3)
    assert list(found) == ["num_epochs", "global_batch_size", "data.train_split"]
    said = "--global_batch_size 3: each of the 4 data groups (8 ranks, --grid.sample_size 2) evaluates one example"
    assert said in found["global_batch_size"] and "Use --global_batch_size 4" in found["global_batch_size"]
    assert "with 3 examples: the training set has fewer examples than the 4" in found["data.train_split"]
    config.grid.sample_size = "auto"  # 2 x 3 gives each rank something to do, no grid of 8 does
    assert list(faults(6)) == ["num_epochs"]
    found = faults(8)
    assert list(found) == ["num_epochs", "number of ranks"] and "--global_batch_size" in found["number of ranks"]
    config.global_batch_size = 0
    assert list(faults(8)) == ["global_batch_size", "num_epochs"]
    config.grid.sample_size = 1
    assert list(faults(8)) == ["global_batch_size", "num_epochs"]


def test_help_shows_a_sentence_per_field(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert "Weight samples per step in the whole job" in " ".join(capsys.readouterr().out.split())


def test_console_command_is_the_module_under_mpi4py():
    done = subprocess.run(["hpc-bnn", "--version"], capture_output=True, text=True, timeout=patience(JOB_SECONDS))
    assert done.returncode == 0 and done.stdout.startswith("hpc_bnn 0.")


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    """Shards of scikit-learn's diabetes data: 442 patients, 10 features, one number to predict."""
    x, y = load_diabetes(return_X_y=True)
    y = ((y - y[:353].mean()) / y[:353].std()).astype(np.float32)
    directory = tmp_path_factory.mktemp("data") / "diabetes"
    splits = {"train": (x[:353].astype(np.float32), y[:353]), "test": (x[353:].astype(np.float32), y[353:])}
    write_shards(directory, splits, name="diabetes", source="scikit-learn", licence="BSD-3-Clause")
    return directory


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--likelihood.scale", "learned", "--objective.name", "log_predictive"],
        ["--likelihood.scale", "0.8", "--objective.name", "moment_matched", "--chunk_size", "4"],
        ["--likelihood.name", "student_t", "--kl_annealing.schedule", "cyclical"],
        ["--objective.name", "crps"],
        ["--likelihood.name", "implicit", "--objective.name", "energy", "--objective.beta", "0.5"],
        ["--likelihood.name", "implicit", "--objective.name", "hpc_bnn.objectives.Crps"],
    ],
    ids=lambda flags: "-".join(flag for flag in flags if not flag.startswith("--")) or "default",
)
def test_regression_from_the_command_line(diabetes, tmp_path, flags):
    run_dir = tmp_path / "run"
    command = [
        "train", "--data.shards", str(diabetes), "--run_dir", str(run_dir), "--num_epochs", "40", "--num_samples", "4",
        "--posterior.init_std", "0.05", "--optimizer.learning_rate", "3e-3", "--test_every_epochs", "40",
        "--kl_weight", "0.1", *flags,
    ]  # fmt: skip
    draws = not flags or "--likelihood.name" in flags  # which picture it is depends on the likelihood only
    with with_plots() if draws else contextlib.nullcontext():
        assert main(command) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["test/rmse"] < 0.85  # the mean of the training targets has 1.0
    assert ("test/nll" in summary) == ("implicit" not in flags and "crps" not in flags)
    coupled = "--objective.name" in flags
    assert summary["objective"]["num_passes"] == (2 if coupled and "--chunk_size" not in flags else 1)
    assert not draws or (run_dir / "plots/uncertainty.png").stat().st_size > 1000


def test_faults_of_objective_and_likelihood_are_named_together(tmp_path, capsys):
    code = main([
        "train", "--run_dir", str(tmp_path / "run"), "--objective.name", "crsp", "--objective.fairness", "2",
        "--likelihood.scale", "-1", "--kl_annealing.num_epochs", "0",
    ])  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    for words in (
        "--objective.name crsp",
        "--objective.fairness 2",
        "--likelihood.scale -1",
        "--kl_annealing.num_epochs 0",
    ):
        assert words in said


def test_stage_from_the_command_line(diabetes, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert main(["stage", str(diabetes), str(copy)]) == 0
    assert "2 files copied" in capsys.readouterr().out
    assert main(["stage", str(diabetes), str(copy)]) == 0
    assert "0 files copied (0.0 MB), 2 kept" in capsys.readouterr().out
    assert main(["verify", str(copy)]) == 0
    for source, destination in ((copy, diabetes), (diabetes, diabetes), (diabetes, diabetes / "sub")):
        flags = ["--clean"] if destination == diabetes else []
        assert main(["stage", str(source), str(destination), *flags]) == 2  # not staged there: not removed
    assert main(["verify", str(diabetes)]) == 0
    (copy / "manifest.json").unlink()
    assert main(["verify", str(copy)]) == 1 and "Stage again" in capsys.readouterr().err
    assert main(["stage", str(diabetes), str(copy), "--clean"]) == 0 and not copy.exists()
    assert main(["stage", str(tmp_path / "nowhere"), str(copy)]) == 1
    assert "data_prep" in capsys.readouterr().err


def test_verify_from_the_command_line(diabetes, tmp_path, capsys):
    shutil.copytree(diabetes, tmp_path / "copy")
    assert main(["verify", str(tmp_path / "copy")]) == 0
    assert "train, 353 examples in 1 files" in capsys.readouterr().out
    os.truncate(tmp_path / "copy/test-00000.h5", 100)
    (tmp_path / "copy/notes.txt").write_text("mine")
    assert main(["verify", str(tmp_path / "copy")]) == 1
    said = capsys.readouterr().err
    assert "test-00000.h5 is truncated: 100 bytes" in said and "notes.txt is foreign" in said


def test_all_that_an_overlap_cannot_be_with_is_named():
    config = Config()
    config.grid.overlap = True
    config.check()
    config.grid.compression, config.optimizer.sharded = "bf16", True
    config.posterior.family, config.posterior.prior = "low_rank", "student_t"
    with pytest.raises(ConfigError) as caught:
        config.check()
    reasons = ("a sharded optimizer", "compressed sums", "the weights of this family", "a Monte Carlo KL")
    assert len(caught.value.faults) == len(reasons)
    for reason in reasons:
        assert f"--grid.overlap true: {reason}" in caught.value.on_command_line()
        assert f"overlap True: {reason}" in str(caught.value)  # as a Python user reads it


# --- flags and files -----------------------------------------------------------------------------------


@settings(max_examples=8)
@given(data=st.data())
def test_a_flag_wins_wherever_it_stands(data, tmp_path_factory):
    """Among files and flags in any order and either way to write them: the last flag, then the last file."""
    directory, expected, words = tmp_path_factory.getbasetemp(), {}, []
    values = st.integers(1, 99)
    for kind in data.draw(st.permutations(["file", "file", "flag", "flag", "flag"])):
        name = data.draw(st.sampled_from(["seed", "num_epochs", "optimizer.learning_rate"]))
        value = data.draw(values)
        if kind == "file":
            group, _, field = name.rpartition(".")
            path = directory / f"{name}-{value}.yaml"
            path.write_text(yaml.safe_dump({group: {field: value}} if group else {field: value}))
            flag, text = "--config", str(path)
            expected.setdefault(name, value) if (name, "flag") in expected else expected.update({name: value})
        else:
            flag, text = f"--{name}", str(value)
            expected |= {name: value, (name, "flag"): True}
        words += data.draw(st.sampled_from([[flag, text], [f"{flag}={text}"]]))
    config = config_of_words(in_order(["train", *words]))
    for name, value in expected.items():
        if isinstance(name, str):
            assert operator.attrgetter(name)(config) == value


@pytest.mark.parametrize(
    "words",
    [
        ["RUN", "--seed", "3"],
        ["--seed", "3", "RUN"],
        ["--which", "best", "RUN", "--seed=3"],
        ["--seed", "3", "--config", "OTHER", "RUN"],
        ["RUN", "--seed", "3", "--config=OTHER"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_the_config_of_a_run_is_read_wherever_the_run_is_named(tmp_path, command, words):
    (tmp_path / "config.yaml").write_text("{num_epochs: 77, kl_weight: 0.25}")
    other = tmp_path / "other.yaml"
    other.write_text("{kl_weight: 0.5}")
    given = [word.replace("RUN", str(tmp_path)).replace("OTHER", str(other)) for word in words]
    required = ["--output", "p.h5"] if command == "predict" else []
    ordered = in_order([command, *given, *required])
    parser = build_parser(ordered)
    config = config_of(parser.instantiate(parser.parse_args(ordered))[command])
    assert (config.num_epochs, config.seed) == (77, 3)
    assert config.kl_weight == (0.5 if "OTHER" in " ".join(words) else 0.25)


@pytest.mark.parametrize("words", [["./-run"], ["--", "-run"], ["--seed", "3", "--", "-run"]], ids=" ".join)
def test_a_run_may_have_a_name_that_begins_as_flags_do(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-run").mkdir()
    (tmp_path / "-run/config.yaml").write_text("{num_epochs: 77}")
    ordered = in_order(["evaluate", *words])
    parser = build_parser(ordered)
    found = parser.instantiate(parser.parse_args(ordered))["evaluate"]
    assert (config_of(found).num_epochs, found.run) == (77, "./-run")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {name: SGD}\nseed: 1\noptimizer: {schedule: constant}\n", "'optimizer' stands twice"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("optimizer:\n  arguments: {lr: 1, lr: 2}\n", "'lr' stands twice"),
        ("data: {shards: a}\ndata.shards: b\n", "data.shards b: it stands twice"),
        ("data.shards: b\ndata:\n  shards: a\n", "data.shards a: it stands twice"),
        ("seed: 010\n", "'010' as a number to the base 8"),
        ("model: {arguments: {hidden: [-010]}}\n", "'-010' as a number to the base 8"),
        ("num_epochs: 1:30\n", "'1:30' as a number to the base 8 or 60"),
        ("kl_weight: 1:30.5\n", "'1:30.5' as a number to the base 8 or 60"),
        ("model: {arguments: &a {x: *a}}\n", "Circular reference"),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_looks_is_an_error(tmp_path, text, message, capsys):
    """PyYAML drops the first of two without a word, and 010 is 8 to it."""
    (tmp_path / "config.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_config_may_use_anchors_and_merges(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {arguments: {a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}}")
    found = config_of_words(["train", "--config", str(tmp_path / "config.yaml")])
    assert found.model.arguments["b"] == {"x": 1, "y": 3}


def test_a_config_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("run_dir: läufe/µ", encoding="utf-8")
    monkeypatch.setattr("builtins.open", functools.partial(open, encoding="latin-1"))  # as with LANG=de_DE
    assert config_of_words(["train", "--config", str(tmp_path / "config.yaml")]).run_dir == "läufe/µ"


def test_a_resolved_config_does_not_say_whether_the_run_was_resumed(digits, tmp_path):
    """With --resume true before --config the run began anew, and the former one was moved away."""
    assert train(digits, tmp_path / "run", "--max_steps", "1") == 0
    stored = tmp_path / "run/config.yaml"
    assert "resume" not in yaml.safe_load(stored.read_text())
    words = [
        "train",
        "--resume",
        "true",
        "--max_steps",
        "2",
        "--config",
        str(stored),
        "--run_dir",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    assert not (tmp_path / "run.1").exists() and "resume" not in yaml.safe_load(stored.read_text())
    assert json.loads((tmp_path / "run/summary.json").read_text())["num_steps"] == 2


SIZES = {
    "memory": {
        "40GB": 4e10,
        "40 GB": 4e10,
        "40G": 4e10,
        "1.5TB": 1.5e12,
        "40GiB": 40 * 2**30,
        "4e10": 4e10,
        "64MiB": 2**26,
    },
    "bandwidth": {"12.5GB/s": 1.25e10, "12.5GB": 1.25e10, "20e9": 2e10, "900MB/s": 9e8},
    "latency": {"2us": 2e-6, "1.5 ms": 1.5e-3, "20e-6": 2e-5, "800ns": 8e-7},
    "flops": {"5T": 5e12, "5TFLOP/s": 5e12, "300GFLOPS": 3e11, "1e14": 1e14},
}
NONSENSE = {
    "memory": ["40", "0", "-1", "40gb", "40Gb", "forty", "nan", "inf", "1e30", "4.0.0GB", "40GB/s", ""],
    "bandwidth": ["12.5", "0", "100Gb/s", "100Gbit", "-2GB/s", "nan"],
    "latency": ["2", "0", "-1", "5m", "2 usec", "1e-12"],
    "flops": ["12", "0", "5Tf", "-5T"],
}


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in SIZES.items() for text in texts])
def test_sizes_take_units(name, text):
    assert QUANTITIES[name].parse(f"--{name}", text) == pytest.approx(SIZES[name][text])
    if f"node_{name}" in QUANTITIES:
        assert QUANTITIES[f"node_{name}"].parse("", text) == pytest.approx(SIZES[name][text])


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in NONSENSE.items() for text in texts])
def test_sizes_that_nothing_has_are_refused(name, text):
    with pytest.raises(ConfigError, match=f"^--{name} .*must be a number from .*Write it as"):
        QUANTITIES[name].parse(f"--{name}", text)


@pytest.mark.parametrize(
    ("command", "redirection", "code"),
    [("verify", "> /dev/full", 1), ("verify", "| true", 0), ("train", ">&- 2>&- <&-", 0)],
    ids=["full", "gone", "closed"],
)
def test_an_output_that_takes_nothing_ends_no_run(digits, tmp_path, command, redirection, code):
    """Its reader is gone, its disk full, or there is none; and the environment is ASCII."""
    run = f"--config configs/digits.yaml --data.shards {digits} --max_steps 2 --run_dir {tmp_path}/run"
    words = f"{sys.executable} -m hpc_bnn {command} {digits if command == 'verify' else run}"
    environment = launch_environment() | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = run_job(["bash", "-c", f"set -o pipefail; {words} {redirection}"], env=environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("stdout: No space left on device. The rest of the output is lost") == code
    assert command == "verify" or (tmp_path / "run/summary.json").exists()


class Segments(nn.Sequential):
    """Gives each point of an image a class."""

    def __init__(self, in_shape, num_outputs):
        super().__init__(nn.Conv2d(in_shape[0], 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_outputs, 3, padding=1))


def blobs(count, seed):
    """Images of two squares, and the class of each point: none, bright or dark."""
    rng = np.random.default_rng(seed)
    x, y = 0.3 * rng.normal(size=(count, 1, 10, 12)), np.zeros((count, 10, 12), np.int64)
    for image, classes in zip(x, y):
        for number, sign in ((1, 1.0), (2, -1.0)):
            row, column = rng.integers(0, 7), rng.integers(0, 9)
            image[0, row : row + 4, column : column + 4] = sign + 0.2 * rng.normal(size=(4, 4))
            classes[row : row + 4, column : column + 4] = number
    return x.astype(np.float32), y


def test_fields_of_classes_from_shards_to_predictions(tmp_path, capsys):
    """Train with mirrored targets mixed, evaluate, predict, load, plan, report: bright and dark squares in noise."""
    facts = {"name": "squares", "source": "made here", "licence": "none", "num_classes": 3}
    splits = {"train": blobs(240, 0), "validation": blobs(50, 1), "test": blobs(31, 2)}
    write_shards(tmp_path / "shards", splits, **facts, details={"classes": ["none", "bright", "dark"]})
    run = tmp_path / "run"
    words = ["--data.shards", tmp_path / "shards", "--model.name", f"{__name__}.Segments", "--num_samples", 2]
    words += ["--num_test_samples", 4, "--posterior.init_std", 0.01, "--kl_weight", 0.1, "--global_batch_size", 20]
    words += ["--optimizer.learning_rate", 0.02, "--augmentation.transforms", "[{name: mixup}]"]
    words = list(map(str, words))
    with with_plots():
        assert main(["train", *words, "--num_epochs", "5", "--run_dir", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/accuracy"] > 0.95 and summary["test/mean_iou"] > 0.85
    assert (run / "plots/uncertainty.png").stat().st_size > 1000
    assert main(["predict", str(run), "--output", str(tmp_path / "p.h5"), "--which", "best"]) == 0
    with xarray.open_dataset(tmp_path / "p.h5") as found:
        assert found.probabilities.dims == ("example", "category", "dim_1", "dim_2")
        assert found["class"].dims == found.y.dims == found.entropy.dims == ("example", "dim_1", "dim_2")
        assert list(found.category.values) == ["none", "bright", "dark"]
        np.testing.assert_array_equal(found.y, splits["test"][1])
        loaded = hpc_bnn.load(run).predict(splits["test"][0])
        np.testing.assert_allclose(loaded["probabilities"], found.probabilities, atol=1e-6)
    assert main(["plan", *words, "--ranks", "2"]) == main(["report", str(run)]) == 0
    for flags, said in (
        (("--augmentation.transforms", "[{name: flip}]"), "and not the targets"),
        (("--checkpoint.metric", "validation/adaptive_ece"), "checkpoint.metric"),
    ):
        assert main(["train", *words, *flags, "--run_dir", str(tmp_path / "refused")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_channels_that_differ_in_scale_have_numbers_of_their_own(tmp_path):
    """Kelvin beside metres: the first line of a run says both."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    y = (x[:, :2] + 0.1 * rng.normal(size=(200, 2))).astype(np.float32)
    facts = {"name": "two", "source": "made here", "licence": "none", "channels": {"y": ["t2m", "z500"]}}
    rmse = {}
    for scale in (1.0, 1000.0):
        directory, targets = tmp_path / f"{scale:g}", y * np.array([1.0, scale], np.float32)
        write_shards(directory, {"train": (x, targets), "test": (x[:40], targets[:40])}, **facts)
        words = [
            "--data.shards",
            directory,
            "--run_dir",
            directory / "run",
            "--num_samples",
            2,
            "--num_test_samples",
            3,
        ]
        words += ["--num_epochs", 1, "--model.arguments", "{hidden: [8]}", "--global_batch_size", 20]
        assert main(["train", *map(str, words)]) == 0
        rmse[scale] = {
            name: value
            for name, value in json.loads((directory / "run/summary.json").read_text()).items()
            if name.startswith("test/rmse")
        }
    assert rmse[1.0].keys() == {"test/rmse"}
    channels = json.loads((tmp_path / "1000/run/evaluation.json").read_text())["curves"]["channels"]
    assert channels["name"] == ["t2m", "z500"]
    assert rmse[1000.0] == pytest.approx(
        {
            "test/rmse": rmse[1000.0]["test/rmse"],
            "test/rmse/t2m": channels["rmse"][0],
            "test/rmse/z500": channels["rmse"][1],
        }
    )
    assert rmse[1000.0]["test/rmse/z500"] > 100 * rmse[1000.0]["test/rmse/t2m"]
