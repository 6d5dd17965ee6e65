"""Preference fine-tuning (SimPO, CPO, CPO-SimPO) of causal language models on a Ray cluster.

What each command of `ray-prefopt` does is a function here: `train`, `prepare_data`, `evaluate`, `export`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import PrefoptError
from ray_prefopt.settings import load_config

if TYPE_CHECKING:
    from ray_prefopt.compat.config import CPOConfig, SimPOConfig
    from ray_prefopt.compat.trainer import CPOTrainer, SimPOTrainer
    from ray_prefopt.training.export import export
    from ray_prefopt.training.run import EvalResult, TrainResult, evaluate, prepare_data, train

__version__ = "0.1.0"
__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "EvalResult",
    "PrefoptError",
    "SimPOConfig",
    "SimPOTrainer",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "export",
    "load_config",
    "prepare_data",
    "train",
]
_HOMES = {
    "CPOConfig": "ray_prefopt.compat.config",
    "CPOTrainer": "ray_prefopt.compat.trainer",
    "SimPOConfig": "ray_prefopt.compat.config",
    "SimPOTrainer": "ray_prefopt.compat.trainer",
    "export": "ray_prefopt.training.export",
}
"""Modules of names that are loaded late; the others are in `training.run`."""


def __getattr__(name: str) -> Any:
    """Load torch and Ray when something that needs them is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "ray_prefopt.training.run")), name)
