"""From tokenized pairs to the tensors of one micro-batch. Only this module and model/forward.py know the layout.

Shape suffixes: B pairs, R = 2B rows (chosen first, rejected after), T tokens, D tokens of the decoder (T, unless it has
rows of its own), S scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ray_prefopt.data.tokenization import TokenizedPair


@dataclass(frozen=True, slots=True)
class PairBatch:
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

    def to(self, device: torch.device) -> Self:
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: tensor if tensor is None else tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        return type(self)(**moved)

    @property
    def num_tokens(self) -> int:
        decoder = self.decoder_input_ids_RD
        return self.input_ids_RT.numel() + (0 if decoder is None else decoder.numel())


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
