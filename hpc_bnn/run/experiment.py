"""The experiment of a config, without training: data, network, likelihood, posterior."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..comm import GridComm, StallWatch, connect
from ..comm.launcher import without_launcher
from ..config import Config, DataConfig, Score, config_of_run, flatten, read_tree
from ..data import Manifest, ShardDataset, Source, as_source
from ..data.dataset import Normalisation, check_alike, check_same_manifest, has_large_mean
from ..data.manifest import MANIFEST
from ..errors import ConfigError, DataError, Fault, import_object
from ..likelihoods import Likelihood, build_likelihood
from ..models import checkpoint_layers
from ..objectives import build_objective
from ..posteriors import Posterior, build_posterior
from ..predictive import (
    Calibration,
    Evaluation,
    check_up,
    evaluate_dataset,
    find_groups,
    mean_network,
    uncertainties_of_dataset,
)
from ..safe_files import read_bytes, refuse_world_writable, write_atomically
from ..training import KlAnnealing, build_optimizer
from ..training.state import scatter_model
from ..training.step import VariationalStep
from .checkpoint import CheckpointStore, read_identity
from .plotted_examples import ShownClasses, ShownValues, shown_examples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestResult:
    """Evaluation of a data set, and examples to plot."""

    evaluation: Evaluation
    shown: ShownClasses | ShownValues
    """Examples to plot, on their ranks."""


class Experiment:
    """A posterior over the weights of a network, its likelihood, and the data that it is for.

    Collective over the world, in construction and in every method. ``num_steps`` are those of the checkpoint of `of_run`.
    Where it is that of a file (`hpc_bnn.run.model_file`), ``file`` is its path, and ``calibration`` the text of the
    calibration in it, or None. As a context, ``watch`` ends the job where a rank hangs (``stall_seconds``).

    `Config.check` has approved the config; the manifest has the shapes of the training data, and the statistics by
    which everything is normalised.
    """

    def __init__(self, config: Config, comm: GridComm, manifest: Manifest):
        self.config = config
        self.comm = comm
        self.manifest = manifest
        self.num_steps = 0
        self.file: Path | None = None
        self.calibration: str | None = None
        check_same_manifest(comm, manifest)
        self.is_writer = comm.grid.is_first("world")
        self.run_dir = Path(config.run_dir)
        self.dtype = torch.float64 if config.dtype == "float64" else torch.float32
        self.likelihood = self._build_likelihood()
        self.posterior = self._build_posterior()
        keep_last, asynchronous = config.checkpoint.keep_last, config.checkpoint.asynchronous
        self.checkpoints = CheckpointStore(self.run_dir / "checkpoints", keep_last, asynchronous)
        self.watch = StallWatch(config.stall_seconds, comm.grid.rank)

    @classmethod
    def of_run(cls, config: Config, comm: GridComm, which: str = "newest") -> Experiment:
        """Return that of a run at its newest or best checkpoint; `DataError` without a sound one, or a manifest."""
        check_same_start(config, comm)
        with comm.agree(f"reading {config.run_dir}"):
            refuse_world_writable(config.run_dir, "the run directory")
            if not Path(config.run_dir, MANIFEST).exists():
                raise DataError(f"{config.run_dir} holds no run ({MANIFEST} is missing). Train one there")
            manifest = Manifest.read(config.run_dir, has_files=False)
        experiment = cls(config, comm, manifest)
        state, store = None, experiment.checkpoints
        with comm.agree(f"reading {store.directory}"):
            if experiment.is_writer:
                store.identity = read_identity(experiment.run_dir)
                state = store.load_best() if which == "best" else store.load_newest(falls_back=False)
                if state is None:
                    raise DataError(f"{store.directory} holds no sound checkpoint ({which})")
                check_network(config, state["config"], store.directory)
                if state["place"].get("data", manifest.digest) != manifest.digest:  # a former checkpoint does not say
                    raise DataError(
                        f"{config.run_dir}/{MANIFEST} is not that of the run: its checkpoint was written with other data, or "
                        "other statistics. Put the manifest of its training data there"
                    )
                state = {"model": state["model"], "num_steps": state["place"]["num_steps"]}
        experiment.num_steps = comm.broadcast_object(state and state["num_steps"])
        scatter_model(experiment.posterior, state and state["model"], comm)
        return experiment

    def restore(self, model: dict[str, torch.Tensor], num_steps: int) -> None:
        """Take over the parameters of a file, which all ranks have, and its number of steps."""
        with self.comm.agree("restoring the checkpoint"):
            self.posterior.load_state_dict(model)
        self.num_steps = num_steps

    @property
    def normalisation(self) -> Normalisation:
        """What makes of arrays, as they are in the shards, what the network takes."""
        options = {"normalises_targets": self.likelihood.is_equivariant}
        return Normalisation(self.manifest, self.manifest, self.comm.device, self.dtype, **options)

    @property
    def is_wide(self) -> bool:
        """Whether predictions are float64: float32 would round what the targets tell."""
        return self.dtype == torch.float64 or has_large_mean(self.manifest, "y")

    def build_step(
        self, num_train_examples: int, num_batches: int
    ) -> tuple[VariationalStep, torch.optim.lr_scheduler.LambdaLR]:
        """Return the step and the schedule of the learning rate, for N in the ELBO and so many steps per epoch."""
        config, comm = self.config, self.comm
        with comm.agree(f"making the objective {config.objective.name}"):
            objective = build_objective(config.objective, self.manifest.target_weights)
        optimizer, schedule = build_optimizer(
            config.optimizer, self.posterior, comm, config.num_epochs, num_batches, config.grid.overlap
        )
        annealing = config.kl_annealing
        in_run = annealing.fraction_of_run
        num_annealed = annealing.num_epochs if in_run is None else in_run * config.num_epochs
        step = VariationalStep(
            self.posterior,
            self.likelihood,
            optimizer,
            comm,
            num_samples=config.num_samples,
            num_train_examples=num_train_examples,
            seed=config.seed,
            kl_weight=KlAnnealing(config.kl_weight, annealing.schedule, num_annealed * num_batches),
            objective=objective,
            autocast_dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
            max_gradient_norm=config.optimizer.max_gradient_norm,
            chunk_size=config.chunk_size,
            batching=config.batching,
            micro_batch_size=config.micro_batch_size,
            capture=config.capture,
        )
        return step, schedule

    def open(self, split: str, shards: str | None = None) -> Source:
        """Open a split of the data of the config, or of shards, normalised as the data that the network is trained on."""
        if shards is None and self.config.data.dataset is not None:
            source, path = open_dataset(self.config.data, split, self.comm), self.config.data.dataset
            if self.manifest.statistics:
                rule = "the network was trained on shards, normalised by their statistics, which a dataset is not"
                raise ConfigError(Fault("data.dataset", path, rule, "Use <data.shards>"))
            check_alike(self.manifest, source.manifest, path)
            return source.on(self.comm.device, self.dtype)
        return ShardDataset(
            shards or self.config.data.shards,
            split,
            self.comm.device,
            self.dtype,
            comm=self.comm,
            reading=self.config.data.reading,
            normalises_targets=self.likelihood.is_equivariant,
            scaling=self.manifest,
        )

    @property
    def test_samples(self) -> dict[str, Any]:
        """The samples of the predictive, and how many a rank evaluates at once: arguments of what predicts."""
        config = self.config
        chunk_size = config.chunk_size if config.batching == "vmap" and config.chunk_size != "auto" else 1
        return {"num_samples": config.num_test_samples, "seed": config.seed, "chunk_size": chunk_size}

    def uncertainties(self, dataset: Source, calibration: Calibration | None = None) -> dict[str, torch.Tensor]:
        """Return the uncertainties [N] of all examples of a data set (`hpc_bnn.predictive.evaluation.uncertainties_of`)."""
        mark, options = lambda *_: self.watch.mark(), self.test_samples | {"calibration": calibration}
        return uncertainties_of_dataset(self.posterior, self.likelihood, self.comm, dataset, see=mark, **options)

    def evaluate(
        self,
        dataset: Source,
        by: Sequence[str] = (),
        regions: Mapping[str, Any] | None = None,
        references: Sequence[str] = (),
        calibration: Calibration | None = None,
    ) -> TestResult:
        """Evaluate a data set (`evaluate_dataset`, `find_groups`); `DataError` as for `check_targets`."""
        self.check_targets(dataset, "they can be predicted (hpc-bnn predict), not evaluated")
        shown = shown_examples(self.likelihood, self.comm, dataset)

        def see(*block: Any) -> None:
            self.watch.mark()
            shown.add(*block)

        train_set = self.open(self.config.data.train_split) if "climatology" in references else None
        evaluation = evaluate_dataset(
            self.posterior, self.likelihood, self.comm, dataset, see=see, groups=find_groups(self.comm, dataset, by, regions),
            references=references, train_set=train_set, calibration=calibration, **self.test_samples,
        )  # fmt: skip
        return TestResult(evaluation, shown)

    def check_up(self, dataset: Source) -> dict[str, Any]:
        """Return a `hpc_bnn.predictive.check_up`, with ``mean_network``: the metrics of the posterior mean on a data set.

        It is empty where the config does not want it. The mean network takes one pass over the data set.
        """
        if not self.config.check_up:
            return {}
        found, mark, options = check_up(self.posterior, self.comm), lambda *_: self.watch.mark(), self.test_samples
        try:
            mean = mean_network(self.posterior)
        except NotImplementedError as error:
            return found | {"mean_network": {}, "notes": [*found["notes"], f"No mean network: {error}."]}
        options |= {"num_samples": 1, "chunk_size": 1}
        metrics = evaluate_dataset(mean, self.likelihood, self.comm, dataset, see=mark, **options).metrics
        return found | {"mean_network": metrics}

    def check_targets(self, dataset: Source, rule: str) -> None:
        """Raise `DataError` where the targets of a data set are other classes than the trained ones, or other numbers. Local."""
        mine, theirs = self.manifest.num_classes, dataset.manifest.num_classes
        if mine != theirs:
            raise DataError(f"the network is for {mine or 'no'} classes, and the data have {theirs or 'none'}: {rule}")
        ours, of_data = self.manifest.details, dataset.manifest.details
        by_time = "lead_seconds" if "lead_seconds" in ours and "lead_seconds" in of_data else "lead"
        for name in ("classes", "changes", "step_seconds", "step_months", by_time):
            if name in ours and name in of_data and ours[name] != of_data[name]:
                trained = f"the network was trained with {name} {ours[name]}"
                raise DataError(f"{trained}, and the data have {of_data[name]}: {rule}")

    def check_identity(self, done: str) -> None:
        """Raise `DataError` where the directory is now that of another run than was evaluated or calibrated. Local: the writer."""
        found, mine = read_identity(self.run_dir), self.checkpoints.identity
        if found != mine:
            raise DataError(f"{self.run_dir} is now that of run {found}, and run {mine} was {done}")

    def write_evaluation(
        self,
        path: Path,
        tested: TestResult,
        num_steps: int,
        which: str = "newest",
        foreign: dict[str, float] | None = None,
        foreign_data: str | None = None,
        posterior: dict[str, Any] | None = None,
        calibrated: bool = False,
    ) -> None:
        """Write an evaluation to a file. Local: the writer calls it.

        ``which`` checkpoint was tested, of ``num_steps`` steps; ``foreign`` are out-of-distribution metrics, of the shards
        and split ``foreign_data``; ``posterior`` is a `check_up`; ``calibrated`` says that the calibration of the run was applied.
        """
        data = self.config.data
        content = {
            "metrics": tested.evaluation.metrics | (foreign or {}),
            "curves": tested.evaluation.curves,
            "groups": tested.evaluation.groups,
            "checkpoint": which,
            "num_steps": num_steps,
            "num_samples": self.config.num_test_samples,
            "calibrated": calibrated,
            "data": {"shards": data.dataset or data.shards, "split": data.test_split, "foreign": foreign_data},
            **({"posterior": posterior} if posterior else {}),
        }
        self.check_identity("evaluated")
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def _build_likelihood(self) -> Likelihood:
        config, manifest = self.config.likelihood, self.manifest
        objective = self.config.objective.name
        if config.name == "auto" and objective in get_args(Score):
            if manifest.num_classes is not None:
                rule = f"it scores predictions of numbers, and the targets of these data are {manifest.num_classes} classes"
                raise ConfigError(Fault("objective.name", objective, rule, "Use elbo or log_predictive"))
            config = replace(config, name="implicit")
        missing = {"missing_targets": manifest.missing_targets, "ignore_index": manifest.ignore_index}
        return build_likelihood(config, manifest.num_classes, manifest.arrays["y"].shape, **missing)

    def _build_posterior(self) -> Posterior:
        config, comm, path = self.config, self.comm, self.config.model.pretrained
        pretrained = None if path is None else _read_pretrained(path, comm)

        def make_module() -> nn.Module:
            network, arguments = import_object("model.name", config.model.name), config.model.arguments
            shapes = {"in_shape": self.manifest.in_shape, "num_outputs": self.likelihood.num_outputs}
            target_shape = self.manifest.places
            try:
                accepted = inspect.signature(network).parameters if target_shape else ()
                for name in ("target_shape", "places"):  # and the former name
                    if name in accepted:
                        shapes[name] = target_shape
                module = network(**shapes, **arguments)
            except (TypeError, ValueError, AttributeError) as error:
                rule = f"{config.model.name} refuses them ({error})"
                raise ConfigError(Fault("model.arguments", arguments, rule, "Fix the arguments")) from error
            if path is not None:
                with _refusing_pretrained(path):
                    module.load_state_dict(pretrained)
            module = checkpoint_layers(module, config.model.checkpoint_layers)
            module = self.likelihood.wrap(module)
            kinds = {(p.device, p.dtype) for p in module.parameters()}
            return module if kinds == {(comm.device, self.dtype)} else module._apply(converted)

        def converted(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_complex():  # module.to(dtype) would discard the imaginary parts
                return tensor.to(comm.device, self.dtype.to_complex())
            return tensor.to(comm.device, self.dtype if tensor.is_floating_point() else None)

        with comm.agree(f"building {config.model.name}"):
            posterior = build_posterior(
                config.posterior,
                make_module,
                num_samples=config.num_samples,
                local_samples=comm.grid.local_samples(config.num_samples),
                seed=config.seed,
                output=config.model.output,
            )
        return posterior


def check_same_start(config: Config, comm: GridComm) -> None:
    """Raise `RankError` unless all ranks have the same config, files that it names, and modules. Collective over the world."""
    values = flatten(asdict(config))
    for name, value in list(values.items()):
        for text in _texts(value):
            if (found := _content(text)) is not None:
                values[f"the content of {name}" + (f", {text}" if text != value else "")] = found
    comm.check_equal(values, "starting the run: ", "Start all ranks with the same command and the same files")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value of a config: arguments and transforms are lists and mappings. Local."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _content(text: str) -> str | None:
    """Return a digest of the file of this name, or the module of this import path; None where there is none. Local."""
    path, half = Path(text), 8 * 2**20  # of a file above 16 MiB the length, the first and the last 8 MiB
    with contextlib.suppress(ImportError, ValueError, OSError):
        if not path.is_file() and "." in text:
            found = importlib.util.find_spec(text.rpartition(".")[0])
            path = Path(found.origin if found is not None and found.origin else "")
        if path.is_file():
            with path.open("rb") as file:
                length, start = path.stat().st_size, file.read(half)
                file.seek(max(half, length - half))
                return hashlib.sha256(start + file.read() + str(length).encode()).hexdigest()[:16]
    return None


def set_precision(config: Config) -> None:
    """Let torch multiply float32 numbers, and choose algorithms, as a config wants it, in the whole process. Local."""
    is_tf32 = config.float32_precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a process first uses cuBLAS
    torch.use_deterministic_algorithms(config.deterministic)


def connect_grid(config: Config, sample_size: int) -> GridComm:
    """Set the precision, and join the process grid with a sample axis of this extent. Collective over the world."""
    set_precision(config)
    grid = config.grid
    options = {"backend": config.backend, "overlaps": grid.overlap}
    return connect(sample_size, config.device, grid.reduction, grid.compression, **options)


def open_dataset(config: DataConfig, split: str, comm: GridComm) -> Source:
    """Return a split of the dataset of the user (``data.dataset``). Collective over the world."""
    with comm.agree(f"making {config.dataset}, split {split}"):
        return _source_of(str(config.dataset), json.dumps(config.arguments), split)


@functools.lru_cache(maxsize=4)  # a run asks for the shapes, and then for the examples
def _source_of(path: str, arguments: str, split: str) -> Source:
    make, given = import_object("data.dataset", path), json.loads(arguments)
    try:
        inspect.signature(make).bind(split=split, **given)
    except TypeError as error:
        rule = f"{path} refuses them, or split={split!r} ({error})"
        raise ConfigError(Fault("data.arguments", given, rule, "Fix the arguments")) from error
    return as_source(make(split=split, **given))


def read_or_prepare(config: DataConfig, comm: GridComm) -> Manifest:
    """Read the manifest, or make that of a user's dataset; a script makes missing shards. Collective over the world."""
    if config.dataset is not None:
        names = [config.train_split, config.test_split]
        names += [config.validation_split] if config.validation_split not in (None, "auto") else []
        manifests = {name: open_dataset(config, name, comm).manifest for name in dict.fromkeys(names)}
        splits = {name: tuple(manifest.shards) for name, manifest in manifests.items()}
        return replace(manifests[config.train_split], name=config.dataset, splits=splits)
    with comm.agree(f"preparing {config.shards}"):
        script = config.prepare if comm.grid.is_first("world") else None
        if script and read_bytes(Path(config.shards, MANIFEST), "the manifest") is None:  # a damaged one is an error
            logger.info("%s holds no shards; running %s", config.shards, script)
            _prepare_shards(script, config.shards)
    with comm.agree(f"reading {config.shards}"):
        return Manifest.read(config.shards)


