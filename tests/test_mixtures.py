"""Mixtures over the samples, against scoringrules, scipy, and the definition by brute force."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import scoringrules
import torch

from hpc_bnn.likelihoods import mixtures as module
from hpc_bnn.likelihoods.mixtures import BernoulliMixture, GaussianMixture, Members, PoissonMixture, StudentTMixture

K, N, T = 7, 5, 3


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(K, N, T)), rng.uniform(0.2, 1.5, (K, N, T)), rng.normal(size=(N, T)) * 2


def tensors(*arrays):
    return [torch.from_numpy(np.ascontiguousarray(array, np.float64)) for array in arrays]


def mixtures():
    """Yield (mixture, y, frozen distributions of scipy [K][N][T])."""
    loc, scale, y = draw()
    yield GaussianMixture(*tensors(loc, scale)), y, scipy.stats.norm(loc, scale)
    yield StudentTMixture(*tensors(loc, scale), df=3.5), y, scipy.stats.t(3.5, loc, scale)
    yield PoissonMixture(*tensors(np.exp(loc + 1))), np.round(np.exp(y)), scipy.stats.poisson(np.exp(loc + 1))
    yield BernoulliMixture(*tensors(scale / 2)), (y > 0).astype(float), scipy.stats.bernoulli(scale / 2)


@pytest.fixture(params=range(4), ids=["gaussian", "student_t", "poisson", "bernoulli"])
def case(request):
    return list(mixtures())[request.param]


def test_distribution_functions_are_those_of_scipy(case):
    mixture, y, components = case
    np.testing.assert_allclose(mixture.cdf(*tensors(y)).numpy(), components.cdf(y).mean(0), rtol=1e-12)


def test_crps_is_the_integral_of_the_squared_difference_and_the_fair_one_has_no_own_pairs(case):
    mixture, y, components = case
    got, fair = (score.numpy() for score in mixture.crps(*tensors(y)))
    steps = isinstance(mixture, (PoissonMixture, BernoulliMixture))
    # nodes: all whole numbers up to 1000, or a fine grid whose tails are integrated by scipy
    z = np.arange(0, 1000.0) if steps else np.linspace(-60, 60, 60_001)
    spacing, f = (1.0 if steps else z[1] - z[0]), components.cdf(z[:, None, None, None])
    mean = f.mean(1)
    brute = ((mean - (y <= z[:, None, None])) ** 2).sum(0) * spacing
    own = 2 * (f * (1 - f)).sum((0, 1)) * spacing / K  # mean over i of E|Y_i - Y_i'|
    pairs = 2 * (mean * (1 - mean)).sum(0) * spacing
    distance = brute + pairs / 2
    expected_fair = distance - (pairs * K**2 - own * K) / (2 * K * (K - 1))
    tolerance = 1e-8 if steps else 1e-3  # of the brute force: steps at y, tails of Student's t
    np.testing.assert_allclose(got, brute, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(fair, expected_fair, rtol=tolerance, atol=tolerance)


def test_quantiles_invert_the_distribution_function(case):
    mixture, _, _ = case
    for level in (0.025, 0.31, 0.5, 0.95):
        quantile = mixture.quantile(level)
        if isinstance(mixture, (PoissonMixture, BernoulliMixture)):  # the least number that reaches the level
            assert (mixture.cdf(quantile) >= level).all() and (mixture.cdf(quantile - 1) < level).all()
        else:
            torch.testing.assert_close(mixture.cdf(quantile), torch.full_like(quantile, level), rtol=0, atol=1e-7)


def test_crps_equals_scoringrules():
    loc, scale, y = draw(1)
    components = [np.moveaxis(part, 0, -1) for part in (loc, scale)]
    got, _ = GaussianMixture(*tensors(loc, scale)).crps(*tensors(y))
    np.testing.assert_allclose(got, scoringrules.crps_mixnorm(y, *components), rtol=1e-9)
    got, fair = Members(*tensors(loc)).crps(*tensors(y))
    ensemble = components[0]
    np.testing.assert_allclose(got, scoringrules.crps_ensemble(y, ensemble, estimator="nrg"), rtol=1e-12)
    np.testing.assert_allclose(fair, scoringrules.crps_ensemble(y, ensemble, estimator="fair"), rtol=1e-12)
    one = StudentTMixture(*tensors(loc[:1], scale[:1]), df=4.0).crps(*tensors(y))
    np.testing.assert_allclose(one[0], scoringrules.crps_t(y, 4.0, loc[0], scale[0]), rtol=1e-6)
    assert one[1].isnan().all()
    rates, counts = np.exp(loc[:1] + 2), np.round(np.exp(y + 1))
    one, _ = PoissonMixture(*tensors(rates)).crps(*tensors(counts))
    np.testing.assert_allclose(one, scoringrules.crps_poisson(counts, rates[0]), rtol=1e-8)


def test_crps_of_counts_of_any_size(monkeypatch):
    """Of very many counts by the formula of normal distributions; neither they nor rates that are no numbers take long."""
    rates = np.exp(np.random.default_rng(0).normal(7, 0.2, (K, 40, 1)))
    y = np.round(rates.mean(0)) + np.arange(-20, 20)[:, None] * 20
    mixture = PoissonMixture(*tensors(rates))
    exact = mixture.crps(*tensors(y))
    monkeypatch.setattr(module, "MAX_COUNTS", 100)
    for got, expected in zip(mixture.crps(*tensors(y)), exact):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert not torch.equal(got, expected)
    rates, y = np.array([[3e8], [150.0], [7.0]]), np.array([1000.0])
    distances = np.abs(rates - rates.T[:, None]).sum() / 9
    got = PoissonMixture(*tensors(rates)).crps(*tensors(y))[0]
    np.testing.assert_allclose(got, np.abs(rates - y).mean() - distances / 2, rtol=1e-4)
    assert PoissonMixture(torch.tensor([[3.0], [math.inf]])).crps(torch.ones(1))[0].isnan()


@pytest.mark.parametrize("rate", [1e6, 1e15, 1e16, 1e17, 1e18, 1e30])
def test_quantiles_of_counts_of_any_size(rate):
    """Above 2^53 they are numbers of float64 next to the quantile; the median of the larger rate's lower tail."""
    for level in (0.05, 0.5, 0.9):
        got = PoissonMixture(torch.full((2, 1), rate, dtype=torch.float64)).quantile(level)
        expected = rate + scipy.stats.norm.ppf(level) * math.sqrt(rate)
        assert got.item() == pytest.approx(expected, abs=0.02 * math.sqrt(rate) + 4 * np.spacing(rate))
    for lost in (math.inf, math.nan):
        rates = torch.tensor([[lost, 3.0], [rate, 3.0]], dtype=torch.float64)
        lost, sound = PoissonMixture(rates).quantile(0.5).tolist()
        assert math.isnan(lost) and sound == 3


