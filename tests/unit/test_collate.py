"""Micro-batches worked out by hand: where the head is needed, and which token it predicts there."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_prefopt.data.collate import PairBatch, collate, pack
from ray_prefopt.data.tokenization import TokenizedPair

PAD = 9


def test_two_pairs_of_different_lengths() -> None:
    pairs = [
        TokenizedPair(chosen=[1, 2, 3, 4], rejected=[1, 2, 5], chosen_start=2, rejected_start=2),
        TokenizedPair(chosen=[6, 7], rejected=[6, 8, 0, 8, 9], chosen_start=1, rejected_start=1),
    ]
    batch = collate(pairs, pad_id=PAD)
    # chosen rows, then rejected rows; the pad token may be a token of a completion
    assert batch.input_ids_RT.tolist() == [
        [1, 2, 3, 4, PAD],
        [6, 7, PAD, PAD, PAD],
        [1, 2, 5, PAD, PAD],
        [6, 8, 0, 8, 9],
    ]
    assert batch.attention_mask_RT.tolist() == [
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    # the last token of the prompt predicts the first of the completion, and the last token predicts nothing
    assert batch.predicts_RD.int().tolist() == [
        [0, 1, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
    ]
    assert batch.targets_S.tolist() == [3, 4, 7, 5, 8, 0, 8, 9]
    assert batch.weights_B.tolist() == [1.0, 1.0]
    assert batch.num_tokens == 20


def test_prompts_of_a_pair_may_end_at_different_tokens() -> None:
    batch = collate([TokenizedPair([1, 2, 3], [1, 2, 3], chosen_start=1, rejected_start=2)], pad_id=PAD)
    assert batch.predicts_RD.int().tolist() == [[1, 1, 0], [0, 1, 0]]
    assert batch.targets_S.tolist() == [2, 3, 3]


def test_nothing_predicts_a_very_first_token() -> None:
    batch = collate([TokenizedPair([1, 2], [3, 4], chosen_start=0, rejected_start=1)], pad_id=PAD)
    assert batch.predicts_RD.int().tolist() == [[1, 0], [1, 0]]
    assert batch.targets_S.tolist() == [2, 4]


def test_an_encoder_reads_prompts_and_a_decoder_completions() -> None:
    pairs = [
        TokenizedPair(chosen=[1, 2, 3, 4], rejected=[1, 2, 5], chosen_start=2, rejected_start=2),
        TokenizedPair(chosen=[6, 7], rejected=[6, 8, 0, 9], chosen_start=1, rejected_start=1),
    ]
    batch = collate(pairs, pad_id=PAD, decoder_start_id=5)
    assert batch.input_ids_RT.tolist() == [[1, 2], [6, PAD], [1, 2], [6, PAD]]
    assert batch.attention_mask_RT.tolist() == [[1, 1], [1, 0], [1, 1], [1, 0]]
    # the start predicts the first token of the completion, and the last token predicts nothing
    assert batch.decoder_input_ids_RD is not None
    assert batch.decoder_input_ids_RD.tolist() == [[5, 3, PAD], [5, PAD, PAD], [5, PAD, PAD], [5, 8, 0]]
    assert batch.predicts_RD.int().tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert batch.targets_S.tolist() == [3, 4, 7, 5, 8, 0, 9]
    assert batch.num_tokens == 8 + 12
    assert_equal(batch.to(torch.device("cpu")), batch)


def test_filler_has_no_weight() -> None:
    pair = TokenizedPair([1, 2], [1, 3], 1, 1)
    assert collate([pair, pair], pad_id=PAD, weight=0.0).weights_B.tolist() == [0.0, 0.0]


def test_ids_may_come_as_the_arrays_of_a_block() -> None:
    lists = TokenizedPair([1, 2, 3], [1, 4], 1, 1)
    arrays = TokenizedPair(np.array([1, 2, 3], np.int32), np.array([1, 4], np.int32), 1, 1)
    assert_equal(collate([arrays], pad_id=PAD), collate([lists], pad_id=PAD))


def test_moving_keeps_every_tensor() -> None:
    batch = collate([TokenizedPair([1, 2, 3], [1, 4], 1, 1)], pad_id=PAD)
    moved = batch.to(torch.device("cpu"))
    assert_equal(moved, batch)
    assert batch.to(torch.device("meta")).targets_S.is_meta


def assert_equal(one: PairBatch, other: PairBatch) -> None:
    for name in PairBatch.__slots__:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


ids = st.lists(st.integers(0, 50), min_size=1, max_size=8)


@st.composite
def tokenized(draw: st.DrawFn) -> TokenizedPair:
    prompt = draw(ids)
    chosen, rejected = draw(ids), draw(ids)
    return TokenizedPair(prompt + chosen, prompt + rejected, len(prompt), len(prompt))


@given(st.lists(tokenized(), min_size=1, max_size=4), st.integers(0, 50))
def test_rows_and_completions_come_back(pairs: list[TokenizedPair], pad_id: int) -> None:
    batch = collate(pairs, pad_id=pad_id)
    sides = [(pair.chosen, pair.chosen_start) for pair in pairs]
    sides += [(pair.rejected, pair.rejected_start) for pair in pairs]
    rows = zip(batch.input_ids_RT, batch.attention_mask_RT.bool(), strict=True)
    assert [row[mask].tolist() for row, mask in rows] == [tokens for tokens, _ in sides]
    assert batch.targets_S.tolist() == [token for tokens, start in sides for token in tokens[start:]]
    assert batch.predicts_RD.sum(1).tolist() == [len(tokens) - start for tokens, start in sides]
    assert batch.input_ids_RT.shape[1] == max(len(tokens) for tokens, _ in sides)
    assert set(batch.input_ids_RT[batch.attention_mask_RT == 0].tolist()) <= {pad_id}


@given(st.lists(tokenized(), min_size=1, max_size=4))
def test_pairs_come_back_from_their_row(pairs: list[TokenizedPair]) -> None:
    assert pack(pairs).pairs() == pairs


def test_a_pair_without_a_prompt_comes_back_as_it_is_scored() -> None:
    """Nothing predicts a very first token, of which the row no longer knows that it was an answer's."""
    batch = pack([TokenizedPair([1, 2], [1, 3, 4], 0, 1)])
    assert batch.pairs() == [TokenizedPair([1, 2], [1, 3, 4], 1, 1)]
