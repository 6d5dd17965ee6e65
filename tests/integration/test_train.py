"""A run on Ray, with real workers under ZeRO, from rows to a Hugging Face folder."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt.config import TrainConfig
from ray_prefopt.settings import dump_yaml
from ray_prefopt.training.describe import describe
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.run import evaluate, prepare_data, train
from tests.integration.conftest import STEPS, Toy

pytestmark = pytest.mark.ray


def records_of(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights_of(model: str | None) -> dict[str, torch.Tensor]:
    assert model is not None
    return load_file(f"{model}/model.safetensors")


def assert_same_weights(model: str | None, other: str | None) -> None:
    """Bit for bit."""
    weights, expected = weights_of(model), weights_of(other)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_what_a_run_leaves_behind(straight: TrainResult, toy: Toy) -> None:
    assert (straight.name, straight.steps) == ("straight", STEPS)
    assert dataclasses.asdict(straight) == json.loads(Path(straight.folder, "result.json").read_text())
    assert toy.config() == TrainConfig.model_validate_json(Path(straight.folder, "config.json").read_text())
    steps = [record for record in records_of(straight.folder) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["epoch"] == 1.0
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert straight.metrics["eval_rewards/accuracies"] == 1.0
    assert {
        "rewards/chosen",
        "rewards/margins",
        "logps/rejected",
        "logits/chosen",
        "nll_loss",
        "grad_norm",
    } <= set(steps[0])
    names = sorted(path.name for path in Path(straight.folder, "checkpoints").iterdir())
    assert [name[:13] for name in names] == ["step-00000009", "step-00000012"]
    assert straight.checkpoint.endswith(names[-1])


def test_tensorboard_shows_the_same_numbers(straight: TrainResult) -> None:
    (path,) = Path(straight.folder, "tensorboard").iterdir()
    shown = {
        (value.tag, event.step): value.simple_value
        for event in _events(path)
        for value in event.summary.value
    }
    last = next(record for record in records_of(straight.folder) if record["step"] == STEPS)
    assert shown["train/loss", STEPS] == pytest.approx(last["loss"])
    assert ("eval_rewards/accuracies", STEPS) in shown


def _events(path: Path) -> list[Event]:
    """TFRecord: length, its checksum, data, its checksum."""
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_the_exported_model_talks(straight: TrainResult) -> None:
    assert straight.model is not None
    model = AutoModelForCausalLM.from_pretrained(straight.model)
    tokenizer = AutoTokenizer.from_pretrained(straight.model)
    chat = [{"role": "user", "content": "What is 3 plus 3?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]


def test_a_finished_run_is_not_run_again(straight: TrainResult, toy: Toy) -> None:
    before = Path(straight.checkpoint, "MANIFEST.json").stat().st_mtime_ns
    assert train(toy.config()) == straight
    assert Path(straight.checkpoint, "MANIFEST.json").stat().st_mtime_ns == before
    assert describe(toy.config())["run"]["state"] == "finished"


@pytest.mark.soak
def test_evaluation_of_checkpoint_and_model_agree(straight: TrainResult, toy: Toy) -> None:
    """A checkpoint brings its model, engine and loss along; the exported model is asked for the same loss."""
    expected = {name: value for name, value in straight.metrics.items() if name.startswith("eval_")}
    values = toy.values(name=None)
    for path, sections in ((straight.checkpoint, {"model": {}, "loss": None}), (straight.model, {})):
        given = {**values, **sections}
        given["model"] = {**given["model"], "path": path}
        config = TrainConfig.model_validate(
            {name: value for name, value in given.items() if value is not None}
        )
        found = evaluate(config)
        assert found.metrics == pytest.approx(expected, rel=1e-6)
        assert (found.model, found.pairs) == (path, {"eval": 9})


@pytest.mark.soak
def test_the_command_line_does_the_same(straight: TrainResult, toy: Toy, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(toy.config()))
    done = subprocess.run(
        [sys.executable, "-m", "ray_prefopt", "train", "-c", str(config), "--run.name=by-command", "--json"],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert_same_weights(result["model"], straight.model)
    assert f"step {STEPS}/{STEPS} 100% | loss " in done.stderr
    timed = {"pairs_per_second", "tokens_per_second", "data_wait"}
    for record, expected in zip(records_of(result["folder"]), records_of(straight.folder), strict=True):
        assert {key: record[key] for key in record.keys() - timed} == {
            key: expected[key] for key in expected.keys() - timed
        }


def test_prepared_pairs_are_found(straight: TrainResult, toy: Toy) -> None:
    train_pairs, eval_pairs = prepare_data(toy.config())
    assert (train_pairs["counts"]["pairs"], eval_pairs["counts"]["pairs"]) == (4 * STEPS, 9)
    plan = describe(toy.config(name="another", num_workers=3))
    assert plan["pairs"]["train"]["prepared"] == train_pairs["folder"]
    assert plan["run"] == {
        "folder": str(toy.folder / "runs" / "another"),
        "state": "new",
        "steps": STEPS,
        "pairs_per_step": 4,
        "micro_batches_per_step": 1,
    }
    assert plan["model"]["parameters"] == sum(
        weight.numel() for weight in weights_of(straight.model).values()
    )
