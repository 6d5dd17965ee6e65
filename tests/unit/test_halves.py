"""Micro-batches in two halves at once have the losses and gradients of whole ones, the same in every run."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ray_prefopt.config import LossConfig, OptimConfig
from ray_prefopt.data.balance import Costs
from ray_prefopt.data.collate import collate, pack
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import Scorer
from ray_prefopt.model.layout import make_scorer
from ray_prefopt.training.halves import HalvedScorer, in_halves
from ray_prefopt.training.metrics import MetricSums
from ray_prefopt.training.step import StepInput, train_step
from tests.unit.test_forward import pairs_of
from tests.unit.test_packed import CONFIG, CPU, LOSSES, assert_same, graded, model_of


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def engine_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> PlainEngine:
    return PlainEngine(model, OptimConfig(learning_rate=0.01), total_steps=4, dtype=dtype, device=CPU)


def scorers_of(engine: PlainEngine) -> tuple[Scorer, Scorer]:
    """In halves, and of the whole."""
    whole, reason = make_scorer(engine.forward, engine.module, CONFIG, engine.dtype, CPU)
    assert reason is None
    return in_halves(whole, engine, Costs()), whole


def assert_halved(
    model: nn.Module, config: LossConfig = LOSSES[0], dtype: torch.dtype = torch.float32
) -> None:
    """Seven pairs of uneven lengths."""
    halved, whole = scorers_of(engine_of(model, dtype))
    assert isinstance(halved, HalvedScorer)
    batch = pack(pairs_of(7, seed=3))
    assert_same(graded(halved, batch, config, model), graded(whole, batch, config, model))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("config", LOSSES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere", "gemma3_text"])
def test_losses_and_gradients_are_those_of_the_whole(kind: str, config: LossConfig) -> None:
    """Also of an NLL that is averaged over the tokens of a micro-batch."""
    assert_halved(model_of(kind), config)


def test_tied_weights_get_the_gradient_of_both() -> None:
    model = model_of("qwen2", tie_word_embeddings=True)
    model.tie_weights()
    assert_halved(model)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]])
def test_adapters(targets: list[str]) -> None:
    """On the head as well, where logits are there at once."""
    model = get_peft_model(model_of("qwen2"), LoraConfig(r=2, target_modules=targets))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    assert_halved(model)


def test_recomputed_activations() -> None:
    model = model_of("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_halved(model)


def test_half_precision_rounds_as_the_whole() -> None:
    model, batch = model_of("llama"), pack(pairs_of(6))
    halved, whole = scorers_of(engine_of(model, torch.bfloat16))
    exact = graded(scorers_of(engine_of(model))[1], batch, LOSSES[0], model)
    distances = [
        max((one[2][name] - exact[2][name]).norm() for name in exact[2])
        for one in (graded(each, batch, LOSSES[0], model) for each in (halved, whole))
    ]
    assert 0 < distances[0] < 1.5 * distances[1]


def steps(count: int = 2) -> tuple[list[Tensor], dict[str, float]]:
    """Weights and metrics after some steps of three micro-batches."""
    engine, metrics, objective = engine_of(model_of("llama")), MetricSums(), Objective(LOSSES[0])
    halved, _ = scorers_of(engine)
    for step in range(count):
        groups = [pairs_of(5, seed=3 * step + micro) for micro in range(3)]
        totals = StepTotals(
            15, sum(len(each.chosen) - each.chosen_start for group in groups for each in group)
        )
        batches = [pack(group) for group in groups]
        train_step(engine, StepInput(step, totals, batches, [[]] * 3), objective, metrics, scorer=halved)
    return [weight.detach().clone() for weight in engine.module.parameters()], metrics.reduce()


def test_steps_repeat_to_the_bit() -> None:
    (weights, record), (again, same_record) = steps(), steps()
    assert record == same_record
    assert all(torch.equal(*each) for each in zip(weights, again, strict=True))


def test_both_halves_run_at_once_by_half_of_the_threads_each() -> None:
    model = model_of("llama")
    halved, _ = scorers_of(engine_of(model))
    threads, both = [], threading.Barrier(2, timeout=60)

    def meet(*_: Any) -> None:
        both.wait()
        threads.append(torch.get_num_threads())

    model.model.norm.register_forward_hook(meet)
    graded(halved, pack(pairs_of(7, seed=3)), LOSSES[0], model)
    assert threads == [1, 1]


def test_work_is_halved_and_not_pairs() -> None:
    """A pair as long as two others is by itself."""
    model = model_of("llama")
    halved, _ = scorers_of(engine_of(model))
    pairs = [
        TokenizedPair([1] * length, [1] * (length - 1) + [2], length - 2, length - 2)
        for length in (11, 20, 10)
    ]
    tokens: list[int] = []
    model.model.norm.register_forward_hook(lambda _, __, out: tokens.append(out.shape[1]))
    graded(halved, pack(pairs), LOSSES[0], model)
    assert sorted(tokens) == [pack(pairs[1:2]).num_tokens, pack(pairs[::2]).num_tokens]


@pytest.mark.parametrize("half", [0, 1])
def test_an_error_in_a_half_is_that_of_the_loss(half: int) -> None:
    """And leaves nothing behind: no thread at work, all threads for what comes."""
    model = model_of("llama")
    halved, _ = scorers_of(engine_of(model))

    def fail(*_: Any) -> None:
        if (threading.current_thread() is threading.main_thread()) == (half == 0):
            raise RuntimeError("no norm today")

    hook = model.model.norm.register_forward_pre_hook(fail)
    batch = pack(pairs_of(7, seed=3))
    with pytest.raises(RuntimeError, match="no norm today"):
        graded(halved, batch, LOSSES[0], model)
    assert torch.get_num_threads() == 2
    hook.remove()
    assert_halved(model)


def test_what_has_no_halves_is_computed_as_a_whole() -> None:
    """A single pair, rows that are padded, and weights with hooks on their gradients, which would be called twice."""
    model = model_of("llama")
    engine = engine_of(model)
    halved, whole = scorers_of(engine)
    pairs = pairs_of(3)
    for batch in (pack(pairs[:1]), collate(pairs, pad_id=0)):
        found, expected = (graded(each, batch, LOSSES[0], model) for each in (halved, whole))
        assert found[0].grad_fn is None
        assert all(torch.equal(found[2][name], each) for name, each in expected[2].items())
    model.lm_head.weight.register_hook(lambda gradient: 3 * gradient)
    found, expected = (graded(each, pack(pairs), LOSSES[0], model) for each in (halved, whole))
    assert all(torch.equal(found[2][name], each) for name, each in expected[2].items())


def test_where_halves_are_not_for() -> None:
    """One thread or an odd number of them, padded pairs, gradients that are scaled, positions that a pass changes."""
    engine = engine_of(model_of("llama"))
    _, whole = scorers_of(engine)
    padded = Scorer(engine.forward)
    assert in_halves(padded, engine, Costs()) is padded
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert in_halves(whole, engine, Costs()) is whole
    torch.set_num_threads(2)
    assert in_halves(whole, engine_of(engine.module, torch.float16), Costs()) is whole
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    moving = engine_of(model_of("llama", rope_parameters=rope))
    scorer, reason = make_scorer(moving.forward, moving.module, CONFIG, torch.float32, CPU)
    assert reason is None
    assert in_halves(scorer, moving, Costs()) is scorer
