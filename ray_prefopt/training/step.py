"""One optimizer step, and one evaluation: functions of an engine, micro-batches and an objective."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

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
        engine.backward(loss)
        losses.append(loss.detach())
        metrics.add(sums)
    _check_finite(torch.stack(losses), inputs)
    notify("on_pre_optimizer_step")
    try:
        norm = engine.step()
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {inputs.step + 1}: {error}, though every loss is finite; nothing was updated. {REMEDY}"
        ) from None
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


def _check_finite(losses: torch.Tensor, inputs: StepInput) -> None:
    """One small reduction per step, so that all ranks stop together, with the words of the first bad one."""
    is_bad = ~torch.isfinite(losses)
    any_bad = is_bad.any().float()
    if dist.is_initialized():
        dist.all_reduce(any_bad, op=dist.ReduceOp.MAX)
    if not any_bad.item():
        return
    own = None
    if is_bad.any():
        micro = int(is_bad.nonzero()[0])
        own = (
            f"step {inputs.step + 1}, rank {ranks.rank()}: the loss of micro-batch {micro} is {losses[micro].item()}, "
            f"pair ids {inputs.micro_ids[micro].tolist()}; nothing was updated. {REMEDY}"
        )
    raise NonFiniteError(next(message for message in ranks.all_gather(own) if message is not None))


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
