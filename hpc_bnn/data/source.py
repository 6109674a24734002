"""What a loader, an evaluation and a prediction read examples from: tensors, a Dataset of torch, or what a user writes."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler, default_collate

from ..errors import ConfigError, DataError, Fault
from ..grid import Grid
from ..trees import Inputs, map_tensors, num_rows, rows_of, tensors_of
from .manifest import OPTIONAL, Arrays, ArraySpec, Manifest, ShardFile, sha256_of_json
from .order import EpochOrder, batches_in_part, local_places, num_global_batches

logger = logging.getLogger(__name__)

SPLIT = "all"
"""Name of the split of a source that has one."""


class Source:
    """Examples by number, the same on all ranks.

    Inherit from it and give `read`, `__len__` and ``manifest`` (`describe` makes one). An example is a pair: inputs (a
    tensor, or a dict, list or tuple of tensors) and a target. What random numbers change in an example belongs into an
    augmentation, because numbers that are drawn here depend on the rank that draws them.
    """

    manifest: Manifest
    """Shapes, dtypes, number of classes, names of channels, statistics."""
    device, dtype = torch.device("cpu"), torch.float32
    """Device of the examples; dtype of all numbers in them that are floating-point."""
    reading: str = "rank"
    """How the examples reach the ranks; it stands in the summary of a run."""
    num_bytes_read = 0
    """Bytes that this rank has read from the file system so far."""
    _has_looked = False
    has_own_order = False
    """Whether the examples come in one order only, which is that of every epoch."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Tensor) -> Any:
        """Return what `deliver` makes examples of. Local, in a thread of its own; called in the order of the batches."""
        raise NotImplementedError

    def deliver(self, content: Any) -> tuple[Any, ...]:
        """Return inputs [B, ...], targets [B, ...], weights [B] if any, on the device, of what `read` gave. Local."""
        if self.dtype == torch.float32 and not self._has_looked:
            self._has_looked = True
            if any(map(loses_differences, tensors_of(content))):
                remedy = "subtract their mean in the data, or set dtype float64"
                logger.warning("numbers of %s in float64 are equal in float32: %s", self.manifest.name, remedy)

        def here(tensor: Tensor) -> Tensor:
            return on_device(tensor, self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

        return tuple(map_tensors(here, content))

    def begin(self, epoch: int) -> None:
        """Begin an epoch. Local."""

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Source:
        """Deliver to a device and in a dtype from now on; return itself. Local."""
        self.device, self.dtype = torch.device(device), dtype
        return self

    def fetch(self, indices: Tensor | Sequence[int] | slice) -> tuple[Any, ...]:
        """Return what `deliver` does of some examples. Local, or as `deliver` is."""
        if isinstance(indices, slice):
            indices = torch.arange(*indices.indices(len(self)))
        wanted = torch.as_tensor(indices)
        is_whole = wanted.dtype in (torch.int64, torch.int32)
        if len(wanted) and not (is_whole and wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"examples are fetched by whole numbers from 0 to {len(self) - 1}, not {wanted}")
        return self.deliver(self.read(wanted.long()))

    @property
    def in_shape(self) -> Any:
        """Shape of one input, or the shapes by name where there are several."""
        return self.manifest.in_shape

    @property
    def target_scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the targets per channel, [1, channels, 1, ...], if they are normalised."""
        return None

    @property
    def input_scale(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the one input ``x`` per channel, as `target_scale`, if it is normalised."""
        return None

    def in_units(self, y: Tensor) -> Tensor:
        """Return targets [B, ...], as they are delivered, in units of y."""
        return y

    def coordinates(self, span: range) -> Arrays:
        """Return what names or places the examples of a range, such as their ``time``, as arrays [n] by name. Local."""
        return {}


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device; the host does not wait for a GPU. Local."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


class TensorSource(Source):
    """Examples in memory.

    Parameters
    ----------
    x, y : tree of tensors, Tensor
        Inputs [N, ...] and targets [N, ...]; classes are integers [N].
    num_classes : int, optional
        Number of classes; targets are numbers without it.
    weights : Tensor, optional
        [N] of the examples, floating-point, finite and 0 or more.
    """

    reading = "memory"

    def __init__(self, x: Inputs, y: Tensor, num_classes: int | None = None, weights: Tensor | None = None):
        self._content = (x, y) if weights is None else (x, y, weights)
        self._length = num_rows(self._content)
        self.manifest = describe("tensors", self._content, self._length, num_classes)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Tensor) -> Any:
        return map_tensors(lambda tensor: tensor[indices.to(tensor.device)], self._content)


