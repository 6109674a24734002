"""Temperature, sets and intervals: against their definitions, their promise, and what they refuse."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from fractions import Fraction

import h5py
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from torch import nn

import hpc_bnn
from hpc_bnn import Categorical, Grid, GridComm, MeanFieldGaussian, ShardDataset, predict_classes, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.likelihoods.mixtures import GaussianMixture, StudentTMixture
from hpc_bnn.noise import Key, Stream
from hpc_bnn.predictive import calibration as module
from hpc_bnn.predictive.calibration import (
    INTERVALS,
    SETS,
    Calibration,
    calibrate_dataset,
    conformal_rank,
    conformal_thresholds,
    fit_noise_factors,
    fit_temperature,
    fit_vector,
    set_scores,
    tempered,
    vector_scaled,
)
from hpc_bnn.predictive.evaluation import evaluate_dataset
from hpc_bnn.predictive.predictive import ClassPredictive, Share, ValuePredictive
from hpc_bnn.reductions import TargetShares

ONE = GridComm(Grid())


# --- definitions ---------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.integers(1, 999))
def test_the_rank_is_exact(num_examples, thousandths):
    level = thousandths / 1000
    assert conformal_rank(num_examples, level) == math.ceil((num_examples + 1) * Fraction(thousandths, 1000))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.sampled_from([0.07, 0.5, 0.9, 0.95]))
def test_the_threshold_is_the_smallest_score_that_enough_do_not_exceed(scores, level):
    """With ties: it is defined by a count, not by an index."""
    scores = torch.tensor(scores, dtype=torch.float64)
    got = conformal_thresholds(scores, level, len(scores), ONE)
    needed = (len(scores) + 1) * Fraction(str(level))
    enough = [s for s in scores.unique().tolist() if (scores <= s).sum().item() >= needed]
    assert got.shape == () and got.item() == min(enough, default=math.inf)


def test_each_target_has_a_threshold_of_its_own_whatever_is_gathered_at_once(monkeypatch):
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 3, 2)))
    monkeypatch.setattr(module, "GATHERED_NUMBERS", 100)  # two targets at once
    got = conformal_thresholds(scores, 0.8, 50, ONE)
    assert np.array_equal(got, np.sort(scores.numpy(), axis=0)[math.ceil(51 * 0.8) - 1])


def classes_of(temperature, num_examples, seed=0, num_classes=5):
    """Return log-probabilities whose classes are drawn from them at a temperature, and these classes."""
    rng = np.random.default_rng(seed)
    log_p = torch.from_numpy(rng.normal(size=(num_examples, num_classes)) * 3).log_softmax(1)
    sums = (log_p / temperature).softmax(1).cumsum(1).numpy()
    return log_p, torch.from_numpy((rng.random((num_examples, 1)) > sums).sum(1).clip(max=num_classes - 1))


def test_the_temperature_has_the_least_negative_log_likelihood():
    log_p, y = classes_of(2.0, 300)

    def nll(log_temperature):
        return -(log_p / math.exp(log_temperature)).log_softmax(1)[torch.arange(300), y].sum().item()

    least = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    got = fit_temperature(log_p, y, ONE)
    assert math.log(got) == pytest.approx(least.x, abs=1e-6) and nll(math.log(got)) <= least.fun * (1 + 1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    found = np.array([math.log(fit_temperature(*classes_of(temperature, 400, seed), ONE)) for seed in range(40)])
    error = found.std(ddof=1) / math.sqrt(len(found))
    assert abs(found.mean() - math.log(temperature)) < 4 * error + 0.005  # the bias of 400 examples
    assert error < 0.02


def test_a_temperature_stays_in_its_range_where_no_other_is_better():
    log_p = torch.tensor([[0.7, 0.3]], dtype=torch.float64).log()
    ends = [fit_temperature(log_p, torch.tensor([y]), ONE) for y in (0, 1)]
    assert ends == pytest.approx(module.TEMPERATURES)


def test_tempered_probabilities_are_powers_over_their_sum():
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = p.sqrt() / p.sqrt().sum(1, keepdim=True)
    torch.testing.assert_close(tempered(p, 2.0), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tempered(p, 1.0), p, rtol=1e-12, atol=1e-12)


def test_vector_scaling_has_the_least_penalised_negative_log_likelihood():
    """Also for a class that never occurs, and for probabilities of 0."""
    log_p, y = classes_of(2.0, 200)
    log_p[:5, 4] = math.log(np.finfo(float).tiny)
    y[y == 4] = 0

    def value_and_gradient(vector):
        at = torch.from_numpy(vector.copy()).requires_grad_()
        z = log_p * at[:5] + at[5:]
        value = -z.log_softmax(1)[torch.arange(200), y].sum()
        value = value + ((at[:5] - 0.5).square().sum() + at[5:].square().sum()) / 2
        value.backward()
        return value.item(), at.grad.numpy()

    least = minimize(value_and_gradient, np.repeat([0.5, 0.0], 5), jac=True, method="BFGS", options={"gtol": 1e-9})
    got = fit_vector(log_p, y, 2.0, ONE)
    np.testing.assert_allclose(got.flatten(), least.x, atol=1e-6)
    assert np.abs(value_and_gradient(got.flatten().numpy())[1]).max() < 1e-9
    p = log_p.exp()
    expected = p ** got[0] * got[1].exp()
    torch.testing.assert_close(vector_scaled(p, got), expected / expected.sum(1, keepdim=True), rtol=1e-10, atol=1e-14)


def test_a_known_vector_is_found():
    w, b, rng = (
        torch.tensor([0.5, 1.0, 2.0]).double(),
        torch.tensor([-0.5, 0.0, 0.5]).double(),
        np.random.default_rng(0),
    )
    log_p = torch.from_numpy(rng.normal(size=(40_000, 3))).log_softmax(1)
    sums = (log_p * w + b).softmax(1).cumsum(1).numpy()
    y = torch.from_numpy((rng.random((len(log_p), 1)) > sums).sum(1))
    got = fit_vector(log_p, y, fit_temperature(log_p, y, ONE), ONE)
    torch.testing.assert_close(got[0], w, atol=0.1, rtol=0)  # standard errors: about 0.02
    torch.testing.assert_close(got[1] - got[1].mean(), b, atol=0.1, rtol=0)


def noise_of(kind, factor, rng, missing=0.0):
    """Return 4 components [4, 3, 150] whose scales are too small by a factor, targets [3, 150], and which are there."""
    loc = torch.from_numpy(rng.normal(size=(4, 3, 150)))
    scale = torch.from_numpy(rng.uniform(0.2, 0.6, size=(4, 3, 150)))
    noise = rng.normal(size=(3, 150)) if kind is GaussianMixture else rng.standard_t(5, size=(3, 150))
    member = torch.from_numpy(rng.integers(0, 4, (1, 3, 150)))
    y = loc.gather(0, member)[0] + factor * scale.gather(0, member)[0] * torch.from_numpy(noise)
    present = torch.from_numpy(rng.random((3, 150)) >= missing)
    mixture = kind(loc, scale) if kind is GaussianMixture else kind(loc, scale, 5.0)
    return mixture, torch.where(present, y, math.nan), present


@pytest.mark.parametrize("kind", [GaussianMixture, StudentTMixture])
def test_the_factor_of_the_noise_has_the_greatest_likelihood(kind):
    rng = np.random.default_rng(1)
    mixture, y, present = noise_of(kind, 2.5, rng, missing=0.2)
    channel = torch.arange(3)[:, None].expand(3, 150)

    def part_of(places):
        flat = [values[:, places].flatten() for values in (y, present, channel)]
        return mixture.map(lambda c: c[:, :, places].flatten(1)), *flat

    got = fit_noise_factors([part_of(slice(None))], 3, ONE)
    whole = [fit_noise_factors([], 3, ONE)]
    of = scipy.stats.norm.logpdf if kind is GaussianMixture else (lambda z: scipy.stats.t.logpdf(z, 5))
    loc, scale = (c.numpy() for c in mixture.components)
    for t, keep in enumerate(present.numpy()):

        def nll(log_factor, t=t, keep=keep):
            s = scale[:, t, keep] * math.exp(log_factor)
            return -logsumexp(of((y[t].numpy()[keep] - loc[:, t, keep]) / s) - np.log(s), axis=0).sum()

        least = minimize_scalar(nll, bounds=(-2, 3), method="bounded", options={"xatol": 1e-9})
        assert math.log(got[t].item()) == pytest.approx(least.x, abs=1e-6) and 1.8 < got[t] < 3.3
    assert torch.equal(whole[0], torch.ones(3).double())  # no targets tell nothing
    parts = [part_of(places) for places in (slice(40), slice(40, None))]
    torch.testing.assert_close(fit_noise_factors(parts, 3, ONE), got, rtol=1e-12, atol=0)
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    at = torch.where(present, y, 0)
    logs = mixture.rescaled(s.exp()).log_densities(at)
    (slope,) = torch.autograd.grad(logs.sum(), s)
    torch.testing.assert_close(mixture.slopes(at).sum(), slope)


@pytest.mark.parametrize("score", ["aps", "raps"])
def test_adaptive_scores_are_those_of_the_definition(score):
    """The probability of the classes from the most likely one down to this one, and a penalty of its rank; less 1."""
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(6), 20))
    p[0] = torch.tensor([0.5, 0.5, 0, 0, 0, 0])  # ties: the lower class is the more likely one
    got = set_scores(p, score, 0.3, 2)
    for row, scores in zip(p.tolist(), got.tolist()):
        order = sorted(range(6), key=lambda c: (-row[c], c))
        for rank, c in enumerate(order, 1):
            penalty = 0.3 * max(0, rank - 2) if score == "raps" else 0.0
            assert scores[c] == pytest.approx(sum(row[d] for d in order[:rank]) + penalty - 1, abs=1e-14)
    sure = torch.tensor([[1.0, 1e-30, 1e-40]], dtype=torch.float64)
    assert len(set_scores(sure, "aps").unique()) == 3  # also where a sum of the first is 1


# --- the promise ---------------------------------------------------------------------------------------


def assert_covers(inside, level, num_examples):
    """Coverage of many calibrations: at least the level, at most that of scores without ties, in standard errors."""
    inside = np.asarray(inside)
    error = inside.std(ddof=1) / math.sqrt(len(inside))
    assert level - 4 * error < inside.mean() < level + 1 / (num_examples + 1) + 4 * error
    assert error < 0.01


@pytest.mark.parametrize(("level", "score"), [(0.5, "threshold"), (0.9, "threshold"), (0.8, "aps"), (0.8, "raps")])
def test_sets_of_overconfident_probabilities_cover_as_often_as_promised(level, score):
    inside = []
    for seed in range(300):
        log_p, y = classes_of(4.0, 120, seed)
        p, n = log_p.exp(), 20
        scores = set_scores(p, score, 0.1, 1)[torch.arange(n), y[:n]]
        thresholds = conformal_thresholds(scores, level, n, ONE)
        found = Calibration(SETS, level, n, thresholds, 1.0, score=score, penalty=0.1, free_rank=1)
        columns = found.columns_of(ClassPredictive(p[n:], p[n:], p[n:, 0]))
        assert columns["in_set"].dtype == torch.int8
        inside.append(columns["in_set"].gather(1, y[n:, None]).double().mean().item())
    assert_covers(inside, level, 20)


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_intervals_too_narrow_and_too_wide_cover_as_often_as_promised(factor):
    """Noise that grows with x, in two targets of different units; the network states a multiple of it."""
    rng, level, n, inside = np.random.default_rng(1), 0.8, 30, []
    for _ in range(300):
        scale = torch.from_numpy(rng.uniform(0.5, 2, size=(n + 100, 1))) * torch.tensor([1.0, 100.0])
        y = scale * torch.from_numpy(rng.normal(size=scale.shape))
        loc, stated = torch.zeros(2, *y.shape, dtype=torch.float64), (factor * scale).expand(2, *y.shape)
        mixture = GaussianMixture(loc, stated)
        predictive = ValuePredictive(loc[0], stated[0] ** 2, loc[0], mixture=mixture)
        low, high = mixture.quantile(0.1), mixture.quantile(0.9)
        thresholds = conformal_thresholds(torch.maximum(low - y, y - high)[:n], level, n, ONE)
        columns = Calibration(INTERVALS, level, n, thresholds).columns_of(predictive)
        inside.append(((columns["lower"] <= y) & (y <= columns["upper"]))[n:].double().mean(0).numpy())
        assert (thresholds > 0).all() if factor < 1 else (thresholds < 0).all()
    for of_target in np.array(inside).T:
        assert_covers(of_target, level, n)


@pytest.mark.parametrize("score", ["threshold", "aps", "raps"])
@pytest.mark.parametrize("scale", [1e-9, 1.0])
def test_a_class_whose_score_is_the_threshold_is_in_the_set(score, scale):
    """Also where the probabilities are rounded otherwise, as in another batch, and where they are small."""
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(6), 50)) * scale
    p[:, 0] += 1 - p.sum(1)
    scores = set_scores(p, score, 0.1, 1)
    rounded = p * (1 + 3e-7 * torch.linspace(-1, 1, 300, dtype=torch.float64).view(50, 6))
    for c in range(6):
        for n, threshold in enumerate(scores[:, c]):
            found = Calibration(SETS, 0.8, 9, threshold, 1.0, score=score, penalty=0.1, free_rank=1)
            one = rounded[n : n + 1]
            in_set = found.set_of(ClassPredictive(one, one, one[:, 0]))[0]
            assert in_set[c]
            # Others only where their probability is the same to rounding
            new = in_set & (scores[n] > threshold)
            assert not new.any() or (p[n, new] / p[n, c] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("is_normalised", [False, True])
@pytest.mark.parametrize(("middle", "std", "threshold"), [(280.0, 1e-3, 0.5), (0.0, 1.0, -0.7), (-3e5, 10.0, 0.0)])
def test_a_number_whose_score_is_the_threshold_is_in_the_interval(middle, std, threshold, is_normalised):
    """Also where the prediction is rounded otherwise, and where the ends are written in float32.

    Intervals of normalised numbers are no wider where the numbers are large.
    """
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.normal(size=(200, 1)))
    loc = middle + std * z
    width = std * scipy.stats.norm.ppf(0.9)
    found = Calibration(INTERVALS, 0.8, 9, torch.tensor([threshold * std], dtype=torch.float64))
    y = [loc - width - threshold * std, loc + width + threshold * std]
    noise = 1 + 2e-7 * torch.from_numpy(rng.uniform(-1, 1, loc.shape))
    rounded = (noise * (z if is_normalised else loc)).float().double()
    one = torch.ones_like(rounded)
    mixture = GaussianMixture(rounded[None], (one if is_normalised else std * one)[None])
    predictive = ValuePredictive(rounded, rounded, rounded, mixture=mixture)
    predictive = predictive.in_units(torch.tensor([middle]), torch.tensor([std])) if is_normalised else predictive
    lower, upper = found.interval_of(predictive)
    assert (lower.float() <= y[0].float()).all() and (y[1].float() <= upper.float()).all()
    exact = 2 * (width + threshold * std)
    assert ((upper - lower) - exact).max() < 1e-4 * std + (0 if is_normalised else 2e-5 * abs(middle))
    everything = replace(found, thresholds=torch.tensor([math.inf]))
    lower, upper = everything.interval_of(predictive)
    assert (lower == -math.inf).all() and (upper == math.inf).all()


# --- runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shard directories of classes and of numbers, with a split for each purpose."""
    directory, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    ends = {
        "train": (0, 100),
        "validation": (100, 160),
        "calibration": (160, 219),
        "test": (219, 320),
        "few": (320, 323),
    }
    x = rng.normal(size=(323, 3))
    numbers = np.stack([x[:, 0], 1000 + 50 * x[:, 1]], 1) + rng.normal(size=(323, 2)) * [0.5, 5]
    classes = (x + rng.normal(size=x.shape)).argmax(1)
    for kind, y, more in (("numbers", numbers, {}), ("classes", classes, {"num_classes": 3})):
        splits = {name: (x[a:b], y[a:b]) for name, (a, b) in ends.items()}
        write_shards(directory / kind, splits, name=kind, source="test", licence="none", **more)
    return directory


