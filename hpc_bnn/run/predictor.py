"""A trained network after its run: predictions for arrays in the units of the user, in a notebook, without MPI."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..comm import GridComm, choose_device
from ..comm.devices import num_visible_gpus
from ..data import Source
from ..data.dataset import NormalisedSource
from ..data.manifest import ArraySpec, inputs_of
from ..errors import ConfigError, Fault, count
from ..grid import Grid
from ..predictive import check_up, predict_dataset
from .calibrate import read_calibration
from .experiment import Experiment, read_config
from .export import check_levels, columns_of, what_is_kept
from .model_file import POSTERIOR, export_model, read_posterior
from .plain_network import PlainNetwork, What, plain_network

Arrays = Any
"""An array or tensor [N, ...], or what `numpy.asarray` takes."""


Which = Literal["best", "newest"]


def load(run_dir: str | os.PathLike, which: Which = "best", *, device: str = "auto") -> Predictor:
    """Return a predictor with the parameters of a run's checkpoint. Local; needs neither MPI nor the data of the run.

    Parameters
    ----------
    run_dir : path
        ``--run_dir`` of ``hpc-bnn train``; or a .safetensors file of ``hpc-bnn export``, which needs no run either.
    which : {"best", "newest"}
        The checkpoint of a run: the best one by ``checkpoint.metric``, or the newest. A file holds one checkpoint.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        As in `hpc_bnn.connect`.

    Raises
    ------
    ConfigError
        ``run_dir`` is no run, or one of a newer hpc_bnn; or ``which`` is another word; or safetensors is not installed.
    DataError
        It has no such checkpoint; or the file is damaged, or not one of ``hpc-bnn export``.

    Examples
    --------
    >>> predictor = hpc_bnn.load("runs/quickstart")  # doctest: +SKIP
    >>> prediction = predictor.predict(images)  # doctest: +SKIP
    >>> prediction["class"], prediction["mutual_information"]  # doctest: +SKIP
    """
    if which not in get_args(Which):
        raise ConfigError(Fault("which", which, f"must be {' or '.join(get_args(Which))}", "Leave it out for the best"))
    comm, path = GridComm(Grid(), choose_device(device, 0, num_visible_gpus())), Path(run_dir)
    if path.suffix == POSTERIOR and not path.is_dir():
        return Predictor(read_posterior(path, comm))
    config = read_config(run_dir)
    config.run_dir = str(run_dir)
    return Predictor(Experiment.of_run(config, comm, which))


class Predictor:
    """Predicts for arrays in the units of the shards: it normalises inputs, and gives numbers in units of y. Local.

    Attributes
    ----------
    posterior, likelihood : Posterior, Likelihood
        Over the weights, and of the targets: for what `predict` does not do.
    config, manifest : Config, Manifest
        Of the run, and of its training data: shapes, names of channels, statistics.
    num_steps : int
        Steps of the checkpoint.
    experiment : hpc_bnn.run.Experiment
        What it is made of: of one process, with trained parameters, as `hpc_bnn.load` makes it.
    """

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.posterior, self.likelihood = experiment.posterior, experiment.likelihood
        self.config, self.manifest, self.num_steps = experiment.config, experiment.manifest, experiment.num_steps

    def predict(
        self,
        x: Arrays | Mapping[str, Arrays],
        *,
        num_samples: int | None = None,
        quantiles: Sequence[float] = (),
        members: bool = False,
        calibrated: bool = False,
        batch_size: int = 1024,
        progress: bool = False,
    ) -> dict[str, np.ndarray]:
        """Return the predictive of examples, by the names of the datasets of ``hpc-bnn predict`` (`predict_run`).

        Parameters
        ----------
        x : array [N, ...], or dict of them
            Inputs as they are in the shards, not normalised; a dict where the network has several.
        num_samples : int, optional
            Samples of the weights; by default those of the run's evaluation. The samples are keyed by the seed of the run:
            two calls give the same numbers, which are those of ``hpc-bnn predict``.
        quantiles : sequence of float
            Levels of ``quantiles`` [N, Q, ...], between 0 and 1.
        members : bool
            Whether ``members`` [N, K, ...] holds what each sample predicts.
        calibrated : bool
            Whether RUN_DIR/calibration.json of ``hpc-bnn calibrate`` is applied: ``calibrated_probabilities`` and ``in_set``,
            or ``lower``, ``upper``, ``calibrated_std`` and ``calibrated_quantiles`` (`hpc_bnn.predictive.Calibration`).
        batch_size : int
            Examples of a forward pass.
        progress : bool
            Whether a bar shows the progress.

        Returns
        -------
        dict of str to array
            Classes: ``probabilities``, ``std``, ``class``, ``entropy``, ``mutual_information`` (nats). Numbers: ``mean``,
            ``std``, ``aleatoric_std``, ``epistemic_std``, in units of y.

        Raises
        ------
        ConfigError
            The inputs have another form than those of the training, or an argument does not fit, or the calibration is of
            another checkpoint or of other samples.
        DataError
            The calibration cannot be read.
        """
        experiment = self.experiment
        wanted, quantiles = quantiles, check_levels(quantiles, self.likelihood, "quantiles")
        if np.size(wanted) and not quantiles:
            rule = f"the likelihood {type(self.likelihood).__name__} has no quantiles"
            raise ConfigError(Fault("quantiles", wanted, rule, "Leave them out, or give it a `mixture`"))
        source = self.source(x)
        options: dict[str, Any] = samples_of(experiment, num_samples)
        count("Try 1024").check("batch_size", batch_size)
        options["batch_size"] = batch_size
        calibration = read_calibration(experiment, options["num_samples"]) if calibrated else None
        blocks = predict_dataset(
            self.posterior, self.likelihood, experiment.comm, source,
            **what_is_kept(self.likelihood, quantiles, members, calibration), with_targets=False, **options,
        )  # fmt: skip
        parts: dict[str, list[np.ndarray]] = {}
        with tqdm(total=len(source), unit="example", disable=not progress) as bar:
            for block in blocks:
                for name, column in columns_of(block.predictive, quantiles, members, calibration).items():
                    parts.setdefault(name, []).append(column.cpu().numpy())
                bar.update(len(block.examples))
        return {name: np.concatenate(part) for name, part in parts.items()}

    def as_module(self, what: What, *, sample: int | None = None, num_samples: int | None = None) -> PlainNetwork:
        """Return a plain ``nn.Module`` with fixed weights, for inputs as `predict` takes them; it shares no memory. Local.

        Each sample in it has given what the posterior gives for two made-up examples. It can be copied, pickled, traced,
        and given to ``torch.export``.

        Parameters
        ----------
        what : {"mean", "sample", "samples"}
            The network with the mean of the weights, with one sample of them, or several samples.
        sample : int, optional
            Number of the sample, from 0 on (default: 0): the sample of that number of `predict`.
        num_samples : int, optional
            Number of samples (default: those of the run's evaluation). Each is a network of its own in memory.

        Returns
        -------
        PlainNetwork
            ``module(x)``: class probabilities [B, C, ...], or the mean [B, targets, ...] in units of y. Of samples a pair:
            the mean over them, and ``std`` of `predict`: of the probabilities, or the total one of y.

        Raises
        ------
        ConfigError
            The posterior has no mean network or no such sample, or the network drops where its masks cannot be kept.
        """
        return plain_network(self.experiment, what, sample=sample, num_samples=num_samples)

    def export(
        self,
        output: str | os.PathLike,
        what: What | None = None,
        *,
        sample: int | None = None,
        num_samples: int | None = None,
    ) -> Path:
        """Write the trained network to one file, and return its path. Local.

        Parameters
        ----------
        output : path
            Its suffix says what is written. ``.safetensors``: the whole posterior, for `hpc_bnn.load`. ``.onnx``: what
            `as_module` returns, for any number of examples. ``.pt``: the ``state_dict`` of the network with the weights of
            the mean or of a sample, by the names of its own class; it takes normalised inputs.
        what, sample, num_samples
            As for `as_module`; needed for ``.onnx`` and ``.pt`` only.

        Raises
        ------
        ConfigError
            There is such a file, or it cannot hold what is asked for, or a package is missing (the extra ``export``), or
            torch cannot write the network as ONNX.
        DataError
            The file cannot be written, or the calibration of the run cannot be read.
        """
        return export_model(self.experiment, output, what=what, sample=sample, num_samples=num_samples)

    def source(self, x: Arrays | Mapping[str, Arrays], y: Arrays | None = None) -> Source:
        """Return examples of the user, as they are in the shards, as the network sees them; `ConfigError` as for `predict`."""
        return _Examples(self.experiment, x, y)

    def check_up(self) -> dict[str, Any]:
        """Return `hpc_bnn.predictive.check_up` of the checkpoint: KL, signal-to-noise ratio and more of each tensor.

        ``pandas.DataFrame(found["tensors"])`` shows them as a table. RUN_DIR/evaluation.json also has the mean network.
        """
        return check_up(self.posterior, self.experiment.comm)


def samples_of(experiment: Experiment, num_samples: int | None) -> dict[str, Any]:
    """Return `Experiment.test_samples` with another number, where there is one; `ConfigError` where it is none. Local."""
    options = experiment.test_samples
    if num_samples is not None:
        count("Leave it out").check("num_samples", num_samples)
        options["num_samples"] = num_samples
    return options


class _Examples(NormalisedSource):
    """Examples of the user in memory, normalised as those of the training; without y their targets do not exist."""

    def __init__(self, experiment: Experiment, x: Arrays | Mapping[str, Arrays], y: Arrays | None = None):
        self._scaling = experiment.manifest
        arrays = {name: spec for name, spec in experiment.manifest.arrays.items() if name != "weights"}
        self.manifest = (
            replace(experiment.manifest, arrays=arrays) if experiment.manifest.has_weights else self._scaling
        )
        self.on(experiment.comm.device, experiment.dtype)
        specs, target = self.manifest.inputs, self.manifest.arrays["y"]
        named = dict(x) if isinstance(x, Mapping) else {"x": x}
        if named.keys() != specs.keys():
            rule = f"the network has the inputs {', '.join(specs)}"
            raise ConfigError(Fault("x", ", ".join(map(str, named)), rule, "Give a dict with an array for each"))
        details = self.manifest.details
        self._arrays = {name: _as_stored(name, named[name], spec, details) for name, spec in specs.items()}
        self._arrays |= {} if y is None else {"y": _as_stored("y", y, target, details)}
        lengths = {len(array) for array in self._arrays.values()}
        if len(lengths) != 1 or 0 in lengths:
            rule = "all arrays need as many examples, one or more, along their first dim"
            raise ConfigError(Fault("x", sorted(lengths), rule, "Look at the shapes"))
        self._length = lengths.pop()
        self._normalise = experiment.normalisation

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array[indices.numpy()]) for name, array in self._arrays.items()}

    def deliver(self, content: dict[str, Tensor]) -> tuple[Any, Tensor]:
        found = self._normalise({name: values.to(self.device) for name, values in content.items()})
        return inputs_of(found), found.get("y", torch.empty(0, device=self.device))


def _names_along(given: Arrays, dim: int) -> Sequence[Any]:
    """Return what stands for the places of a dim of a table or an xarray.DataArray; nothing of other arrays. Local."""
    if dim == 1 and hasattr(given, "columns"):
        return list(given.columns)
    dims, coordinates = getattr(given, "dims", ()), getattr(given, "coords", {})
    return list(coordinates[dims[dim]].values) if dim < len(dims) and dims[dim] in coordinates else ()


def _as_stored(name: str, given: Arrays, spec: ArraySpec, details: Mapping[str, Any]) -> np.ndarray:
    """Return an array [N, ...] in the shape and dtype of the shards; `ConfigError` where it is none."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = given.float() if given.dtype == torch.bfloat16 else given  # NumPy has none
    if np.ma.is_masked(given):
        given = given.astype(np.float64).filled(math.nan)
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:  # of several lengths; sparse tensors
        raise ConfigError(Fault(name, type(given).__name__, f"it is no array ({error})", "Give arrays")) from error
    names, fits = _names_along(given, 1), array.shape[1:] == tuple(spec.shape)
    named, numbers = list(map(str, names)), (int, float, np.number)
    if fits and spec.channels and sorted(named) == sorted(spec.channels):
        array = array[:, [named.index(channel) for channel in spec.channels]]
    elif fits and spec.channels and not all(isinstance(n, numbers) or str(n).isdecimal() for n in names):
        rule = f"the network was trained on {', '.join(spec.channels)}"
        raise ConfigError(Fault(name, ", ".join(named), rule, "Name the columns so, or give an array"))
    points = {axis: details.get(axis, ()) for axis in ("latitudes", "longitudes")}
    if fits and tuple(spec.shape[-2:]) == tuple(map(len, points.values())):
        for dim, (axis, ours) in enumerate(points.items(), array.ndim - 2):
            theirs = np.asarray(_names_along(given, dim))
            if theirs.dtype.kind in "iuf" and theirs.size and (abs((theirs - ours + 180) % 360 - 180) > 1e-3).any():
                rule = (
                    f"its {axis} are {theirs[0]:g} to {theirs[-1]:g}, those of the training {ours[0]:g} to {ours[-1]:g}"
                )
                raise ConfigError(Fault(name, f"of other {axis}", rule, "Select the same points, in the same order"))
    if array.shape[1:] != tuple(spec.shape) or array.ndim == 0:
        rule = f"an example of the training is {list(spec.shape)}, so it must be [N, {', '.join(map(str, spec.shape))}]"
        raise ConfigError(Fault(name, f"of shape {list(array.shape)}", rule, "Reshape it; one example is x[None]"))
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            stored = array.astype(spec.dtype)
        is_whole = stored.dtype.kind in "iub" or not np.can_cast(array.dtype, spec.dtype, "same_kind")
        fits = np.array_equal(stored, array) if is_whole else name == "y" or bool(np.isfinite(stored).all())
    except (TypeError, ValueError):  # words
        fits = False
    if not fits:
        rule = f"the training data are {spec.dtype} without NaN and infinity, and some of these values are not"
        raise ConfigError(Fault(name, f"of dtype {array.dtype}", rule, "Give them in the units and form of the shards"))
    return stored
