"""What each command does, seen from the driver: check what can be checked, prepare the pairs, run the workers."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from fsspec.core import url_to_fs
from transformers import EvalPrediction, PretrainedConfig

from ray_prefopt.config import ModelConfig, Source, TrainConfig
from ray_prefopt.data.balance import Costs, Layout
from ray_prefopt.data.blocks import Blocks, open_blocks
from ray_prefopt.data.plan import Plan
from ray_prefopt.data.prepare import find_blocks, prepare
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.optimizer import check_optim
from ray_prefopt.errors import ConfigError, OutOfMemoryError
from ray_prefopt.model.load import check_tokenizer, compute_dtype, load_architecture
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.training.batches import Batching, batching_of, longest
from ray_prefopt.training.callbacks import Returned
from ray_prefopt.training.checkpoint import (
    Checkpoint,
    LoopState,
    checkpoint_at,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    open_checkpoint,
    write_text,
)
from ray_prefopt.training.display import Display
from ray_prefopt.training.export import export
from ray_prefopt.training.footprint import Footprint, Outline, footprint
from ray_prefopt.training.hooks import Hooks, check_portable
from ray_prefopt.training.log import Event, closing_log
from ray_prefopt.training.loop import Job, Record, best_metric, make_plan
from ray_prefopt.training.predictions import Evaluation
from ray_prefopt.training.trackers import check_trackers, start_log
from ray_prefopt.training.workers import run_evaluation, run_training, start_ray

logger = logging.getLogger(__name__)

NO_HOOKS = Hooks()
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
    """The one with the best run.best_metric; the last one when nothing was evaluated."""
    model: str | None
    """Hugging Face folder of the last checkpoint."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of the worker that needed most: `seen`, and `estimated` where there is an estimate."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics of a model over its evaluation sets."""

    model: str
    pairs: dict[str, int]
    """Of each evaluation set by its name; an unnamed one is `eval`."""
    metrics: Record
    predictions: dict[str, EvalPrediction] = field(default_factory=dict, repr=False)
    """Of each set, when hooks.keep_predictions asks for them."""


def train(
    config: TrainConfig, *, hooks: Hooks = NO_HOOKS, observer: Callable[[Event], None] | None = None
) -> TrainResult:
    """Fine-tune a model on preference pairs: from pairs to a Hugging Face folder.

    The same config again resumes a run that did not finish, and returns the result of one that did. `hooks` is Python
    that runs on the workers; what its callbacks gather there is theirs again afterwards. `observer` hears every event
    of the run's log on the driver. Raises PrefoptError: ConfigError, DataError, ModelError, ResourceError and
    CheckpointError before any worker starts, NonFiniteError and TrainingError later.
    """
    config = resolved(config)
    architecture = _check(config, hooks)
    folder = run_folder(config)
    if not config.run.force_new:
        config = _with_found_micro_batch(config, folder)
        _refuse_other_config(config, folder)
        if (finished := _finished(folder, export=config.run.export)) is not None:
            logger.warning("run %s is finished: here is its result; run.force_new trains anew", finished.name)
            return finished
    _check_start(config, folder)
    start_ray()
    train_blocks = _prepare(config, config.data.train_sources)
    total_steps = make_plan(config, train_blocks).total_steps
    _claim(config, folder)
    job = _job(config, folder, hooks, train_blocks=train_blocks)
    log = start_log(config, folder)
    newest = _newest(job)
    state = newest.state if newest else LoopState()
    if state.step < total_steps and not state.stopped:
        if newest is not None:
            newest.check_resumable()
        with Display(log, total_steps, observer), closing_log(log):
            job = _train_within_memory(job, architecture, train_blocks, log)
        _give_back(hooks, log)
    return _finish(job, ray.get(log.records.remote()), ray.get(log.memory.remote()))


def _train_within_memory(job: Job, architecture: PretrainedConfig, blocks: Blocks, log: Any) -> Job:
    """Run the workers to the end, with ever smaller micro-batches where run.auto_find_batch_size asks for it.

    The log is told how much memory a worker should need, and then how much it did.
    """
    while True:
        expected = _expected(job.config, architecture, blocks)
        if expected is not None:
            ray.get(log.note.remote(f"memory: {expected}"))
        try:
            run_training(job, log)
        except OutOfMemoryError as error:
            config = _with_half_the_micro_batch(job.config, blocks)
            size = config.run.micro_batch_tokens or config.run.micro_batch
            ray.get(log.try_again.remote(f"{error}; going on with {size}"))
            _write_config(config, job.folder)
            job = replace(job, config=config)
            continue
        if expected is not None:
            is_telling = expected.is_telling(use_gpu=job.config.run.use_gpu)
            ray.get(log.compare_memory.remote(expected.estimate.device, is_telling))
        return job


def _expected(config: TrainConfig, architecture: PretrainedConfig, blocks: Blocks) -> Footprint | None:
    """What a worker should need. Never a reason to fail: not every model can be made on no device."""
    with suppress(Exception):
        outline = Outline.of(config, architecture)
        return footprint(config, outline, _pairs(config, blocks, outline), config.run.min_workers)
    return None


def _with_half_the_micro_batch(config: TrainConfig, blocks: Blocks) -> TrainConfig:
    """Raises OutOfMemoryError when the largest micro-batch is a single pair already."""
    run, tokens = config.run, config.run.micro_batch_tokens
    if tokens is None:
        is_single, half = run.micro_batch == 1, {"micro_batch": run.micro_batch // 2}
    else:
        layout: Layout = "padded" if config.model.layout == "padded" else "packed"
        is_single, half = tokens <= longest(blocks, Costs(layout)), {"micro_batch_tokens": tokens // 2}
    if is_single:
        pair = "too" if tokens is None else "too, which the longest pair has by itself"
        raise OutOfMemoryError(
            f"out of memory with {run.micro_batch_text} {pair}: set model.gradient_checkpointing, engine.zero_stage 3 "
            "or a smaller data.max_length, or give the workers more memory"
        )
    if run.eval_micro_batch is not None:
        half["eval_micro_batch"] = max(run.eval_micro_batch // 2, 1)
    return config.model_copy(update={"run": run.model_copy(update=half)})


def _with_found_micro_batch(config: TrainConfig, folder: str) -> TrainConfig:
    """The config with the micro-batches that the run has come down to already."""
    if not (config.run.auto_find_batch_size and has_checkpoints(f"{folder}/checkpoints")):
        return config
    fs, path = url_to_fs(folder)
    found = json.loads(fs.cat_file(f"{path}/config.json"))["run"]
    given = config.run.model_dump()
    name = "micro_batch" if config.run.micro_batch_tokens is None else "micro_batch_tokens"
    if not found.get("auto_find_batch_size") or (found.get(name) or given[name]) >= given[name]:
        return config
    sizes = {name: found[name] for name in (name, "eval_micro_batch")}
    return config.model_copy(update={"run": config.run.model_copy(update=sizes)})


def _give_back(hooks: Hooks, log: Any) -> None:
    """What callbacks gathered on rank 0 becomes that of the driver's own objects."""
    returned: Returned | None = ray.get(log.callbacks.remote())
    if returned is not None:
        for name in returned.give_back(hooks.callbacks):
            logger.warning(
                "%s holds something that cannot leave its worker: it is as it was before training", name
            )


