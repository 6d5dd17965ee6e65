"""What Ray Train starts on each worker: the loop, with its reports to the run's log."""

import logging
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_prefopt.errors import PrefoptError
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, evaluate_worker, train_worker


def train(job: Job, log: Any) -> None:
    """`loop.train_worker`; rank 0 tells `log`, the run's RunLog, how it goes."""
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    place = _placed(job, rank)

    def on_rank_0(send: Callable[..., Any]) -> Callable[..., None]:
        return send if rank == 0 else lambda *_: None

    reports = Reports(
        started=on_rank_0(lambda state: log.started.remote(state, workers)),
        log=on_rank_0(log.log.remote),
        saved=on_rank_0(lambda saved: ray.get(log.saved.remote(saved.path, saved.state.step))),
        warn=on_rank_0(log.warn.remote),
        note=on_rank_0(log.note.remote),
        report=ray.train.report,
        samples=on_rank_0(log.sampled.remote),
        needed=on_rank_0(lambda memory: ray.get(log.needed.remote(memory))),
        returned=on_rank_0(lambda returned: ray.get(log.returned.remote(returned))),
        step_begins=place.at,
        measured=lambda values: log.measured.remote(rank, values),
    )
    _guarded(log, lambda: train_worker(job, _device(job), reports))


class Place(logging.Filter):
    """Puts run, rank and step into every line that a worker logs; Ray Train writes them as JSON with all they have."""

    def __init__(self, run: str, rank: int) -> None:
        super().__init__()
        self._run, self._rank, self._step = run, rank, 0

    def at(self, step: int) -> None:
        """Counted from 1; lines before the first have 0."""
        self._step = step

    def filter(self, record: logging.LogRecord) -> bool:
        record.run, record.rank, record.step = self._run, self._rank, self._step
        return True


def _placed(job: Job, rank: int) -> Place:
    """That of this worker, in all that it logs from now on."""
    place = Place(str(job.config.run.name), rank)
    for handler in logging.getLogger().handlers:
        handler.addFilter(place)
    return place


def evaluate(job: Job, log: Any) -> None:
    """`loop.evaluate_worker`; rank 0 tells `log` what it found."""
    rank = ray.train.get_context().get_world_rank()
    _placed(job, rank)

    def work() -> None:
        found = evaluate_worker(job, _device(job))
        if rank == 0:
            ray.get(log.evaluated.remote(found))

    _guarded(log, work)


def _device(job: Job) -> torch.device:
    if not job.config.run.use_gpu:
        return torch.device("cpu")
    device = ray.train.torch.get_device()
    torch.cuda.set_device(device)  # NCCL sends objects from the current one
    return device


def _guarded(log: Any, work: Callable[[], Any]) -> None:
    """An error of ours would come again at every restart: note it, and let the restarted workers do nothing."""
    if ray.get(log.fatal.remote()) is not None:
        return
    try:
        work()
    except PrefoptError as error:
        ray.get(log.fail.remote(error))
        raise
