"""A rule stands once: beside its field; constructors and the command line speak of the same one, in their own words."""

import ast
import math
import operator
import pickle
from typing import Literal, get_args, get_origin

import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from hpc_bnn import (
    Augmentation,
    BatchLoader,
    Config,
    Crps,
    DeepEnsemble,
    Energy,
    Gaussian,
    GaussianPrior,
    Grid,
    GridComm,
    Implicit,
    KlAnnealing,
    LaplacePrior,
    LowRankGaussian,
    MCDropout,
    MeanFieldGaussian,
    ScaleMixturePrior,
    StudentT,
    StudentTPrior,
    VariationalStep,
    config,
)
from hpc_bnn.config import FIELDS, NAMES
from hpc_bnn.errors import ConfigError, Fault
from hpc_bnn.objectives import OBJECTIVES

ELSEWHERE = {
    "model.output": "a place, which the network has or not: Network",
    "grid.sample_size": "Grid, with the number of ranks",
    "augmentation.num_groups": "check_groups, with num_samples",
    "optimizer.warmup_epochs": "Config, with num_epochs",
    "seed": "any",
    "early_stopping.min_change": "any",
}
"""Numbers without a rule of their own."""


def takes_numbers(type_):
    return type_ in (int, float) or (
        get_origin(type_) not in (list, dict, Literal) and any(map(takes_numbers, get_args(type_)))
    )


def test_each_number_of_a_config_has_a_rule_or_is_free():
    without = {name for name, field in FIELDS.items() if takes_numbers(field.type) and field.rule is None}
    assert without == ELSEWHERE.keys()


def make_step(**options):
    posterior = MeanFieldGaussian(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(posterior.parameters(), 0.1)
    return VariationalStep(
        posterior, Gaussian(1), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=3, **options
    )


def net(module=None):
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))


SHARED = [
    ("posterior.prior_std", -1.0, "std", lambda v: GaussianPrior(v)),
    ("posterior.prior_std", math.inf, "scale", lambda v: LaplacePrior(v)),
    ("posterior.prior_std", 0.0, "scale", lambda v: StudentTPrior(scale=v)),
    ("posterior.prior_std", 0.0, "prior_std", lambda v: DeepEnsemble(net, 2, [0], prior_std=v)),
    ("posterior.prior_std", math.nan, "prior_std", lambda v: MCDropout(net(), prior_std=v)),
    ("posterior.prior_df", 0.0, "df", lambda v: StudentTPrior(df=v)),
    ("posterior.prior_narrow_std", -2.0, "narrow_std", lambda v: ScaleMixturePrior(narrow_std=v)),
    ("posterior.prior_fraction", 1.0, "fraction", lambda v: ScaleMixturePrior(fraction=v)),
    ("posterior.init_std", 0.0, "init_std", lambda v: MeanFieldGaussian(net(), init_std=v)),
    ("posterior.init_std_relative", -1.0, "init_std_relative", lambda v: MeanFieldGaussian(net(), init_std_relative=v)),
    ("posterior.estimator", "locale", "estimator", lambda v: MeanFieldGaussian(net(), estimator=v)),
    ("posterior.rank", 0, "rank", lambda v: LowRankGaussian(net(), rank=v)),
    ("likelihood.scale", -1.0, "scale", lambda v: Gaussian(2, scale=v)),
    ("likelihood.scale", "learnt", "scale", lambda v: Gaussian(2, scale=v)),
    ("likelihood.init_scale", 0.0, "init_scale", lambda v: Gaussian(2, init_scale=v)),
    ("likelihood.df", math.nan, "df", lambda v: StudentT(2, df=v)),
    ("objective.fairness", 1.5, "fairness", lambda v: Crps(fairness=v)),
    ("objective.beta", 2.0, "beta", lambda v: Energy(beta=v)),
    ("kl_annealing.schedule", "lineer", "schedule", lambda v: KlAnnealing(schedule=v)),
    ("kl_annealing.num_epochs", 0.0, "num_steps", lambda v: KlAnnealing(num_steps=v)),
    ("kl_weight", -1.0, "weight", lambda v: KlAnnealing(v)),
    ("kl_weight", math.inf, "kl_weight", lambda v: make_step(kl_weight=v)),
    ("chunk_size", 0, "chunk_size", lambda v: make_step(chunk_size=v)),
    ("optimizer.max_gradient_norm", 0.0, "max_gradient_norm", lambda v: make_step(max_gradient_norm=v)),
    ("global_batch_size", 0, "global_batch_size", lambda v: BatchLoader([1], Grid(), v, 0)),
    ("data.prefetch", -1, "prefetch", lambda v: BatchLoader([1], Grid(), 1, 0, prefetch=v)),
    ("augmentation.views", "alike", "kind", lambda v: Augmentation([], v, num_samples=2)),
]


