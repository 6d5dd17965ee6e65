"""From TRL's flat arguments to the config tree, as `compat.table.HONOURED` says."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.table import OF_TRACKIO, check
from ray_prefopt.config import LoraConfig, TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.settings import load_config, parse_scalar

ALL_CHECKPOINTS = 1_000_000
"""`run.keep_checkpoints` of a run that deletes none."""

Args = CPOConfig | SimPOConfig


def to_train_config(
    args: Args,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    num_workers: int | tuple[int, int],
    use_gpu: bool,
    peft_config: Any = None,
    cluster: Mapping[str, Any] = MappingProxyType({}),
    is_encoder_decoder: bool | None = None,
) -> TrainConfig:
    """The config of the run that the arguments describe.

    `model` and `data` are the values of those sections that a trainer is given by itself: path, tokenizer, train, eval
    (None: there is nothing to evaluate on; left out: that is not known yet). `cluster` are further values of `run`.
    `is_encoder_decoder` says what the model is, once it is known.
    Reads nothing but the JSON file that `args.deepspeed` may name. Raises ConfigError for what cannot be honoured.
    """
    if not isinstance(args, CPOConfig | SimPOConfig):
        raise ConfigError(
            f"args must be a CPOConfig or SimPOConfig of ray_prefopt; got {type(args).__name__}: change its import"
        )
    check(args)
    if is_encoder_decoder is not None and args.is_encoder_decoder not in (None, is_encoder_decoder):
        kind = "an encoder-decoder" if is_encoder_decoder else "a decoder alone"
        raise _refusal(args, "is_encoder_decoder", f"the model is {kind}; leave it out")
    if peft_config is not None and model.get("adapter") is not None:
        raise ConfigError(
            "peft_config: the model is a PeftModel already; leave peft_config out to go on training its adapter, or "
            "give what merge_and_unload() makes of it"
        )
    lora = None if peft_config is None else _lora(peft_config, is_encoder_decoder=is_encoder_decoder)
    evaluates = _evaluates(args, data)
    return load_config(
        base={
            "model": {**_model(args), **({"lora": lora} if lora else {}), **model},
            "data": {
                **_data(args, is_encoder_decoder=bool(is_encoder_decoder)),
                **data,
                **({} if evaluates else {"eval": None}),
            },
            "loss": _cpo_loss(args) if isinstance(args, CPOConfig) else _simpo_loss(args),
            "optim": _optim(args),
            "engine": _engine(args, num_workers),
            "run": {
                **_run(args, evaluates=evaluates),
                "num_workers": num_workers,
                "use_gpu": use_gpu and not (args.use_cpu or args.no_cuda),
                "global_batch": _global_batch(args, num_workers),
                **cluster,
            },
        }
    )


def _refusal(args: Args, name: str, advice: str) -> ConfigError:
    """What is wrong with the value of a field that is honoured otherwise."""
    return ConfigError(
        f"{type(args).__name__}.{name} cannot be honoured; got {getattr(args, name)!r}: {advice}"
    )


def _text(value: Any) -> str:
    """A member of an enumeration of transformers, or what a script has put in its place."""
    return str(getattr(value, "value", value))


# --- model and data ---


def _model(args: Args) -> dict[str, Any]:
    if args.bf16 and args.fp16:
        raise _refusal(args, "fp16", "bf16 is set too, leave one of them out")
    if args.gradient_checkpointing != args.activation_checkpointing:
        raise _refusal(
            args, "gradient_checkpointing", f"activation_checkpointing is {args.activation_checkpointing!r}"
        )
    if (args.activation_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
        raise _refusal(args, "activation_checkpointing_kwargs", "only {'use_reentrant': False} can be")
    given = args.model_init_kwargs or {}
    if not isinstance(given, Mapping):
        raise _refusal(args, "model_init_kwargs", "it must be a mapping, or JSON of one")
    options = {name: value for name, value in given.items() if value is not None and name not in _PLACEMENT}
    saved_dtype = options.pop("torch_dtype", "auto")
    dtype = str(options.pop("dtype", saved_dtype)).removeprefix("torch.")
    quantization = _quantization(args, options)
    own = {name: options.pop(name) for name in _OWN & options.keys()}
    for name, value in options.items():
        if not isinstance(value, str | int | float | list | dict):
            raise _refusal(args, "model_init_kwargs", f"leave out {name}: {type(value).__name__} is no JSON")
    trusts = {"trust_remote_code": True} if getattr(args, "trust_remote_code", False) else {}
    backend = args.torchdynamo or args.torch_compile_backend or "inductor"
    is_compiled = args.torch_compile or args.torchdynamo is not None
    return {
        "dtype": "bfloat16" if args.bf16 else "float16" if args.fp16 else dtype,
        "gradient_checkpointing": bool(args.gradient_checkpointing),
        "disable_dropout": args.disable_dropout,
        "neftune_noise_alpha": args.neftune_noise_alpha or None,
        "float32_matmul_precision": "high" if args.tf32 else "highest",
        "compile": {"backend": backend, "mode": args.torch_compile_mode} if is_compiled else None,
        "quantization": quantization,
        "overrides": options,
        **trusts,
        **own,
    }


_PLACEMENT = {"use_cache", "device_map", "low_cpu_mem_usage"}
"""Arguments of from_pretrained that workers have their own way with."""
_OWN = {"attn_implementation", "revision", "trust_remote_code"}


def _quantization(args: Args, options: dict[str, Any]) -> dict[str, Any] | None:
    """Takes what quantizes a model out of the arguments of from_pretrained."""
    given = options.pop("quantization_config", None)
    bits = {name: options.pop(name, False) for name in ("load_in_4bit", "load_in_8bit")}
    if given is None:
        return bits if any(bits.values()) else None
    values = given if isinstance(given, Mapping) else given.to_dict() if hasattr(given, "to_dict") else {}
    if str(_text(values.get("quant_method", "bitsandbytes"))) != "bitsandbytes" or not values:
        raise _refusal(
            args, "model_init_kwargs", "a quantization_config must be a BitsAndBytesConfig, or its fields"
        )
    return {
        name: str(value).removeprefix("torch.") if name.endswith("dtype") else value
        for name, value in values.items()
        if value is not None and name != "quant_method" and not name.startswith("_")
    }


PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None}
"""Where peft's LoraConfig has another default than ours."""
_BOOKKEEPING = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}


