"""One rank's share of a step, rehearsed: its memory without the memory, its collectives without the ranks (floor 7).

The step is the real one. Its tensors are torch's fake tensors, which have shapes and no content, so that the share of a large
network on 1,024 ranks is rehearsed on a laptop; a `GridComm` whose other ranks are imagined notes what would be sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from .comm import GridComm
from .config import Config
from .data import Manifest
from .errors import DataError
from .experiment import Experiment
from .grid import Grid
from .network import Operation
from .optim import optimizer_maker
from .stack import first_line
from .step import VariationalStep


@dataclass(frozen=True)
class Collective:
    """What a rank takes part in at every step."""

    operation: Operation
    axis: str
    num_bytes: float
    """Of the whole buffer."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step takes on one rank, the busiest."""

    local_samples: int
    local_batch_size: int
    parameter_bytes: int
    """Parameters that are trained."""
    gradient_bytes: int
    """Their gradients, and what travels with them."""
    sample_bytes: int
    """Weights, noise and scales of the sample at hand, buffers of the module."""
    optimizer_bytes: int
    """State of the optimizer, and what its update takes besides."""
    activation_bytes: int
    """Batch, activations of a chunk of samples, gradients of its weights: the peak above the rest."""
    peak_bytes: int
    """All of it at its peak."""
    flops: float
    """Of all samples of this rank: products of matrices and convolutions, forward and backward (FLOP)."""
    collectives: tuple[Collective, ...]


class ImaginedComm(GridComm):
    """The place of rank 0 in a grid whose other ranks are not there: what is sent is noted, and goes nowhere.

    Sums are what this rank has, gathered tensors its own again and again. Local.
    """

    library = "imagined"

    def __init__(self, grid: Grid, config: Config, device: torch.device | str = "cpu"):
        super().__init__(grid, device, config.grid.reduction, config.grid.compression)
        self.collectives: list[Collective] = []

    def sum_(self, tensors, axis="world", *, compressed=False) -> None:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        for route in self._routes[axis]:
            for tensor in tensors:
                self._note("all-reduce", route, tensor, compressed)

    def start_sum_(self, flat, axis="world") -> Callable[[], None]:
        self._note("all-reduce", axis, flat)
        return lambda: None

    def max_(self, tensors, axis="world") -> None:
        self.sum_(tensors, axis)

    def reduce_scatter_(self, flat, axis, *, compressed=False) -> torch.Tensor:
        self._note("reduce-scatter", axis, flat, compressed)
        shares, index = self._shares(len(flat), axis)
        return flat.detach()[shares[index].start : shares[index].stop]

    def gather_shares_(self, flat, axis, *, compressed=False) -> None:
        self._note("all-gather", axis, flat, compressed)

    def gather(self, tensor, axis) -> torch.Tensor:
        if not self._routes[axis]:
            return tensor
        gathered = tensor.detach().repeat(self._extents[axis], *[1] * (tensor.dim() - 1))
        self._note("all-gather", axis, gathered)
        return gathered

    def broadcast_(self, tensors, root=0, axis="world") -> None:
        pass  # at the start only

    def _note(self, operation: Operation, axis: str, tensor: torch.Tensor, compressed: bool = False) -> None:
        if self._extents[axis] > 1 and tensor.numel():
            is_half = compressed and self.compression != "none"
            num_bytes = tensor.numel() * (2 if is_half else tensor.element_size())
            self.collectives.append(Collective(operation, axis, num_bytes))


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak, real or fake.

    Attributes
    ----------
    live_bytes, peak_bytes : int
        After the last operation; most so far. What an operation takes inside itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return result

    @property
    def live_bytes(self) -> int:
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())


