"""Which numbers of a run's records become metrics, and with which tags."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_prefopt.training import gauges
from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.gauges import METRICS, PREFIX, Gauges
from ray_prefopt.training.log import RunLog
from ray_prefopt.training.metrics import METRICS as MEASURED

Values = dict[tuple[str, ...], float]


class Recorded:
    """Stands for Ray's Gauge, which keeps what it is told to itself until somebody scrapes."""

    seen: Values

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self._name, self._tag_keys = name, tag_keys
        assert description.endswith(".")

    def set(self, value: float, tags: Mapping[str, str]) -> None:
        assert tuple(tags) == self._tag_keys
        Recorded.seen[self._name, *tags.values()] = value


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Values:
    monkeypatch.setattr(gauges, "Gauge", Recorded)
    Recorded.seen = {}
    return Recorded.seen


def test_names_are_those_that_prometheus_takes() -> None:
    names = [metric.name for metric in METRICS.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(rf"{PREFIX}prefopt_[a-z_]+", name) for name in names)
    assert {"loss", "rewards/accuracies"} <= METRICS.keys() & set(MEASURED)


def test_of_a_record_what_is_known_is_shown(seen: Values) -> None:
    Gauges("first").show(
        {"step": 10, "loss": 0.5, "rewards/accuracies": 0.75, "grad_norm": 3.0, "data_wait": 0.1}
    )
    assert seen == {
        ("prefopt_step", "first"): 10,
        ("prefopt_loss", "first"): 0.5,
        ("prefopt_reward_accuracy", "first"): 0.75,
        ("prefopt_data_wait_share", "first", "0"): 0.1,
    }


def test_other_ranks_show_what_is_their_own_alone(seen: Values) -> None:
    Gauges("first").show({"data_wait": 0.25, "checkpoint_seconds": 2.0}, rank=3)
    assert seen == {("prefopt_data_wait_share", "first", "3"): 0.25}


def test_the_log_of_a_run_shows_how_it_goes(seen: Values, tmp_path: Path) -> None:
    log: Any = RunLog.__ray_metadata__.modified_class(str(tmp_path / "second"))
    log.started(LoopState(), 4)
    log.log({"step": 5, "loss": 0.5})
    log.measured(1, {"data_wait": 0.5})
    log.measured(0, {"checkpoint_seconds": 1.5})
    log.saved("folder/step-6", 6)
    log.warn("the disk is slow")
    log.log({"step": 8, "loss": 0.25})
    log.started(LoopState(6), 3)
    assert seen == {
        ("prefopt_workers", "second"): 3,
        ("prefopt_starts", "second"): 2,
        ("prefopt_step", "second"): 6,
        ("prefopt_loss", "second"): 0.25,
        ("prefopt_data_wait_share", "second", "1"): 0.5,
        ("prefopt_checkpoint_seconds", "second"): 1.5,
        ("prefopt_checkpoint_step", "second"): 6,
        ("prefopt_warnings", "second"): 1,
    }
