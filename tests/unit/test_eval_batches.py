"""How many pairs an evaluation takes at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_prefopt.config import TrainConfig
from ray_prefopt.training.job import Job
from ray_prefopt.training.loop import evaluate_worker
from tests.tiny import random_pairs, save_tiny_model, write_blocks

PAIRS = random_pairs(8, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def evaluated(model: str, folder: Path, nll_average: str, **run: Any) -> dict[str, float]:
    config = TrainConfig.model_validate(
        {
            "model": {"path": model, "dtype": "float32"},
            "data": {"train": []},
            "loss": {"kind": "cpo", "nll_average": nll_average},
            "engine": {"kind": "plain"},
            "run": run,
        }
    )
    blocks = write_blocks(folder / "blocks", PAIRS)
    job = Job(config, str(folder), 0, None, {"": blocks})
    return evaluate_worker(job, torch.device("cpu")).record


def test_the_evaluation_batch_is_its_own(model: str, tmp_path: Path) -> None:
    """Averaged over micro-batches, the loss shows their size: one batch of all pairs is the mean over all tokens."""
    by_step = evaluated(model, tmp_path, "step", micro_batch=2)["eval_loss"]
    loss = {
        given: evaluated(model, tmp_path, "micro_batch", micro_batch=given[0], eval_micro_batch=given[1])[
            "eval_loss"
        ]
        for given in [(2, 8), (2, None), (8, 2)]
    }
    assert loss[2, 8] == pytest.approx(by_step, rel=1e-5)
    assert loss[2, None] == pytest.approx(loss[8, 2], rel=1e-6)
    assert abs(loss[8, 2] - by_step) > 1e-4
