"""Frozen weights in 4 and 8 bits: really so small, as trainable as before, and refused where they cannot be had."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import ModelError
from ray_prefopt.model import quantization
from ray_prefopt.model.adapters import merged, save_base
from ray_prefopt.model.load import load_architecture, load_model
from tests.tiny import save_tiny_model, tiny_config

IDS = torch.arange(20).view(2, 10)
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8: dict[str, Any] = {"load_in_8bit": True}
EACH = pytest.mark.parametrize(
    ("options", "stored"), [(NF4, torch.uint8), (INT8, torch.int8)], ids=["4", "8"]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for the kernels that need whole blocks of 64."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return save_tiny_model(tmp_path_factory.mktemp("base"), **shape)


def loaded(base: str, options: dict[str, Any] | None, **more: Any) -> Any:
    config = ModelConfig(path=base, dtype="float32", quantization=options, lora={"r": 4})
    return load_model(config, dtype=torch.float32, seed=1, **more)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the adapters, with weights B that are not zero."""
    model.train().zero_grad()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@EACH
def test_weights_are_small_and_frozen_and_all_else_is_in_fp32(
    base: str, options: dict[str, Any], stored: torch.dtype
) -> None:
    model = loaded(base, options)
    for name, weight in model.named_parameters():
        is_projection = "_proj.base_layer.weight" in name
        assert weight.dtype == (stored if is_projection else torch.float32), name
        assert weight.requires_grad == ("lora_" in name)
    whole = sum(
        weight.nbytes for name, weight in loaded(base, None).named_parameters() if "base_layer" in name
    )
    small = sum(weight.nbytes for name, weight in model.named_parameters() if "base_layer" in name)
    assert small < whole * (0.16 if options is NF4 else 0.27)  # 1/8 or 1/4, and the biases


@EACH
def test_gradients_are_about_those_of_the_whole_model(
    base: str, options: dict[str, Any], stored: torch.dtype
) -> None:
    found, expected = gradients(loaded(base, options)), gradients(loaded(base, None))
    assert found.keys() == expected.keys()
    one, other = (torch.cat([each[name].flatten() for name in expected]) for each in (found, expected))
    assert 0.95 < torch.cosine_similarity(one, other, dim=0) < 0.99999


@EACH
def test_an_evaluation_leaves_the_weights_as_they_are(
    base: str, options: dict[str, Any], stored: torch.dtype
) -> None:
    model = loaded(base, options)
    before = gradients(model)
    with torch.no_grad():
        model.eval()(IDS)
    after = gradients(model)
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())


def test_the_computing_precision_is_the_models_when_nothing_is_said(base: str) -> None:
    def computes_in(options: dict[str, Any], dtype: str) -> torch.dtype:
        config = ModelConfig(
            path=base, dtype=dtype, quantization=options, lora={"target_modules": ["q_proj"]}
        )
        model: Any = load_model(config, dtype=torch.float32, seed=1)
        found: torch.dtype = model.get_base_model().model.layers[0].mlp.up_proj.compute_dtype
        return found

    assert computes_in(NF4, "bfloat16") == torch.bfloat16
    assert computes_in(NF4, "float32") == torch.float32
    assert computes_in(NF4 | {"bnb_4bit_compute_dtype": "float16"}, "bfloat16") == torch.float16


@EACH
def test_what_is_merged_is_no_longer_quantized(
    base: str, options: dict[str, Any], stored: torch.dtype
) -> None:
    model, whole = loaded(base, options), loaded(base, options, dequantize=True)
    for each in (model, whole):
        gradients(each)
    expected = model.train()(IDS).logits
    whole = merged(whole)
    assert {weight.dtype for weight in whole.parameters()} == {torch.float32}
    torch.testing.assert_close(whole(IDS).logits, expected, rtol=0, atol=1e-5)


