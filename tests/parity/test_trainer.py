"""Our CPOTrainer beside trl's, built with the same arguments: rows, batches, losses, and whole runs on Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.experimental.cpo as theirs
from datasets import Dataset
from ray.train import ScalingConfig
from transformers import AutoConfig, AutoTokenizer
from trl.experimental.utils import DPODataCollatorWithPadding

import ray_prefopt.compat.trainer as ours
from ray_prefopt.compat.batches import pairs_of
from ray_prefopt.config import EngineConfig
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.model.load import model_class
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.export import checkpoint_weights
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from tests.tiny import CORPUS, chat_row, save_tiny_model, write_blocks

pytestmark = pytest.mark.parity

LOSSES: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
    "cpo, smoothed": {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.05, "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.1, "cpo_alpha": 0.0},
    "ipo": {"loss_type": "ipo", "beta": 0.5, "cpo_alpha": 0.0},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "cpo_simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.05},
    "alphapo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "alpha": 0.1},
}
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": 64,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    # With a smaller eps, Adam makes a full step of the rounding of a tiny gradient.
    "adam_epsilon": 1e-6,
}
STEPS = 10


def plain_rows(count: int) -> Dataset:
    words = " ".join(CORPUS).split()

    def text(start: int, length: int) -> str:
        return " ".join(words[(start * 7 + i) % len(words)] for i in range(length))

    return Dataset.from_list(
        [
            {
                "prompt": text(n, 2 + n % 5),
                "chosen": " " + text(n + 3, 1 + n % 7),
                "rejected": " " + text(n + 5, 2 + n % 4),
            }
            for n in range(count)
        ]
    )


def chat_rows(count: int) -> Dataset:
    return Dataset.from_list(
        [chat_row(f"What is {n} plus {n}?", f"It is {n + n}.", f"{n}? No idea.") for n in range(count)]
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def pair_of_trainers(folder: str, out: Path, rows: Dataset, **arguments: Any) -> tuple[Any, Any]:
    kind = model_class(AutoConfig.from_pretrained(folder))

    def built(module: Any, **more: Any) -> Any:
        return module.CPOTrainer(
            model=kind.from_pretrained(folder, dtype=torch.float32),
            args=module.CPOConfig(
                output_dir=str(out / module.__name__.partition(".")[0]), **{**SHARED, **arguments}
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder),
            **more,
        )

    our = built(ours, scaling_config=ScalingConfig(num_workers=1))
    return built(theirs), our  # the later of two TrainingArguments is the one whose accelerator works


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rows", [plain_rows(6), chat_rows(6)], ids=["plain", "chat"])
def test_methods_give_what_trl_gives(loss: str, rows: Dataset, model_folder: str, tmp_path: Path) -> None:
    their, our = pair_of_trainers(model_folder, tmp_path, rows, **LOSSES[loss])
    features = [dict(row) for row in their.train_dataset]
    kept = [name for name in features[0] if name.endswith(("input_ids", "attention_mask", "labels"))]
    for row, feature in zip(rows, features, strict=True):
        ours_of_row = our.tokenize_row(row)
        expected = {name: feature[name] for name in kept}
        if isinstance(
            row["prompt"], str
        ):  # trl gives messages a second EOS: tests/parity/test_tokenization.py
            assert {name: ours_of_row[name] for name in kept} == expected
    batch = DPODataCollatorWithPadding(pad_token_id=their.pad_token_id)(
        [{name: feature[name] for name in kept} for feature in features]
    )
    model = their.model.eval()
    theirs_forward, ours_forward = (each.concatenated_forward(model, batch) for each in (their, our))
    for theirs_part, ours_part in list(zip(theirs_forward, ours_forward, strict=True))[:2]:
        torch.testing.assert_close(ours_part, theirs_part, rtol=1e-5, atol=1e-5)
    if our.args.cpo_alpha:
        torch.testing.assert_close(ours_forward[4], theirs_forward[4], rtol=1e-5, atol=1e-5)
    chosen, rejected = torch.linspace(-3, -0.1, 8), torch.linspace(-0.2, -4, 8)
    for theirs_part, ours_part in zip(
        their.cpo_loss(chosen, rejected), our.cpo_loss(chosen, rejected), strict=True
    ):
        torch.testing.assert_close(ours_part, theirs_part.cpu(), rtol=1e-5, atol=1e-6)
    (theirs_loss, theirs_metrics), (ours_loss, ours_metrics) = (
        each.get_batch_loss_metrics(model, batch, train_eval="eval") for each in (their, our)
    )
    torch.testing.assert_close(ours_loss, theirs_loss, rtol=1e-5, atol=1e-5)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
    ):
        assert ours_metrics[f"eval_{name}"] == pytest.approx(
            theirs_metrics[f"eval_{name}"], rel=1e-5, abs=1e-5
        )


LOGGED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
          "logps/rejected", "nll_loss", "grad_norm", "learning_rate")  # fmt: skip


def trained_here(
    our: Any, rows: Dataset, folder: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What the run of a trainer does on one worker, without Ray and with the plain engine: records and weights."""
    pairs: list[TokenizedPair] = []
    for row in rows:
        pairs += pairs_of({name: [ids] for name, ids in our.tokenize_row(row).items()})
    config = our._config.model_copy(update={"engine": EngineConfig(kind="plain")})
    job = Job(
        config,
        str(folder / "run"),
        our.processing_class.pad_token_id,
        write_blocks(folder / "blocks", pairs),
        {},
    )
    records: list[dict[str, float]] = []
    train_worker(
        job,
        torch.device("cpu"),
        Reports(lambda _: None, records.append, lambda _: None, pytest.fail, lambda _: None),
    )
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    return records, checkpoint_weights(config, Path(checkpoint.path))


