"""What W&B, MLflow and the like are told: real trackers, writing to local files."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.training.trackers import IDS, Trackers, check_trackers, environment
from tests.gang import run_gang

RECORDS: list[dict[str, Any]] = [
    {"step": 1, "epoch": 0.5, "loss": 0.75},
    {"step": 2, "epoch": 1.0, "loss": 0.5},
    {"step": 2, "epoch": 1.0, "eval_loss": 0.25, "eval_rewards/accuracies": 1.0},
]


def config_of(*names: str) -> TrainConfig:
    run = {"name": "mine", "report_to": list(names)}
    return TrainConfig.model_validate({"model": {"path": "m"}, "data": {"train": "x"}, "run": run})


def fed(name: str, folder: Path, records: list[dict[str, Any]] = RECORDS, start: int = 0) -> list[str]:
    """Track in a process of its own, as each driver does; returns warnings."""
    (warnings,) = run_gang(1, _fed, name, folder, records, start)
    return list(warnings)


def _fed(name: str, folder: Path, records: list[dict[str, Any]], start: int) -> list[str]:
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": str(folder.parent / "mlruns"),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    warnings: list[str] = []
    trackers = Trackers(config_of(name), str(folder), warnings.append)
    trackers.begin(start)
    for record in records:
        trackers.log(record)
    trackers.end()
    return warnings


def wandb_records(file: Path) -> Iterator[Any]:
    """Protobufs of an offline run: 7 bytes of header, then LevelDB's log of fragments in blocks of 32 KiB."""
    data = file.read_bytes()
    offset, whole = 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:  # too little is left of the block for another record
            offset += 32768 - offset % 32768
            continue
        size, kind = struct.unpack("<HB", data[offset + 4 : offset + 7])
        whole += data[offset + 7 : offset + 7 + size]
        offset += 7 + size
        if kind in (1, 4):  # a whole record, or the last fragment of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_items(folder: Path, kind: str) -> list[dict[str, Any]]:
    """History or config of the offline runs under a folder, oldest first."""
    records = [
        record
        for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        for record in wandb_records(file)
    ]
    found = [record.history.item if kind == "history" else record.config.update for record in records]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
        for items in found
        if items
    ]


MORE = [{"step": 3, "epoch": 1.5, "loss": 0.25}]
"""Of a run that goes on after step 2."""


def test_wandb_gets_every_record_and_the_config(tmp_path: Path) -> None:
    assert fed("wandb", tmp_path / "run") == []
    rows = wandb_items(tmp_path / "run", "history")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [0.75, 0.5]
    assert [row["train/global_step"] for row in rows] == [1, 2, 2]
    assert rows[-1]["eval/rewards/accuracies"] == 1.0
    config = {
        name: value for update in wandb_items(tmp_path / "run", "config") for name, value in update.items()
    }
    assert (config["loss.kind"], config["loss.beta"], config["run.name"]) == ("simpo", 2.0, "mine")
    first = json.loads((tmp_path / "run" / IDS).read_text())["wandb"]
    assert fed("wandb", tmp_path / "run", MORE, start=2) == []
    assert json.loads((tmp_path / "run" / IDS).read_text())["wandb"] == first
    rows = wandb_items(tmp_path / "run", "history")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [0.75, 0.5, 0.25]


def test_mlflow_gets_every_record_and_the_config(tmp_path: Path) -> None:
    assert fed("mlflow", tmp_path / "run") == fed("mlflow", tmp_path / "run", MORE, start=2) == []
    (metric,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")  # one run, though it began twice
    values = [line.split()[1:] for line in metric.read_text().splitlines()]
    assert sorted(values, key=lambda each: int(each[1])) == [["0.75", "1"], ["0.5", "2"], ["0.25", "3"]]
    folder = metric.parents[1]
    assert (folder / "metrics" / "eval_rewards" / "accuracies").read_text().split()[1:] == ["1.0", "2"]
    assert (folder / "params" / "loss.beta").read_text() == "2.0"
    assert "mine" in (folder / "tags" / "mlflow.runName").read_text()


def test_a_tracker_that_fails_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "mlruns").touch()
    (warning,) = fed("mlflow", tmp_path / "run")
    assert warning.startswith("MLflowCallback is left out from here on: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wandbb", r"run\.report_to: wandbb cannot be used here: wandbb is not supported"),
        ("comet_ml", r"run\.report_to: comet_ml cannot be used here: CometCallback requires comet-ml"),
    ],
)
def test_trackers_that_are_not_there(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_trackers(["wandb", name])


def test_the_drivers_environment_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("UNRELATED", "x")
    found = environment()
    assert found["WANDB_PROJECT"] == "mine"
    assert "UNRELATED" not in found
