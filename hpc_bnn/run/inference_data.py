"""Predictions and log-likelihoods of a run for ArviZ, in a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ConfigError, Fault
from ..predictive import ClassPredictive, log_of, predict_dataset
from .export import dims_of_rows
from .predictor import Arrays, Predictor, load, samples_of


def to_arviz(
    run: str | os.PathLike | Predictor,
    x: Arrays | Mapping[str, Arrays] | None = None,
    y: Arrays | None = None,
    *,
    split: str | None = None,
    num_samples: int | None = None,
) -> Any:
    """Return predictions and log-likelihoods by sample and example, for ArviZ. Local.

    The samples of the weights are the draws of one chain, the same ones as those of ``hpc-bnn predict``. They are independent
    draws of the *approximate* posterior (the members, for an ensemble). ``arviz.loo`` takes them for draws of the exact one;
    its Pareto k also grows where the two differ. It speaks of examples that the network was trained on: use
    ``split="train"``. For examples that are new to the network, the metric ``nll`` needs no such estimate.

    Parameters
    ----------
    run : path or Predictor
        A run directory, of which it takes the best checkpoint, or what `hpc_bnn.load` returned.
    x, y : array [N, ...], optional
        Inputs (a dict of arrays where the network has several) and targets, as they are in the shards. Without targets
        there are predictions only.
    split : str, optional
        Without x: the split of the data of the run; by default that of the tests.
    num_samples : int, optional
        Samples of the weights, K; by default those of the evaluation of the run.

    Returns
    -------
    arviz.InferenceData (ArviZ 0.x, tried: 0.23) or xarray.DataTree (ArviZ 1.x, tried: 1.3)
        ``posterior_predictive``: ``probabilities`` [1, K, N, C, ...] of classes, or ``mean`` [1, K, N, targets, ...] that a
        sample predicts (units of y). ``observed_data``: ``y`` [N, ...]. ``log_likelihood``: ``y`` [1, K, N], log p(y | x, w_s)
        of an example, all its targets together (nats, y in its units). ``posterior``: ``total_log_likelihood`` [1, K], its
        sum over the examples, a number by which ArviZ can judge the draws. The last two only where the likelihood has a
        density. Dims are ``chain``, ``draw``, ``example``, and those of `predict_run`, with their coordinates. All is in
        memory, N K C numbers.

    It raises `ConfigError` where ArviZ is not installed (``pip install 'hpc_bnn[arviz]'``) or an argument does not fit;
    `DataError` where run or data cannot be read, or a target lies outside the support of the likelihood.

    Examples
    --------
    >>> data = hpc_bnn.to_arviz("runs/quickstart", split="train")  # doctest: +SKIP
    >>> arviz.loo(data)  # doctest: +SKIP
    """
    try:
        import arviz  # pyright: ignore[reportMissingImports]
        import xarray
    except ImportError as error:
        rule, remedy = f"it needs ArviZ, which cannot be imported ({error})", "pip install 'hpc_bnn[arviz]'"
        raise ConfigError(Fault("to_arviz", str(run), rule, remedy)) from error
    if (x is None and y is not None) or (x is not None and split is not None):
        given = "y" if x is None else "split"
        rule = "targets belong to inputs" if x is None else "x are the examples, and a split has its own"
        raise ConfigError(Fault(given, "given", rule, "Give x and y, or a split"))
    predictor = run if isinstance(run, Predictor) else load(run)
    experiment, likelihood, has_y = predictor.experiment, predictor.likelihood, x is None or y is not None
    source = experiment.open(split or experiment.config.data.test_split) if x is None else predictor.source(x, y)
    blocks = predict_dataset(
        predictor.posterior, likelihood, experiment.comm, source,
        keep_members=True, keep_log_probs=True, with_targets=has_y, **samples_of(experiment, num_samples),
    )  # fmt: skip
    parts: dict[str, list[np.ndarray]] = {"members": [], "y": [], "log_prob": []}
    for block in blocks:
        members = block.predictive.members
        assert members is not None, "they were asked for"
        parts["members"].append(members.cpu().numpy())
        if not has_y:
            continue
        likelihood.check_targets(block.y)
        parts["y"].append(block.y.cpu().numpy())
        if isinstance(block.predictive, ClassPredictive):  # log p are logits, too
            of_each = block.y.repeat_interleave(members.shape[1], 0)
            log_prob = likelihood.log_prob(log_of(members).flatten(0, 1), of_each).unflatten(0, members.shape[:2])
        else:
            log_prob = block.predictive.log_probs
        parts["log_prob"] += [] if log_prob is None else [log_prob.cpu().numpy()]
    found = {name: np.concatenate(part) for name, part in parts.items() if part}
    rows, of_sample = dims_of_rows(experiment, source.manifest, (), True, True), ("chain", "draw", "example")

    def dataset(name: str, values: np.ndarray, dims: tuple[str, ...]) -> xarray.Dataset:
        known = {dim.name: list(dim.values) for dim in (*rows["members"][1:], *rows["y"])}
        coordinates = {dim: known.get(dim, range(extent)) for dim, extent in zip(dims, values.shape)}
        attributes = {"run_dir": str(experiment.run_dir), "num_steps": experiment.num_steps, "hpc_bnn": __version__}
        return xarray.Dataset({name: (dims, values)}, coordinates, attributes)

    name = "mean" if likelihood.num_classes is None else "probabilities"
    by_sample = {part: np.moveaxis(found[part], 1, 0)[None] for part in ("members", "log_prob") if part in found}
    dims = (*of_sample, *(dim.name for dim in rows["members"][1:]))
    groups: dict[str, Any] = {"posterior_predictive": dataset(name, by_sample["members"], dims)}
    if "log_prob" in found:
        total = by_sample["log_prob"].sum(-1)
        groups["posterior"] = dataset("total_log_likelihood", total, of_sample[:2])
        groups["log_likelihood"] = dataset("y", by_sample["log_prob"], of_sample)
    if has_y:
        groups["observed_data"] = dataset("y", found["y"], ("example", *(dim.name for dim in rows["y"])))
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData(**groups)
    return xarray.DataTree.from_dict(groups)
