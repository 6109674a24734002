"""Transforms and views: keyed by the example, statistically what they say."""

import math

import pytest
import torch
from scipy import stats

from hpc_bnn import Categorical, Grid, GridComm, MeanFieldGaussian, VariationalStep, write_shards
from hpc_bnn.cli.commands import main
from hpc_bnn.config import AugmentationConfig
from hpc_bnn.data import ArraySpec, Augmentation, Batch, Manifest
from hpc_bnn.data.augment import Crop, Erase, ExampleRandom, Flip, Mask, Mixup, Noise, build_augmentation
from hpc_bnn.errors import ConfigError
from hpc_bnn.noise import Key, Stream
from hpc_bnn.noise.philox import mix64, philox4x32


def random(examples, view=0, transform=0, epoch=0, seed=3):
    return ExampleRandom(seed, epoch, torch.as_tensor(examples), view, transform)


def image(n, channels=2, size=8):
    """Images without zeros, each pixel another number."""
    return torch.arange(1, n * channels * size * size + 1, dtype=torch.float32).view(n, channels, size, size)


# --- random numbers ------------------------------------------------------------------------------------


def test_numbers_are_uniform_and_independent_between_examples_epochs_views_and_transforms():
    examples = torch.arange(20_000)
    keys = [{}, {"view": 1}, {"transform": 1}, {"epoch": 1}, {"seed": 4}]
    numbers = [random(examples, **key).uniform(4) for key in keys]
    numbers.append(numbers[0].roll(1, 0))  # neighbours
    flat = torch.stack([one.flatten() for one in numbers]).double()
    for one in flat:
        assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 5 / math.sqrt(flat.shape[1])  # standard errors
    within = torch.corrcoef(numbers[0].T.double()) - torch.eye(4)  # the numbers of one example
    assert within.abs().max() < 5 / math.sqrt(len(examples))


def test_numbers_of_an_example_do_not_depend_on_the_batch():
    whole = random(torch.arange(100)).uniform(3)
    assert torch.equal(random([7, 3, 99]).uniform(3), whole[[7, 3, 99]])
    both = random([5])
    first, second = both.uniform(2), both.uniform(2)
    assert torch.equal(torch.cat([first, second], 1), random([5]).uniform(4)) and not torch.equal(first, second)


