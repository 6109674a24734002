"""The cases whose numbers are frozen: small networks after 20 steps in float64 (see benchmarks/frozen.py, test_frozen.py).

Two versions of hpc_bnn import this file, so it uses public names only, and makes data and networks by torch alone.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import hpc_bnn
from hpc_bnn.data.augment import Crop, Mixup
from hpc_bnn.models import MLP, ViT

NUM_STEPS = 20
NUM_EXAMPLES = 31
NUM_TRAIN_EXAMPLES = 300  # as if there were more: the KL does not drown the data
SHAPE, NUM_CLASSES, NUM_TARGETS = (1, 8, 8), 3, 2
SEED = 7

Tensors = dict[str, Tensor]
"""What a case ends with: parameters and buffers by name, the course of the loss, the predictive."""


@dataclass(frozen=True)
class Case:
    """One training. The fields that are not at their default are its name."""

    family: str = "mean_field"
    network: str = "mlp"
    objective: str = "elbo"
    likelihood: str = "categorical"
    optimizer: str = "sgd"
    num_samples: int = 5  # uneven on two ranks
    chunk_size: int = 1
    global_batch_size: int = 13  # 13, 13 and 5 of 31 examples
    views: str = "none"
    kl: str = "constant"
    max_gradient_norm: float | None = None

    @property
    def name(self) -> str:
        more = [
            f"{field.name}={value}"
            for field in fields(self)[2:]
            if (value := getattr(self, field.name)) != field.default
        ]
        return " ".join([self.family, self.network, *more])


# --- networks ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions and torch's own BatchNorm."""

    def __init__(self, num_outputs: int, width: int = 4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.head(torch.relu(x + y).mean((2, 3)))


class Attention(nn.Module):
    """torch's attention over the rows of an image, with ``batch_first=True`` and a learned token."""

    def __init__(self, num_outputs: int, dim: int = 8):
        super().__init__()
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))
        self.head = nn.Linear(dim, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x.squeeze(1)], 1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


class Tied(nn.Module):
    """A weight in two places, a frozen one, and one that no forward uses."""

    def __init__(self, num_outputs: int):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(8, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.flatten(1)))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(x)))))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, num_outputs: int):
        super().__init__()
        self.layer = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.squeeze(1))[0][:, -1])


def dropout(num_outputs: int) -> nn.Module:
    """Convolution and linear layers with dropout of channels and of numbers."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Dropout2d(0.2), nn.Flatten(),
        nn.Linear(64, 10), nn.Tanh(), nn.Dropout(0.2), nn.Linear(10, num_outputs),
    )  # fmt: skip


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": lambda n: MLP(SHAPE, n, hidden=(10,), activation="Tanh"),
    "wide": lambda n: MLP(SHAPE, n, hidden=(800, 800)),  # enough for several sums while a backward pass runs
    "vit": lambda n: ViT(SHAPE, n, dim=8, depth=1, heads=2, mlp_dim=12),
    "vit_dropout": lambda n: ViT(SHAPE, n, dim=8, depth=1, heads=2, mlp_dim=12, dropout=0.2),
    "residual": Residual,
    "dropout": dropout,
    "attention": Attention,
    "tied": Tied,
    "recurrent": Recurrent,
}


# --- families, likelihoods, objectives, optimizers ------------------------------------------------------


def _mean_field(**options):
    return lambda net: hpc_bnn.MeanFieldGaussian(net, **{"init_std": 0.1, **options})


def _low_rank(**options):
    return lambda net: hpc_bnn.LowRankGaussian(net, init_std=0.1, rank=2, **options)


FAMILIES: dict[str, Callable] = {
    "mean_field": _mean_field(prior=hpc_bnn.GaussianPrior(0.7)),
    "antithetic": _mean_field(antithetic=True),
    "laplace": _mean_field(prior=hpc_bnn.LaplacePrior(0.5)),
    "student_t": _mean_field(prior=hpc_bnn.StudentTPrior(scale=0.5)),
    "scale_mixture": _mean_field(prior=hpc_bnn.ScaleMixturePrior()),
    "fan_in": _mean_field(prior=hpc_bnn.GaussianPrior("fan_in")),
    "initial": _mean_field(prior=hpc_bnn.GaussianPrior(0.5, mean="initial"), init_std_relative=0.2),
    "no_biases": _mean_field(deterministic=("norm", "*bias")),
    "all_random": _mean_field(deterministic=()),
    "local": _mean_field(estimator="local"),
    "flipout": _mean_field(estimator="flipout"),
    "low_rank": _low_rank(),
    "low_rank_laplace": _low_rank(prior=hpc_bnn.LaplacePrior(0.5)),
    "low_rank_student_t": _low_rank(prior=hpc_bnn.StudentTPrior()),
    "mc_dropout": hpc_bnn.MCDropout,
    "deterministic": hpc_bnn.DeterministicNetwork,
    "ensemble": hpc_bnn.DeepEnsemble,
}

LIKELIHOODS: dict[str, Callable] = {
    "categorical": lambda: hpc_bnn.Categorical(NUM_CLASSES),
    "gaussian": lambda: hpc_bnn.Gaussian(NUM_TARGETS),
    "gaussian_learned": lambda: hpc_bnn.Gaussian(NUM_TARGETS, "learned"),
    "gaussian_fixed": lambda: hpc_bnn.Gaussian(NUM_TARGETS, 0.5),
    "student_t": lambda: hpc_bnn.StudentT(NUM_TARGETS),
    "bernoulli": lambda: hpc_bnn.Bernoulli(NUM_TARGETS),
    "poisson": lambda: hpc_bnn.Poisson(NUM_TARGETS),
    "implicit": lambda: hpc_bnn.Implicit(NUM_TARGETS),
}


def root_of_mean_square(members: Tensor, y: Tensor) -> Tensor:
    """An objective of one's own: losses [B] of members [K, B, ...] and targets [B, ...]."""
    return (members - y).square().flatten(2).mean((0, 2)).sqrt()