def _lora(peft_config: Any, *, is_encoder_decoder: bool | None) -> dict[str, Any]:
    """Our section for a peft.LoraConfig, or for a mapping of its fields."""
    if isinstance(peft_config, Mapping):
        values = {**PEFT_DEFAULTS, **peft_config}
    elif type(peft_config).__name__ == "LoraConfig":
        unset = type(peft_config)()
        values = {field.name: getattr(peft_config, field.name) for field in fields(peft_config)}
        values = {
            name: value
            for name, value in values.items()
            if name in LoraConfig.model_fields or value != getattr(unset, name)
        }
    else:
        raise ConfigError(
            f"peft_config must be a peft.LoraConfig or a mapping of its fields; got {type(peft_config).__name__}: "
            "other adapters cannot be trained"
        )
    tasks = {False: "CAUSAL_LM", True: "SEQ_2_SEQ_LM"}
    known = tasks.values() if is_encoder_decoder is None else [tasks[is_encoder_decoder]]
    if values.get("task_type") in (None, *known):
        values.pop("task_type", None)
    if "task_type" in values:
        raise ConfigError(
            f"peft_config.task_type is {str(values['task_type'])!r}, but the model is trained as "
            f"{' or '.join(known)}: leave it out"
        )
    targets = values["target_modules"]
    ours = LoraConfig.model_fields.keys() - {"args"}
    return {
        **{name: value for name, value in values.items() if name in ours},
        "target_modules": sorted(targets) if isinstance(targets, set | list | tuple) else targets,
        "args": {name: value for name, value in values.items() if name not in ours | _BOOKKEEPING},
    }


