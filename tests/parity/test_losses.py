"""Log-probabilities, losses and metrics equal to those of trl's CPOTrainer, on the same tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from ray_prefopt.config import CPOLoss, CPOSimPOLoss, IPOLoss, LossConfig, SimPOLoss
from ray_prefopt.data.collate import collate
from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.losses.logps import PairLogps, token_logps
from ray_prefopt.losses.objective import Objective, StepTotals, pair_losses
from ray_prefopt.model.forward import can_restrict_logits, pair_logps
from ray_prefopt.training.metrics import means
from tests.tiny import tiny_model

pytestmark = pytest.mark.parity

PAD = 0


@dataclass(frozen=True)
class Trl:
    """The arguments of a CPOTrainer that its losses read."""

    loss_type: str
    beta: float
    simpo_gamma: float = 0.0
    label_smoothing: float = 0.0
    alpha: float = 0.0
    cpo_alpha: float = 0.0

    def trainer(self, model: nn.Module | None = None) -> SimpleNamespace:
        """A stand-in with trl's own methods; a real trainer costs a second and a folder."""
        config = getattr(model, "config", None)
        trainer = SimpleNamespace(
            **vars(self),
            accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value),
            is_encoder_decoder=False,
            pad_token_id=PAD,
            aux_loss_enabled=getattr(config, "output_router_logits", False),
            aux_loss_coef=getattr(config, "router_aux_loss_coef", 0.0),
            concatenated_inputs=CPOTrainer.concatenated_inputs,
            get_batch_logps=CPOTrainer.get_batch_logps,
        )
        for name in ("cpo_loss", "concatenated_forward"):
            setattr(trainer, name, MethodType(getattr(CPOTrainer, name), trainer))
        return trainer

    def ours(self) -> LossConfig:
        """The loss section with the same meaning."""
        shared = {"beta": self.beta, "cpo_alpha": self.cpo_alpha, "nll_average": "micro_batch"}
        smoothing = {"label_smoothing": self.label_smoothing}
        if self.loss_type == "ipo":
            return IPOLoss(**shared, alpha=self.alpha)
        if self.loss_type == "simpo":
            ratio = self.simpo_gamma / self.beta
            return CPOSimPOLoss(**shared, **smoothing, gamma_beta_ratio=ratio, alpha=self.alpha)
        return CPOLoss(**shared, **smoothing, link=self.loss_type)


BETAS = st.floats(0.01, 10)
SMOOTHING = st.floats(0, 0.49)
TRL = st.one_of(
    st.builds(Trl, st.just("sigmoid"), BETAS, label_smoothing=SMOOTHING),
    st.builds(Trl, st.just("hinge"), BETAS),
    st.builds(Trl, st.just("ipo"), BETAS, alpha=st.sampled_from([0.0, 0.3, 0.9])),
    st.builds(
        Trl,
        st.just("simpo"),
        BETAS,
        simpo_gamma=st.floats(0, 5),
        label_smoothing=SMOOTHING,
        alpha=st.sampled_from([0.0, 0.0, -0.4, 0.3, 0.99]),
    ),
)
MEANS = st.floats(-8, -1e-3)


@given(TRL, st.lists(st.tuples(MEANS, MEANS, st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4))
def test_losses_and_rewards_equal_trl(arguments: Trl, rows: Sequence[tuple[float, float, int, int]]) -> None:
    chosen, rejected, chosen_len, rejected_len = torch.tensor(rows, dtype=torch.float64).T
    zeros = torch.zeros_like(chosen)
    logps = PairLogps(chosen * chosen_len, rejected * rejected_len, chosen_len, rejected_len, zeros, zeros)
    is_mean = arguments.loss_type in ("ipo", "simpo")  # as concatenated_forward decides
    given_to_trl = (chosen, rejected) if is_mean else (logps.chosen, logps.rejected)
    losses, reward_chosen, reward_rejected = arguments.trainer().cpo_loss(*given_to_trl)
    torch.testing.assert_close(pair_losses(arguments.ours(), logps), losses, rtol=1e-9, atol=1e-9)

    sums = Objective(arguments.ours()).sums(logps, torch.ones_like(chosen), torch.zeros(()))
    rewards = {"rewards/chosen": reward_chosen, "rewards/rejected": reward_rejected}
    for name, reward in rewards.items():
        torch.testing.assert_close(sums[name], reward.sum(), rtol=1e-9, atol=1e-9)


def test_alpha_is_finite_where_trl_is_not() -> None:
    """trl raises an underflown probability to -alpha: inf - inf. AlphaPO's formula itself has a value there."""
    chosen, rejected = torch.tensor([-110.0]), torch.tensor([-120.0])
    assert Trl("simpo", beta=1, alpha=0.5).trainer().cpo_loss(chosen, rejected)[0].isnan().all()
    ones, zeros = torch.ones(1), torch.zeros(1)
    logps = PairLogps(chosen, rejected, ones, ones, zeros, zeros)
    # both rewards are about -1e24, the chosen one far above the other
    assert pair_losses(SimPOLoss(beta=1, alpha=0.5), logps).tolist() == [0.0]


@given(st.data())
def test_token_logps_equal_get_batch_logps(data: st.DataObject) -> None:
    rows, length, vocabulary = (data.draw(st.integers(*bounds)) for bounds in ((1, 3), (2, 8), (2, 20)))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits = 4 * torch.randn(rows, length, vocabulary, generator=rng)
    labels = torch.randint(vocabulary, (rows, length), generator=rng)
    starts = [data.draw(st.integers(1, length - 1)) for _ in range(rows)]
    for row, start in enumerate(starts):
        labels[row, :start] = -100
    is_scored = labels[:, 1:] != -100
    logps, _ = token_logps(logits[:, :-1][is_scored], labels[:, 1:][is_scored])
    ours = torch.stack([part.sum() for part in logps.split(is_scored.sum(1).tolist())])
    torch.testing.assert_close(ours, CPOTrainer.get_batch_logps(logits, labels), rtol=1e-5, atol=1e-5)
    averaged = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    torch.testing.assert_close(ours / is_scored.sum(1), averaged, rtol=1e-5, atol=1e-5)


def random_pairs(count: int, *, seed: int = 0) -> list[TokenizedPair]:
    """Pairs of different lengths, with some prompts that differ in their last token."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        prompt = rng.integers(1, 500, rng.integers(2, 9)).tolist()
        chosen, rejected = (rng.integers(1, 500, rng.integers(1, 12)).tolist() for _ in range(2))
        step_back = index % 2
        found.append(
            TokenizedPair(prompt + chosen, prompt + rejected, len(prompt) - step_back, len(prompt)),
        )
    return found


def trl_batch(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    """The same pairs through trl's collator."""
    rows = []
    for pair in pairs:
        row: dict[str, list[int]] = {"prompt_input_ids": pair.chosen[: pair.chosen_start]}
        for name, ids, start in (
            ("chosen", pair.chosen, pair.chosen_start),
            ("rejected", pair.rejected, pair.rejected_start),
        ):
            row[f"{name}_input_ids"] = ids
            row[f"{name}_labels"] = [-100] * start + ids[start:]
        rows.append(row | {f"{name}_attention_mask": [1] * len(row[f"{name}_input_ids"]) for name in PARTS})
    batch: dict[str, Tensor] = DPODataCollatorWithPadding(pad_token_id=PAD)(rows)
    return batch


PARTS = ("prompt", "chosen", "rejected")
ROUTED = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.02,
}
MODELS: dict[str, dict[str, Any]] = {"qwen2": {}, "llama": {}, "gemma2": {}, "gpt2": {}, "mixtral": ROUTED}


