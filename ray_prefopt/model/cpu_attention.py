"""Attention over packed pairs on a CPU: by tiles of queries, without a mask of whole rows.

Shape suffixes: T tokens, Q queries, K keys, H heads, G heads of keys and values, R queries of all heads that share one
of keys, D head size.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_prefopt.model import onednn
from ray_prefopt.model.onednn import linear

Segments = tuple[tuple[int, int, int], ...]
"""Of each pair the tokens that are shared, chosen, and rejected."""
TILE = 256
"""Queries at once: torch's kernel skips keys behind a query in steps of 512 alone."""
ROWS = 512
"""R of a whole pair, for each thread, from which on products are faster than torch's kernel."""
LATER_QK = torch.full((TILE, TILE), -torch.inf).triu_(1)
LATER_KQ = LATER_QK.T.contiguous()
"""What is added to scores: a query sees none of the keys after it."""
LN_2 = math.log(2)
"""Scores of products are to base 2: torch's exp2 takes a quarter of the time of its exp, which is MKL's."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    unread: tuple[int, ...] | None,
) -> Tensor:
    """As `packed_attention`."""
    out: Tensor = _Attention.apply(query, key, value, segments, scale, unread)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """By torch's kernel, or by products; either needs the output and log-sum-exp for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scale: float | None,
        unread: tuple[int, ...] | None,
    ) -> Tensor:
        ctx.new = torch.empty_like if unread is None else torch.zeros_like
        by_tokens = ctx.new(query.transpose(1, 2), memory_format=torch.contiguous_format)
        out: Tensor = by_tokens.transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        ctx.layout = segments, query.shape[-1] ** -0.5 if scale is None else scale, unread
        ctx.takes_products = _takes_products(query, key, segments)
        attend = _attend_by_products if ctx.takes_products else _attend_by_kernel
        attend(query, key, value, out, lse, *ctx.layout)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        states = ctx.saved_tensors
        gradients = tuple(ctx.new(each) for each in states[:3])
        differentiate = _differentiate_products if ctx.takes_products else _differentiate_kernel
        differentiate(d_out, *states, *gradients, *ctx.layout)
        return *gradients, None, None, None


def _takes_products(query: Tensor, key: Tensor, segments: Segments) -> bool:
    """Where they are fast: oneDNN's of many rows. With a head of keys for each of queries they are too small."""
    sharing = query.shape[1] // key.shape[1]
    rows = sharing * query.shape[2] // len(segments)
    is_fast = onednn.IS_FASTER and query.dtype == torch.float32
    return is_fast and sharing > 1 and rows >= ROWS * torch.get_num_threads()


# --- By torch's kernel, without copies of keys ---


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    segments: Segments, scale: float, unread: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """Fill the output and the log-sum-exp. What a tile gets of several runs of keys is merged by the latter."""
    for own, before in _tiles(segments, unread):
        q, out_tile, lse_tile = query[:, :, own], out[:, :, own], lse[:, :, own]
        found = _flash(q, key[:, :, own], value[:, :, own], is_causal=True, scale=scale)
        out_tile.copy_(found[0])
        lse_tile.copy_(found[1])
        for keys in before:
            of_keys, lse_of_keys = _flash(q, key[:, :, keys], value[:, :, keys], scale=scale)
            out_tile.lerp_(of_keys, torch.sigmoid(lse_of_keys - lse_tile)[..., None].to(out.dtype))
            torch.logaddexp(lse_tile, lse_of_keys, out=lse_tile)


def _differentiate_kernel(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    d_query: Tensor, d_key: Tensor, d_value: Tensor,
    segments: Segments, scale: float, unread: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """Fill the gradients. Over one run of keys they need of the others nothing but the merged output."""
    for own, before in _tiles(segments, unread):
        of_tile = [each[:, :, own] for each in (d_out, query, out, lse)]
        for keys in (own, *before):
            of_keys = key[:, :, keys], value[:, :, keys]
            d_q, d_k, d_v = _flash_backward(
                *of_tile[:2], *of_keys, *of_tile[2:], 0.0, keys is own, scale=scale
            )
            if keys is own:  # which no tile before it has seen
                d_query[:, :, own], d_key[:, :, own], d_value[:, :, own] = d_q, d_k, d_v
            else:
                d_query[:, :, own] += d_q
                d_key[:, :, keys] += d_k
                d_value[:, :, keys] += d_v


def _tiles(segments: Segments, unread: tuple[int, ...] | None) -> Iterator[tuple[slice, list[slice]]]:
    """Some queries, which see the keys at their own places causally, and the runs of keys before them that all see."""
    base = 0
    for (shared, chosen, rejected), skipped in zip(segments, unread or [0] * len(segments), strict=True):
        first, end = base + shared + chosen, base + shared + chosen + rejected
        for start in range(base + skipped, first, TILE):
            yield slice(start, min(start + TILE, first)), [slice(base, start)] if start > base else []
        for start in range(first, end, TILE):
            runs = (slice(base, base + shared), slice(first, start))
            yield slice(start, min(start + TILE, end)), [run for run in runs if run.start < run.stop]
        base = end


# --- By products: each tile by all keys that it sees, a rejected completion's next to a copy of the shared ones ---


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    segments: Segments, scale: float, unread: tuple[int, ...] | None,
) -> None:  # fmt: skip
    groups = key.shape[1]
    for run in _runs(segments, unread):
        k_GKD, v_GKD = run.keys(key), run.keys(value)
        for tile, keys in run.tiles():
            q_GRD = _rows(query, tile, groups, scale / LN_2)
            found = _grouped(out, tile, groups), _grouped(lse, tile, groups)
            for each in zip(q_GRD, k_GKD[:, :keys], v_GKD[:, :keys], *found, strict=True):
                _attend(*each)


