"""An encoder-decoder from rows to a folder, through the trainer of TRL's name and two workers."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ray.train import ScalingConfig
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.data.blocks import open_blocks, read_block
from ray_prefopt.settings import load_config
from ray_prefopt.training.describe import describe
from tests.integration.test_trainer import SMALL
from tests.tiny import CORPUS, save_tiny_model

pytestmark = pytest.mark.ray


def translations(count: int, start: int = 0) -> Dataset:
    words = " ".join(CORPUS).split()
    return Dataset.from_list(
        [
            {
                "prompt": f"translate: {words[n % len(words)]} {words[3 * n % len(words)]}",
                "chosen": words[(n + 1) % len(words)],
                "rejected": f"{words[(n + 2) % len(words)]} {words[(n + 5) % len(words)]}",
            }
            for n in range(start, start + count)
        ]
    )


@pytest.mark.soak
def test_t5_trains_resumes_and_evaluates(tmp_path: Path, ray_local: None) -> None:
    model_folder = save_tiny_model(tmp_path / "model", "t5")
    rows, held_out = translations(16), translations(5, start=50)
    arguments = {
        **SMALL,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }

    def trainer_for(**more: object) -> CPOTrainer:
        return CPOTrainer(
            model_folder,
            CPOConfig(output_dir=str(tmp_path / "out"), is_encoder_decoder=True, **{**arguments, **more}),
            train_dataset=rows,
            eval_dataset=held_out,
            scaling_config=ScalingConfig(num_workers=2),
        )

    trainer = trainer_for()
    assert trainer.train().global_step == 4
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert losses[-1] < losses[0]

    (blocks,) = (
        found
        for path in (tmp_path / "out" / "blocks").iterdir()
        if (found := open_blocks(str(path))).num_pairs == len(rows)
    )
    assert blocks.manifest["recipe"]["encoder_decoder"]
    pair, row = read_block(blocks, 0).to_pylist()[0], trainer.tokenize_row(rows[0])
    assert pair["chosen"] == row["prompt_input_ids"] + row["chosen_labels"]
    assert pair["rejected"] == row["prompt_input_ids"] + row["rejected_labels"]

    exported = str(tmp_path / "out" / "run" / "model")
    saved = AutoModelForSeq2SeqLM.from_pretrained(exported)
    for name, weight in saved.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], weight)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")
    assert saved.generate(**prompt, max_new_tokens=4).shape[0] == 1

    last = next(record for record in reversed(trainer.state.log_history) if "eval_loss" in record)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert trainer_for().train(resume_from_checkpoint=True).global_step == 4  # it is finished

    config = load_config(base={"model": {"path": exported}, "data": {"train": str(tmp_path / "rows.jsonl")}})
    rows.to_json(tmp_path / "rows.jsonl")
    assert describe(config)["model"]["architecture"] == "t5"
    assert describe(config)["model"]["parameters"] == saved.num_parameters()
