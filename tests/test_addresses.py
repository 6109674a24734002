"""Where ranks meet (hpc_bnn.comm.rendezvous): the order of addresses, and who answers there."""

import datetime
import hmac
import os
import pickle
import socket
import threading

import pytest
import torch.distributed as dist
from conftest import REPOSITORY, patience

from hpc_bnn.comm import rendezvous as addresses
from hpc_bnn.comm import torchrun
from hpc_bnn.errors import CommunicationError

NODE = [
    ("lo", "127.0.0.1"), ("lo", "::1"), ("docker0", "172.17.0.1"), ("eth0", "198.18.0.1"), ("eth1", "2001:db8::1"),
    ("eth1", "198.19.0.1"), ("ib0", "192.0.2.1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, ["127.0.0.1", "::1", "192.0.2.1", "198.18.0.1", "198.19.0.1", "2001:db8::1", "172.17.0.1"]),
        ({"NCCL_SOCKET_IFNAME": "eth1,eth2"}, ["127.0.0.1", "::1", "198.19.0.1", "2001:db8::1", "192.0.2.1"]),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, ["127.0.0.1", "::1", "192.0.2.1"]),
        ({"NCCL_SOCKET_IFNAME": "^ib0"}, ["127.0.0.1", "::1", "192.0.2.1"]),
        ({"GLOO_SOCKET_IFNAME": "docker0"}, ["172.17.0.1"]),
    ],
)
def test_the_order_of_addresses(monkeypatch, environment, first):
    monkeypatch.setattr(addresses, "_addresses_of_the_name", set)
    found = addresses.candidates(NODE, environment)
    assert found[: len(first)] == first
    assert len(found) == (len(first) if "GLOO_SOCKET_IFNAME" in environment else len(NODE))


def test_the_address_of_the_hosts_name_comes_before_others(monkeypatch):
    monkeypatch.setattr(addresses, "_addresses_of_the_name", lambda: {"198.19.0.1"})
    assert addresses.candidates(NODE, {})[2:5] == ["192.0.2.1", "198.19.0.1", "198.18.0.1"]


def test_an_interface_that_is_not_there_is_named():
    with pytest.raises(CommunicationError, match=r"GLOO_SOCKET_IFNAME=ib7: .* there are docker0, eth0"):
        addresses.candidates(NODE, {"GLOO_SOCKET_IFNAME": "ib7"})


def test_only_rank_0_of_this_job_is_taken_for_it(monkeypatch):
    monkeypatch.setattr(addresses, "PROBE_SECONDS", 0.5)
    with addresses._listening() as (port, token):
        assert addresses._reach("127.0.0.1", port, token) == "127.0.0.1"
        assert "somebody else" in str(addresses._reach("127.0.0.1", port, b"x" * 16))
    assert isinstance(addresses._reach("127.0.0.1", port, token), OSError)  # closed with the block
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timed out" in str(addresses._reach("127.0.0.1", silent.getsockname()[1], token))


class Ranks:
    """Two threads in the place of two ranks."""

    def __init__(self):
        self.values, self.barrier = [None, None], threading.Barrier(2, timeout=patience(30))

    def meet(self, rank):
        def allgather(value):
            self.values[rank] = value
            self.barrier.wait()
            seen = list(self.values)
            self.barrier.wait()
            return seen

        try:
            return addresses.find_meeting(allgather, rank == 0)
        except CommunicationError as error:
            return error

    def both(self):
        found = [None, None]

        def work(rank):
            found[rank] = self.meet(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_ranks_of_one_network_stack_meet_on_its_loopback(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert Ranks().both() == [addresses.Rendezvous("127.0.0.1", "lo")] * 2


def test_where_they_cannot_meet_all_say_so(monkeypatch):
    monkeypatch.setattr(addresses, "interfaces", lambda: [("eth0", "127.0.0.9")])
    monkeypatch.setattr(addresses, "_reach", lambda *_: OSError("No route to host"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    for error in Ranks().both():
        assert "127.0.0.9 not from rank 0" in str(error) and "GLOO_SOCKET_IFNAME=eth0 allows no" in str(error)


# --- the store of torchrun ------------------------------------------------------------------------------


class Attack:
    """What runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("secret", ["", "shared by the ranks"], ids=["without a secret", "with a secret"])
@pytest.mark.parametrize("forged", ["pickle", "signed pickle", "JSON", "nothing"])
def test_who_reaches_the_store_runs_no_code(tmp_path, monkeypatch, secret, forged):
    """In the keys of both ranks and in rank 0's answer, with and without knowing the names of the keys."""
    ranks = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, torchrun.SECRET: secret}.items():
        monkeypatch.setenv(name, value)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store.set_timeout(datetime.timedelta(seconds=0.2))
    monkeypatch.setattr(torchrun.Running, "store", store)
    payload = pickle.dumps(Attack(tmp_path / "PWNED"))
    content = {
        "pickle": payload,
        "signed pickle": hmac.digest(b"", payload, "sha256") + payload,
        "JSON": hmac.digest(b"guessed", b"[1, 2]", "sha256") + b"[1, 2]",
        "nothing": b"",
    }[forged]
    for token in ("", torchrun._token()):
        key = f"hpc_bnn.{token}.gather.{torchrun.Running.num_waits + 1}"
        for name in (key, f"{key}.0", f"{key}.1"):
            store.set(name, content)
    with pytest.raises((CommunicationError, ValueError)):
        torchrun._allgather_before_start(["mine"])
    assert not os.listdir(tmp_path)


def test_what_the_ranks_say_arrives_by_the_store(monkeypatch):
    ranks = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**ranks, torchrun.SECRET: "s"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torchrun.Running, "store", dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False))
    said = ["node7", [29500, "0f" * 16, ["127.0.0.1"], None], None]
    assert torchrun._allgather_before_start(said) == [said]


def test_no_module_unpickles_what_a_store_holds():
    for path in (REPOSITORY / "hpc_bnn/comm").glob("*.py"):
        assert "import pickle" not in path.read_text(), path
