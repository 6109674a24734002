"""Test examples with their predictive, kept for a picture.

`evaluate_dataset` passes every block of predictions to `see`; `gather` sends the selected ones to rank 0.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..comm import GridComm
from ..data import Source
from ..likelihoods import Likelihood
from ..predictive import ClassPredictive
from ..trees import tensors_of

NUM_SHOWN_EXAMPLES = 12
"""Classes: half the surest, half the least sure."""

NUM_SHOWN_POINTS, NUM_SHOWN_TARGETS = 200, 256
"""Numbers: examples, evenly spread, and targets of each."""

NUM_SHOWN_FIELDS, LEAST_FIELD = 3, 8
"""Fields [channels, rows, columns]: examples, evenly spread; and rows and columns that make a field."""


class ShownClasses:
    """The surest and the least sure examples of the job."""

    def __init__(self, comm: GridComm, dataset: Source):
        self.comm, self.dataset = comm, dataset
        self._seen: list[tuple[Tensor, ClassPredictive]] = []

    def add(self, examples: Tensor, predictive: Any, y: Tensor) -> None:
        """Take in the `ClassPredictive` of some examples [B] of this rank, and their classes. Local."""
        self._seen.append((examples, predictive))

    def gather(self) -> dict[str, Any]:
        """Return the examples on rank 0, elsewhere nothing. Collective over the world."""
        half = NUM_SHOWN_EXAMPLES // 2
        # All ranks choose alike, by the numbers of the candidates; only then do the inputs of those that are shown travel
        mine = self._choose(half) if self.comm.grid.is_first("sample") else []
        everyones = list(itertools.chain.from_iterable(self.comm.gather_objects(mine)))
        everyones.sort(key=lambda example: example["entropy"])
        surest = {int(e["probabilities"].argmax()): e for e in reversed(everyones)}  # one of each class
        surest, least_sure = sorted(surest.values(), key=lambda e: e["entropy"])[:half], everyones[-half:][::-1]
        span = range(len(self.dataset))[self.comm.grid.local_examples(len(self.dataset))]
        wanted = sorted({example["index"] for example in (*surest, *least_sure)} & set(span))
        pictures: dict[int, dict[str, Any]] = {}
        if wanted:  # all ranks of a sample group: it may read together
            x, y, *_ = self.dataset.fetch(torch.tensor(wanted))
            if self.comm.grid.is_first("sample"):
                pictures = {n: {"x": tensors_of(x)[0][i].cpu(), "y": int(y[i])} for i, n in enumerate(wanted)}
        for part in self.comm.gather_objects(pictures):
            pictures |= part
        if self.comm.grid.rank != 0:
            return {}
        return {
            kind: [example | pictures[example["index"]] for example in shown]
            for kind, shown in (("surest", surest), ("least_sure", least_sure))
        }

    def _choose(self, half: int) -> list[dict[str, Any]]:
        """Return candidates of this rank: the surest of each class, and the least sure."""
        if not self._seen:
            return []
        entropy = torch.cat([predictive.entropy for _, predictive in self._seen])
        said = torch.cat([predictive.probabilities.argmax(-1) for _, predictive in self._seen]).tolist()
        order = entropy.argsort().tolist()
        surest = {said[i]: i for i in reversed(order)}.values()
        places = dict.fromkeys([*sorted(surest, key=order.index)[:half], *order[-half:]])
        starts = list(itertools.accumulate((len(examples) for examples, _ in self._seen), initial=0))
        found = []
        for place in places:
            block = next(b for b, stop in enumerate(starts[1:]) if place < stop)
            examples, predictive = self._seen[block]
            row = place - starts[block]
            example = {"index": int(examples[row]), "entropy": float(entropy[place])}
            example |= {"probabilities": predictive.probabilities[row].cpu(), "std": predictive.std[row].cpu()}
            found.append(example | {"mutual_information": float(predictive.mutual_information[row])})
        return found


class ShownValues:
    """Targets and predictive of evenly spread examples of the job, in units of y."""

    num_shown = NUM_SHOWN_POINTS

    def __init__(self, comm: GridComm, dataset: Source):
        self.comm, self._ignored = comm, dataset.manifest.ignore_index
        self._every = -(-len(dataset) // self.num_shown)
        self._seen: list[dict[str, Tensor]] = []

    def add(self, examples: Tensor, predictive: Any, y: Tensor) -> None:
        """Take in the `ValuePredictive` of some examples [B] of this rank, and their targets. Local."""
        rows = examples % self._every == 0
        columns = {
            "y": y,
            "mean": predictive.mean,
            "aleatoric_std": predictive.aleatoric_variance.sqrt(),
            "epistemic_std": predictive.epistemic_variance.sqrt(),
        }
        self._seen.append({name: self._cut(column[rows]).cpu() for name, column in columns.items()})

    def _cut(self, column: Tensor) -> Tensor:
        return column.flatten(1)[:, :NUM_SHOWN_TARGETS]

    def gather(self) -> dict[str, Tensor]:
        """Return columns [n, targets], or fields [n, rows, columns], on rank 0, else {}. Collective over the world."""
        mine = self._seen if self.comm.grid.is_first("sample") else []
        parts = list(itertools.chain.from_iterable(self.comm.gather_objects(mine)))
        if self.comm.grid.rank != 0:
            return {}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ShownFields(ShownValues):
    """The same of a few examples that are fields [channels, rows, columns]: their first channel."""

    num_shown = NUM_SHOWN_FIELDS

    def _cut(self, column: Tensor) -> Tensor:
        return column[:, 0]


class ShownClassFields(ShownFields):
    """Of a few examples that are fields of classes: true and predicted classes, entropy and mutual information (nats)."""

    def add(self, examples: Tensor, predictive: Any, y: Tensor) -> None:
        """Take in the `ClassPredictive` of some examples [B] of this rank, and their classes [B, ...]. Local."""
        rows = examples % self._every == 0
        columns = {
            "y": y if self._ignored is None else torch.where(y == self._ignored, math.nan, y.double()),
            "class": predictive.probabilities.argmax(1),
            "entropy": predictive.entropy,
            "mutual_information": predictive.mutual_information,
        }
        shape = (-1, math.prod(y.shape[1:-1]), y.shape[-1])
        self._seen.append({name: column[rows].reshape(shape).cpu() for name, column in columns.items()})


def shown_examples(likelihood: Likelihood, comm: GridComm, dataset: Source) -> ShownClasses | ShownValues:
    """Return what keeps the examples that suit a likelihood and the targets."""
    if likelihood.num_classes is not None:
        return (ShownClassFields if dataset.manifest.places else ShownClasses)(comm, dataset)
    shape = dataset.manifest.arrays["y"].shape
    is_field = len(shape) == 3 and min(shape[1:]) >= LEAST_FIELD
    return (ShownFields if is_field else ShownValues)(comm, dataset)