@pytest.mark.parametrize(("narrow", "tolerance"), [(0.3, 1e-6), (0.1, 1e-3), (0.01, 0.03)])
def test_pairs_of_student_t_against_scipy_where_components_are_narrow(narrow, tolerance):
    loc = np.linspace(-1, 1, K)[:, None, None]
    scale = np.full_like(loc, narrow)
    y = np.array([[0.3]])

    def square(z):
        return (scipy.stats.t(4, loc, scale).cdf(z).mean() - (z >= 0.3)) ** 2

    expected = sum(
        scipy.integrate.quad(square, a, b, limit=500)[0]
        for a, b in ((-np.inf, -1.5), *((c, c + 0.1) for c in np.arange(-1.5, 1.45, 0.1)), (1.5, np.inf))
    )
    got, _ = StudentTMixture(*tensors(loc, scale), df=4.0).crps(*tensors(y))
    assert got.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("df", [1.01, 1.2, 1.49, 2.5, 30.0])
def test_crps_of_student_t_with_tails_of_any_length(df):
    """Of one sample against scoringrules; of several, of other scales too, against the integral of the definition."""
    loc, scale, y = draw(2)
    one, _ = StudentTMixture(*tensors(loc[:1], scale[:1]), df=df).crps(*tensors(y))
    np.testing.assert_allclose(one, scoringrules.crps_t(y, df, loc[0], scale[0]), rtol=1e-9)
    loc, scale, y = loc[:, 0, 0], 0.5 + scale[:, 0, 0], y[0, 0]
    u = np.linspace(-35, 60, 5001)
    expected, steps = 0.0, np.exp(u)[:, None]
    for sign in (-1, 1):  # beyond y the distribution function squared, or what is left of it
        beyond = scipy.stats.t(df).sf((sign * (y - loc) + steps) / scale).mean(1)
        expected += (beyond**2 * np.exp(u)).sum() * (u[1] - u[0])
    got, _ = StudentTMixture(*tensors(loc[:, None], scale[:, None]), df=df).crps(*tensors([y]))
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_pit_is_uniform_where_the_mixture_is_right(case):
    """Mean and second moment of the PIT of draws from the mixture; thresholds in standard errors."""
    mixture, _, components = case
    num_draws, rng = 4000, np.random.default_rng(3)
    one = mixture.rows(0, 1)
    which = rng.integers(0, K, num_draws)
    draws = components.rvs(size=(num_draws, K, N, T), random_state=rng)[np.arange(num_draws), which, :1, :1]
    ends = [one.pit(torch.from_numpy(np.broadcast_to(d, (1, T)).astype(float).copy())) for d in draws]
    low, high = (np.array([end[i][0, 0].item() for end in ends]) for i in (0, 1))
    u = low + rng.uniform(size=num_draws) * (high - low)
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / num_draws)
    assert abs((u**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / num_draws)


def test_ranks_of_exchangeable_members_are_uniform_and_quantiles_cover_as_they_say():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(K + 1, 20_000, 1))
    members, y = tensors(values[:-1], values[-1])
    low, high = Members(members).pit(y)
    torch.testing.assert_close(high - low, torch.full_like(low, 1 / (K + 1)))
    counts = np.bincount((low * (K + 1)).round().long().numpy().ravel(), minlength=K + 1)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    for level in (1 / 8, 0.5, 7 / 8):  # where a member is the quantile
        share = (y <= Members(members).quantile(level)).double().mean().item()
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / 20_000)
    tied = Members(torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1)).pit(torch.tensor([[1.0]]))
    assert [end.item() for end in tied] == [0, 0.75]


