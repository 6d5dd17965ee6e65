"""What experiment trackers are told of a search: a real MLflow store on disk."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.search.tracking import end_search, trial_environment
from ray_prefopt.training.trackers import Trackers
from tests.gang import run_gang

METRIC = "eval_logps_mean/accuracies"


def config_of(*names: str) -> TrainConfig:
    run = {"name": "sweep", "report_to": list(names)}
    return TrainConfig.model_validate({"model": {"path": "m"}, "data": {"train": "x"}, "run": run})


def _search_twice(folder: Path) -> list[str]:
    """A search with one trial, gone on with once, in a process of its own as each driver is; returns warnings."""
    store = {"MLFLOW_TRACKING_URI": str(folder / "mlruns"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    os.environ |= {**store, "MLFLOW_EXPERIMENT_NAME": "prefs", "MLFLOW_TAGS": '{"team": "a"}'}
    os.environ |= {"WANDB_PROJECT": "mine"}
    warnings: list[str] = []
    (folder / "sweep").mkdir()  # which the search has made by then
    config = config_of("mlflow")
    for value in (0.75, 0.875):
        found = trial_environment(config, str(folder / "sweep"), warnings.append)
        end_search(config, str(folder / "sweep"), {"loss.beta": value}, METRIC, value, warnings.append)
    assert found["WANDB_RUN_GROUP"] == "sweep"
    assert found["WANDB_PROJECT"] == "mine"
    os.environ |= found
    trial = config.model_copy(update={"run": config.run.model_copy(update={"name": "sweep/trial-000"})})
    trackers = Trackers(trial, str(folder / "sweep/trial-000"), warnings.append)
    trackers.begin(0)
    trackers.log({"step": 1, "epoch": 1.0, "loss": 0.5})
    trackers.end()
    return warnings


def content(folder: Path, *names: str) -> dict[str, str]:
    return {name: (folder / name).read_text().strip() for name in names}


def test_trials_are_children_of_the_searchs_run_in_mlflow(tmp_path: Path) -> None:
    assert run_gang(1, _search_twice, tmp_path) == [[]]
    runs = {path.parent.name: path.parent for path in tmp_path.glob("mlruns/*/*/meta.yaml")}
    tags = {
        run_id: content(run / "tags", *(tag.name for tag in (run / "tags").iterdir()))
        for run_id, run in runs.items()
    }
    assert len(runs) == 2
    (parent,) = (run_id for run_id, found in tags.items() if found["mlflow.runName"] == "sweep")
    (child,) = (run_id for run_id, found in tags.items() if found["mlflow.runName"] == "sweep/trial-000")
    assert tags[child]["mlflow.parentRunId"] == parent
    assert (tags[child]["search"], tags[child]["team"]) == ("sweep", "a")
    assert tags[parent]["best.loss.beta"] == "0.875"
    values = [line.split()[1] for line in (runs[parent] / "metrics" / METRIC).read_text().splitlines()]
    assert values == ["0.75", "0.875"]  # the second time, the search goes on in the run it had


def test_without_trackers_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert trial_environment(config_of(), str(tmp_path), pytest.fail) == {}
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_reached_costs_its_run_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://here")
    warnings: list[str] = []
    found: dict[str, Any] = trial_environment(config_of("mlflow"), str(tmp_path), warnings.append)
    assert json.loads(found["MLFLOW_TAGS"]) == {"search": "sweep"}
    (tmp_path / "trackers.json").write_text('{"mlflow": "0123"}')
    end_search(config_of("mlflow"), str(tmp_path), {}, METRIC, 1.0, warnings.append)
    assert warnings[0].startswith("MLflow has no run of the search itself: ")
    assert "nowhere" in warnings[0]
    assert warnings[1].startswith("MLflow was not told of the best trial: ")
