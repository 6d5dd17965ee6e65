"""Completions that the model writes during evaluations, beside the ones of the pairs: to see what the numbers mean."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.blocks import Blocks
from ray_prefopt.data.stream import PairReader
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.base import Engine
from ray_prefopt.training import ranks

Sample = dict[str, Any]
"""`step`, `set`, and the texts `prompt`, `chosen`, `rejected` and `sample`."""


def sampled(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Blocks],
    config: TrainConfig,
    step: int,
) -> list[Sample]:
    """Completions for run.eval_samples prompts of each set, the same ones every time; on every rank, from all of them.

    Sampling takes the model's own generation settings. All ranks generate together, since stage 3 gathers each layer
    from all of them.
    """
    rank, world_size = ranks.rank(), ranks.world_size()
    rows: list[tuple[int, Sample]] = []
    engine.module.eval()
    for name, blocks in sets.items():
        pairs = _spread(blocks, config.run.eval_samples)
        for index in range(rank, math.ceil(len(pairs) / world_size) * world_size, world_size):
            pair = pairs[
                index % len(pairs)
            ]  # a rank without one repeats another's, so that all call as often
            row = _row(tokenizer, pair, _completed(engine, tokenizer, pair, config))
            if index < len(pairs):
                rows.append((index, {"step": step, "set": name or "eval", **row}))
    engine.module.train()
    gathered = [row for part in ranks.all_gather(rows) for row in part]
    return [row for _, row in sorted(gathered, key=lambda entry: (entry[1]["set"], entry[0]))]


def _spread(blocks: Blocks, count: int) -> list[TokenizedPair]:
    """So many pairs, evenly over the set."""
    ids = np.linspace(0, blocks.num_pairs - 1, min(count, blocks.num_pairs)).astype(np.int64)
    return PairReader(blocks).read(ids)


def _prompt(pair: TokenizedPair) -> list[int]:
    return list(pair.chosen[: min(pair.chosen_start, pair.rejected_start)])


@torch.no_grad()
def _completed(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, config: TrainConfig
) -> str:
    """A sampled completion of the pair's prompt, without the prompt."""
    module: Any = engine.module
    prompt = _prompt(pair)
    is_encoder_decoder = module.config.is_encoder_decoder
    room = config.data.max_length - (0 if is_encoder_decoder else len(prompt))
    ids_RT: Tensor = module.generate(
        input_ids=torch.tensor([prompt], device=engine.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=engine.device),
        do_sample=True,
        max_new_tokens=min(room, config.run.eval_sample_tokens),
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=config.engine.kind == "zero" and config.engine.zero_stage == 3,
    )
    new_T = ids_RT[0] if is_encoder_decoder else ids_RT[0, len(prompt) :]
    return str(tokenizer.decode(new_T, skip_special_tokens=True))


def _row(tokenizer: PreTrainedTokenizerBase, pair: TokenizedPair, sample: str) -> dict[str, str]:
    def text(ids: Any) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return {
        "prompt": text(_prompt(pair)),
        "chosen": text(pair.chosen[pair.chosen_start :]),
        "rejected": text(pair.rejected[pair.rejected_start :]),
        "sample": sample,
    }
