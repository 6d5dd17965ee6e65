"""TRL's rows and padded batches (`chosen_input_ids`, `chosen_attention_mask`, `chosen_labels`, ...), and pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ConfigError

LABEL_PAD = -100
"""Label of a token that is not scored."""

Batch = Mapping[str, Any]


def stacked(batch: Batch, name: str) -> Tensor:
    """Chosen rows over rejected ones, (2B, T), padded on the right to the longer of the two."""
    fill = LABEL_PAD if name == "labels" else 0
    chosen, rejected = (torch.as_tensor(batch[f"{side}_{name}"]) for side in ("chosen", "rejected"))
    width = max(chosen.shape[1], rejected.shape[1])
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=fill) for part in (chosen, rejected)])


def pairs_of(batch: Batch) -> list[TokenizedPair]:
    """The pairs of a padded batch."""

    def unpadded(side: str) -> list[tuple[list[int], int]]:
        columns = (
            torch.as_tensor(batch[f"{side}_{name}"]) for name in ("input_ids", "attention_mask", "labels")
        )
        rows = zip(*columns, strict=True)
        return [
            (ids[mask.bool()].tolist(), int((labels[mask.bool()] != LABEL_PAD).nonzero()[0]))
            for ids, mask, labels in rows
        ]

    return [
        TokenizedPair(chosen, rejected, chosen_start, rejected_start)
        for (chosen, chosen_start), (rejected, rejected_start) in zip(
            unpadded("chosen"), unpadded("rejected"), strict=True
        )
    ]


def row_of(pair: TokenizedPair) -> dict[str, list[int]]:
    """Ids, attention masks and labels of a pair, and its prompt."""
    prompt = list(pair.chosen[: min(pair.chosen_start, pair.rejected_start)])
    return {
        **_side("chosen", pair.chosen, pair.chosen_start),
        **_side("rejected", pair.rejected, pair.rejected_start),
        "prompt_input_ids": prompt,
        "prompt_attention_mask": [1] * len(prompt),
    }


def _side(side: str, ids: list[int], start: int) -> dict[str, list[int]]:
    return {
        f"{side}_input_ids": ids,
        f"{side}_attention_mask": [1] * len(ids),
        f"{side}_labels": [LABEL_PAD] * start + ids[start:],
    }


def repacked(
    collator: Callable[[list[dict[str, Any]]], Batch], pairs: Sequence[TokenizedPair]
) -> list[TokenizedPair]:
    """The pairs after a collator written for TRL, which makes a padded batch of rows, has had its way with them.

    Raises ConfigError when it does not return a batch of as many pairs.
    """
    rows = [
        row_of(TokenizedPair(list(pair.chosen), list(pair.rejected), pair.chosen_start, pair.rejected_start))
        for pair in pairs
    ]
    batch = collator([dict(row) for row in rows])
    missing = sorted(rows[0].keys() - batch.keys() - {"prompt_input_ids", "prompt_attention_mask"})
    if missing:
        raise ConfigError(
            f"data_collator: its batch has no {', '.join(missing)}; it has {', '.join(sorted(batch))}"
        )
    found = pairs_of(batch)
    if len(found) != len(pairs):
        raise ConfigError(f"data_collator: got {len(found)} pairs for {len(pairs)}; return one row for each")
    return found
