"""The order of training: which pairs form optimizer step s, and which rank sees them when.

Pure functions of (lengths, blocks, seed, epoch, step, world size): restarts, Ray's scheduling and the number of workers
cannot change which pairs a step holds. Pair ids are dense, 0 to N-1.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ray_prefopt.errors import DataError

Ids = np.ndarray
"""Pair ids, int64."""


@dataclass(frozen=True)
class Order:
    """In what sequence an epoch visits the pairs.

    Blocks are permuted, then pairs inside windows of consecutive blocks; a set that fits in one window gets a full
    shuffle, a larger one needs no more than a window of it in memory.
    """

    block_rows: tuple[int, ...]
    """Pairs in each block."""
    seed: int
    shuffle: bool = True
    window: int = 1_000_000
    """Pairs permuted together."""

    @property
    def num_pairs(self) -> int:
        return sum(self.block_rows)

    def epoch(self, epoch: int) -> Ids:
        """Pair ids in the order of this epoch, (N,); each exactly once."""
        if not self.shuffle:
            return np.arange(self.num_pairs)
        return _shuffled(self.block_rows, self.seed, epoch, self.window)


@lru_cache(maxsize=2)
def _shuffled(block_rows: tuple[int, ...], seed: int, epoch: int, window: int) -> Ids:
    rng = np.random.default_rng([seed, epoch])
    starts = np.concatenate([[0], np.cumsum(block_rows)])
    windows: list[list[Ids]] = [[]]
    held = 0
    for block in rng.permutation(len(block_rows)):
        if windows[-1] and held + block_rows[block] > window:
            windows.append([])
            held = 0
        windows[-1].append(np.arange(starts[block], starts[block + 1]))
        held += block_rows[block]
    return np.concatenate([rng.permutation(np.concatenate(ids)) for ids in windows if ids])


@dataclass(frozen=True)
class Plan:
    """Steps, global batches and micro-batches of a whole run.

    >>> plan = Plan(Order((5,), seed=0, shuffle=False), lengths=np.ones(5), global_batch=2, micro_batch=1, epochs=1)
    >>> plan.total_steps, [plan.step_ids(step).tolist() for step in range(3)]
    (3, [[0, 1], [2, 3], [4]])
    """

    order: Order
    lengths: np.ndarray = field(repr=False)
    """Work per pair in tokens, (N,), for balancing the ranks."""
    global_batch: int
    micro_batch: int
    epochs: float = 1
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if self.order.num_pairs < self.global_batch:
            raise DataError(
                f"{self.order.num_pairs} usable pairs do not fill one global batch of {self.global_batch}: "
                "add pairs, or set run.global_batch to fewer"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left: no pair is dropped."""
        return math.ceil(self.order.num_pairs / self.global_batch)

    @property
    def total_steps(self) -> int:
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch)

    def epoch_at(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, rest * self.global_batch / self.order.num_pairs)

    def step_ids(self, step: int) -> Ids:
        """The pairs of a step, whatever the world size."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.order.epoch(epoch)[index * self.global_batch : (index + 1) * self.global_batch]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[Ids]:
        """The micro-batches of a rank in a step; as many on each rank, some possibly empty.

        Ranks get equal numbers of pairs (give or take one) and similar numbers of tokens; each micro-batch holds pairs
        of similar length, the longest first, so that memory peaks at once. Without shuffling the order of the pairs is
        kept in this too.
        """
        ids = self.step_ids(step)
        if not self.order.shuffle:
            return in_turn(ids, self.micro_batch, rank, world_size)
        return deal(ids, self.lengths, self.micro_batch, rank, world_size)


def deal(ids: Ids, lengths: np.ndarray, micro_batch: int, rank: int, world_size: int) -> list[Ids]:
    """Cut the pairs of a step into this rank's micro-batches: sorted by length and dealt out in a snake.

    >>> lengths = np.array([5, 1, 4, 2])
    >>> [deal(np.arange(4), lengths, 1, rank, world_size=2) for rank in (0, 1)]
    [[array([0]), array([1])], [array([2]), array([3])]]
    """
    by_length = ids[np.argsort(-lengths[ids], kind="stable")]
    turn = np.arange(len(by_length)) % (2 * world_size)
    mine = by_length[(turn == rank) | (turn == 2 * world_size - 1 - rank)]
    count = math.ceil(math.ceil(len(ids) / world_size) / micro_batch)
    return [mine[index * micro_batch : (index + 1) * micro_batch] for index in range(count)]


def in_turn(ids: Ids, micro_batch: int, rank: int, world_size: int) -> list[Ids]:
    """Cut the pairs of a step in their order, the ranks taking micro-batches in turn, as accelerate does.

    >>> [in_turn(np.arange(5), 2, rank, world_size=2) for rank in (0, 1)]
    [[array([0, 1]), array([4])], [array([2, 3]), array([], dtype=int64)]]
    """
    cut = [ids[start : start + micro_batch] for start in range(0, len(ids), micro_batch)]
    mine = cut[rank::world_size]
    return mine + [ids[:0]] * (math.ceil(len(cut) / world_size) - len(mine))


def extend_hash(digest: str, ids: Ids) -> str:
    """Running hash of the pairs seen so far: equal only if every step held the same pairs in the same order."""
    return hashlib.blake2b(
        digest.encode() + np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=16
    ).hexdigest()
