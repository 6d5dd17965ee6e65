"""Ray Train's own configs, given to a trainer beside TRL's arguments, as fields of `run`."""

import re
from dataclasses import fields
from typing import Any

import ray.train
import torch

from ray_prefopt.errors import ConfigError

MADE_UP_NAME = re.compile(r"ray_train_run-\d{4}-")
"""What Ray calls a run that is given no name."""


def run_values(scaling: ray.train.ScalingConfig | None, run: ray.train.RunConfig | None) -> dict[str, Any]:
    """What both say; without a ScalingConfig one worker on CPUs, or one for each GPU of this machine.

    Raises ConfigError for what a run has no place for.
    """
    return {**_scaling_values(scaling or _of_this_machine()), **(_run_values(run) if run else {})}


def _scaling_values(scaling: Any) -> dict[str, Any]:
    resources = dict(scaling.resources_per_worker or {})
    cpus = resources.pop("CPU", 1)
    gpus = resources.pop("GPU", 1 if scaling.use_gpu else 0)
    if gpus != (1 if scaling.use_gpu else 0) or cpus != int(cpus) or cpus < 1:
        raise ConfigError(
            "scaling_config: resources_per_worker needs whole CPUs, and one GPU exactly when use_gpu is true; "
            f"got {scaling.resources_per_worker}"
        )
    _refuse_others(
        "scaling_config",
        scaling,
        {
            "num_workers",
            "elastic_resize_monitor_interval_s",
            "use_gpu",
            "resources_per_worker",
            "placement_strategy",
            "accelerator_type",
        },
    )
    return {
        "num_workers": scaling.num_workers,
        "resize_interval_s": scaling.elastic_resize_monitor_interval_s,
        "use_gpu": bool(scaling.use_gpu),
        "cpus_per_worker": int(cpus),
        "resources_per_worker": resources,
        "placement_strategy": scaling.placement_strategy,
        "accelerator_type": scaling.accelerator_type,
    }


def _run_values(run: Any) -> dict[str, Any]:
    _refuse_others(
        "run_config",
        run,
        {"name", "storage_path", "failure_config", "checkpoint_config", "worker_runtime_env"},
    )
    failures: Any = run.failure_config
    checkpoints: Any = run.checkpoint_config
    _refuse_others("run_config.failure_config", failures, {"max_failures"})
    _refuse_others("run_config.checkpoint_config", checkpoints, {"num_to_keep"})
    values: dict[str, Any] = {"max_failures": failures.max_failures}
    if not MADE_UP_NAME.match(str(run.name)):
        values["name"] = run.name
    if run.storage_path != ray.train.RunConfig().storage_path:
        values["storage_path"] = str(run.storage_path)
    if checkpoints.num_to_keep is not None:
        values["keep_checkpoints"] = checkpoints.num_to_keep
    environment = dict(run.worker_runtime_env or {})
    values["env_vars"] = dict(environment.pop("env_vars", {}))
    if environment:
        raise ConfigError(
            f"run_config: worker_runtime_env has {', '.join(sorted(environment))}; only env_vars can be honoured: "
            "give the rest to `ray job submit` or ray.init, so that the driver has it too"
        )
    return values


def _refuse_others(name: str, given: Any, honoured: set[str]) -> None:
    """Raises ConfigError for a field that is set and not honoured."""
    unset = type(given)()
    for field in fields(given):
        value = getattr(given, field.name)
        if field.name not in honoured and value != getattr(unset, field.name):
            raise ConfigError(
                f"{name}: {field.name} cannot be honoured; got {value!r}: leave it out; "
                f"{', '.join(sorted(honoured))} can be"
            )


def _of_this_machine() -> ray.train.ScalingConfig:
    gpus = torch.cuda.device_count()
    return ray.train.ScalingConfig(num_workers=max(gpus, 1), use_gpu=gpus > 0)
