"""Loss and gradient of the head and the log-probabilities above it in one pass, a chunk of logits at a time.

The loss of a pair depends on the log-probabilities of its own completions alone, so that a chunk of whole pairs has
all its gradient needs: forward and backward of a chunk take three matrix products and one buffer of logits, and the
logits of two chunks are never held together (Liger Kernel, Hsu et al. 2024, does so for language modelling).

Shape suffixes: B pairs, U positions, S scored tokens, C positions of a chunk, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ray_prefopt.losses.logps import PairLogps

PairLoss = Callable[[PairLogps], Tensor]
"""The loss of a micro-batch, a scalar: a sum over pairs, whose lengths and weights are known before."""
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits held at once: 128 MiB in fp32 on a CPU, 1 GiB on a GPU."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Which positions predict which tokens, pair by pair."""

    source_S: Tensor
    targets_S: Tensor
    lengths: tuple[tuple[int, int], ...]
    """Scored tokens of each pair, chosen and rejected."""
    lengths_2B: Tensor
    """The same in a tensor, so that no step waits for it to come to a GPU."""
    positions: tuple[int, ...]
    """Predicting positions of each pair."""


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: `cap * tanh(scale * (x W^T + b) / cap)`, where there is a cap."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    buffer: list[Tensor] = field(default_factory=list)
    """Memory for the logits of a chunk, kept from one to the next: fresh pages cost a CPU more than the arithmetic."""

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """(C, V) in fp32, in the buffer."""
        weight_VD = self.weight_VD.detach().to(hidden_CD.dtype)
        rows, vocabulary = hidden_CD.shape[0], weight_VD.shape[0]
        if not self.buffer or self.buffer[0].numel() < rows * vocabulary:
            self.buffer[:] = [torch.empty(rows * vocabulary, device=hidden_CD.device)]
        logits_CV = self.buffer[0][: rows * vocabulary].view(rows, vocabulary)
        if hidden_CD.dtype == torch.float32:
            torch.mm(hidden_CD, weight_VD.T, out=logits_CV)
        else:
            logits_CV.copy_(hidden_CD @ weight_VD.T)
        if self.bias_V is not None:
            logits_CV += self.bias_V.detach().float()
        if self.scale != 1.0:
            logits_CV *= self.scale
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_CV

    def mean_logits(self, hidden_CD: Tensor, logits_CV: Tensor) -> Tensor:
        """(C,): by the mean of the weights where that is the same, which is less work."""
        if self.softcap is not None:
            return logits_CV.mean(-1)
        means_C = hidden_CD.float() @ self.weight_VD.detach().mean(0, dtype=torch.float32)
        if self.bias_V is not None:
            means_C += self.bias_V.detach().float().mean()
        return means_C * self.scale


@dataclass(slots=True)
class HeadGradient:
    """Of the head's weights, from when it is known until the backward pass comes to them."""

    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None

    def add(self, d_logits_CV: Tensor, hidden_CD: Tensor) -> None:
        """What a chunk gives them, where they are trained."""
        if self.weight_VD is not None and hidden_CD.dtype == torch.float32:
            self.weight_VD.addmm_(d_logits_CV.T, hidden_CD)
        elif self.weight_VD is not None:
            self.weight_VD += d_logits_CV.T @ hidden_CD
        if self.bias_V is not None:
            self.bias_V += d_logits_CV.sum(0, dtype=torch.float32)


def above_head(hidden: Tensor, head: Head, gradient: HeadGradient) -> Tensor:
    """The same states, whose backward pass gives the head's weights their `gradient` too.

    A model returns these: what DeepSpeed does when a gradient reaches the model's output comes before all weights.
    """
    states: Tensor = _AboveHead.apply(hidden, head.weight_VD, head.bias_V, gradient)  # type: ignore[no-untyped-call]
    return states


