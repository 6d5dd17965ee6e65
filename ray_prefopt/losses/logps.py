"""Log-probabilities of completions: the sufficient statistic that every loss is made of.

Shape suffixes: B pairs, S scored positions, V vocabulary.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 27
"""Logits (positions times vocabulary) that are held in fp32 at once: 512 MiB."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Summed completion log-probabilities in nats, token counts and mean logits; every tensor is (B,), fp32.

    SimPO reads the means, CPO the sums, behaviour cloning the totals; the mean logits are a metric and carry no
    gradient. `aux_loss` is the router's load-balancing loss, a scalar, for mixture-of-experts models that ask for it.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor
    aux_loss: Tensor | None = None

    @classmethod
    def of_tokens(cls, logps_S: Tensor, logits_S: Tensor, lengths_2B: Tensor) -> Self:
        """From log-probabilities and mean logits of all tokens: of each pair the chosen ones, then the rejected."""
        sums_2B = torch.segment_reduce(logps_S, "sum", lengths=lengths_2B, unsafe=True)
        return cls.of_sums(sums_2B, logits_S, lengths_2B)

    @classmethod
    def of_sums(cls, sums_2B: Tensor, logits_S: Tensor, lengths_2B: Tensor) -> Self:
        """The same, where the log-probabilities of each completion are summed."""
        means_2B = torch.segment_reduce(logits_S, "mean", lengths=lengths_2B, unsafe=True)
        counts_2B = lengths_2B.float()
        return cls(
            sums_2B[0::2], sums_2B[1::2], counts_2B[0::2], counts_2B[1::2], means_2B[0::2], means_2B[1::2]
        )

    def put(self, places_N: Tensor, logps: Self) -> Self:
        """With those of N pairs, (N,), in their places."""
        return replace(
            self,
            **{
                field.name: getattr(self, field.name).index_copy(0, places_N, getattr(logps, field.name))
                for field in fields(self)
                if field.name != "aux_loss"
            },
        )

    @property
    def chosen_mean(self) -> Tensor:
        return self.chosen / self.chosen_len

    @property
    def rejected_mean(self) -> Tensor:
        return self.rejected / self.rejected_len


def token_logps(logits_SV: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) and the mean logit of each position, both (S,) in fp32; the latter without gradient.

    Works through the positions in chunks, and keeps of a chunk what the backward pass cannot recompute: nothing in fp32
    is ever as large as the logits.

    >>> logps, means = token_logps(torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.tensor([1]))
    >>> logps.exp().tolist()
    [0.25]
    """
    rows = max(1, CHUNK_ELEMENTS // logits_SV.shape[-1])
    if logits_SV.shape[0] <= rows:
        return _token_logps(logits_SV, targets_S)
    chunks = [
        checkpoint(_token_logps, logits, targets, use_reentrant=False)
        for logits, targets in zip(logits_SV.split(rows), targets_S.split(rows), strict=True)
    ]
    logps, means = zip(*chunks, strict=True)
    return torch.cat(logps), torch.cat(means)


def _token_logps(logits_SV: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
    logits_SV = logits_SV.float()
    picked_S = logits_SV.gather(-1, targets_S.unsqueeze(-1)).squeeze(-1)
    return picked_S - logits_SV.logsumexp(-1), logits_SV.detach().mean(-1)
