"""What a trainer leaves beside its weights: pushes to the Hub, model cards, and files of metrics."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import TrainerCallback, TrainerState

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.errors import HubError
from ray_prefopt.training.checkpoint import open_checkpoint
from tests.hub import Commit, Hub, local_hub
from tests.integration.test_trainer import SMALL, chats
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Pushed:
    """A trainer whose checkpoints and model were pushed."""

    trainer: CPOTrainer
    hub: Hub
    folder: Path
    metrics: dict[str, float]

    def commit(self, message: str) -> Commit:
        (found,) = (commit for commit in self.hub.commits if commit.message == message)
        return found


class Counting(TrainerCallback):
    """Keeps what is known of tokens after each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(state.num_input_tokens_seen)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Iterator[Pushed]:
    folder = tmp_path_factory.mktemp("tiny-cpo")
    args = CPOConfig(
        output_dir=str(folder),
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_model_id="org/tiny-cpo",
        hub_strategy="checkpoint",
        hub_always_push=True,
        hub_token="secret",
        hub_private_repo=True,
        hub_revision="mine",
        include_num_input_tokens_seen="non_padding",
        **SMALL,
    )
    with local_hub() as hub:
        model = save_tiny_model(tmp_path_factory.mktemp("model"))
        trainer = CPOTrainer(
            model, args, train_dataset=chats(8), eval_dataset=chats(3, start=100), callbacks=[Counting]
        )
        output = trainer.train()
        yield Pushed(trainer, hub, folder, output.metrics)


# --- pushes ---


def test_checkpoints_and_the_model_are_pushed(pushed: Pushed) -> None:
    """Each model beside the checkpoint that it is exported from, in the order of the run."""
    steps = [f"Training in progress, step {step}{part}" for step in (2, 4) for part in ("", ", checkpoint")]
    assert pushed.hub.messages() == [*steps, "End of training"]
    assert {(commit.repository, commit.revision) for commit in pushed.hub.commits} == {
        ("org/tiny-cpo", "mine")
    }
    assert pushed.hub.tokens == {"secret"}
    assert all(created["visibility"] == "private" for created in pushed.hub.created)
    last = load(pushed.commit("End of training").files["model.safetensors"])
    for message, is_last in ((steps[0], False), (steps[2], True)):
        weights = load(pushed.commit(message).files["model.safetensors"])
        assert all(weight.equal(last[name]) for name, weight in weights.items()) == is_last
    for name, weight in last.items():
        assert weight.equal(pushed.trainer.model.state_dict()[name])


def test_training_can_go_on_from_a_pushed_checkpoint(pushed: Pushed, tmp_path: Path) -> None:
    for name, data in pushed.commit("Training in progress, step 2, checkpoint").files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert open_checkpoint(str(tmp_path / "last-checkpoint")).state.step == 2


def test_a_last_push_that_fails_says_where_the_model_is(pushed: Pushed) -> None:
    pushed.hub.refuses = {"commit"}
    with pytest.raises(HubError) as caught:
        pushed.trainer.train(resume_from_checkpoint=True)
    pushed.hub.refuses = set()
    folder = pushed.folder / "inputs" / "upload"
    assert str(caught.value).startswith("nothing could be pushed to org/tiny-cpo: 403 Forbidden: not you")
    assert str(caught.value).endswith(f". The model and its card lie in {folder}; call push_to_hub() again")
    assert (folder / "model.safetensors").exists()
    assert pushed.trainer.state.global_step == 4


def test_nothing_is_trained_for_a_repository_that_cannot_be_made(pushed: Pushed) -> None:
    pushed.hub.refuses = {"create"}
    with pytest.raises(HubError, match="no repository org/tiny-cpo to push to"):
        pushed.trainer.train()
    pushed.hub.refuses = set()
    assert not list(pushed.folder.glob("run.old-*"))


# --- cards ---


