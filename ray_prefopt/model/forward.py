"""One forward pass over a micro-batch of pairs; the head only where a completion token is predicted.

Shape suffixes: B pairs, R = 2B rows, T tokens, D tokens of the decoder, S scored positions, V vocabulary.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ray_prefopt.data.collate import PairBatch
from ray_prefopt.losses.logps import PairLogps, token_logps

ForwardFn = Callable[..., Any]


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can restrict its head to some positions (nearly all causal models of transformers can)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


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
