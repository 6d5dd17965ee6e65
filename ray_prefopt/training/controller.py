"""Our part in Ray Train's controller: it says what becomes of the workers, and when their number may change.

Imported there before the workers are started, so it must not touch what they need.
"""

import textwrap
import time
from collections.abc import Mapping
from typing import Any

import ray
import ray._private.state
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from ray_prefopt.config import RunConfig
from ray_prefopt.errors import ResourceError
from ray_prefopt.training.room import TELL_EACH_S, fitting, is_alone, missing

LOOK_S = 1.0
"""Between two looks for room: Ray's controller itself would look without a pause."""
FIRST_S = 10.0
"""Workers that are not back by then are said to be waited for."""
LINE = 200
"""Characters of a cause."""
WAITING = ("INITIALIZING", "RESTARTING", "RESCHEDULING")
"""States of Ray's controller; it has one of them for as long as it finds no room."""


class Watch(ControllerCallback, WorkerGroupCallback):
    """Tells the run's log who controls the workers, when they are lost, and what is missing to start them again.

    Raises ResourceError when that takes longer than run.restart_timeout_s, or run.resource_timeout_s in the beginning.
    """

    def __init__(self, log: Any, run: RunConfig) -> None:
        self._log, self._run = log, run
        self._patience_s = run.resource_timeout_s
        self._tried = run.max_workers
        self._waiting_since: float | None = None
        self._tell_at = 0.0

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ARG002
        self._log.controlled.remote(ray.get_runtime_context().current_actor)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        before, now = _name(previous_state), _name(current_state)
        if now == "RUNNING":
            self._patience_s, self._waiting_since = self._run.restart_timeout_s, None
        elif now == "SCHEDULING":
            self._tried = current_state.scaling_decision.num_workers
        elif now == "RESIZING":
            self._log.resizing.remote(current_state.scaling_decision.num_workers)
        elif now == "PREEMPTING" and before != now:
            ranks = ", ".join(map(str, current_state.preemption_info.preempted_ranks))
            self._log.warn.remote(f"the nodes of ranks {ranks} are about to be taken away")
        elif now in WAITING:
            if before in ("RUNNING", "PREEMPTING"):
                self._log.lost.remote(cause(current_state.training_failed_error))
            self._wait(is_again=before == now)

    def _wait(self, *, is_again: bool) -> None:
        """`is_again`: Ray looked for room just now, and found none."""
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since, self._tell_at = now, now + FIRST_S
        waited = now - self._waiting_since
        workers = self._run.min_workers if is_again else self._tried
        if waited > self._patience_s:
            error = ResourceError(
                f"{missing(self._run, workers)} after {waited:.0f} s in which they could not be started. Add nodes, or "
                "have run.num_workers a pair, to go on with fewer; the same command goes on from the last checkpoint"
            )
            ray.get(self._log.fail.remote(error))
            raise error
        if now >= self._tell_at:
            self._log.warn.remote(
                f"no room for the workers yet, after {waited:.0f} s of at most {self._patience_s:g} s: "
                f"{missing(self._run, workers)}"
            )
            self._tell_at = now + TELL_EACH_S
        if is_again:
            time.sleep(LOOK_S)


def _name(state: Any) -> str:
    """Of a state of Ray's controller."""
    name: str = state._state_type.state_name
    return name


def cause(error: Any) -> str:
    """Why workers were lost, in a line: of several failures one of a process that died, since others follow from it."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return _line(error)
    own = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in failures.items()}
    dead = [rank for rank, failure in own.items() if isinstance(failure, RayActorError)]
    rank = min(dead or own)
    return f"rank {rank}: {_line(own[rank])}"


def _line(error: Any) -> str:
    """The first line; of an actor's death, which Ray begins with a list of what the actor was, the one after it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("\t")] or [type(error).__name__]
    line = told[1] if isinstance(error, ActorDiedError) and len(told) > 1 else told[0]
    place = next((f" ({line.split()[1]})" for line in lines if line.startswith("\tip: ")), "")
    return textwrap.shorten(line.rstrip("."), LINE, placeholder=" ...") + place


class Trainer(TorchTrainer):
    """Ray's trainer, whose workers change in number as AtCheckpoints says, and which starts no process for nothing."""

    def __init__(self, *args: Any, run: RunConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._run = run

    def _create_default_callbacks(self) -> list[Any]:
        """Without that for Ray Datasets, of which there are none: workers read blocks. And without that for workers of
        a controller that died, which asks Ray's dashboard each second: `free_orphans` ends them."""
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # Train v2 has it
        unused = DatasetsCallback, PlacementGroupCleanerCallback
        return [callback for callback in callbacks if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        scaling: Any = self.scaling_config
        if self._run.is_elastic:
            arguments["scaling_policy"] = AtCheckpoints(scaling, self._run)
        elif is_alone():
            arguments["scaling_policy"] = Unasked(scaling)
        return super()._initialize_and_run_controller(**arguments)  # type: ignore[misc]  # Train v2 has it


class Unasked(FixedScalingPolicy):
    """Ray's policy for a number of workers that stays, without the process by which it asks an autoscaler for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class AtCheckpoints(ElasticScalingPolicy):
    """Ray's elastic policy, which here loses no step and asks for no room that others use.

    A group that is running is resized when it has just saved, which is when it reports. Ray would stop it at any time,
    and counts whole nodes, whoever works on them.
    """

    def __init__(self, scaling: Any, run: RunConfig) -> None:
        super().__init__(scaling)
        self._run = run
        self._may_hold_room = False

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:  # noqa: ARG002
        # What is left of a group that failed is there until the next one is started.
        self._may_hold_room = _name(current_state) == "RESTARTING"

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        decision = super().make_decision_for_non_running_worker_group()
        nodes = _whole_nodes() if self._may_hold_room else _free_nodes()
        return self._possible(decision, fitting(self._run, nodes))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        if not any(worker.training_report for worker in worker_group_status.worker_statuses.values()):
            self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
            return NoopDecision()
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        number = worker_group_state.num_workers
        return self._possible(decision, number + fitting(self._run, _free_nodes()), unless=number)

    def _possible(self, decision: ScalingDecision, room: int, unless: int | None = None) -> ScalingDecision:
        """The decision for as many workers as there is room for; none for too few, or for as many as there are."""
        if not isinstance(decision, ResizeDecision):
            return decision
        number = min(decision.num_workers, room)
        return (
            NoopDecision()
            if number < self._run.min_workers or number == unless
            else self._get_resize_decision(number)
        )


def _free_nodes() -> list[Mapping[str, float]]:
    """What is free on each node."""
    return list(ray._private.state.available_resources_per_node().values())


def _whole_nodes() -> list[Mapping[str, float]]:
    """What each node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
