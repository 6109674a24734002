"""What does not go together stands in one table, and config, constructors and step say the same of it."""

import itertools

import pytest
import torch
from torch import nn

from hpc_bnn import (
    Categorical,
    Grid,
    GridComm,
    LogPredictive,
    NegativeElbo,
    OverlappingOptimizer,
    ShardedOptimizer,
    VariationalStep,
)
from hpc_bnn.capabilities import FAMILIES, TABLE, Capabilities, Features, refusals
from hpc_bnn.config import Config, PosteriorConfig
from hpc_bnn.errors import ConfigError
from hpc_bnn.posteriors import build_posterior
from hpc_bnn.posteriors.families import Dropout, Ensemble, LowRank, MeanField, Point

MADE = {
    "mean_field": MeanField(),
    "low_rank": LowRank(),
    "mc_dropout": Dropout(0.1),
    "ensemble": Ensemble(2),
    "deterministic": Point(),
}


def test_the_registry_says_what_the_families_are():
    assert MADE.keys() == FAMILIES.keys()
    for name, capabilities in FAMILIES.items():
        assert MADE[name].capabilities == capabilities, name


def all_of(kind):
    """Every instance of Capabilities or Features that differs in at most three fields from the default."""
    choices = {
        "kl": ["none", "closed form", "Monte Carlo", "point"],
        "owner": ["all", "sample"],
        "estimator": ["reparameterisation", "local"],
    }
    names = list(kind.__dataclass_fields__)
    for few in itertools.combinations(names, 3):
        for values in itertools.product(*(choices.get(name, [True, False]) for name in few)):
            yield kind(**dict(zip(few, values)))


def test_every_refusal_can_happen_and_says_what_to_do():
    pairs = [(c, f) for c in all_of(Capabilities) for f in set(all_of(Features))]
    for refusal in TABLE:
        assert any(refusal.applies(c, f) for c, f in pairs), refusal
        assert refusal.remedy and refusal.reason and refusal.field
    assert not refusals(Capabilities("closed form", is_separable=True), Features())


def faults_of(action):
    try:
        action()
    except ConfigError as error:
        return {(fault.field, fault.rule) for fault in error.faults}
    return set()


CASES = list(
    itertools.product(
        FAMILIES, ["reparameterisation", "flipout"], ["gaussian", "student_t"], [False, True], [False, True],
        [False, True], ["elbo", "log_predictive"],
    )
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_constructors_refuse_the_same(family):
    num_refused = 0
    for _, estimator, prior, antithetic, overlap, sharded, objective in [c for c in CASES if c[0] == family]:
        if estimator == "flipout" and family not in ("mean_field", "low_rank"):
            continue  # in Python the others take no estimator
        posterior = PosteriorConfig(family, prior=prior, estimator=estimator, antithetic=antithetic)
        config = Config(num_samples=2, num_test_samples=2, posterior=posterior)
        config.grid.overlap, config.optimizer.sharded, config.objective.name = overlap, sharded, objective
        expected = faults_of(config.check)

        def make_all(estimator=estimator, objective=objective, overlap=overlap, sharded=sharded, config=config):
            """As the parts are made, one after another: the first that refuses ends it."""
            made = build_posterior(
                config.posterior, lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 3)),
                num_samples=2, local_samples=range(2), seed=0,
            )  # fmt: skip
            comm = GridComm(Grid())
            optimizer = torch.optim.Adam(made.parameters())
            if overlap:
                optimizer = OverlappingOptimizer(optimizer, made, comm)
            if sharded:
                ShardedOptimizer(torch.optim.Adam, made, comm)
            VariationalStep(
                made, Categorical(3), optimizer, comm, num_samples=2, num_train_examples=9,
                objective=LogPredictive() if objective == "log_predictive" else NegativeElbo(),
            )  # fmt: skip

        got = faults_of(make_all)
        both = overlap and sharded  # a config can ask for both; in Python one optimizer takes the place of the other
        assert got <= expected and (bool(got) == bool(expected) or both), (family, estimator, prior, got, expected)
        num_refused += bool(expected)
    assert num_refused
