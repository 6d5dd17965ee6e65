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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.heads import ROOT, TOKEN, environment
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
        try:
            ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._name, "link", "set", "dev", "bridge", "up")
        except AssertionError:
            self.remove()
            raise

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

    def part(self, hosts: Iterable[Host], *, apart: bool = True) -> None:
        """Let these hosts reach all others but each other; or each other again."""
        for host in hosts:
            words = ["type", "bridge_slave", "isolated", "on" if apart else "off"]
            ip("-n", self._name, "link", "set", "dev", host.name, *words)

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

    def train(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        """The driver is on the head, as a RayJob's is; its output is `NAME.log` there."""
        words = ["train", "-c", str(self.folder / "run.yaml"), "--run.name", name]
        words += [
            "--run.save_steps",
            "2",
            "--run.max_failures",
            "-1",
            "--run.resource_timeout_s",
            "120",
            *more,
        ]
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


@pytest.fixture(scope="module")
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
        cluster = Cluster(switch, spec, folder)
        cluster.start_head()
        cluster.add_worker()
        cluster.add_worker()
        yield cluster
    finally:
        switch.remove()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> str:
    """The model of a run to which nothing happens."""
    watch = Stopwatch(cluster, "undisturbed")
    watch.finish()
    watch.say("the undisturbed run is done")
    return f"{cluster.run_folder('undisturbed')}/model"


class Stopwatch:
    """A run on the cluster, and what is seen of it, with the seconds since its start; `pytest -s` shows them."""

    def __init__(self, cluster: Cluster, name: str, *flags: str) -> None:
        self._cluster, self._name = cluster, name
        self._begun = time.monotonic()
        self._driver = cluster.train(name, *flags)

    def say(self, what: str) -> float:
        seconds = time.monotonic() - self._begun
        sys.stdout.write(f"{seconds:6.1f} s  {what}\n")
        return seconds

    def wait(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert self._driver.poll() is None, self._cluster.output(self._name)
            assert time.monotonic() < until, self._cluster.output(self._name)
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: self._cluster.step(self._name) >= step)

    def wait_for_words(self, words: str) -> str:
        """Of the driver; returns what follows them on their line."""
        self.wait(lambda: words in self._cluster.output(self._name))
        return self._cluster.output(self._name).partition(words)[2].partition("\n")[0]

    def finish(self) -> None:
        self.wait(lambda: self._driver.poll() == 0)


def assert_undisturbed(cluster: Cluster, name: str, model: str) -> None:
    """Each step was taken once, as far as the record goes, and the weights are those of the other run."""
    steps = [record["step"] for record in records_of(cluster.run_folder(name)) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    assert_same_weights(f"{cluster.run_folder(name)}/model", model)


LOST = "workers were lost after step "
AGAIN = "workers were started again: going on after step "


def test_workers_that_do_not_hear_each_other(cluster: Cluster, undisturbed: str) -> None:
    """Ray hears them all, so that the run's own limit is what ends their waiting."""
    workers = cluster.switch.hosts[1:3]
    run = Stopwatch(cluster, "apart", "--run.collective_timeout_s", "15")
    run.wait_for_step(5)
    cluster.switch.part(workers)
    parted = run.say(f"no way between the workers after step {cluster.step('apart')} of {STEPS}")
    why = run.wait_for_words(LOST)
    noticed = run.say(f"lost after step {why}")
    assert 14 < noticed - parted < 60
    cluster.switch.part(workers, apart=False)
    run.say("there is a way again")
    step = int(run.wait_for_words(AGAIN))
    run.say(f"the workers go on after step {step}")
    run.finish()
    run.say("the run is done")
    assert step in range(2, STEPS, 2)
    assert_undisturbed(cluster, "apart", undisturbed)


def test_a_host_is_cut_off_and_another_joins(cluster: Cluster, undisturbed: str) -> None:
    lost = cluster.switch.hosts[2]
    run = Stopwatch(cluster, "cut")
    run.wait_for_step(1)
    run.say("the first steps")
    run.wait_for_step(9)
    cluster.switch.cut(lost)
    cut = run.say(f"{lost.name} is cut off after step {cluster.step('cut')} of {STEPS}")
    why = run.wait_for_words(LOST)
    noticed = run.say(f"lost after step {why}")
    assert noticed - cut < 60
    # Its worker waits for the others, and hears of nothing; it hurts nobody.
    assert lost.has("RayTrainWorker")
    assert cluster.head.has("RunLog")
    joined = cluster.add_worker()
    run.say(f"{joined.name} is started")
    step = int(run.wait_for_words(AGAIN))
    run.say(f"the workers go on after step {step}")
    assert joined.has("RayTrainWorker")
    run.finish()
    run.say("the run is done")
    assert step in range(2, STEPS, 2)
    assert_undisturbed(cluster, "cut", undisturbed)
