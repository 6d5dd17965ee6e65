"""Training on Ray.

The package has the name of its main function and can be called like it: `from ray_prefopt import train` gives the one
or the other, depending on what was imported before.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("ray_prefopt.train.run").train(*args, **options)


sys.modules[__name__].__class__ = _Package
