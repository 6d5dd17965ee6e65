"""The record of a run: metrics.jsonl and TensorBoard hold every step once, also when workers begin again."""

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import fsspec
import pytest
from tensorboardX.proto.event_pb2 import Event

from ray_prefopt.errors import DataError, NonFiniteError
from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.log import RunLog

Log: Any = RunLog.__ray_metadata__.modified_class
"""The class inside the actor."""


def record(step: int, **values: float) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, **values}


def lines(folder: Path | str) -> list[dict[str, Any]]:
    fs, path = fsspec.core.url_to_fs(str(folder))
    return [json.loads(line) for line in fs.cat_file(f"{path}/metrics.jsonl").splitlines()]


def run(folder: Path | str, start: int, stop: int) -> Any:
    """A run that logs the steps after `start` up to `stop`."""
    log = Log(str(folder))
    log.started(LoopState(start), 2)
    for step in range(start + 1, stop + 1):
        log.log(record(step))
    return log


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard would show: by tag and step; a file that begins with a purge takes back what was beyond it."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log") and event.session_log.status == 1:
                for values in found.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    return dict(found)


def test_memory_that_was_seen_is_beside_what_was_expected(tmp_path: Path) -> None:
    log = Log(str(tmp_path))
    log.compare_memory(2_100_000_000, True)  # nothing was seen: another process had the run's last step
    log.needed(1_900_000_000)
    log.compare_memory(2_100_000_000, False)
    assert log.events(0) == []
    log.compare_memory(2_100_000_000, True)
    assert log.events(0) == [("note", "memory: 1.9 GB seen, 2.1 GB estimated")]
    assert log.memory() == {"seen": 1_900_000_000, "estimated": 2_100_000_000}


def test_each_record_is_a_line_at_once(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 3)
    assert lines(tmp_path) == [record(1), record(2), record(3)] == log.records()
    log.log({"step": 3, "eval_loss": 0.5})
    assert lines(tmp_path)[3:] == [{"step": 3, "eval_loss": 0.5}]


def test_a_resumed_run_takes_back_what_it_will_log_again(tmp_path: Path) -> None:
    run(tmp_path, 0, 5)
    log = run(tmp_path, 3, 6)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in log.records()] == [1, 2, 3, 4, 5, 6]


def test_workers_that_begin_again_in_the_same_attempt_do_as_well(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 5)
    log.started(LoopState(2), 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    log.log(record(3))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_what_came_before_the_first_step_is_logged_again_too(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 0)
    for _ in range(2):
        log.started(LoopState(), 2)
        log.log({"step": 0, "eval_loss": 0.5})
    assert lines(tmp_path) == [{"step": 0, "eval_loss": 0.5}]
    log.started(LoopState(1), 2)
    assert lines(tmp_path) == [{"step": 0, "eval_loss": 0.5}]


def test_a_process_killed_while_writing_leaves_whole_lines(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    log = Log(str(tmp_path))
    assert [line["step"] for line in log.records()] == [1, 2]
    log.started(LoopState(2), 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 4)
    log.log({"step": 4, "eval_loss": 0.25})
    log.saved("folder/step-4", 4)  # flushes
    assert scalars(tmp_path) == {
        "train/loss": pytest.approx({step: 1 / step for step in (1, 2, 3, 4)}),
        "eval_loss": {4: 0.25},
    }
    resumed = Log(str(tmp_path))
    resumed.started(LoopState(2), 2)
    resumed.log(record(3, extra=7.0))
    resumed.flush()
    assert scalars(tmp_path) == {
        "train/loss": pytest.approx({step: 1 / step for step in (1, 2, 3)}),
        "train/extra": {3: 7.0},
        "eval_loss": {},
    }


def test_events_are_those_of_this_attempt_in_order(tmp_path: Path) -> None:
    run(tmp_path, 0, 2)
    log = Log(str(tmp_path))
    assert log.events(0) == []
    log.started(LoopState(1), 2)
    log.log(record(2))
    log.saved("folder/step-2", 2)
    log.warn("the disk is slow")
    assert log.events(0) == [
        ("started", (LoopState(1), 2)),
        ("metrics", record(2)),
        ("saved", ("folder/step-2", 2)),
        ("warning", "the disk is slow"),
    ]
    assert log.events(3) == [("warning", "the disk is slow")]
    assert log.events(4) == []


def test_workers_that_are_lost_or_resized(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 4)
    log.lost("rank 1: its node died")
    log.saved("folder/step-4", 4)
    log.log(record(5))
    log.lost("rank 0: it was killed")
    log.started(LoopState(4), 1)
    log.resizing(3)
    assert [event for event in log.events(0) if event[0] in ("warning", "note")] == [
        (
            "warning",
            "workers were lost after step 4: rank 1: its node died; starting them again, from the beginning",
        ),
        (
            "warning",
            "workers were lost after step 5: rank 0: it was killed; starting them again, "
            "from the checkpoint of step 4",
        ),
        ("note", "resizing from 1 to 3 workers after step 4, from the checkpoint of step 4"),
    ]


def test_the_first_fatal_error_counts(tmp_path: Path) -> None:
    log = Log(str(tmp_path))
    assert log.fatal() is None
    first = NonFiniteError("step 7, rank 0")
    log.fail(first)
    log.fail(DataError("a block is damaged"))
    assert log.fatal() is first


def test_object_stores_have_the_file_at_checkpoints() -> None:
    folder = "memory://bucket/log/run"
    log = run(folder, 0, 3)
    assert lines(folder) == []
    log.saved(f"{folder}/checkpoints/step-3", 3)
    assert lines(folder) == [record(1), record(2), record(3)]
    resumed = Log(folder)
    resumed.started(LoopState(2), 2)
    resumed.log(record(3))
    resumed.flush()
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    assert fsspec.filesystem("memory").ls("/bucket/log/run", detail=False) == [
        "/bucket/log/run/metrics.jsonl"
    ]


def test_a_line_that_a_full_disk_kept_out_comes_with_the_next(tmp_path: Path) -> None:
    log = run(tmp_path, 0, 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()  # as if nothing could be written there
    log.log(record(3))
    log.saved("a/checkpoint", 3)
    assert any("the log cannot be written: " in str(event) for event in log.events(0))
    (tmp_path / "metrics.jsonl").rmdir()
    log.log(record(4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
