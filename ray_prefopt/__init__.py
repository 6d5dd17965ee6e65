"""Preference fine-tuning (SimPO, CPO, CPO-SimPO) of language models on a Ray cluster.

What each command of `ray-prefopt` does is a function here: `train`, `tune`, `prepare_data`, `evaluate`,
`export`.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_prefopt.config import TrainConfig
from ray_prefopt.errors import PrefoptError
from ray_prefopt.search_config import SearchConfig, TuneConfig
from ray_prefopt.settings import load_config, load_tune_config

if TYPE_CHECKING:
    from ray_prefopt.compat.config import CPOConfig, SimPOConfig
    from ray_prefopt.compat.trainer import CPOTrainer, SimPOTrainer
    from ray_prefopt.search.tune import TuneResult, tune
    from ray_prefopt.training.export import export
    from ray_prefopt.training.folder import TrainResult
    from ray_prefopt.training.hooks import Hooks
    from ray_prefopt.training.run import EvalResult, evaluate, prepare_data, train

# bitsandbytes, which peft imports, warns of a faster kernel at every start, and of a cast in each layer of each step.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
__all__ = [
    "CPOConfig",
    "CPOTrainer",
    "EvalResult",
    "Hooks",
    "PrefoptError",
    "SearchConfig",
    "SimPOConfig",
    "SimPOTrainer",
    "TrainConfig",
    "TrainResult",
    "TuneConfig",
    "TuneResult",
    "evaluate",
    "export",
    "load_config",
    "load_tune_config",
    "prepare_data",
    "train",
    "tune",
]
_HOMES = {
    "CPOConfig": "ray_prefopt.compat.config",
    "CPOTrainer": "ray_prefopt.compat.trainer",
    "Hooks": "ray_prefopt.training.hooks",
    "SimPOConfig": "ray_prefopt.compat.config",
    "SimPOTrainer": "ray_prefopt.compat.trainer",
    "TrainResult": "ray_prefopt.training.folder",
    "TuneResult": "ray_prefopt.search.tune",
    "export": "ray_prefopt.training.export",
    "tune": "ray_prefopt.search.tune",
}
"""Modules of names that are loaded late; the others are in `training.run`."""


def __getattr__(name: str) -> Any:
    """Load torch and Ray when something that needs them is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "ray_prefopt.training.run")), name)
