"""One optimizer step, and one evaluation: functions of an engine, micro-batches and an objective."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ray_prefopt.data.plan import Ids
from ray_prefopt.engine.base import Engine
from ray_prefopt.errors import NonFiniteError
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import Batch, Scorer
from ray_prefopt.training import ranks
from ray_prefopt.training.metrics import MetricSums


@dataclass(frozen=True, slots=True)
class StepInput:
    """What a rank needs for a step."""

    step: int
    totals: StepTotals
    micro_batches: Sequence[Batch]
    micro_ids: Sequence[Ids]
    """Pair ids of each micro-batch; empty for filler."""


def train_step(
    engine: Engine,
    inputs: StepInput,
    objective: Objective,
    metrics: MetricSums,
    notify: Callable[[str], None] = lambda _: None,
    *,
    scorer: Scorer,
) -> float:
    """Forward and backward over the micro-batches, then one update; returns the gradient norm before clipping.

    `notify` hears of `on_substep_end`, `on_pre_optimizer_step` and `on_optimizer_step`, as callbacks name them.
    `scorer` is the engine's. Raises NonFiniteError on every rank, before anything
    moved, with the pairs of the first bad micro-batch.
    """
    losses: list[torch.Tensor] = []
    for batch in inputs.micro_batches:
        if losses:
            notify("on_substep_end")
        batch = batch.to(engine.device)
        loss, logps = scorer.loss(
            batch, partial(objective.loss, weights=batch.weights_B, totals=inputs.totals)
        )
        losses.append(loss.detach())
        metrics.add(objective.sums(logps, batch.weights_B, losses[-1]))
        # Times one, or NaN for a loss that is not finite: its gradient is NaN then, at which the engine stops. To look
        # at the loss here would be to wait for the device.
        engine.backward(loss * (1 + 0 * losses[-1]))
    notify("on_pre_optimizer_step")
    try:
        norm = engine.step()
    except NonFiniteError as error:
        raise NonFiniteError(
            _bad_loss(losses, inputs)
            or f"step {inputs.step + 1}: {error}, though every loss is finite; nothing was updated. {REMEDY}"
        ) from None
    # With fp16 a gradient overflows now and then, and its step is left out; a loss does not.
    if not math.isfinite(norm) and (why := _bad_loss(losses, inputs)):
        raise NonFiniteError(why)
    notify("on_optimizer_step")
    metrics.end_step()
    return norm


REMEDY = (
    "Start again from the last checkpoint with a smaller optim.learning_rate or beta, model.dtype: bfloat16 instead of "
    "float16, or without these pairs"
)


def _bad_loss(losses: Sequence[torch.Tensor], inputs: StepInput) -> str | None:
    """What to say of the first loss that is not finite, the same on all ranks; called by all of them."""
    own = None
    for micro, loss in enumerate(losses):
        if not math.isfinite(loss):
            own = (
                f"step {inputs.step + 1}, rank {ranks.rank()}: the loss of micro-batch {micro} is {loss.item()}, "
                f"pair ids {inputs.micro_ids[micro].tolist()}; nothing was updated. {REMEDY}"
            )
            break
    return next((words for words in ranks.all_gather(own) if words is not None), None)


@torch.no_grad()
def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    objective: Objective,
    totals: StepTotals,
    each: Callable[[PairLogps, Batch], None] | None = None,
    *,
    scorer: Scorer,
) -> dict[str, float]:
    """Means over a whole evaluation set, exact: sums and counts over ranks, nothing dropped or counted twice.

    `each` gets the log-probabilities of every micro-batch; `scorer` is the engine's.
    """
    metrics = MetricSums()
    engine.module.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        logps = scorer.logps(batch)
        loss = objective.loss(logps, batch.weights_B, totals)
        metrics.add(objective.sums(logps, batch.weights_B, loss))
        if each is not None:
            each(logps, batch)
    engine.module.train()
    metrics.end_step()
    return metrics.reduce()