def train(shards, run_dir, *more):
    command = [
        "train",
        "--data.shards",
        str(shards),
        "--run_dir",
        str(run_dir),
        "--num_epochs",
        "4",
        "--num_samples",
        "2",
    ]
    command += ["--num_test_samples", "5", "--global_batch_size", "50", "--optimizer.learning_rate", "0.02"]
    assert main([*command, *more]) == 0
    return run_dir


@pytest.fixture(scope="module")
def runs(shards):
    return {kind: train(shards / kind, shards / f"run-{kind}") for kind in ("classes", "numbers")}


@pytest.fixture
def run(runs, tmp_path):
    """Return a function that gives a copy of a run."""
    return lambda kind="classes": shutil.copytree(runs[kind], tmp_path / kind)


def predicted(run_dir, path, *more):
    assert main(["predict", str(run_dir), "--output", str(path), *more]) == 0
    with h5py.File(path) as file:
        return {name: values[()] for name, values in file.items()}, dict(file.attrs)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_calibrated_prediction_is_what_the_definition_gives(kind, run, tmp_path, capsys):
    run_dir, path = run(kind), tmp_path / "p.h5"
    assert main(["calibrate", str(run_dir), "--level", "0.8", "--which", "best"]) == 0
    assert str(run_dir / "calibration.json") in capsys.readouterr().out
    found = json.loads((run_dir / "calibration.json").read_text())
    assert (found["num_examples"], found["split"], found["level"], found["checkpoint"]) == (
        59,
        "calibration",
        0.8,
        "best",
    )
    assert found["run"] == json.loads((run_dir / "run.json").read_text())["identity"]
    options = ["--which", "best", "--dtype", "float64", "--quantiles", "[0.1, 0.9]"]
    seen, _ = predicted(run_dir, tmp_path / "seen.h5", "--split", "calibration", *options)
    new, attributes = predicted(run_dir, path, "--calibration", "true", *options)
    rank, y = math.ceil(60 * 0.8) - 1, seen["y"]
    if kind == "classes":
        assert found["method"] == attributes["calibration_method"] == SETS
        of_truth = np.take_along_axis(seen["probabilities"], y[:, None], 1)[:, 0]
        threshold = np.sort(1 - of_truth)[rank]
        assert found["thresholds"] == pytest.approx(threshold, rel=1e-5)  # the calibration was in float32
        p = new["probabilities"] ** (1 / found["temperature"])
        np.testing.assert_allclose(new["calibrated_probabilities"], p / p.sum(1, keepdims=True), rtol=1e-9)
        assert new["in_set"].dtype == np.int8 and attributes["temperature"] == found["temperature"]
        assert np.array_equal(new["in_set"], 1 - new["probabilities"] <= found["thresholds"])
        assert 0 < new["in_set"].mean() < 1
        y, log_p = torch.from_numpy(y), torch.from_numpy(seen["probabilities"]).log()
        assert found["temperature"] == pytest.approx(fit_temperature(log_p, y, ONE), rel=1e-4)
    else:
        assert found["method"] == attributes["calibration_method"] == INTERVALS and found["temperature"] is None
        score = np.maximum(seen["quantiles"][:, 0] - y, y - seen["quantiles"][:, 1])
        thresholds = np.sort(score, axis=0)[rank]
        np.testing.assert_allclose(found["thresholds"], thresholds, rtol=1e-3, atol=1e-4)
        middle = json.loads((run_dir / "manifest.json").read_text())["statistics"]["y"]["mean"]
        tie = module.TIES * (np.abs(new["quantiles"] - middle).sum(1) + np.abs(found["thresholds"]))
        np.testing.assert_allclose(new["lower"], new["quantiles"][:, 0] - found["thresholds"] - tie, rtol=1e-9)
        np.testing.assert_allclose(new["upper"], new["quantiles"][:, 1] + found["thresholds"] + tie, rtol=1e-9)
        inside = (new["lower"] <= new["y"]) & (new["y"] <= new["upper"])
        assert (inside.mean(0) > 0.8 - 4 * math.sqrt(0.16 * (1 / 59 + 1 / 101))).all()
    assert attributes["calibration_level"] == 0.8 and attributes["calibration_num_examples"] == 59


