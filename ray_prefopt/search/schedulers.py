"""Tune's schedulers, in a unit of time that is the share of a run that every trial may take."""

import math
import random
from collections.abc import Mapping
from typing import Any

from ray.tune import schedulers

from ray_prefopt.search.space import Space, draw, nearest_step
from ray_prefopt.search_config import Dimension, SearchConfig

RESAMPLED = 0.25
"""Share of the values of a copied point that are drawn anew; the others are perturbed (arXiv 1711.09846)."""
FACTORS = (0.8, 1.25)


def make_scheduler(space: Space, search: SearchConfig) -> schedulers.TrialScheduler:
    own: dict[str, Any] = {"time_attr": "time", "metric": "score", "mode": "max"}
    whole: Any = 1 / search.grace
    never: Any = math.inf
    if search.scheduler == "asha":
        return schedulers.ASHAScheduler(
            **own, grace_period=1, max_t=whole, reduction_factor=search.reduction_factor
        )
    if search.scheduler == "hyperband":
        # The best of a bracket go to their end, where rounding would have it stop them a little before.
        return schedulers.HyperBandScheduler(
            **own, max_t=whole, reduction_factor=search.reduction_factor, stop_last_trials=False
        )
    if search.scheduler == "median":
        # A trial that waits for others to compare with would have to be started again.
        return schedulers.MedianStoppingRule(**own, grace_period=1, min_time_slice=never)
    if search.scheduler == "pbt":
        return schedulers.PopulationBasedTraining(
            **own,
            perturbation_interval=1,
            custom_explore_fn=Explorer(space, search.seed),
            log_config=False,
        )
    return schedulers.FIFOScheduler()


class Explorer:
    """Makes the config of a trial that copies another from the other's: a point near it, each time another one."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._rng = space, random.Random(seed)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "point": perturbed(config["point"], self._space.dimensions, self._rng)}


def perturbed(
    point: Mapping[str, Any], dimensions: Mapping[str, Dimension], rng: random.Random
) -> dict[str, Any]:
    """Each value drawn anew, or multiplied by a factor and kept in its range, or moved to a neighbour in its list."""
    return {
        name: draw(dimensions[name], rng) if rng.random() < RESAMPLED else _near(value, dimensions[name], rng)
        for name, value in point.items()
    }


def _near(value: Any, dimension: Dimension, rng: random.Random) -> Any:
    if dimension.values is not None:
        values = sorted(dimension.values)
        return values[min(max(values.index(value) + rng.choice((-1, 1)), 0), len(values) - 1)]
    assert dimension.bounds is not None
    low, high = dimension.bounds
    moved = min(max(value * rng.choice(FACTORS), low), high)
    if dimension.quniform:
        return nearest_step((moved - low) / dimension.quniform[2], *dimension.quniform)
    return moved
