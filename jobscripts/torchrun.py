"""torchrun for one node of a batch job: the same flags, but signals and exit codes as a job script needs them.

    srun --ntasks-per-node=1 python jobscripts/torchrun.py --nnodes 2 --nproc-per-node 4 \
        --master-addr HOST --master-port PORT -m hpc_bnn train ...

torchrun itself dies of SIGUSR1, and its code is 1 whatever the ranks leave with. Here SIGUSR1 goes to the ranks, and the code
is that of the rank that failed first (128 + N for signal N). The number of the node is Slurm's where no --node-rank is given.
"""

import os
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))  # no rank has begun: nothing is lost

from torch.distributed import DistError  # noqa: E402, TID251
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402, TID251
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402, TID251
from torch.distributed.run import main  # noqa: E402, TID251


def children() -> list[int]:
    """Process numbers of the ranks, and of what else this process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]  # the name may hold anything
        except OSError:  # it has ended
            continue
        if int(parent) == os.getpid():
            found.append(int(entry.name))
    return found


def pass_on(number: int, _) -> None:
    """Send a signal to the ranks."""
    for child in children():
        try:
            os.kill(child, number)
        except ProcessLookupError:
            continue


def shell_code(code: int) -> int:
    """Return the exit code that a shell would give."""
    return code if code >= 0 else 128 - code


def first_cause(error: ChildFailedError) -> tuple[int, int]:
    """Return rank and exit code of what came first.

    At almost the same moment ranks that lose a peer end with 1, and torchrun ends those that are left with SIGTERM.
    """

    def place(rank: int) -> tuple:
        failure = error.failures[rank]
        return failure.exitcode == -signal.SIGTERM, failure.exitcode == 1, failure.timestamp, rank

    rank = min(error.failures, key=place)
    return rank, shell_code(error.failures[rank].exitcode)


def run() -> int:
    """Run torchrun and return the exit code of the job on this node."""
    os.environ.setdefault("PET_NODE_RANK", os.environ.get("SLURM_NODEID", "0"))
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        main()
    except ChildFailedError as error:
        rank, code = first_cause(error)
        if code != 75:  # stopped with a checkpoint: nothing has failed
            print(f"torchrun: rank {rank} on {os.uname().nodename} ended with code {code}", file=sys.stderr)
        return code
    except SignalException as error:  # the ranks have had it as well
        return 128 + error.sigval
    except DistError as error:
        print(f"torchrun: {error}. Name a port that is free on the first node in HPC_BNN_MASTER_PORT", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
