"""Whether a model can take packed pairs, and with which head: what it is said to be, and a probe of what it does."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ray_prefopt.config import ModelConfig
from ray_prefopt.data.collate import collate, pack
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ModelError
from ray_prefopt.losses.head import Head
from ray_prefopt.model.adapters import base_of
from ray_prefopt.model.attention import NAME
from ray_prefopt.model.forward import ForwardFn, Scorer, can_restrict_logits, open_head
from ray_prefopt.model.hub import first_line
from ray_prefopt.model.last_layer import spare_unread
from ray_prefopt.model.onednn import add_product, linear

TOLERANCE = {torch.float32: 1e-3}
"""Nats per token by which two layouts may differ in rounding; 0.1 in half precision."""
POWER_OF_SCALING = {"hyperclovax": 1, "minicpm3": 0}
"""Of `logits_scaling` in what a head makes; others, as Granite, divide by it. MiniCPM3 divides what its head gets."""
PACKED_LAYERS = {"full_attention", "sliding_attention"}


def make_scorer(
    forward: ForwardFn, model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Scorer, str | None]:
    """What scores pairs with this model, and why it cannot take packed ones, if so; called by all ranks.

    `forward` is the model, or the engine that wraps it; `dtype` what it computes in. Raises ModelError when
    model.layout asks for packed pairs and the model cannot take them.
    """
    padded = Scorer(forward, restrict_logits=can_restrict_logits(model))
    if config.layout == "padded":
        return padded, "model.layout: padded"
    obstacle = obstacle_of(model, config)
    if obstacle is None:
        base = base_of(model)
        attention = base.config._attn_implementation
        base.set_attn_implementation(NAME)
        packed = Scorer(forward, is_packed=True)
        head = head_of(model)
        candidates = [packed]
        if head is not None:
            open_head(model, head)
            candidates.insert(0, replace(packed, head=head))
        if spare_unread(base):
            candidates = [replace(each, spares_unread=True) for each in candidates] + candidates
        for candidate in candidates:
            obstacle = _difference(candidate, padded, model, dtype, device)
            if obstacle is None:
                return candidate, None
        base.set_attn_implementation(attention)
    if config.layout == "packed":
        raise ModelError(
            f"model.layout: packed is not for this model: {obstacle}; leave it auto, or set it to padded"
        )
    return padded, obstacle


def obstacle_of(model: nn.Module, config: ModelConfig) -> str | None:
    """What is known to make packed pairs differ from padded ones, or None."""
    base = base_of(model)
    architecture = base.config
    text = architecture.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - PACKED_LAYERS
    obstacles = {
        "it is an encoder-decoder": architecture.is_encoder_decoder,
        "it does not restrict its logits": not can_restrict_logits(model),
        "it takes no position_ids": "position_ids" not in inspect.signature(base.forward).parameters,
        "its attention cannot be replaced": not base._supports_attention_backend,
        f"model.attn_implementation is {config.attn_implementation}": config.attn_implementation
        not in (None, "sdpa"),
        "it has a state that tokens pass on": base._is_stateful,
        f"it has layers of {', '.join(sorted(layers))}": bool(layers),
        "it caps its attention scores": getattr(text, "attn_logit_softcapping", None) is not None,
        "its dropout is on": any(isinstance(each, nn.Dropout) and each.p > 0 for each in model.modules())
        or bool(getattr(text, "attention_dropout", 0.0)),
        "its router is noisy": any(
            getattr(text, name, 0) for name in ("router_jitter_noise", "input_jitter_noise")
        ),
        "its router's loss counts tokens": bool(getattr(text, "output_router_logits", False)),
        "model.neftune_noise_alpha is on": bool(config.neftune_noise_alpha),
        "model.compile is on": config.compile is not None,
        "its adapter has tokens of its own": isinstance(model, PeftModel)
        and model.active_peft_config.is_prompt_learning,
    }
    return next((words for words, is_so in obstacles.items() if is_so), None)


def head_of(model: nn.Module) -> Head | None:
    """The head whose gradient can be had in one pass with its logits: a linear layer, under at most a scale and a cap.
    None where it is something else, or has a low-rank adapter."""
    base = base_of(model)
    module: Any = base.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.modules_to_save[module.active_adapters[0]]
    if type(module) is not nn.Linear:
        return None
    text = base.config.get_text_config()
    scaling = getattr(text, "logits_scaling", None) or 1.0
    scale = getattr(text, "logit_scale", None) or scaling ** POWER_OF_SCALING.get(text.model_type, -1)
    return Head(module, float(scale), getattr(text, "final_logit_softcapping", None), linear, add_product)


@torch.no_grad()
def _difference(
    packed: Scorer, padded: Scorer, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> str | None:
    """What is wrong with the packed log-probabilities of two pairs, if anything is."""
    pairs = _probe(base_of(model).config.get_text_config().vocab_size)
    try:
        found = packed.logps(pack(pairs).to(device))
    except Exception as error:  # whatever a model raises at a batch of another form
        return f"a packed batch fails: {first_line(error)}"
    expected = padded.logps(collate(pairs, pad_id=0).to(device))
    differences = torch.cat([found.chosen - expected.chosen, found.rejected - expected.rejected])
    worst = float((differences.abs() / torch.cat([expected.chosen_len, expected.rejected_len])).max())
    if worst <= TOLERANCE.get(dtype, 0.1):
        return None
    return f"its log-probabilities of packed pairs differ by {worst:.2g} nats per token"


def _probe(vocabulary: int) -> list[TokenizedPair]:
    ids = torch.randint(vocabulary, (5, 12), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, *answers = ids
    return [
        TokenizedPair(prompt[:7] + answers[0][:5], prompt[:7] + answers[1], 7, 7),
        TokenizedPair(prompt + answers[2], prompt + answers[3][:3], 12, 12),
    ]
