"""Three hosts with addresses of their own, one of which is cut off: Linux network namespaces on one switch."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.test_submit import ROOT, TOKEN, environment
from tests.integration.test_train import assert_same_weights, records_of
from tests.kustomize import render

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))),
        reason="network namespaces need root and iproute2",
    ),
]
OVERLAY = ROOT / "cluster" / "kuberay" / "overlays" / "cpu-smoke"
STEPS = 21
PATIENCE_S = 400
CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""A silent host is noticed after seconds; by Ray's defaults after a minute."""


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A network namespace with an address and a name of its own, in which processes are started."""

    name: str
    address: str
    namespace: str
    folder: Path

    def start(self, log: str, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Output goes to `log` in the host's folder."""
        # As Debian has it: a host's own name stands for itself alone.
        names = self.folder / "hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        named = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        with (self.folder / log).open("wb") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", named, "sh",
                 self.name, str(names), *command],
                cwd=ROOT, env=environment(TOKEN) | CHECKS | dict(env or {}), stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def processes(self) -> Iterator[psutil.Process]:
        for pid in ip("netns", "pids", self.namespace).split():
            with suppress(psutil.NoSuchProcess):
                yield psutil.Process(int(pid))

    def has(self, actor: str) -> bool:
        titles = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                titles.append(" ".join(process.cmdline()))
        return any(title.startswith(f"ray::{actor}") for title in titles)


