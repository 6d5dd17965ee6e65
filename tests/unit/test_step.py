"""One step and one evaluation with the plain engine: what adds up, and what stops a run before anything moves."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_prefopt.config import CPOLoss, CPOSimPOLoss, OptimConfig
from ray_prefopt.data.collate import PairBatch, collate
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.plain import PlainEngine
from ray_prefopt.errors import NonFiniteError
from ray_prefopt.losses.objective import Objective, StepTotals
from ray_prefopt.model.forward import Scorer, can_restrict_logits, pair_logps
from ray_prefopt.training.metrics import MetricSums
from ray_prefopt.training.step import REMEDY, StepInput, evaluate, train_step
from tests.tiny import random_pairs, tiny_model

PAD = 0
LOSS = CPOSimPOLoss(cpo_alpha=0.5)
OBJECTIVE = Objective(LOSS)
GRADIENT = {"name": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
"""Options of an optimizer that moves weights by their gradient."""


def scorer_of(engine: PlainEngine) -> Scorer:
    """Of padded pairs."""
    return Scorer(engine.forward, restrict_logits=can_restrict_logits(engine.module))


def engine_of(
    module: nn.Module | None = None, dtype: torch.dtype = torch.float32, **optim: Any
) -> PlainEngine:
    config = OptimConfig(**{"learning_rate": 1e-2, "warmup_ratio": 0.0, "schedule": "constant", **optim})
    return PlainEngine(
        module if module is not None else tiny_model(),
        config,
        total_steps=10,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def totals_of(pairs: list[TokenizedPair]) -> StepTotals:
    return StepTotals(len(pairs), sum(len(pair.chosen) - pair.chosen_start for pair in pairs))


def inputs_of(pairs: list[TokenizedPair], micro_batch: int, *, step: int = 0) -> StepInput:
    """The pairs as step `step`, with ids from 100 on."""
    starts = range(0, len(pairs), micro_batch)
    return StepInput(
        step,
        totals_of(pairs),
        [collate(pairs[start : start + micro_batch], pad_id=PAD) for start in starts],
        [100 + np.arange(start, min(start + micro_batch, len(pairs))) for start in starts],
    )


def weights_of(engine: PlainEngine) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in engine.module.state_dict().items()}


def run_step(
    inputs: StepInput, objective: Objective = OBJECTIVE
) -> tuple[dict[str, Tensor], float, dict[str, float]]:
    """Weights that moved by the gradient itself, its norm, and the metrics."""
    engine, metrics = engine_of(**GRADIENT), MetricSums()
    norm = train_step(engine, inputs, objective, metrics, scorer=scorer_of(engine))
    return weights_of(engine), norm, metrics.reduce()


# --- what a step does ---


def test_a_step_is_the_gradient_of_the_mean_over_its_pairs() -> None:
    """Each pair by itself, without batches or engine."""
    pairs = random_pairs(4)
    model = tiny_model().train()
    losses, nll, tokens = [], 0.0, 0
    for pair in pairs:
        logps = pair_logps(model, collate([pair], pad_id=PAD))
        margin = logps.chosen_mean - logps.rejected_mean - LOSS.gamma_beta_ratio
        losses.append(-nn.functional.logsigmoid(LOSS.beta * margin))
        nll, tokens = nll - logps.chosen.sum(), tokens + int(logps.chosen_len)
    loss = torch.cat(losses).mean() + LOSS.cpo_alpha * nll / tokens
    expected = torch.autograd.grad(loss, list(model.parameters()))

    engine = engine_of(**GRADIENT)
    start = weights_of(engine)
    metrics = MetricSums()
    norm = train_step(engine, inputs_of(pairs, 2), OBJECTIVE, metrics, scorer=scorer_of(engine))
    for (name, weight), gradient in zip(engine.module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(start[name] - weight.detach(), gradient, rtol=1e-4, atol=1e-6)
    total = torch.stack([gradient.square().sum() for gradient in expected]).sum().sqrt()
    assert norm == pytest.approx(total.item(), rel=1e-5)
    assert metrics.reduce()["loss"] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 8])
def test_the_size_of_micro_batches_changes_nothing(micro_batch: int) -> None:
    pairs = random_pairs(8)
    weights, norm, record = run_step(inputs_of(pairs, micro_batch))
    other_weights, other_norm, other_record = run_step(inputs_of(pairs[::-1], 8))
    assert norm == pytest.approx(other_norm, rel=1e-5)
    assert record == pytest.approx(other_record, rel=1e-5, abs=1e-7)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=1e-6)


def test_filler_changes_nothing() -> None:
    plain = inputs_of(random_pairs(3), 3)
    filler = collate(random_pairs(1, seed=9), pad_id=PAD, weight=0.0)
    filled = StepInput(0, plain.totals, [*plain.micro_batches, filler], [*plain.micro_ids, np.array([])])
    weights, norm, record = run_step(plain)
    other_weights, other_norm, other_record = run_step(filled)
    assert (norm, record) == (other_norm, other_record)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=0)


def test_training_lowers_the_loss() -> None:
    engine, metrics, inputs = engine_of(), MetricSums(), inputs_of(random_pairs(4), 2)
    losses = []
    for _ in range(5):
        train_step(engine, inputs, OBJECTIVE, metrics, scorer=scorer_of(engine))
        losses.append(metrics.reduce()["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


# --- what is not finite ---


def poisoned(token: int, value: float) -> nn.Module:
    """A model that has `value` in the embedding of one token."""
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[token, 0] = value
    return model


def assert_unmoved(engine: PlainEngine, start: dict[str, Tensor]) -> None:
    for name, weight in weights_of(engine).items():
        assert torch.equal(weight.view(torch.int32), start[name].view(torch.int32)), (
            name
        )  # NaN equals itself here


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_that_is_not_finite_is_named_before_anything_moves(value: float, dtype: torch.dtype) -> None:
    """In fp16 too, where a gradient that overflows is left out without a word."""
    pairs = random_pairs(6)
    pairs[4] = TokenizedPair([1, 511, 2], [1, 511, 3], 2, 2)
    engine, metrics = engine_of(poisoned(511, value), dtype), MetricSums()
    start = weights_of(engine)
    with pytest.raises(NonFiniteError) as caught:
        train_step(engine, inputs_of(pairs, 2, step=6), OBJECTIVE, metrics, scorer=scorer_of(engine))
    assert str(caught.value) == (
        "step 7, rank 0: the loss of micro-batch 2 is nan, pair ids [104, 105]; nothing was updated. "
        + REMEDY
    )
    assert_unmoved(engine, start)
    assert engine.learning_rate() == 1e-2


def test_a_gradient_that_is_not_finite_stops_before_anything_moves() -> None:
    class RootOfZero(Objective):
        def loss(self, logps: Any, weights: Tensor, totals: StepTotals) -> Tensor:
            loss = super().loss(logps, weights, totals)
            return loss + (0 * logps.chosen.sum()).sqrt()  # 0, with an infinite derivative

    engine = engine_of()
    start = weights_of(engine)
    with pytest.raises(NonFiniteError) as caught:
        train_step(
            engine,
            inputs_of(random_pairs(2), 1, step=2),
            RootOfZero(LOSS),
            MetricSums(),
            scorer=scorer_of(engine),
        )
    assert str(caught.value) == (
        "step 3: the gradient norm is nan, though every loss is finite; nothing was updated. " + REMEDY
    )
    assert_unmoved(engine, start)


# --- evaluation ---


def batches_of(pairs: list[TokenizedPair], micro_batch: int) -> list[PairBatch]:
    return list(inputs_of(pairs, micro_batch).micro_batches)


def test_an_evaluation_is_the_mean_over_all_pairs() -> None:
    pairs = random_pairs(5)
    objective = Objective(CPOLoss(beta=0.1, cpo_alpha=1.0))
    engine = engine_of()
    start = weights_of(engine)
    filler = collate(pairs[:1], pad_id=PAD, weight=0.0)
    found = evaluate(
        engine, [*batches_of(pairs, 2), filler], objective, totals_of(pairs), scorer=scorer_of(engine)
    )

    with torch.no_grad():
        singles = [pair_logps(engine.module, collate([pair], pad_id=PAD)) for pair in pairs]
    margins = [float(one.chosen - one.rejected) for one in singles]
    tokens = sum(float(one.chosen_len) for one in singles)
    nll = -sum(float(one.chosen) for one in singles) / tokens
    preference = [-float(nn.functional.logsigmoid(torch.tensor(0.1 * margin))) for margin in margins]
    assert found["loss"] == pytest.approx(np.mean(preference) + nll, rel=1e-5)
    assert found["nll_loss"] == pytest.approx(nll, rel=1e-5)
    assert found["rewards/margins"] == pytest.approx(0.1 * np.mean(margins), rel=1e-4)
    assert found["rewards/accuracies"] == pytest.approx(np.mean([margin > 0 for margin in margins]))
    assert found["completions/chosen_length"] == tokens / 5

    assert_unmoved(engine, start)
    assert all(weight.grad is None for weight in engine.module.parameters())
    assert engine.module.training


def test_dropout_is_off_while_evaluating() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    engine, pairs = engine_of(model), random_pairs(3)
    one, two = (
        evaluate(engine, batches_of(pairs, 2), OBJECTIVE, totals_of(pairs), scorer=scorer_of(engine))
        for _ in range(2)
    )
    assert one == two
    assert all(module.training for module in model.modules())
