"""Simulate one rank's step and evaluation on fake tensors: memory, FLOPs, collectives.

The step is the real one. Its tensors are torch's fake tensors, which have shapes and no content, so a laptop can
simulate one of 1,024 ranks with a large network. The other ranks do not exist: a transport records the messages.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from ..comm import GridComm, ObjectTransport
from ..comm.installed import first_line
from ..comm.simulated import Collective, SimulatedTensors
from ..config import Config, ModelConfig, PosteriorConfig
from ..data import ArraySpec, Manifest, Source
from ..data.dataset import scale_of
from ..data.manifest import inputs_of, torch_dtype
from ..errors import DataError
from ..grid import Grid
from ..likelihoods import Likelihood
from ..likelihoods.mixtures import CHUNK_ELEMENTS
from ..predictive import block_size, member_outputs, score_dataset
from ..run import Experiment, shown_examples
from ..training.optim import optimizer_maker
from ..training.step import VariationalStep
from ..training.updaters import DividedUpdater
from ..trees import Inputs


@dataclass(frozen=True)
class Rehearsal:
    """Memory, FLOPs and collectives of a step on the busiest rank."""

    local_samples: int
    local_batch_size: int
    parameter_bytes: int
    """Parameters that are trained."""
    gradient_bytes: int
    """Their gradients, and the numbers that are summed with them."""
    sample_bytes: int
    """Weights, noise and scales of the sample at hand, buffers of the module."""
    optimizer_bytes: int
    """State of the optimizer, and temporary memory of its update."""
    activation_bytes: int
    """Batch, activations of a chunk of samples, gradients of its weights: the peak above the rest."""
    peak_bytes: int
    """Peak of the whole in a step."""
    resident_bytes: int
    """Memory that stays between steps and during an evaluation: parameters, gradients, the sample, state of the
    optimizer."""
    forward_bytes: int
    """Of an evaluation: outputs and activations of a block of examples, with one sample."""
    evaluation_bytes: int
    """Peak of the whole in an evaluation with ``num_test_samples``."""
    flops: float
    """Of all samples of this rank: products of matrices and convolutions, forward and backward (FLOP)."""
    collectives: tuple[Collective, ...]

    @property
    def needed_bytes(self) -> int:
        """Peak of a run: of a step, or of an evaluation."""
        return max(self.peak_bytes, self.evaluation_bytes)


def imagined_comm(
    grid: Grid,
    config: Config,
    device: torch.device | str = "cpu",
    *,
    collectives: list[Collective] | None = None,
    ranks_per_node: int | None = None,
) -> GridComm:
    """Return rank 0 of a grid as a config wants it; what it would send is added to ``collectives``. Local.

    ``ranks_per_node`` None: all are on one node.
    """
    tensors, objects = SimulatedTensors(grid, [] if collectives is None else collectives), ObjectTransport()
    objects.local_size = min(ranks_per_node or grid.world_size, grid.world_size)
    return GridComm(grid, device, config.grid.reduction, config.grid.compression, tensors=tensors, objects=objects)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive after an operation, and their peak so far, real or fake.

    Temporary memory inside an operation is not counted.
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
        """Return the bytes of the tensors that are alive."""
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())


def share_of(config: Config, manifest: Manifest, comm: GridComm) -> tuple[VariationalStep, tuple]:
    """Return the step of a rank of a grid, and the arguments of a call: a batch without meaning. Local."""
    experiment = Experiment(config, comm, manifest)
    num_examples = manifest.num_examples(config.data.train_split)
    batch = min(config.global_batch_size, num_examples)
    step, _ = experiment.build_step(num_examples, num_batches=-(-num_examples // batch))
    step.comparison.looks = False  # there are no other ranks
    part = comm.grid.local_examples(batch)
    x, y = _batch_of(manifest, part.stop - part.start, experiment.dtype, comm.device)
    return step, (x, y, batch)


def _batch_of(
    manifest: Manifest,
    num_examples: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    make: Callable[..., torch.Tensor] = torch.randn,
) -> tuple[Inputs, torch.Tensor]:
    """Return inputs and targets without meaning, as a source delivers them; classes are 0, ids 1: 0 is often a padding."""
    found = {}
    for name, spec in manifest.arrays.items():
        is_whole = manifest.num_classes is not None if name == "y" else manifest.is_whole(name)
        shape = (num_examples, *spec.shape)
        kind = torch_dtype(spec.dtype)
        kind = kind if kind in (torch.bool, torch.int32) and name != "y" else torch.int64
        whole, number = {"dtype": kind, "device": device}, {"dtype": dtype, "device": device}
        found[name] = torch.full(shape, int(name != "y"), **whole) if is_whole else make(shape, **number)
    return inputs_of(found), found["y"]


def rehearse(
    config: Config, manifest: Manifest, grid: Grid, *, is_on_gpu: bool = False, ranks_per_node: int | None = None
) -> Rehearsal:
    """Return memory, FLOPs and collectives of a step on a rank of a grid. Local; it does not need that memory.

    `DataError` where the control flow of the network depends on numbers.
    """
    collectives: list[Collective] = []
    comm = imagined_comm(grid, config, collectives=collectives, ranks_per_node=ranks_per_node)
    with _default_dtype(config), FakeTensorMode(), LiveMemory() as memory:
        step, arguments = share_of(config, manifest, comm)
        posterior = step.posterior
        step.leave_out_checks()  # they ask for numbers
        posterior.begin_()  # makes what all steps keep
        begun = memory.live_bytes
        memory.peak_bytes = 0
        batch_bytes = sum(tensor.nbytes for tensor in arguments[:2])
        with _rehearsing(config), FlopCounterMode(display=False) as flops:
            step.accumulate_batch_(*arguments)
            step.reduce_()
            posterior.finish_(step.scalars)
        posterior.add_kl_(step.scalars)
        if config.optimizer.max_gradient_norm is not None:
            step.updater.clip_(config.optimizer.max_gradient_norm)
        peak = memory.peak_bytes
        if isinstance(step.updater, DividedUpdater):
            step.updater.gather_()  # of the update
        with _rehearsing(config):
            forward = _forward_bytes(config, manifest, step, memory)
        updated = [p.numel() for g in step.optimizer.optimizer.param_groups for p in g["params"]]
        item_bytes = posterior.buffer.flat.element_size()
    state, besides = optimizer_bytes(config, num_tensors=min(len(updated), 2))
    at_once = sum(updated) if is_on_gpu else max(updated)  # torch updates tensors together on GPUs only
    state, besides = int(state * sum(updated) * item_bytes), int(besides * at_once * item_bytes)
    parameters, gradients = (t.numel() * item_bytes for t in (posterior.buffer.flat, posterior.buffer.reduced))
    resident = begun - batch_bytes + state
    evaluation = evaluation_bytes(config, manifest, grid, resident, forward, is_on_gpu=is_on_gpu)
    return Rehearsal(
        local_samples=len(grid.local_samples(config.num_samples)),
        local_batch_size=len(arguments[0]),
        parameter_bytes=parameters,
        gradient_bytes=gradients,
        sample_bytes=begun - batch_bytes - parameters - gradients,
        optimizer_bytes=state + besides,
        activation_bytes=batch_bytes + max(0, peak - begun),
        peak_bytes=max(peak + state, begun + state + besides),
        resident_bytes=resident,
        forward_bytes=forward,
        evaluation_bytes=evaluation,
        flops=float(flops.get_total_flops()),
        collectives=tuple(collectives),
    )


@contextlib.contextmanager
def _rehearsing(config: Config) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"{config.model.name} cannot be rehearsed: {first_line(error)}") from error


# --- an evaluation --------------------------------------------------------------------------------------


class ImaginedDataset(Source):
    """Examples of zeros in the shapes of a manifest. Local. The likelihood decides whether targets are normalised."""

    def __init__(self, manifest: Manifest, dtype: torch.dtype, num_examples: int, likelihood: Likelihood):
        self.manifest, self.dtype, self._num_examples = manifest, dtype, num_examples
        self._is_scaled = likelihood.is_equivariant and "y" in manifest.statistics

    def __len__(self) -> int:
        return self._num_examples

    @property
    def target_scale(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return scale_of(self.manifest, "y", self.device) if self._is_scaled else None

    def fetch(self, indices: Any) -> tuple[Inputs, torch.Tensor]:
        return _batch_of(self.manifest, len(indices), self.dtype, make=torch.zeros)


class Outputs(nn.Module):
    """A network of one weight that takes no memory but that of its outputs, which differ by point and sample."""

    def __init__(self, in_shape, num_outputs: int, target_shape=()):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.form = (num_outputs, *target_shape)
        self.look = lambda: None  # called at each forward pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.look()
        pattern = torch.linspace(-1, 1, math.prod(self.form), dtype=x.dtype).view(self.form)
        return (self.scale * pattern).expand(len(x), *self.form).contiguous()


def evaluation_bytes(
    config: Config, manifest: Manifest, grid: Grid, resident: float, forward: float, *, is_on_gpu: bool = False
) -> int:
    """Return the memory of the busiest rank at the peak of an evaluation; ``resident``, ``forward``: see `Rehearsal`.

    Local; it does not need that memory. The real evaluation runs on real numbers, because some of its loops end by
    them: with all samples, but on few examples and points, and without the network. Its memory grows linearly with
    them. Scores are computed in the chunks of a CPU or a GPU.
    """
    num_samples = config.num_test_samples
    places = manifest.places
    num_channels = manifest.num_classes or math.prod(manifest.arrays["y"].shape[:1])
    # Some thousand numbers
    wanted = max(2**13 // (num_samples * num_channels), 1)
    extent = max(2, math.ceil(wanted ** (1 / max(len(places), 1))))
    few_places = tuple(min(place, extent) for place in places)
    config, small = _in_small(config, manifest, few_places)
    comm = imagined_comm(grid, config)
    with _default_dtype(config):
        experiment = Experiment(config, comm, small)
    likelihood = experiment.likelihood
    block, mine = _block(config, manifest, grid, likelihood)
    scorers = min(grid.sample_size, 8)  # they share the scores of a block; of more, each has little
    few = min(block, scorers * max(1, wanted // (scorers * math.prod(few_places))))
    factor = block * math.prod(places) / (few * math.prod(few_places))
    # As small a part of the targets as in full size, but not more chunks than can be waited for
    least = num_samples * num_channels * few * math.prod(few_places) / 16
    chunk = math.ceil(max(CHUNK_ELEMENTS["cuda" if is_on_gpu else "cpu"] / factor, least))
    before, held = [0], []

    def try_(num_examples: int) -> tuple[int, int]:
        """Return the bytes at the peak, and at the end."""
        dataset = ImaginedDataset(small, experiment.dtype, num_examples * grid.data_size, likelihood)
        shown = shown_examples(likelihood, comm, dataset)
        with LiveMemory() as memory, mock.patch.dict(CHUNK_ELEMENTS, cpu=chunk):
            network = next(m for m in experiment.posterior.module.modules() if isinstance(m, Outputs))
            network.look = lambda: before.append(memory.live_bytes)
            options = {"num_samples": num_samples, "see": shown.add}
            held[:] = shown, score_dataset(experiment.posterior, likelihood, comm, dataset, **options)
            return memory.peak_bytes, memory.live_bytes

    (fixed, empty), (peak, kept) = try_(0), try_(few)
    inputs = block * manifest.num_inputs * experiment.dtype.itemsize
    above = max(factor * (peak - fixed), factor * (max(before) - fixed) + forward)
    of_former_blocks = (kept - empty) * (mine - block) / few
    return int(resident + inputs + above + of_former_blocks)


def fitting_test_samples(
    config: Config, manifest: Manifest, grid: Grid, rehearsal: Rehearsal, memory_bytes: float, is_on_gpu: bool
) -> int:
    """Return the largest ``num_test_samples`` below that of a config whose evaluation fits, 0 if none does. Local."""

    def needed_bytes(num_test_samples: int) -> int:
        fewer = replace(config, num_test_samples=num_test_samples)
        resident, forward = rehearsal.resident_bytes, rehearsal.forward_bytes
        return evaluation_bytes(fewer, manifest, grid, resident, forward, is_on_gpu=is_on_gpu)

    return bisect(range(config.num_test_samples), memory_bytes, lo=1, key=needed_bytes) - 1


def _block(config: Config, manifest: Manifest, grid: Grid, likelihood: Likelihood) -> tuple[int, int]:
    """Return how many examples a rank evaluates at once, and in all. Local."""
    data = config.data
    num_examples = manifest.num_examples(data.test_split if data.test_split in manifest.splits else data.train_split)
    mine = -(-num_examples // grid.data_size)
    dataset = ImaginedDataset(manifest, _dtype(config), num_examples, likelihood)
    return min(block_size(likelihood, dataset, config.num_test_samples, likelihood.has_mixture), mine), mine


def _in_small(config: Config, manifest: Manifest, places: tuple[int, ...]) -> tuple[Config, Manifest]:
    """Return a config and a manifest of the same likelihood, with few points of each target and without a network."""
    arrays = {
        "x": ArraySpec((1,), "float32"),
        "y": replace(
            manifest.arrays["y"], shape=(*([] if manifest.num_classes else manifest.arrays["y"].shape[:1]), *places)
        ),
    }
    weights = manifest.target_weights
    if weights is not None:
        weights = np.array(weights)
        cut = [slice(place) for place in places][max(len(places) - weights.ndim, 0) :]
        weights = weights[(..., *cut)].tolist()
    small = replace(
        config, model=ModelConfig(f"{__name__}.Outputs"), posterior=PosteriorConfig(init_std=0.1, deterministic=[])
    )
    return small, replace(manifest, arrays=arrays, target_weights=weights)


def _forward_bytes(config: Config, manifest: Manifest, step: VariationalStep, memory: LiveMemory) -> int:
    """Return the memory of an evaluation for the outputs of a sample for a block of examples. Local."""
    block, _ = _block(config, manifest, step.comm.grid, step.likelihood)
    x, _ = ImaginedDataset(manifest, _dtype(config), block, step.likelihood).fetch(range(block))
    before, memory.peak_bytes = memory.live_bytes, 0
    with torch.no_grad():
        next(member_outputs(step.posterior, step.comm, x, config.num_test_samples, config.seed, 1024))
    return memory.peak_bytes - before


def _dtype(config: Config) -> torch.dtype:
    """Return the dtype of weights and inputs."""
    return torch.float64 if config.dtype == "float64" else torch.float32


@contextlib.contextmanager
def _default_dtype(config: Config) -> Iterator[None]:
    """Make networks in their dtype at once: fake ones cannot be converted."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(config))
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def optimizer_bytes(config: Config, num_tensors: int) -> tuple[float, float]:
    """Return an optimizer's state and its temporary memory, as multiples of the tensor that it updates at once. Local.

    It runs the optimizer on small tensors: on two if there are several, because the memory of one may not be free
    when the next one is updated.
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
    unit = parameters[0].nbytes
    return (kept - begun) / (num_tensors * unit), (peak - kept) / unit
