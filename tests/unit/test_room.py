"""What workers need, what a cluster has, and the wait for the difference."""

import logging
import re
import threading
import time
from typing import Any

import pytest
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from ray_prefopt.config import RunConfig
from ray_prefopt.errors import ResourceError
from ray_prefopt.training import room
from ray_prefopt.training.room import (
    asking_for_nodes,
    fitting,
    free_orphans,
    missing,
    of_a_worker,
    wait_for_room,
)


def test_what_a_worker_needs() -> None:
    assert of_a_worker(RunConfig(cpus_per_worker=7)) == {"CPU": 7}
    run = RunConfig(use_gpu=True, resources_per_worker={"fast_disk": 0.5})
    assert of_a_worker(run) == {"CPU": 1, "GPU": 1, "fast_disk": 0.5}


def test_how_many_fit() -> None:
    """Each node by itself, by what it has least of."""
    nodes = [{"CPU": 7.0, "GPU": 2.0}, {"CPU": 5.0, "GPU": 4.0}, {"CPU": 64.0}, {}]
    assert fitting(RunConfig(cpus_per_worker=2, use_gpu=True), nodes) == 2 + 2
    assert fitting(RunConfig(cpus_per_worker=2), nodes) == 3 + 2 + 32
    assert fitting(RunConfig(resources_per_worker={"unset": 0}), nodes) == 7 + 5 + 64


@pytest.mark.usefixtures("ray_local")
def test_room_is_asked_for_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What waits is a placement group of the fewest workers, which autoscalers hear of, and which goes afterwards."""
    monkeypatch.setattr(room, "TELL_AFTER_S", 0.5)
    taken = placement_group([{"CPU": 3}])
    assert taken.wait(30)
    run = RunConfig(num_workers=[2, 4], placement_strategy="SPREAD")
    waiting = threading.Thread(target=wait_for_room, args=(run,))
    with caplog.at_level(logging.WARNING):
        waiting.start()
        asked = None
        while asked is None:
            asked = next((one for one in placement_group_table().values() if one["state"] == "PENDING"), None)
            time.sleep(0.05)
    assert list(asked["bundles"].values()) == [{"CPU": 1.0}] * 2
    assert asked["strategy"] == "SPREAD"
    remove_placement_group(taken)
    waiting.join(30)
    assert not waiting.is_alive()
    (told,) = caplog.messages  # what ran before may not have given all its CPUs back
    assert re.fullmatch("waiting up to 60 s: 2 workers need 2 CPU; the cluster has [01] of 4 CPU free", told)
    assert placement_group_table()[asked["placement_group_id"]]["state"] == "REMOVED"


@pytest.mark.usefixtures("ray_local")
def test_the_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "TELL_AFTER_S", 0.2)
    with pytest.raises(ResourceError) as caught:
        wait_for_room(RunConfig(num_workers=9, resource_timeout_s=1.5))
    assert str(caught.value).startswith("9 workers need 9 CPU; the cluster has ")
    assert "of 4 CPU free after waiting 1.5 s. Lower run.num_workers or run.cpus_per_worker" in str(
        caught.value
    )


@pytest.mark.usefixtures("ray_local")
def test_a_kind_of_gpu_is_asked_for() -> None:
    run = RunConfig(use_gpu=True, accelerator_type="H100")
    with asking_for_nodes(run) as group:
        assert group.bundle_specs == [{"CPU": 1.0, "GPU": 1.0, "accelerator_type:H100": 0.001}]
        assert not group.wait(0.1)
    assert missing(run, 1) == (
        f"1 workers need 1 CPU, 1 GPU; the cluster has {ray.available_resources()['CPU']:g} of 4 CPU free, "
        "0 of 0 GPU free"
    )


@pytest.mark.usefixtures("ray_local")
def test_a_group_is_placed_before_it_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even one that nobody waits for. Ray would lose the CPUs of one that it is just placing."""
    states = []

    def remove(group: PlacementGroup) -> None:
        states.append(placement_group_table(group)["state"])
        remove_placement_group(group)

    monkeypatch.setattr(room, "remove_placement_group", remove)
    with asking_for_nodes(RunConfig()):
        pass
    assert states == ["CREATED"]


@pytest.mark.usefixtures("ray_local")
def test_room_of_a_dead_controller_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a living one, of another actor, or of the driver; nor through a Ray client, which does not see it."""

    class Actor:
        def take(self) -> str:
            group = placement_group([{"CPU": 0.5}])
            assert group.wait(30)
            return group.id.hex()

    controller: Any = ray.remote(num_cpus=0)(type("TrainController", (Actor,), {}))
    other: Any = ray.remote(num_cpus=0)(Actor)
    dead, living, stranger = actors = controller.remote(), controller.remote(), other.remote()
    own = placement_group([{"CPU": 0.5}])
    ids = [*ray.get([actor.take.remote() for actor in actors]), own.id.hex()]
    ray.kill(dead)
    ray.kill(stranger)
    states: list[str] = []
    while states[:1] != ["REMOVED"]:
        free_orphans()
        states = [placement_group_table()[each]["state"] for each in ids]
    assert states[1:] == ["CREATED"] * 3
    monkeypatch.setattr(ray.util.client.ray, "is_connected", lambda: True)
    monkeypatch.setattr(room, "remove_placement_group", None)
    ray.kill(living)
    free_orphans()
    for group in placement_group_table().values():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group["placement_group_id"])))
