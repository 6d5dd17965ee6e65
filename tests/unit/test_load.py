"""Models from folders and architectures, and the sentence that each model gets which cannot be trained."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import ModelError
from ray_prefopt.model.adapters import merged
from ray_prefopt.model.load import (
    check_tokenizer,
    compute_dtype,
    decoder_start_id,
    load_architecture,
    load_model,
    save_model,
)
from tests.tiny import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer


def built(*, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    if "path" not in options:
        options = {"from_config": tiny_config(), "tokenizer": "-", **options}
    return load_model(ModelConfig(**options), dtype=dtype, seed=seed)


def weights_equal(one: nn.Module, other: nn.Module) -> bool:
    states, others = one.state_dict(), other.state_dict()
    return states.keys() == others.keys() and all(torch.equal(states[name], others[name]) for name in states)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny_model(tmp_path_factory.mktemp("model"), seed=3))


# --- building ---


def test_an_architecture_has_the_weights_of_its_seed() -> None:
    torch.manual_seed(99)
    assert weights_equal(built(seed=5), tiny_model(seed=5))
    assert not weights_equal(built(seed=5), built(seed=6))


def test_a_folder_has_its_own_weights(saved: Path) -> None:
    model, stored = built(path=str(saved), seed=5), load_file(saved / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("source", ["folder", "architecture"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_in_the_dtype_and_ready_to_train(saved: Path, source: str, dtype: torch.dtype) -> None:
    model = built(**({"path": str(saved)} if source == "folder" else {}), dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "saved_as", "computed"),
    [
        ("auto", None, torch.float32),
        ("auto", "float16", torch.float16),
        ("bfloat16", "float32", torch.bfloat16),
        ("float32", "bfloat16", torch.float32),
    ],
)
def test_precision_is_the_configs_or_that_of_the_weights(
    dtype: str, saved_as: str | None, computed: torch.dtype
) -> None:
    architecture = tiny_config(**({"dtype": saved_as} if saved_as else {}))
    config = ModelConfig(from_config=architecture, tokenizer="-", dtype=dtype)
    assert compute_dtype(config, load_architecture(config)) == computed


def test_dropout_is_off_unless_asked_for() -> None:
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3}
    gpt2 = {"from_config": tiny_config("gpt2", **dropout)}
    assert {module.p for module in built(**gpt2).modules() if isinstance(module, nn.Dropout)} == {0.0}
    kept = built(**gpt2, disable_dropout=False)
    assert {module.p for module in kept.modules() if isinstance(module, nn.Dropout)} == {0.1, 0.2, 0.3}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_comes_with_its_decoder(kind: str, tmp_path: Path) -> None:
    """A folder with BART's config would give its decoder alone too."""
    folder = save_tiny_model(tmp_path, kind, seed=3)
    assert weights_equal(built(path=folder), tiny_model(kind, seed=3))
    assert weights_equal(built(from_config=tiny_config(kind), seed=5), tiny_model(kind, seed=5))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_dropout_is_off_in_encoders_and_decoders(kind: str) -> None:
    """BART's is no module, so that TRL's disable_dropout does not find it."""
    name = {"t5": "dropout_rate", "bart": "dropout"}[kind]
    ids = {name: torch.arange(8).view(1, 8) for name in ("input_ids", "decoder_input_ids")}
    for disable_dropout in (True, False):
        model = built(from_config=tiny_config(kind, **{name: 0.5}), disable_dropout=disable_dropout)
        first, second = model(**ids).logits, model(**ids).logits
        assert torch.equal(first, second) == disable_dropout


def test_dropout_is_off_in_configs_inside(tmp_path: Path) -> None:
    text = {**tiny_config("llama"), "attention_dropout": 0.5}
    architecture = load_architecture(
        ModelConfig(from_config={"model_type": "emu3", "text_config": text}, tokenizer="-")
    )
    assert architecture.get_text_config().attention_dropout == 0.0


def test_where_a_decoder_starts() -> None:
    begins = {"decoder": {"bos_token_id": 7}}
    for settings, start in (({"model_type": "t5gemma", **begins}, 7), (tiny_config("bart"), 2)):
        assert decoder_start_id(load_architecture(ModelConfig(from_config=settings, tokenizer="-"))) == start
    assert decoder_start_id(load_architecture(ModelConfig(from_config=tiny_config(), tokenizer="-"))) is None


