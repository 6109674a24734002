"""Files of predictions do not depend on the grid."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_evaluate import LIKELIHOODS, write_field_shards

from hpc_bnn import Grid, GridComm
from hpc_bnn.config import Config
from hpc_bnn.data import Manifest
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.experiment import Experiment
from hpc_bnn.predict import predict_run


class ToField:
    """What a config names: a class that is called with the shapes of the data."""

    def __new__(cls, in_shape, num_outputs, places=()):
        from test_evaluate import ToField as Network

        likelihood = LIKELIHOODS["categorical"] if not places else LIKELIHOODS["gaussian"]
        network = Network(likelihood)
        assert network.form[0] == num_outputs and in_shape == (6,)
        return network


@pytest.fixture
def directory(comm, tmp_path_factory):
    return Path(comm.broadcast_object(str(tmp_path_factory.mktemp("run")) if comm.grid.rank == 0 else None))


def make_experiment(comm, directory, num_test_samples=5):
    config = Config(run_dir=str(directory), dtype="float64", num_test_samples=num_test_samples)
    config.data.shards = str(directory / "shards")
    config.model.name = "test_predict.ToField"
    config.posterior.init_std = 0.3
    experiment = Experiment(config, comm, Manifest.read(config.data.shards))
    experiment.num_steps = 0
    return experiment


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_file_of_any_grid_is_that_of_one_process(comm, directory, monkeypatch, name):
    import hpc_bnn.evaluate

    likelihood = LIKELIHOODS[name]
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", likelihood)
    monkeypatch.setattr(hpc_bnn.evaluate, "BLOCK_BYTES", 1000)  # several blocks
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
                np.testing.assert_allclose(
                    got["quantiles"][:, 1], np.quantile(members, 0.5, axis=1), rtol=1e-10
                )
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


def test_a_file_that_cannot_be_written_ends_all_ranks(comm, directory):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS["categorical"])
            (directory / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        predict_run(make_experiment(comm, directory), "train", directory / "file" / "predictions.h5")
    with pytest.raises(ConfigError, match=r"--quantiles 1.5"):
        predict_run(make_experiment(comm, directory), "train", directory / "p.h5", quantiles=(0.5, 1.5))
