"""The run's own record: an actor that ranks, Ray Train's controller and the driver write to, and the driver reads."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import fsspec
import ray
import ray.exceptions
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from rich.filesize import decimal

from ray_prefopt.errors import PrefoptError
from ray_prefopt.storage import write_text
from ray_prefopt.training.board import Board
from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.gauges import Gauges

if TYPE_CHECKING:  # the actor of a run without them should not wait for transformers
    from ray_prefopt.training.callbacks import Returned
    from ray_prefopt.training.predictions import Evaluation
    from ray_prefopt.training.trackers import Trackers

CLOSE_S = 60.0
"""Longest wait for trackers to finish."""
Event = tuple[str, Any]
"""Kind (`controller`, `started`, `metrics`, `saved`, `note`, `warning`) and what belongs to it."""


class Lines:
    """A file of JSON lines that is held in memory too."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self.rows: list[dict[str, Any]] = []
        self._is_behind = False
        """Whether the file lacks a row, or has half of one."""
        if fs.exists(path):
            # What follows the last line break is half a line, of a process that was killed while it wrote.
            *lines, _ = fs.cat_file(path).split(b"\n")
            self.rows = [json.loads(line) for line in lines]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; to the file as well where it can be appended to. What a full disk keeps out of it comes later."""
        self.rows.append(row)
        if isinstance(self._fs, LocalFileSystem):
            with suppress(OSError):
                if self._is_behind:
                    self.flush()
                else:
                    self._is_behind = True
                    with open(self._path, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    self._is_behind = False

    def flush(self) -> None:
        write_text(self._fs, self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._is_behind = False

    @property
    def is_used(self) -> bool:
        return bool(self.rows) or self._fs.exists(self._path)


@ray.remote(num_cpus=0)
class RunLog:
    """Writes metrics.jsonl, TensorBoard events and gauges; keeps this attempt's events for the driver's display."""

    def __init__(
        self, folder: str, trackers: "Callable[[Callable[[str], None]], Trackers] | None" = None
    ) -> None:
        """`trackers` makes those that are told too, given what takes their warnings."""
        self._fs, self._folder = url_to_fs(folder)
        self._metrics = Lines(self._fs, f"{self._folder}/metrics.jsonl")
        self._samples = Lines(self._fs, f"{self._folder}/samples.jsonl")
        self._events: list[Event] = []
        self._gauges = Gauges(self._folder.rstrip("/").rsplit("/", 1)[-1])
        self._workers = self._step = self._saved_step = 0
        self._memory: dict[str, int] = {}
        self._board: Board | None = None
        self._controller: Any = None
        self._fatal: PrefoptError | None = None
        self._evaluation: Evaluation | None = None
        self._callbacks: Returned | None = None
        self._trackers = trackers(self.warn) if trackers else None

    def started(self, state: LoopState, workers: int) -> None:
        """So many workers begin after `state.step`: what was logged beyond it will be logged again."""
        for lines in (self._metrics, self._samples):
            lines.rows = [row for row in lines.rows if state.step and row["step"] <= state.step]
        self.flush()
        if self._board is not None:
            self._board.close()
        if isinstance(self._fs, LocalFileSystem):
            self._board = Board(f"{self._folder}/tensorboard", first_step=state.step + 1)
        if self._trackers:
            self._trackers.begin(state.step)
        self._gauges.count("starts")
        self._gauges.show({"step": state.step, "checkpoint_step": state.step, "workers": workers})
        self._workers, self._step, self._saved_step = workers, state.step, state.step
        self._events.append(("started", (state, workers)))

    def log(self, record: dict[str, Any]) -> None:
        self._metrics.append(record)
        if self._board is not None:
            tags = {name: name if name.startswith("eval_") else f"train/{name}" for name in record}
            self._board.add({tags[name]: record[name] for name in record if name != "step"}, record["step"])
        if self._trackers:
            self._trackers.log(record)
        self._gauges.show(record)
        self._step = record["step"]
        self._events.append(("metrics", record))

    def measured(self, rank: int, values: dict[str, float]) -> None:
        """What `rank` has found about itself, such as `data_wait`."""
        self._gauges.show(values, rank)

    def needed(self, memory: int) -> None:
        """So many bytes were used at the peak by the worker that used most."""
        self._memory["seen"] = memory

    def compare_memory(self, estimated: int, is_comparable: bool) -> None:
        """Say what was seen beside what was expected, where that tells something."""
        self._memory["estimated"] = estimated
        if is_comparable and "seen" in self._memory:
            seen = decimal(self._memory["seen"])
            self.note(f"memory: {seen} seen, {decimal(estimated)} estimated")

    def memory(self) -> dict[str, int]:
        return self._memory

    def saved(self, path: str, step: int) -> None:
        try:
            self.flush()
        except OSError as error:
            self.warn(f"the log cannot be written: {error}")
        self._gauges.show({"checkpoint_step": step})
        self._saved_step = step
        self._events.append(("saved", (path, step)))

    def sampled(self, samples: list[dict[str, Any]]) -> None:
        for sample in samples:
            self._samples.append(sample)
        if self._trackers:
            self._trackers.samples(samples)

    def evaluated(self, found: "Evaluation") -> None:
        """What `loop.evaluate_worker` returned."""
        self.log({"step": 0, **found.record})
        self._evaluation = found

    def evaluation(self) -> "Evaluation | None":
        return self._evaluation

    def returned(self, callbacks: "Returned") -> None:
        self._callbacks = callbacks

    def callbacks(self) -> "Returned | None":
        """As they were when training ended."""
        return self._callbacks

    def controlled(self, controller: Any) -> None:
        """`controller` is the actor that runs the workers of this attempt: they can be stopped by its `abort`."""
        self._controller = controller
        self._events.append(("controller", controller))

    def lost(self, why: str) -> None:
        """The workers are gone, or some of them, so that all are to be started again."""
        self.warn(f"workers were lost after step {self._step}: {why}; starting them again, {self._from()}")

    def resizing(self, workers: int) -> None:
        """There will be so many workers."""
        self.note(
            f"resizing from {self._workers} to {workers} workers after step {self._step}, {self._from()}"
        )

    def _from(self) -> str:
        return f"from the checkpoint of step {self._saved_step}" if self._saved_step else "from the beginning"

    def controller(self) -> Any:
        return self._controller

    def note(self, text: str) -> None:
        """Something that whoever watches may want to know."""
        self._events.append(("note", text))

    def warn(self, text: str) -> None:
        self._gauges.count("warnings")
        self._events.append(("warning", text))

    def fail(self, error: PrefoptError) -> None:
        """The run cannot go on, however often it is tried."""
        self._fatal = self._fatal or error

    def try_again(self, why: str) -> None:
        """What it failed for has been seen to."""
        self._fatal = None
        self.warn(why)

    def fatal(self) -> PrefoptError | None:
        return self._fatal

    def events(self, since: int) -> list[Event]:
        return self._events[since:]

    def records(self) -> list[dict[str, Any]]:
        return self._metrics.rows

    def close(self) -> None:
        """No more is to come."""
        if self._trackers:
            self._trackers.end()

    def flush(self) -> None:
        """Make the files hold everything; object stores have no append, so there it happens at checkpoints."""
        self._fs.makedirs(self._folder, exist_ok=True)
        self._metrics.flush()
        if self._samples.is_used:
            self._samples.flush()
        if self._board is not None:
            self._board.flush()


@contextmanager
def closing_log(log: Any) -> Iterator[None]:
    """Close the log at the end, whatever the end is; trackers may have files to finish."""
    try:
        yield
    finally:
        with suppress(ray.exceptions.RayError):  # the node of the log is gone
            ray.get(log.close.remote(), timeout=CLOSE_S)
