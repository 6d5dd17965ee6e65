"""What a driver finds out by itself: from where a run begins, and what a command would do."""

from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import CheckpointError, ConfigError, ModelError
from ray_prefopt.training import footprint
from ray_prefopt.training.checkpoint import LoopState, save_checkpoint
from ray_prefopt.training.describe import describe
from ray_prefopt.training.run import _check_start, _check_steps_left
from tests.tiny import save_tiny_model


def config_of(folder: Path, **run: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": []},
            "run": {"name": "run", "storage_path": str(folder), **run},
        }
    )


def test_another_runs_checkpoint_is_needed_in_the_beginning_alone(tmp_path: Path) -> None:
    """It may be gone by the time that the run has checkpoints of its own."""
    config, folder = config_of(tmp_path, resume_from=str(tmp_path / "gone")), str(tmp_path / "run")
    with pytest.raises(CheckpointError, match="gone: no checkpoint here"):
        _check_start(config, folder)
    save_checkpoint(lambda _: None, LoopState(1), f"{folder}/checkpoints", extra={}, retained=1)
    _check_start(config, folder)
    with pytest.raises(CheckpointError, match="gone: no checkpoint here"):
        _check_start(config_of(tmp_path, resume_from=str(tmp_path / "gone"), force_new=True), folder)


@pytest.mark.parametrize(("old", "new", "fits"), [(1, 2, True), (2, 3, False), (0, 2, False)])
def test_a_checkpoint_has_the_states_of_its_engine(tmp_path: Path, old: int, new: int, fits: bool) -> None:
    engine = {"engine": {"kind": "zero", "zero_stage": old}}
    saved = TrainConfig.model_validate(config_of(tmp_path).model_dump() | engine).model_dump_json()
    donor = save_checkpoint(
        lambda _: None, LoopState(1), f"{tmp_path}/donor", extra={"config.json": saved}, retained=1
    )
    values = config_of(tmp_path, resume_from=donor.path).model_dump()
    config = TrainConfig.model_validate(values | {"engine": {"kind": "zero", "zero_stage": new}})
    if fits:
        start = _check_start(config, str(tmp_path / "run"))
        assert start is not None
        assert start.state.step == 1
        _check_steps_left(start, 2)
        with pytest.raises(
            ConfigError, match=r"donor/\S+ is of step 1, and this run ends with step 1: raise run.max_st"
        ):
            _check_steps_left(start, 1)
        return
    with pytest.raises(ConfigError) as caught:
        _check_start(config, str(tmp_path / "run"))
    assert str(caught.value) == (
        f"run.resume_from {donor.path} has optimizer states of engine.kind zero, zero_stage {old}; got zero, {new}: "
        "take its engine, or export it and set model.path to begin with its weights"
    )


def test_a_model_that_cannot_be_outlined_is_described_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "model")
    config = config_of(tmp_path)
    assert describe(config)["model"]["parameters"] > 0

    def fail(_: Any) -> None:
        raise RuntimeError("it has to see its weights")

    monkeypatch.setattr(footprint, "model_class", fail)
    plan = describe(config)
    assert plan["model"]["parameters"] == "known when it is loaded"
    assert "memory" not in plan["workers"]


def test_states_that_cannot_be_converted_fix_the_number_of_workers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    values = config_of(tmp_path, num_workers=[1, 2]).model_dump() | {"optim": {"name": "sgd"}}
    with pytest.raises(
        ConfigError,
        match=r"^run.num_workers 1 to 2: DeepSpeed converts the states of adamw_torch and adamw_torch_fused for "
        r"another number of workers, not of sgd: take one of these, engine.kind plain, or a fixed number",
    ):
        describe(TrainConfig.model_validate(values))
    describe(TrainConfig.model_validate(values | {"engine": {"kind": "plain"}}))


def test_deepspeeds_own_options_are_read_beforehand(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")

    def described(**options: Any) -> Any:
        engine = {"deepspeed": options}
        return describe(TrainConfig.model_validate(config_of(tmp_path).model_dump() | {"engine": engine}))

    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}
    assert described(zero_optimization=buckets, wall_clock_breakdown=True)["workers"]["engine"] == "ZeRO 2"
    for given, text in (
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, "not take reduce_bucket_sise 1 (Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "x"}}, "not take reduce_bucket_size 'x' ("),
        ({"communication_data_type": "fp7"}, "not take it: Invalid communication_data_type. Supported"),
        ({"flops_profiler": {"enabled": True}, "comms_loger": {}}, "comms_loger. Did you mean comms_logger?"),
    ):
        with pytest.raises(ConfigError, match=r"^engine.deepspeed: DeepSpeed ") as caught:
            described(**given)
        assert text in str(caught.value)


def test_what_is_wrong_with_an_adapter_is_said_beforehand(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save_tiny_model(tmp_path / "model")
    lora = {"path": str(tmp_path / "model"), "lora": {"target_modules": ["nonexistent"]}}
    config = TrainConfig.model_validate({**config.model_dump(), "model": lora})
    with pytest.raises(ModelError, match=r"^model.lora: Target modules .*nonexistent"):
        describe(config)
