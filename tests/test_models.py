"""The networks that come with the package."""

import copy
import pickle

import pytest
import torch
import yaml
from conftest import REPOSITORY

import hpc_bnn
from hpc_bnn.errors import ConfigError
from hpc_bnn.models import MLP, ResNet, Swin, ViT, checkpoint_layers
from hpc_bnn.plan.simulate import LiveMemory


def test_mlp_shapes_and_options():
    net = MLP((1, 8, 8), 10, hidden=(16, 12), activation="GELU")
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert [tuple(p.shape) for p in net.parameters()] == [(16, 64), (16,), (12, 16), (12,), (10, 12), (10,)]


def test_vit_shapes_and_count():
    net = ViT((3, 32, 32), 10)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    per_block = 3 * 192 * 193 + 192 * 193 + 768 * 193 + 192 * 769 + 4 * 192
    assert sum(p.numel() for p in net.parameters()) == 192 * 49 + 6 * per_block + 2 * 192 + 10 * 193


def test_vit_sees_where_a_patch_is():
    net = ViT((1, 8, 8), 2, dim=8, depth=1, heads=2, mlp_dim=8).eval()
    x = torch.randn(1, 1, 8, 8)
    swapped = torch.cat([x[..., 4:], x[..., :4]], -1)
    assert not torch.allclose(net(x), net(swapped))
    assert len(net.position.unique(dim=0)) == 4


def test_vit_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="30 x 32 must be a multiple of patch=4"):
        ViT((3, 30, 32), 10)


def make_swin(rows=16, columns=32, **options):
    torch.manual_seed(0)
    options = {"patch": 2, "dim": 8, "depths": (2, 2), "heads": (2, 2), "window": (2, 4), **options}
    return Swin((3, rows, columns), 2, (rows, columns), **options).double().eval()


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (13, 16), (33, 64)])
def test_swin_gives_fields_of_any_height(rows, columns):
    net = make_swin(rows, columns)
    assert net(torch.randn(2, 3, rows, columns, dtype=torch.float64)).shape == (2, 2, rows, columns)


