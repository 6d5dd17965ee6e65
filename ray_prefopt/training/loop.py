"""What every worker of a run does: the same loop on each rank, in step with the others."""

import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from fsspec.core import url_to_fs
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState
from transformers.trainer_utils import enable_full_determinism

from ray_prefopt.config import TrainConfig, eval_prefix
from ray_prefopt.data.balance import Costs
from ray_prefopt.data.blocks import Blocks, open_blocks
from ray_prefopt.data.collate import collate, pack
from ray_prefopt.data.plan import Plan, extend_hash
from ray_prefopt.data.stream import PairReader, Prefetched
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.base import Engine
from ray_prefopt.engine.build import build_engine
from ray_prefopt.engine.zero import to_universal
from ray_prefopt.errors import CheckpointError, ConfigError, OutOfMemoryError
from ray_prefopt.losses.objective import Objective
from ray_prefopt.model.forward import Batch, Scorer
from ray_prefopt.model.hub import first_line
from ray_prefopt.model.layout import make_scorer
from ray_prefopt.model.load import compute_dtype, decoder_start_id
from ray_prefopt.model.tokenizer import load_tokenizer
from ray_prefopt.training import ranks
from ray_prefopt.training.batches import (
    EvalSet,
    MakeBatch,
    batching_of,
    costs_of,
    eval_batching,
    layout_of,
    step_inputs,
)
from ray_prefopt.training.callbacks import (
    STATE_FILE,
    Callbacks,
    Returned,
    arguments_of,
    on_this_rank,
    read_state,
)
from ray_prefopt.training.checkpoint import (
    WEIGHTS,
    Checkpoint,
    LoopState,
    begun_anew,
    better,
    latest_checkpoint,
    local_copy,
    made_once,
    open_checkpoint,
    save_checkpoint,
)
from ray_prefopt.training.due import Due
from ray_prefopt.training.footprint import Peak
from ray_prefopt.training.halves import in_halves
from ray_prefopt.training.job import Job, best_metric, make_plan
from ray_prefopt.training.metrics import Meter, MetricSums, Record
from ray_prefopt.training.predictions import Evaluation, Predictions, computed
from ray_prefopt.training.samples import Sample, sampled
from ray_prefopt.training.step import StepInput, evaluate, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reports:
    """What the loop tells the outside: by rank 0 alone, but for `report`, `step_begins` and `measured`.

    `saved`, `returned` and `needed` wait until it is taken down, and `report` for all ranks; the others for nobody.
    """

    started: Callable[[LoopState], None]
    log: Callable[[Record], None]
    saved: Callable[[Checkpoint], None]
    warn: Callable[[str], None]
    report: Callable[[Record], None]
    """To Ray Train, by every rank, after each checkpoint but the last: a barrier, where their number may change."""
    returned: Callable[[Returned], None] = lambda _: None
    needed: Callable[[int], None] = lambda _: None
    """Memory, in bytes, of the rank that needed most."""
    samples: Callable[[list[Sample]], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None
    step_begins: Callable[[int], None] = lambda _: None
    """On every rank."""
    measured: Callable[[Record], None] = lambda _: None
    """By every rank, of itself: `data_wait`, `checkpoint_seconds`."""


def train_worker(job: Job, device: torch.device, reports: Reports) -> LoopState:
    """Train to the end of the plan, or until a callback says stop, from the newest checkpoint if there is one."""
    config = job.config
    _set_up(config)
    logger.info("rank %d of %d is up", ranks.rank(), ranks.world_size())
    checkpoint = _starting_point(job)
    assert job.train_blocks is not None
    blocks = open_blocks(job.train_blocks)
    plan = make_plan(config, blocks)
    logger.info("%d steps over %d pairs are planned", plan.total_steps, blocks.num_pairs)
    peak = Peak(device)
    engine = _engine_at(job, plan.total_steps, device, checkpoint)
    logger.info("the %s engine is built", config.engine.kind)
    training = _Training(job, reports, engine, plan, blocks, checkpoint)
    try:
        state = training.run()
        reports.needed(max(ranks.all_gather(peak.read())))
        return state
    except RuntimeError as error:
        if config.run.auto_find_batch_size and should_reduce_batch_size(error):
            raise OutOfMemoryError(
                f"out of memory with {config.run.micro_batch_text}: {first_line(error)}"
            ) from error
        raise


class _Training:
    """One attempt of a run, on one rank."""

    def __init__(
        self,
        job: Job,
        reports: Reports,
        engine: Engine,
        plan: Plan,
        blocks: Blocks,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._job, self._run, self._reports = job, job.config.run, reports
        self._engine, self._plan, self._blocks = engine, plan, blocks
        self._state = checkpoint.state if checkpoint else LoopState()
        _check_order(plan, self._state)
        self._objective = Objective(job.config.loss, aux_loss_coef=aux_loss_coef(engine))
        self._scorer, why_padded = _scorer_of(job, engine)
        if why_padded and job.config.model.layout == "auto":
            reports.note(f"pairs are padded, not packed: {why_padded}")
        costs = _costs(engine, self._scorer)
        self._scorer = in_halves(self._scorer, engine, costs)
        self._batching = batching_of(blocks, job.config, costs)
        self._evaluations = _eval_sets(job, engine, self._scorer, costs)
        self._best_metric = best_metric(
            self._run, self._evaluations, is_open=job.hooks.compute_metrics is not None
        )
        self._due = Due(self._run, plan.steps_per_epoch, plan.total_steps)
        self._metrics = MetricSums()
        self._meter = Meter(plan.tokens_until(self._state.step))
        self._callbacks = _callbacks(job, engine, plan, self._best_metric, checkpoint)

    def run(self) -> LoopState:
        self._reports.started(self._state)
        logger.info("training begins after step %d of %d", self._state.step, self._plan.total_steps)
        self._callbacks.call("on_train_begin")
        if self._run.eval_on_start and self._state.step == 0 and self._evaluations:
            with self._meter.paused():
                self._evaluate()
        if not self._state.stopped:  # as it is when workers are lost after a callback's stop
            self._steps()
        self._callbacks.call("on_train_end")
        if self._callbacks.callbacks:
            self._reports.returned(Returned.of(self._callbacks.callbacks))
        return self._state

    def _steps(self) -> None:
        reader = PairReader(self._blocks, max_pairs=self._job.config.data.shuffle_window)
        make_batch = _batch_maker(self._job, self._engine, self._scorer)
        inputs = step_inputs(self._plan, self._batching, reader, self._state.step, make_batch)
        with closing(Prefetched(inputs)) as prefetched:
            for inputs_of_step in prefetched:
                self._step(inputs_of_step, prefetched)
                if self._state.stopped:
                    break

    def _step(self, inputs: StepInput, prefetched: Prefetched[StepInput]) -> None:
        """One optimizer step, and what is due after it."""
        plan, callbacks = self._plan, self._callbacks
        self._reports.step_begins(inputs.step + 1)
        seed_step(self._run.seed, inputs.step)
        if inputs.step % plan.steps_per_epoch == 0:
            callbacks.call("on_epoch_begin")
        callbacks.begin_step()
        learning_rate = self._engine.learning_rate()
        grad_norm = train_step(
            self._engine, inputs, self._objective, self._metrics, callbacks.call, scorer=self._scorer
        )
        ids = plan.step_ids(inputs.step)
        step = inputs.step + 1
        self._state = replace(self._state, step=step, order_hash=extend_hash(self._state.order_hash, ids))
        self._meter.add(len(ids), int(plan.lengths[ids].sum()))

        due = self._due
        callbacks.at(step, plan.epoch_at(step), self._meter.tokens_seen)
        callbacks.expect(log=due.log(step), evaluate=due.evaluate(step), save=due.save(step))
        callbacks.call("on_step_end")
        if step % plan.steps_per_epoch == 0:
            callbacks.call("on_epoch_end")
        control = callbacks.agree()
        record = {"step": step, "epoch": plan.epoch_at(step)}
        if control.should_log or self._is_stopped(control):
            record |= self._metrics.reduce() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
            speed = self._meter.read(prefetched.wait_s)
            self._log(record | speed)
            self._reports.measured({"data_wait": speed["data_wait"]})
            control = callbacks.agree()
        with self._meter.paused():
            value = None
            if control.should_evaluate and self._evaluations:
                value = self._evaluate()
                control = callbacks.agree()
            if control.should_save or self._is_stopped(control) or step == plan.total_steps:
                self._save(value, is_stopped=self._is_stopped(control))

    def _is_stopped(self, control: TrainerControl) -> bool:
        """Whether a callback ends training here."""
        return control.should_training_stop and self._state.step < self._plan.total_steps

    def _log(self, record: Record) -> None:
        self._reports.log(record)
        self._callbacks.state.log_history.append(record)
        self._callbacks.call("on_log", logs=dict(record))

    def _evaluate(self) -> float | None:
        """Evaluate and log; returns the value of the metric that decides which checkpoint is best, if there is one."""
        found = _evaluate_all(self._engine, self._scorer, self._evaluations, self._objective, self._job)
        self._log({"step": self._state.step, "epoch": self._plan.epoch_at(self._state.step), **found.record})
        self._callbacks.call("on_evaluate", metrics=dict(found.record))
        if self._run.eval_samples:
            sets = {name: held_out.blocks for name, held_out in self._evaluations.items()}
            tokenizer = load_tokenizer(self._job.config.model)
            self._reports.samples(sampled(self._engine, tokenizer, sets, self._job.config, self._state.step))
        if (metric := self._best_metric) is None:
            return None
        if metric not in found.record:
            raise ConfigError(f"run.best_metric {metric!r} is not among {', '.join(found.record)}")
        value = found.record[metric]
        if self._state.step:  # as in transformers: what is there before the first step is never the best
            self._callbacks.measured(value, is_lower_better=self._run.is_lower_better(metric))
        return value

    def _save(self, value: float | None, *, is_stopped: bool) -> None:
        """Save a checkpoint; the best one so far, if `value`, which an evaluation of this step gave, is."""
        run = self._run
        state = replace(self._state, stopped=is_stopped)
        if (metric := self._best_metric) is not None and value is not None:
            mode, sign = ("min", -1) if run.is_lower_better(metric) else ("max", 1)
            state = better(state, sign * value, f"{mode} {metric}")
        begun = time.perf_counter()
        extra = {"config.json": self._job.config.model_dump_json(indent=1)}
        if self._callbacks.callbacks:
            extra[STATE_FILE] = self._callbacks.text()
        try:
            saved = save_checkpoint(
                partial(_save_weights, self._engine) if run.save_only_model else self._engine.save,
                state,
                self._job.checkpoints,
                extra=extra,
                retained=run.keep_checkpoints,
            )
        except CheckpointError as error:
            if run.on_save_error == "stop" or state.stopped or state.step == self._plan.total_steps:
                raise
            logger.warning("%s", error)
            self._reports.warn(str(error))
            return
        self._state = state
        took = time.perf_counter() - begun
        logger.info("checkpoint of step %d written in %.1f s: %s", state.step, took, saved.path)
        self._reports.saved(saved)
        self._reports.measured({"checkpoint_seconds": took})
        if state.best_step == state.step:
            self._callbacks.state.best_model_checkpoint = saved.path
        self._callbacks.call("on_save")
        if state.step < self._plan.total_steps and not state.stopped:
            self._reports.report({"step": state.step})


def _save_weights(engine: Engine, folder: Path) -> None:
    weights = engine.weights()
    if ranks.rank() == 0:
        save_file(weights, folder / WEIGHTS)


def _callbacks(
    job: Job, engine: Engine, plan: Plan, metric: str | None, checkpoint: Checkpoint | None
) -> Callbacks:
    """The callbacks of a run as its checkpoint left them."""
    hooks, run = job.hooks, job.config.run
    if not hooks.callbacks:
        return Callbacks((), None, TrainerState(), engine, None)
    arguments = on_this_rank(hooks.arguments or arguments_of(job.config, job.folder, metric), engine.device)
    state = TrainerState()
    if checkpoint is not None:
        own, path = (url_to_fs(each)[1] for each in (job.checkpoints, checkpoint.path))
        state = read_state(checkpoint, is_own=path.startswith(f"{own}/"))
    state.max_steps = plan.total_steps
    state.num_train_epochs = math.ceil(plan.total_steps / plan.steps_per_epoch)
    state.is_world_process_zero = ranks.rank() == 0
    state.is_local_process_zero = ranks.local_rank() == 0
    state.train_batch_size = run.micro_batch
    state.compute_steps(arguments, plan.total_steps)
    return Callbacks(hooks.callbacks, arguments, state, engine, load_tokenizer(job.config.model))


def evaluate_worker(job: Job, device: torch.device) -> Evaluation:
    """Every evaluation set, by the model or by the checkpoint that run.resume_from names."""
    _set_up(job.config)
    engine = _engine_at(job, 1, device, _starting_point(job))
    objective = Objective(job.config.loss, aux_loss_coef=aux_loss_coef(engine))
    scorer, _ = _scorer_of(job, engine)
    sets = _eval_sets(job, engine, scorer, _costs(engine, scorer))
    return _evaluate_all(engine, scorer, sets, objective, job)


def _set_up(config: TrainConfig) -> None:
    """What holds for the whole process."""
    torch.set_num_threads(config.run.cpus_per_worker)
    torch.set_float32_matmul_precision(config.model.float32_matmul_precision)
    if config.run.full_determinism:
        enable_full_determinism(config.run.seed)


def _scorer_of(job: Job, engine: Engine) -> tuple[Scorer, str | None]:
    """What scores pairs, and why it does not take packed ones, if so."""
    config = job.config.model
    architecture: Any = engine.module.config
    dtype = compute_dtype(config, architecture)
    return make_scorer(engine.forward, engine.module, config, dtype, engine.device)


def _costs(engine: Engine, scorer: Scorer) -> Costs:
    """What decides how pairs are dealt out; as rank 0 finds it, since ranks that differ would lose pairs."""
    architecture: Any = engine.module.config
    return costs_of(architecture, layout_of(architecture, is_packed=ranks.broadcast(scorer.is_packed)))


def _batch_maker(job: Job, engine: Engine, scorer: Scorer) -> MakeBatch:
    """Micro-batches as the model reads them."""
    architecture: Any = engine.module.config
    start, repack = decoder_start_id(architecture), job.hooks.repack

    def make_batch(pairs: list[TokenizedPair], weight: float) -> Batch:
        pairs = pairs if repack is None else repack(pairs)
        batch: Batch
        if scorer.is_packed:
            batch = pack(pairs, weight=weight)
        else:
            batch = collate(pairs, pad_id=job.pad_id, decoder_start_id=start, weight=weight)
        return batch.pinned() if engine.device.type == "cuda" else batch

    return make_batch


def _eval_sets(job: Job, engine: Engine, scorer: Scorer, costs: Costs) -> dict[str, EvalSet]:
    make_batch = _batch_maker(job, engine, scorer)
    return {
        name: EvalSet(eval_batching(open_blocks(folder), job.config, costs), make_batch)
        for name, folder in job.eval_blocks.items()
    }


def _evaluate_all(
    engine: Engine, scorer: Scorer, sets: Mapping[str, EvalSet], objective: Objective, job: Job
) -> Evaluation:
    record: Record = {}
    predictions = {}
    for name, held_out in sets.items():
        kept = (
            Predictions(job.hooks, job.config.loss, held_out.micro_ids())
            if job.hooks.wants_predictions
            else None
        )
        with closing(Prefetched(held_out.batches())) as batches:
            each = kept.add if kept else None
            values = evaluate(engine, batches, objective, held_out.totals, each, scorer=scorer)
        if kept:
            predictions[name] = kept.gathered()
            values |= computed(job.hooks, predictions[name])
        record |= {
            eval_prefix(name) + metric.removeprefix("eval_"): value for metric, value in values.items()
        }
    return Evaluation(record, predictions if job.hooks.keep_predictions else {})


def seed_step(seed: int, step: int) -> None:
    """Random numbers are a function of (seed, step, rank): a checkpoint need not hold any generator's state."""
    value = int(np.random.SeedSequence([seed, step, ranks.rank()]).generate_state(1, np.uint64)[0])
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def aux_loss_coef(engine: Engine) -> float:
    """Weight of the router's loss; the model computes one only if its config has output_router_logits."""
    return float(getattr(engine.module.config, "router_aux_loss_coef", 0.0))


def _starting_point(job: Job) -> Checkpoint | None:
    """The checkpoint to go on from, the same on all ranks; rank 0 looks and checks every byte."""
    run = job.config.run
    found: Checkpoint | CheckpointError | None = None
    if ranks.rank() == 0:
        try:
            found = latest_checkpoint(job.checkpoints, on_bad=run.on_bad_checkpoint)
            if found is None and run.resume_from is not None:
                found = begun_anew(open_checkpoint(run.resume_from))
            if found is not None:
                found.check_resumable()
        except CheckpointError as error:
            found = error
    found = ranks.broadcast(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def _engine_at(job: Job, total_steps: int, device: torch.device, checkpoint: Checkpoint | None) -> Engine:
    """The engine, with the checkpoint's weights and optimizer; converted when the number of ranks is another."""
    config = job.config
    build = partial(
        build_engine, config, total_steps=total_steps, device=device, own_optimizer=job.hooks.own_optimizer
    )
    if checkpoint is None:
        return build()
    is_sharded = config.engine.kind == "zero" and config.engine.zero_stage > 0
    is_universal = is_sharded and checkpoint.world_size != ranks.world_size()
    engine = build(is_universal=is_universal)
    is_first = ranks.local_rank() == 0
    with local_copy(checkpoint, is_first=is_first) as folder:
        if is_universal:
            with made_once(partial(to_universal, folder), is_first=is_first) as converted:
                engine.load(converted)
        else:
            engine.load(folder)
    return engine


def _check_order(plan: Plan, state: LoopState) -> None:
    """The pairs that the plan gives for the steps done must be those that were trained on."""
    digest = ""
    for step in range(state.step):
        digest = extend_hash(digest, plan.step_ids(step))
    if digest != state.order_hash:
        raise CheckpointError(
            f"the checkpoint of step {state.step} was trained on other pairs, or in another order, than this config "
            "and data give; use the data, seed and global batch it began with, or start anew with run.force_new"
        )
