"""A Python whose imports are done, for the ranks of tests: torch and what it imports take five seconds of CPU in each.

    python tests/prepared.py serve SOCKET           imports, then forks a process for each request, until stdin closes
    python -S -E tests/prepared.py run SOCKET ...   is, for its parent, ``python ...``: a program or ``-m module``

`run` sends its arguments, environment, directory and streams to `serve`, and stands for the process that is forked there:
it passes signals on to it, ends as it ends, and takes it along when it is killed. MPI, the libraries and hpc_bnn start
in that process, as in any other.
"""

import array
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def ask(path: str) -> None:
    """Have the arguments run by the server at a socket, and end as they end."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = {"arguments": sys.argv[3:], "environment": dict(os.environ), "directory": os.getcwd()}
    content = json.dumps(request).encode()
    streams = array.array("i", [0, 1, 2])
    connection.sendmsg([len(content).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    connection.sendall(content)
    pid = int.from_bytes(receive(connection, 8), "big")

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    code = os.waitstatus_to_exitcode(int.from_bytes(receive(connection, 8), "big"))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            os._exit(1)
        content += part
    return content


def serve(path: str) -> list[str]:
    """Fork for each request; return the arguments of one in its own process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(connection)
        connection.close()


def keep(connection: socket.socket) -> list[str]:
    """Fork the process of a request and keep it; return its arguments there."""
    header, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2])
    request = json.loads(receive(connection, int.from_bytes(header, "big")))
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        os.chdir(request["directory"])
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["arguments"]
    try:
        connection.sendall(pid.to_bytes(8, "big"))
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([ended, connection], [], [])
        if ended not in ready:  # who asked is gone
            os.kill(pid, signal.SIGKILL)
        connection.sendall(os.waitpid(pid, 0)[1].to_bytes(8, "big"))
    finally:
        os._exit(0)


if __name__ == "__main__" and sys.argv[1] == "run":
    ask(sys.argv[2])
elif __name__ == "__main__":
    import gc
    import runpy

    import h5py  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed  # noqa: F401
    import torchmetrics  # noqa: F401

    import hpc_bnn.cli.commands  # noqa: F401
    import hpc_bnn.run.train  # noqa: F401
    import hpc_bnn.testing  # noqa: F401

    assert "mpi4py.MPI" not in sys.modules and "horovod" not in sys.modules, "each process starts them itself"
    gc.freeze()  # neither a process nor its end looks through what was imported
    words = serve(sys.argv[2])
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")