def _differentiate_products(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    d_query: Tensor, d_key: Tensor, d_value: Tensor,
    segments: Segments, scale: float, unread: tuple[int, ...] | None,
) -> None:  # fmt: skip
    groups, along = key.shape[1], torch.linalg.vecdot(d_out, out)
    for run in _runs(segments, unread):
        k_GKD, v_GKD = run.keys(key), run.keys(value)
        d_k_GKD, d_v_GKD = torch.zeros_like(k_GKD), torch.zeros_like(v_GKD)
        for tile, keys in run.tiles():
            rows = (
                _rows(query, tile, groups, scale / LN_2),
                _rows(d_out, tile, groups),
                _rows(lse, tile, groups, -1.0),
                _rows(along, tile, groups, -1.0),
            )
            of_keys = (each[:, :keys] for each in (k_GKD, v_GKD, d_k_GKD, d_v_GKD))
            d_q_GHQD = _grouped(d_query, tile, groups)
            for each in zip(*rows, *of_keys, d_q_GHQD, strict=True):
                _differentiate(*each)
        run.add(d_key, d_k_GKD.mul_(LN_2))
        run.add(d_value, d_v_GKD)
    d_query.mul_(scale)


def _attend(q_RD: Tensor, k_KD: Tensor, v_KD: Tensor, out_HQD: Tensor, lse_HQ: Tensor) -> None:
    """Attention of scaled queries, whose own tokens are the last keys, and the log-sum-exp of their scores."""
    queries = lse_HQ.shape[1]
    scores_RK = linear(q_RD, k_KD)
    scores_RK.view(-1, queries, len(k_KD))[:, :, -queries:] += LATER_QK[:queries, :queries]
    largest_R = scores_RK.amax(-1)
    probs_RK = scores_RK.sub_(largest_R[:, None]).exp2_()
    sum_HQ = probs_RK.sum(-1).view_as(lse_HQ)
    torch.div(linear(probs_RK, v_KD.T).view_as(out_HQD), sum_HQ[..., None], out=out_HQD)
    torch.add(largest_R.view_as(lse_HQ), sum_HQ.log2_(), out=lse_HQ)


def _differentiate(
    q_RD: Tensor,
    d_out_RD: Tensor,
    minus_lse_R: Tensor,
    minus_along_R: Tensor,
    k_KD: Tensor,
    v_KD: Tensor,
    d_k_KD: Tensor,
    d_v_KD: Tensor,
    d_q_HQD: Tensor,
) -> None:
    """The gradient of the queries, but for a factor as for that of the keys, and what they add to those of keys and
    values. Scores are of keys by queries, so that what is subtracted from each query's is a bias, and that no product
    has to transpose them."""
    queries = d_q_HQD.shape[1]
    probs_KR = linear(k_KD, q_RD, minus_lse_R)
    probs_KR[-queries:].view(queries, -1, queries).add_(LATER_KQ[:queries, None, :queries])
    probs_KR.exp2_()
    d_scores_KR = linear(v_KD, d_out_RD, minus_along_R).mul_(probs_KR)
    d_q_HQD.copy_(linear(k_KD.T, d_scores_KR.T).T.view_as(d_q_HQD))
    d_k_KD += linear(d_scores_KR, q_RD.T)
    d_v_KD += linear(probs_KR, d_out_RD.T)


class _Run(NamedTuple):
    """Tokens that see shared ones before them, or none, and those of the run that are not after them."""

    shared: slice
    own: slice
    skipped: int
    """Tokens of the run whose queries are left out."""

    def keys(self, of_tokens: Tensor) -> Tensor:
        """(G, K, D) from (1, G, T, D)."""
        return torch.cat([of_tokens[0, :, self.shared], of_tokens[0, :, self.own]], 1)

    def add(self, of_tokens: Tensor, of_keys: Tensor) -> None:
        """The other way round, to those of shared tokens that are there."""
        shared = _length(self.shared)
        of_tokens[0, :, self.shared] += of_keys[:, :shared]
        of_tokens[0, :, self.own] = of_keys[:, shared:]

    def tiles(self) -> Iterator[tuple[slice, int]]:
        """Some queries, and how many keys they see."""
        before = _length(self.shared) - self.own.start
        for start in range(self.own.start + self.skipped, self.own.stop, TILE):
            end = min(start + TILE, self.own.stop)
            yield slice(start, end), before + end


def _runs(segments: Segments, unread: tuple[int, ...] | None) -> Iterator[_Run]:
    base = 0
    for (shared, chosen, rejected), skipped in zip(segments, unread or [0] * len(segments), strict=True):
        first, end = base + shared + chosen, base + shared + chosen + rejected
        yield _Run(slice(base, base), slice(base, first), skipped)
        if rejected:
            yield _Run(slice(base, base + shared), slice(first, end), 0)
        base = end


def _length(tokens: slice) -> int:
    length: int = tokens.stop - tokens.start
    return length


def _grouped(of_queries: Tensor, tile: slice, groups: int) -> Tensor:
    """A view of a tile by groups of heads, (G, H / G, Q) or (G, H / G, Q, D)."""
    return of_queries[0, :, tile].unflatten(0, (groups, -1))


def _rows(of_queries: Tensor, tile: slice, groups: int, scale: float = 1.0) -> Tensor:
    """A scaled copy of a tile, (G, R) or (G, R, D)."""
    grouped = _grouped(of_queries, tile, groups)
    return torch.mul(grouped, scale, out=grouped.new_empty(grouped.shape)).flatten(1, 2)