def one_pass(
    hidden_UD: Tensor, head: Head, gradient: HeadGradient, scored: Scored, pair_loss: PairLoss
) -> tuple[Tensor, PairLogps]:
    """The loss of a micro-batch, a scalar with its gradient, and the log-probabilities (without) that it is of.

    `hidden_UD` are states of `above_head` with this `gradient`, at the predicting positions in the order of `scored`.
    """
    found = _Found(scored, hidden_UD.device)
    loss: Tensor = _OnePass.apply(hidden_UD, head, gradient, scored, pair_loss, found)  # type: ignore[no-untyped-call]
    return loss, found.logps()


def chunked_logps(hidden_UD: Tensor, head: Head, scored: Scored) -> PairLogps:
    """The log-probabilities alone, without gradient."""
    found = _Found(scored, hidden_UD.device)
    for parts in _groups(scored, _rows_at_once(head, hidden_UD)):
        for part in parts:
            _score(hidden_UD[part.rows].detach(), head, scored, part, found)
    return found.logps()


class _Found:
    """Log-probabilities of all scored tokens of a micro-batch, and their mean logits, as chunks bring them."""

    def __init__(self, scored: Scored, device: torch.device) -> None:
        self.logps_S = torch.zeros(len(scored.targets_S), device=device)
        self.means_S = torch.zeros(len(scored.targets_S), device=device)
        self._lengths_2B = scored.lengths_2B

    def sums(self) -> Tensor:
        return torch.segment_reduce(self.logps_S, "sum", lengths=self._lengths_2B, unsafe=True)

    def logps(self, sums_2B: Tensor | None = None) -> PairLogps:
        """Of given sums, or of those that have been found."""
        sums_2B = self.sums() if sums_2B is None else sums_2B
        return PairLogps.of_sums(sums_2B, self.means_S, self._lengths_2B)


@dataclass(frozen=True, slots=True)
class _Part:
    """Some positions, and the tokens they predict."""

    rows: slice
    tokens: Tensor | slice
    """Indices into the scored tokens."""

    def source(self, scored: Scored) -> Tensor:
        """Which of these positions predicts each of the tokens."""
        first: int = self.rows.start
        return scored.source_S[self.tokens] - first


