"""From tokenized pairs to the tensors of one micro-batch. Only this module and model/forward.py know the layout.

Shape suffixes: B pairs, R = 2B rows (chosen first, rejected after), T tokens, S scored positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ray_prefopt.data.tokenization import TokenizedPair


@dataclass(frozen=True, slots=True)
class PairBatch:
    """A micro-batch of pairs, padded on the right."""

    input_ids_RT: Tensor
    attention_mask_RT: Tensor
    predicts_RT: Tensor
    """True where the next token is a completion token, which is where the head is needed."""
    targets_S: Tensor
    """Those next tokens, row by row."""
    weights_B: Tensor
    """1 for a pair, 0 for filler that only keeps ranks in step."""

    def to(self, device: torch.device) -> Self:
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)
        }
        return type(self)(**moved)

    @property
    def num_tokens(self) -> int:
        return self.input_ids_RT.numel()


def collate(pairs: Sequence[TokenizedPair], *, pad_id: int, weight: float = 1.0) -> PairBatch:
    """Pad pairs into one batch: chosen rows first, rejected rows after.

    >>> pair = TokenizedPair(chosen=[1, 2, 3], rejected=[1, 4], chosen_start=1, rejected_start=1)
    >>> batch = collate([pair], pad_id=0)
    >>> batch.input_ids_RT.tolist()
    [[1, 2, 3], [1, 4, 0]]
    >>> batch.predicts_RT.tolist()
    [[True, True, False], [True, False, False]]
    >>> batch.targets_S.tolist()
    [2, 3, 4]
    """
    rows = [(pair.chosen, pair.chosen_start) for pair in pairs]
    rows += [(pair.rejected, pair.rejected_start) for pair in pairs]
    width = max(len(ids) for ids, _ in rows)
    input_ids_RT = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask_RT = torch.zeros((len(rows), width), dtype=torch.long)
    predicts_RT = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, (ids, start) in enumerate(rows):
        input_ids_RT[row, : len(ids)] = torch.tensor(ids)
        attention_mask_RT[row, : len(ids)] = 1
        predicts_RT[row, max(start, 1) - 1 : len(ids) - 1] = True  # nothing predicts a very first token
    targets_S = input_ids_RT[:, 1:][predicts_RT[:, :-1]]
    return PairBatch(
        input_ids_RT, attention_mask_RT, predicts_RT, targets_S, torch.full((len(pairs),), weight)
    )
