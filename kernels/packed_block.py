"""Triton kernels of `userip_fast.ops.packed_block`; the formulas are there.

Tensors are fp32, bf16 or fp16, rows may be strided, sums and products are in fp32 and rounded once.
What becomes e4m3 is divided by its row's scale in fp32 first, so a program owns whole rows: of a
norm it holds one; of the gated activation, whose rows are long, it goes over one twice, the second
time out of cache. No atomics, and nothing depends on how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from userip_fast.kernels.frozen_block import _act, _warps, row_scale, to_e4m3

_TILE = 1024  # values per program, or per step of one
_HEADS = 8  # heads per program of RoPE


@triton.jit
def _cast_rows_kernel(x_ptr, y_ptr, scale_ptr, D, stride_x, TILE: tl.constexpr, HELD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)
    if HELD:
        x = tl.load(x_ptr + row * stride_x + k, mask=k < D, other=0.0).to(tl.float32)
        scale = row_scale(tl.max(tl.abs(x), 0))
        tl.store(y_ptr + row * D + k, to_e4m3(x, scale + tl.zeros_like(x)), mask=k < D)
    else:
        top = tl.zeros((TILE,), tl.float32)
        for d0 in range(0, D, TILE):
            at = d0 + k
            x = tl.load(x_ptr + row * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.abs(x))
        scale = row_scale(tl.max(top, 0))
        for d0 in range(0, D, TILE):
            at = d0 + k
            x = tl.load(x_ptr + row * stride_x + at, mask=at < D, other=0.0).to(tl.float32)
            tl.store(y_ptr + row * D + at, to_e4m3(x, scale + tl.zeros_like(x)), mask=at < D)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _halves_kernel(x_ptr, y_ptr, F, GELU: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = k < F
    gate = x_ptr + row * 2 * F + k
    value, _ = _act(tl.load(gate, mask=inside, other=0.0).to(tl.float32), GELU)
    y = value * tl.load(gate + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + k, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves_backward_kernel(dy_ptr, x_ptr, dx_ptr, F, GELU: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = k < F
    gate = row * 2 * F + k
    d = tl.load(dy_ptr + row * F + k, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(x_ptr + gate, mask=inside, other=0.0).to(tl.float32), GELU)
    d_gate = d * tl.load(x_ptr + gate + F, mask=inside, other=0.0).to(tl.float32) * slope
    tl.store(dx_ptr + gate, d_gate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + gate + F, (d * value).to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _halves_e4m3_kernel(x_ptr, y_ptr, scale_ptr, F, GELU: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)
    top = tl.zeros((TILE,), tl.float32)
    for f0 in range(0, F, TILE):
        at = f0 + k
        gate = x_ptr + row * 2 * F + at
        value, _ = _act(tl.load(gate, mask=at < F, other=0.0).to(tl.float32), GELU)
        y = value * tl.load(gate + F, mask=at < F, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(y))
    scale = row_scale(tl.max(top, 0))
    for f0 in range(0, F, TILE):
        at = f0 + k
        gate = x_ptr + row * 2 * F + at
        value, _ = _act(tl.load(gate, mask=at < F, other=0.0).to(tl.float32), GELU)
        y = value * tl.load(gate + F, mask=at < F, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * F + at, to_e4m3(y, scale + tl.zeros_like(y)), mask=at < F)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _halves_gradients(dy_ptr, x_ptr, row, at, F, GELU: tl.constexpr):
    inside = at < F
    gate = x_ptr + row * 2 * F + at
    d = tl.load(dy_ptr + row * F + at, mask=inside, other=0.0).to(tl.float32)
    value, slope = _act(tl.load(gate, mask=inside, other=0.0).to(tl.float32), GELU)
    return d * tl.load(gate + F, mask=inside, other=0.0).to(tl.float32) * slope, d * value


@triton.jit
def _halves_backward_e4m3_kernel(
    dy_ptr, x_ptr, dx_ptr, scale_ptr, F, GELU: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE)
    top = tl.zeros((TILE,), tl.float32)
    for f0 in range(0, F, TILE):
        d_gate, d_up = _halves_gradients(dy_ptr, x_ptr, row, f0 + k, F, GELU)
        top = tl.maximum(top, tl.maximum(tl.abs(d_gate), tl.abs(d_up)))
    scale = row_scale(tl.max(top, 0))
    for f0 in range(0, F, TILE):
        at = f0 + k
        d_gate, d_up = _halves_gradients(dy_ptr, x_ptr, row, at, F, GELU)
        wide = scale + tl.zeros_like(d_gate)
        tl.store(dx_ptr + row * 2 * F + at, to_e4m3(d_gate, wide), mask=at < F)
        tl.store(dx_ptr + row * 2 * F + F + at, to_e4m3(d_up, wide), mask=at < F)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _turn_kernel(
    x_ptr, y_ptr, kept_ptr, cosine_ptr, sine_ptr, q_weight_ptr, k_weight_ptr,
    stride_x, stride_y, stride_kept, HEADS, QUERIES, eps, offset,
    DIM: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Heads of a row, [norm and] RoPE, or back; x and y may be the same memory."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    k = tl.arange(0, BLOCK_HALF)[None, :]
    half: tl.constexpr = DIM // 2
    inside = (head < HEADS) & (k < half)
    angle, of_angle = row * DIM + k, k < half
    c1 = tl.load(cosine_ptr + angle, mask=of_angle, other=0.0).to(tl.float32)
    c2 = tl.load(cosine_ptr + angle + half, mask=of_angle, other=0.0).to(tl.float32)
    s1 = tl.load(sine_ptr + angle, mask=of_angle, other=0.0).to(tl.float32)
    s2 = tl.load(sine_ptr + angle + half, mask=of_angle, other=0.0).to(tl.float32)
    source = x_ptr + row * stride_x + head * DIM + k
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        is_query = head < QUERIES
        q1 = tl.load(q_weight_ptr + k, mask=of_angle, other=0.0).to(tl.float32)
        q2 = tl.load(q_weight_ptr + half + k, mask=of_angle, other=0.0).to(tl.float32)
        k1 = tl.load(k_weight_ptr + k, mask=of_angle, other=0.0).to(tl.float32)
        k2 = tl.load(k_weight_ptr + half + k, mask=of_angle, other=0.0).to(tl.float32)
        w1 = tl.where(is_query, q1, k1) + offset
        w2 = tl.where(is_query, q2, k2) + offset
    if BACKWARD:
        y1, y2 = a * c1 + b * s2, b * c2 - a * s1
        if NORM:
            kept = kept_ptr + row * stride_kept + head * DIM + k
            x1 = tl.load(kept, mask=inside, other=0.0).to(tl.float32)
            x2 = tl.load(kept + half, mask=inside, other=0.0).to(tl.float32)
            r = 1.0 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / DIM + eps)[:, None]
            g1, g2 = y1 * w1, y2 * w2
            u1, u2 = x1 * r, x2 * r
            mean = ((tl.sum(g1 * u1, 1) + tl.sum(g2 * u2, 1)) / DIM)[:, None]
            y1, y2 = r * (g1 - u1 * mean), r * (g2 - u2 * mean)
    else:
        if NORM:
            r = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
            a, b = a * r * w1, b * r * w2
        y1, y2 = a * c1 - b * s1, b * c2 + a * s2
    target = y_ptr + row * stride_y + head * DIM + k
    tl.store(target, y1.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + half, y2.to(y_ptr.dtype.element_ty), mask=inside)


def turn(
    x: Tensor, y: Tensor, kept: Tensor | None, cosine: Tensor, sine: Tensor,
    weights: tuple[Tensor, Tensor] | None, queries: int, eps: float, offset: float, backward: bool,
) -> None:  # fmt: skip
    """x [T, heads, d] to y, which may be x; one launch. `kept`: what was turned, for the norm."""
    rows, heads, dim = x.shape
    if x.numel() == 0:
        return
    block = min(_HEADS, triton.next_power_of_2(heads))
    q_weight, k_weight = weights or (cosine, cosine)
    kept = x if kept is None else kept
    _turn_kernel[(rows, triton.cdiv(heads, block))](
        x, y, kept, cosine, sine, q_weight, k_weight,
        x.stride(0), y.stride(0), kept.stride(0), heads, queries, eps, offset,
        DIM=dim, NORM=weights is not None, BACKWARD=backward,
        BLOCK_H=block, BLOCK_HALF=triton.next_power_of_2(dim // 2), num_warps=4,
    )  # fmt: skip


def gated_halves(x: Tensor, y: Tensor, act: int) -> None:
    """Writes y [T, F] from x [T, 2 F]; one launch."""
    rows, width = y.shape
    if y.numel():
        _halves_kernel[(rows, triton.cdiv(width, _TILE))](x, y, width, GELU=act == 1, TILE=_TILE)


def gated_halves_backward(dy: Tensor, x: Tensor, dx: Tensor, act: int) -> None:
    """Writes dx [T, 2 F]; one launch."""
    rows, width = dy.shape
    if dy.numel():
        _halves_backward_kernel[(rows, triton.cdiv(width, _TILE))](
            dy, x, dx, width, GELU=act == 1, TILE=_TILE
        )


def gated_halves_e4m3(x: Tensor, y: Tensor, scale: Tensor, act: int) -> None:
    """Writes y [T, F] in e4m3 and its scales; one launch."""
    rows, width = y.shape
    if y.numel():
        _halves_e4m3_kernel[(rows,)](x, y, scale, width, GELU=act == 1, TILE=2 * _TILE, num_warps=8)


def gated_halves_backward_e4m3(dy: Tensor, x: Tensor, dx: Tensor, scale: Tensor, act: int) -> None:
    """Writes dx [T, 2 F] in e4m3 and its scales; one launch."""
    rows, width = dy.shape
    if dy.numel():
        _halves_backward_e4m3_kernel[(rows,)](
            dy, x, dx, scale, width, GELU=act == 1, TILE=2 * _TILE, num_warps=8
        )


def cast_rows(x: Tensor, y: Tensor, scale: Tensor) -> None:
    """Writes y [M, K] in e4m3 and its scales; one launch."""
    rows, width = x.shape
    if x.numel() == 0:
        return
    held = width <= 8192
    tile = triton.next_power_of_2(width) if held else 4096
    _cast_rows_kernel[(rows,)](
        x, y, scale, width, x.stride(0), TILE=tile, HELD=held, num_warps=_warps(tile)
    )
