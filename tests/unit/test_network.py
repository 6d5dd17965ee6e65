"""Which interface gloo is told to use, and how long workers wait for each other."""

import socket
from datetime import timedelta

import pytest
from torch.distributed import distributed_c10d

from ray_prefopt.training import network


def test_the_interface_of_an_address() -> None:
    names = {name for _, name in socket.if_nameindex()}
    assert network.interface_of("127.0.0.1") in names
    assert (
        network.interface_of("192.0.2.255") is None
    )  # nobody's: a broadcast address of the documentation's network


@pytest.mark.parametrize(("given", "chosen"), [(None, "lo"), ("bond0", "bond0")])
def test_the_user_has_the_last_word(given: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(network.os, "environ", {network.INTERFACE: given} if given else {})
    network.choose_interface()
    assert network.os.environ == {network.INTERFACE: chosen}


def test_an_address_that_no_interface_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a host behind a translation of addresses: gloo decides by itself."""
    monkeypatch.setattr(network, "get_node_ip_address", lambda: "192.0.2.255")
    monkeypatch.setattr(network.os, "environ", {})
    network.choose_interface()
    assert network.os.environ == {}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_groups_without_a_timeout_get_that_of_the_run(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, timedelta(seconds=1))
    network.limit_waiting(77)
    assert distributed_c10d._get_default_timeout(backend) == timedelta(seconds=77)
