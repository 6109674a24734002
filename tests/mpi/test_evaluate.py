"""Metrics of the job, not means of the ranks' metrics."""

import numpy as np
import pytest
import torch
from reference import make_problem, make_step

from hpc_bnn import Categorical, Grid, GridComm, ShardDataset, write_shards
from hpc_bnn.evaluate import evaluate_dataset


@pytest.mark.parametrize("num_examples", [31, 2], ids=["uneven", "fewer_than_ranks"])
def test_metrics_equal_those_of_one_process(comm, tmp_path_factory, num_examples):
    directory = comm.broadcast_object(str(tmp_path_factory.mktemp("shards")) if comm.grid.rank == 0 else None)
    x, y = (t.numpy()[:num_examples] for t in make_problem(torch.float64))
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            facts = {"name": "toy", "source": "test", "licence": "none", "num_classes": 3}
            write_shards(directory, {"train": (x, np.asarray(y))}, **facts)
    dataset = ShardDataset(directory, "train", dtype=torch.float64)
    step = make_step(GridComm(Grid()))
    arguments = step.posterior, Categorical(3)
    expected = evaluate_dataset(*arguments, GridComm(Grid()), dataset, num_samples=6).metrics
    seen = []
    got = evaluate_dataset(
        *arguments, comm, dataset, num_samples=6, see=lambda examples, *_: seen.extend(examples.tolist())
    ).metrics
    assert got["accuracy"] == expected["accuracy"]
    assert got == pytest.approx(expected, rel=1e-12) and {"nll", "brier", "ece"} <= got.keys()
    assert seen == list(range(num_examples))[comm.grid.local_examples(num_examples)]
