"""The space of a search: its fields checked against the base config, points drawn from it, and points put into it."""

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import optuna
from pydantic import ValidationError

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import ConfigError
from ray_prefopt.options import did_you_mean, nearest_fields, options
from ray_prefopt.problems import Problems
from ray_prefopt.search.presets import PRESETS, Recipe
from ray_prefopt.search_config import Dimension, SearchConfig

Point = dict[str, Any]
"""Values by dotted field."""

COUNTED = 10_000
"""Most combinations of lists that are looked at to see how many points there are."""
PROBES = 64
"""Points that are drawn to see whether the configs of a space can be."""
NOT_VARIED = {"run.name", "run.storage_path", "run.resume_from", "run.force_new", "run.export", "run.seed"}
"""Fields that belong to the search itself; run.seed is varied by search.seeds."""
CHANGED_ON_THE_WAY = ("optim.learning_rate", "loss.")
"""What pbt may change in a run that goes on from another's checkpoint."""


@dataclass(frozen=True)
class Space:
    """The dimensions of a search, conditional ones after those that they depend on."""

    base: TrainConfig
    dimensions: Mapping[str, Dimension]
    recipes: tuple[Recipe, ...] = ()
    """Published points, as far as the space holds them."""

    def config_at(self, point: Mapping[str, Any]) -> TrainConfig:
        """The base config with the point's values. Raises ConfigError when there can be no such config."""
        values = self.base.model_dump()
        kind = point.get("loss.kind", self.base.loss.kind)
        if kind != self.base.loss.kind:  # each loss has fields and defaults of its own
            values["loss"] = {"kind": kind}
        for name, value in point.items():
            *sections, leaf = name.split(".")
            inner = values
            for section in sections:
                inner[section] = dict(inner.get(section) or {})
                inner = inner[section]
            inner[leaf] = value
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(Problems(values, ()).of(error))
            shown = ", ".join(f"{name} {show(value)}" for name, value in point.items())
            raise ConfigError(f"search.space has a point that is no config ({shown}): {problems}") from None

    def applies(self, name: str, point: Mapping[str, Any]) -> bool:
        """Whether the condition of a dimension holds at a point, of which the other fields are those of the base."""
        return all(
            self._value(other, point) in (wanted if isinstance(wanted, list) else [wanted])
            for other, wanted in self.dimensions[name].when.items()
        )

    def _value(self, name: str, point: Mapping[str, Any]) -> Any:
        if name in point:
            return point[name]
        value: Any = self.base
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        return value

    def suggest(self, trial: optuna.Trial) -> Point:
        """A point, chosen by an Optuna trial: by its sampler, or as it was queued."""
        point: Point = {}
        for name, dimension in self.dimensions.items():
            if self.applies(name, point):
                point[name] = _suggest(trial, name, dimension)
        return point

    def draw(self, rng: random.Random) -> Point:
        """A point at random."""
        point: Point = {}
        for name, dimension in self.dimensions.items():
            if self.applies(name, point):
                point[name] = draw(dimension, rng)
        return point

    def known(self, point: Mapping[str, Any]) -> Point:
        """The part of a point that the space holds."""
        return {
            name: value
            for name, value in point.items()
            if name in self.dimensions and self.dimensions[name].contains(value)
        }

    def grid(self) -> list[Point]:
        """Every combination of the grids, each once; one empty point when there is none."""
        grids = {name: dimension.grid for name, dimension in self.dimensions.items() if dimension.grid}
        return self._combined(grids)

    @property
    def size(self) -> int | None:
        """How many points there are; None where they are too many to count."""
        points = self.points()
        return None if points is None else len(points)

    def points(self) -> list[Point] | None:
        """All of them; None where they are too many."""
        lists = {name: _all_values(dimension) for name, dimension in self.dimensions.items()}
        known = {name: values for name, values in lists.items() if values is not None}
        if len(known) < len(lists) or math.prod(map(len, known.values())) > COUNTED:
            return None
        return self._combined(known)

    def _combined(self, lists: Mapping[str, list[Any]]) -> list[Point]:
        """Every combination of some values, each once, and of each what has a meaning beside those before it."""
        points: dict[str, Point] = {}
        for values in product(*lists.values()):
            point: Point = {}
            for name, value in zip(lists, values, strict=True):
                others = self.dimensions[name].when
                is_open = any(other in self.dimensions and other not in lists for other in others)
                if is_open or self.applies(name, point):
                    point[name] = value
            points.setdefault(json.dumps(point), point)
        return list(points.values())

    def data_variants(self) -> Iterator[TrainConfig]:
        """A config for each way that the space makes tokens from rows."""
        dimensions = {name: each for name, each in self.dimensions.items() if _decides_tokens(name)}
        values = [
            [{name: value} for value in each.values or []] + ([{}] if each.when else [])
            for name, each in dimensions.items()
        ]
        known = [
            name
            for name, each in dimensions.items()
            if not any(other in self.dimensions and other not in dimensions for other in each.when)
        ]
        seen = []
        for parts in product(*values):
            point = {name: value for part in parts for name, value in part.items()}
            if any((name in point) != self.applies(name, point) for name in known):
                continue
            config = self.config_at(point)
            key = (config.data, config.model.tokenizer_path)
            if key not in seen:
                seen.append(key)
                yield config


