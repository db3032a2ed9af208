"""What a frozen block does beside its products, on packed operands, forward and backward apart.

Of q, k and v, and of gate and up, there is one product each, so their values lie side by side in a
row; these operators read them there and leave gradients there, and nothing is split, joined or
copied. Those that feed an FP8 product write e4m3 at once, with a scale per row:

    turn:           q and k of a row [, RMSNorm of each head] and RoPE, or its gradient
    gated_halves:   y = act(x[:, :F]) x[:, F:]                       as `frozen_block.gated`
    cast_rows:      y = e4m3(x / scale),  scale = largest |x| of the row / 448 (1 for zeros)
    *_e4m3:         the same of what the operator would have written

They are steps of the autograd functions of `userip_fast.lm.halves`, not differentiable themselves.
Sums and products are in fp32; e4m3 is rounded from fp32, not from 16 bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from userip_fast.ops._operator import operator
from userip_fast.ops.frozen_block import (
    ACTIVATIONS,
    _wide,
    gated_backward_reference,
    gated_reference,
    rms_norm_backward_reference,
    rms_norm_reference,
    rotate_reference,
)

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up [M, F] of [M, 2 F]."""
    gate, up = x.chunk(2, 1)
    return gate, up


def _e4m3_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Values and scales of x's rows, to be written."""
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[0], dtype=torch.float32)


def _half(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2)


def cast_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: x [M, K] to e4m3 [M, K] and the fp32 scale [M] of each row."""
    wide = _wide(x)
    top = wide.abs().amax(1)
    scale = torch.where(top > 0, top / LARGEST, 1.0)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3), scale.float()


@operator("cast_rows", cast_rows_reference, fake=_e4m3_like)
def cast_rows(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """x [M, K], rows may be strided, to e4m3 and scales [M]; impl "triton" or "reference"."""
    from userip_fast.kernels import packed_block as kernels

    y, scale = _e4m3_like(x)
    kernels.cast_rows(x, y, scale)
    return y, scale


def rms_norm_e4m3_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The oracle: the norm in fp32, then cast."""
    wide = _wide(x) if residual is None else _wide((_wide(x) + _wide(residual)).to(x.dtype))
    y, _, r = rms_norm_reference(wide, None, _wide(weight), eps, offset)
    total = x.new_empty(0) if residual is None else wide.to(x.dtype)
    return *cast_rows_reference(y), total, r


