"""A run, seen from the driver: check what can be checked, prepare the pairs, ask for workers, bring the result home."""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from fsspec.core import url_to_fs
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from transformers import PretrainedConfig

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.blocks import Blocks
from ray_prefopt.data.prepare import prepare
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.optimizer import check_optim
from ray_prefopt.errors import ConfigError, PrefoptError, ResourceError, TrainingError
from ray_prefopt.model.load import check_tokenizer, load_architecture
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.train.checkpoint import LoopState, latest_checkpoint, write_text
from ray_prefopt.train.display import Display
from ray_prefopt.train.export import export
from ray_prefopt.train.log import RunLog
from ray_prefopt.train.loop import Job, Record, Reports, evaluate_worker, make_plan, train_worker

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    "num_workers", "use_gpu", "cpus_per_worker", "log_steps", "eval_steps", "eval_on_start", "save_steps",
    "keep_checkpoints", "best_metric", "max_failures", "resume_from", "on_bad_checkpoint", "on_save_error", "force_new",
    "export", "resource_timeout_s", "storage_path",
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
    metrics: Record


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune a model on preference pairs: from pairs to a Hugging Face folder.

    The same config again resumes a run that did not finish, and returns the result of one that did. Raises
    PrefoptError: ConfigError, DataError, ModelError, ResourceError and CheckpointError before any worker starts,
    NonFiniteError and TrainingError later.
    """
    config = with_name(config)
    architecture = _check_model(config)
    start_ray(config)
    folder = _claim_folder(config)
    train_blocks = prepare(config.data, config.model, config.data.train_sources, storage_path(config))
    plan = make_plan(config, train_blocks)
    eval_blocks = _prepare_eval(config)
    del architecture
    log = RunLog.remote(folder)
    job = Job(
        config,
        folder,
        load_tokenizer(config.model).pad_token_id,
        train_blocks.folder,
        {name: blocks.folder for name, blocks in eval_blocks.items()},
    )
    state = _state_on_disk(job)
    if state.step < plan.total_steps:
        _wait_for_resources(config)
        with Display(log, plan.total_steps):
            _fit(_train_on_ray, {"job": job, "log": log}, config, log, f"{folder}/ray")
    return _finish(job, ray.get(log.records.remote()))


def prepare_data(config: TrainConfig) -> list[dict[str, Any]]:
    """Tokenize the training and evaluation pairs; returns the manifests of their blocks."""
    start_ray(config)
    blocks = [prepare(config.data, config.model, config.data.train_sources, storage_path(config))]
    return [{"folder": each.folder, **each.manifest} for each in [*blocks, *_prepare_eval(config).values()]]


def evaluate(config: TrainConfig) -> EvalResult:
    """Reward accuracy, margins and log-probabilities of a model on data.eval.

    The model is model.path, or the checkpoint that run.resume_from names.
    """
    if not config.data.eval_sets:
        raise ConfigError("evaluate needs pairs: set data.eval")
    _check_model(config)
    start_ray(config)
    blocks = _prepare_eval(config)
    folder = f"{storage_path(config)}/evaluations/{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"
    job = Job(
        config, folder, load_tokenizer(config.model).pad_token_id, None,
        {name: each.folder for name, each in blocks.items()},
    )  # fmt: skip
    log = RunLog.remote(folder)
    _wait_for_resources(config)
    _fit(_evaluate_on_ray, {"job": job, "log": log}, config, log, f"{folder}/ray")
    metrics = ray.get(log.records.remote())[-1]
    model = config.run.resume_from or str(config.model.path)
    del metrics["step"]
    return EvalResult(model, {name: each.num_pairs for name, each in blocks.items()}, metrics)


# --- On the workers ---


def _train_on_ray(given: dict[str, Any]) -> None:
    log = given["log"]

    def on_rank_0(send: Callable[..., Any]) -> Callable[..., None]:
        return lambda *values: send(*values) if ray.train.get_context().get_world_rank() == 0 else None

    reports = Reports(
        started=on_rank_0(log.started.remote),
        log=on_rank_0(log.log.remote),
        saved=on_rank_0(lambda saved: ray.get(log.saved.remote(saved.path, saved.state.step))),
        warn=on_rank_0(log.warn.remote),
        report=ray.train.report,
    )
    _guarded(log, lambda: train_worker(given["job"], _device(given["job"]), reports))


def _evaluate_on_ray(given: dict[str, Any]) -> None:
    def work() -> None:
        record = evaluate_worker(given["job"], _device(given["job"]))
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(given["log"].log.remote({"step": 0, **record}))

    _guarded(given["log"], work)


def _device(job: Job) -> torch.device:
    return ray.train.torch.get_device() if job.config.run.use_gpu else torch.device("cpu")


def _guarded(log: Any, work: Callable[[], Any]) -> None:
    """An error of ours would come again at every restart: note it, and let the restarted workers do nothing."""
    if ray.get(log.fatal.remote()) is not None:
        return
    try:
        work()
    except PrefoptError as error:
        ray.get(log.fail.remote(error))
        raise


# --- On the driver ---


def _fit(
    worker: Callable[..., None], given: dict[str, Any], config: TrainConfig, log: Any, folder: str
) -> None:
    """Run the workers to the end. Raises the run's own error, or TrainingError with that of the first failed rank."""
    run = config.run
    resources = {"CPU": run.cpus_per_worker, **({"GPU": 1} if run.use_gpu else {})}
    environment = {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(run.cpus_per_worker),
        **({} if run.use_gpu else {"DS_ACCELERATOR": "cpu"}),
    }
    trainer = TorchTrainer(
        worker,
        train_loop_config=given,
        scaling_config=ScalingConfig(
            num_workers=run.num_workers, use_gpu=run.use_gpu, resources_per_worker=resources
        ),
        # A name of its own for each attempt: Ray's snapshot of an earlier one, which a full disk can tear, is never
        # read. What resumes a run are our checkpoints.
        run_config=RayRunConfig(
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=run.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    failure: TrainingFailedError | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    fatal = ray.get(log.fatal.remote())
    if fatal is not None:
        raise fatal
    if failure is not None:
        raise TrainingError(_first_failure(failure)) from failure


def _first_failure(error: TrainingFailedError) -> str:
    """The failing rank's own words, without the frames around them."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return f"the run failed: {error}"
    rank, cause = min(failures.items())
    text = str(cause).strip().splitlines()
    others = f" ({len(failures) - 1} other ranks failed too)" if len(failures) > 1 else ""
    return "\n".join([f"rank {rank} failed{others}:", *text[-12:]])


def with_name(config: TrainConfig) -> TrainConfig:
    """The config with a run name; made from the loss and the time when it has none."""
    if config.run.name is not None:
        return config
    name = f"{config.loss.kind}-{datetime.now():%Y%m%d-%H%M%S}"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def storage_path(config: TrainConfig) -> str:
    """run.storage_path, absolute: workers have another working directory."""
    path = config.run.storage_path
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def start_ray(config: TrainConfig) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start one here, unless this process is connected already."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)


def _check_model(config: TrainConfig) -> PretrainedConfig:
    """Everything about model and engine that a driver can find out in seconds."""
    check_optim(config.optim)
    if config.engine.kind == "zero":
        build_ds_config(
            config.engine,
            dtype="bfloat16",
            max_grad_norm=config.optim.max_grad_norm,
            use_gpu=config.run.use_gpu,
        )
    architecture = load_architecture(config.model)
    check_tokenizer(architecture, load_tokenizer(config.model))
    return architecture


def _prepare_eval(config: TrainConfig) -> dict[str, Blocks]:
    storage = storage_path(config)
    return {
        name: prepare(config.data, config.model, sources, storage)
        for name, sources in config.data.eval_sets.items()
    }


def _claim_folder(config: TrainConfig) -> str:
    """The run's folder, with its config in it. Raises ConfigError when it is another run's."""
    folder = f"{storage_path(config)}/{config.run.name}"
    fs, path = url_to_fs(folder)
    if config.run.force_new and fs.exists(path):
        fs.mv(path, f"{path}.old-{datetime.now():%Y%m%d-%H%M%S}", recursive=True)
    if fs.exists(f"{path}/config.json"):
        differing = _differences(
            json.loads(fs.cat_file(f"{path}/config.json")), config.model_dump(mode="json")
        )
        if differing:
            raise ConfigError(
                f"run {config.run.name!r} in {folder} was begun with another config: {'; '.join(differing)}. "
                "Use its values to resume it, another run.name, or run.force_new to move it aside"
            )
    fs.makedirs(path, exist_ok=True)
    write_text(fs, f"{path}/config.json", config.model_dump_json(indent=1))
    return folder


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted fields that differ, of those that must not, as `field: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [
            name for name in sorted(old.keys() | new.keys()) if not (prefix == "run." and name in MAY_CHANGE)
        ]
        return [
            line for name in names for line in _differences(old.get(name), new.get(name), f"{prefix}{name}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old} -> {new}"]


def _state_on_disk(job: Job) -> LoopState:
    """How far the run is, by its newest checkpoint; refuses a torn one before workers are asked for."""
    checkpoint = latest_checkpoint(job.checkpoints, on_bad=job.config.run.on_bad_checkpoint, verify="sizes")
    return checkpoint.state if checkpoint else LoopState()


def _wait_for_resources(config: TrainConfig) -> None:
    """Wait until the cluster has room for all workers; raises ResourceError after run.resource_timeout_s."""
    run = config.run
    asked = {
        "CPU": run.num_workers * run.cpus_per_worker,
        **({"GPU": run.num_workers} if run.use_gpu else {}),
    }
    deadline = time.monotonic() + run.resource_timeout_s
    told = False
    while True:
        available, total = ray.available_resources(), ray.cluster_resources()
        missing = {name: number for name, number in asked.items() if available.get(name, 0) < number}
        if not missing:
            return
        found = ", ".join(
            f"{available.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in asked
        )
        wanted = ", ".join(f"{number} {name}" for name, number in asked.items())
        if time.monotonic() > deadline:
            raise ResourceError(
                f"{run.num_workers} workers need {wanted}; the cluster has {found} after waiting "
                f"{run.resource_timeout_s:g} s. Lower run.num_workers or run.cpus_per_worker, add nodes, or raise "
                "run.resource_timeout_s; `ray status` shows what holds them"
            )
        if not told:
            logger.warning("waiting up to %g s for %s; %s", run.resource_timeout_s, wanted, found)
            told = True
        time.sleep(0.5)


def _finish(job: Job, records: list[Record]) -> TrainResult:
    """Export the last checkpoint and write result.json."""
    run = job.config.run
    checkpoint = latest_checkpoint(job.checkpoints, on_bad=run.on_bad_checkpoint, verify="sizes")
    assert checkpoint is not None and run.name is not None
    state = checkpoint.state
    fs, root = url_to_fs(job.checkpoints)
    best = f"step-{state.best_step:08d}-" if state.best_step is not None else ""
    best_paths = [
        path for path in fs.ls(root, detail=False) if best and path.rsplit("/", 1)[-1].startswith(best)
    ]
    best_checkpoint = (
        f"{job.checkpoints}/{best_paths[0].rsplit('/', 1)[-1]}" if best_paths else checkpoint.path
    )
    model = f"{job.folder}/model" if run.export else None
    if model is not None:
        export(checkpoint.path, model)
    metrics = {name: value for record in records for name, value in record.items()}
    result = TrainResult(run.name, job.folder, state.step, metrics, checkpoint.path, best_checkpoint, model)
    fs, path = url_to_fs(job.folder)
    write_text(fs, f"{path}/result.json", json.dumps(asdict(result), indent=1))
    return result
