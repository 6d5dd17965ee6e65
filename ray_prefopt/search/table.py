"""What became of each trial: the table that is shown, written to results.csv, ranked and drawn."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fsspec.core import url_to_fs
from ray import cloudpickle
from ray.tune import Callback, Stopper

from ray_prefopt.errors import PrefoptError, TrainingError
from ray_prefopt.search.measure import Measure
from ray_prefopt.search.space import Point, show
from ray_prefopt.search_config import SearchConfig
from ray_prefopt.storage import write_text

TRIALS, RESULTS = "trials.json", "results.csv"


@dataclass
class Row:
    """One trial: a point with one seed."""

    name: str
    point: Point
    seed: int
    status: str = "running"
    """running, finished, stopped (by the scheduler or a budget), or failed."""
    run: str = ""
    """Of `training.run`, which lies in a folder of that name; several in turn where trials copy each other."""
    score: float | None = None
    step: int = 0
    progress: float = 0.0
    """Share of the steps."""
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    error: str | None = None
    history: list[Point] = field(default_factory=list)
    """Points that the trial left behind when it copied another."""


@dataclass(frozen=True)
class Group:
    """The trials of one point, one per seed."""

    rows: tuple[Row, ...]
    seeds: int = 1
    """How many trials a point has when all have begun."""

    @property
    def point(self) -> Point:
        return self.rows[0].point

    @property
    def status(self) -> str:
        """`finished` when all are; else the first of failed, stopped, running that any of them is. Stopped, too, when
        the search came to its end before all had begun."""
        states = {row.status for row in self.rows} | ({"stopped"} if len(self.rows) < self.seeds else set())
        return next((state for state in ("failed", "stopped", "running") if state in states), "finished")

    def values(self, metric: str) -> list[float]:
        return [row.metrics[metric] for row in self.rows if metric in row.metrics]

    def mean(self, metric: str) -> float | None:
        return mean(values) if (values := self.values(metric)) else None

    def std(self, metric: str) -> float | None:
        """Over seeds; None with fewer than two."""
        return stdev(values) if len(values := self.values(metric)) > 1 else None

    @property
    def score(self) -> float:
        scores = [row.score for row in self.rows if row.score is not None]
        return mean(scores) if scores else -math.inf


def groups(rows: Sequence[Row]) -> list[Group]:
    """The rows by point, best first; what did not train to its end has no model, and comes after all that did."""
    by_point: dict[str, list[Row]] = {}
    for row in rows:
        by_point.setdefault(row.name.partition("-seed-")[0], []).append(row)
    seeds = max(map(len, by_point.values()), default=1)
    found = [Group(tuple(members), seeds) for members in by_point.values()]
    return sorted(found, key=lambda group: (group.status == "finished", group.score), reverse=True)


def read_rows(folder: str) -> list[Row]:
    """The trials of a search, from its folder; none when it has not begun."""
    fs, path = url_to_fs(folder)
    if not fs.exists(f"{path}/{TRIALS}"):
        return []
    return [Row(**row) for row in json.loads(fs.cat_file(f"{path}/{TRIALS}"))]


def results_csv(rows: Sequence[Row], measure: Measure) -> str:
    """A line per trial, best first: rank of its point, values, metric with mean and std over seeds, cost, error."""
    fields = list(dict.fromkeys(name for row in rows for name in row.point))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics if name != measure.metric))
    head = ["rank", "trial", "status", *fields, "seed", measure.metric, "mean", "std", "margin_per_token"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, "score", "step", "progress", "seconds", *metrics, "run", "error"])
    for rank, group in enumerate(groups(rows), start=1):
        for row in group.rows:
            margin = measure.margin_of(row.metrics) if row.metrics else None
            values = [row.point.get(name) for name in fields]
            found = [row.metrics.get(measure.metric), group.mean(measure.metric), group.std(measure.metric)]
            cost = [row.score, row.step, round(row.progress, 4), round(row.seconds, 1)]
            rest = [row.metrics.get(name) for name in metrics]
            writer.writerow(
                [
                    rank,
                    row.name,
                    row.status,
                    *values,
                    row.seed,
                    *found,
                    margin,
                    *cost,
                    *rest,
                    row.run,
                    row.error,
                ]
            )
    return out.getvalue()


class Recorder(Callback):
    """Keeps the rows up to date with what Tune hears, on disk too, and says a line about each trial that ends."""

    def __init__(self, folder: str, measure: Measure, total: int, say: Callable[[str], None]) -> None:
        self.rows = {row.name: row for row in read_rows(folder)}
        self.fatal: BaseException | None = None
        """What a trial could not go on for, after Tune tried it again."""
        self._fs, self._folder = url_to_fs(folder)
        self._measure, self._total, self._say = measure, total, say

    def on_trial_start(self, *_: Any, **info: Any) -> None:
        trial = info["trial"]
        config = trial.config
        row = self.rows.setdefault(str(trial), Row(str(trial), config["point"], config["seed"]))
        row.status, row.error = "running", None
        self._write()

    def on_trial_result(self, *_: Any, **info: Any) -> None:
        row, result = self.rows[str(info["trial"])], info["result"]
        row.seconds = result["time_total_s"]
        if "failed" in result:
            row.error = result["failed"]
        else:
            if result["point"] != row.point:
                row.history.append(row.point)
                self._say(f"{row.name} copies another trial and goes on with {_values(result['point'])}")
            row.point, row.run, row.score = result["point"], result["run"], result["score"]
            row.step, row.progress = int(result["step_of_run"]), result["progress"]
            row.metrics = dict(result["metrics"])
        if result.get("finished"):
            row.status = "finished"
        self._write()

    def on_trial_complete(self, *_: Any, **info: Any) -> None:
        trial = info["trial"]
        row = self.rows[str(trial)]
        if row.status != "finished":
            row.status = "failed" if row.error else "stopped"
            actor = trial.temporary_state.ray_actor
            if actor is not None:  # kept for the next trial, it would let the run go on
                actor.cleanup.remote()
        self._tell(row)

    def on_trial_error(self, *_: Any, **info: Any) -> None:
        trial = info["trial"]
        row = self.rows.setdefault(str(trial), Row(str(trial), trial.config["point"], trial.config["seed"]))
        cause = _cause(trial)
        row.status, row.error = "failed", str(cause).strip()
        self.fatal = self.fatal or cause
        self._tell(row)

    def stop_running(self) -> None:
        """What runs now does not any more."""
        for row in self.rows.values():
            row.status = "stopped" if row.status == "running" else row.status
        self._write()

    def _tell(self, row: Row) -> None:
        self._write()
        ended = sum(other.status != "running" for other in self.rows.values())
        metric = row.metrics.get(self._measure.metric)
        found = "" if metric is None else f" {self._measure.metric} {metric:.4f} at step {row.step}"
        reason = f" ({row.error.splitlines()[0]})" if row.error else ""
        self._say(f"[{ended}/{self._total}] {row.name} {row.status}{found} | {_values(row.point)}{reason}")

    def _write(self) -> None:
        rows = list(self.rows.values())
        write_text(self._fs, f"{self._folder}/{TRIALS}", json.dumps([asdict(row) for row in rows], indent=1))
        write_text(self._fs, f"{self._folder}/{RESULTS}", results_csv(rows, self._measure))


def _cause(trial: Any) -> BaseException:
    """What a trial raised, or what became of its process."""
    path = trial.pickled_error_file
    if path is not None and Path(path).exists():
        error = cloudpickle.loads(Path(path).read_bytes())
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, PrefoptError) else TrainingError(f"{trial}: {error}")
    return TrainingError(f"{trial} could not be started")


def _values(point: Point) -> str:
    return " ".join(f"{name} {show(value)}" for name, value in point.items())


class Ended(Exception):  # noqa: N818  # nothing is wrong
    """The search's budget is used up; trials that are running are left as they are, for `resume`."""


class Limits(Stopper):
    """Ends the search when its budget is used up, or when a trial says that no trial can go on."""

    def __init__(self, search: SearchConfig, recorder: Recorder, workers: int) -> None:
        self._search, self._recorder, self._workers = search, recorder, workers
        self._begun = time.monotonic()

    def __call__(self, *_: Any) -> bool:
        """Whether to stop this trial: never by itself."""
        return False

    def stop_all(self) -> bool:
        """Raises rather than stops: trials that Tune has stopped are not gone on with by a later `resume`."""
        hours = (time.monotonic() - self._begun) / 3600
        used = sum(row.seconds for row in self._recorder.rows.values()) * self._workers / 3600
        if self._recorder.fatal is not None:
            raise self._recorder.fatal
        if self._search.max_hours is not None and hours >= self._search.max_hours:
            raise Ended(f"search.max_hours {self._search.max_hours:g} is used up")
        if self._search.max_worker_hours is not None and used >= self._search.max_worker_hours:
            raise Ended(f"search.max_worker_hours {self._search.max_worker_hours:g} is used up")
        return False
