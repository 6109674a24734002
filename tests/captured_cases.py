"""Steps of small networks, for tests that compare captured ones with plain ones, on a CPU and on a GPU."""

import torch
from frozen_cases import FAMILIES, LIKELIHOODS, NETWORKS, OBJECTIVES

import hpc_bnn
from hpc_bnn import Grid, GridComm, KlAnnealing, VariationalStep
from hpc_bnn.views import Views

NUM_STEPS = 7


def make(
    capture="on", family="mean_field", network="mlp", likelihood="categorical", objective="elbo", num_samples=5,
    optimizer="adam", dtype=torch.float32, net=None, device="cpu", comm=None, **options,
):  # fmt: skip
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[likelihood]()

    def make_net():
        made = net() if net else likelihood.wrap(NETWORKS[network](likelihood.num_outputs))
        return made if (dtype, device) == (torch.float32, "cpu") else made.to(device, dtype)

    if family == "ensemble":
        posterior = hpc_bnn.DeepEnsemble(make_net, num_samples, range(num_samples))
    else:
        posterior = FAMILIES[family](make_net()) if isinstance(family, str) else hpc_bnn.Posterior(make_net(), family)
    make_optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0, amsgrad=True, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    }[optimizer]
    return VariationalStep(
        posterior, likelihood, make_optimizer(posterior.parameters()), comm or GridComm(Grid(), device), num_samples=num_samples,
        num_train_examples=300, seed=7, kl_weight=KlAnnealing(0.7, "linear", num_steps=5),
        objective=OBJECTIVES[objective](), capture=capture, **{"max_gradient_norm": 0.5, **options},
    )  # fmt: skip


def batch(step, count=13, seed=0, dtype=torch.float32):
    generator, kind = torch.Generator().manual_seed(seed), type(step.likelihood).__name__
    x = torch.randn(count, 1, 8, 8, generator=generator).to(dtype)
    if kind == "Categorical":
        y = torch.randint(0, 3, (count,), generator=generator)
    else:
        y = (
            torch.rand(count, 2, generator=generator)
            .to(dtype)
            .round(decimals=0 if kind in ("Bernoulli", "Poisson") else 3)
        )
    return x.to(step.comm.device), y.to(step.comm.device)


def train(step, num_steps=NUM_STEPS, dtype=torch.float32, views=False, counts=(13, 5)):
    """Make some steps with batches of two sizes, another learning rate in each, and return what they gave."""
    results = []
    for number in range(num_steps):
        count = counts[number % len(counts)]
        x, y = (whole[step.comm.grid.local_examples(count)] for whole in batch(step, count, number, dtype))
        if views:
            x = Views(x, range(step.num_samples), lambda x, view: x + view)
        for group in step.optimizer.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + number)
        results.append(step(x, y, count))
    step.settle()
    numbers = [(r.nelbo, r.data_term, r.kl, r.kl_weight, r.wants_stop) for r in results]
    return numbers, {name: value.clone() for name, value in step.posterior.state_dict().items()}


def same(got, want):
    assert got[0] == want[0]
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name


KINDS = [
    "mean_field", "antithetic", "laplace", "student_t", "local", "flipout", "low_rank", "low_rank_student_t", "mc_dropout",
    "deterministic", "ensemble",
]  # fmt: skip
"""Families that a captured step treats in ways of their own."""

CASES = [
    *({"family": family, "network": "dropout" if family == "mc_dropout" else "mlp"} for family in KINDS),
    *({"network": network} for network in ("vit", "dropout", "attention", "tied", "recurrent", "residual")),
    {"network": "residual", "objective": "log_predictive"}, {"family": "flipout", "network": "residual"},
    {"network": "residual", "objective": "log_predictive", "num_samples": 1},
    {"family": "flipout", "network": "vit"},
    *({"family": family, "num_samples": 7, "chunk_size": 3} for family in ("mean_field", "antithetic", "student_t", "low_rank")),
    {"network": "vit", "num_samples": 4, "chunk_size": 4},
    *(
        {"objective": objective, "likelihood": likelihood, **chunk}
        for objective, likelihood in (("log_predictive", "categorical"), ("moment_matched", "gaussian"), ("crps", "implicit"))
        for chunk in ({}, {"num_samples": 7, "chunk_size": 3}, {"num_samples": 4, "chunk_size": 4})
    ),
    {"objective": "gathered", "likelihood": "implicit"},
    *({"likelihood": likelihood} for likelihood in ("gaussian_learned", "student_t", "bernoulli", "poisson")),
    {"micro_batch_size": 4}, {"micro_batch_size": 4, "family": "local"}, {"micro_batch_size": 4, "family": "student_t"},
    {"views": True}, {"views": True, "num_samples": 7, "chunk_size": 3},
    {"views": True, "objective": "crps", "likelihood": "implicit"},
    {"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "rmsprop"}, {"max_gradient_norm": None},
    {"dtype": torch.float64}, {"autocast_dtype": torch.bfloat16}, {"family": "antithetic", "num_samples": 6},
]  # fmt: skip
