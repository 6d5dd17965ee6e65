"""A trial: one run of `training.run.train`, in an actor of Tune's that takes no CPU."""

import json
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from fsspec.core import url_to_fs
from ray.tune import Trainable

from ray_prefopt.config import Interval, TrainConfig
from ray_prefopt.data.prepare import find_blocks
from ray_prefopt.errors import PrefoptError, ResourceError
from ray_prefopt.search.measure import Measure
from ray_prefopt.search.space import Point, Space
from ray_prefopt.training.checkpoint import find_checkpoint
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.job import make_plan
from ray_prefopt.training.log import Event
from ray_prefopt.training.metrics import Record
from ray_prefopt.training.run import NO_HOOKS, train
from ray_prefopt.training.workers import stop

POINTER = "run.json"
EVALUATIONS = 0.1
"""Share of the steps between evaluations where schedulers need some and run.eval_steps says nothing."""
PAUSING = ("pbt", "hyperband")
"""Schedulers that stop a trial to go on with it later."""
START_S = 60.0
"""Longest wait for workers that are just being started, to stop them."""
KEPT_FOR_OTHERS = 4
"""Checkpoints that a run of a population keeps: another trial may still be about to load one."""
FAILED = -1e9
"""Score of a trial that cannot be trained: below every other, and a number, which schedulers want."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What all trials of a search have in common."""

    name: str
    """Of the search: the runs are named after it."""
    space: Space
    measure: Measure
    scheduler: str
    grace: float
    """Unit of the schedulers' time, as a share of a run."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of experiment trackers, from the driver."""
    hooks: Hooks = NO_HOOKS

    def config(self, point: Point, seed: int, run: str, resume_from: str | None) -> TrainConfig:
        """The config of one run."""
        config = self.space.config_at(point)
        own = config.run
        evaluate: Interval | None = own.eval_steps or (EVALUATIONS if self.scheduler != "fifo" else None)
        pauses = self.scheduler in PAUSING
        update = {
            "name": run,
            "seed": seed,
            "eval_steps": evaluate,
            "save_steps": evaluate if pauses else own.save_steps,
            "keep_checkpoints": max(own.keep_checkpoints, KEPT_FOR_OTHERS)
            if pauses
            else own.keep_checkpoints,
            "resume_from": resume_from or own.resume_from,
            "force_new": False,
            "export": False,
        }
        return config.model_copy(update={"run": own.model_copy(update=update)})


@dataclass(frozen=True)
class Pointer:
    """What a checkpoint of Tune's holds: which run it is of, at which point, and the run's own checkpoint."""

    trial: str
    run: str
    point: Point
    checkpoint: str | None
    """None: the run had not saved yet."""


