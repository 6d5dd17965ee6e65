"""What trials are ranked by: a number that means the same for every beta, margin and weight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ray_prefopt.config import TrainConfig, eval_prefix
from ray_prefopt.errors import ConfigError, suggest
from ray_prefopt.search_config import SearchConfig
from ray_prefopt.training.metrics import METRICS

REASONS = {
    "loss": "its value changes with beta, the margin and cpo_alpha: the lowest one names the smallest of them",
    "aux_loss": "it is the router's, not the preferences'",
    "rewards/chosen": "rewards are multiplied by beta",
    "rewards/rejected": "rewards are multiplied by beta",
    "rewards/margins": "rewards are multiplied by beta",
}
"""Metrics that cannot be compared between trials."""


@dataclass(frozen=True)
class Measure:
    """A metric as a score, of which more is better."""

    metric: str
    mode: Literal["max", "min"]
    margin: tuple[str, str]
    """Mean log-probabilities of chosen and rejected on the same pairs, whose difference decides between equals."""
    num_pairs: int
    """Of that evaluation set: accuracies differ by 1 / num_pairs at least."""

    def score(self, record: Mapping[str, float]) -> float:
        """The metric, and less than half a pair for the margin; minus infinity when it is not a number.

        >>> measure = Measure("eval_accuracies", "max", ("eval_c", "eval_r"), num_pairs=10)
        >>> round(measure.score({"eval_accuracies": 0.7, "eval_c": -1.0, "eval_r": -2.0}), 4)
        0.7125
        """
        value = record[self.metric] if self.mode == "max" else -record[self.metric]
        if not math.isfinite(value):
            return -math.inf
        margin = self.margin_of(record)
        bonus = margin / (1 + abs(margin)) if math.isfinite(margin) else -1.0
        return value + bonus / (4 * self.num_pairs) if self.metric.endswith("accuracies") else value

    def margin_of(self, record: Mapping[str, float]) -> float:
        """By how much the chosen completions are likelier, per token; beta is not in it."""
        chosen, rejected = self.margin
        return record[chosen] - record[rejected]


def check_metric(config: TrainConfig, search: SearchConfig, varied: set[str]) -> tuple[str, str]:
    """The metric that is asked for, and the prefix of its evaluation set. Raises ConfigError when it cannot rank."""
    sets = {eval_prefix(name): name for name in config.data.eval_sets}
    if not sets:
        raise ConfigError(
            "trials are compared on held-out pairs: got no data.eval; set it to pairs that are not trained on"
        )
    if search.metric is None:
        first = next(iter(sets))
        return f"{first}logps_mean/accuracies", first
    known = {prefix + metric: (prefix, metric) for prefix in sets for metric in METRICS}
    if search.metric not in known:
        raise ConfigError(
            f"search.metric {search.metric!r} is not a metric of these trials.{suggest(search.metric, known)}"
        )
    prefix, metric = known[search.metric]
    reason = REASONS.get(metric)
    if metric in ("rewards/accuracies", "logps/chosen", "logps/rejected") and "loss.kind" in varied:
        reason = "cpo sums log-probabilities where the other losses average them"
    if reason is not None:
        raise ConfigError(
            f"search.metric {search.metric} cannot be compared between trials: {reason}. "
            f"Use {prefix}logps_mean/accuracies, or leave it out"
        )
    return search.metric, prefix


def make_measure(metric: str, prefix: str, search: SearchConfig, num_pairs: int) -> Measure:
    mode = search.mode or ("min" if metric.endswith("loss") else "max")
    return Measure(metric, mode, (f"{prefix}logps_mean/chosen", f"{prefix}logps_mean/rejected"), num_pairs)