class DatasetSource(Source):
    """A `torch.utils.data.Dataset` with ``dataset[index]`` and ``len(dataset)``; examples are pairs (x, y).

    Parameters
    ----------
    dataset : Dataset
        Map-style; its tensors, arrays and numbers are put together by torch's ``default_collate``.
    num_classes : int, optional
        Number of classes; by default that of ``dataset.num_classes``, or of ``dataset.classes`` as torchvision has it.
    """

    def __init__(self, dataset: Any, num_classes: int | None = None):
        self.dataset, self._name = dataset, type(dataset).__name__
        if len(dataset) == 0:
            raise DataError(f"{self._name} has no examples")
        self._first = self._collate([0])
        self.manifest = describe(self._name, self._first, len(dataset), classes_of(dataset, num_classes))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: Tensor) -> Any:
        if len(indices) == 0:
            return rows_of(self._first, slice(0))
        return self._collate(indices.tolist())

    def _collate(self, indices: list[int]) -> Any:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return _pair(self._name, default_collate(self.dataset.__getitems__(indices)))
            return _pair(self._name, default_collate([self.dataset[index] for index in indices]))
        except DataError:
            raise
        except Exception as error:
            some = ", ".join(map(str, indices[:3])) + (", ..." if len(indices) > 3 else "")
            raise DataError(f"{self._name}: examples {some} cannot be read: {type(error).__name__}: {error}") from error


