"""Which rank computes which pairs of a step, in which micro-batches: equal work, as far as whole pairs can be.

Pure functions of lengths, in integers, so that every rank finds the same whatever its processor makes of a float.

Shape suffixes: N pairs, K columns of a row (prompt and completion of an encoder-decoder, else one), M micro-batches.
"""

import math
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from typing import Literal

import numpy as np

Ints = np.ndarray
"""int64."""
Layout = Literal["packed", "padded", "split"]
"""Of pairs: by `collate.pack`, by `collate.collate`, or by the latter for an encoder-decoder."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The work that pairs make in a layout, in any unit."""

    layout: Layout = "packed"
    token: int = 1
    scored: int = 0
    """More for a token that is scored: its logits."""
    attended: int = 0
    """More for each token that another one attends to."""

    def of(self, lengths: Ints) -> "Sizes":
        """What pairs come to by their `blocks.Lengths`, (4, N).

        >>> lengths = np.array([[5], [7], [2], [2]])  # a prompt of 2 tokens with completions of 3 and 5
        >>> Costs("packed").of(lengths).tokens_NK, Costs("padded").of(lengths).tokens_NK
        (array([[8]]), array([[14]]))
        """
        chosen, rejected, chosen_start, rejected_start = lengths.astype(np.int64)
        scored = chosen + rejected - chosen_start - rejected_start
        if self.layout == "packed":
            # Without the last tokens; what is shared is at least the prompt.
            chosen, rejected, shared = chosen - 1, rejected - 1, np.minimum(chosen_start, rejected_start)
            columns = [chosen + rejected - shared]
            attended = (chosen**2 + rejected**2 - shared**2) // 2
        elif self.layout == "padded":
            columns = [2 * np.maximum(chosen, rejected)]
            attended = columns[0] ** 2 // 2
        else:
            prompt = 2 * np.maximum(chosen_start, rejected_start)
            answer = 2 * np.maximum(chosen - chosen_start, rejected - rejected_start)
            columns = [prompt, answer]
            attended = (prompt**2 + answer * prompt + answer**2) // 2
        return Sizes(self, np.stack(columns, 1), scored, attended)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the pairs of a step come to, each by itself."""

    costs: Costs
    tokens_NK: Ints
    """Tokens that are computed."""
    scored_N: Ints
    attended_N: Ints

    @property
    def tokens(self) -> Ints:
        """(N,)"""
        tokens: Ints = self.tokens_NK.sum(1)
        return tokens

    @property
    def work(self) -> Ints:
        """(N,)"""
        costs = self.costs
        work: Ints = (
            costs.token * self.tokens + costs.scored * self.scored_N + costs.attended * self.attended_N
        )
        return work

    def of_parts(self, part_N: Ints, parts: int) -> tuple[Ints, Ints, Ints]:
        """Tokens, scored tokens and work of micro-batches, (M,) each; `part_N` says in which one a pair is.

        Padded rows are all as long as the longest.
        """
        order, counts = np.argsort(part_N, kind="stable"), np.bincount(part_N, minlength=parts)
        starts = (np.cumsum(counts) - counts)[counts > 0]
        tokens_M, scored_M, work_M = np.zeros((3, parts), np.int64)
        scored_M[counts > 0] = np.add.reduceat(self.scored_N[order], starts)
        if self.costs.layout == "packed":
            tokens_M[counts > 0] = np.add.reduceat(self.tokens[order], starts)
            work_M[counts > 0] = np.add.reduceat(self.work[order], starts)
            return tokens_M, scored_M, work_M
        tokens_M[counts > 0] = np.maximum.reduceat(self.tokens_NK[order], starts).sum(1)
        work_M[counts > 0] = self.costs.attended * np.maximum.reduceat(self.attended_N[order], starts)
        tokens_M *= counts
        return (
            tokens_M,
            scored_M,
            counts * work_M + self.costs.token * tokens_M + self.costs.scored * scored_M,
        )

    def growing(self, pairs: Ints) -> Ints:
        """Tokens of the first of these pairs, of the first two in a micro-batch, and so on; (N,)."""
        tokens_NK = self.tokens_NK[pairs]
        if self.costs.layout == "packed":
            return np.cumsum(tokens_NK)
        growing: Ints = np.arange(1, len(pairs) + 1) * np.maximum.accumulate(tokens_NK).sum(1)
        return growing


@dataclass(frozen=True, slots=True)
class Limit:
    """Of a micro-batch."""

    pairs: int
    tokens: int | None = None
    """Instead of `pairs`, where given; a pair that has more is a micro-batch by itself."""


def micro_batches(
    sizes: Sizes, limit: Limit, rank: int, world_size: int, *, in_order: bool = False
) -> list[Ints]:
    """The micro-batches of a rank in a step, as places among the pairs of the step; some may be empty.

    Every rank has as many. All have similar work, in each of them too, and the one with the most tokens comes first, so
    that memory peaks at once. With `in_order` the pairs keep theirs, and ranks take turns as with accelerate.

    >>> sizes = Costs().of(np.full((4, 5), 2))
    >>> [micro_batches(sizes, Limit(2), rank, 2, in_order=True) for rank in (0, 1)]
    [[array([0, 1]), array([4])], [array([2, 3]), array([], dtype=int64)]]
    """
    part_N, parts = cut(sizes, limit, world_size, in_order=in_order)
    if in_order:
        mine = np.arange(rank, parts, world_size)
    else:
        tokens_M, _, work_M = sizes.of_parts(part_N, parts)
        mine = np.flatnonzero(balanced(work_M, world_size) == rank)
        mine = mine[np.argsort(-tokens_M[mine], kind="stable")]
    order, ends = np.argsort(part_N, kind="stable"), np.bincount(part_N, minlength=parts).cumsum()
    return [order[ends[part - 1] if part else 0 : ends[part]] for part in mine]


def cut(sizes: Sizes, limit: Limit, multiple: int, *, in_order: bool = False) -> tuple[Ints, int]:
    """The micro-batch of each pair of a step, (N,), and how many there are: the least multiple that the limit allows.

    Those of packed pairs have similar work; padded pairs are with others as long as they are.
    """
    pairs = len(sizes.tokens_NK)
    order = np.arange(pairs) if in_order else np.argsort(-sizes.tokens, kind="stable")
    is_packed = sizes.costs.layout == "packed"
    if limit.tokens is not None and is_packed and not in_order:
        return filled(sizes.tokens, limit.tokens, multiple)
    if limit.tokens is not None:
        ends = consecutive(sizes, order, limit.tokens)
        ends = ends if in_order else halved(sizes.tokens[order], ends, multiple)
        parts, place = len(ends), np.searchsorted(ends, np.arange(pairs), side="right")
    elif in_order:
        parts, place = math.ceil(pairs / limit.pairs), np.arange(pairs) // limit.pairs
    else:
        parts = multiple * math.ceil(pairs / (multiple * limit.pairs))
        if is_packed:
            return balanced(sizes.work, parts), parts
        place = np.arange(pairs) * parts // pairs
    part_N = np.empty(pairs, np.int64)
    part_N[order] = place
    return part_N, multiple * math.ceil(parts / multiple)


def balanced(work_N: Ints, parts: int) -> Ints:
    """The part that each item goes to, (N,), so that parts have equal work, and as many items give or take one.

    The largest differencing method of Karmarkar and Karp (1982), with parts of equal size as by Michiels et al. (2003):
    items come in groups, one for each part, and the two groups with the largest differences become one, the largest of
    one with the smallest of the other, until a single group is left.

    >>> balanced(np.array([8, 7, 6, 5, 4, 2]), 2)  # 16 each: 4 and 7 with 2 and 8 first, then 5 and 6
    array([0, 1, 0, 1, 1, 0])
    """
    if parts == 1:
        return np.zeros(len(work_N), np.int64)
    order = np.argsort(-work_N, kind="stable")
    groups = math.ceil(len(work_N) / parts)
    sums = np.zeros(groups * parts, np.int64)
    sums[: len(order)] = work_N[order]
    nodes = list(sums.reshape(groups, parts))  # each from the largest to the smallest
    heap = [(int(node[-1] - node[0]), index) for index, node in enumerate(nodes)]
    heapify(heap)
    joined = []
    while len(heap) > 1:
        one, other = heappop(heap)[1], heap[0][1]
        both = nodes[one] + nodes[other][::-1]
        sequence = np.argsort(-both, kind="stable")
        both = both[sequence]
        heapreplace(heap, (int(both[-1] - both[0]), len(nodes)))
        nodes.append(both)
        joined.append((one, other, sequence))
    places = np.empty((len(nodes), parts), np.int64)
    places[-1] = np.arange(parts)
    for node in range(len(nodes) - 1, groups - 1, -1):
        one, other, sequence = joined[node - groups]
        places[one, sequence] = places[node]
        places[other, parts - 1 - sequence] = places[node]
    part_N = np.empty(len(order), np.int64)
    part_N[order] = places[:groups].ravel()[: len(order)]
    return part_N


def filled(tokens_N: Ints, limit: int, multiple: int) -> tuple[Ints, int]:
    """The part that each item goes to, (N,), and how many there are: the first multiple for which this finds a way.

    From the largest to the smallest, each goes where the fewest tokens are; only single items exceed the limit. With a
    few items to a part that takes a tenth more parts than the fullest ones would, and leaves them equal.

    >>> filled(np.array([3, 9, 2, 4, 3]), 6, multiple=1)
    (array([2, 0, 1, 1, 2]), 3)
    """
    order = np.argsort(-tokens_N, kind="stable")
    items = tokens_N[order].tolist()
    parts = max(int((2 * tokens_N > limit).sum()), math.ceil(np.minimum(tokens_N, limit).sum() / limit))
    while True:
        parts = multiple * math.ceil(parts / multiple)
        heap = [(0, part) for part in range(parts)]
        places, most = [], 0
        for tokens in items:
            held, part = heap[0]
            most = max(most, held + tokens) if held else most
            heapreplace(heap, (held + tokens, part))
            places.append(part)
        if most <= limit:
            part_N = np.empty(len(items), np.int64)
            part_N[order] = places
            return part_N, parts
        parts = max(parts + 1, parts * most // limit)


def consecutive(sizes: Sizes, order: Ints, limit: int) -> Ints:
    """Where each micro-batch of the pairs in this order ends, (M,), if none is to have more tokens than the limit.

    >>> consecutive(Costs("padded").of(np.full((4, 5), 2)), np.arange(5), 8)
    array([2, 4, 5])
    """
    ends = [0]
    at_most = limit // int(sizes.tokens.min()) + 1
    while ends[-1] < len(order):
        fitting = sizes.growing(order[ends[-1] : ends[-1] + at_most]) <= limit
        ends.append(ends[-1] + max(1, int(fitting.sum())))
    return np.array(ends[1:])


def halved(tokens_N: Ints, ends: Ints, multiple: int) -> Ints:
    """The same with the largest micro-batches halved, until there are a multiple of them; single pairs stay.

    Pairs are in the order of their tokens, the longest first, so that one tells the size of its micro-batch.

    >>> halved(np.array([2, 2, 2, 2, 2]), np.array([3, 5]), 4)
    array([1, 2, 3, 5])
    """
    starts = [0, *ends[:-1].tolist()]
    heap: list[tuple[int, int, int]] = []

    def add(start: int, end: int) -> None:
        if end - start > 1:
            heappush(heap, ((start - end) * int(tokens_N[start]), start, end))

    for start, end in zip(starts, ends.tolist(), strict=True):
        add(start, end)
    for _ in range(-len(ends) % multiple):
        if heap:
            _, start, end = heappop(heap)
            middle = (start + end) // 2
            starts.append(middle)
            add(start, middle)
            add(middle, end)
    return np.array([*sorted(starts)[1:], len(tokens_N)])
