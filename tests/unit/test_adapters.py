"""Saved adapters: read, put on their model, and parted from it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import ModelError
from ray_prefopt.model.adapters import attach_saved, save_base
from ray_prefopt.model.load import load_architecture, load_model
from tests.tiny import save_tiny_model, tiny_model

IDS = torch.arange(20).view(2, 10)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}},
    "with a module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "with magnitudes": {"target_modules": ["v_proj"], "use_dora": True},
    "with biases": {"target_modules": ["k_proj"], "bias": "lora_only"},
}


def adapted(kind: str = "plain", model: nn.Module | None = None, *, name: str = "default") -> Any:
    """A tiny model with an adapter that changes its output."""
    options = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **OPTIONS[kind])
    found = get_peft_model(model or tiny_model(), options, adapter_name=name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in found.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return found.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_saved_adapter_computes_what_it_did(base: str, tmp_path: Path, kind: str) -> None:
    model = adapted(kind)
    assert (logits(model) - logits(tiny_model())).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=base, adapter=str(tmp_path)), dtype=torch.float32, seed=5)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    trained = {name: weight for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trained.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained


def test_it_has_the_precision_of_the_model(base: str, adapter: Path) -> None:
    config = ModelConfig(path=base, adapter=str(adapter))
    loaded = load_model(config, dtype=torch.bfloat16, seed=0)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}


# --- the model under it ---


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_base_is_saved_as_it_was(tmp_path: Path, kind: str) -> None:
    before = {name: weight.clone() for name, weight in tiny_model().state_dict().items()}
    model = adapted(kind)
    save_base(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    changed = {"model.layers.0.self_attn.k_proj.bias", "model.layers.1.self_attn.k_proj.bias"}
    assert saved.keys() == before.keys()
    for name in saved.keys() - (changed if kind == "with biases" else set()):
        assert torch.equal(saved[name], before[name]), name
    assert not (tmp_path / "adapter_config.json").exists()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_the_base_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = adapted("with a module"), {}
    base = model.get_base_model()
    monkeypatch.setattr(base, "save_pretrained", lambda _: held.update(base.state_dict()))
    save_base(model, tmp_path)
    places = {weight.data_ptr() for weight in model.state_dict().values()}
    assert held.keys() == tiny_model().state_dict().keys()
    assert {weight.data_ptr() for weight in held.values()} <= places
    assert held.keys() != base.state_dict().keys()  # afterwards it is as before


def test_tied_weights_of_a_base_stay_tied(tmp_path: Path) -> None:
    """GPT-2 ties its head, and has transposed layers."""
    options = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    save_base(get_peft_model(tiny_model("gpt2"), options), tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.lm_head.weight is saved.transformer.wte.weight
    torch.testing.assert_close(logits(saved), logits(tiny_model("gpt2")), rtol=0, atol=0)


# --- what is no adapter, or another model's ---


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    save_file(weights, folder / "adapter_model.safetensors")


def with_another_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"] = torch.zeros(2, 64)
    save_file(weights, folder / "adapter_model.safetensors")


def of_another_rank(folder: Path) -> None:
    options = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(options | {"r": 8}))


def with_bin_alone(folder: Path) -> Path:
    (folder / "adapter_model.safetensors").unlink()
    return folder / "adapter_model.bin"


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        r"Can't find 'adapter_config\.json' at '.*'",
    ),
    "no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        r"Expecting property name .*",
    ),
    "another kind": (
        lambda folder: IA3Config(task_type="CAUSAL_LM").save_pretrained(folder),
        r"it is of the kind IA3; LORA alone can be trained",
    ),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        r"its weights are missing \(adapter_model\.safetensors or adapter_model\.bin\)",
    ),
    "weights that hold code": (
        lambda folder: torch.save(nn.Linear(1, 1), with_bin_alone(folder)),
        r"Weights only load failed\..*",
    ),
    "a weight less": (
        without_a_weight,
        r"it is not of this model; missing \['base_model\.model\.model\.layers\.1\.mlp\.down_proj\.lora_A\.default"
        r"\.weight'\], unknown \[\]",
    ),
    "a weight more": (
        with_another_weight,
        r"it is not of this model; missing \[\], unknown \['base_model\.model\.model\.layers\.2\.mlp\.down_proj"
        r"\.lora_A\.weight'\]",
    ),
    "another rank": (of_another_rank, r"Error\(s\) in loading state_dict for PeftModelForCausalLM:"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_adapter_of_the_model_is_refused(
    base: str, adapter: Path, tmp_path: Path, case: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    spoil, message = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=rf"^model\.adapter {folder}: {message}$"):
        load_model(ModelConfig(path=base, adapter=str(folder)), dtype=torch.float32, seed=0)


def test_another_architecture_is_refused(adapter: Path) -> None:
    with pytest.raises(
        ModelError, match=rf"^model\.adapter {adapter}: Target modules .* not found in the base"
    ):
        attach_saved(tiny_model("gpt2"), str(adapter))


def test_an_adapter_that_is_not_there_is_named_before_any_weight_is_read(base: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path=base, adapter="./here"))
    assert str(caught.value) == "model.adapter ./here: no such folder, and not a hub id (org/name)"


def test_an_adapter_in_the_place_of_a_model_is_named(adapter: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path=str(adapter)))
    assert str(caught.value) == (
        f"model {adapter}: it is an adapter; set model.adapter to it, and model.path to its base"
    )


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (
            {"path": "m", "lora": {}, "adapter": "a"},
            "lora makes a new adapter and adapter goes on with a saved one: leave one out",
        ),
        (
            {
                "from_config": {"model_type": "gpt2"},
                "tokenizer": "t",
                "adapter": "a",
                "overrides": {"n_layer": 1},
            },
            "overrides, adapter belongs to a saved model: set path instead of from_config",
        ),
    ],
)
def test_sections_that_contradict_themselves(section: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(**section)


def test_which_models_have_an_adapter() -> None:
    assert not ModelConfig(path="m").has_adapter
    assert ModelConfig(path="m", lora={}).has_adapter
    assert ModelConfig(path="m", adapter="a").has_adapter


# --- settings of a saved model ---


def test_settings_of_a_saved_model_can_be_changed(base: str) -> None:
    config = ModelConfig(path=base, overrides={"rms_norm_eps": 0.5})
    changed = load_model(config, dtype=torch.float32, seed=0)
    assert changed.config.rms_norm_eps == 0.5
    assert (logits(changed) - logits(tiny_model())).abs().max() > 1e-3


def test_settings_that_a_model_has_not_are_refused(base: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path=base, overrides={"rms_norm_epsilon": 0.5}))
    assert str(caught.value) == (
        f"model.overrides: 'rms_norm_epsilon' is not a setting of {base} (qwen2). Did you mean rms_norm_eps?"
    )
    with pytest.raises(ModelError, match=r"^model\.overrides: "):
        load_architecture(ModelConfig(path=base, overrides={"hidden_size": "wide"}))
