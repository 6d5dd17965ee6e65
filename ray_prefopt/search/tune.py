"""A search, seen from the driver: check, prepare the pairs once, run the trials, export the best, write the report."""

import json
import logging
import os
import random
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import optuna
import ray
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from ray import tune as ray_tune
from ray.tune import CheckpointConfig, PlacementGroupFactory
from ray.tune.search import BasicVariantGenerator
from rich.console import Console
from tensorboardX import SummaryWriter

from ray_prefopt.config import TrainConfig, eval_prefix
from ray_prefopt.errors import ConfigError, ResourceError, TrainingError
from ray_prefopt.search.measure import check_metric, make_measure
from ray_prefopt.search.points import Generator, Points, first_points, number_of_points, trial_name
from ray_prefopt.search.report import write_report
from ray_prefopt.search.schedulers import make_scheduler
from ray_prefopt.search.space import Point, Space, label, make_space
from ray_prefopt.search.table import Ended, Group, Limits, Recorder, Row, groups, read_rows
from ray_prefopt.search.tracking import end_search, trial_environment
from ray_prefopt.search.trial import PAUSING, Task, Trial
from ray_prefopt.search_config import SearchConfig, TuneConfig
from ray_prefopt.settings import dump_yaml
from ray_prefopt.storage import move_aside, write_text
from ray_prefopt.training.describe import describe
from ray_prefopt.training.export import export
from ray_prefopt.training.folder import MAY_CHANGE, differences, resolved
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.room import asked, asking_for_nodes
from ray_prefopt.training.run import NO_HOOKS, prepare_data
from ray_prefopt.training.workers import start_ray

CONFIG, BEST, STUDY, SUMMARY = "search.yaml", "best_config.yaml", "study.db", "summary.json"
JOINING_S = 20.0
"""Longest wait for nodes to join a cluster that is too small for a trial, unless run.resource_timeout_s is set."""
MAY_CHANGE_IN_SEARCH = {
    f"search.{name}"
    for name in ("trials", "max_concurrent", "max_hours", "max_worker_hours", "plateau", "min_gain")
}
"""Fields of `search` that a resumed search may have otherwise."""
HEAD_SHARE = 0.9
"""Of the head node's own resource; Ray Train takes a little of it for each run."""
RETRIES = 2
"""Times that Tune starts a trial's driver again after it died or found no room."""
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # data paths may be relative to the folder that the driver is in
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have logs of their own
    "TUNE_GLOBAL_CHECKPOINT_S": "5",
    "TUNE_RESULT_BUFFER_LENGTH": "1",
}


@dataclass(frozen=True)
class TuneResult:
    """What a search leaves behind."""

    name: str
    folder: str
    """search.yaml, results.csv, best_config.yaml, report.html, report.png, best, and a run for each trial."""
    trial: str
    """The best one."""
    point: Point
    metric: str
    value: float
    """Mean over seeds."""
    std: float | None
    """Over seeds; None with a single one."""
    config: str
    """best_config.yaml, which `ray-prefopt train --config` runs as it is."""
    model: str
    """Hugging Face folder of the best trial."""
    report: str
    trials: dict[str, int]
    """How many finished, were stopped, failed."""
    seconds: float
    """Of this call."""


def tune(
    config: TrainConfig, search: SearchConfig, *, resume: bool = False, hooks: Hooks = NO_HOOKS
) -> TuneResult:
    """Search for the best values of some of the config's fields; every trial is a run of `train`.

    `resume` goes on with a search of the same name: finished trials stay as they are, others go on from their
    checkpoints. `hooks` are those of every run. Raises PrefoptError: before the first trial what `train` would raise,
    ResourceError when the cluster has no room for a trial, and TrainingError when no trial came to its end.
    """
    begun = time.monotonic()
    config = named(config)
    space = make_space(config, search)
    metric, prefix = check_metric(config, search, set(space.dimensions))
    _describe_trial(config)
    folder = f"{config.run.storage_path}/{config.run.name}"
    _claim(folder, config, search, resume=resume)
    start_ray()
    slots = _slots(config, search)
    measure = make_measure(metric, prefix, search, _prepare(space, prefix))
    recorder = Recorder(folder, measure, number_of_points(space, search) * len(_seeds(config, search)), _say)
    environment = trial_environment(config, folder, _say)
    task = Task(str(config.run.name), space, measure, search.scheduler, search.grace, environment, hooks)
    _say(f"{recorder._total} trials, {slots} at a time, in {folder}")
    try:
        with _environment():
            _run_trials(task, search, recorder, folder, slots)
    except Ended as ended:
        recorder.stop_running()
        _say(f"{ended}: the search ends here; resume it with a larger one")
    except BaseException:
        recorder.stop_running()
        raise
    return _finish(task, config, folder, begun)