def prepare_data(config: TrainConfig) -> list[dict[str, Any]]:
    """Tokenize the training and evaluation pairs; returns the manifests of their blocks."""
    config = resolved(config)
    start_ray()
    sets = [config.data.train_sources, *config.data.eval_sets.values()]
    prepared = [_prepare(config, sources) for sources in sets if sources]
    return [{"folder": blocks.folder, **blocks.manifest} for blocks in prepared]


def evaluate(config: TrainConfig, *, hooks: Hooks = NO_HOOKS) -> EvalResult:
    """Reward accuracy, margins and log-probabilities of a model on data.eval.

    The model is model.path: a Hugging Face folder or id, a checkpoint, or the folder of a run for its newest one.
    """
    if not config.data.eval_sets:
        raise ConfigError("nothing to evaluate on: got no data.eval; set it to held-out pairs")
    model = str(config.model.path)
    config = _of_checkpoint(resolved(config))
    _check(config, hooks)
    start_ray()
    folder = f"{config.run.storage_path}/evaluations/{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    job = _job(config, folder, hooks, train_blocks=None)
    log = start_log(config, folder)
    run_evaluation(job, log)
    found: Evaluation = ray.get(log.evaluation.remote())
    pairs = {name or "eval": open_blocks(path).num_pairs for name, path in job.eval_blocks.items()}
    predictions = {name or "eval": kept for name, kept in found.predictions.items()}
    return EvalResult(model, pairs, found.record, predictions)


def _of_checkpoint(config: TrainConfig) -> TrainConfig:
    """When model.path is a checkpoint or a run: with its own model and engine, and its loss if none was given."""
    checkpoint = find_checkpoint(config.model.path) if config.model.path else None
    if checkpoint is None:
        return config
    fs, folder = url_to_fs(checkpoint.path)
    saved = TrainConfig.model_validate_json(fs.cat_file(f"{folder}/config.json"))
    parts = {"model": saved.model, "engine": saved.engine}
    parts |= {} if "loss" in config.model_fields_set else {"loss": saved.loss}
    if not checkpoint.is_resumable:
        name = checkpoint.path.rstrip("/").rsplit("/", 1)[-1]
        exported = export(checkpoint.path, f"{config.run.storage_path}/evaluations/models/{name}")
        given = (
            {"lora": None, "adapter": exported}
            if saved.model.has_adapter
            else {"path": exported, "from_config": None}
        )
        return config.model_copy(update={**parts, "model": saved.model.model_copy(update=given)})
    run = config.run.model_copy(update={"resume_from": checkpoint.path})
    return config.model_copy(update={**parts, "run": run})


