"""Frozen weights in 4 or 8 bits, by bitsandbytes: what may be asked for, and what has to be done before training."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.import_utils import is_bitsandbytes_available

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import ModelError, suggest
from ray_prefopt.model.hub import first_line


def is_quantized(config: ModelConfig, architecture: PretrainedConfig) -> bool:
    """Whether the frozen weights are kept in 4 or 8 bits: because they are saved so, or are to be."""
    return config.quantization is not None or _saved_by(architecture) is not None


def _saved_by(architecture: PretrainedConfig) -> str | None:
    """What has quantized the saved weights, or None."""
    saved = getattr(architecture, "quantization_config", None)
    if saved is None:
        return None
    method = saved["quant_method"] if isinstance(saved, Mapping) else saved.quant_method
    return str(getattr(method, "value", method))


def check_quantization(config: ModelConfig, architecture: PretrainedConfig) -> None:
    """Raises ModelError for quantized weights, or a wish to quantize them, that cannot be had."""
    if config.quantization is not None:
        known = inspect.signature(BitsAndBytesConfig).parameters.keys()
        for key in config.quantization.keys() - known:
            raise ModelError(
                f"model.quantization: {key!r} is not a field of BitsAndBytesConfig.{suggest(key, known)}"
            )
        if len([bits for bits in (4, 8) if config.quantization.get(f"load_in_{bits}bit")]) != 1:
            raise ModelError("model.quantization: set one of load_in_4bit and load_in_8bit to true")
        try:
            BitsAndBytesConfig(**config.quantization)
        except (TypeError, ValueError, ImportError) as error:
            raise ModelError(f"model.quantization: {first_line(error)}") from error
    if (method := _saved_by(architecture)) is not None:
        model = f"model {config.path}: its weights are quantized by {method}"
        if method != "bitsandbytes":
            raise ModelError(
                f"{model}, on which nothing can be trained; use the model that they were made of"
            )
        if config.quantization is not None:
            raise ModelError(f"{model} already; leave out model.quantization")
        if not config.has_adapter:
            raise ModelError(f"{model}, and stay as they are; set model.lora to train adapters on them")
    if (stored := _storage(config, architecture)) != "uint8":
        raise ModelError(
            f"model {config.path}: bnb_4bit_quant_storage is {stored}, which a change of precision would garble; leave "
            "it out: every stage shards uint8"
        )
    if is_quantized(config, architecture) and not is_bitsandbytes_available():
        raise ModelError(
            f"model {config.path}: quantized weights need bitsandbytes, which is not installed here; "
            "run pip install 'ray-prefopt[quantization]' on all nodes"
        )


def _storage(config: ModelConfig, architecture: PretrainedConfig) -> str:
    """The dtype that stands for the bits of 4-bit weights."""
    saved = getattr(architecture, "quantization_config", None)
    options = config.quantization or (saved if isinstance(saved, Mapping) else {})
    return str(options.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")


def loading_options(
    config: ModelConfig, *, compute_dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Arguments of from_pretrained for quantized weights, which are made on the device that they stay on."""
    # Under ZeRO 3 transformers takes no place for a model; it is the current device then.
    options: dict[str, Any] = {} if is_deepspeed_zero3_enabled() else {"device_map": {"": str(device)}}
    if config.quantization is not None:
        given = {"bnb_4bit_compute_dtype": compute_dtype, **config.quantization}
        options["quantization_config"] = BitsAndBytesConfig(**given)
    return options


def prepared(model: Any) -> Any:
    """The quantized model as gradients need it: frozen, and in fp32 what is not quantized."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs, an evaluation would rewrite the weights into a form without a backward pass, for good.
            module.support_avx512bf16_for_cpu = False
    model.register_state_dict_post_hook(_without_scales)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _without_scales(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out the scales that bitsandbytes adds for its weights: checkpoints hold neither."""
    own = {
        *dict(model.named_parameters(prefix.rstrip("."), remove_duplicate=False)),
        *dict(model.named_buffers(prefix.rstrip("."), remove_duplicate=False)),
    }
    for name in [name for name in state if name.startswith(prefix) and name not in own]:
        del state[name]