@cache
def model_of(kind: str) -> nn.Module:
    return tiny_model(kind, **MODELS[kind])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_log_probabilities_and_nll_equal_concatenated_forward(kind: str, loss_type: str) -> None:
    pairs, model = random_pairs(3), model_of(kind)
    trainer = Trl(loss_type, beta=1, cpo_alpha=1).trainer(model)
    with torch.no_grad():
        chosen, rejected, _, _, nll, *aux = trainer.concatenated_forward(model, trl_batch(pairs))
        logps = pair_logps(model, collate(pairs, pad_id=PAD), restrict_logits=can_restrict_logits(model))
    ours = (
        (logps.chosen_mean, logps.rejected_mean) if loss_type == "simpo" else (logps.chosen, logps.rejected)
    )
    torch.testing.assert_close(ours, (chosen, rejected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-logps.chosen.sum() / logps.chosen_len.sum(), nll, rtol=1e-5, atol=1e-5)
    if kind == "mixtral":
        torch.testing.assert_close(logps.aux_loss, aux[0], rtol=1e-5, atol=1e-5)
    else:
        assert logps.aux_loss is None
        assert not aux


MICRO_BATCHES = {
    "cpo": Trl("sigmoid", beta=0.1, cpo_alpha=1.0, label_smoothing=0.1),
    "slic": Trl("hinge", beta=0.2, cpo_alpha=0.5),
    "ipo": Trl("ipo", beta=0.3, cpo_alpha=0.2),
    "simpo": Trl("simpo", beta=2.0, simpo_gamma=1.0),
    "cpo_simpo": Trl("simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.05),
    "alphapo": Trl("simpo", beta=2.0, simpo_gamma=1.0, alpha=0.3),
}


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "mixtral"])
@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_loss_gradient_and_metrics_of_a_micro_batch_equal_trl(kind: str, name: str) -> None:
    arguments, pairs, model = MICRO_BATCHES[name], random_pairs(3, seed=1), model_of(kind)
    trainer = arguments.trainer(model)
    expected, metrics = CPOTrainer.get_batch_loss_metrics(trainer, model, trl_batch(pairs))
    expected_gradient = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)

    batch = collate(pairs, pad_id=PAD)
    objective = Objective(arguments.ours(), aux_loss_coef=trainer.aux_loss_coef)
    totals = StepTotals(len(pairs), sum(len(pair.chosen) - pair.chosen_start for pair in pairs))
    logps = pair_logps(model, batch, restrict_logits=can_restrict_logits(model))
    loss = objective.loss(logps, batch.weights_B, totals)
    sums = objective.sums(logps, batch.weights_B, loss)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for one, other in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    ours = means({name: value.item() for name, value in sums.items()}, steps=1)
    # trl's logits/* run over prompt and padding as well; its nll_loss is 0 where the loss has no such term
    compared = {metric for metric in metrics if not metric.startswith("logits/")}
    compared -= set() if arguments.cpo_alpha else {"nll_loss"}
    assert metrics.keys() <= ours.keys()
    assert {metric: ours[metric] for metric in compared} == pytest.approx(
        {metric: metrics[metric] for metric in compared}, rel=1e-5, abs=1e-5
    )
    assert math.isfinite(ours["logits/chosen"])
