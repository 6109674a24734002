"""A trained network in one file, and as a plain network: it gives what the run gives."""

import copy
import importlib
import io
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, stored
from torch import nn

import hpc_bnn
from hpc_bnn import Grid, GridComm, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.config import Config
from hpc_bnn.data.manifest import ArraySpec, Manifest, Statistics
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.models import MLP
from hpc_bnn.run import Experiment, Predictor
from hpc_bnn.run.plain_network import example_inputs


def needs(*packages):
    """Skip where an optional package is missing; `test_a_missing_package_is_named` is for these places."""
    for name in packages:
        pytest.importorskip(name, reason=f"{name} is not installed (the extra export)")


# --- plain networks ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """What is hard to copy: BatchNorm, dropout, an embedding, inputs by name, a change of the input, a dict of outputs."""

    def __init__(self, in_shape, num_outputs):
        super().__init__()
        self.is_named = isinstance(in_shape, dict)
        self.embedding = nn.Embedding(5, 4) if self.is_named else None
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(6, num_outputs)

    def forward(self, a, ids=None):
        a += 1
        a = a + self.embedding(ids).mean(1) if self.is_named else a
        return {"logits": self.last(self.drop(self.norm(self.first(a)).tanh()))}


class Grouped(Net):
    """For an ensemble, whose members cannot share running statistics."""

    def __init__(self, in_shape, num_outputs):
        super().__init__(in_shape, num_outputs)
        self.norm = nn.GroupNorm(2, 6)


class FunctionalDropout(Net):
    def forward(self, a):
        return {"logits": self.last(nn.functional.dropout(self.first(a), 0.3))}


class Fused(Net):
    def __init__(self, in_shape, num_outputs):
        super().__init__(in_shape, num_outputs)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)

    def forward(self, a):
        return {"logits": self.last(self.first(self.encoder(a[:, None]).squeeze(1)))}


class Windows(Net):
    """As a Swin: attention in more than 4 dims."""

    def forward(self, a):
        q = self.first(a).view(-1, 1, 1, 2, 3)
        return {"logits": self.last(nn.functional.scaled_dot_product_attention(q, -q, q.exp()).flatten(1))}


def predictor_of(net="Net", target="classes", family="mean_field", named=False, dtype="float32", mean=3.0, **posterior):
    """Return a predictor whose weights nobody has trained, and inputs for it."""
    arrays = {"a": ArraySpec((4,), "float32")} | ({"ids": ArraySpec((3,), "int16")} if named else {})
    arrays = arrays if named else {"x": arrays["a"]}
    statistics = {next(iter(arrays)): Statistics((mean,) * 4, (2.0,) * 4)}
    if target == "classes":
        arrays["y"] = ArraySpec((), "int64")
    else:
        arrays["y"] = ArraySpec((2,), "float32")
        statistics["y"] = Statistics((mean, -mean), (5.0, 0.5))
    manifest = Manifest("test", "test", "none", arrays, {}, statistics, 3 if target == "classes" else None)
    net = "Grouped" if family == "ensemble" else net
    config = {"model": {"name": f"test_export.{net}", "output": "logits"}, "num_samples": 3, "num_test_samples": 3}
    config |= {"posterior": {"family": family, **posterior}, "dtype": dtype}
    config |= {"likelihood": {"name": target}} if target not in ("classes", "numbers") else {}
    experiment = Experiment(Config.from_dict(config), GridComm(Grid()), manifest)
    with torch.no_grad():
        for tensor in experiment.posterior.module.buffers():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1)) + 0.5)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(7, 4)) * 2 + mean).astype("float32")
    return Predictor(experiment), {"a": x, "ids": rng.integers(0, 5, (7, 3), dtype=np.int16)} if named else x


def as_tensors(x):
    return {name: torch.from_numpy(array) for name, array in x.items()} if isinstance(x, dict) else torch.from_numpy(x)


