"""Triton kernel of `userip_fast.ops.sparse_adam`; the op's module has the formula.

theta, m, v [N, D] fp32 contiguous, step [N] int32, rows [R] int64 distinct, grad [R, D] fp32, bf16
or fp16 contiguous. One program owns a row, so nothing is atomic and the order of rows is free.
The bias corrections are taken in fp64, as 1 - 0.999 would lose three digits in fp32; that is two
exponentials per row. A row out of range is left alone rather than written out of bounds.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sparse_adam_kernel(
    theta_ptr, m_ptr, v_ptr, step_ptr, rows_ptr, grad_ptr, lr, eps, N, D,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr,  # natural; -inf for 0
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    fits = (row >= 0) & (row < N)
    t = tl.load(step_ptr + row, mask=fits, other=0) + 1
    t64 = t.to(tl.float64)
    step_size = (lr / (1.0 - tl.exp(t64 * LOG_BETA1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(t64 * LOG_BETA2)).to(tl.float32)
    width = tl.where(fits, D, 0)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < width
        at = row * D + d
        g = tl.load(grad_ptr + i * D + d, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=mask, other=0.0) * BETA1 + g * (1 - BETA1)
        v = tl.load(v_ptr + at, mask=mask, other=0.0) * BETA2 + g * g * (1 - BETA2)
        theta = tl.load(theta_ptr + at, mask=mask, other=0.0)
        theta -= step_size * m / (tl.sqrt(v) / root + eps)
        tl.store(m_ptr + at, m, mask=mask)
        tl.store(v_ptr + at, v, mask=mask)
        tl.store(theta_ptr + at, theta, mask=mask)
    # Every lane has read the count before any overwrites it.
    tl.debug_barrier()
    tl.store(step_ptr + row, t, mask=fits)


def sparse_adam(
    theta: Tensor, m: Tensor, v: Tensor, step: Tensor, rows: Tensor, grad: Tensor,
    lr: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Launches one program per row."""
    n, dim = theta.shape
    if rows.shape[0] == 0 or dim == 0:
        return
    log1, log2 = (math.log(b) if b > 0 else -math.inf for b in (beta1, beta2))
    _sparse_adam_kernel[(rows.shape[0],)](
        theta, m, v, step, rows.contiguous(), grad.contiguous(), lr, eps, n, dim,
        BETA1=beta1, BETA2=beta2, LOG_BETA1=log1, LOG_BETA2=log2,
        BLOCK_D=min(2048, triton.next_power_of_2(dim)), num_warps=8,
    )  # fmt: skip
