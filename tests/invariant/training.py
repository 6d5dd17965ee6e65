"""Short runs of the training loop on ranks without Ray, over the same 50 pairs; for comparing one with another."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_prefopt.config import TrainConfig
from ray_prefopt.training.checkpoint import Checkpoint, LoopState, latest_checkpoint
from ray_prefopt.training.export import checkpoint_weights
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from ray_prefopt.training.metrics import Record
from tests.gang import run_gang

PAIRS, GLOBAL_BATCH, STEPS = 50, 16, 4
"""The fourth step is smaller than the others: 2 pairs, fewer than three ranks."""


@dataclass(frozen=True)
class Inputs:
    """What all runs share."""

    model: str
    blocks: str
    eval_blocks: str

    def config(
        self,
        engine: str = "plain",
        *,
        dtype: str = "float32",
        lora: bool = False,
        **sections: Mapping[str, Any],
    ) -> TrainConfig:
        """A config by engine (`plain`, `zero2`, ...); `sections` are merged over it."""
        stage = engine.removeprefix("zero")
        values: dict[str, dict[str, Any]] = {
            "model": {"path": self.model, "dtype": dtype, **({"lora": {"r": 4}} if lora else {})},
            "data": {"train": "unread"},
            "loss": {"kind": "cpo_simpo", "cpo_alpha": 0.5},
            "optim": {"learning_rate": 1e-2, "weight_decay": 0.1, "eps": 1e-6, "schedule": "linear"},
            "engine": {"kind": "plain"} if engine == "plain" else {"kind": "zero", "zero_stage": int(stage)},
            "run": {"global_batch": GLOBAL_BATCH, "micro_batch": 4, "save_steps": 2},
        }
        for section, changes in sections.items():
            values[section] |= changes
        return TrainConfig.model_validate(values)

    def job(self, config: TrainConfig, folder: Path) -> Job:
        return Job(config, str(folder), 0, self.blocks, {"": self.eval_blocks})


@dataclass(frozen=True)
class Curve:
    """What a run did."""

    steps: list[Record]
    """Of training, in order; only those of the last attempt."""
    evaluation: Record
    weights: dict[str, Tensor]
    order_hash: str


class StopError(Exception):
    """Stands for the death of all workers right after a checkpoint."""


def run(job: Job, stop_at: int | None = None) -> list[Record]:
    """Train on this rank, to the end or until the checkpoint of step `stop_at`; returns what was logged."""
    records: list[Record] = []

    def saved(checkpoint: Checkpoint) -> None:
        if checkpoint.state.step == stop_at:
            raise StopError

    def warn(text: str) -> None:
        raise AssertionError(text)

    reports = Reports(lambda _: None, records.append, saved, warn, lambda _: None)
    with suppress(StopError):
        train_worker(job, torch.device("cpu"), reports)
    return records


def _run_all(jobs: Sequence[tuple[Job, int | None]]) -> list[list[Record]]:
    return [run(job, stop_at) for job, stop_at in jobs]


def curves(jobs: Mapping[str, Job], world_size: int) -> dict[str, Curve]:
    """Every job to its end, one after the other, by the same ranks."""
    (records, *_) = run_gang(world_size, _run_all, [(job, None) for job in jobs.values()])
    return {name: _curve(job, found) for (name, job), found in zip(jobs.items(), records, strict=True)}


def stop_at(jobs: Mapping[str, Job], world_size: int, step: int) -> None:
    """Every job up to the checkpoint of this step."""
    run_gang(world_size, _run_all, [(job, step) for job in jobs.values()])


def _curve(job: Job, records: Sequence[Record]) -> Curve:
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    state: LoopState = checkpoint.state
    assert state.step == STEPS
    return Curve(
        [record for record in records if "loss" in record],
        next(record for record in records if "eval_loss" in record),
        checkpoint_weights(job.config, Path(checkpoint.path)),
        state.order_hash,
    )
