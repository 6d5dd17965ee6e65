"""One optimizer step, and one evaluation: functions of an engine, micro-batches and an objective."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ray_prefopt.data.plan import Ids
from ray_prefopt.engine.base import Engine
from ray_prefopt.errors import NonFiniteError
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import Batch, Scorer, keeps_logits
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
    scorer: Scorer | None = None,
) -> float:
    """Forward and backward over the micro-batches, then one update; returns the gradient norm before clipping.

    `notify` hears of `on_substep_end`, `on_pre_optimizer_step` and `on_optimizer_step`, as callbacks name them.
    `scorer` is the engine's; it takes padded pairs when not given. Raises NonFiniteError on every rank, before anything
    moved, with the pairs of the first bad micro-batch.
    """
    scorer = scorer or _padded(engine)
    losses: list[torch.Tensor] = []
    for batch in inputs.micro_batches:
        if losses:
            notify("on_substep_end")
        batch = batch.to(engine.device)
        loss, sums = _loss(scorer, batch, objective, inputs.totals)
        losses.append(loss.detach())
        # Whether it is finite is not looked at here, which would wait for the device: by this it has a gradient that is
        # not finite either, at which the engine stops.
        engine.backward(loss * (1 + 0 * losses[-1]))
        metrics.add(sums)
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


def _loss(
    scorer: Scorer, batch: Batch, objective: Objective, totals: StepTotals
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the objective makes of a micro-batch; the loss alone has a gradient."""
    loss, logps = scorer.loss(batch, lambda logps: objective(logps, batch.weights_B, totals)[0])
    with torch.no_grad():
        return loss, objective(logps, batch.weights_B, totals)[1]


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
    scorer: Scorer | None = None,
) -> dict[str, float]:
    """Means over a whole evaluation set, exact: sums and counts over ranks, nothing dropped or counted twice.

    `each` gets the log-probabilities of every micro-batch; `scorer` is as in `train_step`.
    """
    scorer = scorer or _padded(engine)
    metrics = MetricSums()
    engine.module.eval()
    for batch in batches:
        batch = batch.to(engine.device)
        logps = scorer.logps(batch)
        _, sums = objective(logps, batch.weights_B, totals)
        metrics.add(sums)
        if each is not None:
            each(logps, batch)
    engine.module.train()
    metrics.end_step()
    return metrics.reduce()


def _padded(engine: Engine) -> Scorer:
    return Scorer(engine.forward, keep_logits=keeps_logits(engine.module))
