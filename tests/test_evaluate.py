"""The predictive in one process, against references."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from hpc_bnn import (
    Categorical,
    Gaussian,
    Grid,
    GridComm,
    MeanFieldGaussian,
    ShardDataset,
    evaluate,
    predict_values,
    write_shards,
)
from hpc_bnn.evaluate import evaluate_dataset, predict_classes
from hpc_bnn.noise import Stream, keyed_generator, keyed_global_generator


def make_posterior(dropout=0.0):
    with keyed_global_generator(0, Stream.INIT):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(dropout)).double()
    return MeanFieldGaussian(net, init_std=0.5)


def test_predictive_is_the_mean_of_probabilities_and_its_parts_add_up():
    posterior, x = make_posterior(), torch.linspace(-1, 1, 5 * 64, dtype=torch.float64).view(5, 1, 8, 8)
    got = predict_classes(
        posterior, Categorical(10), GridComm(Grid()), x, num_samples=7, seed=2, batch_size=2
    )
    members = []
    posterior.begin()
    for sample in range(7):
        posterior.draw_(sample, lambda s: keyed_generator(2, Stream.PREDICTION, 0, s))
        members.append(torch.softmax(posterior.module(x).detach(), -1))
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
    first, second = (
        predict_classes(posterior, Categorical(10), GridComm(Grid()), x, num_samples=2) for _ in range(2)
    )
    assert torch.equal(first.probabilities, second.probabilities)
    assert posterior.module.training


def test_metrics_equal_scikit_learn(digits, monkeypatch):
    posterior, comm, dataset = (
        make_posterior(),
        GridComm(Grid()),
        ShardDataset(digits, "test", dtype=torch.float64),
    )
    seen = []
    monkeypatch.setattr(evaluate, "BLOCK_BYTES", 100 * 64 * 8)  # four blocks
    metrics = evaluate_dataset(
        posterior, Categorical(10), comm, dataset, num_samples=5, see=lambda *block: seen.append(block)
    ).metrics
    assert [len(examples) for examples, _, _ in seen] == [100, 100, 100, 59]
    assert torch.cat([examples for examples, _, _ in seen]).tolist() == list(range(359))
    _, y = dataset.fetch(slice(None))
    p = torch.cat([predictive.probabilities for _, predictive, _ in seen]).numpy()
    assert metrics["accuracy"] == pytest.approx(
        accuracy_score(y, p.argmax(1)), rel=1e-7
    )  # float32 in torchmetrics
    assert metrics["nll"] == pytest.approx(log_loss(y, p), rel=1e-10)
    assert metrics["brier"] == pytest.approx(np.square(p - np.eye(10)[y]).sum(1).mean(), rel=1e-12)
    reference = MulticlassCalibrationError(num_classes=10, n_bins=15)(torch.from_numpy(p).double(), y)
    assert metrics["ece"] == pytest.approx(reference.item(), rel=1e-5)


def test_total_variance_is_aleatoric_plus_epistemic():
    """Law of total variance, against the variance of draws of y from the mixture over the samples."""
    with keyed_global_generator(0, Stream.INIT):
        net = nn.Linear(3, 4).double()
    posterior, likelihood = MeanFieldGaussian(net, init_std=0.4), Gaussian(2)
    generator = keyed_generator(0, Stream.DATA_ORDER)
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    got = predict_values(posterior, likelihood, GridComm(Grid()), x, y, num_samples=9, seed=1, batch_size=4)
    members = []
    posterior.begin()
    for sample in range(9):
        posterior.draw_(sample, lambda s: keyed_generator(1, Stream.PREDICTION, 0, s))
        members.append(posterior.module(x).detach())
    loc, scale = torch.stack(members)[..., :2], torch.stack(members)[..., 2:].exp()
    torch.testing.assert_close(got.mean, loc.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got.aleatoric_variance, scale.square().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.epistemic_variance, loc.var(0, correction=0), rtol=1e-10, atol=0)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(9, dtype=torch.float64)),
        torch.distributions.Independent(
            torch.distributions.Normal(loc.movedim(0, 1), scale.movedim(0, 1)), 1
        ),
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
        with keyed_global_generator(0, Stream.INIT):
            return nn.Linear(3, 4).double()

    got, expected = (
        evaluate_dataset(
            MeanFieldGaussian(net, init_std=0.3), Gaussian(2), GridComm(Grid()), data, num_samples=5
        )
        for net, data in ((make_net(), normalised), (InUnits(make_net()), plain))
    )
    assert got.metrics == pytest.approx(expected.metrics, rel=1e-9) and got.metrics["rmse"] > 1
