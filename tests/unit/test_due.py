"""When a run logs, evaluates and saves."""

import pytest

from ray_prefopt.config import Interval, RunConfig
from ray_prefopt.training.due import Due

STEPS_PER_EPOCH, LAST = 4, 10


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (None, [10]),
        (1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (3, [3, 6, 9, 10]),
        (50, [10]),
        (0.25, [3, 6, 9, 10]),  # every ceil(2.5) steps, as transformers counts
        (0.5, [5, 10]),
        ("epoch", [4, 8, 10]),
    ],
)
def test_intervals(interval: Interval | None, expected: list[int]) -> None:
    due = Due(RunConfig(log_steps=interval, eval_steps=interval, save_steps=interval), STEPS_PER_EPOCH, LAST)
    for is_due in (due.log, due.evaluate, due.save):
        assert [step for step in range(1, LAST + 1) if is_due(step)] == expected


def test_the_first_step_can_be_logged_too() -> None:
    due = Due(RunConfig(log_steps=5, log_first_step=True, save_steps=5), STEPS_PER_EPOCH, LAST)
    assert [step for step in range(1, LAST + 1) if due.log(step)] == [1, 5, 10]
    assert [step for step in range(1, LAST + 1) if due.save(step)] == [5, 10]


@pytest.mark.parametrize(
    ("interval", "delay", "expected"),
    [
        (3, 6, [6, 9, 10]),
        (3, 5, [6, 9, 10]),
        (3, 9.5, [10]),
        (None, 10, [10]),
        (3, 11, []),
        ("epoch", 2, [8, 10]),
        ("epoch", 2.5, [10]),
        ("epoch", 3, []),  # the last step is in the middle of the third epoch
    ],
)
def test_the_first_evaluation_can_be_delayed(
    interval: Interval | None, delay: float, expected: list[int]
) -> None:
    """As transformers does, which delays the last evaluation too."""
    run = RunConfig(log_steps=interval, eval_steps=interval, eval_delay=delay, save_steps=interval)
    due = Due(run, STEPS_PER_EPOCH, LAST)
    assert [step for step in range(1, LAST + 1) if due.evaluate(step)] == expected
    assert due.save(LAST)
    assert due.log(LAST)
