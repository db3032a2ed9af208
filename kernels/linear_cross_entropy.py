"""Triton kernel of `userip_fast.ops.linear_cross_entropy`: the element-wise half of a chunk.

logits [R, V] contiguous fp32, bf16 or fp16, product of hidden rows and the head; overwritten by the
gradient with respect to that product, times the token's weight. target [R] int64, loss_weight and
token_nll [R] fp32. One program owns a row: a running maximum and sum in one pass (arXiv
1805.02867), the gradient in a second, both in fp32, in the order of the vocabulary. No atomics. A
target out of range gives NaN rather than a read out of bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logit(logits_ptr, bias_ptr, at, k, V, softcap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits at columns k, after bias and soft cap; -inf past the vocabulary."""
    inside = k < V
    x = tl.load(logits_ptr + at + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if SOFTCAP:
        # tanh(y) = 1 - 2 / (exp(2y) + 1); its error of 1e-7 is far below that of the logits.
        x = softcap * (1.0 - 2.0 / (tl.exp2(x / softcap * (2.0 * LOG2E)) + 1.0))
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, bias_ptr, target_ptr, loss_weight_ptr, token_nll_ptr, V, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = row * V
    target = tl.load(target_ptr + row)
    weight = tl.load(loss_weight_ptr + row)
    valid = (target >= 0) & (target < V)

    lanes = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_V], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    picked = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        k = start + lanes
        x = _logit(logits_ptr, bias_ptr, at, k, V, softcap, HAS_BIAS, SOFTCAP)
        higher = tl.maximum(top, x)
        # A lane that has seen no column yet: exp2(-inf - -inf) would be NaN.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2((top - base) * LOG2E) + tl.exp2((x - base) * LOG2E)
        top = higher
        picked += tl.where(k == target, x, 0.0)
    high = tl.max(top, 0)
    total = tl.sum(total * tl.exp2((top - high) * LOG2E), 0)
    at_target = tl.where(valid, tl.sum(picked, 0), float("nan"))
    lse = high + tl.log2(total) * LN2
    tl.store(token_nll_ptr + row, weight * (lse - at_target))

    if NEED_GRAD:
        scale = weight / total
        for start in range(0, V, BLOCK_V):
            k = start + lanes
            x = _logit(logits_ptr, bias_ptr, at, k, V, softcap, HAS_BIAS, SOFTCAP)
            g = tl.exp2((x - high) * LOG2E) * scale
            g -= tl.where(k == target, weight, 0.0)
            if SOFTCAP:
                g *= 1.0 - (x / softcap) * (x / softcap)
            g = g.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + at + k, g, mask=k < V)


def cross_entropy_rows(
    logits: Tensor, bias: Tensor | None, target: Tensor, loss_weight: Tensor, token_nll: Tensor,
    softcap: float, need_grad: bool,
) -> None:  # fmt: skip
    """Writes `token_nll` and, with `need_grad`, overwrites `logits`; one launch."""
    rows, vocab = logits.shape
    if rows == 0:
        return
    _cross_entropy_kernel[(rows,)](
        logits, bias, target, loss_weight, token_nll, vocab, softcap,
        HAS_BIAS=bias is not None, SOFTCAP=softcap > 0.0, NEED_GRAD=need_grad,
        BLOCK_V=min(4096, triton.next_power_of_2(vocab)), num_warps=8,
    )  # fmt: skip
