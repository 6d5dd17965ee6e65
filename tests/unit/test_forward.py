"""Log-probabilities of a batch equal those of each sequence by itself, from all logits, written the long way."""

import copy
import inspect
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ray_prefopt.data.collate import PairBatch, collate
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.losses import logps as logps_module
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.model.forward import can_restrict_logits, pair_logps
from ray_prefopt.model.load import decoder_start_id
from tests.tiny import tiny_config, tiny_model

PAD = 0

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "gpt2": {"n_positions": 64},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
}
"""Families with a cap or a scale on their logits, positions that are learnt, and ALiBi."""
_GEMMA = {name: value for name, value in tiny_config().items() if name != "model_type"}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {},
    "bart": {},
    "t5gemma": {
        "encoder": _GEMMA,
        "decoder": {**_GEMMA, "bos_token_id": 7, "cross_attention_hidden_size": 32},
        "dropout_rate": 0.0,
    },
}
"""The last of them restricts its head."""
MODELS |= ENCODER_DECODERS


@cache
def model_of(kind: str) -> nn.Module:
    """With logits large enough for a cap to bite."""
    model = tiny_model(kind, **MODELS[kind])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def pairs_of(count: int, *, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of different lengths, some with a prompt of another length on the rejected side."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt, chosen, rejected = (rng.integers(1, 500, rng.integers(2, 10)).tolist() for _ in range(3))
        found.append(TokenizedPair(prompt + chosen, prompt + rejected, len(prompt), len(prompt) - index % 2))
    return found


def side_by_itself(model: nn.Module, ids: list[int], start: int) -> tuple[Tensor, Tensor]:
    """Summed log-probability of ids[start:], and the mean of all logits that predict them."""
    if model.config.is_encoder_decoder:
        first = decoder_start_id(model.config)
        rows = {"input_ids": ids[:start], "decoder_input_ids": [first, *ids[start:]]}
        logits = model(**{name: torch.tensor([row]) for name, row in rows.items()}).logits[0]
    else:
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 :]
    total, mean = torch.zeros(()), torch.zeros(())
    for position, token in enumerate(ids[start:]):
        probabilities = torch.log_softmax(logits[position].double(), dim=-1)
        total = total + probabilities[token].float()
        mean = mean + logits[position].mean() / (len(ids) - start)
    return total, mean


def batch_of(model: nn.Module, pairs: list[TokenizedPair]) -> PairBatch:
    return collate(pairs, pad_id=PAD, decoder_start_id=decoder_start_id(model.config))


def by_themselves(model: nn.Module, pairs: list[TokenizedPair]) -> dict[str, Tensor]:
    chosen = [side_by_itself(model, pair.chosen, pair.chosen_start) for pair in pairs]
    rejected = [side_by_itself(model, pair.rejected, pair.rejected_start) for pair in pairs]
    return {
        "chosen": torch.stack([total for total, _ in chosen]),
        "rejected": torch.stack([total for total, _ in rejected]),
        "chosen_len": torch.tensor([float(len(pair.chosen) - pair.chosen_start) for pair in pairs]),
        "rejected_len": torch.tensor([float(len(pair.rejected) - pair.rejected_start) for pair in pairs]),
        "chosen_logits": torch.stack([mean for _, mean in chosen]),
        "rejected_logits": torch.stack([mean for _, mean in rejected]),
    }


