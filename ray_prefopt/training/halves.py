"""Both halves of a micro-batch at once, forward and backward, each by half of the threads of a process.

An operation of several threads is over when the slowest of them is, and a step has thousands of operations; halves side
by side wait for each other once.

Shape suffixes: B pairs, N of them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ray_prefopt.data.balance import Costs, balanced
from ray_prefopt.data.blocks import Lengths
from ray_prefopt.data.collate import PairBatch, pack
from ray_prefopt.engine.base import Engine
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.losses.head import PairLoss
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.model.forward import Batch, Scorer

Gradients = Sequence[Tensor | None]
"""Of each weight; None where nothing of a half has reached it."""


def in_halves(scorer: Scorer, engine: Engine, costs: Costs) -> Scorer:
    """A scorer whose losses are computed in halves; the given one where they cannot be, or need not be."""
    threads = torch.get_num_threads()
    can_be = (
        scorer.is_packed
        and isinstance(engine, PlainEngine)
        and engine.device.type == "cpu"
        and engine.dtype != torch.float16  # whose gradients are scaled before they are made
        and not any(_has_moving_positions(each) for each in engine.module.modules())
    )
    if threads % 2 or not can_be:
        return scorer
    pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads // 2,))
    return HalvedScorer(**vars(scorer), module=engine.module, costs=costs, threads=threads, pool=pool)


def _has_moving_positions(module: Any) -> bool:
    """Whether these are rotary positions that a forward pass changes by its longest row."""
    kinds = getattr(module, "rope_type", None)
    return bool({"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]))


class Half(NamedTuple):
    places_N: Tensor
    """Of its pairs, among those of the micro-batch."""
    logps: PairLogps
    gradients: Gradients


@dataclass(frozen=True, kw_only=True)
class HalvedScorer(Scorer):
    """Of packed pairs, by a module that is in one process; gradients are made with the loss."""

    module: nn.Module
    costs: Costs
    threads: int
    """Of the process."""
    pool: ThreadPoolExecutor
    """Of one thread, for the second half."""

    def loss(self, batch: Batch, pair_loss: PairLoss) -> tuple[Tensor, PairLogps]:
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        has_hooks = any(weight._backward_hooks for weight in weights)  # which would be called for each half
        if isinstance(batch, PairBatch) or len(batch.segments) == 1 or has_hooks:
            return super().loss(batch, pair_loss)
        pairs, scored_2B = batch.pairs(), batch.scored_2B
        whole = PairLogps.of_sums(torch.zeros(len(scored_2B)), torch.zeros(len(batch.targets_S)), scored_2B)
        half_B = balanced(self.costs.of(Lengths.of(pairs).take(np.arange(len(pairs)))).work, 2)

        def of_half(half: int) -> Half:
            places = np.flatnonzero(half_B == half)
            places_N = torch.from_numpy(places)
            loss, logps = super(HalvedScorer, self).loss(
                pack([pairs[place] for place in places]),
                lambda logps: pair_loss(whole.put(places_N, logps)),
            )
            return Half(places_N, logps, torch.autograd.grad(loss, weights, allow_unused=True))

        one, other = self._at_once(of_half)
        with torch.no_grad():
            logps = whole.put(one.places_N, one.logps).put(other.places_N, other.logps)
            loss = pair_loss(logps)
        gradients = [_sum(*each) for each in zip(one.gradients, other.gradients, strict=True)]
        return _Differentiated.apply(loss, gradients, *weights), logps  # type: ignore[no-untyped-call]

    def _at_once(self, of_half: Callable[[int], Half]) -> tuple[Half, Half]:
        torch.set_num_threads(self.threads // 2)
        other = self.pool.submit(of_half, 1)
        try:
            return of_half(0), other.result()
        finally:
            wait([other])
            torch.set_num_threads(self.threads)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one.add_(other)


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # who gets the last reference need not copy
        if upstream != 1:  # a pass over all weights
            gradients = [None if each is None else each.mul_(upstream) for each in gradients]
        return None, None, *gradients
