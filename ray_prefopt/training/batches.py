"""What a rank computes in a step: which pairs in which micro-batches, and their tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.balance import Costs, Layout, Limit, cut, micro_batches
from ray_prefopt.data.blocks import Blocks
from ray_prefopt.data.plan import Ids, Plan
from ray_prefopt.data.stream import PairReader
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.memory import ModelSize
from ray_prefopt.losses.objective import StepTotals
from ray_prefopt.model.forward import Batch
from ray_prefopt.training import ranks
from ray_prefopt.training.step import StepInput

MakeBatch = Callable[[list[TokenizedPair], float], Batch]
"""A micro-batch of pairs that all have this weight."""
UNIT = 1 << 20
"""Work of a token in the layers of a model; there is less of it for a token that another one attends to."""
SAMPLED_STEPS = 100


def costs_of(architecture: PretrainedConfig, layout: Layout) -> Costs:
    """The work of pairs by the multiplications of a model; by their tokens alone where its config says too little.

    Every part of a model takes three times as much forward and backward as it takes forward.
    """
    size = ModelSize.of(architecture.get_text_config(), 0)
    if size is None:
        return Costs(layout)
    hidden = size.hidden
    layer = 2 * hidden * hidden + 2 * hidden * size.key_value + 3 * hidden * size.intermediate
    return Costs(
        layout,
        UNIT,
        UNIT * hidden * size.vocabulary // (layer * size.layers),
        UNIT * 2 * hidden // layer,  # the scores, and the values that they weigh
    )


def layout_of(architecture: PretrainedConfig, *, is_packed: bool) -> Layout:
    if architecture.is_encoder_decoder:
        return "split"
    return "packed" if is_packed else "padded"


@dataclass(frozen=True)
class Batching:
    """How pairs become the micro-batches of ranks."""

    blocks: Blocks
    costs: Costs
    limit: Limit
    in_order: bool = False

    def micro_ids(self, ids: Ids) -> list[Ids]:
        """Those of these pairs that this rank has in each of its micro-batches; none in filler."""
        sizes = self.costs.of(self.blocks.lengths.take(ids))
        return [
            ids[places]
            for places in micro_batches(
                sizes, self.limit, ranks.rank(), ranks.world_size(), in_order=self.in_order
            )
        ]

    def shortest(self, ids: Ids) -> Ids:
        """The one of these pairs with the fewest tokens, (1,)."""
        return ids[self.blocks.lengths.take(ids)[:2].sum(0).argmin(0, keepdims=True)]

    def count(self, ids: Ids, world_size: int) -> int:
        """Micro-batches that each of so many ranks has in a step of these pairs."""
        sizes = self.costs.of(self.blocks.lengths.take(ids))
        return cut(sizes, self.limit, world_size, in_order=self.in_order)[1] // world_size

    def largest(self, plan: Plan, world_size: int) -> tuple[int, int]:
        """Tokens, and scored ones, of the micro-batch with the most tokens.

        In a hundred steps of the first epoch, or of the longest pair by itself.
        """
        longest = self.blocks.total_lengths.argmax(0, keepdims=True)
        steps = min(plan.total_steps, plan.steps_per_epoch)
        sampled = np.unique(np.linspace(0, steps - 1, SAMPLED_STEPS).astype(int))
        found = []
        for ids in (longest, *(plan.step_ids(int(step)) for step in sampled)):
            sizes = self.costs.of(self.blocks.lengths.take(ids))
            tokens, scored, _ = sizes.of_parts(*cut(sizes, self.limit, world_size, in_order=self.in_order))
            found.append((int(tokens.max()), int(scored[tokens.argmax()])))
        return max(found)


def longest_pair(blocks: Blocks, costs: Costs) -> int:
    """Tokens of the longest pair by itself."""
    return int(costs.of(blocks.lengths.take(blocks.total_lengths.argmax(0, keepdims=True))).tokens[0])


def batching_of(blocks: Blocks, config: TrainConfig, costs: Costs) -> Batching:
    """That of training."""
    run = config.run
    return Batching(
        blocks, costs, Limit(run.micro_batch, run.micro_batch_tokens), in_order=not config.data.shuffle
    )


def eval_batching(blocks: Blocks, config: TrainConfig, costs: Costs) -> Batching:
    """That of an evaluation."""
    run = config.run
    if run.eval_micro_batch is not None:
        return Batching(blocks, costs, Limit(run.eval_micro_batch))
    return Batching(blocks, costs, Limit(run.micro_batch, run.micro_batch_tokens))


def step_inputs(
    plan: Plan, batching: Batching, reader: PairReader, start: int, make_batch: MakeBatch
) -> Iterator[StepInput]:
    """This rank's inputs of every step from `start` to the end of the plan."""
    chosen_lengths = batching.blocks.chosen_lengths
    for step in range(start, plan.total_steps):
        ids = plan.step_ids(step)
        micro_ids, filler = batching.micro_ids(ids), batching.shortest(ids)
        batches = [_batch(reader, micro, filler, make_batch) for micro in micro_ids]
        yield StepInput(step, StepTotals(len(ids), int(chosen_lengths[ids].sum())), batches, micro_ids)


def _batch(reader: PairReader, ids: Ids, filler: Ids, make_batch: MakeBatch) -> Batch:
    """The pairs with these ids; `filler` with weight 0 when there are none, so that ranks stay in step."""
    return make_batch(reader.read(ids if len(ids) else filler), 1.0 if len(ids) else 0.0)


@dataclass(frozen=True)
class EvalSet:
    """Held-out pairs, dealt out to the ranks; every pair exactly once."""

    batching: Batching
    make_batch: MakeBatch

    @property
    def blocks(self) -> Blocks:
        return self.batching.blocks

    @property
    def totals(self) -> StepTotals:
        return StepTotals(self.blocks.num_pairs, int(self.blocks.chosen_lengths.sum()))

    def micro_ids(self) -> list[Ids]:
        """Pair ids of this rank's micro-batches; empty for filler."""
        return self.batching.micro_ids(np.arange(self.blocks.num_pairs))

    def batches(self) -> Iterator[Batch]:
        reader, filler = PairReader(self.blocks), self.batching.shortest(np.arange(self.blocks.num_pairs))
        for micro in self.micro_ids():
            yield _batch(reader, micro, filler, self.make_batch)
