"""The weights after five optimizer steps equal those of a real CPOTrainer.train() on the same pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from trl.experimental.cpo import CPOConfig, CPOTrainer

from ray_prefopt.config import CPOLoss, CPOSimPOLoss, LossConfig, ModelConfig, OptimConfig, SimPOLoss
from ray_prefopt.data.collate import collate
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import Scorer
from ray_prefopt.model.load import load_model
from ray_prefopt.training.metrics import MetricSums
from ray_prefopt.training.step import StepInput, train_step
from tests.tiny import CORPUS, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.parity

STEPS, MICRO_BATCH, ACCUMULATION = 5, 2, 2
GLOBAL_BATCH = MICRO_BATCH * ACCUMULATION
SHARED = {"learning_rate": 1e-3, "weight_decay": 0.1}
# Adam divides by the gradient's size: with a small eps the rounding of a tiny gradient (that of a key's bias, which
# attention hardly sees) would become a step of full size.
BETAS, EPS = (0.85, 0.97), 1e-4
ROUTED = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}


@dataclass(frozen=True)
class Case:
    """One run, spelt for trl and for us."""

    trl: dict[str, Any]
    loss: LossConfig
    kind: str = "qwen2"
    shape: tuple[tuple[str, Any], ...] = ()
    warmup: float = 0.0


CASES = {
    "cpo": Case(
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
        CPOLoss(beta=0.1, cpo_alpha=1.0, nll_average="micro_batch"),
    ),
    "cpo_simpo": Case(
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.05},
        CPOSimPOLoss(beta=2.0, gamma_beta_ratio=0.5, cpo_alpha=0.05, nll_average="micro_batch"),
        kind="llama",
    ),
    "cpo, smoothed, experts": Case(
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.5, "label_smoothing": 0.1},
        CPOLoss(beta=0.1, cpo_alpha=0.5, label_smoothing=0.1, nll_average="micro_batch"),
        kind="mixtral",
        shape=tuple(ROUTED.items()),
    ),
    # a tenth of five steps is one step of warm-up for transformers; dropout is part of GPT-2, and off for both
    "simpo, warm-up, dropout": Case(
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        SimPOLoss(beta=2.0, gamma_beta_ratio=0.5),
        kind="gpt2",
        warmup=0.1,
    ),
}


def rows() -> Dataset:
    """Pairs of plain text, of different lengths."""
    rng = np.random.default_rng(0)
    words = " ".join(CORPUS).split()

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high)))

    columns = {"prompt": (2, 8), "chosen": (1, 10), "rejected": (1, 10)}
    return Dataset.from_list(
        [
            {name: (" " if name != "prompt" else "") + text(*bounds) for name, bounds in columns.items()}
            for _ in range(STEPS * GLOBAL_BATCH)
        ]
    )


def trained_by_trl(case: Case, folder: Path) -> tuple[CPOTrainer, list[TokenizedPair]]:
    """A finished trainer, and the tokens that it trained on."""
    arguments = CPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        lr_scheduler_type="linear",
        warmup_steps=case.warmup,
        max_grad_norm=1.0,
        optim="adamw_torch",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **SHARED,
        **case.trl,
    )
    model = tiny_model(case.kind, **dict(case.shape))
    trainer = CPOTrainer(model, arguments, train_dataset=rows(), processing_class=tiny_tokenizer("plain"))
    trainer.train()
    pairs = [
        TokenizedPair(
            row["chosen_input_ids"],
            row["rejected_input_ids"],
            row["chosen_labels"].count(-100),
            row["rejected_labels"].count(-100),
        )
        for row in trainer.train_dataset
    ]
    return trainer, pairs


def trained_by_us(
    case: Case, pairs: list[TokenizedPair], pad_id: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    optim = OptimConfig(
        name="adamw_torch",
        schedule="linear",
        warmup_ratio=case.warmup,
        max_grad_norm=1.0,
        betas=BETAS,
        eps=EPS,
        **SHARED,
    )
    architecture = tiny_config(case.kind, **dict(case.shape))
    model = load_model(ModelConfig(from_config=architecture, tokenizer="-"), dtype=torch.float32, seed=0)
    engine = PlainEngine(model, optim, total_steps=STEPS, dtype=torch.float32, device=torch.device("cpu"))
    coefficient = getattr(model.config, "router_aux_loss_coef", 0.0)
    objective = Objective(case.loss, aux_loss_coef=coefficient)
    metrics, records = MetricSums(), []
    for step in range(STEPS):
        ids = np.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        micro_ids = np.split(ids, ACCUMULATION)
        batches = [collate([pairs[i] for i in micro], pad_id=pad_id) for micro in micro_ids]
        chosen_tokens = sum(len(pairs[i].chosen) - pairs[i].chosen_start for i in ids)
        inputs = StepInput(step, StepTotals(len(ids), chosen_tokens), batches, micro_ids)
        rate = engine.learning_rate()
        norm = train_step(engine, inputs, objective, metrics, scorer=Scorer(engine.forward))
        records.append({**metrics.reduce(), "grad_norm": norm, "learning_rate": rate})
    return model, records


@pytest.mark.parametrize("name", CASES)
def test_five_steps_equal_a_real_trainer(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trainer, pairs = trained_by_trl(case, tmp_path)
    model, records = trained_by_us(case, pairs, trainer.processing_class.pad_token_id)

    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == STEPS
    for ours, theirs in zip(records, logged, strict=True):
        for metric in (
            "learning_rate",
            "loss",
            "grad_norm",
            "rewards/margins",
            "logps/chosen",
            "rewards/accuracies",
        ):
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4, abs=1e-6), metric
    start = tiny_model(case.kind, **dict(case.shape)).state_dict()
    expected = trainer.model.state_dict()
    for weight_name, weight in model.state_dict().items():
        moved = (expected[weight_name] - start[weight_name]).norm()
        error = (weight - expected[weight_name]).norm()
        assert error <= 1e-5 * expected[weight_name].norm(), weight_name
        assert error <= 1e-3 * moved, weight_name  # and small against what training did to it
    assert max((expected[each] - start[each]).norm() for each in start) > 0.01