CASES = [
    {},
    {"named": True},
    {"target": "numbers"},
    {"target": "numbers", "dtype": "float64", "named": True},
    {"target": "numbers", "mean": 1e6},
    {"family": "mc_dropout"},
    {"family": "mc_dropout", "target": "numbers", "named": True},
    {"family": "ensemble", "target": "numbers"},
    {"family": "low_rank"},
    {"family": "deterministic", "dtype": "float64"},
    {"antithetic": True, "init_std": 0.3},
    {"estimator": "flipout"},
    {"deterministic": ["norm", "last.*"], "init_std": 0.3},
    {"target": "poisson"},
    {"target": "bernoulli", "family": "low_rank", "rank": 1},
    {"target": "student_t", "dtype": "float64"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plain_network_predicts_what_the_posterior_predicts(case):
    """Of the same samples, to rounding, for arrays of the user; and what is trained later changes nothing of it."""
    predictor, x = predictor_of(**case)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if case.get("dtype") == "float64" else {"rtol": 1e-5, "atol": 1e-6}
    if "mean" in case:
        tolerance = {"rtol": 1e-10}  # float32 would round what the targets tell
    found = predictor.predict(x, members=True)
    name = "probabilities" if "probabilities" in found else "mean"
    plain = predictor.as_module("samples")
    one = predictor.as_module("sample", sample=2)
    before = as_tensors(x)
    mean, std = plain(before)
    torch.testing.assert_close(before, as_tensors(x), rtol=0, atol=0)  # it leaves its inputs as they are
    wide = case.get("dtype") == "float64" or "mean" in case
    assert mean.dtype == std.dtype == one(before).dtype == (torch.float64 if wide else torch.float32)
    np.testing.assert_allclose(mean, found[name], **tolerance)
    is_fixed = case.get("family") == "deterministic"  # its std is what rounding leaves
    np.testing.assert_allclose(std, found["std"], **tolerance | ({"atol": 1e-7} if is_fixed else {}))
    np.testing.assert_allclose(one(before), found["members"][:, 2], **tolerance)
    if not is_fixed:
        assert (one(before) - predictor.as_module("sample")(before)).abs().max() > 1e-3
    if case.get("family") != "ensemble":
        fewer = predictor.predict(x, num_samples=2)
        np.testing.assert_allclose(predictor.as_module("samples", num_samples=2)(before)[1], fewer["std"], **tolerance)
    with torch.no_grad():
        for parameter in predictor.posterior.parameters():
            parameter.add_(1.0)
    np.testing.assert_allclose(plain(before)[0], mean, rtol=0, atol=0)
    assert np.abs(predictor.predict(x)[name] - found[name]).max() > 1e-3


def test_weights_of_examples_are_no_inputs(tmp_path):
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(size=(40, 6)).astype("f4"), rng.normal(size=(40, 1)).astype("f4"), rng.random(40)
    write_shards(tmp_path / "s", {"train": (x, y, weights), "test": (x, y, weights)}, name="w", source="h", licence="n")
    words = ["--data.shards", tmp_path / "s", "--run_dir", tmp_path / "run", "--num_epochs", 1, "--num_samples", 2]
    assert main(["train", *map(str, words), "--num_test_samples", "3", "--model.arguments", "{hidden: [4]}"]) == 0
    predictor = hpc_bnn.load(tmp_path / "run")
    mean = predictor.predict(x)["mean"]
    np.testing.assert_allclose(predictor.as_module("samples")(torch.from_numpy(x))[0], mean, rtol=1e-5, atol=1e-6)
    assert list(example_inputs(predictor.experiment.manifest)) == ["x"]


def test_the_mean_is_the_network_with_the_mean_of_the_weights():
    predictor, x = predictor_of(target="numbers", init_std=0.3)
    mean = predictor.as_module("mean")
    with torch.no_grad():
        predictor.posterior.log_scale.fill_(-40)  # all samples are the mean
    np.testing.assert_allclose(mean(as_tensors(x)), predictor.predict(x)["mean"], rtol=1e-5, atol=1e-5)
    dropping, x = predictor_of(family="mc_dropout")  # without a mask
    module = dropping.posterior.module.eval()
    expected = module((torch.from_numpy(x) - 3) / 2)["logits"].softmax(1)
    np.testing.assert_allclose(dropping.as_module("mean")(torch.from_numpy(x)), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "what", "options", "named"),
    [
        ({"family": "ensemble"}, "mean", {}, "has no mean network"),
        ({"family": "ensemble"}, "sample", {"sample": 3}, "a deep ensemble of 3 has that many samples"),
        ({"family": "ensemble"}, "samples", {"num_samples": 2}, "a deep ensemble of 3 has that many samples"),
        ({}, "mean", {"sample": 1}, "it is for --what sample"),
        ({}, "mean", {"num_samples": 1}, "it is for --what samples"),
        ({}, "sample", {"sample": -1}, "0 or more"),
        ({}, "samples", {"num_samples": 0}, "at least 1"),
        ({}, "median", {}, "there are mean, sample, samples"),
        ({"family": "mc_dropout", "net": "FunctionalDropout"}, "sample", {}, "its forward calls F.dropout"),
        ({"family": "mc_dropout", "net": "Fused"}, "sample", {}, "drops in a fused layer"),
    ],
)
def test_what_no_plain_network_can_be_is_said(make, what, options, named):
    predictor, x = predictor_of(**make)
    before = predictor.predict(x)["probabilities"]
    with pytest.raises(ConfigError, match=named):
        predictor.as_module(what, **options)
    np.testing.assert_array_equal(predictor.predict(x)["probabilities"], before)  # the posterior is as it was


@pytest.mark.parametrize("case", [{}, {"named": True, "target": "numbers"}, {"family": "mc_dropout"}], ids=str)
def test_a_plain_network_can_be_copied_pickled_traced_and_exported(case):
    predictor, x = predictor_of(**case)
    x = as_tensors(x)
    plain = predictor.as_module("samples")
    expected = plain(x)
    state = io.BytesIO()
    torch.save(plain.state_dict(), state)
    other = predictor_of(**case, init_std=0.5)[0].as_module("samples")
    state.seek(0)
    other.load_state_dict(torch.load(state, weights_only=True))
    batch = {0: torch.export.Dim("batch")}
    few = {name: values[:2] for name, values in x.items()} if isinstance(x, dict) else x[:2]
    shapes = (dict.fromkeys(x, batch) if isinstance(x, dict) else batch,)
    exported = torch.export.export(plain, (few,), dynamic_shapes=shapes).module()
    traced = torch.jit.trace(plain, (few,), check_trace=False)
    twins = [copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)), other, exported, traced]
    for twin in twins:
        for found, wanted in zip(twin(x), expected):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in plain.parameters())


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def x_of(digits, numbers):
    return {"digits": stored(digits), "numbers": stored(numbers / "here")}


