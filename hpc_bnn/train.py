"""Train a Bayesian network from a config (floor 7)."""

from __future__ import annotations

import inspect
import json
import logging
import os
import pickle
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import torch
import yaml
from torch import nn
from tqdm import tqdm

from . import __version__
from .checkpoint import checkpoint_path, save_checkpoint
from .comm import GridComm
from .config import Config
from .data import BatchLoader, Manifest, ShardDataset
from .data.augment import Augmentation, build_augmentation
from .errors import ConfigError, DataError, Fault, check_all, import_object
from .evaluate import evaluate_dataset
from .grid import Grid
from .likelihoods import Likelihood, build_likelihood
from .objectives import Objective, build_objective
from .optim import KlAnnealing, build_optimizer
from .posteriors import Posterior, build_posterior
from .shown import ShownClasses, ShownValues, shown_examples
from .step import VariationalStep

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
            config.optimizer, self.posterior.parameters(), config.num_epochs * steps_per_epoch
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
            chunk_size=config.chunk_size,
        )

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
        manifest = self.manifest
        return build_likelihood(self.config.likelihood, manifest.num_classes, manifest.arrays["y"].shape)

    def _build_augmentation(self) -> Augmentation | None:
        config = self.config
        with self.comm.agree("making the augmentation"):
            return build_augmentation(
                config.augmentation,
                num_samples=config.num_samples,
                seed=config.seed,
                num_classes=self.manifest.num_classes,
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
        config, comm = self.config, self.comm
        self._open_run_dir()
        start = time.perf_counter()
        shown = None
        progress = tqdm(
            total=self._num_planned_steps(),
            unit="step",
            disable=None if self.is_writer else True,  # None: off where stderr is no terminal
            desc="train",
        )
        for epoch in range(config.num_epochs):
            row = self._train_epoch(epoch, progress)
            is_last = epoch + 1 == config.num_epochs or self.step.num_steps == config.max_steps
            if is_last or (epoch + 1) % config.test_every_epochs == 0:
                axis = "world" if self.posterior.is_replicated else "data"
                comm.check_replicas(list(self.posterior.parameters()), f"after epoch {epoch}", axis)
                metrics, shown = self._evaluate()
                row |= metrics
            self._write_row(row, progress)
            if is_last:
                break
        progress.close()
        self._write_checkpoint(epoch + 1)
        examples = shown.gather()
        summary = self._summary(row, epoch + 1, time.perf_counter() - start)
        with comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        return summary, examples

    def _num_planned_steps(self) -> int:
        planned = self.config.num_epochs * self.loader.num_batches
        return min(planned, self.config.max_steps or planned)

    def _train_epoch(self, epoch: int, progress: tqdm) -> dict[str, Any]:
        start = time.perf_counter()
        nelbo_sum = data_sum = num_examples = 0
        for batch in self.loader.epoch(epoch):
            x, y = self.augmentation(batch, epoch) if self.augmentation else (batch.x, batch.y)
            result = self.step(x, y, batch.num_examples)
            self.schedule.step()
            nelbo_sum += result.nelbo * batch.num_examples
            data_sum += result.data_term * batch.num_examples
            num_examples += batch.num_examples
            progress.update()
            progress.set_postfix(nelbo=f"{result.nelbo:.4f}", refresh=False)
            if self.step.num_steps == self.config.max_steps:
                break
        seconds = time.perf_counter() - start
        return {
            "epoch": epoch + 1,
            "step": self.step.num_steps,
            "train/nelbo": nelbo_sum / num_examples,
            "train/data_term": data_sum / num_examples,
            "train/kl": result.kl,
            "train/kl_weight": result.kl_weight,
            "learning_rate": self.schedule.get_last_lr()[0],
            "seconds": seconds,
            "examples_per_second": num_examples / seconds,
        }

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
        with self.comm.agree(f"opening {self.run_dir}"):
            if self.is_writer:
                if self.run_dir.exists() and any(self.run_dir.iterdir()):
                    if not (self.run_dir / "config.yaml").exists():
                        raise ConfigError(
                            Fault(
                                "--run_dir",
                                self.run_dir,
                                "it holds files, but no run",
                                "Name a new directory",
                            )
                        )
                    aside = _free_name(self.run_dir)
                    self.run_dir.rename(aside)
                    logger.warning("%s holds a former run: moved to %s", self.run_dir, aside)
                self.run_dir.mkdir(parents=True, exist_ok=True)
                (self.run_dir / "config.yaml").write_text(
                    yaml.safe_dump(self.config.to_dict(), sort_keys=False)
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

    def _write_checkpoint(self, epoch: int) -> None:
        path = checkpoint_path(self.run_dir, self.step.num_steps)
        state = {
            "model": self._whole_model(),
            "schedule": self.schedule.state_dict(),
            "epoch": epoch,
            "step": self.step.num_steps,
            "config": self.config.to_dict(),
        }
        if self.posterior.is_replicated:  # an ensemble's is spread over the ranks
            state["optimizer"] = self.optimizer.state_dict()
        with self.comm.agree(f"writing {path}"):
            if self.is_writer:
                save_checkpoint(path, state)

    def _whole_model(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the whole job by name. Collective over ``sample_comm``."""
        mine = {name: tensor.cpu() for name, tensor in self.posterior.state_dict().items()}
        if self.posterior.is_replicated:
            return mine
        return {k: v for state in self.comm.gather_objects(mine, "sample") for k, v in state.items()}

    def _summary(self, row: dict[str, Any], num_epochs: int, seconds: float) -> dict[str, Any]:
        grid, traffic = self.comm.grid, self.comm.traffic
        return {
            **{name: value for name, value in row.items() if name.startswith(("train/", "test/"))},
            "num_epochs": num_epochs,
            "num_steps": self.step.num_steps,
            "seconds": seconds,
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
