"""What every worker of a run does: the same loop on each rank, in step with the others."""

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ray_prefopt.config import Interval, RunConfig, TrainConfig
from ray_prefopt.data.blocks import Blocks, open_blocks
from ray_prefopt.data.collate import PairBatch, collate
from ray_prefopt.data.plan import Ids, Order, Plan, deal, extend_hash
from ray_prefopt.data.stream import PairReader, Prefetched
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.base import Engine
from ray_prefopt.engine.build import build_engine
from ray_prefopt.engine.zero import to_universal
from ray_prefopt.errors import CheckpointError, ConfigError, suggest
from ray_prefopt.losses.objective import Objective, StepTotals, make_objective
from ray_prefopt.training import ranks
from ray_prefopt.training.checkpoint import (
    Checkpoint,
    LoopState,
    better,
    latest_checkpoint,
    local_copy,
    made_once,
    open_checkpoint,
    save_checkpoint,
)
from ray_prefopt.training.metrics import METRICS, MetricSums
from ray_prefopt.training.step import StepInput, evaluate, train_step

Record = dict[str, float]


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    folder: str
    """Of the run."""
    pad_id: int
    train_blocks: str | None
    """Folder of prepared pairs; None: evaluate only."""
    eval_blocks: Mapping[str, str]
    """Folders of the evaluation sets by name."""

    @property
    def checkpoints(self) -> str:
        return f"{self.folder}/checkpoints"


@dataclass(frozen=True)
class Reports:
    """Where rank 0's findings go; none of these waits for anybody but `report`."""

    started: Callable[[LoopState], None]
    log: Callable[[Record], None]
    saved: Callable[[Checkpoint], None]
    warn: Callable[[str], None]
    report: Callable[[Record], None]
    """To Ray Train, by all ranks: a barrier."""


def train_worker(job: Job, device: torch.device, reports: Reports) -> LoopState:
    """Train to the end of the plan, from the newest checkpoint if there is one."""
    config, run = job.config, job.config.run
    torch.set_num_threads(run.cpus_per_worker)
    checkpoint = _starting_point(job)
    state = checkpoint.state if checkpoint else LoopState()
    assert job.train_blocks is not None
    blocks = open_blocks(job.train_blocks)
    plan = make_plan(config, blocks)
    engine = _engine_at(config, plan.total_steps, device, checkpoint)
    _check_order(plan, state)
    objective = make_objective(config.loss, aux_loss_coef=aux_loss_coef(engine))
    evaluations = _eval_sets(job)

    def evaluate_now(state: LoopState) -> LoopState:
        record = _evaluate_all(engine, evaluations, objective)
        reports.log({"step": state.step, "epoch": plan.epoch_at(state.step), **record})
        metric = best_metric(run, evaluations)
        if metric is None:
            return state
        return better(state, -record[metric] if metric.endswith("loss") else record[metric])

    def save_now(state: LoopState) -> None:
        try:
            saved = save_checkpoint(
                engine.save,
                state,
                job.checkpoints,
                extra={"config.json": config.model_dump_json(indent=1)},
                retained=run.keep_checkpoints,
            )
            reports.saved(saved)
        except CheckpointError as error:
            if run.on_save_error == "stop" or state.step == plan.total_steps:
                raise
            reports.warn(str(error))

    reports.started(state)
    if run.eval_on_start and state.step == 0 and evaluations:
        state = evaluate_now(state)
    meter = Meter()
    metrics = MetricSums()
    due = Due(run, plan.steps_per_epoch, plan.total_steps)
    reader = PairReader(blocks, max_pairs=config.data.shuffle_window)
    with closing(Prefetched(step_inputs(plan, blocks, reader, state.step, job.pad_id))) as inputs:
        for inputs_of_step in inputs:
            seed_step(run.seed, state.step)
            learning_rate = engine.learning_rate()
            grad_norm = train_step(engine, inputs_of_step, objective, metrics)
            ids = plan.step_ids(state.step)
            state = replace(state, step=state.step + 1, order_hash=extend_hash(state.order_hash, ids))
            meter.add(len(ids), int(blocks.total_lengths[ids].sum()))
            record = {"step": state.step, "epoch": plan.epoch_at(state.step)}
            if due.log(state.step):
                record |= metrics.reduce() | {"grad_norm": grad_norm, "learning_rate": learning_rate}
                reports.log(record | meter.read(inputs.wait_s))
            with meter.paused():
                if due.evaluate(state.step) and evaluations:
                    state = evaluate_now(state)
                if due.save(state.step):
                    save_now(state)
                    reports.report(record)
    return state


def evaluate_worker(job: Job, device: torch.device) -> Record:
    """The metrics of every evaluation set, of the model or of the checkpoint that run.resume_from names."""
    torch.set_num_threads(job.config.run.cpus_per_worker)
    engine = _engine_at(job.config, 1, device, _starting_point(job))
    objective = make_objective(job.config.loss, aux_loss_coef=aux_loss_coef(engine))
    return _evaluate_all(engine, _eval_sets(job), objective)


def make_plan(config: TrainConfig, blocks: Blocks) -> Plan:
    """The plan of a run over prepared pairs. Raises DataError when they do not fill one global batch."""
    order = Order(
        tuple(rows for _, rows in blocks.files),
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
    )
    run = config.run
    return Plan(order, blocks.total_lengths, run.global_batch, run.micro_batch, run.epochs, run.max_steps)