@pytest.mark.parametrize("name, value, argument, make", SHARED, ids=lambda case: case if isinstance(case, str) else "")
def test_python_and_the_command_line_speak_of_one_rule(name, value, argument, make):
    wrong, (group, _, last) = Config(), name.rpartition(".")
    setattr(operator.attrgetter(group)(wrong) if group else wrong, last, value)
    with pytest.raises(ConfigError) as of_config:
        wrong.check()
    with pytest.raises(ConfigError) as of_python:
        make(value)
    (fault,) = of_python.value.faults
    text = f" {value}: must be {FIELDS[name].rule.text}. {FIELDS[name].rule.remedy}"
    assert of_config.value.on_command_line().splitlines()[0] == f"--{name}{text}"
    assert (str(fault), fault.on_command_line()) == (f"{argument}{text}", f"--{name}{text}")


def test_rules_of_two_fields_are_one_as_well():
    wrong = Config(num_samples=1)
    wrong.objective.name, wrong.augmentation.views = "crps", "per_group"
    with pytest.raises(ConfigError) as of_config:
        wrong.check()
    groups, pairs = (fault.on_command_line() for fault in of_config.value.faults)
    with pytest.raises(ConfigError) as of_python:
        Crps().check(Implicit(1), 1)
    assert of_python.value.on_command_line() == pairs and pairs.endswith("or --objective.fairness 0")
    with pytest.raises(ConfigError) as of_python:
        Augmentation([], "per_group", num_samples=1, num_groups=2)
    assert of_python.value.on_command_line() == groups and "between 1 and --num_samples, 1" in groups
    assert str(of_python.value) == "num_groups 2: must be between 1 and num_samples, 1. Try 2"


def test_a_text_names_fields_in_the_words_of_the_caller():
    fault = Fault("objective.name", "x", "no {grid.sample_size} <class 'x'>", "Use <grid.sample_size> or {name: flip}")
    assert str(fault) == "objective x: no {grid.sample_size} <class 'x'>. Use sample_size or {name: flip}"
    assert fault.on_command_line() == (
        "--objective.name x: no {grid.sample_size} <class 'x'>. Use --grid.sample_size or {name: flip}"
    )
    for name in ("RUN_DIR", "--output", "0.weight", "num_targets"):  # no fields
        other = Fault(name, 1, "a rule", "A remedy")
        assert str(other) == other.on_command_line() == f"{name} 1: a rule. A remedy"
    assert "model" in NAMES and Fault("model", 1, "a", "B").on_command_line() == "--model 1: a. B"


def test_an_error_keeps_its_faults_where_ranks_agree():
    alone, fault = GridComm(Grid()), Fault("num_samples", lambda: 1, "a rule", "Use <device> cpu")
    with pytest.raises(ConfigError) as caught, alone.agree("outer"), alone.agree("inner"):
        raise ConfigError(fault, "a text on <backend>")
    error = caught.value
    travelled = pickle.loads(pickle.dumps(error))  # whatever the value was
    for one in (error, travelled):
        assert one.on_command_line().startswith("outer: inner: --num_samples <function")
        assert one.on_command_line().endswith("a rule. Use --device cpu\na text on --backend")
        assert str(one).startswith("outer: inner: num_samples <") and str(one).endswith("a text on backend")


def test_words_stand_once():
    """No list of words anywhere is that of a vocabulary in config, in whatever order."""
    words = {
        name: frozenset(found)
        for name, value in vars(config).items()
        for part in (value, *get_args(value))
        if get_origin(part) is Literal and len(found := get_args(part)) > 1
    }
    assert len(set(words.values())) == len(words) > 12
    seen = []
    for path in (REPOSITORY / "hpc_bnn").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)) and node.elts:
                constants = [e.value for e in node.elts if isinstance(e, ast.Constant)]
                if len(constants) == len(node.elts) and frozenset(constants) in words.values():
                    seen.append((path.name, constants))
    assert all(name == "config.py" for name, _ in seen), seen
    assert len(seen) == len({frozenset(c) for _, c in seen})
    assert frozenset(OBJECTIVES) == words["ObjectiveName"]


def test_the_defaults_fit():
    Config().check()
