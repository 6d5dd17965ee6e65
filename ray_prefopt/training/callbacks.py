"""transformers' TrainerCallbacks in the worker loop, with the events and the state that its Trainer gives them."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DistributedType
from fsspec.core import url_to_fs
from ray import cloudpickle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ray_prefopt.config import Interval, TrainConfig
from ray_prefopt.engine.base import Engine
from ray_prefopt.errors import ConfigError
from ray_prefopt.training import ranks
from ray_prefopt.training.checkpoint import Checkpoint

STATE_FILE = "trainer_state.json"
"""In a checkpoint: the TrainerState, with what stateful callbacks keep, under transformers' name for it."""


class Callbacks:
    """Calls each callback on every rank; where their wishes differ between ranks, rank 0's hold.

    Callbacks that are ExportableState go on where they were after a restart, with or without
    restore_callback_states_from_checkpoint.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback],
        arguments: TrainingArguments | None,
        state: TrainerState,
        engine: Engine,
        processing_class: Any,
    ) -> None:
        self.callbacks = list(callbacks)
        if isinstance(state.stateful_callbacks, Mapping):
            _restore(self.callbacks, state.stateful_callbacks)
        self.state = state
        self.control = TrainerControl()
        self._arguments = arguments
        self._values = {
            "model": engine.module,
            "processing_class": processing_class,
            "optimizer": engine.optimizer,
            "lr_scheduler": engine.schedule,
            "train_dataloader": None,
            "eval_dataloader": None,
        }

    def call(self, event: str, **values: Any) -> None:
        """Call an event, `on_step_end` and the like, on all callbacks."""
        for callback in self.callbacks:
            wished = getattr(callback, event)(
                self._arguments, self.state, self.control, **self._values, **values
            )
            self.control = self.control if wished is None else wished

    def at(self, step: int, epoch: float, tokens_seen: int) -> None:
        """A step is done."""
        self.state.global_step, self.state.epoch, self.state.num_input_tokens_seen = step, epoch, tokens_seen

    def begin_step(self) -> None:
        """What is wished from now on is for this step."""
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.call("on_step_begin")

    def expect(self, *, log: bool, evaluate: bool, save: bool) -> None:
        """What the config has for this step, beside what callbacks wished in it; later ones may change both."""
        self.control.should_log |= log
        self.control.should_evaluate |= evaluate
        self.control.should_save |= save

    def measured(self, value: float, *, is_lower_better: bool) -> None:
        """An evaluation gave `value` of the metric that decides."""
        state, best = self.state, self.state.best_metric
        is_better = best is None or (value < best if is_lower_better else value > best)
        if is_better and not math.isnan(value):
            state.best_metric, state.best_global_step = value, state.global_step

    def agree(self) -> TrainerControl:
        """What is to happen now, the same on all ranks. Raises ConfigError for a wish that cannot be met."""
        if self.callbacks:
            self.control = ranks.broadcast(self.control)
        if self.control.should_epoch_stop:
            raise ConfigError(
                "a callback set control.should_epoch_stop: the pairs of every step are fixed before training begins; "
                "set control.should_training_stop, or run.max_steps"
            )
        return self.control

    def text(self) -> str:
        """Content of STATE_FILE."""
        stateful = [callback for callback in self.callbacks if isinstance(callback, ExportableState)]
        kept = TrainerState(**{**asdict(self.state), "stateful_callbacks": stateful})
        return json.dumps(asdict(kept), indent=1, default=float)


def read_state(checkpoint: Checkpoint, *, is_own: bool) -> TrainerState:
    """What a checkpoint has of it; of another run's not what was best, nor what callbacks had counted."""
    fs, folder = url_to_fs(checkpoint.path)
    if not fs.exists(f"{folder}/{STATE_FILE}"):
        return TrainerState()
    state = TrainerState(**json.loads(fs.cat_file(f"{folder}/{STATE_FILE}")))
    if not is_own:
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        state.stateful_callbacks = []
    return state