TARGET_LENGTH = 128
"""What TRL cuts the completions of an encoder-decoder to when nothing else is said."""


def _data(args: Args, *, is_encoder_decoder: bool) -> dict[str, Any]:
    strategy = args.train_sampling_strategy
    if strategy not in ("random", "sequential", "batch_rebalance", "group_by_length"):
        raise _refusal(args, "train_sampling_strategy", "use random, sequential or group_by_length")
    if args.group_by_length and strategy == "sequential":
        raise _refusal(
            args, "group_by_length", "train_sampling_strategy is sequential, leave one of them out"
        )
    max_length = 512 if args.max_length is None else args.max_length
    # What a user has not chosen may not fit what he has.
    default = 512 if isinstance(args, CPOConfig) else 128
    max_prompt_length = args.max_prompt_length
    if max_prompt_length is None and isinstance(args, SimPOConfig):
        max_prompt_length = default
    if max_prompt_length == default and default >= max_length:
        max_prompt_length = None
    max_completion_length = args.max_completion_length
    if isinstance(args, SimPOConfig) and args.max_target_length is not None:
        if max_completion_length not in (None, args.max_target_length):
            raise _refusal(
                args, "max_target_length", f"max_completion_length is {max_completion_length}, leave one out"
            )
        max_completion_length = args.max_target_length
    if max_completion_length is None and is_encoder_decoder:
        max_completion_length = TARGET_LENGTH
    return {
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "max_completion_length": max_completion_length,
        "truncation_mode": args.truncation_mode,
        "shuffle": strategy != "sequential",
        "group_by_length": args.group_by_length or strategy == "group_by_length",
        "seed": args.data_seed,
    }


# --- loss and optimizer ---


def _cpo_loss(args: CPOConfig) -> dict[str, Any]:
    kind = args.loss_type
    if kind not in ("sigmoid", "hinge", "ipo", "simpo", "alphapo"):
        raise _refusal(args, "loss_type", "use sigmoid, hinge, ipo, simpo or alphapo")
    if kind == "alphapo" and args.cpo_alpha not in (0.0, CPOConfig.cpo_alpha):
        raise _refusal(args, "cpo_alpha", "alphapo has none; use loss_type simpo to keep it")
    if kind in ("sigmoid", "hinge") and args.alpha:
        raise _refusal(args, "alpha", f"loss_type {kind} takes none; use simpo, alphapo or ipo")
    if kind in ("hinge", "ipo"):
        _refuse_smoothing(args)
    loss = {"beta": args.beta, "cpo_alpha": args.cpo_alpha, "nll_average": "micro_batch"}
    if kind == "ipo":
        return {**loss, "kind": "ipo", "alpha": args.alpha}
    loss["label_smoothing"] = args.label_smoothing
    if kind in ("sigmoid", "hinge"):
        return {**loss, "kind": "cpo", "link": kind}
    cpo_alpha = 0.0 if kind == "alphapo" else args.cpo_alpha
    return {
        **loss,
        "kind": "cpo_simpo" if cpo_alpha else "simpo",
        "cpo_alpha": cpo_alpha,
        "gamma_beta_ratio": args.simpo_gamma / args.beta if args.beta > 0 else 0.0,
        "alpha": args.alpha,
    }


def _simpo_loss(args: SimPOConfig) -> dict[str, Any]:
    if args.loss_type not in ("sigmoid", "hinge"):
        raise _refusal(args, "loss_type", "use sigmoid or hinge")
    if args.loss_type == "hinge":
        _refuse_smoothing(args)
    return {
        "kind": "cpo_simpo" if args.sft_weight else "simpo",
        "link": args.loss_type,
        "beta": args.beta,
        "gamma_beta_ratio": args.gamma_beta_ratio,
        "cpo_alpha": args.sft_weight,
        "nll_average": "micro_batch",
        "label_smoothing": args.label_smoothing,
    }


def _refuse_smoothing(args: Args) -> None:
    if args.label_smoothing:
        raise _refusal(args, "label_smoothing", f"loss_type {args.loss_type} takes none; leave it out")


