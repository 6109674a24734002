"""Each family and estimator is its definition on every grid: walking, in batches, in micro-batches, noise kept or not."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from hpc_bnn import (
    Family,
    Gaussian,
    GaussianPrior,
    LaplacePrior,
    Posterior,
    ScaleMixturePrior,
    StudentTPrior,
    VariationalStep,
)
from hpc_bnn.capabilities import Capabilities
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors import Slot
from hpc_bnn.posteriors.families import Dropout, Ensemble, LowRank, MeanField, Point
from hpc_bnn.testing import DiffersError, check_family, family_is_exact  # noqa: F401


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def jitter(slots):
    """No two means, scales or factors alike."""
    generator = torch.Generator().manual_seed(3)
    for p in slots.values():
        p += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)


def mean_field(slots, eps, z):
    return slots["loc"] + slots["log_scale"].exp() * eps


def factor(slots):
    return slots["directions"] / slots["directions"].shape[1] ** 0.5


def low_rank(slots, eps, z):
    return slots["loc"] + slots["log_scale"].exp() * (eps + z(2) @ factor(slots))


def gaussian(slots):
    """Return q as a distribution of torch."""
    if "directions" not in slots:
        return Normal(slots["loc"], slots["log_scale"].exp())
    relative = torch.eye(len(slots["loc"])).double() + factor(slots).T @ factor(slots)
    scale = slots["log_scale"].exp()
    return MultivariateNormal(slots["loc"], scale[:, None] * relative * scale)


def to_prior(mean, std):
    """Return the KL to a Gaussian prior."""

    def kl(slots):
        q = gaussian(slots)
        if isinstance(q, Normal):
            return kl_divergence(q, Normal(number(mean), std)).sum()
        prior = MultivariateNormal(torch.full_like(q.loc, mean), std**2 * torch.eye(len(q.loc), dtype=torch.float64))
        return kl_divergence(q, prior)

    return kl


def cross_entropy_to_laplace(slots, std):
    """By E|w| of a Gaussian (the folded normal distribution) with the marginal standard deviations."""
    q = gaussian(slots)
    m, s = q.mean, q.variance.sqrt()
    magnitude = s * math.sqrt(2 / math.pi) * (-(m**2) / (2 * s**2)).exp() + m * torch.erf(m / (s * math.sqrt(2)))
    return (magnitude / std + math.log(2 * std)).sum()


def minus_entropy(slots):
    return -gaussian(slots).entropy().sum()


WIDE, LAPLACE = GaussianPrior(0.8, mean=0.1), LaplacePrior(0.3)
CASES = {
    "mean_field": dict(family=MeanField(WIDE, 0.2), weights=mean_field, kl=to_prior(0.1, 0.8)),
    "antithetic": dict(family=MeanField(WIDE, 0.2), weights=mean_field, kl=to_prior(0.1, 0.8), antithetic=True),
    "laplace": dict(
        family=MeanField(LAPLACE, 0.2),
        weights=mean_field,
        kl=lambda slots: minus_entropy(slots) + cross_entropy_to_laplace(slots, 0.3),
    ),
    "low_rank": dict(family=LowRank(2, WIDE, 0.2), weights=low_rank, kl=to_prior(0.1, 0.8)),
    "low_rank_antithetic": dict(family=LowRank(2, WIDE, 0.2), weights=low_rank, kl=to_prior(0.1, 0.8), antithetic=True),
    "low_rank_laplace": dict(
        family=LowRank(2, LAPLACE, 0.2),
        weights=low_rank,
        kl=lambda slots: minus_entropy(slots) + cross_entropy_to_laplace(slots, 0.3),
    ),
    "ensemble": dict(
        family=Ensemble(8, 0.7),
        weights=lambda slots, eps, z: slots["members"],
        log_prior=lambda w: -0.5 * w.square().sum() / 0.7**2,
        deterministic=(),
        num_samples=8,
    ),
    "point": dict(family=Point(), weights=lambda slots, eps, z: eps, chunk_sizes=(1,)),
    "dropout": dict(
        family=Dropout(0.25, 0.5),
        weights=lambda slots, eps, z: eps,
        kl=lambda slots: 0.75 / (2 * 0.25) * slots["points"].square().sum(),
        chunk_sizes=(1,),
    ),
}
"""Arguments of `check_family`."""

for name, prior in {"student_t": StudentTPrior(), "mixture": ScaleMixturePrior()}.items():
    CASES[name] = dict(family=MeanField(prior, 0.2), weights=mean_field, kl=minus_entropy, log_prior=prior.log_prob)
    CASES[f"low_rank_{name}"] = dict(
        family=LowRank(2, prior, 0.2), weights=low_rank, kl=minus_entropy, log_prior=prior.log_prob
    )


def noisy_layer(estimator):
    """Return the outputs of the network of `check_family` by the definition of an estimator."""

    def outputs(slots, eps, noise, x):
        def linear(number, name, h):
            mu, b = slots[f"{name}.weight.loc"], slots[f"{name}.bias.loc"]
            sigma, sigma_b = slots[f"{name}.weight.log_scale"].exp(), slots[f"{name}.bias.log_scale"].exp()
            mean = h @ mu.T + b
            if estimator == "local":
                zeta = noise(number, h, len(b))
                return mean + (h**2 @ sigma.T**2 + sigma_b**2).sqrt() * zeta
            r, q = (noise(2 * number + i, h, n, signs=True) for i, n in enumerate((h.shape[1], len(b))))
            perturbation = sigma * eps[f"{name}.weight"]
            return mean + sigma_b * eps[f"{name}.bias"] + ((h * r) @ perturbation.T) * q

        h = linear(0, "0", x)
        h = F.layer_norm(h, h.shape[1:], slots["1.weight"], slots["1.bias"])
        return linear(1, "3", h.tanh())

    return outputs


for name in ("local", "flipout"):
    CASES[name] = dict(
        family=MeanField(WIDE, 0.2), outputs=noisy_layer(name), kl=to_prior(0.1, 0.8), estimator=name, chunk_sizes=(1,)
    )


@pytest.mark.parametrize("name", CASES)
def test_family_is_its_definition(comm, name):
    check_family(comm, **CASES[name], start=jitter)


class Scaled(MeanField):
    """Wrong in one place, as a user may be."""

    def __init__(self, place):
        super().__init__(WIDE, 0.2)
        self.place = place

    def pull_back_(self, grads, slots, work, samples, g, draw):
        super().pull_back_(grads, slots, work, samples, g, draw)
        if self.place == "a gradient" and 1 in samples:
            grads["log_scale"].mul_(1 + 1e-6)

    def kl_(self, grads, slots, work, scalars, cross_entropy):
        return super().kl_(grads, slots, work, scalars, cross_entropy) * (1 + 1e-9 * (self.place == "the KL"))


@pytest.mark.parametrize("place", ["a gradient", "the KL"])
def test_a_family_that_is_not_its_definition_is_named(family_is_exact, place):  # noqa: F811
    with pytest.raises(DiffersError, match="mean-field Gaussian differs from its definition") as caught:
        family_is_exact(Scaled(place), mean_field, to_prior(0.1, 0.8), start=jitter)
    assert ("log_scale" if place == "a gradient" else "KL") in str(caught.value)


# --- a family as a user writes it ------------------------------------------------------------------------


class Sgld(Family):
    """Stochastic gradient Langevin dynamics (Welling and Teh, 2011): a chain for each sample, prior N(0, 1)."""

    name = "SGLD"
    capabilities = Capabilities("Monte Carlo", owner="sample")

    def __init__(self, num_train_examples):
        self.num_train_examples = num_train_examples

    def slots(self, weights, layout, samples):
        return {"chains": Slot(weights.clone(), owner="sample")}

    def sample_(self, slots, work, samples, draw, out):
        out.copy_(slots["chains"])

    def pull_back_(self, grads, slots, work, samples, g, draw):
        g.add_rows_to(grads["chains"])

    def finish_(self, grads, slots, work, scalars):
        grads["chains"].mul_(scalars.num_samples)  # each chain has its own objective, not a share of a mean

    def log_prior(self, weights):
        return -0.5 * weights.square().sum(), -weights

    def after_update_(self, grads, slots, samples, draw, scalars):
        scale = (2 * scalars.learning_rate / self.num_train_examples).sqrt()
        draw.affine_(slots["chains"], scale.to(slots["chains"]).expand(slots["chains"].shape[-1]), slots["chains"])


def test_a_user_s_chains_are_exact(family_is_exact):  # noqa: F811
    family_is_exact(
        Sgld(100),
        weights=lambda slots, eps, z: slots["chains"],
        log_prior=lambda w: -0.5 * w.square().sum(),
        start=jitter,
        deterministic=(),
        num_samples=8,
    )


def test_chains_of_a_linear_regression_have_their_moments(comm):
    """Covariance (A (I - lr A / 2N))^-1, A the precision of the posterior (exact for a Gaussian target)."""
    generator = torch.Generator().manual_seed(2)
    n, p, lr, num_chains = 12, 2, 0.3, 48 * comm.grid.sample_size  # as many for each rank on all grids
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    y = x @ number([[0.5], [-1.0]]) + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    with Key(4, Stream.INIT).global_generator():
        net = torch.nn.Linear(p, 1, bias=False).double()
    chains = Posterior(net, Sgld(n), samples=comm.grid.local_samples(num_chains))
    step = VariationalStep(
        chains, Gaussian(1, scale=0.5), torch.optim.SGD(chains.parameters(), lr=lr), comm,
        num_samples=num_chains, num_train_examples=n, seed=4, chunk_size=num_chains, batching="vmap",
    )  # fmt: skip
    precision = torch.eye(p).double() + x.T @ x / 0.5**2
    covariance = torch.linalg.inv(precision @ (torch.eye(p).double() - lr * precision / (2 * n)))
    mean = torch.linalg.solve(precision, (x.T @ y / 0.5**2)[:, 0])
    mine, seen = comm.grid.local_examples(n), []
    for number_of_step in range(70):
        step(x[mine], y[mine], n)
        if number_of_step >= 30 and number_of_step % 10 == 9:
            seen.append(chains.chains.detach().clone())
    parts = comm.gather_objects(torch.stack(seen), "sample")
    draws = torch.cat(parts, 1).flatten(0, 1)  # chains at distances of 10 steps
    count = len(draws)
    z = (draws.mean(0) - mean) / (covariance.diagonal() / count).sqrt()
    assert z.abs().max() < 5
    centred, variances = draws - mean, covariance.diagonal()
    error = (variances[:, None] * variances + covariance**2) / count
    z = (centred.T @ centred / count - covariance) / error.sqrt()
    assert z.abs().max() < 5