def _restore(callbacks: Sequence[TrainerCallback], states: Mapping[str, Any]) -> None:
    """Give stateful callbacks what they kept; TrainerState has one state by class, or a list of several."""
    for kind, kept in states.items():
        same = [callback for callback in callbacks if type(callback).__name__ == kind]
        for callback, state in zip(same, kept if isinstance(kept, list) else [kept], strict=False):
            for name, value in state["attributes"].items():
                setattr(callback, name, value)


def on_this_rank(arguments: TrainingArguments, device: torch.device) -> TrainingArguments:
    """Arguments that tell the truth of this rank: what they cached of the process they were made in is not that."""
    kinds = {"cuda": DistributedType.MULTI_GPU, "cpu": DistributedType.MULTI_CPU}
    own = copy.copy(arguments)
    own.distributed_state = SimpleNamespace(  # in the place of accelerate's PartialState
        distributed_type=kinds.get(device.type, DistributedType.NO),
        num_processes=ranks.world_size(),
        process_index=ranks.rank(),
        local_process_index=ranks.local_rank(),
        is_main_process=ranks.rank() == 0,
        is_local_main_process=ranks.local_rank() == 0,
        wait_for_everyone=lambda: ranks.all_gather(None),
    )
    vars(own)["_setup_devices"] = device  # where functools keeps it
    own._n_gpu = int(device.type == "cuda")
    return own


def arguments_of(config: TrainConfig, folder: str, metric: str | None) -> TrainingArguments:
    """What a config is in transformers' words, for callbacks to read. `metric` is run.best_metric, resolved."""
    run, optim = config.run, config.optim
    metric_values: dict[str, Any] = (
        {"metric_for_best_model": metric, "greater_is_better": not run.is_lower_better(metric)}
        if metric
        else {}
    )
    return TrainingArguments(
        output_dir=folder,
        run_name=run.name,
        seed=run.seed,
        use_cpu=not run.use_gpu,
        per_device_train_batch_size=run.micro_batch,
        per_device_eval_batch_size=run.eval_micro_batch or run.micro_batch,
        gradient_accumulation_steps=max(run.global_batch // (run.micro_batch * ranks.world_size()), 1),
        num_train_epochs=run.epochs,
        max_steps=run.max_steps or -1,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        logging_first_step=run.log_first_step,
        save_total_limit=run.keep_checkpoints,
        report_to="none",
        **_strategy("logging", run.log_steps),
        **_strategy("eval", run.eval_steps),
        **_strategy("save", run.save_steps),
        **metric_values,
    )


def _strategy(kind: str, interval: Interval | None) -> dict[str, Any]:
    if interval is None or interval == "epoch":
        # The last step evaluates in any case.
        return {f"{kind}_strategy": "epoch" if interval == "epoch" or kind == "eval" else "no"}
    return {f"{kind}_strategy": "steps", f"{kind}_steps": interval}


@dataclass(frozen=True)
class Returned:
    """Callbacks as they are after training, on their way back to the driver."""

    attributes: tuple[bytes | None, ...]
    """Of each callback, pickled; None for what cannot be."""

    @classmethod
    def of(cls, callbacks: Sequence[TrainerCallback]) -> "Returned":
        return cls(tuple(_pickled(vars(callback)) for callback in callbacks))

    def give_back(self, callbacks: Sequence[TrainerCallback]) -> list[str]:
        """Put the attributes into the driver's own objects; returns the names of callbacks that stay as they were."""
        left = []
        for callback, attributes in zip(callbacks, self.attributes, strict=True):
            if attributes is None:
                left.append(type(callback).__name__)
            else:
                vars(callback).update(cloudpickle.loads(attributes))
        return left


def _pickled(attributes: dict[str, Any]) -> bytes | None:
    try:
        return cloudpickle.dumps(attributes)
    except Exception:  # whatever an object's own pickling raises
        return None
