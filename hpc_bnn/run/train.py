"""Train a Bayesian network from a config."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml
from tqdm import tqdm

from .. import __version__
from ..comm import GridComm, Traffic
from ..config import Config, flatten
from ..data import BatchLoader, Manifest
from ..data.augment import build_augmentation
from ..data.manifest import OF_DATA
from ..errors import ConfigError, DataError, Fault, Interrupted
from ..grid import check
from ..likelihoods import Bernoulli
from ..noise import GENERATOR
from ..predictive import metrics_to_minimise
from ..training.chunk_search import ChunkSearch
from ..training.step import StepResult
from . import signals
from .experiment import (
    NETWORK,
    Experiment,
    TestResult,
    check_network,
    check_same_start,
    read_or_prepare,
    validation_split,
)
from .profiling import Profiler
from .run_dir import RunDir

logger = logging.getLogger(__name__)


STEPS = ("global_batch_size", "data.drop_last", "data.train_split")
"""Fields by which a place in a run and the courses of learning rate and KL, which count steps, mean what they do."""
ORDER = ("seed", "data.shuffle_window")
"""Fields of the order of the examples in an epoch."""
MAX_CHANNELS = 8
"""Of which each has its RMSE in the rows; evaluation.json has those of all."""
SEARCHED = ("cuda",)
"""Devices on which a run searches for a chunk size: on others a walk is seldom slower, and repeats bit for bit."""


class Run(Experiment):
    """A training run on the process grid: data, model, step, and what it writes.

    Collective over the world, in construction and in every method. A `StopRequest` on any rank ends the run with a
    checkpoint after the current step; by default signals do, during `train`.
    """

    def __init__(self, config: Config, comm: GridComm, stop: StopRequest | None = None):
        check(config, comm.grid.world_size)
        check_same_start(config, comm)
        super().__init__(config, comm, read_or_prepare(config.data, comm))
        held_out, metric = validation_split(config.data, self.manifest), config.checkpoint.metric
        judges = ("test",) if held_out is None else ("validation", "test")
        names = [
            f"{judge}/{name}" for judge in judges for name in metrics_to_minimise(self.likelihood, self.manifest.places)
        ]
        self._metric_name = names[0] if metric == "auto" else metric
        if self._metric_name not in names:
            rule = f"must be one of {', '.join(names)}"
            raise ConfigError(Fault("checkpoint.metric", metric, rule, "Leave it at auto"))
        with comm.agree("making the augmentation"):
            self.augmentation = build_augmentation(
                config.augmentation, self.manifest, num_samples=config.num_samples, seed=config.seed
            )
            mixes_classes = self.augmentation and self.augmentation.needs_partners and self.manifest.num_classes
            if mixes_classes and isinstance(self.likelihood, Bernoulli):
                rule = "mixup mixes probabilities of both classes, and bernoulli takes one number"
                raise ConfigError(Fault("likelihood.name", config.likelihood.name, rule, "Use categorical"))
        self.train_set, self.test_set = (
            self.open(split) for split in (config.data.train_split, config.data.test_split)
        )
        self._judge = self._metric_name.partition("/")[0]
        self._judging_set = self.test_set if self._judge == "test" else self.open(str(held_out))
        check(config, comm.grid.world_size, len(self.train_set))
        self.loader = BatchLoader(
            self.train_set,
            comm.grid,
            config.global_batch_size,
            config.seed,
            drop_last=config.data.drop_last,
            prefetch=config.data.prefetch,
            with_partners=self.augmentation is not None and self.augmentation.needs_partners,
            window=config.data.shuffle_window,
        )
        self.step, self.schedule = self.build_step(len(self.train_set), self.loader.num_batches)
        self.optimizer = self.step.optimizer
        self.progress = _Progress()
        self.stop = stop or StopRequest()
        self.checkpoints.metric_name = self._metric_name
        self._directory = RunDir(self.run_dir)
        self._writer_of_board = self._find_board()
        self._board = None
        self._begun = time.perf_counter()
        self._results: deque[tuple[StepResult, int]] = deque()  # of steps that may still run, with their examples
        self._nelbo = float("nan")  # the last one that was read
        self._written = self._begun  # when the last checkpoint was
        self._is_checkpoint_due = False  # by the clock of rank 0, as a step has told all ranks

    # --- the run ------------------------------------------------------------------------------------

    def train(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Train, evaluate and write; return what summary.json holds and, on rank 0, test examples with predictive."""
        try:
            with self.watch:
                self._open_run_dir()
                return self._train_and_write()
        finally:
            if self.is_writer:
                self._directory.close()

    def _train_and_write(self) -> tuple[dict[str, Any], dict[str, Any]]:
        with self.stop.watching_signals():
            row, tested = self._train_epochs()
        self._close_checkpoints()
        if tested is None:  # the run was complete already
            tested = self.evaluate(self.test_set)
            row = row | _prefixed(tested)
            with self.comm.agree(f"writing {self.run_dir}"):
                if self.is_writer and self.progress.row and row["epoch"] > self.progress.epoch:
                    self._directory.append_row(row)  # once more, because its epoch did not come to its end
        examples = tested.shown.gather()
        summary = self._summary(row)
        path, num_steps = self.run_dir / "evaluation.json", self.step.num_steps
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                self.write_evaluation(path, tested, num_steps)
                self._directory.write("summary.json", json.dumps(summary, indent=1) + "\n")
        if posterior := self.check_up(self.test_set):  # once the results of the run are safe
            with self.comm.agree(f"writing {self.run_dir}"):
                if self.is_writer:
                    self.write_evaluation(path, tested, num_steps, posterior=posterior)
        return summary, examples

    def _train_epochs(self) -> tuple[dict[str, Any], TestResult | None]:
        """Train to the end of the run; return the last row, and its evaluation."""
        row, tested, before = self.progress.row, None, self.progress.run_seconds
        self._first_step = self.step.num_steps
        self._search = ChunkSearch(self.step) if self._has_chunks_to_try() else None
        self._begin_profile()
        total = self._num_planned_steps()
        off = None if self.is_writer else True  # None: off where stderr is no terminal
        progress = tqdm(total=total, initial=self._first_step, unit="step", disable=off, desc="train")
        with progress:
            while not self._is_over():
                self._train_epoch(progress)
                row, tested = self._finish_epoch(progress)
                self.progress.run_seconds = before + time.perf_counter() - self._begun
                is_planned = row["epoch"] % self.config.checkpoint.every_epochs == 0
                if self._is_over() or is_planned or self._is_checkpoint_due:
                    self._write_checkpoint(row.get(self._metric_name))
        return row, tested

    def _is_over(self) -> bool:
        """Whether the epochs, the steps or the patience are used up."""
        place, config, patience = self.progress, self.config, self.config.early_stopping.patience
        return (
            place.epoch >= config.num_epochs
            or (config.max_steps is not None and self.step.num_steps >= config.max_steps)
            or (patience is not None and place.num_without_improvement >= patience)
        )

    def _num_planned_steps(self) -> int:
        planned = self.config.num_epochs * self.loader.num_batches
        return min(planned, self.config.max_steps or planned)

    def _train_epoch(self, progress: tqdm) -> None:
        """Train to the end of the epoch that the run is in; raise `Interrupted` if some rank wants to stop."""
        place, config = self.progress, self.config
        start, before, in_run = time.perf_counter(), place.seconds, place.run_seconds
        for batch in self.loader.epoch(place.epoch, place.num_batches):
            x, y = self.augmentation(batch, place.epoch) if self.augmentation else (batch.x, batch.y)
            if config.max_seconds is not None and time.perf_counter() - self._begun > config.max_seconds:
                self.stop.why = "<max_seconds> is over"
            self.watch.mark()
            self.stop.why = self.stop.why or signals.received()
            self.step.wants_stop = self.stop.why is not None
            self.step.wants_checkpoint = self._is_checkpoint_late()
            traffic = replace(self.comm.traffic)
            with self._profiler.recording() if self._search is None else self._search.timing():
                result = self.step(x, y, batch.num_examples, weights=batch.weights)
                self._results.append((result, batch.num_examples))
            self.schedule.step()
            place.count(batch.num_examples, traffic, self.comm.traffic)
            wants_stop = self._read_results(self.step.lag)
            seconds = time.perf_counter() - start
            place.seconds, place.run_seconds = before + seconds, in_run + seconds
            progress.update()
            rates = f"{place.num_examples / place.seconds:.0f} examples/s, {self._samples_per_second():.0f} samples/s"
            progress.set_postfix_str(f"nelbo {self._nelbo:.4f}, {rates}", refresh=False)
            every = config.checkpoint.every_steps
            is_last = self._is_over() or place.num_batches == self.loader.num_batches
            writes = not is_last and (self._is_checkpoint_due or (every and self.step.num_steps % every == 0))
            if is_last or writes or wants_stop:
                wants_stop |= self._read_results(0)
            if self._search is not None and self._search.found is not None:
                self._end_search(self._search.found)
            if wants_stop:
                self._write_checkpoint()
                self._close_checkpoints()
                why = next(filter(None, self.comm.gather_objects(self.stop.why)), "a signal")
                error = Interrupted(
                    f"after step {self.step.num_steps}: {why}. The same command with <resume> true goes on from there"
                )
                error.exit_code = signals.INTERRUPTED if why == "SIGINT" else Interrupted.exit_code
                raise error
            if writes:
                self._write_checkpoint()
            if self._is_over():
                break

    def _has_chunks_to_try(self) -> bool:
        """Whether the config leaves the chunk size open, and a rank has samples that could be evaluated at once. Local."""
        is_open = self.config.chunk_size == "auto" and self.comm.device.type in SEARCHED
        return is_open and self.step.loop.can_batch and self.step.num_samples > self.comm.grid.sample_size

    def _end_search(self, chunk_size: int) -> None:
        """Keep a chunk size in the config of the run. Collective over the world."""
        self.config, self._search = replace(self.config, chunk_size=chunk_size), None
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                self._directory.write_config(self._config_as_text())
        self._begin_profile()

    def _begin_profile(self) -> None:
        trace = self.run_dir / "profile.json" if self.is_writer else None
        self._profiler = Profiler(self.step, self.config.profile, trace)

    def _config_as_text(self) -> str:
        return yaml.safe_dump(self.config.to_dict(), sort_keys=False)

    def _read_results(self, lag: int) -> bool:
        """Read the results of all steps but the last few: the same steps on all ranks; return whether some rank wants to stop."""
        wants_stop = False
        if lag == 0:
            self.step.settle()
        while len(self._results) > lag:
            result, num_examples = self._results.popleft()
            self.progress.add(result, num_examples)
            self._nelbo = result.nelbo
            wants_stop |= result.wants_stop
            self._is_checkpoint_due |= result.wants_checkpoint
        return wants_stop

    def _is_checkpoint_late(self) -> bool:
        """Whether rank 0 finds that the last checkpoint is older than the config wants. Local; False on other ranks."""
        minutes = self.config.checkpoint.every_minutes
        return self.is_writer and minutes is not None and time.perf_counter() - self._written > 60 * minutes

    def _finish_epoch(self, progress: tqdm) -> tuple[dict[str, Any], TestResult | None]:
        """Close the epoch: evaluate where it is time, write the row, and go to the next one."""
        place, tested = self.progress, None
        row = {
            "epoch": place.epoch + 1,
            "step": self.step.num_steps,
            **place.means(),
            "samples_per_second": self._samples_per_second(),
            "learning_rate": self.schedule.get_last_lr()[0],
        }
        is_whole = place.num_batches == self.loader.num_batches  # not where --max_steps ended it
        if is_whole:
            place.next_epoch()
        is_planned = row["epoch"] % self.config.test_every_epochs == 0
        if self._is_over() or is_planned:
            axis = "world" if self.posterior.is_replicated else "data"
            self.comm.check_replicas(list(self.posterior.parameters()), f"after epoch {row['epoch']}", axis)
            judged = self.evaluate(self._judging_set)
            row |= _prefixed(judged, self._judge)
            tested = judged if self._judge == "test" else None
            if is_whole and is_planned:
                place.judge(self._metric_name, row.get(self._metric_name), self.config.early_stopping.min_change)
        if self._is_over() and tested is None:
            tested = self.evaluate(self.test_set)
            row |= _prefixed(tested)
        place.row = row
        self._write_row(row, progress)
        return row, tested

    def _samples_per_second(self) -> float:
        """Weight samples of the job per second of this epoch."""
        return self.config.num_samples * self.progress.num_batches / self.progress.seconds

    # --- what it writes -----------------------------------------------------------------------------

    def _open_run_dir(self) -> None:
        """Make the run directory and start, or continue from the newest checkpoint in it."""
        state, store, directory = None, self.checkpoints, self._directory
        with self.comm.agree(f"opening {self.run_dir}"):
            if self.is_writer:
                directory.open(self.config.resume)
                store.identity, store.before_write = directory.identity, directory.check
                state = store.load_newest() if self.config.resume else None
                if state is not None:
                    self._check_state(state)
                    self._follow_config_(state)
        where = self.comm.broadcast_object(
            state and (state["place"], state["schedule"], state["config"].get("chunk_size"))
        )
        if where is not None:
            place, schedule, chunk_size = dict(where[0]), *where[1:]
            place.pop("data", None)  # `_check_state` compares it field by field
            num_steps = place.pop("num_steps")
            self.step.scatter_state(None if state is None else {**state, "num_steps": num_steps})
            with self.comm.agree("restoring the checkpoint"):
                self.schedule.load_state_dict(schedule)
                if self.config.chunk_size == "auto" and chunk_size not in (None, "auto"):
                    self.config = replace(self.config, chunk_size=chunk_size)
                    self.step.set_chunk_size_(chunk_size)
                self.progress = _Progress(**place)
        with self.comm.agree(f"opening {self.run_dir}"):  # nothing was changed there before
            if self.is_writer:
                config = self._config_as_text()
                if state is None:
                    directory.begin(self.manifest.to_json(), config)
                else:
                    self._say_differences(state["config"])
                    directory.resume(state["run"]["identity"], config, self.progress.epoch, self.progress.row)
                store.identity = directory.identity
                if self._writer_of_board is not None:
                    self._board = self._writer_of_board(str(self.run_dir / "tensorboard"))
        store.identity = self.comm.broadcast_object(store.identity)
        if self.is_writer:
            place, posterior, comm = self.progress, self.posterior, self.comm
            if state is not None:
                where = f"epoch {place.epoch + 1}, batch {place.num_batches + 1}"
                logger.info("going on from the checkpoint of step %d: %s", self.step.num_steps, where)
            library = comm.library if comm.grid.world_size > 1 else "one process, no communication"
            logger.info(
                f"grid {comm.grid}, {self.config.num_samples} samples, {self.config.global_batch_size} examples per step, "
                f"{posterior.family} over {posterior.num_weights} weights, KL: {posterior.capabilities.kl}, "
                f"reading {self.train_set.reading}, {comm.device}, {library}"
            )

    def _write_row(self, row: dict[str, Any], progress: tqdm) -> None:
        with self.comm.agree(f"writing {self.run_dir}"):
            if self.is_writer:
                self._directory.append_row(row)
                if self._board is not None:
                    for name, value in row.items():
                        self._board.add_scalar(name, value, row["step"])
                    self._board.flush()
        tested = [name for name in row if name.startswith(("validation/", "test/"))]
        if self.is_writer and tested:
            done = self.step.num_steps - self._first_step
            per_step = (time.perf_counter() - self._begun) / max(done, 1)
            left = tqdm.format_interval(per_step * (self._num_planned_steps() - self.step.num_steps))
            values = "  ".join(f"{name} {row[name]:.4g}" for name in ("train/nelbo", "train/kl", *tested))
            rate = f"{row['examples_per_second']:.0f} examples/s" + ("" if self._is_over() else f"  {left} left")
            progress.write(f"epoch {row['epoch']:4d}  step {row['step']:6d}  {values}  {rate}", file=sys.stderr)

    def _find_board(self) -> type | None:
        """Return the class that writes for TensorBoard, where the config wants it. Collective over the world."""
        if not self.config.tensorboard:
            return None
        with self.comm.agree("importing tensorboard"):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                rule = f"the package tensorboard is not there ({error})"
                remedy = "pip install 'hpc_bnn[tensorboard]', or leave it out"
                raise ConfigError(Fault("tensorboard", True, rule, remedy)) from error
        return SummaryWriter

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise `DataError` or `ConfigError` where data, network, optimizer or random numbers are not those of the run."""
        fields = (*NETWORK, "optimizer.name", *STEPS)
        fields += ORDER if state["place"]["num_batches"] else ()
        if self.config.posterior.prior_mean == "initial":  # no checkpoint holds the weights at the start
            fields += ("seed", "model.pretrained")
        check_network(self.config, state["config"], self.checkpoints.directory, fields)
        former = Manifest.read(self.run_dir, has_files=False)
        for name in OF_DATA:
            if getattr(former, name) != getattr(self.manifest, name):
                raise DataError(
                    f"{self.config.data.dataset or self.config.data.shards} is not what the run began with: {name} of the manifest differ. "
                    "Go on with the former shards, or begin another run_dir"
                )
        if state["generator"] != GENERATOR:
            raise DataError(
                f"the checkpoint of step {state['place']['num_steps']} in {self.checkpoints.directory} is of a run with the "
                f"noise generator {state['generator']}, and hpc_bnn {__version__} draws with {GENERATOR}: the run cannot go "
                f"on to the same numbers. Resume it with hpc_bnn {state['run']['hpc_bnn']}, or begin another run_dir; "
                "hpc-bnn evaluate and predict work with this checkpoint"
            )

    def _follow_config_(self, state: dict[str, Any]) -> None:
        """Put learning rate and arguments of the optimizer into a state, where the config has others than its checkpoint. Local."""
        config, former, schedule = self.config.optimizer, state["config"]["optimizer"], state["schedule"]
        names = former["arguments"].keys() | config.arguments.keys()
        defaults = self.optimizer.optimizer.defaults  # the arguments are among them
        changed = {
            n: defaults[n] for n in names if n in defaults and former["arguments"].get(n) != config.arguments.get(n)
        }
        if former["learning_rate"] != config.learning_rate:
            schedule["base_lrs"] = [config.learning_rate for _ in schedule["base_lrs"]]
            rate = config.learning_rate * self.schedule.lr_lambdas[0](schedule["last_epoch"])
            changed |= {"lr": rate, "initial_lr": config.learning_rate}
        for group in state["optimizer"]["groups"]:
            group.update(changed)

    def _say_differences(self, former: dict[str, Any]) -> None:
        """Log the differences between the config and that of the checkpoint."""
        mine = flatten(self.config.to_dict())
        free = ("run_dir", "resume", "max_seconds", "stall_seconds", "grid.", "backend", "capture", "profile")
        for name, value in flatten(former).items():
            if mine.get(name) != value and not name.startswith(free):
                logger.warning("--%s is %s; the checkpoint was written with %s", name, mine.get(name), value)

    def _write_checkpoint(self, metric: float | None = None) -> None:
        """Write the state of the job. Collective over the world."""
        state = self.step.gather_state(to_first=True)
        with self.comm.agree(f"writing a checkpoint to {self.checkpoints.directory}"):
            if self.is_writer:
                place = {"num_steps": state.pop("num_steps"), "data": self.manifest.digest, **asdict(self.progress)}
                state |= {"schedule": self.schedule.state_dict(), "place": place, "config": self.config.to_dict()}
                self.checkpoints.save(state, self.step.num_steps, metric)
        self._written, self._is_checkpoint_due = time.perf_counter(), False

    def _close_checkpoints(self) -> None:
        """Wait for what is being written. Collective over the world."""
        with self.comm.agree(f"writing a checkpoint to {self.checkpoints.directory}"):
            self.checkpoints.close()

    def _summary(self, row: dict[str, Any]) -> dict[str, Any]:
        grid, traffic, posterior = self.comm.grid, self.comm.traffic, self.posterior
        return {
            **{name: value for name, value in row.items() if name.startswith(("train/", "validation/", "test/"))},
            "run": self.checkpoints.identity,
            "num_epochs": self.progress.epoch,
            "num_steps": self.step.num_steps,
            "seconds": self.progress.run_seconds,
            "num_samples": self.config.num_samples,
            "objective": {"name": self.step.objective.name, "num_passes": self.step.num_passes},
            "likelihood": type(self.likelihood).__name__,
            "reading": {"mode": self.train_set.reading, "num_bytes_of_rank_0": self.train_set.num_bytes_read},
            "posterior": {
                "family": posterior.family,
                "num_random_weights": posterior.num_weights,
                "kl": posterior.capabilities.kl,
            },
            "grid": {"world_size": grid.world_size, "sample_size": grid.sample_size, "data_size": grid.data_size},
            "communication": {
                "library": self.comm.library,
                "num_collectives": traffic.num_collectives,
                "num_bytes": traffic.num_bytes,
                "seconds": traffic.seconds,
            },
            "device": str(self.comm.device),
            "versions": _versions(),
        }


# --- stopping ------------------------------------------------------------------------------------------


class StopRequest:
    """Stop request of this rank: set ``why``, and all ranks stop together after the next step."""

    why: str | None = None

    @contextlib.contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Treat SIGUSR1, SIGTERM and Ctrl-C as a request to stop, a second Ctrl-C as usual.

        Local; does nothing outside of the main thread, or where the command line watches them already.
        """
        if signals.is_watching() or threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(received: int, _) -> None:
            if received == signal.SIGINT and self.why == "SIGINT":
                raise KeyboardInterrupt
            self.why = signal.Signals(received).name

        former = {number: signal.signal(number, handle) for number in signals.STOPPING}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


