"""Triton kernels of `userip_fast.ops.prepend_soft_prompts`: a gather, and a segment sum for theta.

Forward: one program per (row of x, block of columns); x [T, D] in the table's dtype. Vocabulary
rows are multiplied in fp32 by the rounded scale and rounded once, like a product in their dtype.
An id out of range reads nothing and gives NaN.

Backward: one program per (soft row, block of columns) adds the row's occurrences in plan order, in
fp32; `order` and `bounds` come from a stable sort of the plan. A row has one owner: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SLACK_ROW = tl.constexpr(-(2**31))
_BLOCK_D = 1024


@triton.jit
def _prepend_kernel(
    table_ptr, soft_ptr, plan_ptr, x_ptr, stride_table, stride_soft, V, R, D, scale,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    p = tl.load(plan_ptr + t)
    is_token = (p >= 0) & (p < V)
    is_soft = (p < 0) & (p >= -R)
    token_at = table_ptr + tl.cast(tl.where(is_token, p, 0), tl.int64) * stride_table
    soft_at = soft_ptr + tl.cast(tl.where(is_soft, -(p + 1), 0), tl.int64) * stride_soft
    token = (
        tl.load(token_at + d, mask=d < tl.where(is_token, D, 0), other=0.0).to(tl.float32) * scale
    )
    soft = tl.load(soft_at + d, mask=d < tl.where(is_soft, D, 0), other=0.0).to(tl.float32)
    x = tl.where(
        is_token | is_soft | (p == SLACK_ROW), tl.where(is_token, token, soft), float("nan")
    )
    tl.store(x_ptr + tl.cast(t, tl.int64) * D + d, x.to(x_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _prepend_backward_kernel(d_x_ptr, order_ptr, bounds_ptr, d_soft_ptr, D, BLOCK_D: tl.constexpr):
    r = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(bounds_ptr + r)
    end = tl.load(bounds_ptr + r + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(first, end):
        t = tl.load(order_ptr + i)
        total += tl.load(d_x_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
    at = d_soft_ptr + tl.cast(r, tl.int64) * D + d
    tl.store(at, total.to(d_soft_ptr.dtype.element_ty), mask=d < D)


def forward(table: Tensor, soft_rows: Tensor, plan: Tensor, scale: float) -> Tensor:
    """x [T, D]; arguments as `prepend_soft_prompts_reference`, last dimensions contiguous."""
    dim = table.shape[1]
    x = torch.empty(plan.shape[0], dim, dtype=table.dtype, device=table.device)
    if x.numel() == 0:
        return x
    block = min(_BLOCK_D, triton.next_power_of_2(dim))
    rounded = torch.tensor(scale, dtype=table.dtype).item()
    _prepend_kernel[(plan.shape[0], triton.cdiv(dim, block))](
        table, soft_rows, plan, x, table.stride(0), soft_rows.stride(0),
        table.shape[0], soft_rows.shape[0], dim, rounded, BLOCK_D=block,
    )  # fmt: skip
    return x


def backward(
    d_x: Tensor, order: Tensor, bounds: Tensor, num_soft_rows: int, dtype: torch.dtype
) -> Tensor:
    """d_soft_rows [R, D]; soft row r occurs in rows `order[bounds[r]:bounds[r + 1]]` of d_x."""
    dim = d_x.shape[1]
    d_soft = torch.empty(num_soft_rows, dim, dtype=dtype, device=d_x.device)
    if d_soft.numel() == 0:
        return d_soft
    block = min(_BLOCK_D, triton.next_power_of_2(dim))
    _prepend_backward_kernel[(num_soft_rows, triton.cdiv(dim, block))](
        d_x.contiguous(), order, bounds, d_soft, dim, BLOCK_D=block
    )
    return d_soft
