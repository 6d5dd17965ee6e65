"""Training on Ray. The package itself can be called: `ray_prefopt.train(config)` is `ray_prefopt.train.run.train`."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ray_prefopt.config import TrainConfig

if TYPE_CHECKING:
    from ray_prefopt.train.run import TrainResult


class _Callable(ModuleType):
    """Once a module of it is imported, `ray_prefopt.train` is this package, whatever `ray_prefopt` says of `train`."""

    def __call__(self, config: TrainConfig) -> "TrainResult":
        result: TrainResult = import_module(f"{__name__}.run").train(config)
        return result


sys.modules[__name__].__class__ = _Callable