@EACH
def test_a_model_that_was_saved_quantized_is_so_by_itself(
    base: str, tmp_path: Path, options: dict[str, Any], stored: torch.dtype
) -> None:
    """Also one that was under an adapter of peft."""
    in_memory = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32
    )
    in_memory.save_pretrained(tmp_path / "bare")
    save_base(get_peft_model(in_memory, LoraConfig(target_modules="all-linear")), tmp_path / "adapted")
    expected = gradients(loaded(base, options | {"bnb_4bit_compute_dtype": "float32"}))
    for folder in ("bare", "adapted"):
        found = gradients(loaded(str(tmp_path / folder), None))
        assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items()), folder


# --- refusals ---


def refusal(config: ModelConfig) -> str:
    with pytest.raises(ModelError) as caught:
        load_architecture(config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"},
            "model.quantization: 'bnb_4bit_quant_typ' is not a field of BitsAndBytesConfig. "
            "Did you mean bnb_4bit_quant_type?",
        ),
        (
            {"bnb_4bit_quant_type": "nf4"},
            "model.quantization: set one of load_in_4bit and load_in_8bit to true",
        ),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "model.quantization: set one of load_in_4bit and load_in_8bit to true",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": 4},
            "model.quantization: bnb_4bit_quant_type must be a string",
        ),
    ],
)
def test_options_that_make_no_sense(base: str, options: dict[str, Any], text: str) -> None:
    assert refusal(ModelConfig(path=base, quantization=options, lora={})) == text


def test_without_an_adapter_there_is_nothing_to_train(base: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="quantization freezes the weights: set lora or adapter, or there is noth"
    ):
        ModelConfig(path=base, quantization=NF4)
    with pytest.raises(
        ValueError, match="quantization belongs to a saved model: set path instead of from_config"
    ):
        ModelConfig(from_config=tiny_config(), tokenizer=base, quantization=NF4, lora={})
    saved = quantized_by("bitsandbytes", base, tmp_path, load_in_4bit=True)
    assert refusal(ModelConfig(path=saved)) == (
        f"model {saved}: its weights are quantized by bitsandbytes, and stay as they are; set model.lora to train "
        "adapters on them"
    )


def quantized_by(method: str, base: str, folder: Path, **options: Any) -> str:
    """A folder that says of its weights that they are."""
    shutil.copytree(base, folder / "saved")
    path = folder / "saved/config.json"
    settings = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method, **options}}
    path.write_text(json.dumps(settings))
    return str(folder / "saved")


def test_what_is_quantized_is_not_quantized_again(base: str, tmp_path: Path) -> None:
    saved = quantized_by("bitsandbytes", base, tmp_path, load_in_4bit=True)
    assert refusal(ModelConfig(path=saved, quantization=INT8, lora={})) == (
        f"model {saved}: its weights are quantized by bitsandbytes already; leave out model.quantization"
    )


def test_other_methods_are_refused(base: str, tmp_path: Path) -> None:
    saved = quantized_by("gptq", base, tmp_path, bits=4)
    assert refusal(ModelConfig(path=saved, lora={})) == (
        f"model {saved}: its weights are quantized by gptq, on which nothing can be trained; use the model that they "
        "were made of"
    )


def test_bits_are_stored_as_integers(base: str, tmp_path: Path) -> None:
    """Else `.to(float32)` would take their patterns for numbers."""
    text = (
        "bnb_4bit_quant_storage is bfloat16, which a change of precision would garble; leave it out: every stage "
        "shards uint8"
    )
    storage = {"bnb_4bit_quant_storage": "bfloat16"}
    assert refusal(ModelConfig(path=base, quantization=NF4 | storage, lora={})) == f"model {base}: {text}"
    saved = quantized_by("bitsandbytes", base, tmp_path, **NF4, **storage)
    assert refusal(ModelConfig(path=saved, lora={})) == f"model {saved}: {text}"


def test_without_bitsandbytes_nothing_is_quantized(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    assert refusal(ModelConfig(path=base, quantization=NF4, lora={})) == (
        f"model {base}: quantized weights need bitsandbytes, which is not installed here; run pip install "
        "'ray-prefopt[quantization]' on all nodes"
    )