def test_units_and_rows():
    loc, scale, y = draw(2)
    mean, std = torch.tensor([[3.0, 0, -1]]).double(), torch.tensor([[10.0, 0.1, 2]]).double()
    for mixture in (
        GaussianMixture(*tensors(loc, scale)),
        StudentTMixture(*tensors(loc, scale), df=3.0),
        Members(*tensors(loc)),
    ):
        (y_tensor,) = tensors(y)
        scaled = mixture.in_units(mean, std)
        for got, expected in zip(scaled.crps(y_tensor * std + mean), mixture.crps(y_tensor)):
            torch.testing.assert_close(got, expected * std, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(scaled.rows(1, 3).cdf(y_tensor[1:3]), scaled.cdf(y_tensor)[1:3])
    with pytest.raises(NotImplementedError, match="PoissonMixture"):
        PoissonMixture(torch.ones(1, 1, 1)).in_units(mean, std)


@pytest.mark.parametrize("level", [0.1, 0.5])
def test_a_quantile_does_not_depend_on_the_targets_beside_it(level):
    """A process grid deals them out: the same to rounding, although they take different numbers of iterations."""
    generator = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(2, 9, 40, 1, generator=generator, dtype=torch.float64)
    scale = (3 * scale).exp()
    whole = GaussianMixture(loc, scale).quantile(level)
    parts = [GaussianMixture(loc[:, part], scale[:, part]).quantile(level) for part in torch.arange(40).split(7)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