OBJECTIVES: dict[str, Callable] = {
    "elbo": hpc_bnn.NegativeElbo,
    "log_predictive": hpc_bnn.LogPredictive,
    "moment_matched": hpc_bnn.MomentMatched,
    "crps": hpc_bnn.Crps,  # almost fair
    "crps_fair": lambda: hpc_bnn.Crps(fairness=1.0),
    "crps_weights": lambda: hpc_bnn.Crps(fairness=0.0, weights=np.array([1.0, 3.0])),
    "energy": hpc_bnn.Energy,
    "energy_fair": lambda: hpc_bnn.Energy(fairness=1.0, beta=1.5),
    "gathered": lambda: hpc_bnn.Gathered(root_of_mean_square),
}


class Lamb(torch.optim.Optimizer):
    """Looks at whole tensors: the step of each weight is scaled by its norm (after You et al., 2020)."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                norms = parameter.norm(), parameter.grad.norm() + 1e-3
                parameter.sub_(group["lr"] * norms[0] / norms[1] * parameter.grad)


def _adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


# Adam divides by the gradient: not for networks with a weight whose gradient is nothing but rounding.
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda posterior, comm: _sgd(posterior.parameters()),
    "adam": lambda posterior, comm: _adam(posterior.parameters()),
    "lamb": lambda posterior, comm: Lamb(posterior.weight_parameters(), lr=1e-2),
    "divided_adam": lambda posterior, comm: hpc_bnn.ShardedOptimizer(_adam, posterior, comm),
    "divided_sgd": lambda posterior, comm: hpc_bnn.ShardedOptimizer(_sgd, posterior, comm),
    "overlapping_adam": lambda posterior, comm: hpc_bnn.OverlappingOptimizer(
        _adam(posterior.parameters()), posterior, comm
    ),
}

KL = {
    "constant": 0.9,
    "cold": 0.1,
    **{kind: hpc_bnn.KlAnnealing(0.7, kind, num_steps=8) for kind in ("linear", "cosine", "cyclical")},
}


# --- the list ------------------------------------------------------------------------------------------


def _core() -> Iterator[Case]:
    """The cases whose numbers stand in frozen.json: what the tests of the suite compare."""
    for family in FAMILIES:
        yield Case(family, "dropout" if family == "mc_dropout" else "mlp")
    for network in ("vit", "residual", "dropout", "attention", "tied"):
        yield Case("mean_field", network)
    yield from (Case("flipout", "residual"), Case("mc_dropout", "vit_dropout"), Case("low_rank", "attention"))
    for objective, likelihood in SCORED:
        yield Case(objective=objective, likelihood=likelihood)
    for likelihood in ("gaussian_learned", "student_t", "bernoulli", "poisson"):
        yield Case(likelihood=likelihood)
    yield from _crossed(family=["mean_field", "low_rank", "flipout"], num_samples=[7], chunk_size=[3])
    yield Case(chunk_size=16, num_samples=16)
    yield from (
        Case(objective=name, likelihood=likelihood, num_samples=7, chunk_size=3) for name, likelihood in SCORED[:3]
    )
    for optimizer in OPTIMIZERS:
        yield Case(optimizer=optimizer, max_gradient_norm=0.3)
    yield Case("ensemble", optimizer="adam", max_gradient_norm=0.3)
    yield from _crossed(views=["shared", "per_group", "per_sample", "mixup"])
    yield from _crossed(family=["student_t"], kl=[*KL])


def _more() -> Iterator[Case]:
    """The other cases: what only a comparison of two versions on one machine sees."""
    chunks = ({"chunk_size": 1}, {"chunk_size": 3, "num_samples": 7}, {"chunk_size": 16, "num_samples": 16})
    # families x networks, walking
    for family in (*GAUSSIAN, "deterministic"):
        for network in ("mlp", "vit", "dropout", "attention"):
            if not (family == "local" and network in ("vit", "attention")):  # no layer that it knows
                yield Case(family, network)
    for family in ("antithetic", "student_t", "all_random", "low_rank", "deterministic"):
        yield Case(family, "residual")
    yield from _crossed(family=["ensemble"], network=["vit", "dropout"])
    yield from _crossed(family=["mean_field", "low_rank", "deterministic"], network=["tied", "recurrent"])
    yield from _crossed(family=["local", "flipout"], global_batch_size=[29])
    # several samples at once, and what falls back to walking
    for chunk in chunks[1:]:
        for family in GAUSSIAN:
            yield Case(family, **chunk)
        for family, network in itertools.product(("mean_field", "low_rank"), ("vit", "attention", "tied")):
            yield Case(family, network, **chunk)
    for family, network in (
        ("mean_field", "residual"),
        ("mean_field", "dropout"),
        ("flipout", "vit"),
        ("mc_dropout", "dropout"),
    ):
        yield Case(family, network, num_samples=7, chunk_size=3)
    # objectives
    for chunk in chunks:
        for family in ("antithetic", "student_t", "low_rank", "flipout"):
            yield Case(family, objective="log_predictive", **chunk)
        for objective, likelihood in SCORED:
            yield Case(objective=objective, likelihood=likelihood, **chunk)
    yield from _crossed(network=["vit", "residual", "dropout"], objective=["log_predictive"], chunk_size=[1, 3])
    for family, network in (
        ("student_t", "mlp"),
        ("low_rank", "vit"),
        ("mc_dropout", "dropout"),
        ("mean_field", "residual"),
    ):
        for objective, likelihood in (("moment_matched", "gaussian"), ("crps", "implicit"), ("energy", "implicit")):
            yield Case(family, network, objective, likelihood)
    for likelihood in ("gaussian", "gaussian_fixed"):
        yield Case(likelihood=likelihood)
    # optimizers and clipping
    families = ("mean_field", "antithetic", "student_t", "low_rank", "deterministic", "ensemble")
    for family, optimizer in itertools.product(families, OPTIMIZERS):
        divided = optimizer.startswith("divided") and family == "ensemble"
        overlapping = optimizer.startswith("overlapping") and family in ("student_t", "low_rank", "ensemble")
        if not (divided or overlapping):  # these are refused
            yield from _crossed(family=[family], optimizer=[optimizer], max_gradient_norm=[None, 0.3])
    yield from _crossed(network=["wide"], num_samples=[2], optimizer=["divided_adam", "overlapping_adam"])
    yield from _crossed(network=["residual", "dropout"], optimizer=["divided_sgd"], max_gradient_norm=[0.3])
    yield from _crossed(family=["mean_field", "flipout"], network=["vit"], max_gradient_norm=[0.3])
    yield Case("mc_dropout", "dropout", optimizer="overlapping_adam")
    # views and the order of shards
    yield from _crossed(views=["none_of_shards", "shared", "per_group", "per_sample", "mixup"], chunk_size=[1, 3])
    yield Case(network="residual", views="per_sample")
    yield Case(network="vit", views="per_sample", objective="log_predictive")
    # factor of the KL
    yield from _crossed(family=["mean_field", "low_rank", "mc_dropout"], network=["dropout"], kl=[*KL])
    yield Case("ensemble", kl="linear")


def _crossed(**axes: Sequence) -> Iterator[Case]:
    for values in itertools.product(*axes.values()):
        yield Case(**dict(zip(axes, values)))


GAUSSIAN = [name for name in FAMILIES if name not in ("mc_dropout", "ensemble", "deterministic")]
SCORED = (
    ("log_predictive", "categorical"), ("moment_matched", "gaussian"), ("crps", "implicit"), ("crps_fair", "implicit"),
    ("crps_weights", "implicit"), ("energy", "implicit"), ("energy_fair", "implicit"), ("gathered", "gaussian"),
    ("log_predictive", "gaussian"),
)  # fmt: skip

CORE: dict[str, Case] = {case.name: case for case in _core()}
CASES: dict[str, Case] = CORE | {case.name: case for case in _more()}


def matching(pattern: str) -> dict[str, Case]:
    """Return the cases whose name has the pattern in it (``*`` and ``?`` as in a shell); "core": those of `CORE`."""
    if pattern == "core":
        return CORE
    return {name: case for name, case in CASES.items() if fnmatch.fnmatchcase(name, f"*{pattern}*")}


# --- running one ---------------------------------------------------------------------------------------


def make_data(likelihood: str) -> tuple[Tensor, Tensor]:
    """Return inputs [31, 1, 8, 8] and targets that a network can learn."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(NUM_EXAMPLES, *SHAPE, generator=generator, dtype=torch.float64)
    numbers = x.flatten(2).mean(2) * 6 + x[:, :, 0, :NUM_TARGETS].flatten(1)
    if likelihood == "categorical":
        return x, (numbers[:, 0] > 0.5).long() + (numbers[:, 0] > -0.5).long()
    if likelihood == "bernoulli":
        return x, (numbers > 0).long()
    return x, (2 + numbers).clamp_min(0).round().long() if likelihood == "poisson" else numbers


