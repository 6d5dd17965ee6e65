"""DeepSpeed ZeRO, stages 0 to 3. The only module that speaks DeepSpeed."""

import copyreg
import io
import logging
import math
import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import PARAM_SHAPES, PARAM_SLICE_MAPPINGS, SINGLE_PARTITION_OF_FP32_GROUPS
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from pydantic import ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from ray_prefopt.config import OptimConfig
from ray_prefopt.engine.base import kept_buffers
from ray_prefopt.engine.optimizer import OwnOptimizer, keep_options, optimizer_for, peak_rates, set_peak_rates
from ray_prefopt.errors import CheckpointError, ConfigError, NonFiniteError, suggest

TAG = "engine"
"""Folder inside a checkpoint that holds DeepSpeed's files."""

# DeepSpeed passes weights_only=False at every load; this makes torch refuse code in a checkpoint all the same.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
torch.serialization.add_safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address])
# Python before 3.11.5 pickles an enum as a call of getattr (python/cpython#105332), which torch refuses.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))
# Only inference uses the shared-memory reduction; leaving it on compiles it with g++ in every process.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed calls collectives by names that torch is about to drop, and torch says so at every call.
warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the memory reports and bars that DeepSpeed prints whatever the log level."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


class _Asked(dict[str, Any]):
    """A dict that knows which keys were looked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def check_ds_config(ds_config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a value of engine.deepspeed that DeepSpeed refuses, and for a key it does not read."""
    asked = _Asked(ds_config)
    try:
        with _quiet():
            DeepSpeedConfig(asked)
    except ValidationError as error:
        found = error.errors()[0]
        name = ".".join(map(str, found["loc"]))
        raise ConfigError(
            f"engine.deepspeed: DeepSpeed does not take {name} {found['input']!r} ({found['msg']})"
        ) from error
    except Exception as error:  # of whatever kind an option's own check raises
        raise ConfigError(f"engine.deepspeed: DeepSpeed does not take it: {error}") from error
    for name in ds_config.keys() - asked.names:
        raise ConfigError(f"engine.deepspeed: DeepSpeed has no option {name}.{suggest(name, asked.names)}")


def sharded_construction(ds_config: Mapping[str, Any]) -> HfDeepSpeedConfig:
    """While the returned object lives, models are built in shards (stage 3): no rank ever holds the whole."""
    return HfDeepSpeedConfig(dict(ds_config))


class _Writer(TorchCheckpointEngine):  # type: ignore[misc]  # DeepSpeed is not typed
    """Keeps an error of writing until saving is over: the other ranks wait in a barrier for this one."""

    failure: Exception | None = None

    def __init__(self) -> None:
        super().__init__(config_params=None)
        self.zipfile_serialization = True

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        try:
            super().save(state_dict, path)
        except Exception as error:
            self.failure = error


