"""The process grid: rank arithmetic in pure Python.

The ranks of a job form a grid ``sample axis x data axis``. The sample index varies fastest, so that with block
placement of ranks a sample group sits inside one node:

    rank = data_index * sample_size + sample_index

    sample_size = 2, data_size = 2        sample_index   0   1
                                          data_index 0 [ 0   1 ]  <- a sample group: same examples,
                                          data_index 1 [ 2   3 ]     different samples
                                                         ^
                                                         a data group: same samples, different examples

Everything here is Local.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .config import Config
from .errors import ConfigError, Fault, check_all

Axis = Literal["sample", "data", "world"]
"""An axis of the process grid, or all ranks of the job."""


def share(count: int, parts: int, part: int) -> range:
    """Return the contiguous range of ``range(count)`` that owner number ``part`` of ``parts`` gets.

    The first ``count % parts`` owners get one item more than the others; nothing is padded or dropped. Sixteen samples
    on three ranks are 6, 5 and 5. With fewer items than owners the last ranges are empty.
    """
    quotient, remainder = divmod(count, parts)
    start = part * quotient + min(part, remainder)
    return range(start, start + quotient + (part < remainder))


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text, such as "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def sample_sizes(num_ranks: int) -> list[int]:
    """Return the possible extents of the sample axis for a number of ranks: its divisors."""
    return [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]


def grids(num_ranks: int, num_samples: int, batch: int, flag: str = "number of ranks") -> list[int]:
    """Return the extents of the sample axis that give each rank a sample and an example; `ConfigError` if none does."""
    sizes = [s for s in sample_sizes(num_ranks) if s <= num_samples and num_ranks // s <= batch]
    if not sizes:
        have = f"{num_samples} samples and {batch} examples"
        rule = f"no grid of {num_ranks} ranks has a sample and an example for each, with {have}"
        remedy = "Use fewer ranks, more <num_samples>, or more examples (<global_batch_size>, <data.train_split>)"
        raise ConfigError(Fault(flag, num_ranks, rule, remedy))
    return sizes


@dataclass(frozen=True)
class Grid:
    """Coordinates of one rank in the process grid; `ConfigError` unless ``sample_size`` divides ``world_size``."""

    world_size: int = 1
    """Number of ranks of the job."""
    sample_size: int = 1
    """Extent of the sample axis."""
    rank: int = 0
    """World rank of this process."""

    def __post_init__(self):
        assert self.world_size >= 1 and 0 <= self.rank < self.world_size, self
        if self.sample_size < 1 or self.world_size % self.sample_size:
            rule = f"sample_size x data_size must be the number of ranks, and the job has {self.world_size}"
            sizes = ", ".join(map(str, sample_sizes(self.world_size)))
            remedy = f"Use one of {sizes}, or start another number of ranks"
            raise ConfigError(Fault("grid.sample_size", self.sample_size, rule, remedy))

    @property
    def data_size(self) -> int:
        """Extent of the data axis."""
        return self.world_size // self.sample_size

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, the one whose index varies fastest first; the world is none of them."""
        return "sample", "data"

    @property
    def sample_index(self) -> int:
        """Coordinate of this rank on the sample axis."""
        return self.rank % self.sample_size

    @property
    def data_index(self) -> int:
        """Coordinate of this rank on the data axis."""
        return self.rank // self.sample_size

    @property
    def extents(self) -> dict[Axis, int]:
        """Number of ranks along each axis."""
        return {"sample": self.sample_size, "data": self.data_size, "world": self.world_size}

    @property
    def indices(self) -> dict[Axis, int]:
        """Coordinate of this rank along each axis."""
        return {"sample": self.sample_index, "data": self.data_index, "world": self.rank}

    def is_first(self, axis: Axis) -> bool:
        """Whether this rank is the first along an axis; only it adds values that all ranks of the axis have."""
        return self.indices[axis] == 0

    def share(self, count: int, axis: Axis) -> range:
        """Return this rank's range of ``count`` items that are divided along an axis (see `share`)."""
        return share(count, self.extents[axis], self.indices[axis])

    def sample_group(self, data_index: int | None = None) -> range:
        """World ranks with the same examples, those of ``data_index`` (default: of this rank)."""
        start = (self.data_index if data_index is None else data_index) * self.sample_size
        return range(start, start + self.sample_size)

    def data_group(self, sample_index: int | None = None) -> range:
        """World ranks with the same samples, those of ``sample_index`` (default: of this rank)."""
        start = self.sample_index if sample_index is None else sample_index
        return range(start, self.world_size, self.sample_size)

    @property
    def groups(self) -> dict[Axis, range]:
        """World ranks of this rank's group along each axis."""
        return {"sample": self.sample_group(), "data": self.data_group(), "world": range(self.world_size)}

    def all_groups(self, axis: Axis) -> list[range]:
        """World ranks of each group along an axis."""
        if axis == "sample":
            return [self.sample_group(index) for index in range(self.data_size)]
        if axis == "data":
            return [self.data_group(index) for index in range(self.sample_size)]
        return [self.groups[axis]]

    def local_samples(self, num_samples: int) -> range:
        """Global indices of the samples that this rank draws, of ``num_samples`` in the job."""
        return self.share(num_samples, "sample")

    def local_examples(self, global_batch_size: int) -> slice:
        """Positions in a global batch of the examples that this rank evaluates."""
        mine = self.share(global_batch_size, "data")
        return slice(mine.start, mine.stop)

    def check_num_samples(self, num_samples: int) -> None:
        """Raise `ConfigError` unless each rank of the sample axis has a sample to draw."""
        if num_samples < self.sample_size:
            rule = f"each of the {self.sample_size} ranks of the sample axis (<grid.sample_size>) draws one or more"
            remedy = f"Use <num_samples> {self.sample_size} or a smaller <grid.sample_size>"
            raise ConfigError(Fault("num_samples", num_samples, rule, remedy))

    def check_batch(self, global_batch_size: int, num_examples: int | None = None) -> None:
        """Raise `ConfigError` unless each data group has an example of a batch, and of the training set (if known)."""
        ranks = f"the {self.data_size} data groups ({self.world_size} ranks, <grid.sample_size> {self.sample_size})"
        remedy = "a larger <grid.sample_size>, or fewer ranks"
        faults = []
        if 0 < global_batch_size < self.data_size:  # below 1 it is a fault of its own
            rule = f"each of {ranks} evaluates one example or more in a step"
            of_batch = f"Use <global_batch_size> {self.data_size}, {remedy}"
            faults.append(Fault("global_batch_size", global_batch_size, rule, of_batch))
        if num_examples is not None and num_examples < self.data_size:
            rule = f"the training set has fewer examples than {ranks}, and each evaluates one or more in a step"
            faults.append(Fault("data.train_split", f"with {num_examples} examples", rule, f"Use {remedy}"))
        if faults:
            raise ConfigError(*faults)

    def __str__(self) -> str:
        return f"{self.sample_size} x {self.data_size} (samples x data)"


def check(config: Config, world_size: int, num_examples: int | None = None) -> None:
    """Raise one `ConfigError` with all faults of a config for some ranks, and for a training set if known. Local."""
    size, num_samples, batch = config.grid.sample_size, config.num_samples, config.global_batch_size

    def check_grid() -> None:
        if isinstance(size, str):
            if num_samples >= 1 and batch >= 1:  # otherwise that is the fault
                grids(world_size, num_samples, batch)
            return
        grid = Grid(world_size, size)
        check_all(
            lambda: num_samples < 1 or grid.check_num_samples(num_samples),  # below 1 it is a fault of its own
            lambda: grid.check_batch(batch, num_examples),
        )

    check_all(config.check, check_grid)