# --- the place in a run --------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Progress of a run, in plain numbers: a checkpoint holds it with parameters and optimizer."""

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
    num_collectives: int = 0
    num_bytes: int = 0
    communication_seconds: float = 0.0
    """Of rank 0 in the steps of the epoch, waiting for others included."""
    run_seconds: float = 0.0
    """Time in the run (seconds)."""
    metric_name: str | None = None
    """Of the best metric; None: it is that of the run."""
    best_metric: float | None = None
    num_without_improvement: int = 0
    """Evaluations since the best one."""
    row: dict[str, Any] = field(default_factory=dict)
    """Of the last complete epoch."""

    def add(self, result: StepResult, num_examples: int) -> None:
        """Take in what a step has measured."""
        self.nelbo_sum += result.nelbo * num_examples
        self.data_sum += result.data_term * num_examples
        self.kl, self.kl_weight = result.kl, result.kl_weight

    def count(self, num_examples: int, before: Traffic, after: Traffic) -> None:
        """Count a step, and the traffic between before and after it."""
        self.num_batches += 1
        self.num_examples += num_examples
        self.num_collectives += after.num_collectives - before.num_collectives
        self.num_bytes += after.num_bytes - before.num_bytes
        self.communication_seconds += after.seconds - before.seconds

    def means(self) -> dict[str, float]:
        """Return what a row of metrics says of the epoch."""
        return {
            "train/nelbo": self.nelbo_sum / self.num_examples,
            "train/data_term": self.data_sum / self.num_examples,
            "train/kl": self.kl,
            "train/kl_weight": self.kl_weight,
            "seconds": self.seconds,
            "examples_per_second": self.num_examples / self.seconds,
            "collectives_per_step": self.num_collectives / self.num_batches,
            "bytes_per_step": self.num_bytes / self.num_batches,
            "communication_share": self.communication_seconds / self.seconds,
        }

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.num_batches = self.num_examples = self.num_collectives = self.num_bytes = 0
        self.nelbo_sum = self.data_sum = self.seconds = self.communication_seconds = 0.0

    def judge(self, name: str, metric: float | None, min_change: float) -> None:
        """Take in the metric of an evaluation, less is better; a run that goes on by another metric begins to count anew."""
        if self.metric_name not in (None, name):
            self.best_metric, self.num_without_improvement = None, 0
        self.metric_name = name
        if metric is None or not math.isfinite(metric):
            return
        if self.best_metric is None or metric < self.best_metric - min_change:
            self.best_metric, self.num_without_improvement = metric, 0
        else:
            self.num_without_improvement += 1


def _prefixed(tested: TestResult, split: str = "test") -> dict[str, float]:
    """Return the metrics as they stand in a row; of channels that differ in scale also the RMSE of each, in its units."""
    metrics, channels = tested.evaluation.metrics, tested.evaluation.curves.get("channels", {})
    errors = channels.get("rmse", [])  # not there where one is no finite number
    found = {f"{split}/{name}": value for name, value in metrics.items()}
    if 1 < len(errors) <= MAX_CHANNELS and max(errors) > 2 * min(errors):
        found |= {f"{split}/rmse/{name}": value for name, value in zip(channels["name"], errors)}
    return found


# --- helpers -------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Return the versions of what a run uses, of the optional libraries where they are imported."""
    modules = {name: sys.modules.get(name) for name in ("torch", "h5py", "horovod", "mpi4py")}
    found = {"hpc_bnn": __version__, "python": platform.python_version()}
    versions = {name: getattr(module, "__version__", None) for name, module in modules.items()}
    return found | {name: version for name, version in versions.items() if version is not None}
