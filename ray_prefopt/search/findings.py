"""What a search has found so far, read from its folder."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs

from ray_prefopt.errors import CheckpointError
from ray_prefopt.search.measure import check_metric
from ray_prefopt.search.space import Space, make_space
from ray_prefopt.search.table import Group, Row, groups, read_rows
from ray_prefopt.search_config import Dimension, TuneConfig

Record = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """Everything about a search that its report shows."""

    name: str
    space: Space
    metric: str
    prefix: str
    rows: list[Row]
    groups: list[Group]
    """Best first."""
    curves: Mapping[str, list[Record]]
    """Evaluations of each trial by its name, in the order of its steps."""
    workers: int

    @property
    def best(self) -> Group | None:
        """The winner; None before any point was trained to its end."""
        return self.groups[0] if self.groups and self.groups[0].status == "finished" else None

    def finished(self) -> list[Group]:
        return [group for group in self.groups if group.status == "finished"]


def read_findings(folder: str) -> Findings:
    fs, path = url_to_fs(folder)
    rows = read_rows(folder)
    if not rows:
        raise CheckpointError(f"{folder} holds no trials: give the folder of a search that has begun")
    config = TuneConfig.model_validate_json(fs.cat_file(f"{path}/search.json"))
    space = make_space(config.base, config.search)
    metric, prefix = check_metric(config.base, config.search, set(space.dimensions))
    storage = folder.rstrip("/").removesuffix(f"/{config.run.name}")
    curves = {row.name: _evaluations(f"{storage}/{row.run}", metric) for row in rows if row.run}
    return Findings(
        str(config.run.name), space, metric, prefix, rows, groups(rows), curves, config.run.max_workers
    )


def _evaluations(run: str, metric: str) -> list[Record]:
    fs, path = url_to_fs(run)
    if not fs.exists(f"{path}/metrics.jsonl"):
        return []
    lines = fs.cat_file(f"{path}/metrics.jsonl").decode().split("\n")[:-1]
    return [record for record in map(json.loads, lines) if metric in record]


def position(dimension: Dimension, value: Any) -> float:
    """Where a value lies in its dimension, from 0 to 1: on the scale it is drawn from, or by its place in the list.

    >>> position(Dimension(loguniform=(1, 100)), 10), position(Dimension(choice=["a", "b", "c"]), "c")
    (0.5, 1.0)
    """
    if dimension.values is not None:
        return float(dimension.values.index(value) / max(len(dimension.values) - 1, 1))
    assert dimension.bounds is not None
    low, high = dimension.bounds
    if dimension.loguniform:
        return float(math.log(value / low) / math.log(high / low))
    return float((value - low) / (high - low))


def is_logarithmic(dimension: Dimension) -> bool:
    """Whether orders of magnitude are what tells its values apart.

    >>> is_logarithmic(Dimension(grid=[3.0, 30.0, 300.0])), is_logarithmic(Dimension(grid=[0.0, 0.5, 1.0]))
    (True, False)
    """
    values = dimension.values
    if values is None or not all(isinstance(value, int | float) and value > 0 for value in values):
        return dimension.loguniform is not None
    return bool(max(values) >= 10 * min(values))
