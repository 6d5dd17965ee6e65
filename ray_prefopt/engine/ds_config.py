"""DeepSpeed's configuration as a function of ours."""

from collections.abc import Mapping
from typing import Any

from ray_prefopt.config import EngineConfig
from ray_prefopt.errors import ConfigError

OWNED = {
    "train_batch_size": "run.global_batch",
    "train_micro_batch_size_per_gpu": "run.micro_batch",
    "gradient_accumulation_steps": "run.global_batch and run.micro_batch",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.max_grad_norm",
    "fp16.enabled": "model.dtype",
    "bf16.enabled": "model.dtype",
    "zero_optimization.stage": "engine.zero_stage",
}
"""Keys of DeepSpeed's config that have a home elsewhere in ours."""


def build_ds_config(
    engine: EngineConfig, *, dtype: str, max_grad_norm: float, use_gpu: bool
) -> dict[str, Any]:
    """DeepSpeed's config for an engine section; `engine.deepspeed` is merged over it, key by key.

    Gradient accumulation is ours (`managed_gradient_accumulation: false`): `engine.step()` is the boundary, so that a
    step may hold any number of micro-batches. Raises ConfigError for a key that has a home elsewhere in the tree, and
    for fp16 on CPUs.
    """
    for name, home in OWNED.items():
        section, _, key = name.rpartition(".")
        given = engine.deepspeed.get(section) if section else engine.deepspeed
        if isinstance(given, Mapping) and key in given:
            raise ConfigError(f"engine.deepspeed.{name} is set by {home}: use that instead")
    if dtype == "float16" and engine.zero_stage and not use_gpu:
        raise ConfigError(
            "model.dtype float16 needs GPUs under ZeRO 1 to 3, which have none here: use bfloat16, or set run.use_gpu"
        )
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage >= 2 and use_gpu:  # stage 1 reduces once per step, when nothing is left to overlap
        zero["overlap_comm"] = True
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer, "pin_memory": use_gpu}
    if engine.offload_param != "none":
        zero["offload_param"] = {"device": engine.offload_param, "pin_memory": use_gpu}
    # Stage 0 has no fp32 copy of half-precision weights, and neither norm nor guard: weights stay in fp32 under
    # autocast, and clipping is the engine's.
    is_sharded = engine.zero_stage > 0
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "bf16": {"enabled": is_sharded and dtype == "bfloat16"},
        "fp16": {"enabled": is_sharded and dtype == "float16"},
        "torch_autocast": {"enabled": not is_sharded and dtype != "float32", "dtype": dtype},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": max_grad_norm if is_sharded else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merged(ours, engine.deepspeed)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_maps = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both_maps else value
    return merged
