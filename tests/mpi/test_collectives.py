"""Every collective that reaches a library is one that `comm` made and counted."""

import contextlib
import sys
from collections import Counter

import pytest
import torch
from mpi4py import MPI
from test_evaluate import LIKELIHOODS, write_field_shards
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_bnn import connect
from hpc_bnn.config import Config
from hpc_bnn.predictive.evaluation import _Scores
from hpc_bnn.run.export import predict_run
from hpc_bnn.run.train import Run

COLLECTIVES = (
    "allgather",
    "allreduce",
    "alltoall",
    "Barrier",
    "barrier",
    "bcast",
    "gather",
    "reduce",
    "scan",
    "scatter",
)
"""Of mpi4py, also with capitals and in further forms (Iallreduce, Allgatherv, Reduce_scatter)."""


class Watch(TorchDispatchMode):
    """Notes what reaches torch.distributed, Horovod and mpi4py, and which collective of `comm` it belongs to.

    Attributes
    ----------
    seen : list of (int or None, str)
        Number of the collective of `comm`, None where there is none, and what the library was asked for.
    num_tensors, num_objects : int
        Collectives of `comm`.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.current, self.num_tensors, self.num_objects = [], None, 0, 0

    def note(self, what):
        self.seen.append((self.current, what))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):  # what all functions of torch.distributed come to
            self.note(str(function))
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def within(self):
        assert self.current is None, "a collective within another"
        self.current = self.num_tensors + self.num_objects
        try:
            yield
        finally:
            self.current = None

    @contextlib.contextmanager
    def of(self, comm, monkeypatch):
        """Look at a grid, at the libraries below it, and at what others might ask of them."""
        counted = comm._counted

        @contextlib.contextmanager
        def tensors(*arguments):
            with self.within(), counted(*arguments):
                yield
            self.num_tensors += 1

        monkeypatch.setattr(comm, "_counted", tensors)
        for name in ("gather", "gather_first", "broadcast", "barrier"):

            def objects(*args, _original=getattr(comm.objects, name), **kwargs):
                with self.within():
                    result = _original(*args, **kwargs)
                self.num_objects += comm.library != "none"
                return result

            monkeypatch.setattr(comm.objects, name, objects)
        horovod = sys.modules.get("horovod.torch.mpi_ops")
        if horovod is not None:
            monkeypatch.setattr(horovod, "mpi_lib", Noting(horovod.mpi_lib, self.note))
        with self:
            yield


class Noting:
    """A module whose collectives are noted."""

    def __init__(self, module, note):
        self._module, self._note = module, note

    def __getattr__(self, name):
        found = getattr(self._module, name)
        if not any(part in name for part in ("async", "barrier", "join")):
            return found

        def call(*args):
            self._note(name)
            return found(*args)

        return call


def noting_world(note):
    """Return COMM_WORLD as a communicator whose collectives, and those of its parts, are noted."""

    def noted(name):
        def call(self, *args, **kwargs):
            note(name)
            return getattr(MPI.Intracomm, name)(self, *args, **kwargs)

        return call

    def split(name):
        return lambda self, *args, **kwargs: Noted(getattr(MPI.Intracomm, name)(self, *args, **kwargs))

    names = [n for n in dir(MPI.Intracomm) if any(part.lower() in n.lower() for part in COLLECTIVES)]
    parts = {name: split(name) for name in ("Split", "Split_type")}
    Noted = type("Noted", (MPI.Intracomm,), {name: noted(name) for name in names} | parts)
    return Noted(MPI.COMM_WORLD)


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_an_epoch_makes_the_collectives_of_comm_and_no_others(sample_size, directory, monkeypatch, name):
    """Training, evaluation and prediction; metrics leave their states as they are, and sum nothing by themselves."""
    watch = Watch()
    monkeypatch.setattr(MPI, "COMM_WORLD", noting_world(watch.note))
    comm = connect(sample_size, "cpu")
    with comm.agree("writing"):
        if comm.grid.rank == 0:
            write_field_shards(directory / "shards", LIKELIHOODS[name])
    config = Config(
        run_dir=str(directory / "run"), num_epochs=1, global_batch_size=13, num_test_samples=5, device="cpu"
    )
    config.data.shards, config.data.test_split, config.data.prepare = str(directory / "shards"), "train", None
    config.data.reading, config.model.name = "group", "test_predict.ToField"
    config.optimizer.max_gradient_norm, config.optimizer.sharded = 1.0, True
    run = Run(config, comm)
    states, compute = [], _Scores.compute

    def looked_at(scores):
        copies = [[m.sums.clone() for m in scores.all_metrics()]]
        values = compute(scores)
        copies.append([m.sums for m in scores.all_metrics()])
        states.append(copies)
        return values

    monkeypatch.setattr(_Scores, "compute", looked_at)
    watch.seen.clear()
    before = comm.traffic.num_collectives, comm.traffic.num_object_collectives
    with watch.of(comm, monkeypatch):
        run.train()
        run.num_steps = run.step.num_steps
        predict_run(run, "foreign", directory / "predictions.h5", with_members=True)
    assert not [what for number, what in watch.seen if number is None], "a collective that is none of comm"
    counted = comm.traffic.num_collectives - before[0], comm.traffic.num_object_collectives - before[1]
    assert counted == (watch.num_tensors, watch.num_objects)
    calls = Counter(number for number, _ in watch.seen)
    assert len(calls) == sum(counted)
    twice = {what for number, what in watch.seen if calls[number] > 1}
    assert twice <= {"c10d._allgather_base_.default", "allgather", "Allgatherv"}  # torch and MPI gather lengths first
    assert (counted[0] > 0) == (comm.grid.world_size > 1)
    assert len(states) == 2  # of the predictive, and of the mean network
    for was, stays in states:
        assert was
        torch.testing.assert_close(stays, was, rtol=0, atol=0, equal_nan=True)  # one network has no spread over samples
