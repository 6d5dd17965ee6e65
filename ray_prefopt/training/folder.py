"""The folder of a run: where it is, which config it belongs to, and what a finished run leaves in it."""

import json
import os
from collections.abc import Set
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.storage import move_aside, write_text
from ray_prefopt.training.checkpoint import has_checkpoints
from ray_prefopt.training.metrics import Record

MAY_CHANGE = {
    "num_workers", "use_gpu", "cpus_per_worker", "resources_per_worker", "accelerator_type", "placement_strategy",
    "env_vars", "eval_micro_batch", "log_steps", "log_first_step", "eval_steps", "eval_on_start", "eval_delay",
    "eval_samples", "eval_sample_tokens", "save_steps", "save_only_model", "keep_checkpoints", "best_metric",
    "best_mode", "max_failures", "resume_from", "on_bad_checkpoint", "on_save_error", "force_new", "export",
    "collective_timeout_s", "resource_timeout_s", "restart_timeout_s", "resize_interval_s", "storage_path", "report_to",
    "auto_find_batch_size",
}  # fmt: skip
"""Fields of `run` that a resumed run may have otherwise: none of them changes which step does what."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves behind."""

    name: str
    folder: str
    """Of the run: config.json, metrics.jsonl, tensorboard, checkpoints, model, result.json."""
    steps: int
    metrics: Record
    """Last values of everything that was logged."""
    checkpoint: str
    best_checkpoint: str
    """The one with the best run.best_metric, of those whose step was evaluated; the last one if none was."""
    model: str | None
    """Hugging Face folder of the last checkpoint."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the worker that needed most: `seen`, and `estimated` where there is an estimate."""
    pairs: int = 0
    """That there are to train on; each comes once in an epoch."""


def resolved(config: TrainConfig) -> TrainConfig:
    """The config that workers can use wherever they run: paths of local folders absolute, and the run named.

    A run without a name gets one of the loss and the time.
    """
    run, model = config.run, config.model
    name = run.name or f"{config.loss.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    storage = absolute(run.storage_path)
    resume_from = run.resume_from and absolute(run.resume_from)
    local = {
        field: absolute(path)
        for field, path in (("path", model.path), ("tokenizer", model.tokenizer), ("adapter", model.adapter))
        if path is not None and Path(path).expanduser().is_dir()
    }
    return config.model_copy(
        update={
            "run": run.model_copy(update={"name": name, "storage_path": storage, "resume_from": resume_from}),
            "model": model.model_copy(update=local),
        }
    )


def absolute(path: str) -> str:
    """The path as seen from anywhere on this machine; a URI is itself."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def run_folder(config: TrainConfig) -> str:
    return f"{config.run.storage_path}/{config.run.name}"


def claim(config: TrainConfig, folder: str) -> None:
    """Make the run's folder, with its config in it; what is there is moved aside for run.force_new."""
    fs, path = url_to_fs(folder)
    if config.run.force_new:
        move_aside(fs, path)
    fs.makedirs(path, exist_ok=True)
    write_config(config, folder)


def write_config(config: TrainConfig, folder: str) -> None:
    fs, path = url_to_fs(folder)
    write_text(fs, f"{path}/config.json", config.model_dump_json(indent=1))


def refuse_other_config(config: TrainConfig, folder: str) -> None:
    """Raises ConfigError when the folder has checkpoints of another config, or a search."""
    fs, path = url_to_fs(folder)
    if fs.exists(f"{path}/search.json"):
        raise ConfigError(
            f"{folder} is the folder of a search: give the run another run.name, or run.force_new, which moves the "
            "search aside"
        )
    if not has_checkpoints(f"{folder}/checkpoints"):
        return
    sizes = {"micro_batch", "micro_batch_tokens"} if config.run.auto_find_batch_size else set()
    may_change = {f"run.{name}" for name in MAY_CHANGE | sizes}
    old, new = json.loads(fs.cat_file(f"{path}/config.json")), config.model_dump(mode="json")
    differing = differences(old, new, may_change)
    if differing:
        raise ConfigError(
            f"run {config.run.name!r} in {folder} was begun with another config: {'; '.join(differing)}. "
            "Use its values to resume it, another run.name, or run.force_new to move it aside"
        )


def differences(old: Any, new: Any, may_change: Set[str], field: str = "") -> list[str]:
    """Dotted fields that differ, of those that must not, as `field: old -> new`.

    >>> differences({"run": {"seed": 1, "name": "a"}}, {"run": {"seed": 2, "name": "b"}}, {"run.name"})
    ['run.seed: 1 -> 2']
    """
    if field in may_change or old == new:
        return []
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [f"{field}: {old} -> {new}"]
    inside = {name: f"{field}.{name}" if field else name for name in sorted(old.keys() | new.keys())}
    return [
        line
        for name, at in inside.items()
        for line in differences(old.get(name), new.get(name), may_change, at)
    ]


def with_found_micro_batch(config: TrainConfig, folder: str) -> TrainConfig:
    """The config with the micro-batches that the run has come down to already."""
    if not (config.run.auto_find_batch_size and has_checkpoints(f"{folder}/checkpoints")):
        return config
    fs, path = url_to_fs(folder)
    found = json.loads(fs.cat_file(f"{path}/config.json"))["run"]
    if not found.get("auto_find_batch_size"):
        return config
    given = config.run.model_dump()
    size = "micro_batch" if config.run.micro_batch_tokens is None else "micro_batch_tokens"
    smaller = {
        name: found[name]
        for name in (size, "eval_micro_batch")
        if given[name] and found.get(name) and found[name] < given[name]
    }
    return config.model_copy(update={"run": config.run.model_copy(update=smaller)})


def finished(folder: str, *, export: bool) -> TrainResult | None:
    """The result of a finished run whose checkpoint, and model when it is asked for, are still there."""
    fs, path = url_to_fs(folder)
    if not fs.exists(f"{path}/result.json"):
        return None
    result = TrainResult(**json.loads(fs.cat_file(f"{path}/result.json")))
    wanted = [result.checkpoint, *([f"{folder}/model"] if export else [])]
    return result if all(fs.exists(url_to_fs(item)[1]) for item in wanted) else None
