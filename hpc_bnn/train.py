"""Train a Bayesian network from a config (floor 7)."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import pickle
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import torch
import yaml
from torch import nn
from tqdm import tqdm

from . import __version__
from .atomic import write_atomically
from .checkpoint import CheckpointStore, gather_state, restore_state
from .comm import GridComm
from .config import Config
from .data import BatchLoader, Manifest, ShardDataset
from .data.augment import Augmentation, build_augmentation
from .errors import ConfigError, DataError, Fault, Interrupted, check_all, import_object
from .evaluate import evaluate_dataset
from .grid import Grid
from .likelihoods import Likelihood, build_likelihood
from .objectives import Objective, build_objective
from .optim import KlAnnealing, build_optimizer
from .posteriors import Posterior, build_posterior
from .shown import ShownClasses, ShownValues, shown_examples
from .step import StepResult, VariationalStep

logger = logging.getLogger(__name__)


def check(config: Config, world_size: int) -> None:
    """Raise one `ConfigError` with everything in a config that cannot work on so many ranks. Local."""
    check_all(
        config.check,
        lambda: Grid(world_size, config.grid.sample_size).check_num_samples(config.num_samples),
    )


class Run:
    """A training run on the process grid: data, model, step, and what it writes.

    Collective over the world, in construction and in every method.

    Parameters
    ----------
    config : Config
        The run, as `check` approves it.
    comm : GridComm
        The process grid.
    """

    def __init__(self, config: Config, comm: GridComm):
        check(config, comm.grid.world_size)
        self.config = config
        self.comm = comm
        self.is_writer = comm.grid.rank == 0
        self.run_dir = Path(config.run_dir)
        self.dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self.manifest = self._read_manifest()
        self.likelihood = self._build_likelihood()
        self.augmentation = self._build_augmentation()
        self.train_set, self.test_set = (
            self._open(split) for split in (config.data.train_split, config.data.test_split)
        )
        self.loader = BatchLoader(
            self.train_set,
            comm.grid,
            config.global_batch_size,
            config.seed,
            drop_last=config.data.drop_last,
            prefetch=config.data.prefetch,
            with_partners=self.augmentation is not None and self.augmentation.needs_partners,
        )
        self.posterior = self._build_posterior()
        steps_per_epoch = self.loader.num_batches
        self.optimizer, self.schedule = build_optimizer(
            config.optimizer, self.posterior.parameters(), config.num_epochs, steps_per_epoch
        )
        self.step = VariationalStep(
            self.posterior,
            self.likelihood,
            self.optimizer,
            comm,
            num_samples=config.num_samples,
            num_train_examples=len(self.train_set),
            seed=config.seed,
            kl_weight=KlAnnealing(
                config.kl_weight,
                config.kl_annealing.schedule,
                config.kl_annealing.num_epochs * steps_per_epoch,
            ),
            objective=self._build_objective(),
            autocast_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
            max_gradient_norm=config.optimizer.max_gradient_norm,
            chunk_size=config.chunk_size,
        )
        self.checkpoints = CheckpointStore(
            self.run_dir / "checkpoints", config.checkpoint.keep_last, config.checkpoint.asynchronous
        )
        self.place = _Place()
        self._why_stopped: str | None = None
        self._begun = time.perf_counter()

    # --- construction -------------------------------------------------------------------------------

    def _read_manifest(self) -> Manifest:
        """Read the manifest, after preparing the shards where it cannot be read and the config says how."""
        config, comm = self.config.data, self.comm
        with comm.agree(f"preparing {config.shards}"):
            if self.is_writer and config.prepare:
                try:
                    Manifest.read(config.shards)
                except DataError as error:
                    logger.info("%s; running %s", error, config.prepare)
                    _prepare_shards(config.prepare, config.shards)
        with comm.agree(f"reading {config.shards}"):
            return Manifest.read(config.shards)

    def _open(self, split: str) -> ShardDataset:
        return ShardDataset(
            self.config.data.shards,
            split,
            self.comm.device,
            self.dtype,
            comm=self.comm,
            reading=self.config.data.reading,
            normalises_targets=self.likelihood.is_equivariant,
        )

    def _build_likelihood(self) -> Likelihood:
        config, manifest = self.config.likelihood, self.manifest
        if config.name == "auto" and self.config.objective.name in ("crps", "energy"):
            config = replace(config, name="implicit")
        return build_likelihood(config, manifest.num_classes, manifest.arrays["y"].shape)

    def _build_augmentation(self) -> Augmentation | None:
        config = self.config
        with self.comm.agree("making the augmentation"):
            return build_augmentation(
                config.augmentation, self.manifest, num_samples=config.num_samples, seed=config.seed
            )

    def _build_objective(self) -> Objective:
        with self.comm.agree(f"making the objective {self.config.objective.name}"):
            return build_objective(self.config.objective, self.manifest.target_weights)

    def _build_posterior(self) -> Posterior:
        config, comm = self.config, self.comm

        def make_module() -> nn.Module:
            network, arguments = import_object("--model.name", config.model.name), config.model.arguments
            shapes = {"in_shape": self.manifest.arrays["x"].shape, "num_outputs": self.likelihood.num_outputs}
            places = self.manifest.arrays["y"].shape[1:]
            try:
                if places and "places" in inspect.signature(network).parameters:
                    shapes["places"] = places
                module = network(**shapes, **arguments)
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(
                    Fault(
                        "--model.arguments",
                        arguments,
                        f"{config.model.name} refuses them ({error})",
                        "Mend them",
                    )
                ) from error
            if config.model.pretrained is not None:
                _load_pretrained(module, config.model.pretrained)
            return self.likelihood.wrap(module).to(comm.device, self.dtype)

        with comm.agree(f"building {config.model.name}"):
            posterior = build_posterior(
                config.posterior,
                make_module,
                num_samples=config.num_samples,
                local_samples=comm.grid.local_samples(config.num_samples),
                seed=config.seed,
            )
        if posterior.is_replicated:
            comm.broadcast_(list(posterior.parameters()))  # the buffers are keyed, and may be bool
        return posterior

    # --- the run ------------------------------------------------------------------------------------

    def train(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train, evaluate, write everything.

        Returns
        -------
        summary : dict
            What summary.json holds.
        examples : dict
            Test examples with their predictive, for a picture (on rank 0, elsewhere empty).
        """
        self._open_run_dir()
        with self._watching_signals():
            row, shown = self._train_epochs()
        self._close_checkpoints()
        if shown is None:  # the run was complete already
            metrics, shown = self._evaluate()
            row = row | metrics
        examples = shown.gather()
        summary = self._summary(row)
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                text = json.dumps(summary, indent=1) + "\n"
                write_atomically(self.run_dir / "summary.json", text)
        return summary, examples

    def evaluate(self, which: str = "newest") -> dict[str, Any]:
        """Evaluate the newest or the best checkpoint on the test split, and write RUN_DIR/evaluation.json.

        Returns
        -------
        dict
            Metrics, and what they are of; the same on all ranks.
        """
        state, store = None, self.checkpoints
        with self.comm.agree(f"reading {store.directory}"):
            if self.is_writer:
                state = store.load_best() if which == "best" else store.load_newest()
                if state is None:
                    raise DataError(
                        f"{store.directory} holds no sound checkpoint with which to evaluate ({which})"
                    )
        state = self.comm.broadcast_tree(state)
        with self.comm.agree("restoring the checkpoint"):
            self._restore(state)
        metrics, _ = self._evaluate()
        config = self.config
        result = {
            **metrics,
            "checkpoint": f"step {self.step.num_steps}",
            "num_test_samples": config.num_test_samples,
            "data": f"{config.data.shards}, {config.data.test_split}",
        }
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                write_atomically(self.run_dir / "evaluation.json", json.dumps(result, indent=1) + "\n")
        return result

    def _train_epochs(self) -> tuple[dict[str, Any], ShownClasses | ShownValues | None]:
        """Train to the end of the run; return the last row, and what its evaluation has shown."""
        row, shown, before = self.place.row, None, self.place.run_seconds
        progress = tqdm(
            total=self._num_planned_steps(),
            initial=self.step.num_steps,
            unit="step",
            disable=None if self.is_writer else True,  # None: off where stderr is no terminal
            desc="train",
        )
        with progress:
            while not self._is_over():
                self._train_epoch(progress)
                row, shown = self._finish_epoch(progress)
                self.place.run_seconds = before + time.perf_counter() - self._begun
                if self._is_over() or row["epoch"] % self.config.checkpoint.every_epochs == 0:
                    self._write_checkpoint(row.get(self._metric_name))
        return row, shown

    def _is_over(self) -> bool:
        """Whether the epochs, the steps or the patience are used up."""
        place, config, patience = self.place, self.config, self.config.early_stopping.patience
        return (
            place.epoch >= config.num_epochs
            or (config.max_steps is not None and self.step.num_steps >= config.max_steps)
            or (patience is not None and place.num_without_improvement >= patience)
        )

    def _num_planned_steps(self) -> int:
        planned = self.config.num_epochs * self.loader.num_batches
        return min(planned, self.config.max_steps or planned)

    def _train_epoch(self, progress: tqdm) -> None:
        """Train to the end of the epoch that the run is in; raise `Interrupted` where some rank wants to stop."""
        place, config = self.place, self.config
        start, before, in_run = time.perf_counter(), place.seconds, place.run_seconds
        for batch in self.loader.epoch(place.epoch, place.num_batches):
            x, y = self.augmentation(batch, place.epoch) if self.augmentation else (batch.x, batch.y)
            if config.max_seconds is not None and time.perf_counter() - self._begun > config.max_seconds:
                self._stop("--max_seconds is over")
            result = self.step(x, y, batch.num_examples)
            self.schedule.step()
            place.add(result, batch.num_examples)
            seconds = time.perf_counter() - start
            place.seconds, place.run_seconds = before + seconds, in_run + seconds
            progress.update()
            progress.set_postfix(nelbo=f"{result.nelbo:.4f}", refresh=False)
            if result.wants_stop:
                self._write_checkpoint()
                self._close_checkpoints()
                why = next(filter(None, self.comm.gather_objects(self._why_stopped)), "a signal")
                raise Interrupted(
                    f"after step {self.step.num_steps}: {why}. The same command with --resume true goes on from there"
                )
            if self._is_over():
                break
            every = config.checkpoint.every_steps
            if every and self.step.num_steps % every == 0 and place.num_batches < self.loader.num_batches:
                self._write_checkpoint()

    def _finish_epoch(self, progress: tqdm) -> tuple[dict[str, Any], ShownClasses | ShownValues | None]:
        """Close the epoch: evaluate where it is time, write the row, and go to the next one."""
        place, shown = self.place, None
        row = {
            "epoch": place.epoch + 1,
            "step": self.step.num_steps,
            **place.means(),
            "learning_rate": self.schedule.get_last_lr()[0],
        }
        is_whole = place.num_batches == self.loader.num_batches  # not where --max_steps ended it
        if is_whole:
            place.next_epoch()
        is_planned = row["epoch"] % self.config.test_every_epochs == 0
        if self._is_over() or is_planned:
            axis = "world" if self.posterior.is_replicated else "data"
            self.comm.check_replicas(list(self.posterior.parameters()), f"after epoch {row['epoch']}", axis)
            metrics, shown = self._evaluate()
            row |= metrics
            if is_whole and is_planned:
                place.judge(row.get(self._metric_name), self.config.early_stopping.min_change)
        place.row = row
        self._write_row(row, progress)
        return row, shown

    @property
    def _metric_name(self) -> str:
        name = self.config.checkpoint.metric
        return name if name != "auto" else ("test/nll" if self.likelihood.has_density else "test/rmse")

    def _evaluate(self) -> tuple[dict[str, float], ShownClasses | ShownValues]:
        shown = shown_examples(self.likelihood, self.comm, self.test_set)
        metrics = evaluate_dataset(
            self.posterior,
            self.likelihood,
            self.comm,
            self.test_set,
            num_samples=self.config.num_test_samples,
            seed=self.config.seed,
            see=shown.see,
        )
        return {f"test/{name}": value for name, value in metrics.items()}, shown

    # --- what it writes -----------------------------------------------------------------------------

    def _open_run_dir(self) -> None:
        """Make the run directory and begin, or go on from the newest checkpoint in it."""
        state = None
        with self.comm.agree(f"opening {self.run_dir}"):
            if self.is_writer:
                state = self.checkpoints.load_newest() if self.config.resume else None
                if state is None:
                    self._make_run_dir()
                else:
                    self._say_differences(state["config"])
                    self._write_config()
                    _keep_rows(self.run_dir / "metrics.jsonl", state["place"]["epoch"])
        state = self.comm.broadcast_tree(state)
        if state is not None:
            with self.comm.agree("restoring the checkpoint"):
                self._restore(state)
            if self.is_writer:
                logger.info(
                    "going on from the checkpoint of step %d: epoch %d, batch %d",
                    self.step.num_steps,
                    self.place.epoch + 1,
                    self.place.num_batches + 1,
                )
        if self.is_writer:
            logger.info(
                "grid %s, %d samples, %d examples per step, %s over %d weights, KL: %s, reading %s, %s, %s",
                self.comm.grid,
                self.config.num_samples,
                self.config.global_batch_size,
                self.posterior.family,
                self.posterior.num_weights,
                self.posterior.kl_kind,
                self.train_set.reading,
                self.comm.device,
                self.comm.library if self.comm.grid.world_size > 1 else "one process, no communication",
            )

    def _write_row(self, row: dict[str, Any], progress: tqdm) -> None:
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                with open(self.run_dir / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
        if self.is_writer and any(name.startswith("test/") for name in row):
            progress.write(_one_line(row), file=sys.stderr)

    def _make_run_dir(self) -> None:
        """Move a former run aside, make the directory and write the config."""
        if self.run_dir.exists() and any(self.run_dir.iterdir()):
            if not (self.run_dir / "config.yaml").exists():
                raise ConfigError(
                    Fault("--run_dir", self.run_dir, "it holds files, but no run", "Name a new directory")
                )
            aside = _free_name(self.run_dir)
            self.run_dir.rename(aside)
            logger.warning("%s holds a former run: moved to %s", self.run_dir, aside)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._write_config()

    def _write_config(self) -> None:
        text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
        write_atomically(self.run_dir / "config.yaml", text)

    def _say_differences(self, former: dict[str, Any]) -> None:
        """Say what of the config is not as it was when the checkpoint was written."""
        mine = _flat(self.config.to_dict())
        for name, value in _flat(former).items():
            if mine.get(name) != value and not name.startswith(("run_dir", "resume", "max_seconds", "grid.")):
                logger.warning("--%s is %s; the checkpoint was written with %s", name, mine.get(name), value)

    def _write_checkpoint(self, metric: float | None = None) -> None:
        """Write the state of the job. Collective over the world."""
        state = {
            **gather_state(self.posterior, self.optimizer, self.comm),
            "schedule": self.schedule.state_dict(),
            "num_steps": self.step.num_steps,
            "place": asdict(self.place),
            "config": self.config.to_dict(),
        }
        with self.comm.agree(f"writing a checkpoint to {self.checkpoints.directory}"):
            if self.is_writer:
                self.checkpoints.save(state, self.step.num_steps, metric)

    def _close_checkpoints(self) -> None:
        """Wait for what is being written. Collective over the world."""
        with self.comm.agree(f"writing a checkpoint to {self.checkpoints.directory}"):
            self.checkpoints.close()

    def _restore(self, state: dict[str, Any]) -> None:
        restore_state(state, self.posterior, self.optimizer, self.comm)
        self.schedule.load_state_dict(state["schedule"])
        self.step.num_steps = state["num_steps"]
        self.place = _Place(**state["place"])

    # --- stopping -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _watching_signals(self) -> Iterator[None]:
        """Let SIGUSR1 and SIGTERM stop all ranks with a checkpoint after the step that they come in."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(received: int, _) -> None:
            self._stop(signal.Signals(received).name)

        former = {number: signal.signal(number, handle) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _stop(self, why: str) -> None:
        self._why_stopped, self.step.wants_stop = why, True

    def _summary(self, row: dict[str, Any]) -> dict[str, Any]:
        grid, traffic = self.comm.grid, self.comm.traffic
        return {
            **{name: value for name, value in row.items() if name.startswith(("train/", "test/"))},
            "num_epochs": self.place.epoch,
            "num_steps": self.step.num_steps,
            "seconds": self.place.run_seconds,
            "num_samples": self.config.num_samples,
            "objective": {"name": self.step.objective.name, "num_passes": self.step.num_passes},
            "likelihood": type(self.likelihood).__name__,
            "reading": {"mode": self.train_set.reading, "num_bytes_of_rank_0": self.train_set.num_bytes_read},
            "posterior": {
                "family": self.posterior.family,
                "num_random_weights": self.posterior.num_weights,
                "kl": self.posterior.kl_kind,
            },
            "grid": {
                "world_size": grid.world_size,
                "sample_size": grid.sample_size,
                "data_size": grid.data_size,
            },
            "communication": {
                "library": self.comm.library,
                "num_collectives": traffic.num_collectives,
                "num_bytes": traffic.num_bytes,
            },
            "device": str(self.comm.device),
            "versions": _versions(),
        }


# --- the place in a run --------------------------------------------------------------------------------


@dataclass
class _Place:
    """How far a run has come, of plain numbers: with parameters and optimizer all that a checkpoint needs."""

    epoch: int = 0
    """Epochs that are complete."""
    num_batches: int = 0
    """Batches of the epoch that is not."""
    nelbo_sum: float = 0.0
    data_sum: float = 0.0
    num_examples: int = 0
    seconds: float = 0.0
    """Time in the epoch (seconds)."""
    kl: float = 0.0
    kl_weight: float = 1.0
    run_seconds: float = 0.0
    """Time in the run (seconds)."""
    best_metric: float | None = None
    num_without_improvement: int = 0
    """Evaluations since the best one."""
    row: dict[str, Any] = field(default_factory=dict)
    """Of the last complete epoch."""

    def add(self, result: StepResult, num_examples: int) -> None:
        """Take in a step."""
        self.num_batches += 1
        self.nelbo_sum += result.nelbo * num_examples
        self.data_sum += result.data_term * num_examples
        self.num_examples += num_examples
        self.kl, self.kl_weight = result.kl, result.kl_weight

    def means(self) -> dict[str, float]:
        """Return what a row of metrics says of the epoch."""
        return {
            "train/nelbo": self.nelbo_sum / self.num_examples,
            "train/data_term": self.data_sum / self.num_examples,
            "train/kl": self.kl,
            "train/kl_weight": self.kl_weight,
            "seconds": self.seconds,
            "examples_per_second": self.num_examples / self.seconds,
        }

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.num_batches = self.num_examples = 0
        self.nelbo_sum = self.data_sum = self.seconds = 0.0

    def judge(self, metric: float | None, min_change: float) -> None:
        """Take in the metric of an evaluation, less is better."""
        if metric is None:
            return
        if self.best_metric is None or metric < self.best_metric - min_change:
            self.best_metric, self.num_without_improvement = metric, 0
        else:
            self.num_without_improvement += 1


# --- helpers -------------------------------------------------------------------------------------------


def _load_pretrained(module: nn.Module, path: str) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state)
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        raise ConfigError(
            Fault(
                "--model.pretrained",
                path,
                f"not a state_dict of this network ({error})",
                "Save net.state_dict()",
            )
        ) from error


def _prepare_shards(script: str, directory: str) -> None:
    """Run a data_prep script as a process of its own, outside of this MPI job."""
    launcher = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_", "SLURM_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    command = [sys.executable, script, "--output", directory]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}")


def _keep_rows(path: Path, num_epochs: int) -> None:
    """Keep the rows of complete epochs: a run that goes on writes those behind again."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = [row for row in rows if json.loads(row)["epoch"] <= num_epochs]
    write_atomically(path, "".join(f"{row}\n" for row in kept))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted names."""
    flat = {}
    for name, value in tree.items():
        is_group = isinstance(value, dict) and name != "arguments"
        flat |= _flat(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def _free_name(path: Path) -> Path:
    path = path.absolute()  # "." has no name
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return aside


def _one_line(row: dict[str, Any]) -> str:
    shown = ["train/nelbo", "train/kl", *(name for name in row if name.startswith("test/"))]
    values = "  ".join(f"{name} {row[name]:.4g}" for name in shown)
    return f"epoch {row['epoch']:4d}  step {row['step']:6d}  {values}  {row['examples_per_second']:.0f} examples/s"


def _versions() -> dict[str, str]:
    found = {
        "hpc_bnn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "h5py": h5py.__version__,
    }
    for name in ("horovod", "mpi4py"):
        if version := getattr(sys.modules.get(name), "__version__", None):
            found[name] = version
    return found
