"""The two halves of a frozen decoder layer, each one autograd function.

    s = x + residual;  out = f(RMSNorm(s));  returns (out, s)

x is what the half before gave and `residual` what it passed on, so the residual sum is part of the
norm both ways: its gradient d_s is added where the norm's gradient is written, and nobody else has
to. f is attention (q-k-v product, [norms of heads,] RoPE, attention, output product) or the gated
MLP. Saved are s and a number per row; q, k, v, attention's output and its lse; gate and up: what
the formulas of `userip_fast.ops.frozen_block` and `soft_prompt_attention` need, and nothing of a
product. q and k are turned where the product wrote them, gradients written where the product's
backward pass reads them. FP8 products get e4m3 from the operator before them where there is one,
else from one cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from userip_fast.lm.attention import Call, PackContext
from userip_fast.lm.masks import Near
from userip_fast.lm.products import Product
from userip_fast.ops import packed_block as ops
from userip_fast.ops.frozen_block import rms_norm_backward, rms_norm_forward
from userip_fast.ops.soft_prompt_attention import packed
from userip_fast.ops.soft_prompt_attention.context import Context


@dataclass(frozen=True)
class Norm:
    """An RMSNorm: weight [D], epsilon, what is added to the weight, implementation."""

    weight: Tensor
    eps: float
    offset: float
    impl: str

    def forward(self, x: Tensor, residual: Tensor | None, e4m3: bool) -> tuple[Any, Tensor, Tensor]:
        """What a product takes, s and r."""
        if e4m3:
            y, scale, s, r = ops.rms_norm_e4m3(
                x, residual, self.weight, self.eps, self.offset, self.impl
            )
            return (y, scale), x if residual is None else s, r
        y, s, r = rms_norm_forward(x, residual, self.weight, self.eps, self.offset, self.impl)
        return y, x if residual is None else s, r

    def backward(self, dy: Tensor, d_s: Tensor | None, s: Tensor, r: Tensor) -> Tensor:
        """[T, D], the gradient of x and of the residual."""
        d_s = None if d_s is None else d_s.contiguous()
        d: Tensor = rms_norm_backward(dy, d_s, s, r, self.weight, self.offset, self.impl)
        return d


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms [d] of the query and key heads."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float

    def before(self, angles: tuple[Tensor, Tensor], queries: int) -> ops.HeadNorm:
        """These, and the turn behind them."""
        return ops.HeadNorm(self.query, self.key, *angles, queries, self.eps, self.offset)


@dataclass(frozen=True)
class AttentionHalf:
    """Of one layer. `heads`: (H, Hkv, d); `module`: the attention module's id."""

    norm: Norm
    qkv: Product
    output: Product
    heads: tuple[int, int, int]
    head_norms: HeadNorms | None
    scaling: float
    module: int

    def __call__(
        self, x: Tensor, residual: Tensor | None, angles: tuple[Tensor, Tensor],
        context: PackContext, impl: str, rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, residual [T, D] to out and s, [T, D], or [R, D] where `rows` [R] are given."""
        out: tuple[Tensor, Tensor] = _Attention.apply(  # type: ignore[no-untyped-call]
            x, residual, self, angles, context, impl, rows
        )
        return out


@dataclass(frozen=True)
class MLPHalf:
    """Of one layer. `act`: as `frozen_block.gated`."""

    norm: Norm
    gate_up: Product
    down: Product
    act: str

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x, residual [T, D] to out and s [T, D]."""
        out: tuple[Tensor, Tensor] = _MLP.apply(x, residual, self)  # type: ignore[no-untyped-call]
        return out


def _for(product: Product, x: Tensor, impl: str) -> Any:
    """x as the product takes it."""
    return ops.cast_rows(x, impl) if product.e4m3 else x


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, half: AttentionHalf,
        angles: tuple[Tensor, Tensor], context: PackContext, impl: str, rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        heads, kv_heads, dim = half.heads
        turned = heads + kv_heads
        y, s, r = half.norm.forward(x, residual, half.qkv.e4m3)
        qkv = half.qkv.out(y).view(len(x), turned + kv_heads, dim)
        qk, how = qkv[:, :turned], half.norm.impl
        if half.head_norms is None:
            ops.turn_(qk, *angles, False, how)
        else:
            qk = ops.norm_turn(qk, half.head_norms.before(angles, heads), how)
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, turned:]
        near = context.near.get(half.module, Near())
        if context.calls is not None:
            context.calls.append(Call(half.module, k.contiguous(), v.contiguous(), near))
        if context.prefix is None:
            prefix = (k.new_empty(0, kv_heads, dim), k.new_empty(0, kv_heads, dim))
        else:
            (prefix,) = context.prefix[half.module]
        read_in = Context(
            *prefix, context.segment, context.prefix_segment, context.cu_seqlens, context.position,
            context.prefix_position, None, context.num_fields, half.scaling, near.window, 0.0,
            near.chunk, context.max_seqlen,
        )  # fmt: skip
        out, lse = packed.forward(q, k, v, read_in, impl, context.work_lists)
        ctx.save_for_backward(s, r, qkv, qk, out, lse, rows, *angles, *read_in.tensors)
        ctx.half, ctx.settings, ctx.impl = half, read_in.settings, impl
        ctx.lists = context.work_lists
        ctx.joined = residual is not None
        ctx.set_materialize_grads(False)
        attended = out.view(len(x), heads * dim)
        if rows is not None:
            attended, s = attended.index_select(0, rows), s.index_select(0, rows)
        return half.output.out(_for(half.output, attended, how)), s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        s, r, qkv, qk, out, lse, rows, cosine, sine, *tensors = ctx.saved_tensors
        read_in = Context(*tensors, *ctx.settings)
        half: AttentionHalf = ctx.half
        (heads, kv_heads, _), how = half.heads, half.norm.impl
        d_out, d_s = grads
        assert d_out is not None
        d_attended = half.output.back(_for(half.output, d_out.contiguous(), how))
        if rows is not None:
            d_attended = _placed(d_attended, rows, len(s))
            d_s = None if d_s is None else _placed(d_s, rows, len(s))
        q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]
        d = packed.backward(
            d_attended.view(out.shape), q, k, v, out, lse, read_in, ctx.impl, ctx.lists
        )
        d_qk = d[:, : heads + kv_heads]
        if half.head_norms is None:
            ops.turn_(d_qk, cosine, sine, True, how)
        else:
            norm = half.head_norms.before((cosine, sine), heads)
            ops.norm_turn_backward_(d_qk, qkv[:, : heads + kv_heads], norm, how)
        dy = half.qkv.back(_for(half.qkv, d.view(len(d), -1), how))
        dx = half.norm.backward(dy, d_s, s, r)
        return dx, dx if ctx.joined else None, None, None, None, None, None


def _placed(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """x [R, D] at its rows of [count, D], zeros elsewhere."""
    return x.new_zeros(count, x.shape[1]).index_copy_(0, rows, x)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, half: MLPHalf) -> tuple[Tensor, Tensor]:
        y, s, r = half.norm.forward(x, residual, half.gate_up.e4m3)
        gate_up, how = half.gate_up.out(y), half.norm.impl
        gated = ops.gated_halves_e4m3 if half.down.e4m3 else ops.gated_halves
        ctx.save_for_backward(s, r, gate_up)
        ctx.half = half
        ctx.set_materialize_grads(False)
        return half.down.out(gated(gate_up, half.act, how)), s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        s, r, gate_up = ctx.saved_tensors
        half: MLPHalf = ctx.half
        (d_out, d_s), how = grads, half.norm.impl
        assert d_out is not None
        d_gated = half.down.back(_for(half.down, d_out.contiguous(), how))
        backward = (
            ops.gated_halves_backward_e4m3 if half.gate_up.e4m3 else ops.gated_halves_backward
        )
        dy = half.gate_up.back(backward(d_gated, gate_up, half.act, how))
        dx = half.norm.backward(dy, d_s, s, r)
        return dx, dx, None
