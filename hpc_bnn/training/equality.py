"""What must be equal on ranks is compared: the replicas before the first step, batches and settings in each step."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..comm import Axis, GridComm
from ..errors import ConfigError, Fault, RankError
from ..posteriors import Posterior, Tally
from ..trees import tensors_of
from ..views import SharedView

logger = logging.getLogger(__name__)

NUM_PLACES = 2048
"""Numbers of a tensor of a batch that are compared in a step; which ones depends on the step."""

PIECE = 2**24
"""Bytes of the replicas that are compared at once."""

_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multipliers of SplitMix64, as signed words
_FACTORS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)

Digest = Tensor | int
"""Of tensors: on a GPU [] (int64), where the host would have to wait for its value."""


def definition_of(thing: object) -> str:
    """Return the class of an object and its numbers, words and functions, as text that can be compared. Local."""
    content = ((name, getattr(value, "__qualname__", value)) for name, value in getattr(thing, "__dict__", {}).items())
    plain = [f"{name}={value}" for name, value in content if isinstance(value, (bool, int, float, str))]
    return f"{type(thing).__qualname__}({', '.join(plain)})"


def tensors_beside(posterior: Posterior) -> list[tuple[str, Tensor]]:
    """Return tensors of a family and its prior, such as the means of the latter, which no slot holds; with names. Local."""
    owners = [posterior.family_, getattr(posterior.family_, "prior", None)]
    held = [(type(owner).__name__, getattr(owner, "__dict__", {})) for owner in owners]
    return [(f"{of}.{name}", value) for of, all_ in held for name, value in all_.items() if isinstance(value, Tensor)]


class Comparison:
    """Compares what ranks must have in common, by numbers that travel with the sum of a step.

    A rank adds a digest h, the last rank of a group of n subtracts (n - 1) h: equal digests sum to exactly 0. The digests
    are whole numbers below 2^23 / world_size, so that all partial sums are whole numbers below 2^24, which float32 holds
    exactly in any order. The ranks of a sample group must have the same examples, those of the job the same settings and
    parameters (where rows of these belong to samples, the ranks of a data group), and the data groups together as many
    examples as the step was told. ``looks``: nothing is compared without it, as in `hpc-bnn plan`, which has no other ranks.
    """

    def __init__(self, comm: GridComm):
        self._comm, self.looks, self._has_replicas = comm, True, False
        self._places: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
        self._mask = 2 ** int(math.log2(2**23 // comm.grid.world_size)) - 1
        self._axis: Axis = "world"
        self.begin_(0, 0, {})

    def make_replicas_equal_(self, posterior: Posterior) -> None:
        """Overwrite what all ranks, or those of a data group, must share with that of the first, and say what differed.

        Parameters and values of the posterior, tensors of its family and prior, frozen weights and buffers of its module.
        Once; collective over the world.
        """
        comm, buffer, differing = self._comm, posterior.buffer, []
        if self._has_replicas or comm.grid.world_size == 1 or not self.looks:
            return
        self._has_replicas = True
        frozen = [(name, p.detach()) for name, p in posterior.module.named_parameters() if not p.requires_grad]
        beside = [*tensors_beside(posterior), *frozen, *posterior.module.named_buffers()]
        for name, tensor in [*buffer.values.items(), *beside]:
            for piece in _pieces(tensor):
                first = piece.clone()
                comm.broadcast_(first, 0, "data" if name in buffer.owned else "world")
                if not torch.equal(first, piece):
                    differing.append(name)
                    piece.copy_(first)
        names = {name for names in comm.gather_objects(differing) for name in names}
        if names and comm.grid.is_first("world"):
            text = "ranks began with different numbers in %s; all have those of the first rank now"
            remedy = "Seed the ranks alike, or load the same checkpoint"
            logger.warning(f"{text}. {remedy}", ", ".join(sorted(names)))

    def begin_(
        self, step: int, global_batch_size: int, settings: dict[str, Any], posterior: Posterior | None = None
    ) -> None:
        """Begin a step, of which settings must be equal on all ranks, and the parameters of ``posterior``. Local."""
        self._settings = {"the number of steps": step, "global_batch_size": global_batch_size, **settings}
        self._settings_digest = zlib.crc32(repr(self._settings).encode()) & self._mask
        self._step, self._global_batch_size, self.num_examples = step, global_batch_size, 0
        self._parameters: Digest = 0
        if posterior is not None and self.looks:
            self._axis = "world" if posterior.is_replicated else "data"
            is_alone = self._group()[1] == 1
            self._parameters = 0 if is_alone else self._digest([posterior.buffer.flat], 0)
        self._targets: Digest = 0
        self._inputs: Digest = 0
        self._weights: Digest | None = None  # of examples that have some

    def check_part_of(self, step: int, global_batch_size: int) -> None:
        """Raise `ConfigError` where a further part of a batch is told to be of another step, or of another batch. Local."""
        begun = {"num_steps": (step, self._step), "global_batch_size": (global_batch_size, self._global_batch_size)}
        for name, (now, then) in begun.items():
            if now != then:
                raise ConfigError(
                    Fault(name, now, f"the first part of this batch had {then}", "Give all parts the same")
                )

    def add_(self, x: SharedView, y: Tensor, weights: Tensor | None = None) -> None:
        """Add examples of this rank. Local."""
        self.num_examples += len(x)
        if self._comm.grid.sample_size > 1 and self.looks:
            self._targets = self._digest([y], self._targets)
            self._inputs = self._digest(tensors_of(x.before_views), self._inputs)
            if weights is not None:
                self._weights = self._digest([weights], 0 if self._weights is None else self._weights)

    def _digest(self, tensors: Iterable[Tensor], before: Digest) -> Digest:
        """Return a digest of shapes and of some numbers of tensors, after others. Local; a GPU's stays there."""
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                continue
            count = tensor.numel()
            num_places, stride = min(count, NUM_PLACES), max(count // NUM_PLACES, 1)
            key = num_places, stride, tensor.device
            if key not in self._places:
                numbers = torch.arange(num_places, device=tensor.device)
                # An odd weight for each place: an exchange of numbers is seen
                self._places[key] = numbers * stride, _mixed(numbers * _FACTORS[1] + _FACTORS[0]) | 1
            places, weights = self._places[key]
            first = self._step * 7919 % (count - (num_places - 1) * stride) if count else 0
            words, shape = _bits(tensor).take(places + first), zlib.crc32(repr(tuple(tensor.shape)).encode())
            if words.is_cpu:
                before = zlib.crc32(words.numpy().data, shape ^ int(before))
            else:
                words = words.to(torch.int64)
                # Folded: an even number of signs of float64, each the highest bit, would leave no trace in a sum
                before = ((words ^ words >> 32) * weights).sum() + shape + before * _FACTORS[0]
        return before

    def numbers(self, num_examples: int, by_place: bool) -> list[int]:
        """Return what the host knows, `Tally` from NUM_EXAMPLES on; ``by_place``: noise goes by places. Local."""
        grid = self._comm.grid
        is_misplaced = by_place and num_examples != len(grid.share(self._global_batch_size, "data"))
        parts = [0 if isinstance(part, Tensor) else part for part in self._digests()]
        settings = self._settings_digest * _weight(grid.rank, grid.world_size)
        return [num_examples * grid.is_first("sample"), int(is_misplaced), settings, *map(int, parts)]

    def _group(self) -> tuple[int, int]:
        """Return this rank's place among those that must have its parameters, and how many these are. Local."""
        grid = self._comm.grid
        return (grid.rank, grid.world_size) if self._axis == "world" else (grid.data_index, grid.data_size)

    def fill_(self, tally: Tensor) -> None:
        """Write into the scalars that are summed what only the device knows of the batch. Local."""
        for place, part in zip((Tally.BATCH, Tally.BATCH_TOO, Tally.PARAMETERS), self._digests()):
            if isinstance(part, Tensor):
                tally[place] = part

    def _digests(self) -> list[Digest]:
        batch: Digest = self._targets * _FACTORS[0] + self._inputs
        batch = batch if self._weights is None else batch + self._weights * _FACTORS[1]
        weight = _weight(self._comm.grid.sample_index, self._comm.grid.sample_size)
        parameters = (_word(self._parameters) >> 8 & self._mask) * _weight(*self._group())
        return [*((batch >> shift & self._mask) * weight for shift in (40, 17)), parameters]

    def check(self, tally: list[float]) -> None:
        """Raise `RankError` on all ranks where the sums say that ranks differ. Collective over the world if they do."""
        if not self.looks:
            return
        is_equal = not any(tally[Tally.SETTINGS :])
        if is_equal and tally[Tally.NUM_EXAMPLES] == self._global_batch_size and not tally[Tally.NUM_MISPLACED]:
            return
        comm, where = self._comm, f"step {self._step}: "
        comm.check_equal(self._settings, where, "Give all ranks the same")
        remedy = (
            "What one rank does to posterior, network, optimizer or step between steps (load, edit, freeze, options) all have to do, "
            "or call comm.broadcast_(list(posterior.parameters())) after it. On unlike processors, which round differently, "
            "set step.comparison.looks = False"
        )
        comm.check_equal({"the digest of the parameters": _shown(self._parameters)}, where, remedy, self._axis)
        remedy = (
            "Give the ranks of a sample group the same examples, those of comm.grid.data_index of comm.grid.data_size, as hpc_bnn.GlobalBatchSampler has them; "
            'where each rank makes its own view of them, call step(..., views="own")'
        )
        found: dict[str, object] = {"the number of examples": self.num_examples}
        for name, digest in (("targets", self._targets), ("inputs", self._inputs), ("weights", self._weights)):
            found[f"the digest of the {name}"] = None if digest is None else _shown(digest)
        comm.check_equal(found, where, remedy, axis="sample")
        counts = comm.gather_objects(self.num_examples, "data")
        if sum(counts) != self._global_batch_size:
            there_are = f"the data groups have {' + '.join(map(str, counts))} =" if len(counts) > 1 else "the batch has"
            raise RankError(
                f"{where}global_batch_size {self._global_batch_size}: {there_are} {sum(counts)} examples. "
                "Give the number of examples of this step in the whole job, also for the last, smaller batch of an epoch"
            )
        raise RankError(
            f"{where}the data groups have {counts} examples: these estimators draw noise by an example's place in the global "
            "batch. Give each rank the examples comm.grid.local_examples(global_batch_size) of it"
        )


def _weight(index: int, extent: int) -> int:
    return 1 if index < extent - 1 else 1 - extent


# --- digests ------------------------------------------------------------------------------------------------------


def _word(digest: Digest) -> Digest:
    """Return 32 bits of a digest that depend on all of it. Local."""
    return (digest ^ digest >> 32) & 0xFFFFFFFF


def _shown(digest: Digest) -> str:
    return f"{int(_word(digest)):08x}"


def _bits(tensor: Tensor) -> Tensor:
    """Return numbers as whole numbers of the same width. Local."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.view(_WIDTHS[tensor.element_size()])


def _mixed(word: Tensor) -> Tensor:
    """Return whole numbers (int64) whose high bits depend on all bits. Local."""
    for factor in _FACTORS:
        word = (word ^ (word >> 29)) * factor
    return word ^ (word >> 32)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor as bytes, in pieces that can be written."""
    if tensor.layout is torch.strided and tensor.numel() and tensor.detach().is_contiguous():
        yield from tensor.detach().view(-1).view(torch.uint8).split(PIECE)
