"""Files of predictions do not depend on the grid."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_evaluate import LIKELIHOODS, write_field_shards

from hpc_bnn import Grid, GridComm
from hpc_bnn.config import Config
from hpc_bnn.data import Manifest
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.run.experiment import Experiment
from hpc_bnn.run.export import predict_run, verify_predictions
from hpc_bnn.run.train import Run


class ToField:
    """What a config names: a class that is called with the shapes of the data."""

    def __new__(cls, in_shape, num_outputs, places=()):
        from test_evaluate import ToField as Network

        likelihood = LIKELIHOODS["categorical"] if not places else LIKELIHOODS["gaussian"]
        network = Network(likelihood)
        assert network.form[0] == num_outputs and in_shape == (6,)
        return network


def make_experiment(comm, directory, num_test_samples=5, family="mean_field"):
    config = Config(run_dir=str(directory), dtype="float64", num_test_samples=num_test_samples)
    config.num_samples, config.posterior.family = 5, family
    config.data.shards = str(directory / "shards")
    config.model.name = "test_predict.ToField"
    config.posterior.init_std = 0.3
    experiment = Experiment(config, comm, Manifest.read(config.data.shards))
    experiment.num_steps = 0
    return experiment


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_file_of_any_grid_is_that_of_one_process(comm, directory, monkeypatch, name):
    import hpc_bnn.predictive.evaluation

    likelihood = LIKELIHOODS[name]
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", likelihood)
    monkeypatch.setattr(hpc_bnn.predictive.evaluation, "BLOCK_BYTES", 1000)  # several blocks
    options = {"quantiles": (0.1, 0.5), "with_members": True}
    here = make_experiment(comm, directory)
    assert predict_run(here, "train", directory / "here.h5", **options) == directory / "here.h5"
    if comm.grid.rank == 0:
        predict_run(make_experiment(GridComm(Grid()), directory), "train", directory / "one.h5", **options)
        former = os.getcwd()
        os.chdir("/")  # parts are found beside the file, wherever one stands
        with h5py.File(directory / "here.h5") as got, h5py.File(directory / "one.h5") as expected:
            assert got.keys() == expected.keys() and dict(got.attrs).keys() == dict(expected.attrs).keys()
            assert len(got["members"]) == 23 and got["members"].shape[1] == 5
            for key in expected:
                assert got[key].shape == expected[key].shape and got[key].dtype == expected[key].dtype
                np.testing.assert_allclose(got[key][()], expected[key][()], rtol=1e-8, atol=1e-12)
            members, levels = got["members"][()], list(got.attrs["quantile_levels"])
            assert levels == [0.1, 0.5]
            if name == "categorical":
                np.testing.assert_allclose(got["probabilities"][()], members.mean(1), rtol=1e-10)
                np.testing.assert_allclose(got["quantiles"][:, 1], np.quantile(members, 0.5, axis=1), rtol=1e-10)
                assert (got["class"][()] == members.mean(1).argmax(1)).all()
            else:
                np.testing.assert_allclose(got["mean"][()], members.mean(1), rtol=1e-9, atol=1e-9)
                parts = got["aleatoric_std"][()] ** 2 + got["epistemic_std"][()] ** 2
                np.testing.assert_allclose(got["std"][()] ** 2, parts, rtol=1e-10)
        os.chdir(former)
        num_parts = comm.grid.data_size if comm.grid.data_size > 1 else 0
        assert len(list(directory.glob("here-*.h5"))) == num_parts
        assert not list(directory.glob(".*")), "nothing temporary stays"
    comm.barrier()
    with pytest.raises(ConfigError, match=r"--output here\.h5|--output .*here\.h5: it is there already"):
        predict_run(here, "train", directory / "here.h5")


def test_parts_belong_to_one_prediction(comm, directory):
    """A prediction that was renamed keeps its numbers, and one without its parts has none, and says so."""
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS["categorical"])
    names, found = ("a.h5", "b.h5"), []
    for seed, name in enumerate(names):
        experiment = make_experiment(comm, directory)
        experiment.config.seed = seed
        predict_run(experiment, "train", directory / "p.h5")
        if comm.grid.rank == 0:
            (directory / "p.h5").rename(directory / name)
            assert verify_predictions(directory / name) == []
            found.append(h5py.File(directory / name)["probabilities"][()])
    if comm.grid.rank == 0:
        assert not np.allclose(*found)
        with h5py.File(directory / "a.h5") as file:
            np.testing.assert_array_equal(file["probabilities"][()], found[0])
    if comm.grid.rank == 0 and comm.grid.data_size > 1:
        (directory / "copy").mkdir()
        copy = Path(shutil.copy(directory / "a.h5", directory / "copy"))
        with h5py.File(copy) as file:
            assert np.isnan(file["probabilities"][()]).all() and (file["class"][()] == -1).all()
        problems = verify_predictions(copy)
        assert len(problems) == comm.grid.data_size and all("is missing" in problem for problem in problems)
        part = next(directory.glob("p-*-00001.h5"))
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        problems = [verify_predictions(directory / name) for name in names]
        assert sum(map(len, problems)) == 1 and part.name in str(problems)


def test_a_file_that_cannot_be_written_ends_all_ranks(comm, directory):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS["categorical"])
            (directory / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        predict_run(make_experiment(comm, directory), "train", directory / "file" / "predictions.h5")
    with pytest.raises(ConfigError, match=r"--quantiles 1.5"):
        predict_run(make_experiment(comm, directory), "train", directory / "p.h5", quantiles=(0.5, 1.5))


@pytest.mark.parametrize(
    "name, family, num_test_samples",
    [("categorical", "mean_field", 1), ("gaussian", "mean_field", 1), ("gaussian", "ensemble", 5)],
)
def test_fewer_examples_than_data_groups_and_samples_than_ranks(comm, directory, name, family, num_test_samples):
    """Some ranks have nothing to do: evaluation, pictures and predictions are those of one process."""
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS[name])
    everything = []
    for one, output in ((comm, "here.h5"), (GridComm(Grid()), "one.h5")):
        experiment = make_experiment(one, directory, num_test_samples, family)
        tested = experiment.evaluate(experiment.open("few"))
        shown = tested.shown.gather()
        if one is comm or comm.grid.rank == 0:
            predict_run(experiment, "few", directory / output, with_members=True)
        everything.append((tested.evaluation.metrics, tested.evaluation.uncertainties, shown))
    (got, certain, shown), (expected, expected_certain, expected_shown) = everything
    assert got == pytest.approx(expected, rel=1e-8)
    for key, values in expected_certain.items():
        np.testing.assert_allclose(certain[key], values, rtol=1e-9, atol=1e-12)
    if comm.grid.rank == 0:
        sizes = [{key: len(values) for key, values in found.items()} for found in (shown, expected_shown)]
        assert sizes[0] == sizes[1]
        with h5py.File(directory / "here.h5") as a, h5py.File(directory / "one.h5") as b:
            assert a.keys() == b.keys() and len(a["std"]) == 2
            for key in b:  # quantiles are found by iteration, to a part of the distance of the outermost ones
                atol = 1e-6 if key == "quantiles" else 1e-12
                np.testing.assert_allclose(a[key][()], b[key][()], rtol=1e-8, atol=atol)


def test_a_training_set_smaller_than_the_data_groups_is_refused(comm, directory):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS["categorical"])
    config = make_experiment(comm, directory).config
    config.data.train_split = config.data.test_split = "few"
    config.data.prepare, config.grid.sample_size = None, comm.grid.sample_size
    if comm.grid.data_size <= 2:
        assert Run(config, comm).loader.num_batches == 1
        return
    with pytest.raises(ConfigError, match=r"train_split with 2 examples: .* fewer examples than the"):
        Run(config, comm)
