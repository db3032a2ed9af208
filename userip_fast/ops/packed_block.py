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

import torch
from torch import Tensor

from userip_fast.ops._step import step_op
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


def cast_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: x [M, K] to e4m3 [M, K] and the fp32 scale [M] of each row."""
    wide = _wide(x)
    top = wide.abs().amax(1)
    scale = torch.where(top > 0, top / LARGEST, 1.0)
    return (wide / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3), scale.float()


def _cast_rows_fake(x, impl):  # type: ignore[no-untyped-def]
    return _e4m3_like(x, x.shape[1])


@step_op("cast_rows", fake=_cast_rows_fake)
def cast_rows(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """x [M, K], rows may be strided, to e4m3 and scales [M]; impl "triton" or "reference"."""
    if impl == "reference":
        return cast_rows_reference(x)
    from userip_fast.kernels import packed_block as kernels

    y, scale = _e4m3_like(x, x.shape[1])
    kernels.cast_rows(x, y, scale)
    return y, scale


def _rms_norm_e4m3_fake(x, residual, weight, eps, offset, impl):  # type: ignore[no-untyped-def]
    y, scale = _e4m3_like(x, x.shape[1])
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return y, scale, total, torch.empty_like(scale)


@step_op("rms_norm_e4m3", fake=_rms_norm_e4m3_fake)
def rms_norm_e4m3(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm` [M, D] in e4m3: values, scales [M], total (empty without a residual), r [M]."""
    if impl == "reference":
        wide = _wide(x) if residual is None else _wide((_wide(x) + _wide(residual)).to(x.dtype))
        y, _, r = rms_norm_reference(wide, None, _wide(weight), eps, offset)
        total = x.new_empty(0) if residual is None else wide.to(x.dtype)
        return *cast_rows_reference(y), total, r
    from userip_fast.kernels import packed_block as kernels

    y, scale = _e4m3_like(x, x.shape[1])
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    r = torch.empty_like(scale)
    kernels.rms_norm_e4m3(x, residual, weight, y, scale, total, r, eps, offset)
    return y, scale, total, r