def _norm_results(x: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    y, scale = _e4m3_like(x)
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return y, scale, total, torch.empty_like(scale)


@operator("rms_norm_e4m3", rms_norm_e4m3_reference, fake=_norm_results)
def rms_norm_e4m3(*args: Any) -> tuple[Tensor, ...]:
    """`rms_norm` [M, D] in e4m3: values, scales [M], total (empty without a residual), r [M]."""
    from userip_fast.kernels import frozen_block as kernels

    x, residual, weight, eps, offset, _ = args
    out = _norm_results(x, residual)
    kernels.rms_norm(x, residual, weight, *out, eps, offset)
    return out


def gated_halves_reference(x: Tensor, act: str) -> Tensor:
    """The oracle: act(gate) up."""
    return gated_reference(*_halves(x), act)


@operator("gated_halves", gated_halves_reference, fake=_half)
def gated_halves(x: Tensor, act: str, impl: str) -> Tensor:
    """x [M, 2 F] contiguous to act(gate) up [M, F]."""
    from userip_fast.kernels import packed_block as kernels

    y = _half(x)
    kernels.gated_halves(x, y, ACTIVATIONS.index(act))
    return y


def gated_halves_backward_reference(dy: Tensor, x: Tensor, act: str) -> Tensor:
    """The oracle of its gradient."""
    return torch.cat(gated_backward_reference(dy, *_halves(x), act), 1)


@operator(
    "gated_halves_backward",
    gated_halves_backward_reference,
    fake=lambda dy, x, *_: torch.empty_like(x),
)
def gated_halves_backward(dy: Tensor, x: Tensor, act: str, impl: str) -> Tensor:
    """dy [M, F] and x to dx [M, 2 F]."""
    from userip_fast.kernels import packed_block as kernels

    dx = torch.empty_like(x)
    kernels.gated_halves_backward(dy, x, dx, ACTIVATIONS.index(act))
    return dx


def gated_halves_e4m3_reference(x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The oracle: in fp32, then cast."""
    return cast_rows_reference(gated_halves_reference(_wide(x), act))


@operator("gated_halves_e4m3", gated_halves_e4m3_reference, fake=lambda x, *_: _e4m3_like(_half(x)))
def gated_halves_e4m3(x: Tensor, act: str, impl: str) -> tuple[Tensor, Tensor]:
    """`gated_halves` in e4m3: values [M, F] and scales [M]."""
    from userip_fast.kernels import packed_block as kernels

    y, scale = _e4m3_like(_halves(x)[0])
    kernels.gated_halves_e4m3(x, y, scale, ACTIVATIONS.index(act))
    return y, scale


def gated_halves_backward_e4m3_reference(dy: Tensor, x: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The oracle: in fp32, then cast."""
    return cast_rows_reference(gated_halves_backward_reference(_wide(dy), _wide(x), act))


@operator(
    "gated_halves_backward_e4m3",
    gated_halves_backward_e4m3_reference,
    fake=lambda dy, x, *_: _e4m3_like(x),
)
def gated_halves_backward_e4m3(dy: Tensor, x: Tensor, act: str, impl: str) -> tuple[Tensor, Tensor]:
    """`gated_halves_backward` in e4m3: values [M, 2 F] and scales [M]."""
    from userip_fast.kernels import packed_block as kernels

    dx, scale = _e4m3_like(x)
    kernels.gated_halves_backward_e4m3(dy, x, dx, scale, ACTIVATIONS.index(act))
    return dx, scale


def turn_reference(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool) -> None:
    """The oracle: `rotate`, in place."""
    x.copy_(rotate_reference(x, cosine, sine, backward))


@operator("turn_", turn_reference, fake=lambda *_: None, mutates=("x",))
def turn_(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool, impl: str) -> None:
    """RoPE of x [T, heads, d] in place, or back; rows may be strided, angles [T, d]."""
    from userip_fast.kernels import packed_block as kernels

    kernels.turn(x, x, None, cosine, sine, None, 0, 0.0, 0.0, backward)


class HeadNorm(NamedTuple):
    """RMSNorm of every head, and RoPE behind it; the first `queries` heads are queries."""

    q_weight: Tensor  # [d]
    k_weight: Tensor
    cosine: Tensor  # [T, d]
    sine: Tensor
    queries: int
    eps: float
    offset: float

    def parts(self, heads: int) -> tuple[tuple[slice, Tensor], tuple[slice, Tensor]]:
        """Queries and keys of so many heads, and their weights."""
        return (slice(0, self.queries), self.q_weight), (slice(self.queries, heads), self.k_weight)


def norm_turn_reference(x: Tensor, norm: HeadNorm) -> Tensor:
    """The oracle: in fp32, rounded once."""
    y = x.new_empty(x.shape)
    for part, weight in norm.parts(x.shape[1]):
        wide = _wide(x[:, part])
        flat = wide.reshape(-1, x.shape[2])
        flat = rms_norm_reference(flat, None, _wide(weight), norm.eps, norm.offset)[0]
        turned = rotate_reference(flat.view(wide.shape), norm.cosine, norm.sine, False)
        y[:, part] = turned.to(x.dtype)
    return y


@operator("norm_turn", norm_turn_reference, fake=lambda x, *_: x.new_empty(x.shape))
def norm_turn(x: Tensor, norm: HeadNorm, impl: str) -> Tensor:
    """RMSNorm of every head of x [T, heads, d], then RoPE."""
    from userip_fast.kernels import packed_block as kernels

    y = x.new_empty(x.shape)
    kernels.turn(x, y, None, *norm[2:4], norm[:2], *norm[4:], False)
    return y


def norm_turn_backward_reference(d: Tensor, x: Tensor, norm: HeadNorm) -> None:
    """The oracle: in fp32, rounded once."""
    for part, weight in norm.parts(x.shape[1]):
        g = rotate_reference(_wide(d[:, part]), norm.cosine, norm.sine, True)
        wide = _wide(x[:, part]).reshape(-1, x.shape[2])
        r = torch.rsqrt(wide.square().mean(1) + norm.eps)
        flat = g.reshape(wide.shape)
        dx = rms_norm_backward_reference(flat, None, wide, r, _wide(weight), norm.offset)
        d[:, part] = dx.view(g.shape).to(d.dtype)


@operator("norm_turn_backward_", norm_turn_backward_reference, fake=lambda *_: None, mutates=("d",))
def norm_turn_backward_(d: Tensor, x: Tensor, norm: HeadNorm, impl: str) -> None:
    """The gradient of `norm_turn`, in place of that of its result."""
    from userip_fast.kernels import packed_block as kernels

    kernels.turn(d, d, x, *norm[2:4], norm[:2], *norm[4:], True)
