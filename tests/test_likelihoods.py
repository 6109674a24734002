"""Log-densities, means and variances against torch.distributions; learned scales; what is refused."""

import math

import pytest
import torch
from torch import distributions as D
from torch import nn

from hpc_bnn import (
    Bernoulli,
    Categorical,
    DeterministicNetwork,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    MeanFieldGaussian,
    Poisson,
    StudentT,
    VariationalStep,
)
from hpc_bnn.config import LikelihoodConfig
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.likelihoods import build_likelihood
from hpc_bnn.noise import Key, Stream


def outputs_and_targets(num_outputs, num_targets, place=()):
    generator = Key(1, Stream.NOISE).generator()
    f = torch.randn(5, num_outputs, *place, generator=generator, dtype=torch.float64)
    return f, torch.randint(0, 2, (5, num_targets, *place), generator=generator).double()


CASES = {
    "bernoulli": (Bernoulli(2), lambda f: D.Bernoulli(logits=f)),
    "poisson": (Poisson(2), lambda f: D.Poisson(f.exp())),
    "gaussian_fixed": (Gaussian(2, scale=0.3), lambda f: D.Normal(f, 0.3)),
    "gaussian": (Gaussian(2), lambda f: D.Normal(f[:, :2], f[:, 2:].exp())),
    "student_t": (StudentT(2, df=3.5), lambda f: D.StudentT(3.5, f[:, :2], f[:, 2:].exp())),
    "student_t_fixed": (StudentT(2, scale=0.3), lambda f: D.StudentT(4.0, f, 0.3)),
}


