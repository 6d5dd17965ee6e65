"""Python of the user's in the trainers' runs on Ray: callbacks, trackers, metrics, collator, optimizer."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from tensorboardX.proto import event_pb2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    TrainerCallback,
)
from trl.experimental.utils import DPODataCollatorWithPadding

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.allocator import allocator
from ray_prefopt.compat.batches import repacked
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ConfigError
from tests.integration.test_trainer import SMALL, chats
from tests.tiny import random_pairs, save_tiny_model, tiny_model, tiny_tokenizer
from tests.unit.test_trackers import wandb_items

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Notes(TrainerCallback):
    """What it hears, where it hears it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.processes: set[int] = set()
        self.heard: list[str] = []

    def on_init_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.heard.append("init")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **values: Any) -> None:
        self.processes.add(os.getpid())
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **values: Any) -> None:
        assert args.metric_for_best_model == "eval_loss"
        assert values["model"] is not None
        self.heard.append(f"evaluate {state.global_step}")

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **values: Any) -> None:
        self.heard.append(f"predict {sorted(metrics)[0]}")

    def on_train_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        self.heard.append(f"end {state.global_step} of {state.max_steps}")


class WithOurAllocator(TrainerCallback):
    """Fails the run in a worker that has another one."""

    def __init__(self) -> None:
        self.preloaded = allocator().get("LD_PRELOAD", "")

    def on_train_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        assert self.preloaded in Path("/proc/self/maps").read_text()


class StopAtTwo(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        control.should_training_stop = state.global_step == 2


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


def scalars(folder: Path) -> dict[str, list[float]]:
    """What TensorBoard events hold."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.iterdir()):
        data, offset = file.read_bytes(), 0
        while offset < len(data):
            size = int.from_bytes(data[offset : offset + 8], "little")
            event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + size])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
            offset += 16 + size
    return found


@pytest.mark.soak
def test_callbacks_metrics_and_trackers(
    model_folder: str, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Early stopping with a margin that nothing reaches: patience of 2 ends training after the third evaluation."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": str(tmp_path / "mlruns"),
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)
    args = CPOConfig(
        output_dir=str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        report_to=["wandb", "tensorboard", "mlflow"],
        generate_during_eval=True,
        per_device_eval_batch_size=2,
        **{**SMALL, "max_steps": 10},
    )
    notes = Notes()
    trainer = CPOTrainer(
        model_folder,
        args,
        train_dataset=chats(16),
        eval_dataset=chats(5, start=100),
        callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=100.0), notes],
        compute_metrics=accuracy,
        scaling_config=ScalingConfig(num_workers=2),
    )
    output = trainer.train()

    assert output.global_step == trainer.state.global_step == 3
    assert notes.heard == ["init", "evaluate 1", "evaluate 2", "evaluate 3", "end 3 of 10"]
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert notes.losses == logged
    assert len(notes.processes - {os.getpid()}) == 1  # rank 0; what sums up the run is told here
    evaluations = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert [record["eval_accuracy"] for record in evaluations] == [
        record["eval_rewards/accuracies"] for record in evaluations
    ]
    best = min(evaluations, key=lambda record: record["eval_loss"])
    assert trainer.state.best_metric == best["eval_loss"]
    assert trainer.state.best_global_step == best["step"]

    run = tmp_path / "run"
    rows = wandb_items(run, "history")
    assert [row["train/loss"] for row in rows if "train/loss" in row] == pytest.approx(logged)
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == pytest.approx(
        [record["eval_loss"] for record in evaluations]
    )
    assert sum("samples" in row or any(name.startswith("samples/") for name in row) for row in rows) == 3
    (metric,) = (tmp_path / "mlruns").glob("*/*/metrics/loss")
    assert sorted(float(line.split()[1]) for line in metric.read_text().splitlines()) == sorted(logged)
    board = scalars(run / "tensorboard")
    assert board["train/loss"] == pytest.approx(logged)
    assert board["eval_accuracy"] == pytest.approx([record["eval_accuracy"] for record in evaluations])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["set"]) for sample in samples] == [
        (s, "eval") for s in (1, 1, 2, 2, 3, 3)
    ]
    assert "What is 100 plus 100?" in samples[0]["prompt"]
    assert samples[0]["chosen"].startswith("It is 200.")
    assert "What is 100 plus 100?" not in samples[0]["sample"]

    # the run that a callback has stopped is finished
    assert trainer.train(resume_from_checkpoint=True).global_step == 3

    found = trainer.predict(chats(3, start=200))
    assert notes.heard[-1] == "predict test_accuracy"
    assert found.predictions.shape == (3, 2)
    margins = found.predictions[:, 0] - found.predictions[:, 1]
    assert found.metrics is not None
    assert found.metrics["test_rewards/margins"] == pytest.approx(margins.mean(), rel=1e-4)
    assert found.metrics["test_accuracy"] == pytest.approx((margins > 0).mean())


class Shorter(DPODataCollatorWithPadding):  # type: ignore[misc]  # trl is not typed
    """TRL's own collator, but completions lose their last token."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        for row in features:
            for name in row:
                if name.startswith(("chosen", "rejected")):
                    row[name] = row[name][:-1]
        return super().__call__(features)


def test_collator_optimizer_and_ray_train_configs(model_folder: str, tmp_path: Path, ray_local: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trainer = CPOTrainer(
        model,
        CPOConfig(output_dir=str(tmp_path / "unused"), eval_strategy="no", **{**SMALL, "max_steps": 3}),
        data_collator=Shorter(pad_token_id=tokenizer.pad_token_id),
        train_dataset=chats(8),
        processing_class=tokenizer,
        callbacks=[StopAtTwo, WithOurAllocator()],
        optimizers=(optimizer, schedule),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="mine",
            storage_path=f"file://{tmp_path}/runs",  # as any URI
            failure_config=FailureConfig(max_failures=1),
            worker_runtime_env={"env_vars": {"OF_MINE": "1"}},
        ),
    )
    assert trainer.train().global_step == 2
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["learning_rate"] for record in records] == [0.25, 0.125]
    folder = tmp_path / "runs" / "mine"
    config = json.loads((folder / "config.json").read_text())["run"]
    assert (config["name"], config["max_failures"], config["env_vars"]) == ("mine", 1, {"OF_MINE": "1"})
    row = trainer.tokenize_row(chats(1)[0])
    full = sum(label != -100 for label in row["chosen_labels"])
    assert records[0]["completions/chosen_length"] == pytest.approx(full - 1, abs=1.5)
    trained = dict(trainer.model.named_parameters())
    original = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    assert any(not torch.equal(weight, trained[name]) for name, weight in original.named_parameters())


