"""DeepSpeed's config for every setting of ours, and what may not be said there."""

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from ray_prefopt.config import EngineConfig
from ray_prefopt.engine.ds_config import OWNED, build_ds_config
from ray_prefopt.errors import ConfigError


def built(dtype: str = "bfloat16", use_gpu: bool = True, max_grad_norm: float = 0.5, **engine: Any) -> Any:
    return build_ds_config(EngineConfig(**engine), dtype=dtype, max_grad_norm=max_grad_norm, use_gpu=use_gpu)


def test_the_whole_config_of_stage_2() -> None:
    assert built() == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.5,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sharded_stages_train_in_the_dtype_and_clip_in_deepspeed(stage: int, dtype: str) -> None:
    config = built(dtype, zero_stage=stage)
    assert config["zero_optimization"]["stage"] == stage
    assert config["bf16"]["enabled"] == (dtype == "bfloat16")
    assert config["fp16"]["enabled"] == (dtype == "float16")
    assert not config["torch_autocast"]["enabled"]
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("use_gpu", [True, False])
def test_stage_0_is_autocast_over_fp32_and_clips_by_itself(dtype: str, use_gpu: bool) -> None:
    config = built(dtype, use_gpu, zero_stage=0)
    assert config["zero_optimization"] == {"stage": 0}
    assert not config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert config["torch_autocast"] == {"enabled": dtype != "float32", "dtype": dtype}
    assert config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("engine", "use_gpu", "expected"),
    [
        ({"zero_stage": 1}, False, {"stage": 1}),
        ({"zero_stage": 1}, True, {"stage": 1}),
        ({"zero_stage": 3}, True, {"stage": 3, "overlap_comm": True}),
        (
            {"zero_stage": 1, "offload_optimizer": "cpu"},
            True,
            {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        ),
        (
            {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
            False,
            {
                "stage": 3,
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
                "offload_param": {"device": "cpu", "pin_memory": False},
            },
        ),
    ],
)
def test_offloading_and_overlap(engine: dict[str, Any], use_gpu: bool, expected: dict[str, Any]) -> None:
    assert built(use_gpu=use_gpu, **engine)["zero_optimization"] == expected


def test_what_the_user_says_is_merged_key_by_key() -> None:
    given = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 5e8},
        "fp16": {"initial_scale_power": 10},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
        "data_types": "replaced",
    }
    plain, merged = built(zero_stage=1), built(zero_stage=1, deepspeed=given)
    assert merged == plain | {
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 5e8},
        "fp16": {"enabled": False, "initial_scale_power": 10},
        "wall_clock_breakdown": True,
        "steps_per_print": 5,
        "data_types": "replaced",
    }


def test_what_the_user_said_is_not_touched() -> None:
    given = {"zero_optimization": {"overlap_comm": False}}
    built(deepspeed=given)["zero_optimization"]["stage"] = 9
    assert given == {"zero_optimization": {"overlap_comm": False}}


@pytest.mark.parametrize("name", OWNED)
def test_a_key_with_another_home_is_refused(name: str) -> None:
    section, _, key = name.rpartition(".")
    given = {section: {key: 1}} if section else {key: 1}
    with pytest.raises(ConfigError) as caught:
        built(deepspeed=given)
    assert str(caught.value) == f"engine.deepspeed.{name} is set by {OWNED[name]}: use that instead"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_on_cpus_is_refused(stage: int) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^model\.dtype float16 needs GPUs under ZeRO 1 to 3, which have none here: "
        r"use bfloat16, or set run\.use_gpu$",
    ):
        built("float16", use_gpu=False, zero_stage=stage)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_reads_it_as_it_is_meant(stage: int) -> None:
    offload = {"offload_optimizer": "cpu"} if stage else {}
    read = DeepSpeedConfig(built(use_gpu=False, zero_stage=stage, **offload))
    assert read.zero_optimization_stage == stage
    assert read.bfloat16_config.enabled == (stage > 0)
    assert read.gradient_clipping == (0.5 if stage else 0.0)
    assert (read.zero_config.offload_optimizer is not None) == (stage > 0)
