"""What each command does, seen from the driver: check what can be checked, prepare the pairs, run the workers."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from fsspec.core import url_to_fs
from rich.filesize import decimal
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel

from ray_prefopt.config import ModelConfig, Source, TrainConfig
from ray_prefopt.data.blocks import Blocks, open_blocks
from ray_prefopt.data.prepare import find_blocks, prepare
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.memory import ModelSize, estimate
from ray_prefopt.engine.optimizer import check_optim
from ray_prefopt.errors import ConfigError, OutOfMemoryError
from ray_prefopt.model.adapters import attach_lora
from ray_prefopt.model.load import check_tokenizer, compute_dtype, load_architecture, model_class
from ray_prefopt.model.tokenizer import load_tokenizer
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
    _check(config, hooks)
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
            job = _train_within_memory(job, log)
        _give_back(hooks, log)
    return _finish(job, ray.get(log.records.remote()))


def _train_within_memory(job: Job, log: Any) -> Job:
    """Run the workers to the end, with ever smaller micro-batches where run.auto_find_batch_size asks for it."""
    while True:
        try:
            run_training(job, log)
            return job
        except OutOfMemoryError as error:
            config = _with_half_the_micro_batch(job.config)
            ray.get(log.try_again.remote(f"{error}; going on with {config.run.micro_batch}"))
            _write_config(config, job.folder)
            job = replace(job, config=config)


def _with_half_the_micro_batch(config: TrainConfig) -> TrainConfig:
    run = config.run
    if run.micro_batch == 1:
        raise OutOfMemoryError(
            "out of memory with run.micro_batch 1 too: set model.gradient_checkpointing, engine.zero_stage 3 or a "
            "smaller data.max_length, or give the workers more memory"
        )
    half = {"micro_batch": run.micro_batch // 2}
    if run.eval_micro_batch is not None:
        half["eval_micro_batch"] = max(run.eval_micro_batch // 2, 1)
    return config.model_copy(update={"run": run.model_copy(update=half)})


def _with_found_micro_batch(config: TrainConfig, folder: str) -> TrainConfig:
    """The config with the micro-batches that the run has come down to already."""
    if not (config.run.auto_find_batch_size and has_checkpoints(f"{folder}/checkpoints")):
        return config
    fs, path = url_to_fs(folder)
    found = json.loads(fs.cat_file(f"{path}/config.json"))["run"]
    if not found.get("auto_find_batch_size") or found["micro_batch"] >= config.run.micro_batch:
        return config
    sizes = {name: found[name] for name in ("micro_batch", "eval_micro_batch")}
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
    with torch.device("meta"):
        model = model_class(architecture).from_config(
            architecture, trust_remote_code=config.model.trust_remote_code
        )
    plan: dict[str, Any] = {
        "model": _describe_model(config.model, architecture, model.num_parameters()),
        "pairs": {
            name or "eval": _describe_pairs(config, sources)
            for name, sources in {"train": data.train_sources, **data.eval_sets}.items()
            if sources
        },
        "workers": {
            "number": run.workers_text if run.is_elastic else run.max_workers,
            "each": f"{run.cpus_per_worker} CPU" + (", 1 GPU" if run.use_gpu else ""),
            "engine": f"ZeRO {engine.zero_stage}" if engine.kind == "zero" else "plain",
            **(_describe_memory(config, architecture, model) if data.train_sources else {}),
        },
    }
    if data.train_sources:
        unnamed = {"folder": f"{run.storage_path}/{config.loss.kind}-DATE-TIME"}
        plan["run"] = _describe_run(config) | ({} if is_named else unnamed)
    return plan


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


def _describe_memory(
    config: TrainConfig, architecture: PretrainedConfig, model: PreTrainedModel
) -> dict[str, str]:
    """Of each worker at the peak of a step; nothing where `engine.memory` has no estimate. `model` is on no device."""
    given, run, engine = config.model, config.run, config.engine
    if given.quantization or given.adapter or architecture.is_encoder_decoder:
        return {}
    parameters, trainable = model.num_parameters(), None
    if given.lora is not None:
        with torch.device("meta"):
            weights = attach_lora(model, given.lora, seed=0).parameters()
        trainable = sum(weight.numel() for weight in weights if weight.requires_grad)
    size = ModelSize.of(architecture.get_text_config(), parameters, trainable)
    if size is None:
        return {}
    tokens, scored = _largest_micro_batch(config)
    found = estimate(
        size,
        tokens=tokens,
        scored=scored,
        zero_stage=engine.zero_stage if engine.kind == "zero" else None,
        world_size=run.min_workers,  # the fewer share the model, the more has each
        is_half=compute_dtype(given, architecture) != torch.float32,
        checkpointing=given.gradient_checkpointing,
        offload_optimizer=engine.offload_optimizer != "none",
        offload_param=engine.offload_param != "none",
        device="cuda" if run.use_gpu else "cpu",
    )
    total, activations = decimal(found.device), decimal(found.activations)
    host = f"; {decimal(found.host)} of the host" if found.host else ""
    return {"memory": f"about {total}, of which {activations} for {tokens:,} tokens at once{host}"}


def _largest_micro_batch(config: TrainConfig) -> tuple[int, int]:
    """Tokens, and scored ones, of the longest pairs; as long as they may be while they are not prepared."""
    data, run = config.data, config.run
    blocks = find_blocks(data, config.model, data.train_sources, run.storage_path)
    if blocks is None:
        return 2 * data.max_length * run.micro_batch, 2 * data.max_length * run.micro_batch
    lengths = blocks.lengths
    is_packed = config.model.layout != "padded"
    shared = np.minimum(lengths.chosen_start, lengths.rejected_start) if is_packed else 0
    longest = np.argsort(shared - blocks.total_lengths)[: run.micro_batch]
    scored = blocks.chosen_lengths + blocks.rejected_lengths
    return int((blocks.total_lengths - shared)[longest].sum()), int(scored[longest].sum())


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


def _describe_run(config: TrainConfig) -> dict[str, Any]:
    run = config.run
    folder = run_folder(config)
    blocks = find_blocks(config.data, config.model, config.data.train_sources, run.storage_path)
    total_steps = make_plan(config, blocks).total_steps if blocks else run.max_steps
    state = "new"
    if not run.force_new:
        _refuse_other_config(config, folder)
        found = latest_checkpoint(f"{folder}/checkpoints", on_bad=run.on_bad_checkpoint, verify="sizes")
        state = f"resumes after step {found.state.step}" if found else state
        state = "finished" if _finished(folder, export=run.export) else state
    return {
        "folder": folder,
        "state": state,
        "steps": total_steps or "known when the pairs are prepared",
        "pairs_per_step": run.global_batch,
        "micro_batches_per_step": math.ceil(run.global_batch / (run.max_workers * run.micro_batch)),
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
    may_change = MAY_CHANGE | ({"micro_batch"} if config.run.auto_find_batch_size else set())
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


def _finish(job: Job, records: Sequence[Record]) -> TrainResult:
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
    )
    fs, path = url_to_fs(job.folder)
    write_text(fs, f"{path}/result.json", json.dumps(asdict(result), indent=1))
    return result
