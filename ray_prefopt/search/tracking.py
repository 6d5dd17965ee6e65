"""A search in experiment trackers: one group of W&B, and one run of MLflow with a child for each trial."""

import json
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from fsspec.core import url_to_fs

from ray_prefopt.config import TrainConfig
from ray_prefopt.search.space import Point, show
from ray_prefopt.storage import write_text
from ray_prefopt.training.trackers import IDS, environment


def trial_environment(config: TrainConfig, folder: str, warn: Callable[[str], None]) -> dict[str, str]:
    """What trackers find in the environment of each trial: the driver's settings, and which search it belongs to.

    Opens the search's own run of MLflow, or the one that it had before it was resumed.
    """
    if not config.run.report_to:
        return {}
    found = {"WANDB_RUN_GROUP": str(config.run.name), **environment()}
    if "mlflow" in config.run.report_to:
        tags = {"search": config.run.name, **json.loads(found.get("MLFLOW_TAGS", "{}"))}
        try:
            found["MLFLOW_TRACKING_URI"] = import_module("mlflow").get_tracking_uri()
            tags["mlflow.parentRunId"] = _parent(config, folder)
        except Exception as error:  # of a tracker and its network
            warn(f"MLflow has no run of the search itself: {type(error).__name__}: {error}")
        found["MLFLOW_TAGS"] = json.dumps(tags)
    return found


def end_search(
    config: TrainConfig, folder: str, point: Point, metric: str, value: float, warn: Callable[[str], None]
) -> None:
    """Tell MLflow's run of the search what was found, and end it."""
    parent = _known_parent(folder) if "mlflow" in config.run.report_to else None
    if parent is None:
        return
    try:
        client = import_module("mlflow").MlflowClient()
        for name, best in point.items():  # no parameters, which could not change when more trials follow
            client.set_tag(parent, f"best.{name}", show(best))
        client.log_metric(parent, metric, value)
        client.set_terminated(parent)
    except Exception as error:  # as above
        warn(f"MLflow was not told of the best trial: {type(error).__name__}: {error}")


def _parent(config: TrainConfig, folder: str) -> str:
    """The id of the search's run."""
    known = _known_parent(folder)
    client = import_module("mlflow").MlflowClient()
    if known is not None:
        client.update_run(known, status="RUNNING")
        return known
    experiment = _experiment(client)
    run_id = str(client.create_run(experiment, run_name=config.run.name).info.run_id)
    fs, path = url_to_fs(folder)
    write_text(fs, f"{path}/{IDS}", json.dumps({"mlflow": run_id}))
    return run_id


def _experiment(client: Any) -> str:
    """The id of the experiment that the trials' runs are in, made where there is none of that name."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


def _known_parent(folder: str) -> str | None:
    fs, path = url_to_fs(folder)
    if not fs.exists(f"{path}/{IDS}"):
        return None
    run_id: str = json.loads(fs.cat_file(f"{path}/{IDS}"))["mlflow"]
    return run_id
