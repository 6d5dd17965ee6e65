"""What fails on one rank stops all of them, in words, with the last good checkpoint in place."""

import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_prefopt.config import TrainConfig
from ray_prefopt.engine.build import build_engine
from ray_prefopt.engine.zero import to_universal
from ray_prefopt.errors import CheckpointError, NonFiniteError
from ray_prefopt.training import ranks
from ray_prefopt.training.checkpoint import latest_checkpoint
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import Reports, train_worker
from tests.gang import run_gang
from tests.invariant.training import Inputs
from tests.tiny import random_pairs, save_tiny_model, write_blocks

POISON = 500
"""A token that one pair has; its embedding is not a number."""


def _train(job: Job, largest_file: int | None = None) -> tuple[list[str], str]:
    """Warnings, and the error, of this rank; `largest_file` fills rank 1's disk."""
    warnings: list[str] = []
    if largest_file is not None and ranks.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    reports = Reports(lambda _: None, lambda _: None, lambda _: None, warnings.append, lambda _: None)
    try:
        train_worker(job, torch.device("cpu"), reports)
    except (NonFiniteError, CheckpointError) as error:
        return warnings, f"{type(error).__name__}: {error}"
    return warnings, ""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Pair 20 holds the token."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = save_tiny_model(folder / "model", tie_word_embeddings=False)
    weights = load_file(f"{model}/model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, f"{model}/model.safetensors", metadata={"format": "pt"})
    pairs = random_pairs(48)
    pairs[20].chosen[-2] = POISON
    return Inputs(model, write_blocks(folder / "blocks", pairs), "")


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("plain", "float32"),
        ("zero2", "float32"),
        ("zero3", "float32"),
        ("plain", "float16"),
        ("zero0", "float16"),
    ],
)
def test_a_loss_that_is_not_finite(poisoned: Inputs, tmp_path: Path, engine: str, dtype: str) -> None:
    config = poisoned.config(engine, dtype=dtype, data={"shuffle": False}, run={"save_steps": 1})
    job = Job(config, str(tmp_path), 0, poisoned.blocks, {})
    (_, error), (_, other) = run_gang(2, _train, job)
    assert error == other
    assert re.match(
        r"NonFiniteError: step 2, rank [01]: the loss of micro-batch \d is nan, pair ids \[", error
    )
    assert "nothing was updated. Start again from the last checkpoint with a smaller" in error
    named = error.partition("pair ids [")[2].partition("]")[0]
    assert "20" in named.split(", ")
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    assert checkpoint.state.step == 1


@pytest.mark.parametrize("engine", ["plain", "zero0", "zero2"])
def test_a_gradient_that_is_not_finite(inputs: Inputs, tmp_path: Path, engine: str) -> None:
    """Losses are finite, but their sum's gradient overflows."""
    config = inputs.config(engine, loss={"cpo_alpha": 1e38})
    job = Job(config, str(tmp_path), 0, inputs.blocks, {})
    for _, error in run_gang(2, _train, job):
        assert error.startswith("NonFiniteError: step 1: the gradient norm is ")
        assert "though every loss is finite" in error
    assert latest_checkpoint(job.checkpoints) is None


def _fill(inputs: Inputs, folder: Path, engine: str, **run: Any) -> tuple[Job, list[tuple[list[str], str]]]:
    """Train with a disk on rank 1 that takes files up to 1 KB: not one of DeepSpeed's."""
    job = Job(inputs.config(engine, run=run), str(folder), 0, inputs.blocks, {})
    return job, run_gang(2, _train, job, 1024)


def test_a_full_disk_stops_the_run(inputs: Inputs, tmp_path: Path) -> None:
    good = Job(inputs.config("zero2", run={"max_steps": 2}), str(tmp_path), 0, inputs.blocks, {})
    run_gang(2, _train, good)
    job, outcomes = _fill(inputs, tmp_path, "zero2", max_steps=4)
    for warnings, error in outcomes:
        assert warnings == []
        assert error.startswith(
            f"CheckpointError: step 4: the checkpoint could not be written to {job.checkpoints}: "
        )
        assert "rank 1: " in error
        assert "rank 0: " not in error
        assert error.endswith(
            "The one before it stands; free space or mend the storage, and start the same command again"
        )
    checkpoint = latest_checkpoint(job.checkpoints)
    assert checkpoint is not None
    assert checkpoint.state.step == 2
    assert len(list(Path(job.checkpoints).iterdir())) == 1


def test_a_full_disk_may_be_waited_out(inputs: Inputs, tmp_path: Path) -> None:
    """The last checkpoint is the result: without it there is nothing to go on for."""
    _, outcomes = _fill(inputs, tmp_path, "zero2", on_save_error="continue")
    for warnings, error in outcomes:
        assert len(warnings) == 1
        assert warnings[0].startswith("step 2: the checkpoint could not be written to ")
        assert error.startswith("CheckpointError: step 4: the checkpoint could not be written to ")


def _load_errors(config: TrainConfig, folder: Path) -> list[str]:
    """What the ZeRO engine says of checkpoints that no manifest vouches for."""
    engine = build_engine(config, total_steps=4, device=torch.device("cpu"))
    engine.save(folder / "good")
    empty, torn = folder / "empty", folder / "torn"
    if ranks.rank() == 0:
        empty.mkdir()
        shutil.copytree(folder / "good", torn)
        for file in torn.rglob("*_states.pt"):
            file.write_bytes(file.read_bytes()[:100])
    ranks.all_gather(None)
    return [_text_of(partial(engine.load, empty)), _text_of(partial(engine.load, torn))]


def _text_of(action: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        action()
    return str(caught.value)


def test_engine_folders_that_cannot_be_loaded(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    ((empty, torn),) = run_gang(1, _load_errors, inputs.config("zero2"), tmp_path)
    assert empty == f"{tmp_path}/empty: holds no DeepSpeed checkpoint named 'engine'"
    assert torn.startswith(f"{tmp_path}/torn: DeepSpeed cannot load it (")
    converting = _text_of(partial(to_universal, tmp_path / "torn", tmp_path / "out"))
    assert converting.startswith(
        f"{tmp_path}/torn: DeepSpeed cannot convert it for another number of workers ("
    )
