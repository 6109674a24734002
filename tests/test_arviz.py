"""``hpc_bnn.to_arviz``: what ArviZ gets is what the evaluation has; where ArviZ is not there, it is named."""

import json
import sys

import numpy as np
import pytest
from conftest import stored
from scipy.special import logsumexp

import hpc_bnn
from hpc_bnn import write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.errors import ConfigError, DataError


@pytest.fixture
def arviz():
    return pytest.importorskip("arviz", reason="ArviZ is not installed: pip install 'hpc_bnn[arviz]'")


@pytest.fixture
def run(request, digits, numbers):
    """A run of classes or of numbers, and its shards."""
    return request.getfixturevalue(f"{request.param}_run"), {"digits": digits, "numbers": numbers / "here"}[
        request.param
    ]


@pytest.mark.parametrize("run", ["digits", "numbers"], indirect=True)
def test_it_is_what_the_evaluation_has(run, arviz):
    """The mean over the draws is the predictive, and the log-likelihoods give its nll, in units of y."""
    run_dir, _ = run
    assert main(["evaluate", str(run_dir), "--which", "best"]) == 0
    metrics = json.loads((run_dir / "evaluation.json").read_text())["metrics"]
    data = hpc_bnn.to_arviz(run_dir)
    log_p = data["log_likelihood"]["y"]
    num_chains, num_samples, _ = log_p.shape
    assert log_p.dims == ("chain", "draw", "example") and num_chains == 1
    assert num_samples == hpc_bnn.load(run_dir).config.num_test_samples
    nll = -(logsumexp(log_p.values[0], axis=0) - np.log(num_samples)).mean()
    assert nll == pytest.approx(metrics["nll"], rel=1e-6)
    np.testing.assert_allclose(data["posterior"]["total_log_likelihood"].values, log_p.values.sum(-1), rtol=1e-12)
    y = data["observed_data"]["y"]
    if "mean" in data["posterior_predictive"]:
        mean = data["posterior_predictive"]["mean"]
        assert mean.dims == ("chain", "draw", "example", "channel") and list(mean.channel.values) == ["a", "b"]
        error = (mean.mean(("chain", "draw")) - y).values
        assert np.sqrt((error**2).mean()) == pytest.approx(metrics["rmse"], rel=1e-6)
    else:
        p = data["posterior_predictive"]["probabilities"]
        assert p.dims == ("chain", "draw", "example", "category")
        assert (p.mean(("chain", "draw")).argmax("category") == y).mean() == pytest.approx(metrics["accuracy"])
    loo = arviz.loo(hpc_bnn.to_arviz(run_dir, split="train", num_samples=50))
    assert np.isfinite(getattr(loo, "elpd", None) or loo["elpd_loo"])


@pytest.mark.parametrize("run", ["digits", "numbers"], indirect=True)
def test_arrays_give_what_a_split_gives(run, arviz):
    import h5py

    run_dir, shards = run
    files = [shards / shard["file"] for shard in json.loads((shards / "manifest.json").read_text())["splits"]["test"]]
    x, y = stored(shards), np.concatenate([h5py.File(file)["y"][()] for file in files])
    predictor = hpc_bnn.load(run_dir)
    expected, found = hpc_bnn.to_arviz(predictor, num_samples=5), hpc_bnn.to_arviz(predictor, x, y, num_samples=5)
    groups = ["posterior_predictive", "posterior", "log_likelihood", "observed_data"]
    for group in groups:
        for name, values in expected[group].data_vars.items():
            np.testing.assert_allclose(found[group][name].values, values.values, rtol=1e-5, atol=1e-6)
            assert found[group][name].dims == values.dims
    alone = hpc_bnn.to_arviz(predictor, x[:3], num_samples=5)
    assert [group for group in groups if hasattr(alone, group)] == ["posterior_predictive"]
    for options, named in (({"y": y}, "Give x and y"), ({"x": x, "split": "test"}, "Give x and y")):
        with pytest.raises(ConfigError, match=named):
            hpc_bnn.to_arviz(predictor, **options)
    with pytest.raises(ConfigError, match="as many examples"):
        hpc_bnn.to_arviz(predictor, x, y[:3])
    if "probabilities" in expected["posterior_predictive"]:
        with pytest.raises(DataError, match="a target is 77"):
            hpc_bnn.to_arviz(predictor, x[:3], np.array([1, 77, 2], dtype=y.dtype))


@pytest.mark.parametrize("objective", ["elbo", "crps"])
def test_fields_have_their_coordinates_and_scores_no_density(tmp_path, arviz, objective):
    rng = np.random.default_rng(0)
    splits = {split: (rng.normal(size=(9, 6)), rng.normal(size=(9, 2, 1, 2)) * 10) for split in ("train", "test")}
    facts = {"name": "toy", "source": "test", "licence": "none", "channels": {"y": ["t", "z"]}}
    details = {"latitudes": [50.0], "longitudes": [0.0, 10.0]}
    write_shards(tmp_path / "shards", splits, **facts, details=details)
    flags = [
        "--data.shards",
        str(tmp_path / "shards"),
        "--num_epochs",
        "1",
        "--num_samples",
        "2",
        "--num_test_samples",
        "4",
    ]
    assert main(["train", *flags, "--objective.name", objective, "--run_dir", str(tmp_path / "run")]) == 0
    data = hpc_bnn.to_arviz(tmp_path / "run", num_samples=3)
    mean = data["posterior_predictive"]["mean"]
    assert mean.dims == ("chain", "draw", "example", "channel", "latitude", "longitude") and mean.shape[:3] == (1, 3, 9)
    assert list(mean.longitude.values) == [0.0, 10.0] and data["observed_data"]["y"].dims == mean.dims[2:]
    assert hasattr(data, "log_likelihood") == hasattr(data, "posterior") == (objective == "elbo")


def test_without_arviz_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ConfigError, match=r"needs ArviZ.*pip install 'hpc_bnn\[arviz\]'"):
        hpc_bnn.to_arviz(tmp_path)
