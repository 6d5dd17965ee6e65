"""Packed pairs on a GPU, whose attention kernels are others."""

from unittest.mock import Mock

import pytest
import torch

from ray_prefopt.data.collate import collate, pack
from ray_prefopt.model import attention as attention_module
from ray_prefopt.model.forward import Scorer
from ray_prefopt.model.layout import make_scorer
from tests.unit.test_forward import pairs_of
from tests.unit.test_packed import CONFIG, LOSSES, assert_same, graded, model_of, one_call_and_one_by_one

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text", "gpt2"])
def test_loss_and_gradient_are_those_of_padded_pairs(kind: str) -> None:
    device = torch.device("cuda")
    model, pairs = model_of(kind).to(device), pairs_of(6, seed=3)
    packed, reason = make_scorer(model, model, CONFIG, torch.float32, device)
    assert (packed.is_packed, reason) == (True, None)
    expected = graded(Scorer(model), collate(pairs, pad_id=0).to(device), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs).to(device), LOSSES[0], model), expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3_text", "gpt2"])
def test_in_bf16_runs_in_one_call_are_as_near_as_padded_pairs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    model, pairs = model_of(kind).to(device), pairs_of(6, seed=3)
    batch, padded = pack(pairs).to(device), collate(pairs, pad_id=0).to(device)
    exact = graded(Scorer(model), padded, LOSSES[0], model)[1].chosen
    model.bfloat16()
    packed, reason = make_scorer(model, model, CONFIG, torch.bfloat16, device)
    assert (packed.is_packed, reason) == (True, None)
    kernel = Mock(wraps=attention_module.varlen_attn)
    monkeypatch.setattr(attention_module, "varlen_attn", kernel)
    other = graded(Scorer(model), padded, LOSSES[0], model)
    found = graded(packed, batch, LOSSES[0], model)
    assert kernel.call_count == model.config.num_hidden_layers
    assert (found[1].chosen - exact).abs().max() <= 2 * (other[1].chosen - exact).abs().max() + 0.05


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_queries_belong_to_the_last_keys_of_their_run(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, beside masks that say so, forward and backward."""
    for one, other in one_call_and_one_by_one(monkeypatch, window, torch.bfloat16, "cuda"):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