METHODS = ["--scaling", "vector", "--sets", "raps", "--raps_penalty", "0.05", "--raps_rank", "1"]


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_the_other_methods_in_predictions_and_in_an_evaluation(kind, run, tmp_path, capsys):
    """Vector scaling, regularised sets, the noise scale: the metrics are those of what is predicted."""
    run_dir, options = run(kind), ["--dtype", "float64", "--calibration", "true"]
    assert main(["calibrate", str(run_dir), "--level", "0.8", *(METHODS if kind == "classes" else [])]) == 0
    found = json.loads((run_dir / "calibration.json").read_text())
    before, _ = predicted(run_dir, tmp_path / "before.h5", "--dtype", "float64")
    new, attributes = predicted(run_dir, tmp_path / "p.h5", *options, "--quantiles", "[0.05, 0.95]")
    capsys.readouterr()
    assert main(["evaluate", str(run_dir), *options]) == 0
    content = json.loads((run_dir / "evaluation.json").read_text())
    metrics, y = content["metrics"], new["y"]
    assert content["calibrated"] and "nll" in capsys.readouterr().out
    if kind == "classes":
        w, b = np.array(found["vector"])
        p = before["probabilities"] ** w * np.exp(b)
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(new["calibrated_probabilities"], p, rtol=1e-9)
        scores = set_scores(torch.from_numpy(before["probabilities"]), "raps", 0.05, 1).numpy()
        assert np.array_equal(new["in_set"], scores <= found["thresholds"]) and attributes["calibration_sets"] == "raps"
        rows = np.arange(len(y)), y
        assert metrics["nll"] == pytest.approx(-np.log(p[rows]).mean(), rel=1e-9)
        assert metrics["set_coverage"] == pytest.approx(new["in_set"][rows].mean(), rel=1e-12)
        assert metrics["set_size"] == pytest.approx(new["in_set"].sum(1).mean(), rel=1e-12)
    else:
        factors = np.array(found["noise_factors"])
        assert factors.shape == (2,) and np.array_equal(attributes["noise_factors"], factors)
        variance = factors**2 * before["aleatoric_std"] ** 2 + before["epistemic_std"] ** 2
        np.testing.assert_allclose(new["calibrated_std"], np.sqrt(variance), rtol=1e-9)
        low, high = new["calibrated_quantiles"].swapaxes(0, 1)
        assert metrics["coverage_90"] == pytest.approx(((low <= y) & (y <= high)).mean(), rel=1e-9)
        assert metrics["width_90"] == pytest.approx((high - low).mean(), rel=1e-6)
        inside = (new["lower"] <= y) & (y <= new["upper"])
        assert metrics["interval_coverage"] == pytest.approx(inside.mean(), rel=1e-12)
        assert metrics["interval_width"] == pytest.approx((new["upper"] - new["lower"]).mean(), rel=1e-9)
        assert np.array_equal(before["std"], new["std"])
        plain = json.loads((run_dir / "summary.json").read_text())
        assert metrics["nll"] < plain["test/nll"]  # a network of four epochs is unsure
    assert main(["evaluate", str(run_dir), "--dtype", "float64", "--output", str(tmp_path / "plain.json")]) == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert not plain["calibrated"] and not {"set_size", "interval_width"} & plain["metrics"].keys()
    assert plain["metrics"]["nll"] > metrics["nll"]


