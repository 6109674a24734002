"""The rules of linear layers and attention for several weight samples at once (hpc_bnn.posteriors.batch_rules)."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpc_bnn import MeanFieldGaussian
from hpc_bnn.models import MLP, ViT
from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors.batch_rules import BatchedLinear, attend
from hpc_bnn.posteriors.sample_loop import SampleLoop
from hpc_bnn.training.capture import HostReads
from hpc_bnn.views import SharedView

COUNT = 3


def attend_or_not(*arguments, **options):
    result = attend(*arguments, **options)
    return F.scaled_dot_product_attention(*arguments, **options) if result is NotImplemented else result


def alike(function, tensors, dims, tolerance=1e-12):
    """Compare vmap with rules with a loop over the samples: outputs and gradients."""
    given = [t for t in tensors if t is not None]
    leaves = [t.detach().clone().requires_grad_() for t in given]
    dims = [dim for t, dim in zip(tensors, dims) if t is not None]

    def call(*some, function=function):
        some = iter(some)
        return function(*(None if t is None else next(some) for t in tensors))

    batched = {F.scaled_dot_product_attention: attend_or_not}.get(function, function)
    with BatchedLinear():
        got = torch.vmap(lambda *some: call(*some, function=batched), tuple(dims))(*leaves)
    want = torch.stack(
        [call(*(t if d is None else t.select(d, i) for t, d in zip(leaves, dims))) for i in range(COUNT)]
    )
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    weight = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(5))
    for a, b in zip(*(torch.autograd.grad(out, leaves, weight) for out in (got, want))):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def stacked(shape, dim, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = list(shape)
    if dim is not None:
        sizes.insert(dim, COUNT)
    return torch.randn(sizes, generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(shape, bias):
    for x, weight, b in itertools.product((None, 0, len(shape)), (None, 0, 2), (None, 0, 1) if bias else (None,)):
        if (x, weight, b) != (None, None, None):
            tensors = stacked(shape, x, 1), stacked((6, 5), weight, 2), stacked((6,), b, 3) if bias else None
            alike(F.linear, tensors, (x, weight, b))


@pytest.mark.parametrize("lead", [(2,), (4, 2)])
@pytest.mark.parametrize("mask", [None, (5, 7), (2, 5, 7), (1, 5, 7), (1, 1, 5, 7)])
def test_attention(lead, mask):
    if mask is not None and len(mask) > len(lead) + 2:
        return
    for q, k, m in itertools.product((None, 0), (None, 0, 1), (None, 0)):
        if (q, k, m) == (None, None, None):
            continue
        tensors = stacked((*lead, 5, 8), q, 1), stacked((*lead, 7, 8), k, 2), stacked((*lead, 7, 8), 0, 3)
        tensors += (None if mask is None else stacked(mask, m, 4),)
        alike(F.scaled_dot_product_attention, tensors, (q, k, 0, m))
    for options in ({"is_causal": True}, {"scale": 0.3}):
        query, key, value = (stacked((*lead, 5, 8), 0, seed) for seed in range(3))
        got = torch.vmap(lambda *t, options=options: attend(*t, **options))(query, key, value)
        want = [F.scaled_dot_product_attention(*t, **options) for t in zip(query, key, value)]
        torch.testing.assert_close(got, torch.stack(want))


def test_what_no_rule_is_for_is_left_to_torch():
    with BatchedLinear():  # outside of vmap; and a weight of one dim
        assert F.linear(torch.ones(2), torch.ones(3, 2)).tolist() == [2.0] * 3
        alike(F.linear, (stacked((4, 5), 0, 1), stacked((5,), 0, 2)), (0, 0))
    alike(F.scaled_dot_product_attention, [stacked((5, 8), 0, seed) for seed in range(3)], (0, 0, 0))
    assert attend(*torch.ones(3, 2, 4, 4)) is NotImplemented
    seen = []
    torch.vmap(lambda q: seen.append(attend(q, q, q, dropout_p=0.5)) or q)(torch.ones(3, 2, 4, 4))
    assert seen == [NotImplemented]


def test_a_linear_layer_keeps_the_dtype_of_autocast():
    with torch.autocast("cpu", torch.bfloat16), BatchedLinear():
        out = torch.vmap(F.linear, (None, 0))(torch.randn(4, 5), torch.randn(COUNT, 6, 5))
    assert out.dtype == torch.bfloat16


class Torch(nn.Module):
    """A layer of torch that calls its own attention."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x)).mean(1)


@pytest.mark.parametrize(
    ("make", "shape", "most"),
    [
        (lambda: MLP((12,), 3, hidden=(8, 8)), (4, 12), 40),
        (lambda: ViT((3, 8, 8), 3, dim=8, depth=2, heads=2, mlp_dim=16), (2, 3, 8, 8), 190),
        (Torch, (2, 5, 8), 125),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_a_network_gives_what_a_walk_gives_with_few_operations(make, shape, most):
    torch.manual_seed(0)
    posterior, x = MeanFieldGaussian(make().double(), init_std=0.1, deterministic=()), torch.randn(shape).double()
    results = []
    for is_batched in (True, False):
        posterior.begin_()
        with posterior.network.running(), HostReads().watching() as reads:
            loop = SampleLoop(posterior, COUNT if is_batched else 1)
            for _, outputs in loop(range(COUNT), SharedView(x), Key(3, Stream.NOISE)):
                outputs.square().sum().backward()
                posterior.fold_()
        assert not is_batched or reads.num_operations <= most, reads.num_operations
        assert loop.can_batch
        results.append(posterior.buffer.gradient.clone())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
