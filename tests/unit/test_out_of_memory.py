"""What a run does when a worker's memory does not hold a micro-batch; `tests/integration` has it on Ray."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ray_prefopt.config import RunConfig, TrainConfig
from ray_prefopt.data.blocks import open_blocks
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ConfigError, OutOfMemoryError
from ray_prefopt.model.load import load_architecture
from ray_prefopt.training import run as run_module
from ray_prefopt.training.checkpoint import LoopState, save_checkpoint
from ray_prefopt.training.folder import claim, refuse_other_config, with_found_micro_batch
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.job import Job
from tests.invariant.training import run
from tests.tiny import random_pairs, save_tiny_model, write_blocks


class Hungry(TrainerCallback):
    """Asks for a petabyte in a step, as long as micro-batches are larger than `fits`."""

    def __init__(self, fits: int, at_step: int = 0) -> None:
        self.fits, self.at_step = fits, at_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size > self.fits and state.global_step >= self.at_step:
            torch.empty(2**50)


def config_of(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"train": "unread"},
            "engine": {"kind": "plain"},
            "run": {
                "name": "run",
                "storage_path": str(folder),
                "global_batch": 8,
                "micro_batch": 4,
                **changes,
            },
        }
    )


def job_of(folder: Path, **changes: Any) -> Job:
    save_tiny_model(folder / "model")
    blocks = write_blocks(folder / "blocks", random_pairs(8))
    return Job(
        config_of(folder, **changes), str(folder / "run"), 0, blocks, {}, Hooks(callbacks=(Hungry(2),))
    )


def halved(config: TrainConfig, folder: Path) -> TrainConfig:
    """What a run goes on with, whose longest pair has 40 tokens packed and 56 padded."""
    pairs = [TokenizedPair([1] * 5, [2] * 5, 2, 2), TokenizedPair([1] * 20, [2] * 28, 6, 6)]
    blocks = open_blocks(write_blocks(folder / "halved", pairs))
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
    architecture = load_architecture(config.model)
    return run_module._with_half_the_micro_batch(config, architecture, blocks)


def test_a_failed_allocation_is_told_when_it_can_be_helped(tmp_path: Path) -> None:
    job = job_of(tmp_path, auto_find_batch_size=True)
    with pytest.raises(
        OutOfMemoryError,
        match=r"^out of memory with run.micro_batch 4: .* you tried to allocate 4503599627370496",
    ):
        run(job)
    smaller = replace(job, config=halved(job.config, tmp_path))
    assert [record["step"] for record in run(smaller)] == [1]


def test_otherwise_it_is_an_error_as_any_other(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        run(job_of(tmp_path))


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("something else")

    job = job_of(tmp_path, auto_find_batch_size=True)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        run(replace(job, hooks=Hooks(callbacks=(Broken(),))))


def test_micro_batches_are_halved_down_to_one(tmp_path: Path) -> None:
    config = config_of(tmp_path, micro_batch=5, eval_micro_batch=3, auto_find_batch_size=True)
    sizes = []
    for _ in range(2):
        config = halved(config, tmp_path)
        sizes.append((config.run.global_batch, config.run.micro_batch, config.run.eval_micro_batch))
    assert sizes == [(8, 2, 1), (8, 1, 1)]
    with pytest.raises(
        OutOfMemoryError, match=r"with run.micro_batch 1 too: set model.gradient_checkpointing"
    ):
        halved(config, tmp_path)
    assert halved(config_of(tmp_path), tmp_path).run.eval_micro_batch is None


@pytest.mark.parametrize(("layout", "last"), [("auto", 25), ("padded", 50)])
def test_tokens_are_halved_down_to_the_longest_pair(layout: str, last: int, tmp_path: Path) -> None:
    """From 200 over 100 and 50, which no longer holds the longest pair if it is padded."""
    config = config_of(tmp_path, micro_batch_tokens=200, auto_find_batch_size=True)
    config = config.model_copy(update={"model": config.model.model_copy(update={"layout": layout})})
    while config.run.micro_batch_tokens != last:
        config = halved(config, tmp_path)
    assert config.run.micro_batch == 4
    with pytest.raises(
        OutOfMemoryError,
        match=f"^out of memory with run.micro_batch_tokens {last} too, which the longest pair has by itself: set",
    ):
        halved(config, tmp_path)


def test_it_is_told_of_tokens_too(tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.empty(2**50)

    job = job_of(tmp_path, micro_batch_tokens=100, auto_find_batch_size=True)
    with pytest.raises(OutOfMemoryError, match=r"^out of memory with run.micro_batch_tokens 100: "):
        run(replace(job, hooks=Hooks(callbacks=(Broken(),))))


def test_a_resumed_run_begins_with_what_was_found(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    given = config_of(tmp_path, micro_batch=8, eval_micro_batch=8, auto_find_batch_size=True)

    def resumed(config: TrainConfig) -> RunConfig:
        config = with_found_micro_batch(config, folder)
        refuse_other_config(config, folder)
        return config.run

    assert resumed(given) == given.run  # there is no run yet
    claim(halved(given, tmp_path), folder)
    save_checkpoint(lambda _: None, LoopState(), f"{folder}/checkpoints", extra={}, retained=1)
    found = resumed(given)
    assert (found.micro_batch, found.eval_micro_batch, found.global_batch) == (4, 4, 8)
    assert resumed(config_of(tmp_path, micro_batch=2, auto_find_batch_size=True)).micro_batch == 2
    with pytest.raises(ConfigError, match=r"run.micro_batch: 4 -> 8"):
        resumed(config_of(tmp_path, micro_batch=8))
    tokens = config_of(tmp_path, micro_batch_tokens=4096, auto_find_batch_size=True)
    assert resumed(tokens) == tokens.run  # the run had pairs
    claim(halved(tokens, tmp_path), folder)
    assert resumed(tokens).micro_batch_tokens == 2048
    single = config_of(tmp_path, micro_batch=1, eval_micro_batch=8, auto_find_batch_size=True)
    claim(halved(single, tmp_path), folder)
    assert (resumed(single).micro_batch, resumed(single).eval_micro_batch) == (1, 4)


def test_micro_batches_of_evaluations_are_halved_by_themselves(tmp_path: Path) -> None:
    config = config_of(tmp_path, micro_batch=1, eval_micro_batch=4, auto_find_batch_size=True)
    sizes = []
    for _ in range(2):
        config = halved(config, tmp_path)
        sizes.append((config.run.micro_batch, config.run.eval_micro_batch))
    assert sizes == [(1, 2), (1, 1)]
    with pytest.raises(OutOfMemoryError, match=r"with run.micro_batch 1 too: set"):
        halved(config, tmp_path)


def test_what_was_chosen_is_not_what_was_found(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    claim(config_of(tmp_path, micro_batch=2), folder)
    save_checkpoint(lambda _: None, LoopState(), f"{folder}/checkpoints", extra={}, retained=1)
    larger = config_of(tmp_path, micro_batch=8, auto_find_batch_size=True)
    assert with_found_micro_batch(larger, folder) == larger
    refuse_other_config(larger, folder)
