"""Families of models beside trl's CPOTrainer: loss, metrics and gradients; and each comes back from its export."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from ray_prefopt.config import ModelConfig
from ray_prefopt.data.collate import collate
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import can_restrict_logits, pair_logps
from ray_prefopt.model.load import load_model
from ray_prefopt.training.export import export
from ray_prefopt.training.metrics import means
from tests.parity.test_losses import PAD, Trl, random_pairs, trl_batch
from tests.tiny import save_tiny_model
from tests.unit.test_export import assert_same_weights, config_of, trained

pytestmark = pytest.mark.parity

ROUTED = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.02}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.1},
    "phi3": {"sliding_window": 4},
    "gpt2": {"resid_pdrop": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1},
    # trl leaves the dropout of OPT on, which is no module: with none on either side
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "dropout": 0.0},
    "mixtral": {"num_local_experts": 4, **ROUTED},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        **ROUTED,
    },
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, **ROUTED},
}
WINDOWED = [kind for kind, settings in FAMILIES.items() if "sliding_window" in settings]
LOSS = Trl("simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saved models by family, with weights large enough for windows, caps and routers to matter."""

    @cache
    def saved(kind: str) -> str:
        folder = save_tiny_model(tmp_path_factory.mktemp(kind), kind, initializer_range=0.2, **FAMILIES[kind])
        return folder

    return saved


def ours(folder: str, **overrides: Any) -> Any:
    config = ModelConfig(path=folder, overrides=overrides)
    return load_model(config, dtype=torch.float32, seed=0)


def gradients(loss: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: each for name, each in zip(named, found, strict=True) if each is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_micro_batch_equals_trl(kind: str, folders: Any) -> None:
    """Both in training mode, with every dropout of the family switched off in the way of either side."""
    pairs = random_pairs(4, seed=2)
    theirs = AutoModelForCausalLM.from_pretrained(folders(kind)).train()
    disable_dropout_in_model(theirs)
    trainer = LOSS.trainer(theirs)
    expected, their_metrics = CPOTrainer.get_batch_loss_metrics(trainer, theirs, trl_batch(pairs))

    model = ours(folders(kind))
    coefficient = getattr(model.config, "router_aux_loss_coef", 0.0)
    assert coefficient == trainer.aux_loss_coef
    logps = pair_logps(model, collate(pairs, pad_id=PAD), restrict_logits=can_restrict_logits(model))
    totals = StepTotals(len(pairs), sum(len(pair.chosen) - pair.chosen_start for pair in pairs))
    objective = Objective(LOSS.ours(), aux_loss_coef=coefficient)
    loss = objective.loss(logps, torch.ones(len(pairs)), totals)
    sums = objective.sums(logps, torch.ones(len(pairs)), loss)

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert (logps.aux_loss is not None) == ("num_experts_per_tok" in FAMILIES[kind])
    metrics = means({name: value.item() for name, value in sums.items()}, steps=1)
    for name, value in their_metrics.items():
        if not name.startswith("logits/"):  # trl's run over prompt and padding as well
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    expected_gradients = gradients(expected, theirs)
    found = gradients(loss, model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("kind", WINDOWED)
def test_the_window_is_smaller_than_the_sequences(kind: str, folders: Any) -> None:
    """Else the families above would show nothing of it."""
    batch = collate(random_pairs(4, seed=2), pad_id=PAD)
    with torch.no_grad():
        windowed, whole = (
            pair_logps(ours(folders(kind), sliding_window=size), batch).chosen for size in (4, 512)
        )
    assert (windowed - whole).abs().max() > 0.01


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_trained_model_comes_back_from_its_export(kind: str, folders: Any, tmp_path: Path) -> None:
    model = trained(tmp_path / "run", config_of(folders(kind)))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_weights(found, model)
    before = AutoModelForCausalLM.from_pretrained(folders(kind))
    assert any(
        not torch.equal(weight, found.state_dict()[name]) for name, weight in before.state_dict().items()
    )
