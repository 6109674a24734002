"""The ranks of this job, before and after they compute: without torch, so that errors of the command line come at once."""

from __future__ import annotations

import os
import sys

from . import mpi
from .launcher import torchrun_of_job


def world_size() -> int:
    """Return the number of ranks of this job. Local, but starts MPI, except under torchrun.

    `CommunicationError` where the launcher started several ranks that cannot work together: no mpi4py, or another MPI.
    """
    if job := torchrun_of_job():
        return job.least_size
    started = mpi.start_mpi()
    return started.COMM_WORLD.size if started else 1


def wait_for_others(seconds: float) -> bool:
    """Wait for all ranks to call this, at most some seconds; return whether they did. Collective."""
    if not torchrun_of_job():
        return mpi.wait_for_others(seconds)
    from . import torchrun

    return torchrun.wait_for_others(seconds)


def abort(code: int) -> None:
    """End the whole job with an exit code, from this rank alone. Local."""
    mpi.abort(code)
    if torchrun_of_job():
        os._exit(code)  # torchrun ends the others


def finalize() -> None:
    """End the library for tensors and MPI, so that this rank can exit with any code. Collective over the world.

    Without it ``python -m mpi4py`` answers an exit code other than 0 by aborting the job, which is right
    for an error of one rank and noise for one on which all ranks agreed.
    """
    if torchrun_of_job():
        wait_for_others(5.0)  # torchrun ends those that are still there when one has failed
    running = mpi.running_mpi()
    if running is not None:
        running.COMM_WORLD.Barrier()
    for library in ("horovod", "torch_dist"):
        if module := sys.modules.get(f"{__package__}.{library}"):
            module.shutdown()
    if running is not None:
        running.Finalize()