def test_every_push_has_a_card(pushed: Pushed) -> None:
    for message, steps in (("Training in progress, step 2", 2), ("End of training", 4)):
        card = ModelCard(pushed.commit(message).files["README.md"].decode())
        assert card.data.tags == ["ray_prefopt", "cpo", "preference-optimization"]
        assert card.text.startswith("\n# tiny-cpo\n")
        assert f"in {steps} steps of 2 pairs" in card.text
        assert "2401.08417" in card.text
        assert str(pushed.folder) not in str(card)


def test_a_card_says_what_the_script_says(pushed: Pushed) -> None:
    before = len(pushed.hub.commits)
    pushed.trainer.push_to_hub("done", dataset_name="org/pairs", model_name="Tiny", tags="chat")
    (commit,) = pushed.hub.commits[before:]
    card = ModelCard(commit.files["README.md"].decode())
    assert (commit.message, card.data.datasets, card.data.tags[-1]) == ("done", ["org/pairs"], "chat")
    assert card.text.startswith("\n# Tiny\n")
    pushed.trainer.create_model_card(dataset_name="other/pairs", tags=["a", "b"])
    card = ModelCard.load(pushed.folder / "README.md")
    assert (card.data.datasets, card.data.tags[-2:]) == (["other/pairs"], ["a", "b"])
    loss = [record["loss"] for record in pushed.trainer.state.log_history if "loss" in record][-1]
    assert f"| `loss` | {loss:.4f} |" in card.text


def test_a_saved_model_has_its_card(pushed: Pushed, tmp_path: Path) -> None:
    pushed.trainer.save_model(str(tmp_path))
    assert "in 4 steps of 2 pairs" in ModelCard.load(tmp_path / "README.md").text


def test_a_model_from_the_hub_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.name_or_path = "org/base"  # as from_pretrained leaves it
    args = CPOConfig(output_dir=str(tmp_path), **SMALL)
    trainer = CPOTrainer(model, args, train_dataset="org/pairs", processing_class=tiny_tokenizer("plain"))
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("org/base", ["org/pairs"])
    assert card.text.startswith(f"\n# {tmp_path.name}\n")


# --- files of metrics, as the example scripts of transformers and TRL write them ---


def test_metrics_and_state_are_saved(pushed: Pushed, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, folder = pushed.trainer, pushed.folder
    assert trainer.is_world_process_zero()
    assert trainer.is_local_process_zero()
    trainer.log_metrics("train", pushed.metrics)
    shown = capsys.readouterr().out
    assert "***** train metrics *****" in shown
    assert "train_loss" in shown
    trainer.save_metrics("train", pushed.metrics)
    trainer.save_metrics("eval", {"eval_loss": 0.5})
    trainer.save_metrics("test", {"test_loss": 0.25}, combined=False)
    trainer.save_state()

    def read(name: str) -> dict[str, float]:
        values: dict[str, float] = json.loads((folder / name).read_text())
        return values

    assert read("train_results.json") == pushed.metrics
    assert read("eval_results.json") == {"eval_loss": 0.5}
    assert read("test_results.json") == {"test_loss": 0.25}
    assert read("all_results.json") == {**pushed.metrics, "eval_loss": 0.5}
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    assert (state.global_step, state.log_history) == (4, trainer.state.log_history)


def test_tokens_are_counted(pushed: Pushed) -> None:
    """Eight pairs, each seen once: four steps of two."""
    history = pushed.trainer.state.log_history
    counted = [record["num_input_tokens_seen"] for record in history if "loss" in record]
    rows = [pushed.trainer.tokenize_row(row) for row in chats(8)]
    total = sum(len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in rows)
    (callback,) = pushed.trainer.callbacks
    assert counted == sorted(counted) == callback.seen
    assert counted[-1] == pushed.trainer.state.num_input_tokens_seen == total


def test_scripts_can_log(pushed: Pushed) -> None:
    pushed.trainer.log({"mine": 1.0})
    assert pushed.trainer.state.log_history[-1] == {"mine": 1.0, "epoch": 1.0, "step": 4}
