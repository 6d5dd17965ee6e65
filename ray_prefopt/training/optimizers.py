"""Optimizers that were made over a model in one process, made again over the same model in others."""

import io
import pickle
from dataclasses import dataclass
from typing import Any, Self

from ray.cloudpickle import CloudPickler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ray_prefopt.errors import ConfigError


@dataclass(frozen=True)
class PackedOptimizer:
    """An optimizer that the user made over a model, and its schedule, on their way to the workers' models.

    Weights travel by their names; everything else, functions too, as it is.
    """

    payload: bytes

    @classmethod
    def of(cls, optimizer: Optimizer, schedule: LRScheduler | None, model: nn.Module) -> Self:
        """Raises ConfigError when the optimizer has weights that the model has not, or has taken steps."""
        if optimizer.state:
            raise ConfigError("optimizers: the optimizer has taken steps already; give a new one")
        file = io.BytesIO()
        names = {id(weight): name for name, weight in model.named_parameters()}
        _Packer(file, names).dump((optimizer, schedule))  # type: ignore[no-untyped-call]
        return cls(file.getvalue())

    def __call__(self, module: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
        """Both over the weights of the module that have the same names."""
        found: tuple[Optimizer, LRScheduler | None] = _Unpacker(
            io.BytesIO(self.payload), dict(module.named_parameters())
        ).load()
        return found


class _Packer(CloudPickler):
    def __init__(self, file: io.BytesIO, names: dict[int, str]) -> None:
        super().__init__(file)  # type: ignore[no-untyped-call]
        self._names = names

    def persistent_id(self, value: Any) -> str | None:
        if not isinstance(value, nn.Parameter):
            return None
        if id(value) not in self._names:
            raise ConfigError(
                f"optimizers: the optimizer has a weight of shape {tuple(value.shape)} that the model has not; "
                "make it over the parameters of the model that you give"
            )
        return self._names[id(value)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, weights: dict[str, nn.Parameter]) -> None:
        super().__init__(file)
        self._weights = weights

    def persistent_load(self, name: str) -> nn.Parameter:
        return self._weights[name]
