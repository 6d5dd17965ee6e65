"""Every field of TRL's configs is honoured, ignored or refused, and what is refused says what to do instead."""

import dataclasses
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments
from trl.experimental.cpo import CPOConfig as TrlConfig

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.table import HONOURED, IGNORED, REFUSED, check
from ray_prefopt.errors import ConfigError
from tests.unit.test_compat_translate import CASES, WITH_THE_TRAINER

# Of the two documents: what both list, and what one of them lists alone.
SHARED = """
output_dir overwrite_output_dir do_train do_eval do_predict eval_strategy prediction_loss_only
per_device_train_batch_size per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size
gradient_accumulation_steps eval_accumulation_steps eval_delay torch_empty_cache_steps learning_rate
weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm num_train_epochs max_steps lr_scheduler_type
lr_scheduler_kwargs warmup_ratio warmup_steps log_level log_level_replica log_on_each_node logging_dir
logging_strategy logging_first_step logging_steps logging_nan_inf_filter save_strategy save_steps
save_total_limit save_safetensors save_on_each_node save_only_model restore_callback_states_from_checkpoint
no_cuda use_cpu use_mps_device seed data_seed jit_mode_eval use_ipex bf16 fp16 fp16_opt_level
half_precision_backend bf16_full_eval fp16_full_eval tf32 local_rank ddp_backend tpu_num_cores tpu_metrics_debug
debug dataloader_drop_last eval_steps dataloader_num_workers dataloader_prefetch_factor past_index run_name
disable_tqdm remove_unused_columns label_names load_best_model_at_end metric_for_best_model greater_is_better
ignore_data_skip fsdp fsdp_min_num_params fsdp_config fsdp_transformer_layer_cls_to_wrap accelerator_config
deepspeed label_smoothing_factor optim optim_args adafactor group_by_length length_column_name report_to
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers dataloader_pin_memory
dataloader_persistent_workers skip_memory_metrics use_legacy_prediction_loop push_to_hub resume_from_checkpoint
hub_model_id hub_strategy hub_token hub_private_repo hub_always_push gradient_checkpointing
gradient_checkpointing_kwargs include_inputs_for_metrics eval_do_concat_batches fp16_backend
push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters auto_find_batch_size
full_determinism torchdynamo ray_scope ddp_timeout torch_compile torch_compile_backend torch_compile_mode
include_tokens_per_second include_num_input_tokens_seen neftune_noise_alpha optim_target_modules
batch_eval_metrics eval_on_start eval_use_gather_object max_length max_prompt_length max_completion_length beta
label_smoothing loss_type disable_dropout label_pad_token_id padding_value truncation_mode generate_during_eval
is_encoder_decoder model_init_kwargs dataset_num_proc
"""
CPO_ONLY = """
hub_revision include_for_metrics use_liger_kernel liger_kernel_config average_tokens_across_devices cpo_alpha
simpo_gamma
"""
SIMPO_ONLY = """
evaluation_strategy dispatch_batches split_batches max_target_length gamma_beta_ratio sft_weight
"""


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_trl_and_of_the_documents_is_in_one_list() -> None:
    known = names(TrlConfig) | set(f"{SHARED} {CPO_ONLY} {SIMPO_ONLY}".split())
    assert HONOURED.keys() | IGNORED.keys() | REFUSED.keys() == known
    assert len(HONOURED) + len(IGNORED) + len(REFUSED) == len(known)


def test_the_configs_have_these_fields_and_no_others() -> None:
    assert names(CPOConfig) == names(TrlConfig) | set(f"{SHARED} {CPO_ONLY}".split())
    assert names(SimPOConfig) == names(TrainingArguments) | set(f"{SHARED} {SIMPO_ONLY}".split())


def test_everything_honoured_is_proved_and_nothing_else() -> None:
    assert CASES.keys() | WITH_THE_TRAINER == HONOURED.keys()


