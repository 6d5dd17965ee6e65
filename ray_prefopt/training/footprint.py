"""How much memory the workers of a run need: what is expected before it, and what was seen in it."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from transformers import PretrainedConfig

from ray_prefopt.config import TrainConfig
from ray_prefopt.data.balance import Costs
from ray_prefopt.data.plan import Plan
from ray_prefopt.engine.memory import MemoryEstimate, ModelSize, estimate
from ray_prefopt.errors import PrefoptError
from ray_prefopt.model.adapters import attach_lora
from ray_prefopt.model.layout import head_of, obstacle_of
from ray_prefopt.model.load import compute_dtype, model_class
from ray_prefopt.training.batches import Batching, costs_of, layout_of

logger = logging.getLogger(__name__)

COMPARABLE = 1 << 28
"""Bytes of an estimate that is more than what a process on a CPU grows by besides tensors."""


@dataclass(frozen=True)
class Outline:
    """What of a model can be known before its weights are read."""

    architecture: PretrainedConfig
    parameters: int | None
    """None where a model cannot be made on no device."""
    trainable: int | None
    """Weights that are trained; None: all."""
    costs: Costs
    has_chunked_head: bool
    """Whether logits are made a chunk at a time."""

    @classmethod
    def of(cls, config: TrainConfig, architecture: PretrainedConfig) -> "Outline":
        """From a model on no device. What a probe of the workers would find out besides is taken for granted."""
        parameters = trainable = None
        is_packed, is_chunked = True, False
        try:
            with torch.device("meta"):
                model = model_class(architecture).from_config(
                    architecture, trust_remote_code=config.model.trust_remote_code
                )
                parameters = model.num_parameters()
                if config.model.lora is not None:
                    adapted = attach_lora(model, config.model.lora, seed=0)
                    trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
            is_packed, is_chunked = obstacle_of(model, config.model) is None, head_of(model) is not None
        except PrefoptError:  # the config is wrong
            raise
        except Exception as error:  # the model has to see its weights, which is no reason to fail
            logger.debug("no outline of the model: %s", error)
        is_packed = is_packed and config.model.layout != "padded"
        costs = costs_of(architecture, layout_of(architecture, is_packed=is_packed))
        return cls(architecture, parameters, trainable, costs, is_packed and is_chunked)


@dataclass(frozen=True)
class Footprint:
    """Of a worker at the peak of a step."""

    estimate: MemoryEstimate
    tokens: int
    """Of the largest micro-batch."""

    def is_comparable(self, *, use_gpu: bool) -> bool:
        """Whether what is seen can be compared: a process grows by some 30 MB that are no tensors."""
        return use_gpu or self.estimate.device > COMPARABLE

    def __str__(self) -> str:
        """`about 2.1 GB, of which 1.2 GB for 2,048 tokens at once`."""
        found = self.estimate
        total, activations = decimal(found.device), decimal(found.activations)
        host = f"; {decimal(found.host)} of the host" if found.host else ""
        return f"about {total}, of which {activations} for {self.tokens:,} tokens at once{host}"


def footprint(
    config: TrainConfig, outline: Outline, pairs: tuple[Batching, Plan] | None, world_size: int
) -> Footprint | None:
    """What is to be expected; None where `engine.memory` has no estimate.

    `pairs` are those of training; while they are not prepared, all are as long as they may be.
    """
    given, run, engine, architecture = config.model, config.run, config.engine, outline.architecture
    if given.quantization or given.adapter or architecture.is_encoder_decoder or outline.parameters is None:
        return None
    size = ModelSize.of(architecture.get_text_config(), outline.parameters, outline.trainable)
    if size is None:
        return None
    if pairs is None:
        longest = 2 * config.data.max_length
        tokens = scored = max(run.micro_batch_tokens or longest * run.micro_batch, longest)
    else:
        batching, plan = pairs
        tokens, scored = batching.largest(plan, world_size)
    found = estimate(
        size,
        tokens=tokens,
        scored=scored,
        zero_stage=engine.zero_stage if engine.kind == "zero" else None,
        world_size=world_size,
        is_half=compute_dtype(given, architecture) != torch.float32,
        checkpointing=given.gradient_checkpointing,
        chunked_head=outline.has_chunked_head,
        in_halves=_is_halved(config, outline),
        offload_optimizer=engine.offload_optimizer != "none",
        offload_param=engine.offload_param != "none",
        device="cuda" if run.use_gpu else "cpu",
    )
    return Footprint(found, tokens)


def _is_halved(config: TrainConfig, outline: Outline) -> bool:
    """Whether workers compute micro-batches in halves, as far as that can be known before there are any."""
    run = config.run
    return (
        config.engine.kind == "plain"
        and not run.use_gpu
        and run.cpus_per_worker % 2 == 0
        and outline.costs.layout == "packed"
        and compute_dtype(config.model, outline.architecture) != torch.float16
    )


class Peak:
    """Peak memory since this was made: of tensors on a GPU; on a CPU how much the process grew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with suppress(OSError):  # then it is the most since the process began
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident("VmRSS")

    def read(self) -> int:
        """Bytes; 0 where nothing can be told."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_resident("VmHWM") - self._before, 0)


def _resident(name: str) -> int:
    """A line of what Linux knows of this process, in bytes; 0 on other systems."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
