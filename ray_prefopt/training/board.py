"""A TensorBoard event file that holds all it was told once it is flushed.

tensorboardX's SummaryWriter flushes what its queue has handed on, so that a process that dies may leave steps out.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board:
    """Scalars by tag and step; TensorBoard forgets what earlier files of the folder have from `first_step` on."""

    def __init__(self, folder: str, first_step: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Names have seconds: one begun in the same would be overwritten.
        self._file = EventsWriter(f"{folder}/events", f".{time.time_ns()}")
        self._file.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