def _optim(args: Args) -> dict[str, Any]:
    kwargs = args.lr_scheduler_kwargs or {}
    if not isinstance(kwargs, Mapping):
        raise _refusal(args, "lr_scheduler_kwargs", "it must be a mapping, or JSON of one")
    steps = args.warmup_steps
    return {
        "learning_rate": args.learning_rate,
        "name": "adafactor" if args.adafactor else _text(args.optim),
        "args": _optim_args(args),
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "schedule": _text(args.lr_scheduler_type),
        "schedule_args": dict(kwargs),
        "warmup_ratio": steps if 0 < steps < 1 else args.warmup_ratio,
        "warmup_steps": int(steps) if steps >= 1 else None,
    }


def _optim_args(args: Args) -> dict[str, Any]:
    """The keyword arguments in `momentum=0.9, nesterov=true`."""
    parts = [part.partition("=") for part in (args.optim_args or "").replace(" ", "").split(",") if part]
    if not all(name and equals for name, equals, _ in parts):
        raise _refusal(args, "optim_args", "write it as name=value,name=value")
    return {name: parse_scalar(value) for name, _, value in parts}


# --- engine ---


def _engine(args: Args, num_workers: int | tuple[int, int]) -> dict[str, Any]:
    """Our section for a DeepSpeed config, whose keys that follow from the other arguments must agree with them."""
    if not args.deepspeed:
        return {}
    given = _without_auto(_ds_config(args))
    for name, wanted in {
        "train_batch_size": _global_batch(args, num_workers),
        "train_micro_batch_size_per_gpu": _micro_batch(args),
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "bf16.enabled": bool(args.bf16),
        "fp16.enabled": bool(args.fp16),
        "optimizer.type": "AdamW" if _text(args.optim).startswith("adamw_torch") else None,
        "optimizer.params.lr": args.learning_rate,
        "optimizer.params.betas": [args.adam_beta1, args.adam_beta2],
        "optimizer.params.eps": args.adam_epsilon,
        "optimizer.params.weight_decay": args.weight_decay,
    }.items():
        found = _pop(given, name)
        if found is not None and found != wanted:
            derived = "nothing" if wanted is None else json.dumps(wanted)
            raise ConfigError(
                f"deepspeed.{name} is {json.dumps(found)}, but the other arguments give {derived}: make them agree, or "
                "write auto"
            )
    for name, home in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if name in given:
            raise ConfigError(
                f"deepspeed.{name} cannot be honoured; got {json.dumps(given[name])}: use {home}"
            )
    stage = _pop(given, "zero_optimization.stage")
    engine = {"zero_stage": 0 if stage is None else stage}
    for name in ("offload_optimizer", "offload_param"):
        device = _pop(given, f"zero_optimization.{name}.device")
        if device not in (None, "none", "cpu"):
            raise ConfigError(
                f"deepspeed.zero_optimization.{name}.device must be none or cpu; got {device!r}"
            )
        engine[name] = device or "none"
        if device == "none":
            _pop(given, f"zero_optimization.{name}")
    return {**engine, "deepspeed": given}


