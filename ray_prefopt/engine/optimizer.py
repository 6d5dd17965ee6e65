"""Optimizer and schedule from transformers, by their names there."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ray_prefopt.config import OptimConfig
from ray_prefopt.errors import ConfigError, suggest

TRAINER: Any = Trainer
"""For two of its answers, which need neither an instance nor a PreTrainedModel, whatever their annotations say."""


def check_names(optim: OptimConfig) -> None:
    """Raises ConfigError when transformers has no optimizer or schedule of that name."""
    for field, value, known in (
        ("name", optim.name, [item.value for item in OptimizerNames]),
        ("schedule", optim.schedule, [item.value for item in SchedulerType]),
    ):
        if value not in known:
            raise ConfigError(
                f"optim.{field}: {value!r} is not known to transformers.{suggest(value, known)}"
            )


def build_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer over the trainable parameters, weight decay on those that are neither bias nor norm."""
    check_names(optim)
    arguments = TrainingArguments(
        output_dir="unused",
        optim=optim.name,
        optim_args=",".join(f"{key}={value}" for key, value in optim.args.items()) or None,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        report_to="none",
    )
    optimizer_class, options = TRAINER.get_optimizer_cls_and_kwargs(arguments, module)
    if is_optimizer_factory(optimizer_class) or options.keys() & {"params", "model", "optimizer_dict"}:
        raise ConfigError(
            f"optim.name: {optim.name} builds itself from whole layers, which ZeRO shards: "
            "use an optimizer over parameters, such as adamw_torch_fused or adafactor"
        )
    decayed = set(TRAINER.get_decay_parameter_names(None, module))
    trainable = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for name, weight in trainable if name in decayed],
            "weight_decay": optim.weight_decay,
        },
        {"params": [weight for name, weight in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer: Optimizer = optimizer_class([group for group in groups if group["params"]], **options)
    return optimizer


def build_schedule(optimizer: Optimizer, optim: OptimConfig, total_steps: int) -> LRScheduler:
    """The learning rate of each step, from 0 through the peak."""
    return get_scheduler(
        optim.schedule,
        optimizer,
        num_warmup_steps=math.ceil(optim.warmup_ratio * total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(optim.schedule_args),
    )
