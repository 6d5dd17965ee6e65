"""One forward pass over a micro-batch of pairs; the head only where a completion token is predicted.

Shape suffixes: B pairs, R = 2B rows, T tokens, D tokens of the decoder, S scored tokens, U positions that predict them,
V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ray_prefopt.data.collate import PackedBatch, PairBatch
from ray_prefopt.losses.head import Head, HeadGradient, PairLoss, Scored, above_head, chunked_logps, one_pass
from ray_prefopt.losses.logps import PairLogps, token_logps

ForwardFn = Callable[..., Any]
Batch = PairBatch | PackedBatch


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can restrict its head to some positions (nearly all causal models of transformers can)."""
    return "logits_to_keep" in inspect.signature(base_of(model).forward).parameters


def base_of(model: nn.Module) -> Any:
    """The model under its adapter, if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True)
class Scorer:
    """Log-probabilities of pairs, and losses of them, by one model."""

    forward: ForwardFn
    """The model, or the engine that wraps it."""
    keep_logits: bool = True
    """As `keeps_logits` says of the model."""
    is_packed: bool = False
    """Whether micro-batches should be packed."""
    model: Any = None
    """What `forward` calls in the end; needed with a head."""
    head: Head | None = None
    """Of the model, where its gradient can be had in one pass with the logits; packed batches alone use it."""

    def logps(self, batch: Batch) -> PairLogps:
        """Log-probabilities of both completions of each pair."""
        if isinstance(batch, PairBatch):
            return pair_logps(self.forward, batch, keep_logits=self.keep_logits)
        if self.head is None or torch.is_grad_enabled():
            return _packed_logps(self.forward, batch)
        return chunked_logps(self._states(batch, self.head, HeadGradient()), self.head, _scored(batch))

    def loss(self, batch: Batch, pair_loss: PairLoss) -> tuple[Tensor, PairLogps]:
        """The loss of a micro-batch, a scalar with its gradient, and the log-probabilities that it is of."""
        if self.head is None or isinstance(batch, PairBatch):
            logps = self.logps(batch)
            return pair_loss(logps), logps
        gradient = HeadGradient()
        states_UD = self._states(batch, self.head, gradient)
        return one_pass(states_UD, self.head, gradient, _scored(batch), pair_loss)

    def _states(self, batch: PackedBatch, head: Head, gradient: HeadGradient) -> Tensor:
        """The states under the head at the positions that predict, (U, D)."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            """One of them goes on to the head, for whatever the model does there."""
            caught.append(args[0])
            return (args[0][..., :1, :],)

        def hand_out(_: nn.Module, __: Any, output: Any) -> Any:
            output.logits = above_head(caught.pop(), head, gradient)
            return output

        head_module = base_of(self.model).get_output_embeddings()
        with head_module.register_forward_pre_hook(catch), self.model.register_forward_hook(hand_out):
            output = self.forward(**_packed_inputs(batch), logits_to_keep=batch.predicts_U)
        return output.logits.view(-1, output.logits.shape[-1])


def pair_logps(forward: ForwardFn, batch: PairBatch, *, keep_logits: bool = True) -> PairLogps:
    """Log-probabilities of both completions of each pair, from one forward pass of a language model.

    `forward` is the model, or the engine that wraps it; `keep_logits` is `keeps_logits(model)`.
    """
    # The 2-D boolean mask of transformers: only its True positions reach the head, flattened to (S, V).
    kept = {"logits_to_keep": batch.predicts_RD} if keep_logits else {}
    decoder_ids = batch.decoder_input_ids_RD
    decoder = {} if decoder_ids is None else {"decoder_input_ids": decoder_ids}
    output = forward(
        input_ids=batch.input_ids_RT,
        attention_mask=batch.attention_mask_RT,
        use_cache=False,
        **decoder,
        **kept,
    )
    logits_SV = output.logits if keep_logits else output.logits[batch.predicts_RD]
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


def _packed_logps(forward: ForwardFn, batch: PackedBatch) -> PairLogps:
    """The same of packed pairs, with all logits at once: a position that predicts two tokens comes twice."""
    output = forward(**_packed_inputs(batch), logits_to_keep=batch.predicts_U[batch.source_S])
    logps_S, logits_S = token_logps(output.logits.squeeze(0), batch.targets_S)
    return PairLogps.of_tokens(logps_S, logits_S, batch.scored_2B)


def _packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids_T[None],
        "position_ids": batch.position_ids_T[None],
        # transformers hands a mask of four dimensions on as it is, and makes one of the positions otherwise.
        "attention_mask": batch.input_ids_T.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "segments": batch.segments,
        "use_cache": False,
    }


def _scored(batch: PackedBatch) -> Scored:
    return Scored(batch.source_S, batch.targets_S, batch.scored, batch.scored_2B, batch.predicting)