def _ds_config(args: Args) -> dict[str, Any]:
    config: Any = args.deepspeed
    if isinstance(config, str):
        try:
            config = json.loads(
                config if config.lstrip().startswith("{") else Path(config).read_text("utf-8")
            )
        except (OSError, ValueError) as error:
            raise _refusal(
                args, "deepspeed", f"it cannot be read as JSON, or as a JSON file: {error}"
            ) from error
    if not isinstance(config, Mapping):
        raise _refusal(args, "deepspeed", "it must be a mapping, or a JSON file that holds one")
    return dict(config)


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without "auto", and without the sections that held nothing else.

    >>> _without_auto({"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    {'zero_optimization': {'stage': 3}}
    """
    kept = {}
    for name, value in config.items():
        inner = _without_auto(value) if isinstance(value, Mapping) else value
        if value != "auto" and (inner != {} or value == {}):
            kept[name] = inner
    return kept


def _pop(config: dict[str, Any], name: str) -> Any:
    """Take a value out by its dotted name, with the sections that are empty then; None when it is not there."""
    section, _, rest = name.partition(".")
    if not rest:
        return config.pop(section, None)
    inner = config.get(section)
    if not isinstance(inner, dict):
        return None
    value = _pop(inner, rest)
    if not inner:
        del config[section]
    return value


# --- run ---


def _micro_batch(args: Args) -> int:
    return args.per_gpu_train_batch_size or args.per_device_train_batch_size


def _global_batch(args: Args, num_workers: int | tuple[int, int]) -> int:
    """That of the most workers, where they may be fewer for a while."""
    workers = num_workers if isinstance(num_workers, int) else num_workers[1]
    return _micro_batch(args) * args.gradient_accumulation_steps * workers


def _evaluates(args: Args, data: Mapping[str, Any]) -> bool:
    """Whether the run evaluates; data that say nothing of `eval` may get it later. Raises ConfigError for none."""
    strategy = _text(args.eval_strategy)
    has_pairs = bool(data.get("eval", True))
    if strategy != "no" and not has_pairs:
        raise _refusal(args, "eval_strategy", "there is no eval_dataset; give one, or set it to no")
    return has_pairs and (strategy != "no" or args.eval_on_start)


def _run(args: Args, *, evaluates: bool) -> dict[str, Any]:
    eval_steps = _interval(_text(args.eval_strategy), args.eval_steps)
    save_strategy = _text(args.save_strategy)
    if save_strategy == "best" and (not evaluates or args.metric_for_best_model is None):
        raise _refusal(args, "save_strategy", "it needs an eval_strategy and metric_for_best_model")
    epochs = args.num_train_epochs
    named = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for option in OF_TRACKIO if "trackio" in named else ():
        if getattr(args, option) != getattr(type(args), option):
            raise _refusal(args, option, "Trackio is told of the run's name alone; leave it out")
    return {
        "name": args.run_name or "run",
        "storage_path": args.output_dir,
        "micro_batch": _micro_batch(args),
        "shrink_batch": not args.dataloader_drop_last,
        "auto_find_batch_size": args.auto_find_batch_size,
        "eval_micro_batch": args.per_gpu_eval_batch_size or args.per_device_eval_batch_size,
        "epochs": int(epochs) if epochs == int(epochs) else epochs,
        "max_steps": args.max_steps if args.max_steps > 0 else None,
        "drop_last": args.dataloader_drop_last,
        "seed": args.seed,
        "full_determinism": args.full_determinism,
        "collective_timeout_s": args.ddp_timeout,
        "log_steps": _interval(_text(args.logging_strategy), args.logging_steps),
        "log_first_step": args.logging_first_step,
        "eval_steps": eval_steps,
        "eval_on_start": args.eval_on_start,
        "eval_delay": args.eval_delay or 0,
        "save_steps": eval_steps if save_strategy == "best" else _interval(save_strategy, args.save_steps),
        "save_only_model": args.save_only_model,
        "keep_checkpoints": 1 if save_strategy == "best" else args.save_total_limit or ALL_CHECKPOINTS,
        "best_metric": _best_metric(args) if evaluates else None,
        "best_mode": None if args.greater_is_better is None else "max" if args.greater_is_better else "min",
        "eval_samples": (args.per_gpu_eval_batch_size or args.per_device_eval_batch_size)
        if args.generate_during_eval
        else 0,
        "report_to": [name for name in named if name not in (None, "none", "tensorboard")],
    }


def _interval(strategy: str, steps: float | None) -> int | float | str | None:
    """When something happens: every so many steps, after a share of them, at the end of an epoch, or never."""
    if strategy != "steps":
        return "epoch" if strategy == "epoch" else None
    return int(steps) if steps is not None and steps >= 1 else steps


def _best_metric(args: Args) -> str | None:
    metric = args.metric_for_best_model
    if metric is None:
        return "eval_loss" if args.load_best_model_at_end else None
    return metric if metric.startswith("eval_") else f"eval_{metric}"