def step_inputs(
    plan: Plan, blocks: Blocks, reader: PairReader, start: int, pad_id: int
) -> Iterator[StepInput]:
    """This rank's inputs of every step from `start` to the end of the plan."""
    rank, world_size = ranks.rank(), ranks.world_size()
    for step in range(start, plan.total_steps):
        ids = plan.step_ids(step)
        micro_ids = plan.micro_batches(step, rank, world_size)
        batches = [_batch(reader, micro, ids, pad_id) for micro in micro_ids]
        yield StepInput(step, StepTotals(len(ids), int(blocks.chosen_lengths[ids].sum())), batches, micro_ids)


def _batch(reader: PairReader, ids: Ids, others: Ids, pad_id: int) -> PairBatch:
    """The pairs with these ids; one of `others` with weight 0 when there are none, so that ranks stay in step."""
    pairs: list[TokenizedPair] = reader.read(ids if len(ids) else others[:1])
    return collate(pairs, pad_id=pad_id, weight=1.0 if len(ids) else 0.0)


@dataclass(frozen=True)
class EvalSet:
    """Held-out pairs, dealt out to the ranks; every pair exactly once."""

    blocks: Blocks
    micro_batch: int
    pad_id: int

    @property
    def totals(self) -> StepTotals:
        return StepTotals(self.blocks.num_pairs, int(self.blocks.chosen_lengths.sum()))

    def batches(self) -> Iterator[PairBatch]:
        ids = np.arange(self.blocks.num_pairs)
        reader = PairReader(self.blocks)
        for micro in deal(ids, self.blocks.total_lengths, self.micro_batch, ranks.rank(), ranks.world_size()):
            yield _batch(reader, micro, ids, self.pad_id)


def _eval_sets(job: Job) -> dict[str, EvalSet]:
    micro_batch = job.config.run.eval_micro_batch or job.config.run.micro_batch
    return {
        name: EvalSet(open_blocks(folder), micro_batch, job.pad_id)
        for name, folder in job.eval_blocks.items()
    }


def _evaluate_all(engine: Engine, sets: Mapping[str, EvalSet], objective: Objective) -> Record:
    record: Record = {}
    for name, held_out in sets.items():
        prefix = f"eval_{name}_" if name else "eval_"
        with closing(Prefetched(held_out.batches())) as batches:
            values = evaluate(engine, batches, objective, held_out.totals)
        record |= {prefix + metric: value for metric, value in values.items()}
    return record


def best_metric(run: RunConfig, sets: Iterable[str]) -> str | None:
    """The metric that says which checkpoint is best: run.best_metric, or reward accuracy of the first set.

    Raises ConfigError when no evaluation set, of which these are the names, has it.
    """
    prefixes = [f"eval_{name}_" if name else "eval_" for name in sets]
    if run.best_metric is None:
        return f"{prefixes[0]}rewards/accuracies" if prefixes else None
    known = [prefix + metric for prefix in prefixes for metric in METRICS]
    if run.best_metric not in known:
        advice = suggest(run.best_metric, known) or (
            f" There are {', '.join(known)}" if known else " There is no evaluation set: set data.eval"
        )
        raise ConfigError(f"run.best_metric {run.best_metric!r} is not a metric of this run.{advice}")
    return run.best_metric


def seed_step(seed: int, step: int) -> None:
    """Random numbers are a function of (seed, step, rank): a checkpoint need not hold any generator's state."""
    value = int(np.random.SeedSequence([seed, step, ranks.rank()]).generate_state(1, np.uint64)[0])
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@dataclass(frozen=True)
class Due:
    """What happens after which step; the last step evaluates and saves in any case."""

    run: RunConfig
    steps_per_epoch: int
    last: int

    def log(self, step: int) -> bool:
        return self._falls_on(self.run.log_steps, step) or (step == 1 and self.run.log_first_step)

    def evaluate(self, step: int) -> bool:
        return self._falls_on(self.run.eval_steps, step)

    def save(self, step: int) -> bool:
        return self._falls_on(self.run.save_steps, step)

    def _falls_on(self, interval: Interval | None, step: int) -> bool:
        if step == self.last or interval is None:
            return step == self.last
        if interval == "epoch":
            return step % self.steps_per_epoch == 0
        return step % (interval if isinstance(interval, int) else math.ceil(interval * self.last)) == 0


class Meter:
    """Rates of training since the last reading; pairs and tokens are those of all ranks, padding not counted."""

    def __init__(self) -> None:
        self._since, self._pairs, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0

    def add(self, pairs: int, tokens: int) -> None:
        self._pairs += pairs
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training: evaluating, saving."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def read(self, wait_s: float) -> Record:
        """`data_wait` is the share of the time that this rank waited for pairs."""
        elapsed = time.perf_counter() - self._since
        record = {
            "pairs_per_second": self._pairs / elapsed,
            "tokens_per_second": self._tokens / elapsed,
            "data_wait": (wait_s - self._waited) / elapsed,
        }
        self._since, self._pairs, self._tokens, self._waited = time.perf_counter(), 0, 0, wait_s
        return record


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
                found = open_checkpoint(run.resume_from)
        except CheckpointError as error:
            found = error
    found = ranks.broadcast(found)
    if isinstance(found, CheckpointError):
        raise found
    return found


def _engine_at(
    config: TrainConfig, total_steps: int, device: torch.device, checkpoint: Checkpoint | None
) -> Engine:
    """The engine, with the checkpoint's weights and optimizer; converted when the number of ranks is another."""
    if checkpoint is None:
        return build_engine(config, total_steps=total_steps, device=device)
    is_sharded = config.engine.kind == "zero" and config.engine.zero_stage > 0
    is_universal = is_sharded and checkpoint.world_size != ranks.world_size()
    engine = build_engine(config, total_steps=total_steps, device=device, is_universal=is_universal)
    is_first = int(os.environ.get("LOCAL_RANK", ranks.rank())) == 0
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