def _make_network(case: Case, likelihood) -> nn.Module:
    # Made in float64: torch's uniform numbers in float32 are not the same on all kinds of CPUs.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return likelihood.wrap(NETWORKS[case.network](likelihood.num_outputs).double())
    finally:
        torch.set_default_dtype(default)


def _make_posterior(case: Case, likelihood, comm):
    if case.family == "ensemble":
        mine = comm.grid.local_samples(case.num_samples)
        return hpc_bnn.DeepEnsemble(lambda: _make_network(case, likelihood), case.num_samples, mine, seed=SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return FAMILIES[case.family](_make_network(case, likelihood))


def _batches(case: Case, comm, x: Tensor, y: Tensor, directory: Path) -> Iterator[tuple]:
    """Yield this rank's inputs and targets of each step, and the examples of the batch in the job."""
    if case.views != "none":
        yield from _batches_of_shards(case, comm, x, y, directory)
    generator = torch.Generator().manual_seed(SEED + 1)
    while True:
        for batch in torch.randperm(NUM_EXAMPLES, generator=generator).split(case.global_batch_size):
            mine = batch[comm.grid.local_examples(len(batch))]
            yield x[mine], y[mine], len(batch)


def _batches_of_shards(case: Case, comm, x: Tensor, y: Tensor, directory: Path) -> Iterator[tuple]:
    hpc_bnn.write_shards(
        directory, {"train": (x.numpy(), y.numpy())}, name="frozen", source="made up", licence="none",
        num_classes=NUM_CLASSES, comm=comm,
    )  # fmt: skip
    mixes = case.views == "mixup"
    dataset = hpc_bnn.ShardDataset(directory, "train", dtype=torch.float64, comm=comm)
    loader = hpc_bnn.BatchLoader(dataset, comm.grid, case.global_batch_size, SEED, with_partners=mixes, prefetch=0)
    transforms = [Crop(padding=1), lambda x, random: x + random.uniform(*x.shape[1:]).to(x.dtype)]
    transforms += [Mixup(0.3)] if mixes else []
    augmentation = hpc_bnn.Augmentation(
        transforms, "per_sample" if mixes else case.views.replace("none_of_shards", "shared"),
        num_samples=case.num_samples, num_groups=2, seed=SEED, num_classes=NUM_CLASSES,
    )  # fmt: skip
    for epoch in itertools.count():
        for batch in loader.epoch(epoch):
            if case.views == "none_of_shards":
                yield batch.x, batch.y, batch.num_examples
            else:
                yield *augmentation(batch, epoch), batch.num_examples


def run(case: Case, comm, directory: Path) -> Tensors:
    """Train 20 steps and return what is then there on this rank. Collective over the world.

    Parameters
    ----------
    comm : hpc_bnn.GridComm
        The process grid.
    directory : path
        For files of the case; new or empty, the same on all ranks.
    """
    likelihood = LIKELIHOODS[case.likelihood]()
    posterior = _make_posterior(case, likelihood, comm)
    x, y = make_data(case.likelihood)
    step = hpc_bnn.VariationalStep(
        posterior, likelihood, OPTIMIZERS[case.optimizer](posterior, comm), comm,
        num_samples=case.num_samples, num_train_examples=NUM_TRAIN_EXAMPLES, seed=SEED, kl_weight=KL[case.kl],
        objective=OBJECTIVES[case.objective](), max_gradient_norm=case.max_gradient_norm, chunk_size=case.chunk_size,
    )  # fmt: skip
    batches = _batches(case, comm, x, y, directory)
    results = [step(*batch) for batch in itertools.islice(batches, NUM_STEPS)]
    state = posterior.state_dict() | dict(posterior.module.named_buffers())  # those that are not persistent, too
    end = {name: tensor.detach().clone() for name, tensor in state.items()}
    for name in ("nelbo", "kl"):
        end[f"course.{name}"] = torch.tensor([float(getattr(r, name)) for r in results], dtype=torch.float64)
    end |= _predict(case, posterior, likelihood, comm, x, y)
    broken = [name for name, tensor in end.items() if not tensor.isfinite().all()]
    assert not broken, f"{case.name}: {broken} are not finite"
    return end


def _predict(case: Case, posterior, likelihood, comm, x: Tensor, y: Tensor) -> Tensors:
    """Return the predictive of all examples, its numbers in one tensor, and those of each sample."""
    is_of_classes = case.likelihood == "categorical"
    predict = hpc_bnn.predict_classes if is_of_classes else hpc_bnn.predict_values
    options = {"num_samples": case.num_samples, "seed": SEED, "batch_size": 12, "keep_members": True}
    if "chunk_size" in inspect.signature(predict).parameters:
        options["chunk_size"] = 1
    found = predict(posterior, likelihood, comm, *((x,) if is_of_classes else (x, y)), **options)
    if is_of_classes:
        # The square: the root of what is 0 up to rounding differs in its first digits.
        numbers = [found.probabilities, found.std.square(), found.expected_entropy]
    else:
        numbers = [found.mean, found.aleatoric_variance, found.epistemic_variance, found.log_prob]
    numbers = torch.cat([part.flatten() for part in numbers if part is not None])
    return {"predictive": numbers, "predictive.members": found.members}


# --- numbers that stand for a tensor -------------------------------------------------------------------


def digest(name: str, tensor: Tensor) -> tuple[float, float]:
    """Return the norm of a tensor and its projection on random signs that its name fixes, both over sqrt(size)."""
    flat = tensor.detach().double().flatten().numpy()
    key = hashlib.shake_128(name.encode()).digest(len(flat) // 8 + 1)
    signs = 1.0 - 2.0 * np.unpackbits(np.frombuffer(key, np.uint8))[: len(flat)]
    root = math.sqrt(max(len(flat), 1))
    return math.sqrt(math.fsum(flat * flat)) / root, math.fsum(flat * signs) / root


def digests(tensors: Tensors) -> dict[str, tuple[float, float]]:
    return {name: digest(name, tensor) for name, tensor in sorted(tensors.items())}
