"""From tokenized pairs to the tensors of one micro-batch. Only this module and model/forward.py know the layout.

Shape suffixes: B pairs, R = 2B rows (chosen first, rejected after), T tokens, D tokens of the decoder (T, unless it has
rows of its own), S scored tokens, U positions that predict them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ray_prefopt.data.tokenization import TokenizedPair


class _Tensors:
    """What a dataclass of tensors, and of things that stay where they are, can do."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """In memory that a GPU copies from while it computes."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()
        }
        return type(self)(**changed)


@dataclass(frozen=True, slots=True)
class PairBatch(_Tensors):
    """A micro-batch of pairs, padded on the right."""

    input_ids_RT: Tensor
    """Prompts with their completions; prompts alone for an encoder-decoder."""
    attention_mask_RT: Tensor
    predicts_RD: Tensor
    """True where the next token is a completion token, which is where the head is needed."""
    targets_S: Tensor
    """Those next tokens, row by row."""
    weights_B: Tensor
    """1 for a pair, 0 for filler that only keeps ranks in step."""
    decoder_input_ids_RD: Tensor | None = None
    """Completions behind the token that a decoder starts with, less their last one; for an encoder-decoder."""

    def chosen_rows(self) -> list[Tensor]:
        """The inputs of each pair's chosen side, (T,) each."""
        rows = zip(self.input_ids_RT.chunk(2)[0], self.attention_mask_RT.chunk(2)[0].bool(), strict=True)
        return [ids_T[is_token_T] for ids_T, is_token_T in rows]

    @property
    def num_tokens(self) -> int:
        decoder = self.decoder_input_ids_RD
        return self.input_ids_RT.numel() + (0 if decoder is None else decoder.numel())


@dataclass(frozen=True, slots=True)
class PackedBatch(_Tensors):
    """A micro-batch of pairs in one row, nothing of it twice and nothing padded.

    Of each pair come the tokens that both completions begin with (the prompt, mostly), then the rest of the chosen one,
    then the rest of the rejected one. The last token of each predicts nothing and is left out.
    """

    input_ids_T: Tensor
    position_ids_T: Tensor
    predicts_U: Tensor
    """Positions in the row after which a completion token comes, ascending."""
    source_S: Tensor
    """Which of them predicts each scored token; a shared one predicts two. Chosen tokens first in each pair."""
    targets_S: Tensor
    weights_B: Tensor
    """1 for a pair, 0 for filler that only keeps ranks in step."""
    segments: tuple[tuple[int, int, int], ...]
    """Tokens of each pair that are shared, chosen, and rejected."""
    scored: tuple[tuple[int, int], ...]
    """Scored tokens of each pair, chosen and rejected."""
    scored_2B: Tensor
    """The same in a tensor, pair by pair."""
    predicting: tuple[int, ...]
    """Predicting positions of each pair."""
    unread: tuple[int, ...]
    """Shared tokens of each pair before the first that predicts."""

    def chosen_rows(self) -> list[Tensor]:
        """The inputs of each pair's chosen side, (T,) each."""
        parts = self.input_ids_T.split([sum(each) for each in self.segments])
        last = self.targets_S.split([sum(each) for each in self.scored])
        return [
            torch.cat([ids_T[: shared + chosen], targets_S[count - 1 : count]])
            for ids_T, targets_S, (shared, chosen, _), (count, _) in zip(
                parts, last, self.segments, self.scored, strict=True
            )
        ]

    def pairs(self) -> list[TokenizedPair]:
        """What `pack` was given, but for completions that begin with the very first token."""
        parts = self.input_ids_T.split([sum(each) for each in self.segments])
        targets = self.targets_S.split([sum(each) for each in self.scored])
        return [
            TokenizedPair(
                [*ids[: shared + chosen], ends[of_chosen - 1]],
                [*ids[:shared], *ids[shared + chosen :], ends[-1]],
                shared + chosen + 1 - of_chosen,
                shared + rejected + 1 - of_rejected,
            )
            for ids, ends, (shared, chosen, rejected), (of_chosen, of_rejected) in zip(
                (part.tolist() for part in parts),
                (part.tolist() for part in targets),
                self.segments,
                self.scored,
                strict=True,
            )
        ]

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.numel()