def validation_split(config: DataConfig, manifest: Manifest) -> str | None:
    """Return the name of the split that chooses checkpoints and ends a run early; None where the test split does. Local."""
    name = config.validation_split
    if name == "auto":
        name = "validation" if "validation" in manifest.splits else None
    return None if name == config.test_split else name


def judging_split(config: Config, manifest: Manifest) -> str:
    """Return the name of the split whose metric chooses checkpoints, that of the tests or of the validation. Local."""
    held_out = validation_split(config.data, manifest)
    return config.data.test_split if held_out is None or config.checkpoint.metric.startswith("test/") else held_out


def read_config(run_dir: str | os.PathLike) -> Config:
    """Return the config of a run, without flags; `ConfigError` where there is none. Local."""
    return Config.from_dict(read_tree(config_of_run(Path(run_dir))))


NETWORK = ("model.", "posterior.", "likelihood.", "objective.name")
"""Beginnings of fields that say what the numbers of a checkpoint mean."""


def check_network(config: Config, former: dict[str, Any], directory: Path, fields: tuple[str, ...] = NETWORK) -> None:
    """Raise `ConfigError` where a config speaks of another network or distribution than a checkpoint was trained as."""
    mine = flatten(config.to_dict())
    faults = [
        Fault(name, mine[name], f"the checkpoints in {directory} are of a run with {value}", "Leave it at that")
        for name, value in flatten(former).items()
        if name in mine
        and mine[name] != value
        and name.startswith(fields)
        and (name in fields or name != "model.pretrained")
    ]
    if faults:
        raise ConfigError(*faults)


