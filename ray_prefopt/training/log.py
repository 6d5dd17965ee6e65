"""The run's own record: an actor that rank 0 talks to without waiting, and the driver reads from."""

import json
import time
from typing import Any

import ray
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tensorboardX import SummaryWriter

from ray_prefopt.errors import PrefoptError
from ray_prefopt.training.checkpoint import LoopState, write_text

Event = tuple[str, Any]
"""Kind (`started`, `metrics`, `saved`, `warning`) and what belongs to it."""


@ray.remote(num_cpus=0)
class RunLog:
    """Writes metrics.jsonl and TensorBoard events, and keeps the events of this attempt for the driver's display."""

    def __init__(self, folder: str) -> None:
        self._fs, self._folder = url_to_fs(folder)
        self._path = f"{self._folder}/metrics.jsonl"
        self._records: list[dict[str, Any]] = []
        if self._fs.exists(self._path):
            # What follows the last line break is half a line, of a process that was killed while it wrote.
            *lines, _ = self._fs.cat_file(self._path).split(b"\n")
            self._records = [json.loads(line) for line in lines]
        self._events: list[Event] = []
        self._board: SummaryWriter | None = None
        self._fatal: PrefoptError | None = None

    def started(self, state: LoopState) -> None:
        """Workers begin after `state.step`: what was logged beyond it will be logged again."""
        self._records = [record for record in self._records if record["step"] <= state.step]
        self.flush()
        if self._board is not None:
            self._board.close()
        if isinstance(self._fs, LocalFileSystem):
            self._board = SummaryWriter(
                f"{self._folder}/tensorboard",
                purge_step=state.step + 1,
                filename_suffix=f".{time.time_ns()}",  # names have seconds: one begun in the same would be overwritten
            )
        self._events.append(("started", state))

    def log(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        if isinstance(self._fs, LocalFileSystem):
            with open(self._path, "a") as file:
                file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    prefix = "" if name.startswith("eval_") else "train/"
                    self._board.add_scalar(prefix + name, value, record["step"])
        self._events.append(("metrics", record))

    def saved(self, path: str, step: int) -> None:
        self.flush()
        self._events.append(("saved", (path, step)))

    def warn(self, text: str) -> None:
        self._events.append(("warning", text))

    def fail(self, error: PrefoptError) -> None:
        """The run cannot go on, however often it is tried."""
        self._fatal = self._fatal or error

    def fatal(self) -> PrefoptError | None:
        return self._fatal

    def events(self, since: int) -> list[Event]:
        return self._events[since:]

    def records(self) -> list[dict[str, Any]]:
        return self._records

    def flush(self) -> None:
        """Make the file hold every record; object stores have no append, so there it happens at checkpoints."""
        self._fs.makedirs(self._folder, exist_ok=True)
        write_text(self._fs, self._path, "".join(json.dumps(record) + "\n" for record in self._records))
        if self._board is not None:
            self._board.flush()
