"""Test that your own objective, or family of posteriors, is exact on every grid (needs pytest).

In a test file::

    from hpc_bnn.testing import family_is_exact, objective_is_exact  # noqa: F401, pytest fixtures

    def test_my_objective(objective_is_exact):
        objective_is_exact(MyObjective(), reference, likelihood=hpc_bnn.Implicit(2))

    def test_my_family(family_is_exact):
        family_is_exact(
            MyFamily(),
            weights=lambda slots, eps, z: slots["loc"] + slots["log_scale"].exp() * eps,
            kl=lambda slots: ...,
        )

where ``reference(outputs [K, B, ...], y [B, ...])`` is the data term in one line, and ``weights`` and ``kl`` are what
the family is. Run it with ``pytest`` on one rank, and with ``mpirun -np 4 python -m mpi4py -m pytest FILE`` on all
grids of four. All ranks raise the same failure.
"""

from __future__ import annotations

import copy
import itertools
import math
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .comm import GridComm, abort, connect, wait_for_others, world_size
from .grid import sample_sizes
from .likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from .noise import Key, Stream
from .objectives import Objective
from .posteriors import Family, GaussianPrior, MeanFieldGaussian, Posterior
from .posteriors.estimators import ExampleNoise
from .posteriors.families import Slots
from .training.step import VariationalStep

NUM_EXAMPLES, NUM_INPUTS, SEED = 13, 6, 5
LACKING = [10, 11, 12]
"""Examples without a target, where targets may be missing."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class DiffersError(AssertionError):
    """An objective or a family is not its definition, on which all ranks agree."""


@pytest.fixture
def objective_is_exact(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a function that compares an objective with its definition on every grid of the job (`check_objective`)."""
    return _on_every_grid(check_objective, request)


