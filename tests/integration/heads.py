"""Ray heads as `ray start --head` makes them, which ask for a token and listen on this machine alone."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 4
PORTS = (
    "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
    "runtime-env-agent-port", "ray-client-server-port", "node-manager-port", "object-manager-port",
)  # fmt: skip


def environment(token: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    python = f"{Path(sys.executable).parent}:{kept['PATH']}"
    token_of_ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return {**kept, **token_of_ray, "PATH": python, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def head_ports() -> dict[str, int]:
    """By the flags of `ray start`."""
    return dict(zip(PORTS, free_ports(len(PORTS)), strict=True))


@contextmanager
def started_head(
    ports: Mapping[str, int], flags: Sequence[str], env: Mapping[str, str], out: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A head with these flags while this lasts, which may not be up yet; what it says goes to `out`."""
    # short, for the names of its sockets; /tmp/ray is for the user's own
    of_ray = tempfile.mkdtemp(prefix="ray")
    with out.open("w") as log:
        process = subprocess.Popen(
            [
                *(Path(sys.executable).parent / "ray", "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address", "127.0.0.1", "--object-store-memory", str(128 * 2**20)),
                *("--temp-dir", of_ray, *flags, *(f"--{name}={port}" for name, port in ports.items())),
            ],
            cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        yield process
    finally:
        # Its own way down takes half a minute.
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(60)
        shutil.rmtree(of_ray, ignore_errors=True)
