"""What an evaluation found for every single pair, for metrics of the user's own.

Predictions are rewards, (N, 2): of the chosen and of the rejected completion of each pair, in the order of the set.
Labels are zeros, (N,): the index of the completion that is preferred, so that accuracy is the share of pairs whose
larger reward has that index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ray_prefopt.config import LossConfig
from ray_prefopt.data.plan import Ids
from ray_prefopt.errors import ConfigError
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import pair_losses, pair_rewards
from ray_prefopt.model.forward import Batch
from ray_prefopt.training import ranks
from ray_prefopt.training.hooks import Hooks

PAD = -100
"""In `inputs`, after the end of a row."""


@dataclass(frozen=True)
class Evaluation:
    """What was found about the evaluation sets of a run."""

    record: dict[str, float]
    predictions: Mapping[str, EvalPrediction]
    """Of each set by its name, when hooks keep them."""


class Predictions:
    """Collects one evaluation set on this rank, then gathers it from all of them."""

    def __init__(self, hooks: Hooks, loss: LossConfig, micro_ids: Sequence[Ids]) -> None:
        self._hooks = hooks
        self._loss = loss
        self._micro_ids = iter(micro_ids)
        self._rows: list[tuple[int, np.ndarray, float, np.ndarray]] = []

    def add(self, logps: PairLogps, batch: Batch) -> None:
        """The next micro-batch."""
        ids = next(self._micro_ids)
        rewards = torch.stack(pair_rewards(self._loss, logps), dim=1)
        kept = self._preprocessed(rewards).float().cpu().numpy()
        losses = pair_losses(self._loss, logps).tolist()
        inputs = [row.cpu().numpy() for row in batch.chosen_rows()]
        if len(ids):  # filler has none
            self._rows += zip(ids.tolist(), kept, losses, inputs, strict=True)

    def _preprocessed(self, rewards: Tensor) -> Tensor:
        preprocess = self._hooks.preprocess_logits_for_metrics
        if preprocess is None:
            return rewards
        labels = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
        kept = preprocess(rewards, labels)
        if not isinstance(kept, Tensor) or kept.shape[:1] != rewards.shape[:1]:
            found = tuple(kept.shape) if isinstance(kept, Tensor) else type(kept).__name__
            raise ConfigError(
                f"preprocess_logits_for_metrics must return a tensor with a row for each of the {len(rewards)} pairs; "
                f"got {found}"
            )
        return kept

    def gathered(self) -> EvalPrediction:
        """The whole set, on every rank."""
        rows = sorted((row for part in ranks.all_gather(self._rows) for row in part), key=lambda row: row[0])
        _, predictions, losses, inputs = zip(*rows, strict=True)
        wanted = self._hooks.include_for_metrics
        return EvalPrediction(
            predictions=np.stack(predictions),
            label_ids=np.zeros(len(rows), dtype=np.int64),
            inputs=_padded(inputs) if "inputs" in wanted else None,
            losses=np.array(losses, dtype=np.float32) if "loss" in wanted else None,
        )


def computed(hooks: Hooks, found: EvalPrediction) -> dict[str, float]:
    """What hooks.compute_metrics makes of it; rank 0 computes it, every rank gets it.

    Raises ConfigError on every rank when it fails or returns something else than numbers by name.
    """
    if hooks.compute_metrics is None:
        return {}
    outcome: dict[str, float] | str | None = None
    if ranks.rank() == 0:
        try:
            values = hooks.compute_metrics(found)
            if isinstance(values, Mapping):
                outcome = {str(name): float(value) for name, value in values.items()}
            else:
                outcome = f"returned {type(values).__name__}, not numbers by name"
        except Exception as error:  # the user's code
            outcome = f"raised {type(error).__name__}: {error}"
    outcome = ranks.broadcast(outcome)
    if not isinstance(outcome, dict):
        raise ConfigError(
            f"compute_metrics {outcome}; it gets an EvalPrediction and must return a dict of numbers"
        )
    return outcome


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), PAD, dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded
