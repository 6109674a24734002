"""The check-up of a posterior does not depend on the grid; nor does what the evaluation says of the mean network."""

import pytest
import torch
from reference import by_one
from test_evaluate import LIKELIHOODS, write_field_shards
from test_predict import make_experiment

from hpc_bnn import Grid, GridComm, predict_values
from hpc_bnn.noise import Key, Stream


@pytest.mark.parametrize("family", ["mean_field", "low_rank", "ensemble", "deterministic"])
@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_check_up_of_any_grid_is_that_of_one_process(comm, directory, family, name):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS[name])

    def check_up(one):
        experiment = make_experiment(one, directory, family=family)
        if family == "ensemble":  # members that differ more than at their start, by their keys
            members = experiment.posterior.members
            for row, sample in zip(members.data, experiment.posterior.samples):
                row += torch.randn(row.shape, generator=Key(sample, Stream.INIT).generator(), dtype=row.dtype)
        return experiment.check_up(experiment.open("train"))

    got, expected = check_up(comm), by_one(lambda: check_up(GridComm(Grid())))
    assert got["notes"] == expected["notes"] and got["snr"] == expected["snr"] and got.keys() == expected.keys()
    assert got["tensors"].keys() == expected["tensors"].keys()
    columns = [(got["tensors"][column], values) for column, values in expected["tensors"].items()]
    for mine, values in [([got[name]], [expected[name]]) for name in ("kl", "coupling", "at_prior")] + columns:
        for number, value in zip(mine, values, strict=True):
            assert number == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value)
    assert got["mean_network"] == pytest.approx(expected["mean_network"], rel=1e-8)
    assert ("nll" in got["mean_network"]) == (family != "ensemble")
    assert (sum(got["snr"].get("counts", [])) > 0) == (family != "deterministic")


def test_what_is_kept_of_the_samples_comes_in_their_order_to_the_first_rank_of_a_group(comm, directory):
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS["gaussian"])
    found = []
    for one in (comm, GridComm(Grid())):
        experiment = make_experiment(one, directory)
        x, y = experiment.open("few").fetch(slice(None))
        options = {"num_samples": 5, "keep_log_probs": True, "keep_members": True}
        found.append(predict_values(experiment.posterior, experiment.likelihood, one, x, y, **options))
    got, expected = found
    assert expected.log_probs.shape == (2, 5) and expected.members.shape == (2, 5, *expected.mean.shape[1:])
    if not comm.grid.is_first("sample"):
        assert got.log_probs is got.members is got.mixture is None
        return
    torch.testing.assert_close(got.members, expected.members, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.quantile(0.3), expected.quantile(0.3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=1e-12, atol=1e-12)
    mean = got.log_probs.logsumexp(1) - torch.tensor(5.0, dtype=torch.float64).log()
    torch.testing.assert_close(mean, got.log_prob, rtol=1e-12, atol=1e-12)
