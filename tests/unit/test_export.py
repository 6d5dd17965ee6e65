"""From a checkpoint of the plain engine to a folder that transformers and peft load."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.build import build_engine
from ray_prefopt.errors import CheckpointError, ConfigError
from ray_prefopt.training import export as export_module
from ray_prefopt.training.checkpoint import LoopState, save_checkpoint
from ray_prefopt.training.export import export
from tests.tiny import save_tiny_model, tiny_config

IDS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


def config_of(base: str, *, data: dict[str, Any] | None = None, **model: Any) -> TrainConfig:
    return TrainConfig(
        model={"path": base, "dtype": "float32", **model},
        data={"train": "-", **(data or {})},
        optim={"learning_rate": 0.05, "warmup_ratio": 0.0},
        engine={"kind": "plain"},
    )


def trained(run: str | Path, config: TrainConfig, *, steps: int = 1) -> nn.Module:
    """Train a little and save a checkpoint after each step, as a run would; returns the model."""
    engine = build_engine(config, total_steps=9, device=torch.device("cpu"))
    for step in range(1, steps + 1):
        engine.backward(engine.forward(input_ids=IDS, labels=IDS).loss)
        engine.step()
        save_checkpoint(
            engine.save,
            LoopState(step),
            f"{run}/checkpoints",
            extra={"config.json": config.model_dump_json()},
            retained=9,
        )
    return engine.module.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


def loaded(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


# --- whole models ---


def test_the_newest_checkpoint_of_a_run_is_exported(base: str, tmp_path: Path) -> None:
    model = trained(tmp_path / "run", config_of(base), steps=2)
    out = str(tmp_path / "out/model")
    assert export(str(tmp_path / "run"), out) == out
    assert_same_weights(loaded(out), model)
    assert not torch.equal(logits(loaded(base)), logits(loaded(out)))
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        os.listdir(out)
    )
    assert os.listdir(tmp_path / "out") == ["model"]
    assert AutoTokenizer.from_pretrained(out)("What color is the sky?") == AutoTokenizer.from_pretrained(
        base
    )("What color is the sky?")


def test_any_checkpoint_can_be_exported(base: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", config_of(base), steps=2)
    first = trained(tmp_path / "other", config_of(base), steps=1)
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-00000001-*")
    export(str(checkpoint), str(tmp_path / "out"))
    assert_same_weights(loaded(tmp_path / "out"), first)


def test_weights_come_in_the_precision_of_the_model(base: str, tmp_path: Path) -> None:
    model = trained(tmp_path / "run", config_of(base, dtype="bfloat16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    found = loaded(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    assert_same_weights(found, model.bfloat16())


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral"])
def test_tied_weights_and_experts_come_back(base: str, tmp_path: Path, kind: str) -> None:
    experts = {"num_local_experts": 2} if kind == "mixtral" else {}
    model = trained(
        tmp_path / "run", config_of(base, path=None, from_config=tiny_config(kind, **experts), tokenizer=base)
    )
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert_same_weights(loaded(tmp_path / "out"), model)


def test_settings_that_transformers_does_not_know_are_no_hindrance(base: str, tmp_path: Path) -> None:
    """Saved configs hold such, some with names like those of others; here beside `hidden_size`."""
    shutil.copytree(base, tmp_path / "model")
    settings = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(settings | {"hidden_sizes": 1}))
    model = trained(tmp_path / "run", config_of(str(tmp_path / "model")))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert_same_weights(loaded(tmp_path / "out"), model)


def test_settings_of_generate_come_along(base: str, tmp_path: Path) -> None:
    """Unless transformers refuses to save them."""
    shutil.copytree(base, tmp_path / "model")
    file = tmp_path / "model/generation_config.json"
    own = {"eos_token_id": loaded(base).config.eos_token_id}
    given = {"eos_token_id": [5, 6], "temperature": 0.5, "do_sample": True}
    cases = {
        "kept": (given, given),
        "contradictory": ({**given, "do_sample": False}, own),
        "none": (None, own),
    }
    for name, (settings, expected) in cases.items():
        file.unlink()
        if settings is not None:
            file.write_text(json.dumps(settings))
        trained(tmp_path / name, config_of(str(tmp_path / "model")))
        export(str(tmp_path / name), str(tmp_path / f"{name}-out"))
        found = loaded(tmp_path / f"{name}-out").generation_config
        assert {key: getattr(found, key) for key in expected} == expected


def test_a_model_with_its_own_code_is_exported(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "mine.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
        "class Mine(Qwen2Config):\n    model_type = 'mine'\n\n\n"
        "class MineForCausalLM(Qwen2ForCausalLM):\n    config_class = Mine\n"
    )
    settings = json.loads((folder / "config.json").read_text()) | {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    model = trained(tmp_path / "run", config_of(str(folder), trust_remote_code=True))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same_weights(exported, model)


def test_dropout_was_off_for_the_run_alone(base: str, tmp_path: Path) -> None:
    settings = tiny_config("gpt2", resid_pdrop=0.25)
    model: Any = trained(tmp_path / "run", config_of(base, path=None, from_config=settings, tokenizer=base))
    assert model.config.resid_pdrop == 0.0
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert loaded(tmp_path / "out").config.resid_pdrop == 0.25


def test_the_template_of_the_run_goes_with_the_model(base: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", config_of(base, data={"chat_template": "{{ messages[0]['content'] }}!"}))
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


def test_any_storage_will_do(base: str, tmp_path: Path) -> None:
    model = trained("memory://bucket/export/run", config_of(base))
    export("memory://bucket/export/run", "memory://bucket/export/out")
    fs = fsspec.filesystem("memory")
    fs.get("/bucket/export/out", str(tmp_path / "copy"), recursive=True)
    assert_same_weights(loaded(tmp_path / "copy"), model)


def test_an_older_export_is_replaced_in_any_storage(base: str, tmp_path: Path) -> None:
    for name in ("older", "newer"):
        model = trained(f"memory://bucket/again/{name}", config_of(base))
        export(f"memory://bucket/again/{name}", "memory://bucket/again/out")
    fs = fsspec.filesystem("memory")
    assert not fs.exists("/bucket/again/out/model")
    fs.get("/bucket/again/out", str(tmp_path / "copy"), recursive=True)
    assert_same_weights(loaded(tmp_path / "copy"), model)


# --- adapters ---


def test_an_adapter_is_exported_by_itself_or_merged(base: str, tmp_path: Path) -> None:
    config = config_of(base, lora={"r": 4, "target_modules": ["q_proj", "down_proj"]})
    model = trained(tmp_path / "run", config)
    assert (logits(model) - logits(loaded(base))).abs().max() > 1e-3

    export(str(tmp_path / "run"), str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter/model.safetensors").exists()
    assert (
        json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == base
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "adapter")) == len(
        AutoTokenizer.from_pretrained(base)
    )
    adapted = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=0)

    export(str(tmp_path / "run"), str(tmp_path / "merged"), merge=True)
    assert not (tmp_path / "merged/adapter_config.json").exists()
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), rtol=1e-5, atol=1e-5)


def test_modules_trained_beside_the_adapter_come_along(base: str, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = trained(tmp_path / "run", config_of(base, lora=lora))
    export(str(tmp_path / "run"), str(tmp_path / "adapter"))
    adapted = PeftModel.from_pretrained(loaded(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), rtol=0, atol=0)
    export(str(tmp_path / "run"), str(tmp_path / "merged"), merge=True)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(model), rtol=1e-5, atol=1e-5)


# --- the place ---


def test_an_older_export_is_replaced_whole(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, out)
    (out / "model-00002-of-00002.safetensors").touch()
    model = trained(tmp_path / "run", config_of(base))
    export(str(tmp_path / "run"), str(out))
    assert not (out / "model-00002-of-00002.safetensors").exists()
    assert_same_weights(loaded(out), model)
    (tmp_path / "empty").mkdir()
    export(str(tmp_path / "run"), str(tmp_path / "empty"))
    assert_same_weights(loaded(tmp_path / "empty"), model)


def test_an_export_that_fails_leaves_the_older_one(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(base, out)
    trained(tmp_path / "run", config_of(base))

    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export_module, "load_tokenizer", fail)
    with pytest.raises(OSError, match="No space left"):
        export(str(tmp_path / "run"), str(out))
    assert_same_weights(loaded(out), loaded(base))
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_folder_with_something_else_is_left_alone(base: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", config_of(base))
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(ConfigError) as caught:
        export(str(tmp_path / "run"), str(out))
    assert str(caught.value) == f"{out} is not empty and holds no model: export into another folder"
    assert os.listdir(out) == ["thesis.tex"]


def test_a_run_is_never_taken_for_a_model(base: str, tmp_path: Path) -> None:
    """Both have a config.json."""
    trained(tmp_path / "run", config_of(base))
    (tmp_path / "run" / "config.json").write_text(config_of(base).model_dump_json())
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    for out in (tmp_path / "run", checkpoint):
        before = sorted(os.listdir(out))
        with pytest.raises(ConfigError, match="is not empty and holds no model: export into another folder"):
            export(str(tmp_path / "run"), str(out))
        assert sorted(os.listdir(out)) == before


# --- refusals ---


@pytest.mark.parametrize("source", ["nowhere", "run"])
def test_a_source_without_checkpoint_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "run/checkpoints/step-00000001-0123abcd").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        export(str(tmp_path / source), str(tmp_path / "out"))
    assert (
        str(caught.value) == f"{tmp_path / source}: neither a checkpoint nor the folder of a run that has one"
    )
    assert not (tmp_path / "out").exists()


def test_a_torn_checkpoint_is_refused(base: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", config_of(base))
    (weights,) = (tmp_path / "run/checkpoints").glob("*/model.safetensors")
    os.truncate(weights, 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 100 bytes, its manifest says"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))


def test_without_an_adapter_there_is_nothing_to_merge(base: str, tmp_path: Path) -> None:
    trained(tmp_path / "run", config_of(base))
    with pytest.raises(ConfigError) as caught:
        export(str(tmp_path / "run"), str(tmp_path / "out"), merge=True)
    assert str(caught.value) == f"{tmp_path}/run has no adapter to merge: it was trained without model.lora"


def another_layer(settings: dict[str, Any]) -> None:
    settings["num_hidden_layers"] = 3
    settings.pop("layer_types")


def one_layer_less(settings: dict[str, Any]) -> None:
    settings["num_hidden_layers"] = 1
    settings.pop("layer_types")


def wider(settings: dict[str, Any]) -> None:
    settings["intermediate_size"] = 65


OTHER_MODELS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "larger": (
        another_layer,
        r"missing \['model\.layers\.2\.input_layernorm\.weight', 'model\.layers\.2\.mlp\.down_proj\.weight', "
        r"'model\.layers\.2\.mlp\.gate_proj\.weight'\], unknown \[\]$",
    ),
    "smaller": (one_layer_less, r"missing \[\], unknown \['model\.layers\.1\.[a-z_.]*weight', "),
    "wider": (wider, r"Error\(s\) in loading state_dict for Qwen2ForCausalLM:(.|\n)*size mismatch"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_a_model_that_changed_since_is_refused(base: str, tmp_path: Path, case: str) -> None:
    change, message = OTHER_MODELS[case]
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    trained(tmp_path / "run", config_of(str(folder)))
    settings = json.loads((folder / "config.json").read_text())
    change(settings)
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        CheckpointError, match=rf"^the checkpoint's weights are not those of the model: {message}"
    ):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