@pytest.mark.parametrize("place", [(), (3, 4)], ids=["vector", "field"])
@pytest.mark.parametrize("case", CASES)
def test_density_mean_and_variance_equal_torch_distributions(case, place):
    likelihood, reference = CASES[case]
    f, y = outputs_and_targets(likelihood.num_outputs, 2, place)
    distribution = reference(f)
    expected = distribution.log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(f, y), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likelihood.mean(f), distribution.mean.expand(y.shape), rtol=1e-12, atol=0)
    torch.testing.assert_close(likelihood.variance(f), distribution.variance.expand(y.shape), rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", [(), (3, 4)], ids=["vector", "field"])
def test_categorical_equals_torch_distributions(place):
    f, _ = outputs_and_targets(3, 1, place)
    y = torch.arange(5 * math.prod(place)).view(5, *place) % 3
    distribution = D.Categorical(logits=f.movedim(1, -1))
    expected = distribution.log_prob(y)
    expected = expected.flatten(1).sum(1) if place else expected
    torch.testing.assert_close(Categorical(3).log_prob(f, y), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(Categorical(3).probabilities(f), distribution.probs.movedim(-1, 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("ignore_index", [None, -56, 300])  # as uint8, -56 is 200
def test_classes_of_any_whole_number_dtype_are_compared_whole(dtype, ignore_index):
    y = torch.tensor([0, 100] if dtype == torch.int8 else [0, 200]).to(dtype)
    likelihood, f = Categorical(300, ignore_index=ignore_index), torch.randn(2, 300, dtype=torch.float64)
    assert likelihood.fits(y).all()
    assert ignore_index is None or likelihood.present(y).all()
    assert torch.equal(likelihood.log_prob(f, y), Categorical(300).log_prob(f, y.long()))
    if dtype.is_signed:
        assert not Categorical(100, ignore_index=255).fits(torch.tensor(-1, dtype=dtype)).any()
    terms = []
    for targets in (y, y.long()):
        with Key(0, Stream.INIT).global_generator():
            posterior = MeanFieldGaussian(nn.Linear(4, 300))
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
        options = {"num_samples": 1, "num_train_examples": 2}
        step = VariationalStep(posterior, likelihood, optimizer, GridComm(Grid()), **options)
        terms.append(step(torch.zeros(2, 4), targets, 2).data_term)
    assert terms[0] == terms[1] > 0


def test_targets_without_a_dim_are_one_target_and_no_shape_is_broadcast():
    f, y = outputs_and_targets(2, 1)
    assert torch.equal(Gaussian(1).log_prob(f, y), Gaussian(1).log_prob(f, y[:, 0]))
    with pytest.raises(ConfigError, match="num_outputs = 4"):
        Gaussian(2).log_prob(torch.zeros(5, 4), torch.zeros(5))  # [5, 2] against [5] would broadcast in silence
    with pytest.raises(ConfigError, match=r"likelihood\.wrap"):
        Gaussian(2, scale="learned").log_prob(torch.zeros(5, 2), torch.zeros(5, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_learned_scale_is_a_point_and_finds_the_noise(dtype):
    """Targets of noise 0.3 around a constant: maximum likelihood of the second kind gives the scale."""
    from hpc_bnn import GaussianPrior, Grid, GridComm, VariationalStep

    generator = Key(2, Stream.NOISE).generator()
    x = torch.ones(400, 1, dtype=dtype)
    y = 2 + 0.3 * torch.randn(400, 1, generator=generator, dtype=torch.float64).to(dtype)
    likelihood = Gaussian(1, scale="learned")
    network = likelihood.wrap(nn.Linear(1, 1).to(dtype))
    posterior = MeanFieldGaussian(network, prior=GaussianPrior(3.0), init_std=0.01, deterministic=())
    assert posterior.num_weights == 2 and set(posterior.state_dict()) >= {"log_scale", "network.weight.loc"}
    step = VariationalStep(
        posterior, likelihood, torch.optim.Adam(posterior.parameters(), lr=0.03), GridComm(Grid()),
        num_samples=4, num_train_examples=400,
    )  # fmt: skip
    for _ in range(400):
        step(x, y, 400)
    # the standard error of a scale from n examples is scale / sqrt(2 n)
    learned = posterior.state_dict()["log_scale"].exp().item()
    assert abs(learned - y.std().item()) < 4 * 0.3 / math.sqrt(2 * 400)


class Located(nn.Module):
    """Two inputs; returns what ``wrap`` makes of the locations."""

    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Bilinear(2, 2, 1), wrap

    def forward(self, a, b):
        return self.wrap(self.layer(a, b))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "wrap, output",
    [
        (lambda y: y, None),
        (lambda y: y[:, 0], None),
        (lambda y: {"mu": y, "features": y.expand(-1, 4), "loss": y.sum()}, "mu"),
        (lambda y: (None, [y]), lambda found: found[1][0]),
    ],
)
def test_a_learned_scale_goes_round_any_network(wrap, output, named):
    torch.manual_seed(0)
    likelihood, net = Gaussian(1, "learned", init_scale=0.5), Located(wrap).double()
    posterior = DeterministicNetwork(likelihood.wrap(net), output=output)
    x, y = torch.randn(2, 5, 2, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    expected = -D.Normal(net.layer(*x), 0.5).log_prob(y).mean().item()
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.0)
    step = VariationalStep(posterior, likelihood, optimizer, GridComm(Grid()), num_samples=1, num_train_examples=5)
    x = {"a": x[0], "b": x[1]} if named else (x[0], x[1])
    assert step(x, y, 5).data_term == pytest.approx(expected, rel=1e-6)


def test_a_learned_scale_of_other_targets_is_an_error_with_the_remedy():
    likelihood = Gaussian(2, "learned")
    with pytest.raises(ConfigError, match="gives 2 on dim 1"):
        likelihood.mean(likelihood.wrap(nn.Linear(3, 5))(torch.ones(4, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(2, scale=0.0),
        lambda: StudentT(2, df=-1.0),
        *(lambda kind=kind, n=n: kind(n) for kind in (Gaussian, Categorical) for n in (0, -1, 1.5, 2.0, "3", None)),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    "name, num_classes, shape, kind",
    [
        ("auto", 7, (), Categorical),
        ("auto", None, (3,), Gaussian),
        ("student_t", None, (), StudentT),
        ("poisson", None, (2,), Poisson),
        ("bernoulli", 2, (), Bernoulli),
        ("implicit", None, (2, 4, 5), Implicit),
    ],
)
def test_built_from_a_config(name, num_classes, shape, kind):
    likelihood = build_likelihood(LikelihoodConfig(name), num_classes, shape)
    assert type(likelihood) is kind
    assert likelihood.num_targets == (shape[0] if shape else 1)


@pytest.mark.parametrize("name, num_classes", [("gaussian", 3), ("categorical", None), ("bernoulli", 2)])
def test_classes_and_numbers_are_not_mixed_up(name, num_classes):
    with pytest.raises(ConfigError, match=r"^likelihood "):
        build_likelihood(LikelihoodConfig(name), num_classes, (2,))


@pytest.mark.parametrize(
    "likelihood, good, bad",
    [
        (Poisson(), [0.0, 3.0], [-1.0, 1.5, float("inf")]),
        (Bernoulli(), [0.0, 0.3, 1.0], [-0.1, 1.1, float("nan")]),
        (Gaussian(), [-1e30, 2.0], [float("inf"), float("nan")]),
        (Categorical(3), [0, 2], [-1, 3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_targets_outside_the_support_are_refused(likelihood, good, bad):
    likelihood.check_targets(torch.tensor(good))
    for value in bad:
        with pytest.raises(DataError, match=f"a target is {value:g}, and the likelihood {type(likelihood).__name__}"):
            likelihood.check_targets(torch.tensor([*good, value]))
    net = torch.nn.Linear(1, likelihood.num_outputs)
    posterior = MeanFieldGaussian(net)
    step = VariationalStep(posterior, likelihood, torch.optim.SGD(posterior.parameters(), lr=0.1), GridComm(Grid()),
                           num_samples=1, num_train_examples=2)  # fmt: skip
    with pytest.raises(DataError, match="a target is"):
        step(torch.ones(2, 1), torch.tensor([good[0], bad[0]]), 2)


@pytest.mark.parametrize("kind", [Gaussian, StudentT])
@pytest.mark.parametrize("scale", ["heteroscedastic", "learned"])
@pytest.mark.parametrize("min_scale", [0.0, 0.01, 0.3])
def test_a_scale_does_not_fall_below_its_floor(kind, scale, min_scale):
    likelihood = kind(2, scale, 0.5, min_scale=min_scale)
    log_scale = torch.linspace(-200, 3, 50).double()
    outputs = torch.cat([torch.zeros(50, 2), log_scale[:, None].expand(50, 2)], 1).double().requires_grad_()
    found = likelihood.mixture(outputs[None]).components[1][0, :, 0]
    torch.testing.assert_close(found, min_scale + log_scale.exp())
    likelihood.log_prob(outputs, torch.zeros(50, 2)).sum().backward()  # targets that are met: scales want to fall
    assert outputs.grad.isfinite().all()
    if min_scale:
        assert likelihood.log_prob(outputs, torch.zeros(50, 2)).max() < -2 * math.log(min_scale)
    if scale == "learned":
        module = likelihood.wrap(torch.nn.Linear(3, 2).double())
        start = likelihood.mixture(module(torch.zeros(1, 3).double())[None]).components[1]
        torch.testing.assert_close(start, torch.full_like(start, 0.5))
        with pytest.raises(ConfigError, match=r"min_scale 0\.5: must be below"):
            kind(2, scale, 0.5, min_scale=0.5)


def test_a_floor_makes_a_network_that_is_too_sure_pay_less():
    """A network that has seen its examples is sure without bound; on the next one that costs it 24 nats or more."""
    y = torch.tensor([[1.0]])
    sure = torch.tensor([[0.0, -5.0]])
    assert -Gaussian(1).log_prob(sure, y) > 1e4 and -Gaussian(1, min_scale=0.2).log_prob(sure, y) < 20
