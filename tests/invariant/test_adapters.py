"""Adapters that were saved before, and quantized weights under them: trained, resumed and exported on every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.build import build_engine
from ray_prefopt.training.export import export
from tests.gang import run_gang
from tests.invariant.training import Curve, Inputs, curves, stop_at

IDS = torch.arange(20).view(2, 10)
ENGINES = ("plain", "zero0", "zero2", "zero3")
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def assert_same_losses(curve: Curve, other: Curve, *, rel: float) -> None:
    for step, expected in zip(curve.steps, other.steps, strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=rel)
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * rel)


def assert_same_weights(curve: Curve, other: Curve) -> None:
    assert curve.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in curve.weights.items())


# --- saved adapters ---


@pytest.fixture(scope="module")
def first(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Curve]:
    """An adapter beside which a module was trained whole, exported by the run that made it."""
    folder = tmp_path_factory.mktemp("first")
    config = inputs.config("zero2", model={"lora": {"r": 4, "modules_to_save": ["lm_head"]}})
    job = inputs.job(config, folder / "run")
    curve = curves({"first": job}, 2)["first"]
    return export(job.folder, str(folder / "adapter")), curve


def test_a_saved_adapter_goes_on_where_it_stopped(
    inputs: Inputs, first: tuple[str, Curve], tmp_path: Path
) -> None:
    path, before = first
    section = {"model": {"adapter": path}, "run": {"eval_on_start": True}}
    jobs = {
        engine: inputs.job(inputs.config(engine, **section), tmp_path / engine)
        for engine in ("plain", "zero2", "zero3")
    }
    found = curves(jobs, 2)
    for engine, curve in found.items():
        assert curve.evaluation["eval_loss"] == pytest.approx(before.evaluation["eval_loss"], rel=1e-6)
        assert_same_losses(curve, found["plain"], rel=1e-6)
        assert any("lm_head.modules_to_save" in name for name in curve.weights), engine
    assert found["zero2"].steps[-1]["loss"] < before.steps[-1]["loss"] - 0.01
    names = {name for name in found["zero2"].weights if "lora_" in name}
    assert all((found["zero2"].weights[name] != before.weights[name]).any() for name in names)

    broken = {
        engine: inputs.job(inputs.config(engine, **section), tmp_path / f"{engine} again")
        for engine in ("zero2", "zero3")
    }
    stop_at(broken, 2, step=2)
    for engine, curve in curves(broken, 2).items():
        assert_same_weights(curve, found[engine])

    adapter = export(jobs["zero3"].folder, str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(inputs.model)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(inputs.model))).abs().max() > 1e-3
    merged = export(jobs["zero3"].folder, str(tmp_path / "merged"), merge=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), expected)


# --- quantized weights ---


def quantized(inputs: Inputs, kind: str, engine: str, **options: Any) -> TrainConfig:
    model = {"quantization": QUANTIZATIONS[kind], "lora": {"r": 4}}
    return inputs.config(engine, model=model, **options)


@pytest.mark.parametrize("kind", ["4 bits", pytest.param("8 bits", marks=pytest.mark.soak)])
def test_every_engine_trains_and_resumes_on_quantized_weights(
    inputs: Inputs, tmp_path: Path, kind: str
) -> None:
    """With an evaluation after each step, which must leave the weights as they are."""
    run = {"eval_steps": 1}
    whole = inputs.config("plain", model={"lora": {"r": 4}})
    jobs = {
        engine: inputs.job(quantized(inputs, kind, engine, run=run), tmp_path / engine) for engine in ENGINES
    }
    found = curves({**jobs, "whole": inputs.job(whole, tmp_path / "whole")}, 2)
    for engine in ENGINES:
        assert_same_losses(found[engine], found["plain"], rel=1e-5)
    for name in found["zero2"].weights:
        assert "lora_" in name
    for step, unrounded in zip(found["plain"].steps, found["whole"].steps, strict=True):
        assert step["loss"] != unrounded["loss"]
        assert step["loss"] == pytest.approx(unrounded["loss"], rel=2e-2)

    broken = {
        engine: inputs.job(quantized(inputs, kind, engine, run=run), tmp_path / f"{engine} again")
        for engine in ("plain", "zero2", "zero3")
    }
    stop_at(broken, 2, step=2)
    for engine, curve in curves(broken, 2).items():
        assert_same_weights(curve, found[engine])

    adapter = export(jobs["zero2"].folder, str(tmp_path / "adapter"))
    as_quantized = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **QUANTIZATIONS[kind])
    base = AutoModelForCausalLM.from_pretrained(
        inputs.model, quantization_config=as_quantized, dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, adapter).train()  # bitsandbytes is exact in training alone
    expected = adapted(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(
        export(jobs["zero2"].folder, str(tmp_path / "merged"), merge=True)
    )
    assert not getattr(merged.config, "quantization_config", None)
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_half_precision_on_quantized_weights(inputs: Inputs, tmp_path: Path) -> None:
    kinds = {kind: quantized(inputs, kind, "plain") for kind in QUANTIZATIONS}
    halves = {f"{kind}, half": quantized(inputs, kind, "zero2", dtype="bfloat16") for kind in QUANTIZATIONS}
    jobs = {name: inputs.job(config, tmp_path / name) for name, config in {**kinds, **halves}.items()}
    found = curves(jobs, 2)
    for kind in QUANTIZATIONS:
        assert_same_losses(found[f"{kind}, half"], found[kind], rel=5e-3)


def _shares(config: TrainConfig) -> list[tuple[torch.dtype, int, int]]:
    """Of each quantized weight: how it is stored, what this rank holds of it, and its whole size."""
    engine = build_engine(config, total_steps=1, device=torch.device("cpu"))
    weights: list[Any] = [
        weight for name, weight in engine.module.named_parameters() if name.endswith("base_layer.weight")
    ]
    return [(weight.dtype, weight.ds_tensor.numel(), weight.ds_numel) for weight in weights]


def test_stage_3_shards_quantized_weights(inputs: Inputs) -> None:
    config = quantized(inputs, "4 bits", "zero3")
    every = {
        "zero_optimization": {"stage3_param_persistence_threshold": 0}
    }  # small weights stay whole otherwise
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed": every})})
    for shares in run_gang(2, _shares, config):
        assert len(shares) == 14  # seven projections in each of two layers
        assert all(stored == torch.uint8 and share == whole / 2 for stored, share, whole in shares)
