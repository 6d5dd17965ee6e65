"""Experts with their auxiliary loss, and what a model can be told for training, on ranks of their own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_prefopt.training.export import export
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from tests.gang import run_gang
from tests.invariant.test_adapters import assert_same_losses, assert_same_weights
from tests.invariant.training import Inputs, curves, stop_at
from tests.tiny import save_tiny_model

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


# --- experts ---


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_train_resume_and_export(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    """The saved config leaves the auxiliary loss out, as those of the Hub do; overrides ask for it."""
    folder = save_tiny_model(tmp_path / "model", kind, **EXPERTS[kind])
    model = {"path": folder, "overrides": AUX}
    jobs = {
        engine: inputs.job(inputs.config(engine, model=model), tmp_path / engine)
        for engine in ("plain", "zero2", "zero3")
    }
    without = inputs.job(inputs.config("plain", model={"path": folder}), tmp_path / "without")
    found = curves({**jobs, "without": without}, 2)
    for engine in ("zero2", "zero3"):
        assert_same_losses(found[engine], found["plain"], rel=1e-5)
    first, unbalanced = found["plain"].steps[0], found["without"].steps[0]
    # of 2 experts for each token, 4 that are equally likely give 2
    assert first["aux_loss"] == pytest.approx(2.0, abs=0.1)
    assert first["loss"] - unbalanced["loss"] == pytest.approx(0.5 * first["aux_loss"], rel=1e-3)
    assert "aux_loss" not in unbalanced

    again = inputs.job(inputs.config("zero2", model=model), tmp_path / "again")
    stop_at({"again": again}, 2, step=2)
    assert_same_weights(curves({"again": again}, 2)["again"], found["zero2"])

    exported = AutoModelForCausalLM.from_pretrained(export(jobs["zero2"].folder, str(tmp_path / "out")))
    assert exported.config.output_router_logits
    for name, weight in exported.state_dict().items():
        assert torch.equal(weight, found["zero2"].weights[name]), name


# --- switches ---


def test_noise_is_that_of_the_seed_and_for_training_alone(inputs: Inputs, tmp_path: Path) -> None:
    def config(engine: str, alpha: float | None, *, lora: bool = False) -> Any:
        run = {"eval_on_start": True}
        return inputs.config(engine, lora=lora, model={"neftune_noise_alpha": alpha}, run=run)

    configs = {
        "without": config("plain", None),
        **{engine: config(engine, 5.0) for engine in ("plain", "zero2", "zero3")},
        **{f"{engine}, lora": config(engine, 5.0, lora=True) for engine in ("plain", "zero3")},
        "without, lora": config("plain", None, lora=True),
    }
    found = curves({name: inputs.job(each, tmp_path / name) for name, each in configs.items()}, 2)
    for engine in ("zero2", "zero3"):
        assert_same_losses(found[engine], found["plain"], rel=1e-5)
    assert_same_losses(found["zero3, lora"], found["plain, lora"], rel=1e-5)
    for suffix in ("", ", lora"):
        noisy, clear = found[f"plain{suffix}"], found[f"without{suffix}"]
        assert noisy.evaluation["eval_loss"] == pytest.approx(clear.evaluation["eval_loss"], rel=1e-6)
        assert all(
            abs(one["loss"] - other["loss"]) > 1e-4
            for one, other in zip(noisy.steps, clear.steps, strict=True)
        )

    again = inputs.job(config("zero2", 5.0), tmp_path / "again")
    stop_at({"again": again}, 2, step=2)
    assert_same_weights(curves({"again": again}, 2)["again"], found["zero2"])


@dataclass
class Seen:
    """What torch was told while a step was logged, and the losses."""

    is_deterministic: bool
    precision: str
    losses: list[float]


def _nothing(_: Any) -> None:
    """Hears of nothing."""


def _seen(jobs: list[Job]) -> list[Seen]:
    found = []
    for job in jobs:
        seen = Seen(False, "", [])

        def log(record: dict[str, float], seen: Seen = seen) -> None:
            seen.is_deterministic = torch.are_deterministic_algorithms_enabled()
            seen.precision = torch.get_float32_matmul_precision()
            seen.losses += [record["loss"]] if "loss" in record else []

        reports = Reports(_nothing, log, _nothing, _nothing, _nothing)
        train_worker(job, torch.device("cpu"), reports)
        found.append(seen)
    return found


def test_workers_are_as_exact_as_they_are_told(inputs: Inputs, tmp_path: Path) -> None:
    told = inputs.config("zero2", model={"float32_matmul_precision": "high"}, run={"full_determinism": True})
    jobs = [inputs.job(inputs.config("zero2"), tmp_path / "as is"), inputs.job(told, tmp_path / "told")]
    for as_is, other in run_gang(2, _seen, jobs):
        assert (as_is.is_deterministic, as_is.precision) == (False, "highest")
        assert (other.is_deterministic, other.precision) == (True, "high")
        assert other.losses == pytest.approx(as_is.losses, rel=1e-4)
