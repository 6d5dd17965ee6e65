"""Packed pairs have the log-probabilities, losses and gradients of padded ones, or the model takes padded ones."""

import copy
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ray_prefopt.config import CompileConfig, CPOLoss, LossConfig, ModelConfig, SimPOLoss
from ray_prefopt.data.collate import PackedBatch, collate, pack
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.errors import ModelError
from ray_prefopt.losses import head as head_module
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model import attention as attention_module
from ray_prefopt.model import cpu_attention
from ray_prefopt.model import layout as layout_module
from ray_prefopt.model import onednn as onednn_module
from ray_prefopt.model.attention import NAME, packed_attention
from ray_prefopt.model.forward import Batch, Scorer
from ray_prefopt.model.layout import make_scorer, obstacle_of
from ray_prefopt.model.onednn import linear
from tests.parity.test_models import FAMILIES
from tests.tiny import tiny_model
from tests.unit.test_forward import MODELS, pairs_of

CPU = torch.device("cpu")
CONFIG = ModelConfig(path="unread")
DROPOUTS = (
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "dropout",
    "hidden_dropout",
    "embd_dropout",
)
PACKED = (
    "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi", "gpt2", "gpt_neox", "opt", "cohere", "granite",
    "deepseek_v3", "minicpm3", "hyperclovax",
)  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 9,
}  # fmt: skip
"""Keys are twice as wide as values."""
FORMS = {
    **FAMILIES,
    **MODELS,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT | {"dim_model_base": 28},
    "hyperclovax": {"logits_scaling": 0.8},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
PADDED = {
    "gemma2": "it caps its attention scores",
    "bloom": "it takes no position_ids",
    "t5": "it is an encoder-decoder",
    "mixtral": "its router's loss counts tokens",
    "doge": "a packed batch fails: packed attention has no mask of the model's own",
    "nemotron": "a packed batch fails: its layers do not hand on what they are given",
    "bert": "a packed batch fails: its attention is not causal",
}
LOSSES: tuple[LossConfig, ...] = (
    SimPOLoss(cpo_alpha=0.7),
    CPOLoss(link="hinge"),
    CPOLoss(nll_average="micro_batch"),
)


def model_of(kind: str, **more: Any) -> Any:
    """With logits large enough for a mistake to show, and every dropout off."""
    model = tiny_model(kind, **FORMS.get(kind, {}) | more)
    model.config.update({name: 0.0 for name in DROPOUTS if hasattr(model.config, name)})
    model = type(model)(model.config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * (0.15 if weight.dim() > 1 else 1.0))
    return model


def scorers(
    model: Any, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32
) -> tuple[Scorer, Scorer]:
    """Of packed and of padded pairs."""
    found, reason = make_scorer(model, model, config, dtype, CPU)
    assert (found.is_packed, reason) == (True, None)
    return found, Scorer(model)


def graded(
    scorer: Scorer, batch: Batch, config: LossConfig, model: nn.Module
) -> tuple[Tensor, PairLogps, dict[str, Tensor]]:
    objective = Objective(config)
    totals = StepTotals(len(batch.weights_B), 31)
    loss, logps = scorer.loss(batch, lambda logps: objective.loss(logps, batch.weights_B, totals))
    model.zero_grad()
    (loss * 2).backward()
    return (
        loss.detach(),
        logps,
        {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None},
    )


def assert_same(
    packed: tuple[Tensor, PairLogps, dict[str, Tensor]], padded: tuple[Tensor, PairLogps, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-6, atol=1e-6)
    for name in ("chosen", "rejected", "chosen_len", "rejected_len", "chosen_logits", "rejected_logits"):
        torch.testing.assert_close(
            getattr(packed[1], name), getattr(padded[1], name), rtol=1e-6, atol=2e-5, msg=name
        )
    assert packed[2].keys() == padded[2].keys()
    scale = torch.stack([each.norm() for each in padded[2].values()]).norm()
    for name, gradient in padded[2].items():
        assert (packed[2][name] - gradient).norm() <= 1e-6 * scale, name


@pytest.mark.parametrize("kind", PACKED)
def test_loss_and_gradient_are_those_of_padded_pairs(kind: str) -> None:
    model, pairs = model_of(kind), pairs_of(6, seed=3)
    packed, padded = scorers(model)
    assert packed.head is not None
    assert packed.spares_unread
    batch = pack(pairs)
    assert batch.num_tokens < sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    for config in LOSSES:
        expected = graded(padded, collate(pairs, pad_id=0), config, model)
        assert_same(graded(packed, batch, config, model), expected)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_the_window_counts_positions_not_places_in_the_row(kind: str) -> None:
    """The rejected tokens stand behind the chosen ones; only tokens before them are in their window."""
    pair = TokenizedPair(list(range(1, 21)), [*range(1, 9), *range(40, 52)], 8, 8)
    found = []
    for window in (4, 512):
        model = model_of(kind, sliding_window=window)
        packed, padded = scorers(model)
        with torch.no_grad():
            found.append(packed.logps(pack([pair])).rejected)
            torch.testing.assert_close(found[-1], padded.logps(collate([pair], pad_id=0)).rejected)
    assert (found[0] - found[1]).abs() > 0.1


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("kind", ["qwen2", "cohere", "phi"])
def test_chunks_change_nothing(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a row, of a part of a pair, and of some whole pairs; the head of phi has a bias, cohere's a scale."""
    model, batch = model_of(kind), pack(pairs_of(6, seed=3))
    packed, _ = scorers(model)
    whole = graded(packed, batch, LOSSES[0], model)
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", rows * 512)
    assert_same(graded(packed, batch, LOSSES[0], model), whole)
    with torch.no_grad():
        torch.testing.assert_close(packed.logps(batch).chosen, whole[1].chosen, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_logits_of_two_chunks_are_never_held_together(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("qwen2"), pack(pairs_of(6, seed=3))
    packed, _ = scorers(model)
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", rows * 512)
    made: list[weakref.ref[Tensor]] = []

    def product(states: Tensor, weight: Tensor) -> Tensor:
        out = linear(states, weight)
        if len(weight) == 512:  # and not the way back
            assert not [each for each in made if each() is not None]
            made.append(weakref.ref(out))
        return out

    assert packed.head is not None
    watched = replace(packed, head=replace(packed.head, product=product))
    graded(watched, batch, LOSSES[0], model)
    with torch.no_grad():
        watched.logps(batch)
    assert len(made) > 2
    assert made[-1]() is None


def test_the_head_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and both gradients; the values stay."""
    model, batch = model_of("qwen2"), pack(pairs_of(6, seed=3))
    packed, _ = scorers(model)
    monkeypatch.setattr(onednn_module, "IS_FASTER", False)
    by_mkl = graded(packed, batch, LOSSES[0], model)
    shapes: list[torch.Size] = []
    product = onednn_module._product

    def counted(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        shapes.append(weight.shape)
        out: Tensor = product(x, weight, *others)
        return out

    monkeypatch.setattr(onednn_module, "IS_FASTER", True)
    monkeypatch.setattr(onednn_module, "ROWS", 300)
    monkeypatch.setattr(onednn_module, "_product", counted)
    assert_same(graded(packed, batch, LOSSES[0], model), by_mkl)
    width = model.config.hidden_size
    assert shapes == [(512, width), (width, 512), *2 * [(width, len(batch.predicts_U))]]


def test_a_cap_on_the_logits() -> None:
    """Gemma 3 has none by itself."""
    model, pairs = model_of("gemma3_text", final_logit_softcapping=3.0), pairs_of(4)
    packed, padded = scorers(model)
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)


def test_the_states_under_the_head_are_asked_for_once_and_not_their_logits() -> None:
    model = model_of("qwen2")
    batch, seen = pack(pairs_of(3)), []
    model.lm_head.register_forward_hook(lambda _, states, out: seen.append((states[0].shape, out.shape)))
    packed, _ = scorers(model)
    seen.clear()
    graded(packed, batch, LOSSES[0], model)
    assert seen == [((1, len(batch.predicts_U), 32), ())]


def test_adapters_under_and_on_the_head() -> None:
    """A frozen head gets no gradient, one beside an adapter has its own; one with an adapter goes the long way."""
    pairs = pairs_of(4)
    cases: tuple[tuple[list[str], list[str] | None, bool], ...] = (
        (["q_proj", "down_proj"], None, True), (["q_proj"], ["lm_head"], True), (["q_proj", "lm_head"], None, False)
    )  # fmt: skip
    for targets, whole, has_head in cases:
        options = LoraConfig(r=2, target_modules=targets, modules_to_save=whole)
        model = get_peft_model(model_of("qwen2"), options)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        packed, padded = scorers(model)
        assert (packed.head is not None) == has_head
        expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
        found = graded(packed, pack(pairs), LOSSES[0], model)
        assert all("lora" in name or "lm_head.modules_to_save" in name for name in found[2])
        assert any("modules_to_save" in name for name in found[2]) == (whole is not None)
        assert_same(found, expected)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_last_layer_is_asked_where_something_is_read(recomputes: bool) -> None:
    """Keys and values of all tokens, the rest of those that predict; also when it is computed again."""
    model = model_of("qwen2").train()
    packed, padded = scorers(model)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made: dict[str, set[int]] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp"):
        for index, layer in enumerate(model.model.layers):
            places = made.setdefault(f"{index}.{name}", set())
            layer.get_submodule(name).register_forward_hook(
                lambda _, __, out, to=places: to.add(int(out.any(-1).sum()))
            )
    batch = pack(pairs_of(3))
    tokens, read = batch.num_tokens, len(batch.predicts_U)
    assert read < tokens
    graded(packed, batch, LOSSES[0], model)
    first, last = list(made.values())[::2], list(made.values())[1::2]
    assert first == [{tokens}] * 5
    assert last == [{read}, {tokens}, {tokens}, {read}, {read}]
    rows = collate(pairs_of(3), pad_id=0)
    padded.logps(rows)
    assert last[-1] == {read, rows.input_ids_RT.numel()}


def test_a_copy_of_the_model_has_a_last_layer_of_its_own() -> None:
    model = model_of("llama")
    scorers(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    packed, padded = scorers(copied)
    pairs = pairs_of(3)
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], copied)
    assert expected[0] > 0.1
    assert_same(graded(packed, pack(pairs), LOSSES[0], copied), expected)


def test_a_last_layer_that_is_not_found_computes_everything() -> None:
    model = model_of("llama")
    model.config.num_hidden_layers = 7
    found, _ = make_scorer(model, model, CONFIG, torch.float32, CPU)
    assert (found.is_packed, found.spares_unread) == (True, False)


def test_tied_weights_get_the_gradient_of_both() -> None:
    model, pairs = model_of("qwen2", tie_word_embeddings=True), pairs_of(4)
    model.tie_weights()
    packed, padded = scorers(model)
    assert packed.head is not None
    assert packed.head.linear.weight is model.get_input_embeddings().weight
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)


def test_recomputed_activations() -> None:
    model, batch = model_of("llama"), pack(pairs_of(4))
    packed, _ = scorers(model)
    expected = graded(packed, batch, LOSSES[0], model)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(graded(packed, batch, LOSSES[0], model), expected)


def test_half_precision_is_as_near_as_that_of_padded_pairs() -> None:
    model, pairs = model_of("llama"), pairs_of(6)
    _, padded = scorers(model)
    exact = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)[1].chosen
    model.bfloat16()
    packed, padded = scorers(model, dtype=torch.bfloat16)
    found = graded(packed, pack(pairs), LOSSES[0], model)
    other = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert found[1].chosen.dtype == torch.float32
    assert (found[1].chosen - exact).abs().max() <= 2 * (other[1].chosen - exact).abs().max() + 0.05
    assert all(each.dtype == torch.bfloat16 for each in found[2].values())


@pytest.mark.parametrize("kind", ["llama", "phi", "cohere"])
def test_fp16_has_the_gradients_of_all_logits_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss that is a millionth of a step's, whose slopes fp16 would round to nothing; but not beyond its range."""
    model, batch, totals = model_of(kind), pack(pairs_of(6, seed=3)), StepTotals(10**6, 10**6)
    exact, objective = scorers(model)[0], Objective(LOSSES[0])
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 20 * 512)

    def forward(**inputs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.float16):
            return model(**inputs)

    def gradient(scorer: Scorer, scale: float) -> Tensor:
        loss, _ = scorer.loss(batch, lambda logps: objective.loss(logps, batch.weights_B, totals))
        model.zero_grad()
        (loss * scale).backward()
        return torch.cat([each.grad.flatten() for each in model.parameters()]) / scale

    half, _ = make_scorer(forward, model, CONFIG, torch.float16, CPU)
    assert half.head is not None
    expected = gradient(exact, 1.0)
    for scale in (2.0**8, 2.0**12, 2.0**16):
        at_once = gradient(replace(half, head=None), scale)
        assert (gradient(half, scale) - expected).norm() <= 1.2 * (at_once - expected).norm()
    assert not gradient(half, 2.0**60).isfinite().all()


def test_answers_that_begin_alike_share_their_tokens_and_both_score_them() -> None:
    pair = TokenizedPair([1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], 2, 2)
    batch = pack([pair])
    assert batch.segments == ((4, 0, 1),)
    assert batch.scored == ((3, 4),)
    assert batch.predicts_U.tolist() == [1, 2, 3, 4]
    assert batch.source_S.tolist() == [0, 1, 2, 0, 1, 2, 3]
    model = model_of("qwen2")
    packed, padded = scorers(model)
    expected = graded(padded, collate([pair], pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, batch, LOSSES[0], model), expected)


@pytest.mark.parametrize(
    "pair",
    [
        TokenizedPair([5, 6], [7, 8, 9], 1, 1),  # nothing shared
        TokenizedPair([5, 6, 7], [5, 6], 1, 1),  # one is the beginning of the other
        TokenizedPair([5, 6, 7], [5, 6, 7], 2, 2),  # the same
        TokenizedPair([5, 6], [7, 8], 0, 0),  # no prompt: nothing predicts the first token
    ],
)
def test_odd_pairs(pair: TokenizedPair) -> None:
    model = model_of("llama")
    packed, padded = scorers(model)
    pairs = [pair, *pairs_of(2)]
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)


def test_both_layouts_say_the_same_of_their_rows() -> None:
    pairs = pairs_of(4)
    packed, padded = pack(pairs), collate(pairs, pad_id=0)
    for one, other, pair in zip(packed.chosen_rows(), padded.chosen_rows(), pairs, strict=True):
        assert one.tolist() == other.tolist() == pair.chosen
    moved = packed.to(CPU)
    assert isinstance(moved, PackedBatch)
    assert moved.segments == packed.segments


@pytest.mark.parametrize("kind", PADDED)
def test_models_that_cannot(kind: str) -> None:
    model = tiny_model(kind, **FORMS.get(kind, {}))
    attention = model.config._attn_implementation
    found, reason = make_scorer(model, model, CONFIG, torch.float32, CPU)
    assert (found.is_packed, reason, model.config._attn_implementation) == (False, PADDED[kind], attention)
    with pytest.raises(
        ModelError, match=f"model.layout: packed is not for this model: {PADDED[kind]}; leave it auto"
    ):
        make_scorer(model, model, CONFIG.model_copy(update={"layout": "packed"}), torch.float32, CPU)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_log_probability_that_is_no_number_is_a_difference(side: str) -> None:
    model = model_of("qwen2")
    packed, padded = scorers(model)

    def broken(batch: Batch) -> PairLogps:
        logps = packed.logps(batch)
        return replace(logps, **{side: getattr(logps, side) * torch.nan})

    found = layout_module._difference(SimpleNamespace(logps=broken), padded, model, torch.float32, CPU)
    assert found == "its log-probabilities of packed pairs differ by nan nats per token"


@pytest.mark.parametrize("window", [6, 512])
def test_windows_that_are_in_masks_alone(window: int) -> None:
    """However long: the pairs that are tried beforehand are shorter than most windows."""
    model = model_of(
        "qwen2_moe",
        num_experts=4,
        output_router_logits=False,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=1,
    )
    found, reason = make_scorer(model, model, CONFIG, torch.float32, CPU)
    assert not found.is_packed
    assert reason == "a packed batch fails: packed attention is not told of its sliding window"


def test_a_window_is_that_of_the_layer_or_of_all_layers() -> None:
    layer, config = nn.Module(), SimpleNamespace(sliding_window=4)
    assert not attention_module._slides_by_mask(layer)
    layer.config = config  # type: ignore[assignment]
    assert attention_module._slides_by_mask(layer)
    config.layer_types = ["full_attention", "sliding_attention"]
    assert not attention_module._slides_by_mask(layer)
    layer.sliding_window = 4  # type: ignore[assignment]
    assert attention_module._slides_by_mask(layer)


def test_a_window_that_other_layers_have() -> None:
    """EXAONE 4 keeps it on every layer, and hands it on where it slides."""
    layers = ["sliding_attention", "full_attention"]
    model, pairs = model_of("exaone4", sliding_window=8, layer_types=layers), pairs_of(4, seed=3)
    packed, padded = scorers(model)
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"attn_implementation": "eager"}, "model.attn_implementation is eager"),
        ({"neftune_noise_alpha": 5.0}, "model.neftune_noise_alpha is on"),
        ({"compile": CompileConfig()}, "model.compile is on"),
    ],
)
def test_configs_that_cannot(changed: dict[str, Any], words: str) -> None:
    assert obstacle_of(model_of("qwen2"), CONFIG.model_copy(update=changed)) == words