@pytest.fixture
def family_is_exact(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a function that compares a family with its definition on every grid of the job (`check_family`)."""
    return _on_every_grid(check_family, request)


def _on_every_grid(check_one: Callable[..., None], request: pytest.FixtureRequest) -> Callable[..., None]:
    def check(*arguments, **options) -> None:
        ranks = world_size()
        try:
            for sample_size in sample_sizes(ranks):
                check_one(connect(sample_size, device="cpu"), *arguments, **options)
        except DiffersError:
            raise  # on all ranks
        except Exception:
            if not wait_for_others(5.0):  # only here: pytest would catch it, and the others wait for ever
                capture: Any = request.config.pluginmanager.getplugin("capturemanager")
                with capture.global_and_fixture_disabled():
                    traceback.print_exc()
                    abort(1)
            raise

    return check


def check_objective(
    comm: GridComm,
    objective: Objective,
    reference: Callable[[Tensor, Tensor], Tensor],
    *,
    likelihood: Likelihood,
    num_samples: Sequence[int | str] = (16, 5, "one per rank"),
    chunk_sizes: Sequence[int] = (1, 3, 16),
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
) -> None:
    """Compare loss and gradient of a step with the definition, differentiated by autograd in one process.

    On a small network, 13 examples (uneven on 2, 3 and 4 ranks), uneven sample counts, one sample per rank, and
    chunks of the samples. Relative tolerance: 1e-12 in float64, 1e-5 in float32. `DiffersError` names the cases that
    differ, and where, on all ranks. Collective over the world.

    Parameters
    ----------
    comm, objective, likelihood : GridComm, Objective, Likelihood
        The process grid; what is tested, in a step of which likelihood.
    reference : callable
        ``reference(outputs, y)``: outputs [K, B, ...] of all samples and targets y [B, ...] to the mean over the
        examples of the data term, a scalar.
    num_samples, chunk_sizes, dtypes : sequences
        Values to test: all together in float64, other dtypes with the last chunk size.
    """
    failures: list[str] = []
    for dtype in dtypes:
        for count in num_samples:
            count = max(comm.grid.sample_size, 1) if count == "one per rank" else count
            step = make_step(comm, objective, likelihood, dtype, num_samples=count)
            x, y = make_examples(likelihood, dtype)
            expected = _on_first(comm, lambda: differentiate(step, reference, x, y))  # noqa: B023
            mine = comm.grid.local_examples(NUM_EXAMPLES)
            # float64 with all chunk sizes, other dtypes with one: rounding has nothing to do with chunks
            for chunk_size in chunk_sizes if dtype is torch.float64 else chunk_sizes[-1:]:
                step.loop.chunk_size = chunk_size
                step.accumulate_batch_(x[mine], y[mine], NUM_EXAMPLES)
                step.reduce_()
                step.posterior.finish_(step.scalars)
                got = {"loss": step.posterior.buffer.tally[0], "gradient": step.posterior.buffer.gradient}
                failures += _differences(comm, got, expected, dtype, f"{count} samples, chunk_size {chunk_size}")
    _agree(comm, objective.name, failures)


def _on_first(comm: GridComm, compute: Callable[[], Slots]) -> Slots:
    """Return what one rank computes for all. Collective over the world."""
    with comm.agree("computing the definition"):
        found = compute() if comm.grid.is_first("world") else None
    return comm.broadcast_object(found)


def _differences(comm: GridComm, got: Slots, expected: Slots, dtype: torch.dtype, case: str) -> list[str]:
    """Return a line for each number that differs from its definition on this rank. Local."""
    errors = {name: float((got[name].double() - e).norm() / e.norm().clamp_min(1e-30)) for name, e in expected.items()}
    return [
        f"{name}: relative error {error:.1e} ({dtype}, {case}, grid {comm.grid}, rank {comm.grid.rank})"
        for name, error in errors.items()
        if not error < TOLERANCE[dtype]  # NaN is below nothing
    ]


def _agree(comm: GridComm, name: str, failures: list[str]) -> None:
    failures = [failure for theirs in comm.gather_objects(failures) for failure in theirs]
    if failures:
        raise DiffersError("\n".join([f"{name} differs from its definition:", *failures]))


def make_step(
    comm: GridComm, objective: Objective, likelihood: Likelihood, dtype: torch.dtype, **options
) -> VariationalStep:
    """Return a step of a small mean-field network. Local."""
    with Key(SEED, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(NUM_INPUTS, 10), nn.Tanh(), nn.Linear(10, likelihood.num_outputs))
    net = likelihood.wrap(net).to(dtype)
    posterior = MeanFieldGaussian(net, prior=GaussianPrior(0.7), init_std=0.1, deterministic=())
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    options |= {"num_train_examples": 100, "seed": SEED, "objective": objective}
    return VariationalStep(posterior, likelihood, optimizer, comm, **options)


def make_examples(likelihood: Likelihood, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return inputs [13, 6] and targets [13, ...] that go with a likelihood. Local.

    Where it takes missing targets, some are: all of the last three examples, which one of four data groups has alone.
    """
    generator = Key(SEED, Stream.DATA_ORDER).generator()
    x = torch.randn(NUM_EXAMPLES, NUM_INPUTS, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        y = torch.randint(0, likelihood.num_outputs, (NUM_EXAMPLES,), generator=generator)
        if likelihood.ignore_index is not None:
            y[[0, 4, *LACKING]] = likelihood.ignore_index
        return x.to(dtype), y
    shape = (NUM_EXAMPLES, likelihood.num_targets)
    if isinstance(likelihood, (Bernoulli, Poisson)):
        top = 2 if isinstance(likelihood, Bernoulli) else 5
        y = torch.randint(0, top, shape, generator=generator)
    else:
        y = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if likelihood.missing_targets:
        y = y.to(dtype)
        y[[0, 4, 5], [0, -1, 0]] = math.nan
        y[LACKING] = math.nan
    return x.to(dtype), y


def differentiate(step: VariationalStep, reference: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Slots:
    """Return the data term of the step's next samples and its gradient, by autograd, all samples at once. Local."""
    leaves = _leaves(step.posterior)
    of_sample = _definition(step, lambda slots, eps, z: slots["loc"] + slots["log_scale"].exp() * eps)
    outputs = [of_sample(leaves, sample, x.double())[1] for sample in range(step.num_samples)]
    loss = reference(torch.stack(outputs), y.double() if y.is_floating_point() else y)
    gradients = _gradients(loss, leaves).values()
    return {"loss": loss.detach(), "gradient": torch.cat([gradient.reshape(-1) for gradient in gradients])}


# --- families -------------------------------------------------------------------------------------------


def check_family(
    comm: GridComm,
    family: Family,
    weights: Callable[[Slots, Tensor, Callable[..., Tensor]], Tensor] = lambda slots, eps, z: eps,
    kl: Callable[[Slots], Tensor] = lambda slots: torch.zeros((), dtype=torch.float64),
    *,
    log_prior: Callable[[Tensor], Tensor] | None = None,
    outputs: Callable[..., Tensor] | None = None,
    start: Callable[[Slots], None] | None = None,
    deterministic: Sequence[str] = ("norm",),
    num_samples: int = 6,
    chunk_sizes: Sequence[int] = (1, 4),
    **options,
) -> None:
    """Compare objective, KL and gradient of a step with the definition, differentiated by autograd in one process.

    On a small network with points and random weights, with 13 examples (uneven on 2, 3 and 4 ranks): with a noise that
    is kept and one that is drawn again, walking and in batches, with the whole batch and in micro-batches (each pair of
    these), in float64 (relative tolerance 1e-12), and once in float32 (1e-5). Errors as of `check_objective`. Collective
    over the world.

    Parameters
    ----------
    comm, family : GridComm, Family
        The process grid, and what is tested.
    weights : callable
        ``weights(slots, eps, z)``: the weights [P] of one sample, of the slots by name, of P standard normal numbers,
        and of ``z(count, *path)``, which are those that the family has from ``draw.normal(path, count)``. Of slots that
        belong to samples it gets the rows of the sample.
    kl : callable
        ``kl(slots)``: the KL (nats), or the part of it that has a closed form.
    log_prior : callable, optional
        ``log_prior(w)``: log prior (nats) of weights [P], where the KL is a Monte Carlo one, or that of points.
    outputs : callable, optional
        Instead of ``weights``, for estimators with noise per example: ``outputs(slots, eps, noise, x)``, the outputs
        [B, 3] of one sample for all examples, where the slots are views by weight and slot, eps views by weight, and
        ``noise(layer, like, width, signs=False)`` is `ExampleNoise.draw`.
    start : callable, optional
        Changes the slots in place before the step, so that no two numbers are alike.
    num_samples, chunk_sizes : int, sequence of int
        Samples in the whole job; samples at once, of which the first and the last are tried.
    deterministic, **options
        Of `Posterior`: weights that stay points, ``estimator``, ``antithetic``.
    """
    failures: list[str] = []
    expected: dict[torch.dtype, Slots] = {}
    few, many = chunk_sizes[0], chunk_sizes[-1]
    for keeps_noise, chunk_size, num_parts, dtype in (
        (True, few, 1, torch.float64), (True, many, 2, torch.float64), (False, few, 2, torch.float64),
        (False, many, 1, torch.float64), (True, few, 1, torch.float32),
    ):  # each pair of settings  # fmt: skip
        step = _family_step(
            comm, family, dtype, start, num_samples=max(num_samples, comm.grid.sample_size),
            chunk_size=chunk_size, deterministic=deterministic, keeps_noise=keeps_noise, **options,
        )  # fmt: skip
        x, y = make_examples(step.likelihood, dtype)
        if dtype not in expected:

            def compute(step=step, x=x, y=y) -> Slots:
                definition = _definition(step, weights, outputs)
                return _differentiate_family(step, definition, kl, log_prior, x, y)

            # Rows that belong to samples differ from rank to rank
            expected[dtype] = _on_first(comm, compute) if step.posterior.is_replicated else compute()
        mine = range(NUM_EXAMPLES)[comm.grid.local_examples(NUM_EXAMPLES)]
        ends = [mine.start + len(mine) * part // num_parts for part in range(num_parts + 1)]
        for start_, stop in itertools.pairwise(ends):
            step.accumulate_(x[start_:stop], y[start_:stop], NUM_EXAMPLES, is_last=stop == mine.stop)
        step.reduce_()
        result = step.update_()
        numbers = torch.tensor([result.nelbo, result.kl], dtype=torch.float64)
        witness: Any = step.optimizer.optimizer
        got = dict(zip(("objective", "KL"), numbers)) | witness.seen
        case = f"{step.num_samples} samples, chunk_size {chunk_size}, {num_parts} micro-batches, noise "
        case += "kept" if keeps_noise else "drawn again"
        failures += _differences(comm, got, expected[dtype], dtype, case)
    _agree(comm, family.name, failures)


class _Witness(torch.optim.Optimizer):
    """Keeps the gradients that an optimizer is given, and updates nothing."""

    def __init__(self, posterior: Posterior):
        self._names = [name for name, _ in posterior.named_parameters()]
        super().__init__(posterior.parameters(), {"lr": 0.0})

    def step(self, closure: None = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.seen = {name: p.grad.clone() for name, p in zip(self._names, parameters)}


def _family_step(
    comm: GridComm,
    family: Family,
    dtype: torch.dtype,
    start: Callable[[Slots], None] | None,
    num_samples: int,
    chunk_size: int,
    **options,
) -> VariationalStep:
    """Return a step of a small network with points. Local."""
    with Key(SEED, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(NUM_INPUTS, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    posterior = Posterior(net, family, samples=comm.grid.local_samples(num_samples), **options)
    if start is not None:
        with torch.no_grad():
            start(dict(posterior.named_parameters()))
    return VariationalStep(
        posterior, Categorical(3), _Witness(posterior), comm, num_samples=num_samples, num_train_examples=100,
        seed=SEED, kl_weight=0.7, chunk_size=chunk_size, batching="vmap",
    )  # fmt: skip


def _normal(posterior: Posterior, key: Key, count: int) -> Tensor:
    """Return normal numbers of a key in float64, with the sign of its sample. Local."""
    sign = 1
    if posterior.antithetic:
        key, sign = key.of(key.sample & ~1), 1 - 2 * (key.sample % 2)
    return sign * key.normal(count).double()


def _definition(
    step: VariationalStep, weights: Callable[..., Tensor], outputs: Callable[..., Tensor] | None = None
) -> Callable[..., tuple[Any, Tensor]]:
    """Return what gives weights [P] (none with noise per example) and outputs [B, 3] of a sample. Local."""
    posterior = step.posterior
    module = copy.deepcopy(posterior.module).double()

    def definition(slots: Slots, sample: int, x: Tensor) -> tuple[Any, Tensor]:
        key = step.key.of(sample)
        layout = posterior.random
        of_tensors = [_normal(posterior, key.child(layout.numbers[n]), s.numel()) for n, s in layout.shapes.items()]
        eps = torch.cat([torch.empty(0, dtype=torch.float64), *of_tensors])
        if outputs is not None:
            noise = ExampleNoise()
            noise.begin_sample(key)

            def draw(layer: int, like: Tensor, width: int, signs: bool = False) -> Tensor:
                return noise.draw(layer, like.to(posterior.dtype), width, signs).double()

            return None, outputs(posterior.buffer.named(slots), posterior.random.views(eps), draw, x)

        def z(count: int, *path: int) -> Tensor:
            return _normal(posterior, key.child(Stream.FACTOR, len(path), *path), count)

        w = weights(slots, eps, z)
        points = posterior.point.views(slots["points"]) if "points" in slots else {}
        return w, torch.func.functional_call(module, posterior.random.views(w) | points, (x,))

    return definition


def _differentiate_family(
    step: VariationalStep,
    definition: Callable[..., tuple[Any, Tensor]],
    kl: Callable[[Slots], Tensor],
    log_prior: Callable[[Tensor], Tensor] | None,
    x: Tensor,
    y: Tensor,
) -> Slots:
    """Return objective, KL and gradients by autograd, all examples at once, in float64. Local.

    Rows that belong to samples train alone: the gradient of each is that of its own objective.
    """
    posterior, factor = step.posterior, 0.7 / step.num_train_examples
    leaves = _leaves(posterior)
    owned = posterior.samples if not posterior.is_replicated else []
    data_term, divergence = torch.zeros(2, dtype=torch.float64).unbind()
    for sample in owned or range(step.num_samples):
        slots = {name: leaf[owned.index(sample)] for name, leaf in leaves.items()} if owned else leaves
        w, outputs = definition(slots, sample, x.double())
        data_term = data_term - step.likelihood.log_prob(outputs, y).mean()
        if log_prior is not None:
            divergence = divergence - log_prior(w)
        if owned:
            divergence = divergence + kl(slots)
    if owned:
        return _gradients(data_term + factor * divergence, leaves)
    data_term, divergence = data_term / step.num_samples, divergence / step.num_samples + kl(leaves)
    objective = data_term + factor * divergence
    return {"objective": objective.detach(), "KL": divergence.detach()} | _gradients(objective, leaves)


def _leaves(posterior: Posterior) -> Slots:
    """Return copies of the trained slots in float64, to be differentiated by. Local."""
    return {name: p.detach().double().requires_grad_() for name, p in posterior.named_parameters()}


def _gradients(loss: Tensor, leaves: Slots) -> Slots:
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients))