def test_a_row_has_the_numbers_of_its_key():
    """As DESIGN has it, far into a row of a large index: the hash takes one word more, and 24 bits become a number."""
    examples, place = torch.tensor([2**40 + 17, 3]), 1000
    got = Key(12, Stream.AUGMENTATION, path=(9,), step=5).uniform(examples, 1, first=place)
    for row, index in zip(got, examples.tolist()):
        key = mix64(mix64(mix64(mix64(mix64(12) ^ Stream.AUGMENTATION) ^ 1) ^ 9) ^ index)
        words = philox4x32(16 * (place // 64) + place % 16, 0, 5, 0, key & 0xFFFFFFFF, key >> 32)
        assert row.item() == (int(words[place % 64 // 16]) >> 8) / 2**24


def test_uniform_and_normal_numbers_of_one_transform_are_independent():
    """A normal number is made of two words: no other number may have one of them."""
    r = random(torch.arange(20_000))
    numbers = torch.cat([r.uniform(5), r.normal(40), r.uniform(70)], 1).double()
    numbers = torch.cat([numbers, numbers.square()], 1)
    correlation = torch.corrcoef(numbers.T) - torch.eye(len(numbers.T))
    within = torch.arange(len(correlation)) % 115
    assert correlation[within[:, None] != within[None]].abs().max() < 6 / math.sqrt(len(numbers))


def test_normal_numbers_are_normal():
    numbers = random(torch.arange(5000)).normal(3, 5)
    assert numbers.shape == (5000, 3, 5)
    assert stats.kstest(numbers.flatten().double().numpy(), "norm").pvalue > 1e-4


# --- transforms ----------------------------------------------------------------------------------------


def test_crop_shifts_whole_images_and_fills_with_zeros():
    x, n = image(400), 400
    y = Crop(2)(x, random(torch.arange(n)))
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last) | y.is_contiguous()
    shifts = set()
    padded = torch.nn.functional.pad(x, [2] * 4)
    for before, after in zip(padded, y):
        found = [
            (dy, dx) for dy in range(5) for dx in range(5) if torch.equal(before[:, dy : dy + 8, dx : dx + 8], after)
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) == 25  # every shift of 400 images


def test_flip_mirrors_some():
    x = image(1000)
    y = Flip(0.3)(x, random(torch.arange(1000)))
    flipped = (y == x.flip(-1)).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) ^ flipped).all()
    assert abs(flipped.float().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1000)
    assert torch.equal(Flip(0.0)(x, random(torch.arange(1000))), x)


def test_erase_sets_a_rectangle_to_zero():
    x = image(2000, size=32)
    y = Erase(0.5, min_area=0.1, max_area=0.2)(x, random(torch.arange(2000)))
    gone = (y == 0).all(1)  # [B, H, W]
    assert torch.equal(y, x.masked_fill(gone[:, None], 0))
    rows, columns = gone.any(2), gone.any(1)
    assert torch.equal(gone, rows[:, :, None] & columns[:, None, :])
    erased = gone.any((1, 2))
    assert abs(erased.float().mean() - 0.5) < 5 * math.sqrt(0.25 / 2000)
    area = gone[erased].float().mean((1, 2))
    assert area.min() > 0.08 and area.max() < 0.23 and abs(area.mean() - 0.15) < 0.01
    aspect = rows[erased].sum(1) / columns[erased].sum(1)
    assert aspect.min() < 0.5 and aspect.max() > 2 and aspect.min() > 0.3 and aspect.max() < 3.4
    assert gone[:, 0].any() and gone[:, -1].any() and gone[:, :, 0].any() and gone[:, :, -1].any()


def test_mask_sets_a_stretch_of_a_series_to_zero():
    x = torch.ones(2000, 3, 50)
    y = Mask(0.4, max_share=0.2)(x, random(torch.arange(2000)))
    gone = (y == 0).all(1)
    assert torch.equal(y, x.masked_fill(gone[:, None], 0))
    starts = (gone.int().diff(dim=1, prepend=torch.zeros(2000, 1, dtype=torch.int32)) == 1).sum(1)
    assert starts.max() == 1 and abs((starts == 1).float().mean() - 0.4) < 5 * math.sqrt(0.24 / 2000)
    assert gone.sum(1).max() == 10 and gone[:, 0].any() and gone[:, -1].any()


def test_noise_has_its_standard_deviation():
    y = Noise(0.2)(torch.full((500, 2, 6, 5), 3.0), random(torch.arange(500)))
    n = y.numel()
    assert abs(y.mean() - 3) < 5 * 0.2 / math.sqrt(n) and abs(y.std() - 0.2) < 5 * 0.2 / math.sqrt(2 * n)


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_mixup_weights_follow_the_beta_distribution(alpha):
    w = Mixup(alpha).weights(random(torch.arange(20_000))).numpy()
    assert stats.kstest(w, stats.beta(alpha, alpha).cdf).pvalue > 1e-4


def test_mixup_mixes_inputs_and_class_probabilities():
    x, y = image(5), torch.tensor([0, 2, 1, 1, 0])
    batch = Batch(x, y, torch.arange(5), 5, partners=(x.flip(0), y.flip(0)))
    mixup = Mixup(1.0)
    w = mixup.weights(random(torch.arange(5))).float()
    mixed, probabilities = mixup.mix(batch, random(torch.arange(5)), num_classes=3)
    expected = w.view(-1, 1, 1, 1) * x + (1 - w.view(-1, 1, 1, 1)) * x.flip(0)
    torch.testing.assert_close(mixed, expected)
    one_hot = torch.eye(3)[y]
    torch.testing.assert_close(probabilities, w[:, None] * one_hot + (1 - w[:, None]) * one_hot.flip(0))
    numbers = Batch(x, y.float(), batch.examples, 5, partners=(x.flip(0), y.float().flip(0)))
    torch.testing.assert_close(mixup.mix(numbers, random(torch.arange(5)), None)[1], w * y + (1 - w) * y.flip(0))


# --- views ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, groups",
    [("shared", [range(7)]), ("per_group", [range(3), range(3, 5), range(5, 7)]), ("per_sample", range(7))],
)
def test_samples_of_a_group_see_the_same_view(kind, groups):
    batch = Batch(torch.zeros(3, 2, 4), torch.zeros(3), torch.tensor([4, 9, 2]), 3)
    views, _ = Augmentation([Noise(1.0)], kind, num_samples=7, num_groups=3, seed=0)(batch, epoch=1)
    seen = [views.of(s) for s in range(7)]
    groups = [list(g) if isinstance(g, range) else [g] for g in groups]
    of_sample = {s: g for g, samples in enumerate(groups) for s in samples}
    for a in range(7):
        for b in range(7):
            assert torch.equal(seen[a], seen[b]) == (of_sample[a] == of_sample[b]), (a, b)
    assert len(views) == 3 and torch.equal(views.of(5), seen[5])  # made again: the same


def about(x, y=()):
    """A manifest of examples of these shapes."""
    arrays = {"x": ArraySpec(x, "float32"), "y": ArraySpec(y, "float32")}
    return Manifest("toy", "test", "none", arrays, {}, {})


def scaled(x, random):
    """A user's transform."""
    return x * random.uniform(1, 1, 1)


class Halve:
    """A user's transform with arguments."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, random):
        return x * self.factor


def test_transforms_by_name_and_import_path():
    config = AugmentationConfig(
        transforms=[
            {"name": "crop", "padding": 1},
            {"name": f"{__name__}.scaled"},
            {"name": f"{__name__}.Halve", "factor": 0.5},
        ]
    )
    augmentation = build_augmentation(config, about((1, 4, 4)), num_samples=2, seed=0)
    batch = Batch(torch.ones(6, 1, 4, 4), torch.zeros(6), torch.arange(6), 6)
    out = augmentation(batch, epoch=0)[0].of(1)
    assert out.shape == (6, 1, 4, 4) and out.max() <= 0.5 and out.std() > 0.01
    assert build_augmentation(AugmentationConfig(), about((1, 4, 4)), num_samples=2, seed=0) is None


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"name": "cropp"}, ["cropp", "crop, flip"]),
        ({"padding": 3}, ["None", "Try {name: flip}"]),
        ({"name": "crop", "pad": 3}, ["pad", "Fix the arguments"]),
        ({"name": "crop", "padding": 0}, ["padding: 0", "whole number from 1 on"]),
        ({"name": "flip", "probability": 2}, ["probability: 2", "between 0 and 1"]),
        ({"name": "flip", "probability": "high"}, ["probability: high", "a number between 0 and 1"]),
        ({"name": "crop", "padding": 1.5}, ["padding: 1.5", "whole number"]),
        ({"name": "erase", "min_area": 0}, ["min_area: 0", "above 0"]),
        ({"name": "noise", "std": "large"}, ["std: large", "positive and finite"]),
        ({"name": "mask"}, ["mask", "series [channels, length]", "[1, 8, 8]"]),
        ({"name": "hpc_bnn.nowhere.Thing"}, ["hpc_bnn.nowhere.Thing", "cannot be imported"]),
        *(({"name": name}, [name, "cannot be imported"]) for name in ("../../x", ".Thing", "..", "a..b", "1.2")),
    ],
)
def test_wrong_transforms_are_named(entry, words):
    with pytest.raises(ConfigError) as caught:
        build_augmentation(AugmentationConfig(transforms=[entry]), about((1, 8, 8)), num_samples=2, seed=0)
    assert all(word in str(caught.value) for word in ["transforms", *words]), caught.value


def in_place(x, random):
    return x.mul_(2)


@pytest.mark.parametrize(
    "transform, words",
    [
        (lambda x, random: x[..., 1:], "Keep shape and dtype"),
        (lambda x, random: x.double(), "Keep shape and dtype"),
        (lambda x, random: None, "returns NoneType"),
        (in_place, "in_place: it changes its inputs in place"),
    ],
)
def test_a_transform_returns_new_inputs_alike(transform, words):
    augmentation = Augmentation([transform], num_samples=2)
    batch = Batch(torch.ones(6, 1, 4), torch.zeros(6), torch.arange(6), 6)
    with pytest.raises(ConfigError, match=words):
        augmentation(batch, epoch=0)[0].of(0)


@pytest.mark.parametrize("name", ["flip", "crop"])
def test_inputs_are_not_moved_where_their_targets_have_places(name):
    config = AugmentationConfig(transforms=[{"name": name}])
    with pytest.raises(ConfigError, match="would move the inputs"):
        build_augmentation(config, about((3, 8, 8), (2, 8, 8)), num_samples=2, seed=0)
    assert build_augmentation(config, about((3, 8, 8), (2,)), num_samples=2, seed=0) is not None


def test_mixup_of_a_run_needs_a_likelihood_of_classes(tmp_path, capsys):
    x, y = torch.ones(20, 2).numpy(), torch.arange(20).numpy() % 2
    facts = {"name": "toy", "source": "test", "licence": "none", "num_classes": 2}
    write_shards(tmp_path / "shards", {"train": (x, y), "test": (x, y)}, **facts)
    words = ["--data.shards", str(tmp_path / "shards"), "--run_dir", str(tmp_path / "run"), "--num_epochs", "1"]
    words += ["--augmentation.transforms", "[{name: mixup}]", "--global_batch_size", "10", "--num_samples", "1"]
    assert main(["train", *words, "--likelihood.name", "bernoulli"]) == 2
    assert "--likelihood.name bernoulli: mixup mixes" in (said := capsys.readouterr().err) and "Use categorical" in said
    assert main(["train", *words, "--likelihood.name", "categorical"]) == 0


def test_views_and_mixup_are_used_as_they_are_meant():
    batch = Batch(torch.ones(6, 1, 4), torch.zeros(6, dtype=torch.int64), torch.arange(6), 6)
    with pytest.raises(ConfigError, match="with_partners"):
        Augmentation([Mixup()], num_samples=2, num_classes=3)(batch, 0)
    with pytest.raises(ConfigError, match="persample"):
        Augmentation([Noise()], "persample", num_samples=2)
    with pytest.raises(ConfigError, match="num_groups 3"):
        Augmentation([Noise()], "per_group", num_samples=2, num_groups=3)
    views, y = Augmentation([Noise()], num_samples=4)(batch, 0)
    posterior = MeanFieldGaussian(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    step = VariationalStep(posterior, Categorical(2), torch.optim.SGD(posterior.parameters(), 0.1), GridComm(Grid()),
                           num_samples=2, num_train_examples=6)  # fmt: skip
    with pytest.raises(ConfigError, match="made for 4 samples"):
        step(views, y, 6)
