"""Nodes that are lost and added while a run goes on, each a raylet of its own on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from torch import Tensor

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.blocks import open_blocks
from ray_prefopt.settings import dump_yaml
from ray_prefopt.training.checkpoint import LoopState, latest_checkpoint
from ray_prefopt.training.export import checkpoint_weights
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from tests.gang import run_gang
from tests.integration.conftest import STEPS, Toy
from tests.integration.heads import ROOT, environment, head_ports, started_head
from tests.integration.test_train import records_of, weights_of

pytestmark = [pytest.mark.ray, pytest.mark.soak, pytest.mark.timeout(900)]
PATIENCE_S = 240
TICK_S = 21
"""Ray looks at the nodes of a cluster every 20 s."""
# The token of all other tests, since Ray reads it once in a process, and clusters here are in this one.
ENVIRONMENT = environment(os.environ["RAY_AUTH_TOKEN"]) | {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Where Ray still counts a node that has just gone, it waits that long in vain.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
}


class Paced:
    """A run in a process of its own, on a cluster of a head and of nodes of one CPU each."""

    def __init__(self, cluster: Cluster, config: TrainConfig, folder: Path) -> None:
        self.cluster = cluster
        self.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self._pace, self._said = folder / "pace", folder / "said"
        self.let(0)
        file = folder / "run.yaml"
        file.write_text(dump_yaml(config))
        with self._said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.paced", str(file), str(self._pace)],
                cwd=ROOT, env=ENVIRONMENT | {"RAY_ADDRESS": cluster.address}, stdout=out, stderr=out,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self._said.read_text()

    def let(self, step: int) -> None:
        """Steps up to this one may happen."""
        scratch = self._pace.with_suffix(".new")
        scratch.write_text(str(step))
        scratch.replace(self._pace)

    def hear(self, words: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while words not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"not said: {words}\n{self.said}"
            time.sleep(0.1)

    def lose_a_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextmanager
def paced(toy: Toy, folder: Path, **run: Any) -> Iterator[Paced]:
    before = dict(os.environ)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name.startswith("RAY_")})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found = None
    try:
        config = toy.config(name="elastic", storage_path=str(folder / "runs"), **run)
        found = Paced(cluster, config, folder)
        yield found
    finally:
        if found is not None:
            found.process.kill()
            found.process.wait()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def undisturbed(config: TrainConfig, folder: Path, blocks: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of the same run by one rank without Ray, over the same blocks."""
    job = Job(config, str(folder), 0, blocks["train"], {"": blocks["eval"]})
    run_gang(1, _train, job)
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    return checkpoint_weights(config, Path(checkpoint.path))


def _train(job: Job) -> LoopState:
    def ignore(_: Any) -> None:
        pass

    return train_worker(job, torch.device("cpu"), Reports(ignore, ignore, ignore, ignore, ignore))


def test_a_run_shrinks_with_its_cluster_and_grows_again(toy: Toy, tmp_path: Path) -> None:
    """2 workers, then 1, then 2: one failure is allowed for, and growing is none."""
    with paced(toy, tmp_path, num_workers=[1, 2], max_failures=1, resize_interval_s=0) as run:
        run.let(5)
        run.hear(f"step 5/{STEPS}")
        run.lose_a_node()
        run.hear("warning: workers were lost after step 5: rank ")
        run.hear("workers were started again, 1 instead of 2: going on after step 3\n")
        run.nodes.append(run.cluster.add_node(num_cpus=1))
        time.sleep(TICK_S)
        run.let(6)
        run.hear("resizing from 1 to 2 workers after step 6, from the checkpoint of step 6\n")
        run.hear("workers were started again, 2 instead of 1: going on after step 6\n")
        run.let(STEPS)
        assert run.end() == 0, run.said
        said = run.said
    assert "starting them again, from the checkpoint of step 3\n" in said
    assert [said.count(text) for text in ("were lost", "started again", "resizing")] == [1, 2, 1], said
    folder = tmp_path / "runs" / "elastic"
    steps = [record for record in records_of(str(folder)) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))

    by_pairs = {
        open_blocks(str(path)).num_pairs: str(path) for path in (tmp_path / "runs" / "blocks").iterdir()
    }
    config = toy.config(num_workers=1)
    expected = undisturbed(config, tmp_path / "alone", {"train": by_pairs[4 * STEPS], "eval": by_pairs[9]})
    weights = weights_of(str(folder / "model"))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5)
    found = [latest_checkpoint(str(path / "checkpoints")) for path in (folder, tmp_path / "alone")]
    first, second = (checkpoint.state.order_hash for checkpoint in found if checkpoint is not None)
    assert first == second  # no pair skipped, none repeated


def test_a_run_that_misses_a_node_says_so_and_ends(toy: Toy, tmp_path: Path) -> None:
    with paced(toy, tmp_path, max_failures=-1, restart_timeout_s=45) as run:
        run.let(4)
        run.hear(f"step 4/{STEPS}")
        run.lose_a_node()
        run.hear("warning: workers were lost after step 4: rank ")
        run.hear("warning: no room for the workers yet, after ")
        run.hear("s of at most 45 s: 2 workers need 2 CPU; the cluster has 1 of 1 CPU free\n")
        assert run.end() == 1
        assert "ResourceError: 2 workers need 2 CPU; the cluster has 1 of 1 CPU free after " in run.said


def test_a_run_that_waits_for_a_node_can_be_interrupted(toy: Toy, tmp_path: Path) -> None:
    with paced(toy, tmp_path, max_failures=-1) as run:
        run.let(4)
        run.hear(f"step 4/{STEPS}")
        run.lose_a_node()
        run.hear("warning: no room for the workers yet, after ")
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(90) != 0
        assert run.said.endswith("\nKeyboardInterrupt\n")


# --- An autoscaler ---


def autoscaling(folder: Path, gcs: str) -> Path:
    """Ray's own provider of nodes that are raylets here: up to two with a CPU each, none to begin with."""
    config = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": HEAD,
            "launch_multiple": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        **{name: [] for name in LISTS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "workers": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
    }
    path = folder / "autoscaling.json"
    path.write_text(json.dumps(config))
    return path


LISTS = (
    "setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files",
)  # fmt: skip
HEAD = "f" * 51 + "00000"
WAIT = """
import ray
from ray_prefopt.config import RunConfig
from ray_prefopt.training.room import wait_for_room

ray.init("auto", log_to_driver=False, logging_level="ERROR")
print(ray.cluster_resources().get("CPU", 0))
wait_for_room(RunConfig(num_workers=[2, 3], resource_timeout_s=120))
print(ray.cluster_resources()["CPU"])
"""


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_autoscaler_is_asked_for_nodes(tmp_path: Path, version: str) -> None:
    ports, out = head_ports(), tmp_path / "out"
    gcs = f"127.0.0.1:{ports['port']}"
    settings = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    if version == "v2":
        settings |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD,
                     "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD}  # fmt: skip
    flags = (
        *("--include-dashboard", "false", "--num-cpus", "0"),
        *("--autoscaling-config", str(autoscaling(tmp_path, gcs))),
    )
    with started_head(ports, flags, ENVIRONMENT | settings, out) as head:
        time.sleep(10)
        assert head.poll() is None, out.read_text()
        done = subprocess.run(
            [sys.executable, "-c", WAIT], cwd=ROOT, env=ENVIRONMENT | {"RAY_ADDRESS": gcs},
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["0", "2.0"]
        assert "waiting up to 120 s: 2 workers need 2 CPU; the cluster has 0 of 0 CPU free\n" in done.stderr
