"""Low-rank adapters on a frozen model: new ones, saved ones, and both parts on their way out."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn

from ray_prefopt.config import LoraConfig
from ray_prefopt.errors import ModelError
from ray_prefopt.model.hub import first_line, why_missing, why_not_loaded, without_bars

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def attach_lora(model: Any, lora: LoraConfig, *, seed: int) -> nn.Module:
    """The model with low-rank adapters, everything else frozen. Raises ModelError when no module matches."""
    torch.manual_seed(seed)
    task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    options = {"task_type": task_type, **lora.model_dump(exclude={"args"}), **lora.args}
    try:
        # Adapters in the model's own precision: ZeRO refuses a mix.
        return get_peft_model(model, PeftLoraConfig(**options), autocast_adapter_dtype=False)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model.lora: {first_line(error)}") from error


def read_adapter(path: str) -> PeftLoraConfig:
    """The options of a saved adapter. Raises ModelError when there is none, or it is of another kind."""
    if missing := why_missing(path, None, ADAPTER_FILE):
        raise ModelError(f"model.adapter {path}: {missing}")
    try:
        options = PeftConfig.from_pretrained(path)
    except Exception as error:  # of peft, huggingface_hub and json
        raise ModelError(f"model.adapter {path}: {why_not_loaded(path, error)}") from error
    if type(options) is not PeftLoraConfig:
        kind = getattr(options.peft_type, "value", options.peft_type)
        raise ModelError(f"model.adapter {path}: it is of the kind {kind}; LORA alone can be trained")
    if Path(path).is_dir() and not any(Path(path, name).exists() for name in ADAPTER_WEIGHTS):
        raise ModelError(f"model.adapter {path}: its weights are missing ({' or '.join(ADAPTER_WEIGHTS)})")
    return options


def attach_saved(model: Any, path: str) -> nn.Module:
    """The model with a saved adapter, everything else frozen. Raises ModelError when it is not of this model."""
    options = read_adapter(path)
    options.inference_mode = False
    try:
        adapted = get_peft_model(model, options, autocast_adapter_dtype=False)
        outcome: Any = set_peft_model_state_dict(adapted, load_peft_weights(path, device="cpu"))
    except Exception as error:  # of peft, huggingface_hub, safetensors and torch
        raise ModelError(f"model.adapter {path}: {first_line(error)}") from error
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    missing, unknown = sorted(trained.intersection(outcome.missing_keys)), sorted(outcome.unexpected_keys)
    if missing or unknown:
        raise ModelError(
            f"model.adapter {path}: it is not of this model; missing {missing[:3]}, unknown {unknown[:3]}"
        )
    return adapted


def with_adapter(model: Any, folder: str) -> nn.Module:
    """The model with a saved adapter, for more training; a PeftModel takes its weights into the adapter it has."""
    if isinstance(model, PeftModel):
        (name,) = model.active_adapters
        set_peft_model_state_dict(model, load_peft_weights(folder), adapter_name=name)
        return model
    adapted: nn.Module = PeftModel.from_pretrained(model, folder, is_trainable=True)
    return adapted


def base_of(model: Any) -> Any:
    """The model under the adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def name_base(folder: Path, name: str | None) -> None:
    """Let the adapter in a folder, if there is one, say of which model it is, and not from where workers had it."""
    path = folder / ADAPTER_FILE
    if name and path.exists():
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}, indent=2)
        )


def merged(model: nn.Module) -> nn.Module:
    """The model with its low-rank adapters merged into the weights they adapt."""
    assert isinstance(model, PeftModel)
    whole = model.merge_and_unload()
    assert isinstance(whole, nn.Module)
    return whole


def save_base(model: Any, folder: Path) -> None:
    """Write the model under the adapters as a Hugging Face folder, from where it lies in memory."""
    base = model.get_base_model()

    def leave_out_adapters(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
        """Weights by the names that they have without peft."""
        for name in list(state):
            weight = state.pop(name)
            if model.base_model.prefix not in name and ".modules_to_save." not in name:
                state[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = weight

    # A hook, since transformers drops the state_dict that a quantized model is to be saved with.
    hook = base.register_state_dict_post_hook(leave_out_adapters)
    with without_bars():
        base.save_pretrained(folder)
    hook.remove()
