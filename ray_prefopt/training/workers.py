"""Ray Train around the loop: wait for the cluster, start the workers, and hear from the driver's side how it went.

Ray Train's controller imports this module before it starts the workers: what they need is in `on_worker`, unseen by it.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray._common.network_utils import parse_address  # type: ignore[attr-defined]  # re-exported from C
from ray._private.services import canonicalize_bootstrap_address
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import ControllerCallback

from ray_prefopt.config import RunConfig, TrainConfig
from ray_prefopt.errors import ResourceError, TrainingError
from ray_prefopt.training.network import RayNetwork

if TYPE_CHECKING:
    from ray_prefopt.training.loop import Job

TELL_AFTER_S = 5.0
"""What has just finished on the cluster may take that long to give its CPUs back."""
ANSWER_TIMEOUT_S = 10.0
logger = logging.getLogger(__name__)


def start_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS, else to the one of `ray start`, else start one here.

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
            f"no Ray cluster answers at {address}, which RAY_ADDRESS={asked} names: start it, or unset RAY_ADDRESS "
            "to run on this machine"
        )
    ray.init("local" if is_gone else None, log_to_driver=False, logging_level=logging.ERROR)


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
    _fit("train", job, log)


def run_evaluation(job: "Job", log: Any) -> None:
    """`on_worker.evaluate` on all workers; the log gets what it found. Raises as `run_training`."""
    _fit("evaluate", job, log)


def _work(given: dict[str, Any]) -> None:
    """What one worker does: `train` or `evaluate` of `on_worker`."""
    on_worker = import_module("ray_prefopt.training.on_worker")
    getattr(on_worker, given["work"])(ray.get(given["job"]), given["log"])


class _Introduction(ControllerCallback):
    """Tells the log which actor runs the workers: whoever watches the run can stop it with `abort`.

    Workers outlive a controller that just dies, until Ray's dashboard notices, if there is one.
    """

    def __init__(self, log: Any) -> None:
        self._log = log

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        self._log.controlled.remote(ray.get_runtime_context().current_actor)


def _fit(work: str, job: "Job", log: Any) -> None:
    run = job.config.run
    _wait_for_room(job.config)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"work": work, "job": ray.put(job), "log": log},
        torch_config=RayNetwork(),
        scaling_config=ScalingConfig(
            num_workers=run.num_workers,
            use_gpu=run.use_gpu,
            resources_per_worker=_resources(run),
            accelerator_type=run.accelerator_type,
            placement_strategy=run.placement_strategy,
        ),
        # A name of its own for each attempt: Ray's snapshot of an earlier one, which a full disk can tear, is never
        # read. What resumes a run are our checkpoints.
        run_config=ray.train.RunConfig(
            name=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}",
            storage_path=f"{job.folder}/ray",
            failure_config=FailureConfig(max_failures=run.max_failures),
            callbacks=[_Introduction(log)],  # type: ignore[list-item]  # Train v2 takes it
            worker_runtime_env={"env_vars": _environment(job.config)},  # type: ignore[call-arg]  # Train v2 has it
        ),
    )
    failure: TrainingFailedError | None = None
    try:
        with _interruptible():
            trainer.fit()
    except TrainingFailedError as error:
        failure = error
    fatal = ray.get(log.fatal.remote())
    if fatal is not None:
        raise fatal
    if failure is not None:
        raise TrainingError(_first_failure(failure)) from failure


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as everywhere in Python: Ray Train's handler stops the workers, but then exits, and stays installed."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _environment(config: TrainConfig) -> dict[str, str]:
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(config.run.cpus_per_worker),
        **({} if config.run.use_gpu else {"DS_ACCELERATOR": "cpu"}),
        **config.run.env_vars,
    }


def _resources(run: RunConfig) -> dict[str, float]:
    """Of one worker."""
    return {"CPU": run.cpus_per_worker, **({"GPU": 1} if run.use_gpu else {}), **run.resources_per_worker}


def _first_failure(error: TrainingFailedError) -> str:
    """The failing rank's own words, without the frames around them."""
    failures = getattr(error, "worker_failures", {})
    if not failures:
        return f"the run failed: {error}"
    rank, cause = min(failures.items())
    text = str(cause).strip().splitlines()
    others = f" ({len(failures) - 1} other ranks failed too)" if len(failures) > 1 else ""
    return "\n".join([f"rank {rank} failed{others}:", *text[-12:]])


def _wait_for_room(config: TrainConfig) -> None:
    """Wait until the cluster has room for all workers; raises ResourceError after run.resource_timeout_s."""
    run = config.run
    asked = {name: run.num_workers * number for name, number in _resources(run).items()}
    wanted = ", ".join(f"{number:g} {name}" for name, number in asked.items())
    begun, is_told = time.monotonic(), False
    while True:
        available, total = ray.available_resources(), ray.cluster_resources()
        if all(available.get(name, 0) >= number for name, number in asked.items()):
            return
        found = ", ".join(
            f"{available.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in asked
        )
        waited = time.monotonic() - begun
        if waited > run.resource_timeout_s:
            raise ResourceError(
                f"{run.num_workers} workers need {wanted}; the cluster has {found} after waiting "
                f"{run.resource_timeout_s:g} s. Lower run.num_workers or run.cpus_per_worker, add nodes, or raise "
                "run.resource_timeout_s; `ray status` shows what holds them"
            )
        if waited > TELL_AFTER_S and not is_told:
            logger.warning("waiting up to %g s for %s; %s", run.resource_timeout_s, wanted, found)
            is_told = True
        time.sleep(0.5)