class ZeroEngine:
    """A DeepSpeed engine; optimizer states, gradients and weights are sharded by `zero_optimization.stage`."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        total_steps: int,
        ds_config: Mapping[str, Any],
        device: torch.device,
        own_optimizer: OwnOptimizer | None = None,
    ) -> None:
        optimizer, make_schedule = optimizer_for(module, optim, total_steps, own_optimizer)
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # what an earlier engine of this process left on
        with _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                lr_scheduler=make_schedule,
                config=dict(ds_config),
                dist_init_required=False,
            )
        self._writer = _Writer()
        self._engine.checkpoint_engine = self._writer
        self._engine._copy_recovery_script = lambda _: None  # export does what that script does
        self.module = module
        self.device = device
        self.optimizer = self._engine.optimizer
        self.schedule = self._engine.lr_scheduler
        autocast = ds_config["torch_autocast"]
        self._scales_loss = ds_config["fp16"]["enabled"] or (
            autocast["enabled"] and autocast["dtype"] == "float16"
        )
        self._unsharded_norm = math.nan
        self._is_sharded = ds_config["zero_optimization"]["stage"] > 0
        if not self._is_sharded:
            optimizer.register_step_pre_hook(self._clip_unsharded(optim.max_grad_norm))
        self._is_of_config = own_optimizer is None
        self._has_frozen = any(not weight.requires_grad for weight in module.parameters())

    def forward(self, **inputs: Any) -> Any:
        self._engine.training = self.module.training
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; ours is a share of a sum.
        self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def step(self) -> float:
        if (
            not self._is_sharded
        ):  # until its hook says otherwise: torch's scaler leaves out steps that overflow
            self._unsharded_norm, self.optimizer.overflow = math.nan, True
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = self._unsharded_norm if norm is None else float(norm)
        if not math.isfinite(norm) and not self._scales_loss:
            raise NonFiniteError(f"the gradient norm is {norm}")
        return norm

    def _clip_unsharded(self, max_grad_norm: float) -> Callable[..., None]:
        """Stage 0: DeepSpeed reports no norm and has no guard; runs after the reduction, before anything moves."""

        def clip(optimizer: Optimizer, *_: Any) -> None:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            # A fused optimizer gets scaled fp16 gradients, and their scale.
            scale = float(1.0 if (scale := getattr(optimizer, "grad_scale", None)) is None else scale)
            norm = nn.utils.clip_grad_norm_(weights, (max_grad_norm or math.inf) * scale)
            self._unsharded_norm = float(norm) / scale
            self.optimizer.overflow = not math.isfinite(
                self._unsharded_norm
            )  # then DeepSpeed's schedule waits too
            if not math.isfinite(self._unsharded_norm) and not self._scales_loss:
                raise NonFiniteError(f"the gradient norm is {self._unsharded_norm}")

        return clip

    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def save(self, folder: Path) -> None:
        self._writer.failure = None
        scaler = self._unsharded_scaler
        self._engine.save_checkpoint(
            str(folder),
            tag=TAG,
            save_latest=False,
            exclude_frozen_parameters=self._has_frozen,
            client_state={} if scaler is None else {"scaler": scaler.state_dict()},
        )
        if self._writer.failure is not None:
            raise self._writer.failure

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, weight in self.module.named_parameters():
            if weight.requires_grad:
                whole = safe_get_full_fp32_param(weight) if self._is_sharded else weight.detach()
                if dist.get_rank() == 0:
                    found[name] = whole.float().cpu()
        if dist.get_rank() == 0 and not self._has_frozen:
            found |= {name: buffer.cpu() for name, buffer in kept_buffers(self.module).items()}
        return found

    def load(self, folder: Path) -> None:
        if not (folder / TAG).is_dir():
            raise CheckpointError(f"{folder}: holds no DeepSpeed checkpoint named {TAG!r}")
        own_options = [dict(group) for group in self._inner_optimizer.param_groups]
        own_rates = peak_rates(self.schedule)
        own_clip = getattr(self.optimizer, "clip_grad", None)  # which DeepSpeed saves as well
        try:
            path, kept = self._engine.load_checkpoint(
                str(folder), tag=TAG, load_module_strict=not self._has_frozen
            )
        except Exception as error:
            raise CheckpointError(
                f"{folder}: DeepSpeed cannot load it ({type(error).__name__}: {error})"
            ) from error
        assert path is not None  # DeepSpeed only warns when there is nothing, and would train from step 0
        if (scaler := self._unsharded_scaler) is not None and "scaler" in kept:
            scaler.load_state_dict(kept["scaler"])
        if self._engine.load_universal_checkpoint():
            self._mend_universal(own_options)
        if self._is_of_config:
            keep_options(self._inner_optimizer, own_options)
        if own_clip is not None:
            self.optimizer.clip_grad = own_clip
        set_peak_rates(self._inner_optimizer, self.schedule, own_rates)

    def _mend_universal(self, own_options: list[dict[str, Any]]) -> None:
        """Stage 3 loads one step counter for all weights to count up, and the first group's options into all groups."""
        for group, own in zip(self._inner_optimizer.param_groups, own_options, strict=True):
            group["weight_decay"] = own["weight_decay"]
        for state in self._inner_optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    @property
    def _unsharded_scaler(self) -> torch.amp.GradScaler | None:
        """Of losses in half precision at stage 0, which DeepSpeed keeps in no checkpoint."""
        return getattr(self._engine, "torch_autocast_z0_gradscaler", None)

    @property
    def _inner_optimizer(self) -> Optimizer:
        """The one over this rank's shards."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def to_universal(folder: Path, out: Path) -> None:
    """Rewrite a checkpoint into DeepSpeed's universal format, which any number of ranks can load.

    Raises CheckpointError.
    """
    arguments = Namespace(
        input_folder=str(folder / TAG), output_folder=str(out / TAG), num_extract_workers=1, num_merge_workers=1,
        inject_missing_state=True, keep_temp_folder=False, strict=True,
    )  # fmt: skip
    try:
        with _quiet():
            ds_to_universal.main(arguments)
    except KeyError as error:
        raise CheckpointError(
            f"{folder}: DeepSpeed converts the states of Adam alone for another number of workers (no {error} here): "
            "go on with as many as wrote it"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{folder}: DeepSpeed cannot convert it for another number of workers ({type(error).__name__}: {error})"
        ) from error


def _stage_1_weights(folder: Path) -> dict[str, Tensor]:
    """Of stage 1 in bf16, which has a form of its own, that zero_to_fp32 does not read: pieces of flat groups."""
    found = torch.load(next(folder.glob("*_model_states.pt")), map_location="cpu", weights_only=True)
    shapes = {name: shape for group in found[PARAM_SHAPES] for name, shape in group.items()}
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    shards = sorted(
        folder.glob("*_optim_states.pt"), key=lambda path: int(re.findall(r"rank_(\d+)_mp", path.name)[0])
    )
    for shard in shards:
        states = torch.load(shard, map_location="cpu", weights_only=True)["optimizer_state_dict"]
        groups = zip(states[SINGLE_PARTITION_OF_FP32_GROUPS], states[PARAM_SLICE_MAPPINGS], strict=True)
        for flat, places in groups:
            for name, place in places.items():
                pieces[name].append(flat.narrow(0, place.start, place.numel))
    buffers = {name: found["module"][name] for name in found["buffer_names"]}
    return buffers | {name: torch.cat(parts).view(shapes[name]) for name, parts in pieces.items() if parts}


def full_weights(folder: Path) -> dict[str, Tensor]:
    """The trained weights in a checkpoint folder, whole and in fp32, on the CPU."""
    shard = next((folder / TAG).glob("*_optim_states.pt"), None)
    if shard is None:  # stage 0 shards nothing
        states = torch.load(
            folder / TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True
        )
        return dict(states["module"])
    if "zero_stage" not in torch.load(shard, mmap=True, weights_only=True)["optimizer_state_dict"]:
        return _stage_1_weights(folder / TAG)
    with _quiet():
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
