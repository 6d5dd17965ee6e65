"""The last layer, for the tokens of which something is read.

Log-probabilities are read of completions alone, and what the last layer makes of a prompt goes nowhere else than into
keys and values: its queries, its attention, its output projection and its MLP are left out there.

Shape suffixes: T tokens of the packed row, U positions that are read, D hidden size.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

Forward = Callable[..., Any]


class Read(NamedTuple):
    """What is read of a packed row."""

    positions_U: Tensor
    unread: tuple[int, ...]
    """How many tokens each pair begins with of which nothing is."""


_read: ContextVar[Read | None] = ContextVar("read", default=None)
"""Of the forward pass that this thread is in, or of the repetition of it for the backward pass."""


def spare_unread(model: Any) -> bool:
    """Make the last layer heed `read`, a keyword that models hand on to the attention of all layers; without it the
    layer does what it did. False if no attention is found in it."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    layer = lists[0][-1] if lists else None
    attention: Any = _part(layer, "self_attn", "attn", "attention")
    if attention is None:
        return False
    if getattr(attention.forward, "func", None) is _attending:  # it does already
        return True
    attention.forward = partial(_attending, attention.forward)
    for part in (_part(layer, "mlp"), _part(attention, "q_proj"), _part(attention, "o_proj")):
        if part is not None:
            part.forward = partial(_where_read, part.forward)
    return True


def _part(module: Any, *names: str) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _attending(forward: Forward, *args: Any, read: Read | None = None, **kwargs: Any) -> Any:
    """The forward of the attention, which is the first part of the layer."""
    _read.set(read)
    return forward(*args, **kwargs) if read is None else forward(*args, unread=read.unread, **kwargs)


def _where_read(forward: Forward, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A forward of each token by itself, (1, T, D); zero where nothing is read of it."""
    read = _read.get()
    if read is None:
        return forward(x, *args, **kwargs)
    positions_U = read.positions_U
    found: Tensor = forward(x.index_select(1, positions_U), *args, **kwargs)
    return found.new_zeros(1, x.shape[1], found.shape[-1]).index_copy_(1, positions_U, found)
