"""What becomes of every field of TRL's configs: honoured, ignored with a reason, or refused with what to use instead.

`compat.translate` does what HONOURED says; the page docs/migrating-from-trl.md is written from here.
"""

from dataclasses import fields
from functools import cache
from typing import Any

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.errors import ConfigError

HONOURED = {
    # the run
    "output_dir": "`run.storage_path`; the run is the folder `run_name` in it, prepared pairs lie in `blocks`",
    "run_name": "`run.name`; `run` when not given",
    "resume_from_checkpoint": "where `train()` goes on when it is not told otherwise",
    "push_to_hub": "the driver pushes checkpoints while training goes on, and the model at the end, each with its card",
    "hub_model_id": "where to push to; the name of `output_dir` when not given",
    "hub_strategy": "`end` pushes the model alone; `every_save` also that of each checkpoint; `checkpoint` also the "
    "newest checkpoint, as `last-checkpoint`; `all_checkpoints` all of them, in `checkpoints`",
    "hub_always_push": "push a checkpoint that is saved during another push too",
    "hub_token": "with what to push",
    "hub_private_repo": "whether a repository that is made is private",
    "hub_revision": "the branch to push to",
    "push_to_hub_model_id": "as `hub_model_id`",
    "push_to_hub_organization": "the organization of `hub_model_id`",
    "push_to_hub_token": "as `hub_token`",
    "seed": "`run.seed`: order of the pairs, new weights, dropout",
    "data_seed": "`data.seed`: order of the pairs",
    "use_cpu": "`run.use_gpu: false`",
    "no_cuda": "as `use_cpu`",
    # batches and steps
    "per_device_train_batch_size": "`run.micro_batch`",
    "per_gpu_train_batch_size": "when given, instead of `per_device_train_batch_size`",
    "per_device_eval_batch_size": "`run.eval_micro_batch`",
    "per_gpu_eval_batch_size": "when given, instead of `per_device_eval_batch_size`",
    "auto_find_batch_size": "`run.auto_find_batch_size`: micro-batches become smaller, steps stay as they are",
    "gradient_accumulation_steps": "`run.global_batch` = batch size x accumulation steps x workers",
    "num_train_epochs": "`run.epochs`, fractions too",
    "max_steps": "`run.max_steps`; -1 leaves it to `num_train_epochs`",
    "train_sampling_strategy": "`sequential` is `data.shuffle: false`; `group_by_length` is `data.group_by_length`; "
    "`random` and `batch_rebalance` are what is done anyway, since shuffled pairs are dealt out by length",
    "group_by_length": "`data.group_by_length`",
    "dataloader_drop_last": "`run.drop_last`: the smaller last step of an epoch; evaluations measure every pair",
    # optimizer
    "learning_rate": "`optim.learning_rate`",
    "optim": "`optim.name`",
    "optim_args": "`optim.args`",
    "adafactor": "`optim.name: adafactor`",
    "adam_beta1": "`optim.betas`, the first",
    "adam_beta2": "`optim.betas`, the second",
    "adam_epsilon": "`optim.eps`",
    "weight_decay": "`optim.weight_decay`",
    "max_grad_norm": "`optim.max_grad_norm`",
    "lr_scheduler_type": "`optim.schedule`",
    "lr_scheduler_kwargs": "`optim.schedule_args`",
    "warmup_steps": "`optim.warmup_steps`; below 1 `optim.warmup_ratio`",
    "warmup_ratio": "`optim.warmup_ratio`, unless `warmup_steps` is given",
    # model
    "bf16": "`model.dtype: bfloat16`; without `bf16` and `fp16`, the `dtype` of `model_init_kwargs`, or `auto`",
    "fp16": "`model.dtype: float16`",
    "activation_checkpointing": "`model.gradient_checkpointing`",
    "activation_checkpointing_kwargs": "`use_reentrant: false`, which is what is done; others are refused",
    "gradient_checkpointing": "`model.gradient_checkpointing`",
    "gradient_checkpointing_kwargs": "as `activation_checkpointing_kwargs`",
    "disable_dropout": "`model.disable_dropout`",
    "is_encoder_decoder": "the model knows it; refused when it says otherwise",
    "model_init_kwargs": "`dtype`, `attn_implementation`, `revision`, `trust_remote_code` are fields of `model`; "
    "`quantization_config`, `load_in_4bit` and `load_in_8bit` are `model.quantization`; `device_map`, "
    "`low_cpu_mem_usage` and `use_cache` have no effect, since workers place the model; others are `model.overrides`, "
    "such as `output_router_logits`, and refused when the model has no such setting",
    "neftune_noise_alpha": "`model.neftune_noise_alpha`",
    "torch_compile": "`model.compile`; TF32 is left to `tf32`",
    "torch_compile_backend": "`model.compile.backend`",
    "torch_compile_mode": "`model.compile.mode`",
    "torchdynamo": "as `torch_compile_backend`",
    "tf32": "`model.float32_matmul_precision`: `high` allows TF32, `highest` does not",
    "full_determinism": "`run.full_determinism`",
    "trust_remote_code": "`model.trust_remote_code`",
    "deepspeed": "dict or JSON file: stage and CPU offload are fields of `engine`, the rest is `engine.deepspeed`; "
    "`auto` stands for what is derived here anyway; values that contradict the other arguments are refused",
    # lengths
    "max_length": "`data.max_length`; None is 512",
    "max_prompt_length": "`data.max_prompt_length`; None is 128 in `SimPOConfig`; a default that is not below "
    "`max_length` is left out",
    "max_completion_length": "`data.max_completion_length`, of decoders too; None is 128 for encoder-decoders",
    "max_target_length": "as `max_completion_length`",
    "truncation_mode": "`data.truncation_mode`",
    # loss
    "loss_type": "`loss.kind` and `loss.link`: `sigmoid` and `hinge` are `cpo` in `CPOConfig` and `simpo` in "
    "`SimPOConfig`; `ipo` is `ipo`; `simpo` is `cpo_simpo`, or `simpo` when `cpo_alpha` is 0; `alphapo` is `simpo`",
    "beta": "`loss.beta`",
    "cpo_alpha": "`loss.cpo_alpha`, averaged over micro-batches as in TRL (`loss.nll_average`)",
    "sft_weight": "`loss.cpo_alpha`, averaged over micro-batches (`loss.nll_average`)",
    "simpo_gamma": "`loss.gamma_beta_ratio` = `simpo_gamma` / `beta`",
    "gamma_beta_ratio": "`loss.gamma_beta_ratio`",
    "alpha": "`loss.alpha`; refused with `sigmoid` and `hinge`, where it overflows in TRL",
    "label_smoothing": "`loss.label_smoothing`; refused with `hinge` and `ipo`, where TRL leaves it out",
    "ddp_timeout": "`run.collective_timeout_s`",
    # logging, evaluation, checkpoints
    "logging_strategy": "`run.log_steps`: `epoch` at the end of each epoch, `no` after the last step alone",
    "logging_steps": "`run.log_steps`; below 1, a share of all steps",
    "logging_first_step": "`run.log_first_step`",
    "include_tokens_per_second": "`tokens_per_second` is in every line of the log",
    "include_num_input_tokens_seen": "`num_input_tokens_seen` is in every line of the log: tokens of the pairs of all "
    "workers, without padding, which is hardly any here",
    "report_to": "`run.report_to`: wandb, mlflow, trackio, ...; TensorBoard events are always written",
    "eval_strategy": "`run.eval_steps`, and once more at the end; `no` without `eval_on_start` leaves out `data.eval`",
    "evaluation_strategy": "as `eval_strategy`",
    "eval_steps": "`run.eval_steps`; below 1, a share of all steps",
    "eval_on_start": "`run.eval_on_start`",
    "include_for_metrics": "`compute_metrics` also gets `inputs` (ids of prompt and chosen completion) and `losses`",
    "generate_during_eval": "`run.eval_samples` = evaluation batch size: completions without their prompt, in "
    "samples.jsonl, and as a table in W&B",
    "include_inputs_for_metrics": "as `include_for_metrics` with `inputs`",
    "prediction_loss_only": "`compute_metrics` is not called",
    "restore_callback_states_from_checkpoint": "callbacks that keep a state always go on with it",
    "eval_delay": "`run.eval_delay`",
    "save_strategy": "`run.save_steps`, and once more at the end; `best` saves after each evaluation, and keeps the "
    "best and the newest",
    "save_steps": "`run.save_steps`; below 1, a share of all steps",
    "save_only_model": "`run.save_only_model`",
    "save_total_limit": "`run.keep_checkpoints`, besides the best one; None keeps all",
    "load_best_model_at_end": "`run.best_metric` is `eval_loss` unless `metric_for_best_model` says otherwise",
    "metric_for_best_model": "`run.best_metric`, with `eval_` in front",
    "greater_is_better": "`run.best_mode`: `max` or `min`",
}  # fmt: skip
"""Field: the fields of ours that it becomes."""

