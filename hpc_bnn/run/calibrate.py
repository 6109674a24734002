"""The calibration of a run: made once after the training, kept with the run, applied by predictions."""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import numpy as np
import torch

from .. import __version__
from ..config import Scaling, SetScore
from ..data import EpochOrder
from ..errors import ConfigError, DataError, Fault, above_and_below
from ..noise import Stream
from ..predictive import INTERVALS, NOISE_FACTORS, SETS, TEMPERATURES, Calibration, calibrate_dataset, check_methods
from ..safe_files import check_can_write, read_bytes, write_atomically
from .experiment import Experiment, judging_split, logger, read_config, read_or_prepare

CALIBRATION = "calibration.json"
FORMAT = 2
"""Version of the file. Format 1 has neither ``vector``, ``sets``, ``raps`` nor ``noise_factors``."""


def calibrate_run(
    experiment: Experiment,
    split: str = "calibration",
    *,
    level: float = 0.9,
    scaling: Scaling = "temperature",
    sets: SetScore = "threshold",
    raps: tuple[float, int] = (0.01, 5),
    half: bool = False,
    which: str = "newest",
) -> Calibration:
    """Calibrate the checkpoint of a run by a split of ``config.data.shards`` and write RUN_DIR/calibration.json.

    Collective over the world. `read_calibration` reads the file; a former one is replaced.

    Parameters
    ----------
    split : str
        Its examples must be new to the run: neither those of the training, nor those that judged its checkpoints.
    level : float
        Probability that a set or interval holds the target, above 0 and below 1.
    scaling : {"temperature", "vector"}
        Of classes: what calibrates the probabilities, one number, or a factor and a summand for each class.
    sets : {"threshold", "aps", "raps"}
        Of classes: the score of the sets (`hpc_bnn.predictive.calibration.set_scores`).
    raps : (float, int)
        For "raps": the penalty of each rank, and the number of ranks that are free.
    half : bool
        Use half of the split, the same one for each seed. So a split may serve that judged checkpoints; the other half is
        left for a look at the coverage.
    which : {"newest", "best"}
        What the checkpoint is, for the file.

    Raises
    ------
    ConfigError
        The level is none, or the split is not there, or not new to the run, or a method does not fit the targets.
    DataError
        RUN_DIR cannot be written, or the targets do not fit the network.
    """
    comm, config, path = experiment.comm, experiment.config, experiment.run_dir / CALIBRATION
    above_and_below(0, 1, "Try 0.9").check("--level", level)
    check_methods(experiment.likelihood, scaling, sets, *raps)
    with comm.agree(f"writing {path}"):
        if experiment.is_writer:
            check_can_write(path, "the RUN_DIR of a copy of the run")
    has_judged = _check_split(experiment, split, half)
    dataset = experiment.open(split)
    experiment.check_targets(dataset, "they are no calibration")
    examples = None
    if half:
        order = EpochOrder(len(dataset), config.seed, 0, stream=Stream.HALF)
        examples = order[torch.arange(-(-len(dataset) // 2))].sort().values
    with experiment.watch:
        found = calibrate_dataset(
            experiment.posterior,
            experiment.likelihood,
            comm,
            dataset,
            level=level,
            scaling=scaling,
            score=sets,
            penalty=raps[0],
            free_rank=raps[1],
            examples=examples,
            see=lambda *_: experiment.watch.mark(),
            **experiment.test_samples,
        )
    content = {
        "format": FORMAT,
        **_origin(experiment),
        "checkpoint": which,
        "shards": config.data.dataset or config.data.shards,
        "split": split,
        "half": half,
        "judged_checkpoints": has_judged,
        "method": found.method,
        "level": level,
        "num_examples": found.num_examples,
        "temperature": found.temperature,
        "vector": None if found.vector is None else found.vector.tolist(),
        "sets": found.score,
        "raps": [found.penalty, found.free_rank],
        "noise_factors": None if found.noise_factors is None else found.noise_factors.tolist(),
        "thresholds": None if found.holds_everything else _listed(found.thresholds),
        "hpc_bnn": __version__,
    }
    with comm.agree(f"writing {path}"):
        if experiment.is_writer:
            experiment.check_identity("calibrated")
            write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
            _say(found)
    return found


def read_calibration(experiment: Experiment, num_samples: int, evaluated: str | None = None) -> Calibration:
    """Return the calibration of a run, made with the checkpoint and the samples that predict now. Collective over the world.

    ``evaluated`` is a split of the data of the config that it will be judged by: if it was made with that, rank 0 says it.
    `ConfigError` where there is none, or it is of another run, checkpoint or samples; `DataError` if unreadable.
    """
    comm, path, found = experiment.comm, experiment.file or experiment.run_dir / CALIBRATION, None
    with comm.agree(f"reading {path}"):
        if experiment.is_writer:
            text = _text_of(experiment)
            if text is None:
                rule, remedy = f"{path} is missing", "Make it with hpc-bnn calibrate RUN_DIR"
                if experiment.file:
                    rule, remedy = f"{path} holds none", "Calibrate its run, and export it again"
                raise ConfigError(Fault("--calibration", True, rule, remedy, "calibrated"))
            try:
                content = json.loads(text)
                found = _parsed(experiment, content)
                origin = {name: content[name] for name in _origin(experiment)}
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                rule = f"{path} is no calibration of this network ({error!r})"
                raise DataError(f"{rule}. Calibrate the run again") from error
            for name, mine in (_origin(experiment) | {"num_samples": num_samples}).items():
                if origin[name] != mine:
                    rule = f"{path} was made with {name} {origin[name]}, and this is {mine}"
                    remedy = "Use the same checkpoint (--which) and samples, or calibrate again"
                    raise ConfigError(Fault("--calibration", True, rule, remedy, "calibrated"))
            data = experiment.config.data
            if (evaluated, data.dataset or data.shards) == (content.get("split"), content.get("shards")):
                logger.warning(
                    "the calibration was made with the split %s: its coverage there is not that of new examples",
                    evaluated,
                )
    return comm.broadcast_object(found)


def kept_calibration(experiment: Experiment) -> str | None:
    """Return the text of a checkpoint's calibration; None without one, and say if there is another. Local: one rank."""
    text = _text_of(experiment)
    if text is not None:
        try:
            read_calibration(experiment, experiment.config.num_test_samples)
        except ConfigError as error:
            logger.warning("the calibration of the run is left out (%s)", error)
            text = None
    return text


def _text_of(experiment: Experiment) -> str | None:
    """Return the text of the calibration that a run, or a file of one, has. Local; `DataError` where it cannot be read."""
    if experiment.file is not None:
        return experiment.calibration
    text = read_bytes(experiment.run_dir / CALIBRATION, "the calibration of a run")
    return None if text is None else text.decode(errors="replace")


def _origin(experiment: Experiment) -> dict[str, Any]:
    """Return what a calibration belongs to: the writer's."""
    config = experiment.config
    run = {"run": experiment.checkpoints.identity, "num_steps": experiment.num_steps}
    return run | {"num_samples": config.num_test_samples, "seed": config.seed}


def _check_split(experiment: Experiment, split: str, half: bool) -> bool:
    """Raise `ConfigError` unless a split may calibrate the run; return whether it judged its checkpoints. Collective."""
    comm, data = experiment.comm, experiment.config.data
    manifest = read_or_prepare(data, comm)
    if data.dataset is None and split not in manifest.splits:
        remedy = "Name one that chose no checkpoint, or the validation split with --half true"
        raise ConfigError(Fault("--split", split, f"the data have the splits {', '.join(manifest.splits)}", remedy))
    if data.dataset is None and manifest.digest != experiment.manifest.digest:
        return False  # other data than those of the run, whatever their splits are called
    with comm.agree(f"reading {experiment.run_dir}"):
        trained = read_config(experiment.run_dir)  # flags may say something else
    judged, remedy = split == judging_split(trained, experiment.manifest), "Name a split that is new to the run"
    if split == trained.data.train_split:
        raise ConfigError(Fault("--split", split, "the network was trained on it, and knows its targets", remedy))
    if judged and not half:
        rule = "it judged the checkpoints of this run"
        raise ConfigError(Fault("--split", split, rule, f"{remedy}, or use a half of it (--half true)"))
    return judged


def _parsed(experiment: Experiment, content: dict[str, Any]) -> Calibration:
    """Return the calibration that a file holds; `ValueError`, `TypeError` or `KeyError` where it is none. Local."""
    likelihood = experiment.likelihood
    of_classes = likelihood.num_classes is not None
    method, shape = (SETS, ()) if of_classes else (INTERVALS, (likelihood.num_targets,))
    shape += experiment.manifest.places
    level, temperature, thresholds = content["level"], content["temperature"], content["thresholds"]
    if content["format"] == 1:
        content = content | {"vector": None, "sets": "threshold", "raps": [0.0, 0], "noise_factors": None}
    limits = torch.full(shape, math.inf, dtype=torch.float64)
    if thresholds is not None:
        if (numbers := np.array(thresholds)).dtype.kind == "U":
            raise ValueError("thresholds are words")
        limits = torch.as_tensor(numbers.astype(np.float64))  # null is NaN
        limits = torch.where(limits.isnan(), math.inf, limits)
    vector, noise = (
        None if content[name] is None else torch.tensor(content[name], dtype=torch.float64)
        for name in ("vector", "noise_factors")
    )
    penalty, free_rank = content["raps"]
    fits = {
        "format": content["format"] in range(1, FORMAT + 1),
        "method": content["method"] == method,
        "level": 0 < level < 1,
        "num_examples": isinstance(content["num_examples"], int) and content["num_examples"] > 0,
        "temperature": (TEMPERATURES[0] <= temperature <= TEMPERATURES[1]) if of_classes else temperature is None,
        "vector": vector is None
        or (of_classes and vector.shape == (2, likelihood.num_classes) and bool(vector.isfinite().all())),
        "sets": content["sets"] in (get_args(SetScore) if of_classes else ("threshold",)),
        "raps": 0 <= penalty < math.inf and isinstance(free_rank, int) and free_rank >= 0,
        "noise_factors": noise is None
        or (
            not of_classes and noise.shape == (likelihood.num_targets,) and bool((noise.isfinite() & (noise > 0)).all())
        ),
        "thresholds": limits.shape == shape and (thresholds is None or bool(limits.isfinite().any())),
    }
    found = Calibration(
        method, level, content["num_examples"], limits, temperature, vector, content["sets"], penalty, free_rank, noise
    )
    if broken := [name for name, value in fits.items() if not value]:
        raise ValueError(f"{', '.join(broken)} cannot be")
    if found.holds_everything != (thresholds is None):
        raise ValueError("thresholds do not fit num_examples")
    return found


def _listed(thresholds: torch.Tensor) -> Any:
    """Return thresholds as JSON has them, null where one is infinite. Local."""
    found = thresholds.numpy().astype(object)
    found[np.isinf(thresholds.numpy())] = None
    return found.tolist()


def _say(found: Calibration) -> None:
    """Warn of what a user should know."""
    if found.holds_everything:
        rule = "%d examples are too few for the level %g: sets and intervals hold everything"
        logger.warning(f"{rule}. Use more examples, or a lower level", found.num_examples, found.level)
    for factor in [] if found.noise_factors is None else found.noise_factors.tolist():
        if min(abs(math.log(factor / end)) for end in NOISE_FACTORS) < 1e-6:
            rule = "a factor of the noise scale, %g, is an end of the range: look at the units of the targets"
            logger.warning(rule, factor)
    if found.temperature is not None and min(abs(math.log(found.temperature / end)) for end in TEMPERATURES) < 1e-6:
        rule = "the temperature %g is an end of the range: the examples are too few, or predicted without errors"
        logger.warning(rule, found.temperature)
