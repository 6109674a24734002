"""Objectives: exact on every grid, against definitions of one line, with the communication that they state."""

import math

import pytest
import torch
from modules import NUM_CLASSES, make_examples, make_module
from reference import relative_difference
from torch import nn
from torch.distributions import Normal

from hpc_bnn import (
    Bernoulli,
    Categorical,
    Crps,
    DeepEnsemble,
    Energy,
    Gathered,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    LogPredictive,
    MeanFieldGaussian,
    MomentMatched,
    NegativeElbo,
    Poisson,
    StudentT,
    VariationalStep,
    testing,
)
from hpc_bnn.errors import ConfigError
from hpc_bnn.likelihoods.mixtures import CHUNK_ELEMENTS
from hpc_bnn.noise import Key, Stream
from hpc_bnn.reductions import LogMeanExp, Moments


def log_lik(likelihood):
    """l[s, b] of outputs [K, B, ...]."""
    return lambda outputs, y: torch.stack([likelihood.log_prob(o, y) for o in outputs])


def elbo(likelihood):
    return lambda outputs, y: -log_lik(likelihood)(outputs, y).mean()


def log_predictive(likelihood):
    return lambda f, y: -(torch.logsumexp(log_lik(likelihood)(f, y), 0) - math.log(len(f))).mean()


def moment_matched(likelihood):
    def loss(outputs, y):
        mean = torch.stack([likelihood.mean(o) for o in outputs])
        inner = torch.stack([likelihood.variance(o) for o in outputs]).mean(0)
        total = inner + mean.var(0, correction=0)
        return -Normal(mean.mean(0), total.sqrt()).log_prob(y.view_as(total).to(total)).sum(1).mean()

    return loss


def pair_factor(num_samples, fairness):
    return (1 - (1 - fairness) / num_samples) / (num_samples * (num_samples - 1)) if num_samples > 1 else 0.0


def crps(fairness, w):
    def loss(f, y):
        pairs = (f[:, None] - f[None]).abs().sum((0, 1))
        score = (f - y).abs().mean(0) - 0.5 * pair_factor(len(f), fairness) * pairs
        return (score * w / w.mean()).mean()

    return loss


def energy(fairness, beta, w):
    def norm(d):
        square = (d.square() * w / w.mean()).sum(-1)
        return torch.where(square > 0, square.clamp_min(1e-300), 1.0).pow(beta / 2) * (square > 0)

    def loss(f, y):
        pairs = norm(f[:, None] - f[None]).sum((0, 1))
        return (norm(f - y).mean(0) - 0.5 * pair_factor(len(f), fairness) * pairs).mean()

    return loss


def log_cosh(members, y):
    """An objective of a user: couples the samples through their mean."""
    return torch.log(torch.cosh(members.mean(0) - y)).sum(-1) + 0.1 * members.var(0, correction=0).sum(-1)


W = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
LIKELIHOODS = {
    "categorical": Categorical(3),
    "bernoulli": Bernoulli(2),
    "poisson": Poisson(2),
    "gaussian_fixed": Gaussian(2, scale=0.6),
    "gaussian_learned": Gaussian(2, scale="learned", init_scale=0.8),
    "gaussian_heteroscedastic": Gaussian(2),
    "student_t": StudentT(2, df=3.5),
}
CASES = {
    f"{objective.name}_{name}": (objective, likelihood, definition(likelihood))
    for objective, definition in (
        (NegativeElbo(), elbo),
        (LogPredictive(), log_predictive),
        (MomentMatched(), moment_matched),
    )
    for name, likelihood in LIKELIHOODS.items()
    if likelihood.has_variance or objective.name != "moment_matched"
}
CASES |= {
    f"crps_{fairness}": (Crps(fairness, w), Implicit(3), crps(fairness, w))
    for fairness, w in ((0.0, torch.ones(3)), (0.95, W), (1.0, W))
}
CASES |= {
    f"energy_{fairness}_{beta}": (Energy(fairness, beta, w), Implicit(3), energy(fairness, beta, w))
    for fairness, beta, w in ((0.0, 1.0, torch.ones(3)), (0.95, 1.0, W), (1.0, 1.5, W), (0.95, 0.5, W))
}
# So many targets that those of an example lie on several ranks; of 13 examples ranks have whole ones, and some of others
MANY = torch.linspace(0.5, 1.5, 300, dtype=torch.float64)
CASES["crps_of_many"] = (Crps(0.95, MANY), Implicit(300), crps(0.95, MANY))
CASES["energy_of_many"] = (Energy(0.95, 1.0, MANY), Implicit(300), energy(0.95, 1.0, MANY))
CASES["own"] = (Gathered(log_cosh), Gaussian(2, scale=1.0), lambda f, y: log_cosh(f, y).mean())
OF_DENSITIES = Gathered(lambda log_prob, y: math.log(len(log_prob)) - log_prob.logsumexp(0), of="log_prob")
CASES["own_of_densities"] = (OF_DENSITIES, Gaussian(2), log_predictive(Gaussian(2)))
CASES["own_of_classes"] = (OF_DENSITIES, Categorical(3), log_predictive(Categorical(3)))


QUICK = {"elbo_categorical", "log_predictive_gaussian_heteroscedastic", "moment_matched_gaussian_learned"}
QUICK |= {"log_predictive_student_t", "crps_0.95", "energy_0.95_1.0", "energy_of_many", "own", "own_of_densities"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_loss_and_gradient_equal_the_definition(comm, case):
    objective, likelihood, definition = CASES[case]
    needs_pairs = getattr(objective, "fairness", 0) > 0
    counts = (16, 5, "one per rank") if comm.grid.sample_size > 1 or not needs_pairs else (16, 5)
    testing.check_objective(comm, objective, definition, likelihood=likelihood, num_samples=counts)


@pytest.mark.parametrize("case", ["crps_of_many", "energy_of_many", "energy_0.95_1.0"])
def test_small_parts_of_the_targets_give_the_same(comm, case, monkeypatch):
    """Parts end within examples and at the ends of shares, and pairs of members are taken singly."""
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 16)
    objective, likelihood, definition = CASES[case]
    options = {"num_samples": (5,), "chunk_sizes": (5,), "dtypes": (torch.float64,)}
    testing.check_objective(comm, objective, definition, likelihood=likelihood, **options)


@pytest.mark.parametrize("score", [Crps(), Energy()], ids=lambda score: score.name)
def test_a_score_can_be_a_part_of_an_own_objective(score):
    x = torch.randn(4, 2, 3, generator=Key(0, Stream.NOISE).generator(), dtype=torch.float64)
    assert torch.autograd.gradcheck(score.score, (x.requires_grad_(), torch.zeros(2, 3, dtype=torch.float64)))


@pytest.mark.parametrize("wrong", ["loss", "gradient", "nan", "per rank"])
def test_the_check_sees_what_is_wrong(comm, wrong):
    class Wrong(LogPredictive):
        def begin(self, y, samples, num_samples):
            coupling = super().begin(y, samples, num_samples)
            if wrong == "loss":
                data_term = coupling.data_term
                coupling.data_term = lambda: data_term() * (1 + 1e-4)
            elif wrong == "gradient":
                gradient = coupling.gradient
                coupling.gradient = lambda samples, t: gradient(samples, t) * (1 + 1e-4 * samples[0])
            elif wrong == "nan":
                coupling.gradient = lambda samples, t: t * math.nan
            else:  # what the published code does
                combine = coupling.combine
                coupling.combine = lambda comm: combine(GridComm(Grid()))
            return coupling

    likelihood = Categorical(3)
    if wrong == "per rank" and comm.grid.sample_size == 1:
        return testing.check_objective(comm, Wrong(), log_predictive(likelihood), likelihood=likelihood)
    with pytest.raises(AssertionError, match="log_predictive differs from its definition"):
        testing.check_objective(comm, Wrong(), log_predictive(likelihood), likelihood=likelihood)