class Switch:
    """A bridge in a namespace of its own, and the hosts that hang on it: no address here meets one of this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"prefopt-{secrets.token_hex(3)}"
        self.hosts: list[Host] = []
        ip("netns", "add", self._name)
        ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._name, "link", "set", "dev", "bridge", "up")

    def add(self, name: str) -> Host:
        host = Host(
            name,
            f"10.97.0.{len(self.hosts) + 1}",
            f"{self._name}-{name}",
            self._folder / str(len(self.hosts)),
        )
        host.folder.mkdir()
        ip("netns", "add", host.namespace)
        self.hosts.append(host)
        ip(
            "link",
            "add",
            "eth0",
            "netns",
            host.namespace,
            "type",
            "veth",
            "peer",
            "name",
            name,
            "netns",
            self._name,
        )
        ip("-n", self._name, "link", "set", "dev", name, "master", "bridge", "up")
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        ip("-n", host.namespace, "link", "set", "dev", "lo", "up")
        ip("-n", host.namespace, "link", "set", "dev", "eth0", "up")
        return host

    def cut(self, host: Host) -> None:
        """As if its cable were drawn: nobody hears of it, and no connection is reset."""
        ip("-n", self._name, "link", "set", "dev", host.name, "down")

    def remove(self) -> None:
        for host in self.hosts:
            while running := list(host.processes()):
                for process in running:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
                psutil.wait_procs(running, timeout=5)
            ip("netns", "delete", host.namespace)
        ip("netns", "delete", self._name)


@dataclass(frozen=True)
class Cluster:
    """Ray on a switch's hosts, as KubeRay starts it in the pods of the CPU overlay."""

    switch: Switch
    spec: dict[str, Any]
    folder: Path

    @property
    def head(self) -> Host:
        return self.switch.hosts[0]

    def start_head(self) -> None:
        """And wait until it answers."""
        head = self.switch.add("head")
        ray = self._start(head, self.spec["headGroupSpec"], "--head", "--dashboard-host=0.0.0.0")
        until = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (words := (head.folder / "ray.log").read_text()):
            assert ray.poll() is None, words
            assert time.monotonic() < until, words
            time.sleep(0.1)

    def add_worker(self) -> Host:
        host = self.switch.add(f"worker-{len(self.switch.hosts)}")
        self._start(host, self.spec["workerGroupSpecs"][0], f"--address={self.head.address}:6379")
        return host

    def _start(self, host: Host, group: dict[str, Any], *words: str) -> subprocess.Popen[bytes]:
        """With what the operator reads off the container's limits, and rayStartParams on top."""
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits["memory"].endswith("Gi")
        params = {
            "num-cpus": limits["cpu"],
            "memory": str(int(limits["memory"].removesuffix("Gi")) * 2**30),
            "metrics-export-port": "8080",
            "dashboard-agent-listen-port": "52365",
            "node-ip-address": host.address,
            "temp-dir": str(host.folder / "ray"),
            "object-store-memory": str(100 * 2**20),
            **group["rayStartParams"],
        }
        flags = [f"--{name}={value}" for name, value in params.items()]
        ray = str(Path(sys.executable).parent / "ray")
        return host.start("ray.log", ray, "start", "--block", "--disable-usage-stats", *words, *flags)

    def train(self, name: str) -> subprocess.Popen[bytes]:
        """The driver is on the head, as a RayJob's is; its output is `NAME.log` there."""
        words = ["train", "-c", str(self.folder / "run.yaml"), "--run.name", name]
        words += ["--run.save_steps", "2", "--run.max_failures", "-1", "--run.resource_timeout_s", "120"]
        address = {"RAY_ADDRESS": f"{self.head.address}:6379"}
        return self.head.start(f"{name}.log", sys.executable, "-m", "ray_prefopt", *words, env=address)

    def output(self, name: str) -> str:
        return (self.head.folder / f"{name}.log").read_text()

    def run_folder(self, name: str) -> str:
        return str(self.folder / "runs" / name)

    def step(self, name: str) -> int:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return max((int(record["step"]) for record in records_of(self.run_folder(name))), default=0)
        return 0

    def has_restarted(self) -> bool:
        """Whether Ray Train has seen that a worker was lost."""
        logs = (self.head.folder / "ray" / "session_latest" / "logs" / "train").glob("*sys-controller*.log")
        return any("[FailurePolicy] RETRY" in log.read_text() for log in logs)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hosts"))  # short, for the names of Ray's sockets
    try:
        switch = Switch(folder)
    except AssertionError as error:
        shutil.rmtree(folder)
        pytest.skip(f"no network namespaces here: {error}")
    objects = render(OVERLAY)
    (spec,) = (item["spec"]["rayClusterSpec"] for item in objects if item["kind"] == "RayJob")
    (text,) = (item["data"]["run.yaml"] for item in objects if item["kind"] == "ConfigMap")
    here = text.replace("/opt/ray-prefopt", str(ROOT)).replace("/runs", str(folder / "runs"))
    (folder / "run.yaml").write_text(here)
    try:
        yield Cluster(switch, spec, folder)
    finally:
        switch.remove()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_host_is_cut_off_and_another_joins(cluster: Cluster) -> None:
    begun = time.monotonic()

    def passed(what: str) -> float:
        seconds = time.monotonic() - begun
        sys.stdout.write(f"{seconds:6.1f} s  {what}\n")  # `pytest -s` shows it
        return seconds

    def wait(name: str, driver: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert driver.poll() is None, cluster.output(name)
            assert time.monotonic() < until, cluster.output(name)
            time.sleep(0.05)

    def finish(name: str, driver: subprocess.Popen[bytes]) -> None:
        wait(name, driver, lambda: driver.poll() == 0)

    cluster.start_head()
    cluster.add_worker()
    lost = cluster.add_worker()
    finish("undisturbed", cluster.train("undisturbed"))
    passed("the undisturbed run is done")

    driver = cluster.train("cut")
    wait("cut", driver, lambda: cluster.step("cut") > 0)
    passed("the run takes its first steps")
    wait("cut", driver, lambda: cluster.step("cut") >= 9)
    cluster.switch.cut(lost)
    cut = passed(f"{lost.name} is cut off after step {cluster.step('cut')} of {STEPS}")
    wait("cut", driver, cluster.has_restarted)
    noticed = passed("Ray notices, and ends the workers that are left")
    # Its worker waits for the others, and hears of nothing; it hurts nobody.
    assert lost.has("RayTrainWorker")
    assert cluster.head.has("RunLog")
    joined = cluster.add_worker()
    passed(f"{joined.name} is started")
    restarted = "workers were started again: going on after step "
    wait("cut", driver, lambda: restarted in cluster.output("cut"))
    step = int(cluster.output("cut").partition(restarted)[2].split()[0])
    passed(f"the workers go on after step {step}")
    assert joined.has("RayTrainWorker")
    finish("cut", driver)
    passed("the run is done")

    assert noticed - cut < 60
    assert step in range(2, STEPS, 2)
    steps = [record["step"] for record in records_of(cluster.run_folder("cut")) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    models = [f"{cluster.run_folder(name)}/model" for name in ("cut", "undisturbed")]
    assert_same_weights(*models)
