"""What a model is told for training: noise on its embeddings, and compiling, which changes no value and no name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import register_backend

from ray_prefopt.config import ModelConfig
from ray_prefopt.data.collate import collate
from ray_prefopt.model.forward import can_restrict_logits, pair_logps
from ray_prefopt.model.load import load_model
from tests.tiny import random_pairs, tiny_config

LORA = pytest.mark.parametrize(
    "lora", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["all weights", "adapters"]
)


def built(**options: Any) -> Any:
    architecture = tiny_config(num_hidden_layers=1)
    config = ModelConfig(from_config=architecture, tokenizer="-", **options)
    return load_model(config, dtype=torch.float32, seed=0)


# --- noise ---


@LORA
def test_noise_is_uniform_and_as_large_as_the_paper_says(lora: dict[str, Any] | None) -> None:
    """alpha / sqrt(tokens x width): of 10 tokens and width 32, 5 / sqrt(320)."""
    model, ids = built(neftune_noise_alpha=5.0, lora=lora), torch.arange(400).view(40, 10)
    embed = model.get_input_embeddings()
    clear = embed.weight[ids]
    noise = embed(ids) - clear
    bound = 5 / 320**0.5
    assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert noise.mean().abs() < 0.01 * bound
    model.eval()
    assert torch.equal(embed(ids), clear)


def test_without_it_embeddings_are_themselves() -> None:
    model, ids = built(), torch.arange(10).view(1, 10)
    embed = model.get_input_embeddings()
    assert torch.equal(embed(ids), embed.weight[ids])


# --- compiling ---


COMPILED: list[dict[str, Any]] = []
"""The options with which the backend `noted` compiled a graph, one for each."""


@register_backend
def noted(graph: torch.fx.GraphModule, _: list[Tensor], **options: Any) -> Callable[..., Any]:
    COMPILED.append(options)
    return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()
    COMPILED.clear()


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(named, torch.autograd.grad(logps.sum(), list(named.values())), strict=True))


@LORA
def test_a_compiled_model_computes_the_same(lora: dict[str, Any] | None) -> None:
    batch = collate(random_pairs(2), pad_id=0)
    plain, fast = built(lora=lora), built(lora=lora, compile={"backend": "noted", "mode": "max-autotune"})
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert type(fast) is type(plain)
    assert can_restrict_logits(fast)
    expected = pair_logps(plain, batch)
    assert not COMPILED
    found = pair_logps(fast, batch)
    assert COMPILED
    assert all(options == {"mode": "max-autotune"} for options in COMPILED)
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        gradients(fast, found.chosen), gradients(plain, expected.chosen), rtol=0, atol=1e-6
    )
