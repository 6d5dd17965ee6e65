"""What bad input gets: each row of the design's error table, said by `train` on the driver, before any worker starts.

What can only happen on workers is in tests/invariant/test_failures.py: losses that are not finite, and full disks.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    PrefoptError,
    ResourceError,
)
from ray_prefopt.settings import load_config
from ray_prefopt.training import workers
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.run import evaluate, train
from tests.integration.conftest import STEPS, Toy, rows, write_rows
from tests.integration.test_train import assert_same_weights
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.ray


@pytest.fixture
def no_workers(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer has to come before workers are asked for."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(workers, "Trainer", never)


def changed(toy: Toy, changes: dict[str, Any], **run: Any) -> TrainConfig:
    """The toy's config with `section.field` values replaced."""
    values = toy.values(**{"name": "bad", **run})
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return TrainConfig.model_validate(values)


def message(error: type[PrefoptError], config: TrainConfig) -> str:
    with pytest.raises(error) as caught:
        train(config)
    return str(caught.value)


# --- Config ---


def test_an_unknown_key_and_values_that_contradict_each_other(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\ndata: {train: t}\nloss:\n  kind: simpo\n  gama_beta_ratio: 1\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml:5: loss.gama_beta_ratio is not a field. Did you mean loss.gamma"
    ):
        load_config([file])
    flags = ["--model.path=m", "--data.train=t", "--engine.kind=plain", "--engine.offload_optimizer=cpu"]
    with pytest.raises(
        ConfigError, match=r"offload_optimizer belongs to engine.kind: zero; got engine.kind: plain"
    ):
        load_config([], flags)


def test_a_metric_that_no_evaluation_has(toy: Toy, no_workers: None) -> None:
    text = message(ConfigError, toy.config(name="bad", best_metric="eval_rewards/accuracy"))
    assert text == (
        "run.best_metric 'eval_rewards/accuracy' is not a metric of this run. "
        "Did you mean eval_rewards/accuracies?"
    )
    text = message(ConfigError, changed(toy, {"data.eval": None}, best_metric="eval_loss"))
    assert text.endswith("is not a metric of this run. There is no evaluation set: set data.eval")


def test_nothing_to_evaluate_on(toy: Toy, no_workers: None) -> None:
    with pytest.raises(
        ConfigError, match=r"nothing to evaluate on: got no data.eval; set it to held-out pairs"
    ):
        evaluate(changed(toy, {"data.eval": None}))


# --- Data ---


def test_a_missing_file(toy: Toy, no_workers: None) -> None:
    text = message(DataError, changed(toy, {"data.train": "nowhere.jsonl"}))
    assert text.startswith(
        "nowhere.jsonl does not exist: data paths are files, globs, folders, URIs, or org/name"
    )


def test_a_missing_column(toy: Toy, no_workers: None, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "worse": "c"}] * 8)
    text = message(DataError, changed(toy, {"data.train": path}))
    assert text.startswith("8 of 8 rows are unusable, and no pair is left:\n  8 missing_column: ")
    assert text.endswith(
        "set data.columns, as in {prompt: question, chosen: better, rejected: worse}, or repair these rows"
    )


def test_an_empty_dataset(toy: Toy, no_workers: None, tmp_path: Path) -> None:
    text = message(DataError, changed(toy, {"data.train": write_rows(tmp_path / "pairs.jsonl", [])}))
    assert str(tmp_path / "pairs.jsonl") in text
    assert "empty" in text


def test_fewer_pairs_than_one_global_batch(toy: Toy, no_workers: None) -> None:
    text = message(DataError, toy.config(name="bad", global_batch=64))
    assert text == (
        f"{4 * STEPS} usable pairs do not fill one global batch of 64: add pairs, or set run.global_batch to fewer"
    )


