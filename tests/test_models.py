"""The networks that come with the package."""

import pytest
import torch

from hpc_bnn.models import MLP, ViT


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
