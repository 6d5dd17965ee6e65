"""A run that died and went on ends where one that did not die ends."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import CheckpointError
from ray_prefopt.training.job import Job
from tests.gang import run_gang
from tests.invariant.test_engines import assert_equal
from tests.invariant.training import Inputs, curves, run, stop_at
from tests.tiny import random_pairs, write_blocks

SAME_RANKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, by length": {"data": {"group_by_length": True}},
    **{f"zero {stage}": {"engine": f"zero{stage}"} for stage in range(4)},
    **{f"zero {stage}, bf16": {"engine": f"zero{stage}", "dtype": "bfloat16"} for stage in (1, 2, 3)},
    "plain, bf16": {"dtype": "bfloat16"},
    "plain, in halves": {"run": {"cpus_per_worker": 2}},
    "plain, in halves, bf16": {"run": {"cpus_per_worker": 2}, "dtype": "bfloat16"},
    "zero 2, lora": {"engine": "zero2", "lora": True},
    "zero 3, lora": {"engine": "zero3", "lora": True},
}
OTHER_RANKS: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    (2, 1): {
        "plain": {},
        **{f"zero {stage}": {"engine": f"zero{stage}"} for stage in range(4)},
        "zero 2, lora": {"engine": "zero2", "lora": True},
    },
    (1, 2): {"zero 3": {"engine": "zero3"}},
    (2, 3): {"plain": {}, "zero 2": {"engine": "zero2"}},
}
TIMED = {"pairs_per_second", "tokens_per_second", "data_wait"}


def _jobs(inputs: Inputs, cases: Mapping[str, Any], folder: Path) -> dict[str, Job]:
    return {name: inputs.job(inputs.config(**case), folder / name) for name, case in cases.items()}


def test_same_ranks_bit_for_bit(inputs: Inputs, tmp_path: Path) -> None:
    straight = curves(_jobs(inputs, SAME_RANKS, tmp_path / "straight"), 2)
    broken = _jobs(inputs, SAME_RANKS, tmp_path / "broken")
    stop_at(broken, 2, step=2)
    for name, resumed in curves(broken, 2).items():
        whole = straight[name]
        assert [step["step"] for step in resumed.steps] == [3, 4]
        for step, expected in zip(resumed.steps, whole.steps[2:], strict=True):
            assert _untimed(step) == _untimed(expected), name
        assert _untimed(resumed.evaluation) == _untimed(whole.evaluation), name
        assert resumed.weights.keys() == whole.weights.keys()
        assert all(torch.equal(weight, whole.weights[key]) for key, weight in resumed.weights.items()), name
        assert resumed.order_hash == whole.order_hash


def _untimed(record: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name not in TIMED}


@pytest.mark.parametrize(("before", "after"), OTHER_RANKS)
def test_other_ranks_within_rounding(inputs: Inputs, tmp_path: Path, before: int, after: int) -> None:
    cases = OTHER_RANKS[before, after]
    straight = curves(_jobs(inputs, cases, tmp_path / "straight"), after)
    broken = _jobs(inputs, cases, tmp_path / "broken")
    stop_at(broken, before, step=2)
    for name, resumed in curves(broken, after).items():
        whole = straight[name]
        assert_equal(resumed, replace(whole, steps=whole.steps[2:]), loss=2e-6, weights=2e-5)


@pytest.mark.parametrize("engine", ["plain", "zero0"])
def test_the_scale_of_losses_is_that_of_the_run_that_died(
    inputs: Inputs, tmp_path: Path, engine: str
) -> None:
    """In fp16; a scale that begins anew would overflow, and leave out the steps that do."""
    steps = {"save_steps": 6, "global_batch": 4, "max_steps": 10}
    config = inputs.config(engine, dtype="float16", loss={"cpo_alpha": 100.0}, run=steps)
    (whole,) = run_gang(1, run, inputs.job(config, tmp_path / "whole"))
    broken = inputs.job(config, tmp_path / "broken")
    run_gang(1, run, broken, 6)
    (resumed,) = run_gang(1, run, broken)
    assert [_untimed(record) for record in resumed] == [_untimed(record) for record in whole[-len(resumed) :]]


def test_the_schedule_waits_for_steps_that_overflow(inputs: Inputs, tmp_path: Path) -> None:
    steps = {"save_steps": 20, "global_batch": 4, "max_steps": 10}
    rates = {}
    for engine in ("plain", "zero0"):
        optim = {"warmup_steps": 4, "name": "adamw_torch"}
        config = inputs.config(engine, dtype="float16", loss={"cpo_alpha": 3000.0}, optim=optim, run=steps)
        (records,) = run_gang(1, run, inputs.job(config, tmp_path / engine))
        lines = [record for record in records if "loss" in record]
        assert not math.isfinite(lines[0]["grad_norm"])
        rates[engine] = [record["learning_rate"] for record in lines]
    assert rates["zero0"] == rates["plain"]
    assert rates["plain"][:2] == [0.0, 0.0]


def test_other_pairs_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    job = inputs.job(inputs.config(), tmp_path / "run")
    run(job, stop_at=2)
    others = write_blocks(tmp_path / "others", random_pairs(60))
    with pytest.raises(
        CheckpointError, match=r"the checkpoint of step 2 was trained on other pairs, or in another order"
    ):
        run(replace(job, train_blocks=others))


def test_resume_from_another_run(inputs: Inputs, tmp_path: Path) -> None:
    first = inputs.job(inputs.config(), tmp_path / "first")
    run(first, stop_at=2)
    (checkpoint,) = Path(first.checkpoints).iterdir()
    config = inputs.config(run={"resume_from": str(checkpoint)})
    records = run(inputs.job(config, tmp_path / "second"))
    assert [record["step"] for record in records if "loss" in record] == [3, 4]


def test_resume_from_nothing(inputs: Inputs, tmp_path: Path) -> None:
    config: TrainConfig = inputs.config(run={"resume_from": str(tmp_path / "gone")})
    with pytest.raises(CheckpointError, match=r"gone: no checkpoint here \(MANIFEST.json is missing\)"):
        run(inputs.job(config, tmp_path / "run"))


def test_a_stage_is_written_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python before 3.11.5 pickles enums, torch would refuse it."""
    monkeypatch.setattr(
        ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (ZeroStageEnum, stage.name))
    )
    torch.save(ZeroStageEnum.gradients, tmp_path / "stage.pt")
    assert torch.load(tmp_path / "stage.pt", weights_only=True) is ZeroStageEnum.gradients
