"""Which point comes next: Optuna's samplers behind Tune's interface for searchers."""

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState
from ray.tune.search import Searcher, SearchGenerator

from ray_prefopt.search.space import Point, Space, label
from ray_prefopt.search.trial import FAILED
from ray_prefopt.search_config import SearchConfig

DEFAULT_TRIALS = 16
STUDY = "prefopt"


def number_of_points(space: Space, search: SearchConfig) -> int:
    """How many points are tried."""
    if search.trials is not None:
        return search.trials
    has_grid = len(space.grid()) > 1
    number = len(first_points(space, search)) if has_grid else DEFAULT_TRIALS
    return min(number, space.size or number)


def first_points(space: Space, search: SearchConfig) -> list[Point]:
    """What is tried first, each once: the user's points, the published recipes, every combination of the grids.

    Of a space that has no more points than there are trials all are, those that the user's and the recipes are part of
    before the others.
    """
    wanted = [*search.points, *(dict(recipe.values) for recipe in space.recipes)]
    points = space.points()
    if points is not None and len(points) <= (search.trials or DEFAULT_TRIALS):
        wanted = [point for part in wanted for point in points if part.items() <= point.items()] + points
    elif (grid := space.grid()) != [{}]:
        wanted += grid
    return [point for index, point in enumerate(wanted) if point not in wanted[:index]]


def make_sampler(search: SearchConfig, *, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    if search.searcher == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(4, min(10, trials // 3))
    if search.searcher == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
    )


@dataclass
class Attempt:
    """One point with one seed."""

    number: int
    """Of the point."""
    point: Point
    seed: int


@dataclass
class Progress:
    """What a search that is resumed has to know of its points."""

    live: dict[str, Attempt] = field(default_factory=dict)
    """By Tune's trial id."""
    waiting: list[Attempt] = field(default_factory=list)
    outcomes: dict[int, dict[int, float | None]] = field(default_factory=dict)
    """Scores by point and seed; None for a trial that was stopped or failed."""
    scores: list[float] = field(default_factory=list)
    """Means of whole points in the order in which they ended; minus infinity where there is none."""
    handed_out: int = 0


class Points(Searcher):
    """Asks an Optuna study for points, hands each out once per seed, and tells the study the mean score."""

    def __init__(
        self,
        space: Space,
        search: SearchConfig,
        seeds: list[int],
        storage: str | None,
        room: Callable[[], int | None],
    ) -> None:
        """`storage` is the URL of Optuna's database, or None to keep the study in memory; `room`: how many trials may
        run now, or None for any number.
        """
        super().__init__(metric="score", mode="max")
        self._space, self._search, self._seeds, self._room = space, search, seeds, room
        self._total = number_of_points(space, search)
        self._progress = Progress()
        self._study = optuna.create_study(
            study_name=STUDY,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            sampler=self._sampler(0),
        )
        self._keeps_itself = storage is not None
        if not self._study.trials:
            for point in first_points(space, search):  # those that there are no trials for wait for more
                self._study.enqueue_trial({name: label(value) for name, value in point.items()})

    def _sampler(self, handed_out: int) -> optuna.samplers.BaseSampler:
        """Seeded by how far the search is: one that is resumed does not draw the same points again."""
        return make_sampler(self._search, seed=self._search.seed + handed_out, trials=self._total)

    def suggest(self, trial_id: str) -> Any:
        """The config of Tune's next trial; None when there is no room for one now."""
        progress = self._progress
        room = self._room()
        if room is not None and len(progress.live) >= room:
            return None
        if not progress.waiting:
            if progress.handed_out >= self._total or self._is_flat():
                return None if progress.live else self.FINISHED
            trial = self._study.ask()
            point = self._space.suggest(trial)
            progress.handed_out += 1
            progress.waiting = [Attempt(trial.number, point, seed) for seed in self._seeds]
        attempt = progress.waiting.pop(0)
        progress.live[trial_id] = attempt
        return {"name": self.name_of(attempt), "seed": attempt.seed, "point": attempt.point}

    def name_of(self, attempt: Attempt) -> str:
        """Of the trial, within the search."""
        return trial_name(attempt.number, attempt.seed if len(self._seeds) > 1 else None)

    def _is_flat(self) -> bool:
        """Whether the last `plateau` points were no better than the best before them."""
        patience, scores = self._search.plateau, self._progress.scores
        if patience is None or len(scores) <= patience:
            return False
        return max(scores[-patience:]) <= max(scores[:-patience]) + self._search.min_gain

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        attempt = self._progress.live.get(trial_id)
        if attempt is not None and len(self._seeds) == 1 and math.isfinite(result.get("score", math.nan)):
            known = self._study.trials[attempt.number]
            if not known.state.is_finished():  # as it may be where Tune's snapshot is older than the study
                trial = optuna.Trial(self._study, known._trial_id)
                trial.report(result["score"], step=int(result["step_of_run"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        attempt = self._progress.live.pop(trial_id, None)
        if attempt is None:
            return
        is_finished = result is not None and not error and bool(result.get("finished"))
        outcomes = self._progress.outcomes.setdefault(attempt.number, {})
        outcomes[attempt.seed] = result["score"] if is_finished and result else None
        if len(outcomes) < len(self._seeds):
            return
        found = [score for score in outcomes.values() if score is not None]
        is_whole = len(found) == len(self._seeds) and all(map(math.isfinite, found))
        self._progress.scores.append(sum(found) / len(found) if is_whole else -math.inf)
        if self._study.trials[attempt.number].state.is_finished():
            return
        if is_whole:
            self._study.tell(attempt.number, self._progress.scores[-1])
        else:
            failed = error or result is None or result.get("score") == FAILED
            self._study.tell(attempt.number, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def save(self, checkpoint_path: str) -> None:
        study = None if self._keeps_itself else self._study
        with open(checkpoint_path, "wb") as file:
            pickle.dump((self._progress, study), file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self._progress, study = pickle.load(file)
        if study is not None:
            self._study = study
        self._study.sampler = self._sampler(self._progress.handed_out)
        self._wait_for_lost()

    def _wait_for_lost(self) -> None:
        """Points that were handed out after the last snapshot of a killed search are handed out again."""
        known = {attempt.number for attempt in (*self._progress.live.values(), *self._progress.waiting)}
        for trial in self._study.trials:
            if (
                trial.state == TrialState.RUNNING
                and trial.number not in known | self._progress.outcomes.keys()
            ):
                point = self._space.suggest(optuna.trial.FixedTrial(trial.params))  # type: ignore[arg-type]
                self._progress.waiting += [Attempt(trial.number, point, seed) for seed in self._seeds]
                self._progress.handed_out += 1


class Generator(SearchGenerator):
    """Tune's view of `Points`: the end of a search is not remembered, as it may be gone on with for more trials."""

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({**state, "finished": False})


def trial_name(number: int, seed: int | None) -> str:
    """`trial-003`, or `trial-003-seed-42` where a point has several.

    >>> trial_name(3, None), trial_name(3, 42)
    ('trial-003', 'trial-003-seed-42')
    """
    return f"trial-{number:03d}" + ("" if seed is None else f"-seed-{seed}")
