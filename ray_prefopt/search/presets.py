"""Published hyperparameters of each loss: ranges to search, and the recipes to try first.

Sources: SimPO is arXiv 2405.14734 with the README and `training_configs` of princeton-nlp/SimPO, where the learning
rate comes first (3e-7 to 1e-6; 1e-5 breaks models), beta of 2 to 2.5 in the paper and up to 10 later, and
gamma_beta_ratio between 0 and 1. CPO is arXiv 2401.08417 with fe1ixxu/ALMA. CPO-SimPO is fe1ixxu/CPO_SIMPO, whose one
published cpo_alpha is 0.05; the range around it is ours. Ranges for low-rank adapters are one to two orders higher, as
in ALMA's 1e-4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_prefopt.search_config import Dimension

FULL_RATES = Dimension(loguniform=(3e-7, 1e-6))
LORA_RATES = Dimension(loguniform=(1e-5, 2e-4))


@dataclass(frozen=True)
class Recipe:
    """One published set of values."""

    name: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """What to search for one loss."""

    space: Mapping[str, Dimension]
    rates: Dimension
    """Of the learning rate, when all weights are trained."""
    recipes: tuple[Recipe, ...]

    def dimensions(self, *, lora: bool) -> dict[str, Dimension]:
        """The space with the learning rates that fit what is trained."""
        return {**self.space, "optim.learning_rate": LORA_RATES if lora else self.rates}


def _simpo(name: str, beta: float, ratio: float, rate: float, **more: float) -> Recipe:
    values = {"loss.beta": beta, "loss.gamma_beta_ratio": ratio, "optim.learning_rate": rate}
    return Recipe(name, values | {f"loss.{key}": value for key, value in more.items()})


def _cpo(name: str, rate: float) -> Recipe:
    return Recipe(name, {"loss.beta": 0.1, "loss.cpo_alpha": 1.0, "optim.learning_rate": rate})


PRESETS = {
    "simpo": Preset(
        space={
            "loss.beta": Dimension(loguniform=(2, 10)),
            "loss.gamma_beta_ratio": Dimension(uniform=(0, 1)),
        },
        rates=FULL_RATES,
        recipes=(
            _simpo("SimPO Llama-3-8B-Instruct v0.2", 10, 0.3, 1e-6),
            _simpo("SimPO Llama-3-8B-Instruct", 2.5, 0.55, 1e-6),
            _simpo("SimPO Llama-3-8B-Base", 2, 0.5, 6e-7),
            _simpo("SimPO Gemma-2-9B-it", 10, 0.5, 8e-7),
            _simpo("SimPO Mistral-7B-Base", 2, 0.8, 3e-7),
            _simpo("SimPO Mistral-7B-Instruct", 2.5, 0.1, 5e-7),
        ),
    ),
    "cpo": Preset(
        space={
            "loss.beta": Dimension(loguniform=(0.01, 0.3)),
            "loss.cpo_alpha": Dimension(loguniform=(0.1, 2)),
        },
        rates=FULL_RATES,
        recipes=(_cpo("CPO Llama-3-8B-Instruct", 1e-6), _cpo("ALMA-R-13B (LoRA)", 1e-4)),
    ),
    "cpo_simpo": Preset(
        space={
            "loss.beta": Dimension(loguniform=(2, 10)),
            "loss.gamma_beta_ratio": Dimension(uniform=(0, 1)),
            "loss.cpo_alpha": Dimension(loguniform=(0.01, 1)),
        },
        rates=FULL_RATES,
        recipes=(_simpo("CPO-SimPO Llama-3-8B-Instruct", 10, 0.54, 1e-6, cpo_alpha=0.05),),
    ),
}
