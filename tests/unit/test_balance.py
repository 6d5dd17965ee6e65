"""Equal work for all ranks: by hand for a few pairs, as a property for many, and beside dealing out by length."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.data.balance import Costs, Ints, Layout, Limit, Sizes, balanced, cut, filled, micro_batches
from ray_prefopt.data.collate import collate, pack
from tests.benchmarks.balance import dealt, imbalance, lengths_of
from tests.tiny import random_pairs

LAYOUTS: tuple[Layout, ...] = ("packed", "padded", "split")


def of_tokens(*tokens: int, layout: Layout = "packed") -> Sizes:
    """Pairs of so many tokens each."""
    values = np.array(tokens)
    return Sizes(Costs(layout), values[:, None], np.zeros_like(values), np.zeros_like(values))


def tokens_of(sizes: Sizes, micros: list[list[Ints]]) -> list[list[list[int]]]:
    return [[sizes.tokens[micro].tolist() for micro in mine] for mine in micros]


def all_ranks(sizes: Sizes, limit: Limit, world_size: int, *, in_order: bool = False) -> list[list[Ints]]:
    return [micro_batches(sizes, limit, rank, world_size, in_order=in_order) for rank in range(world_size)]


# --- sizes ---


def test_sizes_of_a_pair() -> None:
    """A prompt of 3 tokens, 2 chosen ones and 4 rejected."""
    lengths = np.array([[5], [7], [3], [3]])
    packed, padded, split = (Costs(layout, 100, 10, 1).of(lengths) for layout in LAYOUTS)
    # 3 of the prompt, and but for the last ones 1 and 3; they look at 4 * 4 / 2 and (6 * 6 - 3 * 3) / 2 others.
    assert (packed.tokens.tolist(), packed.scored_N.tolist(), packed.attended_N.tolist()) == ([7], [6], [21])
    # Two rows of 7, that look at all of themselves.
    assert (padded.tokens.tolist(), padded.scored_N.tolist(), padded.attended_N.tolist()) == ([14], [6], [98])
    # Two prompts of 3 with completions of 4, which look at the prompt too: 2 * (9 + 12 + 16), some with a factor of 2.
    assert (split.tokens_NK.tolist(), split.scored_N.tolist()) == ([[6, 8]], [6])
    assert (packed.work.tolist(), padded.work.tolist()) == ([781], [1558])


def test_tokens_are_those_of_the_tensors() -> None:
    pairs = random_pairs(40, seed=3)
    lengths = np.array([[len(p.chosen), len(p.rejected), p.chosen_start, p.rejected_start] for p in pairs]).T
    parts = np.arange(40) % 7
    tensors = {
        "packed": lambda some: pack(some),
        "padded": lambda some: collate(some, pad_id=0),
        "split": lambda some: collate(some, pad_id=0, decoder_start_id=1),
    }
    for layout in LAYOUTS:
        tokens, scored, _ = Costs(layout).of(lengths).of_parts(parts, 8)
        batches = [
            tensors[layout]([pairs[place] for place in np.flatnonzero(parts == part)]) for part in range(7)
        ]
        assert scored.tolist() == [len(batch.targets_S) for batch in batches] + [0]
        if layout == "packed":  # completions may begin alike, which lengths do not tell
            found = [batch.num_tokens for batch in batches]
            assert all(few <= many for few, many in zip(found, tokens, strict=False))
            assert sum(found) > 0.98 * tokens.sum()
        else:
            assert tokens.tolist() == [batch.num_tokens for batch in batches] + [0]


# --- differencing ---


def test_differencing_by_hand() -> None:
    """12 + 5 with 11 + 6 leaves nothing: 10 | 9 makes 1, and the sums are 27 and 26; in a snake 12 10 6 | 11 9 5."""
    assert sums_of([12, 11, 10, 9, 6, 5], 2) == [26, 27]


def test_differencing_where_greed_fails() -> None:
    """8 7 | 6 5 | 4: the largest to the smaller sum gives 8 5 4 and 7 6, 17 to 13."""
    assert sums_of([8, 7, 6, 5, 4], 2) == [14, 16]


def sums_of(work: list[int], parts: int) -> list[int]:
    part = balanced(np.array(work), parts)
    return sorted(np.bincount(part, weights=work).astype(int).tolist())


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_parts_have_as_many_items_and_similar_sums(work: list[int], parts: int) -> None:
    part = balanced(np.array(work), parts)
    counts = np.bincount(part, minlength=parts)
    assert counts.max() <= math.ceil(len(work) / parts)
    sums = np.bincount(part, weights=work, minlength=parts)
    # No two parts are further apart than the items of one group are.
    assert sums.max() - sums.min() <= max(work)


# --- micro-batches ---


def test_packed_pairs_are_mixed_so_that_all_micro_batches_are_alike() -> None:
    """By length it would be 8 6 | 7 5 and 4 1 | 3 2: a peak of 14 tokens instead of 9."""
    sizes = of_tokens(1, 2, 3, 4, 5, 6, 7, 8)
    micros = tokens_of(sizes, all_ranks(sizes, Limit(2), 2))
    assert sorted(sorted(micro) for mine in micros for micro in mine) == [[1, 8], [2, 7], [3, 6], [4, 5]]


def test_padded_pairs_are_with_others_as_long() -> None:
    """Two rows each: 8 8 and 2 2 against 7 7 and 6 6 is 20 against 26; 8 and 2, 7 and 6 are as near as it gets."""
    sizes = of_tokens(8, 2, 7, 6, 6, 2, 8, 7, layout="padded")
    assert tokens_of(sizes, all_ranks(sizes, Limit(2), 2)) == [[[7, 7], [6, 6]], [[8, 8], [2, 2]]]


def test_the_largest_comes_first() -> None:
    sizes = of_tokens(1, 9, 3, 5)
    assert tokens_of(sizes, all_ranks(sizes, Limit(1), 1)) == [[[9], [5], [3], [1]]]


def test_without_shuffling_micro_batches_keep_the_order() -> None:
    for layout in LAYOUTS:
        sizes = of_tokens(*range(10, 20), layout=layout)
        by_rank = [
            [micro.tolist() for micro in mine] for mine in all_ranks(sizes, Limit(2), 2, in_order=True)
        ]
        assert by_rank == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], []]]


@given(
    st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=40),
    st.integers(1, 6),
    st.integers(1, 5) | st.integers(10, 300),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
def test_ranks_share_every_step(
    lengths: list[tuple[int, int, int]], world_size: int, limit: int, layout: Layout, in_order: bool
) -> None:
    """Each pair once, as many micro-batches on each rank, and none above the limit."""
    prompt, chosen, rejected = np.array(lengths).T
    sizes = Costs(layout, 3, 2, 1).of(np.stack([prompt + chosen, prompt + rejected, prompt, prompt]))
    within = Limit(limit) if limit < 10 else Limit(1, tokens=limit)
    ranks = all_ranks(sizes, within, world_size, in_order=in_order)
    assert sorted(np.concatenate([micro for mine in ranks for micro in mine])) == list(range(len(lengths)))
    assert len({len(mine) for mine in ranks}) == 1
    part = np.zeros(len(lengths), int)
    for mine in ranks:
        for number, micro in enumerate(mine):
            part[micro] = number
        for micro in mine:
            tokens = int(sizes.growing(micro)[-1]) if len(micro) else 0
            assert len(micro) <= limit if limit < 10 else len(micro) == 1 or tokens <= limit
            if in_order:
                assert (np.diff(micro) == 1).all()
        if not in_order:
            tokens_of_mine = [int(sizes.growing(micro)[-1]) if len(micro) else 0 for micro in mine]
            assert tokens_of_mine == sorted(tokens_of_mine, reverse=True)


# --- so many tokens ---


def test_a_budget_is_filled_evenly() -> None:
    """20 tokens in two of ten; on four ranks each pair is by itself."""
    sizes = of_tokens(6, 5, 5, 4)
    assert tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=10), 1)) == [[[6, 4], [5, 5]]]
    assert sorted(tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=10), 2))) == [[[5, 5]], [[6, 4]]]
    assert sorted(tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=10), 4))) == [[[4]], [[5]], [[5]], [[6]]]


def test_a_longer_pair_is_by_itself() -> None:
    for layout in LAYOUTS:
        sizes = of_tokens(12, 3, 3, 3, layout=layout)
        (micros,) = tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=9), 1))
        assert micros == [[12], [3, 3, 3]]


def test_padding_counts() -> None:
    """Three rows as long as the longest are 15 and not 9."""
    sizes = of_tokens(5, 3, 1, 1, layout="padded")
    (micros,) = tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=10), 1))
    assert micros == [[5, 3], [1, 1]]


def test_an_encoder_and_a_decoder_are_padded_by_themselves() -> None:
    """Rows of 6 + 2 and 2 + 6 tokens are 6 + 6 together: 24."""
    tokens = np.array([[6, 2], [2, 6]])
    sizes = Sizes(Costs("split"), tokens, np.zeros(2, int), np.zeros(2, int))
    assert sizes.growing(np.array([0, 1])).tolist() == [8, 24]
    assert [cut(sizes, Limit(1, tokens=limit), 1)[1] for limit in (23, 24)] == [2, 1]


def test_a_budget_is_shared_by_ranks_without_filler_where_there_are_pairs() -> None:
    """Two micro-batches would do; four ranks halve them."""
    sizes = of_tokens(5, 5, 4, 4, layout="padded")
    micros = tokens_of(sizes, all_ranks(sizes, Limit(1, tokens=10), 4))
    assert sorted(micros) == [[[4]], [[4]], [[5]], [[5]]]
    few = tokens_of(of_tokens(5, 4), all_ranks(of_tokens(5, 4), Limit(1, tokens=10), 3))
    assert sorted(few) == [[[]], [[4]], [[5]]]


def test_in_their_order_pairs_come_up_to_the_budget() -> None:
    sizes = of_tokens(4, 4, 4, 9, 1, 1)
    ranks = all_ranks(sizes, Limit(1, tokens=9), 2, in_order=True)
    assert tokens_of(sizes, ranks) == [[[4, 4], [9]], [[4], [1, 1]]]


def test_a_budget_that_does_not_fill_up_takes_more_parts() -> None:
    """Three of 6 tokens are more than 18 / 10, since no two of them fit together."""
    part, parts = filled(np.array([6, 6, 6]), 10, 1)
    assert (sorted(part.tolist()), parts) == ([0, 1, 2], 3)


# --- beside what it was ---


@pytest.mark.parametrize(("pairs", "micro_batch", "ranks"), [(128, 4, 8), (128, 1, 16), (512, 8, 8)])
def test_ranks_carry_more_equal_work_than_by_length_alone(pairs: int, micro_batch: int, ranks: int) -> None:
    """Lengths by a lognormal: half a percent above the mean of ranks, a fifth of what dealing out by length has."""
    before, after = [], []
    for seed in range(10):
        lengths = lengths_of(pairs, seed)
        sizes = Costs("packed", 10_000, 3_000, 1).of(lengths)
        before.append(imbalance(sizes, dealt(lengths, micro_batch, ranks)))
        after.append(imbalance(sizes, all_ranks(sizes, Limit(micro_batch), ranks)))
        assert after[-1].waiting < before[-1].waiting
        assert after[-1].peak <= before[-1].peak
    worst = np.mean([found.ranks for found in after])
    assert worst < 1.005
    assert np.mean([found.ranks for found in before]) - 1 > 5 * (worst - 1)
