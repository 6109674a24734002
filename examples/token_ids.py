"""Words of a text as whole numbers, from shards to an embedding: is a forecast for a fine or for a bad day?

    python examples/token_ids.py
    mpirun -np 2 python -m mpi4py examples/token_ids.py          # the same two numbers

``ids=("x",)`` keeps the inputs whole: without it they are numbers, and are normalised. From files the same is

    python data_prep/arrays.py --train tokens.npz --ids --classes 2 --test-fraction 0.2 --output data/tokens
    PYTHONPATH=examples hpc-bnn train --data.shards data/tokens --model.name token_ids.BagOfWords --model.arguments '{num_words: 20}'
"""

import numpy as np
import torch
from torch import nn

import hpc_bnn

FINE, BAD = ["sunny", "warm", "calm", "clear", "bright"], ["storm", "rain", "cold", "fog", "hail"]
WORDS = ["<blank>", "the", "day", "will", "be", "and", "in", "north", "south", "later", *FINE, *BAD]
LENGTH = 8
"""Words of a sentence, filled up with blanks."""


def sentences(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [number, LENGTH] int64 of made up sentences, and whether they are of fine days [number]."""
    rng, texts = np.random.default_rng(seed), []
    classes = rng.integers(0, 2, number)
    for is_fine in classes:
        first, second = rng.choice(FINE if is_fine else BAD, 2)
        text = ["the", "day", "will", "be", first, "and", second, str(rng.choice(["later", "north"]))]
        texts.append(text[: rng.integers(5, LENGTH + 1)])
    ids = [[WORDS.index(word) for word in text] + [0] * (LENGTH - len(text)) for text in texts]
    return np.array(ids), classes


class BagOfWords(nn.Module):
    """The mean of the words' vectors, and a layer; blanks count for nothing."""

    def __init__(self, in_shape: tuple[int, ...], num_outputs: int, num_words: int = len(WORDS), width: int = 8):
        super().__init__()
        self.words = nn.Embedding(num_words, width, padding_idx=0)
        self.head = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, num_outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # ids [B, LENGTH] -> logits [B, num_outputs]
        counts = (x > 0).sum(1, keepdim=True)
        return self.head(self.words(x).sum(1) / counts)


def main(comm: hpc_bnn.GridComm, directory: str) -> float:
    """Write shards, train on them, and return the accuracy on other sentences. Collective over the world."""
    splits = {"train": sentences(400, seed=0), "test": sentences(200, seed=1)}
    facts = {"name": "forecasts", "source": "made up", "licence": "none", "num_classes": 2}
    hpc_bnn.write_shards(directory, splits, ids=("x",), comm=comm, **facts)
    train, test = (hpc_bnn.ShardDataset(directory, split, dtype=torch.float64, comm=comm) for split in splits)

    torch.manual_seed(0)
    net = BagOfWords(train.in_shape, 2).double()
    comm.broadcast_(list(net.parameters()))
    posterior = hpc_bnn.MeanFieldGaussian(net, init_std=0.05, deterministic=())  # the words' vectors are random, too
    likelihood = hpc_bnn.Categorical(2)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.02)
    step = hpc_bnn.VariationalStep(
        posterior, likelihood, optimizer, comm, num_samples=4, num_train_examples=len(train), kl_weight=0.1
    )
    loader = hpc_bnn.BatchLoader(train, comm.grid, global_batch_size=50, seed=0)
    for epoch in range(15):
        for batch in loader.epoch(epoch):
            result = step(batch.x, batch.y, batch.num_examples)
    x, y = test.fetch(slice(None))
    predictive = hpc_bnn.predict_classes(posterior, likelihood, comm, x, num_samples=32)
    accuracy = (predictive.probabilities.argmax(1) == y).double().mean().item()
    if comm.grid.rank == 0:
        print(f"grid {comm.grid}: negative ELBO {result.nelbo:.4f} nats, test accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    with hpc_bnn.connect(sample_size=1, device="cpu") as grid_comm:
        main(grid_comm, "data/forecasts")
