"""The element-wise parts of a frozen transformer block, each in one pass, forward and backward.

    rms_norm:    s = x + residual;  y = s r (w + offset),  r = 1 / sqrt(mean(s^2) + eps)
                 ds = r (g - u mean(g u)) + d_total,  g = dy (w + offset),  u = s r
    gated:       y = act(gate) up                        act: SiLU, or GELU by tanh
                 d_gate = dy up act'(gate),  d_up = dy act(gate)
    rotate:      (y1, y2) = (x1 c1 - x2 s1, x2 c2 + x1 s2)      halves of a head; RoPE
                 (d1, d2) = (dy1 c1 + dy2 s2, dy2 c2 - dy1 s1)

Weights are frozen: they get no gradient. Sums and products are in fp32 and rounded once, where the
plain modules of transformers round after every step in 16 bits. Saved for backward: the norm's
input and a number per row, gate and up, and RoPE's angles.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from userip_fast.ops import _triton
from userip_fast.ops._dispatch import WhyNot, by_device, extension, resolve, why_not_cpu
from userip_fast.ops._operator import differentiable, operator

ACTIVATIONS = ("silu", "gelu_tanh")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The oracle: y [M, D], total [M, D] (or [0]), r [M] fp32 (fp64 of fp64)."""
    total = x if residual is None else x + residual
    wide = _wide(total)
    r = torch.rsqrt(wide.square().mean(1) + eps)
    y = (wide * r[:, None] * (_wide(weight) + offset)).to(x.dtype)
    return y, total if residual is not None else x.new_empty(0), r


def rms_norm_backward_reference(
    dy: Tensor, d_total: Tensor | None, total: Tensor, r: Tensor, weight: Tensor, offset: float
) -> Tensor:
    """The oracle's gradient of the sum."""
    g, unit = _wide(dy) * (_wide(weight) + offset), _wide(total) * r[:, None]
    d = r[:, None] * (g - unit * (g * unit).mean(1, keepdim=True))
    return (d if d_total is None else d + _wide(d_total)).to(dy.dtype)


def gated_reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The oracle: act(gate) up."""
    g = _wide(gate)
    value = F.silu(g) if act == "silu" else F.gelu(g, approximate="tanh")
    return (value * _wide(up)).to(gate.dtype)


def gated_backward_reference(
    dy: Tensor, gate: Tensor, up: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    """The oracle's d_gate and d_up."""
    g, d = _wide(gate), _wide(dy)
    if act == "silu":
        d_gate = torch.ops.aten.silu_backward(d * _wide(up), g)
        value = F.silu(g)
    else:
        d_gate = torch.ops.aten.gelu_backward(d * _wide(up), g, approximate="tanh")
        value = F.gelu(g, approximate="tanh")
    return d_gate.to(gate.dtype), (d * value).to(gate.dtype)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> Tensor:
    """The oracle: x [T, H, d] turned by its row's angles [T, d], or back."""
    c1, c2, s1, s2 = (h[:, None] for t in (cosine, sine) for h in _wide(t).chunk(2, -1))
    a, b = _wide(x).chunk(2, -1)
    if backward:
        s1, s2 = -s2, -s1
    return torch.cat([a * c1 - b * s1, b * c2 + a * s2], -1).to(x.dtype)


def _norm_results(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y, total and r, to be written."""
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    r = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), total, r


@operator("rms_norm", rms_norm_reference, fake=_norm_results)
def rms_norm_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, D], x + residual (empty without one) and r [M] of x [M, D] contiguous."""
    x, residual, weight, eps, offset, impl = args
    y, total, r = _norm_results(x, residual)
    if impl == "triton":
        from userip_fast.kernels import frozen_block as kernels

        kernels.rms_norm(x, residual, weight, y, None, total, r, eps, offset)
    else:
        joined = None if residual is None else total
        extension("rms_norm", x, residual, weight, y, joined, r, *x.shape, eps, offset)
    return y, total, r


@operator("rms_norm_backward", rms_norm_backward_reference, fake=_like_first)
def rms_norm_backward(*args: Any) -> Tensor:
    """[M, D], the gradient of the sum that `rms_norm_forward` normed."""
    *tensors, offset, impl = args
    dx = torch.empty_like(tensors[0])
    if impl == "triton":
        from userip_fast.kernels import frozen_block as kernels

        kernels.rms_norm_backward(*tensors, dx, offset)
    else:
        extension("rms_norm_backward", *tensors, dx, *dx.shape, offset)
    return dx


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, ctx.offset, ctx.impl = inputs
    _, total, r = output
    ctx.joined = residual is not None
    ctx.mark_non_differentiable(r, *(() if ctx.joined else (total,)))
    ctx.save_for_backward(total if ctx.joined else x, r, weight)
    ctx.set_materialize_grads(False)


def _rms_norm_gradient(ctx: Any, dy: Any, d_total: Any, _: None) -> tuple[Tensor | None, ...]:
    total, r, weight = ctx.saved_tensors
    if not ctx.joined:
        d_total = None
    if dy is None:
        dx = d_total
    else:
        d_total = None if d_total is None else d_total.contiguous()
        dx = rms_norm_backward(dy.contiguous(), d_total, total, r, weight, ctx.offset, ctx.impl)
    return dx, dx if ctx.joined else None


_rms_norm = differentiable(rms_norm_forward, _rms_norm_context, _rms_norm_gradient)


@operator("gated", gated_reference, fake=_like_first)
def gated_step(gate: Tensor, up: Tensor, act: str, impl: str) -> Tensor:
    y = torch.empty_like(gate)
    if impl == "triton":
        from userip_fast.kernels import frozen_block as kernels

        kernels.gated(gate, up, y, ACTIVATIONS.index(act))
    else:
        extension("gated", gate, up, y, y.numel(), ACTIVATIONS.index(act))
    return y


@operator(
    "gated_backward",
    gated_backward_reference,
    fake=lambda dy, gate, up, *_: (torch.empty_like(gate), torch.empty_like(up)),
)
def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str, impl: str) -> Any:
    grads = torch.empty_like(gate), torch.empty_like(up)
    if impl == "triton":
        from userip_fast.kernels import frozen_block as kernels

        kernels.gated_backward(dy, gate, up, *grads, ACTIVATIONS.index(act))
    else:
        extension("gated_backward", dy, gate, up, *grads, dy.numel(), ACTIVATIONS.index(act))
    return grads