def pack(pairs: Sequence[TokenizedPair], *, weight: float = 1.0) -> PackedBatch:
    """Lay pairs one behind the other, each with what its completions share once.

    >>> pair = TokenizedPair(chosen=[1, 2, 3, 9], rejected=[1, 2, 4, 5, 9], chosen_start=2, rejected_start=2)
    >>> batch = pack([pair])
    >>> batch.input_ids_T.tolist(), batch.position_ids_T.tolist()
    ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3])
    >>> batch.segments, batch.scored, batch.unread
    (((2, 1, 2),), ((2, 3),), (1,))
    >>> batch.predicts_U.tolist(), batch.source_S.tolist(), batch.targets_S.tolist()
    ([1, 2, 3, 4], [0, 1, 0, 2, 3], [3, 9, 4, 5, 9])
    """
    ids, positions, predicts, targets = [], [], [], []
    segments, scored, predicting, unread = [], [], [], []
    base = 0
    for pair in pairs:
        chosen, rejected = np.asarray(pair.chosen), np.asarray(pair.rejected)
        body, other = chosen[:-1], rejected[:-1]
        shared = _common(body, other)
        ids += [body, other[shared:]]
        positions += [np.arange(len(body)), np.arange(shared, len(other))]
        starts = max(pair.chosen_start, 1), max(pair.rejected_start, 1)  # nothing predicts a very first token
        of_chosen = base + np.arange(starts[0] - 1, len(body))
        at = np.arange(starts[1] - 1, len(other))
        of_rejected = base + np.where(at < shared, at, at + len(body) - shared)
        predicts += [of_chosen, of_rejected]
        targets += [chosen[starts[0] :], rejected[starts[1] :]]
        segments.append((shared, len(body) - shared, len(other) - shared))
        scored.append((len(of_chosen), len(of_rejected)))
        predicting.append(len(np.union1d(of_chosen, of_rejected)))
        unread.append(min(*starts, shared + 1) - 1)
        base += len(body) + len(other) - shared
    predicts_U, source_S = np.unique(np.concatenate(predicts), return_inverse=True)
    return PackedBatch(
        input_ids_T=_long(np.concatenate(ids)),
        position_ids_T=_long(np.concatenate(positions)),
        predicts_U=_long(predicts_U),
        source_S=_long(source_S),
        targets_S=_long(np.concatenate(targets)),
        weights_B=torch.full((len(pairs),), weight),
        segments=tuple(segments),
        scored=tuple(scored),
        scored_2B=torch.tensor(scored).flatten(),
        predicting=tuple(predicting),
        unread=tuple(unread),
    )


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements two arrays begin with alike."""
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def _long(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64, copy=False))


def collate(
    pairs: Sequence[TokenizedPair], *, pad_id: int, decoder_start_id: int | None = None, weight: float = 1.0
) -> PairBatch:
    """Pad pairs into one batch: chosen rows first, rejected rows after; for an encoder-decoder with `decoder_start_id`.

    >>> pair = TokenizedPair(chosen=[1, 2, 3], rejected=[1, 4], chosen_start=1, rejected_start=1)
    >>> batch = collate([pair], pad_id=0)
    >>> batch.input_ids_RT.tolist()
    [[1, 2, 3], [1, 4, 0]]
    >>> batch.predicts_RD.tolist()
    [[True, True, False], [True, False, False]]
    >>> batch.targets_S.tolist()
    [2, 3, 4]
    >>> batch = collate([pair], pad_id=0, decoder_start_id=9)
    >>> batch.input_ids_RT.tolist(), batch.decoder_input_ids_RD.tolist()
    ([[1], [1]], [[9, 2], [9, 0]])
    >>> batch.targets_S.tolist()
    [2, 3, 4]
    """
    rows = [(pair.chosen, pair.chosen_start) for pair in pairs]
    rows += [(pair.rejected, pair.rejected_start) for pair in pairs]
    rows = [(ids, max(start, 1)) for ids, start in rows]  # nothing predicts a very first token
    targets_S = torch.tensor(np.concatenate([ids[start:] for ids, start in rows]), dtype=torch.long)
    weights_B = torch.full((len(pairs),), weight)
    if decoder_start_id is None:
        input_ids_RT, is_token_RT = _padded([ids for ids, _ in rows], pad_id)
        predicts_RT = torch.zeros_like(is_token_RT)
        for predicts_T, (ids, start) in zip(predicts_RT, rows, strict=True):
            predicts_T[start - 1 : len(ids) - 1] = True
        return PairBatch(input_ids_RT, is_token_RT.long(), predicts_RT, targets_S, weights_B)
    input_ids_RT, is_token_RT = _padded([ids[:start] for ids, start in rows], pad_id)
    decoder_RD, predicts_RD = _padded([[decoder_start_id, *ids[start:-1]] for ids, start in rows], pad_id)
    return PairBatch(input_ids_RT, is_token_RT.long(), predicts_RD, targets_S, weights_B, decoder_RD)


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows padded on the right to the longest, and where they have tokens; both (R, T)."""
    width = max(map(len, rows))
    ids_RT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    is_token_RT = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, ids in enumerate(rows):
        ids_RT[row, : len(ids)] = torch.tensor(ids)
        is_token_RT[row, : len(ids)] = True
    return ids_RT, is_token_RT
