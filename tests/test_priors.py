"""Priors: densities, scores, closed-form KL; against torch.distributions and quadrature, in float64."""

import math

import pytest
import torch
from torch import distributions as D
from torch import nn

from hpc_bnn.errors import ConfigError
from hpc_bnn.posteriors import (
    FlatLayout,
    GaussianPrior,
    LaplacePrior,
    MeanFieldGaussian,
    ScaleMixturePrior,
    StudentTPrior,
)

LAYOUT = FlatLayout({"weight": torch.Size([4, 8]), "bias": torch.Size([4])})
W = torch.linspace(-2.1, 1.9, 36, dtype=torch.float64)
FAN_IN = torch.cat([torch.full((32,), 8**-0.5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)])


def exact(value):
    return torch.as_tensor(value, dtype=torch.float64)


def gaussian(scale, mean=0.0):
    return D.Normal(exact(mean), exact(scale))


PRIORS = {
    "gaussian": (GaussianPrior(0.7, mean=0.3), gaussian(0.7, 0.3)),
    "gaussian_fan_in": (GaussianPrior("fan_in"), gaussian(FAN_IN)),
    "gaussian_initial": (GaussianPrior(0.5, mean="initial"), gaussian(0.5, W + 1)),
    "gaussian_both": (GaussianPrior("fan_in", mean="initial"), gaussian(FAN_IN, W + 1)),
    "laplace": (LaplacePrior(0.4, mean=-0.2), D.Laplace(exact(-0.2), exact(0.4))),
    "laplace_fan_in": (LaplacePrior("fan_in"), D.Laplace(exact(0.0), FAN_IN)),
    "mixture": (
        ScaleMixturePrior(1.5, 0.1, 0.25),
        D.MixtureSameFamily(D.Categorical(exact([0.25, 0.75])), gaussian([1.5, 0.1])),
    ),
    "student_t": (StudentTPrior(3.0, 0.6), D.StudentT(exact(3.0), exact(0.0), exact(0.6))),
    "student_t_fan_in": (StudentTPrior(4.0, "fan_in"), D.StudentT(exact(4.0), exact(0.0), FAN_IN)),
}


@pytest.fixture(params=PRIORS)
def case(request):
    prior, reference = PRIORS[request.param]
    return prior.bind(LAYOUT, W + 1), reference


def test_log_density_and_score(case):
    prior, reference = case
    w = W.clone().requires_grad_()
    expected = reference.log_prob(w).sum()
    torch.testing.assert_close(prior.log_prob(W), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.score(W), torch.autograd.grad(expected, w)[0], rtol=1e-11, atol=1e-12)


def test_closed_form_kl_equals_quadrature_and_its_gradient_autograd(case):
    prior, reference = case
    if not prior.closed_form:
        with pytest.raises(NotImplementedError):
            prior.cross_entropy(W, W.exp())
        return
    loc, log_scale = (W * 0.5).requires_grad_(), (0.3 * W - 1).detach().requires_grad_()
    # trapezoids over 12 standard deviations: spectral accuracy for the Gaussian, h^2 at the Laplace kink
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)[:, None]
    q = D.Normal(loc.detach(), log_scale.detach().exp())
    total = 0.0
    for part in torch.arange(36).split(6):
        single = reference if not reference.batch_shape or reference.mean.ndim == 0 else None
        w = q.loc[part] + q.scale[part] * z
        p = single or type(reference)(reference.loc.expand(36)[part], reference.scale.expand(36)[part])
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        log_q = -0.5 * z * z - 0.5 * math.log(2 * math.pi) - q.scale[part].log()
        total += torch.trapezoid(density * (log_q - p.log_prob(w)), z.squeeze(1), dim=0).sum()
    kl = prior.kl_from_gaussian(loc, log_scale, log_scale.exp())
    by_weight = prior.kl_by_weight(loc.detach()[4:], log_scale.detach().exp()[4:], slice(4, 36))
    assert by_weight.shape == (32,)
    rest = prior.kl_by_weight(loc.detach()[:4], log_scale.detach().exp()[:4], slice(0, 4)).sum()
    assert (by_weight.sum() + rest).item() == pytest.approx(kl.item(), rel=1e-12)
    assert kl.item() == pytest.approx(total.item(), rel=1e-7)
    got = torch.zeros(36).double(), torch.zeros(36).double()
    with torch.no_grad():
        prior.add_kl_gradient_(*got, loc, log_scale.exp(), torch.tensor(0.25, dtype=torch.float64))
    for mine, expected in zip(got, torch.autograd.grad(0.25 * kl, [loc, log_scale])):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("prior", "width", "log_prob"),
    [
        (ScaleMixturePrior(1.5, 0.1, 0.25), 0.1, PRIORS["mixture"][1].log_prob),
        (StudentTPrior(3.0, 0.6), 0.6, PRIORS["student_t"][1].log_prob),
    ],
    ids=["mixture", "student_t"],
)
def test_a_kl_by_quadrature_has_the_error_that_it_states(prior, width, log_prob):
    """Of weights from the narrow component to far in the tails, with scales of 0.003 to 10 widths of the prior."""
    loc, scale = (
        torch.cartesian_prod(torch.linspace(-2, 2, 9), torch.logspace(-2.5, 1, 15) * width).double().T.contiguous()
    )
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    log_q = -0.5 * z * z - 0.5 * math.log(2 * math.pi)
    for mean, std, got in zip(loc, scale, prior.kl_by_weight(loc, scale, slice(None))):
        expected = torch.trapezoid(log_q.exp() * (log_q - std.log() - log_prob(mean + std * z)), z)
        assert abs(got - expected) < (0.01 if std > width else 1e-6), (mean, std, got, expected)


def test_which_kl_is_visible():
    def kind(prior):
        return MeanFieldGaussian(nn.Linear(2, 2), prior=prior).capabilities.kl

    assert kind(GaussianPrior()) == kind(LaplacePrior()) == "closed form"
    assert kind(StudentTPrior()) == kind(ScaleMixturePrior()) == "Monte Carlo"
    with pytest.raises(NotImplementedError, match="Monte Carlo"):
        MeanFieldGaussian(nn.Linear(2, 2), prior=StudentTPrior()).kl()


@pytest.mark.parametrize("kind", [GaussianPrior, LaplacePrior, StudentTPrior, ScaleMixturePrior])
def test_senseless_scales_are_refused(kind):
    name = "std" if kind in (GaussianPrior, ScaleMixturePrior) else "scale"
    for value in (0, -1.0, math.nan, math.inf, "wide"):
        with pytest.raises(ConfigError, match=f"^{name} {value}: must be positive and finite"):
            kind(**{name: value})
    with pytest.raises(ConfigError, match=rf"^{name} tensor\(1.\) \(a Tensor\): must be"):
        kind(**{name: torch.tensor(1.0)})
    for mean in (math.nan, "intial", torch.zeros(3)) if kind in (GaussianPrior, LaplacePrior) else ():
        with pytest.raises(ConfigError, match=r"^mean (?s:.*): must be a finite number or initial"):
            kind(mean=mean)
    with pytest.raises(ConfigError, match="fraction"):
        ScaleMixturePrior(fraction=1.0)