_SCRIPTS = "scripts read it, no trainer does"
_TRACKIO = (
    "only Trackio has a use for it; with `report_to='trackio'` it is refused: only the run's name is told"
)
OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
"""Ignored without it, and refused with it."""
_LOADER = "prepared pairs are read ahead of the step; there are no loader processes"
_DDP = "gradients are reduced by DeepSpeed, not by torch's DistributedDataParallel"

IGNORED = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), _SCRIPTS),
    "overwrite_output_dir": "`train()` moves an older run aside, unless it is to resume it",
    "local_rank": "Ray Train gives the workers their ranks",
    "ddp_backend": "Ray Train makes the process group: nccl on GPUs, gloo on CPUs",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), _DDP
    ),
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory",
         "dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order"),
        _LOADER,
    ),
    "dataset_num_proc": "Ray Data tokenizes on all CPUs of the cluster",
    "remove_unused_columns": "only the columns of the pair are read",
    "length_column_name": "lengths are counted when the pairs are tokenized",
    "label_pad_token_id": "no label stands for padding: positions are scored by where the completion begins",
    "padding_value": "padding is masked, so its id changes nothing",
    "use_cache": "training keeps no cache",
    "average_tokens_across_devices": "losses are divided by the pairs of the whole step on all workers",
    "logging_dir": "TensorBoard events are in the folder `tensorboard` of the run, where a resumed run goes on",
    "label_names": "what is scored follows from the pair, in TRL's trainer too",
    "logging_nan_inf_filter": "a loss or gradient that is not finite stops the run",
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node"),
                    "a run has one log, that of worker 0; Python's `logging` sets the level of messages"),
    "disable_tqdm": "progress is shown on terminals alone",
    "eval_accumulation_steps": "predictions are two numbers for each pair",
    "eval_use_gather_object": "predictions are two numbers for each pair",
    "save_on_each_node": "checkpoints lie on storage that all nodes see",
    "torch_empty_cache_steps": "it changes no result; against fragmentation there is PYTORCH_CUDA_ALLOC_CONF",
    **dict.fromkeys(OF_TRACKIO, _TRACKIO),
}  # fmt: skip
"""Field: why nothing is lost without it."""

