"""What an operator has of a run that is going on: metrics at the node's endpoint, and logs that say whose they are."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.train.v2._internal.logging import LoggingManager
from transformers import TrainerCallback

from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.gauges import METRICS
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.run import train
from tests.integration.conftest import STEPS, Toy
from tests.integration.test_train import records_of
from tests.unit.test_dashboard import FILE as DASHBOARD

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PATIENCE_S = 300
HELD_AT = 6
OF_ACCIDENTS_AND_GPUS = re.compile(r"ray_(node_gpus|node_gram|node_manager_unexpected|memory_manager)_")

Samples = dict[str, dict[tuple[str, str], float]]
"""Values by metric, and by run and rank."""


@dataclass
class Hold(TrainerCallback):
    """Stops every worker at a step until a file is there."""

    file: str

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while state.global_step == HELD_AT and not Path(self.file).exists() and time.monotonic() < deadline:
            time.sleep(0.1)


@contextmanager
def held(toy: Toy, folder: Path) -> Iterator[list[TrainResult]]:
    """A run called `watched` that stands at a step; afterwards it is done, and its result in the list."""
    results: list[TrainResult] = []
    file = folder / "go on"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(train, toy.config(name="watched"), hooks=Hooks(callbacks=(Hold(str(file)),)))
        try:
            yield results
        finally:
            file.touch()
        results.append(running.result())


def scraped() -> Samples:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            tags = (sample.labels.get("run", ""), sample.labels.get("rank", ""))
            found.setdefault(sample.name, {})[tags] = sample.value
    return found


def test_a_run_is_seen_from_outside(toy: Toy, ray_local: None, tmp_path: Path) -> None:
    with held(toy, tmp_path) as results:
        deadline = time.monotonic() + PATIENCE_S
        samples = scraped()
        while samples.get("ray_prefopt_step", {}).get(("watched", "")) != HELD_AT - 1 or (
            "watched",
            "1",
        ) not in samples.get("ray_prefopt_data_wait_share", {}):
            assert time.monotonic() < deadline, samples.keys()
            time.sleep(1)
            samples = scraped()
    (result,) = results
    assert result.steps == STEPS

    ours = {name: values for name, values in samples.items() if name.startswith("ray_prefopt_")}
    unseen = {METRICS["warnings"].name}
    assert ours.keys() == {metric.name for metric in METRICS.values()} - unseen
    for metric in METRICS.values():
        if metric.name not in unseen:
            ranks = ["0", "1"] if "rank" in metric.tags else [""]
            assert {rank for run, rank in ours[metric.name] if run == "watched"} == set(ranks), metric.name
    record = next(record for record in records_of(result.folder) if record["step"] == HELD_AT - 1)
    for key in ("loss", "rewards/accuracies", "pairs_per_second", "tokens_per_second"):
        assert ours[METRICS[key].name]["watched", ""] == pytest.approx(record[key])
    assert ours["ray_prefopt_data_wait_share"]["watched", "0"] == pytest.approx(record["data_wait"])
    assert ours["ray_prefopt_starts"]["watched", ""] == 1
    assert ours["ray_prefopt_checkpoint_step"]["watched", ""] == 3
    assert 0 < ours["ray_prefopt_checkpoint_seconds"]["watched", ""] < PATIENCE_S

    asked = set(re.findall(r"\bray_\w+", " ".join(queries())))
    assert {
        name for name in asked - unseen - samples.keys() if not OF_ACCIDENTS_AND_GPUS.match(name)
    } == set()

    lines = [line for line in worker_logs() if line.get("run") == "watched"]
    begun = [line for line in lines if line["message"] == f"training begins after step 0 of {STEPS}"]
    assert sorted((line["rank"], line["step"]) for line in begun) == [(0, 0), (1, 0)]
    assert all({"node_id", "worker_id", "levelname"} <= line.keys() for line in begun)
    saved = [line for line in lines if line["message"].startswith("checkpoint of step 9 written in ")]
    assert sorted((line["rank"], line["step"]) for line in saved) == [(0, 9), (1, 9)]


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def worker_logs() -> list[dict[str, Any]]:
    folder = LoggingManager.get_log_directory()
    assert folder is not None
    files = Path(folder).glob("ray-train-app-worker-*.log")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
