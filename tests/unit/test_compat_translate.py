"""What TRL's arguments become: every honoured field changes the config in the way that the table says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from peft import LoraConfig as PeftLoraConfig
from transformers import BitsAndBytesConfig, GPT2Config

from ray_prefopt.compat.config import CPOConfig, SimPOConfig
from ray_prefopt.compat.translate import PEFT_DEFAULTS, to_train_config
from ray_prefopt.config import CompileConfig, LoraConfig, TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.training.metrics import Meter

CPO, SIMPO = CPOConfig, SimPOConfig
EVAL = {"train": "pairs.jsonl", "eval": "held_out.jsonl"}


def translated(
    args: Any,
    data: dict[str, Any] = EVAL,
    workers: int | tuple[int, int] = 2,
    use_gpu: bool = True,
    peft_config: Any = None,
    is_encoder_decoder: bool | None = None,
) -> TrainConfig:
    return to_train_config(
        args,
        model={"path": "model"},
        data=data,
        num_workers=workers,
        use_gpu=use_gpu,
        peft_config=peft_config,
        is_encoder_decoder=is_encoder_decoder,
    )


def value_at(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


Case = tuple[type[CPOConfig | SimPOConfig], dict[str, Any], str, Any]

CASES: dict[str, list[Case]] = {
    # the run
    "output_dir": [(CPO, {"output_dir": "mine"}, "run.storage_path", "mine")],
    "run_name": [(CPO, {"run_name": "first"}, "run.name", "first")],
    "seed": [(CPO, {"seed": 7}, "run.seed", 7)],
    "data_seed": [(CPO, {"data_seed": 7}, "data.seed", 7)],
    "use_cpu": [(CPO, {"use_cpu": True}, "run.use_gpu", False)],
    "no_cuda": [(SIMPO, {"no_cuda": True}, "run.use_gpu", False)],
    # batches and steps, on two workers: 8 pairs each, in one micro-batch, when nothing is set
    "per_device_train_batch_size": [
        (CPO, {"per_device_train_batch_size": 3}, "run.micro_batch", 3),
        (CPO, {"per_device_train_batch_size": 3}, "run.global_batch", 6),
    ],
    "per_gpu_train_batch_size": [
        (CPO, {"per_gpu_train_batch_size": 5, "per_device_train_batch_size": 3}, "run.micro_batch", 5),
        (CPO, {"per_gpu_train_batch_size": 5}, "run.global_batch", 10),
    ],
    "per_device_eval_batch_size": [(CPO, {"per_device_eval_batch_size": 3}, "run.eval_micro_batch", 3)],
    "per_gpu_eval_batch_size": [(CPO, {"per_gpu_eval_batch_size": 5}, "run.eval_micro_batch", 5)],
    "auto_find_batch_size": [(CPO, {"auto_find_batch_size": True}, "run.auto_find_batch_size", True)],
    "gradient_accumulation_steps": [(CPO, {"gradient_accumulation_steps": 4}, "run.global_batch", 64)],
    "num_train_epochs": [
        (CPO, {"num_train_epochs": 1}, "run.epochs", 1),
        (CPO, {"num_train_epochs": 1.5}, "run.epochs", 1.5),
    ],
    "max_steps": [(CPO, {"max_steps": 10}, "run.max_steps", 10)],
    "train_sampling_strategy": [
        (CPO, {"train_sampling_strategy": "sequential"}, "data.shuffle", False),
        (CPO, {"train_sampling_strategy": "group_by_length"}, "data.group_by_length", True),
    ],
    "group_by_length": [(SIMPO, {"group_by_length": True}, "data.group_by_length", True)],
    "dataloader_drop_last": [
        (CPO, {"dataloader_drop_last": True}, "run.drop_last", True),
        (CPO, {"dataloader_drop_last": True}, "run.shrink_batch", False),
    ],
    # optimizer
    "learning_rate": [(CPO, {"learning_rate": 3e-7}, "optim.learning_rate", 3e-7)],
    "optim": [(CPO, {"optim": "lion_32bit"}, "optim.name", "lion_32bit")],
    "optim_args": [
        (
            CPO,
            {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
            "optim.args",
            {"momentum": 0.9, "nesterov": True},
        )
    ],
    "adafactor": [(CPO, {"adafactor": True}, "optim.name", "adafactor")],
    "adam_beta1": [(CPO, {"adam_beta1": 0.8}, "optim.betas", (0.8, 0.999))],
    "adam_beta2": [(CPO, {"adam_beta2": 0.95}, "optim.betas", (0.9, 0.95))],
    "adam_epsilon": [(CPO, {"adam_epsilon": 1e-6}, "optim.eps", 1e-6)],
    "weight_decay": [(CPO, {"weight_decay": 0.1}, "optim.weight_decay", 0.1)],
    "max_grad_norm": [(CPO, {"max_grad_norm": 0.5}, "optim.max_grad_norm", 0.5)],
    "lr_scheduler_type": [(CPO, {"lr_scheduler_type": "cosine"}, "optim.schedule", "cosine")],
    "lr_scheduler_kwargs": [
        (CPO, {"lr_scheduler_kwargs": {"num_cycles": 2}}, "optim.schedule_args", {"num_cycles": 2}),
        (CPO, {"lr_scheduler_kwargs": '{"num_cycles": 2}'}, "optim.schedule_args", {"num_cycles": 2}),
    ],
    "warmup_steps": [
        (CPO, {"warmup_steps": 150}, "optim.warmup_steps", 150),
        (CPO, {"warmup_steps": 0.25, "warmup_ratio": 0.1}, "optim.warmup_ratio", 0.25),
    ],
    "warmup_ratio": [(SIMPO, {"warmup_ratio": 0.1}, "optim.warmup_ratio", 0.1)],
    # model
    "bf16": [
        (SIMPO, {"bf16": True}, "model.dtype", "bfloat16"),
        (CPO, {"bf16": False}, "model.dtype", "auto"),
    ],
    "fp16": [(CPO, {"fp16": True}, "model.dtype", "float16")],
    "activation_checkpointing": [
        (CPO, {"activation_checkpointing": False}, "model.gradient_checkpointing", False)
    ],
    "gradient_checkpointing": [
        (SIMPO, {"gradient_checkpointing": True}, "model.gradient_checkpointing", True)
    ],
    "activation_checkpointing_kwargs": [],
    "gradient_checkpointing_kwargs": [],
    "disable_dropout": [(CPO, {"disable_dropout": False}, "model.disable_dropout", False)],
    "model_init_kwargs": [
        (SIMPO, {"model_init_kwargs": {"dtype": "float32"}}, "model.dtype", "float32"),
        (SIMPO, {"model_init_kwargs": {"torch_dtype": "torch.bfloat16"}}, "model.dtype", "bfloat16"),
        (CPO, {"model_init_kwargs": {"attn_implementation": "eager"}}, "model.attn_implementation", "eager"),
        (CPO, {"model_init_kwargs": '{"revision": "v2", "use_cache": false}'}, "model.revision", "v2"),
        (
            CPO,
            {"model_init_kwargs": {"trust_remote_code": True, "cache_dir": None}},
            "model.trust_remote_code",
            True,
        ),
        (
            CPO,
            {"model_init_kwargs": {"output_router_logits": True, "device_map": "auto"}},
            "model.overrides",
            {"output_router_logits": True},
        ),
    ],
    "neftune_noise_alpha": [(CPO, {"neftune_noise_alpha": 5}, "model.neftune_noise_alpha", 5.0)],
    "torch_compile": [(SIMPO, {"torch_compile": True}, "model.compile", CompileConfig())],
    "torch_compile_backend": [
        (CPO, {"torch_compile_backend": "aot_eager"}, "model.compile", CompileConfig(backend="aot_eager"))
    ],
    "torch_compile_mode": [
        (CPO, {"torch_compile_mode": "max-autotune"}, "model.compile", CompileConfig(mode="max-autotune"))
    ],
    "torchdynamo": [(SIMPO, {"torchdynamo": "eager"}, "model.compile", CompileConfig(backend="eager"))],
    "tf32": [(CPO, {"tf32": True}, "model.float32_matmul_precision", "high")],
    "full_determinism": [(CPO, {"full_determinism": True}, "run.full_determinism", True)],
    "ddp_timeout": [(CPO, {"ddp_timeout": 60}, "run.collective_timeout_s", 60)],
    "trust_remote_code": [(CPO, {"trust_remote_code": True}, "model.trust_remote_code", True)],
    "deepspeed": [(CPO, {"deepspeed": {"zero_optimization": {"stage": 3}}}, "engine.zero_stage", 3)],
    # lengths
    "max_length": [
        (CPO, {"max_length": 2048}, "data.max_length", 2048),
        (CPO, {"max_length": None}, "data.max_length", 512),
    ],
    "max_prompt_length": [
        (CPO, {"max_prompt_length": 128}, "data.max_prompt_length", 128),
        (CPO, {"max_length": 256}, "data.max_prompt_length", None),
        (SIMPO, {"max_length": 2048, "max_prompt_length": 1800}, "data.max_prompt_length", 1800),
        (SIMPO, {"max_length": 64}, "data.max_prompt_length", None),
    ],
    "max_completion_length": [(CPO, {"max_completion_length": 100}, "data.max_completion_length", 100)],
    "max_target_length": [
        (SIMPO, {"max_target_length": 64}, "data.max_completion_length", 64),
        (SIMPO, {"max_target_length": 64, "max_completion_length": 64}, "data.max_completion_length", 64),
    ],
    "truncation_mode": [(CPO, {"truncation_mode": "keep_start"}, "data.truncation_mode", "keep_start")],
    # loss
    "loss_type": [
        (CPO, {"loss_type": "hinge"}, "loss.link", "hinge"),
        (CPO, {"loss_type": "ipo"}, "loss.kind", "ipo"),
        (CPO, {"loss_type": "simpo"}, "loss.kind", "cpo_simpo"),
        (CPO, {"loss_type": "simpo", "cpo_alpha": 0.0}, "loss.kind", "simpo"),
        (CPO, {"loss_type": "alphapo"}, "loss.kind", "simpo"),
        (SIMPO, {"loss_type": "hinge"}, "loss.link", "hinge"),
    ],
    "beta": [(CPO, {"beta": 0.5}, "loss.beta", 0.5), (SIMPO, {"beta": 10.0}, "loss.beta", 10.0)],
    "cpo_alpha": [
        (CPO, {"cpo_alpha": 0.05}, "loss.cpo_alpha", 0.05),
        (CPO, {"cpo_alpha": 0.0}, "loss.cpo_alpha", 0.0),
    ],
    "sft_weight": [
        (SIMPO, {"sft_weight": 0.05}, "loss.cpo_alpha", 0.05),
        (SIMPO, {"sft_weight": 0.05}, "loss.kind", "cpo_simpo"),
    ],
    "simpo_gamma": [
        (CPO, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.6}, "loss.gamma_beta_ratio", 0.8)
    ],
    "gamma_beta_ratio": [(SIMPO, {"gamma_beta_ratio": 0.55}, "loss.gamma_beta_ratio", 0.55)],
    "alpha": [
        (CPO, {"loss_type": "simpo", "alpha": 0.25}, "loss.alpha", 0.25),
        (CPO, {"loss_type": "ipo", "alpha": 0.25}, "loss.alpha", 0.25),
    ],
    "label_smoothing": [
        (CPO, {"label_smoothing": 0.1}, "loss.label_smoothing", 0.1),
        (SIMPO, {"label_smoothing": 0.1}, "loss.label_smoothing", 0.1),
    ],
    # logging, evaluation, checkpoints
    "logging_strategy": [
        (CPO, {"logging_strategy": "epoch"}, "run.log_steps", "epoch"),
        (CPO, {"logging_strategy": "no"}, "run.log_steps", None),
    ],
    "logging_steps": [
        (CPO, {"logging_steps": 25}, "run.log_steps", 25),
        (CPO, {"logging_steps": 0.1}, "run.log_steps", 0.1),
    ],
    "logging_first_step": [(CPO, {"logging_first_step": True}, "run.log_first_step", True)],
    "include_tokens_per_second": [],
    "include_num_input_tokens_seen": [],
    "report_to": [
        (CPO, {"report_to": ["tensorboard", "wandb"]}, "run.report_to", ["wandb"]),
        (CPO, {"report_to": "mlflow"}, "run.report_to", ["mlflow"]),
    ],
    "eval_strategy": [
        (CPO, {"eval_strategy": "steps"}, "run.eval_steps", 10),
        (CPO, {"eval_strategy": "epoch"}, "run.eval_steps", "epoch"),
        (CPO, {"eval_strategy": "epoch"}, "data.eval", "held_out.jsonl"),
    ],
    "evaluation_strategy": [(SIMPO, {"evaluation_strategy": "epoch"}, "run.eval_steps", "epoch")],
    "eval_steps": [
        (CPO, {"eval_strategy": "steps", "eval_steps": 400}, "run.eval_steps", 400),
        (CPO, {"eval_strategy": "steps", "eval_steps": 0.25}, "run.eval_steps", 0.25),
    ],
    "generate_during_eval": [(CPO, {"generate_during_eval": True}, "run.eval_samples", 8)],
    "eval_on_start": [
        (CPO, {"eval_on_start": True}, "run.eval_on_start", True),
        (CPO, {"eval_on_start": True}, "data.eval", "held_out.jsonl"),
    ],
    "eval_delay": [
        (CPO, {"eval_delay": 100, "eval_strategy": "steps"}, "run.eval_delay", 100),
        (CPO, {"eval_delay": 1.5, "eval_strategy": "epoch"}, "run.eval_delay", 1.5),
    ],
    "save_strategy": [
        (CPO, {"save_strategy": "no"}, "run.save_steps", None),
        (CPO, {"save_strategy": "epoch"}, "run.save_steps", "epoch"),
        (
            CPO,
            {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
            "run.keep_checkpoints",
            1,
        ),
        (
            CPO,
            {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
            "run.save_steps",
            "epoch",
        ),
    ],
    "save_steps": [
        (CPO, {"save_steps": 50}, "run.save_steps", 50),
        (CPO, {"save_steps": 0.5}, "run.save_steps", 0.5),
    ],
    "save_only_model": [(CPO, {"save_only_model": True}, "run.save_only_model", True)],
    "save_total_limit": [(CPO, {"save_total_limit": 3}, "run.keep_checkpoints", 3)],
    "load_best_model_at_end": [
        (
            CPO,
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
            "run.best_metric",
            "eval_loss",
        )
    ],
    "metric_for_best_model": [
        (
            CPO,
            {"metric_for_best_model": "rewards/margins", "eval_strategy": "epoch"},
            "run.best_metric",
            "eval_rewards/margins",
        ),
        (
            CPO,
            {"metric_for_best_model": "eval_nll_loss", "eval_strategy": "epoch"},
            "run.best_metric",
            "eval_nll_loss",
        ),
    ],
    "greater_is_better": [
        (CPO, {"metric_for_best_model": "error", "greater_is_better": False}, "run.best_mode", "min"),
        (CPO, {"metric_for_best_model": "loss", "greater_is_better": True}, "run.best_mode", "max"),
    ],
}
"""Arguments, a field of ours, and its value with them; without them it has another."""

WITH_THE_TRAINER = {
    "resume_from_checkpoint", "hub_model_id", "hub_token", "hub_private_repo", "include_for_metrics",
    "include_inputs_for_metrics", "prediction_loss_only", "restore_callback_states_from_checkpoint",
    "is_encoder_decoder", "push_to_hub", "hub_strategy", "hub_always_push", "hub_revision", "push_to_hub_model_id",
    "push_to_hub_organization", "push_to_hub_token",
}  # fmt: skip
"""Honoured by methods of the trainer, and proved in its tests."""


@pytest.mark.parametrize(
    ("kind", "given", "name", "expected"),
    [pytest.param(*case, id=f"{name}-{case[2]}") for name, cases in CASES.items() for case in cases],
)
def test_an_honoured_field_changes_what_it_says(
    kind: type[CPOConfig | SimPOConfig], given: dict[str, Any], name: str, expected: Any
) -> None:
    assert value_at(translated(kind(**given)), name) == expected
    unset = translated(kind())
    try:
        assert value_at(unset, name) != expected
    except AttributeError:
        assert name in ("loss.gamma_beta_ratio", "loss.alpha")  # of another loss than the default one


def test_defaults_of_cpo() -> None:
    config = translated(CPOConfig(), workers=4)
    assert config == TrainConfig.model_validate(
        {
            "model": {"path": "model", "dtype": "bfloat16", "gradient_checkpointing": True},
            "data": {"train": "pairs.jsonl", "max_length": 1024, "max_prompt_length": 512},
            "loss": {"kind": "cpo", "beta": 0.1, "cpo_alpha": 1.0, "nll_average": "micro_batch"},
            "optim": {
                "learning_rate": 1e-6,
                "name": "adamw_torch_fused",
                "schedule": "linear",
                "warmup_ratio": 0.0,
            },
            "run": {
                "name": "run",
                "shrink_batch": True,
                "storage_path": "trainer_output",
                "num_workers": 4,
                "use_gpu": True,
                "global_batch": 32,
                "micro_batch": 8,
                "eval_micro_batch": 8,
                "epochs": 3,
                "log_steps": 10,
                "save_steps": 500,
                "keep_checkpoints": 1_000_000,
            },
        }
    )


def test_the_example_of_the_simpo_document() -> None:
    config = translated(SimPOConfig(output_dir="out", beta=2.5, gamma_beta_ratio=0.25))
    assert config.loss.model_dump() == {
        "kind": "simpo",
        "beta": 2.5,
        "gamma_beta_ratio": 0.25,
        "cpo_alpha": 0.0,
        "nll_average": "micro_batch",
        "link": "sigmoid",
        "label_smoothing": 0.0,
        "alpha": 0.0,
    }
    assert (config.data.max_length, config.data.max_prompt_length) == (512, 128)
    assert (config.model.dtype, config.optim.learning_rate) == ("auto", 5e-5)


def test_simpo_by_way_of_cpo_config_has_the_margin_of_trl() -> None:
    loss = translated(CPOConfig(loss_type="simpo", cpo_alpha=0.0)).loss
    assert loss.gamma_beta_ratio == pytest.approx(5.0)  # 0.5 / 0.1
    same = translated(SimPOConfig(beta=2.0, gamma_beta_ratio=0.25)).loss
    assert translated(CPOConfig(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)).loss == same


def test_values_of_the_trainer_have_the_last_word() -> None:
    config = to_train_config(
        CPOConfig(),
        model={"path": "weights", "tokenizer": "tokenizer", "dtype": "float32"},
        data={"train": "a", "columns": {"prompt": "question"}},
        num_workers=1,
        use_gpu=False,
    )
    assert (config.model.tokenizer, config.model.dtype) == ("tokenizer", "float32")
    assert (config.data.columns, config.run.use_gpu) == ({"prompt": "question"}, False)


# --- what is honoured for some values ---


def refusal(args: Any, **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        translated(args, **given)
    return str(caught.value)


def test_tokens_are_in_every_line() -> None:
    meter = Meter(tokens_seen=1000)
    for _ in range(2):
        meter.add(pairs=4, tokens=30)
        meter.add(pairs=4, tokens=20)
        record = meter.read(0.0)
        assert record["tokens_per_second"] / record["pairs_per_second"] == pytest.approx(50 / 8)
    assert record["num_input_tokens_seen"] == 1100
    assert translated(CPOConfig(include_tokens_per_second=True)) == translated(CPOConfig())
    for counted in ("all", "non_padding"):
        assert translated(CPOConfig(include_num_input_tokens_seen=counted)) == translated(CPOConfig())


def test_tensorboard_is_written_anyway() -> None:
    assert translated(CPOConfig(report_to="tensorboard")) == translated(CPOConfig(report_to=[]))


@pytest.mark.parametrize("name", ["activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"])
def test_checkpointing_is_not_reentrant(name: str) -> None:
    assert translated(CPOConfig(**{name: {"use_reentrant": False}})) == translated(CPOConfig())
    assert refusal(CPOConfig(**{name: {"use_reentrant": True}})) == (
        "CPOConfig.activation_checkpointing_kwargs cannot be honoured; got {'use_reentrant': True}: "
        "only {'use_reentrant': False} can be"
    )


def test_names_of_checkpointing_that_were_set_apart() -> None:
    args = CPOConfig()
    args.gradient_checkpointing = False
    assert refusal(args) == (
        "CPOConfig.gradient_checkpointing cannot be honoured; got False: activation_checkpointing is True"
    )


def test_a_metric_needs_evaluations() -> None:
    assert translated(CPOConfig(metric_for_best_model="loss")).run.best_metric is None


def test_no_strategy_leaves_out_the_evaluation_set() -> None:
    assert translated(CPOConfig()).data.eval is None
    assert translated(CPOConfig(eval_strategy="steps"), data={"train": "a"}).run.eval_steps == 10
    assert refusal(CPOConfig(eval_strategy="steps"), data={"train": "a", "eval": None}) == (
        "CPOConfig.eval_strategy cannot be honoured; got <IntervalStrategy.STEPS: 'steps'>: "
        "there is no eval_dataset; give one, or set it to no"
    )


def test_saving_the_best_needs_a_metric() -> None:
    assert refusal(CPOConfig(save_strategy="best", eval_strategy="epoch")) == (
        "CPOConfig.save_strategy cannot be honoured; got <SaveStrategy.BEST: 'best'>: "
        "it needs an eval_strategy and metric_for_best_model"
    )


def test_trackio_is_told_of_nothing_but_the_name() -> None:
    assert translated(CPOConfig(report_to="trackio")).run.report_to == ["trackio"]
    assert translated(CPOConfig(project="mine")).run.report_to == []
    assert refusal(CPOConfig(report_to="trackio", project="mine")) == (
        "CPOConfig.project cannot be honoured; got 'mine': Trackio is told of the run's name alone; leave it out"
    )


def misspelled(name: str, value: Any) -> CPOConfig:
    """With a value that the constructor of transformers would refuse."""
    args = CPOConfig()
    setattr(args, name, value)
    return args


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (
            CPOConfig(fp16=True, bf16=True),
            "CPOConfig.fp16 cannot be honoured; got True: bf16 is set too, leave one of them out",
        ),
        (
            CPOConfig(model_init_kwargs={"config": GPT2Config()}),
            "leave out config: GPT2Config is no JSON",
        ),
        (
            CPOConfig(model_init_kwargs={"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "a quantization_config must be a BitsAndBytesConfig, or its fields",
        ),
        (
            CPOConfig(model_init_kwargs={"load_in_4bit": True}),
            "quantization freezes the weights: set lora or adapter, or there is nothing to train",
        ),
        (
            CPOConfig(model_init_kwargs="options.json"),
            "CPOConfig.model_init_kwargs cannot be honoured; got 'options.json': it must be a mapping, or JSON of one",
        ),
        (
            CPOConfig(lr_scheduler_kwargs="num_cycles=2"),
            "CPOConfig.lr_scheduler_kwargs cannot be honoured; got 'num_cycles=2': it must be a mapping, or JSON of "
            "one",
        ),
        (
            CPOConfig(optim_args="momentum"),
            "CPOConfig.optim_args cannot be honoured; got 'momentum': write it as name=value,name=value",
        ),
        (
            SimPOConfig(train_sampling_strategy="sequential", group_by_length=True),
            "SimPOConfig.group_by_length cannot be honoured; got True: train_sampling_strategy is sequential, leave "
            "one of them out",
        ),
        (
            misspelled("train_sampling_strategy", "by_length"),
            "CPOConfig.train_sampling_strategy cannot be honoured; got 'by_length': use random, sequential or "
            "group_by_length",
        ),
        (
            CPOConfig(loss_type="kto_pair"),
            "CPOConfig.loss_type cannot be honoured; got 'kto_pair': use sigmoid, hinge, ipo, simpo or alphapo",
        ),
        (
            SimPOConfig(loss_type="ipo"),
            "SimPOConfig.loss_type cannot be honoured; got 'ipo': use sigmoid or hinge",
        ),
        (
            CPOConfig(loss_type="alphapo", cpo_alpha=0.5),
            "CPOConfig.cpo_alpha cannot be honoured; got 0.5: alphapo has none; use loss_type simpo to keep it",
        ),
        (
            CPOConfig(loss_type="hinge", alpha=0.5),
            "CPOConfig.alpha cannot be honoured; got 0.5: loss_type hinge takes none; use simpo, alphapo or ipo",
        ),
        (
            CPOConfig(loss_type="ipo", label_smoothing=0.1),
            "CPOConfig.label_smoothing cannot be honoured; got 0.1: loss_type ipo takes none; leave it out",
        ),
        (
            SimPOConfig(loss_type="hinge", label_smoothing=0.1),
            "SimPOConfig.label_smoothing cannot be honoured; got 0.1: loss_type hinge takes none; leave it out",
        ),
        (CPOConfig(beta=0.0, loss_type="simpo"), "loss.beta must be > 0; got 0.0"),
        (CPOConfig(run_name="../b"), "run.name must be a folder name of letters, digits, '.', '_' and '-'"),
        (CPOConfig(use_liger_kernel=True), "CPOConfig.use_liger_kernel cannot be honoured; got True"),
    ],
)
def test_values_that_cannot_be_honoured(args: CPOConfig | SimPOConfig, sentence: str) -> None:
    assert sentence in refusal(args)


def test_arguments_of_somebody_else() -> None:
    assert refusal({"beta": 1}) == (
        "args must be a CPOConfig or SimPOConfig of ray_prefopt; got dict: change its import"
    )


# --- deepspeed ---

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "stage3_prefetch_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
    },
}


def test_a_deepspeed_config_full_of_auto() -> None:
    config = translated(CPOConfig(deepspeed=AUTO))
    assert config.engine.model_dump() == {
        "kind": "zero",
        "zero_stage": 3,
        "offload_optimizer": "cpu",
        "offload_param": "none",
        "deepspeed": {
            "fp16": {"loss_scale": 0},
            "zero_optimization": {
                "offload_optimizer": {"pin_memory": True},
                "stage3_max_live_parameters": 1e9,
            },
        },
    }
    assert AUTO["bf16"] == {"enabled": "auto"}  # what the user gave stays as it was
    unset = translated(CPOConfig())
    assert (config.optim, config.run) == (unset.optim, unset.run)


def test_a_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(AUTO))
    assert translated(CPOConfig(deepspeed=str(path))) == translated(CPOConfig(deepspeed=AUTO))
    assert translated(CPOConfig(deepspeed=json.dumps(AUTO))) == translated(CPOConfig(deepspeed=AUTO))
    path.write_text("[1]")
    assert "it must be a mapping, or a JSON file that holds one" in refusal(CPOConfig(deepspeed=str(path)))
    path.write_text("{")
    assert "it cannot be read as JSON, or as a JSON file: Expecting" in refusal(
        CPOConfig(deepspeed=str(path))
    )
    missing = str(tmp_path / "none.json")
    assert f"got {missing!r}: it cannot be read as JSON, or as a JSON file: [Errno 2]" in refusal(
        CPOConfig(deepspeed=missing)
    )


def test_deepspeed_values_that_agree_with_the_arguments() -> None:
    given = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-6, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
        },
        "zero_optimization": {"stage": 1},
    }
    config = translated(CPOConfig(deepspeed=given, gradient_accumulation_steps=4))
    assert (config.engine.zero_stage, config.engine.deepspeed) == (1, {})
    assert (
        translated(CPOConfig(deepspeed={"steps_per_print": 5})).engine.zero_stage == 0
    )  # DeepSpeed's default


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"train_batch_size": 128},
            "deepspeed.train_batch_size is 128, but the other arguments give 16: make them agree, or write auto",
        ),
        (
            {"bf16": {"enabled": False}},
            "deepspeed.bf16.enabled is false, but the other arguments give true: make them agree, or write auto",
        ),
        (
            {"optimizer": {"type": "OneBitAdam"}},
            'deepspeed.optimizer.type is "OneBitAdam", but the other arguments give "AdamW": make them agree, or '
            "write auto",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
            'deepspeed.optimizer cannot be honoured; got {"params": {"torch_adam": true}}: use optim',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
            'deepspeed.scheduler cannot be honoured; got {"type": "WarmupLR"}: use lr_scheduler_type',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "deepspeed.zero_optimization.offload_param.device must be none or cpu; got 'nvme'",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs zero_stage 3; got zero_stage 2",
        ),
    ],
)
def test_deepspeed_values_that_do_not(given: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(CPOConfig(deepspeed=given))


def test_a_deepspeed_optimizer_beside_another_one() -> None:
    args = CPOConfig(optim="adafactor", deepspeed={"optimizer": {"type": "AdamW"}})
    assert 'deepspeed.optimizer.type is "AdamW", but the other arguments give nothing' in refusal(args)


# --- peft ---


def test_a_lora_config() -> None:
    given = PeftLoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["v_proj", "q_proj"],
        modules_to_save=["lm_head"],
        bias="none",
        use_rslora=True,
        task_type="CAUSAL_LM",
    )
    assert translated(CPOConfig(), peft_config=given).model.lora == LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
        use_rslora=True,
    )
    assert translated(CPOConfig()).model.lora is None


def test_options_of_peft_that_we_do_not_name_are_passed_on() -> None:
    given = PeftLoraConfig(layers_to_transform=[0], init_lora_weights="gaussian", rank_pattern={"q_proj": 2})
    lora = translated(CPOConfig(), peft_config=given).model.lora
    assert lora is not None
    assert lora.args == {
        "layers_to_transform": [0],
        "init_lora_weights": "gaussian",
        "rank_pattern": {"q_proj": 2},
    }


def test_what_peft_leaves_open_is_left_open() -> None:
    by_object = translated(CPOConfig(), peft_config=PeftLoraConfig()).model.lora
    assert by_object == LoraConfig(r=8, lora_alpha=8, target_modules=None)
    assert translated(CPOConfig(), peft_config={}).model.lora == by_object
    assert translated(
        CPOConfig(), peft_config={"r": 4, "target_modules": "all-linear"}
    ).model.lora == LoraConfig(r=4, lora_alpha=8)
    ours, peft = LoraConfig(), PeftLoraConfig()
    named = LoraConfig.model_fields.keys() - {"args"}
    differing = {name for name in named if getattr(ours, name) != getattr(peft, name)}
    assert differing == PEFT_DEFAULTS.keys()
    assert all(getattr(peft, name) == value for name, value in PEFT_DEFAULTS.items())


def test_adapters_that_cannot_be_trained() -> None:
    assert refusal(CPOConfig(), peft_config=PeftLoraConfig(task_type="SEQ_CLS")) == (
        "peft_config.task_type is 'SEQ_CLS', but the model is trained as CAUSAL_LM or SEQ_2_SEQ_LM: leave it out"
    )
    assert refusal(CPOConfig(), peft_config=IA3Config()) == (
        "peft_config must be a peft.LoraConfig or a mapping of its fields; got IA3Config: "
        "other adapters cannot be trained"
    )


def test_targets_of_encoder_decoders_have_the_bound_of_trl() -> None:
    for given, expected in (({}, 128), ({"max_completion_length": 300}, 300)):
        data = translated(CPOConfig(**given), is_encoder_decoder=True).data
        assert data.max_completion_length == expected
    assert (
        translated(SimPOConfig(max_target_length=64), is_encoder_decoder=True).data.max_completion_length
        == 64
    )
    assert translated(CPOConfig(), is_encoder_decoder=False).data.max_completion_length is None
    assert refusal(SimPOConfig(max_target_length=64, max_completion_length=65)) == (
        "SimPOConfig.max_target_length cannot be honoured; got 64: max_completion_length is 65, leave one out"
    )


def test_a_model_is_what_it_is() -> None:
    for said, found in ((None, True), (None, False), (True, True), (False, False), (True, None)):
        translated(CPOConfig(is_encoder_decoder=said), is_encoder_decoder=found)
    for said, kind in ((False, "an encoder-decoder"), (True, "a decoder alone")):
        assert refusal(CPOConfig(is_encoder_decoder=said), is_encoder_decoder=not said) == (
            f"CPOConfig.is_encoder_decoder cannot be honoured; got {said}: the model is {kind}; leave it out"
        )
    for found, task in (
        (True, "SEQ_2_SEQ_LM"),
        (False, "CAUSAL_LM"),
        (None, "SEQ_2_SEQ_LM"),
        (None, "CAUSAL_LM"),
    ):
        lora = translated(CPOConfig(), peft_config={"task_type": task}, is_encoder_decoder=found).model.lora
        assert lora == LoraConfig(r=8, lora_alpha=8, target_modules=None)
    assert refusal(CPOConfig(), peft_config={"task_type": "CAUSAL_LM"}, is_encoder_decoder=True) == (
        "peft_config.task_type is 'CAUSAL_LM', but the model is trained as SEQ_2_SEQ_LM: leave it out"
    )


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.mark.parametrize(
    "given",
    [
        {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": {"": 0}},
        {"quantization_config": BitsAndBytesConfig(**NF4).to_dict()},
    ],
)
def test_a_quantized_base(given: dict[str, Any]) -> None:
    quantization = translated(CPOConfig(model_init_kwargs=given), peft_config={"r": 4}).model.quantization
    assert quantization is not None
    assert BitsAndBytesConfig(**quantization).to_dict() == BitsAndBytesConfig(**NF4).to_dict()
    assert json.loads(json.dumps(quantization)) == quantization


def test_a_quantized_base_by_its_older_names() -> None:
    config = translated(CPOConfig(model_init_kwargs={"load_in_8bit": True}), peft_config={"r": 4})
    assert config.model.quantization == {"load_in_4bit": False, "load_in_8bit": True}
    unset = translated(CPOConfig(model_init_kwargs={"load_in_8bit": False, "load_in_4bit": False}))
    assert unset.model.quantization is None


def test_a_new_adapter_on_a_model_that_has_one() -> None:
    with pytest.raises(ConfigError) as caught:
        to_train_config(
            CPOConfig(),
            model={"path": "base", "adapter": "adapter"},
            data=EVAL,
            num_workers=1,
            use_gpu=False,
            peft_config=PeftLoraConfig(),
        )
    assert str(caught.value) == (
        "peft_config: the model is a PeftModel already; leave peft_config out to go on training its adapter, or give "
        "what merge_and_unload() makes of it"
    )


def test_gamma_is_what_trl_subtracts() -> None:
    """TRL's loss is -logsigmoid(beta * z - simpo_gamma); ours -logsigmoid(beta * (z - gamma_beta_ratio))."""
    loss = translated(CPOConfig(loss_type="simpo", beta=2.5, simpo_gamma=1.375)).loss
    assert math.isclose(loss.beta * loss.gamma_beta_ratio, 1.375)
