"""A run whose steps somebody else lets happen, as a process of its own: `python -m tests.integration.paced`."""

import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from ray_prefopt.settings import load_config
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.run import train


class Pace(TrainerCallback):
    """Holds every rank before the step that follows the one in a file."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        while int(self._file.read_text() or 0) <= state.global_step:
            time.sleep(0.05)


if __name__ == "__main__":
    config, file = sys.argv[1:]
    train(load_config([Path(config)]), hooks=Hooks(callbacks=(Pace(file),)))
