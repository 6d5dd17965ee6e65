"""Optimizer and schedule from transformers, by their names there."""

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ray_prefopt.config import EngineConfig, OptimConfig
from ray_prefopt.errors import ConfigError, suggest

OwnOptimizer = Callable[[nn.Module], tuple[Optimizer, LRScheduler | None]]
"""Makes an optimizer of the user's own, and its schedule if it has one, over the weights of a module."""
CONVERTED = ("adamw_torch", "adamw_torch_fused")
"""Optimizers whose states DeepSpeed can convert for another number of workers."""
TRAINER: Any = Trainer
"""For two of its answers, which need neither an instance nor a PreTrainedModel, whatever their annotations say."""

# It advises to launch with torchrun whenever a process group is there.
logging.getLogger("transformers.training_args").setLevel(logging.ERROR)


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


def can_change_workers(engine: EngineConfig, optim: OptimConfig) -> bool:
    """Whether training can go on with another number of workers: with whole states, or such as can be converted."""
    is_sharded = engine.kind == "zero" and engine.zero_stage > 0
    return not is_sharded or optim.name in CONVERTED


def check_optim(optim: OptimConfig) -> None:
    """Raises ConfigError when the optimizer or schedule cannot be built here; takes milliseconds, for the driver."""
    build_schedule(build_optimizer(nn.Linear(1, 1), optim), optim, total_steps=1)


def build_optimizer(module: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimizer over the trainable parameters, weight decay on those that are neither bias nor norm.

    Raises ConfigError when transformers has none of that name, it is not installed, or does not take optim.args.
    """
    check_names(optim)
    for key, home in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if key in optim.args:
            raise ConfigError(f"optim.args.{key} is set by optim.{home}: use that instead")
    arguments = TrainingArguments(
        output_dir="unused",
        optim=optim.name,
        learning_rate=optim.learning_rate,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        report_to="none",
    )
    try:
        optimizer_class, options = TRAINER.get_optimizer_cls_and_kwargs(arguments, module)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"optim.name: {optim.name} cannot be used here: {error}") from error
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
    try:
        optimizer: Optimizer = optimizer_class(
            [group for group in groups if group["params"]], **{**options, **optim.args}
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.args: {optim.name} does not take {optim.args}: {error}") from error
    return optimizer


def build_schedule(optimizer: Optimizer, optim: OptimConfig, total_steps: int) -> LRScheduler:
    """The learning rate of each step, from 0 through the peak.

    Raises ConfigError when the schedule does not take optim.schedule_args, or follows something else than steps.
    """
    warmup_steps = optim.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(optim.warmup_ratio * total_steps)
    try:
        schedule = get_scheduler(
            optim.schedule,
            optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(optim.schedule_args),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optim.schedule_args: {optim.schedule} does not take {optim.schedule_args}: {error}"
        ) from error
    if "metrics" in inspect.signature(schedule.step).parameters:
        raise ConfigError(
            f"optim.schedule: {optim.schedule} follows a metric; use one of steps, such as cosine"
        )
    return schedule


def peak_rates(schedule: Any) -> list[float]:
    """The learning rates that a schedule scales, one per group of weights; none where it has no such thing."""
    return [float(rate) for rate in getattr(schedule, "base_lrs", ())]


def keep_options(optimizer: Optimizer, own: Sequence[Mapping[str, Any]]) -> None:
    """Give an optimizer that was loaded from a checkpoint, perhaps of another run, the options of its config again.

    What else is in its groups may be a part of its state.
    """
    for group, given in zip(optimizer.param_groups, own, strict=True):
        group.update({name: given[name] for name in ("weight_decay", "betas", "eps") if name in given})


def set_peak_rates(optimizer: Optimizer, schedule: Any, rates: Sequence[float]) -> None:
    """Give a schedule that was loaded from a checkpoint these rates instead of the checkpoint's; its step stays.

    The same rates change nothing, to the bit.
    """
    for index, (group, old, new) in enumerate(
        zip(optimizer.param_groups, peak_rates(schedule), rates, strict=False)
    ):
        if new != old:
            group["initial_lr"] = schedule.base_lrs[index] = new
            group["lr"] *= new / old
            schedule._last_lr[index] = group["lr"]


def optimizer_for(
    module: nn.Module, optim: OptimConfig, total_steps: int, own: OwnOptimizer | None
) -> tuple[Optimizer, Callable[[Optimizer], LRScheduler]]:
    """The user's own optimizer or that of the config, and what makes the schedule over it."""
    if own is None:
        return build_optimizer(module, optim), lambda inner: build_schedule(inner, optim, total_steps)
    optimizer, schedule = own(module)
    if schedule is None:
        return optimizer, lambda inner: build_schedule(inner, optim, total_steps)

    def attached(inner: Optimizer) -> LRScheduler:
        schedule.optimizer = inner
        return schedule

    return optimizer, attached
