"""What is different on a GPU: threads of the backward pass, generators, kernels under vmap, memory. Local to one GPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import batch_norm, dropout
from torch.utils.checkpoint import checkpoint

from hpc_bnn import Categorical, Grid, GridComm, MCDropout, MeanFieldGaussian, VariationalStep, predict_classes
from hpc_bnn.models import ViT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
DEVICE = torch.device("cuda", 0)
CLASSES = Categorical(3)


def make(net, num_samples=4, chunk_size=1, family=MeanFieldGaussian, lr=0.1, autocast_dtype=None, **options):
    posterior = family(net.to(DEVICE), **options)
    return VariationalStep(
        posterior, CLASSES, torch.optim.SGD(posterior.parameters(), lr=lr), GridComm(Grid(), DEVICE),
        num_samples=num_samples, num_train_examples=100, chunk_size=chunk_size, autocast_dtype=autocast_dtype,
    )  # fmt: skip


def seeded(make_net, dtype=torch.float64):
    torch.manual_seed(0)
    return make_net().to(dtype)


def examples(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *shape, generator=generator, dtype=dtype).to(DEVICE), (torch.arange(8) % 3).to(DEVICE)


class NormAct(nn.BatchNorm1d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Block(nn.Module):
    def __init__(self, checkpoints, by_name):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), NormAct(8)
        self.checkpoints, self.by_name = checkpoints, by_name
        self.register_buffer("running_mean", torch.zeros(8))
        self.register_buffer("running_var", torch.ones(8))

    def block(self, x):
        x = self.norm(self.first(x))
        if self.by_name:
            x = dropout(batch_norm(x, self.running_mean, self.running_var, training=self.training), 0.3, self.training)
        return F.dropout(x, 0.3, self.training)

    def forward(self, x):
        y = checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x)
        return self.last(y)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_checkpointed_block_meets_the_same_masks_in_the_threads_of_the_backward_pass(by_name):
    x, y = examples(6)
    results = []
    for checkpoints in (False, True):
        step = make(seeded(lambda c=checkpoints: Block(c, by_name)))
        results.append([step(x, y, 8).nelbo for _ in range(3)] + [step.posterior.state_dict()])
    assert results[0][:3] == pytest.approx(results[1][:3], rel=1e-12)
    for name, value in results[0][3].items():
        torch.testing.assert_close(results[1][3][name], value, rtol=1e-11, atol=1e-13)


def test_a_norm_keeps_its_activation():
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 8), NormAct(8), nn.Linear(8, 3))).to(DEVICE)
    x, y = examples(6)
    expected = F.cross_entropy(copy.deepcopy(net)(x), y).item()
    assert make(net, init_std=1e-9)(x, y, 8).data_term == pytest.approx(expected, abs=1e-7)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) * torch.rand_like(x[:, :1])


def test_noise_of_the_generator_of_a_gpu_is_noticed_and_put_back(caplog):
    x, y = examples(6)
    step = make(seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))))
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state(DEVICE)
    step(x, y, 8)
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before) and not caplog.text
    make(seeded(Noisy))(x, y, 8)
    assert "torch's global generator of cuda:0" in caplog.text


def vit(dropout=0.0):
    return ViT((3, 32, 32), 3, patch=4, dim=48, depth=2, heads=3, dropout=dropout)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [4, "auto"])
def test_a_vit_trains_in_chunks_or_falls_back(chunk_size, autocast_dtype, caplog):
    """The default config of the ViT: its attention under vmap fails in the backward pass on some GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    x, y = examples(3, 32, 32, dtype=torch.float32)
    results = []
    for size in (1, chunk_size):
        step = make(seeded(vit, torch.float32), chunk_size=size, autocast_dtype=autocast_dtype)
        results.append([step(x, y, 8).nelbo for _ in range(3)])
    print("batched" if step.loop.can_batch else "walked", step.loop.chunk_size, caplog.text)
    assert results[0] == pytest.approx(results[1], rel=1e-4 if autocast_dtype is None else 2e-2)


def test_chunks_that_do_not_fit_into_memory_walk(caplog):
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 4096), nn.Tanh(), nn.Linear(4096, 4096), nn.Tanh(), nn.Linear(4096, 3)), torch.float32)  # fmt: skip
    x, y = examples(6, dtype=torch.float32)
    walking = make(copy.deepcopy(net), num_samples=32)
    expected = [walking(x, y, 8).nelbo for _ in range(2)]
    del walking
    torch.cuda.empty_cache()
    step = make(net, num_samples=32, chunk_size=32)
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 1.5 * 2**30) / total)
    try:
        got = [step(x, y, 8).nelbo for _ in range(2)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert got == pytest.approx(expected, rel=1e-5)
    assert "its memory is not enough for chunks of 32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_differ_under_a_users_autocast(dtype):
    x, y = examples(6, dtype=torch.float32)
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3)), torch.float32)
    seen = []
    net.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    step = make(net, init_std=0.3)
    with torch.autocast("cuda", dtype):
        step(x, y, 8)
        outputs = seen[-4:]
        assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
        options = {"num_samples": 4, "keep_members": True}
        drawn = predict_classes(step.posterior, CLASSES, step.comm, x, **options).members
    assert (drawn.std(1) > 1e-3).any(1).all()


def test_mc_dropout_and_copies():
    x, y = examples(6)
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 3)))
    step = make(net, family=MCDropout)
    step(x, y, 8)
    twin = copy.deepcopy(step.posterior)
    options = {"num_samples": 5, "keep_members": True}
    a, b = (predict_classes(p, CLASSES, step.comm, x, **options).members for p in (twin, step.posterior))
    assert torch.equal(a, b) and a.std(1).max() > 0.01
