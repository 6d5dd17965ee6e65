"""Room for the workers on the cluster: what they need, what there is, and waiting for the difference."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import ray
import ray._private.state
import ray.util.client
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]  # generated
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from ray_prefopt.config import RunConfig
from ray_prefopt.errors import ResourceError

TELL_AFTER_S = 5.0
"""What has just finished on the cluster may take that long to give its CPUs back."""
TELL_EACH_S = 60.0
"""How often it is said what is still missing."""
PLACED_S = 1.0
"""A group that is not placed by then waits for room."""
logger = logging.getLogger(__name__)


def of_a_worker(run: RunConfig) -> dict[str, float]:
    """What one worker needs, by Ray's names."""
    return {"CPU": run.cpus_per_worker, **({"GPU": 1} if run.use_gpu else {}), **run.resources_per_worker}


def asked(run: RunConfig, workers: int) -> dict[str, float]:
    """What so many workers need, by Ray's names."""
    return {name: workers * number for name, number in of_a_worker(run).items()}


def missing(run: RunConfig, workers: int) -> str:
    """`2 workers need 2 CPU; the cluster has 1 of 4 CPU free`."""
    available, total = ray.available_resources(), ray.cluster_resources()
    needs = asked(run, workers)
    needed = ", ".join(f"{number:g} {name}" for name, number in needs.items())
    found = ", ".join(f"{available.get(name, 0):g} of {total.get(name, 0):g} {name} free" for name in needs)
    return f"{workers} workers need {needed}; the cluster has {found}"


def fitting(run: RunConfig, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers fit on nodes with these resources."""
    each = {name: number for name, number in of_a_worker(run).items() if number}
    return sum(min(int(node.get(name, 0) // number) for name, number in each.items()) for node in nodes)


def is_alone() -> bool:
    """Whether the cluster is a single node."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def wait_for_room(run: RunConfig) -> None:
    """Wait until the cluster has room for the fewest workers; raises ResourceError after run.resource_timeout_s."""
    begun, workers = time.monotonic(), run.min_workers
    needs = asked(run, workers)
    while time.monotonic() - begun < min(TELL_AFTER_S, run.resource_timeout_s):
        free_orphans()
        available = ray.available_resources()
        if all(available.get(name, 0) >= number for name, number in needs.items()):
            return
        time.sleep(0.5)
    if run.resource_timeout_s > TELL_AFTER_S:
        told = begun - TELL_EACH_S
        with asking_for_nodes(run) as group:
            while time.monotonic() - begun < run.resource_timeout_s:
                if time.monotonic() - told >= TELL_EACH_S:
                    logger.warning("waiting up to %g s: %s", run.resource_timeout_s, missing(run, workers))
                    told = time.monotonic()
                free_orphans()
                if group.wait(1):
                    return
    raise ResourceError(
        f"{missing(run, workers)} after waiting {run.resource_timeout_s:g} s. Lower run.num_workers or "
        "run.cpus_per_worker, add nodes, or raise run.resource_timeout_s; `ray status` shows what holds them"
    )


def free_orphans() -> None:
    """End workers of this job whose controller has died, as it does with the trial of a search that it belongs to.

    Ray keeps their room until the job ends. Its own remedy asks the dashboard, and finds none where a host has two
    Rays. Through a Ray client nothing is seen of it, and nothing done.
    """
    if ray.util.client.ray.is_connected():
        return
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    accessor = ray._private.state.state._connect_and_get_accessor()
    for data in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(data)
        is_there = group.state != PlacementGroupTableData.REMOVED and group.creator_job_id == job.binary()
        if is_there and _is_dead_controller(ray.ActorID(group.creator_actor_id)):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _is_dead_controller(actor: ray.ActorID) -> bool:
    """Nil is what the driver itself has."""
    if actor.is_nil():
        return False
    state = ray._private.state.actors(actor.hex())
    return (state.get("ActorClassName"), state.get("State")) == ("TrainController", "DEAD")


@contextmanager
def asking_for_nodes(run: RunConfig) -> Iterator[PlacementGroup]:
    """Room that is asked for while this lasts: the fewest workers, placed as they would be.

    An autoscaler adds nodes for a placement group that waits. For `request_resources` of its SDK it adds none while
    others use those there are, and Ray Data and Ray Train each take back what anybody asked for in that way. It is not
    removed while it is being placed: Ray would lose what it has taken by then (ray-project/ray#64693).
    """
    each = of_a_worker(run)
    if run.accelerator_type:
        each[f"accelerator_type:{run.accelerator_type}"] = 0.001
    group = placement_group([each] * run.min_workers, strategy=run.placement_strategy)
    try:
        yield group
    finally:
        group.wait(PLACED_S)
        remove_placement_group(group)
