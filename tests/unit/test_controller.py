"""What Ray Train's controller does for a run: what it tells of the workers, and when it changes their number."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from ray.train import PreemptionInfo, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    scaling_policy,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError

from ray_prefopt.config import RunConfig
from ray_prefopt.errors import ResourceError
from ray_prefopt.training import controller, room, workers
from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.controller import AtCheckpoints, Trainer, Unasked, Watch, cause
from ray_prefopt.training.log import RunLog

LOST = WorkerGroupError("it died", {1: RuntimeError("node 7 is gone\nand more")})
RUNNING, RESTARTING = states.RunningState(), states.RestartingState(LOST)
NO_START = states.ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))


def scheduling(workers: int) -> states.SchedulingState:
    return states.SchedulingState(ResizeDecision(workers, {"CPU": 1}))


# --- What is told ---


class Remote:
    """The log of a run as if it were an actor's handle."""

    def __init__(self, folder: Path) -> None:
        self.log = RunLog.__ray_metadata__.modified_class(str(folder))  # type: ignore[attr-defined]
        self.log.started(LoopState(3), 2)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.log, name))

    @property
    def said(self) -> list[str]:
        return [text for kind, text in self.log.events(0) if kind in ("warning", "note")]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes when somebody sleeps, and a cluster of which one CPU of two is free."""
    found = Clock()
    time = SimpleNamespace(monotonic=lambda: found.now, sleep=found.sleep)
    monkeypatch.setattr(controller, "time", time)
    monkeypatch.setattr(controller.ray, "get", lambda value: value)
    monkeypatch.setattr(room.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(room.ray, "cluster_resources", lambda: {"CPU": 2.0})
    return found


def watched(folder: Path, **run: Any) -> tuple[Watch, Remote]:
    log = Remote(folder)
    watch = Watch(log, RunConfig(**run))
    watch.after_controller_state_update(scheduling(2), RUNNING)
    return watch, log


def test_a_loss_and_the_wait_for_a_node(tmp_path: Path, clock: Clock) -> None:
    """A fixed number of workers: Ray asks for all of them, for a minute at a time."""
    watch, log = watched(tmp_path, num_workers=2, restart_timeout_s=150)
    watch.after_controller_state_update(RUNNING, RESTARTING)
    assert log.said == [
        "workers were lost after step 3: rank 1: node 7 is gone; starting them again, from the checkpoint of step 3"
    ]
    for _ in range(2):
        watch.after_controller_state_update(RESTARTING, scheduling(2))
        clock.now += 61
        watch.after_controller_state_update(scheduling(2), NO_START)
    assert log.said[1:] == [
        f"no room for the workers yet, after {waited} s of at most 150 s: "
        "2 workers need 2 CPU; the cluster has 1 of 2 CPU free"
        for waited in (61, 122)
    ]
    watch.after_controller_state_update(NO_START, scheduling(2))
    watch.after_controller_state_update(scheduling(2), RUNNING)
    clock.now += 3600
    watch.after_controller_state_update(RUNNING, RESTARTING)
    assert len(log.said) == 4  # it waits anew


def test_the_wait_has_an_end(tmp_path: Path, clock: Clock) -> None:
    """An elastic run: Ray looks again and again, and each look may take its time."""
    watch, log = watched(tmp_path, num_workers=[3, 4], restart_timeout_s=150)
    watch.after_controller_state_update(RUNNING, RESTARTING)
    while clock.now <= 1000 + 150:
        watch.after_controller_state_update(RESTARTING, RESTARTING)
    with pytest.raises(ResourceError) as caught:
        watch.after_controller_state_update(RESTARTING, RESTARTING)
    assert clock.now == 1000 + 151
    assert [text.split(" s of")[0] for text in log.said[1:]] == [
        f"no room for the workers yet, after {waited}" for waited in (10, 70, 130)
    ]
    assert str(caught.value) == (
        "3 workers need 3 CPU; the cluster has 1 of 2 CPU free after 151 s in which they could not be started. Add "
        "nodes, or have run.num_workers a pair, to go on with fewer; the same command goes on from the last checkpoint"
    )
    assert log.log.fatal() is caught.value


def test_the_first_start_has_the_patience_of_a_start(tmp_path: Path, clock: Clock) -> None:
    watch = Watch(Remote(tmp_path), RunConfig(num_workers=2, resource_timeout_s=70))
    watch.after_controller_state_update(scheduling(2), NO_START)
    clock.now += 71
    with pytest.raises(ResourceError, match="after 71 s in which they could not be started"):
        watch.after_controller_state_update(scheduling(2), NO_START)


def test_what_is_known_beforehand(tmp_path: Path, clock: Clock) -> None:
    watch, log = watched(tmp_path, num_workers=[1, 4])
    preempting = states.PreemptingState(PreemptionInfo(None, {"a": [1, 3]}), 0.0)
    watch.after_controller_state_update(RUNNING, preempting)
    watch.after_controller_state_update(preempting, preempting)
    watch.after_controller_state_update(preempting, RESTARTING)
    watch.after_controller_state_update(RUNNING, states.ResizingState(ResizeDecision(4, {"CPU": 1})))
    assert [text.split(";")[0] for text in log.said] == [
        "the nodes of ranks 1, 3 are about to be taken away",
        "workers were lost after step 3: rank 1: node 7 is gone",
        "resizing from 2 to 4 workers after step 3, from the checkpoint of step 3",
    ]


def test_the_cause_is_the_death_that_others_follow_from() -> None:
    context = ActorDiedErrorContext(
        error_message="Its node has died.\nAnd so on.", actor_id=b"1" * 16, node_ip_address="10.0.0.7", pid=12
    )
    died = WorkerHealthCheckFailedError("the check failed", ActorDiedError(context))
    assert cause(WorkerGroupError("", {0: RuntimeError("connection closed"), 1: died})) == (
        "rank 1: Its node has died (10.0.0.7)"
    )
    assert cause(WorkerGroupError("", {0: ActorDiedError()})) == (
        "rank 0: The actor died unexpectedly before finishing this task"
    )
    assert cause(WorkerGroupError("", {2: ValueError("\n  odd\nlines"), 3: KeyError("x")})) == "rank 2: odd"
    assert cause(WorkerGroupError("", {0: ValueError()})) == "rank 0: ValueError"
    preempted = PreemptionError(PreemptionInfo(None, {"a": [1]}))
    assert cause(preempted).startswith("Training was interrupted by node preemption (preempted_ranks=[1]")
    long = cause(WorkerGroupError("", {0: ValueError("word " * 100)}))
    assert len(long) <= len("rank 0: ") + controller.LINE
    assert long.endswith("word ...")


# --- How many workers ---


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> AtCheckpoints:
    """Of a run of 2 to 4 workers on nodes of 2 CPUs, three of which Ray counts as its own."""
    monkeypatch.setattr(AtCheckpoints, "_maybe_send_resource_request", lambda _: None)
    monkeypatch.setattr(
        AtCheckpoints, "_get_reserved_resources", lambda _: {name: {"CPU": 2.0} for name in "abc"}
    )
    run = RunConfig(num_workers=[2, 4], resize_interval_s=0)
    scaling: Any = ScalingConfig(num_workers=(2, 4), elastic_resize_monitor_interval_s=0)
    return AtCheckpoints(scaling, run)


def status(*reports: Any) -> Any:
    return SimpleNamespace(
        worker_statuses={rank: SimpleNamespace(training_report=report) for rank, report in enumerate(reports)}
    )


def number(decision: Any) -> int | None:
    """Of workers; None: it stays as it is."""
    assert isinstance(decision, NoopDecision | ResizeDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


@pytest.mark.parametrize(
    ("workers", "free", "reports", "expected"),
    [
        (2, [2, 2], (None, None), None),  # not while there is no checkpoint
        (2, [2, 2], (object(), None), 4),
        (2, [1, 0], (object(), object()), 3),
        (2, [0, 0.5], (object(), object()), None),  # others work there
        (4, [0, 0], (object(),) * 4, None),
    ],
)
def test_a_group_that_runs_is_resized_when_it_has_saved(
    policy: AtCheckpoints,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    free: list[float],
    reports: tuple[Any, ...],
    expected: int | None,
) -> None:
    monkeypatch.setattr(controller, "_free_nodes", lambda: [{"CPU": cpus} for cpus in free])
    group = SimpleNamespace(num_workers=workers, start_time=0.0)
    assert number(policy.make_decision_for_running_worker_group(group, status(*reports))) == expected


@pytest.mark.parametrize(
    ("before", "state", "expected"),
    [
        (RUNNING, RESTARTING, 3),  # by whole nodes: what is left of the group still holds its part
        (scheduling(4), NO_START, 2),  # by what is free
        (RESTARTING, states.InitializingState(), 2),
    ],
)
def test_a_group_that_starts_takes_what_there_is(
    policy: AtCheckpoints, monkeypatch: pytest.MonkeyPatch, before: Any, state: Any, expected: int
) -> None:
    monkeypatch.setattr(controller, "_free_nodes", lambda: [{"CPU": 2.0}, {}])
    monkeypatch.setattr(controller, "_whole_nodes", lambda: [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}])
    policy.after_controller_state_update(before, state)
    assert number(policy.make_decision_for_non_running_worker_group()) == expected


def test_fewer_than_the_fewest_do_not_start(policy: AtCheckpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "_free_nodes", lambda: [{"CPU": 1.0}])
    assert number(policy.make_decision_for_non_running_worker_group()) is None


# --- Processes that are not started ---


def test_there_is_none_for_datasets_nor_for_what_we_do_ourselves() -> None:
    """And the others that Ray Train makes are left as they are."""
    rays = {type(callback) for callback in TorchTrainer(print)._create_default_callbacks()}
    ours = {type(callback) for callback in Trainer(print, run=RunConfig())._create_default_callbacks()}
    assert (rays - ours, ours - rays) == ({DatasetsCallback, PlacementGroupCleanerCallback}, set())


@pytest.mark.parametrize(
    ("workers", "alone", "expected"),
    [(2, True, Unasked), (2, False, None), ((1, 2), True, AtCheckpoints), ((1, 2), False, AtCheckpoints)],
)
def test_nodes_are_asked_for_where_there_can_be_several(
    workers: Any, alone: bool, expected: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Mock()
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", given)
    monkeypatch.setattr(controller, "is_alone", lambda: alone)
    run = RunConfig(num_workers=list(workers) if isinstance(workers, tuple) else workers)
    scaling = ScalingConfig(num_workers=workers, elastic_resize_monitor_interval_s=60)  # type: ignore[call-arg]
    Trainer(print, run=run, scaling_config=scaling)._initialize_and_run_controller(metadata=1)
    policy = given.call_args.kwargs.pop("scaling_policy", None)
    assert type(policy) is (expected or type(None))
    assert given.call_args.kwargs == {"metadata": 1}


def test_a_policy_that_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """And decides what Ray's does, which asks an actor of Ray Data's."""
    asked = Mock()
    monkeypatch.setattr(scaling_policy, "TrainAutoscalingCoordinatorClient", asked)
    scaling = ScalingConfig(num_workers=2)
    for policy in (Unasked(scaling), FixedScalingPolicy(scaling)):
        asked.assert_not_called()
        policy.after_controller_start(Mock())
        assert number(policy.make_decision_for_non_running_worker_group()) == 2
        assert number(policy.make_decision_for_running_worker_group(Mock(), Mock())) is None
        policy.before_controller_abort()
        asyncio.run(policy.before_controller_shutdown())
    asked.assert_called_once()


@pytest.mark.parametrize(("nodes", "given", "seen"), [(1, None, "0"), (1, "1", "1"), (2, None, None)])
def test_a_node_by_itself_is_not_watched(
    nodes: int, given: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [{"Alive": True}] * nodes + [{"Alive": False}]
    monkeypatch.setattr(workers.ray, "nodes", lambda: alive)
    monkeypatch.delenv(workers.WATCHER, raising=False)
    if given is not None:
        monkeypatch.setenv(workers.WATCHER, given)
    assert workers.WATCHER == ENABLE_PREEMPTION_WATCHER_ENV_VAR
    with workers._watched_for_preemption():
        assert os.environ.get(workers.WATCHER) == seen
    assert os.environ.get(workers.WATCHER) == given
