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


def inputs_of(batch: Batch, *, pad_id: int, decoder_start_id: int | None) -> dict[str, Tensor]:
    """What the model reads of a batch, chosen rows over rejected ones; decoders alone have no `decoder_start_id`."""
    if decoder_start_id is None:
        return {name: stacked(batch, name) for name in ("input_ids", "attention_mask")}
    labels = stacked(batch, "labels")
    starts = torch.full_like(labels[:, :1], decoder_start_id)
    return {
        **{
            name: torch.as_tensor(batch[f"prompt_{name}"]).repeat(2, 1)
            for name in ("input_ids", "attention_mask")
        },
        "decoder_input_ids": torch.cat(
            [starts, labels[:, :-1].masked_fill(labels[:, :-1] == LABEL_PAD, pad_id)], 1
        ),
    }


PARTIAL_LABELS = (
    "labels: a completion is scored as a whole; got labels that leave out or change some of its tokens: change "
    "input_ids, or where the labels begin"
)


def pairs_of(batch: Batch) -> list[TokenizedPair]:
    """The pairs of a padded batch; for an encoder-decoder it holds prompts and labels alone."""
    if "chosen_input_ids" not in batch:
        prompts = _unpadded(batch, "prompt_input_ids", torch.as_tensor(batch["prompt_attention_mask"]).bool())
        scored = {
            name: torch.as_tensor(batch[name]) != LABEL_PAD for name in ("chosen_labels", "rejected_labels")
        }
        if any((mask.int().diff() > 0).any() for mask in scored.values()):
            raise ConfigError(PARTIAL_LABELS)
        chosen, rejected = (_unpadded(batch, name, mask) for name, mask in scored.items())
        return [
            TokenizedPair(prompt + one, prompt + other, len(prompt), len(prompt))
            for prompt, one, other in zip(prompts, chosen, rejected, strict=True)
        ]

    def unpadded(side: str) -> list[tuple[list[int], int]]:
        columns = (
            torch.as_tensor(batch[f"{side}_{name}"]) for name in ("input_ids", "attention_mask", "labels")
        )
        rows = zip(*columns, strict=True)
        return [_side_of(ids[mask.bool()], labels[mask.bool()]) for ids, mask, labels in rows]

    return [
        TokenizedPair(chosen, rejected, chosen_start, rejected_start)
        for (chosen, chosen_start), (rejected, rejected_start) in zip(
            unpadded("chosen"), unpadded("rejected"), strict=True
        )
    ]


def _side_of(ids: Tensor, labels: Tensor) -> tuple[list[int], int]:
    """Its tokens, and where those begin that are scored: all that follow. Raises ConfigError for other labels."""
    scored = (labels != LABEL_PAD).nonzero()
    start = int(scored[0]) if len(scored) else len(ids)
    if start == len(ids) or not torch.equal(labels[start:], ids[start:]):
        raise ConfigError(PARTIAL_LABELS)
    return ids.tolist(), start


def _unpadded(batch: Batch, name: str, mask: Tensor) -> list[list[int]]:
    rows = zip(torch.as_tensor(batch[name]), mask, strict=True)
    return [row[kept].tolist() for row, kept in rows]


def row_of(pair: TokenizedPair, *, is_encoder_decoder: bool = False) -> dict[str, list[int]]:
    """Ids, attention masks and labels of a pair, and its prompt; for an encoder-decoder prompt and labels alone."""
    prompt = list(pair.chosen[: min(pair.chosen_start, pair.rejected_start)])
    if is_encoder_decoder:
        sides = {
            "chosen_labels": pair.chosen[pair.chosen_start :],
            "rejected_labels": pair.rejected[pair.rejected_start :],
        }
    else:
        sides = {
            **_side("chosen", pair.chosen, pair.chosen_start),
            **_side("rejected", pair.rejected, pair.rejected_start),
        }
    return {**sides, "prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def _side(side: str, ids: list[int], start: int) -> dict[str, list[int]]:
    return {
        f"{side}_input_ids": ids,
        f"{side}_attention_mask": [1] * len(ids),
        f"{side}_labels": [LABEL_PAD] * start + ids[start:],
    }


def repacked(
    collator: Callable[[list[dict[str, Any]]], Batch],
    pairs: Sequence[TokenizedPair],
    *,
    is_encoder_decoder: bool = False,
) -> list[TokenizedPair]:
    """The pairs after a collator written for TRL, which makes a padded batch of rows, has had its way with them.

    Raises ConfigError when it does not return a batch of as many pairs.
    """
    rows = [
        row_of(
            TokenizedPair(list(pair.chosen), list(pair.rejected), pair.chosen_start, pair.rejected_start),
            is_encoder_decoder=is_encoder_decoder,
        )
        for pair in pairs
    ]
    batch = collator([dict(row) for row in rows])
    unread = set() if is_encoder_decoder else {"prompt_input_ids", "prompt_attention_mask"}
    missing = sorted(rows[0].keys() - batch.keys() - unread)
    if missing:
        raise ConfigError(
            f"data_collator: its batch has no {', '.join(missing)}; it has {', '.join(sorted(batch))}"
        )
    found = pairs_of(batch)
    if len(found) != len(pairs):
        raise ConfigError(f"data_collator: got {len(found)} pairs for {len(pairs)}; return one row for each")
    return found
