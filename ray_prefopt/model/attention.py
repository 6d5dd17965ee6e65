"""Attention over packed pairs, as one of transformers' attention functions.

Each completion sees the shared tokens of its own pair and its own tokens before it, at the positions they would have
in a row of their own: the values are those of the padded layout (prefix sharing, Wang and Hegde 2024).

Shape suffixes: T tokens of the packed row, Q queries, K keys, H heads, G heads of keys and values, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "ray_prefopt_packed"
Segments = tuple[tuple[int, int, int], ...]
"""Of each pair the tokens that are shared, chosen, and rejected."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a row of pairs, (1, T, H, D), from `query` (1, H, T, D), `key` and `value` (1, G, T, D).

    Without `segments` it is transformers' `sdpa`. Raises NotImplementedError for what it would have to leave out.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    others["dropout"] = others.get("dropout") or None
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias", "dropout") if others.get(name) is not None
    ]
    if unknown:
        raise NotImplementedError(f"packed attention has no {' and no '.join(unknown)}")
    lengths = [sum(segment) for segment in segments]
    outs = []
    for (shared, chosen, rejected), q, k, v in zip(
        segments, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    ):
        first = shared + chosen
        outs.append(_attend(q[:, :, :first], k[:, :, :first], v[:, :, :first], scaling, sliding_window))
        if rejected:
            own_k, own_v = (torch.cat([kv[:, :, :shared], kv[:, :, first:]], 2) for kv in (k, v))
            outs.append(_attend(q[:, :, first:], own_k, own_v, scaling, sliding_window))
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention, (1, H, Q, D), whose queries belong to the last keys."""
    queries, keys = query.shape[2], key.shape[2]
    visible_QK = None
    if queries < keys or (window is not None and window < keys):
        visible_QK = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if window is not None:
            visible_QK = visible_QK.triu(keys - queries - window + 1)
        if query.is_cuda:  # its fast kernels take a mask or grouped heads, not both
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible_QK, is_causal=visible_QK is None, scale=scaling, enable_gqa=True
    )


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