def make_space(base: TrainConfig, search: SearchConfig) -> Space:
    """The preset's dimensions and the user's over them. Raises ConfigError for what cannot be searched."""
    dimensions: dict[str, Dimension] = {}
    if search.preset is not None:
        if search.preset != base.loss.kind:
            raise ConfigError(
                f"search.preset {search.preset} is for loss.kind {search.preset}; got loss.kind {base.loss.kind}"
            )
        dimensions |= PRESETS[search.preset].dimensions(lora=base.model.has_adapter)
    dimensions |= search.space
    for name, dimension in dimensions.items():
        _check_field(name)
        for other in dimension.when:
            _check_field(other)
        if _decides_tokens(name) and dimension.values is None:
            raise ConfigError(
                f"search.space: {name} decides the tokens, which are made once for each of its values before the "
                "first trial: give it a choice or a grid"
            )
        if search.scheduler == "pbt":
            _check_changeable(name, dimension)
    known = Space(base, _ordered(dimensions))
    recipes = PRESETS[search.preset].recipes if search.preset and search.recipes else ()
    held = [Recipe(recipe.name, known.known(recipe.values)) for recipe in recipes]
    space = Space(base, known.dimensions, tuple(recipe for recipe in held if recipe.values))
    for point in search.points:
        unheld = [name for name in point if name not in space.known(point)]
        if unheld:
            raise ConfigError(
                f"search.points: {unheld[0]} {show(point[unheld[0]])} is not in the space; widen search.space"
            )
    if search.scheduler == "pbt" and space.size is not None and (search.trials or 0) > space.size:
        raise ConfigError(
            f"search.trials {search.trials}: each trial of a population begins at a point of its own, and search.space "
            f"has {space.size}; set search.trials to that, or widen the space"
        )
    _probe(space, search)
    return space


def _check_field(name: str) -> None:
    known = [field for field in options() if not field.startswith("search.")]
    if name in NOT_VARIED:
        advice = "list seeds in search.seeds" if name == "run.seed" else "every trial has its own"
        raise ConfigError(f"search.space: {name} cannot be varied: {advice}")
    is_inside = any(name.startswith(f"{field}.") and options()[field].is_mapping for field in known)
    if name not in known and not is_inside:
        raise ConfigError(f"search.space: {name} is not a field.{did_you_mean(nearest_fields(name, known))}")


def _check_changeable(name: str, dimension: Dimension) -> None:
    is_number = dimension.bounds is not None or all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in dimension.values or []
    )
    if not name.startswith(CHANGED_ON_THE_WAY) or name == "loss.kind" or not is_number or dimension.when:
        raise ConfigError(
            f"search.space: pbt changes fields in the middle of a run, which {name} does not allow: "
            "it takes numbers of `loss` and optim.learning_rate, without `when`"
        )


def _decides_tokens(name: str) -> bool:
    return name.startswith(("data.", "model.path", "model.tokenizer")) and not name.startswith("data.shuffle")


def _ordered(dimensions: Mapping[str, Dimension]) -> dict[str, Dimension]:
    """Each dimension after those that its condition names."""
    ordered: dict[str, Dimension] = {}
    waiting = dict(dimensions)
    while waiting:
        ready = [
            name
            for name, dimension in waiting.items()
            if not any(other in waiting for other in dimension.when)
        ]
        if not ready:
            raise ConfigError(f"search.space: the conditions of {', '.join(waiting)} go round in a circle")
        ordered |= {name: waiting.pop(name) for name in ready}
    return ordered


def _probe(space: Space, search: SearchConfig) -> None:
    """Raises ConfigError when a point of the space is no config, as far as corners and a draw of points show."""
    rng = random.Random(search.seed)
    points = [space.draw(rng) for _ in range(PROBES)]
    for name, dimension in space.dimensions.items():
        for value in dimension.values or dimension.bounds or ():
            points += [{**point, name: value} for point in points[:1] if name in point]
    for point in [*points, *search.points]:
        space.config_at({name: value for name, value in point.items() if space.applies(name, point)})


def draw(dimension: Dimension, rng: random.Random) -> Any:
    """A value at random."""
    if dimension.values is not None:
        return rng.choice(dimension.values)
    assert dimension.bounds is not None
    low, high = dimension.bounds
    if dimension.loguniform:
        return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
    if dimension.quniform:
        return nearest_step(rng.randint(0, steps(*dimension.quniform)), *dimension.quniform)
    return rng.uniform(low, high)


def steps(low: float, high: float, step: float) -> int:
    """How many there are in a range."""
    return math.floor((high - low) / step + 1e-9)


def nearest_step(number: float, low: float, high: float, step: float) -> float:
    """The value that many steps above the lowest, or the last one.

    >>> nearest_step(3, 0.0, 0.3, 0.1), nearest_step(4.9, 0.0, 0.49, 0.1)
    (0.3, 0.4)
    """
    return min(low + step * min(round(number), steps(low, high, step)), high)


def _all_values(dimension: Dimension) -> list[Any] | None:
    """Of a list, or of a range with steps; None where there is no end of them."""
    if dimension.quniform is None:
        return dimension.values
    return [nearest_step(number, *dimension.quniform) for number in range(steps(*dimension.quniform) + 1)]


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    if dimension.values is not None:
        by_label = {label(value): value for value in dimension.values}
        return by_label[trial.suggest_categorical(name, list(by_label))]
    assert dimension.bounds is not None
    low, high = dimension.bounds
    step = dimension.quniform[2] if dimension.quniform else None
    return trial.suggest_float(name, low, high, step=step, log=dimension.loguniform is not None)


def label(value: Any) -> str | int | float | bool | None:
    """A value as Optuna can keep it: lists and mappings as JSON."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def show(value: Any) -> str:
    """A value, short.

    >>> show(3.14159e-7), show(10.0), show(True), show("cpo")
    ('3.14e-07', '10', 'true', 'cpo')
    """
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)
