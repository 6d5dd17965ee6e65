"""The order of training: which pairs form optimizer step s.

Pure functions of (lengths, blocks, seed, epoch, step): restarts, Ray's scheduling and the number of workers cannot
change which pairs a step holds. Pair ids are dense, 0 to N-1.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

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

    @cached_property
    def num_pairs(self) -> int:
        return sum(self.block_rows)

    @cached_property
    def _hash(self) -> int:
        return hash((self.block_rows, self.seed, self.shuffle, self.window))

    def __hash__(self) -> int:
        """Every step asks for its order by this one; of a hundred thousand blocks it takes a millisecond to find."""
        return self._hash

    def epoch(self, epoch: int) -> Ids:
        """Pair ids in the order of this epoch, (N,); each exactly once."""
        if not self.shuffle:
            return np.arange(self.num_pairs)
        return _shuffled(self, epoch)[0]

    def window_ends(self, epoch: int) -> Ids:
        """Where in the order of this epoch each window ends."""
        if not self.shuffle:
            return np.array([self.num_pairs])
        return _shuffled(self, epoch)[1]


@lru_cache(maxsize=2)
def _shuffled(order: Order, epoch: int) -> tuple[Ids, Ids]:
    block_rows, window = order.block_rows, order.window
    rng = np.random.default_rng([order.seed, epoch])
    starts = np.concatenate([[0], np.cumsum(block_rows)])
    windows: list[list[Ids]] = [[]]
    held = 0
    for block in rng.permutation(len(block_rows)):
        if windows[-1] and held + block_rows[block] > window:
            windows.append([])
            held = 0
        windows[-1].append(np.arange(starts[block], starts[block + 1]))
        held += block_rows[block]
    permuted = [rng.permutation(np.concatenate(ids)) for ids in windows if ids]
    return np.concatenate(permuted), np.cumsum([len(ids) for ids in permuted])


@dataclass(frozen=True, eq=False)
class Plan:
    """Steps and global batches of a whole run.

    >>> plan = Plan(Order((5,), seed=0, shuffle=False), lengths=np.ones(5), global_batch=2, epochs=1)
    >>> plan.total_steps, [plan.step_ids(step).tolist() for step in range(3)]
    (3, [[0, 1], [2, 3], [4]])
    """

    order: Order
    lengths: np.ndarray = field(repr=False)
    """Tokens of each pair, prompts counted twice, (N,)."""
    global_batch: int
    epochs: float = 1
    max_steps: int | None = None
    group_by_length: bool = False
    """Steps hold pairs of similar length, as `grouped` arranges them."""
    drop_last: bool = False
    """Leave out the pairs at the end of an epoch that do not fill a step."""

    def __post_init__(self) -> None:
        if self.order.num_pairs < self.global_batch:
            raise DataError(
                f"{self.order.num_pairs} usable pairs do not fill one global batch of {self.global_batch}: "
                "add pairs, or set run.global_batch to fewer"
            )

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left, unless that is to be dropped."""
        if self.drop_last:
            return self.order.num_pairs // self.global_batch
        return math.ceil(self.order.num_pairs / self.global_batch)

    @property
    def total_steps(self) -> int:
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch)

    def epoch_at(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        whole, rest = divmod(step, self.steps_per_epoch)
        pairs = self.order.num_pairs - self.drop_last * (self.order.num_pairs % self.global_batch)
        return whole + rest * self.global_batch / pairs

    def step_ids(self, step: int) -> Ids:
        """The pairs of a step, whatever the world size."""
        epoch, index = divmod(step, self.steps_per_epoch)
        ids = _epoch_by_length(self, epoch) if self.group_by_length else self.order.epoch(epoch)
        return ids[index * self.global_batch : (index + 1) * self.global_batch]

    def tokens_until(self, step: int) -> int:
        """Tokens in the pairs of the first `step` steps."""
        return sum(int(self.lengths[self.step_ids(done)].sum()) for done in range(step))


STRETCH = 50
"""Steps whose pairs are sorted together; fewer where an epoch has not four times as many, as in transformers."""


@lru_cache(maxsize=2)
def _epoch_by_length(plan: Plan, epoch: int) -> Ids:
    ids = plan.order.epoch(epoch)
    stretch = max(min(len(ids) // (4 * plan.global_batch), STRETCH), 1) * plan.global_batch
    return grouped(ids, plan.lengths, plan.global_batch, stretch, plan.order.window_ends(epoch))


def grouped(ids: Ids, lengths: np.ndarray, global_batch: int, stretch: int, window_ends: Ids) -> Ids:
    """Sort the pairs of an epoch inside stretches of so many, the longest first, and never across windows.

    The step with the longest pair of all comes first, so that memory peaks at once.

    >>> lengths = np.array([3, 1, 9, 2, 7, 5])
    >>> grouped(np.arange(6), lengths, 1, 3, np.array([6])).tolist()
    [2, 0, 1, 4, 5, 3]
    """
    ends = np.union1d(window_ends, np.arange(stretch, len(ids), stretch))
    parts = np.split(ids, ends[:-1])
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    start = int(lengths[order].argmax()) // global_batch * global_batch
    longest = order[start : start + global_batch].copy()
    order[start : start + len(longest)] = order[: len(longest)]
    order[: len(longest)] = longest
    return order


def extend_hash(digest: str, ids: Ids) -> str:
    """Running hash of the pairs seen so far: equal only if every step held the same pairs in the same order."""
    return hashlib.blake2b(
        digest.encode() + np.ascontiguousarray(ids, np.int64).tobytes(), digest_size=16
    ).hexdigest()