def test_each_point_of_a_field_has_a_set_of_its_own(tmp_path, monkeypatch):
    """As `numbers` have thresholds; the temperature is that of all points. One point never has a class."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), rng.integers(0, 3, (40, 2, 3))
    y[:, 1, 1] = y[:7, 0, 2] = -1
    write_shards(tmp_path, {"train": (x, y)}, name="toy", source="here", licence="none", num_classes=3, ignore_index=-1)
    likelihood, data = Categorical(3, ignore_index=-1), ShardDataset(tmp_path, "train", dtype=torch.float64)
    with Key(0, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(6, 18), nn.Unflatten(1, (3, 2, 3))).double()
    posterior = MeanFieldGaussian(net, init_std=0.3)
    options = {"level": 0.8, "num_samples": 4, "scaling": "vector", "score": "aps"}
    found = calibrate_dataset(posterior, likelihood, ONE, data, **options)
    p = predict_classes(posterior, likelihood, ONE, data.fetch(slice(None))[0], num_samples=4).probabilities
    y = torch.from_numpy(y)
    for row, column in itertools.product(range(2), range(3)):
        there = y[:, row, column] >= 0
        scores = set_scores(p[there, :, row, column], "aps").gather(1, y[there, row, column][:, None])[:, 0]
        rank = conformal_rank(len(scores), 0.8)
        expected = scores.sort().values[rank - 1] if len(scores) else torch.tensor(math.inf)
        assert found.thresholds[row, column].item() == pytest.approx(expected.item(), rel=1e-12)
    assert (found.num_examples, found.thresholds.shape) == (33, (2, 3)) and not found.holds_everything
    log_p, classes = p.movedim(1, -1)[y >= 0].log(), y[y >= 0]
    assert found.temperature == pytest.approx(fit_temperature(log_p, classes, ONE), rel=1e-9)
    torch.testing.assert_close(found.vector, fit_vector(log_p, classes, found.temperature, ONE), rtol=1e-9, atol=1e-12)
    columns = found.columns_of(ClassPredictive(p, p, p.sum(1)))
    assert columns["in_set"].shape == p.shape and columns["in_set"][:, :, 1, 1].all()
    one = vector_scaled(p[:, :, 0, 1], found.vector)
    torch.testing.assert_close(columns["calibrated_probabilities"][:, :, 0, 1], one, rtol=1e-12, atol=0)
    metrics = evaluate_dataset(posterior, likelihood, ONE, data, num_samples=4, calibration=found).metrics
    inside = columns["in_set"].gather(1, y.clamp_min(0)[:, None])[:, 0][y >= 0].double().mean().item()
    assert metrics["set_coverage"] == pytest.approx(inside, rel=1e-12) and inside >= 0.8
    monkeypatch.setattr(module, "FITTED_NUMBERS", 240)  # of 720: every third point
    fewer = calibrate_dataset(posterior, likelihood, ONE, data, **options)
    assert fewer.temperature != found.temperature and torch.equal(fewer.thresholds, found.thresholds)


def test_an_interval_of_a_point_without_numbers_has_no_end(tmp_path, caplog):
    """Land in a field of the sea, and a point with too few: null in the file, and the others have theirs."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(40, *shape)).astype(np.float32) for shape in ((6,), (2, 2, 3)))
    y[:, 1, 0, 0] = y[3:, 0, 0, 1] = math.nan
    facts = {"name": "toy", "source": "here", "licence": "none", "missing_targets": True}
    splits = dict.fromkeys(("train", "test", "calibration"), (x, y))
    write_shards(tmp_path / "shards", splits, **facts)
    words = ["--data.shards", tmp_path / "shards", "--run_dir", tmp_path / "run", "--num_epochs", 1]
    words += [
        "--model.name",
        f"{__name__}.Fields",
        "--global_batch_size",
        20,
        "--num_samples",
        2,
        "--num_test_samples",
        3,
    ]
    assert main(["train", *map(str, words)]) == main(["calibrate", str(tmp_path / "run"), "--level", "0.8"]) == 0
    found = json.loads((tmp_path / "run/calibration.json").read_text())
    assert found["thresholds"][1][0][0] is None is found["thresholds"][0][0][1] and found["num_examples"] == 40
    assert "1 of 12 targets have too few examples for the level 0.8" in caplog.text
    new, _ = predicted(tmp_path / "run", tmp_path / "p.h5", "--calibration", "true")
    assert np.isinf(new["upper"][:, 1, 0, 0]).all() and np.isfinite(new["upper"]).sum() == 40 * 10
    assert main(["evaluate", str(tmp_path / "run"), "--calibration", "true", "--references", "climatology"]) == 0
    metrics = json.loads((tmp_path / "run/evaluation.json").read_text())["metrics"]
    assert metrics["interval_coverage"] >= 0.8 and "interval_width" not in metrics  # one is infinite
    assert math.isfinite(metrics["crps_skill/climatology"])