def _gated_halves_fake(x, act, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@step_op("gated_halves", fake=_gated_halves_fake)
def gated_halves(x: Tensor, act: str, impl: str) -> Tensor:
    """x [M, 2 F] contiguous to act(gate) up [M, F]."""
    if impl == "reference":
        return gated_reference(*_halves(x), act)
    from userip_fast.kernels import packed_block as kernels

    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    kernels.gated_halves(x, y, ACTIVATIONS.index(act))
    return y


def _gated_halves_backward_fake(dy, x, act, impl):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@step_op("gated_halves_backward", fake=_gated_halves_backward_fake)
def gated_halves_backward(dy: Tensor, x: Tensor, act: str, impl: str) -> Tensor:
    """dy [M, F] and x to dx [M, 2 F]."""
    if impl == "reference":
        return torch.cat(gated_backward_reference(dy, *_halves(x), act), 1)
    from userip_fast.kernels import packed_block as kernels

    dx = torch.empty_like(x)
    kernels.gated_halves_backward(dy, x, dx, ACTIVATIONS.index(act))
    return dx


def _gated_halves_e4m3_fake(x, act, impl):  # type: ignore[no-untyped-def]
    return _e4m3_like(x, x.shape[1] // 2)


@step_op("gated_halves_e4m3", fake=_gated_halves_e4m3_fake)
def gated_halves_e4m3(x: Tensor, act: str, impl: str) -> tuple[Tensor, Tensor]:
    """`gated_halves` in e4m3: values [M, F] and scales [M]."""
    if impl == "reference":
        return cast_rows_reference(gated_reference(*_halves(_wide(x)), act))
    from userip_fast.kernels import packed_block as kernels

    y, scale = _e4m3_like(x, x.shape[1] // 2)
    kernels.gated_halves_e4m3(x, y, scale, ACTIVATIONS.index(act))
    return y, scale


def _gated_halves_backward_e4m3_fake(dy, x, act, impl):  # type: ignore[no-untyped-def]
    return _e4m3_like(x, x.shape[1])


@step_op("gated_halves_backward_e4m3", fake=_gated_halves_backward_e4m3_fake)
def gated_halves_backward_e4m3(dy: Tensor, x: Tensor, act: str, impl: str) -> tuple[Tensor, Tensor]:
    """`gated_halves_backward` in e4m3: values [M, 2 F] and scales [M]."""
    if impl == "reference":
        parts = gated_backward_reference(_wide(dy), *_halves(_wide(x)), act)
        return cast_rows_reference(torch.cat(parts, 1))
    from userip_fast.kernels import packed_block as kernels

    dx, scale = _e4m3_like(x, x.shape[1])
    kernels.gated_halves_backward_e4m3(dy, x, dx, scale, ACTIVATIONS.index(act))
    return dx, scale


def _turn_fake(x, cosine, sine, backward, impl):  # type: ignore[no-untyped-def]
    return None


@step_op("turn_", fake=_turn_fake, mutates=("x",))
def turn_(x: Tensor, cosine: Tensor, sine: Tensor, backward: bool, impl: str) -> None:
    """RoPE of x [T, heads, d] in place, or back; rows may be strided, angles [T, d]."""
    if impl == "reference":
        x.copy_(rotate_reference(x, cosine, sine, backward))
        return
    from userip_fast.kernels import packed_block as kernels

    kernels.turn(x, x, None, cosine, sine, None, 0, 0.0, 0.0, backward)


def _norm_turn_fake(x, q_weight, k_weight, cosine, sine, queries, eps, offset, impl):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@step_op("norm_turn", fake=_norm_turn_fake)
def norm_turn(
    x: Tensor, q_weight: Tensor, k_weight: Tensor, cosine: Tensor, sine: Tensor, queries: int,
    eps: float, offset: float, impl: str,
) -> Tensor:  # fmt: skip
    """RMSNorm of every head of x [T, heads, d] (`queries` of them queries), then RoPE."""
    y = x.new_empty(x.shape)
    if impl == "reference":
        for part, weight in _parts(x, queries, q_weight, k_weight):
            wide = _wide(x[:, part])
            flat = rms_norm_reference(
                wide.reshape(-1, x.shape[2]), None, _wide(weight), eps, offset
            )[0]
            y[:, part] = rotate_reference(flat.view(wide.shape), cosine, sine, False).to(x.dtype)
        return y
    from userip_fast.kernels import packed_block as kernels

    weights = (q_weight, k_weight)
    kernels.turn(x, y, None, cosine, sine, weights, queries, eps, offset, False)
    return y


def _norm_turn_backward_fake(d, x, q_weight, k_weight, cosine, sine, queries, eps, offset, impl):  # type: ignore[no-untyped-def]
    return None


@step_op("norm_turn_backward_", fake=_norm_turn_backward_fake, mutates=("d",))
def norm_turn_backward_(
    d: Tensor, x: Tensor, q_weight: Tensor, k_weight: Tensor, cosine: Tensor, sine: Tensor,
    queries: int, eps: float, offset: float, impl: str,
) -> None:  # fmt: skip
    """The gradient of `norm_turn`, in place of that of its result."""
    if impl == "reference":
        for part, weight in _parts(x, queries, q_weight, k_weight):
            g = rotate_reference(_wide(d[:, part]), cosine, sine, True)
            wide = _wide(x[:, part]).reshape(-1, x.shape[2])
            r = torch.rsqrt(wide.square().mean(1) + eps)
            dx = rms_norm_backward_reference(
                g.reshape(wide.shape), None, wide, r, _wide(weight), offset
            )
            d[:, part] = dx.view(g.shape).to(d.dtype)
        return
    from userip_fast.kernels import packed_block as kernels

    weights = (q_weight, k_weight)
    kernels.turn(d, d, x, cosine, sine, weights, queries, eps, offset, True)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """gate and up [M, F] of [M, 2 F]."""
    gate, up = x.chunk(2, 1)
    return gate, up


def _parts(
    x: Tensor, queries: int, q_weight: Tensor, k_weight: Tensor
) -> tuple[tuple[slice, Tensor], tuple[slice, Tensor]]:
    return (slice(0, queries), q_weight), (slice(queries, x.shape[1]), k_weight)


def _e4m3_like(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty((x.shape[0], width), dtype=E4M3)
    return values, x.new_empty(x.shape[0], dtype=torch.float32)
