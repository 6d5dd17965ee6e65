"""Every loss against numbers worked out by hand, its gradient against finite differences, and the shares of a step."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ray_prefopt.config import CPOLoss, CPOSimPOLoss, IPOLoss, LossConfig, SimPOLoss
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.objective import Objective, StepTotals, pair_losses
from ray_prefopt.losses.preference import alpha_reward, cpo_loss, ipo_loss, simpo_loss


def pairs(
    chosen: list[float], rejected: list[float], chosen_len: list[float], rejected_len: list[float]
) -> PairLogps:
    columns = [
        torch.tensor(column, dtype=torch.float64) for column in (chosen, rejected, chosen_len, rejected_len)
    ]
    return PairLogps(*columns, torch.full_like(columns[0], 0.5), torch.full_like(columns[0], -0.5))


# Sums -2 and -6, means -1 and -2: CPO is 4 ahead, SimPO 1.
ONE = pairs([-2], [-6], [2], [3])
# Mean probabilities 1/4 and 1/16, so that powers of them are whole numbers.
POWERS = pairs([-3 * math.log(4)], [-2 * math.log(16)], [3], [2])

BY_HAND = {
    # log(1 + e^-2), since beta * 4 = 2
    "cpo": (CPOLoss(beta=0.5), ONE, 0.126928011),
    # 0.9 log(1 + e^-2) + 0.1 log(1 + e^2) = log(1 + e^-2) + 0.1 * 2
    "cpo, smoothed": (CPOLoss(beta=0.5, label_smoothing=0.1), ONE, 0.326928011),
    # 1 - 0.1 * 4
    "cpo, hinge": (CPOLoss(beta=0.1, link="hinge"), ONE, 0.6),
    # 1 - 0.5 * 4 is below 0
    "cpo, hinge, far enough": (CPOLoss(beta=0.5, link="hinge"), ONE, 0.0),
    # (1 - 1 / 0.2)^2
    "ipo": (IPOLoss(beta=0.1), ONE, 16.0),
    # r(1/4) = (1 - 2) / 0.5 = -2, r(1/16) = (1 - 4) / 0.5 = -6: (4 - 5)^2
    "ipo, alpha": (IPOLoss(beta=0.1, alpha=0.5), POWERS, 1.0),
    # log(1 + e^-1), since 2 * (1 - 0.5) = 1
    "simpo": (SimPOLoss(beta=2, gamma_beta_ratio=0.5), ONE, 0.313261688),
    # log(1 + e^-1) + 0.2 * 1
    "simpo, smoothed": (SimPOLoss(beta=2, gamma_beta_ratio=0.5, label_smoothing=0.2), ONE, 0.513261688),
    # 1 - 0.5 * (1 - 0.5)
    "simpo, hinge": (SimPOLoss(beta=0.5, gamma_beta_ratio=0.5, link="hinge"), ONE, 0.75),
    # log(1 + e^-(0.25 * (4 - 2))) = log(1 + e^-0.5)
    "alphapo": (SimPOLoss(beta=0.25, gamma_beta_ratio=2, alpha=0.5), POWERS, 0.474076984),
    # r(1/4) = (1 - 1/2) / -0.5 = -1, r(1/16) = (1 - 1/4) / -0.5 = -1.5: log(1 + e^-(2 * 0.5))
    "alphapo, negative alpha": (SimPOLoss(beta=2, gamma_beta_ratio=0, alpha=-0.5), POWERS, 0.313261688),
    # the preference term of CPO-SimPO is SimPO's
    "cpo_simpo": (CPOSimPOLoss(beta=2, gamma_beta_ratio=0.5), ONE, 0.313261688),
}


@pytest.mark.parametrize(("config", "logps", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_losses_by_hand(config: LossConfig, logps: PairLogps, expected: float) -> None:
    assert pair_losses(config, logps).tolist() == pytest.approx([expected], abs=1e-9)


def test_losses_of_several_pairs_do_not_mix() -> None:
    both = pairs([-2, -3], [-6, -3], [2, 3], [3, 3])
    # the second pair is a draw: log 2 for CPO, log(1 + e^1) for SimPO with beta * ratio = 1
    assert cpo_loss(both, beta=0.5).tolist() == pytest.approx([0.126928011, math.log(2)])
    assert simpo_loss(both, beta=2, gamma_beta_ratio=0.5).tolist() == pytest.approx(
        [0.313261688, 1.313261688]
    )


def test_alpha_reward_by_hand_and_towards_zero() -> None:
    logps = torch.tensor([-1.0, -0.25, 0.0], dtype=torch.float64)
    assert alpha_reward(logps, 1.0).tolist() == pytest.approx([1 - math.e, 1 - math.exp(0.25), 0.0])
    assert alpha_reward(logps, 0.0) is logps
    # r(l) = l - alpha l^2 / 2 + ..., so that it goes over into the log-probability
    assert alpha_reward(logps, 1e-9).tolist() == pytest.approx(logps.tolist(), abs=1e-9)


def test_alpha_reward_stays_exact_where_the_textbook_form_cancels_or_underflows() -> None:
    def textbook(logps: Tensor, alpha: float) -> Tensor:
        return (1 - logps.exp().pow(-alpha)) / alpha

    small = torch.tensor([-1.0])
    assert abs(textbook(small, 1e-6) + 1).item() > 0.04  # 1 - 1.00000095 keeps one digit in fp32
    assert alpha_reward(small, 1e-6).item() == pytest.approx(-1.0000005, rel=1e-6)

    far = torch.tensor([-110.0, -120.0])  # their probabilities are 0 in fp32
    assert textbook(far, 0.5).tolist() == [-math.inf, -math.inf]
    assert alpha_reward(far, 0.5).tolist() == pytest.approx(
        [-2 * math.expm1(55), -2 * math.expm1(60)], rel=1e-5
    )
    logps = pairs([-110], [-120], [1], [1])
    assert simpo_loss(logps, beta=1, gamma_beta_ratio=0, alpha=0.5).item() == 0.0


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_losses_of_extreme_margins_are_finite_with_finite_gradients(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    logps = PairLogps(chosen, torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1), torch.zeros(1))
    cpo_loss(logps, beta=1, label_smoothing=0.1).sum().backward()
    # -0.9 (1 - s) + 0.1 s with s = sigmoid(margin) in {0, 1}
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(0.1 if margin > 0 else -0.9)


@pytest.mark.parametrize(
    "config",
    [
        CPOLoss(beta=0.3, label_smoothing=0.1),
        CPOLoss(beta=0.3, link="hinge"),
        IPOLoss(beta=0.4, alpha=0.3),
        SimPOLoss(beta=2, gamma_beta_ratio=0.4),
        SimPOLoss(beta=0.5, gamma_beta_ratio=0.4, link="hinge"),
        CPOSimPOLoss(beta=2, alpha=0.7, cpo_alpha=0.5),
        CPOSimPOLoss(beta=2, alpha=-0.7, cpo_alpha=0.5, nll_average="micro_batch"),
    ],
    ids=lambda config: f"{config.kind}-{config.nll_average}",
)
def test_gradients_match_finite_differences(config: LossConfig) -> None:
    objective = Objective(config, aux_loss_coef=0.1)
    lens = torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)
    weights = torch.ones(2, dtype=torch.float64)

    def loss(chosen: Tensor, rejected: Tensor, aux: Tensor) -> Tensor:
        logps = PairLogps(chosen, rejected, *lens, torch.zeros(2), torch.zeros(2), aux_loss=aux)
        return objective.loss(logps, weights, StepTotals(pairs=4, chosen_tokens=11))

    values = ([-2.0, -7.0], [-3.5, -6.0], 1.5)
    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    assert torch.autograd.gradcheck(loss, inputs)


def test_nll_average_step_and_micro_batch_by_hand() -> None:
    # chosen tokens: 2 of log p = -1, then 6 of -3; no margin, so each pair costs log 2
    first, second = pairs([-2], [-2], [2], [2]), pairs([-18], [-18], [6], [6])
    together = pairs([-2, -18], [-2, -18], [2, 6], [2, 6])
    totals = StepTotals(pairs=2, chosen_tokens=8)

    def step_loss(nll_average: str, micro_batches: list[PairLogps]) -> float:
        config = CPOLoss(beta=0.1, cpo_alpha=0.5, nll_average=nll_average)
        objective = Objective(config)
        shares = [objective.loss(logps, torch.ones_like(logps.chosen), totals) for logps in micro_batches]
        return float(sum(shares))

    # step: (2 + 18) / 8 = 2.5, however the pairs are grouped
    assert step_loss("step", [first, second]) == pytest.approx(math.log(2) + 0.5 * 2.5)
    assert step_loss("step", [together]) == pytest.approx(math.log(2) + 0.5 * 2.5)
    # micro_batch: the mean of 2 / 2 and 18 / 6 is 2; in one micro-batch it is 2.5 again
    assert step_loss("micro_batch", [first, second]) == pytest.approx(math.log(2) + 0.5 * 2.0)
    assert step_loss("micro_batch", [together]) == pytest.approx(math.log(2) + 0.5 * 2.5)


def test_aux_loss_is_added_by_the_share_of_pairs() -> None:
    logps = replace(pairs([-1], [-1], [1], [1]), aux_loss=torch.tensor(3.0, dtype=torch.float64))
    objective = Objective(CPOLoss(cpo_alpha=0), aux_loss_coef=0.1)
    loss = objective.loss(logps, torch.ones(1), StepTotals(pairs=4, chosen_tokens=4))
    sums = objective.sums(logps, torch.ones(1), loss)
    # one pair of four: (log 2 + 0.1 * 3) / 4
    assert loss.item() == pytest.approx((math.log(2) + 0.3) / 4)
    assert sums["aux_loss"].item() == 3.0


@pytest.mark.parametrize("nll_average", ["step", "micro_batch"])
def test_filler_counts_for_nothing(nll_average: str) -> None:
    logps = replace(pairs([-1], [-2], [1], [1]), aux_loss=torch.tensor(3.0))
    objective = Objective(CPOLoss(nll_average=nll_average), aux_loss_coef=0.1)
    loss = objective.loss(logps, torch.zeros(1), StepTotals(pairs=4, chosen_tokens=4))
    sums = objective.sums(logps, torch.zeros(1), loss)
    assert loss.item() == 0.0
    assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(sums, 0.0)


def test_metric_sums_by_hand() -> None:
    logps = pairs([-2, -9], [-6, -4], [2, 3], [3, 4])
    loss = torch.tensor(3.0, requires_grad=True)

    def read(config: LossConfig) -> dict[str, float]:
        sums = Objective(config).sums(logps, torch.ones(2), loss)
        assert not any(value.requires_grad for value in sums.values())
        return {name: value.item() for name, value in sums.items()}

    shared = {
        "loss": 3.0,
        "pairs": 2.0,
        "nll_loss": 11.0,
        "nll_weight": 5.0,  # tokens
        "completions/chosen_length": 5.0,
        "completions/rejected_length": 7.0,
        "logps_mean/chosen": -4.0,  # -1, -3
        "logps_mean/rejected": -3.0,  # -2, -1
        "logps_mean/accuracies": 1.0,
        "logits/chosen": 1.0,
        "logits/rejected": -1.0,
        "rewards/accuracies": 1.0,  # the first pair is right, the second wrong
    }
    cpo = read(CPOLoss(beta=0.5, cpo_alpha=0))
    rewards = {"rewards/chosen": -5.5, "rewards/rejected": -5.0, "rewards/margins": -0.5}
    assert cpo == pytest.approx(shared | rewards | {"logps/chosen": -11, "logps/rejected": -10})
    by_micro_batch = read(CPOLoss(nll_average="micro_batch"))
    assert (by_micro_batch["nll_loss"], by_micro_batch["nll_weight"]) == (
        pytest.approx(2 * 11 / 5),
        2.0,
    )  # pairs
    simpo = read(SimPOLoss(beta=2))  # the target margin is no part of a reward
    rewards = {"rewards/chosen": -8.0, "rewards/rejected": -6.0, "rewards/margins": -2.0}
    assert simpo == pytest.approx(shared | rewards | {"logps/chosen": -4, "logps/rejected": -3})
    # rewards of AlphaPO are the transformed ones: 1 - 1/p
    alpha = read(SimPOLoss(beta=1, alpha=1))
    assert alpha["rewards/chosen"] == pytest.approx((1 - math.e) + (1 - math.e**3))


@given(
    chosen=st.floats(-30, -0.01),
    rejected=st.floats(-30, -0.01),
    beta=st.floats(0.01, 10),
    ratio=st.floats(0, 2),
)
def test_identities_between_losses(chosen: float, rejected: float, beta: float, ratio: float) -> None:
    logps = pairs([chosen], [rejected], [1], [1])
    swapped = pairs([rejected], [chosen], [1], [1])
    loss = simpo_loss(logps, beta=beta, gamma_beta_ratio=ratio).item()
    # one token each: mean = sum, so SimPO without margin is CPO
    assert simpo_loss(logps, beta=beta, gamma_beta_ratio=0).item() == cpo_loss(logps, beta=beta).item()
    # log sigmoid(x) - log sigmoid(-x) = x
    mirror = cpo_loss(swapped, beta=beta).item()
    assert mirror - cpo_loss(logps, beta=beta).item() == pytest.approx(beta * (chosen - rejected), abs=1e-9)
    # a larger margin is harder to reach, and IPO is least where the difference is 1 / (2 beta)
    assert loss >= cpo_loss(logps, beta=beta).item()
    assert ipo_loss(
        pairs([rejected + 1 / (2 * beta)], [rejected], [1], [1]), beta=beta
    ).item() == pytest.approx(0)
