"""One short run, whole and undisturbed, that the tests of this folder compare theirs with."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.config import TrainConfig
from ray_prefopt.training.folder import TrainResult
from ray_prefopt.training.run import train
from tests.tiny import chat_row, save_tiny_model

STEPS = 12


@dataclass(frozen=True)
class Toy:
    """Pairs, a model, and the config of a run over them: 2 workers, ZeRO-2, fp32, 12 steps of 4 pairs."""

    folder: Path

    def values(self, **run: Any) -> dict[str, Any]:
        return {
            "model": {"path": str(self.folder / "model"), "dtype": "float32"},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "eval": str(self.folder / "eval.jsonl"),
                "max_length": 128,
                "max_prompt_length": 64,
            },
            "loss": {"kind": "cpo_simpo", "cpo_alpha": 0.5},
            "optim": {"learning_rate": 1e-2},
            "run": {
                "name": "straight",
                "storage_path": str(self.folder / "runs"),
                "num_workers": 2,
                "global_batch": 4,
                "micro_batch": 2,
                "save_steps": 3,
                **run,
            },
        }

    def config(self, **run: Any) -> TrainConfig:
        return TrainConfig.model_validate(self.values(**run))


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(numbers: range) -> list[dict[str, Any]]:
    return [
        chat_row(f"What is {n} plus {n}?", f"It is {n + n}, of course.", f"{n}? I do not know.")
        for n in numbers
    ]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    save_tiny_model(folder / "model")
    write_rows(folder / "train.jsonl", rows(range(4 * STEPS)))
    write_rows(folder / "eval.jsonl", rows(range(100, 109)))
    return Toy(folder)


@pytest.fixture(scope="session")
def straight(toy: Toy, ray_local: None) -> TrainResult:
    """The undisturbed run."""
    return train(toy.config())
