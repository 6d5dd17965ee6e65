"""Preference fine-tuning (SimPO, CPO, CPO-SimPO) of causal language models on a Ray cluster.

What each command of `ray-prefopt` does is a function here: `train`, `prepare_data`, `evaluate`, `export`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import PrefoptError
from ray_prefopt.settings import load_config

if TYPE_CHECKING:
    from ray_prefopt.training.export import export
    from ray_prefopt.training.run import EvalResult, TrainResult, evaluate, prepare_data, train

__version__ = "0.1.0"
__all__ = [
    "EvalResult",
    "PrefoptError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "export",
    "load_config",
    "prepare_data",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load torch and Ray when something that needs them is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        import_module("ray_prefopt.training.export" if name == "export" else "ray_prefopt.training.run"), name
    )
