"""Ranks meet on the network of Ray's nodes, and do not wait for each other without end.

Left to itself, gloo listens at the address that a host gives its own name: on many hosts the loopback, by a line
`127.0.1.1 name` in /etc/hosts, where no other host finds it. NCCL looks for a network by itself.
"""

import os
from datetime import timedelta
from typing import Any

import psutil
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address
from torch.distributed import distributed_c10d

INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo's own variable; the user's value stands."""


class RayNetwork(TorchConfig):
    """Ray Train's process group, on the interface that has the address of each worker's node.

    `timeout_s` is that of every group which is made in the workers, DeepSpeed's among them.
    """

    @property
    def backend_cls(self) -> type["_Backend"]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(choose_interface)
        worker_group.execute(limit_waiting, backend_config.timeout_s)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Name the interface of this node's address to gloo; none where it is not an address of this host."""
    interface = interface_of(get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(INTERFACE, interface)


def interface_of(address: str) -> str | None:
    """The first interface of this host that has an IP address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None


def limit_waiting(timeout_s: int) -> None:
    """Make this the timeout of groups that are made without one, as DeepSpeed makes its own."""
    timeout = timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