def describe(config: TrainConfig) -> dict[str, Any]:
    """What a command would do with this config, without Ray and without writing anything.

    Raises what it would raise before it asks for workers, but for rows that are not read yet.
    """
    is_named = config.run.name is not None
    config = resolved(config)
    architecture = _check(config)
    run, data, engine = config.run, config.data, config.engine
    outline = Outline.of(config, architecture)
    plan: dict[str, Any] = {
        "model": _describe_model(config.model, architecture, outline.parameters),
        "pairs": {
            name or "eval": _describe_pairs(config, sources)
            for name, sources in {"train": data.train_sources, **data.eval_sets}.items()
            if sources
        },
        "workers": {
            "number": run.workers_text if run.is_elastic else run.max_workers,
            "each": f"{run.cpus_per_worker} CPU" + (", 1 GPU" if run.use_gpu else ""),
            "engine": f"ZeRO {engine.zero_stage}" if engine.kind == "zero" else "plain",
        },
    }
    if data.train_sources:
        blocks = find_blocks(data, config.model, data.train_sources, run.storage_path)
        pairs = _pairs(config, blocks, outline) if blocks else None
        if (expected := footprint(config, outline, pairs, run.min_workers)) is not None:
            plan["workers"]["memory"] = str(expected)
        unnamed = {"folder": f"{run.storage_path}/{config.loss.kind}-DATE-TIME"}
        plan["run"] = _describe_run(config, pairs) | ({} if is_named else unnamed)
    return plan


def _pairs(config: TrainConfig, blocks: Blocks, outline: Outline) -> tuple[Batching, Plan]:
    """Those of training: how they become micro-batches, and steps."""
    return batching_of(blocks, config, outline.costs), make_plan(config, blocks)


# --- Parts of a plan ---


def _describe_model(config: ModelConfig, architecture: PretrainedConfig, parameters: int) -> dict[str, Any]:
    return {
        "architecture": architecture.model_type,
        "parameters": parameters,
        "dtype": str(compute_dtype(config, architecture)).removeprefix("torch."),
        "trained": _describe_trained(config),
    }


def _describe_trained(config: ModelConfig) -> str:
    if not config.has_adapter:
        return "all weights"
    return f"LoRA adapters of rank {config.lora.r}" if config.lora else f"the LoRA adapter {config.adapter}"


def _describe_pairs(config: TrainConfig, sources: Sequence[Source]) -> dict[str, Any]:
    blocks = find_blocks(config.data, config.model, sources, config.run.storage_path)
    if blocks is None:
        return {"sources": [source.path for source in sources], "prepared": False}
    return {
        "sources": [source.path for source in sources],
        "prepared": blocks.folder,
        "pairs": blocks.num_pairs,
        "tokens": int(blocks.total_lengths.sum()),
    }


def _describe_run(config: TrainConfig, pairs: tuple[Batching, Plan] | None) -> dict[str, Any]:
    run = config.run
    folder = run_folder(config)
    total_steps, micro_batches = run.max_steps, None
    if pairs is not None:
        batching, plan = pairs
        total_steps, micro_batches = plan.total_steps, batching.count(plan.step_ids(0), run.max_workers)
    elif run.micro_batch_tokens is None:
        micro_batches = math.ceil(run.global_batch / (run.max_workers * run.micro_batch))
    unknown, state = "known when the pairs are prepared", "new"
    if not run.force_new:
        _refuse_other_config(config, folder)
        found = latest_checkpoint(f"{folder}/checkpoints", on_bad=run.on_bad_checkpoint, verify="sizes")
        state = f"resumes after step {found.state.step}" if found else state
        state = "finished" if _finished(folder, export=run.export) else state
    return {
        "folder": folder,
        "state": state,
        "steps": total_steps or unknown,
        "pairs_per_step": run.global_batch,
        "micro_batches_per_step": micro_batches or unknown,
    }


# --- Checks ---


def _check(config: TrainConfig, hooks: Hooks = NO_HOOKS) -> PretrainedConfig:
    """Everything about model, engine, metrics and hooks that a driver can find out in seconds."""
    check_optim(config.optim)
    check_trackers(config.run.report_to)
    check_portable(hooks)
    best_metric(config.run, config.data.eval_sets, is_open=hooks.compute_metrics is not None)
    architecture = load_architecture(config.model)
    check_tokenizer(architecture, load_tokenizer(config.model))
    if config.engine.kind == "zero":
        build_ds_config(
            config.engine,
            dtype=str(compute_dtype(config.model, architecture)).removeprefix("torch."),
            max_grad_norm=config.optim.max_grad_norm,
            use_gpu=config.run.use_gpu,
        )
    return architecture


