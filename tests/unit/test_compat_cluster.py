"""Ray's own configs beside TRL's arguments."""

from typing import Any

import pytest
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

from ray_prefopt.compat.cluster import run_values
from ray_prefopt.errors import ConfigError


def test_without_configs_there_is_one_worker_on_this_machine() -> None:
    assert run_values(None, None) == {
        "num_workers": 1,
        "resize_interval_s": 60.0,
        "use_gpu": False,
        "cpus_per_worker": 1,
        "resources_per_worker": {},
        "placement_strategy": "PACK",
        "accelerator_type": None,
    }


def test_what_each_worker_gets() -> None:
    scaling = ScalingConfig(
        num_workers=(2, 8),
        elastic_resize_monitor_interval_s=300,
        use_gpu=True,
        resources_per_worker={"CPU": 6, "GPU": 1, "fast_disk": 0.5},
        placement_strategy="SPREAD",
        accelerator_type="H100",
    )
    assert run_values(scaling, None) == {
        "num_workers": (2, 8),
        "resize_interval_s": 300,
        "use_gpu": True,
        "cpus_per_worker": 6,
        "resources_per_worker": {"fast_disk": 0.5},
        "placement_strategy": "SPREAD",
        "accelerator_type": "H100",
    }


def test_the_name_the_storage_and_the_failures_of_a_run() -> None:
    run = RunConfig(
        name="mine",
        storage_path="s3://bucket/runs",
        failure_config=FailureConfig(max_failures=3),
        checkpoint_config=CheckpointConfig(num_to_keep=5),
        worker_runtime_env={"env_vars": {"NCCL_DEBUG": "INFO"}},
    )
    values = run_values(None, run)
    assert {name: values[name] for name in values.keys() - run_values(None, None).keys()} == {
        "name": "mine",
        "storage_path": "s3://bucket/runs",
        "max_failures": 3,
        "keep_checkpoints": 5,
        "env_vars": {"NCCL_DEBUG": "INFO"},
    }


def test_what_ray_makes_up_is_not_taken() -> None:
    """It names every run, and puts it into the home folder."""
    assert run_values(None, RunConfig()).keys() & {"name", "storage_path", "keep_checkpoints"} == set()


@pytest.mark.parametrize(
    ("scaling", "run", "text"),
    [
        (
            ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            None,
            "scaling_config: resources_per_worker needs whole CPUs, and one GPU exactly when use_gpu is true; "
            "got {'CPU': 0.5}",
        ),
        (
            ScalingConfig(label_selector={"zone": "a"}),
            None,
            "scaling_config: label_selector cannot be honoured; got {'zone': 'a'}: leave it out; accelerator_type, ",
        ),
        (
            None,
            RunConfig(failure_config=FailureConfig(controller_failure_limit=2)),
            "run_config.failure_config: controller_failure_limit cannot be honoured; got 2: leave it out; "
            "max_failures can be",
        ),
        (
            None,
            RunConfig(checkpoint_config=CheckpointConfig(checkpoint_score_attribute="loss")),
            "run_config.checkpoint_config: checkpoint_score_attribute cannot be honoured; got 'loss'",
        ),
        (
            None,
            RunConfig(worker_runtime_env={"pip": ["x"]}),
            "run_config: worker_runtime_env has pip; only env_vars can be honoured: give the rest to `ray job submit`",
        ),
    ],
)
def test_what_a_run_has_no_place_for(scaling: Any, run: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_values(scaling, run)
    assert str(caught.value).startswith(text)
