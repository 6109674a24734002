"""The check-up of a posterior: against its definitions, in float64, and in the files of a run."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn

import hpc_bnn
from hpc_bnn import Categorical, Family, Grid, GridComm, Posterior, TensorSource, evaluate_dataset, predict_classes
from hpc_bnn.capabilities import Capabilities
from hpc_bnn.cli.commands import main
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import (
    DeepEnsemble,
    DeterministicNetwork,
    GaussianPrior,
    LaplacePrior,
    LowRankGaussian,
    MCDropout,
    MeanFieldGaussian,
    ScaleMixturePrior,
    Slot,
    StudentTPrior,
)
from hpc_bnn.predictive import check_up, mean_network

ONE = GridComm(Grid())
FAMILIES = [MeanFieldGaussian, LowRankGaussian]
CLOSED = [
    GaussianPrior(0.7),
    GaussianPrior("fan_in", "initial"),
    LaplacePrior(0.4, 0.1),
    LaplacePrior("fan_in", "initial"),
]
OPEN = [ScaleMixturePrior(), StudentTPrior(3.0, "fan_in")]


def make_net():
    with Key(0, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2))
    return net.double()


def jittered(posterior):
    """Return a posterior whose parameters are not those of the start."""
    for number, parameter in enumerate(posterior.parameters()):
        noise = torch.randn(parameter.shape, generator=Key(number, Stream.INIT).generator(), dtype=parameter.dtype)
        parameter.data += 0.3 * noise
    return posterior


def inputs(number=7):
    return torch.randn(number, 3, generator=Key(1, Stream.DATA_ORDER).generator(), dtype=torch.float64)


def line_of(found, name):
    return {column: values[found["tensors"]["name"].index(name)] for column, values in found["tensors"].items()}


# --- the KL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", CLOSED, ids=repr)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_kl_of_the_tensors_adds_up(kind, prior):
    posterior = jittered(kind(make_net(), prior=prior, init_std=0.3))
    found = check_up(posterior, ONE)
    kls = [kl for kl in found["tensors"]["kl"] if kl is not None]
    assert len(kls) == 4 and sum(kls) + (found["coupling"] or 0) == pytest.approx(posterior.kl().item(), rel=1e-10)
    assert found["kl"] == pytest.approx(posterior.kl().item(), rel=1e-10)
    assert (found["coupling"] is not None and found["coupling"] > 0.01) == (kind is LowRankGaussian)


def test_the_kl_of_a_tensor_is_that_of_its_weights():
    posterior = jittered(MeanFieldGaussian(make_net(), prior=GaussianPrior(0.7), init_std=0.3))
    state = posterior.state_dict()
    found = check_up(posterior, ONE)
    for name in ("0.weight", "0.bias", "4.weight", "4.bias"):
        q = D.Normal(state[f"{name}.loc"], state[f"{name}.log_scale"].exp())
        expected = (
            D.kl_divergence(q, D.Normal(torch.zeros(()).double(), torch.tensor(0.7, dtype=torch.float64))).sum().item()
        )
        line = line_of(found, name)
        assert line["kl"] == pytest.approx(expected, rel=1e-12)
        assert line["kl_per_weight"] == pytest.approx(expected / line["num_weights"], rel=1e-12)
    assert found["tensors"]["name"] == [name for name, _ in make_net().named_parameters()], "in the order of the module"
    assert line_of(found, "2.weight") | {"rms": 0} == {
        **dict.fromkeys(found["tensors"]), "name": "2.weight", "kind": "point", "num_weights": 5, "rms": 0,
    }  # fmt: skip


def test_the_coupling_is_the_total_correlation():
    posterior = jittered(LowRankGaussian(make_net(), rank=2, init_std=0.3))
    scale, factor = posterior.log_scale.detach().exp(), posterior.factor.detach()
    covariance = scale[:, None] * (torch.eye(len(scale)) + factor.T @ factor) * scale
    of_all = D.MultivariateNormal(posterior.loc.detach(), covariance).entropy()
    one_by_one = D.Normal(posterior.loc.detach(), covariance.diagonal().sqrt()).entropy().sum()
    assert check_up(posterior, ONE)["coupling"] == pytest.approx((one_by_one - of_all).item(), rel=1e-10)


@pytest.mark.parametrize("prior", OPEN, ids=repr)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_kl_without_closed_form_is_what_the_estimate_of_the_training_tends_to(kind, prior):
    posterior = jittered(kind(make_net(), prior=prior, init_std=0.3))
    loc, scale = posterior.loc.detach(), posterior.log_scale.detach().exp()
    factor = posterior.factor.detach() if kind is LowRankGaussian else torch.zeros(1, len(loc)).double()
    covariance = scale[:, None] * (torch.eye(len(scale)) + factor.T @ factor) * scale
    q, bound = D.MultivariateNormal(loc, covariance), posterior.family_.prior
    with Key(3, Stream.INIT).global_generator():
        draws = q.sample((4000,))
    terms = q.log_prob(draws) - torch.stack([bound.log_prob(draw) for draw in draws])
    found = check_up(posterior, ONE)
    assert abs(found["kl"] - terms.mean().item()) < 4 * terms.std().item() / 4000**0.5
    assert "quadrature" in found["notes"][0]


def test_dropout_and_ensembles_have_what_they_have():
    dropout = MCDropout(make_net(), prior_std=0.5)
    found = check_up(dropout, ONE)
    assert sum(found["tensors"]["kl"]) == pytest.approx(dropout.kl().item(), rel=1e-10)
    assert set(found["tensors"]["kind"]) == {"point"} and found["snr"] == {} and found["at_prior"] is None
    ensemble = jittered(DeepEnsemble(make_net, 3, [0, 1, 2], prior_std=0.5))
    found, state = check_up(ensemble, ONE), ensemble.state_dict()
    for name, parameter in make_net().named_parameters():
        members = torch.stack([state[f"members.{number}.{name}"] for number in range(3)]).flatten(1)
        line, ratio = line_of(found, name), members.mean(0).abs() / members.std(0)
        assert line["rms"] == pytest.approx(members.mean(0).square().mean().sqrt().item(), rel=1e-12)
        assert line["kl"] == pytest.approx(2 * members.square().sum(1).mean().item(), rel=1e-12)
        assert line["snr_median"] == pytest.approx(ratio.sort().values[round((len(ratio) - 1) / 2)].item(), rel=1e-12)
        assert line["num_weights"] == parameter.numel()
    one = check_up(DeepEnsemble(make_net, 1, [0]), ONE)
    assert one["snr"] == {} and one["tensors"]["kl"][0] > 0
    points = check_up(DeterministicNetwork(make_net()), ONE)
    assert points["kl"] is None and points["tensors"]["rms"][0] > 0 and "no KL" in points["notes"][0]


class Bare(Family):
    """A family that says nothing of its weights but how to draw them."""

    name, capabilities = "bare", Capabilities("none")

    def slots(self, weights, layout, samples):
        return {"centre": Slot(weights)}

    def sample_(self, slots, work, samples, draw, out):
        draw.affine_(slots["centre"], torch.full_like(slots["centre"], 0.1), out)

    def pull_back_(self, grads, slots, work, samples, g, draw):
        g.add_to(grads["centre"])


class Rows(Bare):
    """Rows of which nobody says which are weights."""

    capabilities = Capabilities("none", owner="sample")

    def slots(self, weights, layout, samples):
        return {"rows": Slot(weights.clone(), owner="sample")}


def test_a_family_of_a_user_that_says_little():
    for family in (Bare(), Rows()):
        found = check_up(Posterior(make_net(), family), ONE)
        assert found["kl"] is None and found["snr"] == {} and found["tensors"]["num_weights"][0] == 15
        with pytest.raises(NotImplementedError, match="has no mean network"):
            mean_network(Posterior(make_net(), family))
    assert "a bare states no standard deviation" in " ".join(check_up(Posterior(make_net(), Bare()), ONE)["notes"])


# --- sigma, and the prior ------------------------------------------------------------------------------


def test_the_signal_to_noise_ratio_by_hand():
    posterior = MeanFieldGaussian(nn.Linear(10, 1, bias=False).double())
    with torch.no_grad():
        posterior.loc.copy_(torch.tensor([0, 1e-9, 0.5, -1, 2, 3, -4, 5, 1e9, 7]))
        posterior.log_scale.fill_(0.0)
        posterior.log_scale[9] = -math.inf
    found = check_up(posterior, ONE)
    line, counts = line_of(found, "weight"), np.array(found["snr"]["counts"])
    assert (line["snr_05"], line["snr_median"], line["snr_95"]) == (0, 2, None)  # in order, place 0, 4 and 9
    edges = found["snr"]["log10_edges"]
    assert counts.sum() == 10 and counts[0] == counts[-1] == 2
    inner, _ = np.histogram(np.log10([0.5, 1, 2, 3, 4, 5]), edges)
    np.testing.assert_array_equal(counts[1:-1], inner[1:-1])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "prior", [GaussianPrior(0.5), LaplacePrior(0.5), ScaleMixturePrior(), StudentTPrior(3.0)], ids=repr
)
def test_weights_at_the_prior_are_those_near_the_best_gaussian(prior):
    posterior = MeanFieldGaussian(nn.Linear(4, 1, bias=False).double(), prior=prior)
    numbers = torch.logspace(-3, 1, 4001, dtype=torch.float64)
    kls = prior.kl_by_weight(torch.zeros_like(numbers), numbers, slice(None))
    best = numbers[kls.argmin()].item()
    if isinstance(prior, GaussianPrior):
        assert best == pytest.approx(0.5, rel=2e-3) and kls.min() < 1e-5
    if isinstance(prior, LaplacePrior):
        assert best == pytest.approx(0.5 * math.sqrt(math.pi / 2), rel=2e-3)
    with torch.no_grad():
        posterior.loc.copy_(torch.tensor([0, 0, 0, 0.6 * best]))
        posterior.log_scale.copy_(torch.tensor([1, 1.03, 2, 1]).mul(best).log())
    assert check_up(posterior, ONE)["at_prior"] == 0.5
    assert line_of(check_up(posterior, ONE), "weight")["at_prior"] == 0.5


# --- the mean network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILIES, MCDropout, DeterministicNetwork])
def test_the_mean_network_is_that_of_the_mean_and_leaves_the_posterior_alone(kind):
    posterior, x = jittered(kind(make_net())), inputs()
    arguments, options = (Categorical(2), ONE, x), {"num_samples": 3}
    before, state = predict_classes(posterior, *arguments, **options), copy.deepcopy(posterior.state_dict())
    net = make_net()
    names = [(name, f"{name}.loc" if f"{name}.loc" in state else name) for name in net.state_dict()]
    net.load_state_dict({name: state[there] for name, there in names})
    mean = mean_network(posterior)
    got = predict_classes(mean, *arguments, num_samples=1).probabilities
    torch.testing.assert_close(got, net.eval()(x).detach().softmax(1), rtol=1e-12, atol=0)
    after = predict_classes(posterior, *arguments, **options)
    assert torch.equal(before.probabilities, after.probabilities)
    assert all(torch.equal(value, state[name]) for name, value in posterior.state_dict().items())


def test_an_ensemble_has_no_mean_network():
    with pytest.raises(NotImplementedError, match="deep ensemble has no mean network"):
        mean_network(DeepEnsemble(make_net, 2, [0, 1]))


# --- a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mean_field", "ensemble"])
def test_a_run_writes_it_and_a_predictor_has_it(digits, tmp_path, family):
    flags = ["--data.shards", str(digits), "--num_epochs", "2", "--num_samples", "2", "--num_test_samples", "2"]
    assert main(["train", *flags, "--posterior.family", family, "--run_dir", str(tmp_path / "run")]) == 0
    path = tmp_path / "run/evaluation.json"
    written = json.loads(path.read_text())["posterior"]
    predictor = hpc_bnn.load(tmp_path / "run", "newest")
    found = predictor.check_up()
    assert found["tensors"] == written["tensors"] and found["kl"] == written["kl"] and found["snr"] == written["snr"]
    if family == "ensemble":
        assert written["mean_network"] == {} and "No mean network" in written["notes"][-1]
    else:
        assert found["kl"] == pytest.approx(predictor.posterior.kl().item(), rel=1e-5)
        x, y = predictor.experiment.open("test").fetch(slice(None))
        source = TensorSource(x, y, 10).on("cpu", torch.float32)
        again = evaluate_dataset(
            DeterministicNetwork(predictor.posterior.module), Categorical(10), ONE, source, num_samples=1
        )
        assert written["mean_network"] == pytest.approx(again.metrics, rel=1e-5)
    assert main(["evaluate", str(tmp_path / "run"), "--check_up", "false"]) == 0
    assert "posterior" not in json.loads(path.read_text())
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(path.read_text())["posterior"] == written
