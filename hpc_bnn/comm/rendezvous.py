"""Find the address of rank 0, and the network interface, by which the ranks of a job reach each other.

Try them: the name of a host does not help. Debian resolves a host's own name to 127.0.1.1, some nodes do not know
the names of others, and containers share a name, or have the same address on each node. So rank 0 listens, and all
ranks try its addresses in turn.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CommunicationError

PROBE_SECONDS = 5.0
"""Longest wait for an answer from one address."""
MAX_ADDRESSES = 12
"""Number of addresses to try: the search ends after a minute at the latest."""

_FAST = ("ib", "hsn")  # IP over InfiniBand, Slingshot
_INSIDE_A_NODE = ("docker", "virbr", "veth", "br-", "cni", "lxc", "podman", "usb")
_SIOCGIFADDR = 0x8915
_TOKEN_BYTES = 16


@dataclass(frozen=True)
class Rendezvous:
    """The address at which the ranks meet."""

    address: str
    """Address of rank 0 that all ranks reach."""
    interface: str | None
    """Interface by which this rank reaches it; None if the system does not report it."""


def find_meeting(allgather: Callable[[Any], list[Any]], is_first: bool) -> Rendezvous:
    """Return an address of rank 0 that all ranks reach. Collective over the world, by ``allgather`` of what JSON knows.

    Ranks that share a network stack, whatever their hosts are called, meet on its loopback. `CommunicationError` on all
    ranks, after a minute at the latest, where there is no such address.
    """
    with contextlib.ExitStack() as stack:
        offer, only = None, os.environ.get("GLOO_SOCKET_IFNAME")
        if is_first:
            try:
                port, token = stack.enter_context(_listening())
                offer = [port, token.hex(), candidates(interfaces(), os.environ), only]
            except (OSError, CommunicationError) as error:
                offer = str(error)
        offer = allgather(offer)[0]
        if isinstance(offer, str):
            raise CommunicationError(f"torch.distributed: rank 0 offers no address: {offer}")
        port, token, addresses, only = offer
        failures = []
        for address in addresses:
            reached = _reach(address, port, bytes.fromhex(token))
            problem = str(reached) if isinstance(reached, OSError) else None
            answers = allgather([socket.gethostname(), problem])
            missing = [(rank, host, why) for rank, (host, why) in enumerate(answers) if why is not None]
            if isinstance(reached, str) and not missing:
                return Rendezvous(address, _interface_of(reached))
            rank, host, why = missing[0]
            failures.append(f"{address} not from rank {rank} on {host} ({why})")
    limit = f" (GLOO_SOCKET_IFNAME={only} allows no others)" if only else ""
    raise CommunicationError(
        f"torch.distributed: no address of rank 0 is reached by all ranks: {'; '.join(failures)}{limit}. Name the interface "
        "that connects the nodes (ip -brief address) in GLOO_SOCKET_IFNAME, let ports above 1023 through a "
        "firewall between them, or use <backend> mpi"
    )


def interfaces() -> list[tuple[str | None, str]]:
    """Return name and address of the network interfaces of this process; without link-local ones. Local."""
    found: list[tuple[str | None, str]] = []
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # it has no address
                    request = struct.pack("256s", name.encode())
                    answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
                    found.append((name, socket.inet_ntoa(answer[20:24])))
        with open("/proc/net/if_inet6", encoding="utf-8") as file:
            for line in file:
                number, _, _, _, _, name = line.split()
                found.append((name, str(ipaddress.IPv6Address(bytes.fromhex(number)))))
    if not found:  # a sandbox that does not say
        found = [(None, address) for address in ("127.0.0.1", *_addresses_of_the_name())]
    return [(name, address) for name, address in found if not ipaddress.ip_address(address).is_link_local]


def candidates(found: list[tuple[str | None, str]], environment: dict[str, str] | os._Environ) -> list[str]:
    """Return the addresses to try, in order: loopback, fast networks, that of the host's name, others. Local.

    GLOO_SOCKET_IFNAME allows only some interfaces; NCCL_SOCKET_IFNAME puts some first.
    """
    allowed = environment.get("GLOO_SOCKET_IFNAME", "").split(",")
    if allowed != [""]:
        there = sorted({str(name) for name, _ in found})
        found = [(name, address) for name, address in found if name in allowed]
        if not found:
            raise CommunicationError(
                f"GLOO_SOCKET_IFNAME={','.join(allowed)}: no such interface has an address on {socket.gethostname()}; "
                f"there are {', '.join(there)}"
            )
    of_the_name = _addresses_of_the_name()

    def place(entry: tuple[str | None, str]) -> tuple[int, bool]:
        name, address = entry[0] or "", ipaddress.ip_address(entry[1])
        if address.is_loopback:
            group = 0
        elif _is_meant_for_nccl(name, environment.get("NCCL_SOCKET_IFNAME", "")):
            group = 1
        elif name.startswith(_FAST):
            group = 2
        elif str(address) in of_the_name:
            group = 3
        else:
            group = 5 if name.startswith(_INSIDE_A_NODE) else 4
        return group, address.version == 6

    return [address for _, address in sorted(found, key=place)][:MAX_ADDRESSES]


def _is_meant_for_nccl(name: str, value: str) -> bool:
    """NCCL's rule: beginnings of names; ``=`` before them, whole names; ``^``, all but these, which prefers none."""
    if not value or value.startswith("^"):
        return False
    if value.startswith("="):
        return name in value[1:].split(",")
    return name.startswith(tuple(part for part in value.split(",") if part))


def _addresses_of_the_name() -> set[str]:
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        return {str(where[0]).partition("%")[0] for *_, where in found}
    return set()


@contextlib.contextmanager
def _listening() -> Iterator[tuple[int, bytes]]:
    """Send a token to every client that connects to the port, until the end of the block. Local."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    else:
        server = socket.create_server(("", 0), backlog=4096)

    def answer() -> None:
        while True:
            try:
                visitor, _ = server.accept()
            except OSError:  # the end of the block
                return
            with visitor, contextlib.suppress(OSError):
                visitor.sendall(token)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1], token
    finally:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # close alone does not wake accept
        server.close()
        thread.join(PROBE_SECONDS)


def _reach(address: str, port: int, token: bytes) -> str | OSError:
    """Return the local address of a connection to rank 0, or why there is no connection. Local."""
    try:
        with socket.create_connection((address, port), timeout=PROBE_SECONDS) as connection:
            if connection.recv(_TOKEN_BYTES, socket.MSG_WAITALL) != token:
                return OSError("somebody else answers there")
            return str(connection.getsockname()[0])
    except OSError as error:
        return OSError(str(error))


def _interface_of(address: str) -> str | None:
    return next((name for name, other in interfaces() if other == address), None)
