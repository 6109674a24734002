"""A calibration does not depend on the grid."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
import yaml
from reference import by_one
from test_evaluate import LIKELIHOODS, ToField, write_field_shards
from test_predict import make_experiment

import hpc_bnn.predictive.calibration
import hpc_bnn.predictive.evaluation
from hpc_bnn import Grid, GridComm, MeanFieldGaussian, ShardDataset
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.grid import share
from hpc_bnn.noise import Key, Stream
from hpc_bnn.predictive.calibration import calibrate_dataset, fit_temperature, fit_vector
from hpc_bnn.predictive.evaluation import evaluate_dataset
from hpc_bnn.run.calibrate import calibrate_run, read_calibration
from hpc_bnn.run.export import predict_run

FIELD = "field of classes"
SHAPES = {"categorical": (), FIELD: (2, 3)}
"""Of the thresholds; of numbers (4, 2, 3)."""


def write(comm, directory, name):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS[name], of_classes=name == FIELD)


def assert_equal(got, expected):
    assert (got.method, got.level, got.num_examples) == (expected.method, expected.level, expected.num_examples)
    assert got.temperature == (expected.temperature and pytest.approx(expected.temperature, rel=1e-9))
    for name in ("vector", "noise_factors"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-10, atol=1e-12)
    # Of numbers they are differences of quantiles, found by iteration to a part of the distance of the outermost ones
    torch.testing.assert_close(got.thresholds, expected.thresholds, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["categorical", FIELD, "gaussian", "poisson", "implicit"])
def test_the_calibration_of_any_grid_is_that_of_one_process(comm, directory, monkeypatch, name):
    """Of uneven shares, of several blocks, of fewer examples than ranks, of targets that are gathered in parts."""
    write(comm, directory, name)
    monkeypatch.setattr(hpc_bnn.predictive.evaluation, "BLOCK_BYTES", 300 if name == "categorical" else 6000)
    monkeypatch.setattr(hpc_bnn.predictive.calibration, "GATHERED_NUMBERS", 100)
    monkeypatch.setattr(hpc_bnn.predictive.calibration, "FITTED_NUMBERS", 150 if name == FIELD else 900)  # a part
    cases = [
        ("train", 0.7, None),
        ("train", 0.5, torch.tensor([1, 2, 3, 8, 22])),
        ("few", 0.6, None),
        ("few", 0.9, None),
    ]
    with Key(0, Stream.INIT).global_generator():
        likelihood = LIKELIHOODS[name]
        posterior = MeanFieldGaussian(ToField(likelihood, name == FIELD), init_std=0.3)
    found = []
    for split, level, examples in cases:
        options = {"dtype": torch.float64, "normalises_targets": likelihood.is_equivariant}
        data = ShardDataset(directory / "shards", split, **options)
        options = {"level": level, "examples": examples, "num_samples": 5}
        options |= {"scaling": "vector", "score": "raps"} if name in SHAPES else {}
        found.append(calibrate_dataset(posterior, likelihood, comm, data, **options))
        found.append(by_one(lambda: calibrate_dataset(posterior, likelihood, GridComm(Grid()), data, **options)))  # noqa: B023
    for (_, level, _), got, expected in zip(cases, found[::2], found[1::2]):
        assert_equal(got, expected)
        assert got.holds_everything == (level == 0.9) == bool(got.thresholds.isinf().all())
        assert got.thresholds.shape == SHAPES.get(name, (4, 2, 3))
        assert (got.vector is None) == (name not in SHAPES)
        assert (got.noise_factors is None) == (name != "gaussian")
    # One example of the calibration is on the edge of its set or interval, where rounding decides
    calibration = replace(found[1], thresholds=found[1].thresholds + 1e-6)
    options = {"dtype": torch.float64, "normalises_targets": likelihood.is_equivariant}
    data = ShardDataset(directory / "shards", "train", **options)

    def evaluate(one):
        return evaluate_dataset(posterior, likelihood, one, data, calibration=calibration, num_samples=5).metrics

    got, expected = evaluate(comm), by_one(lambda: evaluate(GridComm(Grid())))
    for metric, value in expected.items():
        assert got[metric] == pytest.approx(value, rel=1e-8 if "width" in metric else 1e-10), metric
    assert {"set_coverage", "set_size"} <= got.keys() or {"interval_coverage", "interval_width"} <= got.keys()


@pytest.mark.parametrize("num_examples", [41, 2], ids=["uneven", "fewer_than_ranks"])
def test_temperature_and_vector_are_of_all_examples(comm, num_examples):
    rng = np.random.default_rng(num_examples)
    log_p = torch.from_numpy(3 * rng.normal(size=(num_examples, 4))).log_softmax(1)
    y = torch.where(torch.arange(num_examples) % 3 == 1, log_p.argmin(1), log_p.argmax(1))
    mine = share(num_examples, comm.grid.world_size, comm.grid.rank)
    span = slice(mine.start, mine.stop)
    got, expected = fit_temperature(log_p[span], y[span], comm), fit_temperature(log_p, y, GridComm(Grid()))
    assert got == pytest.approx(expected, rel=1e-9) and (num_examples == 2 or 1 < expected < 19)
    got, expected = fit_vector(log_p[span], y[span], 2.0, comm), fit_vector(log_p, y, 2.0, GridComm(Grid()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert (expected[1].abs() > 1e-3).all()


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_file_is_written_once_and_read_by_all(comm, directory, name):
    write(comm, directory, name)
    here = make_experiment(comm, directory)
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            (directory / "config.yaml").write_text(yaml.safe_dump(here.config.to_dict()))
    with pytest.raises(ConfigError, match=r"calibration\.json is missing"):
        read_calibration(here, 5)
    written = calibrate_run(here, "foreign", level=0.8, half=True)
    assert_equal(read_calibration(here, 5), written)
    predict_run(here, "train", directory / "here.h5", calibrated=True)
    if name == "gaussian":
        with pytest.raises(ConfigError, match="the targets have the dims dim_1, dim_2, and a table has one row per"):
            predict_run(here, "train", directory / "here.csv")
    else:
        predict_run(here, "train", directory / "here.csv", calibrated=True)
    if comm.grid.rank == 0:
        if name == "categorical":
            table = np.genfromtxt(directory / "here.csv", delimiter=",", names=True, deletechars="")
            with h5py.File(directory / "here.h5") as file:
                for column in range(3):
                    assert np.array_equal(table[f"in_set/{column}"], file["in_set"][:, column])
                    np.testing.assert_array_equal(table[f"probabilities/{column}"], file["probabilities"][:, column])
            assert np.array_equal(table["example"], np.arange(23)) and not list(directory.glob(".*"))
        one = make_experiment(GridComm(Grid()), directory)
        assert_equal(read_calibration(one, 5), written)
        predict_run(one, "train", directory / "one.h5", calibrated=True)
        with h5py.File(directory / "here.h5") as got, h5py.File(directory / "one.h5") as expected:
            assert got.keys() == expected.keys() and dict(got.attrs).keys() == dict(expected.attrs).keys()
            for key in ("lower", "upper") if name == "gaussian" else ("calibrated_probabilities", "in_set"):
                np.testing.assert_allclose(got[key][()], expected[key][()], rtol=1e-6, atol=1e-8)
                assert got[key].dtype == expected[key].dtype
        path = directory / "calibration.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"num_steps": 3}))
    comm.barrier()
    with pytest.raises(ConfigError, match="was made with num_steps 3, and this is 0"):
        predict_run(here, "train", directory / "p.h5", calibrated=True)
    for split, said in (("train", "was trained on it"), ("nowhere", "the data have the splits train, foreign, few")):
        with pytest.raises(ConfigError, match=said):
            calibrate_run(here, split)


def test_a_target_that_is_none_is_found_by_all(comm, directory, monkeypatch):
    """It is in the last block of the last data group; the others have finished theirs."""
    write(comm, directory, "gaussian")
    monkeypatch.setattr(hpc_bnn.predictive.evaluation, "BLOCK_BYTES", 1000)
    experiment = make_experiment(comm, directory)
    data = experiment.open("train")
    monkeypatch.setattr(type(experiment.likelihood), "fits", lambda self, y: y != y_last)
    y_last = data.in_units(data.fetch([22])[1])[0, 0, 0, 0].item()
    with pytest.raises(DataError, match=r"a target is .*Gaussian is for"):
        calibrate_dataset(experiment.posterior, experiment.likelihood, comm, data, level=0.9, **experiment.test_samples)