def test_attention_is_the_one_asked_for(saved: Path) -> None:
    assert built(attn_implementation="eager").config._attn_implementation == "eager"
    assert built(path=str(saved), attn_implementation="eager").config._attn_implementation == "eager"
    assert built().config._attn_implementation == "sdpa"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_gradient_checkpointing_changes_no_gradient(lora: dict[str, Any] | None) -> None:
    plain, saving = built(lora=lora), built(lora=lora, gradient_checkpointing=True)
    base = saving.get_base_model() if lora else saving
    assert base.is_gradient_checkpointing
    expected = gradients(plain)
    assert expected
    torch.testing.assert_close(gradients(saving), expected, rtol=0, atol=1e-7)


# --- adapters ---


def adapted(model: nn.Module) -> set[str]:
    """Names of the last part of modules with an adapter."""
    return {
        name.split(".lora_")[0].rsplit(".", 1)[-1]
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_" in name
    }


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", PROJECTIONS),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (None, {"q_proj", "v_proj"}),  # what peft has for qwen2
        (r".*\.1\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
    ],
)
def test_adapters_are_where_the_config_says(targets: Any, expected: set[str]) -> None:
    model = built(lora={"r": 4, "target_modules": targets})
    assert adapted(model) == expected
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    assert ("layers.0" in " ".join(trained)) == (not str(targets).startswith(".*"))


@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        ("t5", {"q", "k", "v", "o", "wi", "wo"}),
        ("bart", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_adapters_are_in_encoders_and_decoders(kind: str, linear: set[str]) -> None:
    model = built(from_config=tiny_config(kind), lora={"r": 2})
    assert adapted(model) == linear
    assert model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"


def test_an_adapter_changes_nothing_before_training_and_depends_on_the_seed_alone() -> None:
    ids = torch.arange(8).view(1, 8)
    one, two, other = (built(lora={"r": 4}, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(one(ids).logits, tiny_model(seed=1)(ids).logits, rtol=0, atol=1e-6)
    assert weights_equal(one, two)
    assert not weights_equal(one, other)


def test_adapters_have_the_precision_of_the_model() -> None:
    model = built(lora={"r": 4}, dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_options_of_the_adapter_reach_peft() -> None:
    model = built(
        lora={
            "r": 4,
            "lora_alpha": 12,
            "use_rslora": True,
            "lora_dropout": 0.25,
            "modules_to_save": ["lm_head"],
        }
    )
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.scaling["default"] == 12 / 4**0.5
    assert layer.lora_dropout["default"].p == 0.25
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "base_model.model.lm_head.modules_to_save.default.weight" in trained


def test_options_that_only_peft_knows() -> None:
    args = {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}}
    model = built(lora={"r": 4, "target_modules": ["q_proj", "v_proj"], "args": args})
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(".layers.1." in name for name in trained)
    ranks = {name.split(".")[-4]: len(weight) for name, weight in trained.items() if "lora_A" in name}
    assert (ranks["q_proj"], ranks["v_proj"]) == (2, 4)
    with pytest.raises(ModelError, match=r"^model\.lora: .*unexpected keyword argument 'rang'"):
        built(lora={"args": {"rang": 4}})


def test_a_merged_model_is_the_same_without_adapters(tmp_path: Path) -> None:
    model, ids = built(lora={"r": 4}), torch.arange(8).view(1, 8)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.1)
        expected = model.eval()(ids).logits
        whole = merged(model)
        torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert (tiny_model()(ids).logits - expected).abs().max() > 0.01
    assert whole.state_dict().keys() == tiny_model().state_dict().keys()


@pytest.mark.parametrize("is_shown", [True, False])
def test_saving_draws_no_bars_and_leaves_the_others(tmp_path: Path, is_shown: bool) -> None:
    was_shown = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if is_shown else logging.disable_progress_bar)()
    try:
        save_model(tiny_model(), tmp_path)
        assert logging.is_progress_bar_enabled() == is_shown
    finally:
        (logging.enable_progress_bar if was_shown else logging.disable_progress_bar)()
    assert weights_equal(built(path=str(tmp_path)), tiny_model())


# --- what cannot be loaded ---


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def with_own_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (folder / "configuration_own.py").write_text("raise SystemExit('code of a model was run')\n")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], r"Unrecognized model in .*"),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        r".*no file named model\.safetensors.*",
    ),
    "weights that could hold code": (pickled, r".*no file named model\.safetensors.*"),
    "torn weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        r"Error while deserializing.*",
    ),
    "config is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r".*not a valid JSON file\.",
    ),
    "unknown type": (
        lambda folder: edit_config(folder, model_type="quen2"),
        r".*model type `quen2` but Transformers does not recognize this architecture.*",
    ),
    "no language model": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
        r"vit is not a language model of transformers; use one that AutoModelForCausalLM loads",
    ),
    "an encoder-decoder that writes no text": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "table-transformer"}'),
        r"table-transformer is not a language model of transformers; use one that AutoModelForSeq2SeqLM loads",
    ),
    "a decoder without a start": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
        r"t5 does not say how its decoder starts; set decoder_start_token_id in its config \(for T5, the id of the pad "
        r"token\)",
    ),
    "an encoder-decoder with a router": (
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "switch_transformers", "decoder_start_token_id": 0, "output_router_logits": true}'
        ),
        r"switch_transformers does not tell the loss of its router apart; set output_router_logits to false "
        r"\(model\.overrides\), and train without it",
    ),
    "own code": (
        with_own_code,
        r"it comes with its own code; read that code, then set model\.trust_remote_code: true",
    ),
    "other shapes": (lambda folder: edit_config(folder, hidden_size=64), r".*ignore_mismatched_sizes.*"),
    "another layer": (
        lambda folder: edit_config(folder, num_hidden_layers=3, layer_types=None),
        r"its files hold no weights for model\.layers\.2\.input_layernorm\.weight, model\.layers\.2\.mlp\.down_proj"
        r"\.weight, model\.layers\.2\.mlp\.gate_proj\.weight \(12 in all\); they are incomplete, or of a model "
        r"without a language modelling head",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_model_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    spoil, message = FOLDERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=rf"^model {folder}: {message}$"):
        built(path=str(folder))


