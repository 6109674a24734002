"""A trained network after its run: predictions for arrays in the units of the user, in a notebook, without MPI."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..comm import GridComm, choose_device
from ..comm.devices import num_visible_gpus
from ..data import Source
from ..data.dataset import Normalisation
from ..data.manifest import ArraySpec, inputs_of
from ..errors import ConfigError, Fault
from ..grid import Grid
from ..predictive import predict_dataset
from .calibrate import read_calibration
from .experiment import Experiment, read_config
from .export import check_levels, columns_of, needs_members

Arrays = Any
"""An array or tensor [N, ...], or what `numpy.asarray` takes."""


def load(run_dir: str | os.PathLike, which: Literal["best", "newest"] = "best", *, device: str = "auto") -> Predictor:
    """Return a predictor with the parameters of a run's checkpoint. Local; needs neither MPI nor the data of the run.

    Parameters
    ----------
    run_dir : path
        ``--run_dir`` of ``hpc-bnn train``.
    which : {"best", "newest"}
        The checkpoint: the best one by ``checkpoint.metric``, or the newest.
    device : {"auto", "cpu", "cuda", "cuda:N"}
        As in `hpc_bnn.connect`.

    Raises
    ------
    ConfigError
        ``run_dir`` is no run, or one of a newer hpc_bnn.
    DataError
        It has no such checkpoint.

    Examples
    --------
    >>> predictor = hpc_bnn.load("runs/quickstart")  # doctest: +SKIP
    >>> prediction = predictor.predict(images)  # doctest: +SKIP
    >>> prediction["class"], prediction["mutual_information"]  # doctest: +SKIP
    """
    config = read_config(run_dir)
    config.run_dir = str(run_dir)
    comm = GridComm(Grid(), choose_device(device, 0, num_visible_gpus()))
    return Predictor(Experiment.of_run(config, comm, which))


class Predictor:
    """Predicts for arrays in the units of the shards: it normalises inputs, and gives numbers in units of y. Local.

    Parameters
    ----------
    experiment : hpc_bnn.run.Experiment
        Of one process, with trained parameters; `hpc_bnn.load` makes it.

    Attributes
    ----------
    posterior, likelihood : Posterior, Likelihood
        Over the weights, and of the targets: for what `predict` does not do.
    config, manifest : Config, Manifest
        Of the run, and of its training data: shapes, names of channels, statistics.
    num_steps : int
        Steps of the checkpoint.
    """

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
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
            or ``lower`` and ``upper`` (`hpc_bnn.predictive.Calibration`).
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
        experiment = self._experiment
        quantiles = check_levels(quantiles, self.likelihood, "quantiles")
        source = _Examples(experiment, x)
        options: dict[str, Any] = experiment.test_samples | {"batch_size": batch_size}
        if num_samples is not None:
            options["num_samples"] = num_samples
        if options["num_samples"] < 1:
            raise ConfigError(Fault("num_samples", num_samples, "must be 1 or more", "Leave it out"))
        calibration = read_calibration(experiment, options["num_samples"]) if calibrated else None
        blocks = predict_dataset(
            self.posterior, self.likelihood, experiment.comm, source,
            keep_members=needs_members(quantiles, members, calibration), with_targets=False, **options,
        )  # fmt: skip
        parts: dict[str, list[np.ndarray]] = {}
        with tqdm(total=len(source), unit="example", disable=not progress) as bar:
            for block in blocks:
                for name, column in columns_of(block.predictive, quantiles, members, calibration).items():
                    parts.setdefault(name, []).append(column.cpu().numpy())
                bar.update(len(block.examples))
        return {name: np.concatenate(part) for name, part in parts.items()}


class _Examples(Source):
    """Inputs of the user in memory, normalised as those of the training; their targets do not exist."""

    def __init__(self, experiment: Experiment, x: Arrays | Mapping[str, Arrays]):
        self.manifest, self._scaling = experiment.manifest, experiment.manifest
        self.on(experiment.comm.device, experiment.dtype)
        specs = {name: spec for name, spec in self.manifest.arrays.items() if name != "y"}
        named = dict(x) if isinstance(x, Mapping) else {"x": x}
        if named.keys() != specs.keys():
            rule = f"the network has the inputs {', '.join(specs)}"
            raise ConfigError(Fault("x", ", ".join(map(str, named)), rule, "Give a dict with an array for each"))
        self._arrays = {name: _as_stored(name, named[name], spec) for name, spec in specs.items()}
        lengths = {len(array) for array in self._arrays.values()}
        if len(lengths) != 1 or 0 in lengths:
            rule = "all inputs need as many examples, one or more, along their first dim"
            raise ConfigError(Fault("x", sorted(lengths), rule, "Look at the shapes"))
        self._length = lengths.pop()
        options = {"normalises_targets": experiment.likelihood.is_equivariant}
        self._normalise = Normalisation(self.manifest, self.manifest, self.device, self.dtype, **options)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array[indices.numpy()]) for name, array in self._arrays.items()}

    def deliver(self, content: dict[str, Tensor]) -> tuple[Any, Tensor]:
        found = self._normalise({name: values.to(self.device) for name, values in content.items()})
        return inputs_of(found), torch.empty(0, device=self.device)

    @property
    def target_scale(self) -> tuple[Tensor, Tensor] | None:
        return self._normalise.scales.get("y")


def _as_stored(name: str, given: Arrays, spec: ArraySpec) -> np.ndarray:
    """Return an input [N, ...] in the shape and dtype of the shards; `ConfigError` where it is none."""
    array = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.shape[1:] != tuple(spec.shape) or array.ndim == 0:
        rule = f"an example of the training is {list(spec.shape)}, so it must be [N, {', '.join(map(str, spec.shape))}]"
        raise ConfigError(Fault(name, f"of shape {list(array.shape)}", rule, "Reshape it; one example is x[None]"))
    stored = array.astype(spec.dtype)
    if not np.can_cast(array.dtype, spec.dtype, "same_kind") and not np.array_equal(stored, array):
        rule = f"the training data are {spec.dtype}, and some of these numbers are not"
        raise ConfigError(Fault(name, f"of dtype {array.dtype}", rule, "Give them in the units and form of the shards"))
    return stored
