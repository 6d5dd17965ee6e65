"""Packed pairs on a GPU, whose attention kernels are others."""

import pytest
import torch
from torch import nn

from ray_prefopt.data.collate import collate, pack
from ray_prefopt.model import attention as attention_module
from ray_prefopt.model.attention import packed_attention
from ray_prefopt.model.forward import Scorer
from ray_prefopt.model.layout import make_scorer
from tests.unit.test_forward import pairs_of
from tests.unit.test_packed import CONFIG, LOSSES, assert_same, graded, model_of

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
    calls, kernel = [], attention_module.varlen_attn
    monkeypatch.setattr(
        attention_module,
        "varlen_attn",
        lambda *given, **more: (calls.append(None), kernel(*given, **more))[1],
    )
    other = graded(Scorer(model), padded, LOSSES[0], model)
    found = graded(packed, batch, LOSSES[0], model)
    assert len(calls) == model.config.num_hidden_layers
    assert (found[1].chosen - exact).abs().max() <= 2 * (other[1].chosen - exact).abs().max() + 0.05


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_queries_belong_to_the_last_keys_of_their_run(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, beside masks that say so, forward and backward."""
    segments = ((5, 8, 7), (0, 2, 3), (4, 1, 0), (3, 0, 4))
    random = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 37, 64, device="cuda", dtype=torch.bfloat16, generator=random).requires_grad_()
        for heads in (6, 2, 2)
    )
    upstream = torch.randn(1, 37, 6, 64, device="cuda", dtype=torch.bfloat16, generator=random)
    found = []
    for takes_runs in (True, False):
        monkeypatch.setattr(attention_module, "_takes_runs", lambda *_, it=takes_runs: it)
        out, _ = packed_attention(
            nn.Identity(), query, key, value, None, segments=segments, scaling=0.3, sliding_window=window
        )
        found.append((out, *torch.autograd.grad(out, (query, key, value), upstream)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
