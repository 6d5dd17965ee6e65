"""What the trainers take as a model besides paths and whole models: adapters of peft, and quantized weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ray_prefopt import CPOConfig, CPOTrainer
from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError, ModelError
from ray_prefopt.training.describe import describe
from ray_prefopt.training.folder import resolved
from tests.integration.test_trainer import SMALL, TWO_WORKERS, chats
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.ray

EVALUATED: dict[str, Any] = {**SMALL, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Wide enough for the kernels of bitsandbytes that need whole blocks of 64."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return save_tiny_model(tmp_path_factory.mktemp("model"), **shape)


def adapted(name: str = "default", **options: Any) -> Any:
    given = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(tiny_model(), given, adapter_name=name)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.fill_(0.02)
    return model


def last_eval_loss(trainer: CPOTrainer) -> float:
    return [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record][-1]


@pytest.mark.soak
def test_a_peft_model_goes_on_and_holds_the_trained_adapter(tmp_path: Path, ray_local: None) -> None:
    model = adapted("mine", modules_to_save=["lm_head"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = CPOTrainer(
        model,
        CPOConfig(output_dir=str(tmp_path), **EVALUATED),
        train_dataset=chats(8),
        eval_dataset=chats(3, start=100),
        processing_class=tiny_tokenizer(),
        scaling_config=TWO_WORKERS,
    )
    trainer.train()
    assert trainer.model is model
    for name, weight in model.state_dict().items():
        is_trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(weight, before[name]) == (not is_trained), name
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "run" / "model").eval()
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model.eval()(ids).logits, loaded(ids).logits, rtol=0, atol=0)
    expected = last_eval_loss(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.soak
def test_a_quantized_base_from_a_script_of_trl(model_folder: str, tmp_path: Path, ray_local: None) -> None:
    """With the arguments that trl.ModelConfig gives."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    given = {
        "dtype": torch.float32,
        "quantization_config": quantization,
        "device_map": {"": 0},
        "use_cache": False,
    }
    trainer = CPOTrainer(
        model_folder,
        CPOConfig(output_dir=str(tmp_path), model_init_kwargs=given, **EVALUATED),
        train_dataset=chats(8),
        eval_dataset=chats(3, start=100),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        scaling_config=TWO_WORKERS,
    )
    trainer.train()
    assert trainer.model.get_base_model().is_loaded_in_4bit
    adapter = {name: weight for name, weight in trainer.model.named_parameters() if "lora_B" in name}
    assert adapter
    assert all(weight.abs().max() > 0 for weight in adapter.values())
    expected = last_eval_loss(trainer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# --- without a run ---


def small(tmp_path: Path, model: Any, **arguments: Any) -> CPOTrainer:
    args = CPOConfig(output_dir=str(tmp_path / "out"), **SMALL)
    return CPOTrainer(model, args, processing_class=tiny_tokenizer(), **arguments)


def test_an_untrained_peft_model_is_saved_as_its_adapter(tmp_path: Path) -> None:
    model = adapted()
    small(tmp_path, model).save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "config.json").exists()
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "saved").eval()
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


def test_what_is_trained_is_named_before(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an adapter in a folder is found by workers wherever they run."""
    adapted().save_pretrained(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    data = {"train": []}
    config = TrainConfig(model={"path": model_folder, "adapter": "mine"}, data=data)
    assert resolved(config).model.adapter == str(tmp_path / "mine")
    assert describe(config)["model"]["trained"] == f"the LoRA adapter {tmp_path}/mine"
    config = TrainConfig(model={"path": model_folder, "lora": {"r": 3}}, data=data)
    assert describe(config)["model"]["trained"] == "LoRA adapters of rank 3"
    assert describe(TrainConfig(model={"path": model_folder}, data=data))["model"]["trained"] == "all weights"


def test_a_quantized_model_in_memory_needs_an_adapter(model_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    trainer = small(tmp_path, model, train_dataset=chats(8), peft_config={"r": 4})
    assert trainer._config.model.has_adapter
    with pytest.raises(
        ModelError, match=r"its weights are quantized by bitsandbytes, and stay as they are; set mod"
    ):
        small(tmp_path, model, train_dataset=chats(8)).train()


def with_an_adapter_of_transformers() -> Any:
    model: Any = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def with_two_active() -> Any:
    model = adapted("one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["one", "two"])
    return model


@pytest.mark.parametrize(
    ("made", "arguments", "text"),
    [
        (
            adapted,
            {"peft_config": LoraConfig(r=2)},
            "peft_config: the model is a PeftModel already; leave peft_config out to go on training its adapter",
        ),
        (
            with_an_adapter_of_transformers,
            {},
            "model: got a model into which transformers has put an adapter; give a PeftModel, such as PeftModel.from_",
        ),
        (
            with_two_active,
            {},
            r"model: got a PeftModel with the adapters one, two active; set_adapter\(\) the one to train",
        ),
    ],
)
def test_adapters_that_cannot_be_trained(
    made: Any, arguments: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"^{text}"):
        small(tmp_path, made(), **arguments)