def assert_equal(found: PairLogps, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_equal_those_of_each_sequence(kind: str) -> None:
    model, pairs = model_of(kind), pairs_of(5)
    with torch.no_grad():
        found = pair_logps(model, batch_of(model, pairs), restrict_logits=can_restrict_logits(model))
        assert_equal(found, by_themselves(model, pairs))
    assert found.chosen.dtype == torch.float32
    torch.testing.assert_close(found.chosen_mean, found.chosen / found.chosen_len)
    torch.testing.assert_close(found.rejected_mean, found.rejected / found.rejected_len)
    assert found.aux_loss is None


def test_the_cap_and_the_scale_are_in_the_logits() -> None:
    """Else the families above would show nothing."""
    pairs = pairs_of(3)
    for kind, key in (
        ("gemma2", "final_logit_softcapping"),
        ("cohere", "logit_scale"),
        ("granite", "logits_scaling"),
    ):
        plain = tiny_model(kind, **MODELS[kind] | {key: None if kind == "gemma2" else 1.0})
        plain.load_state_dict(model_of(kind).state_dict())
        with torch.no_grad():
            one, other = (pair_logps(model, collate(pairs, pad_id=PAD)) for model in (plain, model_of(kind)))
        assert ((one.chosen - other.chosen).abs() > 0.1).all()


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_of_each_sequence(kind: str) -> None:
    model, pairs = model_of(kind), pairs_of(3, seed=1)

    def gradient(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
        objective = (chosen @ torch.tensor([1.0, -2.0, 0.5]) + rejected @ torch.tensor([0.5, 1.0, -1.0])) / 10
        return list(torch.autograd.grad(objective, list(model.parameters())))

    found = pair_logps(model, batch_of(model, pairs), restrict_logits=can_restrict_logits(model))
    expected = by_themselves(model, pairs)
    torch.testing.assert_close(
        gradient(found.chosen, found.rejected),
        gradient(expected["chosen"], expected["rejected"]),
        rtol=1e-4,
        atol=1e-5,
    )
    assert not found.chosen_logits.requires_grad
    assert not found.chosen_len.requires_grad


def test_neither_padding_nor_neighbours_matter() -> None:
    model, pairs = model_of("qwen2"), pairs_of(4)
    with torch.no_grad():
        together = pair_logps(model, collate(pairs, pad_id=PAD))
        other_pad = pair_logps(model, collate(pairs, pad_id=511))
        alone = [pair_logps(model, collate([pair], pad_id=PAD)) for pair in pairs]
    for name in ("chosen", "rejected", "chosen_logits"):
        value = getattr(together, name)
        torch.testing.assert_close(getattr(other_pad, name), value, rtol=0, atol=0)
        torch.testing.assert_close(
            torch.cat([getattr(one, name) for one in alone]), value, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_head_that_cannot_be_restricted_gives_the_same(kind: str) -> None:
    model, batch = model_of(kind), collate(pairs_of(4), pad_id=PAD)
    with torch.no_grad():
        kept, whole = (pair_logps(model, batch, restrict_logits=keep) for keep in (True, False))
    for name in ("chosen", "rejected", "chosen_len", "rejected_len", "chosen_logits", "rejected_logits"):
        torch.testing.assert_close(getattr(whole, name), getattr(kept, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen2", "t5gemma", "qwen2 with adapters"])
def test_only_scored_positions_reach_the_head(kind: str) -> None:
    model, pairs = model_of(kind.split()[0]), pairs_of(4)
    head = model.get_output_embeddings()
    if kind.endswith("adapters"):
        model = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM"))
        head = model.get_output_embeddings()
    shapes: list[torch.Size] = []
    hook = head.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    pair_logps(model, batch_of(model, pairs), restrict_logits=can_restrict_logits(model))
    hook.remove()
    scored = sum(
        len(pair.chosen) - pair.chosen_start + len(pair.rejected) - pair.rejected_start for pair in pairs
    )
    assert [shape[:-1].numel() for shape in shapes] == [scored]


def test_which_models_restrict_their_head() -> None:
    assert can_restrict_logits(model_of("qwen2"))
    for kind in ENCODER_DECODERS:
        assert can_restrict_logits(model_of(kind)) == (kind == "t5gemma")

    class Old(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            """An older forward."""

    assert not can_restrict_logits(Old())
    assert "logits_to_keep" not in inspect.signature(Old().forward).parameters


def test_the_model_is_told_what_it_needs_and_nothing_else() -> None:
    """Position ids are left to the model; a cache would only cost memory."""
    batch = collate(pairs_of(2), pad_id=PAD)
    told: dict[str, Any] = {}

    def forward(**inputs: Any) -> Any:
        told.update(inputs)
        return SimpleNamespace(
            logits=torch.zeros(int(batch.predicts_RD.sum()), 8), aux_loss=torch.tensor(7.0)
        )

    def forward_all(**inputs: Any) -> Any:
        told.clear()
        told.update(inputs)
        return SimpleNamespace(logits=torch.zeros(*batch.input_ids_RT.shape, 8))

    batch.targets_S.remainder_(8)
    found = pair_logps(forward, batch)
    assert told.keys() == {"input_ids", "attention_mask", "use_cache", "logits_to_keep"}
    assert told["use_cache"] is False
    assert told["logits_to_keep"] is batch.predicts_RD
    assert found.aux_loss == 7.0
    torch.testing.assert_close(found.chosen_mean, torch.full((2,), -np.log(8.0), dtype=torch.float32))
    pair_logps(forward_all, batch, restrict_logits=False)
    assert told.keys() == {"input_ids", "attention_mask", "use_cache"}


def test_the_routers_loss_is_passed_on() -> None:
    routed = {"num_local_experts": 4, "output_router_logits": True}
    model, batch = tiny_model("mixtral", **routed), collate(pairs_of(3), pad_id=PAD)
    with torch.no_grad():
        found = pair_logps(model, batch)
        output = model(input_ids=batch.input_ids_RT, attention_mask=batch.attention_mask_RT)
    torch.testing.assert_close(found.aux_loss, output.aux_loss)


# --- chunks ---


@pytest.mark.parametrize("positions", [1, 3, 7, 1000])
def test_chunks_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    model, batch = model_of("gemma2"), collate(pairs_of(4), pad_id=PAD)

    def run() -> tuple[PairLogps, tuple[Tensor, ...]]:
        found = pair_logps(model, batch)
        return found, torch.autograd.grad((found.chosen - found.rejected).sum(), list(model.parameters()))

    whole, gradient = run()
    monkeypatch.setattr(logps_module, "CHUNK_ELEMENTS", positions * model.config.vocab_size)
    chunked, chunked_gradient = run()
    for name in ("chosen", "rejected", "chosen_logits", "rejected_logits"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=1e-5, atol=1e-6)
    assert not chunked.chosen_logits.requires_grad


def test_half_precision_logits_are_summed_in_fp32() -> None:
    """A hundred tokens of probability 1/8: in bfloat16 the sum would be off by some 0.5."""
    pair = TokenizedPair([1] * 101, [1] * 101, 1, 1)
    batch = collate([pair], pad_id=PAD)
    logits = torch.zeros(int(batch.predicts_RD.sum()), 8, dtype=torch.bfloat16)
    found = pair_logps(lambda **_: SimpleNamespace(logits=logits), batch)
    assert found.chosen.item() == pytest.approx(-100 * np.log(8.0), rel=1e-6)