class Fields(nn.Module):
    def __init__(self, in_shape, num_outputs, places=()):
        super().__init__()
        self.form = (num_outputs, *places)
        self.linear = nn.Linear(in_shape[0], math.prod(self.form))

    def forward(self, x):
        return self.linear(x).unflatten(1, self.form)


def test_the_density_after_the_calibration_is_that_of_the_rescaled_mixture():
    """Joint over the targets that are there."""
    mixture, y, present = noise_of(GaussianMixture, 1.0, np.random.default_rng(0), missing=0.3)
    mixture, y, present = mixture.map(lambda c: c.movedim(2, 1)), y.T, present.T
    zeros, factors = torch.zeros_like(y), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    found = Calibration(INTERVALS, 0.9, 9, torch.zeros(3), noise_factors=factors)
    share = Share(mixture.map(lambda c: c.flatten(1)), TargetShares(ONE, 4, y.shape))
    predictive = ValuePredictive(zeros, zeros + 4, zeros + 9, share=share)
    got = found.applied(predictive, torch.where(present, y, 0), present)
    normal = torch.distributions.Normal(mixture.components[0], mixture.components[1] * factors)
    expected = torch.where(present, normal.log_prob(torch.where(present, y, 0)), 0).sum(2).logsumexp(0) - math.log(4)
    torch.testing.assert_close(got.log_prob, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.variance, 4 * factors.square() + 9 + zeros)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_calibration_of_the_first_format_is_read(kind, run, tmp_path):
    run_dir = run(kind)
    assert main(["calibrate", str(run_dir)]) == 0
    path = run_dir / "calibration.json"
    content = json.loads(path.read_text())
    assert content["format"] == 2
    former = {name: v for name, v in content.items() if name not in ("vector", "sets", "raps", "noise_factors")}
    path.write_text(json.dumps(former | {"format": 1}))
    new, _ = predicted(run_dir, tmp_path / "p.h5", "--calibration", "true")
    assert ("in_set" in new) == (kind == "classes") and "calibrated_std" not in new


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_loaded_run_applies_its_calibration(kind, run, shards, tmp_path):
    run_dir = run(kind)
    assert main(["calibrate", str(run_dir), "--which", "best", *(METHODS if kind == "classes" else [])]) == 0
    x = h5py.File(next((shards / kind).glob("*test*.h5")))["x"][()]
    got = hpc_bnn.load(run_dir).predict(x, calibrated=True)
    expected, _ = predicted(run_dir, tmp_path / "p.h5", "--which", "best", "--calibration", "true", "--quantiles", "[]")
    names = {"classes": ["calibrated_probabilities", "in_set"], "numbers": ["lower", "upper", "calibrated_std"]}[kind]
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
    assert not set(names) & hpc_bnn.load(run_dir).predict(x).keys()
    with pytest.raises(ConfigError, match="num_samples"):
        hpc_bnn.load(run_dir).predict(x, num_samples=3, calibrated=True)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_too_few_examples_hold_everything_and_it_is_said(kind, run, tmp_path, caplog):
    run_dir = run(kind)
    assert main(["calibrate", str(run_dir), "--split", "few"]) == 0
    assert "3 examples are too few for the level 0.9" in caplog.text
    assert json.loads((run_dir / "calibration.json").read_text())["thresholds"] is None
    new, _ = predicted(run_dir, tmp_path / "p.h5", "--calibration", "true")
    if kind == "classes":
        assert (new["in_set"] == 1).all()
    else:
        assert (new["lower"] == -np.inf).all() and (new["upper"] == np.inf).all()
    assert main(["calibrate", str(run_dir), "--split", "few", "--level", "0.75"]) == 0  # three of four
    assert json.loads((run_dir / "calibration.json").read_text())["thresholds"] is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--split", "train"], "--split train: the network was trained on it"),
        (["--split", "train", "--half", "true"], "--split train: the network was trained on it"),
        (["--split", "validation"], "--split validation: it judged the checkpoints of this run"),
        (["--split", "validation", "--data.validation_split", "null"], "--split validation: it judged"),
        (["--split", "nowhere"], "--split nowhere: the data have the splits train, validation"),
        (["--level", "1"], "--level 1.0: must be above 0 and below 1"),
        (["--sets", "raps", "--raps_penalty", "-1"], "--raps_penalty -1.0: must be 0 or more"),
    ],
    ids=" ".join,
)
def test_what_cannot_calibrate_is_refused(words, said, run, capsys):
    run_dir = run()
    assert main(["calibrate", str(run_dir), *words]) == 2
    assert said in capsys.readouterr().err and not (run_dir / "calibration.json").exists()