@pytest.mark.parametrize("kind", ["digits", "numbers"])
def test_a_file_predicts_bit_for_bit_what_its_run_predicts(kind, x_of, digits_run, numbers_run, tmp_path, capsys):
    """In a process without the run, MPI and h5py's data; and it can be exported again."""
    needs("safetensors")
    run_dir, x, path = digits_run if kind == "digits" else numbers_run, x_of[kind], tmp_path / "model.safetensors"
    assert main(["export", str(run_dir), "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    expected = hpc_bnn.load(run_dir).predict(x, members=True)
    np.savez(tmp_path / "expected.npz", x=x, **expected)
    program = (
        "import sys, os; sys.modules['mpi4py'] = sys.modules['horovod'] = None\n"
        "import numpy as np, hpc_bnn\n"
        "expected = dict(np.load('expected.npz'))\n"
        "predictor = hpc_bnn.load('model.safetensors')\n"
        "found = predictor.predict(expected.pop('x'), members=True)\n"
        "for name, values in expected.items(): np.testing.assert_array_equal(found[name], values)\n"
        "predictor.export('again.safetensors')\n"
        "print(len(found), predictor.num_steps)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(expected)), str(hpc_bnn.load(run_dir).num_steps)]
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    (tmp_path / "new").touch()
    assert path.stat().st_mode & 0o444 == (tmp_path / "new").stat().st_mode & 0o444  # as of any file of the user
    newest = hpc_bnn.load(run_dir, "newest")
    other = newest.export(tmp_path / "newest.safetensors")
    assert hpc_bnn.load(other).num_steps == newest.num_steps


def test_a_calibration_travels_with_its_checkpoint(digits_run, x_of, tmp_path, caplog):
    needs("safetensors")
    import shutil

    run_dir, x = tmp_path / "run", x_of["digits"]
    shutil.copytree(digits_run, run_dir)
    bare = hpc_bnn.load(run_dir).export(tmp_path / "bare.safetensors")
    assert main(["calibrate", str(run_dir), "--which", "best", "--split", "test", "--half", "true"]) == 0
    expected = hpc_bnn.load(run_dir).predict(x, calibrated=True)
    path = hpc_bnn.load(run_dir).export(tmp_path / "model.safetensors")
    content = json.loads((run_dir / "calibration.json").read_text())
    (run_dir / "calibration.json").write_text(json.dumps(content | {"num_steps": 1}))
    other = hpc_bnn.load(run_dir).export(tmp_path / "other.safetensors")
    assert "left out" in caplog.text
    shutil.rmtree(run_dir)
    found = hpc_bnn.load(path).predict(x, calibrated=True)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    for without in (bare, other):
        with pytest.raises(ConfigError, match=f"{without} holds none"):
            hpc_bnn.load(without).predict(x, calibrated=True)


def test_a_file_needs_no_pretrained_weights(digits, tmp_path, x_of):
    needs("safetensors")
    weights, run_dir = tmp_path / "weights.pt", tmp_path / "run"
    torch.save(MLP((1, 8, 8), 10).state_dict(), weights)
    command = ["train", "--data.shards", str(digits), "--run_dir", str(run_dir), "--num_epochs", "1"]
    assert main([*command, "--model.pretrained", str(weights), "--num_test_samples", "2", "--num_samples", "1"]) == 0
    path = hpc_bnn.load(run_dir).export(tmp_path / "model.safetensors")
    expected = hpc_bnn.load(run_dir).predict(x_of["digits"])["probabilities"]
    weights.unlink()
    predictor = hpc_bnn.load(path)
    np.testing.assert_array_equal(predictor.predict(x_of["digits"])["probabilities"], expected)
    assert predictor.config.model.pretrained == str(weights)


def test_a_file_that_is_not_as_it_was_written_is_refused(digits_run, tmp_path):
    needs("safetensors")
    from safetensors.torch import save_file

    whole = hpc_bnn.load(digits_run).export(tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    for length in [0, 7, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"model\.safetensors cannot be read, or is damaged"):
            hpc_bnn.load(path)
    for place in [8, 50, 300, *rng.integers(0, len(whole), 20)]:  # the header, and numbers
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"model\.safetensors (cannot be read|was changed|is no posterior)"):
            hpc_bnn.load(path)
    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(DataError, match="is no posterior of hpc_bnn"):
        hpc_bnn.load(path)
    with pytest.raises(DataError, match="is not there"):
        hpc_bnn.load(tmp_path / "none.safetensors")
    path.write_bytes(whole)
    path.chmod(0o666)
    with pytest.raises(DataError, match="may be written by every user"):
        hpc_bnn.load(path)


def test_a_file_of_a_newer_version_is_refused(digits_run, tmp_path, monkeypatch):
    needs("safetensors")
    predictor = hpc_bnn.load(digits_run)
    model_file = importlib.import_module("hpc_bnn.run.model_file")
    with monkeypatch.context() as patch:
        patch.setattr(model_file, "VERSION", 2)
        path = predictor.export(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="is of version 2"):
        hpc_bnn.load(path)


@pytest.mark.parametrize(
    ("name", "flags", "named"),
    [
        ("model.txt", [], "its suffix says what to write"),
        ("model", [], "its suffix says what to write"),
        ("model.safetensors", ["--what", "mean"], "holds the whole posterior"),
        ("model.safetensors", ["--sample", "0"], "holds the whole posterior"),
        ("model.onnx", [], "Use --what mean, sample or samples"),
        ("model.pt", [], "Use --what mean, sample or samples"),
        ("model.pt", ["--what", "samples"], "the weights of one network"),
        ("model.pt", ["--what", "mean", "--sample", "0"], "it is for --what sample"),
        ("model.pt", ["--what", "sample", "--num_samples", "2"], "it is for --what samples"),
        ("there.pt", ["--what", "mean"], "it is there already"),
        ("file/model.pt", ["--what", "mean"], "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_nothing(digits_run, tmp_path, capsys, name, flags, named):
    for other in ("there.pt", "file"):
        (tmp_path / other).write_bytes(b"mine")
    assert main(["export", str(digits_run), "--output", str(tmp_path / name), *flags]) in (1, 2)
    assert named in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there.pt"]
    assert (tmp_path / "there.pt").read_bytes() == b"mine"


def test_a_file_that_appears_meanwhile_stays(digits_run, tmp_path, monkeypatch):
    path, save = tmp_path / "model.pt", torch.save

    def late(state, temporary):
        save(state, temporary)
        path.write_bytes(b"mine")

    monkeypatch.setattr(torch, "save", late)
    with pytest.raises(ConfigError, match="it is there already"):
        hpc_bnn.load(digits_run).export(path, "mean")
    assert path.read_bytes() == b"mine"
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["safetensors", "onnx", "onnxscript"])
def test_a_missing_package_is_named(digits_run, tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    if package == "onnxscript":
        monkeypatch.setitem(sys.modules, "onnx", sys)  # whether it is there or not
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["model.safetensors"] if package == "safetensors" else ["model.onnx", "mean"]
    with pytest.raises(ConfigError, match=rf"it needs {package}.*\n*.*hpc_bnn\[export\]"):
        hpc_bnn.load(digits_run).export(tmp_path / arguments[0], *arguments[1:])
    if package == "safetensors":
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ConfigError, match="it needs safetensors"):
            hpc_bnn.load(tmp_path / "model.safetensors")
    else:
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["classes", "numbers"])
@pytest.mark.parametrize("flags", [["--what", "mean"], ["--what", "sample", "--sample", "1"]], ids=["mean", "sample"])
def test_weights_load_into_the_class_of_the_user(target, flags, digits, digits_run, numbers, numbers_run, tmp_path):
    """By its own names, though a likelihood may have wrapped it; it takes what is normalised."""
    run_dir, x = (digits_run, stored(digits)) if target == "classes" else (numbers_run, stored(numbers / "here"))
    assert main(["export", str(run_dir), "--output", str(tmp_path / "w.pt"), *flags]) == 0
    predictor = hpc_bnn.load(run_dir)
    manifest, arguments = predictor.manifest, predictor.config.model.arguments
    net = MLP(manifest.in_shape, predictor.likelihood.num_outputs, **arguments).eval()
    net.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    plain = predictor.as_module(flags[1], sample=1 if "--sample" in flags else None)
    outputs = net(plain.normalised(torch.from_numpy(x)))
    found = (
        outputs.softmax(1) if target == "classes" else predictor.likelihood.mean(outputs) * plain.y_std + plain.y_mean
    )
    np.testing.assert_allclose(found.detach(), plain(torch.from_numpy(x)), rtol=1e-5, atol=1e-5)


def test_a_learned_scale_is_no_weight_of_the_network(numbers, tmp_path):
    command = ["train", "--data.shards", str(numbers / "here"), "--run_dir", str(tmp_path / "run"), "--num_epochs", "1"]
    assert main([*command, "--likelihood.scale", "learned", "--num_samples", "1", "--num_test_samples", "2"]) == 0
    path = hpc_bnn.load(tmp_path / "run").export(tmp_path / "w.pt", "mean")
    MLP((2,), 2).load_state_dict(torch.load(path, weights_only=True))


def test_a_mask_is_no_weight(tmp_path):
    predictor, _ = predictor_of(family="mc_dropout")
    with pytest.raises(ConfigError, match="a sample of MC dropout is a mask"):
        predictor.export(tmp_path / "w.pt", "sample")
    state = torch.load(predictor.export(tmp_path / "w.pt", "mean"), weights_only=True)
    Net((4,), 3).load_state_dict(state)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ({}, "mean"),
        ({}, "sample"),
        ({}, "samples"),
        ({"target": "numbers", "named": True}, "samples"),
        ({"target": "numbers", "mean": 1e6}, "mean"),
        ({"net": "Windows"}, "samples"),
        ({"family": "mc_dropout"}, "samples"),
        ({"family": "ensemble", "target": "student_t"}, "samples"),
    ],
    ids=str,
)
def test_onnx_computes_what_the_plain_network_computes(case, what, tmp_path):
    """In one file, by names, for any number of examples."""
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    predictor, x = predictor_of(**case)
    path = predictor.export(tmp_path / "model.onnx", what)
    assert list(tmp_path.iterdir()) == [path]
    named, plain = x if isinstance(x, dict) else {"x": x}, predictor.as_module(what)
    assert b".py" not in path.read_bytes()  # no path of this machine
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_inputs()] == list(named)
    assert [put.name for put in session.get_outputs()] == plain.output_names
    for size in (1, 2, 7):
        few = {name: array[:size] for name, array in named.items()}
        expected = plain(as_tensors(few if isinstance(x, dict) else few["x"]))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for found, wanted in zip(session.run(None, few), expected, strict=True):
            assert found.dtype == wanted.numpy().dtype
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_onnx_of_a_run_from_the_command_line(digits_run, x_of, tmp_path):
    needs("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    command = [
        "export",
        str(digits_run),
        "--output",
        str(tmp_path / "m.onnx"),
        "--what",
        "samples",
        "--num_samples",
        "3",
    ]
    assert main(command) == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    probabilities, std = session.run(None, {"x": x_of["digits"]})
    expected = hpc_bnn.load(digits_run).predict(x_of["digits"], num_samples=3)
    np.testing.assert_allclose(probabilities, expected["probabilities"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(std, expected["std"], rtol=1e-3, atol=1e-6)


class Reads(Net):
    def forward(self, a):
        return {"logits": self.last(self.first(a)) * float(a.sum() > 0)}


def test_what_onnx_cannot_say_is_an_error(tmp_path):
    needs("onnx", "onnxscript")
    predictor, _ = predictor_of("Reads")
    with pytest.raises(ConfigError, match=r"torch\.onnx cannot write this network"):
        predictor.export(tmp_path / "model.onnx", "mean")
    assert not list(tmp_path.iterdir())


def test_help_imports_no_torch():
    program = (
        "import sys; from hpc_bnn.cli.commands import main\ntry: main(['export', '--help'])\nexcept SystemExit: pass\n"
    )
    program += "assert not {'torch', 'onnx', 'safetensors'} & sys.modules.keys(), 'torch'\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and "--num_samples" in done.stdout, done.stderr
