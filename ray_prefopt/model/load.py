"""Build the model that is trained: from a folder, a hub id, or an architecture; with adapters when asked for."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from ray_prefopt.config import LoraConfig, ModelConfig
from ray_prefopt.errors import ModelError, suggest
from ray_prefopt.model.hub import first_line, why_missing, why_not_loaded


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """The transformers config of the model: no weights, seconds at most.

    Raises ModelError when it does not exist, is gated, needs remote code that is not trusted, or is no causal model.
    """
    architecture = _built(config) if config.from_config is not None else _read(config)
    if type(architecture) not in MODEL_FOR_CAUSAL_LM_MAPPING and not config.trust_remote_code:
        raise ModelError(
            f"model {config.path or config.from_config}: {architecture.model_type} is not a causal language model of "
            "transformers; use one that AutoModelForCausalLM loads"
        )
    if config.disable_dropout:
        for name, value in architecture.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(architecture, name, 0.0)
    return architecture


def _built(config: ModelConfig) -> PretrainedConfig:
    options = dict(config.from_config or {})
    model_type = options.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model.from_config: model_type {model_type!r} is not one of transformers'."
            f"{suggest(str(model_type), CONFIG_MAPPING)}"
        )
    kind = CONFIG_MAPPING[model_type]
    known = {*kind().to_dict(), *kind.attribute_map}
    for key in (
        options.keys() - known
    ):  # transformers keeps whatever it is given; some unlisted keys have a meaning
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise ModelError(
                f"model.from_config: {key!r} is not a setting of {model_type}. Did you mean {near[0]}?"
            )
    try:
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:
        raise ModelError(f"model.from_config ({model_type}): {first_line(error)}") from error


def _read(config: ModelConfig) -> PretrainedConfig:
    path = str(config.path)
    if missing := why_missing(path, config.revision, "config.json"):
        raise ModelError(f"model {path}: {missing}")
    try:
        return AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"model {path}: {why_not_loaded(path, error)}") from error


def check_tokenizer(architecture: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError when the tokenizer has ids that the model has no embedding for."""
    vocabulary = architecture.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {vocabulary}: "
            "use the tokenizer that belongs to the model (model.tokenizer), or resize the model's embeddings first"
        )


def compute_dtype(config: ModelConfig, architecture: PretrainedConfig) -> torch.dtype:
    """Precision of forward and backward; `auto` is that of the saved weights, fp32 when they do not say."""
    saved = architecture.dtype or torch.float32
    dtype = saved if config.dtype == "auto" else getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def load_model(config: ModelConfig, *, dtype: torch.dtype, seed: int) -> nn.Module:
    """The model with weights in `dtype`, adapters attached, ready to be given to an engine.

    Under `engine.zero.sharded_construction` each rank gets its shards alone. `seed` is that of random weights and
    adapters, so that all ranks and all engines start from the same. Raises ModelError when it cannot be built whole.
    """
    architecture = load_architecture(config)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    torch.manual_seed(seed)
    if config.from_config is not None:
        model = _random(architecture, options)
    else:
        model = _pretrained(config, architecture, options)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        model = attach_lora(model, config.lora, seed=seed)
    return model.train()


def _random(architecture: PretrainedConfig, options: dict[str, Any]) -> Any:
    try:
        return AutoModelForCausalLM.from_config(architecture, **options)
    except Exception as error:
        raise ModelError(f"model.from_config ({architecture.model_type}): {first_line(error)}") from error


def _pretrained(config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any]) -> Any:
    path = str(config.path)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=architecture,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever transformers and safetensors raise, and the repository's code
        raise ModelError(f"model {path}: {why_not_loaded(path, error)}") from error
    model, report = found
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and leaves them random
        raise ModelError(
            f"model {path}: its files hold no weights for {', '.join(missing[:3])} ({len(missing)} in all); "
            "they are incomplete, or of a model without a language modelling head"
        )
    return model


def attach_lora(model: nn.Module, lora: LoraConfig, *, seed: int) -> nn.Module:
    """The model with low-rank adapters, everything else frozen. Raises ModelError when no module matches."""
    torch.manual_seed(seed)
    try:
        # Adapters in the model's own precision: ZeRO refuses a mix.
        return get_peft_model(
            model, PeftLoraConfig(task_type="CAUSAL_LM", **lora.model_dump()), autocast_adapter_dtype=False
        )
    except ValueError as error:
        raise ModelError(f"model.lora: {first_line(error)}") from error


def merged(model: nn.Module) -> nn.Module:
    """The model with its low-rank adapters merged into the weights they adapt."""
    assert isinstance(model, PeftModel)
    whole = model.merge_and_unload()
    assert isinstance(whole, nn.Module)
    return whole


def save_model(model: Any, folder: Path) -> None:
    """Write the model, or its adapters alone, as a Hugging Face folder."""
    with without_bars():
        model.save_pretrained(folder)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