def test_rows_that_are_no_pairs(toy: Toy, no_workers: None, tmp_path: Path) -> None:
    """Malformed JSON, a number for a text, an empty completion: counted by reason, with where they are."""
    good = [json.dumps(row) for row in rows(range(6))]
    bad = [
        '{"prompt": "a", ',
        '{"prompt": "a", "chosen": 3, "rejected": "c"}',
        '{"prompt": "a", "chosen": "", "rejected": "c"}',
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(good + bad) + "\n")
    text = message(DataError, changed(toy, {"data.train": str(path)}))
    assert text.startswith(
        "3 of 9 rows are unusable, and data.max_bad_fraction allows 0.05 of them:\n  1 empty_completion: "
    )
    assert re.search(rf"1 malformed_json: {path}:7: ", text)
    assert re.search(rf"1 not_text: {path}:8: ", text)
    assert text.endswith("repair these rows, or raise data.max_bad_fraction")


def test_a_tokenizer_without_chat_template(toy: Toy, no_workers: None, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", chat="plain")
    text = message(DataError, changed(toy, {"model.path": model}))
    assert "data.chat_template" in text


# --- Model ---


def test_a_model_that_does_not_exist(toy: Toy, no_workers: None) -> None:
    assert message(ModelError, changed(toy, {"model.path": "./nowhere"})) == (
        "model ./nowhere: no such folder, and not a hub id (org/name)"
    )


def test_remote_code_that_is_not_trusted(toy: Toy, no_workers: None, tmp_path: Path) -> None:
    model = Path(save_tiny_model(tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("raise SystemExit('ran')")
    assert message(ModelError, changed(toy, {"model.path": str(model)})) == (
        f"model {model}: it comes with its own code; read that code, then set model.trust_remote_code: true"
    )


# --- Resources ---


def test_more_workers_than_the_cluster_has_room_for(toy: Toy, no_workers: None) -> None:
    text = message(ResourceError, toy.config(name="bad", num_workers=64, resource_timeout_s=0.5))
    assert text.startswith(
        "64 workers need 64 CPU; the cluster has 4 of 4 CPU free after waiting 0.5 s. Lower "
    )


# --- Checkpoints ---


def test_a_checkpoint_to_start_from_that_is_not_there(
    toy: Toy, straight: TrainResult, no_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(toy.folder)
    assert message(CheckpointError, toy.config(name="bad", resume_from="nowhere")) == (
        f"{toy.folder}/nowhere: no checkpoint here (MANIFEST.json is missing)"
    )
    own = straight.checkpoint
    assert message(ConfigError, toy.config(force_new=True, resume_from=own)) == (
        f"run.resume_from {own} is in the folder that run.force_new moves aside: copy it elsewhere first, "
        "or leave out one of the two"
    )


def test_the_same_name_with_another_config(straight: TrainResult, toy: Toy, no_workers: None) -> None:
    values = toy.values(epochs=2)
    values["loss"]["beta"] = 5.0
    assert message(ConfigError, TrainConfig.model_validate(values)) == (
        f"run 'straight' in {straight.folder} was begun with another config: loss.beta: 2.0 -> 5.0; "
        "run.epochs: 1 -> 2. Use its values to resume it, another run.name, or run.force_new to move it aside"
    )


@pytest.fixture
def torn(straight: TrainResult, toy: Toy) -> str:
    """A copy of the whole run whose newest checkpoint has lost half of a file; the name of the copy."""
    folder = toy.folder / "runs" / "torn"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(straight.folder, folder)
    (folder / "result.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["run"]["name"] = "torn"
    (folder / "config.json").write_text(json.dumps(config))
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    file = next(newest.glob("engine/*_optim_states.pt"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "torn"


def test_a_torn_checkpoint_is_refused(torn: str, toy: Toy, no_workers: None) -> None:
    text = message(CheckpointError, toy.config(name=torn))
    assert re.search(r"step-00000012-\w+/engine/\S+_optim_states.pt: \d+ bytes, its manifest says \d+;", text)
    assert text.endswith("run.on_bad_checkpoint: fallback uses the one before")


@pytest.mark.soak
def test_a_torn_checkpoint_is_done_without_when_told_to(torn: str, straight: TrainResult, toy: Toy) -> None:
    result = train(toy.config(name=torn, on_bad_checkpoint="fallback"))
    assert result.steps == STEPS
    assert_same_weights(result.model, straight.model)
