"""One split of a shard directory, as the ranks of a job read it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from ..comm import GridComm
from ..comm.devices import free_memory_bytes
from ..config import Reading, check_field
from ..errors import DataError
from ..grid import Grid
from .files import SplitFiles
from .manifest import MANIFEST, Arrays, Manifest, inputs_of, torch_dtype
from .source import Source

LARGE_MEAN = 2.0**10
"""Mean of a channel, in its standard deviations, from which float32 numbers are normalised in float64."""
MEMORY_SHARE = 0.5
"""Fraction of the free memory of a node that a split may take with the reading "auto"."""


class NormalisedSource(Source):
    """A source whose examples a `Normalisation` makes."""

    _normalise: Normalisation

    @property
    def target_scale(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and standard deviation of the targets per channel, [1, channels, 1, ...] float64, if they are scaled."""
        return self._normalise.scales.get("y")

    @property
    def input_scale(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and standard deviation of the inputs ``x``, as `target_scale`."""
        return self._normalise.scales.get("x")

    def in_units(self, y: torch.Tensor) -> torch.Tensor:
        """Return targets [B, ...], as they are delivered, in units of y, float64 where they are normalised."""
        return y if self.target_scale is None else y * self.target_scale[1] + self.target_scale[0]


class ShardDataset(NormalisedSource):
    """One split of a shard directory: read as it is stored, normalised on the device when fetched.

    `DataError` where the split or a file is missing, truncated, corrupt, or not what the manifest says. If only one
    rank finds an error while it fetches, only this rank raises it, and the error has to end the job.

    Parameters
    ----------
    directory, split : path, str
        Shard directory, and name of the split.
    device, dtype : torch.device, torch.dtype
        Device of the examples; floating-point dtype of the inputs, and of targets that are numbers.
    comm : GridComm, optional
        The ranks that read together; construction is then collective over the world.
    reading : {"auto", "node", "group", "rank"}
        How the bytes reach the ranks. ``node``: the ranks of a node read the split into memory that they share, each
        file once. ``group``: the first rank of a sample group reads the examples of a batch, the others receive them
        over ``sample_comm``. ``rank``: each rank reads the examples of its batches. ``auto``: ``node`` if the split
        takes at most half of the free memory on each node; otherwise ``group``, or ``rank`` if a sample group is one
        rank.
    normalises_targets : bool
        Whether targets get mean 0 and standard deviation 1, if the manifest has their statistics.
    scaling : Manifest, optional
        Manifest with the statistics of the normalisation: for a trained network that of its training data (default:
        that of this directory).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        split: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        comm: GridComm | None = None,
        reading: Reading = "auto",
        normalises_targets: bool = True,
        scaling: Manifest | None = None,
    ):
        self._comm = comm or GridComm(Grid(1, 1, 0))
        with self._comm.agree(f"opening {directory}"):
            self._files = SplitFiles(directory, split)
            if self._comm.local_rank == 0:
                self._files.check_sizes()
            scaling = scaling or self._files.manifest
            check_alike(scaling, self._files.manifest, directory)
        self.manifest = self._files.manifest
        check_same_manifest(self._comm, self.manifest)
        self.device, self.dtype = torch.device(device), dtype
        self.reading = self._choose(reading)
        """The reading that is used, never "auto"."""
        self._memory = self._read_into_memory() if self.reading == "node" else None
        options = {"normalises_targets": normalises_targets}
        self._normalise = Normalisation(scaling, self.manifest, self.device, dtype, **options)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def num_bytes(self) -> int:
        """Bytes of the examples of the split, as they are stored."""
        return len(self) * self.manifest.num_bytes_per_example

    @property
    def num_bytes_read(self) -> int:
        """Bytes that this rank has read from the file system so far."""
        return self._files.num_bytes_read

    # --- examples -----------------------------------------------------------------------------------

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the bytes of examples, or memory for what another rank sends, for `deliver`. Local, in any thread."""
        buffer = torch.empty(len(indices) * self.manifest.num_bytes_per_example, dtype=torch.uint8)
        arrays = {name: tensor.numpy() for name, tensor in self._split(buffer).items()}
        if self._memory is not None:
            for name, array in arrays.items():
                np.take(self._memory[name], indices.cpu().numpy(), axis=0, out=array)
        elif self.reading == "rank" or self._comm.grid.is_first("sample"):
            self._files.read(indices.cpu().numpy(), arrays)
        return buffer.pin_memory() if self.device.type == "cuda" else buffer

    def deliver(self, buffer: torch.Tensor) -> tuple[Any, ...]:
        """Return inputs, targets, and weights if any, from the bytes of `read`: on the device, normalised, ids whole.

        Collective over ``sample_comm`` with the reading ``group``, otherwise local.
        """
        buffer = buffer.to(self.device, non_blocking=True)
        if self.reading == "group":
            self._comm.broadcast_(buffer, root=0, axis="sample")
        found = self._normalise(self._split(buffer))
        return (inputs_of(found), found["y"], *([found["weights"]] if self.manifest.has_weights else []))

    def coordinates(self, span: range) -> Arrays:
        """Return the coordinates [n] of a range of examples by name: times as datetime64, numbers, texts. Local."""
        return self._files.coordinates(span)

    # --- memory -------------------------------------------------------------------------------------

    def _choose(self, reading: Reading) -> Reading:
        """Return the reading that "auto" stands for; the same on all ranks."""
        check_field("data.reading", reading)
        has_groups = self._comm.grid.sample_size > 1
        if reading != "auto":
            return "rank" if reading == "group" and not has_groups else reading
        free = min(self._comm.gather_objects(free_memory_bytes(self._comm.local_size > 1)))
        if self.num_bytes <= MEMORY_SHARE * free:
            return "node"
        return "group" if has_groups else "rank"

    def _read_into_memory(self) -> Arrays:
        """Read the whole split, each file by one rank of the node. Collective over the world."""
        comm, specs = self._comm, self.manifest.arrays
        shared = {name: comm.node_array((len(self), *spec.shape), spec.dtype) for name, spec in specs.items()}
        arrays = {name: one.array for name, one in shared.items()}
        with comm.agree(f"reading {self._files.directory}"):
            for number in range(comm.local_rank, len(self._files.shards), comm.local_size):
                self._files.read_shard(number, arrays)
        for one in shared.values():
            one.publish()
        return arrays

    def _split(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views [B, ...] of a buffer of bytes; the wider items come first, so that all are aligned."""
        num_examples = len(buffer) // self.manifest.num_bytes_per_example
        arrays, start = {}, 0
        for name, spec in sorted(self.manifest.arrays.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
            stop = start + num_examples * spec.num_bytes
            arrays[name] = buffer[start:stop].view(torch_dtype(spec.dtype)).view(num_examples, *spec.shape)
            start = stop
        return {name: arrays[name] for name in self.manifest.arrays}


def check_same_manifest(comm: GridComm, manifest: Manifest) -> None:
    """Raise `RankError` unless all ranks have the same data by their manifest. Collective over the world."""
    values = {f"the content of {MANIFEST}": manifest.digest}
    comm.check_equal(values, "reading the data: ", "Give all ranks the same shards")


def check_alike(scaling: Manifest, manifest: Manifest, directory: str | os.PathLike) -> None:
    """Raise `DataError` if the examples are not of the shape, kind and units that a network was trained on. Local."""
    if manifest.inputs.keys() != scaling.inputs.keys():
        theirs, ours = (", ".join(m.inputs) for m in (manifest, scaling))
        rule = f"{directory} has {theirs}, and the network was trained on {ours}"
        raise DataError(f"{rule}. Prepare the shards in the same way")
    for name, spec in {**manifest.inputs, "y": manifest.arrays["y"]}.items():
        expected = scaling.arrays[name]
        if name == "y" and manifest.num_classes != scaling.num_classes:
            continue  # foreign classes: their examples can be predicted, not scored
        if (spec.shape, spec.channels) != (expected.shape, expected.channels):
            raise DataError(
                f"{directory}: {name} is {list(spec.shape)} {list(spec.channels)} per example, and the network was "
                f"trained on {list(expected.shape)} {list(expected.channels)}. Prepare the shards in the same way"
            )
        kinds = [np.dtype(of.dtype).kind in "iub" for of in (spec, expected)]
        if name != "y" and kinds[0] != kinds[1]:  # bytes of pixels, and the same pixels from 0 to 1
            raise DataError(
                f"{directory}: {name} is {spec.dtype}, and the network was trained on {expected.dtype}. Prepare the shards "
                "in the same way: whole numbers and fractions are seldom in the same units"
            )
    theirs, ours = (m.details.get("units") for m in (manifest, scaling))
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs.keys() & ours.keys():
            if theirs[name] != ours[name]:
                raise DataError(
                    f"{directory}: {name} is in '{theirs[name]}', and the network was trained on it in '{ours[name]}'. "
                    "Prepare the shards in the same units"
                )


class Normalisation:
    """Makes of arrays, as they are stored, what a network sees. Local.

    Parameters
    ----------
    scaling, manifest : Manifest
        Whose statistics are used, those of the training data; and of the arrays.
    device, dtype : torch.device, torch.dtype
        Of the result; ids stay int64 or int32.

    Attributes
    ----------
    scales, working : dict of str to tuple
        Mean and standard deviation (`scale_of`) of the arrays that are normalised; and the same in the dtype in which
        they are subtracted and divided by.
    """

    def __init__(
        self, scaling: Manifest, manifest: Manifest, device: torch.device, dtype: torch.dtype, *,
        normalises_targets: bool,
    ):  # fmt: skip
        names = [n for n in manifest.arrays if n in scaling.statistics and (n != "y" or normalises_targets)]
        self.scales = {name: scale_of(scaling, name, device) for name in names}
        self._dtype = dtype
        # Numbers that float32 would round, or whose mean it would, are subtracted from it first
        precise = {name for name in names if dtype == torch.float64 or is_precise(scaling, manifest, name)}
        self.working = {
            name: tuple(number.to(torch.float64 if name in precise else dtype) for number in scale)
            for name, scale in self.scales.items()
        }

    def __call__(self, arrays: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the arrays [B, ...] normalised; they may be overwritten."""
        found = dict(arrays)
        for name, values in arrays.items():
            if name in self.working:
                mean, std = self.working[name]
                values = values.to(mean.dtype).sub_(mean).div_(std)
            if name in self.working or values.is_floating_point():
                found[name] = values.to(self._dtype)
            elif values.dtype not in (torch.bool, torch.int32):
                found[name] = values.long()  # an embedding takes no narrower ids
        return found


def scale_of(manifest: Manifest, name: str, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (1 if constant), float64, to broadcast over [B, channels, ...] or [B]. Local."""
    num_dims = len(manifest.arrays[name].shape)
    form = (1, -1, *(1,) * (num_dims - 1)) if num_dims else (1,)
    found = (manifest.statistics[name].mean, manifest.statistics[name].std)
    mean, std = (torch.tensor(numbers, dtype=torch.float64, device=device).view(form) for numbers in found)
    return mean, torch.where(std > 0, std, 1)


def is_precise(scaling: Manifest, manifest: Manifest, name: str) -> bool:
    """Whether float32 rounds the stored numbers of an array, or, for their spread, their mean. Local."""
    return not np.can_cast(np.dtype(manifest.arrays[name].dtype), np.float32) or has_large_mean(scaling, name)


def has_large_mean(manifest: Manifest, name: str) -> bool:
    """Whether float32 rounds what a channel of an array tells beside its mean. Local."""
    found = manifest.statistics.get(name)
    pairs = zip(found.mean, found.std) if found is not None else ()
    return any(abs(mean) > LARGE_MEAN * std for mean, std in pairs if std > 0)
