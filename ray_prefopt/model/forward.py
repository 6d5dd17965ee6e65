"""One forward pass over a micro-batch of pairs; the head only where a completion token is predicted.

Shape suffixes: B pairs, R = 2B rows, T tokens, D tokens of the decoder, S scored tokens, U positions that predict them,
V vocabulary.
"""

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ray_prefopt.data.collate import PackedBatch, PairBatch
from ray_prefopt.losses.head import FoundLogps, Head, PairLoss, Scored, one_pass, score
from ray_prefopt.losses.logps import PairLogps, token_logps
from ray_prefopt.model.adapters import base_of
from ray_prefopt.model.last_layer import Read

ForwardFn = Callable[..., Any]
Batch = PairBatch | PackedBatch


def can_restrict_logits(model: nn.Module) -> bool:
    """Whether the model can restrict its head to some positions (nearly all causal models of transformers can)."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of pairs, and losses of them, by one model."""

    forward: ForwardFn
    """The model, or the engine that wraps it."""
    restrict_logits: bool = True
    """As `can_restrict_logits` says of the model."""
    is_packed: bool = False
    """Whether micro-batches should be packed."""
    head: Head | None = None
    """Of the model, after `open_head`, where its gradient can be had in one pass with the logits; packed batches alone
    use it."""
    spares_unread: bool = False
    """Whether the last layer of the model leaves out what nothing is read of, as after `spare_unread`."""

    def logps(self, batch: Batch) -> PairLogps:
        """Log-probabilities of both completions of each pair."""
        if isinstance(batch, PairBatch):
            return pair_logps(self.forward, batch, restrict_logits=self.restrict_logits)
        head = self.head
        if head is None or torch.is_grad_enabled():
            return self._all_logps(batch)
        found = FoundLogps(_scored(batch))
        self._in_head(batch, lambda hidden_UD: score(hidden_UD, head, found))
        return found.logps()

    def loss(self, batch: Batch, pair_loss: PairLoss) -> tuple[Tensor, PairLogps]:
        """The loss of a micro-batch, a scalar with its gradient, and the log-probabilities that it is of."""
        head = self.head
        if head is None or isinstance(batch, PairBatch):
            logps = self.logps(batch)
            return pair_loss(logps), logps
        found = FoundLogps(_scored(batch))
        loss = self._in_head(batch, lambda hidden_UD: one_pass(hidden_UD, head, found, pair_loss))
        return loss, found.logps()

    def _in_head(self, batch: PackedBatch, work: Callable[[Tensor], Tensor]) -> Tensor:
        """What `work` makes of the states at the positions that predict, (U, D), in place of their logits."""
        token = _head_pass.set(_HeadPass(work))
        try:
            output: Tensor = self.forward(**self._inputs(batch), logits_to_keep=batch.predicts_U).logits
        finally:
            _head_pass.reset(token)
        return output

    def _all_logps(self, batch: PackedBatch) -> PairLogps:
        """With all logits at once: a position that predicts two tokens comes twice."""
        output = self.forward(**self._inputs(batch), logits_to_keep=batch.predicts_U[batch.source_S])
        logps_S, logits_S = token_logps(output.logits.squeeze(0), batch.targets_S)
        return PairLogps.of_tokens(logps_S, logits_S, batch.scored_2B)

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        read = {"read": Read(batch.predicts_U, batch.unread)} if self.spares_unread else {}
        return {
            "input_ids": batch.input_ids_T[None],
            "position_ids": batch.position_ids_T[None],
            # transformers hands a mask of four dimensions on as it is, and makes one of the positions otherwise.
            "attention_mask": batch.input_ids_T.new_ones(1, 1, 1, 1, dtype=torch.bool),
            "segments": batch.segments,
            "use_cache": False,
            **read,
        }


@dataclass(slots=True)
class _HeadPass:
    """What a forward pass does in the head in place of logits, and what came of it."""

    work: Callable[[Tensor], Tensor]
    made: Tensor | None = None


_head_pass: ContextVar[_HeadPass | None] = ContextVar("head_pass", default=None)
"""That this thread is in; None where logits are wanted."""


def open_head(model: nn.Module, head: Head) -> None:
    """Let a pass do its work in the head of a model; without any the head does what it did.

    In the head's forward, where ZeRO 3 has its weights, and waits for their gradient; and the model's output, since
    DeepSpeed prepares for a backward pass when a gradient reaches that.
    """
    linear: Any = head.linear
    if getattr(linear.forward, "func", None) is _work_or_logits:  # it does already
        return
    linear.forward = partial(_work_or_logits, linear.forward)
    linear.register_forward_hook(_keep)
    model.register_forward_hook(_hand_out, prepend=True)


def _work_or_logits(forward: ForwardFn, hidden: Tensor) -> Tensor:
    now = _head_pass.get()
    return forward(hidden) if now is None else now.work(hidden.view(-1, hidden.shape[-1]))


def _keep(head: Any, _: Any, output: Tensor) -> Tensor:
    """Logits of one position, for whatever the model does with them."""
    now = _head_pass.get()
    if now is None:
        return output
    now.made = output
    return output.new_zeros(1, 1, head.out_features)


def _hand_out(_: nn.Module, __: Any, output: Any) -> Any:
    now = _head_pass.get()
    if now is not None:
        output.logits = now.made
    return output


def pair_logps(forward: ForwardFn, batch: PairBatch, *, restrict_logits: bool = True) -> PairLogps:
    """Log-probabilities of both completions of each pair, from one forward pass of a language model.

    `forward` is the model, or the engine that wraps it; `restrict_logits` is `can_restrict_logits(model)`.
    """
    # The 2-D boolean mask of transformers: only its True positions reach the head, flattened to (S, V).
    kept = {"logits_to_keep": batch.predicts_RD} if restrict_logits else {}
    decoder_ids = batch.decoder_input_ids_RD
    decoder = {} if decoder_ids is None else {"decoder_input_ids": decoder_ids}
    output = forward(
        input_ids=batch.input_ids_RT,
        attention_mask=batch.attention_mask_RT,
        use_cache=False,
        **decoder,
        **kept,
    )
    logits_SV = output.logits if restrict_logits else output.logits[batch.predicts_RD]
    logps_S, logits_S = token_logps(logits_SV, batch.targets_S)

    lengths_R = batch.predicts_RD.sum(1)
    chosen, rejected = _row_sums(logps_S, batch.predicts_RD).chunk(2)
    chosen_len, rejected_len = lengths_R.float().chunk(2)
    chosen_logits, rejected_logits = _row_sums(logits_S, batch.predicts_RD).chunk(2)
    return PairLogps(
        chosen,
        rejected,
        chosen_len,
        rejected_len,
        chosen_logits / chosen_len,
        rejected_logits / rejected_len,
        aux_loss=getattr(output, "aux_loss", None),
    )


def _row_sums(values_S: Tensor, mask_RD: Tensor) -> Tensor:
    """Sum of each row's values, (R,). A scatter and a row sum, since index_add is not deterministic on CUDA."""
    return torch.zeros(mask_RD.shape, device=values_S.device).masked_scatter(mask_RD, values_S).sum(1)


def _scored(batch: PackedBatch) -> Scored:
    return Scored(batch.source_S, batch.targets_S, batch.scored, batch.scored_2B, batch.predicting)
