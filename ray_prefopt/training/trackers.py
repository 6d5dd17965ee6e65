"""Experiment trackers: transformers' integrations, fed from the run's log.

They live with the log, not with a worker, so that workers that are started again go on in the same tracked run; a run
that is resumed finds the tracker's id in its folder.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.training.log import RunLog

ENVIRONMENT = (
    "CLEARML_",
    "COMET_",
    "DVCLIVE_",
    "HF_MLFLOW_",
    "MLFLOW_",
    "NEPTUNE_",
    "SWANLAB_",
    "TRACKIO_",
    "WANDB_",
)
"""Beginnings of the variables by which trackers are set up."""
IDS = "trackers.json"


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError when transformers has no integration of a name, or what it needs is not installed."""
    for name in names:
        try:
            for kind in get_reporting_integration_callbacks([name]):
                kind()
        except (ImportError, RuntimeError, ValueError) as error:
            raise ConfigError(f"run.report_to: {name} cannot be used here: {error}") from error


def environment() -> dict[str, str]:
    """What the driver's environment says to trackers."""
    return {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)}


def start_log(config: TrainConfig, folder: str) -> Any:
    """The RunLog of a run, with the trackers of run.report_to, set up as the driver's environment says.

    On the driver's node: a run outlives every other one.
    """
    log: Any = RunLog
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    if not config.run.report_to:
        return log.options(scheduling_strategy=here).remote(folder)
    with_trackers = log.options(scheduling_strategy=here, runtime_env={"env_vars": environment()})
    return with_trackers.remote(folder, partial(Trackers, config, folder))


class Trackers:
    """The integrations of a run. One that fails is left out from then on: tracking is never worth failing for."""

    def __init__(self, config: TrainConfig, folder: str, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._folder = Path(folder) if "://" not in folder else None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("WANDB_DIR", folder)
            self._resume_ids(self._folder)
        self._arguments = _Arguments(
            output_dir=folder, run_name=config.run.name, seed=config.run.seed, use_cpu=True, report_to="none"
        )
        self._arguments.values = flat(config.model_dump(mode="json"))
        self._state = TrainerState()
        self._callbacks = [kind() for kind in get_reporting_integration_callbacks(list(config.run.report_to))]

    def begin(self, step: int) -> None:
        """Workers begin after `step`."""
        self._state.global_step = step
        self._call("on_train_begin")
        if self._folder is not None:
            (self._folder / IDS).write_text(json.dumps(_ids()))

    def log(self, record: Mapping[str, Any]) -> None:
        self._state.global_step, self._state.epoch = record["step"], record.get("epoch", 0.0)
        self._call("on_log", logs={name: value for name, value in record.items() if name != "step"})

    def samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """To W&B as a table; the others have no place for texts."""
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None and samples:
            table = wandb.Table(columns=list(samples[0]), data=[list(sample.values()) for sample in samples])
            wandb.log({"samples": table, "train/global_step": self._state.global_step})

    def end(self) -> None:
        """Have everything written: this process may be killed now."""
        self._call("on_train_end")
        for module, finish in (("wandb", "teardown"), ("mlflow", "flush_async_logging")):
            if self._callbacks and module in sys.modules:
                getattr(sys.modules[module], finish)()

    def _call(self, event: str, **values: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, event)(self._arguments, self._state, TrainerControl(), model=None, **values)
            except Exception as error:  # of a tracker and its network
                self._callbacks.remove(callback)
                self._warn(
                    f"{type(callback).__name__} is left out from here on: {type(error).__name__}: {error}"
                )

    @staticmethod
    def _resume_ids(folder: Path) -> None:
        ids = json.loads((folder / IDS).read_text()) if (folder / IDS).exists() else {}
        if "wandb" in ids:
            os.environ |= {"WANDB_RUN_ID": ids["wandb"], "WANDB_RESUME": "allow"}
        if "mlflow" in ids:
            os.environ["MLFLOW_RUN_ID"] = ids["mlflow"]


class _Arguments(TrainingArguments):
    """What trackers read: the run's name, and its config where they expect transformers' arguments."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config by dotted names, as trackers show parameters.

    >>> flat({"run": {"seed": 1, "name": "a"}})
    {'run.seed': 1, 'run.name': 'a'}
    """
    named: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            named |= flat(value, f"{prefix}{name}.")
        else:
            named[prefix + name] = value
    return named


def _ids() -> dict[str, str]:
    """Of the runs that are open in this process."""
    ids = {}
    if (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
        ids["wandb"] = wandb.run.id
    if (mlflow := sys.modules.get("mlflow")) is not None and (active := mlflow.active_run()) is not None:
        ids["mlflow"] = active.info.run_id
    return ids
