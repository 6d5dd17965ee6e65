"""Lean norms and MLPs give the values and gradients of transformers' own, and keep less for the backward pass."""

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.models.llama.modeling_llama import LlamaMLP

from ray_prefopt.model import onednn
from ray_prefopt.model.lean import keep_less
from ray_prefopt.model.onednn import use_onednn
from tests.unit.test_packed import model_of

LEAN = {
    "llama": {"LlamaRMSNorm", "LlamaMLP"},
    "qwen2": {"Qwen2RMSNorm", "Qwen2MLP"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP"},
    "granite": {"GraniteRMSNorm", "GraniteMLP"},
    "mixtral": {"MixtralRMSNorm"},
    "gemma3_text": {"Gemma3MLP"},  # its norm is another: x * (1 + weight)
    "cohere": {"CohereMLP"},  # its norm is not an RMS norm
    "phi": set(),
    "gpt2": set(),
    "t5": set(),
}
IDS = torch.arange(5, 39).reshape(2, 17)


def exchanged(model: nn.Module) -> set[str]:
    return {type(each).__name__ for each in model.modules() if "forward" in each.__dict__} - {"Linear"}


def gradients(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=IDS).logits
    (logits.float() * torch.linspace(0, 1, logits.shape[-1])).sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return logits.detach(), found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert other[name].dtype == gradient.dtype
        assert (other[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("kind", [kind for kind in LEAN if kind != "t5"])
def test_values_are_equal_and_gradients_too(kind: str) -> None:
    model = model_of(kind)
    lean = copy.deepcopy(model)
    keep_less(lean)
    assert exchanged(lean) == LEAN[kind]
    logits, expected = gradients(model)
    lean_logits, found = gradients(lean)
    torch.testing.assert_close(lean_logits, logits, rtol=1e-5, atol=1e-5)
    assert_close(expected, found, 2e-6)


class Limited(LlamaMLP):
    """What is larger than `limit`, if there is one, is cut off, as in DeepSeek-V4."""

    limit: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(
            self.act_fn(gate if self.limit is None else gate.clamp(max=self.limit)) * self.up_proj(x)
        )


@pytest.mark.parametrize("limit", [0.5, 10.0, 500.0])
def test_each_module_is_tried_by_itself_and_with_large_inputs(limit: float) -> None:
    mlps = nn.ModuleList(Limited(model_of("llama").config) for _ in range(2))
    mlps[1].limit = limit  # type: ignore[assignment]
    keep_less(mlps)
    assert ["forward" in each.__dict__ for each in mlps] == [True, False]


def test_linear_layers_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the head's, forward and both gradients; with biases, and in other precisions as torch does."""
    product = Mock(wraps=onednn._product)
    monkeypatch.setattr(onednn, "_product", product)
    monkeypatch.setattr(onednn, "IS_FASTER", True)
    model = model_of("qwen2")
    other = copy.deepcopy(model)
    use_onednn(other)
    linear = {name for name, each in model.named_modules() if type(each) is nn.Linear}
    assert {name for name, each in other.named_modules() if "forward" in each.__dict__} == linear - {
        "lm_head"
    }
    (logits, expected), (other_logits, found) = gradients(model), gradients(other)
    assert product.call_count == 3 * (len(linear) - 1)
    torch.testing.assert_close(other_logits, logits, rtol=1e-5, atol=1e-5)
    assert_close(expected, found, 2e-6)
    half = gradients(model, torch.bfloat16), gradients(other, torch.bfloat16)
    assert torch.equal(half[0][0], half[1][0])
    assert_close(half[0][1], half[1][1], 0.0)
    half = gradients(model.bfloat16()), gradients(other.bfloat16())
    assert torch.equal(half[0][0], half[1][0])


def test_linear_layers_stay_where_mkl_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "IS_FASTER", False)
    model = model_of("qwen2")
    use_onednn(model)
    assert not [each for each in model.modules() if "forward" in each.__dict__]


@pytest.mark.parametrize("is_autocast", [False, True])
def test_half_precision(*, is_autocast: bool) -> None:
    model = model_of("qwen2")  # biases, and grouped heads
    lean = copy.deepcopy(model)
    keep_less(lean)
    if is_autocast:
        (logits, expected), (lean_logits, found) = (gradients(each, torch.bfloat16) for each in (model, lean))
    else:
        (logits, expected), (lean_logits, found) = (gradients(each.bfloat16()) for each in (model, lean))
    assert torch.equal(logits, lean_logits)
    assert_close(expected, found, 0.02)


def test_an_mlp_with_a_bias() -> None:
    model = model_of("llama", mlp_bias=True)
    lean = copy.deepcopy(model)
    keep_less(lean)
    assert exchanged(lean) == LEAN["llama"]
    assert_close(gradients(model)[1], gradients(lean)[1], 2e-6)


def kept(model: Any) -> int:
    """Numbers that autograd keeps of a forward pass through the layers, weights apart."""
    found = {}
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes() // 4)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS)
    return sum(size for _, size in found.values())


def test_what_is_kept() -> None:
    """Of each layer less by two steps of two norms, and the activation of the gate and the product."""
    sizes = []
    for layers in (1, 2):
        model = model_of("llama", num_hidden_layers=layers)
        whole = kept(model)
        keep_less(model)
        sizes.append(whole - kept(model))
    config, tokens = model.config, IDS.numel()
    assert sizes[1] - sizes[0] == tokens * (2 * config.hidden_size + 2 * config.intermediate_size)


def test_recomputing_layers_and_adapters() -> None:
    """An adapter on the last projection takes the place of a layer that the MLP would have called otherwise."""
    model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    expected = gradients(copy.deepcopy(model))[1]
    keep_less(model)
    assert_close(expected, gradients(model)[1], 2e-6)

    base = model_of("llama")
    expected = gradients(copy.deepcopy(base))[1]
    keep_less(base)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["down_proj"]))
    assert torch.equal(adapted(input_ids=IDS).logits, base(input_ids=IDS).logits)
    base.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(expected, gradients(base)[1], 2e-6)


def test_a_frozen_layer_gets_no_gradient() -> None:
    model = model_of("llama")
    keep_less(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)
    expected = {name: each for name, each in gradients(model_of("llama"))[1].items() if "q_proj" in name}
    assert_close(expected, gradients(model)[1], 2e-6)


def test_what_computes_something_else_under_the_same_names_stays_as_it_is() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    class OddMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class GatedRMSNorm(OddRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    class DroppingMLP(OddMLP):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(
                self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.5
            )

    odd = nn.Sequential(OddRMSNorm(), OddMLP(), OddMLP(), OddRMSNorm(), GatedRMSNorm(), DroppingMLP()).eval()
    keep_less(odd)
    assert not [each for each in odd.modules() if "forward" in each.__dict__]