def describe_search(config: TrainConfig, search: SearchConfig) -> dict[str, Any]:
    """What `tune` would do, without Ray and without writing anything. Raises what it would raise beforehand."""
    config = named(config)
    space = make_space(config, search)
    metric, _ = check_metric(config, search, set(space.dimensions))
    plan = _describe_trial(config)
    _refuse_a_run(f"{config.run.storage_path}/{config.run.name}", config)
    dimensions = {name: item.model_dump(exclude_defaults=True) for name, item in space.dimensions.items()}
    return {
        "search": {
            "folder": f"{config.run.storage_path}/{config.run.name}",
            "space": json.loads(json.dumps(dimensions)),
            "recipes": {recipe.name: dict(recipe.values) for recipe in space.recipes},
            "trials": number_of_points(space, search) * len(_seeds(config, search)),
            "metric": metric,
            "scheduler": search.scheduler,
        },
        **{name: part for name, part in plan.items() if name != "run"},
        "run": {name: value for name, value in plan["run"].items() if name not in ("folder", "state")},
    }


# --- Before the trials ---


def _describe_trial(config: TrainConfig) -> dict[str, Any]:
    """What `train` would do, but for its folder. Raises what it would raise before it asks for workers."""
    run = config.run.model_copy(update={"name": f"{config.run.name}/trial"})
    return describe(config.model_copy(update={"run": run}))


def named(config: TrainConfig) -> TrainConfig:
    """The base config with a name for the search, and paths that every process understands."""
    name = config.run.name or f"search-{config.loss.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    return resolved(
        TrainConfig.model_validate(
            {
                **{section: getattr(config, section) for section in TrainConfig.model_fields},
                "run": config.run.model_copy(update={"name": name}),
            }
        )
    )


def _seeds(config: TrainConfig, search: SearchConfig) -> list[int]:
    return search.seeds or [config.run.seed]


def _refuse_a_run(folder: str, config: TrainConfig) -> None:
    """Raises ConfigError when the search's folder is that of a run of `train`."""
    fs, path = url_to_fs(folder)
    if fs.exists(f"{path}/config.json") and not config.run.force_new:
        raise ConfigError(
            f"{folder} is the folder of a run of `train`: give the search another run.name, or run.force_new, which "
            "moves that run aside"
        )


def _claim(folder: str, config: TrainConfig, search: SearchConfig, *, resume: bool) -> None:
    """Make the search's folder, with its config in it. Raises ConfigError when it is another's."""
    if resume and config.run.force_new:
        raise ConfigError(
            "--resume goes on with a search, and run.force_new begins it anew: leave one of them out"
        )
    _refuse_a_run(folder, config)
    fs, path = url_to_fs(folder)
    whole = TuneConfig(**{name: getattr(config, name) for name in TrainConfig.model_fields}, search=search)
    body = json.loads(whole.model_dump_json())
    if config.run.force_new:
        move_aside(fs, path)
    elif fs.exists(f"{path}/search.json"):
        if not resume:
            raise ConfigError(
                f"search {config.run.name!r} is in {folder} already: --resume goes on with it, run.force_new moves it "
                "aside, another run.name leaves it alone"
            )
        may_change = {f"run.{name}" for name in MAY_CHANGE} | MAY_CHANGE_IN_SEARCH
        differing = differences(json.loads(fs.cat_file(f"{path}/search.json")), body, may_change)
        if differing:
            raise ConfigError(
                f"search {config.run.name!r} in {folder} was begun otherwise: {'; '.join(differing)}. "
                "Use its values to resume it, or another run.name"
            )
    fs.makedirs(path, exist_ok=True)
    write_text(fs, f"{path}/search.json", json.dumps(body, indent=1))
    write_text(fs, f"{path}/{CONFIG}", dump_yaml(whole))