def test_swin_has_no_seam_at_the_date_line():
    """Fields that are turned about the earth by whole coarse windows give turned outputs; by less they do not."""
    net, x = make_swin(), torch.randn(1, 3, 16, 32, dtype=torch.float64)
    turned = net(x.roll(16, 3))
    torch.testing.assert_close(turned, net(x).roll(16, 3), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(net(x.roll(2, 3)), net(x).roll(2, 3), rtol=1e-3)


def reach(net, row, column):
    """Return which input places an output place depends on, [rows, columns]."""
    x = torch.randn(1, 3, *net.shape, dtype=torch.float64, requires_grad=True)
    net(x)[0, :, row, column].sum().backward()
    return x.grad[0].abs().sum(0) > 1e-12


def test_swin_windows_shift_over_the_date_line_and_not_over_the_poles():
    net = make_swin(depths=(2,), heads=(2,))
    north_west = reach(net, 0, 0)
    assert north_west[0, -1] and north_west[0, 1], "both sides of the date line are neighbours"
    assert not north_west[-2:].any(), "the poles are not"
    unshifted = make_swin(depths=(1,), heads=(2,))
    assert not reach(unshifted, 0, 0)[0, -1] and reach(unshifted, 0, 0).sum() == 4 * 8  # one window


def test_swin_of_a_region_knows_its_edges():
    net = make_swin(16, 30, depths=(2,), heads=(2,), is_periodic=False)
    assert net(torch.randn(2, 3, 16, 30, dtype=torch.float64)).shape == (2, 2, 16, 30)
    corner = reach(net, 0, 0)
    assert corner[0, 1] and not corner[:, -8:].any() and not corner[-2:].any()
    assert reach(net, 8, 15)[6, 12] and reach(net, 0, 29)[0, -1]  # windows still shift inside


def test_swin_counts_and_full_size():
    net = make_swin()
    block = 3 * 8 * 9 + 8 * 9 + 32 * 9 + 8 * 33 + 4 * 8 + 3 * 7 * 2
    wide = 3 * 16 * 17 + 16 * 17 + 64 * 17 + 16 * 65 + 4 * 16 + 3 * 7 * 2
    between = 2 * 32 + 32 * 16 + 16 * 32 + 2 * 8 + 8 * 17
    assert sum(p.numel() for p in net.parameters()) == 4 * block + 2 * wide + between + 8 * 13 + 2 * 8 + 8 * 9
    with torch.device("meta"):
        config = yaml.safe_load((REPOSITORY / "configs/era5_swin.yaml").read_text())["model"]["arguments"]
        full = Swin((69, 721, 1440), 2 * 69, (721, 1440), **config)
    assert sum(p.numel() for p in full.parameters()) > 200e6


@pytest.mark.parametrize(
    ("options", "words"), [({"columns": 24}, "24 longitudes"), ({"dim": 9}, "heads"), ({"depths": (2, 2, 2)}, "heads")]
)
def test_swin_that_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_swin(**options)


def test_resnet_shapes_and_normalisations():
    group, batch = (ResNet((3, 16, 16), 5, width=8, depths=(1, 1), norm=norm) for norm in ("group", "batch"))
    x = torch.randn(4, 3, 16, 16)
    assert group(x).shape == batch(x).shape == (4, 5)
    torch.testing.assert_close(group(x)[:2], group(x[:2]))  # an example alone
    assert not torch.allclose(batch(x)[:2], batch(x[:2]))
    counts = [8 * 3 * 9, 2 * 8 * 8 * 9, 16 * 8 * 9 + 16 * 16 * 9 + 16 * 8, 2 * (8 + 8 + 8 + 16 + 16), 5 * 17]
    assert sum(p.numel() for p in group.parameters()) == sum(counts)
    with pytest.raises(ValueError, match="width=12"):
        ResNet((3, 16, 16), 5, width=12)


def test_mlp_dropout_layers():
    net = MLP((4,), 2, hidden=(8, 8), dropout=0.3)
    assert [layer.p for layer in net if isinstance(layer, torch.nn.Dropout)] == [0.3, 0.3]
    assert not any(isinstance(layer, torch.nn.Dropout) for layer in MLP((4,), 2))


@pytest.mark.parametrize("family", [hpc_bnn.MeanFieldGaussian, hpc_bnn.MCDropout])
def test_checkpointed_layers_give_the_same_bits_with_less_memory(family):
    x, y, results, peaks = torch.randn(64, 3, 8, 8), torch.arange(64) % 3, [], []
    for patterns in ([], ["blocks.*"]):
        torch.manual_seed(0)
        net = ViT((3, 8, 8), 3, dim=16, depth=4, heads=2, mlp_dim=32, dropout=0.2)
        posterior = copy.deepcopy(family(checkpoint_layers(net, patterns)))
        optimizer, comm = torch.optim.SGD(posterior.parameters(), lr=0.1), hpc_bnn.GridComm(hpc_bnn.Grid())
        step = hpc_bnn.VariationalStep(
            posterior, hpc_bnn.Categorical(3), optimizer, comm, num_samples=2, num_train_examples=50
        )
        step(x, y, 64)
        with LiveMemory() as memory:
            results.append([step(x, y, 64).nelbo, posterior.buffer.flat.clone()])
        peaks.append(memory.peak_bytes)
        pickle.loads(pickle.dumps(posterior))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert peaks[1] < 0.7 * peaks[0]


def test_a_pattern_that_fits_no_layer_is_an_error():
    with pytest.raises(
        ConfigError, match=r"checkpoint_layers block\.\*: no layer of ViT has such a name \(there are embed"
    ):
        checkpoint_layers(ViT((3, 8, 8), 3, dim=16, depth=1, heads=2, mlp_dim=32), ["block.*"])
