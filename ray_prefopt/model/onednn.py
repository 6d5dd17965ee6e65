"""Matrix products in fp32 by oneDNN on CPUs with AVX-512: MKL, which torch takes, is slower on those of AMD."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
IS_FASTER = (
    _product is not None
    and torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)
"""MKL has half to three quarters of the speed with AVX-512, and a tenth more without: measured on three CPUs of AMD."""
ROWS = 1024
"""Of a sum that a product is added to at once."""


def use_onednn(model: Any) -> None:
    """Exchange, in place, the forward of linear layers, but for that of the head; nothing where MKL is faster."""
    if not IS_FASTER:
        return
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is nn.Linear and module is not head and "forward" not in module.__dict__:
            module.__dict__["forward"] = MethodType(layer_forward, module)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, without gradients."""
    is_single = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    if not (IS_FASTER and is_single and x.device.type == "cpu"):
        return F.linear(x, weight, bias)
    out: Tensor = _product(x.flatten(0, -2), weight.detach(), bias, "none", [], "")
    return out.unflatten(0, x.shape[:-1])


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """As `Tensor.addmm_`, some rows at a time: the product is never there as a whole."""
    if not (IS_FASTER and total.device.type == "cpu"):
        total.addmm_(one, other)
        return
    for sums, rows in zip(total.split(ROWS), one.split(ROWS), strict=True):
        sums += linear(rows.T.contiguous().T, other.T)  # oneDNN is slow on columns of a wider matrix


def layer_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a linear layer."""
    if torch.is_autocast_enabled(x.device.type):
        return F.linear(x, layer.weight, layer.bias)
    out: Tensor = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return gradients(x, weight, d_out, (ctx.needs_input_grad[0], ctx.needs_input_grad[2]))


def gradients(
    x: Tensor | None, weight: Tensor, d_out: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a linear layer by its input and bias, where these are needed, and by its weight, where there is an input `x`;
    in the precision of each."""
    d_rows = d_out.flatten(0, -2)
    d_x = linear(d_out, weight.to(d_out.dtype).T) if needed[0] else None
    d_weight = None if x is None else linear(d_rows.T, x.flatten(0, -2).T).to(weight.dtype)
    d_bias = d_rows.sum(0).to(weight.dtype) if needed[1] else None
    return d_x, d_weight, d_bias
