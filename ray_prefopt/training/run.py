"""What each command does, seen from the driver: check what can be checked, prepare the pairs, run the workers."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import ray
from fsspec.core import url_to_fs
from transformers import EvalPrediction, PretrainedConfig

from ray_prefopt.config import EngineConfig, RunConfig, Source, TrainConfig
from ray_prefopt.data.blocks import Blocks, open_blocks
from ray_prefopt.data.plan import Plan
from ray_prefopt.data.prepare import prepare
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.optimizer import CONVERTED, can_change_workers, check_optim
from ray_prefopt.engine.zero import check_ds_config
from ray_prefopt.errors import ConfigError, OutOfMemoryError
from ray_prefopt.model.load import check_tokenizer, compute_dtype, load_architecture
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.storage import write_text
from ray_prefopt.training.batches import Batching, batching_of, longest_pair
from ray_prefopt.training.callbacks import Returned
from ray_prefopt.training.checkpoint import (
    Checkpoint,
    LoopState,
    checkpoint_at,
    find_checkpoint,
    has_checkpoints,
    latest_checkpoint,
    open_checkpoint,
)
from ray_prefopt.training.display import Display
from ray_prefopt.training.export import export
from ray_prefopt.training.folder import (
    TrainResult,
    claim,
    finished,
    refuse_other_config,
    resolved,
    run_folder,
    with_found_micro_batch,
    write_config,
)
from ray_prefopt.training.footprint import Footprint, Outline, footprint
from ray_prefopt.training.hooks import Hooks, check_portable
from ray_prefopt.training.job import Job, best_metric, make_plan
from ray_prefopt.training.log import Event, closing_log
from ray_prefopt.training.metrics import Record
from ray_prefopt.training.predictions import Evaluation
from ray_prefopt.training.trackers import check_trackers, start_log
from ray_prefopt.training.workers import run_evaluation, run_training, start_ray

logger = logging.getLogger(__name__)

NO_HOOKS = Hooks()
BEGUN = "the run has its folder"
"""A note at KeyboardInterrupt: run.force_new would now move aside what was done."""


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
    architecture = check(config, hooks)
    folder = run_folder(config)
    if not config.run.force_new:
        config = with_found_micro_batch(config, folder)
        refuse_other_config(config, folder)
        if (result := finished(folder, export=config.run.export)) is not None:
            logger.warning("run %s is finished: here is its result; run.force_new trains anew", result.name)
            return result
    start = _check_start(config, folder)
    start_ray()
    train_blocks = _prepare(config, config.data.train_sources)
    total_steps = make_plan(config, train_blocks).total_steps
    _check_steps_left(start, total_steps)
    claim(config, folder)
    with _begun():
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


@contextmanager
def _begun() -> Iterator[None]:
    """Notes at a Ctrl-C that the run has its folder."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note(BEGUN)
        raise


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
            config = _with_half_the_micro_batch(job.config, architecture, blocks)
            ray.get(log.try_again.remote(f"{error}; going on with {_sizes(config.run)}"))
            write_config(config, job.folder)
            job = replace(job, config=config)
            continue
        if expected is not None:
            is_comparable = expected.is_comparable(use_gpu=job.config.run.use_gpu)
            ray.get(log.compare_memory.remote(expected.estimate.device, is_comparable))
        return job


def _expected(config: TrainConfig, architecture: PretrainedConfig, blocks: Blocks) -> Footprint | None:
    """What a worker should need, if that can be told."""
    outline = Outline.of(config, architecture)
    return footprint(config, outline, pairs_of(config, blocks, outline), config.run.min_workers)