def _gated_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.act, ctx.impl = inputs
    ctx.save_for_backward(gate, up)


def _gated_gradient(ctx: Any, dy: Tensor) -> Any:
    return _gated_backward(dy.contiguous(), *ctx.saved_tensors, ctx.act, ctx.impl)


_gated = differentiable(gated_step, _gated_context, _gated_gradient)


@operator("rotate", rotate_reference, fake=lambda x, *_: x.new_empty(x.shape))
def rotate_step(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool, impl: str) -> Tensor:
    y = x.new_empty(x.shape)
    if impl == "triton":
        from userip_fast.kernels import packed_block as kernels

        kernels.turn(x, y, None, cosine, sine, None, 0, 0.0, 0.0, backward)
    else:
        extension("rope", x, x.stride(0), cosine, sine, y, *x.shape, backward)
    return y


def _rotate_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cosine, sine, ctx.backward, ctx.impl = inputs
    ctx.save_for_backward(cosine, sine)


def _rotate_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor]:
    return (rotate_step(dy.contiguous(), *ctx.saved_tensors, not ctx.backward, ctx.impl),)


_rotate = differentiable(rotate_step, _rotate_context, _rotate_gradient)


def candidates(x: Tensor) -> dict[str, WhyNot]:
    """Implementations for tensors like x, best first."""

    def cpu() -> str | None:
        if x.dtype != torch.float32:
            return f"it computes in float32, the tensors are {x.dtype}"
        return why_not_cpu(x, "rms_norm")

    def triton() -> str | None:
        if x.dtype == torch.float64:
            return "it computes in float32, the tensors are float64"
        return _triton.why_not(x)

    return by_device(x, cpu, triton=triton)


def _check(op: str, x: Tensor, others: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (t, shape) in others.items():
        if tuple(t.shape) != shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"{op}: {name} must be {x.dtype} {shape} on {x.device}, got {t.dtype} "
                f"{tuple(t.shape)} on {t.device}"
            )


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of a sum that goes on as the residual stream.

    Args:
        x: [..., D] fp32, bf16 or fp16. Differentiable.
        weight: [D], same dtype, frozen.
        residual: Like x, or None. Differentiable.
        eps: Added to the mean square.
        offset: Added to the weight: 1 in Gemma.
        impl: "auto", "triton", "cpu" (fp32) or "reference".

    Returns:
        y like x, and x + residual (x itself without one).

    Raises:
        ValueError: A shape, dtype or device breaks the rules above, or `weight` requires grad.
    """
    dim = x.shape[-1]
    _check("rms_norm", x, {"weight": (weight, (dim,))})
    if residual is not None:
        _check("rms_norm", x, {"residual": (residual, tuple(x.shape))})
    if weight.requires_grad:
        raise ValueError("rms_norm: weight is frozen, it requires grad; detach it")
    chosen = resolve("rms_norm", impl, candidates(x))
    flat = x.reshape(-1, dim).contiguous()
    other = None if residual is None else residual.reshape(-1, dim).contiguous()
    y, total, _ = _rms_norm(flat, other, weight, eps, offset, chosen)
    return y.view(x.shape), x if residual is None else total.view(x.shape)


def gated(gate: Tensor, up: Tensor, act: str = "silu", *, impl: str = "auto") -> Tensor:
    """act(gate) up, as in SwiGLU and GeGLU.

    Args:
        gate, up: Of one shape and dtype, fp32, bf16 or fp16. Differentiable.
        act: "silu" or "gelu_tanh".
        impl: "auto", "triton", "cpu" (fp32) or "reference".

    Raises:
        ValueError: The two differ in shape, dtype or device, or `act` is unknown.
    """
    _check("gated", gate, {"up": (up, tuple(gate.shape))})
    if act not in ACTIVATIONS:
        raise ValueError(f"gated: act must be one of {ACTIVATIONS}, is {act!r}")
    chosen = resolve("gated", impl, candidates(gate))
    y: Tensor = _gated(gate.contiguous(), up.contiguous(), act, chosen)
    return y


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, impl: str = "auto") -> Tensor:
    """RoPE on halves of a head, as Llama does it.

    Args:
        x: [T, H, d] fp32, bf16 or fp16; rows may be strided. Differentiable.
        cosine, sine: [T, d], same dtype, constant.
        impl: "auto", "triton", "cpu" (fp32) or "reference".

    Returns:
        [T, H, d], contiguous.

    Raises:
        ValueError: A shape, dtype or device breaks the rules above, or d is odd.
    """
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"rotate: x must be [T, H, d] with an even d, got {tuple(x.shape)}")
    shape = (x.shape[0], x.shape[2])
    _check("rotate", x, {"cosine": (cosine, shape), "sine": (sine, shape)})
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    chosen = resolve("rotate", impl, candidates(x))
    y: Tensor = _rotate(x, cosine.contiguous(), sine.contiguous(), False, chosen)
    return y
