"""How much memory a rank needs, as arithmetic on the sizes of a model, a micro-batch and an engine.

Everything is in bytes, and of tensors alone: a process has its libraries besides, and an allocator leaves gaps. The
activations are those of a decoder with RMS norms, rotary positions and a gated MLP, such as Llama, Qwen or Mistral, for
the tokens that are computed: with packed pairs nothing is padded, and what two completions share is there once.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from ray_prefopt.losses import head, logps

HALF, SINGLE = 2, 4
Precision = Literal["single", "half", "autocast"]
"""Of what is computed; autocast has fp32 weights and norms around products in half precision."""
BUCKET = 500_000_000
"""Gradients that DeepSpeed gathers before it reduces them (reduce_bucket_size)."""
LIVE = 1_000_000_000
"""Weights that stage 3 keeps whole at once (stage3_max_live_parameters): all of them, of a model that is smaller."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model's shape decides about memory."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    """Width of the MLP."""
    key_value: int
    """Width of keys, and of values: `hidden`, or less with grouped heads."""
    trainable: int | None = None
    """Weights that are trained; all of them unless there are adapters."""

    @classmethod
    def of(cls, architecture: Any, parameters: int, trainable: int | None = None) -> Self | None:
        """By the config of a model of transformers; None where it does not say what it would have to."""
        try:
            hidden, heads = architecture.hidden_size, architecture.num_attention_heads
            groups = getattr(architecture, "num_key_value_heads", None) or heads
            return cls(
                parameters,
                hidden,
                architecture.num_hidden_layers,
                architecture.vocab_size,
                architecture.intermediate_size,
                groups * (getattr(architecture, "head_dim", None) or hidden // heads),
                trainable,
            )
        except AttributeError:
            return None

    @property
    def trained(self) -> int:
        return self.parameters if self.trainable is None else self.trainable


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    """States of AdamW, and the fp32 master weights beside those that compute."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    head: int
    """Logits, and the gradient of the weights that make them."""
    working: int
    """Held throughout: gathered weights of stage 3, copies of autocast, buckets on a GPU."""
    reduction: int
    """Held when activations are gone: gradients on their way to where they belong."""
    host: int
    """In the host's memory: what is offloaded."""

    @property
    def device(self) -> int:
        """On the GPU, or in the process where there is none."""
        lasting = self.weights + self.gradients + self.optimizer + self.working
        return lasting + max(self.activations + self.head, self.reduction)


def estimate(
    size: ModelSize,
    *,
    tokens: int,
    scored: int,
    zero_stage: Literal[0, 1, 2, 3] | None,
    world_size: int = 1,
    is_half: bool = True,
    checkpointing: bool = False,
    chunked_head: bool = True,
    in_halves: bool = False,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    device: Literal["cpu", "cuda"] = "cuda",
) -> MemoryEstimate:
    """The peak of a step of several micro-batches with AdamW.

    `tokens` are those of a micro-batch that are computed, `scored` the completion tokens among them; `zero_stage` is
    None for the plain engine. Without `chunked_head` all logits of a micro-batch are there at once; `in_halves` both of
    its halves are, with gradients of their own.
    """
    stage = zero_stage or 0
    precision: Precision = "single" if not is_half else "half" if stage else "autocast"
    trained, shard = size.trained, -(-size.trained // world_size)
    tiled = device == "cpu" and chunked_head
    weights = _width(precision) * size.parameters
    gradients = SINGLE * (shard if stage >= 2 else trained)
    if stage == 1 and is_half:
        gradients += HALF * trained  # as they come, before they are added up
    optimizer = 3 * SINGLE * shard if stage else 2 * SINGLE * trained
    working, reduction = _of_engine(size, zero_stage, shard, precision, device)
    parts = 1
    if in_halves:
        parts, reduction = 2, 2 * SINGLE * trained
    host = 0
    if stage == 3:
        weights = -(-weights // world_size)
    if offload_optimizer:
        host, optimizer, gradients = host + optimizer + gradients, 0, 0
    if offload_param:
        host, weights = host + weights, 0
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activation_bytes(size, tokens, precision, checkpointing=checkpointing, tiled=tiled),
        head=parts * _head_bytes(size, scored // parts, chunked=chunked_head, is_half=is_half, device=device),
        working=working,
        reduction=reduction,
        host=host,
    )


def activation_bytes(
    size: ModelSize, tokens: int, precision: Precision, *, checkpointing: bool, tiled: bool = False
) -> int:
    """What all layers keep of a micro-batch; with checkpointing their inputs, and all of the one that is recomputed.

    Besides, what the backward pass makes in the layer that it is at: of its MLP the activation and three gradients, and
    those of the states around it.
    """
    width = HALF if precision == "half" else SINGLE
    layer = layer_bytes(size, precision, tiled=tiled)
    kept = width * size.hidden * size.layers + layer if checkpointing else layer * size.layers
    return tokens * (kept + 2 * width * (size.hidden + 2 * size.intermediate))


def layer_bytes(size: ModelSize, precision: Precision, *, tiled: bool = False) -> int:
    """What autograd keeps per token and layer.

    Each of two norms: its input, and its output, which the linear layers keep; attention: queries, keys, values and its
    output, and, unless it is `tiled`, that once more in the order of o_proj, and keys and values again for the rejected
    completion; the MLP: gate and up, and if it may have an adapter the gate's activation and the product of both.
    """
    norm = {"single": 2 * SINGLE, "half": 2 * HALF, "autocast": 2 * SINGLE + HALF}[precision]
    attention = 2 * (size.hidden + size.key_value) if tiled else 3 * size.hidden + 4 * size.key_value
    mlp = (2 if size.trainable is None else 4) * size.intermediate
    return 2 * norm * size.hidden + (SINGLE if precision == "single" else HALF) * (attention + mlp)


def _width(precision: Precision) -> int:
    """Of a weight."""
    return HALF if precision == "half" else SINGLE


def _head_bytes(size: ModelSize, scored: int, *, chunked: bool, is_half: bool, device: str) -> int:
    """One pass in chunks, with the gradient of its weights in fp32; otherwise all logits, and their softmax."""
    logits = scored * size.vocabulary
    if not chunked:
        return 2 * (HALF if is_half else SINGLE) * logits + 2 * SINGLE * min(logits, logps.CHUNK_ELEMENTS)
    copies = 2 * HALF if is_half else 0
    gradient = SINGLE * size.vocabulary * size.hidden if size.trainable is None else 0
    return min(logits, head.CHUNK_ELEMENTS[device]) * (SINGLE + copies) + gradient


def _of_engine(
    size: ModelSize, zero_stage: int | None, shard: int, precision: Precision, device: str
) -> tuple[int, int]:
    """What an engine holds throughout, and what only when gradients are reduced.

    DeepSpeed reserves a bucket and the next one beforehand; on a CPU memory is taken when it is written to, and nothing
    overlaps. From stage 2 on a rank has its new gradients beside the sum, and all in one piece for the step; in stage 3
    the bucket fills while there are activations.
    """
    copies = HALF * size.parameters if precision == "autocast" else 0
    if zero_stage is None:
        return copies, 0
    gathered = _width(precision) * min(size.parameters, LIVE) if zero_stage == 3 else 0
    bucket = _width(precision) * min(size.trained, BUCKET)
    if device == "cuda" and zero_stage:
        return gathered + 2 * bucket, 0
    if zero_stage == 3:
        return copies + gathered + bucket, 2 * SINGLE * shard
    return copies + gathered, bucket + (2 * SINGLE * shard if zero_stage == 2 else 0)
