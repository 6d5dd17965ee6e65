"""Encoder-decoders train, resume, evaluate and export as decoders do, on every engine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ray_prefopt.training.export import export
from ray_prefopt.training.loop import Reports, evaluate_worker, train_worker
from ray_prefopt.training.samples import Sample
from tests.invariant.test_engines import assert_equal, compare
from tests.invariant.training import PAIRS, STEPS, Curve, Inputs, curves, stop_at
from tests.tiny import random_pairs, save_tiny_model, write_blocks

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batch 1": {"run": {"micro_batch": 1}},
    "zero 2": {"engine": "zero2"},
    "zero 3": {"engine": "zero3"},
    "zero 3, recomputed": {"engine": "zero3", "model": {"gradient_checkpointing": True}},
    "zero 2, lora": {"engine": "zero2", "lora": True},
    "zero 3, lora": {"engine": "zero3", "lora": True},
    "zero 3, bf16": {"engine": "zero3", "dtype": "bfloat16"},
}
UNHEARD = Reports(*[lambda _: None] * 5)
FEW = ("plain", "zero 2", "zero 3", "zero 3, lora")


@pytest.fixture(scope="module", params=["t5", pytest.param("bart", marks=pytest.mark.soak)])
def split_inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp(request.param)
    return Inputs(
        save_tiny_model(folder / "model", request.param),
        write_blocks(folder / "blocks", random_pairs(PAIRS)),
        write_blocks(folder / "eval", random_pairs(7, seed=1)),
    )


@pytest.fixture(scope="module")
def runs(split_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Curve]]:
    """Two ranks, and each run stopped half-way once; all cases for T5, a few for BART."""
    folder = tmp_path_factory.mktemp("runs")
    cases = CASES if "t5" in split_inputs.model else {name: CASES[name] for name in FEW}
    jobs = {
        name: split_inputs.job(split_inputs.config(**case), folder / name) for name, case in cases.items()
    }
    stop_at(jobs, 2, step=2)
    return folder, curves(jobs, 2)


@pytest.fixture(scope="module")
def reference(split_inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """One rank, plain engine, all pairs of a step in one micro-batch, never stopped."""
    config = split_inputs.config(run={"micro_batch": 16})
    job = split_inputs.job(config, tmp_path_factory.mktemp("runs") / "reference")
    return curves({"reference": job}, 1)["reference"]


def test_engines_and_stops_change_nothing(runs: Any, reference: Curve) -> None:
    later = replace(reference, steps=reference.steps[2:])
    for name, curve in runs[1].items():
        if "lora" in name or "bf16" in name:
            assert [step["step"] for step in curve.steps] == [3, STEPS]
        else:
            # ZeRO names the one embedding of encoder, decoder and head four times
            same = {weight: curve.weights[weight] for weight in reference.weights}
            assert_equal(replace(curve, weights=same), later, loss=2e-6, weights=2e-5)


def test_adapters_and_half_precision_are_the_same_on_other_stages(runs: Any, reference: Curve) -> None:
    _, found = runs
    if found.keys() < CASES.keys():
        pytest.skip("T5 is enough for these")
    for step, other in zip(found["zero 2, lora"].steps, found["zero 3, lora"].steps, strict=True):
        compare(step, other, rel=1e-5)
    for step, expected in zip(found["zero 3, bf16"].steps, reference.steps[2:], strict=True):
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def test_training_moves_encoder_and_decoder(reference: Curve, split_inputs: Inputs) -> None:
    before = AutoModelForSeq2SeqLM.from_pretrained(split_inputs.model).state_dict()
    moved = {
        name: (weight - before[name]).abs().max()
        for name, weight in reference.weights.items()
        if name.endswith(".weight")  # softmax takes no notice of a key's bias
    }
    assert min(moved.values()) > 1e-4
    assert {part for name in moved for part in name.split(".")} >= {"encoder", "decoder"}


def test_evaluation_from_a_checkpoint_is_that_of_the_run(runs: Any, split_inputs: Inputs) -> None:
    folder, found = runs
    (checkpoint,) = (folder / "plain" / "checkpoints").glob(f"step-*{STEPS}-*")
    config = split_inputs.config(run={"resume_from": str(checkpoint)})
    record = evaluate_worker(split_inputs.job(config, folder / "evaluated"), torch.device("cpu")).record
    expected = {name: value for name, value in found["plain"].evaluation.items() if name.startswith("eval_")}
    assert record == pytest.approx(expected, rel=1e-5)


def test_samples_are_what_the_decoder_writes(split_inputs: Inputs, tmp_path: Path) -> None:
    """With a top_k of 1 in the model's generation settings there is one completion: that of the exported model."""
    model = AutoModelForSeq2SeqLM.from_pretrained(split_inputs.model)
    tokenizer = AutoTokenizer.from_pretrained(split_inputs.model)
    model.generation_config.do_sample, model.generation_config.top_k = True, 1
    model.generation_config.forced_eos_token_id = None
    model.generation_config.suppress_tokens = [*range(5), *range(len(tokenizer), 512)]  # those without a text
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = {"eval_samples": 2, "eval_sample_tokens": 5, "max_steps": 1}
    job = split_inputs.job(
        split_inputs.config(model={"path": str(tmp_path / "model")}, run=run), tmp_path / "run"
    )
    found: list[Sample] = []
    train_worker(job, torch.device("cpu"), replace(UNHEARD, samples=found.extend))
    trained = AutoModelForSeq2SeqLM.from_pretrained(export(str(tmp_path / "run"), str(tmp_path / "out")))
    pairs = [random_pairs(7, seed=1)[index] for index in (0, 6)]
    for sample, pair in zip(found, pairs, strict=True):
        prompt = list(pair.chosen[: pair.chosen_start])
        written = trained.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=5)[0]
        assert sample["sample"] == tokenizer.decode(written, skip_special_tokens=True) != ""
        assert sample["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)


def test_exported_models_are_those_that_were_trained(
    runs: Any, reference: Curve, split_inputs: Inputs, tmp_path: Path
) -> None:
    folder, _ = runs
    for name in ("zero 2", "zero 3"):
        out = export(str(folder / name), str(tmp_path / name))
        model = AutoModelForSeq2SeqLM.from_pretrained(out)
        for weight, value in model.state_dict().items():
            if weight in reference.weights:
                torch.testing.assert_close(value, reference.weights[weight], rtol=2e-5, atol=2e-5)
        assert AutoTokenizer.from_pretrained(out)("sky") == AutoTokenizer.from_pretrained(split_inputs.model)(
            "sky"
        )
    adapter = export(str(folder / "zero 3, lora"), str(tmp_path / "adapter"))
    whole = export(str(folder / "zero 3, lora"), str(tmp_path / "merged"), merge=True)
    base = AutoModelForSeq2SeqLM.from_pretrained(split_inputs.model)
    adapted = PeftModel.from_pretrained(base, adapter).eval()
    ids = {name: torch.arange(3, 9).view(1, 6) for name in ("input_ids", "decoder_input_ids")}
    with torch.no_grad():
        one, other = adapted(**ids).logits, AutoModelForSeq2SeqLM.from_pretrained(whole).eval()(**ids).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