# --- What needs no run ---


def test_trls_collator_changes_nothing() -> None:
    pairs = random_pairs(4, seed=5)
    arrays = [
        TokenizedPair(np.array(pair.chosen), np.array(pair.rejected), pair.chosen_start, pair.rejected_start)  # type: ignore[arg-type]
        for pair in pairs
    ]
    assert repacked(DPODataCollatorWithPadding(pad_token_id=0), arrays) == pairs


@pytest.mark.parametrize(
    ("collator", "text"),
    [
        (
            lambda rows: {"input_ids": []},
            "data_collator: its batch has no chosen_attention_mask, chosen_input_ids, ",
        ),
        (
            lambda rows: DPODataCollatorWithPadding(pad_token_id=0)(rows[:1]),
            "data_collator: got 1 pairs for 2; return one row for each",
        ),
    ],
)
def test_collators_that_return_something_else(collator: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        repacked(collator, random_pairs(2))
    assert str(caught.value).startswith(text)


def small(tmp_path: Path, **given: Any) -> CPOTrainer:
    args = CPOConfig(output_dir=str(tmp_path), **{**SMALL, **given.pop("args", {})})
    return CPOTrainer(tiny_model(), args, processing_class=tiny_tokenizer("plain"), **given)


def test_callbacks_come_and_go(tmp_path: Path) -> None:
    notes = Notes()
    trainer = small(tmp_path, callbacks=[StopAtTwo])
    trainer.add_callback(notes)
    trainer.add_callback(EarlyStoppingCallback)
    assert [type(each).__name__ for each in trainer.callbacks] == [
        "StopAtTwo",
        "Notes",
        "EarlyStoppingCallback",
    ]
    assert trainer.pop_callback(StopAtTwo) is not None
    assert trainer.pop_callback(StopAtTwo) is None
    trainer.remove_callback(notes)
    assert [type(each).__name__ for each in trainer.callbacks] == ["EarlyStoppingCallback"]


def test_what_compute_metrics_gets_besides(tmp_path: Path) -> None:
    assert small(tmp_path, args={"include_for_metrics": ["loss"]})._hooks.include_for_metrics == ("loss",)
    assert small(tmp_path, args={"include_inputs_for_metrics": True})._hooks.include_for_metrics == (
        "inputs",
    )
    assert small(tmp_path, compute_metrics=accuracy)._hooks.compute_metrics is accuracy
    only_loss = small(tmp_path, args={"prediction_loss_only": True}, compute_metrics=accuracy)
    assert only_loss._hooks.compute_metrics is None
    with pytest.raises(ConfigError, match=r"^include_for_metrics: logits is not known; inputs and loss are$"):
        small(tmp_path, args={"include_for_metrics": ["logits"]})
