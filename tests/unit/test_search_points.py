"""Which trials a search hands out, without running any: real Optuna, made-up scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from ray_prefopt.search.points import Generator, Points
from ray_prefopt.search.space import make_space
from ray_prefopt.search_config import SearchConfig
from tests.unit.test_search_space import base, search

Score = Callable[[dict[str, Any]], float]


def points(
    asked: SearchConfig, *, seeds: tuple[int, ...] = (42,), room: int | None = None, url: str | None = None
) -> Points:
    return Points(make_space(base(), asked), asked, list(seeds), url, lambda: room)


def run_all(searcher: Points, score: Score, limit: int = 100) -> list[dict[str, Any]]:
    """Every trial that is handed out, each finished with its score before the next is asked for."""
    given = []
    for number in range(limit):
        config = searcher.suggest(f"t{number}")
        if config == Points.FINISHED:
            return given
        given.append(config)
        result = {"score": score(config), "time": 1, "step_of_run": 1, "finished": True}
        searcher.on_trial_complete(f"t{number}", result)
    raise AssertionError("the search does not end")


def near_three(config: dict[str, Any]) -> float:
    return -abs(config["point"]["loss.beta"] - 3)


BETA = {"loss.beta": {"uniform": [1, 10]}}


@pytest.mark.parametrize("searcher", ["tpe", "gp", "random"])
def test_every_searcher_gives_what_was_asked_for(searcher: str) -> None:
    asked = search(space=BETA, trials=12, searcher=searcher, points=[{"loss.beta": 9.5}])
    given = run_all(points(asked), near_three)
    assert [config["name"] for config in given] == [f"trial-{number:03d}" for number in range(12)]
    assert given[0]["point"] == {"loss.beta": 9.5}
    betas = [config["point"]["loss.beta"] for config in given]
    assert len(set(betas)) == 12
    if searcher != "random":  # which learns nothing
        assert min(abs(beta - 3) for beta in betas[6:]) < min(abs(beta - 3) for beta in betas[:4])


def test_what_there_are_no_trials_for_waits_for_more(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study"
    space = {"loss.beta": {"grid": [1, 2, 4]}, "loss.gamma_beta_ratio": {"grid": [0.0, 0.5, 1.0]}}
    first = points(search(space=space, trials=4), url=url)
    given = run_all(first, near_three)
    first.save(str(tmp_path / "saved"))
    again = points(search(space=space, trials=9), url=url)
    again.restore(str(tmp_path / "saved"))
    given += run_all(again, near_three)
    assert len({json.dumps(config["point"]) for config in given}) == len(given) == 9


def test_a_grid_is_tried_once_each() -> None:
    asked = search(
        space={"loss.beta": {"grid": [1, 2, 4]}, "loss.gamma_beta_ratio": {"grid": [0.0, 0.5, 1.0]}}
    )
    given = run_all(points(asked), near_three)
    tried = [tuple(config["point"].values()) for config in given]
    assert sorted(tried) == [(beta, ratio) for beta in (1, 2, 4) for ratio in (0.0, 0.5, 1.0)]


def test_each_point_is_trained_with_every_seed_and_told_by_the_mean() -> None:
    asked = search(space=BETA, trials=2, seeds=[1, 2])
    searcher = points(asked, seeds=(1, 2))
    given = run_all(searcher, lambda config: float(config["seed"]))
    assert [(config["name"], config["seed"]) for config in given] == [
        ("trial-000-seed-1", 1),
        ("trial-000-seed-2", 2),
        ("trial-001-seed-1", 1),
        ("trial-001-seed-2", 2),
    ]
    assert given[0]["point"] == given[1]["point"]
    assert [trial.value for trial in searcher._study.trials] == [1.5, 1.5]


def test_no_more_trials_than_there_is_room_for() -> None:
    searcher = points(search(space=BETA, trials=5), room=2)
    assert searcher.suggest("a") is not None
    assert searcher.suggest("b") is not None
    assert searcher.suggest("c") is None
    searcher.on_trial_complete("a", {"score": 1.0, "finished": True})
    assert searcher.suggest("c") is not None


def test_a_plateau_ends_the_search() -> None:
    """Scores 1 2 3 3 3: three points in a row that are no better than the third end it at the sixth."""
    scores = iter([1.0, 2.0, 3.0, 3.0, 2.9, 3.0, 9.0])
    given = run_all(points(search(space=BETA, trials=50, plateau=3)), lambda _: next(scores))
    assert len(given) == 6


def test_gains_below_min_gain_are_none() -> None:
    scores = iter([1.0, 1.01, 1.02, 1.03])
    asked = search(space=BETA, trials=50, plateau=3, min_gain=0.1)
    assert len(run_all(points(asked), lambda _: next(scores))) == 4


def test_what_the_study_is_told(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    searcher = points(search(space=BETA, trials=3), url=url)
    for name in "abc":
        searcher.suggest(name)
    searcher.on_trial_result("a", {"score": 0.25, "time": 1.0, "step_of_run": 5})
    searcher.on_trial_complete("a", {"score": 0.5, "finished": True})
    searcher.on_trial_complete("b", {"score": 0.1})  # the scheduler has stopped it
    searcher.on_trial_complete("c", None, error=True)
    trials = optuna.load_study(study_name="prefopt", storage=url).trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert (trials[0].value, trials[0].intermediate_values) == (0.5, {5: 0.25})


@pytest.mark.parametrize("is_stored", [True, False])
def test_a_search_goes_on_where_it_was(tmp_path: Path, is_stored: bool) -> None:
    """Two trials ended and one runs at the snapshot; with a database, one that was handed out later is too."""
    url = f"sqlite:///{tmp_path}/study.db" if is_stored else None
    asked = search(space=BETA, trials=6)
    first = points(asked, url=url)
    before = [first.suggest(name) for name in "abc"]
    for name in "ab":
        first.on_trial_complete(name, {"score": 1.0, "finished": True})
    first.save(str(tmp_path / "state"))
    lost = first.suggest("d")

    second = points(asked, url=url)
    second.restore(str(tmp_path / "state"))
    second.on_trial_complete("c", {"score": 2.0, "finished": True})
    rest = run_all(second, near_three)
    assert len(rest) == 3
    names = [config["name"] for config in (*before, *rest)]
    assert names == [f"trial-{number:03d}" for number in range(6)]
    if is_stored:
        assert rest[0] == lost
    tried = [config["point"]["loss.beta"] for config in (*before, *rest)]
    assert len(set(tried)) == 6


def test_a_search_at_its_end_can_be_gone_on_with() -> None:
    asked = search(space=BETA, trials=1)
    generator = Generator(points(asked))
    generator.set_state({"counter": 1, "total_samples": 5, "finished": True, "experiment": None})
    assert not generator.is_finished()


def test_every_point_of_a_space_with_few_is_tried_once() -> None:
    """Those that the user asks for come first; to draw them would repeat some and miss others."""
    space = {"loss.beta": {"choice": [1, 2, 3]}, "loss.label_smoothing": {"quniform": [0, 0.3, 0.3]}}
    asked = search(space=space, points=[{"loss.beta": 3}])
    given = [config["point"] for config in run_all(points(asked), near_three)]
    assert len(given) == len({json.dumps(point) for point in given}) == 6
    assert [point["loss.beta"] for point in given] == [3, 3, 1, 1, 2, 2]


def test_a_search_goes_on_though_its_study_is_ahead_of_its_snapshot(tmp_path: Path) -> None:
    """Killed between the end of a trial, which the study hears of at once, and Tune's next snapshot."""
    asked, url = search(space=BETA, trials=4), f"sqlite:///{tmp_path}/study"
    first = points(asked, url=url)
    first.suggest("t0")
    first.save(str(tmp_path / "snapshot"))
    first.on_trial_complete("t0", {"score": 0.5, "time": 1, "step_of_run": 1})
    again = points(asked, url=url)
    again.restore(str(tmp_path / "snapshot"))
    again.on_trial_result("t0", {"score": 0.6, "time": 2, "step_of_run": 2})
    again.on_trial_complete("t0", {"score": 0.6, "time": 2, "step_of_run": 2, "finished": True})
    assert again._study.trials[0].state == TrialState.PRUNED
    assert again.suggest("t1")["name"] == "trial-001"
