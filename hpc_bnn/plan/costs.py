"""What a sample costs on a device: measured once on one of it, and taken along to plan for a thousand."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config, flatten
from ..data import Manifest
from ..errors import ConfigError, Fault
from ..grid import Grid
from ..safe_files import write_atomically
from .simulate import imagined_comm

logger = logging.getLogger(__name__)

OF_STEP = (
    "model", "posterior", "likelihood", "objective", "dtype", "float32_precision", "chunk_size", "batching", "capture",
)  # fmt: skip
"""Fields of a config on which the cost of a sample depends."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step on one rank with some examples: linear in its samples."""

    examples: int
    step_seconds: float
    """Of what is done once: update, KL, checks."""
    sample_seconds: float
    """Of each sample: draw, forward, backward, fold. Of one example it is the floor: what launches cost from Python."""


@dataclass(frozen=True)
class Costs:
    """The costs of a network on a device."""

    device: str
    config: dict[str, Any]
    """Fields of `OF_STEP`, and the shapes of the data, by name."""
    costs: tuple[Cost, ...]
    """By examples, ascending."""

    def seconds(self, num_samples: int, num_examples: int) -> float:
        """Return the seconds of a step: linear between numbers of examples that were measured, and proportional beyond. Local."""
        below = [cost for cost in self.costs if cost.examples <= num_examples] or [self.costs[0]]
        above = [cost for cost in self.costs if cost.examples > num_examples]
        low = below[-1]
        if not above:
            return low.step_seconds + num_samples * low.sample_seconds * num_examples / low.examples
        high, part = above[0], max(num_examples - low.examples, 0) / (above[0].examples - low.examples or 1)
        step = low.step_seconds + part * (high.step_seconds - low.step_seconds)
        return step + num_samples * (low.sample_seconds + part * (high.sample_seconds - low.sample_seconds))


def measure_costs(config: Config, manifest: Manifest, device: str, measure: Callable[[Config, Any], float]) -> Costs:
    """Return the costs for 1, 4, ... examples up to the batch, as memory allows; ``measure`` gives seconds. Local."""
    chunk = 1 if config.chunk_size == "auto" else config.chunk_size
    most = min(config.global_batch_size, manifest.num_examples(config.data.train_split))
    counts = sorted({4**power for power in range(20) if 4**power < most} | {most})
    costs = []
    for count in counts:
        of_count = replace(config, global_batch_size=count)
        few, more = (replace(of_count, num_samples=n * chunk) for n in (2, 3))
        try:
            two, three = (measure(some, imagined_comm(Grid(), some, device)) for some in (few, more))
        except torch.OutOfMemoryError:
            if not costs:
                raise
            logger.info("%d examples at once do not fit into the memory of %s", count, device)
            break
        sample = max(three - two, 0.0) / chunk
        costs.append(Cost(count, max(two - 2 * chunk * sample, 0.0), sample))
    return Costs(device, _definition(config, manifest), tuple(costs))


def write_costs(path: Path, costs: Costs) -> None:
    """Write costs as JSON. Local."""
    write_atomically(path, json.dumps(asdict(costs), indent=1) + "\n")


def read_costs(path: str, config: Config, manifest: Manifest) -> Costs:
    """Return what `write_costs` wrote; `ConfigError` where a file holds no costs, or those of another network. Local."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [(c["examples"], c["step_seconds"], c["sample_seconds"]) for c in content["costs"]]
        costs = tuple(Cost(int(count), float(step), float(sample)) for count, step, sample in rows)
        if not costs or min(c.examples for c in costs) < 1:
            raise ValueError("no costs")
        found = Costs(str(content["device"]), dict(content["config"]), costs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"it holds no costs ({type(error).__name__}: {error})"
        remedy = "Write it with hpc-bnn plan --measure FILE on one device"
        raise ConfigError(Fault("--measured", path, rule, remedy)) from error
    mine = _definition(config, manifest)
    differ = sorted(name for name in mine.keys() | found.config.keys() if mine.get(name) != found.config.get(name))
    if differ:
        rule = f"it was measured with another {', '.join(differ[:5])}"
        raise ConfigError(Fault("--measured", path, rule, "Measure again with this config"))
    return found


def _definition(config: Config, manifest: Manifest) -> dict[str, Any]:
    """Return what determines the cost of a sample, as JSON gives it back."""
    fields = flatten({name: value for name, value in asdict(config).items() if name in OF_STEP})
    shapes = {f"data.{name}": [list(spec.shape), spec.dtype] for name, spec in manifest.arrays.items()}
    return json.loads(json.dumps(fields | shapes, default=str))
