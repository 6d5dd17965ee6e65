"""From log-probabilities of a micro-batch to its share of the step's loss, and the sums that metrics are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_prefopt.config import CPOLoss, IPOLoss, LossConfig
from ray_prefopt.losses.logps import PairLogps
from ray_prefopt.losses.preference import alpha_reward, cpo_loss, ipo_loss, simpo_loss


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What an optimizer step holds over all ranks and micro-batches; known from the plan before the step begins."""

    pairs: int
    chosen_tokens: int


@dataclass(frozen=True, slots=True)
class Objective:
    """What a loss section asks for, of a micro-batch at a time.

    Weights, (B,), are 1 for a pair and 0 for filler.
    """

    config: LossConfig
    aux_loss_coef: float = 0.0
    """Weight of the router's loss, of models that have one."""

    def loss(self, logps: PairLogps, weights: Tensor, totals: StepTotals) -> Tensor:
        """A scalar whose sum over the step's micro-batches on all ranks is the step's loss."""
        config = self.config
        share = weights.sum() / totals.pairs
        loss = (weights * pair_losses(config, logps)).sum() / totals.pairs
        if config.cpo_alpha:
            loss = loss + config.cpo_alpha * _nll(config, logps, weights, totals)
        if logps.aux_loss is not None:
            loss = loss + self.aux_loss_coef * share * logps.aux_loss
        return loss

    @torch.no_grad()
    def sums(self, logps: PairLogps, weights: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Weighted sums over pairs, (), under TRL's metric names, and this `loss`.

        `nll_loss` is a sum over `nll_weight`: tokens, or pairs where it is averaged over micro-batches.
        """
        chosen, rejected = read_by_loss(self.config, logps)
        reward_chosen, reward_rejected = pair_rewards(self.config, logps)
        per_pair = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "logps_mean/chosen": logps.chosen_mean,
            "logps_mean/rejected": logps.rejected_mean,
            "logps_mean/accuracies": (logps.chosen_mean > logps.rejected_mean).float(),
            "logits/chosen": logps.chosen_logits,
            "logits/rejected": logps.rejected_logits,
            "completions/chosen_length": logps.chosen_len,
            "completions/rejected_length": logps.rejected_len,
        }
        sums = {name: (weights * value).sum() for name, value in per_pair.items()}
        pairs, tokens = weights.sum(), sums["completions/chosen_length"]
        nll = -(weights * logps.chosen).sum()
        if self.config.nll_average == "micro_batch":
            nll, tokens = pairs * nll / tokens.clamp(min=1), pairs
        if logps.aux_loss is not None:
            sums["aux_loss"] = pairs * logps.aux_loss
        return {"loss": loss.detach(), "pairs": pairs, "nll_loss": nll, "nll_weight": tokens, **sums}


def pair_losses(config: LossConfig, logps: PairLogps) -> Tensor:
    """The preference loss of each pair, (B,)."""
    if isinstance(config, IPOLoss):
        return ipo_loss(logps, beta=config.beta, alpha=config.alpha)
    if isinstance(config, CPOLoss):
        return cpo_loss(logps, beta=config.beta, link=config.link, label_smoothing=config.label_smoothing)
    return simpo_loss(
        logps,
        beta=config.beta,
        gamma_beta_ratio=config.gamma_beta_ratio,
        link=config.link,
        label_smoothing=config.label_smoothing,
        alpha=config.alpha,
    )


def read_by_loss(config: LossConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """What the loss reads of the chosen and the rejected completions: CPO the sums, the others the means; (B,) each."""
    if isinstance(config, CPOLoss):
        return logps.chosen, logps.rejected
    return logps.chosen_mean, logps.rejected_mean


def pair_rewards(config: LossConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    """The implicit rewards of the chosen and the rejected completion of each pair, (B,) each."""
    chosen, rejected = read_by_loss(config, logps)
    alpha = getattr(config, "alpha", 0.0)
    return config.beta * alpha_reward(chosen, alpha), config.beta * alpha_reward(rejected, alpha)


def _nll(config: LossConfig, logps: PairLogps, weights: Tensor, totals: StepTotals) -> Tensor:
    """This micro-batch's share of the token-mean negative log-likelihood of the chosen completions, a scalar."""
    nll = -(weights * logps.chosen).sum()
    if config.nll_average == "step":
        return nll / totals.chosen_tokens
    tokens = (weights * logps.chosen_len).sum().clamp(min=1)
    return nll / tokens * (weights.sum() / totals.pairs)