_FSDP = 'shard with DeepSpeed: deepspeed={"zero_optimization": {"stage": 3}}'
_HALF = "leave it out: half precision is torch's and DeepSpeed's"
_APPLE = "workers run on CPUs and NVIDIA GPUs: leave it out"
_TPU = "workers run on CPUs and NVIDIA GPUs: leave it out"
_ACCELERATE = "leave it out: Ray Train deals the data out to the workers, not accelerate"
_PREDICTIONS = "leave it out: compute_metrics gets each evaluation set as a whole"
_LIGER = (
    "leave it out: its kernels need Triton and a GPU, and log-probabilities are computed in chunks already"
)

REFUSED = {
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"), _FSDP),
    **dict.fromkeys(("accelerator_config", "dispatch_batches", "split_batches"), _ACCELERATE),
    "parallelism_config": "set the number of workers; long sequences want gradient_checkpointing",
    **dict.fromkeys(("fp16_opt_level", "half_precision_backend", "fp16_backend"), _HALF),
    "bf16_full_eval": "set bf16: evaluations have the precision of training",
    "fp16_full_eval": "set fp16: evaluations have the precision of training",
    "use_mps_device": _APPLE,
    "use_ipex": _APPLE,
    "tpu_num_cores": _TPU,
    "tpu_metrics_debug": _TPU,
    "mp_parameters": "leave it out: Ray starts the workers, not SageMaker",
    "jit_mode_eval": "use torch_compile",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "optim_target_modules": "use an optimizer over all parameters, or LoRA through peft_config",
    "label_smoothing_factor": "use label_smoothing, that of the preference loss",
    "ignore_data_skip": "leave it out: a resumed run goes on with the pairs that come next",
    "save_safetensors": "leave it out: models are written as safetensors",
    "enable_jit_checkpoint": "use save_steps: a run that was stopped goes on after its newest checkpoint",
    "skip_memory_metrics": "leave it out: Ray's dashboard shows memory",
    "debug": "leave it out: a value that is not finite stops the run with step, rank and pairs",
    "eval_do_concat_batches": _PREDICTIONS,
    "batch_eval_metrics": _PREDICTIONS,
    "past_index": "leave it out: models with a state of their own cannot be trained",
    "ray_scope": "leave it out: trials are ranked by their last evaluation",
    "use_legacy_prediction_loop": "leave it out: there is one evaluation loop",
}  # fmt: skip
"""Field: what to do instead. Refused when it asks for something, that is when it differs from its default."""


def check(args: CPOConfig | SimPOConfig) -> None:
    """Raises ConfigError when a field is set that is refused, or that a newer transformers has and we do not know."""
    kind = CPOConfig if isinstance(args, CPOConfig) else SimPOConfig
    problems = []
    for field in fields(kind):
        value, default = getattr(args, field.name), _defaults(kind)[field.name]
        if field.name in HONOURED or field.name in IGNORED or value == default or _is_off(value, default):
            continue
        instead = REFUSED.get(field.name, "leave it out: this version of ray_prefopt does not know it")
        problems.append(f"{kind.__name__}.{field.name} cannot be honoured; got {value!r}: {instead}")
    if problems:
        raise ConfigError("\n".join(problems))


@cache
def _defaults(kind: type[CPOConfig | SimPOConfig]) -> dict[str, Any]:
    """What the fields are when nothing is set, after transformers has had its way with them."""
    unset = kind(output_dir="unused")
    return {field.name: getattr(unset, field.name) for field in fields(kind)}


def _is_off(value: Any, default: Any) -> bool:
    """Whether both ask for nothing: None, False, "" and empty collections."""
    return all(item is None or item is False or item in ("", [], {}) for item in (value, default))
