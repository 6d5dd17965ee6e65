"""Norms and gated MLPs that keep less of the forward pass for the backward pass; their values stay the same.

What transformers' RMS norms and MLPs leave to autograd are intermediate steps of the same size as their inputs. Here a
norm keeps its input, an MLP its gate and up projections, and the backward pass makes the steps in between again, which
is elementwise work alone (Liger Kernel, Hsu et al. 2024, does so in Triton).
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ray_prefopt.model.onednn import gradients, layer_forward, linear

Forms = dict[nn.Module, Callable[..., Tensor]]
"""What takes the place of the forward of a module, and of its parts."""


def keep_less(model: nn.Module) -> None:
    """Exchange, in place, the forward of each norm and MLP for its lean form, where that is found to give the same."""
    for module in model.modules():
        forms = _lean_forms(module)
        if forms and _are_same(module, forms):
            _exchange(forms)


def _lean_forms(module: Any) -> Forms:
    """What may take the place of its forward, and of its parts', by what a module is made of; empty if nothing."""
    if type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None:
        return {module: _rms_norm} if [name for name, _ in module.named_parameters()] == ["weight"] else {}
    projections = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if all(type(each) is nn.Linear for each in projections) and hasattr(module, "act_fn"):
        return {module: _mlp, module.down_proj: _over_gated(module.act_fn)}
    return {}


def _exchange(forms: Forms) -> None:
    for part, forward in forms.items():
        part.forward = MethodType(forward, part)


@torch.no_grad()
def _are_same(module: nn.Module, forms: Forms) -> bool:
    """Whether a module gives the same with these forms, with small random weights in place of its own: to the bit in
    half precision, and up to the order of sums in fp32. Of large inputs as well, since some MLPs have a limit."""
    width, random = 8, torch.Generator().manual_seed(0)
    shapes = {
        name: [width] * len(getattr(weight, "ds_shape", weight.shape))  # what it is when it is not sharded
        for name, weight in module.named_parameters()
    }
    weights = {name: torch.randn(shape, generator=random, device="cpu") for name, shape in shapes.items()}
    x = torch.randn(3, width, generator=random, device="cpu") * torch.tensor([[1.0], [30.0], [1000.0]])
    inputs = [(weights, x), ({name: each.bfloat16() for name, each in weights.items()}, x.bfloat16())]
    own = {part: part.__dict__["forward"] for part in forms if "forward" in part.__dict__}
    module.train()  # where dropout is on, it shows
    with torch.random.fork_rng(devices=[]):
        try:
            single, half = (functional_call(module, *each) for each in inputs)
            _exchange(forms)
            lean_single, lean_half = (functional_call(module, *each) for each in inputs)
            is_close = (lean_single - single).abs() <= 1e-5 * single.abs().amax(-1, keepdim=True)
            return bool(is_close.all()) and torch.equal(lean_half, half)
        except (TypeError, RuntimeError):  # it is called in another way
            return False
        finally:
            for part in forms:
                part.__dict__.pop("forward", None)
            for part, forward in own.items():
                part.__dict__["forward"] = forward


def _epsilon(norm: Any) -> float | None:
    epsilon: float | None = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return epsilon


# --- norms ---


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = _RMSNorm.apply(x, norm.weight, _epsilon(norm))  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """`weight * x / rms(x)`, computed in fp32; (..., D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * normed).flatten(0, -2).sum(0).to(weight.dtype)
        d_normed = d_out * weight.to(normed.dtype)
        along = torch.linalg.vecdot(d_normed, normed)[..., None] / normed.shape[-1]
        d_x = d_normed.addcmul_(normed, along, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


# --- MLPs ---


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if type(mlp.down_proj) is nn.Linear:
        return mlp.down_proj(gate, up)  # a call of the module, for whatever is hooked onto it
    return mlp.down_proj(mlp.act_fn(gate) * up)  # an adapter has taken its place


def _over_gated(act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The forward of a linear layer: of what it is given, or, if that is two things, of `act(gate) * up`."""

    def forward(layer: nn.Linear, gate: Tensor, up: Tensor | None = None) -> Tensor:
        if up is None:
            return layer_forward(layer, gate)
        out: Tensor = _LinearOfGated.apply(gate, up, act, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
        return out

    return forward


class _LinearOfGated(torch.autograd.Function):
    """A linear layer over `act(gate) * up`, which is made again for the backward pass; (..., D) from (..., I)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        act: Callable[[Tensor], Tensor],
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.act = act
        return linear(act(gate) * up, weight, bias)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.needs_input_grad[3:]
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            activated = ctx.act(gate)
        gated = activated.detach() * up if of_weight else None
        d_gated, d_weight, d_bias = gradients(gated, weight, d_out, (True, of_bias))
        del gated
        assert d_gated is not None
        d_up = d_gated * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, gate, d_gated.mul_(up))
        return d_gate, d_up, None, d_weight, d_bias
