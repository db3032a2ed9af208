"""Attention of packed users over [constant field-name prefix | own soft rows | own behaviour].

The rows of user u are `cu_seqlens[u]:cu_seqlens[u + 1]`; every user also sees the same P prefix
rows, whose K/V is computed once per LM. Row r sees column c (a prefix row, or an own row not after
r) iff, with s for segment,

    s_r == s_c  or  s_c < 0  or  (s_r >= num_fields and s_c < num_fields)

so a field sees itself and BOS (segment -1), and behaviour sees all fields and its own segment: one
for a plain sequence (`num_fields`), one per item (`num_fields + i`) when items are independent
given the profile. The last two terms are one comparison, `s_c < (num_fields if behaviour else 0)`,
which is how every implementation writes them. The prefix is constant and gets no gradient.

A window or a chunk (never both) narrows this by position. A head may have a sink, a constant logit
whose share of the softmax goes nowhere: lse' = logaddexp(lse, sink). v may be of another width
than q and k. None of the three changes the backward pass but by its lse and widths.

Backward, with P = exp(S - lse) and delta = sum_d(out * d_out), as in FlashAttention-2 (arXiv
2307.08691): dV = P^T dO, dS = P (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q; a soft cap
multiplies dS by 1 - (S / softcap)^2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from userip_fast.ops._dispatch import by_device, resolve
from userip_fast.ops._operator import differentiable, flat, operator
from userip_fast.ops._triton import why_not as why_not_triton
from userip_fast.ops.soft_prompt_attention import reference
from userip_fast.ops.soft_prompt_attention.context import Context

_OP = "soft_prompt_attention"

soft_prompt_attention_reference = flat(reference.forward)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, context: Context, impl: str) -> Any:
    acc = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(0) if impl == "cpu" else q.new_empty(q.shape[1], q.shape[0], dtype=acc)
    return q.new_empty(*q.shape[:2], v.shape[2]), lse


@operator(_OP, reference.forward, fake=_forward_fake)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, context: Context, impl: str) -> Any:
    """out and lse, which is empty by "cpu": its backward pass needs none."""
    if impl == "cpu":
        from userip_fast.ops.soft_prompt_attention import cpu

        return cpu.forward(q, k, v, context), q.new_empty(0)
    from userip_fast.kernels import soft_prompt_attention as kernels

    if impl == "triton":
        return kernels.forward(q, k, v, context)
    from userip_fast.ops.soft_prompt_attention import varlen

    return varlen.forward(q, k, v, context, kernels, varlen.flash_for(q, k))


@operator(
    "soft_prompt_attention_backward",
    reference.backward,
    fake=lambda d_out, q, k, v, *others: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    impl: str,
) -> Any:  # fmt: skip
    """dq, dk and dv."""
    if impl == "cpu":
        from userip_fast.ops.soft_prompt_attention import cpu

        return cpu.backward(d_out, q, k, v, out, context)
    from userip_fast.kernels import soft_prompt_attention as kernels

    if impl == "triton":
        return kernels.backward(d_out, q, k, v, out, lse, context)
    from userip_fast.ops.soft_prompt_attention import varlen

    flash = varlen.flash_for(q, k)
    return varlen.backward(d_out, q, k, v, out, lse, context, kernels, flash)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, context, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, *context.tensors)
    ctx.settings = context.settings
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # the lse has none, which would be zeros else


def _backward(ctx: Any, d_out: Tensor | None, _d_lse: None) -> tuple[Tensor, ...]:
    if d_out is None:
        return ()
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    context = Context(*tensors, *ctx.settings)
    grads: tuple[Tensor, ...] = attention_backward(d_out, q, k, v, out, lse, context, ctx.impl)
    return grads


_attention = differentiable(attention_forward, _setup_context, _backward)


def _why_not_triton(q: Tensor, v: Tensor) -> str | None:
    if max(q.shape[2], v.shape[2]) > 256:
        return f"it takes heads of at most 256, these are {q.shape[2]} and {v.shape[2]}"
    if q.dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return "Triton's interpreter cannot multiply bfloat16"
    return why_not_triton(q)


def _why_not_varlen(q: Tensor, v: Tensor, context: Context) -> str | None:
    if context.sinks is not None or context.chunk or v.shape[2] != q.shape[2]:
        return "it knows neither sinks nor chunks nor a v of another width"
    if q.device.type != "cuda":
        return f"it needs a CUDA device for torch's flash kernels, the tensors are on {q.device}"
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] % 8:
        return f"flash kernels take bf16 or fp16 and multiples of 8, got {q.dtype}, {q.shape[2]}"
    return _why_not_triton(q, v)  # for the soft rows


def soft_prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    segment: Tensor,
    prefix_segment: Tensor,
    cu_seqlens: Tensor,
    position: Tensor,
    prefix_position: Tensor,
    *,
    num_fields: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: Tensor | None = None,
    max_seqlen: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention of packed users with a shared constant prefix and a mask from segments.

    Args:
        q: [T, H, d] fp32/bf16/fp16 (fp64 for oracles), RoPE applied; rows may be strided, the last
            dimension is contiguous. Differentiable. Slack rows may hold any finite value.
        k: [T, Hkv, d], like `q`; Hkv divides H. Differentiable.
        v: [T, Hkv, dv], like `k` but for its width. Differentiable.
        prefix_k: [P, Hkv, d], K of BOS and the field names after RoPE; constant. P may be 0.
        prefix_v: [P, Hkv, dv].
        segment: [T] int32: the field of a soft row, `num_fields` or more for behaviour.
        prefix_segment: [P] int32: -1 for BOS (visible to all), else the field.
        cu_seqlens: [U + 1] int32, first row of each user, from 0; the last entry is at most T. Rows
            past it are slack: output and gradients are zero there.
        position: [T] int32, RoPE positions; read only under a window or in chunks.
        prefix_position: [P] int32.
        num_fields: J.
        scale: Multiplies q.k, usually d ** -0.5.
        window: Keep only columns with `position_c > position_r - window`; 0 for no window.
        softcap: Scores become `softcap * tanh(score / softcap)`; 0 for none.
        chunk: Keep only columns with `position_c // chunk == position_r // chunk`; 0 for none.
        sinks: [H], any dtype, constant: a logit of each head beside its scores, after the soft cap,
            whose probability is dropped, as in gpt-oss; None for none.
        max_seqlen: Most rows of any user, if known on the host; only `varlen` needs it.
        impl: "auto", "cpu", "triton", "varlen" or "reference".

    Returns:
        out: [T, H, dv] in the dtype of `q`, contiguous. Sums are kept in fp32.

    Raises:
        ValueError: A shape, dtype or argument breaks the rules above.
        UnavailableError: The implementation asked for cannot run this call.
    """
    context = Context(
        prefix_k, prefix_v, segment, prefix_segment, cu_seqlens, position, prefix_position, sinks,
        num_fields, scale, window, softcap, chunk, max_seqlen or 0,
    )  # fmt: skip
    _check(q, k, v, context)
    if (
        num_fields < 1
        or min(window, chunk) < 0
        or not softcap >= 0.0
        or not math.isfinite(scale)
        or (window and chunk)
    ):
        raise ValueError(
            f"{_OP}: num_fields >= 1, window >= 0 or chunk >= 0 (not both), softcap >= 0 and a "
            f"finite scale are needed, got num_fields={num_fields}, window={window}, "
            f"chunk={chunk}, softcap={softcap}, scale={scale}"
        )
    if sinks is not None and (
        sinks.shape != q.shape[1:2] or sinks.device != q.device or sinks.requires_grad
    ):
        raise ValueError(
            f"{_OP}: sinks must be a constant [{q.shape[1]}] on {q.device}, got "
            f"{tuple(sinks.shape)} on {sinks.device}, requires_grad={sinks.requires_grad}"
        )
    found = by_device(
        q,
        cpu=lambda: None if q.device.type in ("cpu", "meta") else f"the tensors are on {q.device}",
        triton=lambda: _why_not_triton(q, v),
    )  # whether varlen is faster anywhere has not been measured: by name alone
    chosen = resolve(_OP, impl, found | {"varlen": lambda: _why_not_varlen(q, v, context)})
    out: Tensor = _attention(q, k, v, context, chosen)[0]
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:
    prefix_k, prefix_v, cu_seqlens = context.prefix_k, context.prefix_v, context.cu_seqlens
    if any(x.dim() != 3 for x in (q, k, v, prefix_k)):
        raise ValueError(
            f"{_OP}: q [T, H, d], k [T, Hkv, d], v [T, Hkv, dv] and prefix_k [P, Hkv, d] must have "
            f"3 dimensions, got {', '.join(str(tuple(x.shape)) for x in (q, k, v, prefix_k))}"
        )
    (rows, heads, dim), kv_heads, prefix = q.shape, k.shape[1], prefix_k.shape[0]
    width = v.shape[2]
    if not 8 <= dim <= 512 or not 1 <= width <= 512 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{_OP}: head size must be 8 to 512, v at most 512 wide, and the key heads must divide "
            f"the query heads, got head size {dim}, v {width} wide, {heads} query heads, "
            f"{kv_heads} key heads"
        )
    for name, x, shape in (
        ("k", k, (rows, kv_heads, dim)),
        ("v", v, (rows, kv_heads, width)),
        ("prefix_k", prefix_k, (prefix, kv_heads, dim)),
        ("prefix_v", prefix_v, (prefix, kv_heads, width)),
    ):
        if tuple(x.shape) != shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{_OP}: {name} must be {q.dtype} {shape} on {q.device} to go with q "
                f"{tuple(q.shape)}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{_OP}: q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    for name, x in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.stride(2) != 1:
            raise ValueError(
                f"{_OP}: the last dimension of {name} must be contiguous, its strides are "
                f"{x.stride()}; call .contiguous()"
            )
    if prefix_k.requires_grad or prefix_v.requires_grad:
        raise ValueError(
            f"{_OP}: prefix_k and prefix_v are constants, one requires grad; detach it"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{_OP}: cu_seqlens must be [U + 1], got {tuple(cu_seqlens.shape)}")
    for name, x, length in (
        ("segment", context.segment, rows),
        ("prefix_segment", context.prefix_segment, prefix),
        ("position", context.position, rows),
        ("prefix_position", context.prefix_position, prefix),
        ("cu_seqlens", cu_seqlens, cu_seqlens.shape[0]),
    ):
        if tuple(x.shape) != (length,) or x.dtype != torch.int32 or x.device != q.device:
            raise ValueError(
                f"{_OP}: {name} must be int32 [{length}] on {q.device}, got {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
            )