SET: dict[str, Any] = {
    "fsdp": "full_shard",
    "fsdp_config": {"min_num_params": 1},
    "fsdp_min_num_params": 1,
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "accelerator_config": {"split_batches": True},
    "dispatch_batches": True,
    "split_batches": True,
    "parallelism_config": SimpleNamespace(tp_size=2),
    "fp16_opt_level": "O2",
    "half_precision_backend": "apex",
    "fp16_backend": "apex",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_mps_device": True,
    "use_ipex": True,
    "tpu_num_cores": 8,
    "tpu_metrics_debug": True,
    "mp_parameters": "microbatches=2",
    "jit_mode_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": "attn",
    "label_smoothing_factor": 0.1,
    "ignore_data_skip": True,
    "save_safetensors": False,
    "enable_jit_checkpoint": True,
    "skip_memory_metrics": False,
    "debug": "underflow_overflow",
    "eval_do_concat_batches": False,
    "batch_eval_metrics": True,
    "past_index": 0,
    "ray_scope": "all",
    "use_legacy_prediction_loop": True,
}


def test_every_refused_field_is_tried() -> None:
    assert SET.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [CPOConfig, SimPOConfig])
def test_a_refused_field_says_what_to_do_instead(kind: type[CPOConfig | SimPOConfig], name: str) -> None:
    if name not in names(kind):
        pytest.skip("the other config has it")
    args = kind(**{name: SET[name]})
    with pytest.raises(ConfigError) as caught:
        check(args)
    lines = str(caught.value).splitlines()
    shown = (
        "" if name in ("accelerator_config", "debug", "include_num_input_tokens_seen") else repr(SET[name])
    )
    (line,) = [
        line for line in lines if line.startswith(f"{kind.__name__}.{name} cannot be honoured; got {shown}")
    ]
    assert line.endswith(f": {REFUSED[name]}")
    assert len(lines) == 1


@pytest.mark.parametrize("kind", [CPOConfig, SimPOConfig])
def test_defaults_and_what_asks_for_nothing_pass(kind: type[CPOConfig | SimPOConfig]) -> None:
    check(kind())
    check(kind(fsdp="", is_encoder_decoder=False, label_names=[], tf32=False, debug="", report_to="none"))


@pytest.mark.parametrize("name", IGNORED)
def test_an_ignored_field_passes(name: str) -> None:
    args = CPOConfig()
    setattr(args, name, "anything")
    check(args)


def test_a_field_set_after_construction_is_seen() -> None:
    args = CPOConfig()
    args.use_liger_kernel = True
    with pytest.raises(
        ConfigError, match=r"^CPOConfig.use_liger_kernel cannot be honoured; got True: leave it out"
    ):
        check(args)


def test_fields_of_a_newer_transformers_are_refused_when_they_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {name: text for name, text in REFUSED.items() if name != "use_liger_kernel"}
    monkeypatch.setattr("ray_prefopt.compat.table.REFUSED", known)
    check(CPOConfig())
    with pytest.raises(ConfigError) as caught:
        check(CPOConfig(use_liger_kernel=True))
    assert str(caught.value) == (
        "CPOConfig.use_liger_kernel cannot be honoured; got True: "
        "leave it out: this version of ray_prefopt does not know it"
    )


def test_fields_of_a_subclass_are_its_own() -> None:
    @dataclasses.dataclass
    class Mine(SimPOConfig):
        mine: int = 3

    check(Mine(mine=4))


def test_the_page_of_all_fields_is_up_to_date() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "migrating_page.py"
    spec = importlib.util.spec_from_file_location("migrating_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run `python docs/migrating_page.py`"
    for count, title in ((len(HONOURED), "Honoured"), (len(IGNORED), "Ignored"), (len(REFUSED), "Refused")):
        rows = module.page().partition(f"## {title}\n")[2].partition("\n## ")[0].count("\n| `")
        assert rows == count
        assert f"{count} are {title.lower()}" in module.page()
