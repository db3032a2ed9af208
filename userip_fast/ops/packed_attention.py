"""`soft_prompt_attention` on the rows of one q-k-v product, a step of `userip_fast.lm.halves`.

There are no sinks, and v is as wide as k. q, k and v are heads of one tensor [T, H + 2 Hkv, d], or
v is and q and k are of another; gradients are written into one tensor of that shape, which the
product's backward pass reads as it lies. The work lists of a pack are made by its first layer and
kept for the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from userip_fast.ops._step import watched
from userip_fast.ops.soft_prompt_attention import attention_backward, attention_forward


class Mask(NamedTuple):
    """Who sees whom; the arguments of `soft_prompt_attention` that a pack's layers share."""

    segment: Tensor
    prefix_segment: Tensor
    cu_seqlens: Tensor
    position: Tensor
    prefix_position: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Mask,
    settings: tuple[Any, ...], lists: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T, H, d] and lse, as the op's `impl` (the last of `settings`) keeps it."""
    if settings[-1] == "triton" and not watched(q):
        from userip_fast.kernels import soft_prompt_attention as kernels

        return kernels.forward(q, k, v, prefix_k, prefix_v, *mask, None, *settings[:5], lists)
    return attention_forward(q, k, v, prefix_k, prefix_v, *mask, None, *settings)


@torch.library.custom_op("userip_fast::packed_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    segment: Tensor, prefix_segment: Tensor, cu_seqlens: Tensor, position: Tensor,
    prefix_position: Tensor, out: Tensor, lse: Tensor, num_fields: int, scale: float,
    window: int, softcap: float, chunk: int, max_seqlen: int, impl: str,
) -> Tensor:  # fmt: skip
    mask = Mask(segment, prefix_segment, cu_seqlens, position, prefix_position)
    settings = (num_fields, scale, window, softcap, chunk, max_seqlen, impl)
    return _run(d_out, q, k, v, prefix_k, prefix_v, mask, out, lse, settings, None)


@_backward.register_fake
def _(d_out, q, k, v, *args):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])


def _run(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    mask: Mask, out: Tensor, lse: Tensor, settings: tuple[Any, ...], lists: Any,
) -> Tensor:  # fmt: skip
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    whole = q.new_empty(rows, heads + 2 * kv_heads, dim)
    parts = torch.split(whole, [heads, kv_heads, kv_heads], 1)
    if settings[-1] == "triton":
        from userip_fast.kernels import soft_prompt_attention as kernels

        more: Any = (*mask, None, out, lse, *settings[:5], lists, parts)
        kernels.backward(d_out, q, k, v, prefix_k, prefix_v, *more)
        return whole
    more = (*mask, None, out, lse, *settings)
    grads = attention_backward(d_out, q, k, v, prefix_k, prefix_v, *more)
    for part, grad in zip(parts, grads, strict=True):
        part.copy_(grad)
    return whole


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    mask: Mask, out: Tensor, lse: Tensor, settings: tuple[Any, ...], lists: Any,
) -> Tensor:  # fmt: skip
    """[T, H + 2 Hkv, d], the gradients of q, k and v side by side."""
    if watched(q):
        return _backward(d_out, q, k, v, prefix_k, prefix_v, *mask, out, lse, *settings)
    return _run(d_out, q, k, v, prefix_k, prefix_v, mask, out, lse, settings, lists)
