"""Loss and gradient of the head and the log-probabilities above it in one pass, a chunk of logits at a time.

The loss of a pair depends on the log-probabilities of its own completions alone, so that a chunk of whole pairs has
all its gradient needs: forward and backward of a chunk take three matrix products and no second tensor of its size, and
the logits of two chunks are never held together (Liger Kernel, Hsu et al. 2024, does so for language modelling).

Shape suffixes: B pairs, U positions, S scored tokens, C positions of a chunk, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_prefopt.losses.logps import PairLogps

PairLoss = Callable[[PairLogps], Tensor]
"""The loss of a micro-batch, a scalar: a sum over pairs, whose lengths and weights are known before."""
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits held at once: 128 MiB in fp32 on a CPU, 1 GiB on a GPU. Whatever memory is free: where chunks end decides how
sums round, and a run that is resumed, perhaps among other processes, has to round as the one before it."""


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


class FoundLogps:
    """Log-probabilities of all scored tokens of a micro-batch, and their mean logits, as chunks bring them."""

    def __init__(self, scored: Scored) -> None:
        self.scored = scored
        self.logps_S = torch.zeros(len(scored.targets_S), device=scored.targets_S.device)
        self.means_S = torch.zeros_like(self.logps_S)

    def sums(self) -> Tensor:
        return torch.segment_reduce(self.logps_S, "sum", lengths=self.scored.lengths_2B, unsafe=True)

    def logps(self, sums_2B: Tensor | None = None) -> PairLogps:
        """Of given sums, or of those that have been found."""
        sums_2B = self.sums() if sums_2B is None else sums_2B
        return PairLogps.of_sums(sums_2B, self.means_S, self.scored.lengths_2B)


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: `cap * tanh(scale * (x W^T + b) / cap)`, where there is a cap."""

    linear: nn.Linear
    """W and b; with ZeRO 3 they are there only while it is called, so that a pass belongs into its forward."""
    scale: float = 1.0
    softcap: float | None = None
    product: Callable[[Tensor, Tensor], Tensor] = F.linear
    """As `F.linear`, without gradients: of states (C, D) and weights (V, D), and back."""
    add_product: Callable[[Tensor, Tensor, Tensor], object] = Tensor.addmm_
    """Of two more to the first: what (V, C) and (C, D) give to the gradient of the weights, in fp32."""


def one_pass(hidden_UD: Tensor, head: Head, found: FoundLogps, pair_loss: PairLoss) -> Tensor:
    """The loss of a micro-batch, a scalar with its gradient; `found` gets the log-probabilities that it is of.

    `hidden_UD` are the states at the predicting positions, in the order of `found.scored`.
    """
    hidden_UD, weight_VD, bias_V = _as_multiplied(hidden_UD), head.linear.weight, head.linear.bias
    loss: Tensor = _OnePass.apply(hidden_UD, weight_VD, bias_V, head, found, pair_loss)  # type: ignore[no-untyped-call]
    return loss


def score(hidden_UD: Tensor, head: Head, found: FoundLogps) -> Tensor:
    """The log-probabilities alone, without gradient; returns the sums over completions, (2B,)."""
    logits = _Logits(_as_multiplied(hidden_UD), head, found)
    for parts in logits.groups():
        for part in parts:
            logits.score(part)
    return found.sums()


def _as_multiplied(hidden_UD: Tensor) -> Tensor:
    """In the precision of matrix products, as autocast has it."""
    kind = hidden_UD.device.type
    return hidden_UD.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden_UD


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


class _Logits:
    """The logits of a micro-batch, a part at a time."""

    def __init__(self, hidden_UD: Tensor, head: Head, found: FoundLogps) -> None:
        weight_VD, bias_V = head.linear.weight.detach(), head.linear.bias
        self.hidden_UD = hidden_UD.detach()
        self.weight_VD = weight_VD.to(hidden_UD.dtype)
        self._bias_V = None if bias_V is None else bias_V.detach().float()
        self._mean_D = weight_VD.mean(0, dtype=torch.float32)
        self.head, self._found, self._scored = head, found, found.scored

    def groups(self) -> Iterator[list[_Part]]:
        limit = CHUNK_ELEMENTS[self.hidden_UD.device.type] // len(self.weight_VD)
        return _groups(self._scored, max(1, limit))

    def score(self, part: _Part) -> tuple[Tensor, Tensor | None]:
        """Note the log-probabilities and mean logits of a part; returns its probabilities, and the slope of the cap if
        there is one."""
        logits_CV, softcap = self._of(part), self.head.softcap
        source, targets = part.source(self._scored), self._scored.targets_S[part.tokens]
        picked = logits_CV[source, targets]
        largest_C = logits_CV.amax(-1)
        slope_CV = None if softcap is None else 1 - (logits_CV / softcap) ** 2
        self._found.means_S[part.tokens] = self._means(part, logits_CV)[source]
        # The log-sum-exp from the softmax, so that nothing else as large as the logits is ever needed.
        probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
        lse_C = largest_C - probs_CV.amax(-1).log()
        self._found.logps_S[part.tokens] = picked - lse_C[source]
        return probs_CV, slope_CV

    def gradient(self, scores: tuple[Tensor, Tensor | None], part: _Part, slopes: Tensor) -> Tensor:
        """Of the loss by what comes out of the matrix product, (C, V), over the probabilities: slope * (one-hot -
        softmax), with the slope of each token of the part."""
        probs_CV, cap_slope_CV = scores
        source, targets = part.source(self._scored), self._scored.targets_S[part.tokens]
        slope_C = torch.zeros(len(probs_CV), device=probs_CV.device).index_add_(0, source, slopes)
        d_logits_CV = probs_CV.mul_(-slope_C[:, None])
        d_logits_CV.index_put_((source, targets), slopes, accumulate=True)
        return d_logits_CV if cap_slope_CV is None else d_logits_CV.mul_(cap_slope_CV)

    def _of(self, part: _Part) -> Tensor:
        """(C, V) in fp32."""
        head = self.head
        logits_CV = head.product(self.hidden_UD[part.rows], self.weight_VD).float()
        if self._bias_V is not None:
            logits_CV += self._bias_V
        if head.scale != 1.0:
            logits_CV *= head.scale
        if head.softcap is not None:
            logits_CV.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits_CV

    def _means(self, part: _Part, logits_CV: Tensor) -> Tensor:
        """(C,): by the mean of the weights where that is the same, which is less work."""
        if self.head.softcap is not None:
            return logits_CV.mean(-1)
        means_C = (self.hidden_UD[part.rows] * self._mean_D).sum(-1)
        if self._bias_V is not None:
            means_C += self._bias_V.mean()
        return means_C * self.head.scale


class _Gradients:
    """Of the states and of the weights that are trained, in fp32, as chunks bring them."""

    def __init__(self, logits: _Logits, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self._logits = logits
        self.hidden_UD = torch.zeros_like(logits.hidden_UD, dtype=torch.float32)
        self.weight_VD, self.bias_V = _zeros(weight_VD), _zeros(bias_V)

    def add(self, scores: tuple[Tensor, Tensor | None], part: _Part, slopes: Tensor) -> None:
        """What a part gives them."""
        logits, hidden_CD = self._logits, self._logits.hidden_UD[part.rows]
        if hidden_CD.dtype == torch.float32:
            d_logits_CV = logits.gradient(scores, part, slopes)
            self.hidden_UD[part.rows] = logits.head.product(d_logits_CV, logits.weight_VD.T)
            if self.weight_VD is not None:
                logits.head.add_product(self.weight_VD, d_logits_CV.T, hidden_CD)
            if self.bias_V is not None:
                self.bias_V += d_logits_CV.sum(0)
            return
        # Products of numbers around one: fp16 has none as small as a share of a loss, nor as large as a scaled one.
        unit_1 = slopes.abs().amax(0, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        d_logits_CV = logits.gradient(scores, part, slopes / unit_1)
        if self.bias_V is not None:
            self.bias_V.addcmul_(d_logits_CV.sum(0), unit_1)
        d_logits_CV = d_logits_CV.to(hidden_CD.dtype)
        torch.mul(d_logits_CV @ logits.weight_VD, unit_1, out=self.hidden_UD[part.rows])
        if self.weight_VD is not None:
            self.weight_VD.addcmul_(d_logits_CV.T @ hidden_CD, unit_1)


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_UD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        found: FoundLogps,
        pair_loss: PairLoss,
    ) -> Tensor:
        logits = _Logits(hidden_UD, head, found)
        gradients = _Gradients(logits, weight_VD, bias_V)
        for parts in logits.groups():
            for part in parts[:-1]:
                logits.score(part)
            scores: tuple[Tensor, Tensor | None] | None = logits.score(parts[-1])
            slopes_S = _slopes(found, pair_loss)
            for part in reversed(parts):
                gradients.add(scores or logits.score(part), part, slopes_S[part.tokens] * head.scale)
                scores = None  # gone before there are others
        ctx.gradients = gradients.hidden_UD, gradients.weight_VD, gradients.bias_V
        ctx.dtypes = hidden_UD.dtype, weight_VD.dtype, weight_VD.dtype
        return pair_loss(found.logps()).detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """In fp32 up to here, since `upstream` has the scale that fp16 needs."""
        gradients, ctx.gradients = ctx.gradients, None  # who gets the last reference need not copy
        scaled = [
            None if each is None else each.mul_(upstream).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _zeros(weight: Tensor | None) -> Tensor | None:
    return (
        torch.zeros_like(weight, dtype=torch.float32) if weight is not None and weight.requires_grad else None
    )


def _slopes(found: FoundLogps, pair_loss: PairLoss) -> Tensor:
    """The derivative of the loss by each scored log-probability, (S,); right for the pairs that have been found."""
    scored = found.scored
    with torch.enable_grad():
        sums_2B = found.sums().requires_grad_()
        (slopes_2B,) = torch.autograd.grad(pair_loss(found.logps(sums_2B)), sums_2B)
    return slopes_2B.repeat_interleave(scored.lengths_2B, output_size=len(scored.targets_S))
