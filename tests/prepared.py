"""A Python whose imports are done, for the ranks of tests: torch and what it imports take five seconds of CPU in each.

    python tests/prepared.py serve SOCKET           imports, then forks a process for each request, until stdin closes
    python -S -E tests/prepared.py run SOCKET ...   is, for its parent, ``python ...``: a program or ``-m module``

`run` sends its arguments, environment, directory and streams to `serve`, and stands for the process that is forked there:
it passes signals on to it, ends as it ends, and takes it along when it is killed. MPI, the libraries and hpc_bnn start
in that process, as in any other. A process that meets an error ends as any other; one that meets none, in short (`end`).
"""

import array
import atexit
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def start(*place: str, **options) -> tuple[subprocess.Popen, list[str]]:
    """Start a server; return it and the command that stands for its ``python``. It ends when its stdin is closed.

    A place is a command that starts others there (nsenter).
    """
    path, pipe = f"{tempfile.mkdtemp(prefix='hpc-bnn-')}/socket", subprocess.PIPE
    command = [*place, sys.executable, __file__, "serve", path]
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, **options)
    assert server.stdout.readline(), "the server of prepared processes did not start; above it says why"
    return server, [sys.executable, "-S", "-E", __file__, "run", path]


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
            raise ConnectionError("who is at the other end is gone")
        content += part
    return content


def request_at(connection: socket.socket) -> tuple[dict, array.array]:
    """Return what `ask` sends: a request and its streams."""
    header, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_SPACE(12))
    if not ancillary:
        raise ConnectionError("who asked is gone")
    streams = array.array("i", ancillary[0][2])
    try:
        return json.loads(receive(connection, int.from_bytes(header, "big"))), streams
    except ConnectionError:
        for stream in streams:
            os.close(stream)
        raise


def serve(path: str) -> list[str]:
    """Fork for each request and keep the process; return the arguments of a request in its own."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    print("ready", flush=True)
    kept = {}  # what says that it has ended -> the process, and who asked for it
    while True:
        asking = {connection: pid for pid, connection in kept.values()}
        ready, _, _ = select.select([listener, sys.stdin, *kept, *asking], [], [])
        for ended in kept.keys() & set(ready):
            pid, connection = kept.pop(ended)
            with contextlib.suppress(OSError):  # who asked is gone
                connection.sendall(os.waitpid(pid, 0)[1].to_bytes(8, "big"))
            connection.close()
            os.close(ended)
            asking.pop(connection)
        for connection in asking.keys() & set(ready):  # who asked is gone
            os.kill(asking[connection], signal.SIGKILL)
        if sys.stdin in ready:
            for pid, _ in kept.values():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)
            os._exit(0)
        if listener in ready:
            connection, _ = listener.accept()
            try:
                request, streams = request_at(connection)
            except ConnectionError:  # killed while it asked: others are served on
                connection.close()
                continue
            pid = os.fork()
            if pid == 0:
                for kept_here in (listener, connection, *asking):
                    kept_here.close()
                for ended in kept:
                    os.close(ended)
                return become(request, streams)
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(OSError):  # who asked is gone
                connection.sendall(pid.to_bytes(8, "big"))
            kept[os.pidfd_open(pid)] = pid, connection


def become(request: dict, streams: array.array) -> list[str]:
    """Take over the streams, the directory and the environment of a request; return its arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    return request["arguments"]


def end() -> None:
    """End without an error, and without taking apart what was imported: half a second, most of it to copy pages."""
    threading._shutdown()
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__" and sys.argv[1] == "run":
    try:
        ask(sys.argv[2])
    except ConnectionError:  # the tests have ended
        os._exit(1)
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
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise
    end()
