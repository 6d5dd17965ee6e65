"""The preference losses: arithmetic on (B,) vectors, nothing else.

`margin` is what the chosen completion is ahead by: the difference of the two (transformed) log-probabilities, less a
target margin where the loss has one.
"""

import torch.nn.functional as F
from torch import Tensor

from ray_prefopt.losses.logps import PairLogps


def alpha_reward(logps: Tensor, alpha: float) -> Tensor:
    """AlphaPO's reward (1 - p^-alpha) / alpha of log-probabilities (arXiv 2501.03884, equation 5); alpha 0 gives log p.

    Written with expm1, so that it neither underflows nor cancels where (1 - exp(logp) ** -alpha) / alpha does.
    """
    if alpha == 0:
        return logps
    return -(-alpha * logps).expm1() / alpha


def sigmoid_loss(margin: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry: -log sigmoid(beta * margin), mixed with its mirror image by label_smoothing. Returns (B,)."""
    loss = -F.logsigmoid(beta * margin)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-beta * margin)


def hinge_loss(margin: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge max(0, 1 - beta * margin) (arXiv 2305.10425). Returns (B,)."""
    return F.relu(1 - beta * margin)


def ipo_loss(logps: PairLogps, *, beta: float, alpha: float = 0.0) -> Tensor:
    """IPO on mean log-probabilities: (margin - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17). Returns (B,)."""
    margin = alpha_reward(logps.chosen_mean, alpha) - alpha_reward(logps.rejected_mean, alpha)
    return (margin - 1 / (2 * beta)) ** 2


def cpo_loss(logps: PairLogps, *, beta: float, link: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """CPO's preference term: summed log-probabilities, no reference (arXiv 2401.08417, equation 5). Returns (B,)."""
    return _linked(logps.chosen - logps.rejected, beta, link, label_smoothing)


def simpo_loss(
    logps: PairLogps,
    *,
    beta: float,
    gamma_beta_ratio: float,
    link: str = "sigmoid",
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """SimPO: mean log-probabilities and a target margin (arXiv 2405.14734, equation 6). Returns (B,).

    `alpha` other than 0 makes it AlphaPO; the target margin stays gamma_beta_ratio, as in TRL.
    """
    margin = alpha_reward(logps.chosen_mean, alpha) - alpha_reward(logps.rejected_mean, alpha)
    return _linked(margin - gamma_beta_ratio, beta, link, label_smoothing)


def _linked(margin: Tensor, beta: float, link: str, label_smoothing: float) -> Tensor:
    if link == "hinge":
        return hinge_loss(margin, beta=beta)
    return sigmoid_loss(margin, beta=beta, label_smoothing=label_smoothing)
