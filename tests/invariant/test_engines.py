"""Engines, ranks, micro-batches, offload and recomputation change how a step is computed, never what it computes."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.ds_config import build_ds_config
from ray_prefopt.engine.zero import sharded_construction
from ray_prefopt.model.load import load_model
from tests.gang import run_gang
from tests.invariant.training import Curve, Inputs, curves
from tests.tiny import tiny_config

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batch 1": {"run": {"micro_batch": 1}},
    "micro-batch 8": {"run": {"micro_batch": 8}},
    "in halves": {"run": {"cpus_per_worker": 2}},
    "150 tokens": {"run": {"micro_batch_tokens": 150}},
    "40 tokens": {"run": {"micro_batch_tokens": 40}},
    "150 tokens, padded": {"run": {"micro_batch_tokens": 150}, "model": {"layout": "padded"}},
    "zero 0": {"engine": "zero0"},
    "zero 1": {"engine": "zero1"},
    "zero 2": {"engine": "zero2"},
    "zero 3": {"engine": "zero3"},
    "zero 2, micro-batch 8": {"engine": "zero2", "run": {"micro_batch": 8}},
    "zero 3, 150 tokens": {"engine": "zero3", "run": {"micro_batch_tokens": 150}},
    "zero 2, recomputed": {"engine": "zero2", "model": {"gradient_checkpointing": True}},
    "zero 3, recomputed": {"engine": "zero3", "model": {"gradient_checkpointing": True}},
}
OFFLOADED = {
    "zero 2, offloaded": ("zero2", {"offload_optimizer": "cpu"}),
    "zero 3, offloaded": ("zero3", {"offload_optimizer": "cpu", "offload_param": "cpu"}),
}
LORA = {"plain": {}, "zero 2": {"engine": "zero2"}, "zero 3": {"engine": "zero3"}}
HALF = {
    "plain": {},
    **{f"zero {stage}": {"engine": f"zero{stage}"} for stage in range(4)},
}
FP16 = ("plain", "zero 0")
"""Without a GPU, DeepSpeed refuses the other stages."""
FEW = ("plain", "150 tokens", "zero 1", "zero 2", "zero 3")


def _configs(inputs: Inputs, world_size: int) -> dict[str, Any]:
    cases = CASES if world_size < 3 else {name: CASES[name] for name in FEW}
    configs = {name: inputs.config(**case) for name, case in cases.items()}
    if world_size == 2:
        for name, (engine, offload) in OFFLOADED.items():
            config = inputs.config(engine)
            configs[name] = config.model_copy(update={"engine": config.engine.model_copy(update=offload)})
        configs |= {f"lora, {name}": inputs.config(**case, lora=True) for name, case in LORA.items()}
        configs |= {f"fp16, {name}": inputs.config(**HALF[name], dtype="float16") for name in FP16}
        configs |= {f"bf16, {name}": inputs.config(**case, dtype="bfloat16") for name, case in HALF.items()}
    return configs


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} ranks".format)
def by_name(
    request: pytest.FixtureRequest, inputs: Inputs, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Curve]:
    folder = tmp_path_factory.mktemp("runs")
    configs = _configs(inputs, request.param)
    return curves(
        {name: inputs.job(config, folder / name) for name, config in configs.items()}, request.param
    )


@pytest.fixture(scope="module")
def reference(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """One rank, plain engine, all pairs of a step in one micro-batch."""
    config = inputs.config(run={"micro_batch": 16})
    return curves({"reference": inputs.job(config, tmp_path_factory.mktemp("runs") / "reference")}, 1)[
        "reference"
    ]


def assert_equal(curve: Curve, other: Curve, *, loss: float = 1e-6, weights: float = 1e-5) -> None:
    """Same steps: losses and gradient norms relative to `loss`, every other metric and the weights to `weights`."""
    for step, expected in zip(curve.steps, other.steps, strict=True):
        for name in ("loss", "grad_norm"):
            assert step[name] == pytest.approx(expected[name], rel=loss), name
        compare(step, expected, rel=weights)
    compare(curve.evaluation, other.evaluation, rel=weights)
    assert curve.order_hash == other.order_hash
    assert curve.weights.keys() == other.weights.keys()
    for name, weight in curve.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=weights, atol=weights)


def compare(record: dict[str, float], expected: dict[str, float], *, rel: float) -> None:
    timed = {"pairs_per_second", "tokens_per_second", "data_wait"}
    assert {name: value for name, value in record.items() if name not in timed} == {
        name: pytest.approx(value, rel=rel, abs=rel) for name, value in expected.items() if name not in timed
    }


def test_whole_precision(by_name: dict[str, Curve], reference: Curve) -> None:
    for name, curve in by_name.items():
        if not name.startswith(("lora", "bf16", "fp16")):
            assert_equal(curve, reference)


def test_training_moves_the_weights(reference: Curve, inputs: Inputs) -> None:
    before = load_file(f"{inputs.model}/model.safetensors")
    moved = [(reference.weights[name] - weight).abs().max() for name, weight in before.items()]
    assert min(moved) > 1e-3


def test_adapters(by_name: dict[str, Curve]) -> None:
    if "lora, plain" not in by_name:
        pytest.skip("two ranks are enough for adapters")
    plain = by_name["lora, plain"]
    assert all("lora_" in name for name in by_name["lora, zero 2"].weights)
    for stage in (2, 3):
        curve = by_name[f"lora, zero {stage}"]
        for step, expected in zip(curve.steps, plain.steps, strict=True):
            compare(step, expected, rel=1e-5)
        for name, weight in curve.weights.items():
            torch.testing.assert_close(weight, plain.weights[name], rtol=1e-5, atol=1e-5)


def test_half_precision(by_name: dict[str, Curve], reference: Curve) -> None:
    """bf16 rounds to 3 digits, fp16 to 4; the gradient norm is that of the loss, not of the scaled loss."""
    halves = {name: curve for name, curve in by_name.items() if name.startswith(("bf16", "fp16"))}
    if not halves:
        pytest.skip("two ranks are enough for half precision")
    assert len(halves) == len(HALF) + len(FP16)
    for curve in halves.values():
        for step, expected in zip(curve.steps, reference.steps, strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], rel=1e-2)
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)


def _shares(config: TrainConfig) -> tuple[int, int, int]:
    """Weights that this rank holds when the model was built, those of its share, and those of the whole model."""
    ds_config = build_ds_config(config.engine, dtype="float32", max_grad_norm=1.0, use_gpu=False)
    sharded = sharded_construction(ds_config)
    weights: list[Any] = list(load_model(config.model, dtype=torch.float32, seed=0).parameters())
    del sharded
    return (
        sum(weight.numel() for weight in weights),
        sum(weight.ds_tensor.numel() for weight in weights),
        sum(weight.ds_numel for weight in weights),
    )


@pytest.mark.parametrize("is_saved", [True, False], ids=["from a folder", "new"])
def test_stage_3_never_builds_the_whole_model(inputs: Inputs, is_saved: bool) -> None:
    model = {} if is_saved else {"path": None, "from_config": tiny_config(), "tokenizer": inputs.model}
    for held, share, whole in run_gang(2, _shares, inputs.config("zero3", model=model)):
        assert held == 0
        assert whole == 51_488
        assert whole / 2 <= share <= whole / 2 + 32  # each weight is padded to a multiple of the ranks
