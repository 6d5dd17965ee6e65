"""What a run is to the driver and to its workers alike: its parts, its plan, and the metric that decides."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ray_prefopt.config import RunConfig, TrainConfig, eval_prefix
from ray_prefopt.data.blocks import Blocks
from ray_prefopt.data.plan import Order, Plan
from ray_prefopt.errors import ConfigError, suggest
from ray_prefopt.training.hooks import Hooks
from ray_prefopt.training.metrics import METRICS


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker."""

    config: TrainConfig
    folder: str
    """Of the run."""
    pad_id: int
    train_blocks: str | None
    """Folder of prepared pairs; None: evaluate only."""
    eval_blocks: Mapping[str, str]
    """Folders of the evaluation sets by name."""

    hooks: Hooks = field(default_factory=Hooks)

    @property
    def checkpoints(self) -> str:
        return f"{self.folder}/checkpoints"


def make_plan(config: TrainConfig, blocks: Blocks) -> Plan:
    """The plan of a run over prepared pairs. Raises DataError when they do not fill one global batch."""
    order = Order(
        tuple(rows for _, rows in blocks.files),
        seed=config.run.seed if config.data.seed is None else config.data.seed,
        shuffle=config.data.shuffle,
        window=config.data.shuffle_window,
    )
    run = config.run
    return Plan(
        order,
        blocks.total_lengths,
        min(run.global_batch, blocks.num_pairs) if run.shrink_batch else run.global_batch,
        run.epochs,
        run.max_steps,
        group_by_length=config.data.group_by_length,
        drop_last=run.drop_last,
    )


def best_metric(run: RunConfig, sets: Iterable[str], *, is_open: bool = False) -> str | None:
    """The metric that says which checkpoint is best: run.best_metric, or reward accuracy of the first set.

    Raises ConfigError when no evaluation set, of which these are the names, has it; `is_open` when there may be metrics
    of the user's own.
    """
    prefixes = [eval_prefix(name) for name in sets]
    if run.best_metric is None:
        return f"{prefixes[0]}rewards/accuracies" if prefixes else None
    known = [prefix + metric for prefix in prefixes for metric in METRICS]
    if run.best_metric not in known and not (is_open and prefixes):
        advice = suggest(run.best_metric, known) or (
            f" There are {', '.join(known)}" if known else " There is no evaluation set: set data.eval"
        )
        raise ConfigError(f"run.best_metric {run.best_metric!r} is not a metric of this run.{advice}")
    return run.best_metric
