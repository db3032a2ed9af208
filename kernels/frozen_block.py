"""Triton kernels of `userip_fast.ops.frozen_block`; the formulas are there.

Tensors are contiguous, fp32, bf16 or fp16; sums and products are in fp32 and rounded once, or cast
to e4m3 with a scale a row. Norms: a program owns a row and holds it. The gated activation: a
program owns _TILE values. RoPE is that of `packed_block`. No atomics, and nothing depends on how
many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # values per program of the gated activation
LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def row_scale(top):
    """Of e4m3 values of a row whose largest magnitude is `top`; a row of zeros has scale 1."""
    return tl.where(top > 0, tl.div_rn(top, 448.0), 1.0)


@triton.jit
def to_e4m3(x, scale):
    x = tl.div_rn(x, scale)
    # NaN stays what it is: minimum and maximum would turn it into a number.
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    return x.to(tl.float8e4nv)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, scale_ptr, total_ptr, r_ptr, D, eps, offset,
    JOINED: tl.constexpr, E4M3: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < D
    x = tl.load(x_ptr + row * D + k, mask=inside, other=0.0).to(tl.float32)
    if JOINED:
        x += tl.load(residual_ptr + row * D + k, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)  # the norm reads what the residual stream holds
        tl.store(total_ptr + row * D + k, rounded, mask=inside)
        x = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    w = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32) + offset
    y = x * r * w
    if E4M3:
        y = tl.where(inside, y, 0.0)
        scale = row_scale(tl.max(tl.abs(y), 0))
        tl.store(y_ptr + row * D + k, to_e4m3(y, scale + tl.zeros_like(y)), mask=inside)
        tl.store(scale_ptr + row, scale)
    else:
        tl.store(y_ptr + row * D + k, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(r_ptr + row, r)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr, d_total_ptr, x_ptr, r_ptr, weight_ptr, dx_ptr, D, offset,
    JOINED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D)
    inside = k < D
    w = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32) + offset
    g = tl.load(dy_ptr + row * D + k, mask=inside, other=0.0).to(tl.float32) * w
    r = tl.load(r_ptr + row)
    unit = tl.load(x_ptr + row * D + k, mask=inside, other=0.0).to(tl.float32) * r
    dx = r * (g - unit * (tl.sum(g * unit, 0) / D))
    if JOINED:
        dx += tl.load(d_total_ptr + row * D + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * D + k, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tanh(x):
    # 1 - 2 / (exp(2 |x|) + 1) cancels near 0, where tanh is x to within its third power.
    positive = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * positive) + 1.0)
    square = x * x
    near = positive * (1.0 - square * (1.0 / 3 - square * (2.0 / 15 - square * (17.0 / 315))))
    t = tl.where(positive < 0.2, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def _act(g, GELU: tl.constexpr):
    """Value and slope of the activation."""
    if GELU:
        inner = 0.7978845608028654 * g * (1.0 + 0.044715 * g * g)
        t = _tanh(inner)
        rise = 0.5 * (1.0 + t)
        inner_slope = 0.7978845608028654 * (1.0 + 3 * 0.044715 * g * g)
        return g * rise, rise + 0.5 * g * (1.0 - t * t) * inner_slope
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        return g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid))


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, y_ptr, n, GELU: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < n
    value, _ = _act(tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32), GELU)
    y = value * tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, d_gate_ptr, d_up_ptr, n, GELU: tl.constexpr, TILE: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < n
    d = tl.load(dy_ptr + i, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32), GELU)
    d_gate = d * tl.load(up_ptr + i, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(d_gate_ptr + i, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + i, (d * value).to(d_up_ptr.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, y: Tensor, scale: Tensor | None,
    total: Tensor, r: Tensor, eps: float, offset: float,
) -> None:  # fmt: skip
    """Writes y (in e4m3 with a scale a row, where `scale` is given), r and, with a residual, total;
    one launch."""
    if x.shape[0] == 0:
        return
    block = triton.next_power_of_2(x.shape[1])
    _rms_norm_kernel[(x.shape[0],)](
        x, residual, weight, y, scale, total, r, x.shape[1], eps, offset,
        JOINED=residual is not None, E4M3=scale is not None, BLOCK_D=block,
        num_warps=_warps(block),
    )  # fmt: skip


def rms_norm_backward(
    dy: Tensor, d_total: Tensor | None, total: Tensor, r: Tensor, weight: Tensor, dx: Tensor,
    offset: float,
) -> None:  # fmt: skip
    """Writes dx; one launch."""
    if dy.shape[0] == 0:
        return
    block = triton.next_power_of_2(dy.shape[1])
    _rms_norm_backward_kernel[(dy.shape[0],)](
        dy, d_total, total, r, weight, dx, dy.shape[1], offset,
        JOINED=d_total is not None, BLOCK_D=block, num_warps=_warps(block),
    )  # fmt: skip


def gated(gate: Tensor, up: Tensor, y: Tensor, act: int) -> None:
    """Writes y; one launch. `act` is 0 for SiLU, 1 for GELU by tanh."""
    n = gate.numel()
    if n:
        _gated_kernel[(triton.cdiv(n, _TILE),)](gate, up, y, n, GELU=act == 1, TILE=_TILE)


def gated_backward(
    dy: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor, act: int
) -> None:
    """Writes d_gate and d_up; one launch."""
    n = gate.numel()
    if n:
        _gated_backward_kernel[(triton.cdiv(n, _TILE),)](
            dy, gate, up, d_gate, d_up, n, GELU=act == 1, TILE=_TILE
        )