def _read_pretrained(path: str, comm: GridComm) -> Any:
    """Return the state_dict in a file, which rank 0 reads. Collective over the world."""
    state = None
    with comm.agree(f"reading {path}"), _refusing_pretrained(path):
        if comm.grid.is_first("world"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    # Modules look at the version that wrote their part
    metadata = comm.broadcast_object(getattr(state, "_metadata", None))
    state = comm.broadcast_tree(state)
    if isinstance(state, dict) and metadata is not None:
        state = OrderedDict(state)
        state._metadata = metadata  # pyright: ignore[reportAttributeAccessIssue]
    return state


@contextlib.contextmanager
def _refusing_pretrained(path: str) -> Iterator[None]:
    """Raise `ConfigError` where a file holds no weights of a network. Local."""
    try:
        yield
    except (OSError, RuntimeError, pickle.UnpicklingError, TypeError, AttributeError) as error:
        rule = f"not a state_dict of this network ({error})"
        raise ConfigError(Fault("model.pretrained", path, rule, "Save net.state_dict()")) from error


def _prepare_shards(script: str, directory: str) -> None:
    """Run a data_prep script as a process of its own, outside of this MPI job."""
    command = [sys.executable, script, "--output", directory]
    done = subprocess.run(command, env=without_launcher(os.environ), capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{' '.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}")
