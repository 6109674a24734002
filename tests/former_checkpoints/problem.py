"""Small trainings of which hpc_bnn 0.1 wrote checkpoints; run as a program by that version, it writes them.

Two versions of hpc_bnn import this file: see README.md.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

import hpc_bnn
from hpc_bnn.config import OptimizerConfig
from hpc_bnn.noise import Key, Stream
from hpc_bnn.run import checkpoint
from hpc_bnn.training.optim import build_optimizer

HERE = Path(__file__).parent
NUM_EXAMPLES, NUM_CLASSES, NUM_SAMPLES, SEED = 8, 4, 4, 3
NUM_STEPS = 3
"""Before the checkpoint, and once more after it."""
LAMB = {"name": "pytorch_optimizer.Lamb"}
CASES = {
    "mean_field": ("mean_field", {}),
    "mean_field_sharded": ("mean_field", {"sharded": True}),
    "mean_field_lamb": ("mean_field", LAMB),
    "mean_field_adafactor": ("mean_field", {"name": "torch.optim.Adafactor"}),
    "ensemble": ("ensemble", {}),
    "ensemble_lamb": ("ensemble", LAMB),
    "mc_dropout": ("mc_dropout", {"name": "SGD", "arguments": {"momentum": 0.9}}),
    "deterministic": ("deterministic", {"name": "SGD"}),
    "low_rank": ("low_rank", {}),
}
"""Family and optimizer by name."""


def make_net(family):
    """The weight of the second layer has a multiple of 16 numbers, so that memory has another order than the module."""
    between = {"mc_dropout": nn.Dropout(0.2), "ensemble": nn.Tanh()}.get(family, nn.BatchNorm1d(4))
    return nn.Sequential(nn.Linear(3, 4, bias=False), between, nn.Linear(4, NUM_CLASSES)).double()


def make_posterior(family, comm):
    if family == "ensemble":
        members = comm.grid.local_samples(NUM_SAMPLES)
        return hpc_bnn.DeepEnsemble(lambda: make_net(family), NUM_SAMPLES, members, seed=SEED)
    with Key(SEED, Stream.INIT).global_generator():
        net = make_net(family)
    if family == "mc_dropout":
        return hpc_bnn.MCDropout(net)
    if family == "deterministic":
        return hpc_bnn.DeterministicNetwork(net)
    if family == "low_rank":
        return hpc_bnn.LowRankGaussian(net, rank=2, init_std=0.1)
    return hpc_bnn.MeanFieldGaussian(net, init_std=0.1)


def make_step(family, options, comm):
    """Return the step and the schedule of the learning rate."""
    posterior = make_posterior(family, comm)
    config = OptimizerConfig(learning_rate=0.02, schedule="cosine", **options)
    optimizer, schedule = build_optimizer(config, posterior, comm, 1, 4 * NUM_STEPS)
    step = hpc_bnn.VariationalStep(
        posterior, hpc_bnn.Categorical(NUM_CLASSES), optimizer, comm,
        num_samples=NUM_SAMPLES, num_train_examples=NUM_EXAMPLES, seed=SEED, kl_weight=0.5,
    )  # fmt: skip
    return step, schedule


def train(step, schedule):
    """Make NUM_STEPS steps. Collective over the world."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(NUM_EXAMPLES, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)
    mine = step.comm.grid.local_examples(NUM_EXAMPLES)
    for _ in range(NUM_STEPS):
        step(x[mine], y[mine], NUM_EXAMPLES)
        schedule.step()


def resume(state, family, options, comm):
    """Return the step and the schedule of a training that goes on from a checkpoint of format 3."""
    step, schedule = make_step(family, options, comm)
    step.load_state_dict({**state, "num_steps": state["place"]["num_steps"]})
    schedule.load_state_dict(state["schedule"])
    return step, schedule


def end_of(step, schedule):
    """Return the parameters after NUM_STEPS more steps. Collective over the world."""
    train(step, schedule)
    return gather_state(step)["model"]


def gather_state(step):
    """By either version. Collective over the world."""
    if hasattr(step, "gather_state"):
        return step.gather_state()
    return checkpoint.gather_state(step.posterior, step.optimizer, step.comm)


def write(case, comm):
    """Write a checkpoint in the middle of a training; return numbers of its middle and its end."""
    family, options = CASES[case]
    step, schedule = make_step(family, options, comm)
    train(step, schedule)
    state = {
        **gather_state(step),
        "schedule": schedule.state_dict(),
        "num_steps": step.num_steps,
        "place": {"epoch": 0, "num_batches": step.num_steps, "row": {}},
        "config": {"posterior": {"family": family}},
    }
    if comm.grid.rank == 0:
        checkpoint.CheckpointStore(HERE / case).save(state, step.num_steps)
    kl = step.posterior.kl().item() if family == "low_rank" else None
    model = end_of(step, schedule)
    return {"kl": kl} if kl else {name: rounded(value) for name, value in model.items()}


def rounded(tensor):
    return [float(f"{value:.13g}") for value in tensor.flatten().tolist()]


if __name__ == "__main__":
    ranks = hpc_bnn.connect(2, "cpu", backend="torch")
    expected = {name: write(name, ranks) for name in CASES}
    if ranks.grid.rank == 0:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(end)}" for name, end in expected.items())
        (HERE / "expected.json").write_text(f"{{\n{lines}\n}}\n")
    sys.exit(0)