def _check_start(config: TrainConfig, folder: str) -> None:
    """Raises CheckpointError when run.resume_from is no whole checkpoint, ConfigError when it is about to be moved."""
    run = config.run
    if run.resume_from is None:
        return
    if run.force_new and run.resume_from.startswith(f"{folder}/"):
        raise ConfigError(
            f"run.resume_from {run.resume_from} is in the folder that run.force_new moves aside: "
            "copy it elsewhere first, or leave out one of the two"
        )
    open_checkpoint(run.resume_from, verify="sizes").check_resumable()


def _refuse_other_config(config: TrainConfig, folder: str) -> None:
    """Raises ConfigError when the folder has checkpoints of another config."""
    if not has_checkpoints(f"{folder}/checkpoints"):
        return
    fs, path = url_to_fs(folder)
    sizes = {"micro_batch", "micro_batch_tokens"}
    may_change = MAY_CHANGE | (sizes if config.run.auto_find_batch_size else set())
    old, new = json.loads(fs.cat_file(f"{path}/config.json")), config.model_dump(mode="json")
    differing = _differences(old, new, may_change)
    if differing:
        raise ConfigError(
            f"run {config.run.name!r} in {folder} was begun with another config: {'; '.join(differing)}. "
            "Use its values to resume it, another run.name, or run.force_new to move it aside"
        )


def _differences(old: Any, new: Any, may_change: Set[str], prefix: str = "") -> list[str]:
    """Dotted fields that differ, of those that must not, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [
            name for name in sorted(old.keys() | new.keys()) if not (prefix == "run." and name in may_change)
        ]
        return [
            line
            for name in names
            for line in _differences(old.get(name), new.get(name), may_change, f"{prefix}{name}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


# --- The run's folder ---


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


def _claim(config: TrainConfig, folder: str) -> None:
    """Make the run's folder, with its config in it; what is there is moved aside for run.force_new."""
    fs, path = url_to_fs(folder)
    if config.run.force_new and fs.exists(path):
        fs.mv(path, f"{path}.old-{datetime.now():%Y%m%d-%H%M%S}", recursive=True)
    fs.makedirs(path, exist_ok=True)
    _write_config(config, folder)


def _write_config(config: TrainConfig, folder: str) -> None:
    fs, path = url_to_fs(folder)
    write_text(fs, f"{path}/config.json", config.model_dump_json(indent=1))


def _job(config: TrainConfig, folder: str, hooks: Hooks, *, train_blocks: Blocks | None) -> Job:
    return Job(
        config,
        folder,
        load_tokenizer(config.model).pad_token_id,
        train_blocks.folder if train_blocks else None,
        {name: _prepare(config, sources).folder for name, sources in config.data.eval_sets.items()},
        hooks,
    )


def _prepare(config: TrainConfig, sources: Sequence[Source]) -> Blocks:
    return prepare(config.data, config.model, sources, config.run.storage_path)


def _newest(job: Job) -> Checkpoint | None:
    """The newest checkpoint of the run; refuses a torn one before workers are asked for."""
    return latest_checkpoint(job.checkpoints, on_bad=job.config.run.on_bad_checkpoint, verify="sizes")


def _finished(folder: str, *, export: bool) -> TrainResult | None:
    """The result of a finished run whose checkpoint, and model when it is asked for, are still there."""
    fs, path = url_to_fs(folder)
    if not fs.exists(f"{path}/result.json"):
        return None
    result = TrainResult(**json.loads(fs.cat_file(f"{path}/result.json")))
    wanted = [result.checkpoint, *([f"{folder}/model"] if export else [])]
    return result if all(fs.exists(url_to_fs(item)[1]) for item in wanted) else None


def _finish(job: Job, records: Sequence[Record], memory: dict[str, int]) -> TrainResult:
    """Export the last checkpoint and write result.json."""
    run = job.config.run
    checkpoint = _newest(job)
    assert checkpoint is not None
    best_step = checkpoint.state.best_step
    best = checkpoint_at(job.checkpoints, best_step) if best_step is not None else None
    result = TrainResult(
        name=str(run.name),
        folder=job.folder,
        steps=checkpoint.state.step,
        metrics={name: value for record in records for name, value in record.items()},
        checkpoint=checkpoint.path,
        best_checkpoint=best or checkpoint.path,
        model=export(checkpoint.path, f"{job.folder}/model") if run.export else None,
        memory=memory,
    )
    fs, path = url_to_fs(job.folder)
    write_text(fs, f"{path}/result.json", json.dumps(asdict(result), indent=1))
    return result