def test_methods_of_classes_are_refused_for_numbers(runs, run, capsys, monkeypatch):
    for words in (["--scaling", "vector"], ["--sets", "aps"]):
        assert main(["calibrate", str(runs["numbers"]), *words]) == 2
        assert f"{' '.join(words)}: it is for classes, and the targets are numbers" in capsys.readouterr().err
    monkeypatch.setattr(module, "MAX_VECTOR_CLASSES", 2)
    assert main(["calibrate", str(run()), "--scaling", "vector"]) == 2
    assert "--scaling vector: it takes at most 2 classes, and there are 3. Use temperature" in capsys.readouterr().err


def test_a_calibration_that_is_judged_by_its_own_examples_is_said(run, caplog):
    run_dir, words = run(), ["--calibration", "true", "--check_up", "false"]
    for split, said in (("calibration", False), ("test", True)):
        assert main(["calibrate", str(run_dir), "--split", split]) == main(["evaluate", str(run_dir), *words]) == 0
        assert ("made with the split test: its coverage there is not that of new examples" in caplog.text) == said


@pytest.mark.parametrize("options", [("--data.validation_split", "null"), ("--checkpoint.metric", "test/nll")])
def test_the_test_split_is_refused_where_it_judged(options, shards, tmp_path, capsys):
    run_dir = train(shards / "classes", tmp_path / "run", *options)
    assert main(["calibrate", str(run_dir), "--split", "test"]) == 2
    assert "--split test: it judged the checkpoints" in capsys.readouterr().err
    assert main(["calibrate", str(run_dir), "--split", "validation"]) == 0


