"""Attention over packed pairs, as one of transformers' attention functions.

Each completion sees the shared tokens of its own pair and its own tokens before it, at the positions they would have
in a row of their own: the values are those of the padded layout (prefix sharing, Wang and Hegde 2024).

Shape suffixes: T tokens of the packed row, Q queries, K keys, H heads, G heads of keys and values, D head size.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ray_prefopt.model.cpu_attention import Segments, attend_on_cpu

NAME = "ray_prefopt_packed"


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
    unread: tuple[int, ...] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a row of pairs, (1, T, H, D), from `query` (1, H, T, D), `key` and `value` (1, G, T, D).

    Nothing is read of what comes for the first `unread` tokens of each pair. Without `segments` it is transformers'
    `sdpa`. Raises NotImplementedError for what it would have to leave out.
    """
    is_ours = attention_mask is not None and attention_mask.numel() == 1  # what packed pairs come with
    if segments is None and is_ours and query.shape[2] > 1:
        raise NotImplementedError("its layers do not hand on what they are given")
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    others["dropout"] = others.get("dropout") or None
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias", "dropout") if others.get(name) is not None
    ]
    if unknown:
        raise NotImplementedError(f"packed attention has no {' and no '.join(unknown)}")
    if attention_mask is not None and not is_ours:
        raise NotImplementedError("packed attention has no mask of the model's own")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("its attention is not causal")
    if sliding_window is None and _slides_by_mask(module):
        raise NotImplementedError("packed attention is not told of its sliding window")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as it is for torch's own attention
        query, key, value = (each.to(torch.get_autocast_dtype(kind)) for each in (query, key, value))
    if _takes_runs(query, value):
        return _in_one_call(query, key, value, segments, scaling, sliding_window), None
    if kind == "cpu" and sliding_window is None and query.shape[-1] == value.shape[-1]:
        return attend_on_cpu(query, key, value, segments, scaling, unread), None
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


def _slides_by_mask(module: nn.Module) -> bool:
    """Whether a layer has a window, which a model that does not hand it on has in its masks."""
    if getattr(module, "is_sliding", None) is False:  # it keeps the window of the layers that slide
        return False
    if getattr(module, "sliding_window", None) is not None:
        return True
    config = getattr(module, "config", None)
    return (
        getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None
    )


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


# --- On a GPU, in half precision ---


class _Runs(NamedTuple):
    """What sees what: of each pair a run of shared and chosen tokens, and one of rejected tokens."""

    ends_of_queries: Tensor
    """0, and where each run ends; int32."""
    ends_of_keys: Tensor
    """The same of keys, which are the shared tokens and those of the run: a rejected one has the shared ones again."""
    tokens_K: Tensor
    """The tokens that the keys are of."""
    first_T: Tensor
    """The first key of each token."""
    again: Tensor
    """The keys whose tokens have come before."""
    most_queries: int
    """Of the longest run."""
    most_keys: int


@lru_cache(maxsize=2)
def _runs(segments: Segments, device: torch.device) -> _Runs:
    """Once for all layers, without waiting for the device."""
    runs = []
    base = 0
    for shared, chosen, rejected in segments:
        first, own = shared + chosen, np.arange(base, base + shared + chosen + rejected)
        runs += [(first, own[:first]), (rejected, np.concatenate([own[:shared], own[first:]]))]
        base += len(own)
    runs = [(queries, keys) for queries, keys in runs if queries]
    lengths = np.array([(queries, len(keys)) for queries, keys in runs])
    ends = np.concatenate([[[0, 0]], lengths.cumsum(0)]).astype(np.int32)
    tokens = np.concatenate([keys for _, keys in runs])
    _, first_keys = np.unique(tokens, return_index=True)
    again = np.setdiff1d(np.arange(len(tokens)), first_keys)
    tensors = [torch.from_numpy(each.copy()) for each in (*ends.T, tokens, first_keys, again)]
    if device.type == "cuda":
        tensors = [each.pin_memory().to(device, non_blocking=True) for each in tensors]
    ends_of_queries, ends_of_keys, tokens_K, first_T, again_keys = tensors
    return _Runs(ends_of_queries, ends_of_keys, tokens_K, first_T, again_keys, *lengths.max(0).tolist())


def _takes_runs(query: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel for runs of any lengths takes this: FlashAttention 2, on GPUs since Ampere."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1]
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _in_one_call(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """(1, T, H, D), by a kernel whose queries belong to the last keys of their run."""
    runs = _runs(segments, query.device)
    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    own_key, own_value = (_SharedAgain.apply(each, runs) for each in (key, value))  # type: ignore[no-untyped-call]
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        query.contiguous(), own_key, own_value, runs.ends_of_queries, runs.ends_of_keys, runs.most_queries,
        runs.most_keys, scale=scale, window_size=(-1 if window is None else window - 1, 0), enable_gqa=True,
    )  # fmt: skip
    return out[None]


class _SharedAgain(torch.autograd.Function):
    """Keys or values in the order of runs, (K, G, D) from (T, G, D). By a gather whose gradient is a gather and a sum
    over distinct places, the same each time; that of indexing is by atomic additions."""

    @staticmethod
    def forward(ctx: Any, of_tokens: Tensor, runs: _Runs) -> Tensor:
        ctx.runs = runs
        return of_tokens.index_select(0, runs.tokens_K)

    @staticmethod
    def backward(ctx: Any, d_keys: Tensor) -> tuple[Tensor, None]:
        runs = ctx.runs
        d_tokens = d_keys.index_select(0, runs.first_T)
        shared = runs.tokens_K.index_select(0, runs.again)
        return d_tokens.index_add_(0, shared, d_keys.index_select(0, runs.again)), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