def assert_same_run(records: list[dict[str, float]], weights: dict[str, torch.Tensor], their: Any) -> None:
    """Without cpo_alpha, trl logs 0 for `nll_loss`; grad_norm is a sum of squares over all weights."""
    logged = [entry for entry in their.state.log_history if "grad_norm" in entry]
    assert len(records) == len(logged) == STEPS
    for step, (record, entry) in enumerate(zip(records, logged, strict=True)):
        for name in LOGGED:
            if name != "nll_loss" or their.cpo_alpha:
                rel = 1e-4 if name == "grad_norm" else 1e-5
                assert record[name] == pytest.approx(entry[name], rel=rel, abs=1e-5), (step, name)
    expected = their.model.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_ten_steps_equal_those_of_trl(
    loss: str, accumulation: int, model_folder: str, tmp_path: Path
) -> None:
    rows = plain_rows(2 * accumulation * STEPS)
    arguments = {**LOSSES[loss], "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    their, our = pair_of_trainers(model_folder, tmp_path, rows, **arguments)
    their.train()
    records, weights = trained_here(our, rows, tmp_path)
    assert_same_run(records, weights, their)


@pytest.mark.parametrize("loss", ["cpo", "cpo_simpo", "alphapo"])
def test_ten_steps_on_conversations_equal_those_of_trl(loss: str, tmp_path: Path) -> None:
    """With a template that ends with the EOS itself; after others trl adds a second one."""
    folder = save_tiny_model(tmp_path / "model", chat="mistral")
    rows = chat_rows(2 * STEPS)
    their, our = pair_of_trainers(folder, tmp_path, rows, **LOSSES[loss], max_steps=STEPS)
    assert [row["chosen_input_ids"] for row in their.train_dataset] == [
        our.tokenize_row(row)["chosen_input_ids"] for row in rows
    ]
    their.train()
    records, weights = trained_here(our, rows, tmp_path)
    assert_same_run(records, weights, their)


@pytest.mark.parametrize("sft_weight", [0.0, 0.1])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0)]
)
def test_the_formulas_of_the_simpo_document(
    loss_type: str, label_smoothing: float, sft_weight: float, model_folder: str, tmp_path: Path
) -> None:
    """Those of princeton-nlp/SimPO, written out: mean log-probabilities of the completion, sequence by sequence."""
    beta, gamma_beta_ratio = 2.5, 0.55
    trainer = ours.SimPOTrainer(
        model=model_class(AutoConfig.from_pretrained(model_folder)).from_pretrained(
            model_folder, dtype=torch.float32
        ),
        args=ours.SimPOConfig(
            output_dir=str(tmp_path), beta=beta, gamma_beta_ratio=gamma_beta_ratio, loss_type=loss_type,
            label_smoothing=label_smoothing, sft_weight=sft_weight, use_cpu=True,
        ),
        tokenizer=AutoTokenizer.from_pretrained(model_folder),
    )  # fmt: skip
    rows = [trainer.tokenize_row(row) for row in plain_rows(5)]

    def token_logps(row: dict[str, Any], side: str) -> torch.Tensor:
        ids, labels = (torch.tensor([row[f"{side}_{name}"]]) for name in ("input_ids", "labels"))
        logps = trainer.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        return logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[targets != -100]

    chosen, rejected = ([token_logps(row, side) for row in rows] for side in ("chosen", "rejected"))
    means = [torch.stack([each.mean() for each in side]) for side in (chosen, rejected)]
    margins = beta * (means[0] - means[1] - gamma_beta_ratio)
    losses = torch.relu(1 - margins)
    if loss_type == "sigmoid":
        log_odds = torch.nn.functional.logsigmoid
        losses = -(1 - label_smoothing) * log_odds(margins) - label_smoothing * log_odds(-margins)
    expected = losses.mean() - sft_weight * torch.cat(chosen).mean()

    batch = DPODataCollatorWithPadding(pad_token_id=0)(rows)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert metrics["rewards/chosen"] == pytest.approx(beta * means[0].mean().item(), rel=1e-5)
    margin = beta * (means[0] - means[1]).mean().item()
    assert metrics["rewards/margins"] == pytest.approx(margin, abs=1e-5)  # of numbers around 20
    assert metrics["logps/rejected"] == pytest.approx(means[1].mean().item(), rel=1e-5)
    torch.testing.assert_close(trainer.simpo_loss(*means)[0], losses, rtol=1e-5, atol=1e-6)
