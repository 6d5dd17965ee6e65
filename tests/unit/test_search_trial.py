"""Trials without Ray: which run a trial is, and with which config."""

from pathlib import Path

import pytest

from ray_prefopt.search.measure import Measure
from ray_prefopt.search.space import make_space
from ray_prefopt.search.table import Group, Row, groups, results_csv
from ray_prefopt.search.trial import Pointer, Task, next_run
from tests.unit.test_search_space import base, search

MEASURE = Measure(
    "eval_logps_mean/accuracies", "max", ("eval_logps_mean/chosen", "eval_logps_mean/rejected"), 10
)
BETA = {"loss.beta": {"uniform": [1, 10]}}


def task(scheduler: str, **run: object) -> Task:
    return Task("sweep", make_space(base(run=run), search(space=BETA)), MEASURE, scheduler, 0.25)


def test_the_config_of_a_trial() -> None:
    config = task("asha", save_steps=100, force_new=True).config(
        {"loss.beta": 3.0}, 7, "sweep/trial-001", None
    )
    assert (config.loss.beta, config.run.seed, config.run.name) == (3.0, 7, "sweep/trial-001")
    assert (config.run.eval_steps, config.run.save_steps) == (0.1, 100)
    assert (config.run.export, config.run.force_new, config.run.resume_from) == (False, False, None)


def test_schedulers_that_pause_save_what_they_compare() -> None:
    run = (
        task("pbt", eval_steps=5, save_steps=100)
        .config({"loss.beta": 3.0}, 7, "sweep/trial-001", "some/checkpoint")
        .run
    )
    assert (run.eval_steps, run.save_steps, run.resume_from) == (5, 5, "some/checkpoint")
    assert run.keep_checkpoints == 4
    assert task("fifo").config({}, 7, "sweep/trial-001", None).run.eval_steps is None


def test_a_trial_goes_on_with_its_own_run_and_begins_another_when_it_copies(tmp_path: Path) -> None:
    donor = Pointer("s/trial-001", "s/trial-001", {"loss.beta": 2.0}, str(tmp_path))
    assert next_run("s/trial-000", {"loss.beta": 1.0}, None, "runs") == ("s/trial-000", None)
    assert next_run("s/trial-001", {"loss.beta": 2.0}, donor, "runs") == ("s/trial-001", None)
    copied = next_run("s/trial-000", {"loss.beta": 2.5}, donor, "runs")
    assert copied == next_run("s/trial-000", {"loss.beta": 2.5}, donor, "runs")
    assert copied[0].startswith("s/trial-000.")
    assert copied[1] == str(tmp_path)
    again = Pointer("s/trial-000", copied[0], {"loss.beta": 2.5}, str(tmp_path))
    assert next_run("s/trial-000", {"loss.beta": 2.5}, again, "runs") == (copied[0], None)


# --- The table ---


def row(name: str, beta: float, accuracy: float | None, *, status: str = "finished", seed: int = 1) -> Row:
    metrics = {}
    if accuracy is not None:
        metrics = {MEASURE.metric: accuracy, "eval_logps_mean/chosen": -1.0, "eval_logps_mean/rejected": -1.5}
    score = MEASURE.score(metrics) if metrics else None
    return Row(name, {"loss.beta": beta}, seed, status, f"s/{name}", score, 10, 1.0, 30.0, metrics)


ROWS = [
    row("trial-000-seed-1", 1.0, 0.6),
    row("trial-000-seed-2", 1.0, 0.8, seed=2),
    row("trial-001-seed-1", 2.0, 0.9),
    row("trial-001-seed-2", 2.0, 0.95, status="stopped", seed=2),
    row("trial-002-seed-1", 3.0, 0.75),
    row("trial-002-seed-2", 3.0, 0.75, seed=2),
    row("trial-003-seed-1", 4.0, None, status="failed"),
]


def test_points_are_ranked_by_their_mean_and_those_without_a_model_come_last() -> None:
    ranked = groups(ROWS)
    assert [group.point["loss.beta"] for group in ranked] == [3.0, 1.0, 2.0, 4.0]
    assert [group.status for group in ranked] == ["finished", "finished", "stopped", "failed"]
    assert ranked[1].mean(MEASURE.metric) == pytest.approx(0.7)
    assert ranked[1].std(MEASURE.metric) == pytest.approx(0.1414, abs=1e-4)  # 0.2 / sqrt(2)
    assert Group((ROWS[0],)).std(MEASURE.metric) is None


def test_a_point_is_whole_with_all_its_seeds() -> None:
    """A budget that ended the search between two seeds leaves a point that was measured once."""
    (first, last) = groups([*ROWS[:2], row("trial-005-seed-1", 5.0, 0.99)])
    assert (first.point["loss.beta"], first.status) == (1.0, "finished")
    assert (last.point["loss.beta"], last.status) == (5.0, "stopped")


def test_results_csv() -> None:
    head, *lines = (line.split(",") for line in results_csv(ROWS, MEASURE).splitlines())
    assert head[:9] == [
        "rank", "trial", "status", "loss.beta", "seed", MEASURE.metric, "mean", "std", "margin_per_token"
    ]  # fmt: skip
    assert lines[0][:9] == ["1", "trial-002-seed-1", "finished", "3.0", "1", "0.75", "0.75", "0.0", "0.5"]
    assert [line[0] for line in lines] == ["1", "1", "2", "2", "3", "3", "4"]
