"""Optimizers and learning-rate schedules, from torch, and the annealing of the KL."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..comm import GridComm, map_leaves
from ..config import KlSchedule, OptimizerConfig, check_field
from ..errors import ConfigError, Fault, import_object
from ..posteriors import Posterior

ELEMENTWISE = (
    "Adam",
    "AdamW",
    "SGD",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "Rprop",
    "ASGD",
)
"""Optimizers of torch that treat every number by itself, so that they may see parameters flat or in parts."""


class JobOptimizer:
    """The optimizer of a job: sums the gradient over the ranks, and updates the parameters on each of them.

    This class: every rank updates all parameters, which are the same on all replicas.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Over ``posterior.parameters()`` or ``posterior.weight_parameters()``.
    """

    overlaps = False
    """Whether sums begin during the last backward pass."""

    def __init__(self, optimizer: torch.optim.Optimizer, posterior: Posterior, comm: GridComm):
        self.optimizer, self.posterior, self.comm = optimizer, posterior, comm
        self.check()

    def check(self) -> None:
        """Verify what a user can do to the optimizer, before each step. Local; a microsecond or two.

        Raises
        ------
        ConfigError
            It decays weights that have a prior, ascends, or does not update the posterior's parameters.
        """
        groups = self.optimizer.param_groups
        for group in groups:
            if group.get("maximize"):
                raise ConfigError(Fault("maximize", True, "the objective is minimised", "Leave it out"))
            for key, value in group.items():
                is_decay = "weight_decay" in key and not isinstance(value, bool) and value
                if is_decay and any(map(self._has_prior, group["params"])):
                    raise ConfigError(_decay_fault(key, value))
        updated = [id(p) for group in groups for p in group["params"]]
        now = updated, [id(p) for p in self.posterior.parameters()]
        if now != self._checked:
            self._check_parameters(set(updated))
            self._checked = now

    _checked: tuple[list[int], list[int]] | None = None

    def _has_prior(self, parameter: nn.Parameter) -> bool:
        is_ours = any(parameter is p for p in self.posterior.all_parameters())
        return is_ours and self.posterior.has_prior(parameter)

    def _check_parameters(self, updated: set[int]) -> None:
        of_network = {id(p) for p in self.posterior.module.parameters()} & updated
        if of_network or not {id(p) for p in self.posterior.all_parameters()} & updated:
            rule = (
                f"it updates {len(of_network)} parameters of the network itself, which each draw writes anew"
                if of_network
                else "it updates none of the posterior's parameters"
            )
            remedy = "Make it with posterior.parameters()"
            raise ConfigError(Fault("optimizer", type(self.optimizer).__name__, rule, remedy))

    @staticmethod
    def of(optimizer: torch.optim.Optimizer, posterior: Posterior, comm: GridComm) -> JobOptimizer:
        """Return the optimizer of the job that suits a posterior."""
        kind = JobOptimizer if posterior.is_replicated else MemberOptimizer
        return kind(optimizer, posterior, comm)

    def reduce_(self) -> None:
        """Sum the gradient of the data term and what stands behind it over the job. Collective over the world."""
        posterior, comm = self.posterior, self.comm
        if comm.compression != "none":
            comm.sum_(posterior.gradient, compressed=True)
            comm.sum_(posterior.behind_gradient)
        else:
            comm.sum_(posterior.reduced)

    def overlapping(self) -> contextlib.AbstractContextManager:
        """Return a context for the backward pass after which no gradient of the step is folded in any more."""
        return contextlib.nullcontext()

    def start_(self) -> None:
        """Begin the sums that `overlapping` has not begun; after the last sample, before ``posterior.finish_``."""

    def local_checksum(self) -> Tensor:
        """Return the sum of this rank's part of the gradient and of what stands behind it. Local, before `reduce_`."""
        return self.posterior.reduced.sum()

    def clip_(self, max_norm: float) -> None:
        """Scale the gradient of the job (of each member of an ensemble) down to a norm of at most ``max_norm``.

        Local, where a subclass does not say otherwise; as all that follows.
        """
        self.posterior.clip_gradient_(max_norm)

    def step(self) -> None:
        """Update the parameters."""
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the job, in the form of torch for all its parameters: nothing of the grid is in it."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, on this or another grid. Local."""
        self.optimizer.load_state_dict(state)


