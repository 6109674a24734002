"""Sampling parallelism in an ordinary training loop; `# <--` marks the lines that make it parallel."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import hpc_bnn


def main(comm: hpc_bnn.GridComm) -> None:
    x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    x = x / 16
    torch.manual_seed(0)  # any nn.Module; in float64 every grid prints the same numbers
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    comm.broadcast_(list(net.parameters()))  # <-- the same weights on all ranks

    posterior = hpc_bnn.MeanFieldGaussian(net, prior=hpc_bnn.GaussianPrior(std=0.7), init_std=0.1)
    likelihood = hpc_bnn.Categorical(num_classes=10)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=1e-2)
    step = hpc_bnn.VariationalStep(
        posterior, likelihood, optimizer, comm, num_samples=8, num_train_examples=1500, kl_weight=0.5
    )
    for epoch in range(20):
        for batch in hpc_bnn.global_batches(1500, global_batch_size=64, seed=0, epoch=epoch):
            mine = batch[comm.grid.local_examples(len(batch))]  # <-- this rank's examples
            result = step(x[mine], y[mine], global_batch_size=len(batch))  # sums over both axes inside
    predictive = hpc_bnn.predict_classes(posterior, likelihood, comm, x[1500:], num_samples=64)
    accuracy = (predictive.probabilities.argmax(-1) == y[1500:]).float().mean()
    if comm.grid.rank == 0:  # <-- one rank prints
        print(f"grid {comm.grid}: negative ELBO {result.nelbo:.4f} nats, test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    with hpc_bnn.connect(sample_size=int(([*sys.argv, "1"])[1])) as comm:  # <-- join the process grid
        main(comm)
