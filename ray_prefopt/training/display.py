"""What a run shows on the driver's terminal: a live bar, or a line per record where there is none."""

import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.log import Event

POLL_S = 0.5


class Display:
    """Follows a RunLog from a thread while the driver waits for the run; everything goes to stderr."""

    def __init__(self, log: Any, total_steps: int, observer: Callable[[Event], None] | None = None) -> None:
        """`observer` is called with every event, in its order, from that thread."""
        self._log = log
        self._observer = observer
        self._total = total_steps
        self._seen = 0
        self._workers = 0
        self._done = threading.Event()
        self._console = Console(stderr=True, highlight=False)
        self._thread = threading.Thread(target=self._follow, daemon=True, name="display")
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            # In a narrow terminal the summary is what gives way.
            TextColumn(
                "{task.fields[summary]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            expand=True,
            console=self._console,
            disable=not (sys.stderr.isatty() and self._console.is_interactive),
        )
        self._task = self._progress.add_task("train", total=total_steps, summary="")

    def __enter__(self) -> Self:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join(timeout=5)
        self._progress.stop()

    def _follow(self) -> None:
        while not self._done.wait(POLL_S):
            self._show_new()
        self._show_new()

    def _show_new(self) -> None:
        try:
            events = ray.get(self._log.events.remote(self._seen), timeout=10)
        except Exception:  # the log is gone or busy; showing progress is never worth failing for
            return
        self._seen += len(events)
        for kind, value in events:
            getattr(self, f"_on_{kind}")(value)
            if self._observer is not None:
                self._observer((kind, value))

    def _on_started(self, value: tuple[LoopState, int]) -> None:
        state, workers = value
        if self._workers not in (0, workers):
            self._say(
                f"workers were started again, {workers} instead of {self._workers}: going on after step {state.step}"
            )
        elif self._workers:
            self._say(f"workers were started again: going on after step {state.step}")
        elif state.step:
            self._say(f"resuming after step {state.step} of {self._total}; no pair is repeated or skipped")
        self._workers = workers
        self._progress.reset(self._task, total=self._total, completed=state.step)

    def _on_metrics(self, record: dict[str, Any]) -> None:
        if any(name.startswith("eval_") for name in record):
            self._say(f"step {record['step']}: {eval_summary(record)}")
            return
        summary = train_summary(record)
        self._progress.update(self._task, completed=record["step"], summary=summary)
        if self._progress.disable:
            percent = 100 * record["step"] // self._total
            self._say(f"step {record['step']}/{self._total} {percent}% | {summary}")

    def _on_saved(self, value: tuple[str, int]) -> None:
        path, step = value
        self._say(f"step {step}: checkpoint {path.rsplit('/', 1)[-1]}")

    def _on_controller(self, controller: Any) -> None:
        """Nothing to see."""

    def _on_note(self, text: str) -> None:
        self._say(text)

    def _on_warning(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def train_summary(record: dict[str, Any]) -> str:
    """The numbers to watch, in a line."""
    return (
        f"loss {record['loss']:.4f} acc {record['rewards/accuracies']:.2f} margin {record['rewards/margins']:.3f} | "
        f"logps {record['logps_mean/chosen']:.2f} {record['logps_mean/rejected']:.2f} | "
        f"{record['pairs_per_second']:.1f} pairs/s wait {100 * record['data_wait']:.1f}%"
    )


def eval_summary(record: dict[str, Any]) -> str:
    """Loss, accuracy and margin of each evaluation set."""
    shown, parts = ("loss", "rewards/accuracies", "rewards/margins"), ("nll_loss", "aux_loss")
    return "  ".join(
        f"{name} {value:.4f}"
        for name, value in record.items()
        if name.endswith(shown) and not name.endswith(parts)
    )
