"""What Prometheus hears of a run, at the metrics endpoint that Ray has on every node."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ray.util.metrics import Gauge

PREFIX = "ray_"
"""Ray puts it before every name that it exports."""


@dataclass(frozen=True)
class Metric:
    """A number of a run."""

    name: str
    """As Prometheus knows it."""
    description: str
    tags: tuple[str, ...] = ("run",)


METRICS = {
    "step": Metric("ray_prefopt_step", "The last step that was logged."),
    "loss": Metric("ray_prefopt_loss", "Training loss, mean since the last log."),
    "rewards/accuracies": Metric(
        "ray_prefopt_reward_accuracy", "Share of the training pairs whose chosen completion has the higher reward."
    ),
    "pairs_per_second": Metric("ray_prefopt_pairs_per_second", "Pairs trained on per second, by all workers."),
    "tokens_per_second": Metric(
        "ray_prefopt_tokens_per_second", "Tokens trained on per second, by all workers; padding is not counted."
    ),
    "data_wait": Metric(
        "ray_prefopt_data_wait_share", "Share of the time that a worker waited for pairs.", ("run", "rank")
    ),
    "checkpoint_seconds": Metric("ray_prefopt_checkpoint_seconds", "Time that writing the last checkpoint took."),
    "checkpoint_step": Metric("ray_prefopt_checkpoint_step", "Step of the last checkpoint; 0 before the first."),
    "workers": Metric("ray_prefopt_workers", "Workers of the run since they were last started."),
    "starts": Metric("ray_prefopt_starts", "How often the workers were started; 1 where none was lost."),
    "warnings": Metric("ray_prefopt_warnings", "Warnings so far, such as a checkpoint that could not be written."),
}  # fmt: skip
"""By what they are called in the records of a run."""


class Gauges:
    """The metrics of one run, held by one process. Where nobody scrapes they are heard by no one."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._counts: Counter[str] = Counter()
        self._gauges = {
            key: Gauge(metric.name.removeprefix(PREFIX), metric.description, metric.tags)
            for key, metric in METRICS.items()
        }

    def show(self, values: Mapping[str, float], rank: int = 0) -> None:
        """Set those of METRICS that are among `values`, as `rank` has them; what all ranks have alike is rank 0's."""
        for key in METRICS.keys() & values.keys():
            tags = METRICS[key].tags
            if rank == 0 or "rank" in tags:
                own = {"run": self._run, "rank": str(rank)}
                self._gauges[key].set(values[key], {tag: own[tag] for tag in tags})

    def count(self, key: str) -> None:
        """One more of `starts` or `warnings`."""
        self._counts[key] += 1
        self.show({key: self._counts[key]})
