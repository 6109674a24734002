"""The predictive in one process, against references."""

import functools
import math

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
from sklearn.metrics import accuracy_score, average_precision_score, jaccard_score, log_loss, roc_auc_score, roc_curve
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from hpc_bnn import (
    Bernoulli,
    Categorical,
    Gaussian,
    Grid,
    GridComm,
    Implicit,
    MeanFieldGaussian,
    Poisson,
    ShardDataset,
    TensorSource,
    VariationalStep,
    predict_values,
    write_shards,
)
from hpc_bnn.errors import DataError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.predictive import calibrate_dataset
from hpc_bnn.predictive import evaluation as evaluate
from hpc_bnn.predictive.evaluation import evaluate_dataset, out_of_distribution_metrics, predict_classes
from hpc_bnn.predictive.metrics import adaptive_calibration_error, area_under_risk_coverage, risk_coverage


def make_posterior(dropout=0.0):
    with Key(0, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(dropout)).double()
    return MeanFieldGaussian(net, init_std=0.5)


def test_predictive_is_the_mean_of_probabilities_and_its_parts_add_up():
    posterior, x = make_posterior(), torch.linspace(-1, 1, 5 * 64, dtype=torch.float64).view(5, 1, 8, 8)
    got = predict_classes(posterior, Categorical(10), GridComm(Grid()), x, num_samples=7, seed=2, batch_size=2)
    members = []
    posterior.begin_()
    for sample in range(7):
        posterior.draw_(Key(2, Stream.PREDICTION, sample=sample))
        members.append(torch.softmax(posterior.network(x).detach(), -1))
    members = torch.stack(members)  # [S, B, C]
    torch.testing.assert_close(got.probabilities, members.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.std, members.std(0, correction=0), rtol=1e-6, atol=1e-9)
    expected_entropy = -(members * members.log()).sum(-1).mean(0)
    torch.testing.assert_close(got.expected_entropy, expected_entropy, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.entropy, -(members.mean(0) * members.mean(0).log()).sum(-1))
    assert (got.mutual_information > 0.01).all()  # scales of 0.5: the members disagree
    torch.testing.assert_close(got.mutual_information, got.entropy - expected_entropy)


def test_modules_are_evaluated_in_eval_mode_and_put_back():
    posterior = make_posterior(dropout=0.9)
    x = torch.ones(2, 1, 8, 8, dtype=torch.float64)
    posterior.module.train()
    first, second = (predict_classes(posterior, Categorical(10), GridComm(Grid()), x, num_samples=2) for _ in range(2))
    assert torch.equal(first.probabilities, second.probabilities)
    assert posterior.module.training


def test_metrics_equal_scikit_learn(digits, monkeypatch):
    posterior, comm, dataset = (make_posterior(), GridComm(Grid()), ShardDataset(digits, "test", dtype=torch.float64))
    seen = []
    monkeypatch.setattr(evaluate, "BLOCK_BYTES", 100 * 64 * 8)  # four blocks
    found = evaluate_dataset(
        posterior, Categorical(10), comm, dataset, num_samples=5, see=lambda *block: seen.append(block)
    )
    metrics, curve = found.metrics, found.curves["risk_coverage"]
    assert [len(examples) for examples, _, _ in seen] == [100, 100, 100, 59]
    assert torch.cat([examples for examples, _, _ in seen]).tolist() == list(range(359))
    _, y = dataset.fetch(slice(None))
    p = torch.cat([predictive.probabilities for _, predictive, _ in seen]).numpy()
    assert metrics["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)), rel=1e-14)
    assert metrics["nll"] == pytest.approx(log_loss(y, p), rel=1e-10)
    assert metrics["brier"] == pytest.approx(np.square(p - np.eye(10)[y]).sum(1).mean(), rel=1e-12)
    reference = MulticlassCalibrationError(num_classes=10, n_bins=15)(torch.from_numpy(p).double(), y)
    assert metrics["ece"] == pytest.approx(reference.item(), rel=1e-5)
    by_class = [BinaryCalibrationError(15)(torch.from_numpy(p[:, c]), y == c).item() for c in range(10)]
    assert metrics["classwise_ece"] == pytest.approx(np.mean(by_class), rel=1e-5)
    entropy = torch.cat([predictive.entropy for _, predictive, _ in seen]).numpy()
    order = entropy.argsort()  # no ties
    risks = (p.argmax(1) != y.numpy())[order].cumsum() / np.arange(1, 360)
    assert metrics["aurc"] == pytest.approx(risks.mean(), rel=1e-12)
    places = [math.ceil(359 * k / 50) for k in range(1, 51)]
    np.testing.assert_allclose(curve["coverage"], np.array(places) / 359, rtol=1e-12)
    np.testing.assert_allclose(curve["risk"], risks[np.array(places) - 1], rtol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (4, 5)], ids=["sequence", "field"])