def _rows_at_once(head: Head, hidden_UD: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS[hidden_UD.device.type] // head.weight_VD.shape[0])


def _groups(scored: Scored, rows_at_once: int) -> Iterator[list[_Part]]:
    """Whole pairs as long as their positions fit; a pair that does not fit by itself comes in several parts."""
    pair = row = token = 0
    while pair < len(scored.positions):
        end, rows = pair + 1, scored.positions[pair]
        while end < len(scored.positions) and rows + scored.positions[end] <= rows_at_once:
            rows += scored.positions[end]
            end += 1
        tokens = slice(token, token + sum(map(sum, scored.lengths[pair:end])))
        if rows <= rows_at_once:
            yield [_Part(slice(row, row + rows), tokens)]
        else:
            source = scored.source_S[tokens]
            starts = range(row, row + rows, rows_at_once)
            bounds = [slice(start, min(start + rows_at_once, row + rows)) for start in starts]
            yield [
                _Part(each, token + ((source >= each.start) & (source < each.stop)).nonzero()[:, 0])
                for each in bounds
            ]
        pair, row, token = end, row + rows, tokens.stop


def _score(
    hidden_CD: Tensor, head: Head, scored: Scored, part: _Part, found: _Found
) -> tuple[Tensor, Tensor | None]:
    """Note the log-probabilities and mean logits of a part; returns its probabilities, in the buffer, and the slope of
    the cap if there is one."""
    logits_CV = head.logits(hidden_CD)
    source, targets = part.source(scored), scored.targets_S[part.tokens]
    picked = logits_CV[source, targets]
    largest_C, at_C = logits_CV.max(-1)
    slope_CV = None if head.softcap is None else 1 - (logits_CV / head.softcap) ** 2
    found.means_S[part.tokens] = head.mean_logits(hidden_CD, logits_CV)[source]
    # The log-sum-exp from the softmax, so that nothing else as large as the logits is ever needed.
    probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    lse_C = largest_C - probs_CV.gather(1, at_C[:, None])[:, 0].log()
    found.logps_S[part.tokens] = picked - lse_C[source]
    return probs_CV, slope_CV


class _AboveHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,  # noqa: ARG004  # autograd brings the gradient to it
        gradient: HeadGradient,
    ) -> Tensor:
        ctx.gradient, ctx.dtype = gradient, weight_VD.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        of_weight, of_bias = ctx.gradient.weight_VD, ctx.gradient.bias_V
        ctx.gradient.weight_VD = ctx.gradient.bias_V = None
        return (
            d_hidden,
            None if of_weight is None else of_weight.to(ctx.dtype),
            None if of_bias is None else of_bias.to(ctx.dtype),
            None,
        )


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        head: Head,
        gradient: HeadGradient,
        scored: Scored,
        pair_loss: PairLoss,
        found: _Found,
    ) -> Tensor:
        hidden_UD = hidden_UD.detach()
        d_hidden_UD = torch.zeros_like(hidden_UD)
        gradient.weight_VD, gradient.bias_V = _zeros(head.weight_VD), _zeros(head.bias_V)
        for parts in _groups(scored, _rows_at_once(head, hidden_UD)):
            for part in parts:
                scores = _score(hidden_UD[part.rows], head, scored, part, found)
            slopes_S = _slopes(found, scored, pair_loss)
            for part in parts:
                hidden_CD = hidden_UD[part.rows]
                if len(parts) > 1:  # the buffer holds the last one's
                    scores = _score(hidden_CD, head, scored, part, found)
                d_logits_CV = _logits_gradient(scores, head, scored, part, slopes_S).to(hidden_CD.dtype)
                weight_VD = head.weight_VD.detach().to(hidden_CD.dtype)
                torch.mm(d_logits_CV, weight_VD, out=d_hidden_UD[part.rows])
                gradient.add(d_logits_CV, hidden_CD)
        ctx.gradient, ctx.d_hidden_UD = gradient, d_hidden_UD
        return pair_loss(found.logps()).detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        for each in (ctx.gradient.weight_VD, ctx.gradient.bias_V):
            if each is not None:
                each.mul_(upstream)
        return ctx.d_hidden_UD.mul_(upstream), None, None, None, None, None


def _zeros(weight: Tensor | None) -> Tensor | None:
    return (
        torch.zeros_like(weight, dtype=torch.float32) if weight is not None and weight.requires_grad else None
    )


def _logits_gradient(
    scores: tuple[Tensor, Tensor | None], head: Head, scored: Scored, part: _Part, slopes_S: Tensor
) -> Tensor:
    """Of the loss by what comes out of the matrix product, (C, V): slope * (one-hot - softmax), over the latter."""
    probs_CV, cap_slope_CV = scores
    source, slopes = part.source(scored), slopes_S[part.tokens]
    slope_C = torch.zeros(len(probs_CV), device=probs_CV.device).index_add_(0, source, slopes)
    d_logits_CV = probs_CV.mul_(-slope_C[:, None])
    d_logits_CV.index_put_((source, scored.targets_S[part.tokens]), slopes, accumulate=True)
    if cap_slope_CV is not None:
        d_logits_CV *= cap_slope_CV
    return d_logits_CV.mul_(head.scale) if head.scale != 1.0 else d_logits_CV


def _slopes(found: _Found, scored: Scored, pair_loss: PairLoss) -> Tensor:
    """The derivative of the loss by each scored log-probability, (S,); right for the pairs that have been found."""
    with torch.enable_grad():
        sums_2B = found.sums().requires_grad_()
        (slopes_2B,) = torch.autograd.grad(pair_loss(found.logps(sums_2B)), sums_2B)
    return slopes_2B.repeat_interleave(scored.lengths_2B, output_size=len(scored.targets_S))