def test_splits_of_other_data_have_judged_nothing(run, shards, tmp_path):
    x = np.random.default_rng(5).normal(size=(40, 3))
    facts = {"name": "other", "source": "test", "licence": "none", "num_classes": 3}
    write_shards(tmp_path / "other", {"train": (x, x.argmax(1)), "validation": (x, x.argmax(1))}, **facts)
    assert main(["calibrate", str(run()), "--data.shards", str(tmp_path / "other"), "--split", "validation"]) == 0


def test_half_of_a_split_is_keyed(run):
    run_dir, found = run(), []
    for seed in ("0", "0", "1"):
        words = ["--split", "validation", "--half", "true", "--seed", seed]
        assert main(["calibrate", str(run_dir), *words]) == 0
        found.append(json.loads((run_dir / "calibration.json").read_text()))
    assert found[0] == found[1] and found[0]["thresholds"] != found[2]["thresholds"]
    assert found[0]["num_examples"] == 30 and found[0]["half"] and found[0]["judged_checkpoints"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"run": "0" * 16}, "was made with run 0000"),
        ({"num_steps": 1}, "was made with num_steps 1, and this is 8"),
        ({"num_samples": 4}, "was made with num_samples 4, and this is 5"),
        ({"seed": 4}, "was made with seed 4, and this is 0"),
    ],
    ids=str,
)
def test_the_calibration_of_something_else_is_refused(change, said, run, tmp_path, capsys):
    run_dir = run()
    assert main(["calibrate", str(run_dir)]) == 0
    path = run_dir / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["predict", str(run_dir), "--output", str(tmp_path / "p.h5"), "--calibration", "true"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "p.h5").exists()


