"""Data parallelism in torch alone: whole weights on every rank, one gradient reduction per step."""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ray_prefopt.config import OptimConfig
from ray_prefopt.engine.base import kept_buffers
from ray_prefopt.engine.optimizer import OwnOptimizer, keep_options, optimizer_for, peak_rates, set_peak_rates
from ray_prefopt.errors import CheckpointError, NonFiniteError


class PlainEngine:
    """Weights, gradients and optimizer states in fp32; bf16 or fp16 is autocast. The reference for `zero`."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        total_steps: int,
        dtype: torch.dtype,
        device: torch.device,
        own_optimizer: OwnOptimizer | None = None,
    ) -> None:
        self.module = module.to(device=device, dtype=torch.float32)
        self.device = device
        self.dtype = dtype
        self._max_grad_norm = optim.max_grad_norm or math.inf
        self.optimizer, make_schedule = optimizer_for(self.module, optim, total_steps, own_optimizer)
        self.schedule = make_schedule(self.optimizer)
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self._is_of_config = own_optimizer is None
        self._trainable = [weight for weight in self.module.parameters() if weight.requires_grad]

    def forward(self, **inputs: Any) -> Any:
        with self._autocast():
            return self.module(**inputs)

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> float:
        for weight in self._trainable:
            if weight.grad is None:  # a rank without this expert's tokens still takes part in the sum
                weight.grad = torch.zeros_like(weight)
        if dist.is_initialized() and dist.get_world_size() > 1:
            # All at once: one after the other, small ones would each wait for the network.
            for sent in [dist.all_reduce(weight.grad, async_op=True) for weight in self._trainable]:
                sent.wait()
        self._scaler.unscale_(self.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self._trainable, self._max_grad_norm))
        if not math.isfinite(norm) and not self._scaler.is_enabled():
            raise NonFiniteError(f"the gradient norm is {norm}")
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if math.isfinite(norm):  # else the scaler has left the step out
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def save(self, folder: Path) -> None:
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        save_model(self.module, str(folder / "model.safetensors"))
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        torch.save(states, folder / "engine.pt")

    def weights(self) -> dict[str, Tensor]:
        if dist.is_initialized() and dist.get_rank() > 0:
            return {}
        named = dict(self.module.named_parameters())
        trained = {name: weight.detach() for name, weight in named.items() if weight.requires_grad}
        others = kept_buffers(self.module) if len(trained) == len(named) else {}
        return {name: each.cpu() for name, each in {**trained, **others}.items()}

    def load(self, folder: Path) -> None:
        own_rates = peak_rates(self.schedule)
        own_options = [dict(group) for group in self.optimizer.param_groups]
        try:
            load_model(self.module, str(folder / "model.safetensors"))
            states = torch.load(folder / "engine.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(states["optimizer"])
            self.schedule.load_state_dict(states["schedule"])
            self._scaler.load_state_dict(states["scaler"])
        except Exception as error:
            raise CheckpointError(f"{folder}: cannot be loaded into this model: {error}") from error
        if self._is_of_config:
            keep_options(self.optimizer, own_options)
        set_peak_rates(self.optimizer, self.schedule, own_rates)
