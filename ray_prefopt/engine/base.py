"""What the training loop asks of an engine; `plain` and `zero` answer."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What a model saves besides its weights, by name."""
    weights = dict(module.named_parameters(remove_duplicate=False))
    return {name: each for name, each in module.state_dict().items() if name not in weights}


class Engine(Protocol):
    """A model, its optimizer and schedule, spread over the ranks of the default process group."""

    module: nn.Module
    """The model itself; its weights may be sharded."""
    device: torch.device
    optimizer: Any
    """The one that steps; DeepSpeed wraps it."""
    schedule: Any
    """Of the learning rate."""

    def forward(self, **inputs: Any) -> Any:
        """The model's output; this, not `module`, is what training calls."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar; what is summed over micro-batches and ranks is the gradient of the step."""

    def step(self) -> float:
        """Clip, update weights and learning rate, clear gradients; returns the gradient norm before clipping.

        Raises NonFiniteError on every rank, before anything moved, when that norm is NaN or infinite.
        """

    def learning_rate(self) -> float:
        """The rate that the next step will use."""

    def save(self, folder: Path) -> None:
        """Write this rank's part of weights, optimizer and schedule; called by all ranks."""

    def weights(self) -> dict[str, Tensor]:
        """The trained weights, whole and in fp32, on rank 0; nothing on the others. Called by all ranks."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; called by all ranks. Raises CheckpointError."""
