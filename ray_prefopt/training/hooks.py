"""Python of the user's that runs on the workers beside the loop: it travels with the job, pickled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ray import cloudpickle
from torch import Tensor
from transformers import EvalPrediction, TrainerCallback, TrainingArguments

from ray_prefopt.data.tokenization import TokenizedPair
from ray_prefopt.engine.optimizer import OwnOptimizer
from ray_prefopt.errors import ConfigError

ComputeMetrics: TypeAlias = Callable[[EvalPrediction], Mapping[str, float]]


@dataclass(frozen=True)
class Hooks:
    """What is called at which point; nothing of it is needed for a run."""

    callbacks: tuple[TrainerCallback, ...] = ()
    """Called on every rank; `training.callbacks` says when."""
    arguments: TrainingArguments | None = None
    """What callbacks get as `args`; made from the config when not given."""
    compute_metrics: ComputeMetrics | None = None
    """Further metrics of each evaluation set, from `training.predictions`."""
    preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None
    """From rewards (B, 2) and labels (B,) of a micro-batch to what is kept as predictions, (B, ...)."""
    include_for_metrics: tuple[str, ...] = ()
    """What compute_metrics gets besides: `inputs`, `loss`."""
    keep_predictions: bool = False
    """Return the predictions of `evaluate`."""
    repack: Callable[[list[TokenizedPair]], list[TokenizedPair]] | None = None
    """Applied to the pairs of each micro-batch before they become tensors."""

    own_optimizer: OwnOptimizer | None = None
    """Takes the place of the optim section."""

    @property
    def wants_predictions(self) -> bool:
        return self.compute_metrics is not None or self.keep_predictions


def check_portable(hooks: Hooks) -> None:
    """Raises ConfigError, by name, for what cannot be sent to workers."""
    parts = {f"callbacks[{index}]": callback for index, callback in enumerate(hooks.callbacks)}
    parts |= {name: value for name, value in vars(hooks).items() if name != "callbacks"}
    for name, value in parts.items():
        try:
            cloudpickle.dumps(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        except Exception as error:  # whatever an object's own pickling raises
            raise ConfigError(
                f"{name} cannot be sent to the workers ({type(error).__name__}: {error}): open files, connections and "
                "locks where it is first called, not when it is made"
            ) from error
