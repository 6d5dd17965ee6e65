"""How equal the work of ranks is, beside pairs that are sorted by length and dealt out in a snake, and what it costs.

    python -m tests.benchmarks.balance

Lengths are drawn from a lognormal around those of UltraFeedback, up to 1,024 tokens; work is that of a Qwen2.5 of
half a billion weights. Of each row twenty steps are drawn, and the means are shown.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from transformers import AutoConfig

from ray_prefopt.data.balance import Ints, Layout, Limit, Sizes, micro_batches
from ray_prefopt.training.batches import costs_of

STEPS = 20
CASES = [
    (128, 4, 8), (128, 8, 4), (128, 2, 16), (128, 1, 64), (512, 8, 8), (512, 4, 64), (4096, 8, 8), (4096, 1, 1000),
]  # fmt: skip
"""Pairs of a step, pairs of a micro-batch, ranks."""
Deal = list[list[Ints]]
"""The micro-batches of all ranks."""


def lengths_of(pairs: int, seed: int) -> Ints:
    """As `blocks.Lengths.take`."""
    rng = np.random.default_rng(seed)

    def draw(median: int) -> Ints:
        return np.clip(rng.lognormal(math.log(median), 0.8, pairs), 4, 512).astype(np.int64)

    prompt, chosen, rejected = draw(110), draw(260), draw(260)
    return np.stack([prompt + chosen, prompt + rejected, prompt, prompt])


def dealt(lengths: Ints, micro_batch: int, world_size: int) -> Deal:
    """Sorted by the tokens of both sequences and dealt out in a snake, then cut in that order."""
    by_length = np.argsort(-lengths[:2].sum(0), kind="stable")
    turn = np.arange(len(by_length)) % (2 * world_size)
    ranks = [by_length[(turn == rank) | (turn == 2 * world_size - 1 - rank)] for rank in range(world_size)]
    count = math.ceil(math.ceil(len(by_length) / world_size) / micro_batch)
    return [[mine[i * micro_batch : (i + 1) * micro_batch] for i in range(count)] for mine in ranks]


@dataclass(frozen=True)
class Imbalance:
    ranks: float
    """The most work of a rank, over the mean of what pairs make that are not padded to others."""
    waiting: float
    """The same if ranks wait for each other after each micro-batch, as ZeRO 2 and 3 make them."""
    peak: int
    """Tokens of the largest micro-batch."""


def imbalance(sizes: Sizes, deal: Sequence[Sequence[Ints]]) -> Imbalance:
    world_size, count = len(deal), len(deal[0])
    part = np.empty(len(sizes.scored_N), np.int64)
    for rank, mine in enumerate(deal):
        for number, micro in enumerate(mine):
            part[micro] = rank * count + number
    tokens, _, work = sizes.of_parts(part, world_size * count)
    work = work.reshape(world_size, count)
    mean = sizes.work.sum() / world_size
    return Imbalance(work.sum(1).max() / mean, work.max(0).sum() / mean, int(tokens.max()))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def row(layout: Layout, pairs: int, micro_batch: int, world_size: int) -> str:
    architecture = AutoConfig.for_model(
        "qwen2", hidden_size=896, num_hidden_layers=24, intermediate_size=4864, vocab_size=151936,
        num_attention_heads=14, num_key_value_heads=2,
    )  # fmt: skip
    costs = costs_of(architecture, layout)
    limit, budget = Limit(micro_batch), Limit(micro_batch, tokens=640 * micro_batch)
    before, after, times = [], [], []
    for seed in range(STEPS):
        lengths = lengths_of(pairs, seed)
        sizes = costs.of(lengths)
        deal = [micro_batches(sizes, limit, rank, world_size) for rank in range(world_size)]
        before.append(astuple(imbalance(sizes, dealt(lengths, micro_batch, world_size))))
        after.append(astuple(imbalance(sizes, deal)))
        times.append([timed(lambda: micro_batches(sizes, each, 0, world_size)) for each in (limit, budget)])  # noqa: B023
    columns = zip(np.mean(before, 0), np.mean(after, 0), ("{:.3f}", "{:.3f}", "{:,.0f}"), strict=True)
    cells = [
        *map(str, (layout, pairs, micro_batch, world_size)),
        *(f"{form.format(one)}, {form.format(other)}" for one, other, form in columns),
        *(f"{value * 1e6:,.0f}" for value in np.median(times, 0)),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| layout | pairs | micro-batch | ranks | most work over mean | waiting | largest micro-batch | us | us, by tokens |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    sys.stdout.write(HEAD + "\n")
    layouts: tuple[Layout, ...] = ("packed", "padded")
    for layout in layouts:
        for case in CASES:
            sys.stdout.write(row(layout, *case) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