def _with_half_the_micro_batch(
    config: TrainConfig, architecture: PretrainedConfig, blocks: Blocks
) -> TrainConfig:
    """Raises OutOfMemoryError when the largest micro-batch is a single pair already, in training and evaluation."""
    run, tokens = config.run, config.run.micro_batch_tokens
    if tokens is None:
        is_single, half = run.micro_batch == 1, {"micro_batch": run.micro_batch // 2}
    else:
        costs = Outline.of(config, architecture).costs
        is_single, half = tokens <= longest_pair(blocks, costs), {"micro_batch_tokens": tokens // 2}
    if is_single and run.eval_micro_batch in (None, 1):
        pair = "too" if tokens is None else "too, which the longest pair has by itself"
        raise OutOfMemoryError(
            f"out of memory with {run.micro_batch_text} {pair}: set model.gradient_checkpointing, engine.zero_stage 3 "
            "or a smaller data.max_length, or give the workers more memory"
        )
    if is_single:
        half = {}
    if run.eval_micro_batch is not None:
        half["eval_micro_batch"] = max(run.eval_micro_batch // 2, 1)
    return config.model_copy(update={"run": run.model_copy(update=half)})


def _sizes(run: RunConfig) -> str:
    """Of micro-batches."""
    size = str(run.micro_batch_tokens or run.micro_batch)
    return size if run.eval_micro_batch is None else f"{size}, and {run.eval_micro_batch} in evaluations"


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
    check(config, hooks)
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
    saved = _config_of(checkpoint)
    parts = {"model": saved.model, "engine": saved.engine}
    parts |= {} if "loss" in config.model_fields_set else {"loss": saved.loss}
    if not checkpoint.is_resumable or not can_change_workers(saved.engine, saved.optim):
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


def pairs_of(config: TrainConfig, blocks: Blocks, outline: Outline) -> tuple[Batching, Plan]:
    """Those of training: how they become micro-batches, and steps."""
    return batching_of(blocks, config, outline.costs), make_plan(config, blocks)


# --- Checks ---


def check(config: TrainConfig, hooks: Hooks = NO_HOOKS) -> PretrainedConfig:
    """Everything about model, engine, metrics and hooks that a driver can find out in seconds."""
    check_optim(config.optim)
    if config.run.is_elastic and not can_change_workers(config.engine, config.optim):
        raise ConfigError(
            f"run.num_workers {config.run.workers_text}: DeepSpeed converts the states of {' and '.join(CONVERTED)} "
            f"for another number of workers, not of {config.optim.name}: take one of these, engine.kind plain, or a "
            "fixed number"
        )
    check_trackers(config.run.report_to)
    check_portable(hooks)
    best_metric(config.run, config.data.eval_sets, is_open=hooks.compute_metrics is not None)
    architecture = load_architecture(config.model)
    check_tokenizer(architecture, load_tokenizer(config.model))
    if config.engine.kind == "zero":
        ds_config = build_ds_config(
            config.engine,
            dtype=str(compute_dtype(config.model, architecture)).removeprefix("torch."),
            max_grad_norm=config.optim.max_grad_norm,
            use_gpu=config.run.use_gpu,
        )
        if config.engine.deepspeed:
            check_ds_config(ds_config)
    return architecture


def _check_start(config: TrainConfig, folder: str) -> Checkpoint | None:
    """The checkpoint of another run that this one begins with, if it does.

    Raises CheckpointError when it is not whole, ConfigError when it is about to be moved or is another engine's.
    """
    run = config.run
    goes_on = not run.force_new and has_checkpoints(f"{folder}/checkpoints")
    if run.resume_from is None or goes_on:
        return None
    if run.force_new and run.resume_from.startswith(f"{folder}/"):
        raise ConfigError(
            f"run.resume_from {run.resume_from} is in the folder that run.force_new moves aside: "
            "copy it elsewhere first, or leave out one of the two"
        )
    start = open_checkpoint(run.resume_from, verify="sizes")
    start.check_resumable()
    saved = _config_of(start).engine
    if (saved.kind, _states(saved)) != (config.engine.kind, _states(config.engine)):
        raise ConfigError(
            f"run.resume_from {start.path} has optimizer states of engine.kind {saved.kind}, zero_stage "
            f"{saved.zero_stage}; got {config.engine.kind}, {config.engine.zero_stage}: take its engine, or export it "
            "and set model.path to begin with its weights"
        )
    return start


def _check_steps_left(start: Checkpoint | None, total_steps: int) -> None:
    """Raises ConfigError when a run begins with a checkpoint that is beyond its end."""
    if start is not None and start.state.step >= total_steps:
        raise ConfigError(
            f"run.resume_from {start.path} is of step {start.state.step}, and this run ends with step {total_steps}: "
            "raise run.max_steps or run.epochs, or export it and set model.path to begin with its weights"
        )


def _config_of(checkpoint: Checkpoint) -> TrainConfig:
    """That of the run that wrote it."""
    fs, folder = url_to_fs(checkpoint.path)
    return TrainConfig.model_validate_json(fs.cat_file(f"{folder}/config.json"))


def _states(engine: EngineConfig) -> int | None:
    """How optimizer states are laid out: stages 1 and 2 read each other's."""
    return None if engine.kind == "plain" else {2: 1}.get(engine.zero_stage, engine.zero_stage)


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
        pairs=open_blocks(str(job.train_blocks)).num_pairs,
    )
    fs, path = url_to_fs(job.folder)
    write_text(fs, f"{path}/result.json", json.dumps(asdict(result), indent=1))
    return result
