"""Test that your own objective is exact on every grid (needs pytest).

In a test file::

    from hpc_bnn.testing import objective_is_exact  # noqa: F401, a pytest fixture

    def test_my_objective(objective_is_exact):
        objective_is_exact(MyObjective(), reference, likelihood=hpc_bnn.Implicit(2))

where ``reference(outputs [K, B, ...], y [B, ...])`` is the data term in one line. Run it with ``pytest`` on one rank,
and with ``mpirun -np 4 python -m mpi4py -m pytest FILE`` on all grids of four. All ranks raise the same failure.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from .comm import GridComm, abort, connect, wait_for_others, world_size
from .grid import sample_sizes
from .likelihoods import Bernoulli, Categorical, Likelihood, Poisson
from .noise import Key, Stream
from .objectives import Objective
from .posteriors import GaussianPrior, MeanFieldGaussian
from .training.step import VariationalStep

NUM_EXAMPLES, NUM_INPUTS, SEED = 13, 6, 5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class ObjectiveDiffersError(AssertionError):
    """An objective is not its definition, on which all ranks agree."""


@pytest.fixture
def objective_is_exact(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Give a function that compares an objective with its definition on every grid of the job (`check_objective`)."""

    def check(objective: Objective, reference: Callable[[Tensor, Tensor], Tensor], **options) -> None:
        ranks = world_size()
        try:
            for sample_size in sample_sizes(ranks):
                check_objective(connect(sample_size, device="cpu"), objective, reference, **options)
        except ObjectiveDiffersError:
            raise  # on all ranks
        except Exception:
            if not wait_for_others(5.0):  # only here: pytest would catch it, and the others wait for ever
                with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
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
    chunks of the samples. Relative tolerance: 1e-12 in float64, 1e-5 in float32. Collective over the world.

    Parameters
    ----------
    comm : GridComm
        The process grid.
    objective : Objective
        The objective to test.
    reference : callable
        ``reference(outputs, y)``: outputs [K, B, ...] of all samples and targets y [B, ...] to the mean over the
        examples of the data term, a scalar.
    likelihood : Likelihood
        Likelihood of the step.
    num_samples, chunk_sizes, dtypes : sequences
        Values to test.

    Raises
    ------
    ObjectiveDiffersError
        On all ranks, with the cases that differ, and where.
    """
    failures = []
    for dtype in dtypes:
        for count in num_samples:
            count = max(comm.grid.sample_size, 1) if count == "one per rank" else count
            expected = None
            for chunk_size in chunk_sizes:
                step = make_step(comm, objective, likelihood, dtype, num_samples=count, chunk_size=chunk_size)
                x, y = make_examples(likelihood, dtype)
                if expected is None:
                    expected = differentiate(step, reference, x, y)
                mine = comm.grid.local_examples(NUM_EXAMPLES)
                step.accumulate_gradient_(x[mine], y[mine], NUM_EXAMPLES)
                got = step.posterior.tally[0], step.posterior.gradient
                errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, expected)]
                if not all(error < TOLERANCE[dtype] for error in errors):  # NaN is below nothing
                    failures.append(
                        f"{dtype}, {count} samples, chunk_size {chunk_size}, grid {comm.grid}, "
                        f"rank {comm.grid.rank}: relative error of the loss {errors[0]:.1e}, of the gradient {errors[1]:.1e}"
                    )
    failures = [failure for theirs in comm.gather_objects(failures) for failure in theirs]
    if failures:
        raise ObjectiveDiffersError("\n".join([f"{objective.name} differs from its definition:", *failures]))


def make_step(
    comm: GridComm, objective: Objective, likelihood: Likelihood, dtype: torch.dtype, **options
) -> VariationalStep:
    """Return a step of a small mean-field network. Local."""
    with Key(SEED, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(NUM_INPUTS, 10), nn.Tanh(), nn.Linear(10, likelihood.num_outputs))
    posterior = MeanFieldGaussian(
        likelihood.wrap(net).to(dtype), prior=GaussianPrior(0.7), init_std=0.1, deterministic=()
    )
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    return VariationalStep(
        posterior,
        likelihood,
        optimizer,
        comm,
        num_train_examples=100,
        seed=SEED,
        objective=objective,
        **options,
    )


def make_examples(likelihood: Likelihood, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return inputs [13, 6] and targets [13, ...] that go with a likelihood. Local."""
    generator = Key(SEED, Stream.DATA_ORDER).generator()
    x = torch.randn(NUM_EXAMPLES, NUM_INPUTS, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, Categorical):
        return x.to(dtype), torch.randint(0, likelihood.num_classes, (NUM_EXAMPLES,), generator=generator)
    shape = (NUM_EXAMPLES, likelihood.num_targets)
    if isinstance(likelihood, (Bernoulli, Poisson)):
        top = 2 if isinstance(likelihood, Bernoulli) else 5
        return x.to(dtype), torch.randint(0, top, shape, generator=generator)
    return x.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def differentiate(
    step: VariationalStep, reference: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the data term of the step's next samples and its gradient, by autograd, all samples at once. Local."""
    posterior = step.posterior
    leaves = {name: p.detach().clone().requires_grad_() for name, p in posterior.named_parameters()}
    points = posterior.point.views(leaves["points"]) if "points" in leaves else {}
    outputs = []
    for sample in range(step.num_samples):
        generator = step.key.of(sample).generator()
        eps = torch.randn(posterior.num_weights, dtype=x.dtype, generator=generator)
        weights = posterior.random.views(leaves["loc"] + leaves["log_scale"].exp() * eps)
        outputs.append(torch.func.functional_call(posterior.module, weights | points, (x,)))
    loss = reference(torch.stack(outputs), y)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.cat([gradient.reshape(-1) for gradient in gradients])