def _decay_fault(key: str, value: float) -> Fault:
    return Fault(
        "optimizer.arguments",
        f"{key} {value}",
        "the prior is what decays the weights of a posterior, and a decay of the optimizer would shrink them once more, and "
        "pull the logarithms of the scales to 0, which is scales to 1",
        f"Set {key} to 0 and choose the prior (<posterior.prior_std>, GaussianPrior(std)); weights without a prior "
        "(posterior.points) may decay in a group of their own",
        "optimizer",
    )


OVERLAP_BYTES = 4 * 2**20
"""Least size of a sum that is begun during the backward pass; at most `OVERLAP_PARTS` are (bytes)."""

OVERLAP_PARTS = 16


class OverlappingOptimizer(JobOptimizer):
    """Sums the gradient in parts, the first of them while the last backward pass of a step still runs.

    It pays where ranks wait for a network while they could compute: docs/collectives.md says what was measured.

    Raises
    ------
    ConfigError
        The posterior adds to all gradients after its backward pass, its ranks hold different parameters, or the gradient
        is compressed.
    """

    overlaps = True

    def __init__(self, optimizer: torch.optim.Optimizer, posterior: Posterior, comm: GridComm):
        problem = posterior.why_indivisible()
        if comm.compression != "none":
            problem = "compressed sums are made in shares, one after another"
        if problem is not None:
            raise ConfigError(Fault("grid.overlap", True, problem, "Leave it out"))
        super().__init__(optimizer, posterior, comm)
        num_bytes = max(OVERLAP_BYTES, posterior.gradient.nbytes // OVERLAP_PARTS)
        self._parts = posterior.divide_(num_bytes, self._see)
        self._is_last = False
        self._begin()

    def _begin(self) -> None:
        self._num_started = 0
        self._missing = [len(part.layout) for part in self._parts]
        self._spans: list[Tensor] = []
        self._waits: list[Callable[[], None]] = []
        self._checksum = self.posterior.reduced.new_zeros(())

    def _see(self, number: int, num_gradients: int) -> None:
        """Note that gradients of a part have come, and begin the sums of complete ones, on all ranks in one order."""
        if self._is_last:
            self._missing[number] -= num_gradients
            while self._num_started < len(self._parts) and self._missing[self._num_started] <= 0:
                self._start_next()

    def _start_next(self) -> None:
        for span in self.posterior.complete_(self._parts[self._num_started]):
            self._checksum += span.sum()
            self._waits.append(self.comm.start_sum_(span))
            self._spans.append(span)
        self._num_started += 1

    @contextlib.contextmanager
    def overlapping(self) -> Iterator[None]:
        """See `JobOptimizer.overlapping`. Collective over the world with `start_`: a sum for each span of a part."""
        self._is_last = True
        try:
            yield
        except BaseException:
            self._begin()  # the step is lost
            raise
        finally:
            self._is_last = False
        started = itertools.chain(*map(self.posterior.parameters_of, self._parts[: self._num_started]))
        if any(parameter.grad is not None for parameter in started):
            rule = "a weight of this network gets its gradient in several goes (reentrant checkpointing)"
            raise ConfigError(Fault("grid.overlap", True, rule, "Leave it out, or use_reentrant=False"))

    def start_(self) -> None:
        while self._num_started < len(self._parts):
            self._start_next()

    def local_checksum(self) -> Tensor:
        return self._checksum + sum(span.sum() for span in self._rest())

    def reduce_(self) -> None:
        """See `JobOptimizer.reduce_`; the rest is one sum more, over the same ranks."""
        rest = self._rest()
        packed = torch.cat(rest)
        for wait in [*self._waits, self.comm.start_sum_(packed)]:
            wait()
        torch._foreach_copy_(rest, list(packed.split([len(part) for part in rest])))
        self._begin()

    def _rest(self) -> list[Tensor]:
        """Return what stands between the spans of the parts, and behind them."""
        reduced = self.posterior.reduced
        places = sorted((span.storage_offset(), span.storage_offset() + len(span)) for span in self._spans)
        starts, ends = [0, *(end for _, end in places)], [*(start for start, _ in places), len(reduced)]
        return [reduced[start:end] for start, end in zip(starts, ends) if start < end]


class MemberOptimizer(JobOptimizer):
    """The optimizer of a deep ensemble: each rank updates its own members."""

    def reduce_(self) -> None:
        """See `JobOptimizer.reduce_`: the gradient of a member is summed over its data group. Collective over the world."""
        self.comm.sum_(self.posterior.gradient, "data", compressed=True)
        self.comm.sum_(self.posterior.behind_gradient)

    @property
    def _is_stacked(self) -> bool:
        """Whether one parameter holds all members of this rank, as rows; otherwise there are some for each member."""
        (group,) = self.optimizer.param_groups
        return len(group["params"]) == 1 and group["params"][0].shape == self.posterior.members.shape

    def state_dict(self) -> dict[str, Any]:
        """See `JobOptimizer.state_dict`. Collective over ``sample_comm``."""
        mine = map_leaves(self.optimizer.state_dict(), Tensor, lambda t: t.detach().to("cpu", copy=True))
        parts = self.comm.gather_objects(mine, "sample")
        if self._is_stacked:
            return _join(parts)
        states = [part["state"][number] for part in parts for number in sorted(part["state"])]
        (group,) = mine["param_groups"]
        count = sum(len(part["param_groups"][0]["params"]) for part in parts)
        return {"state": dict(enumerate(states)), "param_groups": [group | {"params": list(range(count))}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        posterior, count = self.posterior, self.posterior.num_members
        mine = self.comm.grid.local_samples(count)
        if self._is_stacked:
            rows = slice(mine.start, mine.stop)
            state = map_leaves(state, Tensor, lambda t: t[rows] if t.ndim and len(t) == count else t)
        else:
            (group,) = state["param_groups"]
            each = len(group["params"]) // posterior.num_members
            numbers = range(mine.start * each, mine.stop * each)
            states = {i: state["state"][n] for i, n in enumerate(numbers) if n in state["state"]}
            state = {"state": states, "param_groups": [group | {"params": list(range(len(numbers)))}]}
        self.optimizer.load_state_dict(state)


def _join(trees: list[Any]) -> Any:
    """Join the optimizer states of the members: rows of tensors one after another, the rest is the same."""
    first = trees[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(trees)
    if isinstance(first, dict):
        return {key: _join([tree[key] for tree in trees]) for key in first}
    return first


class ShardedOptimizer(JobOptimizer):
    """Optimizer state in parts over the sample group: ZeRO stage 1 (Rajbhandari et al., 2020).

    Each rank of a sample group receives its part of the gradient (reduce-scatter), sums it over its data group, which
    holds the same part, updates its part of the parameters, and the parts are gathered. The numbers are those of the
    unsharded optimizer. Mean-field doubles the parameters, so that Adam keeps four numbers per weight: they are divided by
    the extent of the sample axis.

    Parameters
    ----------
    make : callable
        Makes the optimizer of a list of parameters: ``lambda parameters: torch.optim.Adam(parameters, lr=1e-3)``. It
        has to treat every number by itself.
    posterior : Posterior
        With the same parameters on all ranks.
    comm : GridComm
        The process grid.

    Raises
    ------
    ConfigError
        The posterior is an ensemble, or the optimizer looks at whole tensors.
    """

    def __init__(
        self,
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        posterior: Posterior,
        comm: GridComm,
    ):
        if not posterior.is_replicated:
            rule = (
                "an ensemble has its members, and their optimizer states, spread over the sample axis already"
            )
            raise ConfigError(Fault("optimizer.sharded", True, rule, "Leave it out"))
        mine = comm.grid.share(len(posterior.flat), "sample")
        self._part = slice(mine.start, mine.stop)
        self._parameter = nn.Parameter(posterior.flat[self._part])
        optimizer = make([self._parameter])
        _check_elementwise(optimizer)
        super().__init__(optimizer, posterior, comm)

    def _check_parameters(self, updated: set[int]) -> None:
        pass  # it has made its parameter itself

    def _has_prior(self, parameter: nn.Parameter) -> bool:
        return True  # a share of all weights

    def reduce_(self) -> None:
        """See `JobOptimizer.reduce_`; only this rank's part of the gradient is then that of the job."""
        posterior, comm = self.posterior, self.comm
        part = comm.reduce_scatter_(posterior.gradient, "sample", compressed=True)
        comm.sum_(part, "data", compressed=True)
        comm.sum_(posterior.behind_gradient)

    def clip_(self, max_norm: float) -> None:
        """See `JobOptimizer.clip_`. Collective over ``sample_comm``: one number."""
        part = self.posterior.gradient[self._part]
        square = torch.linalg.vector_norm(part.double()).square()
        self.comm.sum_(square, "sample")
        part.mul_((max_norm / (square.sqrt() + 1e-6)).clamp(max=1))

    def step(self) -> None:
        """Update the parameters. Collective over ``sample_comm``."""
        self._parameter.grad = self.posterior.gradient[self._part]
        self.optimizer.step()
        self.comm.gather_shares_(self.posterior.flat, "sample")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as the unsharded optimizer has it. Collective over ``sample_comm``."""
        mine, shapes = self.optimizer.state_dict(), self._shapes()
        state: dict[int, dict[str, Any]] = {
            number: {} for number in range(len(shapes) if mine["state"] else 0)
        }
        for key, value in mine["state"].get(0, {}).items():
            if not isinstance(value, Tensor):
                parts = [value] * len(shapes)
            elif value.ndim == 0:  # a counter of its own for each: optimizers count in place
                parts = [value.clone() for _ in shapes]
            else:
                whole = self.comm.gather(value, "sample")
                lengths = [shape.numel() for shape in shapes]
                parts = [part.view(shape) for part, shape in zip(whole.split(lengths), shapes)]
            for number, part in enumerate(parts):
                state[number][key] = part
        group = mine["param_groups"][0] | {"params": list(range(len(shapes)))}
        return {"state": state, "param_groups": [group]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine: dict[str, Any] = {}
        for key, value in state["state"].get(0, {}).items():
            mine[key] = value
            if isinstance(value, Tensor) and value.ndim:
                slots = [state["state"][number][key] for number in range(len(self._shapes()))]
                mine[key] = torch.cat([slot.reshape(-1) for slot in slots])[self._part]
        group = state["param_groups"][0] | {"params": [0]}
        self.optimizer.load_state_dict({"state": {0: mine} if mine else {}, "param_groups": [group]})

    def _shapes(self) -> list[torch.Size]:
        return [parameter.shape for parameter in self.posterior.parameters()]


def _check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    kind = type(optimizer)
    if kind.__name__ not in ELEMENTWISE or not kind.__module__.startswith("torch.optim"):
        rule = (
            f"its state can be divided for {', '.join(ELEMENTWISE)} only, which treat every number by itself"
        )
        raise ConfigError(
            Fault("optimizer.sharded", kind.__name__, rule, "Leave it out, or use <optimizer.name> AdamW")
        )


def build_optimizer(
    config: OptimizerConfig,
    posterior: Posterior,
    comm: GridComm,
    num_epochs: int,
    steps_per_epoch: int,
    overlap: bool = False,
) -> tuple[JobOptimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer and the schedule of its learning rate. Local.

    Optimizers of torch that treat every number by itself see the parameters flat, others a tensor per weight.

    Raises
    ------
    ConfigError
        The optimizer is unknown, or refuses its arguments.
    """
    make = optimizer_maker(config)
    if config.sharded:
        optimizer: JobOptimizer = ShardedOptimizer(make, posterior, comm)
    else:
        is_flat = _path(config) in [f"torch.optim.{name}" for name in ELEMENTWISE]
        parameters = posterior.parameters() if is_flat else posterior.weight_parameters()
        kind = OverlappingOptimizer if overlap else JobOptimizer.of
        optimizer = kind(make(parameters), posterior, comm)

    def factor(num_steps: int) -> float:
        return learning_rate_factor(config, num_steps / steps_per_epoch, num_epochs)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, factor)


def optimizer_maker(config: OptimizerConfig) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return what makes the optimizer of a config over some parameters. Local.

    Raises
    ------
    ConfigError
        The optimizer is unknown; and, when it is made, that it refuses its arguments.
    """
    # The prior is the decay of the weights: an optimizer's own would pull the scales as well.
    kind = import_object("optimizer.name", _path(config))
    arguments = config.arguments
    if "weight_decay" in inspect.signature(kind).parameters:
        arguments = {"weight_decay": 0.0, **arguments}

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            return kind(parameters, lr=config.learning_rate, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                Fault(
                    "optimizer.arguments",
                    config.arguments,
                    f"{config.name} refuses them ({error})",
                    "Fix the arguments",
                )
            ) from error

    return make


def _path(config: OptimizerConfig) -> str:
    return config.name if "." in config.name else f"torch.optim.{config.name}"


def learning_rate_factor(config: OptimizerConfig, epochs: float, num_epochs: int) -> float:
    """Return the learning rate after some epochs, as a multiple of ``config.learning_rate``. Local."""
    warmup = config.warmup_epochs
    if epochs < warmup:
        return epochs / warmup
    if config.schedule == "cosine":
        done = (epochs - warmup) / max(num_epochs - warmup, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if config.schedule == "step":
        return config.decay ** math.floor(epochs / config.decay_every_epochs + 1e-9)
    return 1.0


@dataclass(frozen=True)
class KlAnnealing:
    """Factor of the KL as a function of the steps made so far: it comes up to ``weight``.

    Call it with the number of steps, as `hpc_bnn.VariationalStep` does.

    Parameters
    ----------
    weight : float
        Factor that is reached; 1 is Bayes, below 1 a cold posterior.
    schedule : {"constant", "linear", "cosine", "cyclical"}
        From the start; up from 0 along a line (Sonderby et al., 2016) or half a cosine; or again and again: up from
        0 in the first half of each cycle, constant in the second (Fu et al., Cyclical Annealing Schedule, 2019).
    num_steps : float
        Steps until ``weight`` is reached; of cyclical the length of a cycle.
    """

    weight: float = 1.0
    schedule: KlSchedule = "constant"
    num_steps: float = 1.0

    def __post_init__(self):
        check_field("kl_weight", self.weight, "weight")
        check_field("kl_annealing.schedule", self.schedule)
        check_field("kl_annealing.num_epochs", self.num_steps, "num_steps")

    def __call__(self, num_steps: int) -> float:
        done = num_steps / self.num_steps
        if self.schedule == "cyclical":
            return self.weight * min(2 * (done % 1.0), 1.0)
        if self.schedule == "linear":
            return self.weight * min(done, 1.0)
        if self.schedule == "cosine":
            return self.weight * 0.5 * (1 - math.cos(math.pi * min(done, 1.0)))
        return self.weight
