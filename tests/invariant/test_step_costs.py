"""What a step that is not logged makes the ranks wait for: the device, and each other."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ray_prefopt.training import loop
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from tests.gang import run_gang
from tests.invariant.training import STEPS, Inputs

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operations whose result the host has to know: on a GPU it waits for all that was asked before."""
ENGINES = ("plain", "zero0", "zero1", "zero2")
MICRO_BATCHES = {1: 8, 4: 2}
"""Of a rank in a step, and the pairs in each."""


class Counting(TorchDispatchMode):
    """Counts what is waited for, and what is sent, by the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS or name.startswith("c10d::"):
            self.calls["waits" if name in WAITS else name.removeprefix("c10d::").strip("_")] += 1
        return func(*args, **(kwargs or {}))


def _count(job: Job) -> dict[str, int]:
    """In the second step."""
    seen: list[Counter[str]] = []
    step = loop._Training._step

    def counted(*args: Any) -> None:
        with Counting() as counting:
            step(*args)
        seen.append(counting.calls)

    loop._Training._step = counted  # type: ignore[method-assign]
    try:
        train_worker(job, torch.device("cpu"), Reports(*[lambda _: None] * 5))
    finally:
        loop._Training._step = step  # type: ignore[method-assign]
    assert len(seen) == STEPS
    return dict(seen[1])


def _count_all(jobs: list[Job]) -> list[dict[str, int]]:
    return [_count(job) for job in jobs]


@pytest.fixture(scope="module")
def calls(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, dict[str, int]]]:
    """By engine and micro-batches, of two ranks."""
    cases = [(engine, count) for engine in ENGINES for count in MICRO_BATCHES]
    run = {"log_steps": STEPS, "save_steps": None}
    jobs = [
        Job(
            inputs.config(engine, run=run | {"micro_batch": MICRO_BATCHES[count]}),
            str(tmp_path_factory.mktemp(engine)), 0, inputs.blocks, {},
        )
        for engine, count in cases
    ]  # fmt: skip
    found: dict[str, dict[int, dict[str, int]]] = {engine: {} for engine in ENGINES}
    for (engine, count), each in zip(cases, run_gang(2, _count_all, jobs)[0], strict=True):
        found[engine][count] = each
    return found


@pytest.mark.parametrize("engine", ["plain", "zero0"])
def test_the_host_waits_once_for_the_norm(calls: dict[str, Any], engine: str) -> None:
    assert [each["waits"] for each in calls[engine].values()] == [1, 1]


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_deepspeed_looks_at_the_norm_before_and_in_each_of_two_groups(
    calls: dict[str, Any], engine: str
) -> None:
    """And we at what it found."""
    assert [each["waits"] for each in calls[engine].values()] == [4, 4]


@pytest.mark.parametrize("engine", ["plain", "zero0", "zero1"])
def test_nothing_is_sent_before_the_last_micro_batch_is_done(calls: dict[str, Any], engine: str) -> None:
    assert calls[engine][4] == calls[engine][1]


def test_each_weight_is_sent_once(calls: dict[str, Any]) -> None:
    """Nor is anything else."""
    assert calls["plain"][1] == {"waits": 1, "allreduce": 27}
    assert calls["zero0"][1] == {"waits": 1, "allreduce": 1}


def test_shards_of_gradients_are_sent_after_each_micro_batch(calls: dict[str, Any]) -> None:
    """A rank of ZeRO 2 has no room for the others'."""
    assert calls["zero2"][4]["allreduce"] == calls["zero2"][1]["allreduce"] + 3