def test_metrics_of_fields_of_classes_equal_scikit_learn(tmp_path, shape):
    """All points count alike; class 3 of 5 occurs nowhere."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 6)), rng.choice([0, 1, 2, 4], (30, *shape))
    write_shards(tmp_path, {"train": (x, y)}, name="toy", source="here", licence="none", num_classes=5)
    net = nn.Sequential(nn.Linear(6, 5 * math.prod(shape)), nn.Unflatten(1, (5, *shape))).double()
    with torch.no_grad():
        net[0].bias.view(5, -1)[3] = -100.0
    posterior, dataset = MeanFieldGaussian(net, init_std=0.2), ShardDataset(tmp_path, "train", dtype=torch.float64)
    found = evaluate_dataset(posterior, Categorical(5), GridComm(Grid()), dataset, num_samples=6)
    p = predict_classes(posterior, Categorical(5), GridComm(Grid()), dataset.fetch(slice(None))[0], num_samples=6)
    points, truth = p.probabilities.movedim(1, -1).reshape(-1, 5).numpy(), y.reshape(-1)
    said = points.argmax(1)
    assert found.metrics["accuracy"] == pytest.approx(accuracy_score(truth, said), rel=1e-12)
    assert found.metrics["nll"] == pytest.approx(log_loss(truth, points, labels=range(5)), rel=1e-9)
    assert found.metrics["mean_iou"] == pytest.approx(jaccard_score(truth, said, average="macro"), rel=1e-12)
    by_class = jaccard_score(truth, said, average=None, labels=[0, 1, 2, 4])
    assert found.curves["overlap"]["iou"] == pytest.approx([*by_class[:3], None, by_class[3]])
    brier = np.square(points - np.eye(5)[truth]).sum(1).mean()
    assert found.metrics["brier"] == pytest.approx(brier, rel=1e-9) and "adaptive_ece" not in found.metrics
    by_class = [BinaryCalibrationError(15)(*map(torch.from_numpy, (points[:, c], truth == c))).item() for c in range(5)]
    assert found.metrics["classwise_ece"] == pytest.approx(np.mean(by_class), rel=1e-5)
    losses = (said != truth).reshape(30, -1).mean(1)[p.entropy.flatten(1).mean(1).argsort().numpy()]
    assert found.metrics["aurc"] == pytest.approx((losses.cumsum() / np.arange(1, 31)).mean(), rel=1e-12)
    for name, value in (("entropy", p.entropy), ("mutual_information", p.mutual_information)):
        torch.testing.assert_close(found.uncertainties[name], value.flatten(1).mean(1), rtol=1e-10, atol=1e-12)


def test_total_variance_is_aleatoric_plus_epistemic():
    """Law of total variance, against the variance of draws of y from the mixture over the samples."""
    with Key(0, Stream.INIT).global_generator():
        net = nn.Linear(3, 4).double()
    posterior, likelihood = MeanFieldGaussian(net, init_std=0.4), Gaussian(2)
    generator = Key(0, Stream.DATA_ORDER).generator()
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    got = predict_values(posterior, likelihood, GridComm(Grid()), x, y, num_samples=9, seed=1, batch_size=4)
    members = []
    posterior.begin_()
    for sample in range(9):
        posterior.draw_(Key(1, Stream.PREDICTION, sample=sample))
        members.append(posterior.network(x).detach())
    loc, scale = torch.stack(members)[..., :2], torch.stack(members)[..., 2:].exp()
    torch.testing.assert_close(got.mean, loc.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.aleatoric_variance, scale.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.epistemic_variance, loc.var(0, correction=0), rtol=1e-10, atol=0)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(9, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal(loc.movedim(0, 1), scale.movedim(0, 1)), 1),
    )
    torch.testing.assert_close(got.variance, mixture.variance, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.log_prob, mixture.log_prob(y), rtol=1e-12, atol=0)


def test_metrics_are_in_units_of_y_where_the_network_sees_normalised_targets(tmp_path):
    """Against a network whose last layer is rescaled by hand, on the same shards read without normalisation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)).astype(np.float64)
    y = np.stack([300 + 20 * x[:, 0], -5 + 0.1 * x[:, 1] + 0.01 * rng.normal(size=40)], axis=1)
    write_shards(tmp_path, {"train": (x, y)}, name="toy", source="test", licence="none")
    normalised, plain = (
        ShardDataset(tmp_path, "train", dtype=torch.float64, normalises_targets=on) for on in (True, False)
    )
    mean, std = (part.squeeze(0) for part in normalised.target_scale)
    torch.testing.assert_close(mean, torch.from_numpy(y.mean(0)))
    torch.testing.assert_close(std, torch.from_numpy(y.std(0)))
    assert plain.target_scale is None and torch.equal(plain.fetch(slice(None))[1], torch.from_numpy(y))

    class InUnits(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            loc, log_scale = self.net(x).chunk(2, dim=1)
            return torch.cat([loc * std + mean, log_scale + std.log()], dim=1)

    def make_net():
        with Key(0, Stream.INIT).global_generator():
            return nn.Linear(3, 4).double()

    got, expected = (
        evaluate_dataset(MeanFieldGaussian(net, init_std=0.3), Gaussian(2), GridComm(Grid()), data, num_samples=5)
        for net, data in ((make_net(), normalised), (InUnits(make_net()), plain))
    )
    assert got.metrics == pytest.approx(expected.metrics, rel=1e-9) and got.metrics["rmse"] > 1


@pytest.mark.parametrize("form", [(), (4,), (1, 4), (4, 1, 1), (1, 4, 1, 1), (5, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("num_samples", [4, 3], ids=["as_many_as_targets", "fewer"])
def test_units_are_those_of_targets_not_of_samples(form, num_samples):
    """Standard deviations of 4 targets, whatever form they have: with 4 samples a wrong dim would be no error."""
    torch.manual_seed(0)
    shape = (5, 4, 2, 3) if len(form) != 2 and form != (4,) else (5, 4)
    posterior, likelihood = (
        MeanFieldGaussian(nn.Linear(6, math.prod(shape[1:])).double(), init_std=0.3),
        Gaussian(4, 0.7),
    )
    posterior.module.register_forward_hook(lambda _, __, out: out.view(-1, *shape[1:]))
    x, y = torch.randn(5, 6).double(), torch.randn(shape).double()
    options = {"num_samples": num_samples, "keep_members": True}
    predictive = predict_values(posterior, likelihood, GridComm(Grid()), x, y, **options)
    mean, std = torch.randn(form).double(), torch.rand(form).double() + 0.5
    got = predictive.in_units(mean, std)
    mean, std = (number.expand(shape) for number in (mean, std))
    torch.testing.assert_close(got.mean, predictive.mean * std + mean)
    torch.testing.assert_close(got.variance, predictive.variance * std.square())
    for sample in range(num_samples):
        torch.testing.assert_close(got.members[:, sample], predictive.members[:, sample] * std + mean)
    torch.testing.assert_close(got.log_prob, predictive.log_prob - std.log().flatten(1).sum(1))
    median = predictive.mixture.quantile(0.5) * std + mean
    torch.testing.assert_close(got.mixture.quantile(0.5), median, rtol=1e-6, atol=1e-6)


MISFITS = {
    "classes": (Categorical(3), torch.arange(40) % 3, [-100, -1, 3, 255]),
    "probabilities": (Categorical(3), torch.full((40, 3), 1 / 3), [2.0, -0.1, math.nan, 0.9]),
    "yes and no": (Bernoulli(3), torch.ones(40, 3), [9.0, -1.0, math.nan]),
    "counts": (Poisson(3), torch.ones(40, 3), [0.5, -1.0, math.inf, math.nan]),
    "numbers": (Gaussian(3, 1.0), torch.ones(40, 3), [math.inf, math.nan]),
}


@pytest.mark.parametrize("where", [0, 17, 39])
@pytest.mark.parametrize("kind", [kind for kind in MISFITS if kind != "probabilities"])
def test_a_target_that_nothing_has_is_found_wherever_it_stands(kind, where):
    likelihood, y, values = MISFITS[kind]
    posterior = MeanFieldGaussian(nn.Linear(2, 3))
    for value in values:
        wrong = y.clone()
        wrong[where] = value
        source = TensorSource(torch.randn(40, 2), wrong, likelihood.num_classes)
        with pytest.raises(DataError, match=rf"a target is {value:g}, and the likelihood"):
            evaluate_dataset(posterior, likelihood, GridComm(Grid()), source, num_samples=2)
        if not likelihood.num_classes:
            with pytest.raises(DataError, match=rf"a target is {value:g}, and the likelihood"):
                predict_values(posterior, likelihood, GridComm(Grid()), torch.randn(40, 2), wrong, num_samples=2)


@pytest.mark.parametrize("judge", [evaluate_dataset, functools.partial(calibrate_dataset, level=0.5)])
def test_probabilities_of_classes_have_a_loss_and_no_metrics(judge):
    likelihood, y, _ = MISFITS["probabilities"]
    with pytest.raises(DataError, match=r"probabilities of classes, .* Give y.argmax\(1\)"):
        source = TensorSource(torch.randn(40, 2), y)
        judge(MeanFieldGaussian(nn.Linear(2, 3)), likelihood, GridComm(Grid()), source, num_samples=2)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("kind", MISFITS)
def test_targets_are_checked_in_every_batch(kind, batch, micro_batch_size):
    likelihood, y, values = MISFITS[kind]
    for value in values:
        posterior = MeanFieldGaussian(nn.Linear(2, 3))
        optimizer = torch.optim.Adam(posterior.parameters())
        step = VariationalStep(
            posterior, likelihood, optimizer, GridComm(Grid()),
            num_samples=2, num_train_examples=40, micro_batch_size=micro_batch_size,
        )  # fmt: skip
        wrong, x = y.clone(), torch.randn(40, 2)
        wrong[10 * batch + 7] = value
        for number in range(batch):
            step(x[:10], wrong[10 * number : 10 * number + 10], 10)
        before = [p.detach().clone() for p in posterior.parameters()]
        with pytest.raises(DataError, match=rf"a target is {value:g} on rank 0 in step {batch}, and the likelihood"):
            step(x[:10], wrong[10 * batch : 10 * batch + 10], 10)
        assert all(map(torch.equal, before, posterior.parameters())) and step.num_steps == batch
        step(x[:10], y[:10], 10)  # a caller may go on without the example


def test_a_batch_that_was_overwritten_after_a_misfit_is_said(monkeypatch):
    """On a GPU the host sees two steps later that a target was none; then no rank may find it in its tensors."""
    posterior = MeanFieldGaussian(nn.Linear(2, 3))
    optimizer = torch.optim.Adam(posterior.parameters())
    step = VariationalStep(posterior, Categorical(3), optimizer, GridComm(Grid()), num_samples=2, num_train_examples=40)
    monkeypatch.setattr(step.comm, "gather_objects", lambda found: [None])
    with pytest.raises(DataError, match=r"a target or a weight of step 0 cannot be\. The batch has been overwritten"):
        step(torch.randn(3, 2), torch.tensor([0, 1, 7]), 3)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_of_numbers_equal_the_references_on_gathered_predictions(tmp_path, weighted):
    """scoringrules, torchmetrics and numpy on the components of all samples, in units of y, by channel and together."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 3))
    y = rng.normal(size=(30, 2, 4)) * np.array([[3.0], [200.0]]) + x[:, :1, None]
    weights = np.array([0.5, 1.0, 1.5, 1.0]) if weighted else None
    facts = {"name": "toy", "source": "test", "licence": "none", "channels": {"y": ["t", "z"]}}
    write_shards(tmp_path, {"train": (x, y)}, target_weights=weights, **facts)
    dataset = ShardDataset(tmp_path, "train", dtype=torch.float64)
    with Key(0, Stream.INIT).global_generator():
        net = nn.Sequential(nn.Linear(3, 16), nn.Unflatten(1, (4, 4))).double()
    posterior, likelihood, comm = MeanFieldGaussian(net, init_std=0.2), Gaussian(2), GridComm(Grid())
    evaluation = evaluate_dataset(posterior, likelihood, comm, dataset, num_samples=6)
    got, channels = evaluation.metrics, evaluation.curves["channels"]

    outputs, (inputs, _) = [], dataset.fetch(slice(None))
    posterior.begin_()
    for sample in range(6):
        posterior.draw_(Key(0, Stream.PREDICTION, sample=sample))
        outputs.append(posterior.network(inputs).detach())
    mean, std = (part.numpy() for part in dataset.target_scale)
    outputs = torch.stack(outputs, -1).numpy()  # [B, 2 * channels, places, K]
    loc, scale = outputs[:, :2] * std[..., None] + mean[..., None], np.exp(outputs[:, 2:]) * std[..., None]
    error = loc.mean(-1) - y

    def average(values):
        return np.average(values, axis=-1, weights=weights).mean(0)  # by channel

    def check(name, values, root=False):
        by_channel = average(values)
        finish = np.sqrt if root else (lambda value: value)
        np.testing.assert_allclose(channels[name], finish(by_channel), rtol=1e-9)
        assert got[name] == pytest.approx(float(finish(by_channel.mean())), rel=1e-9)

    assert channels["name"] == ["t", "z"]
    check("rmse", error**2, root=True)
    check("mae", np.abs(error))
    check("crps", scoringrules.crps_mixnorm(y, loc, scale))
    total = average_of_each(np.sqrt((scale**2).mean(-1) + loc.var(-1)), weights)
    losses = average_of_each(np.abs(error), weights)[total.argsort()]
    assert got["aurc"] == pytest.approx((losses.cumsum() / np.arange(1, 31)).mean(), rel=1e-9)
    assert evaluation.curves["risk_coverage"]["risk"][-1] == pytest.approx(got["mae"], rel=1e-12)
    spread = (scale**2).mean(-1) + 7 / 5 * loc.var(-1)
    assert got["spread_skill"] == pytest.approx(np.sqrt(average(spread).mean()) / got["rmse"], rel=1e-9)
    if not weighted:
        predicted, true = torch.from_numpy(loc.mean(-1)), torch.from_numpy(y)
        assert got["rmse"] == pytest.approx(MeanSquaredError(squared=False)(predicted, true).item(), rel=1e-5)
    cdf = scipy.stats.norm(loc, scale).cdf(y[..., None]).mean(-1)
    spans = np.broadcast_to(1.0 if weights is None else weights, cdf.shape)
    for level in (0.5, 0.9, 0.95):
        inside = (cdf >= (1 - level) / 2) & (cdf < (1 + level) / 2)
        expected = np.average(inside, weights=spans)
        assert got[f"coverage_{100 * level:.0f}"] == pytest.approx(expected, rel=1e-9)
        ends = [quantile_of_mixture(loc, scale, end) for end in ((1 - level) / 2, (1 + level) / 2)]
        assert got[f"width_{100 * level:.0f}"] == pytest.approx(average(ends[1] - ends[0]).mean(), rel=1e-6)
    levels = np.arange(1, 200) / 200
    reached = np.array([np.average(cdf < level, weights=spans) for level in levels])
    assert got["calibration_error"] == pytest.approx(np.abs(reached - levels).mean(), rel=1e-9)
    histogram = np.histogram(cdf, bins=np.linspace(0, 1, 21), weights=spans)[0]
    np.testing.assert_allclose(evaluation.curves["pit"], histogram / spans.sum(), atol=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "least"), [(Implicit(3), 0.0), (Poisson(3), 0.9), (Bernoulli(3), 0.9), (Gaussian(3, 1.0), 0.8)]
)
def test_coverage_is_that_of_the_intervals_that_are_predicted(likelihood, least):
    """Few members hold less than a level says, counts more: the PIT has the level in each case, the interval not."""
    with Key(0, Stream.INIT).global_generator():
        posterior = MeanFieldGaussian(nn.Linear(3, 3).double(), init_std=0.3)
        x = torch.randn(200, 3, dtype=torch.float64)
    options = {"num_samples": 5, "seed": 3}
    draws = predict_values(posterior, likelihood, GridComm(Grid()), x, keep_members=True, **options)
    y = {Poisson: draws.mean.round(), Bernoulli: (draws.mean > 0.5).double()}.get(type(likelihood), draws.mean.clone())
    y[::3] += 9 * (least == 0)
    source = TensorSource(x, y).on("cpu", torch.float64)
    found = evaluate_dataset(posterior, likelihood, GridComm(Grid()), source, **options)
    for percent, level in evaluate.INTERVALS.items():
        low, high = (draws.quantile((1 + side * level) / 2) for side in (-1, 1))
        inside = ((low <= y) & (y <= high)).double().mean(0)
        assert found.metrics[f"coverage_{percent}"] == pytest.approx(inside.mean().item(), rel=1e-12)
        assert found.metrics[f"width_{percent}"] == pytest.approx((high - low).mean().item(), rel=1e-12)
        assert found.curves["channels"][f"coverage_{percent}"] == pytest.approx(inside.tolist(), rel=1e-12)
    assert least <= found.metrics["coverage_95"] and (found.metrics["coverage_95"] < 0.7) == (least == 0)


def average_of_each(values, weights):
    """Return the means [B] over the targets of each example."""
    return np.average(values, axis=-1, weights=weights).mean(1)


def quantile_of_mixture(loc, scale, level):
    """Bisection on the distribution function, [..., K] -> [...]."""
    low, high = (loc - 9 * scale).min(-1), (loc + 9 * scale).max(-1)
    for _ in range(80):
        middle = (low + high) / 2
        is_below = scipy.stats.norm(loc, scale).cdf(middle[..., None]).mean(-1) < level
        low, high = np.where(is_below, middle, low), np.where(is_below, high, middle)
    return low


def test_adaptive_calibration_error_has_bins_of_equal_count():
    rng = np.random.default_rng(0)
    confidence = rng.beta(8, 2, 150)
    correct = rng.uniform(size=150) < confidence**2
    order = np.argsort(confidence)
    bins = [order[i : i + 10] for i in range(0, 150, 10)]
    expected = sum(abs(correct[b].mean() - confidence[b].mean()) for b in bins) / 15
    got = adaptive_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct))
    assert got == pytest.approx(expected, rel=1e-12) and got > 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_risk_and_coverage_are_those_of_every_threshold(weighted):
    """Ties are accepted together, whatever their order, also where rounding tells them apart."""
    rng = np.random.default_rng(0)
    uncertainty, loss = rng.integers(0, 9, 60) / 7, rng.exponential(size=60)
    weights = rng.integers(0, 3, 60) if weighted else np.ones(60)
    rounded = torch.from_numpy(uncertainty * (1 + 1e-15 * rng.integers(-3, 4, 60)))
    accepted = [uncertainty <= threshold for threshold in uncertainty]
    risks = [np.average(loss[a], weights=weights[a]) for a in accepted]
    columns = [rounded, torch.from_numpy(loss), torch.from_numpy(weights).double() if weighted else None]
    coverage, risk = risk_coverage(*columns)
    assert area_under_risk_coverage(coverage, risk) == pytest.approx(np.average(risks, weights=weights), rel=1e-12)
    assert coverage[-1] == 1 and len(coverage) == 9
    order = rng.permutation(60)
    again = risk_coverage(*(None if column is None else column[order] for column in columns))
    torch.testing.assert_close(again, (coverage, risk), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_foreign", [30, 20, 1])
def test_detection_equals_scikit_learn_and_knows_ties(num_foreign, weighted):
    rng = np.random.default_rng(num_foreign)
    inside, outside = rng.normal(size=50).round(1), rng.normal(1.0, size=num_foreign).round(1)
    weights = [rng.integers(0, 4, len(part)) if weighted else None for part in (inside, outside)]
    if weighted:
        weights[1][0] = 2  # one counts
    found = [
        {"entropy": torch.from_numpy(part)} | ({"weight": torch.from_numpy(w).double()} if weighted else {})
        for part, w in zip((inside, outside), weights)
    ]
    got = out_of_distribution_metrics(*found)
    truth, scores = np.repeat([0, 1], [50, num_foreign]), np.concatenate([inside, outside])
    of = {"sample_weight": np.concatenate(weights) if weighted else None}
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False, **of)
    assert got == {
        "ood_auroc/entropy": pytest.approx(roc_auc_score(truth, scores, **of), rel=1e-12),
        "ood_aupr/entropy": pytest.approx(average_precision_score(truth, scores, **of), rel=1e-12),
        "ood_fpr95/entropy": pytest.approx(false[true >= 0.95 - 1e-12][0], rel=1e-12),
    }