def test_architectures_that_cannot() -> None:
    model = model_of("qwen2")
    assert obstacle_of(model, CONFIG) is None
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert obstacle_of(model, CONFIG) == "it has layers of chunked_attention"
    noisy = model_of("mixtral", output_router_logits=False, router_jitter_noise=0.1)
    assert obstacle_of(noisy, CONFIG) == "its router is noisy"
    dropping = model_of("gpt2")
    dropping.transformer.drop.p = 0.1
    assert obstacle_of(dropping, CONFIG) == "its dropout is on"


def test_layout_padded_leaves_the_model_alone() -> None:
    model = model_of("qwen2")
    padded = CONFIG.model_copy(update={"layout": "padded"})
    found, reason = make_scorer(model, model, padded, torch.float32, CPU)
    assert (found.is_packed, reason, model.config._attn_implementation) == (
        False,
        "model.layout: padded",
        "sdpa",
    )


def test_a_model_that_does_something_else_with_packed_pairs_is_found_out() -> None:
    """Positions of its own count: what no list knows, the probe sees."""
    model = model_of("qwen2")
    forward = model

    def astray(**inputs: Any) -> Any:
        if "segments" in inputs:
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        return forward(**inputs)

    found, reason = make_scorer(astray, model, CONFIG, torch.float32, CPU)
    assert not found.is_packed
    assert reason is not None
    assert reason.startswith("its log-probabilities of packed pairs differ by ")

    def unable(**inputs: Any) -> Any:
        if "segments" in inputs:
            raise TypeError("forward() got an unexpected keyword argument 'segments'")
        return forward(**inputs)

    _, reason = make_scorer(unable, model, CONFIG, torch.float32, CPU)
    assert reason == "a packed batch fails: forward() got an unexpected keyword argument 'segments'"
    assert model.config._attn_implementation == "sdpa"


