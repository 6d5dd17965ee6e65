"""The config of a search: a TrainConfig, and what is varied about it. As light as `config`."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_prefopt.config import Config, TrainConfig

DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "choice", "grid")


class Dimension(Config):
    """The values of one field: exactly one of the distributions, and perhaps a condition."""

    uniform: tuple[float, float] | None = None
    """Any number from low to high."""
    loguniform: tuple[float, float] | None = None
    """Any number from low to high, every order of magnitude alike."""
    quniform: tuple[float, float, float] | None = None
    """Low, high and the step between values."""
    choice: list[Any] | None = Field(None, min_length=1)
    """One of these values."""
    grid: list[Any] | None = Field(None, min_length=1)
    """Every one of these values, with every combination of the other grids."""
    when: dict[str, Any] = Field(default_factory=dict)
    """Vary the field only where other fields have these values (a list: one of them)."""

    @model_validator(mode="after")
    def _is_one_distribution(self) -> Self:
        given = [name for name in DISTRIBUTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(DISTRIBUTIONS)}; got {', '.join(given) or 'none'}"
            )
        if self.bounds is not None:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{given[0]} goes from low to high; got {low:g} and {high:g}")
            if self.loguniform and low <= 0:
                raise ValueError(f"loguniform needs numbers above 0; got {low:g}")
            if self.quniform and not 0 < self.quniform[2] <= high - low:
                raise ValueError(f"quniform needs a step within its range; got {self.quniform[2]:g}")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Low and high of a range; None for a list of values."""
        span = self.uniform or self.loguniform or self.quniform
        return (span[0], span[1]) if span else None

    @property
    def values(self) -> list[Any] | None:
        """The values of a list; None for a range."""
        return self.choice or self.grid

    def contains(self, value: Any) -> bool:
        """Whether a search over this dimension can come upon the value.

        >>> Dimension(quniform=(0, 1, 0.25)).contains(0.5), Dimension(quniform=(0, 1, 0.25)).contains(0.6)
        (True, False)
        """
        if self.values is not None:
            return value in self.values
        assert self.bounds is not None
        low, high = self.bounds
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        if self.quniform is None:
            return True
        steps = (value - low) / self.quniform[2]
        return math.isclose(steps, round(steps), abs_tol=1e-6)


class SearchConfig(Config):
    """What a search varies, how it chooses, what it compares, and when it ends."""

    preset: Literal["simpo", "cpo", "cpo_simpo"] | None = None
    """Published ranges and recipes of a loss, which must be loss.kind; `space` goes over it field by field."""
    space: dict[str, Dimension] = Field(default_factory=dict)
    """Distributions by dotted field: `{loss.beta: {loguniform: [1, 10]}, loss.gamma_beta_ratio: {uniform: [0, 1]}}`."""
    points: list[dict[str, Any]] = Field(default_factory=list)
    """Points to try first; fields that they leave out are chosen like all others."""
    recipes: bool = True
    """Try the preset's published recipes after those."""
    trials: int | None = Field(None, ge=1)
    """Points to try: when not given, every combination of the grids, or 16."""
    seeds: list[int] = Field(default_factory=list)
    """Train each point with each of these as run.seed and rank it by the mean; run.seed alone when not given."""
    metric: str | None = None
    """What trials are ranked by: length-normalised reward accuracy on the first evaluation set when not given."""
    mode: Literal["max", "min"] | None = None
    """Whether more is better; less is for `nll_loss` when not given."""
    searcher: Literal["tpe", "gp", "random"] = "tpe"
    """How points are chosen, by Optuna: from the results so far (tpe, gp), or blindly."""
    scheduler: Literal["asha", "median", "hyperband", "pbt", "fifo"] = "asha"
    """Which trials go on: the better part at each rung, those above the median, ..., or all of them (fifo)."""
    grace: float = Field(0.25, gt=0.0, le=1.0)
    """Share of its steps that every trial may take; pbt copies and perturbs the best each time it has passed."""
    reduction_factor: float = Field(3.0, gt=1.0)
    """One in so many trials goes on from each rung of asha and hyperband."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; when not given, as many as the cluster has room for."""
    max_hours: float | None = Field(None, gt=0.0)
    """End the search after this time, whatever is running."""
    max_worker_hours: float | None = Field(None, gt=0.0)
    """End the search when the trials have used so many hours of workers, which are GPU-hours with run.use_gpu."""
    plateau: int | None = Field(None, ge=1)
    """Try no more points when so many in a row were no better than the best before them."""
    min_gain: float = Field(0.0, ge=0.0)
    """Improvement of the metric that counts for `plateau`."""
    seed: int = Field(0, ge=0)
    """Of the choice of points."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, space: Any) -> Any:
        """`{loss: {beta: {...}}}`, as flags give it, is `{loss.beta: {...}}`."""
        return _flat(space) if isinstance(space, Mapping) else space

    @model_validator(mode="after")
    def _varies_something(self) -> Self:
        if not self.space and self.preset is None:
            raise ValueError("set search.space (a distribution for each field to vary), or search.preset")
        for name in ("seeds", "points"):
            values = getattr(self, name)
            if any(value in values[:index] for index, value in enumerate(values)):
                raise ValueError(f"{name} has the same entry twice; got {values}")
        if self.scheduler == "pbt" and len(self.seeds) > 1:
            raise ValueError("pbt trains one population: give seeds one entry, or another scheduler")
        return self


def _flat(space: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, Mapping) and not any(name in value for name in (*DISTRIBUTIONS, "when")):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class TuneConfig(TrainConfig):
    """A search: the run that its trials vary, and how."""

    search: SearchConfig

    @property
    def base(self) -> TrainConfig:
        """The config that trials vary."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})
