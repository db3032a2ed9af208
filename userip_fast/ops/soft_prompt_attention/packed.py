"""`soft_prompt_attention` on the rows of one q-k-v product, a step of `userip_fast.lm.halves`.

v is as wide as k. q, k and v are heads of one tensor [T, H + 2 Hkv, d], or
v is and q and k are of another; gradients are written into one tensor of that shape, which the
product's backward pass reads as it lies. The work lists of a pack are made by its first layer and
kept for the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from userip_fast.ops._operator import operator, watched
from userip_fast.ops.soft_prompt_attention import attention_backward, attention_forward, reference
from userip_fast.ops.soft_prompt_attention.context import Context


def forward(
    q: Tensor, k: Tensor, v: Tensor, context: Context, impl: str, lists: Any
) -> tuple[Tensor, Tensor]:
    """out [T, H, d] and lse, as the op's `impl` keeps it."""
    if impl == "triton" and not watched(q):
        from userip_fast.kernels import soft_prompt_attention as kernels

        return kernels.forward(q, k, v, context, lists)
    out: tuple[Tensor, Tensor] = attention_forward(q, k, v, context, impl)
    return out


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    impl: str, lists: Any,
) -> Tensor:  # fmt: skip
    """[T, H + 2 Hkv, d], the gradients of q, k and v side by side."""
    if impl == "triton" and not watched(q):
        return _by_triton(d_out, q, k, v, out, lse, context, lists)
    whole: Tensor = _backward(d_out, q, k, v, out, lse, context, impl)
    return whole


def backward_reference(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context
) -> Tensor:
    """The oracle of `backward`."""
    return torch.cat(reference.backward(d_out, q, k, v, out, lse, context), 1)


@operator(
    "packed_attention_backward",
    backward_reference,
    fake=lambda d_out, q, k, *others: q.new_empty(len(q), q.shape[1] + 2 * k.shape[1], q.shape[2]),
)
def _backward(*args: Any) -> Tensor:
    *inputs, impl = args
    if impl == "triton":
        return _by_triton(*inputs)
    return torch.cat(attention_backward(*args), 1)


def _by_triton(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, context: Context,
    lists: Any = None,
) -> Tensor:  # fmt: skip
    from userip_fast.kernels import soft_prompt_attention as kernels

    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    whole = q.new_empty(rows, heads + 2 * kv_heads, dim)
    parts = torch.split(whole, [heads, kv_heads, kv_heads], 1)
    kernels.backward(d_out, q, k, v, out, lse, context, lists, parts)
    return whole