def _slots(config: TrainConfig, search: SearchConfig) -> int:
    """Trials at a time. Raises ResourceError when the cluster is too small for a single one."""
    run = config.run
    patience = run.resource_timeout_s if "resource_timeout_s" in run.model_fields_set else JOINING_S
    begun = time.monotonic()
    with nullcontext() if _room(config) else asking_for_nodes(run):
        while (room := _room(config)) < 1:
            if time.monotonic() - begun > min(patience, run.resource_timeout_s):
                needs, total = asked(run, run.min_workers), ray.cluster_resources()
                needed = ", ".join(f"{number:g} {name}" for name, number in needs.items())
                found = ", ".join(f"{total.get(name, 0):g} {name}" for name in needs)
                raise ResourceError(
                    f"a trial needs {needed} for its {run.min_workers} workers; the cluster has {found} in all, after "
                    f"waiting {time.monotonic() - begun:.0f} s. Lower run.num_workers or run.cpus_per_worker, or add "
                    "nodes"
                )
            time.sleep(0.5)
    return min(room, search.max_concurrent or room, number_of_points(make_space(config, search), search))


def _room(config: TrainConfig) -> int:
    """Trials that the whole cluster can hold, each with its most workers; 0 when it is too small for one."""
    total = ray.cluster_resources()

    def trials(workers: int) -> int:
        needs = asked(config.run, workers)
        return min(int(total.get(name, 0) // number) for name, number in needs.items() if number)

    return trials(config.run.max_workers) or min(trials(config.run.min_workers), 1)


def _prepare(space: Space, prefix: str) -> int:
    """Make the tokens of all trials; returns the pairs of the evaluation set with this prefix."""
    pairs = 0
    for config in space.data_variants():
        _, *eval_sets = prepare_data(config)
        names = [eval_prefix(name) for name in config.data.eval_sets]
        pairs = max(pairs, eval_sets[names.index(prefix)]["counts"]["pairs"])
    return pairs


# --- The trials ---


def _run_trials(task: Task, search: SearchConfig, recorder: Recorder, folder: str, slots: int) -> None:
    """Raises KeyboardInterrupt, Ended, and whatever a trial could not go on for."""
    space, base = task.space, task.space.base
    is_population = search.scheduler == "pbt"
    points = _population(space, search) if is_population else []
    search_alg: Any = BasicVariantGenerator()
    settings: dict[str, Any] = {"point": ray_tune.grid_search(points), "seed": _seeds(base, search)[0]}
    if not is_population:
        settings = {}
        search_alg = Generator(
            Points(space, search, _seeds(base, search), _study_url(folder), lambda: _limit(base, search))
        )

    def name_of(trial: Any) -> str:
        return trial.config.get("name") or trial_name(points.index(trial.config["point"]), None)

    # Drivers take no CPU. Where trials wait for others, Tune itself must hold them back: a share of the head node's
    # own resource does it, which every cluster has once.
    driver = {"memory": 1.0}
    if search.scheduler in PAUSING:
        driver = {"node:__internal_head__": int(HEAD_SHARE * 1e4 / slots) / 1e4}
    ray_tune.run(
        ray_tune.with_parameters(Trial, task=task),
        name="tune",
        storage_path=folder,
        config=settings,
        num_samples=1 if is_population else -1,  # the searcher says when it is at its end
        search_alg=search_alg,
        scheduler=make_scheduler(space, search),
        stop=Limits(search, recorder, base.run.max_workers),
        callbacks=[recorder],
        resources_per_trial=PlacementGroupFactory([driver]),
        checkpoint_config=CheckpointConfig(checkpoint_frequency=1, num_to_keep=4),
        trial_name_creator=name_of,
        trial_dirname_creator=name_of,
        max_failures=RETRIES,
        raise_on_failed_trial=False,
        reuse_actors=search.scheduler not in PAUSING,
        resume="AUTO+ERRORED" if _has_snapshot(folder) else False,
        verbose=0,
    )
    if any(row.status == "running" for row in recorder.rows.values()):  # Tune ends quietly on Ctrl-C
        raise KeyboardInterrupt


def _limit(config: TrainConfig, search: SearchConfig) -> int | None:
    """Trials at a time now, since clusters grow and shrink; None where Tune holds them back itself."""
    if search.scheduler in PAUSING:
        return None
    room = max(_room(config), 1)
    return min(room, search.max_concurrent or room)


def _has_snapshot(folder: str) -> bool:
    """Whether Tune has written down a state of this search to go on from."""
    fs, path = url_to_fs(folder)
    return bool(fs.glob(f"{path}/tune/experiment_state-*.json"))


def _population(space: Space, search: SearchConfig) -> list[Point]:
    """Where the trials of a population begin: each at a point of its own."""
    rng, number = random.Random(search.seed), number_of_points(space, search)
    points: list[Point] = []
    for point in first_points(space, search):
        whole = {**space.draw(rng), **point}
        points += [whole] if whole not in points else []
    while len(points) < number:
        point = space.draw(rng)
        points += [point] if point not in points else []
    return points[:number]


def _study_url(folder: str) -> str | None:
    """Optuna's database, for `optuna-dashboard` too; none where files cannot be written in place."""
    fs, path = url_to_fs(folder)
    return f"sqlite:///{path}/{STUDY}" if isinstance(fs, LocalFileSystem) else None


@contextmanager
def _environment() -> Iterator[None]:
    """Settings of Tune that have no other place; Tune and Optuna say what is wrong, not what they do."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "optuna")]
    levels = [logger.level for logger in loggers]
    os.environ.update(ENVIRONMENT)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


# --- After the trials ---


def _finish(task: Task, config: TrainConfig, folder: str, begun: float) -> TuneResult:
    rows = read_rows(folder)
    ranked = groups(rows)
    if not ranked or ranked[0].status != "finished":
        counted = ", ".join(
            f"{number} {status}" for status, number in Counter(row.status for row in rows).items()
        )
        reasons = [f"{row.name}: {row.error}" for row in rows if row.error][:1]
        raise TrainingError("; ".join([f"no trial came to its end ({counted or 'none began'})", *reasons]))
    best = ranked[0]
    fs, path = url_to_fs(folder)
    write_text(fs, f"{path}/{BEST}", _best_config(task, config, best))
    model = export(f"{config.run.storage_path}/{best.rows[0].run}", f"{folder}/best")
    report = write_report(folder)
    if isinstance(fs, LocalFileSystem):
        _write_board(path, rows, task.measure.metric)
    value = best.mean(task.measure.metric)
    assert value is not None
    end_search(config, folder, best.point, task.measure.metric, value, _say)
    result = TuneResult(
        name=str(config.run.name),
        folder=folder,
        trial=best.rows[0].name,
        point=best.point,
        metric=task.measure.metric,
        value=value,
        std=best.std(task.measure.metric),
        config=f"{folder}/{BEST}",
        model=model,
        report=report,
        trials=dict(Counter(row.status for row in rows)),
        seconds=round(time.monotonic() - begun, 1),
    )
    write_text(fs, f"{path}/{SUMMARY}", json.dumps(asdict(result), indent=1))
    return result


def _write_board(folder: str, rows: Sequence[Row], metric: str) -> None:
    """What TensorBoard shows under HPARAMS."""
    shutil.rmtree(f"{folder}/tensorboard", ignore_errors=True)
    for row in rows:
        if metric in row.metrics:
            values = {name: label(value) for name, value in row.point.items()}
            with SummaryWriter(f"{folder}/tensorboard") as writer:
                writer.add_hparams(
                    {**values, "run.seed": row.seed}, {f"hparam/{metric}": row.metrics[metric]}, row.name
                )


def _best_config(task: Task, config: TrainConfig, best: Group) -> str:
    """The winner as a file for `ray-prefopt train`, with where it comes from on top."""
    row = best.rows[0]
    found = task.space.config_at(row.point)
    run = found.run.model_copy(
        update={"name": f"{config.run.name}-best", "seed": row.seed, "force_new": False}
    )
    head = [
        f"# {row.name} of the search {config.run.name}: {task.measure.metric} {best.mean(task.measure.metric):.4f}"
    ]
    head += [f"# before it copied another trial: {json.dumps(point)}" for point in row.history]
    return "\n".join([*head, dump_yaml(found.model_copy(update={"run": run}))])


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)