def test_a_path_that_is_neither_folder_nor_hub_id_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path="./here"))
    assert str(caught.value) == "model ./here: no such folder, and not a hub id (org/name)"


def test_a_hub_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(
        ModelError, match=r"^model org/name: We couldn't connect to 'https://huggingface\.co'"
    ):
        load_architecture(ModelConfig(path="org/name"))


def test_what_transformers_says_is_put_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("\n  org/name does not appear to have a file named config.json.\nCheck it.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(path="org/name"))
    assert str(caught.value) == "model org/name: org/name does not appear to have a file named config.json."


ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"model_type": "qwen"}, r"model_type 'qwen' is not one of transformers'\. Did you mean qwen3\?"),
    "nothing near": ({"model_type": "zzzz"}, r"model_type 'zzzz' is not one of transformers'\."),
    "value": (
        {"model_type": "qwen2", "hidden_size": "wide"},
        r"\(qwen2\): Validation error for field 'hidden_size':",
    ),
    "shape": (
        {"model_type": "gpt2", "n_embd": 30, "n_head": 4},
        r"\(gpt2\): `embed_dim` must be divisible by .*",
    ),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_an_architecture_that_cannot_be_built_is_refused(case: str) -> None:
    settings, message = ARCHITECTURES[case]
    with pytest.raises(ModelError, match=rf"^model\.from_config:? {message}$"):
        built(from_config=settings)


def test_an_architecture_that_writes_no_text_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^model \{'model_type': 'vit'\}: vit is not a language model"):
        built(from_config={"model_type": "vit"})


def test_attention_that_is_not_there_is_refused(saved: Path) -> None:
    with pytest.raises(
        ModelError, match=rf'^model {saved}: Specified `attn_implementation="flash"` is not supp'
    ):
        built(path=str(saved), attn_implementation="flash")
    with pytest.raises(
        ModelError, match=r'^model\.from_config \(qwen2\): Specified `attn_implementation="flash"`'
    ):
        built(attn_implementation="flash")


def test_adapters_that_fit_nowhere_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"^model\.lora: Target modules \{'query'\} not found in the base model"
    ):
        built(lora={"target_modules": ["query"]})


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    check_tokenizer(
        load_architecture(ModelConfig(from_config=tiny_config(vocab_size=size), tokenizer="-")), tokenizer
    )
    small = load_architecture(ModelConfig(from_config=tiny_config(vocab_size=size - 1), tokenizer="-"))
    with pytest.raises(ModelError) as caught:
        check_tokenizer(small, tokenizer)
    assert str(caught.value) == (
        f"the tokenizer has {size} tokens, the model embeds {size - 1}: use the tokenizer that belongs to the model "
        "(model.tokenizer), or resize the model's embeddings first"
    )


def test_a_mistyped_setting_of_an_architecture_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        load_architecture(ModelConfig(from_config=tiny_config() | {"hidden_sise": 64}, tokenizer="unread"))
    assert str(caught.value) == (
        "model.from_config: 'hidden_sise' is not a setting of qwen2. Did you mean hidden_size?"
    )


def test_settings_that_are_read_though_not_listed_are_let_through() -> None:
    """head_dim is none of Qwen2Config's, and the model reads it."""
    assert (
        load_architecture(ModelConfig(from_config=tiny_config(head_dim=8), tokenizer="unread")).head_dim == 8
    )