def test_a_calibration_that_is_not_there_is_said(run, tmp_path, capsys):
    words = ["predict", str(run()), "--output", str(tmp_path / "p.h5"), "--calibration", "true"]
    assert main(words) == 2
    assert "calibration.json is missing. Make it with hpc-bnn calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        "not JSON",
        "[]",
        "[" * 100_000,
        {"format": 3},
        {"vector": [[1.0, 1.0]]},
        {"vector": [[1.0, 1.0, math.nan], [0.0, 0.0, 0.0]]},
        {"sets": "all"},
        {"raps": [-1.0, 0]},
        {"noise_factors": [1.0, 1.0]},
        {"noise_factors": ...},
        {"method": INTERVALS},
        {"level": 1.5},
        {"level": "high"},
        {"num_examples": 0},
        {"num_examples": 3},
        {"temperature": None},
        {"temperature": math.nan},
        {"thresholds": [0.1, 0.2]},
        {"thresholds": "0.1"},
        {"thresholds": math.nan},
        {"thresholds": None},
        {"num_steps": ...},
    ],
    ids=lambda change: str(change)[:30],
)
def test_a_calibration_of_another_format_is_refused(change, run, tmp_path):
    run_dir = run()
    assert main(["calibrate", str(run_dir), "--which", "best"]) == 0
    path = run_dir / "calibration.json"
    if isinstance(change, dict):
        content = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))
    else:
        path.write_text(change)
    with pytest.raises(DataError, match=r"calibration\.json is no calibration of this network"):
        hpc_bnn.load(run_dir).predict(np.zeros((2, 3)), calibrated=True)


def test_a_directory_in_the_way_is_said_before_anything_is_computed(run, capsys, monkeypatch):
    run_dir = run()
    (run_dir / "calibration.json").mkdir()
    monkeypatch.setattr("hpc_bnn.run.calibrate.calibrate_dataset", None)
    assert main(["calibrate", str(run_dir)]) == 1
    assert "calibration.json cannot be written (Is a directory)" in capsys.readouterr().err


def test_what_is_no_number_calibrates_nothing(run, shards):
    predictor = hpc_bnn.load(run("numbers"))
    with torch.no_grad():
        for parameter in predictor.posterior.parameters():
            parameter.fill_(math.nan)
    data = ShardDataset(shards / "numbers", "calibration", normalises_targets=True)
    with pytest.raises(DataError, match="no finite number"):
        module.calibrate_dataset(predictor.posterior, predictor.likelihood, ONE, data, level=0.9, num_samples=2)
