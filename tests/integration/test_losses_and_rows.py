"""Every loss on every form of rows, with and without adapters: from a dataset in memory to trained weights.

Rows are prepared on Ray as always; the run itself happens in this process.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.compat.inputs import pairs_source
from ray_prefopt.config import EngineConfig, TrainConfig
from ray_prefopt.data.blocks import open_blocks, read_block
from ray_prefopt.data.prepare import prepare
from ray_prefopt.model.load import load_model
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.export import checkpoint_weights
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from ray_prefopt.training.metrics import Record
from tests.integration.test_trainer import SMALL
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.ray

QUESTIONS = [(f"What is {n} plus {n}?", f" It is {n + n}.", f" {n}? No idea.") for n in range(6)]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text.strip()}


FORMS: dict[str, list[dict[str, Any]]] = {
    "standard": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in QUESTIONS],
    "standard, prompt implicit": [{"chosen": p + c, "rejected": p + r} for p, c, r in QUESTIONS],
    "conversational": [
        {"prompt": [said("user", p)], "chosen": [said("assistant", c)], "rejected": [said("assistant", r)]}
        for p, c, r in QUESTIONS
    ],
    "conversational, prompt implicit": [
        {
            "chosen": [said("user", p), said("assistant", c)],
            "rejected": [said("user", p), said("assistant", r)],
        }
        for p, c, r in QUESTIONS
    ],
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def blocks(model_folder: str, tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> dict[str, str]:
    """Folders of the prepared rows of each form, as a trainer has them prepared."""
    storage = tmp_path_factory.mktemp("blocks")
    folders = {}
    for form, rows in FORMS.items():
        trainer = CPOTrainer(model_folder, CPOConfig(output_dir=str(storage), **SMALL))
        source = pairs_source(Dataset.from_list(rows), storage / "rows")
        config = trainer._translate(data={"train": source})
        folders[form] = prepare(config.data, config.model, config.data.train_sources, str(storage)).folder
    return folders


def pairs_in(folder: str) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = read_block(open_blocks(folder), 0).to_pylist()
    return pairs


def test_a_prompt_may_be_given_or_left_to_be_found(blocks: dict[str, str]) -> None:
    for form in ("standard", "conversational"):
        assert pairs_in(blocks[form]) == pairs_in(blocks[f"{form}, prompt implicit"])
    assert pairs_in(blocks["standard"]) != pairs_in(blocks["conversational"])


def trained(config: TrainConfig, blocks: str, folder: Path) -> tuple[list[Record], dict[str, Tensor]]:
    config = config.model_copy(update={"engine": EngineConfig(kind="plain")})
    job = Job(config, str(folder), 0, blocks, {"": blocks})
    records: list[Record] = []
    ignored = [lambda _: None] * 3
    train_worker(
        job, torch.device("cpu"), Reports(ignored[0], records.append, ignored[1], pytest.fail, ignored[2])
    )
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    return records, checkpoint_weights(config, Path(checkpoint.path))


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize(
    ("loss", "form"),
    [
        ({"loss_type": "sigmoid"}, "standard"),
        ({"loss_type": "hinge"}, "standard, prompt implicit"),
        ({"loss_type": "ipo"}, "conversational"),
        ({"loss_type": "simpo"}, "conversational, prompt implicit"),
        ({"loss_type": "alphapo", "alpha": 0.5, "simpo_gamma": 0.5}, "standard"),
    ],
    ids=lambda value: value["loss_type"] if isinstance(value, dict) else None,
)
def test_every_weight_that_is_trained_moves(
    loss: dict[str, Any], form: str, lora: bool, model_folder: str, blocks: dict[str, str], tmp_path: Path
) -> None:
    args = CPOConfig(
        output_dir=str(tmp_path), eval_strategy="steps", eval_steps=3, beta=0.1, cpo_alpha=1.0, **loss,
        **{**SMALL, "max_steps": 3, "learning_rate": 0.1},
    )  # fmt: skip
    adapters = LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = CPOTrainer(model_folder, args, eval_dataset="unread", peft_config=adapters)
    records, weights = trained(trainer._config, blocks[form], tmp_path / "run")
    before = dict(
        load_model(trainer._config.model, dtype=torch.float32, seed=args.seed).named_parameters(
            remove_duplicate=False
        )
    )
    moved = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in weights if "lora_" in name or not lora}
    *steps, evaluation = records
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert evaluation["eval_rewards/accuracies"] in [n / 6 for n in range(7)]
    assert evaluation["eval_rewards/margins"] == pytest.approx(
        evaluation["eval_rewards/chosen"] - evaluation["eval_rewards/rejected"], abs=1e-4
    )
    expected = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "nll_loss",
    }
    assert expected <= steps[0].keys()