def test_a_head_that_does_more_than_it_says_is_left_to_the_model() -> None:
    """A cap under another name: packed, and with the model's own logits."""
    model = model_of("qwen2")
    forward = model

    def capped(**inputs: Any) -> Any:
        return SimpleNamespace(logits=torch.tanh(forward(**inputs).logits))

    found, reason = make_scorer(capped, model, CONFIG, torch.float32, CPU)
    assert (found.is_packed, found.head, reason) == (True, None, None)


@pytest.fixture(params=["_flash", "linear"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Mock]:
    """What attends on a CPU: torch's kernel or products, the first of the two."""
    found = {name: Mock(wraps=getattr(cpu_attention, name)) for name in ("_flash", "linear")}
    for name, it in found.items():
        monkeypatch.setattr(cpu_attention, name, it)
    monkeypatch.setattr(cpu_attention, "_takes_products", lambda *_: request.param == "linear")
    return {request.param: found.pop(request.param), **found}


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("tile", [1, 3, 128])
def test_tiles_are_the_attention_of_whole_rows(
    tile: int, heads: int, groups: int, on_cpu: dict[str, Mock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window wider than any pair asks for the same in another way: by masks over whole rows."""
    monkeypatch.setattr(cpu_attention, "TILE", tile)
    segments = ((5, 8, 7), (0, 2, 3), (4, 1, 0), (3, 0, 4))
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 37, width, 16, dtype=torch.float64, generator=random).transpose(1, 2).requires_grad_()
        for width in (heads, groups, groups)
    )
    upstream = torch.randn(1, 37, heads, 16, dtype=torch.float64, generator=random)
    found = []
    for window in (None, 99):
        out, _ = packed_attention(
            nn.Identity(), query, key, value, None, segments=segments, scaling=0.3, sliding_window=window
        )
        assert out.is_contiguous()
        found.append((out, *torch.autograd.grad(out, (query, key, value), upstream)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert [it.called for it in on_cpu.values()] == [True, False]


@pytest.mark.parametrize(
    ("heads", "tokens", "dtype", "faster", "threads", "expected"),
    [
        (4, 512, torch.float32, True, 1, True),
        (4, 510, torch.float32, True, 1, False),
        (4, 512, torch.float32, True, 2, False),
        (2, 4096, torch.float32, True, 1, False),  # no two heads share keys
        (4, 512, torch.float64, True, 1, False),
        (4, 512, torch.float32, False, 1, False),
    ],
)
def test_products_attend_where_they_are_fast(
    heads: int,
    tokens: int,
    dtype: torch.dtype,
    faster: bool,
    threads: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two pairs whose rows are as many as all of their tokens, since two heads share one of keys."""
    monkeypatch.setattr(onednn_module, "IS_FASTER", faster)
    monkeypatch.setattr(cpu_attention.torch, "get_num_threads", lambda: threads)
    query, key = (torch.empty(1, width, tokens, 8, dtype=dtype) for width in (heads, 2))
    segments = ((tokens // 4, tokens // 8, tokens // 8),) * 2
    assert cpu_attention._takes_products(query, key, segments) is expected


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("on_cpu", ["linear"], indirect=True)
def test_products_have_the_loss_and_gradient_of_padded_pairs(kind: str, on_cpu: dict[str, Mock]) -> None:
    model = model_of(kind)
    pairs = pairs_of(6, seed=3)
    packed, padded = scorers(model)
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)
    by_masks = kind in (
        "mistral",
        "deepseek_v3",
        "minicpm3",
    )  # a window in each layer; values of another width
    assert [it.called for it in on_cpu.values()] == [not by_masks, False]


def by_hand(
    query: Tensor, key: Tensor, value: Tensor, ends_of_queries: Tensor, ends_of_keys: Tensor, *_: int,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's `varlen_attn` says it does: run by run, whose queries belong to the last keys; in fp64."""
    outs = []
    bounds = [ends.tolist() for ends in (ends_of_queries, ends_of_keys)]
    for begin, end, first, last in zip(*(part for ends in bounds for part in (ends, ends[1:])), strict=False):
        q, k, v = query[begin:end], key[first:last], value[first:last]
        behind = torch.arange(last - first) - torch.arange(begin - end, 0)[:, None] - (last - first)
        left, right = window_size
        hidden = behind > right if left < 0 else (behind > right) | (behind < -left)
        bias = torch.zeros(hidden.shape, dtype=torch.double).masked_fill_(hidden, -torch.inf)
        q, k, v = (each.transpose(0, 1).double() for each in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=bias, scale=scale, enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).to(query.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """As on a GPU in half precision, whose kernel is spelt out."""
    spelt_out = Mock(wraps=by_hand)
    monkeypatch.setattr(attention_module, "_takes_runs", lambda *_: True)
    monkeypatch.setattr(attention_module, "varlen_attn", spelt_out)
    return spelt_out


@pytest.mark.parametrize("kind", PACKED)
def test_runs_in_one_call_have_the_loss_and_gradient_of_padded_pairs(kind: str, kernel: Mock) -> None:
    model = model_of(kind)
    odd = [TokenizedPair([5, 6, 7], [5, 6], 1, 1), TokenizedPair([5, 6], [7, 8], 0, 0)]
    pairs = [*odd, *pairs_of(4, seed=3)]
    packed, padded = scorers(model)
    expected = graded(padded, collate(pairs, pad_id=0), LOSSES[0], model)
    kernel.reset_mock()
    assert_same(graded(packed, pack(pairs), LOSSES[0], model), expected)
    assert kernel.call_count == model.config.num_hidden_layers


def one_call_and_one_by_one(
    monkeypatch: pytest.MonkeyPatch, window: int | None, dtype: torch.dtype, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """What attention gives by runs in one call and by masks, and the gradients of both."""
    segments = ((5, 8, 7), (0, 2, 3), (4, 1, 0), (3, 0, 4))
    random = torch.Generator(device).manual_seed(0)
    query, key, value, upstream = (
        torch.randn(1, heads, 37, 64, dtype=dtype, device=device, generator=random) for heads in (6, 2, 2, 6)
    )
    inputs = [each.requires_grad_() for each in (query, key, value)]
    found = []
    for takes_runs in (True, False):
        monkeypatch.setattr(attention_module, "_takes_runs", lambda *_, it=takes_runs: it)
        out, _ = packed_attention(
            nn.Identity(), *inputs, None, segments=segments, scaling=0.3, sliding_window=window
        )
        found.append((out, *torch.autograd.grad(out, inputs, upstream.transpose(1, 2))))
    return zip(*found, strict=True)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_runs_in_one_call_see_what_runs_one_by_one_see(
    window: int | None, kernel: Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for one, other in one_call_and_one_by_one(monkeypatch, window, torch.float64, "cpu"):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert kernel.call_count == 1


def test_tiles_leave_out_the_queries_that_nothing_is_read_of(on_cpu: dict[str, Mock]) -> None:
    """The rest, and the gradients of the rest, are those of all queries."""
    segments, unread = ((5, 8, 7), (0, 2, 3), (4, 1, 0), (3, 0, 4)), (4, 0, 3, 3)
    random = torch.Generator().manual_seed(0)
    query, key, value, upstream = (
        torch.randn(1, 2, 37, 16, dtype=torch.float64, generator=random) for _ in range(4)
    )
    left_out = torch.tensor([0, 1, 2, 3, 25, 26, 27, 30, 31, 32])
    upstream[:, :, left_out] = 0
    inputs = [each.requires_grad_() for each in (query, key, value)]
    found = []
    for spared in (None, unread):
        out, _ = packed_attention(nn.Identity(), *inputs, None, segments=segments, unread=spared)
        gradients = torch.autograd.grad(out, inputs, upstream.transpose(1, 2))
        found.append((out.detach().transpose(1, 2), *gradients))
    assert not found[1][0][:, :, left_out].any()
    found[0][0][:, :, left_out] = 0
    for whole, some in zip(*found, strict=True):
        torch.testing.assert_close(some, whole, rtol=1e-12, atol=1e-12)


def test_what_attention_would_leave_out_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    others: dict[str, Any] = {"softcap": 2.0, "s_aux": torch.zeros(2), "dropout": 0.1}
    with pytest.raises(
        NotImplementedError, match="packed attention has no softcap and no s_aux and no dropout"
    ):
        packed_attention(nn.Module(), states, states, states, None, segments=((1, 1, 1),), **others)


def test_generation_goes_on_as_before() -> None:
    model = model_of("qwen2").eval()
    prompt = torch.tensor([[1, 2, 3, 4]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False)
    scorers(model)
    assert model.config._attn_implementation == NAME
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).tolist() == before.tolist()
