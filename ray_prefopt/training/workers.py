"""Ray Train around the loop: wait for the cluster, start the workers, and hear from the driver's side how it went.

Ray Train's controller imports this module before it starts the workers: what they need is in `on_worker`, unseen by it.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
import ray.train
from ray._common.network_utils import parse_address  # type: ignore[attr-defined]  # re-exported from C
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayActorError
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError

from ray_prefopt.allocator import allocator
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ResourceError, TrainingError
from ray_prefopt.training.controller import Trainer, Watch, cause
from ray_prefopt.training.network import RayNetwork
from ray_prefopt.training.room import free_orphans, is_alone, of_a_worker, wait_for_room

if TYPE_CHECKING:
    from ray_prefopt.training.job import Job

ANSWER_TIMEOUT_S = 10.0
STOP_S = 20.0
"""Longest wait for workers to be stopped in good order."""
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
logger = logging.getLogger(__name__)


def start_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS, else to the one of `ray start`, else start one here.

    One that is started here has no dashboard, whose dozen processes would take time from the workers.

    A process that is connected stays so. Raises ResourceError when nothing answers at RAY_ADDRESS; Ray itself would
    try for many minutes. What `ray start` left behind when its machine went down is passed over.
    """
    if ray.is_initialized():
        return
    asked = os.environ.get("RAY_ADDRESS", "")
    address = None if "://" in asked else _known_address(asked)
    is_gone = address is not None and not _answers(address)
    if is_gone and asked:
        raise ResourceError(
            f"no Ray cluster answers at {address}, which RAY_ADDRESS={asked} names: start it, or set "
            "RAY_ADDRESS=local to run on this machine"
        )
    ray.init(
        "local" if is_gone else None,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _known_address(asked: str) -> str | None:
    """host:port of the cluster that Ray would connect to, or None where it would start one."""
    try:
        found: str | None = canonicalize_bootstrap_address(asked or None)  # type: ignore[arg-type]
    except (ConnectionError, ValueError) as error:
        raise ResourceError(f"RAY_ADDRESS={asked} names no Ray cluster: {error}") from error
    return found


def _answers(address: str) -> bool:
    try:
        socket.create_connection(parse_address(address), timeout=ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def run_training(job: "Job", log: Any) -> None:
    """`on_worker.train` on all workers, to the end. `log` is the run's RunLog.

    Raises ResourceError when the cluster has no room for them, the run's own error when it had one, and
    TrainingError with the words of the first rank that failed otherwise.
    """
    _run_workers("train", job, log)


def run_evaluation(job: "Job", log: Any) -> None:
    """`on_worker.evaluate` on all workers; the log gets what it found. Raises as `run_training`."""
    _run_workers("evaluate", job, log)


def _work(given: dict[str, Any]) -> None:
    """What one worker does: `train` or `evaluate` of `on_worker`."""
    on_worker = import_module("ray_prefopt.training.on_worker")
    getattr(on_worker, given["work"])(ray.get(given["job"]), given["log"])


def _run_workers(work: str, job: "Job", log: Any) -> None:
    run = job.config.run
    wait_for_room(run)
    number: Any = (run.min_workers, run.max_workers) if run.is_elastic else run.max_workers
    trainer = Trainer(
        _work,
        train_loop_config={"work": work, "job": ray.put(job), "log": log},
        torch_config=RayNetwork(timeout_s=run.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=number,
            elastic_resize_monitor_interval_s=run.resize_interval_s,  # type: ignore[call-arg]  # Train v2 has it
            use_gpu=run.use_gpu,
            resources_per_worker=of_a_worker(run),
            accelerator_type=run.accelerator_type,
            placement_strategy=run.placement_strategy,
        ),
        # A name of its own for each attempt: Ray's snapshot of an earlier one, which a full disk can tear, is never
        # read. What resumes a run are our checkpoints.
        run_config=ray.train.RunConfig(
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}",
            storage_path=f"{job.folder}/ray",
            failure_config=FailureConfig(max_failures=run.max_failures),
            callbacks=[Watch(log, run)],  # type: ignore[list-item]  # Train v2 takes it
            worker_runtime_env={"env_vars": _environment(job.config)},  # type: ignore[call-arg]  # Train v2 has it
        ),
        run=run,
    )
    failure: Exception | None = None
    try:
        with _watched_for_preemption():
            _fit(trainer, log)
    except TrainingFailedError as error:
        failure, why = error, _first_failure(error)
    except RayActorError as error:
        failure, why = error, f"Ray Train's controller died, {cause(error)}. Start the same command again"
        free_orphans()
    fatal = ray.get(log.fatal.remote())
    if fatal is not None:
        raise fatal
    if failure is not None:
        raise TrainingError(why) from failure


@contextmanager
def _watched_for_preemption() -> Iterator[None]:
    """Ray asks every few seconds, in a process of its own, whether a node is about to be taken away. A node by itself
    would take that process along, which does not start then, unless the driver's environment says so."""
    if not is_alone() or WATCHER in os.environ:
        yield
        return
    os.environ[WATCHER] = "0"
    try:
        yield
    finally:
        del os.environ[WATCHER]


def _fit(trainer: Trainer, log: Any) -> None:
    """`trainer.fit()`, which Ctrl-C ends with its workers.

    In a thread, where Ray leaves signals alone: its own handler waits for the controller, which hears nothing while it
    waits for room itself.
    """
    ended: Future[Any] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=fit, daemon=True, name="fit").start()
    try:
        ended.result()
    except KeyboardInterrupt:
        while not ended.done() and (controller := ray.get(log.controller.remote())) is None:
            time.sleep(0.2)
        if not ended.done():
            stop(controller)
        raise


def stop(controller: Any) -> None:
    """End the workers of a controller, and the controller; at once when it does not answer for STOP_S."""
    try:
        ray.get(controller.abort.remote(), timeout=STOP_S)
    except ray.exceptions.GetTimeoutError:
        ray.kill(controller)
    except RayActorError:  # it goes by its own hand
        pass


def _environment(config: TrainConfig) -> dict[str, str]:
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(config.run.cpus_per_worker),
        **({} if config.run.use_gpu else {"DS_ACCELERATOR": "cpu", **allocator()}),
        **config.run.env_vars,
    }


def _first_failure(error: TrainingFailedError) -> str:
    """The failing rank's own words, without the frames around them."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return f"the run failed: {error}"
    rank, cause = min(failures.items())
    text = str(cause).strip().splitlines()
    others = f" ({len(failures) - 1} other ranks failed too)" if len(failures) > 1 else ""
    return "\n".join([f"rank {rank} failed{others}:", *text[-12:]])