class StreamSource(Source):
    """A `torch.utils.data.IterableDataset`: the order of the examples is its own, in every epoch.

    Each rank goes through the whole stream and keeps the examples of its data group, so the stream must be the same on all
    ranks, whatever ``torch.distributed`` says of them; then the result does not depend on the grid. An epoch are the first
    ``num_examples``. ``dataset.set_epoch(epoch)`` is called where it exists.

    Parameters
    ----------
    dataset : IterableDataset
        Its examples are pairs (x, y).
    num_examples : int, optional
        Examples of an epoch (default: ``len(dataset)``).
    num_classes : int, optional
        As for `DatasetSource`.
    """

    has_own_order = True
    reading = "stream"

    def __init__(self, dataset: Any, num_examples: int | None = None, num_classes: int | None = None):
        self.dataset, self._name = dataset, type(dataset).__name__
        if num_examples is None and not hasattr(dataset, "__len__"):
            rule = f"{self._name} does not say how many examples an epoch has, N of the ELBO"
            raise ConfigError(Fault("num_examples", None, rule, "Give it, or give the dataset a __len__"))
        self._length = len(dataset) if num_examples is None else num_examples
        self._stream: Iterator[Any] = iter(())
        self._position = sys.maxsize  # before the first example the stream begins
        self._first = self.read(torch.tensor([0]))
        self.manifest = describe(self._name, self._first, self._length, classes_of(dataset, num_classes))

    def __len__(self) -> int:
        return self._length

    def begin(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._position = sys.maxsize

    def read(self, indices: Tensor) -> Any:
        examples = []
        for index in indices.tolist():
            if index < self._position:
                self._stream, self._position = iter(self.dataset), 0
            skipped = index - self._position
            example = next(itertools.islice(self._stream, skipped, None), self)
            if example is self:
                raise DataError(f"{self._name} ended before its example {index}, and an epoch has {self._length}")
            self._position = index + 1
            examples.append(example)
        if not examples:
            return rows_of(self._first, slice(0))
        return _pair(self._name, default_collate(examples))


def as_source(data: Any, *, num_classes: int | None = None, num_examples: int | None = None) -> Source:
    """Return a source of what a user has: a `Source`, tensors (x, y), a map-style Dataset, or an iterable one. Local.

    ``num_classes`` and ``num_examples``, those of an epoch of an iterable Dataset, are for what ``data`` does not say.
    A Dataset with an attribute ``missing_targets`` (NaN is a missing target) or ``ignore_index`` (of classes) has
    targets that are missing.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return TensorSource(data[0], data[1], num_classes)
    has_numbers = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
    if not (has_numbers or hasattr(data, "__iter__")):
        rule = f"a {type(data).__name__} is neither tensors (x, y) nor a Dataset of torch nor an hpc_bnn.Source"
        raise ConfigError(Fault("data.dataset", type(data).__name__, rule, "Return one of these"))
    source: Source = DatasetSource(data, num_classes) if has_numbers else StreamSource(data, num_examples, num_classes)
    missing = {name: getattr(data, name) for name in OPTIONAL if hasattr(data, name)}
    source.manifest = replace(source.manifest, **missing)
    return source


def describe(name: str, content: tuple[Any, ...], num_examples: int, num_classes: int | None = None) -> Manifest:
    """Return the manifest of a source, of which ``content`` are some inputs, targets, and weights if any. Local.

    Without ``num_classes`` the targets are numbers.
    """
    x, y, *weights = content
    if num_classes is None and not y.is_floating_point():
        rule = f"the targets of {name} are whole numbers: classes, and it does not say how many, or counts"
        remedy = "Give it, or give the dataset an attribute num_classes; make counts floating-point"
        raise ConfigError(Fault("num_classes", None, rule, remedy))
    named = {"x": x}
    if not isinstance(x, Tensor):
        named = dict(x) if isinstance(x, dict) else {str(number): tensor for number, tensor in enumerate(x)}
    if "y" in named or not all(isinstance(tensor, Tensor) for tensor in named.values()):
        rule = f"the inputs of {name} must be a tensor, or a dict or tuple of tensors without the name y"
        raise ConfigError(Fault("x", sorted(named), rule, "Flatten nested inputs"))
    arrays = {}
    for key, tensor in {**named, "y": y, **({"weights": weights[0]} if weights else {})}.items():
        is_half = tensor.is_floating_point() and tensor.element_size() < 4  # NumPy has no bfloat16
        dtype = torch.float32 if is_half else tensor.dtype
        arrays[key] = ArraySpec(tuple(tensor.shape[1:]), str(dtype).removeprefix("torch."))
    split = ShardFile(name, num_examples, 0, "", "")
    key = sha256_of_json({"name": name, "num_examples": num_examples, "arrays": sorted(map(str, arrays.items()))})
    return Manifest(name, name, "unknown", arrays, {SPLIT: (split,)}, {}, num_classes, key_sha256=key)


def classes_of(dataset: Any, num_classes: int | None) -> int | None:
    """Return the number of classes that is given, or that a dataset says. Local."""
    classes = getattr(dataset, "classes", None)
    said = getattr(dataset, "num_classes", None if classes is None else len(classes))
    return said if num_classes is None else num_classes


def loses_differences(tensor: Tensor) -> bool:
    """Whether numbers [B, ...] in float64 that differ are often equal in float32, such as time stamps. Local."""
    if tensor.dtype != torch.float64 or len(tensor) < 2:
        return False
    ordered = tensor.sort(0).values
    differ = ordered.diff(dim=0) > 0
    lost = differ & (ordered.float().diff(dim=0) == 0)
    return bool((lost.sum(0) > 0.1 * differ.sum(0)).any())


def _pair(name: str, content: Any) -> tuple[Inputs, Tensor]:
    if not (isinstance(content, (tuple, list)) and len(content) == 2 and isinstance(content[1], Tensor)):
        raise DataError(f"an example of {name} must be a pair (x, y): inputs, and one target")
    return content[0], content[1]


class GlobalBatchSampler(Sampler[list[int]]):
    """The examples of this rank in each global batch, for ``DataLoader(dataset, batch_sampler=...)`` of torch.

    The order is that of `global_batches`: a permutation for each epoch, the same on every grid. Local.

    Parameters
    ----------
    num_examples, grid : int, Grid
        Examples of the dataset; ``comm.grid``.
    global_batch_size, seed : int
        Examples per batch in the whole job, and key of the order.
    drop_last, window : bool, int or None
        Leave out the last batch if it is smaller; shuffle within windows (`EpochOrder`).

    Examples
    --------
    ::

        sampler = hpc_bnn.GlobalBatchSampler(len(dataset), comm.grid, 128, seed=0)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(10):
            sampler.set_epoch(epoch)
            for (x, y), size in zip(loader, sampler.sizes):
                step(x, y, global_batch_size=size)
    """

    def __init__(
        self, num_examples: int, grid: Grid, global_batch_size: int, seed: int, *, drop_last: bool = False,
        window: int | None = None,
    ):  # fmt: skip
        self._sizes, self._seed, self._window = (num_examples, global_batch_size), seed, window
        self._grid, self._drop_last, self._epoch = grid, drop_last, 0
        number = num_global_batches(num_examples, global_batch_size, drop_last)
        self.sizes = [min(global_batch_size, num_examples - n * global_batch_size) for n in range(number)]
        """Examples of each batch in the whole job."""
        if not self.sizes or min(self.sizes) < grid.data_size:
            smallest = min(self.sizes, default=0)
            rule = f"a batch of {smallest} examples leaves some of the {grid.data_size} data groups none"
            raise ConfigError(Fault("global_batch_size", global_batch_size, rule, "Use another one, or drop_last"))

    def set_epoch(self, epoch: int) -> None:
        """Take the order of an epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        order = EpochOrder(self._sizes[0], self._seed, self._epoch, self._window)
        part = functools.partial(local_places, self._grid)
        for _, examples in batches_in_part(*self._sizes, order, part, self._drop_last):
            yield examples.tolist()
