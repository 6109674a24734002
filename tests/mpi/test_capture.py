"""Captured steps on a grid: the layout law, one sum per axis, and errors that all ranks raise at the same step."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from graphs import InterpretedGraph
from reference import (
    GLOBAL_BATCH_SIZE,
    NUM_EXAMPLES,
    Results,
    assert_layout_law,
    computed_once,
    make_problem,
    make_step,
)

from hpc_bnn import Grid, GridComm, LogPredictive, NegativeElbo, global_batches
from hpc_bnn.errors import NonFiniteError, RankError
from hpc_bnn.training.chunk_search import ChunkSearch

OBJECTIVES = {"elbo": NegativeElbo, "log_predictive": LogPredictive}


def run(comm, objective, chunk_size, capture):
    step = make_step(comm, num_samples=7, objective=OBJECTIVES[objective](), chunk_size=chunk_size, capture=capture)
    if step.recorder is not None:
        step.recorder.new_graph = InterpretedGraph
    x, y = make_problem(torch.float64)
    results = Results(comm)
    for epoch in range(3):
        for batch in global_batches(NUM_EXAMPLES, GLOBAL_BATCH_SIZE, 5, epoch):
            results.take(step, x[batch], y[batch], len(batch))
    step.settle()
    return step, results


@computed_once
def run_alone(objective):
    return run(GridComm(Grid()), objective, 1, "off")[1]


def test_a_search_for_a_chunk_size_ends_alike_on_all_ranks(comm):
    """Also where some ranks have fewer samples than others, and where one of them cannot batch."""
    x, y = make_problem(torch.float64)
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    for fails in (False, True):
        step = make_step(comm, num_samples=7, capture="on")
        search = ChunkSearch(step)
        if fails and comm.grid.rank == comm.grid.world_size - 1:
            step.loop.fall_back(RuntimeError("not here"))
        for _ in range(32):
            with search.timing():
                step(x[mine], y[mine], NUM_EXAMPLES)
        assert len(set(comm.gather_objects((search.found, tuple(search.seconds.items()))))) == 1
        assert search.found == 1 if fails else search.found in search.seconds
        assert step.loop.chunk_size == search.found
        comm.check_replicas(list(step.posterior.parameters()), "after a search")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_captured_steps_keep_the_layout_law(comm, objective, chunk_size):
    step, results = run(comm, objective, chunk_size, "on")
    assert_layout_law(results, run_alone(objective))
    assert step.recorder.num_captures >= 3 and not step.recorder.said
    x, y = make_problem(torch.float64)
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    before, objects = comm.traffic.num_collectives, comm.traffic.num_object_collectives
    step(x[mine], y[mine], NUM_EXAMPLES)
    made, axes = comm.traffic.num_collectives - before, sum(n > 1 for n in (comm.grid.sample_size, comm.grid.data_size))
    assert made == axes + 2 * (objective == "log_predictive" and comm.grid.sample_size > 1)
    assert comm.traffic.num_object_collectives == objects


def test_all_ranks_say_two_steps_later_where_a_gradient_was_not_finite(comm):
    step, _ = run(comm, "elbo", 1, "on")
    x, y = make_problem(torch.float64)
    number, before = step.num_steps, step.posterior.buffer.flat.clone()
    mine, last = comm.grid.local_examples(NUM_EXAMPLES), comm.grid.world_size - 1
    broken = x[mine].clone()
    if comm.grid.rank == last:
        broken[:] = torch.nan
    step(broken, y[mine], NUM_EXAMPLES)
    step(x[mine], y[mine], NUM_EXAMPLES)
    with pytest.raises(NonFiniteError, match=rf"step {number}: .*on rank {last} on "):
        step(x[mine], y[mine], NUM_EXAMPLES)
    assert torch.equal(step.posterior.buffer.flat, before)
    assert step.num_steps == number


def test_ranks_that_got_other_examples_are_named_two_steps_later(comm):
    if comm.grid.sample_size == 1:
        pytest.skip("no sample group of several ranks")
    step, _ = run(comm, "elbo", 1, "on")
    x, y = make_problem(torch.float64)
    number, before = step.num_steps, step.posterior.buffer.flat.clone()
    mine = comm.grid.local_examples(NUM_EXAMPLES)
    step(x[mine], y[mine].flip(0) if comm.grid.sample_index == 1 else y[mine], NUM_EXAMPLES)
    step(x[mine], y[mine], NUM_EXAMPLES)
    with pytest.raises(RankError, match=f"step {number}: .* the digest of the targets"):
        step(x[mine], y[mine], NUM_EXAMPLES)
    assert torch.equal(step.posterior.buffer.flat, before)
