"""Ordinary modules of many kinds, none written for this package: name -> (module, inputs, classes)."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hpc_bnn.noise import Key, Stream

NUM_CLASSES = 3


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))

    def forward(self, x):
        return self.head(self.features(x))


class Block(nn.Module):
    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = (
            nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
            if stride != 1 or channels_in != channels
            else nn.Identity()
        )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu_(self.bn2(self.conv2(y)) + self.down(x))


class ResNet18(nn.Module):
    """The layers of a ResNet-18 with narrow stages, so that the test is quick."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        stages, channels = [], width
        for stage in range(4):
            wide = width * 2**stage
            stages += [Block(channels, wide, 1 if stage == 0 else 2), Block(wide, wide, 1)]
            channels = wide
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class ViT(nn.Module):
    def __init__(self, dim=16, heads=2, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 5, dim) * 0.02)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = nn.ModuleList(nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim)) for _ in range(depth)
        )
        self.head = nn.Linear(dim, NUM_CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlps)):
            y = self.norms[2 * i](x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


class Swin(nn.Module):
    """Two blocks of windowed attention, the second shifted, with a relative position bias."""

    def __init__(self, dim=8, heads=2, window=4):
        super().__init__()
        self.window, self.heads = window, heads
        self.embed = nn.Conv2d(1, dim, 1)
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        steps = torch.arange(window)
        places = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
        relative = places[:, :, None] - places[:, None, :] + window - 1
        self.register_buffer("index", relative[0] * (2 * window - 1) + relative[1])
        self.head = nn.Linear(dim, NUM_CLASSES)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        n = self.window
        for i in range(2):
            y = torch.roll(self.norm[i](x), (-i * n // 2, -i * n // 2), (1, 2))
            y = y.view(b, h // n, n, w // n, n, c).transpose(2, 3).reshape(-1, n * n, c)
            q, k, v = self.qkv[i](y).view(len(y), n * n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            bias = self.bias[self.index].permute(2, 0, 1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))
            y = self.proj[i](y.transpose(1, 2).reshape(-1, n * n, c))
            y = y.view(b, h // n, w // n, n, n, c).transpose(2, 3).reshape(b, h, w, c)
            x = x + torch.roll(y, (i * n // 2, i * n // 2), (1, 2))
        return self.head(x.mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(8, 12, num_layers=2, batch_first=True)
        self.head = nn.Linear(12, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.layer(x.squeeze(1))[0][:, -1])


class TorchEncoder(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1)).mean(1))


class Tied(nn.Module):
    """An embedding that is also the output layer, as in language models; and weights shared by two layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(NUM_CLASSES, 6)
        self.inner = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.inner[4].weight = self.inner[2].weight
        self.out = nn.Linear(6, NUM_CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        token = (x.flatten(1).sum(1) > 0).long()
        return self.out(self.inner(x.flatten(1)) + self.embed(token))


class BranchOnData(nn.Module):
    """Control flow that depends on the values: cannot be batched over samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, NUM_CLASSES), nn.Linear(64, NUM_CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.a(x) if self.a.bias.sum() > 0 else self.b(x)


class NormAct(nn.BatchNorm1d):
    """A norm with its activation, as timm's."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Mixed(nn.Module):
    """Layers that are not torch's own, functional dropout, and a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 12), nn.Linear(12, 12), nn.Linear(12, NUM_CLASSES)
        self.norm, self.other = NormAct(12), nn.BatchNorm1d(12)

    def block(self, x):
        return self.norm(F.dropout(self.b(x), 0.2, self.training))

    def forward(self, x):
        x = self.a(x.flatten(1))
        x = checkpoint(self.block, x, use_reentrant=False)
        return self.head(F.dropout(self.other(input=x), 0.2, self.training))


class Routed(nn.Module):
    """Each sample goes through one of two norms, by a weight of its own: on a rank, one of them may not run."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(64, 12, bias=False), nn.Linear(12, NUM_CLASSES)
        self.norms = nn.ModuleList(nn.BatchNorm1d(12, momentum=0.3) for _ in range(2))
        with torch.no_grad():
            self.a.weight[:, 0] = 0

    def forward(self, x):
        return self.head(self.norms[int(self.a.weight[0, 0] > 0)](self.a(x.flatten(1))))


class SequenceFirst(nn.Module):
    """The default layout of torch's transformers: the batch is dim 1."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x.squeeze(1).transpose(0, 1)).mean(0))


MODULES = {
    "mixed": Mixed,
    "sequence_first": SequenceFirst,
    "routed_by_sample": Routed,
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, NUM_CLASSES)),
    "lenet_batchnorm": LeNet,
    "resnet18": ResNet18,
    "vit": ViT,
    "swin": Swin,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "torch_transformer_dropout": TorchEncoder,
    "tied": Tied,
    "branch_on_data": BranchOnData,
}


def make_module(name, dtype=torch.float64):
    with Key(1, Stream.INIT).global_generator():
        return MODULES[name]().to(dtype)


def make_examples(num=11, dtype=torch.float64):
    """Return inputs [num, 1, 8, 8] and classes [num]."""
    generator = Key(2, Stream.DATA_ORDER).generator()
    x = torch.randn(num, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, NUM_CLASSES, (num,), generator=generator)
