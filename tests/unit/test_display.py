"""What a run says on stderr, line by line."""

from types import SimpleNamespace
from typing import Any

import pytest

from ray_prefopt.training import display as display_module
from ray_prefopt.training.checkpoint import LoopState
from ray_prefopt.training.display import Display, eval_summary, train_summary

RECORD = {
    "step": 12,
    "loss": 0.69314,
    "rewards/accuracies": 0.625,
    "rewards/margins": 0.1236,
    "logps_mean/chosen": -1.234,
    "logps_mean/rejected": -2.345,
    "pairs_per_second": 123.46,
    "data_wait": 0.0123,
}
SUMMARY = "loss 0.6931 acc 0.62 margin 0.124 | logps -1.23 -2.35 | 123.5 pairs/s wait 1.2%"


class FakeLog:
    """A RunLog whose events are already there; `ray.get` answers what it was handed."""

    def __init__(self, *events: tuple[str, Any]) -> None:
        self.all = list(events)
        self.asked: list[int] = []
        self.events = SimpleNamespace(remote=self._events)

    def _events(self, since: int) -> list[tuple[str, Any]]:
        self.asked.append(since)
        return self.all[since:]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_module, "ray", SimpleNamespace(get=lambda value, **_: value))
    monkeypatch.setattr(display_module, "POLL_S", 0.01)


def shown(capsys: pytest.CaptureFixture[str], *events: tuple[str, Any], total_steps: int = 40) -> list[str]:
    with Display(FakeLog(*events), total_steps):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_the_numbers_to_watch() -> None:
    assert train_summary(RECORD) == SUMMARY


def test_the_numbers_of_evaluations() -> None:
    record = {
        "step": 3,
        "epoch": 0.5,
        "eval_a_loss": 0.5,
        "eval_a_rewards/accuracies": 0.75,
        "eval_a_rewards/chosen": 9.0,
        "eval_b_rewards/margins": -0.25,
        "eval_b_nll_loss": 1.0,
    }
    assert eval_summary(record) == (
        "eval_a_loss 0.5000  eval_a_rewards/accuracies 0.7500  eval_b_rewards/margins -0.2500"
    )


def test_a_run_from_the_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        ("started", (LoopState(), 2)),
        ("metrics", RECORD),
        ("metrics", {"step": 12, "epoch": 0.3, "eval_loss": 0.5, "eval_rewards/accuracies": 1.0}),
        ("saved", ("s3://bucket/run/checkpoints/step-00000012-0123abcd", 12)),
        ("note", "pairs are padded, not packed: it is an encoder-decoder"),
        ("warning", "the checkpoint could [not] be written"),
    ]
    assert shown(capsys, *events) == [
        f"step 12/40 30% | {SUMMARY}",
        "step 12: eval_loss 0.5000  eval_rewards/accuracies 1.0000",
        "step 12: checkpoint step-00000012-0123abcd",
        "pairs are padded, not packed: it is an encoder-decoder",
        "warning: the checkpoint could [not] be written",
    ]


def test_a_resumed_run_says_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, ("started", (LoopState(10), 2))) == [
        "resuming after step 10 of 40; no pair is repeated or skipped"
    ]


def test_workers_that_begin_again_are_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    states = [(LoopState(), 2), (LoopState(7), 2), (LoopState(7), 1), (LoopState(9), 2)]
    assert shown(capsys, *[("started", state) for state in states]) == [
        "workers were started again: going on after step 7",
        "workers were started again, 1 instead of 2: going on after step 7",
        "workers were started again, 2 instead of 1: going on after step 9",
    ]


def test_long_lines_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, ("warning", "word " * 60)) == ["warning: " + "word " * 60]


def test_events_are_asked_for_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = FakeLog(("warning", "one"))
    display = Display(log, 40)
    display._show_new()
    log.all.append(("warning", "two"))
    display._show_new()
    display._show_new()
    assert log.asked == [0, 1, 2]
    assert capsys.readouterr().err.splitlines() == ["warning: one", "warning: two"]


def test_a_log_that_is_gone_stops_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("the actor died")

    monkeypatch.setattr(display_module.ray, "get", gone)
    assert shown(capsys, ("warning", "never seen")) == []


def test_a_terminal_has_a_bar_that_follows_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display_module.sys.stderr, "isatty", lambda: True, raising=False)
    display = Display(FakeLog(("started", (LoopState(10), 2)), ("metrics", RECORD)), 40)
    display._show_new()
    (task,) = display._progress.tasks
    assert (task.completed, task.total, task.fields["summary"]) == (12, 40, SUMMARY)


@pytest.mark.parametrize(("kind", "has_bar"), [("xterm", True), ("dumb", False)])
def test_a_terminal_that_cannot_animate_has_lines(
    kind: str, has_bar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display_module.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", kind)
    assert Display(FakeLog(), 40)._progress.disable != has_bar