def make_step(comm, objective, likelihood, **options):
    return testing.make_step(comm, objective, likelihood, torch.float64, **options)


def take_step(step, num_examples=testing.NUM_EXAMPLES):
    x, y = (t[:num_examples] for t in testing.make_examples(step.likelihood, torch.float64))
    part = step.comm.grid.local_examples(num_examples)
    return step(x[part], y[part], num_examples)


def test_the_log_predictive_is_below_the_negative_elbo(comm):
    terms = [
        take_step(make_step(comm, objective, Categorical(3), num_samples=7)).data_term
        for objective in (NegativeElbo(), LogPredictive())
    ]
    assert terms[1] < terms[0]  # Jensen


def energy_floats(B, c, K, grid):
    return c * B * 300 + K * len(grid.share(B * 300, "sample")) + B * K * (K + 1)


@pytest.mark.parametrize(
    "objective, likelihood, num_collectives, floats",
    [
        (LogPredictive(), Categorical(3), 2, lambda B, c, K, grid: 2 * B),
        (LogPredictive(), Gaussian(3), 2, lambda B, c, K, grid: 2 * B),
        (MomentMatched(), Gaussian(3), 2, lambda B, c, K, grid: 3 * B * 3),
        (Crps(), Implicit(3), 2, lambda B, c, K, grid: c * B * 3 + K * len(grid.share(B * 3, "sample"))),
        (Energy(), Implicit(3), 2, lambda B, c, K, grid: c * B * 3 + K * 3 * len(grid.share(B, "sample"))),
        (Energy(), Implicit(300), 3, lambda B, c, K, grid: energy_floats(B, c, K, grid)),
        (Gathered(log_cosh), Gaussian(3), 2, lambda B, c, K, grid: c * B * 3 + K * 3 * len(grid.share(B, "sample"))),
    ],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("num_samples", [8, 16])
@pytest.mark.parametrize("chunk_size", [1, 16])
def test_communication_is_what_the_docstring_says(
    comm, objective, likelihood, num_collectives, floats, num_samples, chunk_size
):
    step = make_step(comm, objective, likelihood, num_samples=num_samples, chunk_size=chunk_size)
    gradient = step.posterior.buffer.reduced.numel()
    axes = (comm.grid.sample_size > 1) + (comm.grid.data_size > 1)
    step.comparison.make_replicas_equal_(step.posterior)  # once, not in each step
    before = comm.traffic.num_collectives, comm.traffic.num_bytes
    take_step(step)
    part = comm.grid.local_examples(testing.NUM_EXAMPLES)
    num_local = len(comm.grid.local_samples(num_samples))
    has_group = comm.grid.sample_size > 1
    assert comm.traffic.num_collectives - before[0] == axes + num_collectives * has_group
    extra = floats(part.stop - part.start, num_local, num_samples, comm.grid) * has_group
    assert comm.traffic.num_bytes - before[1] == 8 * (axes * gradient + extra)


@pytest.mark.parametrize("case", ["log_predictive_categorical", "crps_0.95", "moment_matched_gaussian_learned", "own"])
def test_more_data_groups_than_examples(comm, case):
    objective, likelihood, _ = CASES[case]
    alone, step = (make_step(c, objective, likelihood, num_samples=6) for c in (GridComm(Grid()), comm))
    assert take_step(step, 1).nelbo == pytest.approx(take_step(alone, 1).nelbo, rel=1e-12)
    assert relative_difference(step.posterior.loc, alone.posterior.loc) < 1e-12


def test_one_pass_where_one_chunk_holds_the_samples_of_the_rank(comm):
    mine = len(comm.grid.local_samples(8))
    passes = {}
    for chunk_size in (1, mine - 1, mine, 99):
        if chunk_size:
            step = make_step(comm, LogPredictive(), Categorical(3), num_samples=8, chunk_size=chunk_size)
            take_step(step)
            passes[chunk_size] = step.num_passes
    assert passes == {size: 2 if size < mine else 1 for size in passes}
    single = make_step(comm, LogPredictive(), Categorical(3), num_samples=comm.grid.sample_size)
    take_step(single)
    assert single.num_passes == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_tiny_likelihoods_keep_their_digits(comm, dtype):
    """Log-likelihoods of -700 to -1000 nats: exp underflows, the shifted sum does not."""
    log_probs = (-700 - 300 * torch.rand(6, 4, generator=Key(0, Stream.NOISE).generator(), dtype=torch.float64)).to(
        dtype
    )
    log_probs[0, 3] = log_probs[1, 3] + 1
    mine = comm.grid.local_samples(6)
    density = LogMeanExp(6)
    for sample in mine:
        density.add(log_probs[sample : sample + 1])
    density.exchange(comm)
    expected = torch.logsumexp(log_probs.double(), 0) - math.log(6)
    accuracy = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(density.log_mean.double(), expected, rtol=accuracy, atol=0)
    responsibilities = density.responsibilities(log_probs[mine.start : mine.stop]).sum(0)
    comm.sum_(responsibilities, "sample")
    torch.testing.assert_close(responsibilities, torch.ones(4, dtype=dtype), rtol=accuracy, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_small_spread_on_a_large_mean_keeps_its_digits(comm, dtype):
    """Predictions of 1000 with a spread of 0.01: the difference of squares would have no digit left in float32."""
    f = 1000 + 0.01 * torch.randn(8, 5, 1, generator=Key(0, Stream.NOISE).generator(), dtype=torch.float64)
    f = f.to(dtype)
    mine = comm.grid.local_samples(8)
    moments = Moments(8)
    for sample in mine:
        part = f[sample : sample + 1]
        moments.add(torch.stack([part, torch.ones_like(part)], dim=2))
    moments.exchange(comm)
    expected = f.double().var(0, correction=0)
    tolerance = {torch.float32: 2e-2, torch.float64: 1e-9}[dtype]  # eps * 1000 / 0.01 of the spread
    torch.testing.assert_close(moments.epistemic.double(), expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(moments.aleatoric, torch.ones(5, 1, dtype=dtype))


@pytest.mark.parametrize("fairness", [0.0, 1.0])
def test_scores_equal_scoringrules_on_gathered_samples(comm, fairness):
    import scoringrules

    generator = Key(3, Stream.NOISE).generator()
    members = torch.randn(7, 4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    mine = comm.grid.local_samples(7)
    estimator = "fair" if fairness else "nrg"
    expected = {
        "crps": scoringrules.crps_ensemble(y.numpy(), members.movedim(0, -1).numpy(), estimator=estimator).mean(1),
        "energy": scoringrules.es_ensemble(y.numpy(), members.movedim(0, 1).numpy(), estimator=estimator),
    }
    for objective in (Crps(fairness), Energy(fairness)):
        coupling = objective.begin(y, mine, 7)
        coupling.see(mine, members[mine.start : mine.stop])
        coupling.combine(comm)
        total = coupling.data_term().clone()
        comm.sum_(total, "sample")
        assert total.item() == pytest.approx(expected[objective.name].sum(), rel=1e-12)


def test_weights_of_latitudes_broadcast_over_a_field(comm):
    """Members [K, B, channels, latitudes, longitudes], weights [latitudes, 1]."""
    weights = torch.tensor([0.2, 0.9, 0.4], dtype=torch.float64).view(3, 1)
    generator = Key(4, Stream.NOISE).generator()
    members = torch.randn(5, 2, 2, 3, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    mine = comm.grid.local_samples(5)
    w = weights.expand(2, 3, 4).flatten()
    flat, y_flat = members.flatten(2), y.flatten(1)
    definitions = {"crps": crps(0.95, w), "energy": energy(0.95, 1.0, w)}
    for objective in (Crps(weights=weights), Energy(weights=weights)):
        coupling = objective.begin(y, mine, 5)
        coupling.see(mine, members[mine.start : mine.stop])
        coupling.combine(comm)
        total = coupling.data_term().clone()
        comm.sum_(total, "sample")
        assert total.item() / 2 == pytest.approx(definitions[objective.name](flat, y_flat).item(), rel=1e-12)


def test_an_objective_of_wrong_shape_is_refused(comm):
    step = make_step(comm, Gathered(lambda f, y: (f - y).abs().mean(0)), Implicit(3), num_samples=4)
    with pytest.raises(ConfigError, match="one loss per example"):
        take_step(step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "objective", [MomentMatched(), Crps(), Energy(), Gathered(log_cosh)], ids=lambda objective: objective.name
)
def test_targets_of_another_dtype_and_without_a_dim(comm, objective, dtype):
    """Targets [B] of one number are [B, 1]; they come in the dtype of the file, not of the network."""
    likelihood = Gaussian(1) if isinstance(objective, MomentMatched) else Implicit(1)
    x = testing.make_examples(likelihood, torch.float32)[0]
    y = (torch.arange(testing.NUM_EXAMPLES) % 5).to(dtype)
    part = comm.grid.local_examples(testing.NUM_EXAMPLES)
    terms = []
    for targets in (y, y.float()[:, None]):
        step = testing.make_step(comm, objective, likelihood, torch.float32, num_samples=8)
        terms.append(step(x[part], targets[part], testing.NUM_EXAMPLES).data_term)
    assert terms[0] == terms[1]


@pytest.mark.parametrize(
    "objective, likelihood, num_samples, words",
    [
        (Gathered(log_cosh), Categorical(3), 8, "no mean"),
        (LogPredictive(), Implicit(2), 8, "no density"),
        (MomentMatched(), Categorical(3), 8, "variance"),
        (MomentMatched(), StudentT(2, df=2.0), 8, "variance"),
        (Crps(), Gaussian(2), 8, "implicit"),
        (Crps(), Implicit(2), 1, "or fairness 0"),
    ],
)
def test_what_does_not_exist_is_refused(objective, likelihood, num_samples, words):
    with pytest.raises(ConfigError, match=words):
        make_step(GridComm(Grid()), objective, likelihood, num_samples=num_samples)


def test_ensembles_refuse_a_coupled_objective(comm):
    ensemble = DeepEnsemble(lambda: nn.Linear(6, 3), 8, comm.grid.local_samples(8))
    with pytest.raises(ConfigError, match="members of an ensemble"):
        VariationalStep(
            ensemble, Categorical(3), torch.optim.SGD(ensemble.parameters(), lr=0.1), comm,
            num_samples=8, num_train_examples=9, objective=LogPredictive(),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["lenet_batchnorm", "torch_transformer_dropout"])
def test_two_passes_see_the_same_masks_and_keep_one_set_of_statistics(comm, name):
    states = []
    x, y = make_examples(11)
    for grid_comm in (GridComm(Grid()), comm):
        posterior = MeanFieldGaussian(make_module(name), init_std=0.05)
        optimizer = torch.optim.SGD(posterior.parameters(), lr=0.05)
        step = VariationalStep(
            posterior, Categorical(NUM_CLASSES), optimizer, grid_comm,
            num_samples=5, num_train_examples=100, objective=LogPredictive(),
        )  # fmt: skip
        part = grid_comm.grid.local_examples(11)
        for _ in range(2):
            step(x[part], y[part], 11)
        states.append({k: v.clone() for k, v in posterior.state_dict().items()})
    expected, got = states
    for key, value in got.items():
        if value.is_floating_point():
            assert torch.equal(value, expected[key]) or relative_difference(value, expected[key]) < 1e-12, key
        else:
            assert value == 2  # num_batches_tracked: one per step