def share_of(config: Config, manifest: Manifest, comm: GridComm) -> tuple[VariationalStep, tuple]:
    """Return the step of a rank of a grid, and the arguments of a call: a batch of nothing in particular. Local.

    A ``chunk_size`` that is measured on GPUs at the first step counts as 1.
    """
    if config.chunk_size == "auto":
        config = replace(config, chunk_size=1)
    experiment = Experiment(config, comm, manifest)
    num_examples = manifest.num_examples(config.data.train_split)
    batch = min(config.global_batch_size, num_examples)
    step, _ = experiment.build_step(num_examples, num_batches=-(-num_examples // batch))
    part = comm.grid.local_examples(batch)
    shapes = {name: (part.stop - part.start, *spec.shape) for name, spec in manifest.arrays.items()}
    x = torch.randn(shapes["x"], dtype=experiment.dtype, device=comm.device)
    if manifest.num_classes is None:
        y = torch.randn(shapes["y"], dtype=experiment.dtype, device=comm.device)
    else:
        y = torch.randint(0, manifest.num_classes, shapes["y"], device=comm.device)
    return step, (x, y, batch)


def rehearse(config: Config, manifest: Manifest, grid: Grid, *, is_on_gpu: bool = False) -> Rehearsal:
    """Return what a step takes on a rank of a grid. Local, and without that memory.

    Raises
    ------
    DataError
        The network cannot be rehearsed, because what it does depends on numbers (it asks a tensor for its content).
    """
    comm = ImaginedComm(grid, config)
    with _default_dtype(config), FakeTensorMode(), LiveMemory() as memory:
        step, arguments = share_of(config, manifest, comm)
        posterior = step.posterior
        step._is_prepared = step._has_tried_batch = True  # what is prepared asks for numbers
        posterior.network.looked_at = {True, False}
        step._has_said_passes = True
        begun = memory.live_bytes
        memory.peak_bytes = 0
        batch_bytes = sum(a.numel() * a.element_size() for a in arguments[:2])
        try:
            with FlopCounterMode(display=False) as flops:
                step.accumulate_gradient_(*arguments)
            posterior.attach_gradients_()
        except RuntimeError as error:
            raise DataError(f"{config.model.name} cannot be rehearsed: {first_line(error)}") from error
        posterior.add_kl_gradient_(1.0)
        if config.optimizer.max_gradient_norm is not None:
            step.optimizer.clip_(config.optimizer.max_gradient_norm)
        peak = memory.peak_bytes
        if config.optimizer.sharded:
            comm.gather_shares_(posterior.flat, "sample")  # of the update
        updated = [p.numel() for g in step.optimizer.optimizer.param_groups for p in g["params"]]
        item_bytes = posterior.flat.element_size()
    state, besides = optimizer_bytes(config, num_tensors=min(len(updated), 2))
    at_once = sum(updated) if is_on_gpu else max(updated)  # torch updates tensors together on GPUs only
    state, besides = int(state * sum(updated) * item_bytes), int(besides * at_once * item_bytes)
    parameters, gradients = (t.numel() * item_bytes for t in (posterior.flat, posterior.reduced))
    return Rehearsal(
        local_samples=len(grid.local_samples(config.num_samples)),
        local_batch_size=len(arguments[0]),
        parameter_bytes=parameters,
        gradient_bytes=gradients,
        sample_bytes=begun - batch_bytes - parameters - gradients,
        optimizer_bytes=state + besides,
        activation_bytes=batch_bytes + max(0, peak - begun),
        peak_bytes=max(peak + state, begun + state + besides),
        flops=float(flops.get_total_flops()),
        collectives=tuple(comm.collectives),
    )


@contextlib.contextmanager
def _default_dtype(config: Config) -> Iterator[None]:
    """Make networks in their dtype at once: fake ones cannot be converted."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if config.dtype == "float64" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def optimizer_bytes(config: Config, num_tensors: int) -> tuple[float, float]:
    """Return what an optimizer keeps, and what its update takes besides, as multiples of what it updates at once. Local.

    Tried on tensors of its own: two where there are several, because one may still hold what the next one takes anew.
    """
    with LiveMemory() as memory:
        parameters = [nn.Parameter(torch.zeros(256, 256)) for _ in range(num_tensors)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        begun = memory.live_bytes
        optimizer = optimizer_maker(config.optimizer)(parameters)
        for _ in range(2):
            memory.peak_bytes = 0
            optimizer.step()
        kept, peak = memory.live_bytes, memory.peak_bytes
    unit = parameter.numel() * parameter.element_size()
    return (kept - begun) / (num_tensors * unit), (peak - kept) / unit
