"""Build the model that is trained: from a folder, a hub id, or an architecture; with adapters when asked for."""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.integrations.neftune import activate_neftune
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from ray_prefopt.config import ModelConfig
from ray_prefopt.errors import ModelError, suggest
from ray_prefopt.model.adapters import ADAPTER_FILE, attach_lora, attach_saved, read_adapter
from ray_prefopt.model.hub import first_line, why_missing, why_not_loaded, without_bars
from ray_prefopt.model.lean import keep_less
from ray_prefopt.model.onednn import use_onednn
from ray_prefopt.model.quantization import check_quantization, is_quantized, loading_options, prepared

CPU = torch.device("cpu")


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """The transformers config of the model: no weights, seconds at most.

    Raises ModelError when it does not exist, is gated, needs remote code that is not trusted, is neither a causal
    language model nor an encoder-decoder that says how its decoder starts, or has no weights that can be trained; also
    for an adapter that is none.
    """
    architecture = _built(config) if config.from_config is not None else _read(config)
    is_split = architecture.is_encoder_decoder
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if is_split else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(architecture) not in known and not config.trust_remote_code:
        raise ModelError(
            f"model {config.path or config.from_config}: {architecture.model_type} is not a language model of "
            f"transformers; use one that {model_class(architecture).__name__} loads"
        )
    if is_split and decoder_start_id(architecture) is None:
        raise ModelError(
            f"model {config.path or config.from_config}: {architecture.model_type} does not say how its decoder "
            "starts; set decoder_start_token_id in its config (for T5, the id of the pad token)"
        )
    if is_split and getattr(architecture, "output_router_logits", False):
        raise ModelError(
            f"model {config.path or config.from_config}: {architecture.model_type} does not tell the loss of its "
            "router apart; set output_router_logits to false (model.overrides), and train without it"
        )
    if config.disable_dropout:
        _disable_dropout(architecture)
    check_quantization(config, architecture)
    if config.adapter is not None:
        read_adapter(config.adapter)
    return architecture


def _disable_dropout(architecture: PretrainedConfig) -> None:
    """Also that of the configs inside."""
    for name, value in vars(architecture).items():
        if "drop" in name and isinstance(value, float):
            setattr(architecture, name, 0.0)
        elif isinstance(value, PretrainedConfig):
            _disable_dropout(value)


def model_class(architecture: PretrainedConfig) -> Any:
    """The auto class of transformers that builds models of this architecture."""
    return AutoModelForSeq2SeqLM if architecture.is_encoder_decoder else AutoModelForCausalLM


def decoder_start_id(architecture: PretrainedConfig) -> int | None:
    """The token that an encoder-decoder's decoder reads first, as `generate` finds it; None for decoders alone."""
    if not architecture.is_encoder_decoder:
        return None
    start: int | None = getattr(architecture, "decoder_start_token_id", None)
    decoder = getattr(architecture, "decoder", None)
    return getattr(decoder, "bos_token_id", None) if start is None else start


def _built(config: ModelConfig) -> PretrainedConfig:
    options = dict(config.from_config or {})
    model_type = options.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"model.from_config: model_type {model_type!r} is not one of transformers'."
            f"{suggest(str(model_type), CONFIG_MAPPING)}"
        )
    kind = CONFIG_MAPPING[model_type]
    known = _settings(kind())
    for key in (
        options.keys() - known
    ):  # transformers keeps whatever it is given; some has a meaning, though unlisted
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise ModelError(
                f"model.from_config: {key!r} is not a setting of {model_type}. Did you mean {near[0]}?"
            )
    try:
        return AutoConfig.for_model(model_type, **options)
    except Exception as error:
        raise ModelError(f"model.from_config ({model_type}): {first_line(error)}") from error


def _settings(architecture: PretrainedConfig) -> set[str]:
    return {*architecture.to_dict(), *architecture.attribute_map}


def _read(config: ModelConfig) -> PretrainedConfig:
    path = str(config.path)
    if missing := why_missing(path, config.revision, "config.json"):
        raise ModelError(f"model {path}: {missing}")
    if Path(path, ADAPTER_FILE).exists() and not Path(path, "config.json").exists():
        raise ModelError(
            f"model {path}: it is an adapter; set model.adapter to it, and model.path to its base"
        )
    try:
        architecture = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"model {path}: {why_not_loaded(path, error)}") from error
    known = _settings(architecture)
    for key in config.overrides.keys() - known:
        raise ModelError(
            f"model.overrides: {key!r} is not a setting of {path} ({architecture.model_type}).{suggest(key, known)}"
        )
    try:
        architecture.update(config.overrides)
    except Exception as error:  # what the config's own validation raises
        raise ModelError(f"model.overrides: {first_line(error)}") from error
    return architecture


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


def load_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    device: torch.device = CPU,
    dequantize: bool = False,
    blank: bool = False,
) -> nn.Module:
    """The model with weights in `dtype`, adapters attached, ready to be given to an engine.

    Under `engine.zero.sharded_construction` each rank gets its shards alone. `seed` is that of random weights and
    adapters, so that all ranks and all engines start from the same. Quantized weights, which cannot be moved later, are
    made on `device`; `dequantize` gives them back the precision of `dtype`, as rounded as they are. `blank` reads all
    but the weights, since others are about to take their place. Raises ModelError when the model cannot be built whole.
    """
    architecture = load_architecture(config)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attn_implementation}
    quantized = is_quantized(config, architecture)
    if quantized:
        precision = compute_dtype(config, architecture)
        options |= loading_options(config, compute_dtype=precision, device=device)
    torch.manual_seed(seed)
    if config.from_config is not None or blank:
        model = _random(config, architecture, options)
        model.generation_config = _generation_config(config) or model.generation_config
    else:
        model = _pretrained(config, architecture, options)
    if quantized:
        model = model.dequantize(dtype) if dequantize else prepared(model)
    if config.compile is None:  # which does the same, and more
        if device.type == "cpu":
            use_onednn(model)
        keep_less(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.lora is not None:
        model = attach_lora(model, config.lora, seed=seed)
    if config.adapter is not None:
        model = attach_saved(model, config.adapter)
    if config.neftune_noise_alpha is not None:
        activate_neftune(model, config.neftune_noise_alpha)
    if config.compile is not None:  # in place, so that no name changes
        model.compile(backend=config.compile.backend, mode=config.compile.mode)
    return model.train()


def _random(config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any]) -> Any:
    try:
        kind = model_class(architecture)
        return kind.from_config(architecture, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:
        raise ModelError(f"model.from_config ({architecture.model_type}): {first_line(error)}") from error


def _generation_config(config: ModelConfig) -> GenerationConfig | None:
    """The saved settings of `generate`, if there are any that transformers would save again."""
    if config.path is None:
        return None
    try:
        found = GenerationConfig.from_pretrained(config.path, revision=config.revision or "main")
        found.validate(strict=True)
    except (OSError, ValueError):
        return None
    return found


def _pretrained(config: ModelConfig, architecture: PretrainedConfig, options: dict[str, Any]) -> Any:
    path = str(config.path)
    try:
        found: Any = model_class(architecture).from_pretrained(
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


def save_model(model: Any, folder: Path) -> None:
    """Write the model, or its adapters alone, as a Hugging Face folder."""
    with without_bars():
        model.save_pretrained(folder)