class Trial(Trainable):
    """One run, as Tune sees it: a result for each evaluation, and checkpoints that point at the run's own."""

    def setup(self, config: dict[str, Any], task: Task | None = None) -> None:
        assert task is not None  # tune.with_parameters gives it
        self._task = task
        self._own_name = f"{task.name}/{self.trial_name}"  # of a copied config, the name is the other trial's
        self._seed, self._point = config["seed"], dict(config["point"])
        self._found: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
        self._pointer: Pointer | None = None
        self._run: str | None = None
        self._saved: str | None = None
        self._held: Record | None = None
        self._controller: Any = None
        self._total_steps = 1

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become the next trial, in the process of one that has ended or was stopped."""
        self.cleanup()
        if self._run is not None:
            self._work.join(START_S)
            if self._work.is_alive():
                return False
        self.setup(new_config)  # tune.with_parameters adds the task
        return True

    def step(self) -> Result:
        """Wait for the next evaluation, or for the end; raises what the run raised, if it may go better next time."""
        if self._run is None:
            self._run, resume_from = next_run(self._own_name, self._point, self._pointer, self._storage_path)
            self._work = threading.Thread(
                target=self._run_to_end, args=(resume_from,), daemon=True, name="run"
            )
            self._work.start()
        result = self._found.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def cleanup(self) -> None:
        """Stop the workers of a run that is not at its end: they would outlive this process."""
        begun = time.monotonic()
        while self._run is not None and self._work.is_alive() and time.monotonic() - begun < START_S:
            if self._controller is not None:
                stop(self._controller)
                return
            time.sleep(0.2)

    def save_checkpoint(self, folder: str) -> None:
        pointer = Pointer(self._own_name, self._run or self._own_name, self._point, self._saved)
        if self._run is None and self._pointer is not None:  # asked before it was begun again
            pointer = self._pointer
        Path(folder, POINTER).write_text(json.dumps(asdict(pointer)))

    def load_checkpoint(self, folder: Any) -> None:
        self._pointer = Pointer(**json.loads(Path(folder, POINTER).read_text()))
        self._saved = self._pointer.checkpoint

    @property
    def _storage_path(self) -> str:
        return self._task.space.base.run.storage_path

    def _run_to_end(self, resume_from: str | None) -> None:
        os.environ |= self._task.environment
        try:
            config = self._task.config(self._point, self._seed, str(self._run), resume_from)
            blocks = find_blocks(
                config.data, config.model, config.data.train_sources, config.run.storage_path
            )
            assert blocks is not None, "the search prepares the pairs before its first trial"
            self._total_steps = make_plan(config, blocks).total_steps
            self._finish(train(config, hooks=self._task.hooks, observer=self._observe))
        except ResourceError as error:
            self._found.put(error)
        except PrefoptError as error:
            failed = {"score": FAILED, "progress": 1.0, "time": 1 / self._task.grace, "failed": str(error)}
            self._found.put({**failed, "done": True})
        except BaseException as error:
            self._found.put(error)

    def _observe(self, event: Event) -> None:
        kind, value = event
        if kind == "controller":
            self._controller = value
        elif kind == "saved":
            self._saved, step = value
            if self._held is not None and self._held["step"] == step:
                self._report(self._held)
            self._held = None
        elif kind == "metrics" and self._task.measure.metric in value and value["step"] < self._total_steps:
            # A scheduler that pauses has to know which checkpoint belongs to what it hears.
            if self._task.scheduler in PAUSING:
                self._held = value
            else:
                self._report(value)

    def _report(self, record: Record) -> None:
        self._found.put(self._result(record, record["step"]))

    def _result(self, record: Mapping[str, float], step: float) -> Result:
        progress = step / self._total_steps
        return {
            "score": self._task.measure.score(record),
            "progress": progress,
            "time": progress / self._task.grace,
            "run": self._run,
            "step_of_run": step,
            "point": self._point,
            "metrics": {name: value for name, value in record.items() if name.startswith("eval_")},
        }

    def _finish(self, result: TrainResult) -> None:
        self._saved = result.checkpoint
        final = self._result(result.metrics, result.steps)
        self._found.put({**final, "finished": True, "done": True})


def next_run(name: str, point: Point, restored: Pointer | None, storage_path: str) -> tuple[str, str | None]:
    """The run that a trial is or goes on with, and the checkpoint of another trial that it starts from, if any.

    A trial that copies another's weights begins a run of its own, named after what it copied and what it changed: the
    name is the same when the search is resumed.
    """
    if restored is None:
        return name, None
    if restored.trial == name and restored.point == point:
        return restored.run, None
    digest = xxhash.xxh3_64_hexdigest(json.dumps([point, restored.checkpoint], sort_keys=True).encode())[:6]
    return f"{name}.{digest}", _still_there(restored, storage_path)


def _still_there(pointer: Pointer, storage_path: str) -> str | None:
    """The donor's checkpoint, or the donor's newest when it has deleted that one since."""
    path = pointer.checkpoint
    if path is None or url_to_fs(path)[0].exists(url_to_fs(path)[1]):
        return path
    found = find_checkpoint(f"{storage_path}/{pointer.run}")
    return found.path if found else None
